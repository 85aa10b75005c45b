// bfloat16: the upper half of a float. Computed with as float16 is, and rounded once to the
// nearest, ties to even.

#pragma once

#include <cudasim_sixteen.h>

struct __nv_bfloat16;
float __bfloat162float(__nv_bfloat16 a);
__nv_bfloat16 __float2bfloat16_rn(float a);

struct alignas(2) __nv_bfloat16 : cudasim::Sixteen<__nv_bfloat16> {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  __forceinline__ __nv_bfloat16(T a)
      : __nv_bfloat16(__float2bfloat16_rn(cudasim::to_odd(static_cast<double>(a)))) {}
  __forceinline__ operator float() const { return __bfloat162float(*this); }

  static __forceinline__ __nv_bfloat16 of_bits(unsigned bits) {
    __nv_bfloat16 a;
    a.bits = static_cast<std::uint16_t>(bits);
    return a;
  }
};
using nv_bfloat16 = __nv_bfloat16;

__forceinline__ float __bfloat162float(__nv_bfloat16 a) {
  return __uint_as_float(static_cast<std::uint32_t>(a.bits) << 16);
}

__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float a) {
  const std::uint32_t all = __float_as_uint(a);
  const bool is_nan = (all & 0x7FFFFFFFu) > 0x7F800000u;
  return __nv_bfloat16::of_bits(is_nan ? 0x7FFFu  // NVIDIA's NaN
                                       : (all + 0x7FFFu + (all >> 16 & 1u)) >> 16);
}
__forceinline__ __nv_bfloat16 __float2bfloat16(float a) { return __float2bfloat16_rn(a); }
__forceinline__ __nv_bfloat16 __double2bfloat16(double a) { return a; }
__forceinline__ __nv_bfloat16 __int2bfloat16_rn(int a) { return a; }
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) {
  return __nv_bfloat16::of_bits(a);
}
__forceinline__ int __hisinf(__nv_bfloat16 a) {
  return (a.bits & 0x7FFFu) != 0x7F80u ? 0 : a.bits == 0x7F80u ? 1 : -1;
}

struct alignas(4) __nv_bfloat162 : cudasim::SixteenPair<__nv_bfloat162> {
  __nv_bfloat16 x, y;

  __nv_bfloat162() = default;
  __forceinline__ __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
using nv_bfloat162 = __nv_bfloat162;

__forceinline__ __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
__forceinline__ __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) {
  return {a, b};
}
__forceinline__ __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
__forceinline__ __nv_bfloat162 __float2bfloat162_rn(float a) { return __floats2bfloat162_rn(a, a); }
__forceinline__ float2 __bfloat1622float2(__nv_bfloat162 a) {
  return make_float2(__bfloat162float(a.x), __bfloat162float(a.y));
}
__forceinline__ __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
__forceinline__ __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
