"""The exercises of the chapter on shared memory."""

from __future__ import annotations

import math

import numpy as np

from convt_lab.exercises.cuda import Budget, KernelExercise, Launch, StageExercise
from convt_lab.exercises.naive_gather import rows_of_one_dimension
from convt_lab.problem import Problem

__all__ = ["EXERCISES"]


def _transposes() -> list[Launch]:
    launches = []
    generator = np.random.default_rng(0)
    for rows, columns in ((5, 3), (33, 50), (64, 96)):
        x = generator.standard_normal((rows, columns)).astype(np.float32)
        y = np.full((columns, rows), np.nan, np.float32)
        grid = (math.ceil(columns / 32), math.ceil(rows / 32))
        args = (x, y, rows, columns)
        exact = x.T.astype(np.float64)
        launches.append(Launch(f"a matrix of {rows}×{columns}", grid, (32, 8), args, 1, exact))
    return launches


def _tiled() -> list[Launch]:
    launches = []
    for size in (3, 100, 505):
        ((x, w, exact, scale),) = rows_of_one_dimension([(size, 9, 1)])
        y = np.full(len(exact), np.nan, np.float32)
        blocks = math.ceil(len(y) / 64)
        args = (x, w, y, size, len(y))
        launches.append(Launch(f"{size} inputs, 9 taps", blocks, 64, args, 2, exact, scale))
    return launches


_BARRIER = """          w_of_ci += chunk.kh * chunk.kw;
        }
        __syncthreads();
"""

EXERCISES = (
    StageExercise(
        name="shared_tiled.1",
        stage="shared_tiled",
        spoilt={_BARRIER: _BARRIER.replace("        __syncthreads();\n", "")},
        edits={_BARRIER.replace("        __syncthreads();\n", ""): _BARRIER},
        problems=(
            Problem(1, 2, 4, 5, 3, kernel_size=(2, 3), stride=(2, 3), groups=2, bias=True),
            Problem(1, 20, 1, 9, 11, kernel_size=(3, 3)),
        ),
        hints=(
            "A race has two lines. The one writes, the other reads: what is written too early?",
            "There is a barrier between filling a tile and using it. Is there one between using it "
            "and filling it again?",
            "Put `__syncthreads();` behind the loop over the channels of a chunk.",
        ),
        why="With more channels than fit into one pass, a quick thread begins to fill the tile for "
        "the next pass while a slow one still reads this one. Every tile that is filled again "
        "needs two barriers: before it is used, and after. With few channels there is only one "
        "pass, so a test with few channels sees nothing.",
    ),
    KernelExercise(
        name="shared_tiled.2",
        kernel="transpose",
        text="""
constexpr int TILE = 32, ROWS = 8;  // a block is 32 x 8 threads

// y [columns, rows] is x [rows, columns], turned, by way of a tile in shared memory.
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[TILE][TILE];
  const int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    const int row = row0 + i, column = column0 + threadIdx.x;
    if (row < rows && column < columns) tile[i][threadIdx.x] = x[row * columns + column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < TILE; i += ROWS) {
    const int row = row0 + threadIdx.x, column = column0 + i;
    if (row < rows && column < columns) y[column * rows + row] = tile[threadIdx.x][i];
  }
}
""",
        launches=_transposes,
        budgets=(
            Budget("wavefronts per request", most=1, space="shared"),
            Budget("sectors per request", most=4, op="store", buffer="y"),
        ),
        edits={"tile[TILE][TILE];": "tile[TILE][TILE + 1];"},
        hints=(
            "Which words do the lanes of a warp read in the second loop, and in which banks do "
            "they lie?",
            "They read a column. Its words are a row apart, and a row is as long as there are "
            "banks.",
            "Make the rows of the tile one word longer than they need to be.",
        ),
        why="The lanes read a column, whose words were as far apart as there are banks: all in one "
        "bank, served one after the other. With rows one word longer each lane's word lies one "
        "bank further than its neighbour's. Reading rows and writing columns of `y` directly would "
        "need no tile, and would touch as many sectors as lanes for each store.",
    ),
    KernelExercise(
        name="shared_tiled.3",
        kernel="gather_1d",
        text="""
constexpr int THREADS = 64, TAPS = 9;

// Stride 1: y[o] is the sum over k of x[o - k] * w[k]. A block has 64 threads.
__global__ void gather_1d(const float* x, const float* w, float* y, int size, int out_size) {
  const int o = blockIdx.x * THREADS + threadIdx.x;
  if (o >= out_size) return;
  float sum = 0.0f;
  for (int k = 0; k < TAPS; ++k) {
    const int i = o - k;
    if (i >= 0 && i < size) sum = fmaf(x[i], w[k], sum);
  }
  y[o] = sum;
}
""",
        launches=_tiled,
        budgets=(Budget("FMAs per load", least=7, buffer="x"),),
        whole="""
constexpr int THREADS = 64, TAPS = 9;

// Stride 1: y[o] is the sum over k of x[o - k] * w[k]. A block has 64 threads.
__global__ void gather_1d(const float* x, const float* w, float* y, int size, int out_size) {
  __shared__ float tile[THREADS + TAPS - 1];
  const int first = blockIdx.x * THREADS, o = first + threadIdx.x;
  for (int j = threadIdx.x; j < THREADS + TAPS - 1; j += THREADS) {
    const int i = first - (TAPS - 1) + j;
    tile[j] = i >= 0 && i < size ? x[i] : 0.0f;
  }
  __syncthreads();
  if (o >= out_size) return;
  float sum = 0.0f;
  for (int k = 0; k < TAPS; ++k) sum = fmaf(tile[threadIdx.x + TAPS - 1 - k], w[k], sum);
  y[o] = sum;
}
""",
        hints=(
            "Which inputs do the outputs of a block reach through nine taps?",
            "From `first - (TAPS - 1)` to `first + THREADS - 1`, where `first` is the block's "
            "first output. Bring them into a `__shared__` array, some threads two of them.",
            "The barrier must come before any thread returns. Outside the row, put zeros.",
        ),
        why="A block needs a few more inputs than it has outputs, the halo, and asks for each of "
        "them once. Threads without an output return behind the barrier, not before it: they help "
        "to load, and all must arrive. With zeros beyond the row the loop needs no test; where a "
        "weight can be infinite, as in the stages, that would be wrong.",
    ),
)
