// What a translated kernel and the simulator's runtime say to each other.
//
// A kernel's library is compiled against this header (through include/cuda_runtime.h) and linked
// with the runtime, which is built once. Everything here is C linkage and plain data.

#pragma once

#include <cstddef>
#include <cstdint>

struct uint3;  // CUDA's type

extern "C" {

struct CudasimIndex {
  unsigned x, y, z;
  operator uint3() const;  // defined where uint3 is
};

struct CudasimLaunch {
  CudasimIndex grid;   // blocks
  CudasimIndex block;  // threads
  std::size_t shared_bytes;
  const void* stream;                    // as asked for; nothing here runs in streams
  const void* kernel;                    // the kernel's code
  void (*run_thread)(const void* call);  // runs the kernel for the current thread
  const void* call;                      // the kernel and its arguments ...
  std::size_t call_bytes;                // ... which take this much memory
  int workers;                           // CPU threads to spread the blocks over; 0: all
};

// Why a launch ended early.
enum CudasimFailureKind : int {
  CUDASIM_NONE = 0,
  CUDASIM_BAD_ACCESS = 1,         // an address outside every buffer, or a misaligned vector
  CUDASIM_ARITHMETIC = 2,         // integer division by zero
  CUDASIM_TRAP = 3,               // __trap(), a failed assert, or a broken stack
  CUDASIM_DEADLOCK = 4,           // threads wait for others that never come
  CUDASIM_BAD_CONFIGURATION = 5,  // grid, block or shared memory outside the limits
  CUDASIM_STEP_LIMIT = 6,         // more basic blocks than a traced launch may run
  CUDASIM_OUT_OF_MEMORY = 7,      // of the computer that simulates
  CUDASIM_STOPPED = 8             // it took too long, or somebody interrupted it
};

struct CudasimFailure {
  int kind;
  std::uint64_t address;  // for CUDASIM_BAD_ACCESS; all ones if the processor did not tell
  CudasimIndex block, thread;
  char text[256];
};

// ---- Tracing: see tracer.h ----

enum CudasimSpace : int {
  CUDASIM_GLOBAL = 0,
  CUDASIM_STATIC_SHARED = 1,
  CUDASIM_DYNAMIC_SHARED = 2
};

enum CudasimHazardKind : int {
  CUDASIM_RACE = 0,
  CUDASIM_DIVERGENT_BARRIER = 1,
  CUDASIM_OUT_OF_BOUNDS = 2,
  CUDASIM_UNINITIALISED_READ = 3,
  CUDASIM_WRITE_CONFLICT = 4,
  CUDASIM_MISALIGNED = 5
};

struct CudasimBuffer {
  int space;
  std::uint64_t start;             // an address; for static shared arrays the place in the segment
  std::uint64_t bytes;             // 0 for dynamic shared memory: the launch tells
  std::uint32_t granule;           // bytes of an element
  std::uint32_t starts_unwritten;  // whether NaN means that nothing has been written yet
};

struct CudasimTrace {
  const CudasimBuffer* buffers;
  std::size_t buffer_count;
  const std::uint64_t* blocks;  // the blocks to run, by linear index, or null for all
  std::size_t block_count;
  std::uint64_t max_steps;  // iterations of loops over all threads
};

// One instruction's accesses to one buffer. `pc` is relative to the kernel's library.
struct CudasimSite {
  std::uint64_t pc;
  int op;  // 1 load, 2 store, 3 atomic
  int buffer;
  std::uint64_t requests, active_lanes, transactions, bytes_requested, bytes_moved, ideal;
};

// The costliest request of a site: where each lane of the warp went, relative to the buffer.
struct CudasimRequest {
  std::uint64_t pc;
  int op;
  int buffer;
  std::uint32_t bytes, mask;
  std::uint64_t transactions;
  std::uint64_t offsets[32];
};

struct CudasimHazard {
  int kind;
  int buffer;  // -1: none
  std::uint64_t pc;
  std::int64_t offset;  // in bytes, from the buffer's start
  std::uint64_t count;
  CudasimIndex block, thread, other_block, other_thread;
};

// A launch that was asked for and not run. `kernel` is relative to the kernel's library.
struct CudasimPlanned {
  std::uint64_t kernel;
  CudasimIndex grid, block;
  std::uint64_t shared_bytes;
  std::uint64_t stream;  // 0: the default one
};

// Makes this CPU thread's launches be noted instead of run, until cudasim_plan_end; a block may
// have so much shared memory (0: as much as otherwise).
void cudasim_plan_begin(std::size_t max_shared_bytes);
void cudasim_plan_end();
// What has been noted, in order; the array lives until the next launch or cudasim_plan_end.
std::size_t cudasim_planned(const CudasimPlanned** launches);

// Makes this CPU thread's launches traced ones, on one core, until cudasim_trace_end.
void cudasim_trace_begin(const CudasimTrace* trace);
void cudasim_trace_end();
// What the trace holds; arrays live until cudasim_trace_end.
std::uint64_t cudasim_trace_fma();
std::uint64_t cudasim_trace_tensor_fma();
std::uint64_t cudasim_trace_steps();
std::uint64_t cudasim_trace_blocks(
    std::uint64_t* of);  // how many were run, of how many in the grid
std::uint64_t cudasim_trace_footprint(std::size_t buffer);  // distinct sectors
std::size_t cudasim_trace_sites(const CudasimSite** sites);
std::size_t cudasim_trace_requests(const CudasimRequest** requests);
std::size_t cudasim_trace_hazards(const CudasimHazard** hazards);
std::size_t cudasim_trace_loads(std::size_t buffer, const std::uint32_t** counts);

// What instrumented kernels call.
void cudasim_enter_loop();
void cudasim_next_iteration();
void cudasim_leave_loop();
float cudasim_fma(float a, float b, float c);
void cudasim_tensor_fma(int count);
void cudasim_atomic(const void* address, std::size_t bytes);

// Limits the seconds of the launches to come, of all CPU threads; 0: no limit.
void cudasim_limit_seconds(double seconds);

// What printf does: writes text, of a launch's threads no more than a GPU keeps for it.
void cudasim_print(const char* text, std::size_t bytes);

// Runs a kernel over its grid. A failure is kept for this CPU thread until it is taken.
void cudasim_launch(const CudasimLaunch* launch);
int cudasim_peek_error();  // 0 or a cudaError_t
int cudasim_take_error();
// What happened in the launch whose error was last taken or is still to be taken; told once.
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
int cudasim_in_kernel();  // whether this is a thread of a launch, and not the launcher

// What cudaDeviceGetAttribute says a block may have; what a kernel declares of it, and how much
// more its launches may ask for; and what cudaFuncSetAttribute lets them ask for, or its error.
std::size_t cudasim_max_shared_bytes();
struct CudasimSharedMemory {
  std::size_t declared, allowed;
};
CudasimSharedMemory cudasim_shared_memory(const void* kernel);
int cudasim_allow_shared_bytes(const void* kernel, std::size_t bytes);

// Device memory: 256-byte aligned, among unmapped addresses, so that running past it is caught.
void* cudasim_allocate(std::size_t bytes);
void cudasim_release(void* buffer);

// Whether something else than the poison was written outside a buffer of `bytes` bytes, in what is
// left of its pages; where, counted from the buffer's start.
bool cudasim_overrun(const void* buffer, std::size_t bytes, long long* place);

}  // extern "C"
