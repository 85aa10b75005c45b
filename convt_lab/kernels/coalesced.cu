// Stage 2, coalesced: a warp's lanes run along the output's width, and visit only taps that count.
//
// Since stage 1: (1) neighbouring lanes own neighbouring pixels of one row, so that for stride 1 a
// warp's 32 inputs are 128 consecutive bytes, 4 or 5 sectors instead of 32; (2) the taps that reach
// a pixel are a residue class, found once per thread (problem.cuh), so that the loops hold no
// division, no remainder and no test; (3) at stride 1 all lanes of a warp use the same tap, and the
// weight is one broadcast.
//
// Cost per output: C_in/groups * (taps that reach it) FMAs, two loads each. Star: 1344 FMAs; a
// warp's load of the input moves 128 to 160 bytes for 128 asked for, instead of 1024.

#include "problem.cuh"

constexpr int TILE_H = 4;   // rows of output pixels per block
constexpr int TILE_W = 64;  // columns
constexpr int THREADS = TILE_H * TILE_W;
static_assert(TILE_W % 32 == 0, "a warp's lanes must lie in one row");

__global__ void __launch_bounds__(THREADS, 4)
    coalesced_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                     const float* __restrict__ bias, float* __restrict__ output,
                     ConvTransposeProblem p, Axis rows, Axis columns, int tiles_h, int tiles_w) {
  // A block is one tile of one output plane [n, co].
  const unsigned plane_out = blockIdx.x / (tiles_h * tiles_w);
  const unsigned tile = blockIdx.x % (tiles_h * tiles_w);
  const int co = plane_out % p.out_channels;
  const int n = plane_out / p.out_channels;
  const int oh = tile / tiles_w * TILE_H + threadIdx.y;
  const int ow = tile % tiles_w * TILE_W + threadIdx.x;
  if (oh >= p.out_height || ow >= p.out_width) return;

  const int group_in = p.in_channels / p.groups;
  const int group_out = p.out_channels / p.groups;
  const int first_ci = co / group_out * group_in;
  const int64_t plane_size = static_cast<int64_t>(p.height) * p.width;
  const float* plane = input + (static_cast<int64_t>(n) * p.in_channels + first_ci) * plane_size;
  const float* filter = weight + (static_cast<int64_t>(first_ci) * group_out + co % group_out) *
                                     p.kernel_h * p.kernel_w;

  const Taps vertical = taps_reaching(rows, oh);
  const Taps horizontal = taps_reaching(columns, ow);

  float sum = 0.0f;
  for (int ci = 0; ci < group_in; ++ci) {
    for (int th = 0; th < vertical.count; ++th) {
      const int64_t h = vertical.i - th * rows.i_step, kh = vertical.k + th * rows.k_step;
      const float* x = plane + h * p.width + horizontal.i;
      const float* w = filter + kh * p.kernel_w + horizontal.k;
      // Not unrolled: lanes that take 4 taps and lanes that take 3 then stay together.
#pragma unroll 1
      for (int tw = 0; tw < horizontal.count; ++tw) {
        sum = fmaf(*x, *w, sum);
        x -= columns.i_step;
        w += columns.k_step;
      }
    }
    plane += plane_size;
    filter += static_cast<int64_t>(group_out) * p.kernel_h * p.kernel_w;
  }
  if (bias != nullptr) sum += bias[co];
  output[(static_cast<int64_t>(plane_out) * p.out_height + oh) * p.out_width + ow] = sum;
}

extern "C" cudaError_t coalesced(const float* input, const float* weight, const float* bias,
                                 float* output, ConvTransposeProblem p, cudaStream_t stream) {
  const auto tiles_h = static_cast<int>(ceil_div(p.out_height, TILE_H));
  const auto tiles_w = static_cast<int>(ceil_div(p.out_width, TILE_W));
  const int64_t blocks = static_cast<int64_t>(p.batch) * p.out_channels * tiles_h * tiles_w;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  coalesced_kernel<<<static_cast<unsigned>(blocks), dim3(TILE_W, TILE_H), 0, stream>>>(
      input, weight, bias, output, p, rows_of(p), columns_of(p), tiles_h, tiles_w);
  return cudaGetLastError();
}
