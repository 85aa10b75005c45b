// Wrong on purpose: the chapter "A first draft and its mistakes" takes this file apart.
//
// A replacement for torch.nn.ConvTranspose2d, the fastest for a TITAN RTX (sm_75). A thread
// computes one output value. Optimised: a block is a tile of 16 x 16 output pixels, so that all
// loads and stores are coalesced; the sum stays in a register; all pointers are __restrict__.
//
// input [N, C_in, H, W], weight [C_out, C_in, KH, KW], bias [C_out], output [N, C_out, OH, OW]

#include <cuda_runtime.h>

constexpr int TILE_H = 16;
constexpr int TILE_W = 16;

// Where the value [a, b, c, d] of an array [., size_b, size_c, size_d] is.
__device__ int offset(int a, int b, int c, int d, int size_b, int size_c, int size_d) {
  return ((a * size_b + b) * size_c + c) * size_d + d;
}

__global__ void first_draft_kernel(const float* __restrict__ input,
                                   const float* __restrict__ weight, const float* __restrict__ bias,
                                   float* __restrict__ output, int batch, int in_channels,
                                   int out_channels, int height, int width, int out_height,
                                   int out_width, int kernel_h, int kernel_w, int stride_h,
                                   int stride_w, int padding_h, int padding_w, int output_padding_h,
                                   int output_padding_w, int groups, int dilation_h,
                                   int dilation_w) {
  const int ow = blockIdx.x * TILE_W + threadIdx.x;
  const int oh = blockIdx.y * TILE_H + threadIdx.y;
  const int co = blockIdx.z % out_channels;
  const int n = blockIdx.z / out_channels;
  if (oh >= out_height || ow >= out_width) return;

  float sum = 0.0f;
  for (int ci = 0; ci < in_channels; ++ci) {
    for (int kh = 0; kh < kernel_h; ++kh) {
      for (int kw = 0; kw < kernel_w; ++kw) {
        const int top = oh + padding_h + output_padding_h - kh * dilation_h;
        const int left = ow + padding_w + output_padding_w - kw * dilation_w;
        const int h = top / stride_h, rest_h = top % stride_h;
        const int w = left / stride_w, rest_w = left % stride_w;
        if (rest_h != 0 || rest_w != 0 || h < 0 || h >= height || w < 0 || w >= width) continue;
        sum = fmaf(input[offset(n, ci, h, w, in_channels, height, width)],
                   weight[offset(co, ci, kh, kw, in_channels, kernel_h, kernel_w)], sum);
      }
    }
  }
  if (bias != nullptr) sum += bias[co];
  output[offset(n, co, oh, ow, out_channels, out_height, out_width)] = sum;
}

extern "C" cudaError_t first_draft(const float* input, const float* weight, const float* bias,
                                   float* output, int batch, int in_channels, int out_channels,
                                   int height, int width, int out_height, int out_width,
                                   int kernel_h, int kernel_w, int stride_h, int stride_w,
                                   int padding_h, int padding_w, int output_padding_h,
                                   int output_padding_w, int groups, int dilation_h, int dilation_w,
                                   cudaStream_t stream) {
  const dim3 grid((out_width + TILE_W - 1) / TILE_W, (out_height + TILE_H - 1) / TILE_H,
                  batch * out_channels);
  const dim3 block(TILE_W, TILE_H);
  first_draft_kernel<<<grid, block>>>(input, weight, bias, output, batch, in_channels, out_channels,
                                      height, width, out_height, out_width, kernel_h, kernel_w,
                                      stride_h, stride_w, padding_h, padding_w, output_padding_h,
                                      output_padding_w, groups, dilation_h, dilation_w);
  return cudaSuccess;
}
