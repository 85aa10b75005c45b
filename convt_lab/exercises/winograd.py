"""The exercises of the chapter on Winograd's scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from convt_lab.exercises.cuda import Budget, KernelExercise, Launch, StageExercise
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem

__all__ = ["EXERCISES"]

_F43_PRODUCTS = 6


class _Counter:
    """How many products of an input and a weight were formed."""

    def __init__(self) -> None:
        self.products = 0


@dataclass(frozen=True, eq=False)
class _Form:
    """A sum of inputs, of weights, or of products of both: what a scheme computes, symbolically.

    `terms` has the coefficient of each name, such as ``d0``, ``g1`` or ``d0 g1``.
    """

    kind: str  # "d", "g" or "dg"
    terms: Mapping[str, float]
    counter: _Counter

    def __add__(self, other: Any) -> _Form:
        if isinstance(other, Real) and other == 0:  # sum() begins with it
            return self
        if not isinstance(other, _Form) or other.kind != self.kind:
            return NotImplemented
        names = {**self.terms, **other.terms}
        total = {n: self.terms.get(n, 0.0) + other.terms.get(n, 0.0) for n in names}
        return _Form(self.kind, total, self.counter)

    __radd__ = __add__

    def __mul__(self, other: Any) -> _Form:
        if isinstance(other, Real):
            terms = {name: float(other) * value for name, value in self.terms.items()}
            return _Form(self.kind, terms, self.counter)
        if not isinstance(other, _Form) or {self.kind, other.kind} != {"d", "g"}:
            return NotImplemented
        self.counter.products += 1
        d, g = (self, other) if self.kind == "d" else (other, self)
        terms = {f"{a} {b}": v * w for a, v in d.terms.items() for b, w in g.terms.items()}
        return _Form("dg", terms, self.counter)

    __rmul__ = __mul__

    def __truediv__(self, other: Real) -> _Form:
        return self * (1.0 / other)

    def __neg__(self) -> _Form:
        return self * -1.0

    def __sub__(self, other: Any) -> _Form:
        return self + -other

    def __rsub__(self, other: Any) -> _Form:
        return -self + other

    def __str__(self) -> str:
        shown = [f"{v:+.4g} {n}" for n, v in self.terms.items() if abs(v) > 1e-9]
        return " ".join(shown) or "0"


def _judge_f43(function: Callable) -> tuple[str | None, str]:
    counter = _Counter()
    d = [_Form("d", {f"d{i}": 1.0}, counter) for i in range(6)]
    g = [_Form("g", {f"g{i}": 1.0}, counter) for i in range(3)]
    y = list(function(d, g))
    if len(y) != 4:
        return f"it returns {len(y)} outputs and should return 4", ""
    for j, found in enumerate(y):
        wanted = {f"d{j + k} g{k}": 1.0 for k in range(3)}
        terms = found.terms if isinstance(found, _Form) else {}
        names = {*wanted, *terms}
        if any(abs(terms.get(n, 0.0) - wanted.get(n, 0.0)) > 1e-9 for n in names):
            return f"y[{j}] is {found} and should be {' + '.join(wanted)}", ""
    counted = f"at most {_F43_PRODUCTS} products; yours: {counter.products}"
    if counter.products > _F43_PRODUCTS:
        return f"right outputs\n{counted}", ""
    return None, f"right outputs\n{counted}"


def _pairs() -> list[Launch]:
    launches = []
    generator = np.random.default_rng(0)
    for channels, size in ((1, 4), (3, 30), (8, 254)):
        x = generator.standard_normal((channels, size)).astype(np.float32)
        w = generator.standard_normal((channels, 3)).astype(np.float32)
        wide = np.pad(x.astype(np.float64), ((0, 0), (2, 2)))
        taps = [(w[:, [k]], wide[:, 2 - k : 2 - k + size + 2]) for k in range(3)]
        exact = sum((a * b).sum(axis=0) for a, b in taps)
        scale = sum(np.abs(a * b).sum(axis=0) for a, b in taps)
        y = np.full(size + 2, np.nan, np.float32)
        blocks = math.ceil(len(y) / 2 / 32)
        label = f"{channels} channels, {size} inputs"
        launches.append(Launch(label, blocks, 32, (x, w, y, channels, size), 2, exact, scale))
    return launches


_PAIRS_TEXT = """
// Three taps, stride 1, C channels: y[o] is the sum over c and k of x[c, o - k] * w[c, k].
// x [C, size], w [C, 3], y [size + 2]; size is even. A thread owns two neighbouring outputs.
// Write every product as fmaf: that is what is counted.
__global__ void pairs_1d(const float* x, const float* w, float* y, int channels, int size) {
  const int o = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (o >= size + 2) return;
  float y0 = 0.0f, y1 = 0.0f;
  for (int c = 0; c < channels; ++c) {
    float d[4];  // the inputs o - 2 to o + 1
    for (int j = 0; j < 4; ++j) {
      const int i = o - 2 + j;
      d[j] = i >= 0 && i < size ? x[c * size + i] : 0.0f;
    }
    const float g[3] = {w[c * 3 + 2], w[c * 3 + 1], w[c * 3]};  // in the order of the inputs
    for (int k = 0; k < 3; ++k) {
      y0 = fmaf(d[k], g[k], y0);
      y1 = fmaf(d[k + 1], g[k], y1);
    }
  }
  y[o] = y0;
  y[o + 1] = y1;
}
"""

_SPACED = (
    "// The weights of one product, and 8 words that put the products of two lanes into different "
    "banks.\nconstexpr int PRODUCT_WEIGHTS = KW * BLOCK_CO + 8;\n"
)
_PACKED = "// The weights of one product.\nconstexpr int PRODUCT_WEIGHTS = KW * BLOCK_CO;\n"

EXERCISES = (
    FunctionExercise(
        name="winograd.1",
        function="f43",
        text='''
def f43(d, g):
    """Four outputs of a three-tap filter g from six inputs d."""
    return [d[j] * g[0] + d[j + 1] * g[1] + d[j + 2] * g[2] for j in range(4)]
''',
        whole='''
def f43(d, g):
    """Four outputs of a three-tap filter g from six inputs d: F(4, 3)."""
    m0 = (4 * d[0] - 5 * d[2] + d[4]) * (g[0] / 4)
    m1 = (-4 * d[1] - 4 * d[2] + d[3] + d[4]) * ((g[0] + g[1] + g[2]) / -6)
    m2 = (4 * d[1] - 4 * d[2] - d[3] + d[4]) * ((g[0] - g[1] + g[2]) / -6)
    m3 = (-2 * d[1] - d[2] + 2 * d[3] + d[4]) * ((g[0] + 2 * g[1] + 4 * g[2]) / 24)
    m4 = (2 * d[1] - d[2] - 2 * d[3] + d[4]) * ((g[0] - 2 * g[1] + 4 * g[2]) / 24)
    m5 = (4 * d[1] - 5 * d[3] + d[5]) * g[2]
    return [
        m0 + m1 + m2 + m3 + m4,
        m1 - m2 + 2 * m3 - 2 * m4,
        m1 + m2 + 4 * m3 + 4 * m4,
        m1 - m2 + 8 * m3 - 8 * m4 + m5,
    ]
''',
        judge=_judge_f43,
        hints=(
            "The check calls it with symbols and counts products of a sum of inputs and a sum of "
            "weights. Products with a constant are free.",
            "As with $F(2, 3)$, read d and g as polynomials: a product of the two is known by its "
            "values at five points and its highest coefficient, and each value is one product.",
            "Take the points `0, 1, -1, 2, -2`. The sums of weights are `g` at these points, times "
            "`1/4, -1/6, -1/6, 1/24, 1/24`, and `g[2]` alone.",
        ),
        why="Six products are half of the definition's twelve, where $F(2, 3)$ has two thirds. The "
        "constants are those of Lavin and Gray. They are larger, so larger terms come and go; the "
        "transforms have more additions; and a thread would need the windows of six rows.",
    ),
    StageExercise(
        name="winograd.2",
        stage="winograd",
        spoilt={_SPACED: _PACKED},
        edits={_PACKED: _SPACED},
        problems=(
            Problem(1, 2, 4, 5, 3, kernel_size=(3, 7), bias=True),
            Problem(1, 8, 18, 6, 10, kernel_size=(3, 7)),
        ),
        budgets=(Budget("wavefronts per request", most=3.1, space="shared"),),
        hints=(
            "A half of a warp reads the weights of two products, four words each. How far apart do "
            "they lie, and is that a multiple of the number of banks?",
            "A few words between the products' weights move the second product to other banks. A "
            "load of sixteen bytes needs an address that is a multiple of sixteen.",
            "Add a multiple of four words to `PRODUCT_WEIGHTS`, and not as many as banks.",
        ),
        why="The weights of a product fill all banks a whole number of times, so those of two "
        "products lay in the same four banks. With a few words between them, the two pieces of "
        "four words that a half of the warp reads are in different banks. Any multiple of four "
        "below the number of banks does.",
    ),
    KernelExercise(
        name="winograd.3",
        kernel="pairs_1d",
        text=_PAIRS_TEXT,
        launches=_pairs,
        budgets=(Budget("FMAs", most=4 * 8 * 128, least=3 * 8 * 128),),
        edits={
            "  float y0 = 0.0f, y1 = 0.0f;\n": "  float m[4] = {};\n",
            "    for (int k = 0; k < 3; ++k) {\n"
            "      y0 = fmaf(d[k], g[k], y0);\n"
            "      y1 = fmaf(d[k + 1], g[k], y1);\n"
            "    }\n": (
                "    const float even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];\n"
                "    m[0] = fmaf(d[0] - d[2], g[0], m[0]);\n"
                "    m[1] = fmaf(d[1] + d[2], even + odd, m[1]);\n"
                "    m[2] = fmaf(d[2] - d[1], even - odd, m[2]);\n"
                "    m[3] = fmaf(d[1] - d[3], g[2], m[3]);\n"
            ),
            "  y[o] = y0;\n  y[o + 1] = y1;\n": (
                "  y[o] = m[0] + m[1] + m[2];\n  y[o + 1] = m[1] - m[2] - m[3];\n"
            ),
        },
        hints=(
            "The chapter's scheme needs four products for two outputs. Which of them have to be "
            "formed for each channel, and what can wait until all channels are summed?",
            "Sum `m[0]` to `m[3]` over the channels, and form the two outputs once at the end.",
            "`m[1]` multiplies `d[1] + d[2]` by `(g[0] + g[1] + g[2]) / 2`; the chapter has all "
            "four.",
        ),
        why="Four products for each channel in place of six. The additions at the end are done "
        "once, so the more channels there are, the less they count. The sums of weights are the "
        "same for all threads: the stage forms them once for a block.",
    ),
)
