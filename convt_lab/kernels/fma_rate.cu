// How many float32 multiply-adds a GPU can do in a second: the ceiling of every stage that computes
// in float32. It is no stage: it reads nothing and computes nothing of use.
//
// A thread advances CHAINS independent chains x <- fmaf(x, factor, addend). One chain would wait
// for its own result each time, four cycles or more; sixteen of them, in eight or more warps for
// each scheduler, leave the FMA units no idle cycle. STEPS steps are unrolled, so that the loop's
// own counter, compare and branch are three instructions beside a thousand.
//
// Cost: CHAINS * STEPS FMAs for each thread and round, 16 * 64 = 1024; no load, one store at the
// end. The store is what makes the compiler keep the rest.

#include <cuda_runtime.h>

constexpr int THREADS = 256;
constexpr int CHAINS = 16;
constexpr int STEPS = 64;
static_assert(CHAINS <= 24, "with few registers a thread, all the threads that an SM takes fit");

// result: [blocks * THREADS], the sum of each thread's chains. With |factor| < 1 every chain tends
// to addend / (1 - factor), whatever it started with.
__global__ void __launch_bounds__(THREADS)
    fma_rate_kernel(float* __restrict__ result, float factor, float addend, int rounds) {
  float chain[CHAINS];
#pragma unroll
  for (int c = 0; c < CHAINS; ++c) chain[c] = static_cast<float>(threadIdx.x + c);

#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int c = 0; c < CHAINS; ++c) chain[c] = fmaf(chain[c], factor, addend);
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < CHAINS; ++c) sum += chain[c];
  result[blockIdx.x * THREADS + threadIdx.x] = sum;
}

// `blocks` shall fill every SM: the caller knows how many threads one takes.
extern "C" cudaError_t fma_rate(float* result, float factor, float addend, int rounds, int blocks,
                                cudaStream_t stream) {
  fma_rate_kernel<<<blocks, THREADS, 0, stream>>>(result, factor, addend, rounds);
  return cudaGetLastError();
}
