"""Pictures for the chapter on gathering, in the style of :mod:`convt_lab.figures`."""

from __future__ import annotations

from collections.abc import Mapping

from convt_lab.figures import (
    _BLUE,
    _GREEN,
    _INK,
    _ORANGE,
    _PALE,
    _RED,
    Picture,
    _bare,
    _cell,
    _mix,
    _panels,
    _ticks,
)
from convt_lab.problem import Axis, Problem

__all__ = ["phases"]

_FILLS = [_mix("#FFFFFF", color, 0.45) for color in (_BLUE, _ORANGE, _GREEN, _RED)]
_LETTERS = "ABCD"


def phases(problem: Problem) -> Picture:
    """Draw which taps of the kernel meet which outputs: one letter, one residue class.

    Parameters
    ----------
    problem
        A small one, whose taps fall into at most four classes: as many as the product over both
        axes of the stride, over its greatest common divisor with the dilation. Channels are
        ignored.

    Returns
    -------
    Picture
        The kernel's taps and the outputs, each with the letter and colour of its class; outputs
        that no tap meets are grey and bare. The table lists each class.

    Raises
    ------
    ValueError
        If there are more classes than letters.
    """
    rows, columns = problem.axes
    count = rows.k_step * columns.k_step
    if count > len(_LETTERS):
        raise ValueError(
            f"problem has {count} classes of taps; at most {len(_LETTERS)} can be drawn"
        )

    def letter(row: int | None, column: int | None) -> str:
        return "" if row is None or column is None else _LETTERS[row * columns.k_step + column]

    taps = {
        (kh, kw): letter(kh % rows.k_step, kw % columns.k_step)
        for kh in range(rows.kernel)
        for kw in range(columns.kernel)
    }
    outputs = {
        (oh, ow): letter(_class_of(rows, oh), _class_of(columns, ow))
        for oh in range(rows.out_size)
        for ow in range(columns.out_size)
    }
    figure, (left, right) = _panels(2, height=3.4)
    for axes, cells, title in ((left, taps, "taps (kh, kw)"), (right, outputs, "outputs (oh, ow)")):
        for (y, x), name in cells.items():
            _cell(axes, x, y, _FILLS[_LETTERS.index(name)] if name else _PALE, text=name)
        height, width = (max(place[axis] for place in cells) + 1 for axis in (0, 1))
        _bare(axes, width, height)
        _ticks(axes, range(width), range(height))
        axes.set_title(title, fontsize=11, color=_INK)
    return Picture(figure, "taps and outputs by class", _table(taps, outputs))


def _class_of(axis: Axis, o: int) -> int | None:
    """Return the first tap of output `o`'s class, whether or not there is such a tap."""
    position = o + axis.padding
    if position % axis.common:
        return None
    return position // axis.common * axis.inverse % axis.k_step


def _table(taps: Mapping[tuple[int, int], str], outputs: Mapping[tuple[int, int], str]) -> str:
    lines = ["class  outputs  taps (kh, kw)"]
    for name in _LETTERS:
        of_class = [place for place, other in taps.items() if other == name]
        reached = list(outputs.values()).count(name)
        if of_class or reached:
            places = " ".join(f"({kh}, {kw})" for kh, kw in of_class) or "none"
            lines.append(f"{name:5} {reached:8}  {places}")
    return "\n".join(lines)
