// Stage 4, register_blocked: each thread owns a block of outputs and keeps it in registers.
//
// Since stage 3: two shared loads per FMA keep the FMA units waiting. A thread now owns THREAD_W
// neighbouring pixels of THREAD_CO output channels. An input serves all its channels, a weight all
// its pixels, and along a row the inputs of one tap are those of the next, shifted by one: they
// slide through a window in registers. Shared memory is read 16 bytes at a time, and the next tile
// is on its way (asynchronously from sm_80 on) while this one is used.
//
// Cost, 3x7: for one row of taps a thread reads a window of 28 inputs and 7 x 8 weights, 21 loads
// of 16 bytes, and does 7 * 20 * 8 = 1120 FMAs: 53 per load where stage 3 had one half.
//
// The outputs of one residue class modulo the stride (a phase) are a stride-1 problem of their own,
// whose taps lie i_step apart. The template is written for a phase. <3, 7> is compiled for stride 1
// and dilation 1, where there is one phase and all sizes are constants; <0, 0> takes any other
// problem.

#include <cuda_pipeline.h>

#include "problem.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int LANES_H = 16;  // a warp's lanes cover 16 rows of outputs ...
constexpr int LANES_W = 2;   // ... and, along a row, two times THREAD_W
constexpr int TILE_H = LANES_H;
constexpr int SHARED_FLOATS = 48 * 1024 / 4;
static_assert(LANES_H * LANES_W == 32, "one lane per place in a warp's tile");

// What one pass brings into shared memory: `ci` channels of `rows` x `columns` inputs, `pitch`
// words apart, and their weights for `th` x `tw` taps.
struct Chunk {
  int ci, th, tw;
  int rows, columns, pitch;

  __host__ __device__ constexpr int input_floats() const { return (ci * rows * pitch + 3) / 4 * 4; }
  __host__ __device__ constexpr int floats(int block_co) const {
    return input_floats() + ci * th * tw * block_co;
  }
};

__host__ __device__ constexpr int next_odd(int value) { return value / 2 * 2 + 1; }

// The sizes of a variant. Lanes of a quarter warp read 16 bytes each from 8 rows of the tile: they
// use all banks once if a row is an odd number of 16-byte words. Lanes that read 4 bytes each from
// 16 rows and two columns 16 apart do so if a row is an odd number of words.
template <int KH, int KW>
struct Sizes {
  static constexpr bool FIXED = KW > 0;
  static constexpr int THREAD_W = FIXED ? 20 : 16;
  static constexpr int THREAD_CO = FIXED ? 8 : 4;
  static constexpr int TILE_W = LANES_W * THREAD_W;
  static constexpr int BLOCK_CO = WARPS * THREAD_CO;
  static constexpr int CHUNK_CI = FIXED ? 2 : 8;
  static constexpr int WINDOW = (THREAD_W + KW - 1 + 3) / 4 * 4;  // inputs of one row of taps
  static constexpr int STAGE_PITCH = 4 * next_odd(TILE_W / 4);    // a warp's outputs, TILE_H rows
  static constexpr int STAGE_FLOATS = TILE_H * STAGE_PITCH;
  static_assert(TILE_W % 8 == 0 && TILE_W <= 40, "8 lanes write the columns beyond the first 32");
  static_assert(BLOCK_CO <= 32, "a lane loads the weights of one output channel");
  static_assert(THREAD_CO % 4 == 0, "a thread's weights are read 16 bytes at a time");
  static_assert(FIXED ? THREAD_W % 4 == 0 : THREAD_W == 16, "see above");

  // The chunk of the variant whose sizes are constants.
  __host__ __device__ static constexpr Chunk fixed_chunk() {
    constexpr int columns = TILE_W - THREAD_W + WINDOW;  // the last window is whole
    return {CHUNK_CI, KH, KW, TILE_H + KH - 1, columns, 4 * next_odd(columns / 4)};
  }
};

// How the problem is cut into blocks.
struct Tiling {
  int phases_h, phases_w;
  int h, w, co;  // tiles along a phase's height and width, and along a group's output channels
};

// The largest chunk of which two fit into shared memory. Tap counts are those of the largest phase.
template <class S>
static Chunk choose_chunk(const Axis& rows, const Axis& columns, int group_in) {
  if (S::FIXED) return S::fixed_chunk();
  int ci = min(group_in, S::CHUNK_CI);
  int th = (rows.kernel - 1) / rows.k_step + 1, tw = (columns.kernel - 1) / columns.k_step + 1;
  for (;;) {
    const int64_t tile_h = TILE_H + static_cast<int64_t>(th - 1) * rows.i_step;
    const int64_t tile_w = S::TILE_W + static_cast<int64_t>(tw - 1) * columns.i_step;
    const int64_t floats =
        ci * (tile_h * (tile_w + 1) + static_cast<int64_t>(th) * tw * S::BLOCK_CO);
    if (2 * (floats + 4) <= SHARED_FLOATS) {
      const auto width = static_cast<int>(tile_w);
      return {ci, th, tw, static_cast<int>(tile_h), width, next_odd(width)};
    }
    // One tap of one channel always fits.
    int& largest = ci > 1 ? ci : th > 1 ? th : tw;
    largest = (largest + 1) / 2;
  }
}

__device__ __forceinline__ int take_digit(unsigned& index, int size) {
  const int digit = index % size;
  index /= size;
  return digit;
}

__device__ __forceinline__ void copy_or_zero(float* shared, const float* global, bool inside) {
  if (inside) {
    __pipeline_memcpy_async(shared, global, sizeof(float));
  } else {
    *shared = 0.0f;
  }
}

__device__ __forceinline__ void load_vector(float* registers, const float* shared) {
  const float4 vector = *reinterpret_cast<const float4*>(shared);
  registers[0] = vector.x;
  registers[1] = vector.y;
  registers[2] = vector.z;
  registers[3] = vector.w;
}

__device__ __forceinline__ void store_vector(float* shared, const float* registers) {
  *reinterpret_cast<float4*>(shared) =
      make_float4(registers[0], registers[1], registers[2], registers[3]);
}

// The sum for one output, tap by tap: slow, and right where a weight is not finite (see the
// kernel).
__device__ float sum_of_taps(const float* __restrict__ planes, const float* __restrict__ filters,
                             const ConvTransposeProblem& p, const Axis& rows, const Axis& columns,
                             int oh, int ow) {
  const Taps vertical = taps_reaching(rows, oh), horizontal = taps_reaching(columns, ow);
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t filters_size =
      static_cast<int64_t>(p.out_channels / p.groups) * p.kernel_h * p.kernel_w;
  float sum = 0.0f;
  for (int ci = 0; ci < p.in_channels / p.groups; ++ci) {
    for (int th = 0; th < vertical.count; ++th) {
      for (int tw = 0; tw < horizontal.count; ++tw) {
        const int64_t h = vertical.i - th * rows.i_step, w = horizontal.i - tw * columns.i_step;
        const int kh = vertical.k + th * rows.k_step, kw = horizontal.k + tw * columns.k_step;
        sum = fmaf(planes[ci * plane_size + h * p.width + w],
                   filters[ci * filters_size + kh * p.kernel_w + kw], sum);
      }
    }
  }
  return sum;
}

template <int KH, int KW>
__global__ void __launch_bounds__(THREADS, 2)
    register_blocked_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                            const float* __restrict__ bias, float* __restrict__ output,
                            ConvTransposeProblem p, Axis rows, Axis columns, Tiling tiles,
                            Chunk run_time_chunk) {
  using S = Sizes<KH, KW>;
  constexpr int THREAD_W = S::THREAD_W, THREAD_CO = S::THREAD_CO, BLOCK_CO = S::BLOCK_CO;
  const Chunk chunk = S::FIXED ? S::fixed_chunk() : run_time_chunk;
  const int i_step_h = S::FIXED ? 1 : rows.i_step, i_step_w = S::FIXED ? 1 : columns.i_step;
  const int k_step_h = S::FIXED ? 1 : rows.k_step, k_step_w = S::FIXED ? 1 : columns.k_step;
  extern __shared__ __align__(16) float shared[];  // two buffers: inputs, then weights

  // A block is one tile of one phase of one image, for BLOCK_CO channels of one group. Blocks that
  // share inputs are neighbours.
  unsigned digits = blockIdx.x;
  const int first_co = take_digit(digits, tiles.co) * BLOCK_CO;  // within the group
  const int group = take_digit(digits, p.groups);
  const int phase_w = take_digit(digits, tiles.phases_w);
  const int first_qw = take_digit(digits, tiles.w) * S::TILE_W;  // q counts the phase's pixels
  const int phase_h = take_digit(digits, tiles.phases_h);
  const int first_qh = take_digit(digits, tiles.h) * TILE_H;
  const int n = digits;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_h = lane % LANES_H, lane_w = lane / LANES_H;

  const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const int64_t filter_size = static_cast<int64_t>(p.kernel_h) * p.kernel_w;
  const float* const planes =
      input + (static_cast<int64_t>(n) * p.in_channels + group * group_in) * plane_size;
  const float* const filters =
      weight + static_cast<int64_t>(group) * group_in * group_out * filter_size;

  const Taps vertical = S::FIXED ? Taps{0, p.padding_h, KH} : taps_of_class(rows, phase_h);
  const Taps horizontal = S::FIXED ? Taps{0, p.padding_w, KW} : taps_of_class(columns, phase_w);
  const int count_h = vertical.count, count_w = horizontal.count;
  const int chunks_h = S::FIXED ? 1 : static_cast<int>(ceil_div(count_h, chunk.th));
  const int chunks_w = S::FIXED ? 1 : static_cast<int>(ceil_div(count_w, chunk.tw));
  const int passes = static_cast<int>(ceil_div(group_in, chunk.ci)) * chunks_h * chunks_w;

  // Which channels and taps a pass is about.
  struct Pass {
    int ci, th, tw;  // the first
    int count_th, count_tw;
  };
  const auto pass_at = [&](int index) {
    unsigned digits = index;
    const int tw = take_digit(digits, chunks_w) * chunk.tw;
    const int th = take_digit(digits, chunks_h) * chunk.th;
    return Pass{static_cast<int>(digits) * chunk.ci, th, tw, min(chunk.th, count_h - th),
                min(chunk.tw, count_w - tw)};
  };

  // Lanes copy neighbouring words: columns of the input, output channels of the weights.
  const auto load = [&](const Pass& pass, float* tile_x, float* tile_w) {
    // Column 0 of the tile belongs to the pass's last tap, which has the smallest input index.
    const int first_h = vertical.i + first_qh - (pass.th + pass.count_th - 1) * i_step_h;
    const int first_w = horizontal.i + first_qw - (pass.tw + pass.count_tw - 1) * i_step_w;
    const int first_kh = vertical.k + pass.th * k_step_h;
    const int first_kw = horizontal.k + pass.tw * k_step_w;
    const int co = first_co + lane;
#pragma unroll 1
    for (int c = 0; c < chunk.ci; ++c) {
      const int ci = pass.ci + c;
      float* to = tile_x + (c * chunk.rows + warp) * chunk.pitch;
      const float* x = planes + ci * plane_size + static_cast<int64_t>(first_h + warp) * p.width;
#pragma unroll 1
      for (int row = warp; row < chunk.rows; row += WARPS) {
        const int h = first_h + row;
        const bool row_inside = ci < group_in && h >= 0 && h < p.height;
#pragma unroll
        for (int j = 0; j < chunk.columns; j += 32) {
          const int column = j + lane, w = first_w + column;
          if (column < chunk.columns) {
            copy_or_zero(to + column, x + w, row_inside && w >= 0 && w < p.width);
          }
        }
        to += WARPS * chunk.pitch;
        x += WARPS * static_cast<int64_t>(p.width);
      }
      const float* w = filters + (static_cast<int64_t>(ci) * group_out + co) * filter_size;
      const bool filter_inside = ci < group_in && co < group_out;
      if (lane >= BLOCK_CO) continue;
      float* const to_w = tile_w + c * chunk.th * chunk.tw * BLOCK_CO + lane;
      constexpr int UNROLLED = S::FIXED ? KH * KW : 1;
#pragma unroll UNROLLED
      for (int tap = warp; tap < chunk.th * chunk.tw; tap += WARPS) {
        if constexpr (S::FIXED) {  // all taps, in the weight's own order
          copy_or_zero(to_w + tap * BLOCK_CO, w + tap, filter_inside);
        } else {
          const int th = tap / chunk.tw, tw = tap % chunk.tw;
          const int kh = first_kh + th * k_step_h, kw = first_kw + tw * k_step_w;
          copy_or_zero(to_w + tap * BLOCK_CO, w + static_cast<int64_t>(kh) * p.kernel_w + kw,
                       filter_inside && th < pass.count_th && tw < pass.count_tw);
        }
      }
    }
    __pipeline_commit();
  };

  float sum[THREAD_CO][THREAD_W] = {};

  const auto compute = [&](const Pass& pass, const float* tile_x, const float* tile_w) {
#pragma unroll 1
    for (int ci = 0; ci < chunk.ci; ++ci) {
      const int count_th = S::FIXED ? KH : pass.count_th;
#pragma unroll 1
      for (int th = 0; th < count_th; ++th) {
        const float* x = tile_x + lane_w * THREAD_W +
                         (ci * chunk.rows + lane_h + (count_th - 1 - th) * i_step_h) * chunk.pitch;
        const float* w = tile_w + (ci * chunk.th + th) * chunk.tw * BLOCK_CO + warp * THREAD_CO;
        if constexpr (S::FIXED) {
          float window[S::WINDOW];
#pragma unroll
          for (int j = 0; j < S::WINDOW; j += 4) load_vector(window + j, x + j);
#pragma unroll
          for (int kw = 0; kw < KW; ++kw) {
            float weights[THREAD_CO];
#pragma unroll
            for (int c = 0; c < THREAD_CO; c += 4) load_vector(weights + c, w + kw * BLOCK_CO + c);
#pragma unroll
            for (int c = 0; c < THREAD_CO; ++c) {
#pragma unroll
              for (int j = 0; j < THREAD_W; ++j) {
                sum[c][j] = fmaf(window[j + KW - 1 - kw], weights[c], sum[c][j]);
              }
            }
          }
        } else {
          for (int tw = 0; tw < pass.count_tw; ++tw) {
            float pixels[THREAD_W], weights[THREAD_CO];
#pragma unroll
            for (int j = 0; j < THREAD_W; ++j) {
              pixels[j] = x[(pass.count_tw - 1 - tw) * i_step_w + j];
            }
#pragma unroll
            for (int c = 0; c < THREAD_CO; c += 4) load_vector(weights + c, w + tw * BLOCK_CO + c);
#pragma unroll
            for (int c = 0; c < THREAD_CO; ++c) {
#pragma unroll
              for (int j = 0; j < THREAD_W; ++j) sum[c][j] = fmaf(pixels[j], weights[c], sum[c][j]);
            }
          }
        }
      }
    }
  };

  // Two buffers: while one pass computes, the next is being copied.
  const int input_floats = chunk.input_floats(), buffer_floats = chunk.floats(BLOCK_CO);
  if (passes > 0) load(pass_at(0), shared, shared + input_floats);
  for (int index = 0; index < passes; ++index) {
    float* const current = shared + (index % 2) * buffer_floats;
    float* const other = shared + (1 - index % 2) * buffer_floats;
    if (index + 1 < passes) {
      load(pass_at(index + 1), other, other + input_floats);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    compute(pass_at(index), current, current + input_floats);
    __syncthreads();
  }

  // A thread holds a row of THREAD_W pixels; written directly, the lanes of a warp would touch 32
  // places far apart. Each warp turns its tile around in shared memory, a channel at a time, and
  // writes rows of neighbouring pixels.
  float* const stage = shared + warp * S::STAGE_FLOATS;
  const int thread_co = first_co + warp * THREAD_CO;  // within the group
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  float* const image =
      output +
      (static_cast<int64_t>(n) * p.out_channels + group * group_out + thread_co) * out_plane;
  const int count_qh = (p.out_height - phase_h - 1) / p.stride_h + 1;  // the phase's pixels
  const int count_qw = (p.out_width - phase_w - 1) / p.stride_w + 1;
  bool not_a_number = false;
#pragma unroll
  for (int c = 0; c < THREAD_CO; ++c) {
    if (thread_co + c >= group_out) break;
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + c];
#pragma unroll
    for (int j = 0; j < THREAD_W; ++j) {
      sum[c][j] += shift;
      not_a_number |= sum[c][j] != sum[c][j];
    }
#pragma unroll
    for (int j = 0; j < THREAD_W; j += 4) {
      store_vector(stage + lane_h * S::STAGE_PITCH + lane_w * THREAD_W + j, sum[c] + j);
    }
    __syncwarp();
    const auto write = [&](int row, int column) {
      if (first_qh + row >= count_qh || first_qw + column >= count_qw) return;
      const int oh = phase_h + (first_qh + row) * p.stride_h;
      const int ow = phase_w + (first_qw + column) * p.stride_w;
      image[c * out_plane + static_cast<int64_t>(oh) * p.out_width + ow] =
          stage[row * S::STAGE_PITCH + column];
    };
    for (int row = 0; row < TILE_H; ++row) write(row, lane);
    if constexpr (S::TILE_W > 32) {
      constexpr int REST = S::TILE_W - 32;
      for (int row = lane / REST; row < TILE_H; row += 32 / REST) write(row, 32 + lane % REST);
    }
    __syncwarp();
  }
  if (!not_a_number) return;

  // Beyond the image's edge the tile holds zeros, and zero times an infinite or NaN weight is NaN,
  // where the definition has no product at all. Such outputs are summed again, without the zeros.
  if (first_qh + lane_h >= count_qh) return;
  const int oh = phase_h + (first_qh + lane_h) * p.stride_h;
  const bool whole_rows = taps_reaching(rows, oh).count == vertical.count;
  for (int c = 0; c < THREAD_CO && thread_co + c < group_out; ++c) {
    float* y = image + c * out_plane + static_cast<int64_t>(oh) * p.out_width;
    const int thread_qw = first_qw + lane_w * THREAD_W;
    for (int j = 0; j < THREAD_W && thread_qw + j < count_qw; ++j) {
      const int ow = phase_w + (thread_qw + j) * p.stride_w;
      const bool whole = whole_rows && taps_reaching(columns, ow).count == horizontal.count;
      if (whole || y[ow] == y[ow]) continue;
      const float value =
          sum_of_taps(planes, filters + (thread_co + c) * filter_size, p, rows, columns, oh, ow);
      y[ow] = bias == nullptr ? value : value + bias[group * group_out + thread_co + c];
    }
  }
}

static bool is_3x7(const ConvTransposeProblem& p) {
  return p.kernel_h == 3 && p.kernel_w == 7 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

template <int KH, int KW>
static cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          const ConvTransposeProblem& p, cudaStream_t stream) {
  using S = Sizes<KH, KW>;
  const Axis rows = rows_of(p), columns = columns_of(p);
  const Chunk chunk = choose_chunk<S>(rows, columns, p.in_channels / p.groups);
  // The phases differ by a pixel at most; the tiles are those of the largest.
  const Tiling tiles = {min(p.stride_h, p.out_height), min(p.stride_w, p.out_width),
                        static_cast<int>(ceil_div(ceil_div(p.out_height, p.stride_h), TILE_H)),
                        static_cast<int>(ceil_div(ceil_div(p.out_width, p.stride_w), S::TILE_W)),
                        static_cast<int>(ceil_div(p.out_channels / p.groups, S::BLOCK_CO))};
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.groups * tiles.phases_h *
                         tiles.phases_w * tiles.h * tiles.w * tiles.co;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const std::size_t shared_bytes =
      max(2 * chunk.floats(S::BLOCK_CO), WARPS * S::STAGE_FLOATS) * sizeof(float);
  register_blocked_kernel<KH, KW><<<static_cast<unsigned>(blocks), THREADS, shared_bytes, stream>>>(
      input, weight, bias, output, p, rows, columns, tiles, chunk);
  return cudaGetLastError();
}

extern "C" cudaError_t register_blocked(const float* input, const float* weight, const float* bias,
                                        float* output, ConvTransposeProblem p,
                                        cudaStream_t stream) {
  return is_3x7(p) ? launch<3, 7>(input, weight, bias, output, p, stream)
                   : launch<0, 0>(input, weight, bias, output, p, stream);
}

// Which of the two runs for a problem.
extern "C" const char* register_blocked_variant(ConvTransposeProblem p) {
  return is_3x7(p) ? "3x7" : "general";
}
