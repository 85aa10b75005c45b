// float16: a value is converted to float or double, computed with, and converted back, rounded once
// to the nearest, ties to even.

#pragma once

#include <cudasim_sixteen.h>

struct __half;
float __half2float(__half a);
__half __float2half_rn(float a);

struct alignas(2) __half : cudasim::Sixteen<__half> {
  std::uint16_t bits;

  __half() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  __forceinline__ __half(T a) : __half(__float2half_rn(cudasim::to_odd(static_cast<double>(a)))) {}
  __forceinline__ operator float() const { return __half2float(*this); }

  static __forceinline__ __half of_bits(unsigned bits) {
    __half a;
    a.bits = static_cast<std::uint16_t>(bits);
    return a;
  }
};
using half = __half;

__forceinline__ float __half2float(__half a) {
  const std::uint32_t sign = (a.bits & 0x8000u) << 16, magnitude = a.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinite, or not a number
    return __uint_as_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  // Shifted into a float's place the exponent is 112 too small; scaling also normalises subnormals.
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(value));
}

__forceinline__ __half __float2half_rn(float a) {
  const std::uint32_t all = __float_as_uint(a);
  const std::uint32_t magnitude = all & 0x7FFFFFFFu, sign = all >> 16 & 0x8000u;
  std::uint32_t rounded;
  if (magnitude > 0x7F800000u) {
    return __half::of_bits(0x7FFFu);  // NVIDIA's NaN
  } else if (magnitude >= 0x477FF000u) {
    rounded = 0x7C00u;  // 65520 and more are infinite
  } else if (magnitude < 0x38800000u) {
    // A subnormal: 0.5 has its last bit where the subnormals' is, and the addition rounds.
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  return __half::of_bits(sign | rounded);
}
__forceinline__ __half __float2half(float a) { return __float2half_rn(a); }
__forceinline__ __half __double2half(double a) { return a; }
__forceinline__ __half __int2half_rn(int a) { return a; }
__forceinline__ __half __uint2half_rn(unsigned a) { return a; }
__forceinline__ int __half2int_rn(__half a) { return __float2int_rn(a); }
__forceinline__ int __half2int_rz(__half a) { return __float2int_rz(a); }
__forceinline__ unsigned short __half_as_ushort(__half a) { return a.bits; }
__forceinline__ __half __ushort_as_half(unsigned short a) { return __half::of_bits(a); }
__forceinline__ short __half_as_short(__half a) { return static_cast<short>(a.bits); }
__forceinline__ __half __short_as_half(short a) {
  return __half::of_bits(static_cast<std::uint16_t>(a));
}
__forceinline__ int __hisinf(__half a) {
  return (a.bits & 0x7FFFu) != 0x7C00u ? 0 : a.bits == 0x7C00u ? 1 : -1;
}

struct alignas(4) __half2 : cudasim::SixteenPair<__half2> {
  __half x, y;

  __half2() = default;
  __forceinline__ __half2(__half x, __half y) : x(x), y(y) {}
};
using half2 = __half2;

__forceinline__ __half2 make_half2(__half a, __half b) { return {a, b}; }
__forceinline__ __half2 __halves2half2(__half a, __half b) { return {a, b}; }
__forceinline__ __half2 __half2half2(__half a) { return {a, a}; }
__forceinline__ __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
__forceinline__ __half2 __float2half2_rn(float a) { return __floats2half2_rn(a, a); }
__forceinline__ __half2 __float22half2_rn(float2 a) { return __floats2half2_rn(a.x, a.y); }
__forceinline__ float2 __half22float2(__half2 a) {
  return make_float2(__half2float(a.x), __half2float(a.y));
}
__forceinline__ __half __low2half(__half2 a) { return a.x; }
__forceinline__ __half __high2half(__half2 a) { return a.y; }
__forceinline__ __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
__forceinline__ __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
__forceinline__ __half2 __lowhigh2highlow(__half2 a) { return {a.y, a.x}; }
