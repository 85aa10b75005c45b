// CUDA C++ for g++: the part of the language and of the runtime API that teaching kernels use.
//
// The translation step (translate.py) rewrites only what g++ can't parse: `kernel<<<...>>>(...)`
// and `extern __shared__`. Everything else is given its meaning here. Numbers follow the device's:
// fmaf is fused, shared memory starts as NaN, min and max ignore NaN as fmin and fmax do.

#pragma once

// The C library's names, with C++'s overloads for each type: `abs` of a float is one.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

// ---- printf, which a launch that is stopped must not be in the middle of ------------------------

__attribute__((format(printf, 1, 2))) inline int cudasim_printf(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (length > 0) {
    cudasim_print(text, std::min<std::size_t>(static_cast<std::size_t>(length), sizeof text - 1));
  }
  return length;
}
namespace std {
using ::cudasim_printf;
}
#define printf cudasim_printf

// ---- Ways to end the process, which nvcc refuses in a kernel ------------------------------------

[[noreturn]] inline void cudasim_exit(int status) {
  if (cudasim_in_kernel()) cudasim_trap("a kernel can't call exit");
  std::exit(status);
}
[[noreturn]] inline void cudasim_abort() {
  if (cudasim_in_kernel()) cudasim_trap("a kernel can't call abort");
  std::abort();
}
namespace std {
using ::cudasim_abort;
using ::cudasim_exit;
}  // namespace std
#define exit cudasim_exit
#define abort cudasim_abort

// ---- Keywords ---------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
// __constinit: of a class that has constructors, too, without a flag that says if it was
// initialised.
#define __shared__ __constinit static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_VERSION 13000

// ---- Vector types -----------------------------------------------------------------------------

#define CUDASIM_VECTOR(name, type, align2, align4)                                     \
  struct name##1 { type x; };                                                          \
  struct alignas(align2) name##2 { type x, y; };                                       \
  struct name##3 { type x, y, z; };                                                    \
  struct alignas(align4) name##4 { type x, y, z, w; };                                 \
  __forceinline__ name##1 make_##name##1(type x) { return {x}; }                       \
  __forceinline__ name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  __forceinline__ name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  __forceinline__ name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
CUDASIM_VECTOR(char, signed char, 2, 4)
CUDASIM_VECTOR(uchar, unsigned char, 2, 4)
CUDASIM_VECTOR(short, short, 4, 8)
CUDASIM_VECTOR(ushort, unsigned short, 4, 8)
CUDASIM_VECTOR(int, int, 8, 16)
CUDASIM_VECTOR(uint, unsigned int, 8, 16)
CUDASIM_VECTOR(long, long, 16, 16)
CUDASIM_VECTOR(ulong, unsigned long, 16, 16)
CUDASIM_VECTOR(longlong, long long, 16, 16)
CUDASIM_VECTOR(ulonglong, unsigned long long, 16, 16)
CUDASIM_VECTOR(float, float, 8, 16)
CUDASIM_VECTOR(double, double, 16, 16)
#undef CUDASIM_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr dim3(CudasimIndex v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// ---- Where a thread is ------------------------------------------------------------------------

inline CudasimIndex::operator uint3() const { return {x, y, z}; }
#define threadIdx (::cudasim_thread_index())
#define blockIdx (::cudasim_block_index())
#define blockDim (::cudasim_block_size())
#define gridDim (::cudasim_grid_size())
constexpr int warpSize = 32;

// ---- Launching: kernel<<<grid, block, shared, stream>>>(args) becomes
//      kernel % cudasim::config(grid, block, shared, stream)(args)
//      ---------------------------------

using cudaStream_t = struct CUstream_st*;

namespace cudasim {

template <class... A>
struct Call {
  dim3 grid, block;
  std::size_t shared_bytes;
  cudaStream_t stream;
  std::tuple<A&&...> arguments;
};

struct Config {
  dim3 grid, block;
  std::size_t shared_bytes;
  cudaStream_t stream;

  template <class... A>
  Call<A...> operator()(A&&... arguments) const {
    return {grid, block, shared_bytes, stream,
            std::forward_as_tuple(std::forward<A>(arguments)...)};
  }
};

inline Config config(dim3 grid, dim3 block, std::size_t shared_bytes = 0,
                     cudaStream_t stream = nullptr) {
  return {grid, block, shared_bytes, stream};
}

template <class... P>
struct BoundKernel {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  static void run(const void* self) {
    const auto& bound = *static_cast<const BoundKernel*>(self);
#ifdef __cpp_exceptions
    try {
      std::apply(bound.kernel, bound.arguments);
      return;
    } catch (...) {
    }
    cudasim_trap("a kernel can't throw an exception");
#else
    std::apply(bound.kernel, bound.arguments);
#endif
  }
};

template <class... P, class... A>
void operator%(void (*kernel)(P...), Call<A...> call) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  if (cudasim_in_kernel()) cudasim_trap("a kernel can't launch kernels here");
  const BoundKernel<P...> bound{kernel, std::tuple<P...>(std::move(call.arguments))};
  const CudasimLaunch launch{{call.grid.x, call.grid.y, call.grid.z},
                             {call.block.x, call.block.y, call.block.z},
                             call.shared_bytes,
                             call.stream,
                             reinterpret_cast<const void*>(kernel),
                             &BoundKernel<P...>::run,
                             &bound,
                             sizeof(bound),
                             CUDASIM_WORKERS};
  cudasim_launch(&launch);
}

// `extern __shared__ T name[];` outside a function.
template <class T>
struct DynamicShared {
  operator T*() const { return static_cast<T*>(cudasim_dynamic_shared()); }
};

}  // namespace cudasim

// ---- Loops, which the translation marks in a build that is traced
// --------------------------------

#ifdef CUDASIM_TRACE
namespace cudasim {

struct Loop {
  constexpr Loop() {
    if (!__builtin_is_constant_evaluated()) cudasim_enter_loop();
  }
  constexpr ~Loop() {
    if (!__builtin_is_constant_evaluated()) cudasim_leave_loop();
  }
  Loop(const Loop&) = delete;
};

__forceinline__ constexpr bool next_iteration() {
  if (!__builtin_is_constant_evaluated()) cudasim_next_iteration();
  return false;
}

}  // namespace cudasim
#endif

// ---- Barriers and warps -----------------------------------------------------------------------

// The empty asm keeps the compiler from carrying values of memory across the wait.
__forceinline__ int cudasim_wait_for_block(int predicate) {
  asm volatile("" ::: "memory");
  const int count = cudasim_barrier(predicate);
  asm volatile("" ::: "memory");
  return count;
}
__forceinline__ void __syncthreads() { cudasim_wait_for_block(0); }
__forceinline__ int __syncthreads_count(int predicate) { return cudasim_wait_for_block(predicate); }
__forceinline__ int __syncthreads_or(int predicate) {
  return cudasim_wait_for_block(predicate) != 0;
}
__forceinline__ int __syncthreads_and(int predicate) {
  return cudasim_wait_for_block(!predicate) == 0;
}

namespace cudasim {

struct Lanes {
  std::uint64_t value[32];
  std::uint32_t took_part;
};

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline Lanes exchange(unsigned mask, std::uint64_t bits) {
  Lanes lanes;
  asm volatile("" ::: "memory");
  lanes.took_part = cudasim_exchange(mask, bits, lanes.value);
  asm volatile("" ::: "memory");
  return lanes;
}

inline int lane() {
  const auto t = threadIdx;
  const auto size = blockDim;
  return static_cast<int>((t.x + size.x * (t.y + size.y * t.z)) % warpSize);
}

// What a lane has of the multiply-adds of a tensor core's instruction.
#ifdef CUDASIM_TRACE
inline void count_tensor_fma(int count) { cudasim_tensor_fma(count); }
#else
inline void count_tensor_fma(int) {}
#endif

// The value of lane `from`; the own value where that lane is outside the segment (`valid` false)
// or does not take part (undefined in CUDA).
template <class T>
T shuffle(unsigned mask, T value, int from, bool valid) {
  const Lanes lanes = exchange(mask, to_bits(value));
  if (!valid || from < 0 || from >= warpSize || (lanes.took_part >> from & 1) == 0) return value;
  return from_bits<T>(lanes.value[from]);
}

}  // namespace cudasim

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int base = cudasim::lane() / width * width;
  return cudasim::shuffle(mask, value, base + (source & (width - 1)), true);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cudasim::lane(), from = lane - static_cast<int>(delta);
  return cudasim::shuffle(mask, value, from, from >= lane / width * width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cudasim::lane(), from = lane + static_cast<int>(delta);
  return cudasim::shuffle(mask, value, from, from < (lane / width + 1) * width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const int lane = cudasim::lane(), from = lane ^ lane_mask;
  return cudasim::shuffle(mask, value, from, from < (lane / width + 1) * width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto lanes = cudasim::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < warpSize; ++i) {
    if ((lanes.took_part >> i & 1) && lanes.value[i]) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cudasim::exchange(mask, 0); }
// Not for the tracer, which knows no fences.
__attribute__((noinline, no_sanitize("thread"))) inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

// ---- Arithmetic and memory intrinsics ---------------------------------------------------------

// There are no caches here, so that every kind of load and of store is the plain one.
#define CUDASIM_LOAD(name)                   \
  template <class T>                         \
  __forceinline__ T name(const T* address) { \
    return *address;                         \
  }
#define CUDASIM_STORE(name)                                            \
  template <class T>                                                   \
  __forceinline__ void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                                  \
  }
CUDASIM_LOAD(__ldg)
CUDASIM_LOAD(__ldca)
CUDASIM_LOAD(__ldcg)
CUDASIM_LOAD(__ldcs)
CUDASIM_LOAD(__ldcv)
CUDASIM_LOAD(__ldlu)
CUDASIM_STORE(__stcg)
CUDASIM_STORE(__stcs)
CUDASIM_STORE(__stwb)
CUDASIM_STORE(__stwt)
#undef CUDASIM_LOAD
#undef CUDASIM_STORE
#ifdef CUDASIM_TRACE
#define fmaf(a, b, c) (::cudasim_fma((a), (b), (c)))
#endif
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.0f), 1.0f); }  // NaN becomes 0
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rz(double a) {
  const float nearest = static_cast<float>(a);
  return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(a)
             ? std::nextafter(nearest, 0.0f)
             : nearest;
}
// Fast on a GPU at the price of some bits; here they are as exact as the functions without the
// underscores. Macros, here and below, because libm has or will have these names for itself.
#define __expf cudasim_expf
#define __exp10f cudasim_exp10f
#define __logf cudasim_logf
#define __log2f cudasim_log2f
#define __log10f cudasim_log10f
#define __powf cudasim_powf
#define __sinf cudasim_sinf
#define __cosf cudasim_cosf
#define __tanf cudasim_tanf
#define __tanhf cudasim_tanhf
#define __sincosf cudasim_sincosf
#define sinpi cudasim_sinpi
#define cospi cudasim_cospi
#define sinpif cudasim_sinpif
#define cospif cudasim_cospif
#define rsqrt cudasim_rsqrt
#define rsqrtf cudasim_rsqrtf
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(rsqrt(static_cast<double>(a))); }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return exp10f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __log10f(float a) { return log10f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __tanf(float a) { return tanf(a); }
inline float __tanhf(float a) { return tanhf(a); }
__forceinline__ void __sincosf(float a, float* sine, float* cosine) {
  *sine = sinf(a);
  *cosine = cosf(a);
}

// Of pi times a. The remainder is exact, and zeros and ones come out as such.
inline double sinpi(double a) {
  const double r = std::remainder(a, 2.0);
  if (r == 0.0 || std::fabs(r) == 1.0) return std::copysign(0.0, a);
  return std::sin(3.14159265358979323846 * (std::fabs(r) > 0.5 ? std::copysign(1.0, r) - r : r));
}
inline double cospi(double a) { return sinpi(0.5 - std::fabs(std::remainder(a, 2.0))); }
inline float sinpif(float a) { return static_cast<float>(sinpi(a)); }
inline float cospif(float a) { return static_cast<float>(cospi(a)); }

namespace cudasim {

// What does not fit becomes the nearest that does, and NaN becomes 0, as on a GPU.
template <class Int>
Int saturated(double a) {
  using Limits = std::numeric_limits<Int>;
  if (a != a) return 0;
  if (a <= static_cast<double>(Limits::min())) return Limits::min();
  return a >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<Int>(a);
}

}  // namespace cudasim

inline int __float2int_rn(float a) { return cudasim::saturated<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return cudasim::saturated<int>(std::trunc(a)); }
inline int __float2int_rd(float a) { return cudasim::saturated<int>(std::floor(a)); }
inline int __float2int_ru(float a) { return cudasim::saturated<int>(std::ceil(a)); }
inline unsigned __float2uint_rn(float a) { return cudasim::saturated<unsigned>(std::nearbyint(a)); }
inline unsigned __float2uint_rz(float a) { return cudasim::saturated<unsigned>(std::trunc(a)); }
inline unsigned __float2uint_rd(float a) { return cudasim::saturated<unsigned>(std::floor(a)); }
inline unsigned __float2uint_ru(float a) { return cudasim::saturated<unsigned>(std::ceil(a)); }
inline int __double2int_rn(double a) { return cudasim::saturated<int>(std::nearbyint(a)); }
inline int __double2int_rz(double a) { return cudasim::saturated<int>(std::trunc(a)); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline double __int2double_rn(int a) { return a; }
inline double __uint2double_rn(unsigned a) { return a; }
inline int __float_as_int(float a) { return cudasim::from_bits<int>(cudasim::to_bits(a)); }
inline unsigned __float_as_uint(float a) {
  return cudasim::from_bits<unsigned>(cudasim::to_bits(a));
}
inline float __int_as_float(int a) { return cudasim::from_bits<float>(cudasim::to_bits(a)); }
inline float __uint_as_float(unsigned a) { return cudasim::from_bits<float>(cudasim::to_bits(a)); }
inline long long __double_as_longlong(double a) {
  return cudasim::from_bits<long long>(cudasim::to_bits(a));
}
inline double __longlong_as_double(long long a) {
  return cudasim::from_bits<double>(cudasim::to_bits(a));
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) {
  return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a));
}
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned long long __brevll(unsigned long long a) {
  unsigned long long reversed = 0;
  for (int bit = 0; bit < 64; ++bit) reversed |= (a >> bit & 1) << (63 - bit);
  return reversed;
}
inline unsigned __brev(unsigned a) { return static_cast<unsigned>(__brevll(a) >> 32); }
inline int __mulhi(int a, int b) {
  return static_cast<int>((static_cast<std::int64_t>(a) * b) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
// The lower half of the product of the lower 24 bits.
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xFFFFFFu) * (b & 0xFFFFFFu); }
inline int __mul24(int a, int b) {
  const auto low = [](int c) { return static_cast<int>(static_cast<unsigned>(c) << 8) >> 8; };
  return static_cast<int>(static_cast<unsigned>(low(a)) * static_cast<unsigned>(low(b)));
}
// Nanoseconds of the computer that simulates: they go on, but say nothing of a GPU's time.
inline long long clock64() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}
inline unsigned __activemask() { return 1u << cudasim::lane(); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// With one of the two unsigned, both are.
#define CUDASIM_MIN_MAX(U, A, B)                                 \
  inline U min(A a, B b) {                                       \
    const U left = static_cast<U>(a), right = static_cast<U>(b); \
    return left < right ? left : right;                          \
  }                                                              \
  inline U max(A a, B b) {                                       \
    const U left = static_cast<U>(a), right = static_cast<U>(b); \
    return left > right ? left : right;                          \
  }
#define CUDASIM_MIN_MAX_UNSIGNED(U, I) \
  CUDASIM_MIN_MAX(U, U, U)             \
  CUDASIM_MIN_MAX(U, I, U)             \
  CUDASIM_MIN_MAX(U, U, I)
CUDASIM_MIN_MAX_UNSIGNED(unsigned, int)
CUDASIM_MIN_MAX_UNSIGNED(unsigned long, long)
CUDASIM_MIN_MAX_UNSIGNED(unsigned long long, long long)
#undef CUDASIM_MIN_MAX_UNSIGNED
#undef CUDASIM_MIN_MAX

namespace cudasim {

// Blocks of one launch may run on several cores, so atomics are atomic. A trace sees one access,
// told by the caller, and not the loads and stores of this loop.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T* address, F update) {
  using Bits = std::conditional_t<sizeof(T) == 8, std::uint64_t,
                                  std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>>;
  static_assert(sizeof(T) == sizeof(Bits) && !std::is_same_v<T, short>,
                "atomics work on 4 and 8 bytes, and on float16 and bfloat16");
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED), wanted;
  do {
    wanted = static_cast<Bits>(to_bits(update(from_bits<T>(old))));
  } while (
      !__atomic_compare_exchange_n(bits, &old, wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return from_bits<T>(old);
}

}  // namespace cudasim

template <class T, class U>
__forceinline__ T atomicAdd(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return static_cast<T>(old + static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicSub(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return static_cast<T>(old - static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicMax(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return std::max(old, static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicMin(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return std::min(old, static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicExch(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T) { return static_cast<T>(v); });
}
template <class T, class U>
__forceinline__ T atomicAnd(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return static_cast<T>(old & static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicOr(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return static_cast<T>(old | static_cast<T>(v)); });
}
template <class T, class U>
__forceinline__ T atomicXor(T* a, U v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(a, [v](T old) { return static_cast<T>(old ^ static_cast<T>(v)); });
}
// Counts from 0 to v, and begins again; the other counts down.
__forceinline__ unsigned atomicInc(unsigned* a, unsigned v) {
  cudasim_atomic(a, sizeof(unsigned));
  return cudasim::atomic_update(a, [v](unsigned old) { return old >= v ? 0u : old + 1; });
}
__forceinline__ unsigned atomicDec(unsigned* a, unsigned v) {
  cudasim_atomic(a, sizeof(unsigned));
  return cudasim::atomic_update(a, [v](unsigned old) { return old == 0 || old > v ? v : old - 1; });
}
template <class T, class U, class V>
__forceinline__ T atomicCAS(T* a, U compare, V v) {
  cudasim_atomic(a, sizeof(T));
  return cudasim::atomic_update(
      a, [compare, v](T old) { return old == static_cast<T>(compare) ? static_cast<T>(v) : old; });
}

// Atomic for a block alone, or for all GPUs: the same here.
#define CUDASIM_SCOPES(name)                           \
  template <class T, class... A>                       \
  __forceinline__ T name##_block(T* a, A... values) {  \
    return name(a, values...);                         \
  }                                                    \
  template <class T, class... A>                       \
  __forceinline__ T name##_system(T* a, A... values) { \
    return name(a, values...);                         \
  }
CUDASIM_SCOPES(atomicAdd)
CUDASIM_SCOPES(atomicSub)
CUDASIM_SCOPES(atomicMax)
CUDASIM_SCOPES(atomicMin)
CUDASIM_SCOPES(atomicExch)
CUDASIM_SCOPES(atomicAnd)
CUDASIM_SCOPES(atomicOr)
CUDASIM_SCOPES(atomicXor)
CUDASIM_SCOPES(atomicInc)
CUDASIM_SCOPES(atomicDec)
CUDASIM_SCOPES(atomicCAS)
#undef CUDASIM_SCOPES

inline void __trap() { cudasim_trap("the kernel called __trap()"); }
#include "assert.h"

// ---- The runtime API, as far as a launcher needs it -------------------------------------------

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaError = cudaError_t;

inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(cudasim_take_error()); }
inline cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(cudasim_peek_error()); }
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unspecified launch failure";
  }
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kMultiprocessors = 132, kMajor = 9;  // of an H100 or H200
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cudasim_max_shared_bytes());
      break;
  }
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0) return cudaErrorInvalidValue;
    return static_cast<cudaError_t>(
        cudasim_allow_shared_bytes(reinterpret_cast<const void*>(kernel), value));
  }
  return cudaSuccess;
}
struct cudaFuncAttributes {  // those of them that a CPU can tell
  std::size_t sharedSizeBytes;
  int maxDynamicSharedSizeBytes, maxThreadsPerBlock;
};
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  const auto shared = cudasim_shared_memory(reinterpret_cast<const void*>(kernel));
  *attributes = {shared.declared, static_cast<int>(shared.allowed), 1024};
  return cudaSuccess;
}

// What is known by name only, so that the compiler can say what to do instead: nothing here copies
// from a host to a device.
#define CUDASIM_NOT_NEEDED(name)                                                            \
  template <class... A>                                                                     \
  __attribute__((error("pass arrays to launch: no " #name " is needed"))) cudaError_t name( \
      A&&...);
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
CUDASIM_NOT_NEEDED(cudaMalloc)
CUDASIM_NOT_NEEDED(cudaMallocManaged)
CUDASIM_NOT_NEEDED(cudaMallocHost)
CUDASIM_NOT_NEEDED(cudaMemcpy)
CUDASIM_NOT_NEEDED(cudaMemcpyAsync)
CUDASIM_NOT_NEEDED(cudaMemset)
CUDASIM_NOT_NEEDED(cudaFree)
CUDASIM_NOT_NEEDED(cudaFreeHost)
#undef CUDASIM_NOT_NEEDED
