"""The exercises of the chapter on the naive gather."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from convt_lab import reference
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch, StageExercise
from convt_lab.problem import Problem

__all__ = ["EXERCISES", "rows_of_one_dimension"]


def rows_of_one_dimension(
    sizes: Sequence[tuple[int, int, int]], seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Draw (x, w, exact, scale) for each (size, taps, stride) of a one-dimensional problem."""
    generator = np.random.default_rng(seed)
    rows = []
    for size, taps, stride in sizes:
        x, w = (generator.standard_normal(n).astype(np.float32) for n in (size, taps))
        tensors = (x.reshape(1, 1, 1, -1), w.reshape(1, 1, 1, -1))
        exact = reference.scatter(*tensors, stride=(1, stride)).ravel()
        scale = reference.condition_scale(*tensors, stride=(1, stride)).ravel()
        rows.append((x, w, exact, scale))
    return rows


_SIZES = ((5, 3, 1), (37, 4, 2), (21, 2, 3), (40, 7, 4))


def _scatters() -> list[Launch]:
    launches = []
    for size, taps, stride in _SIZES:
        ((x, w, exact, scale),) = rows_of_one_dimension([(size, taps, stride)])
        y = np.zeros(len(exact), np.float32)
        label = f"{size} inputs, {taps} taps, stride {stride}"
        args = (x, w, y, size, taps, stride)
        launches.append(Launch(label, math.ceil(size / 32), 32, args, 2, exact, scale))
    return launches


def _gathers() -> list[Launch]:
    launches = []
    for size, taps, stride in _SIZES:
        ((x, w, exact, scale),) = rows_of_one_dimension([(size, taps, stride)])
        y = np.full(len(exact), np.nan, np.float32)
        label = f"{size} inputs, {taps} taps, stride {stride}"
        args = (x, w, y, size, taps, stride, len(y))
        launches.append(Launch(label, math.ceil(len(y) / 32), 32, args, 2, exact, scale))
    return launches


EXERCISES = (
    StageExercise(
        name="naive_gather.1",
        stage="naive_gather",
        problems=(
            Problem(2, 2, 4, 5, 3, kernel_size=(2, 3), stride=(2, 3), groups=2, bias=True),
            Problem(1, 2, 2, 30, 58, kernel_size=(3, 7)),
        ),
        budgets=(
            Budget("sectors per request", most=6, buffer="input"),
            Budget("sectors per request", most=4, op="store", buffer="output"),
        ),
        edits={
            "  // oh varies fastest: neighbouring threads are a whole row apart.\n"
            "  const int oh = index % p.out_height;\n"
            "  const int ow = index / p.out_height % p.out_width;\n"
            "  const int co = index / p.out_height / p.out_width": (
                "  // ow varies fastest: neighbouring threads own neighbouring pixels of a row.\n"
                "  const int ow = index % p.out_width;\n"
                "  const int oh = index / p.out_width % p.out_height;\n"
                "  const int co = index / p.out_height / p.out_width"
            )
        },
        hints=(
            "Which of `oh`, `ow`, `co` and `n` differs between the first thread and the second?",
            "An index is taken apart like digits: what is taken first, by `%`, varies fastest.",
            "Let the first two lines take `p.out_width` before `p.out_height`.",
        ),
        why="The digit that is taken first varies fastest. With `ow` first, neighbouring lanes own "
        "neighbouring pixels of a row, and their inputs lie side by side. Nothing else changes, "
        "because each thread still has one output, and each output one thread.",
    ),
    KernelExercise(
        name="naive_gather.2",
        kernel="scatter_1d",
        text="""
// One thread for each input: it stamps. y is zero before the launch.
__global__ void scatter_1d(const float* x, const float* w, float* y,
                           int size, int taps, int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's input
  if (i >= size) return;
  for (int k = 0; k < taps; ++k) {
    y[i * stride + k] += x[i] * w[k];
  }
}
""",
        launches=_scatters,
        edits={"y[i * stride + k] += x[i] * w[k];": "atomicAdd(&y[i * stride + k], x[i] * w[k]);"},
        hints=(
            "Two threads whose stamps overlap add to the same output. What if both read it before "
            "either writes?",
            "Reading, adding and writing must be one operation that nothing comes between.",
            "`atomicAdd(&y[o], value)` is such an operation.",
        ),
        why="`atomicAdd` reads, adds and writes without a gap. `y` must be zero before the launch, "
        "for it is added to. The result depends on the order of the additions, and float addition "
        "is not associative: on a GPU two runs may differ in the last bits. The simulator runs the "
        "threads one after the other, so even the start has right values there; the hazard says "
        "that it is luck.",
    ),
    KernelExercise(
        name="naive_gather.3",
        kernel="gather_1d",
        text="""
__global__ void gather_1d(const float* x, const float* w, float* y,
                          int size, int taps, int stride, int out_size) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's output
  if (o >= out_size) return;
  float sum = 0.0f;
  for (int k = 0; k < taps; ++k) {
    if ((o - k) % stride != 0) continue;  // tap k does not reach this output
    const int i = (o - k) / stride;
    if (i < 0 || i >= size) continue;     // no such input
    sum = fmaf(x[i], w[k], sum);
  }
  y[o] = sum;
}
""",
        launches=_gathers,
        budgets=(Budget("iterations of loops", most=300),),
        whole="""
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
        hints=(
            "The taps that reach an output are a residue class: which tap is its first, if the "
            "dilation is one?",
            "Begin the loop there, and step by `stride`.",
            "The first tap is `o % stride` and its input `o / stride`. From one tap to the next "
            "the input falls by one.",
        ),
        why="With dilation 1 the class of output `o` is `o % stride`: start there and step by "
        "`stride`. The input of the first tap is `o / stride`, computed once; from one tap to the "
        "next it falls by one. No division is left in the loop, and no attempt is in vain but "
        "those at the rim.",
    ),
)
