// Phases: how transposed convolution with any stride and dilation becomes several problems with
// stride and dilation 1.
//
// Along an axis the outputs are sorted by their position modulo stride / g * dilation, g being the
// greatest common divisor of the two. The outputs of one such phase meet every k_step-th tap and
// every i_step-th input (see problem.cuh), and from one to the next both move on by one.

#pragma once

#include "problem.cuh"

// One phase of an axis: outputs first, first + period, ... Its q-th output meets tap number t (of
// `taps`, the kernel's tap k + t * k_step) at input number start + q - t of those that it sees,
// which are residue, residue + i_step, ...
struct Phase {
  int first, count;
  int taps, k;
  int start, residue, size;
};

// How many phases an axis has.
__host__ __device__ __forceinline__ int period_of(const Axis& axis) {
  return axis.stride * axis.i_step;
}

__host__ __device__ __forceinline__ Phase phase_of(const Axis& axis, int first) {
  const Taps taps = taps_of_class(axis, first);
  const int count = (axis.out_size - first - 1) / period_of(axis) + 1;
  int residue = taps.i % axis.i_step;
  if (residue < 0) residue += axis.i_step;
  const int size = residue < axis.size ? (axis.size - residue - 1) / axis.i_step + 1 : 0;
  return {first, count, taps.count, taps.k, (taps.i - residue) / axis.i_step, residue, size};
}

// How many taps a phase of an axis has at most.
inline int most_taps(const Axis& axis) { return (axis.kernel - 1) / axis.k_step + 1; }

inline bool has_more_phases(const Axis& axis, int count) {
  return static_cast<int64_t>(axis.stride) * axis.i_step > count;
}
