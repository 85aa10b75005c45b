"""The exercises of the chapter on coalesced requests."""

from __future__ import annotations

import math

import numpy as np

from convt_lab.exercises.cuda import Budget, KernelExercise, Launch, StageExercise
from convt_lab.exercises.naive_gather import rows_of_one_dimension
from convt_lab.exercises.python import NumbersExercise
from convt_lab.problem import Problem
from convt_lab.stages import stages

__all__ = ["EXERCISES"]


def _count_at_stride_8() -> tuple[float, float]:
    """Sectors for a request of the input and of the weight, in one block in a row's middle."""
    problem = Problem(height=4, width=64, kernel_size=(1, 16), stride=(1, 8))
    x, weight, _ = problem.random_inputs()
    report = stages["coalesced"].profile(x, weight, **problem.arguments, blocks=[3])
    sites = {site.buffer: site for site in report.sites if site.op == "load"}
    return tuple(sites[name].sectors / sites[name].requests for name in ("input", "weight"))


def _gathers() -> list[Launch]:
    launches = []
    for size, taps, stride in ((9, 3, 1), (50, 7, 3), (257, 5, 4)):
        ((x, w, exact, scale),) = rows_of_one_dimension([(size, taps, stride)])
        y = np.full(len(exact), np.nan, np.float32)
        label = f"{size} inputs, {taps} taps, stride {stride}"
        # Enough threads for whole classes, each as long as the longest.
        blocks = math.ceil(stride * math.ceil(len(y) / stride) / 64) + stride
        args = (x, w, y, size, taps, stride, len(y))
        launches.append(Launch(label, blocks, 64, args, 2, exact, scale))
    return launches


EXERCISES = (
    NumbersExercise(
        name="coalesced.1",
        labels=("sectors for a request of the input", "sectors for a request of the weight"),
        guess=(4.5, 1.0),
        values=(1.25, 1.0),
        count=_count_at_stride_8,
        hints=(
            "Which input does the first lane's first tap meet, and which the last lane's?",
            "Thirty-two outputs lie above four inputs. Four floats that begin at a multiple of "
            "four lie in one sector. Each lane has a second tap: which inputs does that meet?",
            "For the second tap all inputs are one further left. Every other warp then needs two "
            "sectors. And all lanes together want eight neighbouring weights.",
        ),
        why="The lanes' outputs lie above four inputs, half a sector. For the second tap they lie "
        "one further left: of every other warp in two sectors, of the rest still in one. The mean "
        "is that of one, one, one and two. The lanes are spread over all eight residue classes, so "
        "they want eight different weights. These lie side by side and are one aligned sector: the "
        "broadcast is gone, and costs nothing here.",
    ),
    StageExercise(
        name="coalesced.2",
        stage="coalesced",
        spoilt={
            "constexpr int TILE_H = 4; ": "constexpr int TILE_H = 32; ",
            "constexpr int TILE_W = 64; ": "constexpr int TILE_W = 8; ",
            'static_assert(TILE_W % 32 == 0, "a warp\'s lanes must lie in one row");\n': "",
            "tile / tiles_w * TILE_H + threadIdx.y;": "tile / tiles_w * TILE_H + threadIdx.x;",
            "tile % tiles_w * TILE_W + threadIdx.x;": "tile % tiles_w * TILE_W + threadIdx.y;",
            "dim3(TILE_W, TILE_H)": "dim3(TILE_H, TILE_W)",
        },
        edits={
            "constexpr int TILE_H = 32; ": "constexpr int TILE_H = 4; ",
            "constexpr int TILE_W = 8; ": "constexpr int TILE_W = 64; ",
            "tile / tiles_w * TILE_H + threadIdx.x;": "tile / tiles_w * TILE_H + threadIdx.y;",
            "tile % tiles_w * TILE_W + threadIdx.y;": "tile % tiles_w * TILE_W + threadIdx.x;",
            "dim3(TILE_H, TILE_W)": "dim3(TILE_W, TILE_H)",
        },
        problems=(
            Problem(2, 2, 4, 5, 3, kernel_size=(2, 3), stride=(2, 3), groups=2, bias=True),
            Problem(1, 2, 2, 30, 122, kernel_size=(3, 7)),
        ),
        budgets=(
            Budget("sectors per request", most=5, buffer="input"),
            Budget("sectors per request", most=4, op="store", buffer="output"),
        ),
        hints=(
            "A warp is thirty-two neighbours in `threadIdx.x` first. Which pixels are they here?",
            "`threadIdx.x` runs from `0` to `blockDim.x - 1`, and the launcher chooses `blockDim`: "
            "swap `threadIdx.x` and `threadIdx.y` in the kernel, and the sizes in the `dim3`.",
            "Then a warp is as wide as the tile, if that is narrower than a warp. Make it wider, "
            "with as many outputs as before.",
        ),
        why="The lanes are numbered along `threadIdx.x` first, and that ran down the tile's "
        "columns. It must run along the width, and the block must be `TILE_W` long in that "
        "direction. With eight columns a warp would still cover four rows, so the tile is made as "
        "wide as two warps. The values were right all the time; only the counters tell.",
    ),
    KernelExercise(
        name="coalesced.3",
        kernel="gather_1d",
        text="""
// Stride and taps are the launch's. There are more threads than outputs: those without one return.
// Blocks have 64 threads, and there are enough blocks for whole warps of each residue class.
__global__ void gather_1d(const float* x, const float* w, float* y,
                          int size, int taps, int stride, int out_size) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's output
  if (o >= out_size) return;
  float sum = 0.0f;
  int i = o / stride;
  for (int k = o % stride; k < taps; k += stride, --i) {
    if (i >= 0 && i < size) sum = fmaf(x[i], w[k], sum);
  }
  y[o] = sum;
}
""",
        launches=_gathers,
        budgets=(Budget("requests", most=48, buffer="w"),),
        edits={
            "  const int o = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's output\n"
            "  if (o >= out_size) return;\n": (
                "  // Whole blocks own outputs of one class: q, q + stride, q + 2 * stride, ...\n"
                "  const int blocks = ((out_size + stride - 1) / stride + blockDim.x - 1)"
                " / blockDim.x;\n"
                "  const int q = blockIdx.x / blocks;\n"
                "  const int place = blockIdx.x % blocks * blockDim.x + threadIdx.x;\n"
                "  const int o = place * stride + q;\n"
                "  if (q >= stride || o >= out_size) return;\n"
            )
        },
        hints=(
            "At stride 4 and five taps, one class has two taps and the others one. How many rounds "
            "does a warp take whose lanes are of all classes?",
            "Let all threads of a block own outputs of one class. Then neighbours are `stride` "
            "outputs apart, and neighbours in their inputs.",
            "Count the blocks that a class needs, `blocks`. Then `blockIdx.x / blocks` is the "
            "class, and the rest numbers the outputs within it.",
        ),
        why="A warp takes as many rounds as its longest lane. With lanes of all classes that is "
        "two rounds here, for every warp; with lanes of one class it is two for one class of four, "
        "and one for the others. The inputs of a warp are now neighbours, too, and its weight is "
        "one. The price is paid at the store, where neighbouring lanes are `stride` outputs apart: "
        "print the result's `report` to see it.",
    ),
)
