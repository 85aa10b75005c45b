// The types that values are stored in: float, float16 and bfloat16. Sums are float32 in all of
// them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void set_rounded(float& to, float value) { to = value; }
__device__ __forceinline__ void set_rounded(__half& to, float value) {
  to = __float2half_rn(value);
}
__device__ __forceinline__ void set_rounded(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}
