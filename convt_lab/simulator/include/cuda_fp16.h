// float16 as storage: a value is converted to float, computed with, and converted back, rounded to
// the nearest, ties to even. Arithmetic on __half itself is not here.

#pragma once

#include <cuda_runtime.h>

struct alignas(2) __half {
  std::uint16_t bits;
};

inline float __half2float(__half a) {
  const std::uint32_t sign = (a.bits & 0x8000u) << 16, magnitude = a.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinite, or not a number
    return __uint_as_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  // Shifted into a float's place the exponent is 112 too small; scaling also normalises subnormals.
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(value));
}

inline __half __float2half_rn(float a) {
  const std::uint32_t all = __float_as_uint(a);
  const std::uint32_t magnitude = all & 0x7FFFFFFFu;
  const auto sign = static_cast<std::uint16_t>(all >> 16 & 0x8000u);
  std::uint32_t rounded;
  if (magnitude > 0x7F800000u) {
    rounded = 0x7FFFu;  // NVIDIA's NaN
  } else if (magnitude >= 0x477FF000u) {
    rounded = 0x7C00u;  // 65520 and more are infinite
  } else if (magnitude < 0x38800000u) {
    // A subnormal: 0.5 has its last bit where the subnormals' is, and the addition rounds.
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | rounded)};
}
inline __half __float2half(float a) { return __float2half_rn(a); }

// Pairs, of which no more is done than rounding and comparing.
struct alignas(4) __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline __half2 __float2half2_rn(float a) { return __floats2half2_rn(a, a); }
inline float2 __half22float2(__half2 a) {
  return make_float2(__half2float(a.x), __half2float(a.y));
}
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline __half2 __habs2(__half2 a) {
  const auto abs = [](__half b) { return __half{static_cast<std::uint16_t>(b.bits & 0x7FFFu)}; };
  return {abs(a.x), abs(a.y)};
}
// The larger, or the one that is a number.
inline __half __hmax(__half a, __half b) {
  const float left = __half2float(a), right = __half2float(b);
  return right != right || left >= right ? a : b;
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
