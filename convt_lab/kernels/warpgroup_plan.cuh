// How the kernels for Hopper's tensor cores cut their work.
//
// Pixels of a phase (phase.cuh) lie on one flat axis: row after row, with as many columns between
// two rows, and rows between two images, as taps reach beyond an output. So a tap is one distance
// on that axis, wherever rows end. Wide images are cut into stripes.
//
// A task is some pixels of a phase, or of two neighbouring phases of rows, for 64 or 128 output
// channels. All phases, and all output channels, meet the same inputs: where shared memory holds
// those of all input channels, tasks are done in bundles that share them.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "blocking.cuh"
#include "flat.cuh"
#include "phase.cuh"
#include "storage.cuh"

namespace warpgroups {

constexpr int MULTIPLIERS = 2;   // warpgroups that multiply,
constexpr int PRODUCERS = 256;   // threads that bring inputs and weights,
constexpr int CONVERTERS = 224;  // and inputs alone
constexpr int THREADS = PRODUCERS + 128 * MULTIPLIERS;
constexpr int PACKERS = 256;    // threads that pack weights,
constexpr int SCALERS = 512;    // that look for the largest weight of a channel,
constexpr int REPAIRERS = 256;  // and that sum by the definition

constexpr int CO = 64;          // rows of an instruction: output channels,
constexpr int CI = 16;          // and what is summed
constexpr int OCTET = 8;        // channels of 16 bytes
constexpr int MAX_BUFFERS = 8;  // of inputs
constexpr int RING = 3;         // of weights
constexpr int MAX_SUBCHUNKS = 4;
constexpr int MAX_STRIPES = 64, NARROW_STRIPE = 32;
constexpr int MAX_PERIOD = 16;  // phases of an axis
constexpr int MAX_REACH = 700;  // of a tile's taps beyond its pixels, in narrow stripes
constexpr int MAX_SHARED_BYTES = 227 * 1024;

constexpr int PART_BYTES = CO * CI * 2;  // of weights of 64 channels

// Second parts are kept 2^11 times as large, so that they have all their bits: those of values that
// are up to 2^28 times smaller than the largest.
constexpr float SECOND_SCALE = 2048.0f;
constexpr int LARGEST_EXPONENT = 13;

// What outputs of a tile are to be summed again: those that are not finite, or all.
enum Flag : char { NONE, SOME, ALL };

// How values are multiplied: input, weight and output are of type T, and channels come last if LAST
// is set. Float32 is multiplied as one or as the sum of two float16. Tasks have so many phases.
template <class T, bool LAST, int PARTS_, int PIXELS_, int MIN_PAIR_, int MAX_PAIR_>
struct Method {
  using Value = T;
  using Part = std::conditional_t<std::is_same_v<T, float>, __half, T>;
  static constexpr bool IS_LAST = LAST;
  static constexpr bool IS_SCALED = std::is_same_v<T, float>;
  static constexpr int PARTS = PARTS_;
  static constexpr int PRODUCTS = PARTS == 2 ? 3 : 1;
  static constexpr int PIXELS = PIXELS_;  // columns of an instruction
  static constexpr int MAX_REGION = PARTS == 2 ? 1100 : 1700;
  static constexpr double MAX_COUNT = 2147000000.0;  // of what a launch counts in 32 bits
  static constexpr int STEP_BYTES = PARTS * PART_BYTES;
  // Whether warpgroups with the same weights are brought them together. Else each goes its own way.
  static constexpr bool SHARES_WEIGHTS = PARTS == 2;
  static constexpr int SUPPLIES = SHARES_WEIGHTS ? 1 : MULTIPLIERS;  // of weights
  static constexpr int SLOT_BYTES = SHARES_WEIGHTS ? 28 * 1024 : 10 * 1024;
  // Of a thread that multiplies, so that none is spilled; one that converts has what is left of
  // 256.
  static constexpr int MULTIPLIER_REGISTERS = PARTS == 1       ? 152
                                              : MAX_PAIR_ == 2 ? 160
                                              : LAST           ? 176
                                                               : 168;
  static constexpr int UNIT = LAST ? 1 : 2;  // neighbours in a row that are read at once
  static constexpr int MIN_PAIR = MIN_PAIR_, MAX_PAIR = MAX_PAIR_;
  // An octet whose largest value is smaller may lose bits.
  static constexpr float TOO_SMALL_TO_SPLIT = PARTS == 2 ? 0x1p-10f : 0x1p-13f;
  // What an octet costs a thread in the model by which plans are chosen (cost_of), in cycles. Lines
  // of the cache count if channels come last, here with two octets of a pixel in a stage.
  static constexpr double CONVERTING = PARTS == 2 ? 400.0 : 250.0;
  static constexpr double LINES = LAST ? sizeof(T) * 120.0 : 0.0;
};

struct Plan {
  int phases_h, phases_w;
  int parts_co;       // of 64 output channels, or of 128 if
  int shares_pixels;  // warpgroups have the same pixels: 0 or 1
  int stripe, stripes;
  int rows, pitch;                  // of an image on the flat axis, and from one row to the next
  int step_rows, step_columns;      // that the units of CONVERTERS are
  int tiles_f;                      // of the flat axis
  int region;                       // positions that a tile's inputs take
  int subchunks;                    // of 16 input channels, of a stage
  int stages;                       // that have all input channels
  int max_steps;                    // of a stage: a tap of 16 channels each,
  int slot_steps;                   // and of a slot of weights
  int pair;                         // phases of a task along a row: 1 or 2,
  int tasks_w;                      // of all of these,
  int tile_pixels;                  // with so many pixels each
  int bundle;                       // tasks that share a tile's inputs: one, or those of all owners
  int has_origin;                   // whether a tile's inputs are those that any phase meets,
  int origin_h, origin_w;           // from this one on
  int buffers;                      // of inputs
  int step_bytes;                   // of weights that a supply brings for a step
  int reads_octets;                 // or value by value,
  int unit;                         // for so many neighbours in a row at once
  int step_octets, step_positions;  // that a thread goes on by
  unsigned tasks, bundles;
  float cost;  // by cost_of()

  __host__ __device__ __forceinline__ int tile_parts() const { return 1 + shares_pixels; }
  // Of the weights that belong together: of one supply, all stages.
  __host__ __device__ __forceinline__ int64_t supply_bytes() const {
    return static_cast<int64_t>(stages) * max_steps * step_bytes;
  }
  __host__ __device__ __forceinline__ int octets() const { return 2 * subchunks; }
};

// How many inputs lie between one that can be read with its neighbours and this one: `unit` is a
// power of two.
__host__ __device__ __forceinline__ int lead_of(int first, int unit) { return first & (unit - 1); }

// The first input that a phase's first output meets.
__host__ __device__ __forceinline__ int first_of(const Phase& phase) {
  return phase.start - (phase.taps - 1);
}

// The phases of both axes, found when they are asked for,
struct AxisPhases {
  const Axis &rows, &columns;

  __device__ __forceinline__ Phase along_h(int i) const { return phase_of(rows, i); }
  __device__ __forceinline__ Phase along_w(int i) const { return phase_of(columns, i); }
};

// or once for a block, in shared memory: it takes divisions.
struct Phases {
  Phase of_rows[MAX_PERIOD], of_columns[MAX_PERIOD];

  // Others may ask after the block's next barrier.
  __device__ __forceinline__ void find(const Plan& plan, const Axis& rows, const Axis& columns) {
    const int i = threadIdx.x;
    if (i < plan.phases_h) of_rows[i] = phase_of(rows, i);
    if (i < plan.phases_w) of_columns[i] = phase_of(columns, i);
  }
  __device__ __forceinline__ const Phase& along_h(int i) const { return of_rows[i]; }
  __device__ __forceinline__ const Phase& along_w(int i) const { return of_columns[i]; }
};

// Whose weights a task's are.
__host__ __device__ __forceinline__ unsigned owner_of(const Plan& plan, int group, int phase_h,
                                                      int phase_w, int part_co) {
  return ((group * plan.phases_h + phase_h) * plan.phases_w + phase_w) * plan.parts_co + part_co;
}

// Some pixels of a phase for 64 or 128 output channels of a group: the first of a task's phases, or
// the second.
struct Task {
  Phase along_h, along_w;
  int part_co, group;
  int first_column;      // of the stripe
  int first;             // position on the flat axis
  int first_h, first_w;  // of the inputs of the first position
  int lead;              // so many before them are read too
  int offset;            // from there to the first that the task meets
  unsigned owner;        // of weights
  int steps;             // of a stage

  // The phases are AxisPhases or Phases.
  template <class Found>
  __device__ __forceinline__ Task(unsigned number, const Plan& plan, const Found& phases,
                                  int second = 0) {
    part_co = take_digit(number, plan.parts_co);
    const int phase_w = take_digit(number, plan.tasks_w) * plan.pair + second;
    const int phase_h = take_digit(number, plan.phases_h);
    first = take_digit(number, plan.tiles_f) * plan.tile_pixels;
    first_column = take_digit(number, plan.stripes) * plan.stripe;
    group = number;
    along_h = phases.along_h(phase_h);
    along_w = phases.along_w(phase_w);
    first_h = plan.has_origin ? plan.origin_h : first_of(along_h);
    first_w = plan.has_origin ? plan.origin_w : first_of(along_w);
    lead = lead_of(first_w, plan.unit);
    offset = lead + (first_of(along_h) - first_h) * plan.pitch + first_of(along_w) - first_w;
    owner = owner_of(plan, group, phase_h, phase_w, part_co);
    steps = along_h.taps * along_w.taps * plan.subchunks;
  }

  // Whether neither the task nor its second phase has any.
  template <class M, class Found>
  __device__ __forceinline__ bool is_empty(unsigned number, const Plan& plan,
                                           const Found& phases) const {
    if (steps > 0 || M::MAX_PAIR == 1 || plan.pair == 1) return steps == 0;
    return Task(number, plan, phases, 1).steps == 0;
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

// A warpgroup's way over the inputs that a stage's steps meet, in 16 bytes, as all addresses here.
struct Way {
  int taps_h, taps_w, next_row, next_subchunk;

  __device__ __forceinline__ Way(const Task& task, const Plan& plan)
      : taps_h(task.along_h.taps),
        taps_w(task.along_w.taps),
        next_row(plan.pitch - taps_w),
        next_subchunk(2 * plan.region - taps_h * plan.pitch) {}
};

struct Position {
  uint32_t address;
  int tap_h = 0, tap_w = 0;

  __device__ __forceinline__ void go_on(const Way& way) {
    ++address;
    if (++tap_w == way.taps_w) {
      tap_w = 0;
      address += way.next_row;
      if (++tap_h == way.taps_h) {
        tap_h = 0;
        address += way.next_subchunk;
      }
    }
  }
};

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
  uint64_t inputs_full[MAX_BUFFERS], inputs_empty[MAX_BUFFERS];
  uint64_t multiplied[MAX_BUFFERS];  // by the first warpgroup
  uint64_t weights_full[MULTIPLIERS][RING], weights_empty[MULTIPLIERS][RING];
  float inverses[MAX_BUFFERS];  // of the scales of inputs
  unsigned largest;             // of a stage's inputs
  Phases phases;
};

template <class M>
struct Shared {
  Barriers* barriers;
  char* inputs;   // [buffer, part, octet, position], 16 bytes each
  char* weights;  // [supply, slot, step, ...]
  int* places;    // of inputs in the tile's images, or -1

  static constexpr int HEAD_BYTES = (sizeof(Barriers) + 127) / 128 * 128;

  __device__ __forceinline__ Shared(char* memory, const Plan& plan)
      : barriers(reinterpret_cast<Barriers*>(memory)),
        inputs(memory + HEAD_BYTES),
        weights(inputs + plan.buffers * M::PARTS * part_bytes(plan)),
        places(reinterpret_cast<int*>(weights + M::SUPPLIES * RING * slot_bytes(plan))) {}

  __host__ __device__ __forceinline__ static int part_bytes(const Plan& plan) {
    return plan.octets() * plan.region * 16;
  }
  __host__ __device__ __forceinline__ static int slot_bytes(const Plan& plan) {
    return plan.slot_steps * plan.step_bytes;
  }
  static int64_t bytes(const Plan& plan) {
    return HEAD_BYTES + plan.buffers * M::PARTS * static_cast<int64_t>(part_bytes(plan)) +
           M::SUPPLIES * RING * slot_bytes(plan) + plan.region * static_cast<int64_t>(sizeof(int));
  }
};

// ---- Choosing a plan ---------------------------------------------------------------------------

inline int64_t most_outputs(const Axis& axis) { return (axis.out_size - 1) / period_of(axis) + 1; }

// How far from a tile's first image, or a stage's first channel of it, a thread's inputs may lie,
// in values: a tile has parts of so many images, a stage so many channels.
template <class M>
double offsets_of(const ConvTransposeProblem& p, int64_t images, int channels) {
  const double planes =
      M::IS_LAST ? static_cast<double>(images) * p.in_channels
                 : static_cast<double>(images - 1) * p.in_channels + channels + OCTET + 1;
  return planes * p.height * p.width;
}

// Whether so many images are few enough for a launch: offsets in a tile's inputs, and positions on
// the flat axis, are counted in 32 bits.
template <class M>
bool fits_a_launch(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                   int images) {
  const int64_t count_h = most_outputs(rows), count_w = most_outputs(columns);
  const int64_t narrow = count_h * min(count_w, static_cast<int64_t>(NARROW_STRIPE));
  const int64_t of_tile = min(static_cast<int64_t>(images), M::MAX_REGION / narrow + 3);
  return offsets_of<M>(p, of_tile, CI) < M::MAX_COUNT &&
         2.0 * images * (count_h + most_taps(rows)) * (count_w + most_taps(columns) + 2) <
             M::MAX_COUNT;
}

// Bounded are what must fit into shared memory, and one image. With few channels most of the tensor
// cores' work would be in vain. convt_lab/stages.py says the same.
template <class M>
bool covers(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns) {
  if (has_more_phases(rows, MAX_PERIOD) || has_more_phases(columns, MAX_PERIOD)) return false;
  const int64_t taps_h = most_taps(rows), taps_w = most_taps(columns);
  return p.in_channels / p.groups >= CI && p.out_channels / p.groups >= CI &&
         (taps_h - 1) * (taps_w + NARROW_STRIPE + 1) + taps_w <= MAX_REACH &&
         fits_a_launch<M>(p, rows, columns, 1);
}

// How units are read: octets, if groups consist of them and, along a row, neighbours can be read at
// once; or value by value.
template <class M>
void choose_units(const ConvTransposeProblem& p, const Axis& columns, bool can_read_octets,
                  Plan& plan) {
  plan.reads_octets = can_read_octets && p.in_channels / p.groups % OCTET == 0 &&
                      (M::IS_LAST ? p.in_channels * sizeof(typename M::Value) % 16 == 0
                                  : p.width % M::UNIT == 0 && columns.i_step == 1);
  plan.unit = plan.reads_octets ? M::UNIT : 1;
}

// Whether inputs lie in memory as they are to lie in shared memory.
template <class M>
__host__ __device__ __forceinline__ bool copies_inputs(const Plan& plan) {
  return M::IS_LAST && !M::IS_SCALED && plan.reads_octets;
}

inline void choose_steps(Plan& plan) {
  const int positions = CONVERTERS * plan.unit;
  plan.step_rows = positions / plan.pitch;
  plan.step_columns = positions % plan.pitch;
  plan.step_octets = positions / plan.region;
  plan.step_positions = positions % plan.region;
}

// Which inputs of an axis outputs at one position of all phases meet: from the first on so many
// more.
struct Reach {
  int first, more;
  int latest_first;  // of a phase
  int size;          // inputs that a phase sees, at most

  Reach(const Axis& axis, int phases)
      : first(INT32_MAX), more(0), latest_first(INT32_MIN), size(0) {
    int last = INT32_MIN;
    for (int i = 0; i < phases; ++i) {
      const Phase phase = phase_of(axis, i);
      if (phase.taps == 0) continue;
      first = min(first, first_of(phase));
      latest_first = max(latest_first, first_of(phase));
      last = max(last, phase.start);
      size = max(size, phase.size);
    }
    if (first > last) {  // there are none
      first = latest_first = 0;
      return;
    }
    more = last - first;
  }

  // How many positions a row of `count` outputs takes, or an image of so many rows, so that the
  // zeros in front of the next one are those behind it: `taken` more inputs than its first one's
  // are met, by phases that begin at inputs of their own, or all at one.
  int positions(int64_t count, int taken, bool has_origin) const {
    const int64_t last_first = has_origin ? first : latest_first;
    return static_cast<int>(
        max(max(count, static_cast<int64_t>(size) - first), count + taken + last_first));
  }
};

// Cuts images into so many stripes; returns whether a tile's inputs fit into shared memory. They
// reach `more` rows and columns beyond its outputs.
template <class M>
bool cut(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns, int stripes,
         const Reach& along_h, const Reach& along_w, int more_h, int more_w, int lead, Plan& plan) {
  const int64_t width = ceil_div(most_outputs(columns), stripes);
  plan.stripe = static_cast<int>(ceil_div(width, 2) * 2);  // pairs of outputs stay together
  plan.stripes = static_cast<int>(ceil_div(most_outputs(columns), plan.stripe));
  // A stripe has its neighbours' inputs at its ends, not zeros.
  const int positions = plan.stripes > 1 ? plan.stripe + more_w
                                         : along_w.positions(plan.stripe, more_w, plan.has_origin);
  plan.pitch = static_cast<int>(ceil_div(positions + lead, 2) * 2);
  plan.rows = along_h.positions(most_outputs(rows), more_h, plan.has_origin);
  const int64_t reach = static_cast<int64_t>(more_h) * plan.pitch + more_w + lead;
  if (plan.tile_pixels + reach > M::MAX_REGION) return false;
  plan.region = static_cast<int>(plan.tile_pixels + reach);
  plan.region += plan.region % plan.unit;
  if (M::IS_LAST) {
    // Octets of a pixel are to lie in different banks, as neighbours do.
    const int wanted = 8 / plan.octets();
    plan.region += (wanted + 8 - plan.region % 8) % 8;
  }
  choose_steps(plan);
  const int64_t flat = static_cast<int64_t>(p.batch) * plan.rows * plan.pitch;
  const int owners = plan.phases_h * plan.tasks_w * plan.parts_co;
  plan.tiles_f = static_cast<int>(ceil_div(flat, plan.tile_pixels));
  plan.tasks = static_cast<unsigned>(plan.tiles_f) * plan.stripes * owners * p.groups;
  plan.bundles = plan.tasks / plan.bundle;
  // Stripes may be so narrow that a tile has parts of many images.
  const int64_t images = min(static_cast<int64_t>(p.batch),
                             plan.region / (static_cast<int64_t>(plan.rows) * plan.pitch) + 2);
  const double offsets = offsets_of<M>(p, images, plan.subchunks * CI);
  const int least = max(2, plan.bundle > 1 ? plan.stages : 0);
  // Of weights that are brought to both warpgroups at once, neither gets far ahead.
  plan.buffers = plan.bundle > 1 ? MAX_BUFFERS : M::SHARES_WEIGHTS ? 2 : 4;
  while (plan.buffers >= least && Shared<M>::bytes(plan) > MAX_SHARED_BYTES) --plan.buffers;
  return offsets < M::MAX_COUNT && plan.buffers >= least;
}

// How long a block takes for a bundle, in cycles: a rough model, to compare plans by. Its constants
// were fitted to the times of 2,936 plans for 34 shapes, measured on an NVIDIA H200.
template <class M>
double cost_of(const Plan& plan) {
  constexpr double WAITING = 270.0, BYTES_PER_CYCLE = 16.0;
  // Of a stage: of the tensor cores, and of the converters.
  const double multiplying =
      M::PIXELS / 2.0 * M::PRODUCTS * MULTIPLIERS * plan.max_steps * (plan.pair > 1 ? 1.25 : 1.0);
  const double converting =
      (M::CONVERTING + M::LINES * 2 / plan.octets()) * plan.region * plan.octets() / CONVERTERS;
  // Outputs of one phase lie apart in a row, and rows of narrow stripes are short: sectors of the
  // cache are written again and again.
  const double scattered = (M::IS_LAST ? 1.0 : min(4, plan.tasks_w)) + 24.0 / plan.stripe;
  const double storing = scattered * CO * plan.tile_parts() * plan.tile_pixels * plan.pair *
                         static_cast<double>(sizeof(typename M::Value)) / BYTES_PER_CYCLE;
  if (plan.bundle == 1) {
    const double beside = 0.25 * min(multiplying, converting);
    return (max(multiplying, converting) + beside + WAITING) * plan.stages + storing;
  }
  // Inputs of the next bundle are converted where buffers are free, and while the last task leaves
  // them.
  const double task = (multiplying + WAITING) * plan.stages + storing;
  const double free = static_cast<double>(plan.buffers - plan.stages) / plan.stages;
  const double beside = task * (1.0 + min(1.0, free) * (plan.bundle - 1));
  return task * plan.bundle + max(0.0, converting * plan.stages - beside);
}

// Fills a plan for a launch; returns whether the problem is one for this kernel.
template <class M>
bool choose_plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns, Plan& plan) {
  if (!covers<M>(p, rows, columns)) return false;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  plan.phases_h = min(period_of(rows), p.out_height);
  plan.phases_w = min(period_of(columns), p.out_width);
  plan.shares_pixels = group_out > CO;
  plan.step_bytes = M::STEP_BYTES * (M::SHARES_WEIGHTS ? plan.tile_parts() : 1);
  plan.parts_co = static_cast<int>(ceil_div(group_out, CO * plan.tile_parts()));
  choose_units<M>(p, columns, true, plan);
  const Reach along_h(rows, plan.phases_h), along_w(columns, plan.phases_w);
  plan.origin_h = along_h.first;
  plan.origin_w = along_w.first;
  const int taps_h = most_taps(rows), taps_w = most_taps(columns);
  const int chunks = static_cast<int>(ceil_div(group_in, CI));
  int lead = 0;  // at most
  for (int i = 0; i < plan.phases_w; ++i) {
    lead = max(lead, lead_of(first_of(phase_of(columns, i)), plan.unit));
  }
  // All phases see the same inputs, unless dilation parts them.
  const bool can_share = rows.i_step == 1 && columns.i_step == 1;
  // Pairs of neighbours in a row are stored at once.
  const bool can_pair = can_share && plan.phases_w % 2 == 0 && p.out_width % 2 == 0;
  plan.cost = FLT_MAX;
  Plan best = plan;
  for (int subchunks = 1; subchunks <= MAX_SUBCHUNKS; subchunks *= 2) {
    if (subchunks > 1 && subchunks > chunks) break;
    plan.subchunks = subchunks;
    plan.stages = static_cast<int>(ceil_div(chunks, subchunks));
    plan.max_steps = taps_h * taps_w * subchunks;
    const int64_t slots = ceil_div(plan.max_steps, max(1, M::SLOT_BYTES / plan.step_bytes));
    plan.slot_steps = static_cast<int>(ceil_div(plan.max_steps, slots));
    const auto try_stripes = [&](int stripes) {
      const int more_h = plan.has_origin ? along_h.more : taps_h - 1;
      const int more_w = plan.has_origin ? along_w.more : taps_w - 1;
      const int most_lead = plan.has_origin ? lead_of(along_w.first, plan.unit) : lead;
      if (!cut<M>(p, rows, columns, stripes, along_h, along_w, more_h, more_w, most_lead, plan)) {
        return;
      }
      constexpr double MULTIPROCESSORS = 132.0;
      const double rounds = plan.bundles / MULTIPROCESSORS;
      const double turns = rounds < 8.0 ? ceil(rounds) : rounds + 0.5;
      const auto cost = static_cast<float>(cost_of<M>(plan) * turns);
      if (cost >= best.cost) return;
      best = plan;
      best.cost = cost;
    };
    const int64_t width = most_outputs(columns);
    for (plan.pair = M::MIN_PAIR; plan.pair <= (can_pair ? M::MAX_PAIR : 1); ++plan.pair) {
      plan.tile_pixels = M::PIXELS / plan.pair * (MULTIPLIERS - plan.shares_pixels);
      plan.tasks_w = plan.phases_w / plan.pair;
      const int owners = plan.phases_h * plan.tasks_w * plan.parts_co;
      for (const int bundle : {1, owners}) {
        if (bundle > 1 && (!can_share || plan.stages > MAX_BUFFERS)) continue;
        plan.bundle = bundle;
        plan.has_origin = plan.pair > 1 || bundle > 1;
        for (int i = 1; i <= min(width, static_cast<int64_t>(MAX_STRIPES)); ++i) try_stripes(i);
        try_stripes(static_cast<int>(ceil_div(width, NARROW_STRIPE)));
      }
    }
  }
  plan = best;
  return plan.cost < FLT_MAX;
}

// The same; a thread's last plan is remembered, as a call asks for it more than once. Each library
// has a memory of its own: with a name that others can see, loaders would give all of them one.
namespace {

template <class M>
bool make_plan(const ConvTransposeProblem& p, const Axis& rows, const Axis& columns, Plan& plan) {
  thread_local ConvTransposeProblem problem = {};
  thread_local Plan last = {};
  thread_local bool is_known = false, exists = false;
  if (!is_known || std::memcmp(&problem, &p, sizeof p) != 0) {
    problem = p;
    last = {};
    exists = choose_plan<M>(p, rows, columns, last);
    is_known = true;
  }
  plan = last;
  return exists;
}

}  // namespace

}  // namespace warpgroups
