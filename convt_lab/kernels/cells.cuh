// Transposed convolution by cells, for problems with few channels: what one_channel.cu and
// few_channels.cu have in common.
//
// A cell is a stretch of `stride` outputs, o = stride * c + r with a phase r for each. With e = i -
// c, an output meets input i through the tap k where k * dilation = r + padding - stride * e: which
// taps a phase has, and at which distance e their inputs lie, is the same in every cell. So a
// thread that owns 4 neighbouring cells of one row, with all their phases and several output
// channels, slides over the inputs: an input that it has fetched serves every phase and channel, in
// up to 4 cells, and the weight of (e, phase, channel) serves 4 cells.
//
// A block copies the inputs that its cells reach into shared memory, as float32, and packs the
// weights beside them by (ci, kh, e, phase, channel). The inner loops then read 16 bytes at a time:
// 4 inputs of a thread's own, or weights that all lanes share. In float32 it sums in the order of
// the stages, and gives their bits.
//
// Cost: for C channels, P phases and 4 values of e a thread does 16 * C * P FMAs on 4 inputs (one
// load) and 4 * C * P weights (C * P loads): at 8 channels and 2 phases 256 FMAs on 17 loads. One
// channel and one phase, 16 FMAs on 2, still leave the memory time to be the limit.
//
// Taps that a phase lacks, and inputs beyond the image, count as zeros. Zero times an infinite
// weight or input is NaN where the definition has no product, so an output that becomes NaN is
// summed again by the definition.

#pragma once

#include "blocking.cuh"

namespace cells {

constexpr int THREAD_W = 4;         // cells of a thread, along the row
constexpr int STEPS_E = 4;          // values of e for which a thread holds inputs at a time
constexpr int WARPS = 8;            // of a block
constexpr int MIN_LANES_SHIFT = 3;  // 8 lanes of a warp along a row; the others take rows below
constexpr int MAX_STRIDE = 16;      // what is admitted, see `covers`
constexpr int MAX_REACH = 32;
constexpr int MAX_TAPS = 256;
constexpr int MAX_PASSES = 6;                  // rows of warps that share a tile of inputs
constexpr int MAX_TILES = 8;                   // tiles of a block, one below the other
constexpr int ENOUGH_BLOCKS = 1056;            // some rounds on the largest GPUs
constexpr int MAX_SHARED_FLOATS = 15 * 1024;   // 60 KiB, which every architecture gives a block
constexpr int GOOD_SHARED_FLOATS = 12 * 1024;  // several blocks fit on a multiprocessor
constexpr int THREADS = WARPS * 32;
static_assert(THREAD_W == 4 && STEPS_E == 4, "inputs are read as vectors of 4");

// How far from its cell a phase's inputs lie along one axis: from `first` down, `count` of them.
struct Reach {
  int cells;  // that hold outputs
  int first, count;
};

struct Plan {
  Reach rows, columns;
  uint32_t masks[MAX_STRIDE];  // of each phase of a row: which distances have taps, `first` first
  Taps taps_h[MAX_STRIDE];     // of each phase of the rows, in cell 0
  int lanes_shift;             // a warp has 1 << lanes_shift lanes along the row
  int warps_co;                // warps of a block that share their pixels
  int passes;                  // rows of warps, one after the other, for a tile of inputs
  int tiles;                   // of a block
  int strips, parts_h, parts_co, parts_phase;  // blocks of an image
  int chunk_ci;                                // input channels in shared memory
  int chunk_w;                                 // input channels whose weights are there
  int halo_h, pitch;                           // rows of inputs, and floats from one to the next
  bool copies_vectors;                         // inputs can be read four at a time
  int copied_rows;                             // of inputs, that a block copies at a time
  int packed;                                  // floats of the weights of one (ci, kh)
  int vector;                                  // outputs written at a time
  bool is_dense;                               // few phases and distances without a tap
};

inline Reach reach_of(const Axis& axis) {
  Reach reach = {static_cast<int>(ceil_div(axis.out_size, axis.stride)), INT32_MIN, 1};
  int last = INT32_MAX;
  for (int r = 0; r < axis.stride; ++r) {
    const Taps taps = taps_of_class(axis, r);
    if (taps.count == 0) continue;
    reach.first = max(reach.first, taps.i);
    last = min(last, taps.i - (taps.count - 1) * axis.i_step);
  }
  reach.count = reach.first - last + 1;  // a kernel has a tap, and a tap has a phase
  return reach;
}

// Bounded are what must fit into shared memory and a row's offsets; convt_lab/stages.py says the
// same.
inline bool covers(const ConvTransposeProblem& p) {
  const auto reach = [](int kernel, int stride, int dilation) {
    return (static_cast<int64_t>(kernel - 1) * dilation + stride - 1) / stride + 1;
  };
  const int64_t reach_h = reach(p.kernel_h, p.stride_h, p.dilation_h);
  const int64_t reach_w = reach(p.kernel_w, p.stride_w, p.dilation_w);
  return p.stride_h <= MAX_STRIDE && p.stride_w <= MAX_STRIDE && reach_h <= MAX_REACH &&
         reach_w <= MAX_REACH && p.kernel_h * ceil_div(reach_w, STEPS_E) * STEPS_E <= MAX_TAPS &&
         static_cast<int64_t>(p.stride_h) * p.out_width * (32 >> MIN_LANES_SHIFT) <= INT32_MAX;
}

// PHASES outputs of each cell and CHANNELS output channels to a thread.
template <int PHASES, int CHANNELS>
struct Sizes {
  // Rows of cells of a thread: so many that it has FMAs enough for every row of taps.
  static constexpr int GROUPS = PHASES * CHANNELS <= 4 ? 2 : 1;
  static constexpr int OUTPUTS = THREAD_W * PHASES;  // of a row, in one channel
  static constexpr int ROOM = CHANNELS <= 2 ? CHANNELS : (CHANNELS + 3) / 4 * 4;
  static constexpr int STEP_FLOATS = PHASES * ROOM;  // weights of one e
  static constexpr int STAGE = 32 * OUTPUTS;         // floats in which a warp turns its outputs

  static constexpr int IN_FLIGHT = PHASES * CHANNELS > 8 ? 1 : 2;  // vectors of inputs

  // Weights of one channel or two are read across values of e, as vectors.
  static constexpr int PADDED_E = ROOM < 4 ? STEPS_E : 1;
};

// VECTOR neighbours in memory, aligned.
template <class T, int VECTOR>
struct alignas(VECTOR * sizeof(T)) Neighbours {
  T values[VECTOR];
};

// Copies the inputs of `count_ci` channels that a tile reaches, as float32; zeros beyond the image.
// A thread keeps its column, of VECTOR inputs that are aligned in memory but not in the tile, and
// has several loads in flight.
template <class T, int VECTOR, int IN_FLIGHT>
__device__ __forceinline__ void copy_inputs(float* tile, const T* __restrict__ planes,
                                            const ConvTransposeProblem& p, const Plan& plan,
                                            int count_ci, int first_h, int first_w) {
  const int lead = first_w & (VECTOR - 1);  // inputs of the first vector before the tile
  const int vectors = plan.pitch / VECTOR + (VECTOR > 1);
  const int step = plan.copied_rows;
  int row = threadIdx.x / vectors;
  if (row >= step) return;
  const int column = (threadIdx.x - row * vectors) * VECTOR - lead;
  const int w = first_w + column;
  const bool inside = w >= 0 && w < p.width;  // all of a vector, for rows of whole vectors
  const int64_t next_rows = static_cast<int64_t>(step) * p.width;
  const int64_t next_plane = (static_cast<int64_t>(p.height) - plan.halo_h) * p.width;
  const T* x = planes + static_cast<int64_t>(first_h + row) * p.width + w;
  const int rows = count_ci * plan.halo_h;
  float* to = tile + row * plan.pitch + column;
  for (int first = row; first < rows; first += IN_FLIGHT * step) {
    Neighbours<T, VECTOR> loaded[IN_FLIGHT];
    bool exists[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; ++k) {
      for (; row >= plan.halo_h; row -= plan.halo_h) x += next_plane;
      exists[k] = inside &&
                  static_cast<unsigned>(first_h + row) < static_cast<unsigned>(p.height) &&
                  first + k * step < rows;
      if (exists[k]) loaded[k] = *reinterpret_cast<const Neighbours<T, VECTOR>*>(x);
      row += step;
      x += next_rows;
    }
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; ++k) {
      if (first + k * step < rows) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          const float value = exists[k] ? to_float(loaded[k].values[j]) : 0.0f;
          if (VECTOR == 1 ||
              static_cast<unsigned>(column + j) < static_cast<unsigned>(plan.pitch)) {
            to[j] = value;
          }
        }
      }
      to += step * plan.pitch;
    }
  }
}

// The same for float32, one by one and asynchronously: all are in flight at once. A thread keeps
// its two columns, half a row apart.
__device__ __forceinline__ void copy_inputs_async(float* tile, const float* __restrict__ planes,
                                                  const ConvTransposeProblem& p, const Plan& plan,
                                                  int count_ci, int first_h, int first_w) {
  const int half = plan.pitch / 2, step = plan.copied_rows;
  int row = threadIdx.x / half;
  if (row >= step) return;
  const int column = threadIdx.x - row * half;
  const int left = first_w + column, right = left + half;
  const bool inside[2] = {left >= 0 && left < p.width, right >= 0 && right < p.width};
  const int64_t next_rows = static_cast<int64_t>(step) * p.width;
  const int64_t next_plane = (static_cast<int64_t>(p.height) - plan.halo_h) * p.width;
  const float* x = planes + static_cast<int64_t>(first_h + row) * p.width + left;
  const float* const end = tile + count_ci * plan.halo_h * plan.pitch;
  for (float* to = tile + row * plan.pitch + column; to < end; to += step * plan.pitch) {
    for (; row >= plan.halo_h; row -= plan.halo_h) x += next_plane;
    const bool exists = static_cast<unsigned>(first_h + row) < static_cast<unsigned>(p.height);
    copy_or_zero(to, x, exists && inside[0]);
    copy_or_zero(to + half, x + half, exists && inside[1]);
    row += step;
    x += next_rows;
  }
  __pipeline_commit();
}

// Packs the weights of channels from `first_co` on by (ci, kh, warp_co, e, phase, channel), zeros
// where there is no tap. A thread keeps its place within (ci, kh), for which it divides once.
template <class T, int PHASES, int CHANNELS>
__device__ __forceinline__ void pack_weights(float* packed, const T* __restrict__ filters,
                                             const ConvTransposeProblem& p, const Plan& plan,
                                             int count_ci, int first_co, int first_phase) {
  using S = Sizes<PHASES, CHANNELS>;
  const int group_out = p.out_channels / p.groups;
  const int taps = p.kernel_h * p.kernel_w;
  const int steps = plan.packed / (plan.warps_co * S::STEP_FLOATS);
  const int lanes = min(THREADS, plan.packed);
  const int step_row = THREADS / lanes;
  const int row = threadIdx.x / lanes;
  if (row >= step_row) return;
  for (int place = threadIdx.x % lanes; place < plan.packed; place += lanes) {
    const int channel = place % S::ROOM, rest = place / S::ROOM;
    const int r = first_phase + rest % PHASES;
    const int e = rest / PHASES % steps;
    const int co = first_co + rest / PHASES / steps * CHANNELS + channel;
    const bool exists = channel < CHANNELS && co < group_out && r < p.stride_w &&
                        e < plan.columns.count && (plan.masks[r] >> e & 1) != 0;
    const int kw =
        exists ? (r + p.padding_w - (plan.columns.first - e) * p.stride_w) / p.dilation_w : 0;
    int ci = row / p.kernel_h, kh = row % p.kernel_h;
    for (float* to = packed + row * plan.packed + place; ci < count_ci;
         to += step_row * plan.packed) {
      float value = 0.0f;
      if (exists) {
        value = to_float(
            filters[(static_cast<int64_t>(ci) * group_out + co) * taps + kh * p.kernel_w + kw]);
      }
      *to = value;
      for (kh += step_row; kh >= p.kernel_h; kh -= p.kernel_h) ++ci;
    }
  }
}

template <int PHASES, int CHANNELS>
using Sums = float[Sizes<PHASES, CHANNELS>::GROUPS][CHANNELS][Sizes<PHASES, CHANNELS>::OUTPUTS];

// Inputs of each row of cells, from the smallest of STEPS_E values of e on.
template <int PHASES, int CHANNELS>
using Window = float[Sizes<PHASES, CHANNELS>::GROUPS][2 * THREAD_W];

// Adds the taps of distance `e` within the window to all of a thread's outputs.
template <int PHASES, int CHANNELS>
__device__ __forceinline__ void add_step(Sums<PHASES, CHANNELS>& sum,
                                         const Window<PHASES, CHANNELS>& window, int e, int q,
                                         const float* weights) {
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
    for (int g = 0; g < Sizes<PHASES, CHANNELS>::GROUPS; ++g) {
#pragma unroll
      for (int j = 0; j < THREAD_W; ++j) {
        float& s = sum[g][c][j * PHASES + q];
        s = fmaf(window[g][j + STEPS_E - 1 - e], weights[c], s);
      }
    }
  }
}

// Adds COUNT values of e, of which the window holds the inputs; where a phase has no tap, zeros.
template <int PHASES, int CHANNELS, int COUNT>
__device__ __forceinline__ void add_all(Sums<PHASES, CHANNELS>& sum,
                                        const Window<PHASES, CHANNELS>& window, const float* w) {
  using S = Sizes<PHASES, CHANNELS>;
  float weights[STEPS_E * S::STEP_FLOATS];
#pragma unroll
  for (int i = 0; i < COUNT * S::STEP_FLOATS; i += 4) load_vector(weights + i, w + i);
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
#pragma unroll
    for (int q = 0; q < PHASES; ++q) {
      add_step<PHASES, CHANNELS>(sum, window, e, q, weights + (e * PHASES + q) * S::ROOM);
    }
  }
}

// Adds those of COUNT values of e and phases that have a tap.
template <int PHASES, int CHANNELS>
__device__ __forceinline__ void add_marked(Sums<PHASES, CHANNELS>& sum,
                                           const Window<PHASES, CHANNELS>& window, const float* w,
                                           int count, const uint32_t (&masks)[PHASES]) {
  using S = Sizes<PHASES, CHANNELS>;
#pragma unroll
  for (int e = 0; e < STEPS_E; ++e) {
    if (e >= count) break;
#pragma unroll
    for (int q = 0; q < PHASES; ++q) {
      if ((masks[q] >> e & 1) == 0) continue;
      float weights[S::ROOM];
#pragma unroll
      for (int c = 0; c < S::ROOM; c += 4) {
        load_vector(weights + c, w + (e * PHASES + q) * S::ROOM + c);
      }
      add_step<PHASES, CHANNELS>(sum, window, e, q, weights);
    }
  }
}

// Adds one row of taps. The inputs of the smallest e begin at `x`, those of the thread's next row
// of cells `next` further on.
template <int PHASES, int CHANNELS>
__device__ __forceinline__ void add_row(Sums<PHASES, CHANNELS>& sum, const float* x, const float* w,
                                        int next, int count, bool is_dense,
                                        const uint32_t (&masks)[PHASES]) {
  using S = Sizes<PHASES, CHANNELS>;
  Window<PHASES, CHANNELS> window;
  x += (count + STEPS_E - 1) / STEPS_E * STEPS_E;
#pragma unroll
  for (int g = 0; g < S::GROUPS; ++g) load_vector(window[g] + THREAD_W, x + g * next);
  const auto load = [&] {
    x -= STEPS_E;
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) load_vector(window[g], x + g * next);
  };
  const auto slide = [&] {
    w += STEPS_E * S::STEP_FLOATS;
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) {
#pragma unroll
      for (int j = 0; j < THREAD_W; ++j) window[g][THREAD_W + j] = window[g][j];
    }
  };
  if (CHANNELS <= 2 || (PHASES * CHANNELS <= 12 && is_dense)) {
#pragma unroll 1
    for (; count >= STEPS_E; count -= STEPS_E) {
      load();
      add_all<PHASES, CHANNELS, STEPS_E>(sum, window, w);
      slide();
    }
    if (count == 0) return;
    load();
    if (count == 1) {
      add_all<PHASES, CHANNELS, 1>(sum, window, w);
    } else if (count == 2) {
      add_all<PHASES, CHANNELS, 2>(sum, window, w);
    } else {
      add_all<PHASES, CHANNELS, 3>(sum, window, w);
    }
  } else {
    uint32_t left[PHASES];
#pragma unroll
    for (int q = 0; q < PHASES; ++q) left[q] = masks[q];
#pragma unroll 1
    for (; count > 0; count -= STEPS_E) {
      load();
      add_marked<PHASES, CHANNELS>(sum, window, w, count, left);
      slide();
#pragma unroll
      for (int q = 0; q < PHASES; ++q) left[q] >>= STEPS_E;
    }
  }
}

// Writes a channel's outputs of a warp, VECTOR neighbours at a time; they lie in `stage` in the
// order of the lanes. Returns whether one is NaN. `image` is where the first goes, `inside_h` and
// `inside_w` how many rows and columns are left there.
template <class T, int PHASES, int VECTOR>
__device__ __forceinline__ bool write_rows(const float* stage, T* image, float shift,
                                           const ConvTransposeProblem& p, const Plan& plan,
                                           int inside_h, int inside_w) {
  constexpr int OF_LANE = THREAD_W * PHASES / VECTOR;
  const int lane = threadIdx.x % 32;
  bool not_a_number = false;
#pragma unroll(VECTOR)
  for (int i = 0; i < OF_LANE; ++i) {
    const int place = i * 32 + lane;
    const int row = place / OF_LANE >> plan.lanes_shift;
    const int oh = row * p.stride_h, ow = (place - (row * OF_LANE << plan.lanes_shift)) * VECTOR;
    if (oh >= inside_h || ow >= inside_w) continue;
    Neighbours<T, VECTOR> rounded;
    const auto sums = *reinterpret_cast<const Neighbours<float, VECTOR>*>(stage + place * VECTOR);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const float value = sums.values[j] + shift;
      not_a_number |= value != value;
      set_rounded(rounded.values[j], value);
    }
    *reinterpret_cast<Neighbours<T, VECTOR>*>(image + (oh * p.out_width + ow)) = rounded;
  }
  return not_a_number;
}

// The same one by one, also where a thread has a part of a cell's phases only.
template <class T, int PHASES>
__device__ __forceinline__ bool write_parts(const float* stage, T* image, float shift,
                                            const ConvTransposeProblem& p, const Plan& plan,
                                            int first_phase, int inside_h, int inside_w) {
  constexpr int OUTPUTS = THREAD_W * PHASES;
  const int lane = threadIdx.x % 32;
  bool not_a_number = false;
#pragma unroll 1
  for (int i = 0; i < OUTPUTS; ++i) {
    const int place = i * 32 + lane;
    const int row = place / OUTPUTS >> plan.lanes_shift;
    const int column = place - (row * OUTPUTS << plan.lanes_shift);
    const int oh = row * p.stride_h, ow = column / PHASES * p.stride_w + column % PHASES;
    if (oh >= inside_h || ow >= inside_w || first_phase + column % PHASES >= p.stride_w) continue;
    const float value = stage[place] + shift;
    not_a_number |= value != value;
    set_rounded(image[oh * p.out_width + ow], value);
  }
  return not_a_number;
}

// A block is tiles one below the other in a strip of cells, a part of the phases, some output
// channels of a group, an image.
struct Block {
  int first_cell_w, first_slot, first_phase, first_co, group, n;
};

template <int PHASES, int CHANNELS>
__device__ __forceinline__ Block find_block(unsigned index, const ConvTransposeProblem& p,
                                            const Plan& plan) {
  Block block;
  block.first_cell_w = take_digit(index, plan.strips) * THREAD_W << plan.lanes_shift;
  block.first_slot =
      take_digit(index, plan.parts_h) * plan.tiles * plan.passes * (WARPS / plan.warps_co);
  block.first_phase = take_digit(index, plan.parts_phase) * PHASES;
  block.first_co = take_digit(index, plan.parts_co) * plan.warps_co * CHANNELS;
  block.group = take_digit(index, p.groups);
  block.n = index;
  return block;
}

// Replaces those outputs of a block that are NaN by their sums by the definition.
template <class T, int PHASES, int CHANNELS>
__device__ __forceinline__ void sum_block_again(const T* __restrict__ input,
                                                const T* __restrict__ weight,
                                                const T* __restrict__ bias, T* output,
                                                const ConvTransposeProblem& p, const Axis& rows,
                                                const Axis& columns, const Plan& plan) {
  // There is one y. The compiler does not know, and keeps none of this in registers until here.
  const Block block = find_block<PHASES, CHANNELS>(blockIdx.x + blockIdx.y, p, plan);
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const T* const planes =
      input + (static_cast<int64_t>(block.n) * p.in_channels + block.group * group_in) *
                  (static_cast<int64_t>(p.height) * p.width);
  const int64_t filter_size = static_cast<int64_t>(p.kernel_h) * p.kernel_w;
  const T* const filters = weight + block.group * group_in * (group_out * filter_size);
  const int row_cells = THREAD_W << plan.lanes_shift;
  const int slot_h = Sizes<PHASES, CHANNELS>::GROUPS * (32 >> plan.lanes_shift);
  const int slots = plan.tiles * plan.passes * (WARPS / plan.warps_co);
  for (int c = 0; c < plan.warps_co * CHANNELS && block.first_co + c < group_out; ++c) {
    const int co = block.group * group_out + block.first_co + c;
    const float shift = bias == nullptr ? -0.0f : to_float(bias[co]);
    T* const plane = output + (static_cast<int64_t>(block.n) * p.out_channels + co) *
                                  (static_cast<int64_t>(p.out_height) * p.out_width);
    for (int slot = 0; slot < slots; ++slot) {
      const int cell_h = (block.first_slot + slot) / p.stride_h * slot_h;
      for (int i = threadIdx.x; i < slot_h * row_cells * PHASES; i += THREADS) {
        const int q = block.first_phase + i % PHASES, cell = i / PHASES;
        const int oh =
            (cell_h + cell / row_cells) * p.stride_h + (block.first_slot + slot) % p.stride_h;
        const int ow = (block.first_cell_w + cell % row_cells) * p.stride_w + q;
        if (q >= p.stride_w || oh >= p.out_height || ow >= p.out_width) continue;
        T& y = plane[static_cast<int64_t>(oh) * p.out_width + ow];
        if (to_float(y) == to_float(y)) continue;
        const T* const filter = filters + (block.first_co + c) * filter_size;
        set_rounded(y, sum_of_taps(planes, filter, p, rows, columns, oh, ow) + shift);
      }
    }
  }
}

// For how many blocks a multiprocessor's registers shall do: three leave a thread 80, two 128. On
// some architectures the compiler needs a few more.
template <class T, int PHASES, int CHANNELS>
constexpr int blocks_per_sm() {
  constexpr int LEAST_FOR_THREE =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ <= 800
      2;
#else
      1;
#endif
  constexpr int MOST_FOR_TWO =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900
      12;
#else
      16;
#endif
  constexpr int OUTPUTS = PHASES * CHANNELS;
  if (sizeof(T) < sizeof(float)) return 2;
  return OUTPUTS >= LEAST_FOR_THREE && OUTPUTS <= 2 ? 3 : OUTPUTS <= MOST_FOR_TWO ? 2 : 1;
}

template <class T, int PHASES, int CHANNELS>
__global__ void __launch_bounds__(THREADS, (blocks_per_sm<T, PHASES, CHANNELS>()))
    cells_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                 const T* __restrict__ bias, T* __restrict__ output, ConvTransposeProblem p,
                 Axis rows, Axis columns, Plan plan) {
  using S = Sizes<PHASES, CHANNELS>;
  extern __shared__ float4 shared_vectors[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float* const shared = reinterpret_cast<float*>(shared_vectors);
  float* const stage = shared + warp * S::STAGE;
  float* const packed = shared + WARPS * S::STAGE;
  float* const tile = packed + plan.chunk_w * p.kernel_h * plan.packed;

  const auto [first_cell_w, first_slot, first_phase, block_co, group, n] =
      find_block<PHASES, CHANNELS>(blockIdx.x, p, plan);
  const int warp_co = warp % plan.warps_co;
  const int first_co = block_co + warp_co * CHANNELS;
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  const T* const planes =
      input + (static_cast<int64_t>(n) * p.in_channels + group * group_in) * plane_size;
  const int64_t filters_size = static_cast<int64_t>(group_out) * p.kernel_h * p.kernel_w;
  const T* const filters = weight + group * group_in * filters_size;

  const int rounds = (plan.columns.count + STEPS_E - 1) / STEPS_E;
  const int first_w = first_cell_w + plan.columns.first - rounds * STEPS_E + 1;
  const int first_ow = first_cell_w * p.stride_w + first_phase;
  uint32_t masks[PHASES];
#pragma unroll
  for (int q = 0; q < PHASES; ++q) {
    masks[q] = first_phase + q < p.stride_w ? plan.masks[first_phase + q] : 0;
  }

  // A slot is a phase of the rows, and as many neighbouring cells as a warp has rows of lanes.
  const int lanes_h = 32 >> plan.lanes_shift, slot_h = S::GROUPS * lanes_h;
  const int slots = WARPS / plan.warps_co;  // at a time
  int phase_h = (first_slot + warp / plan.warps_co) % p.stride_h;
  int cell_h = (first_slot + warp / plan.warps_co) / p.stride_h * slot_h;  // of the first lane
  bool not_a_number = false;
  const bool keeps_weights = plan.chunk_w == group_in;
  for (int t = 0; t < plan.tiles; ++t) {
    const int first_cell_h = (first_slot + t * plan.passes * slots) / p.stride_h * slot_h;
    if (first_cell_h >= plan.rows.cells) break;
    const int first_h = first_cell_h + plan.rows.first - plan.rows.count + 1;

    for (int pass = 0; pass < plan.passes; ++pass) {
      const Taps vertical = plan.taps_h[phase_h];
      const int row = cell_h + (lane >> plan.lanes_shift) + vertical.i - first_h;
      const int lane_w = lane & ((1 << plan.lanes_shift) - 1);
      const float* const x_of_thread = tile + row * plan.pitch + lane_w * THREAD_W;
      const float* const w_of_warp =
          packed + vertical.k * plan.packed + warp_co * (plan.packed / plan.warps_co);

      Sums<PHASES, CHANNELS> sum = {};
      for (int ci0 = 0; ci0 < group_in; ci0 += plan.chunk_ci) {
        const int count_ci = min(plan.chunk_ci, group_in - ci0);

        if (pass == 0 || plan.chunk_ci < group_in) {
          __syncthreads();
          if constexpr (sizeof(T) == sizeof(float)) {
            copy_inputs_async(tile, planes + ci0 * plane_size, p, plan, count_ci, first_h, first_w);
          } else if (plan.copies_vectors) {
            copy_inputs<T, 4, S::IN_FLIGHT>(tile, planes + ci0 * plane_size, p, plan, count_ci,
                                            first_h, first_w);
          } else {
            copy_inputs<T, 1, 2>(tile, planes + ci0 * plane_size, p, plan, count_ci, first_h,
                                 first_w);
          }
          if (!keeps_weights || (t == 0 && pass == 0 && ci0 == 0)) {
            pack_weights<T, PHASES, CHANNELS>(packed, filters + ci0 * filters_size, p, plan,
                                              keeps_weights ? group_in : count_ci, block_co,
                                              first_phase);
          }
          __pipeline_wait_prior(0);
          __syncthreads();
        }
        const float* w_of_ci = w_of_warp + (keeps_weights ? ci0 * p.kernel_h * plan.packed : 0);
        const float* x_of_ci = x_of_thread;
        if (cell_h >= plan.rows.cells) continue;  // the tile ends below the image
        for (int ci = 0; ci < count_ci; ++ci) {
          const float *x = x_of_ci, *w = w_of_ci;
          for (int th = 0; th < vertical.count; ++th) {
            add_row<PHASES, CHANNELS>(sum, x, w, lanes_h * plan.pitch, plan.columns.count,
                                      plan.is_dense, masks);
            x -= rows.i_step * plan.pitch;
            w += rows.k_step * plan.packed;
          }
          x_of_ci += plan.halo_h * plan.pitch;
          w_of_ci += p.kernel_h * plan.packed;
        }
      }

      // A thread holds neighbouring pixels; written directly, the lanes of a warp would touch
      // places far apart. The warp turns a channel around in shared memory and writes neighbours
      // together.
#pragma unroll
      for (int g = 0; g < S::GROUPS; ++g) {
        const int first_oh = (cell_h + g * lanes_h) * p.stride_h + phase_h;
        const int inside_h = p.out_height - first_oh, inside_w = p.out_width - first_ow;
        T* const image =
            output +
            (static_cast<int64_t>(n) * p.out_channels + group * group_out + first_co) * out_plane +
            static_cast<int64_t>(first_oh) * p.out_width + first_ow;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          if (first_co + c >= group_out || inside_h <= 0) break;
          const float shift =
              bias == nullptr ? -0.0f : to_float(bias[group * group_out + first_co + c]);
          __syncwarp();
#pragma unroll
          for (int j = 0; j < S::OUTPUTS; j += 4) {
            store_vector(stage + lane * S::OUTPUTS + j, sum[g][c] + j);
          }
          __syncwarp();
          T* const to = image + c * out_plane;
          if (plan.vector == 4) {
            not_a_number |= write_rows<T, PHASES, 4>(stage, to, shift, p, plan, inside_h, inside_w);
          } else if (plan.vector == 2) {
            not_a_number |= write_rows<T, PHASES, 2>(stage, to, shift, p, plan, inside_h, inside_w);
          } else {
            not_a_number |=
                write_parts<T, PHASES>(stage, to, shift, p, plan, first_phase, inside_h, inside_w);
          }
        }
      }
      for (phase_h += slots; phase_h >= p.stride_h; phase_h -= p.stride_h) cell_h += slot_h;
    }
  }
  if (!__syncthreads_or(not_a_number)) return;
  sum_block_again<T, PHASES, CHANNELS>(input, weight, bias, output, p, rows, columns, plan);
}

// Chooses a block's shape.
template <class T, int PHASES, int CHANNELS>
Plan make_plan(const ConvTransposeProblem& p, const T* input, const T* output,
               std::size_t& shared_bytes) {
  using S = Sizes<PHASES, CHANNELS>;
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  plan.rows = reach_of(rows);
  plan.columns = reach_of(columns);
  int taps_w = 0;
  for (int r = 0; r < rows.stride; ++r) plan.taps_h[r] = taps_of_class(rows, r);
  for (int r = 0; r < columns.stride; ++r) {
    const Taps taps = taps_of_class(columns, r);
    for (int t = 0; t < taps.count; ++t) {
      ++taps_w;
      plan.masks[r] |= uint32_t{1} << (plan.columns.first - taps.i + t * columns.i_step);
    }
  }
  // A test costs less than the FMAs of 8 channels, and more than those of a few.
  plan.is_dense = columns.stride * plan.columns.count * 2 <= taps_w * (CHANNELS > 4 ? 2.5 : 3);
  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t parts_co = ceil_div(group_out, CHANNELS);
  plan.parts_phase = static_cast<int>(ceil_div(p.stride_w, PHASES));
  plan.copies_vectors = sizeof(T) < sizeof(float) && p.width % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(input) % (4 * sizeof(T)) == 0;
  plan.vector = plan.parts_phase > 1 ? 1 : 4;
  while (plan.vector > 1 &&
         (p.out_width % plan.vector != 0 ||
          reinterpret_cast<uintptr_t>(output) % (plan.vector * sizeof(T)) != 0)) {
    plan.vector /= 2;
  }

  // Lanes along the row: as many as it takes to cover the image with little waste.
  const auto area = [&](int shift) {
    const int64_t tile_w = THREAD_W << shift, tile_h = S::GROUPS * (32 >> shift);
    return ceil_div(plan.columns.cells, tile_w) * tile_w * ceil_div(plan.rows.cells, tile_h) *
           tile_h;
  };
  plan.lanes_shift = 5;
  for (int shift = 4; shift >= MIN_LANES_SHIFT; --shift) {
    if (area(shift) * 20 < area(plan.lanes_shift) * 19) plan.lanes_shift = shift;
  }
  const int lanes_w = 1 << plan.lanes_shift, slot_h = S::GROUPS * 32 / lanes_w;
  const int64_t all_slots = ceil_div(plan.rows.cells, slot_h) * p.stride_h;
  const int steps_x = static_cast<int>(ceil_div(plan.columns.count, STEPS_E)) * STEPS_E;
  const int steps = static_cast<int>(ceil_div(plan.columns.count, S::PADDED_E)) * S::PADDED_E;
  plan.pitch = lanes_w * THREAD_W + steps_x;

  const auto set_tile = [&](int warps_co, int passes) {
    plan.warps_co = warps_co;
    plan.passes = passes;
    plan.packed = warps_co * steps * S::STEP_FLOATS;
    const int slots = WARPS / warps_co * passes;
    // Slots that do not begin with phase 0 may span a cell more.
    const int64_t spanned =
        slots % p.stride_h == 0 ? slots / p.stride_h : (slots + p.stride_h - 2) / p.stride_h + 1;
    const int64_t most = ceil_div(plan.rows.cells, slot_h);
    plan.halo_h = static_cast<int>(min(spanned, most) * slot_h + plan.rows.count - 1);
  };
  const auto floats = [&](int64_t chunk_ci, int64_t chunk_w) {
    return int64_t{WARPS} * S::STAGE + chunk_w * p.kernel_h * plan.packed +
           chunk_ci * plan.halo_h * plan.pitch;
  };
  // The warps of a block share inputs among channels first, then among rows. One channel and its
  // weights always fit.
  int warps_co = 1;
  while (2 * warps_co <= WARPS && 2 * warps_co <= parts_co) warps_co *= 2;
  set_tile(warps_co, 1);
  while (plan.warps_co > 1 && floats(1, 1) > GOOD_SHARED_FLOATS) set_tile(plan.warps_co / 2, 1);
  plan.strips = static_cast<int>(ceil_div(plan.columns.cells, lanes_w * THREAD_W));
  plan.parts_co = static_cast<int>(ceil_div(parts_co, plan.warps_co));
  // All weights at once if that leaves room for inputs, all inputs if they fit beside them; then a
  // tile may serve several rows of warps.
  plan.chunk_w = floats(1, group_in) <= GOOD_SHARED_FLOATS * 3 / 4 ? group_in : 0;
  const auto fits = [&](int chunk_ci) {
    return floats(chunk_ci, plan.chunk_w > 0 ? group_in : chunk_ci) <= GOOD_SHARED_FLOATS;
  };
  plan.chunk_ci = 1;
  while (plan.chunk_ci < group_in && fits(plan.chunk_ci + 1)) ++plan.chunk_ci;
  const int64_t columns_of_blocks =
      static_cast<int64_t>(plan.strips) * plan.parts_phase * plan.parts_co * p.groups * p.batch;
  const int slots = WARPS / plan.warps_co;
  const auto blocks = [&](int64_t tiles) {
    return columns_of_blocks * ceil_div(all_slots, tiles * plan.passes * slots);
  };
  if (plan.chunk_ci == group_in) {
    int64_t least = ceil_div(all_slots, slots);  // passes over the image
    int best = 1;
    for (int passes = 2; passes <= MAX_PASSES; ++passes) {
      set_tile(plan.warps_co, passes);
      const int64_t all = ceil_div(all_slots, passes * slots) * passes;
      if (all > least || !fits(group_in) || blocks(1) < ENOUGH_BLOCKS) continue;
      least = all;
      best = passes;
    }
    set_tile(plan.warps_co, best);
  } else {  // as even chunks as possible
    plan.chunk_ci = static_cast<int>(ceil_div(group_in, ceil_div(group_in, plan.chunk_ci)));
  }
  if (plan.chunk_w == 0) plan.chunk_w = plan.chunk_ci;
  plan.tiles = 1;
  while (plan.tiles < MAX_TILES && blocks(2 * plan.tiles) >= ENOUGH_BLOCKS) plan.tiles *= 2;
  plan.parts_h = static_cast<int>(ceil_div(all_slots, plan.tiles * plan.passes * slots));
  plan.copied_rows = THREADS / (sizeof(T) == sizeof(float) ? plan.pitch / 2
                                : plan.copies_vectors      ? plan.pitch / 4 + 1
                                                           : plan.pitch);
  shared_bytes = floats(plan.chunk_ci, plan.chunk_w) * sizeof(float);
  return plan;
}

template <class T, int PHASES, int CHANNELS>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  std::size_t shared_bytes;
  const Plan plan = make_plan<T, PHASES, CHANNELS>(p, input, output, shared_bytes);
  const int64_t blocks = static_cast<int64_t>(plan.strips) * plan.parts_h * plan.parts_phase *
                         plan.parts_co * p.groups * p.batch;
  if (blocks > INT32_MAX || shared_bytes > MAX_SHARED_FLOATS * sizeof(float)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = cells_kernel<T, PHASES, CHANNELS>;
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), THREADS, shared_bytes, stream>>>(
      input, weight, bias, output, p, rows_of(p), columns_of(p), plan);
  return cudaGetLastError();
}

// As many phases to a thread as the stride has, up to 4: the parts of a larger one are even.
inline int phases_of(const ConvTransposeProblem& p) {
  return static_cast<int>(ceil_div(p.stride_w, ceil_div(p.stride_w, 4)));
}

}  // namespace cells
