// Register blocking for any problem: what the stages from register_blocked on do where they have
// nothing better.
//
// The outputs of one residue class modulo the stride (a phase) are a stride-1 problem of their own,
// whose taps lie i_step apart; the kernel computes a tile of one phase. A thread owns THREAD_W
// neighbouring pixels of THREAD_CO output channels and keeps them in registers: an input serves all
// its channels, a weight all its pixels. Shared memory has two buffers, and the next tile is on its
// way (asynchronously from sm_80 on) while one is used.
//
// Cost: for one tap a thread reads 16 inputs and one vector of 4 weights, and does 64 FMAs: almost
// 4 per load.

#pragma once

#include "blocking.cuh"

namespace phases {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int THREAD_W = 16;
constexpr int THREAD_CO = 4;
constexpr int LANES_H = 16;  // a warp's lanes cover 16 rows of outputs ...
constexpr int LANES_W = 2;   // ... and, along a row, two times THREAD_W
constexpr int TILE_H = LANES_H;
constexpr int TILE_W = LANES_W * THREAD_W;
constexpr int BLOCK_CO = WARPS * THREAD_CO;
constexpr int CHUNK_CI = 8;                   // input channels in shared memory, at most
constexpr int SHARED_FLOATS = 48 * 1024 / 4;  // what every architecture gives a block unasked
constexpr int STAGE_PITCH = TILE_W + 4;       // a warp's outputs, TILE_H rows
constexpr int STAGE_FLOATS = TILE_H * STAGE_PITCH;
static_assert(LANES_H * LANES_W == 32, "one lane per place in a warp's tile");
static_assert(BLOCK_CO <= 32, "a lane loads the weights of one output channel");
static_assert(TILE_W == 32, "the lanes write a row of the tile");
static_assert(THREAD_CO == 4, "a thread's weights are one vector");

// What one pass brings into shared memory: `ci` channels of `rows` x `columns` inputs, `pitch`
// words apart, and their weights for `th` x `tw` taps.
struct Chunk {
  int ci, th, tw;
  int rows, columns, pitch;

  __host__ __device__ int input_floats() const { return (ci * rows * pitch + 3) / 4 * 4; }
  __host__ __device__ int floats() const { return input_floats() + ci * th * tw * BLOCK_CO; }
};

// How the problem is cut into blocks.
struct Tiling {
  int phases_h, phases_w;
  int h, w, co;  // tiles along a phase's height and width, and along a group's output channels
};

// The largest chunk of which two fit into shared memory. Tap counts are those of the largest phase.
// Lanes read words from 16 rows and two columns 16 apart: they use all banks once if a row is an
// odd number of words.
static Chunk choose_chunk(const Axis& rows, const Axis& columns, int group_in) {
  int ci = min(group_in, CHUNK_CI);
  int th = (rows.kernel - 1) / rows.k_step + 1, tw = (columns.kernel - 1) / columns.k_step + 1;
  for (;;) {
    const int64_t tile_h = TILE_H + static_cast<int64_t>(th - 1) * rows.i_step;
    const int64_t tile_w = TILE_W + static_cast<int64_t>(tw - 1) * columns.i_step;
    const int64_t floats = ci * (tile_h * (tile_w + 1) + static_cast<int64_t>(th) * tw * BLOCK_CO);
    if (2 * (floats + 4) <= SHARED_FLOATS) {
      const auto width = static_cast<int>(tile_w);
      return {ci, th, tw, static_cast<int>(tile_h), width, width / 2 * 2 + 1};
    }
    // One tap of one channel always fits.
    int& largest = ci > 1 ? ci : th > 1 ? th : tw;
    largest = (largest + 1) / 2;
  }
}

__global__ void __launch_bounds__(THREADS, 2)
    register_blocked_phases_kernel(const float* __restrict__ input,
                                   const float* __restrict__ weight, const float* __restrict__ bias,
                                   float* __restrict__ output, ConvTransposeProblem p, Axis rows,
                                   Axis columns, Tiling tiles, Chunk chunk) {
  extern __shared__ __align__(16) float shared[];  // two buffers: inputs, then weights

  // A block is one tile of one phase of one image, for BLOCK_CO channels of one group. Blocks that
  // share inputs are neighbours.
  unsigned digits = blockIdx.x;
  const int first_co = take_digit(digits, tiles.co) * BLOCK_CO;  // within the group
  const int group = take_digit(digits, p.groups);
  const int phase_w = take_digit(digits, tiles.phases_w);
  const int first_qw = take_digit(digits, tiles.w) * TILE_W;  // q counts the phase's pixels
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

  const Taps vertical = taps_of_class(rows, phase_h);
  const Taps horizontal = taps_of_class(columns, phase_w);
  const int chunks_h = static_cast<int>(ceil_div(vertical.count, chunk.th));
  const int chunks_w = static_cast<int>(ceil_div(horizontal.count, chunk.tw));
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
    return Pass{static_cast<int>(digits) * chunk.ci, th, tw, min(chunk.th, vertical.count - th),
                min(chunk.tw, horizontal.count - tw)};
  };

  // Lanes copy neighbouring words: columns of the input, output channels of the weights.
  const auto load = [&](const Pass& pass, float* tile_x, float* tile_w) {
    // Column 0 of the tile belongs to the pass's last tap, which has the smallest input index.
    const int first_h = vertical.i + first_qh - (pass.th + pass.count_th - 1) * rows.i_step;
    const int first_w = horizontal.i + first_qw - (pass.tw + pass.count_tw - 1) * columns.i_step;
    const int first_kh = vertical.k + pass.th * rows.k_step;
    const int first_kw = horizontal.k + pass.tw * columns.k_step;
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
        for (int column = lane; column < chunk.columns; column += 32) {
          const int w = first_w + column;
          copy_or_zero(to + column, x + w, row_inside && w >= 0 && w < p.width);
        }
        to += WARPS * chunk.pitch;
        x += WARPS * static_cast<int64_t>(p.width);
      }
      if (lane >= BLOCK_CO) continue;
      const float* w = filters + (static_cast<int64_t>(ci) * group_out + co) * filter_size;
      const bool filter_inside = ci < group_in && co < group_out;
      float* const to_w = tile_w + c * chunk.th * chunk.tw * BLOCK_CO + lane;
#pragma unroll 1
      for (int tap = warp; tap < chunk.th * chunk.tw; tap += WARPS) {
        const int th = tap / chunk.tw, tw = tap % chunk.tw;
        const int kh = first_kh + th * rows.k_step, kw = first_kw + tw * columns.k_step;
        copy_or_zero(to_w + tap * BLOCK_CO, w + static_cast<int64_t>(kh) * p.kernel_w + kw,
                     filter_inside && th < pass.count_th && tw < pass.count_tw);
      }
    }
    __pipeline_commit();
  };

  float sum[THREAD_CO][THREAD_W] = {};

  const auto compute = [&](const Pass& pass, const float* tile_x, const float* tile_w) {
#pragma unroll 1
    for (int ci = 0; ci < chunk.ci; ++ci) {
#pragma unroll 1
      for (int th = 0; th < pass.count_th; ++th) {
        const int row = lane_h + (pass.count_th - 1 - th) * rows.i_step;
        const float* x = tile_x + lane_w * THREAD_W + (ci * chunk.rows + row) * chunk.pitch;
        const float* w = tile_w + (ci * chunk.th + th) * chunk.tw * BLOCK_CO + warp * THREAD_CO;
        for (int tw = 0; tw < pass.count_tw; ++tw) {
          float pixels[THREAD_W], weights[THREAD_CO];
#pragma unroll
          for (int j = 0; j < THREAD_W; ++j) {
            pixels[j] = x[(pass.count_tw - 1 - tw) * columns.i_step + j];
          }
          load_vector(weights, w + tw * BLOCK_CO);
#pragma unroll
          for (int c = 0; c < THREAD_CO; ++c) {
#pragma unroll
            for (int j = 0; j < THREAD_W; ++j) sum[c][j] = fmaf(pixels[j], weights[c], sum[c][j]);
          }
        }
      }
    }
  };

  // Two buffers: while one pass computes, the next is being copied.
  const int input_floats = chunk.input_floats(), buffer_floats = chunk.floats();
  if (passes > 0) load(pass_at(0), shared, shared + input_floats);
  for (int index = 0; index < passes; ++index) {
    float* const current = shared + (index % 2) * buffer_floats;
    float* const other = shared + (1 - index % 2) * buffer_floats;
    __pipeline_wait_prior(0);
    __syncthreads();  // all has arrived, and nobody uses the other buffer any more
    if (index + 1 < passes) load(pass_at(index + 1), other, other + input_floats);
    compute(pass_at(index), current, current + input_floats);
  }
  __syncthreads();

  // A thread holds a row of THREAD_W pixels; written directly, the lanes of a warp would touch 32
  // places far apart. Each warp turns its tile around in shared memory, a channel at a time, and
  // writes rows of neighbouring pixels.
  float* const stage = shared + warp * STAGE_FLOATS;
  const int thread_co = first_co + warp * THREAD_CO;  // within the group
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  float* const image =
      output +
      (static_cast<int64_t>(n) * p.out_channels + group * group_out + thread_co) * out_plane;
  const int count_qh = (p.out_height - phase_h - 1) / p.stride_h + 1;  // the phase's pixels
  const int count_qw = (p.out_width - phase_w - 1) / p.stride_w + 1;
  const int64_t row_size = static_cast<int64_t>(p.stride_h) * p.out_width;
  const bool column_inside = first_qw + lane < count_qw;
  const int ow = column_inside ? phase_w + (first_qw + lane) * p.stride_w : 0;
  float* const column =
      image + (phase_h + static_cast<int64_t>(first_qh) * p.stride_h) * p.out_width;
  const int rows_inside = column_inside ? min(TILE_H, count_qh - first_qh) : 0;
  bool not_a_number = false;
#pragma unroll
  for (int c = 0; c < THREAD_CO; ++c) {
    if (thread_co + c >= group_out) break;
    const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + c];
#pragma unroll
    for (int j = 0; j < THREAD_W; j += 4) {
      store_vector(stage + lane_h * STAGE_PITCH + lane_w * THREAD_W + j, sum[c] + j);
    }
    __syncwarp();
    for (int row = 0; row < rows_inside; ++row) {
      const float value = stage[row * STAGE_PITCH + lane] + shift;
      not_a_number |= value != value;
      column[c * out_plane + row * row_size + ow] = value;
    }
    __syncwarp();
  }
  if (!not_a_number) return;

  // Beyond the image's edge the tile holds zeros, and zero times an infinite or NaN weight is NaN,
  // where the definition has no product at all. Such outputs are summed again, without the zeros.
  const bool whole_columns = taps_reaching(columns, ow).count == horizontal.count;
  for (int c = 0; c < THREAD_CO && thread_co + c < group_out; ++c) {
    for (int row = 0; row < rows_inside; ++row) {
      const int oh = phase_h + (first_qh + row) * p.stride_h;
      const bool whole = whole_columns && taps_reaching(rows, oh).count == vertical.count;
      float& y = column[c * out_plane + row * row_size + ow];
      if (whole || y == y) continue;
      const float* const filter = filters + (thread_co + c) * filter_size;
      const float shift = bias == nullptr ? -0.0f : bias[group * group_out + thread_co + c];
      y = sum_of_taps(planes, filter, p, rows, columns, oh, ow) + shift;
    }
  }
}

static cudaError_t launch(const float* input, const float* weight, const float* bias, float* output,
                          const ConvTransposeProblem& p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  const Chunk chunk = choose_chunk(rows, columns, p.in_channels / p.groups);
  // The phases differ by a pixel at most; the tiles are those of the largest.
  const Tiling tiles = {min(p.stride_h, p.out_height), min(p.stride_w, p.out_width),
                        static_cast<int>(ceil_div(ceil_div(p.out_height, p.stride_h), TILE_H)),
                        static_cast<int>(ceil_div(ceil_div(p.out_width, p.stride_w), TILE_W)),
                        static_cast<int>(ceil_div(p.out_channels / p.groups, BLOCK_CO))};
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.groups * tiles.phases_h *
                         tiles.phases_w * tiles.h * tiles.w * tiles.co;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const std::size_t shared_bytes = max(2 * chunk.floats(), WARPS * STAGE_FLOATS) * sizeof(float);
  register_blocked_phases_kernel<<<static_cast<unsigned>(blocks), THREADS, shared_bytes, stream>>>(
      input, weight, bias, output, p, rows, columns, tiles, chunk);
  return cudaGetLastError();
}

}  // namespace phases
