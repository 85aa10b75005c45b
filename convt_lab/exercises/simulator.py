"""The exercises of the appendix on the simulator."""

from __future__ import annotations

import functools

import numpy as np

from convt_lab.exercises.cuda import KernelExercise, Launch
from convt_lab.exercises.python import NumbersExercise
from convt_lab.program import compile as compile_source

__all__ = ["EXERCISES"]

_PAIRS = """
__global__ void pairs(const float2* x, float2* y, int stride) {
  __shared__ float2 tile[8 * 31 + 1];
  for (int i = threadIdx.x; i < 8 * 31 + 1; i += 32) tile[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
"""


@functools.cache
def _count_pairs() -> tuple[float, ...]:
    program = compile_source(_PAIRS, "simulator", name="exercise")
    x, y = np.zeros((249, 2), np.float32), np.zeros((32, 2), np.float32)
    counts = []
    for stride in range(1, 9):
        report = program.launch("pairs", 1, 32, [x, y, stride], trace=True)
        counts.append(report.totals["shared_load_wavefronts"])
    return tuple(counts)


def _neighbours() -> list[Launch]:
    launches = []
    for seed in range(2):
        x = np.random.default_rng(seed).integers(-9, 10, (3, 64)).astype(np.float32)
        y = np.full(64, np.nan, np.float32)
        exact = np.roll(x, -1, axis=1).sum(axis=0).astype(np.float64)
        launches.append(Launch(f"three rows, draw {seed}", 1, 64, (x, y), 1, exact))
    return launches


def _sums() -> list[Launch]:
    launches = []
    for rows, count in ((1, 64), (3, 50), (2, 1)):
        x = np.random.default_rng(count).integers(-9, 10, (rows, count)).astype(np.float32)
        y = np.full(rows, np.nan, np.float32)
        exact = x.sum(axis=1).astype(np.float64)
        launches.append(Launch(f"{rows} rows of {count}", rows, 64, (x, y, count), 1, exact))
    return launches


EXERCISES = (
    NumbersExercise(
        name="simulator.1",
        labels=tuple(f"wavefronts at stride {stride}" for stride in range(1, 9)),
        guess=(2,) * 8,
        values=(2, 4, 2, 8, 2, 4, 2, 16),
        count=_count_pairs,
        hints=(
            "A `float2` is eight bytes, so the two halves of the warp are served one after the "
            "other: two wavefronts at least.",
            "Sixteen pairs lie side by side in the banks. How many lanes of a half want a pair "
            "from the same place, in different rows?",
            "Lane l wants place `l * stride % 16`. A stride with a factor of two uses half of the "
            "places, with a factor of four a quarter.",
        ),
        why="Each half of the warp takes at least one wavefront. The banks hold sixteen pairs side "
        "by side, and a half has sixteen lanes: the multiples of the stride must differ modulo "
        "sixteen. They do exactly if the stride is odd. Each factor of two halves the places that "
        "are used, and doubles the wavefronts.",
    ),
    KernelExercise(
        name="simulator.2",
        kernel="neighbours",
        text="""
__global__ void neighbours(const float* x, float* y) {
  __shared__ float tile[64];
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    tile[threadIdx.x] = x[64 * i + threadIdx.x];
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % 64];
  }
  y[threadIdx.x] = sum;
}
""",
        launches=_neighbours,
        edits={
            "    sum += tile[(threadIdx.x + 1) % 64];\n": (
                "    sum += tile[(threadIdx.x + 1) % 64];\n    __syncthreads();\n"
            )
        },
        hints=(
            "The report names two lines: one writes too early, the other reads too late.",
            "A thread that is quick begins the next round. What keeps it from overwriting what a "
            "slow one has not read?",
            "A second barrier, at the end of the loop's body. Or two tiles in turn, and no second "
            "barrier.",
        ),
        why="A barrier at the end of the body keeps the quick threads from overwriting what others "
        "still read. Two tiles in turn do it as well, at the price of shared memory: the tile that "
        "a quick thread fills is not the one that slow threads read, and before it comes back to "
        "the first it has to pass the barrier of the round between.",
    ),
    KernelExercise(
        name="simulator.3",
        kernel="row_sums",
        text="""
// Block b sums the `count` values of row b, at most 64, by halves. A block has 64 threads.
__global__ void row_sums(const float* x, float* y, int count) {
  __shared__ float part[64];
  if (threadIdx.x >= count) return;
  part[threadIdx.x] = x[blockIdx.x * count + threadIdx.x];
  for (int half = 32; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}
""",
        launches=_sums,
        edits={
            "  if (threadIdx.x >= count) return;\n"
            "  part[threadIdx.x] = x[blockIdx.x * count + threadIdx.x];\n": (
                "  const bool exists = threadIdx.x < count;\n"
                "  part[threadIdx.x] = exists ? x[blockIdx.x * count + threadIdx.x] : 0.0f;\n"
            )
        },
        hints=(
            "It is right for rows of sixty-four. What do the threads without a value do, and what "
            "is in their words of `part`?",
            "A thread that has returned arrives at no barrier, and its word is never written.",
            "Let every thread write a word, zero if it has no value, and let none return early.",
        ),
        why="Threads without a value returned, so they missed the barriers and left their words "
        "unwritten, and others added those. A thread with nothing to do still has to write its "
        "zero and to arrive.",
    ),
)
