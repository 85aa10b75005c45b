"""The exercises of the chapter on float32 from tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from convt_lab import reference
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.python import FunctionExercise
from convt_lab.exercises.tensor_core import PRODUCT, products
from convt_lab.split import FORMATS, matrix_product, pairs_of

__all__ = ["EXERCISES"]


def _judge_split(function: Callable) -> tuple[str | None, str]:
    tf32 = FORMATS["tf32"]
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(4096) * 10.0 ** generator.integers(-5, 6, 4096)).astype(
        np.float32
    )
    parts = [np.asarray(part) for part in function(values, tf32.round)]
    if len(parts) != 2:
        return f"it returns {len(parts)} parts and should return two", ""
    for name, part in zip(("high", "low"), parts, strict=True):
        if part.shape != values.shape or part.dtype != np.float32:
            return f"the {name} part is {part.dtype} of shape {list(part.shape)}", ""
        wrong = part != tf32.round(part)
        if wrong.any():
            at = int(np.argmax(wrong))
            return (
                f"the {name} part of {values[at]:.9g} is {part[at]:.9g}, which is no TF32 number; "
                f"the nearest is {tf32.round(part)[at]:.9g}",
                "",
            )
    missing = np.abs(parts[0].astype(np.float64) + parts[1] - values)
    units = missing / (reference.UNIT_ROUNDOFF * np.abs(values))
    if not (units.max() <= 2):
        at = int(np.argmax(units))
        return (
            f"{values[at]:.9g} is split into {parts[0][at]:.9g} and {parts[1][at]:.9g}: "
            f"{units[at]:,.1f} units of a float32's rounding are missing, and 2 may be",
            "",
        )
    return None, f"both parts are TF32, and at most {units.max():.2f} units are missing"


def _error(pairs: Sequence[tuple[int, int]], parts: int) -> float:
    """Return the condition error of a product of positive matrices, from bfloat16 parts."""
    generator = np.random.default_rng(1)
    a = np.abs(generator.standard_normal((16, 1344))).astype(np.float32)
    b = np.abs(generator.standard_normal((1344, 16))).astype(np.float32)
    c = matrix_product(a, b, FORMATS["bfloat16"], parts, interval=7, pairs=pairs)
    exact = a.astype(np.float64) @ b
    return float(np.max(np.abs(c - exact) / exact) / reference.UNIT_ROUNDOFF)


def _judge_pairs(function: Callable) -> tuple[str | None, str]:
    parts = 3
    pairs = [tuple(int(i) for i in pair) for pair in function(parts)]
    for pair in pairs:
        if len(pair) != 2 or not all(0 <= i < parts for i in pair) or pairs.count(pair) > 1:
            return f"{pair} must be a pair of different places below {parts}, and there once", ""
    most = len(pairs_of(parts))
    lines = [f"at most {most} products; yours: {len(pairs)}"]
    error = _error(pairs, parts)
    gate = reference.FLOAT32_GATE
    lines.append(f"condition error at most {gate:g}; yours: {error:,.1f}")
    text = "\n".join(lines)
    return (None, text) if len(pairs) <= most and error <= gate else (text, "")


def _reals() -> list[Launch]:
    generator = np.random.default_rng(0)
    return products((8, 40), lambda shape: generator.standard_normal(shape).astype(np.float32))


EXERCISES = (
    FunctionExercise(
        name="tensor_core_split.1",
        function="split_in_two",
        text='''
def split_in_two(values, round_tf32):
    """Two TF32 parts of float32 values; round_tf32 rounds an array to TF32."""
    high = round_tf32(values)
    low = values - high
    return high, low
''',
        edits={"low = values - high": "low = round_tf32(values - high)"},
        judge=_judge_split,
        hints=(
            "The difference is exact. But does TF32 hold it?",
            "What rounding took away has up to thirteen digits, and TF32 has eleven.",
            "Round the difference as well.",
        ),
        why="The difference is exact in float32 and has more digits than a TF32: a tensor core "
        "would cut them off. Rounded, they are lost too, but by half as much, and to either side. "
        "Two parts of eleven digits, with signs of their own, hold nearly all of the twenty-four.",
    ),
    FunctionExercise(
        name="tensor_core_split.2",
        function="pairs",
        text='''
def pairs(parts):
    """Which parts of the two operands are multiplied, and in which order they are summed."""
    return [(i, j) for i in range(parts) for j in range(parts)]
''',
        whole='''
def pairs(parts):
    """Which parts of the two operands are multiplied, and in which order they are summed."""
    kept = [(i, j) for i in range(parts) for j in range(parts - i)]
    return sorted(kept, key=lambda pair: -sum(pair))
''',
        judge=_judge_pairs,
        hints=(
            "The product of parts i and j is the smaller, the larger i + j is. Which are as small "
            "as what three parts leave out?",
            "Leave out those with i + j of three or more. Then think of the order: a tensor core "
            "cuts each sum off at its own last digit.",
            "The smallest products first, so that they are cut off at their own last digits, far "
            "below those of the whole.",
        ),
        why="Products with i + j of three or more are below a float32's last digit: six are left. "
        "Once the large product is in the sum, every instruction that follows cuts off at that "
        "sum's last digit. Summed first, the small ones are cut off at their own.",
    ),
    KernelExercise(
        name="tensor_core_split.3",
        kernel="product",
        min_capability=(8, 0),
        text=PRODUCT,
        launches=_reals,
        budgets=(
            Budget("FMAs", most=0),
            Budget("multiply-adds of tensor cores", most=3 * 16 * 8 * 40),
        ),
        whole="""
#include "mma.cuh"

struct Parts {
  uint32_t high, low;
};

__device__ Parts split_in_two(float value) {
  const uint32_t high = to_tf32(value).bits;
  return {high, to_tf32(value - __uint_as_float(high)).bits};
}

// C [16, 8] is A [16, depth] times B [depth, 8], by one warp; depth is a multiple of 8.
__global__ void product(const float* a, const float* b, float* c, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {};
  for (int k = 0; k < depth; k += 8) {
    const float* const row = a + g * depth + k + t;
    const float* const column = b + (k + t) * 8 + g;
    const Parts rows[4] = {split_in_two(row[0]), split_in_two(row[8 * depth]),
                           split_in_two(row[4]), split_in_two(row[8 * depth + 4])};
    const Parts columns[2] = {split_in_two(column[0]), split_in_two(column[4 * 8])};
    const uint32_t a_high[4] = {rows[0].high, rows[1].high, rows[2].high, rows[3].high};
    const uint32_t a_low[4] = {rows[0].low, rows[1].low, rows[2].low, rows[3].low};
    const uint32_t b_high[2] = {columns[0].high, columns[1].high};
    const uint32_t b_low[2] = {columns[0].low, columns[1].low};
    float part[4] = {};
    mma<Tf32>(part, a_low, b_high);
    mma<Tf32>(part, a_high, b_low);
    mma<Tf32>(part, a_high, b_high);
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
""",
        hints=(
            "Split every value into two TF32 parts, as in the first exercise: `to_tf32(value)`, "
            "and `to_tf32` of what is left. `__uint_as_float` makes a float of its bits.",
            "Three products: low times high, high times low, high times high, in this order.",
            "Let the tensor cores sum the three products of eight k into an array of their own, "
            "and add that to `sum` with an ordinary addition.",
        ),
        why="Two parts and three products miss a few units in the worst product. The ordinary "
        "addition rounds where the tensor cores would cut off: that is the promotion. The product "
        "of the two low parts is left out.",
    ),
)
