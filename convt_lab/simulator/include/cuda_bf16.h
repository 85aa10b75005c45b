// bfloat16 as storage: the upper half of a float, rounded to the nearest, ties to even. Arithmetic
// on __nv_bfloat16 itself is not here.

#pragma once

#include <cuda_runtime.h>

struct alignas(2) __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 a) {
  return __uint_as_float(static_cast<std::uint32_t>(a.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const std::uint32_t all = __float_as_uint(a);
  if ((all & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFFu};  // NVIDIA's NaN
  return {static_cast<std::uint16_t>((all + 0x7FFFu + (all >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float a) { return __float2bfloat16_rn(a); }
