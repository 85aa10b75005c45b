// What every stage is told about its problem, and the index arithmetic that they share.
//
// Shapes, as in PyTorch: input [N, C_in, H, W], weight [C_in, C_out/groups, KH, KW], bias [C_out],
// output [N, C_out, OH, OW]. Output pixel o, input pixel i and tap k of one axis meet where
//
//     i * stride + k * dilation = o + padding.
//
// Planes may hold more than 2^31 values in all, so their offsets are 64-bit; sizes along one axis
// fit in an int.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

struct ConvTransposeProblem {
  int batch;                  // N
  int in_channels;            // C_in
  int out_channels;           // C_out
  int groups;                 // both channel counts are multiples of it
  int height, width;          // H, W
  int out_height, out_width;  // OH, OW
  int kernel_h, kernel_w;     // KH, KW
  int stride_h, stride_w;
  int padding_h, padding_w;
  int dilation_h, dilation_w;
};

// One spatial axis, with what solving the equation above for k needs. With g = gcd(stride,
// dilation) there is a solution only if g divides o + padding; the taps that reach o are then one
// residue class,
//
//     k = (o + padding)/g * (dilation/g)^-1  modulo  stride/g,
//
// and from one to the next, k grows by stride/g while i falls by dilation/g.
struct Axis {
  int size;      // H or W
  int out_size;  // OH or OW
  int kernel, stride, padding, dilation;
  int gcd;      // of stride and dilation
  int k_step;   // stride / gcd
  int i_step;   // dilation / gcd
  int inverse;  // of i_step, modulo k_step
};

// The taps that reach one output: (k, i), (k + k_step, i - i_step), ..., `count` of them.
struct Taps {
  int k, i, count;
};

inline Axis make_axis(int size, int out_size, int kernel, int stride, int padding, int dilation) {
  // Euclid's algorithm, extended: gcd = dilation * factor, modulo stride.
  int gcd = stride, remainder = dilation;
  int64_t factor = 0, next_factor = 1;
  while (remainder != 0) {
    const int quotient = gcd / remainder, rest = gcd % remainder;
    const int64_t rest_factor = factor - quotient * next_factor;
    gcd = remainder;
    remainder = rest;
    factor = next_factor;
    next_factor = rest_factor;
  }
  const int k_step = stride / gcd, i_step = dilation / gcd;
  const int inverse = static_cast<int>((factor % k_step + k_step) % k_step);
  return {size, out_size, kernel, stride, padding, dilation, gcd, k_step, i_step, inverse};
}

inline Axis rows_of(const ConvTransposeProblem& p) {
  return make_axis(p.height, p.out_height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
}

inline Axis columns_of(const ConvTransposeProblem& p) {
  return make_axis(p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
}

// An axis with stride and dilation 1.
__host__ __device__ __forceinline__ Axis unit_axis(int size, int out_size, int kernel,
                                                   int padding) {
  return {size, out_size, kernel, 1, padding, 1, 1, 1, 1, 0};
}

// The residue class of output o, whether or not its inputs lie inside the image.
__host__ __device__ __forceinline__ Taps taps_of_class(const Axis& axis, int o) {
  const int shifted = o + axis.padding;
  if (shifted % axis.gcd != 0) return {0, 0, 0};
  const int k = static_cast<int>(static_cast<int64_t>(shifted / axis.gcd % axis.k_step) *
                                 axis.inverse % axis.k_step);
  if (k >= axis.kernel) return {0, 0, 0};
  // Exact: k was chosen so that the stride divides the difference, which may be negative.
  const int i = (shifted - k * axis.dilation) / axis.stride;
  return {k, i, (axis.kernel - 1 - k) / axis.k_step + 1};
}

// The taps of output o whose inputs lie inside the image: no test is needed when they are visited.
__device__ __forceinline__ Taps taps_reaching(const Axis& axis, int o) {
  Taps taps = taps_of_class(axis, o);
  if (taps.count == 0) return taps;
  if (taps.i >= axis.size) {  // the first inputs lie past the image's end
    const int skipped = (taps.i - axis.size) / axis.i_step + 1;
    taps.k += skipped * axis.k_step;
    taps.i -= skipped * axis.i_step;
    taps.count -= skipped;
  }
  const int inside = taps.i < 0 ? 0 : taps.i / axis.i_step + 1;
  taps.count = max(0, min(taps.count, inside));
  return taps;
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
