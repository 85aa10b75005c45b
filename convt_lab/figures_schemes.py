"""Pictures of schemes of sums and products, in the style of :mod:`convt_lab.figures`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from convt_lab.columns import aligned
from convt_lab.figures import _BLUE, _INK, _PALE, _RED, Picture, _bare, _box, _cell, _mix, _panels
from convt_lab.split import Format, pairs_of, split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["parts", "products"]

_FILLS = [_mix("#FFFFFF", _BLUE, share) for share in (0.6, 0.4, 0.2)]

Matrix = Sequence[Sequence[Fraction]]


def products(inputs: Matrix, weights: Matrix, outputs: Matrix) -> Picture:
    """Draw how a few products of sums make several outputs.

    Parameters
    ----------
    inputs
        For each product the factors of the inputs, of which it has a sum: 1, -1 or 0.
    weights
        For each product the factors of the weights. All that aren't zero have one magnitude.
    outputs
        For each output the factors of the products: 1, -1 or 0.

    Returns
    -------
    Picture
        Inputs on the left, products with their weights in the middle, outputs on the right. A solid
        line is added, a dashed one is subtracted. The table has the sums.
    """
    figure, (axes,) = _panels(1, height=3.2)
    height = 1.5 * max(len(inputs[0]), len(inputs), len(outputs))

    def places(count: int) -> list[float]:
        """Where the middles of so many boxes are, spread over the height."""
        return [height * (2 * i + 1) / (2 * count) for i in range(count)]

    columns = {"d": (places(len(inputs[0])), 0.0, 1.0), "m": (places(len(inputs)), 3.0, 4.6)}
    columns["y"] = (places(len(outputs)), 9.6, 1.0)
    for name, (middles, left, width) in columns.items():
        for i, y in enumerate(middles):
            text = f"${name}_{i}$"
            if name == "m":
                text += rf"$\;=\;$sum$\;\times\;{_sum(weights[i], 'g')}$"
            _box(axes, left, y - 0.5, width, 1, _PALE if name == "m" else _FILLS[2])
            axes.text(left + width / 2, y, text, ha="center", va="center", fontsize=10, color=_INK)
    for matrix, (start, end) in ((inputs, "dm"), (outputs, "my")):
        (sources, left, width), (targets, right, _) = columns[start], columns[end]
        for target, factors in zip(targets, matrix, strict=True):
            for source, factor in zip(sources, factors, strict=True):
                _line(axes, (left + width, source), (right, target), factor)
    axes.set_xlim(-0.06, 10.66)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    rows = [("product", "sum of inputs", "sum of weights", "in the outputs")]
    for i, (of_inputs, of_weights) in enumerate(zip(inputs, weights, strict=True)):
        reached = [("+" if y[i] > 0 else "-") + f"y{j}" for j, y in enumerate(outputs) if y[i]]
        rows.append((f"m{i}", _plain(of_inputs, "d"), _plain(of_weights, "g"), " ".join(reached)))
    return Picture(figure, "sums, products and outputs", aligned(rows, left=(0, 1, 2, 3)))


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float], factor: int) -> None:
    if factor:
        (x0, y0), (x1, y1) = start, end
        color, style = (_BLUE, "-") if factor > 0 else (_RED, (0, (4, 2)))
        axes.plot([x0, x1], [y0, y1], color=color, linestyle=style, linewidth=1.6)


def _terms(factors: Sequence[Fraction], name: str) -> tuple[Fraction, list[tuple[str, str]]]:
    """Return the common magnitude of the factors, and the sign and name of each term."""
    there = [(factor, f"{name}{i}") for i, factor in enumerate(factors) if factor]
    (size,) = {abs(factor) for factor, _ in there}
    return Fraction(size), [("+" if factor > 0 else "-", term) for factor, term in there]


def _plain(factors: Sequence[Fraction], name: str) -> str:
    """Return a sum as text: ``1/2 (g0 - g1 + g2)``."""
    size, terms = _terms(factors, name)
    text = " ".join(f"{sign} {term}" for sign, term in terms).removeprefix("+ ")
    return text if size == 1 else f"{size} ({text})"


def _sum(factors: Sequence[Fraction], name: str) -> str:
    """Return the same for a formula."""
    size, terms = _terms(factors, name)
    text = "".join(f"{sign}{term[0]}_{term[1:]}" for sign, term in terms).removeprefix("+")
    return text if size == 1 else rf"\frac{{{size.numerator}}}{{{size.denominator}}}({text})"


def parts(value: float, format: Format, count: int) -> Picture:
    """Draw the parts of one float32, digit by digit, and which of their products are kept.

    Parameters
    ----------
    value
        The number, a float32 that is not zero.
    format
        Of the parts.
    count
        How many; at most three.

    Returns
    -------
    Picture
        On the left the number's binary digits and below them each part's, at their places, with a
        minus before a part that is negative; on the right a grid of the products of two numbers'
        parts. The table lists the parts.
    """
    if not 1 <= count <= len(_FILLS):
        raise ValueError(f"count={count!r} must be 1 to {len(_FILLS)}")
    number = np.float32(value)
    if number == 0 or not np.isfinite(number):
        raise ValueError(f"value={value!r} must be a finite number other than zero")
    found = [float(part[0]) for part in split(np.array([number]), format, count)]
    highest = math.frexp(float(number))[1]  # the place left of the first digit
    figure, (left, right) = _panels(2, height=2.6)
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=[28, 5])
    rows, last = [("part", "value")], 0
    shown = [("x", float(number), 24, _PALE)]
    shown += [(f"x{i}", part, format.digits, _FILLS[i]) for i, part in enumerate(found)]
    for row, (name, part, digits, fill) in enumerate(shown):
        if row:
            rows.append((name, f"{part:.9g}"))
        left.text(-0.4, 2 * row + 0.5, f"${name[0]}_{{{name[1:]}}}$", ha="right", va="center",
                  fontsize=10, color=_INK)  # fmt: skip
        if part == 0:
            continue
        first = highest - math.frexp(part)[1]
        last = max(last, first + digits)
        bits = round(abs(part) * 2.0 ** (digits - math.frexp(part)[1]))
        for i, bit in enumerate(f"{bits:0{digits}b}"):
            _cell(left, first + i, 2 * row, fill)
            left.text(first + i + 0.5, 2 * row + 0.5, bit, ha="center", va="center", fontsize=7,
                      color=_INK)  # fmt: skip
        if part < 0:
            left.text(first - 0.6, 2 * row + 0.5, "−", ha="center", va="center", fontsize=10,
                      color=_INK)  # fmt: skip
    _bare(left, last, 2 * len(shown) - 1)
    left.set_xlim(-1.6, last + 0.06)
    kept = pairs_of(count)
    for i in range(count):
        for j in range(count):
            _cell(right, j, i, _FILLS[i + j] if (i, j) in kept else "#FFFFFF")
            text = rf"$x_{i}w_{j}$"
            right.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8,
                       color=_INK if (i, j) in kept else "#777777")  # fmt: skip
    _bare(right, count, count)
    rows.append(("sum", f"{sum(found):.9g}"))
    return Picture(figure, "a number's parts and their products", aligned(rows, left=(0,)))
