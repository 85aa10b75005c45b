// Stage 3, shared_tiled: a block fetches its inputs once and reads them from shared memory.
//
// Since stage 2: the outputs of one tile use the same few inputs again and again, KH * KW times
// each. The block copies the halo tile of the input that its outputs can reach, and the weights
// that go with it, into shared memory, waits, and then runs the very loops of stage 2 on the
// copies. Lanes read consecutive words, or the same one, so no two lanes want different rows of one
// bank.
//
// Cost: for a tile of 8 x 32 outputs a 3x7 kernel needs a halo of 10 x 38 inputs: 380 global loads
// for 5376 FMAs, 14 FMAs per load where stage 2 had one half. Two shared loads per FMA remain.
//
// What does not fit into shared memory at once is taken in chunks: of input channels and, for a
// very large kernel, of taps.

#include "problem.cuh"

constexpr int TILE_H = 8;
constexpr int TILE_W = 32;
constexpr int THREADS = TILE_H * TILE_W;
constexpr int CHUNK_CI = 16;                  // input channels in shared memory, at most
constexpr int SHARED_FLOATS = 48 * 1024 / 4;  // what every architecture gives a block unasked
static_assert(TILE_W == 32, "a warp's lanes must lie in one row");

// What one pass brings into shared memory: `ci` channels of `halo_h` x `halo_w` inputs, and their
// weights for `kh` x `kw` taps.
struct Chunk {
  int ci, kh, kw;
  int halo_h, halo_w;

  __host__ __device__ int input_floats() const { return ci * halo_h * halo_w; }
  __host__ __device__ int floats() const { return input_floats() + ci * kh * kw; }
};

// How many inputs the outputs of a tile can reach through `taps` taps: i * stride covers a stretch
// of tile - 1 + (taps - 1) * dilation.
static int64_t halo(const Axis& axis, int tile, int taps) {
  return (tile - 1 + static_cast<int64_t>(taps - 1) * axis.dilation) / axis.stride + 1;
}

static Chunk choose_chunk(const Axis& rows, const Axis& columns, int group_in) {
  int ci = min(group_in, CHUNK_CI), kh = rows.kernel, kw = columns.kernel;
  for (;;) {
    const int64_t halo_h = halo(rows, TILE_H, kh), halo_w = halo(columns, TILE_W, kw);
    const int64_t floats = ci * (halo_h * halo_w + static_cast<int64_t>(kh) * kw);
    if (floats <= SHARED_FLOATS) {
      return {ci, kh, kw, static_cast<int>(halo_h), static_cast<int>(halo_w)};
    }
    // One tap of one channel always fits: its halo is no larger than the tile.
    int& largest = ci > 1 ? ci : kh > 1 ? kh : kw;
    largest = (largest + 1) / 2;
  }
}

// The first input that tap `k` or an earlier one brings to outputs from `o` on; may be negative.
__device__ __forceinline__ int first_input(const Axis& axis, int o, int k) {
  const int scaled = o + axis.padding - k * axis.dilation;
  return scaled > 0 ? (scaled - 1) / axis.stride + 1 : -(-scaled / axis.stride);
}

// How many of the taps come before kernel index k.
__device__ __forceinline__ int taps_before(const Taps& taps, const Axis& axis, int k) {
  return k <= taps.k ? 0 : min(taps.count, (k - taps.k - 1) / axis.k_step + 1);
}

__global__ void __launch_bounds__(THREADS, 2)
    shared_tiled_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                        const float* __restrict__ bias, float* __restrict__ output,
                        ConvTransposeProblem p, Axis rows, Axis columns, int tiles_h, int tiles_w,
                        Chunk chunk) {
  extern __shared__ float shared[];
  const int halo_size = chunk.halo_h * chunk.halo_w;
  float* const tile_x = shared;                         // [chunk.ci, halo_h, halo_w]
  float* const tile_w = shared + chunk.input_floats();  // [chunk.ci, chunk.kh, chunk.kw]

  // A block is one tile of one output plane [n, co].
  const unsigned plane_out = blockIdx.x / (tiles_h * tiles_w);
  const unsigned tile = blockIdx.x % (tiles_h * tiles_w);
  const int co = plane_out % p.out_channels;
  const int n = plane_out / p.out_channels;
  const int first_oh = tile / tiles_w * TILE_H, oh = first_oh + threadIdx.y;
  const int first_ow = tile % tiles_w * TILE_W, ow = first_ow + threadIdx.x;
  // A thread outside the image has no taps, but it helps to load.
  const bool inside = oh < p.out_height && ow < p.out_width;

  const int group_in = p.in_channels / p.groups;
  const int group_out = p.out_channels / p.groups;
  const int first_ci = co / group_out * group_in;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const float* planes = input + (static_cast<int64_t>(n) * p.in_channels + first_ci) * plane_size;
  const int64_t filter_size = static_cast<int64_t>(p.kernel_h) * p.kernel_w;
  const float* filters =
      weight + (static_cast<int64_t>(first_ci) * group_out + co % group_out) * filter_size;

  const Taps none = {0, 0, 0};
  const Taps vertical = inside ? taps_reaching(rows, oh) : none;
  const Taps horizontal = inside ? taps_reaching(columns, ow) : none;

  float sum = 0.0f;
  for (int ci0 = 0; ci0 < group_in; ci0 += chunk.ci) {
    const int chunk_ci = min(chunk.ci, group_in - ci0);
    for (int kh0 = 0; kh0 < p.kernel_h; kh0 += chunk.kh) {
      const int chunk_kh = min(chunk.kh, p.kernel_h - kh0);
      const int first_h = first_input(rows, first_oh, kh0 + chunk_kh - 1);
      for (int kw0 = 0; kw0 < p.kernel_w; kw0 += chunk.kw) {
        const int chunk_kw = min(chunk.kw, p.kernel_w - kw0);
        const int first_w = first_input(columns, first_ow, kw0 + chunk_kw - 1);

        // A warp copies every TILE_H-th row. Halo values outside the image are never read, so they
        // need no zeros.
        int ci = ci0, row = threadIdx.y;
        for (float* to = tile_x + row * chunk.halo_w; to < tile_x + chunk_ci * halo_size;
             to += TILE_H * chunk.halo_w) {
          for (; row >= chunk.halo_h; row -= chunk.halo_h) ++ci;
          const int h = first_h + row;
          row += TILE_H;
          if (h < 0 || h >= p.height) continue;
          const float* x = planes + ci * plane_size + static_cast<int64_t>(h) * p.width + first_w;
#pragma unroll 1
          for (int column = threadIdx.x; column < chunk.halo_w; column += TILE_W) {
            const int w = first_w + column;
            if (w >= 0 && w < p.width) to[column] = x[column];
          }
        }
        for (int c = threadIdx.y; c < chunk_ci; c += TILE_H) {
          const float* w = filters + static_cast<int64_t>(ci0 + c) * group_out * filter_size +
                           static_cast<int64_t>(kh0) * p.kernel_w + kw0;
          float* to = tile_w + c * chunk.kh * chunk.kw;
          for (int kh = 0; kh < chunk_kh; ++kh) {
            for (int kw = threadIdx.x; kw < chunk_kw; kw += TILE_W) to[kw] = w[kw];
            to += chunk.kw;
            w += p.kernel_w;
          }
        }
        __syncthreads();

        const int th_begin = taps_before(vertical, rows, kh0);
        const int th_end = taps_before(vertical, rows, kh0 + chunk_kh);
        const int tw_begin = taps_before(horizontal, columns, kw0);
        const int tw_end = taps_before(horizontal, columns, kw0 + chunk_kw);
        const int taps = tw_end - tw_begin;
        const int first_row = vertical.i - th_begin * rows.i_step - first_h;
        const int first_kh = vertical.k + th_begin * rows.k_step - kh0;
        const float* x_of_ci =
            tile_x + first_row * chunk.halo_w + horizontal.i - tw_begin * columns.i_step - first_w;
        const float* w_of_ci =
            tile_w + first_kh * chunk.kw + horizontal.k + tw_begin * columns.k_step - kw0;
        for (int c = 0; c < chunk_ci; ++c) {
          const float *x_of_row = x_of_ci, *w_of_row = w_of_ci;
          for (int th = th_begin; th < th_end; ++th) {
            const float *x = x_of_row, *w = w_of_row;
            const float* const w_end = w + taps * columns.k_step;
            // Not unrolled: lanes that take 4 taps and lanes that take 3 then stay together.
#pragma unroll 1
            for (; w != w_end; w += columns.k_step) {
              sum = fmaf(*x, *w, sum);
              x -= columns.i_step;
            }
            x_of_row -= rows.i_step * chunk.halo_w;
            w_of_row += rows.k_step * chunk.kw;
          }
          x_of_ci += halo_size;
          w_of_ci += chunk.kh * chunk.kw;
        }
        __syncthreads();
      }
    }
  }
  if (!inside) return;
  if (bias != nullptr) sum += bias[co];
  output[(static_cast<int64_t>(plane_out) * p.out_height + oh) * p.out_width + ow] = sum;
}

extern "C" cudaError_t shared_tiled(const float* input, const float* weight, const float* bias,
                                    float* output, ConvTransposeProblem p, cudaStream_t stream) {
  const Axis rows = rows_of(p), columns = columns_of(p);
  const Chunk chunk = choose_chunk(rows, columns, p.in_channels / p.groups);
  const auto tiles_h = static_cast<int>(ceil_div(p.out_height, TILE_H));
  const auto tiles_w = static_cast<int>(ceil_div(p.out_width, TILE_W));
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.out_channels * tiles_h * tiles_w;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  shared_tiled_kernel<<<static_cast<unsigned>(blocks), dim3(TILE_W, TILE_H),
                        chunk.floats() * sizeof(float), stream>>>(
      input, weight, bias, output, p, rows, columns, tiles_h, tiles_w, chunk);
  return cudaGetLastError();
}
