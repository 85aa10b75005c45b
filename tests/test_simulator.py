"""The simulator: CUDA's language and execution model on a CPU."""

import ctypes
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import convt_lab as lab
from convt_lab.backend import Array


def launch(source, grid, block, args, shared_bytes=0, name="run"):
    lab.compile(source, "simulator").launch(name, grid, block, args, shared_bytes)


def test_thread_and_block_indices_cover_the_grid_once():
    source = """
    __global__ void run(int* seen) {
      const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
      const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      seen[block * threads + thread] += 1;
    }
    """
    seen = np.zeros(5 * 3 * 2 * 7 * 4 * 3, np.int32)
    launch(source, (5, 3, 2), (7, 4, 3), [seen])
    assert (seen == 1).all()


def test_a_barrier_orders_shared_memory_over_many_rounds():
    source = """
    __global__ void run(int* out, int rounds) {
      __shared__ int value[96];
      value[threadIdx.x] = threadIdx.x;
      for (int r = 0; r < rounds; ++r) {
        __syncthreads();
        const int next = value[(threadIdx.x + 1) % 96];
        __syncthreads();
        value[threadIdx.x] = next;
      }
      out[blockIdx.x * 96 + threadIdx.x] = value[threadIdx.x];
    }
    """
    out = np.full(10 * 96, -1, np.int32)
    launch(source, 10, 96, [out, 50])
    assert (out.reshape(10, 96) == (np.arange(96) + 50) % 96).all()


def test_threads_that_have_left_do_not_hold_up_a_barrier():
    source = """
    __global__ void run(int* out) {
      if (threadIdx.x >= 40) return;
      const int here = __syncthreads_count(threadIdx.x % 2);
      out[threadIdx.x] = here;
    }
    """
    out = np.zeros(40, np.int32)
    launch(source, 1, 64, [out])
    assert (out == 20).all()


def test_shared_memory_starts_as_nan_in_every_block():
    source = """
    template <int N> __device__ float* scratch() { __shared__ float inner[N]; return inner; }
    __global__ void run(float* out) {
      __shared__ float tile[32];
      extern __shared__ float dynamic[];
      out[blockIdx.x * 32 + threadIdx.x] =
          tile[threadIdx.x] + 0.0f * (scratch<32>()[threadIdx.x] + dynamic[threadIdx.x]);
      __syncthreads();
      tile[threadIdx.x] = scratch<32>()[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
    }
    """
    out = np.zeros(32 * 64, np.float32)
    launch(source, 64, 32, [out], shared_bytes=128)
    assert np.isnan(out).all()


@pytest.mark.parametrize("blocks", [1, 7])
def test_warp_shuffles_and_votes(blocks):
    source = """
    __global__ void run(int* out) {
      const unsigned all = 0xFFFFFFFFu;
      const int i = threadIdx.x, lane = i % 32;
      int* o = out + (blockIdx.x * blockDim.x + i) * 8;
      o[0] = __shfl_sync(all, i, 5);
      o[1] = __shfl_up_sync(all, i, 3);
      o[2] = __shfl_down_sync(all, i, 3, 8);
      o[3] = __shfl_xor_sync(all, i, 7);
      o[4] = (int)__ballot_sync(all, lane % 3 == 0);
      o[5] = __any_sync(all, i == 40) * 2 + __all_sync(all, i >= 0);
      double sum = i;  // 8 bytes
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(all, sum, d);
      o[6] = (int)sum;
      // Only the upper half of each warp takes part.
      o[7] = lane >= 16 ? __shfl_sync(0xFFFF0000u, i, 20) : -1;
    }
    """
    out = np.zeros((blocks, 64, 8), np.int32)
    launch(source, blocks, 64, [out])
    i = np.arange(64)
    lane, base = i % 32, i // 32 * 32
    expected = np.stack(
        [
            base + 5,
            np.where(lane >= 3, i - 3, i),
            np.where(lane % 8 < 5, i + 3, i),
            i ^ 7,
            np.full(64, np.uint32(0x49249249).astype(np.int32)),
            np.where(base == 32, 3, 1),
            base * 32 + 31 * 16,
            np.where(lane >= 16, base + 20, -1),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_atomics_add_up_over_blocks():
    source = """
    __global__ void run(int* count, float* sum, unsigned* largest, unsigned long long* many) {
      atomicAdd(count, 1);
      atomicAdd(sum, 0.5f);
      atomicMax(largest, blockIdx.x * 1000 + threadIdx.x);
      atomicAdd(many, 1ull << 33);
      atomicCAS(count + 1, 0, 77);
    }
    """
    count, total = np.zeros(2, np.int32), np.zeros(1, np.float32)
    largest, many = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    launch(source, 40, 50, [count, total, largest, many])
    assert (count[0], count[1], total[0], largest[0]) == (2000, 77, 1000.0, 39049)
    assert int(many[0]) == 2000 << 33


def test_float_atomics_give_the_same_bits_every_time():
    source = """
    __global__ void run(float* sum, const float* x) {
      atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
    }
    """
    x = np.random.default_rng(0).standard_normal(64 * 64).astype(np.float32)
    sums = set()
    for _ in range(5):
        total = np.zeros(1, np.float32)
        launch(source, 64, 64, [total, x])
        sums.add(total.tobytes())
    assert len(sums) == 1


def test_vectors_templates_constants_and_intrinsics():
    source = """
    #include <cuda_pipeline.h>
    __constant__ float table[2] = {3.0f, 4.0f};
    template <int N, class T> struct Box { T values[N]; };
    template <int N> __device__ __forceinline__ float total(const Box<N, float>& box) {
      float sum = 0.0f;
    #pragma unroll
      for (int i = 0; i < N; ++i) sum += box.values[i];
      return sum;
    }
    __device__ __noinline__ float twice(float value) { return 2.0f * value; }
    __global__ void __launch_bounds__(32) run(const float4* x, float* out) {
      __shared__ __align__(16) float4 copy[2];
      __pipeline_memcpy_async(&copy[0], x, 16);
      __pipeline_memcpy_async(&copy[1], x, 16, 12);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      const float4 v = __ldg(x);
      out[0] = total<4>({v.x, v.y, v.z, v.w});
      out[1] = twice(copy[0].w);
      out[2] = copy[1].x * 100 + copy[1].y * 10 + copy[1].w;
      out[3] = fmaf(table[0], table[1], 0.5f) + max(1, 2) + min(0.5f, 1.0f);
      out[4] = __popc(255u) + __clz(1) + __ffs(8);
      out[5] = __uint_as_float(__float_as_uint(2.5f));
      static_assert(sizeof(float3) == 12 && alignof(float4) == 16 && alignof(float2) == 8);
    }
    """
    out = np.zeros(6, np.float32)
    launch(source, 1, 1, [np.array([1, 2, 3, 4], np.float32), out])
    assert out.tolist() == [10, 8, 100, 15, 43, 2.5]


def test_fmaf_is_fused_and_nothing_else_is():
    source = """
    __global__ void run(const float* x, float* out) {
      out[0] = fmaf(x[0], x[0], -x[1]);
      out[1] = x[0] * x[0] - x[1];
    }
    """
    a = np.float32(1 + 2**-12)
    rounded = np.float32(a * a)
    out = np.zeros(2, np.float32)
    launch(source, 1, 1, [np.array([a, rounded]), out])
    assert out[0] == np.float32(float(a) ** 2 - float(rounded)) != 0
    assert out[1] == 0


BEHIND_LOCALS = """
import sys
import numpy as np
import convt_lab as lab

program = lab.compile('''
__global__ void run(float* a, int n) {
  float t[4];
  for (int j = 0; j <= n; ++j) t[j] = a[j % 32];
  a[0] = t[0];
}
''', "simulator")
a = np.full(32, float(sys.argv[2]), np.float32)
for block in 1, 40:
    try:
        program.launch("run", 3, block, [a, int(sys.argv[1])])
    except lab.KernelError as error:
        print(error)
x = np.zeros(1, np.float32)
lab.compile("__global__ void run(float* x) { *x = 5; }", "simulator").launch("run", 1, 1, [x])
assert x == 5
"""


@pytest.mark.parametrize("value", ["0", "1.5"])
@pytest.mark.parametrize("n", [1000, 20000, 40000, 100000])
def test_an_index_behind_a_local_array_is_an_error_and_no_crash(n, value):
    done = subprocess.run(
        [sys.executable, "-c", BEHIND_LOCALS, str(n), value],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("the thread wrote behind its local variables" in line for line in lines)


class TestFaults:
    """A kernel that fails is an exception that says where, and Python lives on."""

    def check(self, source, message, args=(), grid=1, block=1):
        with pytest.raises(lab.KernelError, match=message):
            launch(source, grid, block, list(args))
        out = np.zeros(1, np.int32)  # the next launch works
        launch("__global__ void run(int* x) { *x = 5; }", 1, 1, [out])
        assert out[0] == 5

    def test_far_out_of_bounds(self):
        self.check(
            "__global__ void run(float* x) { if (threadIdx.x == 3) x[1 << 20] = 1.0f; }",
            r"run stopped in block \(0, 0, 0\), thread \(3, 0, 0\): access outside every buffer: "
            r"4194\d+ bytes past the end of 'x'",
            [np.zeros(4, np.float32)],
            block=8,
        )

    def test_just_past_a_buffer_of_whole_lines(self):
        self.check(
            "__global__ void run(const float* x, float* y) { y[0] = x[64]; }",
            "0 bytes past the end of 'x'",
            [np.zeros(64, np.float32), np.zeros(1, np.float32)],
        )

    def test_a_null_pointer(self):
        for index in (0, 1):
            source = f"__global__ void run(float* x) {{ x[{index}] = 2.0f; }}"
            self.check(source, f"address 0x{4 * index} .a null pointer", [None])

    def test_a_misaligned_vector(self):
        self.check(
            "__global__ void run(float* x) { *(float4*)(x + 1) = make_float4(1, 2, 3, 4); }",
            "misaligned vector",
            [np.zeros(64, np.float32)],
        )

    def test_a_division_by_zero(self):
        self.check(
            "__global__ void run(int* x) { x[0] = x[1] / x[2]; }",
            "integer division by zero",
            [np.zeros(4, np.int32)],
        )

    def test_a_trap_and_an_assertion(self):
        self.check("__global__ void run() { __trap(); }", "__trap")
        self.check(
            "#include <cassert>\n__global__ void run() { assert(threadIdx.x < 2); }",
            r"thread \(2, 0, 0\): assertion failed: threadIdx.x < 2",
            block=4,
        )

    def test_a_stack_that_overflows(self):
        self.check(
            """
            __device__ int deep(int n) {
              volatile int a[256];
              a[n % 256] = n;
              return deep(n + 1) + a[n % 256];
            }
            __global__ void run(int* x) { *x = deep(0); }
            """,
            r"stack is full: recursion, or local arrays of more than 128 KiB$",
            [np.zeros(1, np.int32)],
        )

    def test_a_fault_among_many_blocks_and_barriers(self):
        self.check(
            """
            __global__ void run(int* x) {
              __syncthreads();
              if (blockIdx.x == 57 && threadIdx.x == 9) x[1 << 28] = 1;
              __syncthreads();
            }
            """,
            r"block \(57, 0, 0\), thread \(9, 0, 0\)",
            [np.zeros(1, np.int32)],
            grid=100,
            block=64,
        )

    def test_a_deadlock(self):
        self.check(
            """
            __global__ void run() {
              if (threadIdx.x < 16) __syncwarp(); else __syncthreads();
            }
            """,
            "deadlock: 16 threads wait at __syncthreads and 16 in a warp-level operation",
            block=32,
        )

    def test_arrays_keep_their_values_when_a_launch_fails(self):
        x = np.arange(4, dtype=np.float32)
        with pytest.raises(lab.KernelError):
            launch("__global__ void run(float* x) { x[0] = 9; x[1 << 20] = 1; }", 1, 1, [x])
        assert x.tolist() == [0, 1, 2, 3]

    def test_more_shared_memory_than_was_asked_for(self):
        """Beyond 48 KiB a launcher has to ask, for each kernel."""
        source = """
        __global__ void run(int* x) { extern __shared__ int a[]; a[*x] = 1; *x = a[0]; }
        __global__ void other(int* x) { extern __shared__ int a[]; a[*x] = 1; *x = a[0]; }
        extern "C" cudaError_t go(int* x, int asked, int bytes, cudaStream_t stream) {
          const cudaError_t error = cudaFuncSetAttribute(
              other, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000);
          if (error != cudaSuccess) return error;
          if (asked > 0) {
            const cudaError_t error = cudaFuncSetAttribute(
                run, cudaFuncAttributeMaxDynamicSharedMemorySize, asked);
            if (error != cudaSuccess) return error;
          }
          run<<<1, 1, bytes, stream>>>(x);
          return cudaGetLastError();
        }
        """
        program = lab.compile(source, "simulator")

        def go(asked, bytes):
            x = np.zeros(1, np.int32)
            array = Array.of("x", torch.from_numpy(x), written=True)
            program.call("go", array, ctypes.c_int(asked), ctypes.c_int(bytes))
            assert x[0] == 1

        go(0, 48 * 1024)
        with pytest.raises(lab.KernelError, match="may ask for, 49152, until cuda"):
            go(0, 48 * 1024 + 4)
        go(70000, 70000)
        with pytest.raises(lab.KernelError, match="may ask for, 60000, until"):
            go(60000, 70000)
        with pytest.raises(lab.KernelError, match="invalid argument"):
            go(228 * 1024, 48 * 1024)

    def test_what_was_asked_for_is_never_taken_back(self):
        """Else a thread could take from another what that is about to launch with."""
        source = """
        #include "shared_memory.cuh"
        __global__ void run(int* x) { extern __shared__ int a[]; a[*x] = 1; *x = a[0]; }
        extern "C" cudaError_t go(int* x, cudaStream_t stream) {
          for (const std::size_t bytes : {50000, 90000, 60000, 1000}) {
            const cudaError_t error = allow_shared_bytes(run, bytes);
            if (error != cudaSuccess) return error;
          }
          run<<<1, 1, 90000, stream>>>(x);
          return cudaGetLastError();
        }
        """
        x = np.zeros(1, np.int32)
        array = Array.of("x", torch.from_numpy(x), written=True)
        lab.compile(source, "simulator").call("go", array)
        assert x[0] == 1

    def test_too_much_shared_memory(self):
        source = "__global__ void run(int* x) { __shared__ int a[1000]; a[*x] = 1; *x = a[0]; }"
        with pytest.raises(lab.KernelError, match="4000 static, 230000 dynamic"):
            launch(source, 1, 1, [np.zeros(1, np.int32)], shared_bytes=230000)


def test_pairs_of_float16_are_rounded_and_compared():
    source = """
    #include <cuda_fp16.h>
    __global__ void run(const float* x, float* y) {
      const __half2 a = __floats2half2_rn(x[0], x[1]), b = __float2half2_rn(x[2]);
      const float2 largest = __half22float2(__hmax2(__habs2(a), b));
      y[0] = largest.x;
      y[1] = largest.y;
      y[2] = __half2float(__hmax(__low2half(a), __high2half(a)));
    }"""
    out = np.zeros(3, np.float32)
    x = np.array([-3.1, 0.2, 1.1], np.float32)
    launch(source, 1, 1, [x, out])
    a, b, c = x.astype(np.float16).astype(np.float32)
    assert out.tolist() == [-a, c, b]
    launch(source, 1, 1, [np.array([np.nan, -np.inf, 2.0], np.float32), out])
    assert out.tolist() == [2.0, np.inf, -np.inf]  # what is a number is larger than what is none


def test_the_ucontext_fallback_runs_the_same_programs(tmp_path):
    """The portable way to switch stacks, used where there is no hand-written one."""
    code = """
    import pathlib, subprocess, sys
    import numpy as np
    import convt_lab.simulator as simulator
    simulator._FLAGS = (*simulator._FLAGS, "-DCUDASIM_UCONTEXT")
    import convt_lab as lab
    source = '''
    __global__ void run(int* out) {
      __shared__ int value[64];
      value[threadIdx.x] = threadIdx.x;
      __syncthreads();
      out[threadIdx.x] = value[63 - threadIdx.x] + __shfl_xor_sync(0xFFFFFFFFu, threadIdx.x, 1);
    }'''
    out = np.zeros(64, np.int32)
    lab.compile(source, "simulator").launch("run", 3, 64, [out])
    i = np.arange(64)
    assert (out == 63 - i + (i ^ 1)).all()
    wild = lab.compile("__global__ void run(int* x) { x[1 << 28] = 1; }", "simulator")
    try:
        wild.launch("run", 1, 1, [out])
    except lab.KernelError as error:
        print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "past the end of 'x'" in result.stdout


NARROW = """
import resource, sys
import numpy as np
import convt_lab as lab
from convt_lab.errors import KernelError

program = lab.compile('''
extern "C" __global__ void wait(float* y) {
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}
''', backend="simulator")
trace = sys.argv[2] == "traced"
small = np.zeros(2, np.float32)
program.launch("wait", 1, 2, [small], trace=trace)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), limits[1]))
many = np.zeros(1024, np.float32)
try:
    program.launch("wait", 1, 1024, [many], trace=trace)
except (KernelError, MemoryError) as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, limits)
program.launch("wait", 1, 1024, [many], trace=trace)
assert (many == 1).all()
"""


@pytest.mark.parametrize("trace", ["traced", "plain"])
@pytest.mark.parametrize("room", [0, 2**16, 2**20, 2**23, 2**25, 2**26])
def test_a_computer_without_memory_is_an_error_and_no_crash(room, trace):
    """A block's 1024 threads, which all wait, need 128 MiB of stacks."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW, str(room), trace],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout or "allocate" in done.stdout


ENDLESS = {
    "loop": "__global__ void run(volatile int* x) { while (x[0] == 0) {} }",
    "barriers": "__global__ void run(volatile int* x) { while (x[0] == 0) __syncthreads(); }",
    "warps": "__global__ void run(volatile int* x) { while (x[0] == __shfl_sync(~0u, 0, 1)) {} }",
    "output": '__global__ void run(volatile int* x) { while (x[0] == 0) printf("again\\n"); }',
    "goto": "__global__ void run(volatile int* x) { again: if (x[0] == 0) goto again; }",
}


@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize("source", ENDLESS)
def test_a_launch_that_never_ends_is_stopped(source, blocks, monkeypatch):
    monkeypatch.setenv("CONVT_LAB_LAUNCH_TIMEOUT", "0.3")
    program = lab.compile(ENDLESS[source], "simulator")
    for _ in range(3):
        with pytest.raises(lab.KernelError, match=r"longer than it may: 0.3 s .*does it ever end"):
            program.launch("run", blocks, 70, [np.zeros(1, np.int32)])
    program.launch("run", blocks, 64, [np.ones(1, np.int32)])


def test_a_traced_launch_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setenv("CONVT_LAB_LAUNCH_TIMEOUT", "0.3")
    program = lab.compile(ENDLESS["barriers"], "simulator")
    with pytest.raises(lab.KernelError, match="longer than it may") as caught:
        program.launch("run", 1, 64, [np.zeros(1, np.int32)], trace=True)
    assert caught.value.report.totals["global_load_requests"] > 10


@pytest.mark.parametrize("chosen", ["soon", "0", "-1", "inf", "nan"])
def test_a_time_for_launches_that_is_none(chosen, monkeypatch):
    monkeypatch.setenv("CONVT_LAB_LAUNCH_TIMEOUT", chosen)
    program = lab.compile(ENDLESS["loop"], "simulator")
    with pytest.raises(ValueError, match="must be a positive number of seconds"):
        program.launch("run", 1, 1, [np.ones(1, np.int32)])


def test_output_without_end_is_cut_off(tmp_path, capfd):
    program = lab.compile(
        """
        __global__ void run(int lines) {
          for (int i = 0; i < lines; ++i) printf("%07d of %d\\n", i, lines);
        }
        """,
        "simulator",
    )
    program.launch("run", 1, 1, [200_000])
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["0000000 of 200000", "0000001 of 200000"]
    assert 2**20 - 20 < sum(len(line) + 1 for line in lines) <= 2**20


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np
import convt_lab as lab

program = lab.compile("__global__ void run(volatile int* x) { while (x[0] == 0) {} }", "simulator")
x = np.zeros(1, np.int32)
for trace in (False, True):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        program.launch("run", 5, 40, [x], trace=trace)
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - begin < 5, flush=True)
program.launch("run", 5, 40, [np.ones(1, np.int32)])
handler = signal.getsignal(signal.SIGINT)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("as before", handler is signal.default_int_handler)
"""


def test_a_launch_can_be_interrupted():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted True"] * 2 + ["as before True"]


FORKED = """
import os
import numpy as np
import convt_lab as lab

os.environ["CONVT_LAB_LAUNCH_TIMEOUT"] = "0.3"
program = lab.compile("__global__ void run(volatile int* x) { while (x[0] == 0) {} }", "simulator")
program.launch("run", 1, 1, [np.ones(1, np.int32)])
child = os.fork()
try:
    program.launch("run", 3, 40, [np.zeros(1, np.int32)])
except lab.KernelError as error:
    assert "longer than it may" in str(error)
    if child == 0:
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_stops_its_launches_too():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]
