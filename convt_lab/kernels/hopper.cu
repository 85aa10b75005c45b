// No rung of the ladder yet: Hopper's tensor cores (sm_90a), with the accuracy of float32.
//
// One instruction, wgmma, multiplies 64 output channels by 168 pixels for 16 input channels, both
// from shared memory. It takes inputs as [pixel][8 channels] of 16 bits: a pixel is 16 bytes, so a
// tap, which is a shift, is the same matrix from another address on. What was converted once serves
// all taps.
//
// Pixels of a phase (phase.cuh) lie on one flat axis: row after row, with as many columns between
// two rows, and rows between two images, as taps reach beyond an output. So a tap is one distance
// on that axis, wherever rows end. Wide images are cut into stripes.
//
// Float32 is split in two halves: x s = x0 + x1 / 2048, with a power of two s that brings a chunk's
// largest input near 2^14. x0 w0 + (x0 w1 + x1 w0) / 2048 leaves out less than 2^-22 of x w. Tensor
// cores cut off what they sum; so every few taps the sum so far, divided by s, is added to
// registers with rounding. That errs to one side, so it adds up where all products have one sign.
//
// What is not finite, or has eight neighbouring channels too small for their chunk's scale, is
// summed by the definition in a kernel of its own. Of eight channels, small ones keep fewer digits
// if the largest is more than 2^26 times as large.
//
// Warps have roles: eight bring inputs and weights, two groups of four multiply. They hand on
// buffers, and never meet at a barrier of the block.

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "blocking.cuh"
#include "flat.cuh"
#include "phase.cuh"
#include "split_tile.cuh"
#include "wgmma.cuh"

namespace warpgroups {

constexpr int MULTIPLIERS = 2;   // warpgroups that multiply,
constexpr int PRODUCERS = 256;   // threads that bring inputs and weights,
constexpr int CONVERTERS = 224;  // and inputs alone
constexpr int THREADS = PRODUCERS + 128 * MULTIPLIERS;
constexpr int PACKERS = 128;    // threads that pack weights,
constexpr int SCALERS = 512;    // that look for the largest weight of a channel,
constexpr int REPAIRERS = 256;  // and that sum by the definition

constexpr int CO = 64;  // rows of an instruction: output channels,
constexpr int PIXELS = WGMMA_COLUMNS;
constexpr int CI = 16;      // and what is summed
constexpr int OCTET = 8;    // channels of 16 bytes
constexpr int BUFFERS = 2;  // of inputs,
constexpr int RING = 3;     // and of weights
constexpr int MAX_SUBCHUNKS = 4;
constexpr int MAX_STRIPES = 64, NARROW_STRIPE = 32;
constexpr int MAX_PERIOD = 16;    // phases of an axis
constexpr int MAX_REGION = 1100;  // inputs of a tile
constexpr int MAX_SHARED_BYTES = 227 * 1024;

constexpr int PART_BYTES = CO * CI * 2;  // of weights of 64 channels
constexpr int STEP_BYTES = 2 * PART_BYTES;

// Second parts are kept 2^11 times as large, so that they have all their bits: those of values that
// are up to 2^28 times smaller than the largest.
constexpr float SECOND_SCALE = 2048.0f;
constexpr int LARGEST_EXPONENT = 13;
constexpr float TOO_SMALL_TO_SPLIT = 0x1p-10f;

// What outputs of a tile are to be summed again: those that are not finite, or all.
enum Flag : char { NONE, SOME, ALL };

struct Plan {
  int phases_h, phases_w;
  int parts_co;       // of 64 output channels, or of 128 if
  int shares_pixels;  // warpgroups have the same pixels: 0 or 1
  int stripe, stripes;
  int rows, pitch;              // of an image on the flat axis, and from one row to the next
  int step_rows, step_columns;  // that CONVERTERS positions are
  int tiles_f;                  // of the flat axis
  int region;                   // positions that a tile's inputs take
  int subchunks;                // of 16 input channels, of a stage
  int stages;                   // that have all input channels
  int max_steps;                // of a stage: a tap of 16 channels each,
  int slot_steps;               // and of a slot of weights
  unsigned tiles;

  __host__ __device__ __forceinline__ int tile_pixels() const {
    return PIXELS * (MULTIPLIERS - shares_pixels);
  }
  __host__ __device__ __forceinline__ int tile_parts() const { return 1 + shares_pixels; }
  __host__ __device__ __forceinline__ int step_bytes() const { return STEP_BYTES * tile_parts(); }
  __host__ __device__ __forceinline__ int64_t stage_bytes() const {
    return static_cast<int64_t>(max_steps) * step_bytes();
  }
  __host__ __device__ __forceinline__ int octets() const { return 2 * subchunks; }
};

// A tile: some pixels of a phase, for 64 or 128 output channels of a group.
struct Task {
  Phase along_h, along_w;
  int part_co, group;
  int first_column;  // of the stripe
  int first;         // position on the flat axis
  unsigned owner;    // of weights
  int steps;         // of a stage

  __device__ __forceinline__ Task(unsigned number, const Plan& plan, const Axis& rows,
                                  const Axis& columns) {
    part_co = take_digit(number, plan.parts_co);
    const int phase_w = take_digit(number, plan.phases_w);
    const int phase_h = take_digit(number, plan.phases_h);
    first = take_digit(number, plan.tiles_f) * plan.tile_pixels();
    first_column = take_digit(number, plan.stripes) * plan.stripe;
    group = number;
    along_h = phase_of(rows, phase_h);
    along_w = phase_of(columns, phase_w);
    owner = ((group * plan.phases_h + phase_h) * plan.phases_w + phase_w) * plan.parts_co + part_co;
    steps = along_h.taps * along_w.taps * plan.subchunks;
  }
};

// A position on the flat axis.
struct Place {
  int n, row, column;

  __device__ __forceinline__ Place(int position, const Plan& plan) {
    row = position / plan.pitch;
    column = position - row * plan.pitch;
    n = row / plan.rows;
    row -= n * plan.rows;
  }

  // Goes on by less than a row and some whole rows.
  __device__ __forceinline__ void move(int rows, int columns, const Plan& plan) {
    column += columns;
    row += rows;
    if (column >= plan.pitch) {
      column -= plan.pitch;
      ++row;
    }
    while (row >= plan.rows) {
      row -= plan.rows;
      ++n;
    }
  }
};

// ---- Splitting ---------------------------------------------------------------------------------

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

// The power of two that brings `largest` below 2^(LARGEST_EXPONENT + 1), and its inverse; NaN where
// that would leave float32, so that outputs are NaN and are summed again by the definition.
__device__ __forceinline__ void find_scale(float largest, float& scale, float& inverse) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  scale = inverse = 1.0f;
  if (largest == 0.0f) return;
  if (exponent < -110) {
    inverse = not_a_number();
    return;
  }
  scale = __uint_as_float((127 + LARGEST_EXPONENT - exponent) << 23);
  inverse = __uint_as_float((127 - LARGEST_EXPONENT + exponent) << 23);
}

struct Parts {
  uint4 first, second;
  float largest;  // of the magnitudes, rounded
  bool is_zero;   // all of them

  // Whether bits of the values may be lost.
  __device__ __forceinline__ bool is_lossy() const {
    return !is_zero && largest < TOO_SMALL_TO_SPLIT;
  }
};

__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ __forceinline__ Parts split(const float (&values)[OCTET], float scale) {
  uint32_t first[OCTET / 2], second[OCTET / 2], bits = 0;
  __half2 largest = __float2half2_rn(0.0f);
#pragma unroll
  for (int i = 0; i < OCTET / 2; ++i) {
    const float a = values[2 * i] * scale, b = values[2 * i + 1] * scale;
    const __half2 pair = __floats2half2_rn(a, b);
    const float2 rounded = __half22float2(pair);
    first[i] = bits_of(pair);
    second[i] =
        bits_of(__floats2half2_rn((a - rounded.x) * SECOND_SCALE, (b - rounded.y) * SECOND_SCALE));
    largest = __hmax2(largest, __habs2(pair));
    bits |= __float_as_uint(a) | __float_as_uint(b);
  }
  return {make_uint4(first[0], first[1], first[2], first[3]),
          make_uint4(second[0], second[1], second[2], second[3]),
          __half2float(__hmax(__low2half(largest), __high2half(largest))), bits << 1 == 0};
}

// ---- Weights -----------------------------------------------------------------------------------

// Finds the inverse of the scale of each output channel's weights, and clears the flags of tiles.
__global__ void __launch_bounds__(SCALERS)
    hopper_scale_kernel(const float* __restrict__ weight, float* __restrict__ inverses,
                        char* __restrict__ flags, unsigned tiles, ConvTransposeProblem p) {
  __shared__ unsigned largest;
  for (unsigned i = blockIdx.x * SCALERS + threadIdx.x; i < tiles; i += gridDim.x * SCALERS) {
    flags[i] = NONE;
  }
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  const int group_out = p.out_channels / p.groups, group_in = p.in_channels / p.groups;
  const int filter_size = p.kernel_h * p.kernel_w;
  const int group = blockIdx.x / group_out, co = blockIdx.x % group_out;
  const float* const from =
      weight + (static_cast<int64_t>(group) * group_in * group_out + co) * filter_size;
  unsigned mine = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < group_in * filter_size; i += SCALERS) {
    const int64_t ci = i / filter_size;
    const float value = fabsf(from[ci * group_out * filter_size + i % filter_size]);
    if (value <= FLT_MAX) mine = max(mine, __float_as_uint(value));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine = max(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, lanes));
  }
  if (threadIdx.x % 32 == 0) atomicMax(&largest, mine);
  __syncthreads();
  float scale, inverse;
  find_scale(__uint_as_float(largest), scale, inverse);
  if (threadIdx.x == 0) inverses[blockIdx.x] = inverse;
}

// Packs weights as [group, phase_h, phase_w, part_co, stage, step, 64 of 128 channels, part, half
// of 16 input channels, output channel, input channel]. Steps go over sub-chunks, and then over
// taps in the order of the inputs that they meet.
__global__ void __launch_bounds__(PACKERS)
    hopper_pack_kernel(const float* __restrict__ weight, float* __restrict__ inverses,
                       char* __restrict__ packed, ConvTransposeProblem p, Axis rows, Axis columns,
                       Plan plan, int blocks) {
  unsigned digits = blockIdx.x;
  const int block = take_digit(digits, blocks);
  const unsigned owner = digits;
  const int part_co = take_digit(digits, plan.parts_co);
  const Phase along_w = phase_of(columns, take_digit(digits, plan.phases_w));
  const Phase along_h = phase_of(rows, take_digit(digits, plan.phases_h));
  const int group = digits;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int taps = along_h.taps * along_w.taps, filter_size = p.kernel_h * p.kernel_w;

  unsigned number = block * PACKERS + threadIdx.x;  // of an octet
  const int row = take_digit(number, CO), half = take_digit(number, 2);
  const int part = take_digit(number, plan.tile_parts());
  const int step = take_digit(number, plan.max_steps), stage = number;
  if (step >= taps * plan.subchunks || stage >= plan.stages) return;
  const int tap_h = along_h.taps - 1 - step % taps / along_w.taps;
  const int tap_w = along_w.taps - 1 - step % taps % along_w.taps;
  const int co = (part_co * plan.tile_parts() + part) * CO + row;
  const int first_ci = (stage * plan.subchunks + step / taps) * CI + half * OCTET;
  const float* const from =
      weight +
      ((static_cast<int64_t>(group) * group_in + first_ci) * group_out + co) * filter_size +
      (along_h.k + tap_h * rows.k_step) * p.kernel_w + along_w.k + tap_w * columns.k_step;
  float values[OCTET] = {}, inverse = 1.0f;
  if (co < group_out) {
    inverse = inverses[group * group_out + co];
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
      if (first_ci + i < group_in) {
        values[i] = from[static_cast<int64_t>(i) * group_out * filter_size];
      }
    }
  }
  const Parts parts = split(values, inverse == inverse ? 1.0f / inverse : 1.0f);
  // All that the channel's weights make is summed again then.
  if (parts.is_lossy()) inverses[group * group_out + co] = not_a_number();
  char* const to = packed +
                   (static_cast<int64_t>(owner) * plan.stages + stage) * plan.stage_bytes() +
                   (step * plan.tile_parts() + part) * STEP_BYTES + (half * CO + row) * 16;
  *reinterpret_cast<uint4*>(to) = parts.first;
  *reinterpret_cast<uint4*>(to + PART_BYTES) = parts.second;
}

// ---- Shared memory -----------------------------------------------------------------------------

// Which of some buffers comes next, and whether all were used an odd number of times.
struct Turn {
  int index = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void next(int count) {
    if (++index == count) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Buffers are full or empty in turn; of weights a buffer is a slot.
struct Barriers {
  uint64_t inputs_full[BUFFERS], inputs_empty[BUFFERS];
  uint64_t weights_full[RING], weights_empty[RING];
  float inverses[BUFFERS];  // of the scales of inputs
  unsigned largest;         // of a stage's inputs
};

struct Shared {
  Barriers* barriers;
  char* inputs;   // [buffer, part, octet, position], 16 bytes each
  char* weights;  // [slot, step, ...]
  int* places;    // of inputs in the tile's images, or -1

  static constexpr int HEAD_BYTES = (sizeof(Barriers) + 127) / 128 * 128;

  __device__ __forceinline__ Shared(char* memory, const Plan& plan)
      : barriers(reinterpret_cast<Barriers*>(memory)),
        inputs(memory + HEAD_BYTES),
        weights(inputs + BUFFERS * 2 * part_bytes(plan)),
        places(reinterpret_cast<int*>(weights + RING * slot_bytes(plan))) {}

  __host__ __device__ __forceinline__ static int part_bytes(const Plan& plan) {
    return plan.octets() * plan.region * 16;
  }
  __host__ __device__ __forceinline__ static int slot_bytes(const Plan& plan) {
    return plan.slot_steps * plan.step_bytes();
  }
  static int64_t bytes(const Plan& plan) {
    return HEAD_BYTES + BUFFERS * 2 * static_cast<int64_t>(part_bytes(plan)) +
           RING * slot_bytes(plan) + plan.region * static_cast<int64_t>(sizeof(int));
  }
};

#if HAS_WGMMA

// ---- Roles -------------------------------------------------------------------------------------

constexpr int BATCH = 2;    // octets that a thread loads at once
constexpr int ROUNDED = 4;  // steps after which sums are rounded
// Of a stage's largest input: then its scale is found anew.
constexpr float TOO_LARGE = 0x1p15f, TOO_SMALL = 0x1p8f;

// One thread asks for the weights of all tiles, slot after slot.
__device__ __forceinline__ void bring_weights(const Shared& shared, const char* packed,
                                              const Plan& plan, const Axis& rows,
                                              const Axis& columns) {
  Barriers& barriers = *shared.barriers;
  Turn turn;
  for (unsigned tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const Task task(tile, plan, rows, columns);
    const char* from = packed + static_cast<int64_t>(task.owner) * plan.stages * plan.stage_bytes();
    for (int stage = 0; stage < plan.stages; ++stage, from += plan.stage_bytes()) {
      for (int step = 0; step < task.steps; step += plan.slot_steps) {
        wait(&barriers.weights_empty[turn.index], turn.parity ^ 1);
        copy_bulk(shared.weights + turn.index * Shared::slot_bytes(plan),
                  from + step * plan.step_bytes(),
                  min(plan.slot_steps, task.steps - step) * plan.step_bytes(),
                  &barriers.weights_full[turn.index]);
        turn.next(RING);
      }
    }
  }
}

// A load that stays where it is: the compiler would move it to where its value is used.
__device__ __forceinline__ float load(const float* from) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}

// Calls visit(values, i, exists) for those of a stage's octets that are the thread's; the i-th is
// one of [octet, position]. All loads of a batch are under way at once: for what does not exist,
// something else is read. Channels that do not exist are copies of the last that does, and meet
// weights of zero.
template <bool WHOLE, class Visit>
__device__ __forceinline__ void for_each_octet(const float* __restrict__ planes, const int* places,
                                               int thread, const Plan& plan, int channels,
                                               int plane, const Visit& visit) {
  const int count = plan.octets() * plan.region;
  int position = thread, channel = 0;
#pragma unroll 1
  for (int first = thread; first < count; first += BATCH * CONVERTERS) {
    float values[BATCH][OCTET];
    bool exists[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      while (position >= plan.region) {
        position -= plan.region;
        channel += OCTET;
      }
      const int place = places[position];
      exists[i] = place >= 0;
      // Past the last octet, the last one is read again.
      const int last = WHOLE ? (plan.octets() - 1) * OCTET : channels - 1;
      int x = max(place, 0) + (WHOLE ? min(channel, last) * plane : 0);
#pragma unroll
      for (int c = 0; c < OCTET; ++c, x += WHOLE ? plane : 0) {
        values[i][c] = load(planes + (WHOLE ? x : x + min(channel + c, last) * plane));
      }
      position += CONVERTERS;
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (first + i * CONVERTERS < count) visit(values[i], first + i * CONVERTERS, exists[i]);
    }
  }
}

// Converts inputs, stage after stage.
__device__ __forceinline__ void bring_inputs(const Shared& shared, const float* __restrict__ input,
                                             const ConvTransposeProblem& p, const Plan& plan,
                                             const Axis& rows, const Axis& columns, int thread) {
  constexpr int MEETING = 1;  // barrier of the converters
  Barriers& barriers = *shared.barriers;
  const int group_in = p.in_channels / p.groups;
  const int plane = p.height * p.width;  // it and all offsets in a tile's images fit
  float scale = 1.0f, inverse = 1.0f;
  Turn turn;
  for (unsigned tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const Task task(tile, plan, rows, columns);
    if (task.steps == 0) continue;
    const int first_n = Place(task.first, plan).n;
    any_of<MEETING, CONVERTERS>(false);  // nobody needs the places of the tile before any more
    Place at(task.first + thread, plan);
#pragma unroll 1
    for (int i = thread; i < plan.region; i += CONVERTERS) {
      const int h = task.along_h.start + at.row - (task.along_h.taps - 1);
      const int w = task.along_w.start + task.first_column + at.column - (task.along_w.taps - 1);
      const bool exists =
          at.n < p.batch && h >= 0 && h < task.along_h.size && w >= 0 && w < task.along_w.size;
      const int place = (at.n - first_n) * p.in_channels * plane +
                        (h * rows.i_step + task.along_h.residue) * p.width + w * columns.i_step +
                        task.along_w.residue;
      shared.places[i] = exists ? place : -1;
      at.move(plan.step_rows, plan.step_columns, plan);
    }
    any_of<MEETING, CONVERTERS>(false);
    const float* planes =
        input + (static_cast<int64_t>(first_n) * p.in_channels + task.group * group_in) * plane;
    for (int channels = group_in; channels > 0; channels -= plan.subchunks * CI) {
      const auto for_all = [&](const auto& visit) {
        if (channels >= plan.subchunks * CI) {
          for_each_octet<true>(planes, shared.places, thread, plan, channels, plane, visit);
        } else {
          for_each_octet<false>(planes, shared.places, thread, plan, channels, plane, visit);
        }
      };
      wait(&barriers.inputs_empty[turn.index], turn.parity ^ 1);
      char* const to = shared.inputs + turn.index * 2 * Shared::part_bytes(plan);
      float largest;
      bool is_lossy;
      const auto convert = [&] {
        largest = 0.0f;
        is_lossy = false;
        for_all([&](const float (&values)[OCTET], int i, bool exists) {
          // Should zero times what was read be NaN, outputs are only summed again.
          const Parts parts = split(values, exists ? scale : 0.0f);
          largest = fmaxf(largest, parts.largest);
          is_lossy |= parts.is_lossy();
          *reinterpret_cast<uint4*>(to + i * 16) = parts.first;
          *reinterpret_cast<uint4*>(to + Shared::part_bytes(plan) + i * 16) = parts.second;
        });
        show_tensor_cores();
      };
      // With the scale of the stage before, which is right most of the time.
      convert();
      const bool is_bad = any_of<MEETING, CONVERTERS>(largest >= TOO_LARGE || is_lossy);
      if (!any_of<MEETING, CONVERTERS>(largest >= TOO_SMALL) || is_bad) {
        if (thread == 0) barriers.largest = 0;
        any_of<MEETING, CONVERTERS>(false);
        unsigned finite = 0;  // infinities do not count
        for_all([&](const float (&values)[OCTET], int, bool exists) {
#pragma unroll
          for (int c = 0; c < OCTET; ++c) {
            const float value = fabsf(values[c]);
            if (exists && value <= FLT_MAX) finite = max(finite, __float_as_uint(value));
          }
        });
        atomicMax(&barriers.largest, __reduce_max_sync(0xFFFFFFFFu, finite));
        any_of<MEETING, CONVERTERS>(false);
        find_scale(__uint_as_float(barriers.largest), scale, inverse);
        convert();
        if (any_of<MEETING, CONVERTERS>(is_lossy)) inverse = not_a_number();
      }
      if (thread == 0) {
        barriers.inverses[turn.index] = inverse;
        arrive(&barriers.inputs_full[turn.index]);
      }
      if (!(inverse == inverse)) scale = inverse = 1.0f;  // that was for this stage alone
      turn.next(BUFFERS);
      planes += static_cast<int64_t>(plan.subchunks * CI) * plane;
    }
  }
}

// Multiplies. The warpgroups take turns: while the products of one are on their way, the other adds
// what it has to its sums.
__device__ __forceinline__ void multiply_tiles(const Shared& shared, int warpgroup,
                                               const float* __restrict__ bias,
                                               const float* __restrict__ inverses,
                                               float* __restrict__ output, char* flags,
                                               const ConvTransposeProblem& p, const Plan& plan,
                                               const Axis& rows, const Axis& columns) {
  constexpr int TURN = 2;  // barrier of the first warpgroup's turn; the next is the second's
  Barriers& barriers = *shared.barriers;
  const int first_pixel = plan.shares_pixels ? 0 : warpgroup * PIXELS;
  const int first_part = plan.shares_pixels ? warpgroup : 0;
  const bool is_first_lane = threadIdx.x % 32 == 0;
  if (warpgroup == 1) let_go<128 * MULTIPLIERS>(TURN);
  Turn inputs_turn, weights_turn;
  for (unsigned tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    Product sum;
#pragma unroll
    for (int i = 0; i < PIXELS / 2; ++i) sum[i] = 0.0f;
    {
      const Task task(tile, plan, rows, columns);
      const int taps_w = task.along_w.taps, taps_h = task.along_h.taps;
      // In 16 bytes, as all addresses here.
      const int next_row = plan.pitch - taps_w;
      const int next_subchunk = 2 * plan.region - taps_h * plan.pitch;
      const int second_b = plan.octets() * plan.region, second_a = PART_BYTES / 16;
      const int next_a = plan.step_bytes() / 16;
      for (int stage = 0; stage < plan.stages && task.steps > 0; ++stage) {
        wait(&barriers.inputs_full[inputs_turn.index], inputs_turn.parity);
        const float inverse = barriers.inverses[inputs_turn.index];
        uint32_t b =
            address_of(shared.inputs) / 16 + inputs_turn.index * 2 * second_b + first_pixel;
        int tap_w = 0, tap_h = 0;
        Product part;
        for (int step = 0; step < task.steps; step += plan.slot_steps) {
          wait(&barriers.weights_full[weights_turn.index], weights_turn.parity);
          const uint32_t a =
              (address_of(shared.weights) + weights_turn.index * Shared::slot_bytes(plan) +
               first_part * STEP_BYTES) /
              16;
          const int count = min(plan.slot_steps, task.steps - step);
          // Sums up the products of steps from number `begin` of the slot on to number `end`.
          const auto sum_up = [&](int begin, int end, const auto& first, const auto& others) {
            const auto go_on = [&] {
              ++b;
              if (++tap_w == taps_w) {
                tap_w = 0;
                b += next_row;
                if (++tap_h == taps_h) {
                  tap_h = 0;
                  b += next_subchunk;
                }
              }
            };
            wait_turn<128 * MULTIPLIERS>(TURN + warpgroup);
            begin_products();
            first(a + begin * next_a, b);
            go_on();
#pragma unroll 1
            for (int i = begin + 1; i < end; ++i) {
              others(a + i * next_a, b);
              go_on();
            }
            send_products();
            let_go<128 * MULTIPLIERS>(TURN + 1 - warpgroup);
            finish_products(part);
          };
          const auto add_to_sum = [&] {
#pragma unroll
            for (int i = 0; i < PIXELS / 2; ++i) sum[i] = fmaf(part[i], inverse, sum[i]);
          };
          const auto multiply_large = [&](uint32_t w, uint32_t x) {
            multiply(part, descriptor(w, CO), descriptor(x, plan.region));
          };
          // First the small products. The large ones of the first steps go on from their sum.
          const int3 here = make_int3(b, tap_w, tap_h);
          sum_up(
              0, count,
              [&](uint32_t w, uint32_t x) {
                multiply_first(part, descriptor(w + second_a, CO), descriptor(x, plan.region));
                multiply(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
              },
              [&](uint32_t w, uint32_t x) {
                multiply(part, descriptor(w + second_a, CO), descriptor(x, plan.region));
                multiply(part, descriptor(w, CO), descriptor(x + second_b, plan.region));
              });
          b = here.x;
          tap_w = here.y;
          tap_h = here.z;
#pragma unroll
          for (int i = 0; i < PIXELS / 2; ++i) part[i] *= 1.0f / SECOND_SCALE;
          int done = min(ROUNDED, count);
          sum_up(0, done, multiply_large, multiply_large);
          add_to_sum();
          for (; done < count; done += ROUNDED) {
            sum_up(
                done, min(done + ROUNDED, count),
                [&](uint32_t w, uint32_t x) {
                  multiply_first(part, descriptor(w, CO), descriptor(x, plan.region));
                },
                multiply_large);
            add_to_sum();
          }
          if (is_first_lane) arrive(&barriers.weights_empty[weights_turn.index]);
          weights_turn.next(RING);
        }
        if (is_first_lane) arrive(&barriers.inputs_empty[inputs_turn.index]);
        inputs_turn.next(BUFFERS);
      }
    }

    const Task task(tile, plan, rows, columns);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group_out = p.out_channels / p.groups;
    const int first_co =
        (task.part_co * plan.tile_parts() + first_part) * CO + threadIdx.x % 128 / 32 * 16 + g;
    const bool has_upper = first_co < group_out, has_lower = first_co + 8 < group_out;
    const int period_h = period_of(rows), period_w = period_of(columns);
    const int64_t plane = static_cast<int64_t>(p.out_height) * p.out_width;
    const int last_column = min(plan.stripe, task.along_w.count - task.first_column);
    float factors[2], shifts[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int co = task.group * group_out + first_co + 8 * i;
      const bool exists = first_co + 8 * i < group_out;
      factors[i] = exists ? inverses[co] : 0.0f;
      shifts[i] = exists && bias != nullptr ? bias[co] : -0.0f;
    }
    float zeros[4] = {factors[0] * 0.0f, factors[1] * 0.0f};  // or NaN
#pragma unroll
    for (int i = 0; i < PIXELS / 2; ++i) zeros[i % 4] = fmaf(sum[i], 0.0f, zeros[i % 4]);
    // Infinities, or numbers too far apart: another kernel looks at them.
    if (!(zeros[0] + zeros[1] + zeros[2] + zeros[3] == 0.0f)) flags[tile] = SOME;

    Place at(task.first + first_pixel + 2 * t, plan);
    float* y;  // where column 0 of the row would lie
    int columns_left;
    const auto begin_row = [&] {
      const int64_t image = static_cast<int64_t>(at.n) * p.out_channels + task.group * group_out;
      y = output + (image + first_co) * plane +
          static_cast<int64_t>(task.along_h.first + at.row * period_h) * p.out_width +
          task.along_w.first + task.first_column * period_w;
      columns_left = at.n < p.batch && at.row < task.along_h.count ? last_column : 0;
    };
    begin_row();
    const auto store_all = [&](auto in_pairs) {
#pragma unroll
      for (int j = 0; j < PIXELS / 8; ++j) {
        float* const upper = y + at.column * period_w;
        float* const lower = upper + 8 * plane;
        const float a = fmaf(sum[4 * j], factors[0], shifts[0]);
        const float b = fmaf(sum[4 * j + 1], factors[0], shifts[0]);
        const float c = fmaf(sum[4 * j + 2], factors[1], shifts[1]);
        const float d = fmaf(sum[4 * j + 3], factors[1], shifts[1]);
        const bool exists = at.column < columns_left, has_second = at.column + 1 < columns_left;
        if constexpr (decltype(in_pairs)::value) {
          if (exists && has_upper) *reinterpret_cast<float2*>(upper) = make_float2(a, b);
          if (exists && has_lower) *reinterpret_cast<float2*>(lower) = make_float2(c, d);
        } else {
          if (exists && has_upper) upper[0] = a;
          if (has_second && has_upper) upper[period_w] = b;
          if (exists && has_lower) lower[0] = c;
          if (has_second && has_lower) lower[period_w] = d;
        }
        at.column += 8;
        if (at.column >= plan.pitch) {
          do {
            at.move(1, -plan.pitch, plan);
          } while (at.column >= plan.pitch);
          begin_row();
        }
      }
    };
    // In pairs, there is no single output at the end of a row.
    if (period_w == 1 && p.out_width % 2 == 0 && reinterpret_cast<uintptr_t>(output) % 8 == 0) {
      store_all(std::true_type{});
    } else {
      store_all(std::false_type{});
    }
  }
}

#endif  // HAS_WGMMA

__global__ void __launch_bounds__(THREADS, 1)
    hopper_kernel(const float* __restrict__ input, const float* __restrict__ bias,
                  const float* __restrict__ inverses, const char* __restrict__ packed,
                  float* __restrict__ output, char* flags, ConvTransposeProblem p, Axis rows,
                  Axis columns, Plan plan) {
#if HAS_WGMMA
  extern __shared__ __align__(128) char memory[];
  const Shared shared(memory, plan);
  if (threadIdx.x == 0) {
    for (int i = 0; i < BUFFERS; ++i) {
      initialise(&shared.barriers->inputs_full[i], 1);
      initialise(&shared.barriers->inputs_empty[i], 4 * MULTIPLIERS);
    }
    for (int i = 0; i < RING; ++i) {
      initialise(&shared.barriers->weights_full[i], 1);
      initialise(&shared.barriers->weights_empty[i], 4 * MULTIPLIERS);
    }
    show_tensor_cores();
  }
  __syncthreads();
  constexpr int MULTIPLIER_REGISTERS = 184, PRODUCER_REGISTERS = 72;  // 65536 in all
  // The same in all lanes, and the compiler is to know it.
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (warpgroup < PRODUCERS / 128) {
    keep_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < CONVERTERS) {
      bring_inputs(shared, input, p, plan, rows, columns, threadIdx.x);
    } else if (threadIdx.x == CONVERTERS) {
      bring_weights(shared, packed, plan, rows, columns);
    }
  } else {
    take_registers<MULTIPLIER_REGISTERS>();
    multiply_tiles(shared, warpgroup - PRODUCERS / 128, bias, inverses, output, flags, p, plan,
                   rows, columns);
  }
#else
  // Not compiled for Hopper: the definition has to do.
  if (threadIdx.x > 0) return;
  for (unsigned tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) flags[tile] = ALL;
#endif
}

// Sums outputs again, by the definition: those of tiles that have a flag.
__global__ void __launch_bounds__(REPAIRERS, 2)
    hopper_repair_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                         const float* __restrict__ bias, float* __restrict__ output,
                         const char* __restrict__ flags, ConvTransposeProblem p, Axis rows,
                         Axis columns, Plan plan) {
  const int group_out = p.out_channels / p.groups;
  const int pixels = plan.tile_pixels(), count_co = CO * plan.tile_parts();
  for (unsigned tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const char flag = flags[tile];
    if (flag == NONE) continue;
    const Task task(tile, plan, rows, columns);
    for (int i = threadIdx.x; i < count_co * pixels; i += REPAIRERS) {
      const Place at(task.first + i % pixels, plan);
      const int co = task.part_co * count_co + i / pixels, column = task.first_column + at.column;
      if (co >= group_out || at.n >= p.batch || at.row >= task.along_h.count ||
          at.column >= plan.stripe || column >= task.along_w.count) {
        continue;
      }
      const int oh = task.along_h.first + at.row * period_of(rows);
      const int ow = task.along_w.first + column * period_of(columns);
      const int channel = task.group * group_out + co;
      if (flag == ALL) {
        output[tensor::place_of_output<false>(p, at.n, channel, oh, ow)] = not_a_number();
      }
      tensor::sum_again<false>(output, input, weight, bias, p, rows, columns, at.n, channel, oh,
                               ow);
    }
  }
}

// ---- Launch ------------------------------------------------------------------------------------

inline int64_t most_outputs(const Axis& axis) { return (axis.out_size - 1) / period_of(axis) + 1; }

// Bounded are what must fit into shared memory, and what is counted in 32 bits. With few channels
// most of the tensor cores' work would be in vain. convt_lab/stages.py says the same.
inline bool covers(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns) {
  if (has_more_phases(rows, MAX_PERIOD) || has_more_phases(columns, MAX_PERIOD)) return false;
  const int64_t taps_h = most_taps(rows), taps_w = most_taps(columns);
  const int64_t count_h = most_outputs(rows), count_w = most_outputs(columns);
  const int64_t images = MAX_REGION / (count_h * count_w) + 3;  // of a tile
  const auto fits = [](double count) { return count < 2147000000.0; };
  return p.in_channels / p.groups >= CI && p.out_channels / p.groups >= CI &&
         (taps_h - 1) * (taps_w + NARROW_STRIPE + 1) + taps_w <= 700 &&
         fits(1.0 * images * p.in_channels * p.height * p.width) &&
         fits(2.0 * p.batch * (count_h + taps_h) * (count_w + taps_w + 2));
}

// Cuts images into so many stripes; returns whether a tile's inputs fit into shared memory.
inline bool cut(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns, int stripes,
                Plan& plan) {
  const int taps_h = most_taps(rows), taps_w = most_taps(columns);
  const int64_t width = ceil_div(most_outputs(columns), stripes);
  plan.stripe = static_cast<int>(ceil_div(width, 2) * 2);  // pairs of outputs stay together
  plan.pitch = static_cast<int>(ceil_div(plan.stripe + taps_w - 1, 2) * 2);
  plan.rows = static_cast<int>(most_outputs(rows)) + taps_h - 1;
  plan.stripes = static_cast<int>(ceil_div(most_outputs(columns), plan.stripe));
  plan.step_rows = CONVERTERS / plan.pitch;
  plan.step_columns = CONVERTERS % plan.pitch;
  const int64_t reach = static_cast<int64_t>(taps_h - 1) * plan.pitch + taps_w - 1;
  if (plan.tile_pixels() + reach > MAX_REGION) return false;
  plan.region = static_cast<int>(plan.tile_pixels() + reach);
  const int64_t flat = static_cast<int64_t>(p.batch) * plan.rows * plan.pitch;
  plan.tiles_f = static_cast<int>(ceil_div(flat, plan.tile_pixels()));
  plan.tiles = static_cast<unsigned>(plan.tiles_f) * plan.stripes * plan.phases_h * plan.phases_w *
               plan.parts_co * p.groups;
  // Stripes may be so narrow that a tile has parts of many images.
  const int64_t images = plan.region / (static_cast<int64_t>(plan.rows) * plan.pitch) + 2;
  const double offsets = 1.0 * images * p.in_channels * p.height * p.width;
  return offsets <= INT32_MAX && Shared::bytes(plan) <= MAX_SHARED_BYTES;
}

// Fills a plan; returns whether the problem is one for this kernel.
inline bool make_plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                      Plan& plan) {
  if (!covers(p, rows, columns)) return false;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  plan.phases_h = min(period_of(rows), p.out_height);
  plan.phases_w = min(period_of(columns), p.out_width);
  plan.shares_pixels = group_out > CO;
  plan.parts_co = static_cast<int>(ceil_div(group_out, CO * plan.tile_parts()));
  const int taps = most_taps(rows) * most_taps(columns);
  const int chunks = static_cast<int>(ceil_div(group_in, CI));
  // A stage has some steps, if it can be.
  plan.subchunks = 1;
  const int most = plan.shares_pixels ? MAX_SUBCHUNKS : MAX_SUBCHUNKS / 2;
  while (taps * plan.subchunks < 3 && plan.subchunks < min(most, chunks)) plan.subchunks *= 2;
  for (; plan.subchunks >= 1; plan.subchunks /= 2) {
    plan.stages = static_cast<int>(ceil_div(chunks, plan.subchunks));
    plan.max_steps = taps * plan.subchunks;
    const int64_t slots = ceil_div(plan.max_steps, plan.shares_pixels ? 4 : 7);
    plan.slot_steps = static_cast<int>(ceil_div(plan.max_steps, slots));
    Plan best = plan;
    double least = DBL_MAX;
    const auto try_stripes = [&](int stripes) {
      if (!cut(p, rows, columns, stripes, plan)) return;
      // Cycles of a stage: of the tensor cores, and of the converters.
      const double multiplying = PIXELS / 2 * 3.0 * MULTIPLIERS * plan.max_steps;
      const double converting = 300.0 * plan.region * plan.octets() / CONVERTERS;
      const double cost = plan.tiles * max(multiplying, converting);
      if (cost >= least) return;
      least = cost;
      best = plan;
    };
    const int64_t width = most_outputs(columns);
    for (int stripes = 1; stripes <= min(width, static_cast<int64_t>(MAX_STRIPES)); ++stripes) {
      try_stripes(stripes);
    }
    try_stripes(static_cast<int>(ceil_div(width, NARROW_STRIPE)));
    plan = best;
    if (least < DBL_MAX) return true;
  }
  return false;
}

// The packed weights: inverses of scales, weights, flags of tiles.
struct Packed {
  int64_t owners, inverses_bytes, weights_bytes, bytes;

  Packed(const ConvTransposeProblem& p, const Plan& plan)
      : owners(static_cast<int64_t>(p.groups) * plan.phases_h * plan.phases_w * plan.parts_co),
        inverses_bytes(ceil_div(p.out_channels, 64) * 256),
        weights_bytes(owners * plan.stages * plan.stage_bytes()),
        bytes(inverses_bytes + weights_bytes + plan.tiles) {}
};

inline int64_t packed_bytes(const ConvTransposeProblem& p) {
  Plan plan = {};
  return make_plan(p, rows_of(p), columns_of(p), plan) ? Packed(p, plan).bytes : -1;
}

inline cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          void* memory, const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  if (!make_plan(p, rows, columns, plan)) return cudaErrorInvalidValue;
  const Packed packed(p, plan);
  const int64_t octets =
      static_cast<int64_t>(plan.stages) * plan.max_steps * plan.tile_parts() * CO * 2;
  const int64_t packers = ceil_div(octets, PACKERS);
  if (octets > INT32_MAX || packers * packed.owners > INT32_MAX) return cudaErrorInvalidValue;
  const int shared_bytes = static_cast<int>(Shared::bytes(plan));
  const cudaError_t error = cudaFuncSetAttribute(
      hopper_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;

  float* const inverses = static_cast<float*>(memory);
  char* const weights = static_cast<char*>(memory) + packed.inverses_bytes;
  char* const flags = weights + packed.weights_bytes;
  hopper_scale_kernel<<<static_cast<unsigned>(p.out_channels), SCALERS, 0, stream>>>(
      weight, inverses, flags, plan.tiles, p);
  hopper_pack_kernel<<<static_cast<unsigned>(packers * packed.owners), PACKERS, 0, stream>>>(
      weight, inverses, weights, p, rows, columns, plan, static_cast<int>(packers));
  // Blocks stay, and take one tile after the other.
  const unsigned blocks = min(plan.tiles, static_cast<unsigned>(multiprocessors()));
  hopper_kernel<<<blocks, THREADS, shared_bytes, stream>>>(input, bias, inverses, weights, output,
                                                           flags, p, rows, columns, plan);
  hopper_repair_kernel<<<blocks, REPAIRERS, 0, stream>>>(input, weight, bias, output, flags, p,
                                                         rows, columns, plan);
  return cudaGetLastError();
}

}  // namespace warpgroups

extern "C" std::int64_t hopper_packed_bytes(ConvTransposeProblem p) {
  return warpgroups::packed_bytes(p);
}

extern "C" cudaError_t hopper(const float* input, const float* weight, const float* bias,
                              float* output, void* packed, ConvTransposeProblem p,
                              cudaStream_t stream) {
  return warpgroups::launch(input, weight, bias, output, packed, p, stream);
}
