// Stage 1, naive_gather: one thread for each output value, no thought for the memory.
//
// The scatter of the definition has many input pixels adding to one output pixel, which threads
// can't do without atomics. Seen from the output there is no conflict: a thread collects the
// products that belong to its own output. This first draft tries all C_in * KH * KW taps and asks
// of each whether an input pixel meets it (two divisions and two remainders a tap), so that stride
// s wastes 1 - 1/s^2 of the attempts; and threadIdx.x runs down a column of the output, so that the
// 32 lanes of a warp touch 32 rows of the input, each load as many sectors as lanes.
//
// Cost per output: C_in/groups * KH * KW attempts, two loads each. Star (C_in = 64, 3x7): 1344 FMAs
// and 2688 loads for one value, 1/4 FLOP per byte requested.

#include "problem.cuh"

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    naive_gather_kernel(const float* __restrict__ input, const float* __restrict__ weight,
                        const float* __restrict__ bias, float* __restrict__ output,
                        ConvTransposeProblem p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t count = static_cast<int64_t>(p.batch) * p.out_channels * p.out_height * p.out_width;
  if (index >= count) return;

  // oh varies fastest: neighbouring threads are a whole row apart.
  const int oh = index % p.out_height;
  const int ow = index / p.out_height % p.out_width;
  const int co = index / p.out_height / p.out_width % p.out_channels;
  const int n = index / p.out_height / p.out_width / p.out_channels;

  const int group_in = p.in_channels / p.groups;
  const int group_out = p.out_channels / p.groups;
  const int first_ci = co / group_out * group_in;

  float sum = 0.0f;
  for (int ci = first_ci; ci < first_ci + group_in; ++ci) {
    for (int kh = 0; kh < p.kernel_h; ++kh) {
      for (int kw = 0; kw < p.kernel_w; ++kw) {
        const int h_times_stride = oh + p.padding_h - kh * p.dilation_h;
        const int w_times_stride = ow + p.padding_w - kw * p.dilation_w;
        if (h_times_stride % p.stride_h != 0 || w_times_stride % p.stride_w != 0) continue;
        const int h = h_times_stride / p.stride_h;
        const int w = w_times_stride / p.stride_w;
        if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;

        const int64_t plane = static_cast<int64_t>(n) * p.in_channels + ci;
        const int64_t filter = static_cast<int64_t>(ci) * group_out + co % group_out;
        sum = fmaf(input[(plane * p.height + h) * p.width + w],
                   weight[(filter * p.kernel_h + kh) * p.kernel_w + kw], sum);
      }
    }
  }
  if (bias != nullptr) sum += bias[co];
  const int64_t out_plane = static_cast<int64_t>(n) * p.out_channels + co;
  output[(out_plane * p.out_height + oh) * p.out_width + ow] = sum;
}

extern "C" cudaError_t naive_gather(const float* input, const float* weight, const float* bias,
                                    float* output, ConvTransposeProblem p, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(p.batch) * p.out_channels * p.out_height * p.out_width;
  const auto blocks = static_cast<unsigned>(ceil_div(count, THREADS));
  naive_gather_kernel<<<blocks, THREADS, 0, stream>>>(input, weight, bias, output, p);
  return cudaGetLastError();
}
