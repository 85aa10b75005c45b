// The simulator's runtime: runs the threads of a CUDA grid on a CPU.
//
// A block's threads are fibers (stacks that one CPU thread switches between). One fiber runs thread
// after thread until a thread really has to wait at a barrier, so a kernel without barriers pays
// almost nothing. Blocks are independent and are spread over the CPU's cores.
//
// Shared memory is the kernel library's thread-local storage (`__shared__` becomes
// `static thread_local`), so each core has its own; it is filled with NaN before every block, so
// that a kernel which reads what it never wrote computes NaN rather than the last block's values.
//
// A fault in a kernel (a wild pointer, a division by zero) is caught in a signal handler, which
// abandons the fibers and reports which thread of which block did it.

#include "runtime.h"

#include "symbols.h"
#include "tracer.h"

#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr int kInvalidValue = 1;          // cudaErrorInvalidValue
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration
constexpr int kLaunchFailure = 719;       // cudaErrorLaunchFailure
constexpr int kMaxThreads = 1024;         // per block, on every architecture
constexpr int kWarpSize = 32;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // per block, sm_90
constexpr std::size_t kAlwaysAllowed = 48 * 1024;    // of shared memory, to every kernel
constexpr std::size_t kStackBytes = 128 * 1024;      // as stack_fault says
constexpr std::size_t kStackGuardBytes = 64 * 1024;  // so that a large frame does not step over it
constexpr std::size_t kAlternateStackBytes = 64 * 1024;
constexpr std::size_t kBufferAlignment = 256;  // cudaMalloc's
// On either side of a buffer: what a 32-bit index into 4-byte values can reach.
constexpr std::size_t kGuardBytes = std::size_t{8} << 30;
constexpr std::uint64_t kNoAddress = ~std::uint64_t{0};
constexpr unsigned char kPoison = 0xFF;  // four of them are a NaN, and -1 as an integer

// ---------------------------------------------------------------------------------------------
// Switching stacks. A hand-written switch saves what the C ABI says a call preserves; ucontext,
// the portable fallback, also saves the signal mask with two system calls and is ten times slower.

#if defined(__x86_64__) && !defined(CUDASIM_UCONTEXT)

extern "C" void cudasim_switch(void** save, void* load);
asm(R"(
.text
.hidden cudasim_switch
.globl cudasim_switch
.type cudasim_switch, @function
cudasim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cudasim_switch, .-cudasim_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12 to r15
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) {
    cudasim_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#elif defined(__aarch64__) && !defined(CUDASIM_UCONTEXT)

extern "C" void cudasim_switch(void** save, void* load);
asm(R"(
.text
.hidden cudasim_switch
.globl cudasim_switch
.type cudasim_switch, %function
cudasim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size cudasim_switch, .-cudasim_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    auto* frame = reinterpret_cast<void**>(stack + bytes) - 20;
    std::memset(frame, 0, 160);
    frame[11] = reinterpret_cast<void*>(entry);  // x30, the link register
    stack_pointer = frame;
  }
  static void change(Context& from, Context& to) {
    cudasim_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;

  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

std::size_t page_bytes() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

struct Fiber {
  Context context;
  char* stack = nullptr;

  Fiber() {
    void* memory = mmap(nullptr, 2 * kStackGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      if (const auto handler = std::get_new_handler()) handler();
      throw std::bad_alloc();
    }
    // Guards below the stack turn an overflow into a fault, and those above it an index
    // behind a local array. Failing to set them (too many mappings) only loses that check.
    (void)mprotect(memory, kStackGuardBytes, PROT_NONE);
    stack = static_cast<char*>(memory) + kStackGuardBytes;
    (void)mprotect(stack + kStackBytes, kStackGuardBytes, PROT_NONE);
  }
  ~Fiber() { munmap(stack - kStackGuardBytes, 2 * kStackGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// ---------------------------------------------------------------------------------------------
// One CPU thread's part of a launch: the block that it runs now.

enum class State : unsigned char { kNew, kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  CudasimIndex index;
  State state;
  Fiber* fiber;
  int predicate;            // handed to the barrier
  std::uint32_t mask;       // lanes that this thread waits for
  std::uint64_t value;      // handed to the warp
  std::uint64_t* lanes;     // where it wants the warp's values
  std::uint32_t took_part;  // what the exchange returns
};

struct Library {           // the kernel's
  std::size_t module = 0;  // of its thread-local storage, where the shared arrays are
  std::size_t shared_bytes = 0;
  std::uintptr_t start = 0, end = 0;
  std::uintptr_t base = 0;  // what its file's addresses count from
  const char* path = "";
};

class Watch;

class Worker {
 public:
  Worker(const CudasimLaunch& launch, const Library& library, cudasim::Tracer* tracer,
         Watch& watch);
  ~Worker();

  // Runs one block; false when it failed (see failure()).
  bool run_block(CudasimIndex block, std::uint64_t linear);
  const CudasimFailure& failure() const { return failure_; }

  CudasimIndex thread_index() const { return threads_[current_].index; }
  CudasimIndex block_index() const { return block_; }
  const CudasimLaunch& launch() const { return launch_; }
  void* dynamic_shared() const { return dynamic_shared_; }

  int barrier(int predicate, std::uint64_t site);
  std::uint32_t exchange(std::uint32_t mask, std::uint64_t value, std::uint64_t* lanes);
  [[noreturn]] void abort(int kind, std::uint64_t address, const char* text);
  bool in_fiber() const { return in_fiber_; }
  // What is wrong if the running thread's stack has been left at `address`, or null.
  const char* stack_fault(std::uint64_t address) const {
    const auto stack = reinterpret_cast<std::uint64_t>(running_->stack);
    if (address - (stack - kStackGuardBytes) < kStackGuardBytes) {
      return "the thread's stack is full: recursion, or local arrays of more than 128 KiB";
    }
    if (address - (stack + kStackBytes) < kStackGuardBytes) {
      return "the thread wrote behind its local variables";
    }
    return nullptr;
  }
  void out_of_memory();

  // A signal that the launch is to stop may come between any two instructions. While something is
  // held that others need, a lock of the C library's say, it is obeyed later.
  void hold() { ++held_; }
  void let_go() {
    if (--held_ == 0 && is_to_stop_) stop();
  }
  void stop();
  bool is_to_stop() const { return is_to_stop_; }
  Watch& watch() const { return watch_; }
  cudasim::Tracer* tracer() const { return tracer_; }

 private:
  static void fiber_main();
  void run_threads();
  Fiber* take_idle_fiber();
  void wait();              // the current thread has set its state; run others
  Context& next_context();  // whom to run now
  void thread_finished();
  void release_barrier_if_complete();
  void release_warp_if_complete(int warp);
  void make_ready(int thread);
  void resume(int thread);  // `thread` is the one that runs from now on
  void report_deadlock();

  const CudasimLaunch& launch_;
  Watch& watch_;
  volatile std::sig_atomic_t held_ = 0, is_to_stop_ = 0;
  cudasim::Tracer* const tracer_;  // null unless this launch is traced
  CudasimIndex block_{};
  int count_ = 0;  // threads in the block
  std::vector<Thread> threads_;
  int current_ = 0;   // the thread that runs
  int next_new_ = 0;  // the first thread not yet started
  int live_ = 0;      // threads not yet done
  int waiting_ = 0;   // threads at the barrier
  int barrier_result_ = 0;
  std::vector<int> ready_;  // threads to resume, in order; a queue
  std::size_t ready_head_ = 0;

  Context main_;
  Fiber* running_ = nullptr;
  bool in_fiber_ = false;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;

  char* shared_ = nullptr;  // this CPU thread's copy of the kernel's shared arrays
  std::size_t shared_bytes_ = 0;
  void* dynamic_shared_ = nullptr;

  CudasimFailure failure_{};
  std::unique_ptr<char[]> alternate_stack_;
  stack_t old_alternate_stack_{};
};

// initial-exec: a plain load, also inside a signal handler.
__attribute__((tls_model("initial-exec"))) thread_local Worker* worker = nullptr;
thread_local CudasimFailure last_failure{};
thread_local int pending_error = 0;
thread_local std::unique_ptr<cudasim::Tracer> active_tracer;
thread_local std::vector<std::uint64_t> traced_blocks;
thread_local bool planning = false;
thread_local std::size_t max_shared_bytes = kMaxSharedBytes;
thread_local std::vector<CudasimPlanned> planned;

extern "C" void* __tls_get_addr(std::size_t*);

char* tls_block(std::size_t module) {
  struct {
    std::size_t module, offset;
  } index{module, 0};
  return static_cast<char*>(__tls_get_addr(&index.module));
}

// Held while the loader's own lock is, so that no process is forked then.
std::mutex library_mutex;

// Finds the library that holds `address`.
Library find_library(const void* address) {
  std::lock_guard<std::mutex> lock(library_mutex);
  struct Search {
    std::uintptr_t address;
    Library found;
  } search{reinterpret_cast<std::uintptr_t>(address), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        Library library;
        library.start = ~std::uintptr_t{0};
        library.base = info->dlpi_addr;
        library.path = info->dlpi_name;
        bool holds = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const std::uintptr_t start = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) {
            library.start = std::min(library.start, start);
            library.end = std::max(library.end, start + header.p_memsz);
            holds |= search.address >= start && search.address < start + header.p_memsz;
          } else if (header.p_type == PT_TLS) {
            library.module = info->dlpi_tls_modid;
            library.shared_bytes = header.p_memsz;
          }
        }
        if (holds) search.found = library;
        return holds ? 1 : 0;
      },
      &search);
  return search.found;
}

// Stands for the dynamic shared memory of a launch that gives none: an address of its own, so that
// an access is not taken for one through a null pointer. Null if there are no more addresses.
char* no_shared() {
  static char* const place = [] {
    void* memory = mmap(nullptr, 2 * kMaxSharedBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  }();
  return place;
}

const char* no_shared_fault(std::uint64_t address) {
  const auto start = reinterpret_cast<std::uint64_t>(no_shared());
  if (start == 0 || address - start >= 2 * kMaxSharedBytes) return nullptr;
  return "the launch gave no dynamic shared memory: pass shared_bytes, or a third value in <<<>>>";
}

Worker::Worker(const CudasimLaunch& launch, const Library& library, cudasim::Tracer* tracer,
               Watch& watch)
    : launch_(launch), watch_(watch), tracer_(tracer) {
  count_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  threads_.resize(count_);
  int linear = 0;
  for (unsigned z = 0; z < launch.block.z; ++z) {
    for (unsigned y = 0; y < launch.block.y; ++y) {
      for (unsigned x = 0; x < launch.block.x; ++x) threads_[linear++].index = {x, y, z};
    }
  }
  ready_.reserve(2 * count_);
  if (library.shared_bytes > 0) {
    shared_ = tls_block(library.module);
    shared_bytes_ = library.shared_bytes;
  }
  if (launch.shared_bytes > 0) {
    dynamic_shared_ = cudasim_allocate(launch.shared_bytes);
    if (dynamic_shared_ == nullptr) out_of_memory();
  } else {
    dynamic_shared_ = no_shared();
  }

  alternate_stack_ = std::make_unique<char[]>(kAlternateStackBytes);
  stack_t stack{};
  stack.ss_sp = alternate_stack_.get();
  stack.ss_size = kAlternateStackBytes;
  sigaltstack(&stack, &old_alternate_stack_);
  worker = this;
  if (tracer_ != nullptr) {
    try {
      tracer_->begin_launch(launch, shared_, static_cast<const char*>(dynamic_shared_),
                            library.start, library.end);
    } catch (const std::bad_alloc&) {
      out_of_memory();
    }
  }
}

Worker::~Worker() {
  worker = nullptr;
  if ((old_alternate_stack_.ss_flags & SS_ONSTACK) == 0)
    sigaltstack(&old_alternate_stack_, nullptr);
  if (launch_.shared_bytes > 0) cudasim_release(dynamic_shared_);
}

bool Worker::run_block(CudasimIndex block, std::uint64_t linear) {
  if (failure_.kind != CUDASIM_NONE) return false;
  block_ = block;
  for (auto& thread : threads_) {
    thread.state = State::kNew;
    thread.fiber = nullptr;
  }
  next_new_ = 0;
  live_ = count_;
  waiting_ = 0;
  ready_.clear();
  ready_head_ = 0;
  idle_.clear();
  for (auto& fiber : fibers_) idle_.push_back(fiber.get());
  std::memset(shared_, kPoison, shared_bytes_);
  if (launch_.shared_bytes > 0) std::memset(dynamic_shared_, kPoison, launch_.shared_bytes);

  Context* first = nullptr;
  try {
    if (tracer_ != nullptr) tracer_->begin_block(block, linear);
    first = &next_context();
  } catch (const std::bad_alloc&) {
    out_of_memory();
    return false;
  }
  Context::change(main_, *first);
  in_fiber_ = false;
  if (tracer_ != nullptr) tracer_->end_block();
  return failure_.kind == CUDASIM_NONE;
}

void Worker::fiber_main() { worker->run_threads(); }

// A fiber's life within a block: start thread after thread, each of which may wait on the way.
void Worker::run_threads() {
  in_fiber_ = true;  // not before: until then there is no way back to main_
  while (next_new_ < count_) {
    threads_[next_new_].fiber = running_;
    resume(next_new_++);
    launch_.run_thread(launch_.call);
    thread_finished();
  }
  Fiber* self = running_;
  Context::change(self->context, next_context());  // never comes back: no thread needs this fiber
}

Fiber* Worker::take_idle_fiber() {
  if (idle_.empty()) {
    hold();
    fibers_.push_back(std::make_unique<Fiber>());
    idle_.push_back(fibers_.back().get());
    let_go();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  fiber->context.prepare(fiber->stack, kStackBytes, &Worker::fiber_main);
  return fiber;
}

Context& Worker::next_context() {
  if (ready_head_ < ready_.size()) {
    const int thread = ready_[ready_head_++];
    if (ready_head_ == ready_.size()) {
      ready_.clear();
      ready_head_ = 0;
    }
    running_ = threads_[thread].fiber;
    resume(thread);
    return running_->context;
  }
  if (next_new_ < count_) {
    running_ = take_idle_fiber();
    return running_->context;
  }
  if (live_ > 0) report_deadlock();
  return main_;
}

void Worker::resume(int thread) {
  current_ = thread;
  if (tracer_ != nullptr) {
    tracer_->run_thread(thread, threads_[thread].index, running_->stack, kStackBytes);
  }
}

void Worker::wait() {
  Fiber* self = running_;
  Context& next = next_context();
  if (&next != &self->context) Context::change(self->context, next);
}

void Worker::thread_finished() {
  threads_[current_].state = State::kDone;
  --live_;
  if (tracer_ != nullptr) tracer_->finish_thread();
  release_barrier_if_complete();
  release_warp_if_complete(current_ / kWarpSize);
}

void Worker::make_ready(int thread) {
  threads_[thread].state = State::kReady;
  ready_.push_back(thread);
}

int Worker::barrier(int predicate, std::uint64_t site) {
  if (tracer_ != nullptr) tracer_->arrive_at_barrier(site);
  threads_[current_].state = State::kAtBarrier;
  threads_[current_].predicate = predicate;
  ++waiting_;
  release_barrier_if_complete();
  wait();
  return barrier_result_;
}

// Threads that have exited count as arrived, as on the hardware.
void Worker::release_barrier_if_complete() {
  if (waiting_ == 0 || waiting_ < live_) return;
  if (tracer_ != nullptr) tracer_->release_barrier();
  barrier_result_ = 0;
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state != State::kAtBarrier) continue;
    barrier_result_ += threads_[i].predicate != 0;
    make_ready(i);
  }
  waiting_ = 0;
}

std::uint32_t Worker::exchange(std::uint32_t mask, std::uint64_t value, std::uint64_t* lanes) {
  Thread& thread = threads_[current_];
  if ((mask >> (current_ % kWarpSize) & 1) == 0) {
    char text[80];
    std::snprintf(text, sizeof(text), "the mask 0x%08x is without the lane that calls, %d", mask,
                  current_ % kWarpSize);
    abort(CUDASIM_TRAP, 0, text);
  }
  thread.state = State::kInWarp;
  thread.mask = mask;
  thread.value = value;
  thread.lanes = lanes;
  release_warp_if_complete(current_ / kWarpSize);
  wait();
  return thread.took_part;
}

void Worker::release_warp_if_complete(int warp) {
  const int first = warp * kWarpSize;
  const int lanes = std::min(kWarpSize, count_ - first);
  std::uint32_t live = 0, arrived = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const State state = threads_[first + lane].state;
    if (state != State::kDone) live |= 1u << lane;
    if (state == State::kInWarp) arrived |= 1u << lane;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if ((arrived >> lane & 1) == 0) continue;
    const std::uint32_t wanted = threads_[first + lane].mask & live;
    if ((wanted & ~arrived) != 0) continue;
    if (tracer_ != nullptr) tracer_->release_warp(warp);
    for (int other = 0; other < lanes; ++other) {
      if ((wanted >> other & 1) == 0) continue;
      Thread& thread = threads_[first + other];
      for (int from = 0; from < lanes; ++from) {
        if (wanted >> from & 1) thread.lanes[from] = threads_[first + from].value;
      }
      thread.took_part = wanted;
      make_ready(first + other);
    }
    arrived &= ~wanted;
  }
}

void Worker::report_deadlock() {
  int at_barrier = 0, in_warp = 0, example = 0;
  for (int i = 0; i < count_; ++i) {
    at_barrier += threads_[i].state == State::kAtBarrier;
    in_warp += threads_[i].state == State::kInWarp;
    if (threads_[i].state != State::kDone) example = i;
  }
  failure_.kind = CUDASIM_DEADLOCK;
  failure_.block = block_;
  failure_.thread = threads_[example].index;
  std::snprintf(failure_.text, sizeof(failure_.text),
                "deadlock: %d threads wait at __syncthreads and %d in a warp-level operation, for "
                "threads that never come",
                at_barrier, in_warp);
}

void Worker::abort(int kind, std::uint64_t address, const char* text) {
  failure_.kind = kind;
  failure_.address = address;
  failure_.block = block_;
  failure_.thread = threads_[current_].index;
  std::snprintf(failure_.text, sizeof(failure_.text), "%s", text);
  if (tracer_ != nullptr) tracer_->stop();
  Context abandoned;
  Context::change(abandoned, main_);
  __builtin_unreachable();
}

void Worker::out_of_memory() {
  const char* const text = "the computer has no memory left for the simulation";
  // A thread of the kernel is left where it is: an exception can't pass through its code.
  if (in_fiber_) abort(CUDASIM_OUT_OF_MEMORY, 0, text);
  failure_.kind = CUDASIM_OUT_OF_MEMORY;
  failure_.block = block_;
  std::snprintf(failure_.text, sizeof(failure_.text), "%s", text);
}

// Asked by `new` where there is no memory, in any thread of the process, as long as launches run.
class NewHandler {
 public:
  NewHandler() {
    std::lock_guard<std::mutex> lock(mutex);
    if (launches++ == 0) before = std::set_new_handler(&NewHandler::give_up);
  }
  ~NewHandler() {
    std::lock_guard<std::mutex> lock(mutex);
    if (--launches == 0) std::set_new_handler(before);
  }

  static void give_up() {
    if (worker != nullptr && worker->in_fiber()) worker->out_of_memory();
    if (before == nullptr) throw std::bad_alloc();
    before();
  }
  static std::mutex mutex;

 private:
  static int launches;
  static std::new_handler before;
};
std::mutex NewHandler::mutex;
int NewHandler::launches = 0;
std::new_handler NewHandler::before = nullptr;

// ---------------------------------------------------------------------------------------------
// Stopping a launch: after a time, or where the user interrupts the process.

std::atomic<double> limit_seconds{0.0};
std::atomic<unsigned> interrupts{0};

constexpr auto kWatchPeriod = std::chrono::milliseconds(50);
constexpr std::size_t kMostOutput = 1 << 20;  // bytes; as large as a GPU's buffer for printf

// Replaces what a signal does, as long as one of these exists.
class SignalGuard {
 public:
  using Handler = void (*)(int, siginfo_t*, void*);

  SignalGuard(int signal, Handler handler) : signal_(signal), handler_(handler) {
    std::lock_guard<std::mutex> lock(mutex);
    if (users[signal]++ > 0) return;
    struct sigaction action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
    sigaction(signal, &action, &before[signal]);
  }
  ~SignalGuard() {
    std::lock_guard<std::mutex> lock(mutex);
    if (--users[signal_] > 0) return;
    struct sigaction now{};
    sigaction(signal_, nullptr, &now);
    if (now.sa_sigaction == handler_) sigaction(signal_, &before[signal_], nullptr);
  }
  static const struct sigaction& replaced(int signal) { return before[signal]; }
  static std::mutex mutex;

 private:
  static int users[NSIG];
  static struct sigaction before[NSIG];
  const int signal_;
  const Handler handler_;
};
std::mutex SignalGuard::mutex;
int SignalGuard::users[NSIG];
struct sigaction SignalGuard::before[NSIG];

int stop_signal() { return SIGRTMAX - 3; }

void on_stop(int, siginfo_t*, void*) {
  if (worker != nullptr && worker->in_fiber()) worker->stop();
}

// The process's own handler is asked first: Python's notes the signal, and raises when we are done.
void on_interrupt(int signal, siginfo_t* info, void* context) {
  const struct sigaction& before = SignalGuard::replaced(signal);
  if (before.sa_handler == SIG_IGN) return;
  if (before.sa_handler == SIG_DFL) {
    sigaction(signal, &before, nullptr);
    raise(signal);
    return;
  }
  ++interrupts;
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, info, context);
  } else {
    before.sa_handler(signal);
  }
}

// One launch, as it is watched: its CPU threads, and why it is to stop.
class Watch {
 public:
  Watch(std::atomic<std::uint64_t>& next_block, std::uint64_t blocks);
  ~Watch();

  void enter() {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.push_back(pthread_self());
  }
  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.erase(std::find(threads_.begin(), threads_.end(), pthread_self()));
  }
  const char* reason() const { return reason_.load(); }
  bool may_print(std::size_t bytes) { return printed_.fetch_add(bytes) + bytes <= kMostOutput; }

  // Stops the launch, if it is time. Asked again and again, also in case that a signal has come
  // between two blocks.
  void look() {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin_;
    if (interrupts != interrupts_before_) {
      reason_ = "interrupted";
    } else if (limit_ > 0.0 && taken.count() > limit_) {
      reason_ = "the launch takes longer than it may";
    } else {
      return;
    }
    next_block_ = blocks_;
    std::lock_guard<std::mutex> lock(mutex_);
    for (const pthread_t thread : threads_) pthread_kill(thread, stop_signal());
  }

 private:
  std::atomic<std::uint64_t>& next_block_;
  const std::uint64_t blocks_;
  const unsigned interrupts_before_;
  const double limit_;
  const std::chrono::steady_clock::time_point begin_;
  const SignalGuard stop_guard_{stop_signal(), on_stop};
  const SignalGuard interrupt_guard_{SIGINT, on_interrupt};
  std::atomic<const char*> reason_{nullptr};
  std::atomic<std::size_t> printed_{0};
  std::mutex mutex_;
  std::vector<pthread_t> threads_;
};

// The process's one thread that looks after all launches. It is never destroyed, as it may still
// run when the process ends, and started anew in a fork.
class Watcher {
 public:
  static Watcher& the() {
    static Watcher* const watcher = new Watcher;
    return *watcher;
  }
  void add(Watch* watch) {
    std::lock_guard<std::mutex> lock(mutex_);
    watches_.push_back(watch);
    if (!is_running_) {
      try {
        std::thread([this] { run(); }).detach();
        is_running_ = true;
      } catch (const std::exception&) {
        return;  // no more threads are to be had: the launch runs unwatched
      }
    }
    if (is_asleep_) changed_.notify_one();
  }
  void remove(Watch* watch) {
    std::lock_guard<std::mutex> lock(mutex_);
    watches_.erase(std::find(watches_.begin(), watches_.end(), watch));
  }

 private:
  Watcher() {
    pthread_atfork([] { the().mutex_.lock(); }, [] { the().mutex_.unlock(); },
                   [] {
                     the().is_running_ = the().is_asleep_ = false;
                     the().watches_.clear();
                     the().mutex_.unlock();
                   });
  }
  void run() {
    // Signals are for the threads that were there before.
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    std::unique_lock<std::mutex> lock(mutex_);
    for (int idle = 0;; ++idle) {
      // Short launches come in numbers: it falls asleep only when there was none for a while.
      if (idle < kPatience) {
        lock.unlock();
        std::this_thread::sleep_for(kWatchPeriod);
        lock.lock();
      } else {
        is_asleep_ = true;
        changed_.wait(lock, [this] { return !watches_.empty(); });
        is_asleep_ = false;
      }
      for (Watch* watch : watches_) watch->look();
      if (!watches_.empty()) idle = 0;
    }
  }

  static constexpr int kPatience = 100;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_running_ = false, is_asleep_ = false;
  std::vector<Watch*> watches_;
};

Watch::Watch(std::atomic<std::uint64_t>& next_block, std::uint64_t blocks)
    : next_block_(next_block),
      blocks_(blocks),
      interrupts_before_(interrupts),
      limit_(limit_seconds),
      begin_(std::chrono::steady_clock::now()) {
  Watcher::the().add(this);
}
Watch::~Watch() { Watcher::the().remove(this); }

// Called by a signal. The tracer's own records must not be left half written: it asks at each step.
void Worker::stop() {
  is_to_stop_ = 1;
  if (held_ > 0 || tracer_ != nullptr) return;
  abort(CUDASIM_STOPPED, 0, watch_.reason());
}

// ---------------------------------------------------------------------------------------------
// Device memory: the addresses reserved for each buffer.

struct Reservation {
  void* memory;
  std::size_t bytes;
};
std::map<void*, Reservation> reservations;
std::mutex reservations_mutex;

// ---------------------------------------------------------------------------------------------
// Faults. The handlers are in place only while a launch runs.

// Where the processor was.
std::uint64_t instruction_pointer(const void* context) {
  const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return static_cast<std::uint64_t>(machine.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return machine.pc;
#else
  (void)machine;
  return ~std::uint64_t{0};
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (worker == nullptr || !worker->in_fiber()) {
    // Not ours: put the old handler back, return, and let the instruction fault again.
    sigaction(signal, &SignalGuard::replaced(signal), nullptr);
    return;
  }
  if (signal == SIGFPE) worker->abort(CUDASIM_ARITHMETIC, 0, "integer division by zero");
  if (signal == SIGILL) worker->abort(CUDASIM_TRAP, 0, "the kernel reached a trap");
  // A misaligned vector access faults without telling its address.
  const bool told = info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR;
  const auto address = told ? reinterpret_cast<std::uint64_t>(info->si_addr) : kNoAddress;
  if (told) {
    if (const char* text = no_shared_fault(address)) {
      worker->abort(CUDASIM_BAD_ACCESS, kNoAddress, text);
    }
    if (const char* text = worker->stack_fault(address)) worker->abort(CUDASIM_TRAP, 0, text);
    if (address == instruction_pointer(context)) {
      worker->abort(CUDASIM_TRAP, 0,
                    "the thread left its code: it wrote behind its local variables, or called a "
                    "wild function pointer");
    }
  }
  worker->abort(CUDASIM_BAD_ACCESS, address,
                told ? "access outside every buffer" : "misaligned vector access or wild pointer");
}

struct FaultHandlers {
  const SignalGuard segmentation{SIGSEGV, on_fault}, bus{SIGBUS, on_fault};
  const SignalGuard arithmetic{SIGFPE, on_fault}, trap{SIGILL, on_fault};
};

// Lets this thread have the signals that a launch needs, though the program may have blocked them.
class NeededSignals {
 public:
  NeededSignals() {
    sigset_t needed;
    sigemptyset(&needed);
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, stop_signal()}) {
      sigaddset(&needed, signal);
    }
    pthread_sigmask(SIG_UNBLOCK, &needed, &before_);
  }
  ~NeededSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// The call instruction in the kernel's library that led to the function at hand.
#define CUDASIM_CALLER (reinterpret_cast<std::uint64_t>(__builtin_return_address(0)) - 1)

int available_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::mutex kernels_mutex;
std::unordered_map<const void*, CudasimSharedMemory> kernels;

CudasimSharedMemory& shared_memory_of(const void* kernel) {  // under the mutex
  const auto found = kernels.find(kernel);
  if (found != kernels.end()) return found->second;
  const Library library = find_library(kernel);
  CudasimSharedMemory memory{0, kAlwaysAllowed};
  if (library.shared_bytes > 0) {
    memory.declared = cudasim::own_shared_bytes(
        library.path, reinterpret_cast<std::uintptr_t>(kernel) - library.base);
    memory.allowed -= std::min(memory.declared, memory.allowed);
  }
  return kernels.emplace(kernel, memory).first->second;
}

// Notes an error and what there is to say of it, unless an earlier one is still to be taken.
int note_error(int error, const CudasimFailure& failure) {
  if (pending_error == 0) {
    pending_error = error;
    last_failure = failure;
  }
  return error;
}

// Says that a block can't have so much; false if it can.
bool is_too_much(std::size_t declared, std::size_t dynamic, CudasimFailure& failure) {
  if (declared + dynamic <= max_shared_bytes) return false;
  std::snprintf(failure.text, sizeof(failure.text),
                "%zu bytes of shared memory (%zu static, %zu dynamic) are more than a block's %zu",
                declared + dynamic, declared, dynamic, max_shared_bytes);
  return true;
}

// Returns whether the launch is refused.
bool is_refused(const CudasimLaunch& launch) {
  const auto& g = launch.grid;
  const auto& b = launch.block;
  const auto threads = static_cast<std::uint64_t>(b.x) * b.y * b.z;
  const CudasimSharedMemory shared = cudasim_shared_memory(launch.kernel);
  int error = kInvalidConfiguration;
  CudasimFailure failure{};
  failure.kind = CUDASIM_BAD_CONFIGURATION;
  if (g.x < 1 || g.y < 1 || g.z < 1 || g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535) {
    std::snprintf(failure.text, sizeof(failure.text),
                  "grid (%u, %u, %u) is outside 1 to (2147483647, 65535, 65535)", g.x, g.y, g.z);
  } else if (threads < 1 || threads > kMaxThreads || b.x > 1024 || b.y > 1024 || b.z > 64) {
    std::snprintf(failure.text, sizeof(failure.text),
                  "block (%u, %u, %u) is outside 1 to (1024, 1024, 64), at most 1024 threads", b.x,
                  b.y, b.z);
  } else if (shared.declared > kAlwaysAllowed) {
    std::snprintf(failure.text, sizeof(failure.text),
                  "the kernel declares %zu bytes of shared memory; nvcc refuses more than %zu: "
                  "more has to be dynamic (extern __shared__)",
                  shared.declared, kAlwaysAllowed);
  } else if (is_too_much(shared.declared, launch.shared_bytes, failure)) {
    // The text is written.
  } else if (launch.shared_bytes > shared.allowed) {
    error = kInvalidValue;
    std::snprintf(failure.text, sizeof(failure.text),
                  "%zu bytes of dynamic shared memory are more than the kernel's launches may ask "
                  "for, %zu, until cudaFuncSetAttribute(kernel, "
                  "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) says otherwise",
                  launch.shared_bytes, shared.allowed);
  } else {
    return false;
  }
  note_error(error, failure);
  return true;
}

// A process is forked while no thread holds a lock: in the child nobody would let it go.
struct ForkGuard {
  ForkGuard() { pthread_atfork(lock_all, let_go_of_all, let_go_of_all); }
  static void lock_all() {
    for (std::mutex* mutex : locks()) mutex->lock();
  }
  static void let_go_of_all() {
    for (std::mutex* mutex : locks()) mutex->unlock();
  }
  // In the order in which one is taken under another.
  static std::array<std::mutex*, 5> locks() {
    return {&kernels_mutex, &library_mutex, &reservations_mutex, &SignalGuard::mutex,
            &NewHandler::mutex};
  }
} fork_guard;

}  // namespace

extern "C" {

void cudasim_launch(const CudasimLaunch* launch) {
  // The call's data lies on the launcher's stack; its code tells the library.
  const Library library = find_library(reinterpret_cast<const void*>(launch->run_thread));
  if (is_refused(*launch)) return;
  if (planning) {
    planned.push_back({reinterpret_cast<std::uintptr_t>(launch->kernel) - library.start,
                       launch->grid, launch->block, launch->shared_bytes,
                       reinterpret_cast<std::uintptr_t>(launch->stream)});
    return;
  }

  const auto& grid = launch->grid;
  cudasim::Tracer* const tracer = active_tracer.get();
  const std::uint64_t grid_blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  if (tracer != nullptr && !traced_blocks.empty() && traced_blocks.back() >= grid_blocks) {
    CudasimFailure failure{};
    failure.kind = CUDASIM_BAD_CONFIGURATION;
    std::snprintf(failure.text, sizeof(failure.text),
                  "block %llu cannot be traced: the grid has %llu blocks",
                  static_cast<unsigned long long>(traced_blocks.back()),
                  static_cast<unsigned long long>(grid_blocks));
    note_error(kInvalidConfiguration, failure);
    return;
  }
  const bool some = tracer != nullptr && !traced_blocks.empty();
  const std::uint64_t blocks = some ? traced_blocks.size() : grid_blocks;
  int workers = launch->workers > 0 ? launch->workers : available_cores();
  if (tracer != nullptr) workers = 1;
  workers = static_cast<int>(std::min<std::uint64_t>(workers, blocks));

  FaultHandlers handlers;
  NewHandler new_handler;
  std::atomic<std::uint64_t> next_block{0};
  std::mutex failure_mutex;
  std::uint64_t failed_block = ~0ull;
  CudasimFailure failure{};
  Watch watch(next_block, blocks);
  const auto fail = [&](std::uint64_t block, const CudasimFailure& what) {
    next_block = blocks;
    std::lock_guard<std::mutex> lock(failure_mutex);
    if (block < failed_block) {
      failed_block = block;
      failure = what;
    }
  };
  const auto run = [&] {
    Worker self(*launch, library, tracer, watch);
    for (;;) {
      const std::uint64_t turn = next_block.fetch_add(1, std::memory_order_relaxed);
      if (turn >= blocks) return;
      const std::uint64_t i = some ? traced_blocks[turn] : turn;
      const CudasimIndex block{static_cast<unsigned>(i % grid.x),
                               static_cast<unsigned>(i / grid.x % grid.y),
                               static_cast<unsigned>(i / grid.x / grid.y)};
      if (self.run_block(block, i)) continue;
      return fail(i, self.failure());
    }
  };
  const auto work = [&] {
    const NeededSignals signals;
    watch.enter();
    try {
      run();
    } catch (const std::bad_alloc&) {
      CudasimFailure what{};
      what.kind = CUDASIM_OUT_OF_MEMORY;
      std::snprintf(what.text, sizeof(what.text), "the computer has no memory for a worker");
      fail(0, what);
    }
    watch.leave();
  };
  std::vector<std::thread> helpers;
  helpers.reserve(workers);
  try {
    for (int i = 1; i < workers; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // No more threads are to be had: those that there are do all.
  }
  work();
  for (auto& helper : helpers) helper.join();
  std::fflush(stdout);
  if (watch.reason() != nullptr && failure.kind == CUDASIM_NONE) {  // between two blocks
    failure.kind = CUDASIM_STOPPED;
    std::snprintf(failure.text, sizeof(failure.text), "%s", watch.reason());
  }
  if (failure.kind != CUDASIM_NONE) note_error(kLaunchFailure, failure);
}

int cudasim_peek_error() { return pending_error; }
int cudasim_take_error() {
  const int error = pending_error;
  pending_error = 0;
  return error;
}

const CudasimFailure* cudasim_failure() {
  thread_local CudasimFailure told;
  told = std::exchange(last_failure, CudasimFailure{});
  return &told;
}

CudasimIndex cudasim_thread_index() { return worker->thread_index(); }
CudasimIndex cudasim_block_index() { return worker->block_index(); }
CudasimIndex cudasim_block_size() { return worker->launch().block; }
CudasimIndex cudasim_grid_size() { return worker->launch().grid; }
void* cudasim_dynamic_shared() { return worker->dynamic_shared(); }
int cudasim_barrier(int predicate) { return worker->barrier(predicate, CUDASIM_CALLER); }
std::uint32_t cudasim_exchange(std::uint32_t mask, std::uint64_t value, std::uint64_t* lanes) {
  return worker->exchange(mask, value, lanes);
}
std::size_t cudasim_max_shared_bytes() { return max_shared_bytes; }
CudasimSharedMemory cudasim_shared_memory(const void* kernel) {
  std::lock_guard<std::mutex> lock(kernels_mutex);
  return shared_memory_of(kernel);
}
int cudasim_allow_shared_bytes(const void* kernel, std::size_t bytes) {
  std::lock_guard<std::mutex> lock(kernels_mutex);
  CudasimSharedMemory& shared = shared_memory_of(kernel);
  CudasimFailure failure{};
  failure.kind = CUDASIM_BAD_CONFIGURATION;
  if (is_too_much(shared.declared, bytes, failure)) return note_error(kInvalidValue, failure);
  shared.allowed = bytes;
  return 0;
}
void cudasim_limit_seconds(double seconds) { limit_seconds = seconds; }
void cudasim_print(const char* text, std::size_t bytes) {
  if (worker == nullptr || !worker->in_fiber()) {
    std::fwrite(text, 1, bytes, stdout);
    return;
  }
  if (!worker->watch().may_print(bytes)) return;
  worker->hold();
  std::fwrite(text, 1, bytes, stdout);
  worker->let_go();
}
void cudasim_trap(const char* text) { worker->abort(CUDASIM_TRAP, 0, text); }
int cudasim_in_kernel() { return worker != nullptr && worker->in_fiber(); }

// The buffer ends (up to its alignment) where unmapped addresses begin. What is left of its pages,
// up to one page before it and less than its alignment behind it, is poisoned: cudasim_overrun sees
// what was written there.
void* cudasim_allocate(std::size_t bytes) {
  const std::size_t used = round_up(std::max<std::size_t>(bytes, 1), kBufferAlignment);
  const std::size_t mapped = round_up(used, page_bytes());
  // Reserving addresses costs no memory. Where the process may not have so many, take fewer.
  for (const std::size_t guard : {kGuardBytes, page_bytes()}) {
    const std::size_t reserved = mapped + 2 * guard;
    void* memory =
        mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) continue;
    char* start = static_cast<char*>(memory) + guard;
    if (mprotect(start, mapped, PROT_READ | PROT_WRITE) != 0) {
      munmap(memory, reserved);
      return nullptr;
    }
    char* buffer = start + (mapped - used);
    std::memset(start, kPoison, mapped - used);
    std::memset(buffer + bytes, kPoison, used - bytes);
    std::lock_guard<std::mutex> lock(reservations_mutex);
    reservations[buffer] = {memory, reserved};
    return buffer;
  }
  return nullptr;
}

bool cudasim_overrun(const void* buffer, std::size_t bytes, long long* place) {
  const auto* first = static_cast<const unsigned char*>(buffer);
  const std::size_t used = round_up(std::max<std::size_t>(bytes, 1), kBufferAlignment);
  const std::size_t before = round_up(used, page_bytes()) - used;
  for (std::size_t i = bytes; i < used; ++i) {
    *place = static_cast<long long>(i);
    if (first[i] != kPoison) return true;
  }
  for (std::size_t i = 1; i <= before; ++i) {
    *place = -static_cast<long long>(i);
    if (*(first - i) != kPoison) return true;
  }
  return false;
}

void cudasim_release(void* buffer) {
  std::lock_guard<std::mutex> lock(reservations_mutex);
  const auto found = reservations.find(buffer);
  if (found == reservations.end()) return;
  munmap(found->second.memory, found->second.bytes);
  reservations.erase(found);
}

// ---- Planning -----------------------------------------------------------------------------------

void cudasim_plan_begin(std::size_t max_bytes) {
  planned.clear();
  planning = true;
  if (max_bytes != 0) max_shared_bytes = max_bytes;
}
void cudasim_plan_end() {
  planned.clear();
  planning = false;
  max_shared_bytes = kMaxSharedBytes;
}
std::size_t cudasim_planned(const CudasimPlanned** launches) {
  *launches = planned.data();
  return planned.size();
}

// ---- Tracing ------------------------------------------------------------------------------------

void cudasim_trace_begin(const CudasimTrace* trace) {
  active_tracer = std::make_unique<cudasim::Tracer>(*trace);
  traced_blocks.assign(trace->blocks, trace->blocks + trace->block_count);
}
void cudasim_trace_end() { active_tracer.reset(); }
std::uint64_t cudasim_trace_fma() { return active_tracer->fma(); }
std::uint64_t cudasim_trace_tensor_fma() { return active_tracer->tensor_fma(); }
std::uint64_t cudasim_trace_steps() { return active_tracer->steps(); }
std::uint64_t cudasim_trace_blocks(std::uint64_t* of) {
  *of = active_tracer->grid_blocks();
  return active_tracer->blocks();
}
std::uint64_t cudasim_trace_footprint(std::size_t buffer) {
  return active_tracer->footprint(buffer);
}
std::size_t cudasim_trace_sites(const CudasimSite** sites) {
  *sites = active_tracer->sites().data();
  return active_tracer->sites().size();
}
std::size_t cudasim_trace_requests(const CudasimRequest** requests) {
  *requests = active_tracer->examples().data();
  return active_tracer->examples().size();
}
std::size_t cudasim_trace_hazards(const CudasimHazard** hazards) {
  *hazards = active_tracer->hazards().data();
  return active_tracer->hazards().size();
}
std::size_t cudasim_trace_loads(std::size_t buffer, const std::uint32_t** counts) {
  *counts = active_tracer->loads(buffer).data();
  return active_tracer->loads(buffer).size();
}

// Instrumented code also runs outside kernels (a launcher), and with no trace under way.
static cudasim::Tracer* current_tracer() { return worker == nullptr ? nullptr : worker->tracer(); }

float cudasim_fma(float a, float b, float c) {
  if (cudasim::Tracer* tracer = current_tracer()) tracer->count_fma();
  return __builtin_fmaf(a, b, c);
}

void cudasim_tensor_fma(int count) {
  if (cudasim::Tracer* tracer = current_tracer()) tracer->count_tensor_fma(count);
}

static void trace_access(std::uint64_t pc, const void* address, std::size_t bytes,
                         cudasim::Operation op) {
  cudasim::Tracer* tracer = current_tracer();
  if (tracer == nullptr) return;
  const auto where = reinterpret_cast<std::uint64_t>(address);
  const char* fault = tracer->access(pc, where, static_cast<std::uint32_t>(bytes), op);
  if (fault == nullptr) return;
  const char* const missing = no_shared_fault(where);
  worker->abort(CUDASIM_BAD_ACCESS, missing ? kNoAddress : where, missing ? missing : fault);
}

void cudasim_atomic(const void* address, std::size_t bytes) {
  trace_access(CUDASIM_CALLER, address, bytes, cudasim::kAtomic);
}

// The sanitizer's entry points.
#define CUDASIM_ACCESS(bytes)                                                                    \
  void __tsan_read##bytes(void* a) { trace_access(CUDASIM_CALLER, a, bytes, cudasim::kLoad); }   \
  void __tsan_write##bytes(void* a) { trace_access(CUDASIM_CALLER, a, bytes, cudasim::kStore); } \
  void __tsan_unaligned_read##bytes(void* a) {                                                   \
    trace_access(CUDASIM_CALLER, a, bytes, cudasim::kLoad);                                      \
  }                                                                                              \
  void __tsan_unaligned_write##bytes(void* a) {                                                  \
    trace_access(CUDASIM_CALLER, a, bytes, cudasim::kStore);                                     \
  }
CUDASIM_ACCESS(1)
CUDASIM_ACCESS(2)
CUDASIM_ACCESS(4)
CUDASIM_ACCESS(8)
CUDASIM_ACCESS(16)
void __tsan_read_range(void* a, std::size_t bytes) {
  trace_access(CUDASIM_CALLER, a, bytes, cudasim::kLoad);
}
void __tsan_write_range(void* a, std::size_t bytes) {
  trace_access(CUDASIM_CALLER, a, bytes, cudasim::kStore);
}
void __tsan_init() {}
// The guard of a static variable with a constructor, in host code.
char __tsan_atomic8_load(const volatile char* a, int) {
  return __atomic_load_n(a, __ATOMIC_ACQUIRE);
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
// So that a loop or a recursion without end takes neither all memory nor hours.
static void check_is_not_full(cudasim::Tracer* tracer) {
  if (!tracer->is_full()) return;
  char text[200];
  std::snprintf(text, sizeof(text),
                "the thread is %zu accesses and %zu iterations or calls ahead of others, more than "
                "a trace can keep: it seems to run for ever",
                tracer->open_requests(), tracer->open_contexts());
  worker->abort(CUDASIM_STEP_LIMIT, 0, text);
}
void __tsan_func_entry(void* caller) {
  if (cudasim::Tracer* tracer = current_tracer()) {
    tracer->enter_function(reinterpret_cast<std::uint64_t>(caller));
    check_is_not_full(tracer);
  }
}
void __tsan_func_exit() {
  if (cudasim::Tracer* tracer = current_tracer()) tracer->leave_function();
}

static void take_step(cudasim::Tracer* tracer) {
  check_is_not_full(tracer);
  if (!tracer->take_step()) {
    worker->abort(CUDASIM_STEP_LIMIT, 0, "the launch takes more steps than it may");
  }
  if (worker->is_to_stop()) worker->abort(CUDASIM_STOPPED, 0, worker->watch().reason());
}
void cudasim_enter_loop() {
  if (cudasim::Tracer* tracer = current_tracer()) tracer->enter_loop();
}
void cudasim_next_iteration() {
  if (cudasim::Tracer* tracer = current_tracer()) {
    tracer->next_iteration();
    take_step(tracer);
  }
}
void cudasim_leave_loop() {
  if (cudasim::Tracer* tracer = current_tracer()) tracer->leave_loop();
}
// At the start of every basic block, where a loop can be made of gotos.
void __sanitizer_cov_trace_pc() {
  if (cudasim::Tracer* tracer = current_tracer()) take_step(tracer);
}

}  // extern "C"
