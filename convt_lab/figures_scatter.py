"""The animation of the chapter on stamping: one input pixel after another.

What a page does with it is in book/_static/stamping.js; without scripts, and in print, the page
shows the output after the last stamp.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass

import numpy as np

from convt_lab.columns import aligned
from convt_lab.problem import Problem

__all__ = ["Animation", "Frame", "stamping"]


@dataclass(frozen=True)
class Frame:
    """What the output holds after some stamps.

    Attributes
    ----------
    pixel
        The input pixel (h, w) that stamped last; None before the first.
    sums
        For each output pixel that a stamp has reached, (oh, ow), its sum.
    added
        For each output pixel of the last stamp, what that added to the sum.
    words
        The same for a reader who does not see it.
    """

    pixel: tuple[int, int] | None
    sums: dict[tuple[int, int], int]
    added: dict[tuple[int, int], int]
    words: str

    def met(self) -> list[tuple[int, int]]:
        """Return the output pixels of the last stamp that an earlier one had reached."""
        return [place for place in self.added if self.added[place] != self.sums[place]]


@dataclass(frozen=True)
class Animation:
    """Frames that a page plays, and that a notebook shows the last of.

    Attributes
    ----------
    x, weight
        The input [H, W] and the kernel [KH, KW].
    frames
        The first has nothing stamped, the last everything.
    output_shape
        [OH, OW].
    """

    x: np.ndarray
    weight: np.ndarray
    frames: tuple[Frame, ...]
    output_shape: tuple[int, int]

    def __repr__(self) -> str:
        return f"<animation: {len(self.frames) - 1} stamps>"

    @property
    def y(self) -> np.ndarray:
        """The output after the last stamp, [OH, OW]; 0 where no stamp has reached."""
        y = np.zeros(self.output_shape, dtype=int)
        for place, value in self.frames[-1].sums.items():
            y[place] = value
        return y

    def table(self) -> str:
        """Return of each output pixel what the stamps have added, in their order, as text."""
        height, width = self.output_shape
        rows = [("", *map(str, range(width)))]
        for oh in range(height):
            products = (
                "+".join(str(f.added[oh, ow]) for f in self.frames if (oh, ow) in f.added) or "0"
                for ow in range(width)
            )
            rows.append((str(oh), *products))
        return aligned(rows)

    def _repr_html_(self) -> str:
        last = self.frames[-1]
        text = (
            f"An animation of {len(self.frames) - 1} stamps. Each input pixel in turn multiplies "
            "the kernel by its value and adds the products to the output. The table below has the "
            "same numbers."
        )
        pixels = {place: str(value) for place, value in np.ndenumerate(self.x)}
        taps = {place: str(value) for place, value in np.ndenumerate(self.weight)}
        grids = (
            _grid("input", self.x.shape, pixels, {last.pixel: "is-chosen"}),
            _grid("kernel", self.weight.shape, taps, {}),
            _grid(
                "output",
                self.output_shape,
                {
                    place: f"{value}<br><small>+{last.added[place]}</small>"
                    if place in last.added
                    else str(value)
                    for place, value in last.sums.items()
                },
                dict.fromkeys(last.added, "is-new") | dict.fromkeys(last.met(), "is-new is-sum"),
            ),
        )
        frames = html.escape(json.dumps([self._packed(f) for f in self.frames]))
        return (
            f'<div class="stamping" role="group" aria-label="{html.escape(text)}" '
            f'data-frames="{frames}">\n<div class="stamping-grids">\n{"".join(grids)}</div>\n'
            f'<p class="stamping-words">{html.escape(last.words)}</p>\n</div>'
        )

    def _packed(self, frame: Frame) -> dict:
        """Pack a frame for the page's script: cells are numbered row by row."""
        height, width = self.output_shape
        places = list(np.ndindex(height, width))
        return {
            "pixel": None
            if frame.pixel is None
            else frame.pixel[0] * self.x.shape[1] + frame.pixel[1],
            "sums": [frame.sums.get(place) for place in places],
            "added": {str(h * width + w): value for (h, w), value in frame.added.items()},
            "met": [h * width + w for h, w in frame.met()],
            "words": frame.words,
        }


def stamping(problem: Problem, x: np.ndarray, weight: np.ndarray) -> Animation:
    """Stamp one input pixel after another, row by row, and keep what the output holds in between.

    Parameters
    ----------
    problem
        A small one; channels are ignored.
    x, weight
        The input [H, W] and the kernel [KH, KW], of positive integers.

    Returns
    -------
    Animation
        One frame more than there are input pixels.

    Raises
    ------
    ValueError
        If a shape is not the problem's, or a number is not a positive integer: products of 0, or
        sums that cancel, would look like places that no stamp has reached.
    """
    rows, columns = problem.axes
    for name, array, shape in (
        ("x", x, (rows.size, columns.size)),
        ("weight", weight, problem.kernel_size),
    ):
        if array.shape != tuple(shape):
            raise ValueError(f"{name} has the shape {array.shape}; the problem has {tuple(shape)}")
        if not (np.issubdtype(array.dtype, np.integer) and (array > 0).all()):
            raise ValueError(f"{name} must hold positive integers, not {array.tolist()}")

    sums: dict[tuple[int, int], int] = {}
    frames = [Frame(None, {}, {}, "Nothing is stamped yet; the output is empty.")]
    for h, w in np.ndindex(*x.shape):
        added = {}
        for kh, kw in np.ndindex(*weight.shape):
            oh = h * rows.stride + kh * rows.dilation - rows.padding
            ow = w * columns.stride + kw * columns.dilation - columns.padding
            if 0 <= oh < rows.out_size and 0 <= ow < columns.out_size:
                added[oh, ow] = int(x[h, w] * weight[kh, kw])
        met = len(added.keys() & sums.keys())
        sums = sums | {place: sums.get(place, 0) + value for place, value in added.items()}
        words = (
            f"Stamp {len(frames)} of {x.size}: the kernel times {x[h, w]}, the value of input "
            f"({h}, {w}). Of its {weight.size} products {met or 'none'} "
            f"{'falls' if met == 1 else 'fall'} on pixels that earlier stamps had reached."
        )
        if cropped := weight.size - len(added):
            words += f" {cropped} {'lies' if cropped == 1 else 'lie'} outside the output."
        frames.append(Frame((h, w), sums, added, words))
    return Animation(x, weight, tuple(frames), (rows.out_size, columns.out_size))


def _grid(name: str, shape: tuple[int, int], texts: dict, classes: dict) -> str:
    """Write a table of cells with indices along two edges."""
    height, width = shape
    head = "".join(f'<th scope="col">{column}</th>' for column in range(width))
    lines = [
        f'<div class="stamping-panel"><p class="stamping-heading">{name}, {height} × {width}</p>',
        f'<table data-grid="{name}" aria-label="{name}"><thead><tr><td></td>{head}</tr></thead>',
        "<tbody>",
    ]
    for row in range(height):
        cells = "".join(
            f'<td class="{("stamping-cell " + classes.get((row, column), "")).strip()}">'
            f"{texts.get((row, column), '')}</td>"
            for column in range(width)
        )
        lines.append(f'<tr><th scope="row">{row}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>\n"])
