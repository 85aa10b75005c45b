"""Diagrams of layouts: what they draw is what the kernels' own code does."""

import re
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from test_figures import cells, numbers

import convt_lab as lab
from convt_lab import Problem, figures, figures_blocks
from convt_lab.stages import kernels

GREEN = "#009e73"
BLUE, RED, PALE, PALE_BLUE, PALE_ORANGE = "#0072b2", "#d55e00", "#ececec", "#cfe3f1", "#f9e4b7"
SMALL = dict(in_channels=16, out_channels=128)

SHIFTS = {
    "middle row": (Problem(height=3, width=5, kernel_size=(2, 3), **SMALL), 8, 1, (1, 4)),
    "left edge": (Problem(height=3, width=5, kernel_size=(2, 3), **SMALL), 8, 1, (1, 0)),
    "first row": (Problem(height=4, width=7, kernel_size=(3, 3), **SMALL), 16, 0, (0, 8)),
    "padded": (
        Problem(height=4, width=7, kernel_size=(3, 5), padding=(1, 2), **SMALL),
        8,
        2,
        (2, 0),
    ),
}
DRAWN = {
    **{name: lambda case=case: figures_blocks.shifts(*case) for name, case in SHIFTS.items()},
    "block": lambda: figures_blocks.register_block(4, tap=2),
    "turns": lambda: figures_blocks.turns(Problem.named("star")),
    "wide block": lambda: figures_blocks.register_block(1, tap=6),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN.keys())
def test_a_picture_is_a_png_and_the_same_every_time(draw):
    png, size = draw()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert 300 <= size["width"] <= 700
    assert draw()._repr_png_() == (png, size)


def rows_of(table):
    """(kh, kw), the address, and the pixel that is met, or None."""
    for line in table.splitlines()[1:]:
        kh, kw, address, met = re.fullmatch(r"(\d+), (\d+) +\+(\d+) +(\d+|zero)", line).groups()
        yield (int(kh), int(kw)), int(address), None if met == "zero" else int(met)


@pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())
def test_every_tap_meets_the_input_that_the_definition_has_for_it(case):
    problem, _, _, (oh, ow) = case
    rows, columns = problem.axes
    wanted = {
        (kh, kw): h * problem.width + w for kh, h in rows.taps(oh) for kw, w in columns.taps(ow)
    }
    table = list(rows_of(figures_blocks.shifts(*case).table()))
    assert {tap: met for tap, _, met in table if met is not None} == wanted
    assert len(table) == problem.kernel_size[0] * problem.kernel_size[1]


@pytest.mark.parametrize("case", SHIFTS.values(), ids=SHIFTS.keys())
def test_taps_are_drawn_from_their_addresses_on(case):
    pixels = case[1]
    picture = figures_blocks.shifts(*case)
    (axes,) = picture.figure.axes
    dark = {}
    frames = {}
    for patch in axes.patches:
        if not patch.get_fill():
            frames[patch.get_y()] = int(patch.get_x())
        elif to_hex(patch.get_facecolor()) == BLUE:
            dark.setdefault(patch.get_y(), []).append(int(patch.get_x()))
    # The number in a cell of the memory is that of its pixel, in both planes.
    memory = {x: n for (y, x), n in numbers(axes).items() if y == 0}
    assert memory == {x: n for (y, x), n in numbers(axes).items() if y == 1}
    colours = cells(axes)
    for (_, address, met), y in zip(rows_of(picture.table()), sorted(dark), strict=True):
        assert sorted(dark[y]) == list(range(address, address + pixels))
        assert memory.get(frames[y]) == met
        assert (colours[0, frames[y]] == PALE) == (met is None)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[2:] == [
        f"tap {kh}, {kw}: +{address}" for (kh, kw), address, _ in rows_of(picture.table())
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stride=2), "must be one image with an odd width"),
        (dict(width=6), "must be one image with an odd width"),
        (dict(out_channels=64), "65 to 128 output channels"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(change, message):
    problem = Problem(**{**dict(height=3, width=5, kernel_size=(2, 3)), **SMALL, **change})
    with pytest.raises(ValueError, match=message):
        figures_blocks.shifts(problem, 8, 1, (1, 4))


@pytest.mark.parametrize("output", [(0, 0), (1, 7), (-1, 4)])
def test_an_output_of_another_tile_is_an_error(output):
    problem = SHIFTS["middle row"][0]
    with pytest.raises(ValueError, match=r"output=\(.*must be one of the 8 pixels of the tile"):
        figures_blocks.shifts(problem, 8, 1, output)


def filled(axes, colour):
    return [p for p in axes.patches if p.get_fill() and to_hex(p.get_facecolor()) == colour]


@pytest.mark.parametrize("warps_co", [1, 2, 4])
@pytest.mark.parametrize("tap", [0, 3, 6])
def test_a_register_block_has_the_kernels_sizes(warps_co, tap):
    names = ("THREAD_W", "THREAD_CO", "WINDOW", "KW", "WARPS", "BLOCK_W", "BLOCK_CO", "WARP_W")
    stage = lab.stages["register_blocked"]
    values = figures.constants(stage, *(f"Sizes<{warps_co}>::{n}" for n in names)).values()
    size = dict(zip(names, values, strict=True))
    picture = figures_blocks.register_block(warps_co, tap)
    (axes,) = picture.figure.axes
    squares = [p for p in filled(axes, PALE_BLUE) if p.get_width() == 1]
    assert len(squares) == size["THREAD_W"] * size["THREAD_CO"]
    inputs = [p for p in filled(axes, BLUE) if p.get_y() < min(s.get_y() for s in squares)]
    weights = [p for p in filled(axes, BLUE) if p not in inputs]
    assert (len(inputs), len(weights)) == (size["THREAD_W"], size["THREAD_CO"])
    window = inputs + [p for p in filled(axes, PALE_ORANGE) if p.get_width() == 1]
    assert len(window) == size["WINDOW"]
    # sum[q][j] takes window[j + KW - 1 - kw]: the inputs stand above their sums.
    first = min(p.get_x() for p in window)
    assert min(p.get_x() for p in inputs) - first == size["KW"] - 1 - tap
    assert {p.get_x() for p in inputs} == {s.get_x() for s in squares}
    assert {p.get_y() for p in weights} == {s.get_y() for s in squares}
    # What is framed is one FMA.
    x, w, total = ((p.get_x(), p.get_y()) for p in axes.patches if not p.get_fill())
    assert total == (x[0], w[1])
    assert total in {(s.get_x(), s.get_y()) for s in squares}
    warps = {t.get_text() for t in axes.texts if t.get_text().startswith("warp ")}
    assert warps == {f"warp {i}" for i in range(size["WARPS"])}
    table = [line.split() for line in picture.table().splitlines()]
    block = size["BLOCK_CO"], size["BLOCK_W"]
    assert table[1] == ["block", *map(str, block), f"{block[0] * block[1]:,}"]
    assert table[3][1:3] == [str(size["THREAD_CO"]), str(size["THREAD_W"])]


def test_lanes_and_warps_own_what_the_register_block_says():
    problem = Problem(1, 4, 32, 8, 60, kernel_size=(3, 7))
    stage = lab.stages["register_blocked"]
    report = stage.profile(*problem.random_inputs(), blocks=[0])
    loads = [r for r in report.requests if (r.space, r.op, r.bytes) == ("shared", "load", 16)]
    thread_w, thread_co = figures.constants(
        stage, "Sizes<4>::THREAD_W", "Sizes<4>::THREAD_CO"
    ).values()
    steps = {r.offsets[1] - r.offsets[0] for r in loads}
    assert steps == {4 * thread_w, 0}  # of windows, and of weights, which all lanes share
    assert thread_co % 4 == 0


def test_a_block_that_the_kernel_has_not_is_an_error():
    with pytest.raises(ValueError, match="warps_co=3: must be 1, 2 or 4"):
        figures_blocks.register_block(3, tap=2)
    with pytest.raises(ValueError, match="tap=7: must be from 0 to 6"):
        figures_blocks.register_block(4, tap=7)


@pytest.mark.parametrize("sizes", [(21, 7, 4), (5, 5, 4), (9, 4, 4), (1, 1, 4)])
def test_warpgroups_take_turns_on_the_tensor_cores(sizes):
    steps, slot_steps, rounded = sizes
    spans = figures_blocks._take_turns(steps, slot_steps, rounded, cycles=10)
    products = [span for span in spans if span.what != "add"]
    for one, other in pairwise(products):
        assert other.begin >= one.end
        assert other.warpgroup != one.warpgroup
    for warpgroup in (0, 1):
        own = [span for span in spans if span.warpgroup == warpgroup]
        assert all(other.begin >= one.end for one, other in pairwise(own))
        # Of each step two small products and a large one; after all that is sent there are sums.
        cycles = {"small": 0.0, "large": 0.0, "add": 0.0}
        for span in own:
            cycles[span.what] += span.end - span.begin
        slots = [min(slot_steps, steps - first) for first in range(0, steps, slot_steps)]
        sent = sum(1 + -(-slot // rounded) for slot in slots)
        assert cycles == {"small": 20 * steps, "large": 10 * steps, "add": 10 * sent}


def test_turns_are_those_of_the_kernels_own_plan():
    star = Problem.named("star")
    picture = figures_blocks.turns(star)
    (axes,) = picture.figure.axes
    (pixels,) = figures.constants(
        kernels["hopper"], "warpgroups::Halves<false, 1>::PIXELS"
    ).values()
    taps = star.kernel_size[0] * star.kernel_size[1]
    length = {
        colour: sum(p.get_width() for p in filled(axes, colour)) for colour in (PALE_BLUE, BLUE)
    }
    # A stage has 16 channels of every tap.
    assert length[PALE_BLUE] == 2 * length[BLUE] == 2 * 2 * taps * pixels / 2
    (converting,) = filled(axes, GREEN)
    rows = [line.split() for line in picture.table().splitlines()[1:-1]]
    assert rows[-1] == ["others", "converting", "0", f"{converting.get_width():.0f}"]
    assert len(rows) == len(axes.patches)
    assert picture.table().endswith("tensor cores busy: 100% of the time")


def test_turns_without_such_a_plan_are_an_error():
    with pytest.raises(ValueError, match="must be one that hopper covers, with stride 1"):
        figures_blocks.turns(Problem(1, 64, 64, 8, 8, kernel_size=3, stride=2))
    with pytest.raises(ValueError, match="must be one that hopper covers"):
        figures_blocks.turns(Problem(1, 1, 64, 8, 8, kernel_size=3))


def test_every_picture_is_tested():
    assert figures_blocks.__all__ == ["register_block", "shifts", "turns"]
