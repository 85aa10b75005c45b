"""What the book shows beside its prose: code from the package's own files, constants, pictures.

Excerpts and diffs are found by the text they begin with, never by line number, and constants come
from the compiler, so a page follows the kernels when its notebook is run again. Matplotlib is
imported when a picture is drawn, not before. Nothing here computes a transposed convolution, and
nothing else in the package needs it.
"""

from __future__ import annotations

import difflib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convt_lab.columns import aligned
from convt_lab.operator_record import PYTORCH
from convt_lab.problem import Axis, Problem
from convt_lab.program import compile as compile_source
from convt_lab.simulator.report import SECTOR_BYTES, Report, Request
from convt_lab.simulator.translate import mask_comments_and_strings
from convt_lab.stages import Kernel, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from convt_lab.decoder_record import DecoderRecord, Profile
    from convt_lab.operator_record import Case, OperatorRecord
    from convt_lab.records import Record, Shape

__all__ = [
    "Listing",
    "Picture",
    "Roof",
    "RooflinePoint",
    "banks",
    "bars",
    "coalescing",
    "constants",
    "cost_by_line",
    "diff",
    "flat_axis",
    "fragments",
    "growth",
    "halo",
    "layer_times",
    "listing",
    "pixels_of",
    "promotion",
    "request",
    "residues",
    "reuse",
    "roofline",
    "speedups",
    "stamps",
    "window",
]

# ---- Code --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """A piece of text that a notebook shows as a block of code.

    Attributes
    ----------
    text
        The lines.
    language
        As the highlighter calls it: ``cuda``, ``python`` or ``diff``.
    title
        Where the lines come from.
    """

    text: str
    language: str
    title: str

    def __repr__(self) -> str:
        return f"<{self.title}>"

    def _repr_markdown_(self) -> str:
        return f"`{self.title}`\n\n```{self.language}\n{self.text}\n```"


def listing(
    source: Kernel | Path | Callable | str, start: str | None = None, end: str | None = None
) -> Listing:
    """Take a piece out of a kernel file or show a Python function.

    Parameters
    ----------
    source
        A kernel, a file or a text in CUDA C++, or a Python function, which is shown whole and
        without its docstring.
    start
        Where the piece begins. The name of a function or a struct gives its definition with the
        comment right above it; any other text gives the first line that contains it and what
        follows. None is the text's beginning.
    end
        Text in the first line after `start` that is not shown any more. None is the closing brace
        of what began at `start`, or the end of the text where `start` is None.

    Returns
    -------
    Listing

    Raises
    ------
    ValueError
        If the text holds no `start`, no `end` after it, or nothing that closes.
    """
    if isinstance(source, Kernel):
        text, title = source.source, f"{source.name}.cu"
    elif isinstance(source, Path):
        text, title = source.read_text(), source.name
    elif isinstance(source, str):
        text, title = source, "CUDA C++"
    else:
        file = source.__module__.rpartition(".")[2]
        code = _without_docstring(textwrap.dedent(inspect.getsource(source)))
        return Listing(code, "python", f"{file}.py: {source.__qualname__}")

    lines = text.splitlines()
    if start is None:
        first = shown = 0
        last = len(lines)
    else:
        definition = _definition(lines, start)
        first = _line_with(lines, start) if definition is None else definition
        shown = first if definition is None else _above(lines, first)
        title = title if definition is None else f"{title}: {start}"
        last = _closing(lines, first) + 1 if end is None else 0
    if end is not None:
        last = _line_with(lines, end, first + 1)
    return Listing(_dedent(lines[shown:last]), "cuda", title)


def diff(before: Stage | Listing, after: Stage | Listing) -> Listing:
    """Show what changed from one piece of code to another.

    Parameters
    ----------
    before, after
        Stages (whole files) or listings.

    Returns
    -------
    Listing
        Both texts whole, with a mark before each line that only one of them has.
    """
    old, new = (part if isinstance(part, Listing) else listing(part) for part in (before, after))
    old_lines, new_lines = old.text.splitlines(), new.text.splitlines()
    everything = len(old_lines) + len(new_lines)
    lines = list(difflib.unified_diff(old_lines, new_lines, lineterm="", n=everything))
    # Without the first three lines: two file names, which are the title, and line numbers.
    return Listing("\n".join(lines[3:]), "diff", f"{old.title} → {new.title}")


def constants(source: Kernel | str, *expressions: str) -> dict[str, int]:
    """Ask the compiler for the values of integer expressions in a kernel file.

    Parameters
    ----------
    source
        A kernel or CUDA C++ text.
    *expressions
        Such as ``THREADS`` or ``Sizes<3, 7>::THREAD_W``, in the scope of the file.

    Returns
    -------
    dict of str to int
        Each expression with its value.
    """
    text = source.source if isinstance(source, Kernel) else source
    assignments = "".join(f"  values[{i}] = ({e});\n" for i, e in enumerate(expressions))
    probe = f"\n__global__ void tell_constants(long long* values) {{\n{assignments}}}\n"
    values = np.zeros(len(expressions), dtype=np.int64)
    program = compile_source(text + probe, "simulator", name="constants")
    program.launch("tell_constants", grid=1, block=1, args=[values])
    return dict(zip(expressions, values.tolist(), strict=True))


def _without_docstring(source: str) -> str:
    """Drop a Python function's docstring."""
    return re.sub(r'\n *"""(?:(?!""").)*"""(?=\n)', "", source, count=1, flags=re.DOTALL).rstrip()


def _line_with(lines: Sequence[str], text: str, first: int = 0) -> int:
    for number in range(first, len(lines)):
        if text in lines[number]:
            return number
    where = f" after line {first}" if first else ""
    raise ValueError(f"no line{where} contains {text!r}")


def _definition(lines: Sequence[str], name: str) -> int | None:
    """Find the first line of the definition of a function or struct called `name`."""
    if not re.fullmatch(r"\w+", name):
        return None
    text = mask_comments_and_strings("\n".join(lines))
    code = text.splitlines()
    for match in re.finditer(rf"\b{name}\b[^;{{}}]*\{{", text):
        first = text.count("\n", 0, match.start())
        # A signature may span lines: a template's parameters, attributes.
        while first > 0 and re.search(r"^[^#]*[^;{}:\s]\s*$", code[first - 1]):
            first -= 1
        head = " ".join(code[first:])[: match.start() - len("\n".join([*code[:first], ""]))]
        if head.strip() and not re.match(r"\s*(if|for|while|switch|return|else)\b", head):
            return first
    return None


def _above(lines: Sequence[str], number: int) -> int:
    """Step up over the comment that stands right above a definition."""
    while number > 0 and lines[number - 1].lstrip().startswith("//"):
        number -= 1
    return number


def _closing(lines: Sequence[str], first: int) -> int:
    """Find the line on which the first brace opened from `first` on is closed."""
    depth = 0
    code = mask_comments_and_strings("\n".join(lines)).splitlines()
    for number in range(first, len(code)):
        for character in code[number]:
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return number
    raise ValueError(f"nothing closes what begins with {lines[first].strip()!r}")


def _dedent(lines: Sequence[str]) -> str:
    """Remove the common indentation; preprocessor lines, which have none, don't count."""
    marked = [f"\0{line}" if line.startswith("#") else line for line in lines]
    indents = [len(s) - len(s.lstrip()) for s in marked if s.strip() and not s.startswith("\0")]
    cut = min(indents, default=0)
    return "\n".join(s[1:] if s.startswith("\0") else s[cut:] for s in marked).strip("\n")


# ---- Pictures ----------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers too. A picture is drawn on white and
# stays so in dark mode, where the theme puts it on a light card.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PALE_BLUE, _PALE_ORANGE, _PALE = "#CFE3F1", "#F9E4B7", "#ECECEC"
_INK, _GREY = "#222222", "#767676"
_WIDTH = 6.4  # inches
_SCREEN_DPI, _DPI = 100, 160


class Picture:
    """A figure that a notebook shows as a PNG, at the same size on every screen.

    Parameters
    ----------
    figure
        The finished figure.
    name
        What the picture is called where it can't be shown.
    numbers
        What `table` returns: the numbers of a picture whose own labels don't give them all.
    """

    def __init__(self, figure: Figure, name: str, numbers: str = ""):
        self.figure = figure
        self.name = name
        self._numbers = numbers

    def __repr__(self) -> str:
        return f"<picture: {self.name}>"

    def table(self) -> str:
        """Return the numbers that the picture shows, as text; empty if it names them itself."""
        return self._numbers

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.figure.savefig(
            buffer,
            format="png",
            dpi=_DPI,
            facecolor="white",
            bbox_inches="tight",
            pad_inches=0.06,
            metadata={"Software": None},
        )
        png = buffer.getvalue()
        pixels = int.from_bytes(png[16:20], "big")  # the width, in the header
        return png, {"width": round(pixels * _SCREEN_DPI / _DPI)}


def stamps(*problems: Problem) -> Picture:
    """Draw how the stamps of the input pixels overlap, one panel for each problem.

    Parameters
    ----------
    *problems
        Small problems; channels are ignored.

    Returns
    -------
    Picture
        Each cell of the canvas holds the number of stamps that cover it. The frame is the output.
        Three stamps are outlined: of the first pixel, of its right neighbour and of the last.
    """
    figure, panels = _panels(len(problems), height=4.0)
    for axes, problem in zip(panels, problems, strict=True):
        _draw_stamps(axes, problem)
    return Picture(figure, "stamps and how many overlap")


def _draw_stamps(axes: Axes, problem: Problem) -> None:
    rows, columns = problem.axes
    counts = np.outer(_coverage(rows), _coverage(columns))
    height, width = counts.shape
    for y, x in np.ndindex(height, width):
        inside = (
            0 <= y - rows.padding < rows.out_size and 0 <= x - columns.padding < columns.out_size
        )
        share = counts[y, x] / counts.max()
        fill = _mix("#FFFFFF", _BLUE, 0.45 * share) if inside else _PALE
        _cell(axes, x, y, fill, text=str(counts[y, x]), ink=_INK if inside else _GREY)
    frame = (columns.padding, rows.padding, columns.out_size, rows.out_size)
    _frame(axes, *frame, color=_INK, thick=2.6)
    span_h = rows.dilation * (rows.kernel - 1) + 1
    span_w = columns.dilation * (columns.kernel - 1) + 1
    chosen = dict.fromkeys(
        [(0, 0), (0, min(1, columns.size - 1)), (rows.size - 1, columns.size - 1)]
    )
    for (h, w), color, style, inset in zip(
        chosen, (_ORANGE, _RED, _GREEN), ("-", "--", ":"), (0.1, 0.18, 0.26), strict=False
    ):
        place = (w * columns.stride, h * rows.stride, span_w, span_h)
        _frame(axes, *place, color=color, thick=2.2, style=style, inset=inset)
    _bare(axes, width, height)
    values = [f"stride {problem.stride[0]}", f"padding {problem.padding[0]}"]
    values += [f"output_padding {problem.output_padding[0]}"] if any(problem.output_padding) else []
    axes.set_title(
        f"{', '.join(values)}\n{rows.size}×{columns.size} → {rows.out_size}×{columns.out_size}",
        fontsize=11,
        color=_INK,
    )


def _coverage(axis: Axis) -> np.ndarray:
    """Count along one axis how many stamps cover each place of the canvas, before cropping."""
    counts = np.zeros(axis.out_size + 2 * axis.padding, dtype=int)
    for i in range(axis.size):
        for k in range(axis.kernel):
            place = i * axis.stride + k * axis.dilation
            if place < len(counts):
                counts[place] += 1
    return counts


def residues(axis: Axis) -> Picture:
    """Draw which taps reach which outputs along one axis.

    Parameters
    ----------
    axis
        A small one.

    Returns
    -------
    Picture
        A grid of outputs (across) and taps (down). A cell holds the input index that meets both;
        it is coloured by the tap's residue class, and grey where the input lies outside.
    """
    figure, (axes,) = _panels(1, height=0.9 + 0.36 * axis.kernel)
    fills = [_mix("#FFFFFF", color, 0.45) for color in (_BLUE, _ORANGE, _GREEN, _RED)]
    for o in range(axis.out_size):
        for k in range(axis.kernel):
            scaled = o + axis.padding - k * axis.dilation
            if scaled % axis.stride:
                _cell(axes, o, k, "#FFFFFF")
                continue
            i = scaled // axis.stride
            inside = 0 <= i < axis.size
            fill = fills[k % axis.k_step % len(fills)] if inside else _PALE
            _cell(axes, o, k, fill, text=str(i), ink=_INK if inside else _GREY)
    _bare(axes, axis.out_size, axis.kernel)
    _ticks(axes, range(axis.out_size), range(axis.kernel))
    axes.set_xlabel("output o", color=_INK)
    axes.set_ylabel("tap k", color=_INK)
    return Picture(figure, "taps and outputs that meet")


def request(lanes: Mapping[str, tuple[np.ndarray, np.ndarray]], sector_pixels: int = 8) -> Picture:
    """Draw what one load of a warp touches in an input plane, one panel for each load.

    Parameters
    ----------
    lanes
        For each panel's title the rows h and columns w that the lanes read: of a traced request,
        those that `pixels_of` returns. Rows are assumed to begin at a sector's start.
    sector_pixels
        Pixels in one sector.

    Returns
    -------
    Picture
        Dark cells are the pixels that lanes asked for, pale ones the rest of the sectors that come
        with them.
    """
    reads = {title: np.broadcast_arrays(h, w) for title, (h, w) in lanes.items()}
    columns = np.concatenate([w for _, w in reads.values()])
    left = max(columns.min() // sector_pixels - 1, 0) * sector_pixels
    right = (columns.max() // sector_pixels + 2) * sector_pixels
    heights = [np.ptp(h) + 1 for h, _ in reads.values()]
    # Cells of a few rows are drawn tall, and those of many rows small.
    aspect = 2 if max(heights) < 8 else 1
    scale = min((_WIDTH - 0.8) / (right - left), 4.2 / max(heights) / aspect)
    figure, panels = _panels(
        len(reads),
        height=sum(heights) * aspect * scale + 0.85 * len(reads),
        stacked=True,
        ratios=[h * aspect * scale + 0.4 for h in heights],
    )
    for axes, height, (title, (h, w)) in zip(panels, heights, reads.items(), strict=True):
        top = h.min()
        asked = set(zip(h.tolist(), w.tolist(), strict=True))
        fetched = {(y, x // sector_pixels) for y, x in asked}
        for y, x in np.ndindex(height, right - left):
            pixel = (top + y, left + x)
            came = (pixel[0], pixel[1] // sector_pixels) in fetched
            _cell(axes, x, y, _BLUE if pixel in asked else _PALE_ORANGE if came else "#FFFFFF")
        for y, x in np.ndindex(height, (right - left) // sector_pixels):
            _frame(axes, x * sector_pixels, y, sector_pixels, 1, color=_GREY)
        _bare(axes, right - left, height)
        axes.set_aspect(aspect)
        starts, rows = range(0, right - left, sector_pixels), range(0, height, max(1, height // 4))
        _ticks(axes, starts, rows, [left + x for x in starts], [top + y for y in rows])
        axes.set_title(title, fontsize=11, color=_INK, loc="left")
        axes.set_ylabel("h", color=_INK, rotation=0, labelpad=10)
        axes.set_xlabel("w", color=_INK, labelpad=1)
    return Picture(figure, "pixels a warp asks for and sectors it gets")


def pixels_of(request: Request, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which pixels a traced request touched, as `request` draws them.

    Parameters
    ----------
    request
        Of global memory, to a float32 buffer of rows; each lane asks for one value.
    width
        Of a row, in values.

    Returns
    -------
    tuple of numpy.ndarray
        The row and the column of each lane that took part. Rows are counted from the buffer's
        beginning, through all of its planes.

    Raises
    ------
    ValueError
        If the request is of shared memory, or its lanes ask for more than a value each.
    """
    if request.space != "global" or request.bytes != 4:
        raise ValueError(
            f"request={_title(request)}: must be of global memory, 4 bytes for each lane"
        )
    values = np.array([offset // 4 for offset in request.offsets if offset is not None])
    h, w = np.divmod(values, width)
    return h, w


def halo(tile: tuple[int, int], kernel: tuple[int, int]) -> Picture:
    """Draw the inputs that a tile of outputs needs, for stride 1 and dilation 1.

    Parameters
    ----------
    tile
        Rows and columns of outputs.
    kernel
        KH and KW.

    Returns
    -------
    Picture
        The halo tile of inputs, with the place of the outputs and the windows of two of them.
    """
    (tile_h, tile_w), (kernel_h, kernel_w) = tile, kernel
    height, width = tile_h + kernel_h - 1, tile_w + kernel_w - 1
    scale = (_WIDTH - 0.4) / width
    figure, (axes,) = _panels(1, height=height * scale + 0.7)
    for y, x in np.ndindex(height, width):
        in_tile = y >= kernel_h - 1 and x >= kernel_w - 1
        _cell(axes, x, y, _PALE_BLUE if in_tile else _PALE_ORANGE)
    _frame(axes, kernel_w - 1, kernel_h - 1, tile_w, tile_h, color=_INK, thick=2.4)
    first = (tile_h // 2, tile_w // 2)
    for (oh, ow), color, style in (
        (first, _RED, "-"),
        ((first[0] + 1, first[1] + 3), _GREEN, "--"),
    ):
        _frame(axes, ow, oh, kernel_w, kernel_h, color=color, thick=2.4, style=style)
        _cell(axes, ow + kernel_w - 1, oh + kernel_h - 1, color)
    _bare(axes, width, height)
    axes.set_title(
        f"{tile_h}×{tile_w} outputs (framed) need {height}×{width} inputs", fontsize=11, color=_INK
    )
    return Picture(figure, "a tile and its halo")


def flat_axis(shape: tuple[int, int], pitch: int, kernel: tuple[int, int]) -> Picture:
    """Draw an image's rows laid end to end, with the inputs of two outputs, for stride 1.

    Parameters
    ----------
    shape
        H and W of the inputs; there is no padding.
    pitch
        Places from one row to the next, at least W + KW - 1.
    kernel
        KH and KW.

    Returns
    -------
    Picture
        Above the rows with the zeros behind them, below the same places on one axis. Each holds
        its number on that axis; zeros are grey. In the last row of inputs the first output and the
        last one that all columns of the kernel reach are framed in what their taps multiply.
    """
    (height, width), (kernel_h, kernel_w) = shape, kernel
    figure, (rows, axis) = _panels(2, height=0.25 * (height + 1) + 1.15, stacked=True,
                                   ratios=[height, 1])  # fmt: skip
    fills = (_PALE_BLUE, _PALE_ORANGE)
    for place in range(height * pitch):
        h, w = divmod(place, pitch)
        fill, ink = (fills[h % 2], _INK) if w < width else (_PALE, _GREY)
        _cell(rows, w, h, fill, text=str(place), ink=ink)
        _cell(axis, place, 0, fill, text=str(place), ink=ink)
    last = (height - 1) * pitch
    for output, color, style in ((last, _GREEN, "--"), (last + width - 1, _RED, "-")):
        for kh in range(kernel_h):
            first = output - kh * pitch - (kernel_w - 1)
            _frame(axis, first, 0, kernel_w, 1, color=color, thick=2.2, style=style)
            for kw in range(kernel_w):
                h, w = divmod(first + kw, pitch)
                _frame(rows, w, h, 1, 1, color=color, thick=2.2, style=style, inset=0.08)
    _bare(rows, pitch, height)
    _bare(axis, height * pitch, 1)
    _ticks(rows, [], range(height))
    rows.set_ylabel("h", color=_INK, rotation=0, labelpad=10)
    axis.set_title("the flat axis", fontsize=11, color=_INK, loc="left")
    return Picture(figure, "rows laid end to end")


def window(thread_w: int, kernel_w: int, length: int) -> Picture:
    """Draw how the taps of one kernel row slide over a thread's window of inputs.

    Parameters
    ----------
    thread_w
        Neighbouring pixels that the thread owns.
    kernel_w
        KW.
    length
        Inputs in the window.

    Returns
    -------
    Picture
        One line for each tap; dark cells are the inputs that it multiplies.
    """
    scale = (_WIDTH - 0.8) / length
    figure, (axes,) = _panels(1, height=kernel_w * scale + 0.8)
    for kw, j in np.ndindex(kernel_w, length):
        first = kernel_w - 1 - kw
        _cell(axes, j, kw, _BLUE if first <= j < first + thread_w else _PALE_ORANGE)
    for j in range(0, length, 4):
        _frame(axes, j, 0, 4, kernel_w, color=_INK, thick=1.2)
    _bare(axes, length, kernel_w)
    _ticks(axes, range(0, length, 4), range(kernel_w))
    axes.set_xlabel("input in the window (frames: loads of 16 bytes)", color=_INK)
    axes.set_ylabel("tap kw", color=_INK)
    return Picture(figure, "the sliding window")


#: Who holds what of an instruction's matrices, as mma.cuh says: of A [16, k], B [k, 8] and C
#: [16, 8], with k counted in registers, the lane and the number of its register.
_FRAGMENTS: Mapping[str, tuple[tuple[int, int], Callable[[int, int], tuple[int, int]]]] = {
    "A": ((16, 8), lambda row, k: (4 * (row % 8) + k % 4, row // 8 + 2 * (k // 4))),
    "B": ((8, 8), lambda k, column: (4 * column + k % 4, k // 4)),
    "C": (
        (16, 8),
        lambda row, column: (4 * (row % 8) + column // 2, 2 * (row // 8) + column % 2),
    ),
}


def fragments(lane: int) -> Picture:
    """Draw which lane of a warp holds what of a tensor core's instruction.

    Parameters
    ----------
    lane
        Whose registers are framed.

    Returns
    -------
    Picture
        A, B and C as they meet in the product, each register with its lane's number; pale to dark
        are a lane's first to last register. A and B are of m16n8k8; with two values in a register
        they are twice as long along k.
    """
    figure, _ = _panels(1, height=5.0)
    figure.clear()
    grid = figure.add_gridspec(2, 2, height_ratios=[8, 16])
    for name, place in (("B", (0, 1)), ("A", (1, 0)), ("C", (1, 1))):
        axes = figure.add_subplot(grid[place])
        (rows, columns), holder = _FRAGMENTS[name]
        for row, column in np.ndindex(rows, columns):
            owner, register = holder(row, column)
            count = 2 if name == "B" else 4
            fill = _mix("#FFFFFF", _BLUE, 0.1 + 0.4 * register / (count - 1))
            _box(axes, column, row, 1, 1, fill)
            axes.text(column + 0.5, row + 0.5, str(owner), ha="center", va="center", fontsize=6.5,
                      color=_INK)  # fmt: skip
            if owner == lane:
                _frame(axes, column, row, 1, 1, color=_RED, thick=2.0)
        _bare(axes, columns, rows)
        axes.set_title(name, fontsize=11, color=_INK, loc="left")
    return Picture(figure, "who holds what of an instruction")


def promotion(
    errors: Mapping[str, Mapping[int, float]], gate: float, unit: str = "condition error"
) -> Picture:
    """Draw errors against how many terms tensor cores sum before they are added outside of them.

    Parameters
    ----------
    errors
        For each line's name the error for each number of terms.
    gate
        The largest error of a right float32 result.
    unit
        What the errors are.

    Returns
    -------
    Picture
        Both axes are logarithmic. The table has the numbers.
    """
    figure, (axes,) = _panels(1, height=3.4)
    markers = "osD^v"
    colors = (_BLUE, _GREEN, _ORANGE, _RED, _INK)
    terms = sorted({count for line in errors.values() for count in line})
    rows = [("terms", *map(str, terms))]
    for (name, line), marker, color in zip(errors.items(), markers, colors, strict=False):
        counts = sorted(line)
        axes.plot(counts, [line[c] for c in counts], marker=marker, color=color, markersize=5,
                  linewidth=1.2, label=name)  # fmt: skip
        rows.append((name, *(f"{line[c]:.1f}" if c in line else "" for c in terms)))
    axes.axhline(gate, color=_INK, linewidth=1.0, linestyle="--", label="gate")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(terms)
    axes.set_xlabel("terms that tensor cores sum", fontsize=9, color=_INK)
    axes.set_ylabel(unit, fontsize=9, color=_INK)
    _plain(axes)
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.legend(fontsize=8, frameon=False)
    return Picture(figure, "errors against the promotion interval", aligned(rows, left=(0,)))


def banks(words: Mapping[str, np.ndarray] | Request, count: int = 32) -> Picture:
    """Draw which banks of shared memory the lanes of one request use.

    Parameters
    ----------
    words
        For each panel's title the indices of the 4-byte words, [lanes, words of a lane]. Or a
        request from a `Report`: one panel, or one for each part of the warp that is served for
        itself: halves where the lanes ask for 8 bytes each, quarters where they ask for 16.
    count
        Number of banks.

    Returns
    -------
    Picture
        Lanes down, banks across. Blue where a bank serves one word, red where it has to serve
        several, one after the other. The table of a request says how many wavefronts each panel
        takes, and which banks hold it up.
    """
    first_lanes, numbers = [0] * len(words) if isinstance(words, Mapping) else [], ""
    if isinstance(words, Request):
        words, first_lanes, numbers = _shared_words(words, count)
    lanes = max(len(w) for w in words.values())
    scale = (_WIDTH - 0.8) / count
    if lanes * scale * len(words) > 4.5:  # a whole warp: flat cells
        scale = 4.5 / lanes / len(words)
    figure, panels = _panels(len(words), height=len(words) * (lanes * scale + 0.75), stacked=True)
    for axes, first, (title, places) in zip(panels, first_lanes, words.items(), strict=True):
        used = np.unique(places)
        load = np.bincount(used[used >= 0] % count, minlength=count)
        for lane, bank in np.ndindex(lanes, count):
            _cell(axes, bank, lane, "#FFFFFF")
        for lane, mine in enumerate(places):
            for bank in mine[mine >= 0] % count:
                _cell(axes, bank, lane, _BLUE if load[bank] == 1 else _RED)
        _bare(axes, count, lanes)
        axes.set_aspect(min(1.0, scale / ((_WIDTH - 0.8) / count)))
        rows = range(0, lanes, 1 if lanes <= 8 else 4)
        _ticks(axes, range(0, count, 4), rows, row_labels=[first + r for r in rows])
        axes.set_title(title, fontsize=11, color=_INK, loc="left")
        axes.set_ylabel("lane", color=_INK)
    panels[-1].set_xlabel("bank", color=_INK)
    return Picture(figure, "lanes and banks", numbers)


def _shared_words(request: Request, count: int) -> tuple[dict[str, np.ndarray], list[int], str]:
    """Cut a request into what is served together: words by title (-1: none), first lanes, table."""
    if request.space != "shared":
        raise ValueError(f"the request is of {request.space} memory; banks are shared memory's")
    each = max(1, request.bytes // 4)
    words = np.full((32, each), -1)
    for lane, offset in enumerate(request.offsets):
        if offset is not None:
            words[lane] = offset // 4 + np.arange(each)
    together = 32 if request.bytes <= 4 else 16 if request.bytes <= 8 else 8
    if together == 8 and any(_pairs_agree(request.offsets, step) for step in (1, 2)):
        together = 16
    panels, firsts = {}, list(range(0, 32, together))
    rows = [("lanes", "wavefronts", "banks that serve so many words")]
    for first in firsts:
        part = words[first : first + together]
        used = np.unique(part)
        load = np.bincount(used[used >= 0] % count, minlength=count)
        passes = int(load.max())
        lanes = f"{first}-{first + together - 1}"
        busiest = np.flatnonzero(load == passes) if passes else []
        plural = "" if passes == 1 else "s"
        panels[f"lanes {lanes.replace('-', ' to ')}: {passes} wavefront{plural}"] = part
        rows.append((lanes, str(passes), _runs(busiest)))
    return panels, firsts, f"{_title(request)}\n{aligned(rows, left=(0, 2))}"


def _pairs_agree(offsets: Sequence[int | None], step: int) -> bool:
    """Whether each lane wants what lane ^ `step` wants, where both take part."""
    pairs = [(offsets[lane], offsets[lane ^ step]) for lane in range(32)]
    return all(one == other for one, other in pairs if None not in (one, other))


def coalescing(request: Request) -> Picture:
    """Draw a warp's lanes on the sectors of one request to global memory.

    Parameters
    ----------
    request
        One of a `Report`'s requests.

    Returns
    -------
    Picture
        Above the lanes, grey where they take no part; below the sectors that the request touches,
        with a gap where they are no neighbours in memory. Dark bytes were asked for, pale ones come
        with them. The table says for each sector which lanes it serves and how many of its bytes
        are asked for.
    """
    if request.space != "global":
        raise ValueError(f"the request is of {request.space} memory; sectors are global memory's")
    lanes_of: dict[int, list[int]] = {}
    for lane, offset in enumerate(request.offsets):
        if offset is not None:
            last = (offset + request.bytes - 1) // SECTOR_BYTES
            for sector in range(offset // SECTOR_BYTES, last + 1):
                lanes_of.setdefault(sector, []).append(lane)
    sectors = sorted(lanes_of)
    gaps = [0, *(0.25 * (b > a + 1) for a, b in pairwise(sectors))]
    width = min(5.0, (32 - sum(gaps)) / len(sectors))
    left = (32 - width * len(sectors) - sum(gaps)) / 2
    start = {s: left + i * width + sum(gaps[: i + 1]) for i, s in enumerate(sectors)}

    figure, (axes,) = _panels(1, height=2.5)
    down, unit = 5.0, width / SECTOR_BYTES  # where the sectors lie; the width of a byte
    rows = [("sector", "lanes", f"bytes asked for, of {SECTOR_BYTES}")]
    for sector in sectors:
        _box(axes, start[sector], down, width, 1, _PALE_ORANGE)
        asked = set()
        for lane in lanes_of[sector]:
            offset = request.offsets[lane]
            asked |= {*range(offset, offset + request.bytes)}
        asked &= {*range(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)}
        for offset in sorted({byte - byte % request.bytes for byte in asked}):
            place = start[sector] + (offset - sector * SECTOR_BYTES) * unit
            _box(axes, place, down, request.bytes * unit, 1, _BLUE)
        _frame(axes, start[sector], down, width, 1, color=_INK)
        rows.append((str(sector), _runs(lanes_of[sector]), str(len(asked))))
    for lane, offset in enumerate(request.offsets):
        _cell(axes, lane, 0, _PALE_BLUE if offset is not None else _PALE)
        if offset is not None:
            middle = offset % SECTOR_BYTES + request.bytes / 2
            to = start[offset // SECTOR_BYTES] + middle * unit
            axes.plot([lane + 0.5, to], [1, down], color=_GREY, linewidth=0.8, zorder=1)
    _bare(axes, 32, 6)
    axes.set_aspect("auto")
    _ticks(axes, range(0, 32, 4), [0, 5], row_labels=["lane", "sector"])
    axes.xaxis.tick_top()
    step = -(-len(sectors) // 8)
    for sector in sectors[::step]:
        axes.text(
            start[sector] + width / 2, 6.2, str(sector), ha="center", va="top", fontsize=9,
            color=_INK,
        )  # fmt: skip
    axes.set_title(_title(request), fontsize=11, color=_INK, loc="left")
    return Picture(figure, "lanes and sectors", f"{_title(request)}\n{aligned(rows, left=(1,))}")


def reuse(report: Report, buffer: str, shape: Sequence[int], plane: Sequence[int] = ()) -> Picture:
    """Draw how often a traced launch read each value of one plane of a buffer.

    Parameters
    ----------
    report
        What was traced.
    buffer
        The kernel's parameter.
    shape
        The buffer's shape, such as a problem's `input_shape`; the last two sizes are the plane's.
    plane
        Which plane, as indices of the sizes before the last two. The first one if left out.

    Returns
    -------
    Picture
        A heat map, darker where a value is read more often. The table says how many values of the
        plane are read how often.
    """
    loads = report.buffers[buffer].loads.reshape(shape)
    counts = loads[tuple(plane) or (0,) * (len(shape) - 2)]
    if counts.ndim != 2:
        raise ValueError(f"plane={tuple(plane)}: must have {len(shape) - 2} indices")
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("reads", ["#FFFFFF", _PALE_BLUE, _BLUE, _INK])
    height, width = counts.shape
    drawn_height = min((_WIDTH - 1.4) * height / width, 4.5)
    figure, (axes,) = _panels(1, height=drawn_height + 0.8)
    image = axes.imshow(
        counts, cmap=shades, vmin=0, vmax=max(1, counts.max()), extent=(0, width, height, 0)
    )
    _bare(axes, width, height)
    _frame(axes, 0, 0, width, height, color=_INK)
    across, down = (range(0, n, max(1, n // 6)) for n in (width, height))
    _ticks(axes, across, down)
    axes.set_xlabel("w", color=_INK, labelpad=1)
    axes.set_ylabel("h", color=_INK, rotation=0, labelpad=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, label="reads")
    bar.ax.tick_params(labelsize=9, colors=_INK)
    title = f"reads of each value of {buffer!r}, {height}×{width}"
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    rows = [("reads", "values")]
    rows += [
        (f"{n:,}", f"{c:,}") for n, c in zip(*np.unique(counts, return_counts=True), strict=True)
    ]
    return Picture(figure, f"reads of {buffer!r}", f"{title}\n{aligned(rows)}")


def cost_by_line(report: Report) -> Picture:
    """Draw the kernel's source with a bar of cost beside each line that goes to memory.

    Parameters
    ----------
    report
        What was traced. Sites of a header that was not inlined are left out: their lines are the
        header's.

    Returns
    -------
    Picture
        Blue bars are sectors of global memory, orange ones wavefronts of shared memory. Longer
        stretches without a cost are cut out. The table has a row for each line with a bar.
    """
    lines = report.source.splitlines()
    costs: dict[int, list[int]] = {}
    for site in report.sites:
        if 1 <= site.line <= len(lines):
            both = costs.setdefault(site.line, [0, 0])
            both[0] += site.sectors
            both[1] += site.wavefronts
    if not costs:
        raise ValueError("the report has no line that goes to memory")
    shown: list[int | None] = []
    for before, line in pairwise([0, *sorted(costs)]):
        free = list(range(before + 1, line))
        if before == 0:
            shown += free[-3:]
        else:  # a long gap keeps what stands next to the costs
            shown += free if len(free) <= 8 else [*free[:3], None, *free[-3:]]
        shown.append(line)

    texts = {n: lines[n - 1].expandtabs(4) for n in shown if n is not None}
    # Preprocessor lines have no indentation.
    indented = [t for t in texts.values() if t.strip() and not t.startswith("#")]
    cut, longest = min(len(t) - len(t.lstrip()) for t in indented), 63
    figure, (axes,) = _panels(1, height=0.165 * len(shown) + 0.5)
    bars = 74  # where they begin; a character is about one wide, and the picture 106
    most = max(map(sum, costs.values()))
    for row, number in enumerate(shown):
        if number is None:
            axes.text(5, row, "⋮", fontsize=7, color=_GREY, va="center", family="DejaVu Sans")
            continue
        text = texts[number] if texts[number].startswith("#") else texts[number][cut:]
        text = text if len(text) <= longest else f"{text[: longest - 1]}…"
        for x, what, side, color in ((3, number, "right", _GREY), (4.5, text, "left", _INK)):
            axes.text(
                x, row, str(what), ha=side, va="center", fontsize=7, color=color,
                family="DejaVu Sans Mono", parse_math=False,
            )  # fmt: skip
        if number not in costs:
            continue
        place = bars
        for cost, color in zip(costs[number], (_BLUE, _ORANGE), strict=True):
            axes.barh(row, 24 * cost / most, 0.7, left=place, color=color)
            place += 24 * cost / most
        axes.text(place + 0.5, row, f"{sum(costs[number]):,}", va="center", fontsize=7, color=_INK)
    axes.set_xlim(0, 106)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_axis_off()
    axes.set_title("sectors (blue) and wavefronts (orange)", fontsize=9, color=_INK, loc="right")
    rows = [("line", "sectors", "wavefronts", "source")]
    rows += [
        (str(n), f"{s:,}" if s else "", f"{w:,}" if w else "", lines[n - 1].strip())
        for n, (s, w) in sorted(costs.items())
    ]
    return Picture(figure, "the cost of each line", aligned(rows, left=(3,)))


def _title(request: Request) -> str:
    """Say what a request is, in a line."""
    active = sum(offset is not None for offset in request.offsets)
    unit = "sector" if request.space == "global" else "wavefront"
    return (
        f"{request.op} of {request.buffer!r} in line {request.line}: {active} lanes, "
        f"{request.bytes} bytes each, {request.cost} {unit}{'s' * (request.cost != 1)}"
    )


def _runs(values: Sequence[int]) -> str:
    """Shorten ascending integers: 0-3, 8, 10-11."""
    runs: list[list[int]] = []
    for value in map(int, values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _panels(
    count: int, height: float, stacked: bool = False, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Make a figure with `count` panels, side by side or stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    shape = (count, 1) if stacked else (1, count)
    options: dict[str, Any] = {"height_ratios": ratios} if ratios else {}
    panels = figure.subplots(*shape, squeeze=False, gridspec_kw=options)
    return figure, list(panels.flat)


def _cell(axes: Axes, x: float, y: float, fill: str, text: str = "", ink: str = _INK) -> None:
    _box(axes, x, y, 1, 1, fill)
    if text:
        _label(axes, x + 0.5, y + 0.5, text, ink)


def _box(axes: Axes, x: float, y: float, width: float, height: float, fill: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=fill, edgecolor="#BBBBBB", linewidth=0.5)
    )


def _label(axes: Axes, x: float, y: float, text: str, ink: str = _INK) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=ink)


def _frame(
    axes: Axes, x: float, y: float, width: float, height: float, *, color: str,
    thick: float = 1.0, style: str = "-", inset: float = 0.0,
) -> None:  # fmt: skip
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(
            (x + inset, y + inset),
            width - 2 * inset,
            height - 2 * inset,
            fill=False,
            edgecolor=color,
            linewidth=thick,
            linestyle=style,
            zorder=3,
        )
    )


def _bare(axes: Axes, width: int, height: int) -> None:
    """Fit the panel to the grid, rows counted downwards, without a box around it."""
    axes.set_xlim(-0.06, width + 0.06)
    axes.set_ylim(height + 0.06, -0.06)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ticks(
    axes: Axes,
    columns: Sequence[int],
    rows: Sequence[int],
    column_labels: Sequence[int] | None = None,
    row_labels: Sequence[int | str] | None = None,
) -> None:
    """Label the middles of some of the grid's columns and rows."""
    axes.set_xticks([c + 0.5 for c in columns], column_labels or list(columns))
    axes.set_yticks([r + 0.5 for r in rows], row_labels or list(rows))
    axes.tick_params(length=0, labelsize=9, colors=_INK, pad=2)


def _mix(one: str, other: str, share: float) -> str:
    """Mix two colours, `share` of the other."""
    pairs = zip(*([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (one, other)), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in pairs)


# ---- Measured ----------------------------------------------------------------------------------


def bars(record: Record, *names: str) -> Picture:
    """Draw the time of every implementation, one panel for each shape of a record.

    Parameters
    ----------
    record
        What was measured.
    *names
        Of shapes.

    Returns
    -------
    Picture
        Bars on a logarithmic axis: stages blue, PyTorch in float32 orange, in lower precision pale.
        The line is the least time of the definition's FMAs at the measured FP32 rate. The table has
        all numbers of the shapes' rows.
    """
    shapes = [record.shape(name) for name in names]
    labels = [row.name for row in shapes[0].rows]
    figure, panels = _panels(len(shapes), height=0.9 + 0.235 * len(labels))
    parts = []
    for axes, shape in zip(panels, shapes, strict=True):
        timed = [(i, row, row.time_ms()) for i, row in enumerate(shape.rows) if row.cold]
        for i, row, time in timed:
            lower = row.kind != "stage" and not row.name.startswith(_FLOAT32)
            color = _BLUE if row.kind == "stage" else _PALE_ORANGE if lower else _ORANGE
            axes.barh(i, time, 0.7, color=color, edgecolor=_ORANGE if lower else color)
        times = [time for *_, time in timed]
        axes.set_xscale("log")
        axes.set_xlim(min(times) / 2, max(times) * 6)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        for i, _, time in timed:  # in a column, out of the line's way
            axes.text(max(times) * 6, i, _three_digits(time), ha="right", va="center",
                      fontsize=8, color=_INK)  # fmt: skip
        axes.set_yticks(range(len(labels)), labels if axes is panels[0] else [""] * len(labels))
        if record.ceilings.fp32_fma:
            least = 1000 * shape.problem.flops / record.ceilings.fp32_fma
            axes.axvline(least, color=_RED, linewidth=1.2, linestyle="--", zorder=0)
        axes.set_xlabel("milliseconds, cold", fontsize=9, color=_INK)
        axes.set_title(shape.name, fontsize=11, color=_INK)
        _plain(axes)
        parts.append(_speeds(record, shape))
    return Picture(figure, "the times of all implementations", "\n\n".join(parts))


_FLOAT32 = "cudnn_float32"


def _speeds(record: Record, shape: Shape) -> str:
    """Return a table of all that was measured of a shape's rows."""
    rows = [
        (
            *(shape.name, "cold ms", "sustained", "TFLOP/s", "of FMA", "x cuDNN"),
            *("rel. L2", "condition"),
        )
    ]
    for row in shape.rows:
        name = row.name.replace("_channels_last", ", last")
        if row.cold is None:
            rows.append((name, row.status, *[""] * 6))
            continue
        sustained = row.time_ms("sustained")
        share, speedup = (
            record.share_of_fma(shape.name, row.name),
            shape.speedup(row.name, over=_FLOAT32),
        )
        rows.append(
            (
                name,
                f"{row.time_ms():.3f}",
                "" if sustained is None else f"{sustained:.3f}",
                f"{shape.tflops(row.name):.1f}",
                "" if share is None else f"{share:.1%}",
                "" if speedup is None else f"{speedup:.2f}",
                f"{row.errors.relative_l2:.1e}" if row.errors else "",
                f"{row.errors.condition:,.1f}" if row.errors else "",
            )
        )
    return aligned(rows, left=(0,))


@dataclass(frozen=True)
class Roof:
    """A ceiling of arithmetic.

    Attributes
    ----------
    name
        What multiplies, and how.
    flops_per_second
        By the operator's definition: a way that needs three products for each has a third of the
        instructions' rate.
    """

    name: str
    flops_per_second: float


#: How `roofline` marks each kind of point, and what its legend calls it.
_POINTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "measured": ("bytes as profiled", dict(marker="o", mfc=_BLUE, mec="white")),
    "executed": ("as executed", dict(marker="o", mfc="white", mec=_BLUE)),
    "fewest bytes": ("bytes that must move", dict(marker="<", mfc=_GREEN, mec="white")),
    "bound": ("at most", dict(marker="D", mfc="white", mec=_BLUE)),
}


@dataclass(frozen=True)
class RooflinePoint:
    """Where something stands on a roofline.

    Attributes
    ----------
    intensity
        FLOP for each byte from and to DRAM.
    flops_per_second
        Its rate.
    roof
        The name of the roof that it stands under; the first one's if None.
    kind
        ``"measured"``, by the definition's FLOP and a profiler's bytes; ``"executed"``, by the FLOP
        that a kernel really did; ``"fewest bytes"``, where no bytes were measured and those that
        must move stand in, so that the point may belong further left; or ``"bound"``, for a rate
        that nothing exceeds.
    """

    intensity: float
    flops_per_second: float
    roof: str | None = None
    kind: str = "measured"


def roofline(
    roofs: Sequence[Roof], bytes_per_second: float, points: Mapping[str, RooflinePoint]
) -> Picture:
    """Draw a GPU's ceilings and where kernels stand below them.

    Parameters
    ----------
    roofs
        The ceilings of arithmetic, at least one.
    bytes_per_second
        That of memory.
    points
        By name. Those in one place share their label, and each but the first is a ring around it.

    Returns
    -------
    Picture
        Both axes are logarithmic; the ridge of a single roof is marked. The table has the points
        and how far below their roof they are.

    Raises
    ------
    ValueError
        If a point's roof or kind is none.
    """
    by_name = {roof.name: roof.flops_per_second for roof in roofs}
    for name, point in points.items():
        if point.roof not in (None, *by_name):
            raise ValueError(f"roof={point.roof!r} of {name}: must be one of {[*by_name]}")
        if point.kind not in _POINTS:
            raise ValueError(f"kind={point.kind!r} of {name}: must be one of {[*_POINTS]}")
    tall = 3.9 if len(roofs) == 1 else 5.4
    figure, (axes,) = _panels(1, height=tall)
    highest = max(by_name.values())
    intensities = [highest / bytes_per_second, *(point.intensity for point in points.values())]
    left = min([min(by_name.values()) / bytes_per_second, *intensities]) / 4
    right = max(intensities) * 8
    rates = [point.flops_per_second for point in points.values()]
    bottom, top = min([left * bytes_per_second, *rates]) / 2e12, 2e-12 * max([*rates, highest])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for roof in roofs:
        ridge, rate = roof.flops_per_second / bytes_per_second, roof.flops_per_second / 1e12
        axes.plot([left, ridge, right], [left * bytes_per_second / 1e12, rate, rate],
                  color=_INK, linewidth=1.6)  # fmt: skip
        axes.text(ridge * 1.5, 1.14 * rate, f"{roof.name}, {rate:.0f} TFLOP/s", fontsize=8,
                  color=_GREY)  # fmt: skip
    if len(roofs) == 1:
        ridge = highest / bytes_per_second
        axes.axvline(ridge, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
        sides = (ridge / 1.1, "right", "memory"), (ridge * 1.1, "left", "arithmetic")
        for x, side, limit in sides:
            axes.text(x, top, f"{limit} is the limit", ha=side, va="top", fontsize=8, color=_GREY)
    copied = left * 1.8  # where the slope is named, below it
    speed = f"copy, {bytes_per_second / 1e12:.2f} TB/s"
    axes.text(copied, copied * bytes_per_second / 2.2e12, speed, fontsize=8, color=_GREY)
    rows = [("", "FLOP/byte", "TFLOP/s", "roof", "", "of the roof")]
    for name, point in points.items():
        roof = roofs[0].name if point.roof is None else point.roof
        most = min(by_name[roof], point.intensity * bytes_per_second)
        rows.append(
            (name, _three_digits(point.intensity), f"{point.flops_per_second / 1e12:.2f}",
             f"{most / 1e12:.1f}", "copy" if most < by_name[roof] else roof,
             f"{point.flops_per_second / most:.1%}")
        )  # fmt: skip
    together = _in_one_place(points)
    for names in together:
        for ring, name in enumerate(names):
            point = points[name]
            look = dict(_POINTS[point.kind][1])
            if ring:
                look.update(mfc="none", mec=look["mfc"])
            axes.plot(point.intensity, point.flops_per_second / 1e12, linestyle="", zorder=3,
                      markersize=7 + 5 * ring, **look)  # fmt: skip
    points_of_decade = 72 * (tall - 0.6) / np.log10(top / bottom)
    _label_points(
        axes, {", ".join(names): points[names[0]] for names in together}, points_of_decade
    )
    kinds = dict.fromkeys(point.kind for point in points.values())
    if len(kinds) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], linestyle="", markersize=6.5, label=_POINTS[kind][0],
                          **_POINTS[kind][1]) for kind in kinds]  # fmt: skip
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")
    axes.set_xlabel("FLOP for each byte of DRAM", fontsize=9, color=_INK)
    axes.set_ylabel("TFLOP/s", fontsize=9, color=_INK)
    _plain(axes)
    return Picture(figure, "the roofline", aligned(rows, left=(0, 4)))


def _in_one_place(points: Mapping[str, RooflinePoint]) -> list[list[str]]:
    """Put together the names of points that a reader could not tell apart."""
    places: list[list[str]] = []
    for name, point in points.items():
        for names in places:
            other = points[names[0]]
            if all(
                abs(np.log10(a / b)) < 0.015
                for a, b in ((point.intensity, other.intensity),
                             (point.flops_per_second, other.flops_per_second))
            ):  # fmt: skip
                names.append(name)
                break
        else:
            places.append([name])
    return places


def _label_points(
    axes: Axes, points: Mapping[str, RooflinePoint], points_of_decade: float, gap: float = 12.0
) -> None:
    """Write names to the right of points, at least `gap` of a point (1/72 inch) below each other.

    A line leads to a name that had to make way.
    """
    columns: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name].intensity):
        if columns and points[name].intensity < 1.6 * points[columns[-1][-1]].intensity:
            columns[-1].append(name)
        else:
            columns.append([name])
    for names in columns:
        names.sort(key=lambda name: points[name].flops_per_second)
        right = max(points[name].intensity for name in names)
        own = [points_of_decade * np.log10(points[name].flops_per_second) for name in names]
        # What lies on the roof is named below it.
        below = [9 * (points[name].kind == "bound") for name in names]
        wanted = [place - under for place, under in zip(own, below, strict=True)]
        for i, place in enumerate(_spread(wanted, gap)):
            x, y = points[names[i]].intensity, points[names[i]].flops_per_second / 1e12
            line = dict(arrowstyle="-", color=_GREY, linewidth=0.6, shrinkA=0, shrinkB=3)
            made_way = abs(place - wanted[i]) > 3 or x < right / 1.05
            axes.annotate(
                names[i], (x, y), (right * 1.13, y * 10 ** ((place - own[i]) / points_of_decade)),
                fontsize=9, color=_INK, va="center",
                bbox=dict(facecolor="white", edgecolor="none", pad=0.5),
                arrowprops=line if made_way else None,
            )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move ascending places as little as it takes until neighbours are `gap` apart."""
    groups: list[list[float]] = []  # middle, members
    for place in wanted:
        groups.append([place, 1])
        while len(groups) > 1:
            (low, few), (high, many) = groups[-2:]
            if high - low >= gap * (few + many) / 2:
                break
            # Each keeps its distance from what it wants, on the average.
            middle = (low * few + high * many) / (few + many)
            groups[-2:] = [[middle, few + many]]
    return [
        middle + gap * (i - (count - 1) / 2) for middle, count in groups for i in range(int(count))
    ]


def growth(record: Record) -> Picture:
    """Draw how the time for an output pixel grows, one panel for each axis of a record.

    Parameters
    ----------
    record
        With its part ``growth``.

    Returns
    -------
    Picture
        The fastest right stage at each point (blue, dots) and cuDNN in float32 (orange, squares);
        both axes are logarithmic. The table has a row for each point, with the memory that each
        needs beside inputs and output.
    """
    from matplotlib.figure import Figure

    titles = {
        "batch": "images N",
        "side": "side of the square image",
        "channels": "channels C_in = C_out",
        "kernel_area": "taps KH · KW",
    }
    figure = Figure(figsize=(_WIDTH, 5.0), layout="constrained")
    rows = [("", "", "best stage", "ms", "ns/pixel", "MB", "cuDNN", "ns/pixel", "MB", "x cuDNN")]
    for axes, (axis, points) in zip(
        figure.subplots(2, 2).flat, record.growth.items(), strict=False
    ):
        lines: tuple[list, list] = ([], [])
        for point in points:
            pair = point.best, point.row(_FLOAT32)
            cells = []
            for line, row in zip(lines, pair, strict=True):
                pixel = point.seconds_per_pixel(row)
                line.append(np.nan if pixel is None else 1e9 * pixel)
                memory = row and row.peak_bytes
                cells += (
                    [f"{row.time_ms():.3f}", f"{1e9 * pixel:.3f}",
                     "" if memory is None else f"{memory / 1e6:.0f}"]
                    if pixel is not None else ["", "", ""]
                )  # fmt: skip
            best = pair[0].name if pair[0] else ""
            speedup = point.speedup(best, over=_FLOAT32) if best else None
            ratio = "" if speedup is None else f"{speedup:.2f}"
            growing = "taps" if axis == "kernel_area" else axis
            rows.append((growing, str(point.value), best, *cells, ratio))
        values = [point.value for point in points]
        for line, color, style in zip(lines, (_BLUE, _ORANGE), ("o-", "s--"), strict=True):
            axes.plot(values, line, style, color=color, markersize=4, linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(titles[axis], fontsize=9, color=_INK)
        axes.set_ylabel("ns for a pixel", fontsize=9, color=_INK)
        _plain(axes)
        # Where the axis is short, its decades are too few to read it by.
        axes.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
        )
        shown = values[:: 1 + len(values) // 6]
        axes.set_xticks(shown, list(map(str, shown)))
    figure.axes[0].legend(["best stage", "cuDNN float32"], fontsize=8, frameon=False)
    return Picture(figure, "time for a pixel as a problem grows", aligned(rows, left=(0, 2)))


# How the operator's choices are marked: by shape and by colour. PyTorch's own is orange everywhere.
_MARKS = {
    "hopper": dict(marker="p", mfc=_BLUE, mec=_BLUE),
    "hopper_single": dict(marker="p", mfc="white", mec=_BLUE),
    "tensor_core": dict(marker="h", mfc="white", mec=_BLUE),
    "tensor_core_split": dict(marker="o", mfc=_BLUE, mec=_BLUE),
    "tensor_core_narrow": dict(marker="o", mfc="white", mec=_BLUE),
    "one_channel": dict(marker="^", mfc=_GREEN, mec=_GREEN),
    "few_channels": dict(marker="v", mfc="white", mec=_GREEN),
    "register_blocked": dict(marker="s", mfc=_INK, mec=_INK),
    "winograd": dict(marker="D", mfc="white", mec=_INK),
    PYTORCH: dict(marker="X", mfc=_ORANGE, mec=_ORANGE),
}


def speedups(record: OperatorRecord, form: tuple[str, str, bool]) -> Picture:
    """Draw how many times as fast as PyTorch the operator is, one row for each problem.

    Parameters
    ----------
    record
        What was measured.
    form
        Dtype, memory format and whether TF32 is allowed.

    Returns
    -------
    Picture
        A mark for each problem, the fastest on top, on a logarithmic axis; it says which kernel
        computed it. The line is PyTorch. The table has the times; what was not timed is left out.
    """
    timed = [(case, case.speedup) for case in record.of_form(form) if case.speedup is not None]
    timed.sort(key=lambda pair: -pair[1])
    figure, (axes,) = _panels(1, height=1.3 + 0.17 * len(timed))
    rows = [("ms", "kernel", "ratio", "PyTorch", "operator")]
    for i, (case, speedup) in enumerate(timed):
        axes.plot([1, speedup], [i, i], color="#BBBBBB", linewidth=1, zorder=1)
        axes.plot(speedup, i, linestyle="", markersize=5.5, zorder=3, **_MARKS[case.choice])
        times = (f"{1000 * cold.seconds:.4f}" for cold in (case.pytorch_beside, case.operator.cold))
        rows.append((case.shape, case.choice, f"{speedup:.2f}", *times))
    axes.axvline(1, color=_RED, linewidth=1.2, linestyle="--", zorder=2)
    axes.set_xscale("log", base=2)
    values = [speedup for _, speedup in timed]
    axes.set_xlim(min([0.9, *values]) / 1.05, 1.2 * max([1.9, *values]))
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_yticks(range(len(timed)), [case.shape for case, _ in timed])
    axes.set_xlabel("times as fast as PyTorch", fontsize=9, color=_INK)
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelsize=9)
    _name_marks(axes, [case for case, _ in timed])
    return Picture(figure, "the operator against PyTorch's own", aligned(rows, left=(0, 1)))


def _name_marks(axes: Axes, cases: Sequence[Case]) -> None:
    """Name the marks of `speedups`, in the corner that no mark of a sorted list reaches."""
    from matplotlib.lines import Line2D

    used = {case.choice for case in cases}
    handles = [
        Line2D([], [], linestyle="", markersize=5.5, label=name, **style)
        for name, style in _MARKS.items()
        if name in used
    ]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")


def layer_times(
    record: DecoderRecord | None, mode: str = "float32", after: str | None = None
) -> Picture:
    """Draw what each layer of a network takes, one panel for inference and one for training.

    Parameters
    ----------
    record
        What was measured; None for a picture that says that nothing was.
    mode
        Its name.
    after
        What the kernels of the swapped layers were chosen by, to draw the network after the swap
        beside the one before; None for the latter alone.

    Returns
    -------
    Picture
        Bars of milliseconds: before orange, after blue; of training, the backward is pale. The
        table has the numbers.
    """
    name = "what each layer takes"
    if record is None:
        figure, (axes,) = _panels(1, height=0.8)
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", color=_GREY)
        return Picture(figure, name, "not measured yet")
    one = record.mode(mode)
    labels = list(one.before.profile.inference)
    runs = [("before", one.before.profile, _ORANGE, _PALE_ORANGE)]
    if after is not None:
        runs.append(("after", one.chosen_by(after).profile, _BLUE, _PALE_BLUE))
    high = 0.7 / len(runs)
    figure, panels = _panels(2, height=1.4 + (0.2 + 0.13 * (len(runs) - 1)) * len(labels))
    for which, (_, profile, color, pale) in enumerate(runs):
        places = [i + (which - (len(runs) - 1) / 2) * high for i in range(len(labels))]
        for axes, halves in zip(panels, _halves(profile), strict=True):
            left = [0.0] * len(labels)
            for half, fill in zip(halves, (color, pale), strict=False):
                widths = [1000 * half[layer] for layer in labels]
                axes.barh(places, widths, high, left, color=fill, edgecolor=color, linewidth=0.6)
                left = [a + b for a, b in zip(left, widths, strict=True)]
    shown = [label + (" *" if label in one.alone else "") for label in labels]
    for axes, title in zip(panels, ("inference", "training"), strict=True):
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), shown if axes is panels[0] else [""] * len(labels))
        axes.set_xlabel("milliseconds of kernels", fontsize=9, color=_INK)
        axes.set_title(title, fontsize=11, color=_INK)
        _plain(axes)
    keys = [(f"{when}, {half}" if half else when, fill)
            for when, _, color, pale in runs
            for half, fill in (("forward", color), ("backward", pale))]  # fmt: skip
    _legend(figure, keys)
    what = ("inference", "forward", "backward")
    rows = [("ms", *(cell for when, *_ in runs for cell in (when, "", "")))]
    rows.append(("", *(what * len(runs))))
    for label, layer in zip(shown, labels, strict=True):
        halves = [half[layer] for _, p, *_ in runs for half in (p.inference, p.forward, p.backward)]
        rows.append((label, *(f"{1000 * seconds:.3f}" for seconds in halves)))
    return Picture(figure, name, aligned(rows, left=(0,)))


def _halves(profile: Profile) -> tuple[tuple[Mapping[str, float], ...], ...]:
    """Return what is stacked in the panels of `layer_times`."""
    return (profile.inference,), (profile.forward, profile.backward)


def _legend(figure: Figure, keys: Sequence[tuple[str, str]]) -> None:
    """Name the colours of bars, below all panels."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=fill, edgecolor="#BBBBBB", label=text) for text, fill in keys]
    figure.legend(
        handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=len(keys)
    )


def _three_digits(value: float) -> str:
    return f"{value:#,.3g}".rstrip(".")


def _plain(axes: Axes) -> None:
    """Leave of the box around a plot the two sides that have ticks, and set numbers as numbers."""
    for line in (axes.xaxis, axes.yaxis):
        if line.get_scale() == "log":
            line.set_major_formatter(lambda value, _: f"{value:g}")
            line.set_minor_formatter(lambda value, _: "")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", labelsize=8, colors=_INK)
