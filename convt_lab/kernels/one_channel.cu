// No rung of the ladder: for problems with one output channel in a group, as in depthwise
// upsampling, fixed bilinear filters, or brightness from many features.
//
// The ladder's fast kernels keep inputs in registers for many output channels. With one there is
// nothing to share but neighbourhood: a thread takes two rows of 4 cells (cells.cuh) with all their
// phases, and slides over the inputs.
//
// Cost: depthwise 3x7 with stride 1 has 21 FMAs for 8 bytes of float32, depthwise 4x4 with stride 2
// has 4 for 5 bytes: memory could be the limit, were it not for all the instructions that copy
// inputs, find places and write outputs. So outputs are written up to four at a time.

#include "cells.cuh"

// With one input channel too, stride and dilation 1, and a kernel of a common size, even that is
// too much: all weights stay in registers, and a thread reads what is above its 8 outputs, which
// lie one below the other, straight from the cache. 3x7: 70 loads and 168 FMAs.
namespace depthwise {

constexpr int ROWS = 8;   // of outputs of a thread
constexpr int AHEAD = 2;  // rows of inputs
constexpr int THREADS = 256;

template <class T, int KH, int KW>
__global__ void __launch_bounds__(THREADS, KH* KW > 40 ? 1 : 2)
    depthwise_kernel(const T* __restrict__ input, const T* __restrict__ weight,
                     const T* __restrict__ bias, T* __restrict__ output, ConvTransposeProblem p,
                     int strips, int bands) {
  // A warp has 32 columns and ROWS rows of a plane.
  unsigned digits = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  const int ow = take_digit(digits, strips) * 32 + threadIdx.x % 32;
  const int first_oh = take_digit(digits, bands) * ROWS;
  if (digits >= static_cast<unsigned>(p.batch) * p.out_channels || ow >= p.out_width) return;
  const int channel = digits % p.out_channels;
  const T* const plane = input + static_cast<int64_t>(digits) * p.height * p.width;
  const T* const filter = weight + static_cast<int64_t>(channel) * (KH * KW);
  T* const out = output + static_cast<int64_t>(digits) * p.out_height * p.out_width;

  float weights[KH][KW];
  bool exists[KW];
#pragma unroll
  for (int kw = 0; kw < KW; ++kw) {
    const int w = ow + p.padding_w - kw;
    exists[kw] = w >= 0 && w < p.width;
#pragma unroll
    for (int kh = 0; kh < KH; ++kh) weights[kh][kw] = to_float(filter[kh * KW + kw]);
  }
  // Rows of inputs are loaded some rows ahead, so that loads of several are under way.
  float values[AHEAD + 1][KW];
  const auto load_row = [&](int i, float (&row)[KW]) {
    const int h = first_oh + p.padding_h + i;
    const bool inside = h >= 0 && h < p.height;
    const T* const x = plane + static_cast<int64_t>(h) * p.width + (ow + p.padding_w);
#pragma unroll
    for (int kw = 0; kw < KW; ++kw) {
      row[kw] = inside && exists[kw] ? to_float(x[-kw]) : 0.0f;
    }
  };
  // From below, so that an output meets its taps in their order.
  constexpr int LAST = ROWS - 1, COUNT = ROWS + KH - 1;
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load_row(LAST - i, values[i]);
  float sum[ROWS] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i + AHEAD < COUNT) load_row(LAST - i - AHEAD, values[(i + AHEAD) % (AHEAD + 1)]);
#pragma unroll
    for (int kh = 0; kh < KH; ++kh) {
      const int r = LAST - i + kh;  // of the outputs
      if (r < 0 || r >= ROWS) continue;
#pragma unroll
      for (int kw = 0; kw < KW; ++kw) {
        sum[r] = fmaf(values[i % (AHEAD + 1)][kw], weights[kh][kw], sum[r]);
      }
    }
  }
  const float shift = bias == nullptr ? -0.0f : to_float(bias[channel]);
  T* const column = out + static_cast<int64_t>(first_oh) * p.out_width + ow;
  const int rows = min(ROWS, p.out_height - first_oh);
  bool is_not_a_number = false;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    is_not_a_number |= !(sum[r] == sum[r]);
    if (r < rows) set_rounded(column[static_cast<int64_t>(r) * p.out_width], sum[r] + shift);
  }
  if (!is_not_a_number) return;
  // A zero met something infinite: summed again, by the definition.
  const Axis along_h = unit_axis(p.height, p.out_height, KH, p.padding_h);
  const Axis along_w = unit_axis(p.width, p.out_width, KW, p.padding_w);
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    T& y = column[static_cast<int64_t>(r) * p.out_width];
    if (to_float(y) == to_float(y)) continue;
    const float again = sum_of_taps(plane, filter, p, along_h, along_w, first_oh + r, ow);
    set_rounded(y, again + shift);
  }
}

template <class T, int KH, int KW>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  const int64_t strips = ceil_div(p.out_width, 32), bands = ceil_div(p.out_height, ROWS);
  const int64_t planes = static_cast<int64_t>(p.batch) * p.out_channels;
  const int64_t blocks = ceil_div(planes * strips * bands, THREADS / 32);
  if (blocks > INT32_MAX / (THREADS / 32)) return cudaErrorInvalidValue;
  depthwise_kernel<T, KH, KW><<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
      input, weight, bias, output, p, static_cast<int>(strips), static_cast<int>(bands));
  return cudaGetLastError();
}

// The launcher for a problem, or null.
template <class T>
auto launcher_for(const ConvTransposeProblem& p) -> decltype(&launch<T, 3, 3>) {
  const bool is_dense =
      p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  if (!is_dense || p.in_channels != p.groups || p.out_channels != p.groups) return nullptr;
  const auto is = [&](int kernel_h, int kernel_w) {
    return p.kernel_h == kernel_h && p.kernel_w == kernel_w;
  };
  return is(3, 3)   ? launch<T, 3, 3>
         : is(3, 7) ? launch<T, 3, 7>
         : is(5, 5) ? launch<T, 5, 5>
         : is(7, 7) ? launch<T, 7, 7>
                    : nullptr;
}

}  // namespace depthwise

namespace {

template <class T>
cudaError_t launch(const T* input, const T* weight, const T* bias, T* output,
                   const ConvTransposeProblem& p, cudaStream_t stream) {
  if (!cells::covers(p) || p.out_channels != p.groups) return cudaErrorInvalidValue;
  if (const auto launch_it = depthwise::launcher_for<T>(p)) {
    return launch_it(input, weight, bias, output, p, stream);
  }
  const auto launch_it = cells::phases_of(p) == 1   ? cells::launch<T, 1, 1>
                         : cells::phases_of(p) == 2 ? cells::launch<T, 2, 1>
                         : cells::phases_of(p) == 3 ? cells::launch<T, 3, 1>
                                                    : cells::launch<T, 4, 1>;
  return launch_it(input, weight, bias, output, p, stream);
}

}  // namespace

extern "C" cudaError_t one_channel(const float* input, const float* weight, const float* bias,
                                   float* output, ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t one_channel_float16(const __half* input, const __half* weight,
                                           const __half* bias, __half* output,
                                           ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}

extern "C" cudaError_t one_channel_bfloat16(const __nv_bfloat16* input, const __nv_bfloat16* weight,
                                            const __nv_bfloat16* bias, __nv_bfloat16* output,
                                            ConvTransposeProblem p, cudaStream_t stream) {
  return launch(input, weight, bias, output, p, stream);
}
