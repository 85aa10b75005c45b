"""The exercises of the chapter on tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.program import compile as compile_source
from convt_lab.split import FORMATS

__all__ = ["EXERCISES", "PRODUCT"]

# A warp stores the halves of 32 rows, 16 bytes a lane, and loads the rows as the instruction wants
# them, 8 bytes a lane.
_OPERANDS = """
__global__ void operands(const float4* x, const int* place, float2* y) {
  __shared__ float4 tile[64];
  const int lane = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    tile[place[2 * lane + half] / 4] = x[2 * lane + half];
  }
  __syncthreads();
  for (int first = 0; first < 32; first += 8) {
    const int row = first + lane / 4, t = lane % 4;
    y[4 * row + t] =
        reinterpret_cast<const float2*>(tile)[place[2 * row + t / 2] / 2 + t % 2];
  }
}
"""


def _judge_place(function: Callable) -> tuple[str | None, str]:
    places = [function(row, half) for row in range(32) for half in range(2)]
    for index, place in enumerate(places):
        row, half = divmod(index, 2)
        if not isinstance(place, int | np.integer) or place % 4 or not 0 <= place < 256:
            return (
                f"place({row}, {half}) is {place!r}: it must be a multiple of 4 from 0 to 252",
                "",
            )
        if place in places[:index]:
            other = divmod(places.index(place), 2)
            return f"place({row}, {half}) is {place}, and so is place{other}", ""
    program = compile_source(_OPERANDS, "simulator", name="exercise")
    x = np.arange(256, dtype=np.float32).reshape(64, 4)
    y = np.full((128, 2), np.nan, np.float32)
    args = [x, np.array(places, np.int32), y]
    report = program.launch("operands", 1, 32, args, trace=True)
    if not np.array_equal(y.ravel(), x.ravel()):
        return "the rows that are loaded are not those that were stored", ""
    totals = report.totals
    lines, met = [], True
    for op, most in (("store", 4), ("load", 2)):
        each = totals[f"shared_{op}_wavefronts"] / totals[f"shared_{op}_requests"]
        lines.append(f"shared {op}s: at most {most} wavefronts per request; yours: {each:g}")
        met = met and each <= most
    return (None, "\n".join(lines)) if met else ("\n".join(lines), "")


def _judge_to_tf32(function: Callable) -> tuple[str | None, str]:
    generator = np.random.default_rng(0)
    ties = (np.arange(64, dtype=np.uint32) * 0x1000 + 0x3F800000).view(np.float32)
    values = {
        "normal numbers": generator.standard_normal(4096).astype(np.float32),
        "halfway between two, of both signs": np.concatenate([ties, -ties]),
        "very large and very small": np.float32([1e30, -3.3e-30, 6.5e4, 1.1e-7, 0.0]),
    }
    for name, numbers in values.items():
        rounded = np.asarray(function(numbers.copy()))
        if rounded.dtype != np.float32:
            return f"{name}: it returns {rounded.dtype}, not float32", ""
        exact = FORMATS["tf32"].round(numbers).astype(np.float64)
        if wrong := first_wrong(rounded, exact, 0.0, "the result"):
            at = int(np.argmax(rounded != exact))
            return f"{name}: for the value {numbers[at]:.9g}, {wrong}", ""
    return None, f"{len(values)} kinds of numbers are rounded as the package does it"


def products(depths: tuple[int, ...], draw: Callable) -> list[Launch]:
    """Make launches of ``product`` for some depths; `draw` makes a matrix of a shape."""
    launches = []
    for depth in depths:
        a, b = draw((16, depth)), draw((depth, 8))
        c = np.full((16, 8), np.nan, np.float32)
        exact = a.astype(np.float64) @ b
        scale = np.abs(a).astype(np.float64) @ np.abs(b)
        launches.append(Launch(f"depth {depth}", 1, 32, (a, b, c, depth), 2, exact, scale))
    return launches


def _integers() -> list[Launch]:
    generator = np.random.default_rng(0)
    return products((8, 24), lambda shape: generator.integers(-9, 10, shape).astype(np.float32))


PRODUCT = """
#include "mma.cuh"

// C [16, 8] is A [16, depth] times B [depth, 8], by one warp; depth is a multiple of 8.
__global__ void product(const float* a, const float* b, float* c, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {};
  for (int k = 0; k < depth; k += 8) {
    const float* const row = a + g * depth + k + t;
    const float* const column = b + (k + t) * 8 + g;
    const uint32_t rows[4] = {to_tf32(row[0]).bits, to_tf32(row[8 * depth]).bits,
                              to_tf32(row[4]).bits, to_tf32(row[8 * depth + 4]).bits};
    const uint32_t columns[2] = {to_tf32(column[0]).bits, to_tf32(column[4 * 8]).bits};
    mma<Tf32>(sum, rows, columns);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
"""

EXERCISES = (
    FunctionExercise(
        name="tensor_core.1",
        function="place",
        text='''
def place(row, half):
    """The word where half a row of operands begins; a row has 8 words, there are 32 rows."""
    return 8 * row + 4 * half
''',
        edits={"4 * half\n": "4 * (half ^ row // 4 % 2)\n"},
        judge=_judge_place,
        hints=(
            "A store of sixteen bytes is served eight lanes at a time, here the same half of eight "
            "rows. Which banks do they use, and which never?",
            "The first four of these rows and the last four use the same banks. Move the last "
            "four to the banks that are free.",
            "Swap the two halves in every other four rows: `half ^ (row // 4 % 2)`.",
        ),
        why="Eight rows are twice as long as all banks together, so the first four lanes and the "
        "last four stored to the same banks. With the halves of every other four rows swapped, the "
        "last four lanes use the banks that the first four leave free. A load of eight bytes is "
        "served half a warp at a time; these are four whole rows, all swapped or none.",
    ),
    FunctionExercise(
        name="tensor_core.2",
        function="to_tf32",
        text='''
def to_tf32(values):
    """Round float32 to TF32: 13 digits fewer, to the nearest, and away from zero if halfway."""
    bits = values.view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)
''',
        edits={
            "return (bits & np.uint32(0xFFFFE000))": (
                "return (bits + np.uint32(0x1000) & np.uint32(0xFFFFE000))"
            )
        },
        judge=_judge_to_tf32,
        hints=(
            "The start cuts thirteen binary digits off. When is the next number up nearer?",
            "When the first of the thirteen is a one. Adding half a unit of the last digit that "
            "stays makes it carry exactly then.",
            "Half a unit is `0x1000`. Add it to the bits before you cut off; a carry into the "
            "exponent is right, too.",
        ),
        why="Half a unit of the last digit that stays, added before the rest is cut off, carries "
        "exactly if the rest is at least a half. The sign is a bit of its own, so negative numbers "
        "are rounded alike, away from zero. Cutting off alone errs by up to a whole unit, always "
        "towards zero, so that the errors of a sum of positive products add up.",
    ),
    KernelExercise(
        name="tensor_core.3",
        kernel="product",
        min_capability=(8, 0),
        text="""
#include "mma.cuh"

// C [16, 8] is A [16, depth] times B [depth, 8], by one warp; depth is a multiple of 8.
// A lane sums the four values of C that it would hold if the tensor cores did it.
__global__ void product(const float* a, const float* b, float* c, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {};
  for (int k = 0; k < depth; ++k) {
    for (int i = 0; i < 4; ++i) {
      sum[i] = fmaf(a[(g + i / 2 * 8) * depth + k], b[k * 8 + 2 * t + i % 2], sum[i]);
    }
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
""",
        launches=_integers,
        budgets=(
            Budget("FMAs", most=0),
            Budget("multiply-adds of tensor cores", least=16 * 8 * 24, most=16 * 8 * 24),
        ),
        whole=PRODUCT,
        hints=(
            "`mma<Tf32>(sum, rows, columns)` of `mma.cuh` takes `uint32_t rows[4]` and "
            "`columns[2]` for eight values of k at once; its opening comment says what each "
            "register holds.",
            "`rows[0]` and `rows[1]` are rows `g` and `g + 8` at `k + t`, `rows[2]` and `rows[3]` "
            "the same at `k + t + 4`; `columns` is column `g` at `k + t` and `k + t + 4`.",
            "A register is `to_tf32(value).bits`. Step `k` by eight, and leave the stores as they "
            "are.",
        ),
        why="Each lane brings its share of A and B into registers, and the warp multiplies at "
        "once. What it holds of C afterwards is what the start summed, so the stores stay as they "
        "are. The values are small integers, which TF32 holds: the result is exact.",
    ),
)
