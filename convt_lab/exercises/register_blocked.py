"""The exercises of the chapter on register blocking."""

from __future__ import annotations

import math

import numpy as np

from convt_lab.exercises.cuda import Budget, KernelExercise, Launch, StageExercise
from convt_lab.exercises.naive_gather import rows_of_one_dimension
from convt_lab.problem import Problem

__all__ = ["EXERCISES"]


def _windows() -> list[Launch]:
    launches = []
    for size in (2, 75, 506):
        ((x, w, exact, scale),) = rows_of_one_dimension([(size, 7, 1)])
        y = np.full(len(exact), np.nan, np.float32)
        blocks = math.ceil(len(y) / 64)
        args = (x, w, y, size, len(y))
        launches.append(Launch(f"{size} inputs, 7 taps", blocks, 64, args, 2, exact, scale))
    return launches


def _products() -> list[Launch]:
    launches = []
    generator = np.random.default_rng(0)
    for c_in, c_out, pixels in ((1, 1, 1), (3, 6, 37), (8, 16, 128)):
        x = generator.standard_normal((c_in, pixels)).astype(np.float32)
        w = generator.standard_normal((c_in, c_out)).astype(np.float32)
        y = np.full((c_out, pixels), np.nan, np.float32)
        exact = w.T.astype(np.float64) @ x
        scale = np.abs(w.T).astype(np.float64) @ np.abs(x)
        blocks = math.ceil(y.size / 64)
        label = f"{c_in} input channels, {c_out} output channels, {pixels} pixels"
        args = (x, w, y, c_in, c_out, pixels)
        launches.append(Launch(label, blocks, 64, args, 2, exact, scale))
    return launches


EXERCISES = (
    StageExercise(
        name="register_blocked.1",
        stage="register_blocked",
        spoilt={
            "THREAD_W = 12;           // neighbouring": "THREAD_W = 16;           // neighbouring",
            "  // 8 lanes read 16 bytes each, THREAD_W words apart: all banks once.\n"
            "  static_assert(THREAD_W % 8 == 4, "
            '"an odd number of 16-byte words from lane to lane");\n': "",
        },
        edits={
            "THREAD_W = 16;           // neighbouring": "THREAD_W = 12;           // neighbouring",
        },
        problems=(
            Problem(1, 2, 3, 4, 5, kernel_size=(3, 7), bias=True),
            Problem(1, 3, 8, 6, 24, kernel_size=(3, 7)),
        ),
        budgets=(
            Budget("wavefronts per request", most=2.5, space="shared"),
            Budget("FMAs per load", least=20, space="shared"),
        ),
        hints=(
            "Lanes read windows that begin `THREAD_W` words apart, sixteen bytes at a time, and "
            "eight lanes are served together. In which banks do their pieces lie?",
            "Count in pieces of sixteen bytes: there are eight places for them side by side. Lanes "
            "an even number of pieces apart leave half of the places empty, or more.",
            "Which multiples of four are odd multiples? The window is in whole vectors and a pair "
            "for all of them.",
        ),
        why="Eight lanes, each `THREAD_W / 4` pieces further on, get eight different places if and "
        "only if that number is odd: twelve, twenty and twenty-eight keep both budgets. With "
        "four there are too few FMAs for a load. With thirty-six so many of the loads are windows, "
        "at four wavefronts each, that the mean passes the first budget.",
    ),
    KernelExercise(
        name="register_blocked.2",
        kernel="gather_1d",
        text="""
constexpr int TAPS = 7;

// Stride 1: y[o] is the sum over k of x[o - k] * w[k]. There is a thread for each output; it is all
// right to leave most of them without work.
__global__ void gather_1d(const float* x, const float* w, float* y, int size, int out_size) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x;
  if (o >= out_size) return;
  float sum = 0.0f;
  for (int k = 0; k < TAPS; ++k) {
    const int i = o - k;
    if (i >= 0 && i < size) sum = fmaf(x[i], w[k], sum);
  }
  y[o] = sum;
}
""",
        launches=_windows,
        budgets=(Budget("FMAs per load", least=1.5),),
        whole="""
constexpr int TAPS = 7, THREAD_W = 4, WINDOW = THREAD_W + TAPS - 1;

// Stride 1: y[o] is the sum over k of x[o - k] * w[k]. A thread owns THREAD_W neighbours.
__global__ void gather_1d(const float* x, const float* w, float* y, int size, int out_size) {
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * THREAD_W;
  if (first >= out_size) return;
  float window[WINDOW];
#pragma unroll
  for (int j = 0; j < WINDOW; ++j) {
    const int i = first - (TAPS - 1) + j;
    window[j] = i >= 0 && i < size ? x[i] : 0.0f;
  }
  float sum[THREAD_W] = {};
#pragma unroll
  for (int k = 0; k < TAPS; ++k) {
    const float weight = w[k];
#pragma unroll
    for (int j = 0; j < THREAD_W; ++j) sum[j] = fmaf(window[j + TAPS - 1 - k], weight, sum[j]);
  }
#pragma unroll
  for (int j = 0; j < THREAD_W; ++j) {
    if (first + j < out_size) y[first + j] = sum[j];
  }
}
""",
        hints=(
            "Let a thread own four neighbouring outputs. Which inputs do they need, all taps "
            "together?",
            "Ten inputs, a window: load it into `float window[10]` first, with zeros outside the "
            "row. Then each weight is loaded once and used four times.",
            "Output `first + j` multiplies tap `k` with `window[j + TAPS - 1 - k]`.",
        ),
        why="A window of ten inputs serves four outputs, and so does each weight: fewer than a "
        "third of the start's loads. All indices into `window` and `sum` are constants once the "
        "loops are unrolled, so both can live in registers.",
    ),
    KernelExercise(
        name="register_blocked.3",
        kernel="pointwise",
        text="""
// A transposed convolution with a 1x1 kernel is a matrix product:
// x [C_in, pixels], w [C_in, C_out], y [C_out, pixels]. There is a thread for each output; it is
// all right to leave most of them without work.
__global__ void pointwise(const float* x, const float* w, float* y,
                          int c_in, int c_out, int pixels) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= c_out * pixels) return;
  const int co = index / pixels, pixel = index % pixels;
  float sum = 0.0f;
  for (int ci = 0; ci < c_in; ++ci) {
    sum = fmaf(x[ci * pixels + pixel], w[ci * c_out + co], sum);
  }
  y[index] = sum;
}
""",
        launches=_products,
        budgets=(Budget("FMAs per load", least=1.5),),
        whole="""
constexpr int THREAD_CO = 4, THREAD_W = 4;

// x [C_in, pixels], w [C_in, C_out], y [C_out, pixels]. A thread owns THREAD_CO x THREAD_W outputs.
// Neighbouring lanes own neighbouring pixels; a lane's own pixels are a stretch apart.
__global__ void pointwise(const float* x, const float* w, float* y,
                          int c_in, int c_out, int pixels) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  const int stretch = (pixels + THREAD_W - 1) / THREAD_W;
  const int first_co = index / stretch * THREAD_CO, first = index % stretch;
  if (first_co >= c_out) return;
  float sum[THREAD_CO][THREAD_W] = {};
  for (int ci = 0; ci < c_in; ++ci) {
    float inputs[THREAD_W], weights[THREAD_CO];
#pragma unroll
    for (int j = 0; j < THREAD_W; ++j) {
      const int pixel = first + j * stretch;
      inputs[j] = pixel < pixels ? x[ci * pixels + pixel] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < THREAD_CO; ++q) {
      weights[q] = first_co + q < c_out ? w[ci * c_out + first_co + q] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < THREAD_CO; ++q) {
#pragma unroll
      for (int j = 0; j < THREAD_W; ++j) sum[q][j] = fmaf(inputs[j], weights[q], sum[q][j]);
    }
  }
  for (int q = 0; q < THREAD_CO && first_co + q < c_out; ++q) {
    for (int j = 0; j < THREAD_W && first + j * stretch < pixels; ++j) {
      y[(first_co + q) * pixels + first + j * stretch] = sum[q][j];
    }
  }
}
""",
        hints=(
            "A thread that owns four pixels of four channels does sixteen FMAs with how many loads "
            "for each input channel?",
            "Keep `float sum[4][4]`. For each `ci` load four inputs and four weights, and multiply "
            "each with each.",
            "Where channels or pixels run out, load zeros, and store only outputs that exist.",
        ),
        why="Four inputs and four weights make sixteen FMAs: a quarter of the start's loads. "
        "Loads add, work multiplies. The solution lets a lane's own pixels lie a stretch apart, so "
        "that neighbouring lanes still ask for neighbouring inputs.",
    ),
)
