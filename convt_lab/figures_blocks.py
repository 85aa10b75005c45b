"""Diagrams of how kernels lay their work out, in the style of figures.py.

Sizes are the compiler's, and addresses are those that the kernel's own code computes.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convt_lab.columns import aligned
from convt_lab.figures import (
    _BLUE,
    _GREEN,
    _GREY,
    _INK,
    _PALE,
    _PALE_BLUE,
    _PALE_ORANGE,
    _RED,
    _WIDTH,
    Picture,
    _bare,
    _box,
    _cell,
    _frame,
    _legend,
    _panels,
    _plain,
    _ticks,
    constants,
)
from convt_lab.problem import Problem
from convt_lab.program import compile as compile_source
from convt_lab.stages import _ConvTransposeProblem, kernels, stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["register_block", "shifts", "turns"]

# Follows the first warpgroup of hopper.cu through a stage of one tile, with the kernel's own plan,
# places and steps, for an instruction of so few pixels that they can be drawn.
_FOLLOW = """
namespace warpgroups {
template <int PIXELS>
int follow(const ConvTransposeProblem& p, int tile, int* sizes, int* places, int* addresses) {
  using M = Method<float, false, 2, PIXELS, 1, 1>;
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  if (!make_plan<M>(p, rows, columns, plan) || plan.unit > 1 || plan.subchunks > 1 ||
      plan.parts_co * plan.phases_h * plan.phases_w * plan.stripes * p.batch > 1 ||
      !plan.shares_pixels || tile >= plan.tiles_f) {
    return 0;
  }
  const Task task(tile, plan, AxisPhases{rows, columns});
  sizes[0] = plan.region;
  sizes[1] = plan.pitch;
  sizes[2] = plan.tile_pixels;
  sizes[3] = task.steps;
  for (int i = 0; i < plan.region; ++i) {
    const Place at(task.first + i, plan);
    const int h = task.first_h + at.row, w = task.first_w + at.column;
    const bool exists = at.n == 0 && h >= 0 && h < p.height && w >= 0 && w < p.width;
    places[i] = exists ? h * p.width + w : -1;
  }
  const Way way(task, plan);
  Position inputs = {static_cast<uint32_t>(task.offset)};
  for (int step = 0; step < task.steps; ++step) {
    addresses[step] = inputs.address;
    inputs.go_on(way);
  }
  return 1;
}
}  // namespace warpgroups

extern "C" int follow(ConvTransposeProblem p, int tile, int* sizes, int* places, int* addresses) {
  return warpgroups::follow<PIXELS>(p, tile, sizes, places, addresses);
}
"""
_MOST = 4096  # places and steps
_GAP = 0.6  # between the memory and the taps, in cells


# What the model of cost in warpgroup_plan.cuh says about a stage of hopper.cu: its steps, those of
# a slot of weights, and the cycles of a product and of converting.
_DESCRIBE = """
extern "C" int describe(ConvTransposeProblem p, double* about) {
  using namespace warpgroups;
  using M = Halves<false, 1>;
  const Axis rows = rows_of(p), columns = columns_of(p);
  Plan plan = {};
  if (!make_plan<M>(p, rows, columns, plan) || plan.bundle > 1 || plan.phases_w > 1) return 0;
  about[0] = plan.max_steps;
  about[1] = plan.slot_steps;
  about[2] = M::PIXELS / 2.0;
  about[3] = M::CONVERTING * plan.region * plan.octets() / CONVERTERS;
  return 1;
}
"""


@dataclass(frozen=True)
class _Tile:
    """Where hopper.cu has a tile's inputs, and where its steps find them."""

    pitch: int
    pixels: int
    places: np.ndarray  # of each address the input pixel h W + w, or -1 for zeros
    addresses: np.ndarray  # of each step the first one


def _follow(problem: Problem, pixels: int, tile: int) -> _Tile:
    source = kernels["hopper"].source + _FOLLOW.replace("<PIXELS>(p", f"<{pixels}>(p")
    library = compile_source(source, "simulator", name="follow").library
    sizes, places, addresses = np.zeros(4, np.int32), *np.zeros((2, _MOST), np.int32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (sizes, places, addresses))
    if not library["follow"](_ConvTransposeProblem.of(problem), ctypes.c_int(tile), *pointers):
        raise ValueError(
            f"problem={problem}, tile={tile}: must be one image with an odd width, stride 1, 16 "
            "input channels, 65 to 128 output channels, and have such a tile"
        )
    region, pitch, tile_pixels, steps = sizes.tolist()
    return _Tile(pitch, tile_pixels, places[:region], addresses[:steps])


def shifts(problem: Problem, pixels: int, tile: int, output: tuple[int, int]) -> Picture:
    """Draw a tile's inputs in shared memory, and where the taps of hopper.cu begin to read them.

    Parameters
    ----------
    problem
        A small one: one image with an odd width, stride and dilation 1, 16 input channels, 65 to
        128 output channels.
    pixels
        Columns of an instruction, a multiple of eight; the kernel has many more.
    tile
        Which one, along the flat axis.
    output
        (oh, ow) of one of the tile's outputs.

    Returns
    -------
    Picture
        Above the memory: a cell is 16 bytes, eight channels of a pixel, with the pixel's number,
        grey where it is zero. Below a row for each tap: dark is the matrix that it multiplies, and
        what it multiplies for `output` is framed. The table has the addresses.

    Raises
    ------
    ValueError
        If the problem is none that can be drawn, or the output none of the tile's.
    """
    found = _follow(problem, pixels, tile)
    column = output[0] * found.pitch + output[1] - tile * found.pixels
    exists = all(0 <= o < axis.out_size for o, axis in zip(output, problem.axes, strict=True))
    if not exists or not 0 <= column < found.pixels:
        raise ValueError(f"output={output}: must be one of the {found.pixels} pixels of the tile")
    region, kernel_w = len(found.places), problem.kernel_size[1]
    steps = len(found.addresses)
    scale = (_WIDTH - 1.5) / region
    figure, (axes,) = _panels(1, height=(steps + 2 + _GAP) * scale + 0.7)
    fills = _PALE_BLUE, _PALE_ORANGE
    for octet, address in np.ndindex(2, region):
        place = found.places[address]
        fill = _PALE if place < 0 else fills[place // problem.width % 2]
        _cell(axes, address, octet, fill, text="" if place < 0 else str(place))
    names = ["channels 0 to 7", f"channels 8 to 15: +{region}"]
    rows = [("tap (kh, kw)", "address", "input pixel of the framed output")]
    for step, first in enumerate(found.addresses.tolist()):
        tap, y = divmod(steps - 1 - step, kernel_w), 2 + _GAP + step
        for address in range(region):
            inside = first <= address < first + found.pixels
            _cell(axes, address, y, _BLUE if inside else "#FFFFFF")
        met = found.places[first + column]
        _frame(axes, first + column, y, 1, 1, color=_RED, thick=2.4)
        names.append(f"tap {tap[0]}, {tap[1]}: +{first}")
        rows.append((f"{tap[0]}, {tap[1]}", f"+{first}", "zero" if met < 0 else str(met)))
    _bare(axes, region, 2 + _GAP + steps)
    lines = [0, 1, *(2 + _GAP + step for step in range(steps))]
    _ticks(axes, range(region), lines, row_labels=names)
    axes.xaxis.tick_top()
    axes.set_title("address, in units of 16 bytes", fontsize=9, color=_INK, loc="left")
    return Picture(figure, "every tap is another address", aligned(rows, left=(0,)))


@dataclass(frozen=True)
class _Span:
    """What a warpgroup does for some time, in cycles."""

    warpgroup: int
    what: str  # "small", "large" or "add"
    begin: float
    end: float


def _take_turns(steps: int, slot_steps: int, rounded: int, cycles: float) -> list[_Span]:
    """Follow both warpgroups of hopper.cu through a stage, with weights always there.

    A product takes so many cycles. So does what follows on what the tensor cores have summed, as
    many sums of a lane: they are scaled, or added.
    """
    chunks = []  # what is sent to the tensor cores at once
    for first in range(0, steps, slot_steps):
        count = min(slot_steps, steps - first)
        chunks.append(("small", 2 * count))
        chunks += [("large", min(rounded, count - done)) for done in range(0, count, rounded)]
    spans, is_free, ready = [], 0.0, [0.0, 0.0]
    for what, products in chunks:
        for warpgroup in (0, 1):
            begin = max(is_free, ready[warpgroup])
            is_free = begin + products * cycles
            ready[warpgroup] = is_free + cycles
            spans.append(_Span(warpgroup, what, begin, is_free))
            spans.append(_Span(warpgroup, "add", is_free, is_free + cycles))
    return spans


def turns(problem: Problem) -> Picture:
    """Draw how the warps of hopper.cu share a stage's time, by the model in warpgroup_plan.cuh.

    Parameters
    ----------
    problem
        One that the kernel covers, with stride 1.

    Returns
    -------
    Picture
        The two warpgroups that multiply, and below them the warps that convert the next stage's
        inputs. Nothing is measured: a product takes as many cycles as in the model by which the
        kernel chooses its plans, an addition one cycle, and weights have always come. The table
        has all of it.

    Raises
    ------
    ValueError
        If the kernel has no such plan for the problem.
    """
    source = kernels["hopper"].source + _DESCRIBE
    library = compile_source(source, "simulator", name="describe").library
    about = np.zeros(4)
    pointer = ctypes.c_void_p(about.ctypes.data)
    if not library["describe"](_ConvTransposeProblem.of(problem), pointer):
        raise ValueError(f"problem={problem}: must be one that hopper covers, with stride 1")
    steps, slot_steps, cycles, converting = about.tolist()
    # Only a compiler for Hopper sees the constant.
    rounded = int(re.search(r"constexpr int ROUNDED = (\d+);", kernels["hopper"].source)[1])
    spans = _take_turns(int(steps), int(slot_steps), rounded, cycles)
    looks = {
        "small": ("small products", _PALE_BLUE),
        "large": ("large products", _BLUE),
        "add": ("scaled or added", _PALE_ORANGE),
    }
    figure, (axes,) = _panels(1, height=2.5)
    rows = [("warpgroup", "", "from", "to")]
    for span in spans:
        name, fill = looks[span.what]
        axes.barh(span.warpgroup, span.end - span.begin, 0.7, left=span.begin, color=fill,
                  edgecolor=_INK, linewidth=0.5)  # fmt: skip
        rows.append((str(span.warpgroup), name, f"{span.begin:.0f}", f"{span.end:.0f}"))
    axes.barh(2, converting, 0.7, color=_GREEN, edgecolor=_INK, linewidth=0.5)
    rows.append(("others", "converting", "0", f"{converting:.0f}"))
    axes.set_yticks(range(3), ["first warpgroup", "second warpgroup", "converting warps"])
    axes.set_ylim(2.6, -0.6)
    axes.set_xlim(0, 1.01 * max(span.end for span in spans))
    axes.set_xlabel("cycles, by the model", fontsize=9, color=_INK)
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelsize=9)
    _legend(figure, [*looks.values(), ("the inputs that come next", _GREEN)])
    total = max(span.end for span in spans if span.what != "add")
    busy = sum(span.end - span.begin for span in spans if span.what != "add") / total
    numbers = f"{aligned(rows, left=(0, 1))}\ntensor cores busy: {busy:.0%} of the time"
    return Picture(figure, "warps that take turns", numbers)


def register_block(warps_co: int, tap: int) -> Picture:
    """Draw what a block, a warp and a thread of register_blocked.cu own, and a thread's registers.

    Parameters
    ----------
    warps_co
        Warps of a block side by side in the output channels: 1, 2 or 4.
    tap
        The column kw of the tap that is multiplied.

    Returns
    -------
    Picture
        A block's outputs, those of its first warp, and those of one lane, each part of what is
        above: channels down, pixels of the flat axis across. The thread's sums have the inputs in
        its window above them, those of the tap dark, and the tap's weights to the left. One sum is
        framed with the two values that it is the FMA of. The table has the sizes.

    Raises
    ------
    ValueError
        If `warps_co` or `tap` is not one of the kernel's.
    """
    if warps_co not in (1, 2, 4):
        raise ValueError(f"warps_co={warps_co}: must be 1, 2 or 4")
    names = ("WARPS", "WARPS_W", "THREAD_W", "THREAD_CO", "WARP_W", "BLOCK_W", "BLOCK_CO", "KW")
    found = constants(
        stages["register_blocked"], *(f"Sizes<{warps_co}>::{n}" for n in (*names, "WINDOW"))
    )
    size = dict(zip((*names, "WINDOW"), found.values(), strict=True))
    thread_w, thread_co, window = size["THREAD_W"], size["THREAD_CO"], size["WINDOW"]
    if not 0 <= tap < size["KW"]:
        raise ValueError(f"tap={tap}: must be from 0 to {size['KW'] - 1}")
    lane, chosen = 11, (2, 4)  # a lane, and of its sums a channel and a pixel
    figure, (axes,) = _panels(1, height=5.6)
    wide = window + 6.0  # all three are drawn as wide as this

    # The block: warps in a grid of pixels and channels.
    warp_w, warp_h = wide / size["WARPS_W"], 3.4 / warps_co
    for i, j in np.ndindex(warps_co, size["WARPS_W"]):
        fill = _PALE_ORANGE if (i, j) == (0, 0) else "#FFFFFF"
        _box(axes, j * warp_w, i * warp_h, warp_w, warp_h, fill)
        text = f"warp {j * warps_co + i}"
        axes.text((j + 0.5) * warp_w, (i + 0.5) * warp_h, text, ha="center", va="center",
                  fontsize=8, color=_INK)  # fmt: skip
    _title_of(axes, -0.35, f"a block: {size['BLOCK_CO']} channels × {size['BLOCK_W']} pixels")

    # Its first warp, lane by lane.
    top, high = 5.4, 1.4
    lane_w = wide / 32
    for i in range(32):
        _box(axes, i * lane_w, top, lane_w, high, _PALE_BLUE if i == lane else "#FFFFFF")
        if i % 4 == 3 or i == 0:
            axes.text((i + 0.5) * lane_w, top + high / 2, str(i), ha="center", va="center",
                      fontsize=7, color=_INK)  # fmt: skip
    _zoom(axes, (0, warp_w), warp_h, (0, wide), top)
    _title_of(axes, top - 0.35, f"a warp: {thread_co} channels × {size['WARP_W']} pixels, 32 lanes")

    # A lane's sums, with the window as far to the left as the tap has it.
    begin = 9.6  # the window's row
    left = 5.0  # the first sum's column
    first = left - (size["KW"] - 1 - tap)
    for j in range(window):
        used = 0 <= first + j - left < thread_w
        _cell(axes, first + j, begin, _BLUE if used else _PALE_ORANGE)
    sums = begin + 1.5
    for q, j in np.ndindex(thread_co, thread_w):
        _cell(axes, left + j, sums + q, _PALE_BLUE)
    for q in range(thread_co):
        _cell(axes, left - 1.5, sums + q, _BLUE)
    q, j = chosen
    for x, y in ((left + j, begin), (left - 1.5, sums + q), (left + j, sums + q)):
        _frame(axes, x, y, 1, 1, color=_RED, thick=2.4)
    _zoom(axes, (lane * lane_w, (lane + 1) * lane_w), top + high, (left, left + thread_w), begin)
    text = f"lane {lane}, tap kw = {tap}: {thread_co} × {thread_w} sums in registers"
    _title_of(axes, begin - 0.35, text)
    right, middle = max(first + window, left + thread_w) + 0.4, sums + thread_co / 2
    for x, y, side, text in (
        (right, begin + 0.5, "left", f"window: {window} inputs"),
        (left - 1.9, middle, "right", f"{thread_co}\nweights"),
        (left + thread_w + 0.4, middle, "left", f"{thread_co} channels of\n{thread_w} pixels"),
    ):
        axes.text(x, y, text, ha=side, va="center", fontsize=8, color=_INK)
    axes.set_xlim(-0.1, wide + 0.1)
    axes.set_ylim(sums + thread_co + 0.1, -1.2)
    axes.set_axis_off()
    rows = [("", "channels", "pixels", "outputs")]
    for name, channels, pixels in (
        ("block", size["BLOCK_CO"], size["BLOCK_W"]),
        ("warp", thread_co, size["WARP_W"]),
        ("thread", thread_co, thread_w),
    ):
        rows.append((name, str(channels), str(pixels), f"{channels * pixels:,}"))
    numbers = f"{aligned(rows, left=(0,))}\na thread's registers: {thread_co * thread_w} sums, "
    numbers += f"{window} inputs, {thread_co} weights"
    return Picture(figure, "a block of outputs in registers", numbers)


def _title_of(axes: Axes, y: float, text: str) -> None:
    ground = dict(facecolor="white", edgecolor="none", pad=1.5)
    axes.text(0, y, text, ha="left", va="bottom", fontsize=9.5, color=_INK, bbox=ground)


def _zoom(
    axes: Axes, above: tuple[float, float], bottom: float, below: tuple[float, float], top: float
) -> None:
    """Lead from a part's lower edge to the upper edge of what shows it larger."""
    for one, other in zip(above, below, strict=True):
        axes.plot([one, other], [bottom, top], color=_GREY, linewidth=0.6, linestyle=":", zorder=0)
