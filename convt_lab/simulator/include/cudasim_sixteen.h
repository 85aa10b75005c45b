// What float16 and bfloat16 have in common: every result is that of exact arithmetic, rounded once.

#pragma once

#include <cuda_runtime.h>

namespace cudasim {

// The value cut off to a float, whose last bit tells if something was lost: rounding it once more,
// to fewer bits, gives what rounding `a` itself would have given.
inline float to_odd(double a) {
  const float nearest = static_cast<float>(a);
  if (static_cast<double>(nearest) == a || a != a) return nearest;
  const unsigned bits = __float_as_uint(nearest);
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(a);
  return __uint_as_float((beyond ? bits - 1 : bits) | 1u);
}

// a * b + c in the same way; the product of numbers as short as these is exact.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  const double of_c = sum - product, lost = (product - (sum - of_c)) + (c - of_c);
  const long long bits = __double_as_longlong(sum);
  if (!(lost < 0.0 || lost > 0.0) || (bits & 1) != 0) return sum;
  return __longlong_as_double((lost > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1);
}

// Inlined, because the tracer sees no access that is itself an argument or a result of a call.
// Friends and not templates: as with CUDA, `h * 2.0f` is refused as ambiguous.
template <class T>
struct Sixteen {
  friend __forceinline__ T operator+(T a, T b) { return T(as_double(a) + as_double(b)); }
  friend __forceinline__ T operator-(T a, T b) { return T(as_double(a) - as_double(b)); }
  friend __forceinline__ T operator*(T a, T b) { return T(as_double(a) * as_double(b)); }
  friend __forceinline__ T operator/(T a, T b) { return T(as_double(a) / as_double(b)); }
  friend __forceinline__ T operator+(T a) { return a; }
  friend __forceinline__ T operator-(T a) { return T::of_bits(a.bits ^ 0x8000u); }
  friend __forceinline__ T& operator+=(T& a, T b) { return a = a + b; }
  friend __forceinline__ T& operator-=(T& a, T b) { return a = a - b; }
  friend __forceinline__ T& operator*=(T& a, T b) { return a = a * b; }
  friend __forceinline__ T& operator/=(T& a, T b) { return a = a / b; }
  friend __forceinline__ bool operator==(T a, T b) { return as_double(a) == as_double(b); }
  friend __forceinline__ bool operator!=(T a, T b) { return as_double(a) != as_double(b); }
  friend __forceinline__ bool operator<(T a, T b) { return as_double(a) < as_double(b); }
  friend __forceinline__ bool operator>(T a, T b) { return as_double(a) > as_double(b); }
  friend __forceinline__ bool operator<=(T a, T b) { return as_double(a) <= as_double(b); }
  friend __forceinline__ bool operator>=(T a, T b) { return as_double(a) >= as_double(b); }

  friend __forceinline__ T __hadd(T a, T b) { return a + b; }
  friend __forceinline__ T __hsub(T a, T b) { return a - b; }
  friend __forceinline__ T __hmul(T a, T b) { return a * b; }
  friend __forceinline__ T __hdiv(T a, T b) { return a / b; }
  friend __forceinline__ T __hadd_rn(T a, T b) { return a + b; }
  friend __forceinline__ T __hsub_rn(T a, T b) { return a - b; }
  friend __forceinline__ T __hmul_rn(T a, T b) { return a * b; }
  friend __forceinline__ T __hfma(T a, T b, T c) {
    return T(fma_to_odd(as_double(a), as_double(b), as_double(c)));
  }
  friend __forceinline__ T __hneg(T a) { return -a; }
  friend __forceinline__ T __habs(T a) { return T::of_bits(a.bits & 0x7FFFu); }
  // The larger and the smaller, or the one that is a number.
  friend __forceinline__ T __hmax(T a, T b) { return b != b || a >= b ? a : b; }
  friend __forceinline__ T __hmin(T a, T b) { return b != b || a <= b ? a : b; }
  friend __forceinline__ bool __heq(T a, T b) { return a == b; }
  friend __forceinline__ bool __hne(T a, T b) { return a < b || a > b; }  // false for NaN
  friend __forceinline__ bool __hlt(T a, T b) { return a < b; }
  friend __forceinline__ bool __hgt(T a, T b) { return a > b; }
  friend __forceinline__ bool __hle(T a, T b) { return a <= b; }
  friend __forceinline__ bool __hge(T a, T b) { return a >= b; }
  friend __forceinline__ bool __hisnan(T a) { return a != a; }

  friend __forceinline__ T hsqrt(T a) { return T(std::sqrt(as_double(a))); }
  friend __forceinline__ T hrsqrt(T a) { return T(1.0 / std::sqrt(as_double(a))); }
  friend __forceinline__ T hrcp(T a) { return T(1.0 / as_double(a)); }
  friend __forceinline__ T hexp(T a) { return T(std::exp(as_double(a))); }
  friend __forceinline__ T hlog(T a) { return T(std::log(as_double(a))); }
  friend __forceinline__ T hsin(T a) { return T(std::sin(as_double(a))); }
  friend __forceinline__ T hcos(T a) { return T(std::cos(as_double(a))); }

 private:
  static __forceinline__ double as_double(T a) { return static_cast<float>(a); }
};

template <class Two>
struct SixteenPair {
  friend __forceinline__ Two operator+(Two a, Two b) { return {a.x + b.x, a.y + b.y}; }
  friend __forceinline__ Two operator-(Two a, Two b) { return {a.x - b.x, a.y - b.y}; }
  friend __forceinline__ Two operator*(Two a, Two b) { return {a.x * b.x, a.y * b.y}; }
  friend __forceinline__ Two operator/(Two a, Two b) { return {a.x / b.x, a.y / b.y}; }
  friend __forceinline__ Two operator-(Two a) { return {-a.x, -a.y}; }
  friend __forceinline__ Two& operator+=(Two& a, Two b) { return a = a + b; }
  friend __forceinline__ Two& operator-=(Two& a, Two b) { return a = a - b; }
  friend __forceinline__ Two& operator*=(Two& a, Two b) { return a = a * b; }
  friend __forceinline__ Two& operator/=(Two& a, Two b) { return a = a / b; }

  friend __forceinline__ Two __hadd2(Two a, Two b) { return a + b; }
  friend __forceinline__ Two __hsub2(Two a, Two b) { return a - b; }
  friend __forceinline__ Two __hmul2(Two a, Two b) { return a * b; }
  friend __forceinline__ Two __h2div(Two a, Two b) { return a / b; }
  friend __forceinline__ Two __hfma2(Two a, Two b, Two c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
  }
  friend __forceinline__ Two __hneg2(Two a) { return -a; }
  friend __forceinline__ Two __habs2(Two a) { return {__habs(a.x), __habs(a.y)}; }
  friend __forceinline__ Two __hmax2(Two a, Two b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
  friend __forceinline__ Two __hmin2(Two a, Two b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
  friend __forceinline__ float __low2float(Two a) { return a.x; }
  friend __forceinline__ float __high2float(Two a) { return a.y; }
};

}  // namespace cudasim
