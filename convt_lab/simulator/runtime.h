// What a translated kernel and the simulator's runtime say to each other.
//
// A kernel's library is compiled against this header (through include/cuda_runtime.h) and linked
// with the runtime, which is built once. Everything here is C linkage and plain data.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct CudasimIndex {
  unsigned x, y, z;
};

struct CudasimLaunch {
  CudasimIndex grid;   // blocks
  CudasimIndex block;  // threads
  std::size_t shared_bytes;
  void (*run_thread)(const void* call);  // runs the kernel for the current thread
  const void* call;                      // the kernel and its arguments
  int workers;                           // CPU threads to spread the blocks over; 0: all
};

// Why a launch ended early.
enum CudasimFailureKind : int {
  CUDASIM_NONE = 0,
  CUDASIM_BAD_ACCESS = 1,        // an address outside every buffer, or a misaligned vector
  CUDASIM_ARITHMETIC = 2,        // integer division by zero
  CUDASIM_TRAP = 3,              // __trap() or a failed assert
  CUDASIM_DEADLOCK = 4,          // threads wait for others that never come
  CUDASIM_BAD_CONFIGURATION = 5  // grid, block or shared memory outside the limits
};

struct CudasimFailure {
  int kind;
  std::uint64_t address;  // for CUDASIM_BAD_ACCESS; 0 if the processor did not tell
  CudasimIndex block, thread;
  char text[256];
};

// Runs a kernel over its grid. A failure is kept for this CPU thread until it is taken.
void cudasim_launch(const CudasimLaunch* launch);
int cudasim_peek_error();  // 0 or a cudaError_t
int cudasim_take_error();
// What happened in the launch whose error was last taken or is still to be taken.
const CudasimFailure* cudasim_failure();

// The current thread's place. `const`: within one call of a kernel they never change.
__attribute__((const)) CudasimIndex cudasim_thread_index();
__attribute__((const)) CudasimIndex cudasim_block_index();
__attribute__((const)) CudasimIndex cudasim_block_size();
__attribute__((const)) CudasimIndex cudasim_grid_size();
__attribute__((const)) void* cudasim_dynamic_shared();

// A barrier for the block; returns how many of its threads called with a non-zero predicate.
int cudasim_barrier(int predicate);
// Waits for the lanes in `mask` of the warp, hands every lane's value to each of them, and returns
// the mask of the lanes that took part (lanes that have exited do not).
std::uint32_t cudasim_exchange(std::uint32_t mask, std::uint64_t value, std::uint64_t* lanes);
[[noreturn]] void cudasim_trap(const char* text);

// Device memory: 256-byte aligned, among unmapped addresses, so that running past it is caught.
void* cudasim_allocate(std::size_t bytes);
void cudasim_release(void* buffer);

}  // extern "C"
