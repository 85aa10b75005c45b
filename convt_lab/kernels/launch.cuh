// How Python starts a kernel that has no launcher of its own: one line per kernel, appended to its
// source by program.py, makes two C functions, one that tells the kernel's parameter types and one
// that launches it with arguments given by address. The types come from the compiler, so typedefs,
// macros and `const` need no parsing. program.py includes this file before the source, whose macros
// can't reach it so; they reach the lines behind it, in which all names begin with convt_lab.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

#include "shared_memory.cuh"

namespace convt_lab {

// NumPy's codes: f4 is float, i8 a 64-bit integer, b1 a bool; V16 any other type of 16 bytes.
template <class T>
std::string scalar_code() {
  const std::string size = std::to_string(sizeof(T));
  if constexpr (std::is_same_v<T, bool>) return "b" + size;
  if constexpr (std::is_floating_point_v<T>) return "f" + size;
  if constexpr (std::is_integral_v<T>) return (std::is_signed_v<T> ? "i" : "u") + size;
  return "V" + size;
}

template <class T>
std::string type_code() {
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_pointer_t<T>;
    const std::string prefix = std::is_const_v<Element> ? "*const " : "*";
    if constexpr (std::is_void_v<Element>) {
      return prefix + "V0";
    } else {
      return prefix + scalar_code<std::remove_cv_t<Element>>();
    }
  } else {
    return scalar_code<std::remove_cv_t<T>>();
  }
}

template <class... P, std::size_t... I>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   [[maybe_unused]] void** arguments, cudaStream_t stream,
                   std::index_sequence<I...>) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, shared_bytes, stream>>>(
      *static_cast<std::remove_cv_t<P>*>(arguments[I])...);
  return cudaGetLastError();
}

}  // namespace convt_lab

using convt_lab_size = std::size_t;

// In a namespace without a name: each library has a memory of its own.
namespace {

template <class... P>
const char* convt_lab_signature(void (*)(P...)) {
  static const std::string codes = ((convt_lab::type_code<P>() + ";") + ... + std::string());
  return codes.c_str();
}

template <class... P>
int convt_lab_launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block,
                     std::size_t shared_bytes, void** arguments, void* stream) {
  return convt_lab::launch(kernel, dim3(grid[0], grid[1], grid[2]),
                           dim3(block[0], block[1], block[2]), shared_bytes, arguments,
                           static_cast<cudaStream_t>(stream), std::index_sequence_for<P...>{});
}

}  // namespace

// What is told here is not told once more, of whatever is called next.
extern "C" const char* convt_lab_error_string(int error) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// `symbol` names the C functions; `kernel` may be qualified with its namespace.
#define CONVT_LAB_LAUNCHABLE(symbol, kernel)                                                       \
  extern "C" const char* convt_lab_signature_##symbol() { return convt_lab_signature(kernel); }    \
  extern "C" int convt_lab_launch_##symbol(                                                        \
      const unsigned* convt_lab_grid, const unsigned* convt_lab_block,                             \
      convt_lab_size convt_lab_shared_bytes, void** convt_lab_arguments, void* convt_lab_stream) { \
    return convt_lab_launch(kernel, convt_lab_grid, convt_lab_block, convt_lab_shared_bytes,       \
                            convt_lab_arguments, convt_lab_stream);                                \
  }
