"""Planted bugs, each found at its line; and no hazard where there is none."""

import os
import subprocess
import sys

import numpy as np
import pytest
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab.backend import Array
from convt_lab.simulator.tracing import step_limit
from convt_lab.stages import fma_stages


def hazards(source, block, args, grid=1, shared_bytes=0):
    """Trace ``run`` and return its hazards, whether or not it stopped the launch."""
    program = lab.compile(source, "simulator")
    try:
        report = program.launch("run", grid, block, args, shared_bytes, trace=True)
    except lab.KernelError as error:
        report = error.report
    return report.hazards


def line_of(source, marker="// here"):
    """Return the number of the line with the marker."""
    return next(i for i, text in enumerate(source.split("\n"), 1) if marker in text)


def floats(count, value=0.0):
    return np.full(count, value, np.float32)


BUGS = {
    "a missing barrier": (
        "race",
        "tile",
        """
        __global__ void run(const float* x, float* y) {
          __shared__ float tile[64];
          tile[threadIdx.x] = x[threadIdx.x];
          y[threadIdx.x] = tile[63 - threadIdx.x];  // here
        }
        """,
        dict(block=64, args=[floats(64), floats(64)]),
    ),
    "a missing barrier at the end of a loop": (
        "race",
        "tile",
        """
        __global__ void run(const float* x, float* y) {
          __shared__ float tile[64];
          float sum = 0.0f;
          for (int i = 0; i < 3; ++i) {
            tile[threadIdx.x] = x[64 * i + threadIdx.x];  // here
            __syncthreads();
            sum += tile[(threadIdx.x + 1) % 64];
          }
          y[threadIdx.x] = sum;
        }
        """,
        dict(block=64, args=[floats(192), floats(64)]),
    ),
    "a race within a warp": (
        "race",
        "tile",
        """
        __global__ void run(float* y) {
          __shared__ float tile[32];
          tile[threadIdx.x] = 1.0f;
          y[threadIdx.x] = tile[threadIdx.x ^ 1];  // here
        }
        """,
        dict(block=32, args=[floats(32)]),
    ),
    "two threads that write one word": (
        "race",
        "dynamic",
        """
        __global__ void run(float* y) {
          extern __shared__ float dynamic[];
          dynamic[threadIdx.x / 2] = threadIdx.x;  // here
          __syncthreads();
          y[threadIdx.x] = dynamic[threadIdx.x / 2];
        }
        """,
        dict(block=64, args=[floats(64)], shared_bytes=128),
    ),
    "a word written while two warps read it": (
        "race",
        "tile",
        """
        __global__ void run(const float* x, float* y) {
          __shared__ float tile[64];
          tile[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          y[threadIdx.x] = tile[threadIdx.x % 32];
          if (threadIdx.x == 33) tile[1] = 1.0f;  // here
        }
        """,
        dict(block=64, args=[floats(64), floats(64)]),
    ),
    "a barrier that some threads skip": (
        "divergent_barrier",
        "",
        """
        __global__ void run(float* y) {
          if (threadIdx.x < 40) {
            __syncthreads();  // here
          }
          y[threadIdx.x] = 1.0f;
        }
        """,
        dict(block=64, args=[floats(64)]),
    ),
    "a barrier after an early return": (
        "divergent_barrier",
        "",
        """
        __global__ void run(float* y, int n) {
          const int i = threadIdx.x;
          if (i >= n) return;
          y[i] = 1.0f;
          __syncthreads();  // here
        }
        """,
        dict(block=64, args=[floats(50), 50]),
    ),
    "two barriers for the two sides of a branch": (
        "divergent_barrier",
        "",
        """
        __global__ void run(float* y) {
          if (threadIdx.x % 2 == 0) {
            __syncthreads();
          } else {
            __syncthreads();  // here
          }
          y[threadIdx.x] = 1.0f;
        }
        """,
        dict(block=64, args=[floats(64)]),
    ),
    "a read one past the end": (
        "out_of_bounds",
        "x",
        """
        __global__ void run(const float* x, float* y) {
          y[threadIdx.x] = x[threadIdx.x + 1];  // here
        }
        """,
        dict(block=32, args=[floats(32), floats(32)]),
    ),
    "a write before the start": (
        "out_of_bounds",
        "y",
        """
        __global__ void run(float* y) {
          y[(int)threadIdx.x - 1] = 1.0f;  // here
        }
        """,
        dict(block=32, args=[floats(32)]),
    ),
    "a shared index past the array": (
        "out_of_bounds",
        "tile",
        """
        __global__ void run(float* y) {
          __shared__ float tile[32];
          for (int i = threadIdx.x; i < 32; i += 8) tile[i] = 0.0f;
          __syncthreads();
          y[threadIdx.x] = tile[threadIdx.x * 5];  // here
        }
        """,
        dict(block=8, args=[floats(8)]),
    ),
    "shared memory that nothing has written": (
        "uninitialised_read",
        "tile",
        """
        __global__ void run(float* y) {
          __shared__ float tile[32];
          if (threadIdx.x != 7) tile[threadIdx.x] = 1.0f;
          __syncthreads();
          y[threadIdx.x] = tile[threadIdx.x];  // here
        }
        """,
        dict(block=32, args=[floats(32)]),
    ),
    "an accumulator in memory that nobody cleared": (
        "uninitialised_read",
        "y",
        """
        __global__ void run(const float* x, float* y) {
          y[threadIdx.x] += x[threadIdx.x];  // here
        }
        """,
        dict(block=32, args=[floats(32), floats(32, np.nan)]),
    ),
    "two blocks that write one value": (
        "write_conflict",
        "y",
        """
        __global__ void run(float* y) {
          y[threadIdx.x + 16 * blockIdx.x] = 1.0f;  // here
        }
        """,
        dict(block=32, args=[floats(48)], grid=2),
    ),
    "two threads that write one value": (
        "write_conflict",
        "y",
        """
        __global__ void run(float* y) {
          y[threadIdx.x % 48] = 1.0f;  // here
        }
        """,
        dict(block=64, args=[floats(48)]),
    ),
    "a block that reads what another has written": (
        "race",
        "y",
        """
        __global__ void run(float* y) {
          if (blockIdx.x == 0) y[threadIdx.x] = 2.0f;
          if (blockIdx.x == 1) y[threadIdx.x + 32] = y[threadIdx.x];  // here
        }
        """,
        dict(block=32, args=[floats(64)], grid=2),
    ),
    "a vector at an odd place": (
        "misaligned",
        "x",
        """
        __global__ void run(const float* x, float* y) {
          const float4 v = *reinterpret_cast<const float4*>(x + threadIdx.x);  // here
          y[threadIdx.x] = v.x;
        }
        """,
        dict(block=32, args=[floats(64), floats(32)]),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_at_its_line(name):
    kind, buffer, source, launch = BUGS[name]
    found = hazards(source, **launch)
    assert {h.buffer for h in found} == {buffer}
    # Who races may also be the first: then nothing has been written yet.
    others = {h.kind for h in found} - {kind}
    assert others <= ({"uninitialised_read"} if kind == "race" else set())
    lines = [h.line for h in found if h.kind == kind]
    assert line_of(source) in lines
    # A race has two sides, and both lines are told. Everything else has one.
    assert len(lines) == len(set(lines)) <= (2 if kind == "race" else 1)
    assert "thread (" in found[0].message
    if buffer:
        assert "byte " in found[0].message
        assert repr(buffer) in found[0].message


def test_every_kind_is_planted():
    assert {kind for kind, *_ in BUGS.values()} == {
        *("race", "divergent_barrier", "out_of_bounds"),
        *("uninitialised_read", "write_conflict", "misaligned"),
    }


def test_a_message_gives_an_example():
    source = BUGS["a read one past the end"][2]
    (hazard,) = hazards(source, 32, [floats(32), floats(32)])
    assert hazard.message == (
        "thread (31, 0, 0) of block (0, 0, 0) goes to byte 128 of 'x', which is outside it"
    )


def test_an_error_says_where_a_misaligned_vector_is():
    source = BUGS["a vector at an odd place"][2]
    program = lab.compile(source, "simulator")
    with pytest.raises(lab.KernelError, match=r"access: 4 bytes from the start of 'x' \(256 bytes"):
        program.launch("run", 1, 32, [floats(64), floats(32)], trace=True)


@pytest.mark.parametrize("trace", [False, True])
def test_shared_memory_that_the_launch_did_not_give(trace):
    source = "__global__ void run(float* x) { extern __shared__ float s[]; x[0] = s[0] = 1.0f; }"
    program = lab.compile(source, "simulator")
    with pytest.raises(lab.KernelError, match="no dynamic shared memory: pass shared_bytes"):
        program.launch("run", 1, 1, [floats(4)], trace=trace)


def test_what_is_far_from_every_buffer_is_told_as_an_address():
    source = "__global__ void run(float* x) { x[1ll << 40] = 1.0f; }"
    program = lab.compile(source, "simulator")
    with pytest.raises(lab.KernelError, match=r"every buffer: address 0x[0-9a-f]+$") as caught:
        program.launch("run", 1, 1, [floats(4)], trace=True)
    (hazard,) = caught.value.report.hazards
    assert hazard.message.endswith("goes to an address outside every buffer")


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (
            "a barrier after an early return",
            "thread (50, 0, 0) of block (0, 0, 0) and thread (0, 0, 0) of its block do not reach",
        ),
        (
            "a word written while two warps read it",
            "thread (33, 0, 0) of block (0, 0, 0) and thread (1, 0, 0) of block (0, 0, 0) touch",
        ),
    ],
)
def test_the_message_names_two_threads(bug, message):
    _, _, source, launch = BUGS[bug]
    (hazard,) = hazards(source, **launch)
    assert hazard.message.startswith(message)


CORRECT = {
    "warp-synchronous exchange": (
        """
        __global__ void run(float* y) {
          __shared__ float tile[64];
          tile[threadIdx.x] = 1.0f;
          __syncwarp();
          y[threadIdx.x] = tile[threadIdx.x ^ 1];
        }
        """,
        dict(block=64, args=[floats(64)]),
    ),
    "atomics on one place": (
        """
        __global__ void run(int* count, float* sum) {
          __shared__ int inside;
          if (threadIdx.x == 0) inside = 0;
          __syncthreads();
          atomicAdd(&inside, 1);
          atomicAdd(sum, 1.0f);
          __syncthreads();
          if (threadIdx.x == 0) atomicAdd(count, inside);
        }
        """,
        dict(block=64, args=[np.zeros(1, np.int32), floats(1)], grid=3),
    ),
    "reading the same words and writing one's own": (
        """
        __global__ void run(const float* x, float* y) {
          __shared__ float tile[64];
          for (int i = 0; i < 3; ++i) {
            tile[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            y[threadIdx.x] = tile[0] + tile[threadIdx.x / 2];
            __syncthreads();
          }
        }
        """,
        dict(block=64, args=[floats(64), floats(64, np.nan)]),
    ),
    "a value rewritten by another thread after a barrier": (
        """
        __global__ void run(float* y) {
          y[threadIdx.x] = 1.0f;
          __syncthreads();
          y[63 - threadIdx.x] += 2.0f;
        }
        """,
        dict(block=64, args=[floats(64, np.nan)]),
    ),
    "bytes of one word": (
        """
        __global__ void run(unsigned char* y) {
          __shared__ unsigned char tile[64];
          tile[threadIdx.x] = threadIdx.x;
          y[threadIdx.x] = tile[threadIdx.x];
        }
        """,
        dict(block=64, args=[np.zeros(64, np.uint8)]),
    ),
    "a return after the last barrier": (
        """
        __global__ void run(float* y, int n) {
          __shared__ float tile[64];
          tile[threadIdx.x] = 1.0f;
          __syncthreads();
          if ((int)threadIdx.x >= n) return;
          y[threadIdx.x] = tile[63 - threadIdx.x];
        }
        """,
        dict(block=64, args=[floats(50), 50]),
    ),
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_has_no_hazard(name):
    source, launch = CORRECT[name]
    assert hazards(source, **launch) == ()


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("stage", list(fma_stages))
def test_the_stages_have_none_on_the_random_problems(stage, part):
    """All 300 problems take minutes on one core: CONVT_LAB_LONG=1 asks for them."""
    step = 4 if stage != "register_blocked" or os.environ.get("CONVT_LAB_LONG") else 32
    for number, problem in enumerate(problem_set(300)):
        if number % step != part or problem.batch == 0:
            continue
        x, weight, bias = inputs(problem, seed=number)
        report = lab.stages[stage].profile(x, weight, bias, **problem.arguments)
        assert report.hazards == (), problem


def test_a_kernel_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("convt_lab.simulator.tracing.MAX_STEPS", 100_000)
    program = lab.compile(
        "__global__ void run(volatile int* x) { while (x[0] == 0) {} }", "simulator"
    )
    with pytest.raises(lab.KernelError, match="more steps than it may") as caught:
        program.launch("run", 1, 1, [np.zeros(1, np.int32)], trace=True)
    assert caught.value.report.totals["global_load_requests"] > 1000


AHEAD = """
import re, resource, sys
import numpy as np
import convt_lab as lab

block, source, *rounds = eval(sys.argv[1])
program = lab.compile(source, "simulator")
x = np.zeros(32, np.float32)
program.launch("run", 1, 1, [x, 1], trace=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for n in rounds:
    try:
        report = program.launch("run", 1, block, [x, n], trace=True)
        print(report.totals["global_load_requests"], report.totals["global_load_sectors"])
    except lab.KernelError as error:
        print(re.sub("[0-9]+ ", "N ", str(error)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def ahead(block, source, *rounds):
    """Trace ``run`` in a process of its own; return what it says, and the KiB that it took."""
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, repr((block, source, *rounds))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *said, taken = done.stdout.splitlines()
    return said, int(taken)


@pytest.mark.parametrize(
    "body",
    [
        "while (n > 1) x[0] += x[1];",
        "for (volatile int i = 0; n > 1; ++i) {}",
        "x[0] = n > 1 ? twice(n) : 0;",
    ],
)
def test_a_thread_that_runs_away_from_its_warp_does_not_eat_the_memory(body):
    source = f"""
    __device__ int twice(int n) {{
      return n > 1 ? twice(n > 60 ? 60 : n - 1) + twice(n - 1) : 1;
    }}
    __global__ void run(volatile float* x, int n) {{ {body} }}
    """
    (said,), taken = ahead(64, source, 100)
    assert said == (
        "run stopped in block (0, 0, 0), thread (0, 0, 0): the thread is N accesses and N "
        "iterations or calls ahead of others, more than a trace can keep: it seems to run for ever"
    )
    assert taken < 1.7 * 2**20


@pytest.mark.parametrize("block", [1, 33])
def test_what_the_last_lane_of_a_warp_does_alone_is_counted_and_not_kept(block):
    """The loop's requests are freed early; what comes before and behind is joined as ever."""
    source = """
    __device__ float get(const float* x, int i) { return x[i % 32]; }
    __global__ void run(float* x, int n) {
      float sum = x[threadIdx.x % 32];
      for (int j = 0; j < 3; ++j) {
        sum += get(x, threadIdx.x);
        if (threadIdx.x + 1 == blockDim.x) {
          for (int i = 0; i < n; ++i) sum += get(x, i) + x[0];
        }
        sum += x[(threadIdx.x + j) % 32];
      }
      if (sum == 12345.0f) x[threadIdx.x % 32] = sum;
    }
    """
    rounds = 10, 100_000, 300_000
    said, taken = ahead(block, source, *rounds)
    own = 7 + 7 * (block > 32)
    sectors = 7 + 28 * (block > 32)
    assert said == [f"{own + 6 * n} {sectors + 6 * n}" for n in rounds]
    assert taken < 128 * 2**10


def test_steps_are_counted_and_may_be_limited():
    source = """
    __global__ void run(float* y, int rounds) {
      float sum = 0.0f;
      for (int i = 0; i < rounds; ++i) sum += i;
      y[threadIdx.x] = sum;
    }
    """
    program = lab.compile(source, "simulator")
    args = [floats(40), 25]
    with step_limit(1000):
        assert program.launch("run", 1, 40, args, trace=True).steps == 40 * 25
    with step_limit(999), pytest.raises(lab.KernelError, match="more steps than it may"):
        program.launch("run", 1, 40, args, trace=True)
    assert program.launch("run", 1, 40, args, trace=True).to_dict()["steps"] == 1000


def test_a_launch_begins_when_the_one_before_it_is_done():
    """What another block wrote in the same launch may be read too early, in an earlier one not."""
    source = """
    __global__ void fill(float* y) { y[blockIdx.x] = blockIdx.x; }
    __global__ void move(float* y, float* z) {
      z[blockIdx.x] = y[gridDim.x - 1 - blockIdx.x];
    }
    extern "C" cudaError_t start(float* y, float* z, cudaStream_t stream) {
      fill<<<8, 1, 0, stream>>>(y);
      move<<<8, 1, 0, stream>>>(y, z);
      fill<<<8, 1, 0, stream>>>(y);
      return cudaGetLastError();
    }
    """
    y, z = floats(8, np.nan), floats(8, np.nan)
    arrays = [Array.of(name, array, written=True) for name, array in (("y", y), ("z", z))]
    report = lab.compile(source, "simulator").call("start", *arrays, trace=True)
    assert report.hazards == ()
    np.testing.assert_array_equal(z, np.arange(8)[::-1])


@pytest.mark.parametrize(
    ("size", "index", "told"),
    [
        (32, "i - 1", "1 bytes before the start of 'a'"),
        (32, "i - 900", "before the start of 'a'"),
        (32, "i + 32", "bytes past the end of 'a'"),
        (33, "i + 33", "bytes past the end of 'a'"),
        (0, "i", "0 bytes past the end of 'a'"),
    ],
)
def test_a_write_beside_a_buffer_is_found_without_a_trace(size, index, told):
    """There is memory up to the next page: nothing stops the write itself."""
    source = f"__global__ void run(float* a) {{ int i = threadIdx.x; a[{index}] = 7; }}"
    a = np.zeros(size, np.float32)
    with pytest.raises(lab.KernelError, match=f"a write outside every buffer: .*{told}.*trace"):
        lab.compile(source, "simulator").launch("run", 1, 1, [a])
    assert (a == 0).all()


def test_what_is_read_beside_a_buffer_is_no_number():
    source = "__global__ void run(float* a, const float* b) { a[0] = b[1]; }"
    a, b = np.zeros(1, np.float32), np.zeros(1, np.float32)
    lab.compile(source, "simulator").launch("run", 1, 1, [a, b])
    assert np.isnan(a[0])
