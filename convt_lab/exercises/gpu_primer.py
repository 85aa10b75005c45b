"""The exercises of the primer on the GPU: requests, banks, and how many blocks fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np

from convt_lab import architectures
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.python import FunctionExercise

__all__ = ["EXERCISES"]

_EACH, _THREADS = 8, 64  # of the first kernel


def _scalings() -> list[Launch]:
    launches = []
    for count in (5, 3 * _EACH * _THREADS - 1, 4 * _EACH * _THREADS):
        x = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        y = np.full(count, np.nan, np.float32)
        # A power of two: there is nothing to round.
        args = (x, y, np.float32(0.5), count)
        grid = math.ceil(count / (_EACH * _THREADS))
        launches.append(Launch(f"{count:,} values", grid, _THREADS, args, 1, 0.5 * x.astype(float)))
    return launches


def _sums() -> list[Launch]:
    launches = []
    for count in (1, 700, 1024):
        x = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        blocks = math.ceil(count / 256)
        terms = np.zeros(256 * blocks)
        terms[:count] = x
        terms = terms.reshape(blocks, 256)
        y = np.full(blocks, np.nan, np.float32)
        exact, scale = terms.sum(axis=1), np.abs(terms).sum(axis=1)
        launches.append(Launch(f"{count:,} values", blocks, 256, (x, y, count), 1, exact, scale))
    return launches


def _judge_blocks(function: Callable) -> tuple[str | None, str]:
    cases = 0
    for (name, sm), registers, shared, threads in product(
        architectures.ARCHITECTURES.items(),
        (32, 40, 73, 100, 255),
        (0, 1_000, 16_300, 17_000, 49_000, 54_940, 65_000, 200_000),
        (32, 96, 128, 256, 288, 1024),
    ):
        room = architectures.occupancy(sm, threads, registers, shared)
        found = function(threads, registers, shared, sm)
        if isinstance(found, bool) or found != room.blocks_per_sm:
            return (
                f"{threads} threads, {registers} registers, {shared:,} bytes on {name}: yours is "
                f"{found!r}, and {room.blocks_per_sm} fit; the limit is "
                f"{' and '.join(room.limited_by)}",
                "",
            )
        cases += 1
    count = len(architectures.ARCHITECTURES)
    return None, f"{cases:,} launches on {count} architectures, each as the package has it"


EXERCISES = (
    KernelExercise(
        name="gpu_primer.1",
        kernel="scale",
        text="""
constexpr int EACH = 8;  // values of a thread

__global__ void scale(const float* x, float* y, float factor, int count) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int j = 0; j < EACH; ++j) {
    const int i = thread * EACH + j;
    if (i < count) y[i] = factor * x[i];
  }
}
""",
        launches=_scalings,
        budgets=(
            Budget("sectors per request", most=4, buffer="x"),
            Budget("sectors per request", most=4, op="store", buffer="y"),
        ),
        edits={
            "  const int thread = blockIdx.x * blockDim.x + threadIdx.x;\n": (
                "  const int first = blockIdx.x * blockDim.x * EACH + threadIdx.x;\n"
            ),
            "thread * EACH + j": "first + j * blockDim.x",
        },
        hints=(
            "For a certain `j`, which values do the lanes of a warp read? How far apart are they?",
            "A thread may have any values, as long as each value has a thread. Which values would "
            "let neighbouring lanes read neighbours in every round of the loop?",
            "Let a block take `blockDim.x * EACH` values in a row, and in round `j` the `j`-th "
            "`blockDim.x` of them.",
        ),
        why="A request is what the lanes of a warp ask for in one round. In the start these are "
        "`EACH` floats apart, so that each lane touches a sector of its own. Now a lane's values "
        "are a block's width apart and those of neighbouring lanes side by side. For one thread by "
        "itself, as on a CPU, the start would be the better order.",
    ),
    KernelExercise(
        name="gpu_primer.2",
        kernel="sums",
        text="""
constexpr int THREADS = 256;  // of a block

// y[b] is the sum of the values of block b. Each step halves the number of sums.
__global__ void sums(const float* x, float* y, int count) {
  __shared__ float words[THREADS];
  const int t = threadIdx.x, i = blockIdx.x * THREADS + t;
  words[t] = i < count ? x[i] : 0.0f;
  __syncthreads();
  for (int step = 1; step < THREADS; step *= 2) {
    const int a = 2 * step * t;
    if (a < THREADS) words[a] += words[a + step];
    __syncthreads();
  }
  if (t == 0) y[blockIdx.x] = words[0];
}
""",
        launches=_sums,
        budgets=(
            Budget("wavefronts per request", most=1, space="shared"),
            Budget("requests", most=100, space="shared"),
        ),
        edits={
            "step = 1; step < THREADS; step *= 2": "step = THREADS / 2; step > 0; step /= 2",
            "    const int a = 2 * step * t;\n": "",
            "if (a < THREADS) words[a] += words[a + step];": (
                "if (t < step) words[t] += words[t + step];"
            ),
        },
        hints=(
            "In the second step lane `t` reads word `4 * t`. Which banks are these, and how many "
            "words does each of them have to give?",
            "It does not matter which two sums are added, only that each step halves their number. "
            "Which pairing lets neighbouring lanes read neighbouring words?",
            "Begin with the two halves of the array: `words[t] += words[t + step]`, with `step` "
            "half of the threads, then a quarter, and so on.",
        ),
        why="Where lanes read every second, fourth or eighth word, a bank has as many words to "
        "give, one after the other. If the second half is added to the first, lanes read side by "
        "side in every step. The order of the additions changes, and with it the rounding. The "
        "budget of requests is what halving needs: a single thread that adds all values has no "
        "conflicts either, and asks far more often.",
    ),
    FunctionExercise(
        name="gpu_primer.3",
        function="blocks_per_sm",
        text='''
def blocks_per_sm(threads, registers, shared_bytes, sm):
    """How many blocks of a kernel fit on an SM at once.

    registers: of a thread. sm: an Architecture, which has
    warps_per_sm, blocks_per_sm    at most, of all kernels
    registers_per_sm               in so many partitions, and a warp's lie in one of them
    partitions
    register_granularity           a warp's registers are rounded up to a multiple of it
    shared_bytes_per_sm
    reserved_shared_bytes          the system's, in each block
    shared_granularity             a block's, with the reserved ones, are rounded up to it
    """
    by_warps = sm.warps_per_sm * 32 // threads
    by_registers = sm.registers_per_sm // (registers * threads)
    return min(by_warps, by_registers)
''',
        edits={
            "    by_warps = sm.warps_per_sm * 32 // threads\n"
            "    by_registers = sm.registers_per_sm // (registers * threads)\n"
            "    return min(by_warps, by_registers)\n": (
                "    def rounded_up(value, multiple):\n"
                "        return -(-value // multiple) * multiple\n"
                "\n"
                "    warps = -(-threads // 32)\n"
                "    of_warp = rounded_up(registers * 32, sm.register_granularity)\n"
                "    in_partition = sm.registers_per_sm // sm.partitions // of_warp\n"
                "    fits = [\n"
                "        sm.blocks_per_sm,\n"
                "        sm.warps_per_sm // warps,\n"
                "        in_partition * sm.partitions // warps,\n"
                "    ]\n"
                "    shared = shared_bytes + sm.reserved_shared_bytes\n"
                "    shared = rounded_up(shared, sm.shared_granularity)\n"
                "    if shared > 0:\n"
                "        fits.append(sm.shared_bytes_per_sm // shared)\n"
                "    return min(fits)\n"
            )
        },
        judge=_judge_blocks,
        hints=(
            "Four things have a limit, and the scarcest decides: blocks, warps, registers and "
            "shared memory. The message says which one it is.",
            "Count registers by warps: first round a warp's up, then ask how many warps fit into "
            "one partition, and from there how many blocks into all.",
            "Shared memory: add what is reserved, round up, divide. On some architectures a block "
            "without any takes none, so mind the division by zero.",
        ),
        why="Everything is handed out in whole pieces: registers to warps, shared memory to "
        "blocks, and blocks to SMs. So occupancy moves in jumps. A register less may change "
        "nothing, and a single byte of shared memory more may cost a block.",
    ),
)
