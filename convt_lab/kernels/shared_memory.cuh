// Lets a kernel have more shared memory than every kernel may.

// A guard that stays where this is inlined: such a file may include it, too.
#ifndef CONVT_LAB_SHARED_MEMORY
#define CONVT_LAB_SHARED_MEMORY

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

// Each library has a memory of its own: with a name that others can see, loaders would give all of
// them one.
namespace {

// A kernel's limit holds for all threads' launches. So it is raised and never lowered: else one
// thread could take from another what that one has asked for and is about to launch with. Unasked,
// every kernel has 48 KiB, less what its own text declares.
template <class... P>
cudaError_t allow_shared_bytes(void (*kernel)(P...), std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, void (*)(P...)>, std::size_t> allowed;  // of a GPU's kernel
  if (bytes == 0) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::pair place(device, kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count(place) == 0) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    allowed[place] = attributes.maxDynamicSharedSizeBytes;
  }
  std::size_t& most = allowed[place];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace

#endif  // CONVT_LAB_SHARED_MEMORY
