// One instruction of the tensor cores: 16 rows times 8 columns, summed over as many values of k as
// 32 bytes hold.
//
// mma.m16n8k16 multiplies A [16, 16] by B [16, 8] and adds to C [16, 8], each spread over a warp.
// With g = lane / 4 and t = lane % 4, a lane holds pairs of neighbours in k, or in the columns:
//
//     a[0], a[1]   rows g and g + 8, k = 2t and 2t + 1
//     a[2], a[3]   the same rows, k = 2t + 8 and 2t + 9
//     b[0], b[1]   column g, k = 2t and 2t + 1, then 2t + 8 and 2t + 9
//     c[0], c[1]   row g, columns 2t and 2t + 1;   c[2], c[3]   row g + 8
//
// That is for float16 and bfloat16. A TF32 fills a register alone, and m16n8k8 has half as many:
// k = t in place of the first pair, t + 4 in place of the second.
//
// Products are exact. Sums are kept in float32 but, unlike FMAs, cut off rather than rounded.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "storage.cuh"

// Two neighbours as a register.
__device__ __forceinline__ uint32_t pair_of(__half first, __half second) {
  const __half both[2] = {first, second};
  uint32_t bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t pair_of(__nv_bfloat16 first, __nv_bfloat16 second) {
  const __nv_bfloat16 both[2] = {first, second};
  uint32_t bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}

// TF32: a float32 of which 13 digits are zeros. 11 are left, as in float16, but the exponents are
// float32's. Rounded is to the nearest (away from zero if both are as near): cut off, as the
// instruction would do by itself, values would all err to one side, and twice as far.
struct Tf32 {
  uint32_t bits;
};

#ifdef __CUDACC__
__device__ __forceinline__ Tf32 to_tf32(float value) {
  Tf32 rounded = {0};
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded.bits) : "f"(value));
#endif
  return rounded;
}
#else
inline Tf32 to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7F800000u) == 0x7F800000u) return {bits & 0xFFC00000u};  // infinite, or no number
  return {(bits + 0x1000u) & 0xFFFFE000u};
}
#endif

// A lane's share of a product; the type is that of A's and B's values.
#ifdef __CUDACC__
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Tf32>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif __CUDA_ARCH__ >= 750
  // These GPUs know float16 alone, and m16n8k8 of it: half as many k at a time.
  if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
  }
#endif
}
#else
// On a CPU the lanes exchange what they hold, and each sums its own four values: in double, cut off
// to float32 at the end, which is close to what the tensor cores do.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int IN_REGISTER = 4 / sizeof(T), HALF = 4 * IN_REGISTER, K = 2 * HALF;
  const auto both = [](uint32_t low, uint32_t high) {
    return static_cast<std::uint64_t>(high) << 32 | low;
  };
  const cudasim::Lanes front = cudasim::exchange(0xFFFFFFFFu, both(a[0], a[1]));
  const cudasim::Lanes back = cudasim::exchange(0xFFFFFFFFu, both(a[2], a[3]));
  const cudasim::Lanes columns = cudasim::exchange(0xFFFFFFFFu, both(b[0], b[1]));
  const auto value = [](std::uint64_t registers, int number, int place) {
    const auto bits = static_cast<uint32_t>(registers >> 32 * number);
    if constexpr (std::is_same_v<T, Tf32>) {
      return static_cast<double>(__uint_as_float(bits));
    } else {
      T element;
      const auto half = static_cast<std::uint16_t>(bits >> 16 * place);
      memcpy(&element, &half, sizeof half);
      return static_cast<double>(to_float(element));
    }
  };
  const int g = cudasim::lane() / 4, t = cudasim::lane() % 4;
  double rows[2][K], both_columns[2][K];  // rows g and g + 8, columns 2t and 2t + 1
  for (int k = 0; k < K; ++k) {
    const cudasim::Lanes& from = k < HALF ? front : back;
    const int at = k % HALF / IN_REGISTER, place = k % IN_REGISTER;
    for (int i = 0; i < 2; ++i) {
      rows[i][k] = value(from.value[4 * g + at], i, place);
      both_columns[i][k] = value(columns.value[4 * (2 * t + i) + at], k / HALF, place);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < K; ++k) sum += rows[i / 2][k] * both_columns[i % 2][k];
    c[i] = __double2float_rz(sum);
  }
  cudasim::count_tensor_fma(4 * K);
}
#endif
