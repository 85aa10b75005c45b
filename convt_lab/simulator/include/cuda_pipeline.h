// Asynchronous copies from global to shared memory. Here a copy happens at once, as it does on an
// architecture before sm_80, where <cuda_pipeline.h> falls back to a load and a store.

#pragma once

#include <cuda_runtime.h>

__forceinline__ void __pipeline_memcpy_async(void* shared, const void* global, std::size_t bytes,
                                             std::size_t zero_fill = 0) {
  const auto places =
      reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || places % bytes != 0 || zero_fill > bytes) {
    cudasim_trap("an asynchronous copy is of 4, 8 or 16 bytes, from and to multiples of so many");
  }
  const std::size_t copied = bytes - zero_fill;
  if (bytes == 4 && copied == 4) {
    *static_cast<float*>(shared) = *static_cast<const float*>(global);
  } else if (bytes == 16 && copied == 16) {
    *static_cast<float4*>(shared) = *static_cast<const float4*>(global);
  } else {
    for (std::size_t i = 0; i < bytes / 4; ++i) {
      static_cast<float*>(shared)[i] = 4 * i < copied ? static_cast<const float*>(global)[i] : 0.0f;
    }
  }
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(std::size_t) {}
