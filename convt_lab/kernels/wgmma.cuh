// What is Hopper's own (sm_90a): the tensor cores' instruction for four warps, and barriers in
// shared memory on which warps with different roles wait for each other.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "storage.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

namespace warpgroups {

// ---- Kernels that begin early (warpgroups.cuh: start_early) ------------------------------------

// The next kernel may begin as soon as all blocks have called this, before they end.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All that the kernel before wrote is there afterwards. What is read of it may not be __restrict__:
// the compiler would be free to read it before.
__device__ __forceinline__ void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if HAS_WGMMA

__device__ __forceinline__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Barriers ----------------------------------------------------------------------------------

// A phase of a barrier is over when so many have arrived and so many bytes as were announced have
// come. A thread waits for phase 0, 1, 2, ... by its parity; phase -1 is over from the start.
__device__ __forceinline__ void initialise(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

// The loop is not the compiler's, which would think that a warp's lanes part here.
__device__ __forceinline__ void wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(address_of(barrier)),
      "r"(parity)
      : "memory");
}

// Whether it is over, at once.
__device__ __forceinline__ bool is_over(uint64_t* barrier, unsigned parity) {
  unsigned over;
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n}"
      : "=r"(over)
      : "r"(address_of(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// Arrives, and starts a copy of `bytes` (a multiple of 16) for which the phase will last.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address_of(shared)),
      "l"(global), "r"(bytes), "r"(address_of(barrier))
      : "memory");
}

// Starts to copy 16 bytes, or to write zeros. What was started so far is a group; a thread waits
// for all groups but the last PENDING.
__device__ __forceinline__ void copy_or_clear(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// What a thread wrote to shared memory can be read by the tensor cores after the next barrier.
__device__ __forceinline__ void show_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Whether any of COUNT threads says so. They wait for each other, at the block's barrier ID.
template <int ID, int COUNT>
__device__ __forceinline__ bool any_of(bool says) {
  unsigned any;
  asm volatile(
      "{\n.reg .pred mine, any;\n"
      "setp.ne.u32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, %3, mine;\n"
      "selp.u32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(static_cast<unsigned>(says)), "n"(ID), "n"(COUNT)
      : "memory");
  return any != 0;
}

// Half of COUNT threads wait at the block's barrier `id` until the other half lets them go on.
template <int COUNT>
__device__ __forceinline__ void wait_turn(int id) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void let_go(int id) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}

// How many registers a warp's threads have from now on; all of a warpgroup ask for it.
template <int COUNT>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- The instruction ---------------------------------------------------------------------------

// A matrix of 16-bit values in shared memory, 16 of them along the sum. 8 rows of 8 values, 16
// bytes each, lie together, and 8 rows on begin the next 128 bytes; the other 8 values of a row lie
// `next` on. Addresses are in 16 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int next) {
  return static_cast<uint64_t>(128 / 16) << 32 | static_cast<uint64_t>(next) << 16 | address;
}

// The four warps of a warpgroup hold 64 rows of a product, 16 each. As in mma.cuh a lane has, with
// g = lane / 4 and t = lane % 4, of the columns 8 j and on
//
//     d[4 j], d[4 j + 1]   row g, columns 2t and 2t + 1;   d[4 j + 2], d[4 j + 3]   row g + 8.
template <int COLUMNS>
using Product = float[COLUMNS / 2];

// Half of the columns: the first ones, or the others.
template <int COLUMNS>
__device__ __forceinline__ Product<COLUMNS / 2>& half_of(Product<COLUMNS>& d, int half) {
  return reinterpret_cast<Product<COLUMNS / 2>&>(d[half * (COLUMNS / 4)]);
}

#define REGISTERS4(mode, d, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])
#define REGISTERS16(mode, d, i)                                                   \
  REGISTERS4(mode, d, i), REGISTERS4(mode, d, i + 4), REGISTERS4(mode, d, i + 8), \
      REGISTERS4(mode, d, i + 12)
#define REGISTERS64(mode, d, i)                                                        \
  REGISTERS16(mode, d, i), REGISTERS16(mode, d, i + 16), REGISTERS16(mode, d, i + 32), \
      REGISTERS16(mode, d, i + 48)
#define REGISTERS_96(mode, d) \
  REGISTERS16(mode, d, 0), REGISTERS16(mode, d, 16), REGISTERS16(mode, d, 32)
#define REGISTERS_152(mode, d) \
  REGISTERS64(mode, d, 0), REGISTERS4(mode, d, 64), REGISTERS4(mode, d, 68), REGISTERS4(mode, d, 72)
#define REGISTERS_192(mode, d) \
  REGISTERS64(mode, d, 0), REGISTERS16(mode, d, 64), REGISTERS16(mode, d, 80)
#define NAMES_48                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_76                                                                  \
  NAMES_48                                                                        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75"
#define NAMES_96 "{" NAMES_48 "}, %48, %49"
#define NAMES_152 "{" NAMES_76 "}, %76, %77"
#define NAMES_192                                                                           \
  "{" NAMES_76                                                                              \
  ", %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, " \
  "%93, %94, %95}, %96, %97"
#define WRITTEN "=f"
#define CHANGED "+f"
#define WGMMA(columns, type, adds)                                                          \
  "{\n.reg .pred adds;\n"                                                                   \
  "setp.ne.b32 adds, " adds                                                                 \
  ", 0;\n"                                                                                  \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " " NAMES_##columns \
      ", adds, 1, 1, 0, 0;\n}"

// d = a * b, or d += a * b, as soon as may be: begin, multiply_first or multiply, send, and finish,
// which waits for all that was sent but the last PENDING times. T is the values' type.
#define MULTIPLY(name, columns, mode, adds)                                                       \
  template <class T>                                                                              \
  __device__ __forceinline__ void name(Product<columns>& d, uint64_t a, uint64_t b) {             \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                             \
      asm volatile(WGMMA(columns, "bf16", adds) : REGISTERS_##columns(mode, d) : "l"(a), "l"(b)); \
    } else {                                                                                      \
      asm volatile(WGMMA(columns, "f16", adds) : REGISTERS_##columns(mode, d) : "l"(a), "l"(b));  \
    }                                                                                             \
  }
#define FINISH(columns, count)                                           \
  template <int PENDING = 0>                                             \
  __device__ __forceinline__ void finish_products(Product<columns>& d) { \
    asm volatile("wgmma.wait_group.sync.aligned %" count ";"             \
                 : REGISTERS_##columns(CHANGED, d)                       \
                 : "n"(PENDING)                                          \
                 : "memory");                                            \
  }
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void send_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
MULTIPLY(multiply_first, 96, WRITTEN, "0")
MULTIPLY(multiply_first, 152, WRITTEN, "0")
MULTIPLY(multiply, 96, CHANGED, "1")
MULTIPLY(multiply, 152, CHANGED, "1")
MULTIPLY(multiply, 192, CHANGED, "1")
FINISH(96, "48")
FINISH(152, "76")
FINISH(192, "96")

#undef FINISH
#undef MULTIPLY
#undef WGMMA
#undef CHANGED
#undef WRITTEN
#undef NAMES_192
#undef NAMES_152
#undef NAMES_96
#undef NAMES_76
#undef NAMES_48
#undef REGISTERS_192
#undef REGISTERS_152
#undef REGISTERS_96
#undef REGISTERS64
#undef REGISTERS16
#undef REGISTERS4

#endif  // HAS_WGMMA

}  // namespace warpgroups
