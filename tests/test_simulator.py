"""The simulator: CUDA's language and execution model on a CPU."""

import bisect
import ctypes
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction

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


def values_of(names, kernel, *arrays, includes=""):
    """Run a kernel of one thread per element, traced as well, and return what it wrote to `out`."""
    parameters = ", ".join(f"{ctype}* {name}" for ctype, name in names)
    source = f"{includes}\n__global__ void run({parameters}) {{ int i = threadIdx.x; {kernel} }}"
    results = []
    for trace in (False, True):
        copies = [a.copy() for a in arrays]
        lab.compile(source, "simulator").launch("run", 1, len(arrays[0]), copies, trace=trace)
        results.append(copies[-1])
    np.testing.assert_array_equal(results[0], results[1])
    return results[0]


FAST = {
    "__expf(x[i])": np.exp,
    "__exp10f(x[i])": lambda x: 10.0**x,
    "__logf(x[i])": np.log,
    "__log2f(x[i])": np.log2,
    "__log10f(x[i])": np.log10,
    "__powf(x[i], 1.5f)": lambda x: x**1.5,
    "__sinf(x[i])": np.sin,
    "__cosf(x[i])": np.cos,
    "__tanf(x[i])": np.tan,
    "__tanhf(x[i])": np.tanh,
    "sinpif(x[i])": lambda x: np.sin(np.pi * x),
    "cospif(x[i])": lambda x: np.cos(np.pi * x),
    "float(rsqrt(double(x[i])))": lambda x: x**-0.5,
    "rsqrtf(x[i])": lambda x: x**-0.5,
    "__frsqrt_rn(x[i])": lambda x: x**-0.5,
    "__fsqrt_rn(x[i])": np.sqrt,
    "__frcp_rn(x[i])": lambda x: 1 / x,
    "__fdiv_rn(x[i], 3.0f)": lambda x: x / 3,
    "__fsub_rn(x[i], 0.1f)": lambda x: x - 0.1,
    "__saturatef(x[i] - 1.0f)": lambda x: np.clip(x - 1, 0, 1),
}


def test_functions_of_floats():
    x = np.array([0.3, 1.25, 2.75, 7.1], np.float32)
    written = " ".join(f"out[{k} * 4 + i] = {code};" for k, code in enumerate(FAST))
    out = np.zeros(len(FAST) * 4, np.float32)
    out = values_of([("const float", "x"), ("float", "out")], written, x, out).reshape(-1, 4)
    for row, (code, function) in zip(out, FAST.items(), strict=True):
        np.testing.assert_allclose(
            row, function(x.astype(float)), rtol=1e-6, atol=1e-6, err_msg=code
        )


def test_sines_of_whole_and_half_turns_are_exact():
    x = np.array([0, 0.5, 1, 1.5, 2, -0.5, 1e9 + 512, np.inf], np.float32)
    out = np.zeros(16, np.float32)
    code = "out[i] = sinpif(x[i]); out[8 + i] = cospif(x[i]);"
    out = values_of([("const float", "x"), ("float", "out")], code, x, out)
    assert out[:7].tolist() == [0, 1, 0, -1, 0, -1, 0]
    assert out[8:15].tolist() == [1, 0, -1, 0, 1, 0, 1]
    assert np.isnan(out[[7, 15]]).all()


def test_conversions_round_as_they_say_and_saturate():
    x = np.array([-2.5, -1.5, 0.5, 2.7, 3e9, -3e9, 9e9, np.nan], np.float32)
    code = """
    out[i] = __float2int_rn(x[i]);
    out[8 + i] = __float2int_rz(x[i]);
    out[16 + i] = __float2int_rd(x[i]);
    out[24 + i] = __float2int_ru(x[i]);
    out[32 + i] = __float2uint_rz(x[i]);
    """
    out = np.zeros(40, np.int64)
    out = values_of([("const float", "x"), ("long long", "out")], code, x, out).reshape(5, 8)
    high, low = 2**31 - 1, -(2**31)
    assert out.tolist() == [
        [-2, -2, 0, 3, high, low, high, 0],
        [-2, -1, 0, 2, high, low, high, 0],
        [-3, -2, 0, 2, high, low, high, 0],
        [-2, -1, 1, 3, high, low, high, 0],
        [0, 0, 0, 2, 3000000000, 0, 2**32 - 1, 0],
    ]


def test_integer_intrinsics():
    code = """
    const unsigned u = unsigned(x[i]);
    const int s = int(u);
    out[i] = __brev(u);
    out[4 + i] = __mulhi(s, 1 << 20);
    out[8 + i] = __umulhi(u, 1u << 20);
    out[12 + i] = __mul24(s, 3);
    out[16 + i] = __umul24(u, 3u);
    out[20 + i] = __clzll(x[i]) + 100 * __popcll(x[i]) + 10000 * __ffsll(x[i]);
    out[24 + i] = longlong2{x[i], 1}.x + make_ulonglong2(2, 3).y;
    """
    x = np.array([0, 1, 0x80000001, 0x12FFFFFF], np.int64)
    out = values_of(
        [("const long long", "x"), ("long long", "out")], code, x, np.zeros(28, np.int64)
    )
    as_int = [0, 1, 0x80000001 - 2**32, 0x12FFFFFF]
    assert out.reshape(7, 4).tolist() == [
        [0, 1 << 31, 0x80000001, int(f"{0x12FFFFFF:032b}"[::-1], 2)],
        [v * 2**20 >> 32 for v in as_int],
        [v * 2**20 >> 32 for v in x.tolist()],
        [0, 3, 3, -3],
        [0, 3, 3, 0xFFFFFF * 3],
        [64, 63 + 100 + 10000, 32 + 200 + 10000, 35 + 2600 + 10000],
        [v + 3 for v in x.tolist()],
    ]


def test_min_and_max_of_mixed_types():
    """As in CUDA, where both become unsigned if one is."""
    code = """
    const int a = x[i];
    const long b = x[i];
    const long long c = x[i];
    out[i] = min(a, 3u) + max(3u, a) == a + 3u;
    out[2 + i] = max(a, 3u) == (a < 0 ? unsigned(a) : 3u);
    out[4 + i] = max(b, std::size_t{3}) == (b < 0 ? std::size_t(b) : 3);
    out[6 + i] = min(c, 3ull) == (c < 0 ? 3 : 1);
    out[8 + i] = max(a, 2) == 2 && max(2.5f, 1.0) == 2.5 && min(1.0, 2.0f) == 1.0;
    """
    x = np.array([-5, 1], np.int32)
    out = values_of([("const int", "x"), ("int", "out")], code, x, np.zeros(10, np.int32))
    assert (out == 1).all()


def test_an_index_is_a_uint3():
    source = """
    __device__ unsigned sum(uint3 v) { return v.x + 10 * v.y + 100 * v.z; }
    __device__ unsigned sum_of_sizes(dim3 v) { return v.x + 10 * v.y + 100 * v.z; }
    __global__ void run(unsigned* out) {
      const uint3 t = threadIdx, size = blockDim, place = dim3(1, 2, 3);
      const dim3 blocks = gridDim;
      out[t.x + 2 * t.y] = sum(threadIdx) + sum(place) + sum(size) + sum(blocks) +
                           sum_of_sizes(blockDim) + sum_of_sizes(t);
    }
    """
    out = np.zeros(6, np.uint32)
    launch(source, 1, (2, 3), [out])
    assert out.tolist() == [
        321 + 132 + 111 + 132 + 2 * (x + 10 * y) for y in (0, 1, 2) for x in (0, 1)
    ]


@pytest.mark.parametrize(
    "declared",
    [
        "static __shared__ float s[4][8];",
        "__shared__ static float s[4][8];",
        "extern __shared__ float s[][8];",
        "__shared__ extern float s[][8];",
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_ways_to_declare_shared_arrays(declared, inside):
    source = f"""
    {"" if inside else declared}
    __global__ void run(float* out) {{
      {declared if inside else ""}
      const int i = threadIdx.x;
      s[i / 8][i % 8] = i;
      __syncthreads();
      out[i] = s[3 - i / 8][7 - i % 8];
    }}
    """
    out = np.zeros(32, np.float32)
    report = lab.compile(source, "simulator").launch("run", 1, 32, [out], 128, trace=True)
    assert out.tolist() == list(range(31, -1, -1))
    assert {site.buffer for site in report.sites} == {"s", "out"}


def test_more_atomics():
    source = """
    __global__ void run(unsigned* out) {
      atomicInc(out, 6u);
      atomicDec(out + 1, 6u);
      atomicXor(out + 2, threadIdx.x);
      atomicAdd_block(out + 3, threadIdx.x);
      atomicMax_system(out + 4, threadIdx.x);
      atomicCAS_block(out + 5, 0u, 9u);
      __threadfence_system();
    }
    """
    out = np.zeros(6, np.uint32)
    report = lab.compile(source, "simulator").launch("run", 1, 32, [out], trace=True)
    inc = dec = 0
    for _ in range(32):
        inc = 0 if inc >= 6 else inc + 1
        dec = 6 if dec == 0 or dec > 6 else dec - 1
    xor = int(np.bitwise_xor.reduce(np.arange(32)))
    assert out.tolist() == [inc, dec, xor, 496, 31, 9]
    assert sorted(site.line for site in report.sites) == [3, 4, 5, 6, 7, 8]


def test_cache_hints_are_counted_as_plain_accesses():
    hinted = """
    __global__ void run(const float4* x, float* out) {
      const int i = threadIdx.x;
      __stcs(out + i, __ldcs(x + i).x);
      __stcg(out + 32 + i, __ldcg(&x[i].y));
    }
    """
    plain = """
    __global__ void run(const float4* x, float* out) {
      const int i = threadIdx.x;
      out[i] = x[i].x;
      out[32 + i] = x[i].y;
    }
    """
    x, outs, reports = np.arange(128, dtype=np.float32), [], []
    for source in (hinted, plain.replace("x[i].x", "__ldg(x + i).x")):
        outs.append(np.zeros(64, np.float32))
        program = lab.compile(source, "simulator")
        reports.append(program.launch("run", 1, 32, [x, outs[-1]], trace=True))
    assert outs[0].tolist() == outs[1].tolist() == x[::4].tolist() + x[1::4].tolist()
    first, second = (
        [(s.line, s.op, s.requests, s.sectors, s.bytes_requested) for s in r.sites] for r in reports
    )
    assert first == second


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("cooperative_groups.h", "cooperative groups"),
        ("mma.h", "wmma fragments"),
        ("curand_kernel.h", "cuRAND"),
        ("cub/cub.cuh", "CUB"),
    ],
)
def test_a_library_that_is_not_there_is_named(header, what):
    with pytest.raises(lab.CompileError, match=f"no {what}.*appendix") as caught:
        lab.compile(f"\n#include <{header}>\n__global__ void run() {{}}", "simulator").launch(
            "run", 1, 1, []
        )
    assert header in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        "cudaMalloc(&x, 4)",
        "cudaMallocManaged(&x, 4)",
        "cudaMemcpy(x, x, 4, cudaMemcpyHostToDevice)",
        "cudaFree(x)",
    ],
)
def test_memory_that_nobody_has_to_allocate(call):
    source = f"__global__ void run(int* x) {{}}\nint main() {{ int* x = 0; {call}; }}"
    with pytest.raises(lab.CompileError, match=f"no {call.partition('(')[0]} is needed") as caught:
        launch(source, 1, 1, [np.zeros(1, np.int32)])
    assert caught.value.line == 2


def test_headers_that_many_a_source_includes():
    source = """
    #include <cuda.h>
    #include <cuda_runtime_api.h>
    #include <device_launch_parameters.h>
    #include <math_constants.h>
    __global__ void run(double* out) {
      out[0] = CUDART_INF_F;
      out[1] = -CUDART_INF;
      out[2] = CUDART_NAN_F;
      out[3] = CUDART_NAN;
      out[4] = CUDART_PI_F;
      out[5] = CUDART_PI;
      out[6] = CUDART_MAX_NORMAL_F;
      out[7] = CUDA_VERSION;
      out[8] = __longlong_as_double(__double_as_longlong(1.5) + 1);
    }
    """
    out = np.zeros(9)
    launch(source, 1, 1, [out])
    assert np.isnan(out[2:4]).all()
    assert out[[0, 1, 4, 5, 6, 7, 8]].tolist() == [
        *(np.inf, -np.inf, np.float32(np.pi), np.pi, np.finfo(np.float32).max, 13000),
        np.nextafter(1.5, 2),
    ]


def test_a_clock_goes_on():
    source = """
    __global__ void run(int* out) {
      const long long start = clock64();
      const clock_t before = clock();
      while (clock64() - start < 1000) {}
      *out = clock() >= before;
    }
    """
    out = np.zeros(1, np.int32)
    launch(source, 1, 1, [out])
    assert out[0] == 1


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

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("exit(1);", "can't call exit"),
            ("std::exit(1);", "can't call exit"),
            ("abort();", "can't call abort"),
            ("std::abort();", "can't call abort"),
            ("throw std::bad_alloc();", "can't throw"),
            ("child<<<1, 4>>>(x);", "can't launch kernels here"),
        ],
    )
    def test_what_only_a_launcher_may_do(self, code, message):
        source = f"""
            #include <cstdlib>
            #include <stdlib.h>
            #include <new>
            __global__ void child(int* x) {{ x[threadIdx.x] = 1; }}
            __global__ void run(int* x) {{
              __syncthreads();
              if (threadIdx.x == 2) {{ {code} }}
              __syncthreads();
            }}
            """
        x = np.zeros(4, np.int32)
        for _ in range(3):
            self.check(source, rf"thread \(2, 0, 0\): a kernel {message}", [x], grid=3, block=8)
        expected = lab.CompileError if "throw" in code else lab.KernelError
        with pytest.raises(expected, match="exception" if "throw" in code else message):
            lab.compile(source, "simulator").launch("run", 1, 8, [x], trace=True)

    def test_an_exception_that_is_caught_is_none_of_our_business(self):
        source = """
        #include <stdexcept>
        __global__ void run(int* x) { *x = 3; }
        extern "C" cudaError_t go(int* x, cudaStream_t stream) {
          try {
            throw std::runtime_error("a launcher may");
          } catch (const std::exception&) {
            run<<<1, 1, 0, stream>>>(x);
          }
          return cudaGetLastError();
        }
        """
        x = np.zeros(1, np.int32)
        array = Array.of("x", torch.from_numpy(x), written=True)
        lab.compile(source, "simulator").call("go", array)
        assert x[0] == 3

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

    def test_a_mask_without_the_lane_that_calls(self):
        source = "__global__ void run() { __shfl_sync(0xFFFF, threadIdx.x, 3); }"
        self.check(source, "the mask 0x0000ffff is without the lane that calls, 16", block=32)

    @pytest.mark.parametrize("copy", ["s, x, 12", "s, x, 2", "s, x + 1, 8", "s + 1, x, 16"])
    def test_an_asynchronous_copy_that_is_none(self, copy):
        source = f"""
        #include <cuda_pipeline.h>
        __global__ void run(float* x) {{
          __shared__ float4 memory[4];
          float* s = reinterpret_cast<float*>(memory);
          __pipeline_memcpy_async({copy});
          *x = *s;
        }}"""
        with pytest.raises(lab.KernelError, match="4, 8 or 16 bytes, from and to multiples"):
            launch(source, 1, 1, [np.zeros(16, np.float32)])

    def test_signals_that_the_program_blocks(self, monkeypatch):
        """Faults and the limit come as signals."""
        source = """
        __global__ void far(float* x) { x[100000] = 1; }
        __global__ void forever(volatile float* x) { while (*x == 0) {} }
        """
        program, x = lab.compile(source, "simulator"), np.zeros(4, np.float32)
        monkeypatch.setenv("CONVT_LAB_LAUNCH_TIMEOUT", "0.5")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with pytest.raises(lab.KernelError, match="past the end of 'x'"):
                program.launch("far", 1, 1, [x])
            with pytest.raises(lab.KernelError, match="longer than it may"):
                program.launch("forever", 1, 1, [x])
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert signal.SIGSEGV in blocked

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
          if (asked != 0) {
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
        with pytest.raises(lab.KernelError, match="0 static, 233472 dynamic"):
            go(228 * 1024, 48 * 1024)
        with pytest.raises(lab.KernelError, match="invalid argument"):
            go(-1, 48 * 1024)

    def test_what_a_kernel_declares_is_taken_off(self):
        """Of its own arrays, not of its neighbour's; a template's are each instance's."""
        source = """
        template <int N> __global__ void run(int* x) {
          __shared__ int mine[N];
          __shared__ float more[2];
          extern __shared__ int a[];
          mine[*x] = 1, more[*x] = 1;
          a[*x] = mine[0];
          *x = a[0] + more[0];
        }
        __global__ void other(int* x) { __shared__ int its[9000]; its[*x] = 1; *x = its[0]; }
        extern "C" cudaError_t go(int* x, int asked, int bytes, cudaStream_t stream) {
          if (asked > 0) {
            const cudaError_t error = cudaFuncSetAttribute(
                run<3000>, cudaFuncAttributeMaxDynamicSharedMemorySize, asked);
            if (error != cudaSuccess) return error;
          }
          run<3000><<<1, 1, bytes, stream>>>(x);
          return cudaGetLastError();
        }
        extern "C" int left(int which) {
          cudaFuncAttributes of;
          const cudaError_t error =
              which == 0 ? cudaFuncGetAttributes(&of, other)
                         : which == 1 ? cudaFuncGetAttributes(&of, run<1>)
                                      : cudaFuncGetAttributes(&of, run<3000>);
          if (error != cudaSuccess) return -1;
          return of.sharedSizeBytes + of.maxDynamicSharedSizeBytes == 48 * 1024
                     ? of.maxDynamicSharedSizeBytes : -2;
        }
        """
        program = lab.compile(source, "simulator")
        assert [48 * 1024 - program.library.left(i) for i in range(3)] == [36000, 12, 12008]

        def go(asked, bytes):
            x = np.zeros(1, np.int32)
            array = Array.of("x", torch.from_numpy(x), written=True)
            program.call("go", array, ctypes.c_int(asked), ctypes.c_int(bytes))
            assert x[0] == 2

        go(0, 48 * 1024 - 12008)
        with pytest.raises(lab.KernelError, match="may ask for, 37144, until cuda"):
            go(0, 48 * 1024 - 12004)
        go(48 * 1024, 48 * 1024)
        with pytest.raises(lab.KernelError, match="12008 static, 220444 dynamic"):
            go(227 * 1024 - 12004, 4)
        go(180 * 1024, 180 * 1024)

    def test_what_lambdas_and_kernels_with_c_linkage_declare(self):
        source = """
        extern "C" __global__ void plain(int* x) { __shared__ int s[32]; s[*x] = 1; *x = s[0]; }
        __global__ void run(int* x) {
          const auto inner = [&] { __shared__ int s[15]; s[*x] = 2; return s[0]; };
          *x = inner();
        }
        extern "C" int declared(int which) {
          cudaFuncAttributes of;
          (void)(which == 0 ? cudaFuncGetAttributes(&of, plain) : cudaFuncGetAttributes(&of, run));
          return of.sharedSizeBytes;
        }
        """
        library = lab.compile(source, "simulator").library
        assert [library.declared(i) for i in range(2)] == [128, 60]

    def test_more_declared_than_nvcc_takes(self):
        source = "__global__ void run(int* x) { __shared__ int a[12289]; a[*x] = 1; *x = a[0]; }"
        with pytest.raises(lab.KernelError, match="49156 bytes of shared memory"):
            launch(source, 1, 1, [np.zeros(1, np.int32)])
        launch(source.replace("12289", "12288"), 1, 1, [np.zeros(1, np.int32)])

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


def test_functions_of_c_have_cplusplus_types():
    """`abs` of C is an int's; nvcc has one for each type."""
    source = """
    __global__ void run(const float* x, double* y) {
      y[0] = abs(x[0]);
      y[1] = abs(-5000000000ll);
      y[2] = isnan(x[1]) + 2 * isinf(x[2]) + 4 * isfinite(x[0]) + 8 * signbit(x[0]);
      y[3] = sizeof(sqrt(x[0]));
    }"""
    y = np.zeros(4)
    launch(source, 1, 1, [np.array([-2.5, np.nan, np.inf], np.float32), y])
    assert y.tolist() == [2.5, 5e9, 15, 4]


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


HALF = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "__hadd(a, -b)": lambda a, b: a - b,
    "__hmul(a, __habs(b))": lambda a, b: a * abs(b),
    "__hmax(a, b)": lambda a, b: max(a, b),
    "__hmin(a, b)": lambda a, b: min(a, b),
    "hsqrt(__habs(a))": None,
    "a < b ? T(1) : T(2.0)": lambda a, b: Fraction(1 if a < b else 2),
    "(a += b, a *= b, a)": None,
    "T((double)(float)a * (float)b)": lambda a, b: a * b,
    "__hfma(a, b, c)": None,
}


def nearest_of(exact, values, least_infinite):
    """The element of `values`, sorted and from zero on, that rounding to even gives."""
    magnitude = abs(exact)
    if magnitude >= least_infinite:
        return np.inf if exact > 0 else -np.inf
    above = bisect.bisect_left(values, magnitude)
    if above == len(values):
        found = above - 1
    elif values[above] == magnitude or above == 0:
        found = above
    else:
        low, high = magnitude - values[above - 1], values[above] - magnitude
        found = above if high < low or (high == low and above % 2 == 0) else above - 1
    return float(values[found]) * (1 if exact >= 0 else -1)


@pytest.mark.parametrize(
    ("ctype", "header"), [("half", "cuda_fp16.h"), ("__nv_bfloat16", "cuda_bf16.h")]
)
def test_arithmetic_of_16_bits_is_rounded_once(ctype, header):
    dtype = torch.float16 if ctype == "half" else torch.bfloat16
    patterns = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(dtype).double()
    values = [Fraction(v) for v in patterns[torch.isfinite(patterns)].tolist()]
    overflow = values[-1] + (values[-1] - values[-2]) / 2
    generator = torch.Generator().manual_seed(1)
    # Numbers of every size and, as often, neighbours in size; then what is a tie but for a trifle.
    bits = torch.randint(0, len(values), (3, 1024), generator=generator)
    near = torch.randint(0x3800, 0x3F00, (3, 1024), generator=generator)
    all_bits = torch.cat([bits, near], 1).to(torch.int16)
    signs = torch.where(torch.rand(all_bits.shape, generator=generator) < 0.5, 1.0, -1.0)
    abc = (all_bits.view(dtype).float() * signs).reshape(3, -1)
    tie, trifle = [1 + torch.finfo(dtype).eps, 1.5], torch.finfo(dtype).tiny
    abc[:, :2] = torch.tensor([[*tie, trifle], [*tie, -trifle]]).T
    n = abc.shape[1]
    codes = " ".join(
        f"{{ T a = x[i], b = x[{n} + i], c = x[{2 * n} + i]; out[{k * n} + i] = {code}; }}"
        for k, code in enumerate(HALF)
    )
    source = f"""
    #include <{header}>
    using T = {ctype};
    __global__ void run(const float* x, float* out) {{
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      {codes}
    }}
    """
    out = np.zeros((len(HALF), n), np.float32)
    launch(source, n // 128, 128, [abc.numpy(), out])

    def rounded(exact):
        return nearest_of(exact, values, overflow)

    for i in range(n):
        a, b, c = (Fraction(v) for v in abc[:, i].tolist())
        for row, (code, function) in zip(out, HALF.items(), strict=True):
            if code.startswith("hsqrt"):
                wanted = float(torch.tensor(float(abs(a))).double().sqrt().to(dtype))
            elif code.startswith("(a +="):
                total = rounded(a + b)
                if np.isinf(total):
                    continue
                wanted = rounded(Fraction(total) * b)
            elif code.startswith("__hfma"):
                wanted = rounded(a * b + c)
            elif code == "a / b" and b == 0:
                continue
            else:
                wanted = rounded(function(a, b))
            assert row[i] == wanted, (code, a, b, c)


def test_special_values_conversions_and_pairs_of_16_bits():
    source = """
    #include <cuda_bf16.h>
    #include <cuda_fp16.h>
    #define AT(k) out[k]
    template <class T>
    __device__ void values(const float* x, float* out) {
      const T one = 1.0f, three = 3, none = x[0], infinite = x[1];
      const T nan_sum = infinite - infinite;
      AT(0) = __hisnan(none) + 2 * __hisnan(nan_sum) + 4 * (none != none) + 8 * (one == T(1));
      AT(1) = __hmax(none, one);
      AT(2) = float(infinite) - 0.5f;
      AT(3) = (int)three + __hisinf(-infinite);
      AT(4) = __hfma(infinite, one, three);
      AT(5) = static_cast<float>(T(1e300));
      AT(6) = __shfl_down_sync(1u, one, 0);
      AT(7) = hrcp(T(4)) + hexp(T(0)) + hrsqrt(T(4));
    }
    __global__ void run(const float* x, float* out, half* sum, half2* pairs) {
      values<half>(x, out);
      values<__nv_bfloat16>(x, out + 8);
      atomicAdd(sum, half(1.5f));
      atomicAdd(sum, __float2half(2.0f));
      const half2 a = __halves2half2(1.0f, half(2)), b = make_half2(half(3), half(4));
      pairs[0] = __hfma2(a, b, __hadd2(a, b));
      pairs[1] = (a - b) / b * a;
      out[16] = __high2float(-a) + __low2float(__hmin2(a, b));
      out[17] = __bfloat1622float2(__floats2bfloat162_rn(1, 2) * __float2bfloat162_rn(3)).y;
      out[18] = __half_as_ushort(__ushort_as_half(0x3C01));
    }
    """
    x = np.array([np.nan, np.inf], np.float32)
    out, total, pairs = np.zeros(19, np.float32), np.zeros(1, np.float16), np.zeros(4, np.float16)
    for trace in (False, True):
        total[:] = 0
        lab.compile(source, "simulator").launch("run", 1, 1, [x, out, total, pairs], trace=trace)
        for values in (out[:8], out[8:16]):
            assert values.tolist() == [15, 1, np.inf, 2, np.inf, np.inf, 1, 1.75]
        assert out[16:].tolist() == [-1, 6, 0x3C01]
        assert total[0] == 3.5
        a, b = np.array([1, 2], np.float16), np.array([3, 4], np.float16)
        assert pairs.tolist() == [*(a * b + a + b), *((a - b) / b * a)]


@pytest.mark.parametrize(
    ("ctype", "header"), [("half", "cuda_fp16.h"), ("__nv_bfloat16", "cuda_bf16.h")]
)
def test_accesses_to_16_bits_are_counted(ctype, header):
    source = f"""
    #include <{header}>
    using T = {ctype};
    __global__ void run(const T* x, const T* y, float* out, T* z) {{
      __shared__ T s[32];
      __shared__ T unused[2][32];
      const int i = threadIdx.x;
      s[i] = x[i] + y[i];
      if (i > 40) s[i] = unused[0][i];
      out[i] = s[31 - i];
      z[i] = __hfma(x[i], s[i], y[i]);
      z[i] += x[i];
      z[i] = __shfl_sync(0xFFFFFFFFu, z[i], 0);
      z[i] = 1.0f;
    }}
    """
    x, y, z = (np.ones(32, np.float16) for _ in range(3))
    report = lab.compile(source, "simulator").launch(
        "run", 1, 32, [x, y, np.zeros(32, np.float32), z], trace=True
    )
    found = {(site.line - 8, site.op, site.buffer, site.requests) for site in report.sites}
    assert found == {
        *((0, "load", "x", 1), (0, "load", "y", 1), (0, "store", "s", 1)),
        *((2, "load", "s", 1), (2, "store", "out", 1)),
        *((3, "load", "x", 1), (3, "load", "s", 1), (3, "load", "y", 1), (3, "store", "z", 1)),
        *((4, "load", "x", 1), (4, "load", "z", 1), (4, "store", "z", 1)),
        *((5, "load", "z", 1), (5, "store", "z", 1)),
        (6, "store", "z", 1),
    }


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


FORKED_BESIDE_LAUNCHES = """
import os, threading, time
import numpy as np
import convt_lab as lab

program = lab.compile("__global__ void run(int* x) { x[threadIdx.x] += 2; }", "simulator")
is_over = False

def launch():
    x = np.zeros(32, np.int32)
    program.launch("run", 1, 32, [x])
    assert (x == 2).all()

def launch_on():
    while not is_over:
        launch()

threads = [threading.Thread(target=launch_on) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(150):
    child = os.fork()
    if child == 0:
        launch()
        os._exit(0)
    deadline = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.001)
    assert done[1] == 0, "the child hangs"
is_over = True
print("all came back")
"""


def test_a_fork_beside_other_threads_launches():
    """A lock that one of them held would never be let go in the child."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED_BESIDE_LAUNCHES],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout == "all came back\n", done.stderr


def test_without_binutils_a_trace_says_what_is_missing(monkeypatch):
    program = lab.compile("__global__ void run(int* x) { *x = 31415; }", "simulator")
    x = np.zeros(1, np.int32)
    program.launch("run", 1, 1, [x], trace=True)
    again = lab.compile("__global__ void run(int* x) { *x = 27182; }", "simulator")
    assert again._instrumented
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(lab.BuildError, match=r"readelf does not run .* install binutils"):
        again.launch("run", 1, 1, [x], trace=True)


def test_a_fork_stops_its_launches_too():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]
