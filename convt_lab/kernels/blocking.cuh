// Small pieces that the register-blocked kernels share.

#pragma once

#include <cuda_pipeline.h>

#include "problem.cuh"
#include "shared_memory.cuh"
#include "storage.cuh"

// Splits a block's number into the numbers of its tile, channels, image, ...
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

// Loads up to four of a row's `count` values from `j` on: 16 bytes, or 8 at the end.
__device__ __forceinline__ void load_part(float* registers, const float* shared, int j, int count) {
  if (count - j >= 4) {
    load_vector(registers, shared + j);
  } else {
    const float2 pair = *reinterpret_cast<const float2*>(shared + j);
    registers[0] = pair.x;
    registers[1] = pair.y;
  }
}

__device__ __forceinline__ void store_vector(float* shared, const float* registers) {
  *reinterpret_cast<float4*>(shared) =
      make_float4(registers[0], registers[1], registers[2], registers[3]);
}

// The sum for one output, tap by tap: slow, and right where the kernels' ways are not (values that
// are not finite). `planes` and `filters` begin at the output's image, group and channel; from one
// channel of the input to the next it is `channel_step`, from one pixel of a row `pixel_step`.
template <class T>
__device__ __forceinline__ float sum_of_taps(const T* __restrict__ planes,
                                             const T* __restrict__ filters,
                                             const ConvTransposeProblem& p, const Axis& rows,
                                             const Axis& columns, int oh, int ow,
                                             int64_t channel_step, int pixel_step) {
  const Taps vertical = taps_reaching(rows, oh), horizontal = taps_reaching(columns, ow);
  const int64_t filters_size =
      static_cast<int64_t>(p.out_channels / p.groups) * p.kernel_h * p.kernel_w;
  float sum = 0.0f;
  for (int ci = 0; ci < p.in_channels / p.groups; ++ci) {
    for (int th = 0; th < vertical.count; ++th) {
      for (int tw = 0; tw < horizontal.count; ++tw) {
        const int64_t h = vertical.i - th * rows.i_step, w = horizontal.i - tw * columns.i_step;
        const int kh = vertical.k + th * rows.k_step, kw = horizontal.k + tw * columns.k_step;
        sum = fmaf(to_float(planes[ci * channel_step + (h * p.width + w) * pixel_step]),
                   to_float(filters[ci * filters_size + kh * p.kernel_w + kw]), sum);
      }
    }
  }
  return sum;
}

// It counts the taps of one filter in 32 bits.
inline bool can_sum_taps(const ConvTransposeProblem& p) {
  return static_cast<int64_t>(p.kernel_h) * p.kernel_w <= INT32_MAX;
}

// The same for an input [N, C, H, W].
template <class T>
__device__ __forceinline__ float sum_of_taps(const T* __restrict__ planes,
                                             const T* __restrict__ filters,
                                             const ConvTransposeProblem& p, const Axis& rows,
                                             const Axis& columns, int oh, int ow) {
  return sum_of_taps(planes, filters, p, rows, columns, oh, ow,
                     static_cast<int64_t>(p.height) * p.width, 1);
}
