"""Pictures of several ranks: what is drawn is what the plan and the numbers say."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch

from convt_lab import Problem, figures_distributed
from convt_lab.distributed import RowPlan

PLANS = {
    "stride 1": ((12, 3, 1, 1, 0), [4, 4, 4]),
    "stride 2, dilation 2": ((7, 3, 2, 2, 1), [3, 4]),
    "no overlap": ((6, 2, 3, 1, 0), [2, 2, 2]),
    "past the next": ((8, 5, 1, 1, 0), [3, 1, 1, 3]),
}


def plan_of(name):
    (height, kernel, stride, dilation, padding), heights = PLANS[name]
    problem = Problem(
        height=height,
        kernel_size=(kernel, 1),
        stride=(stride, 1),
        dilation=(dilation, 1),
        padding=(padding, 0),
    )
    return RowPlan.for_heights(problem, heights)


DRAWN = {
    **{name: lambda name=name: figures_distributed.rows_on_ranks(plan_of(name)) for name in PLANS},
    "efficiencies": lambda: figures_distributed.efficiencies(
        {"a": [(1, 1.0), (2, 0.9), (64, 0.5)], "b": [(1, 1.0), (64, 0.25)]}, "GPUs"
    ),
}
each_plan = pytest.mark.parametrize("name", PLANS)


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_a_png_and_the_same_every_time(name):
    png, size = DRAWN[name]()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert 300 <= size["width"] <= 700  # pixels of a page
    assert DRAWN[name]()._repr_png_() == (png, size)


def columns_of(picture):
    """Of each column of cells from left to right, the rows' numbers with their colours."""
    (axes,) = picture.figure.axes
    columns = {}
    for patch in axes.patches:
        if not isinstance(patch, FancyArrowPatch) and patch.get_fill():
            row = int(patch.get_y())
            columns.setdefault(patch.get_x(), {})[row] = to_hex(patch.get_facecolor())
    shown = {}
    for text in axes.texts:
        x, y = text.get_position()
        left = max(start for start in columns if start < x)
        assert int(text.get_text()) == int(y)
        shown.setdefault(left, set()).add(int(y))
    assert shown == {left: set(cells) for left, cells in columns.items()}
    return [columns[left] for left in sorted(columns)]


@each_plan
def test_rows_have_the_colour_of_their_rank(name):
    plan = plan_of(name)
    ranks = range(len(plan.input_rows))
    inputs, *added, outputs = columns_of(DRAWN[name]())
    colors = {rank: inputs[plan.input_rows[rank][0]] for rank in ranks}
    assert len(set(colors.values())) == len(ranks)
    assert inputs == {h: colors[rank] for rank in ranks for h in plan.input_rows[rank]}
    owned = {oh: colors[rank] for rank in ranks for oh in plan.output_rows[rank]}
    assert outputs == owned
    for rank in ranks:
        assert added[rank] == {oh: owned[oh] for oh in plan.added_to(rank)}


@each_plan
def test_each_message_has_a_frame_an_arrow_and_a_place_in_the_table(name):
    plan, picture = plan_of(name), DRAWN[name]()
    ranks = range(len(plan.input_rows))
    messages = {
        (source, other): plan.sent(source, other)
        for source in ranks
        for other in ranks
        if source != other and plan.sent(source, other)
    }
    (axes,) = picture.figure.axes
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    frames = [
        patch
        for patch in axes.patches
        if not isinstance(patch, FancyArrowPatch) and not patch.get_fill()
    ]
    assert len(arrows) == len(frames) == len(messages)
    for frame, arrow, ((source, other), rows) in zip(frames, arrows, messages.items(), strict=True):
        assert round(frame.get_y()) == rows.start
        assert round(frame.get_y() + frame.get_height()) == rows.stop
        (x0, y0), (x1, y1) = arrow._posA_posB
        assert y0 == y1 == (rows.start + rows.stop) / 2
        starts = sorted({p.get_x() for p in axes.patches if p not in arrows and p.get_fill()})
        assert starts[source + 1] < x0 <= x1 == starts[other + 1]
    lines = picture.table().splitlines()[1:]
    for rank, line in zip(ranks, lines, strict=True):
        sends = re.findall(r"(\d+)(?:-(\d+))? to rank (\d)", line)
        assert {
            int(other): range(int(first), int(last or first) + 1) for first, last, other in sends
        } == {other: rows for (source, other), rows in messages.items() if source == rank}
        assert ("nothing" in line) == (not sends)


def test_what_cannot_be_drawn_is_an_error():
    problem = Problem(height=5, kernel_size=3)
    for heights in ([1] * 5, [5, 0]):
        with pytest.raises(ValueError, match="at most 4 ranks can be drawn, and each must have"):
            figures_distributed.rows_on_ranks(RowPlan.for_heights(problem, heights))


def test_lines_are_at_their_places():
    picture = DRAWN["efficiencies"]()
    (axes,) = picture.figure.axes
    named = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert np.array_equal(named["a"], [(1, 1.0), (2, 0.9), (64, 0.5)])
    assert np.array_equal(named["b"], [(1, 1.0), (64, 0.25)])
    assert [line.split() for line in picture.table().splitlines()] == [
        ["GPUs", "a", "b"],
        ["1", "1.000", "1.000"],
        ["2", "0.900"],
        ["64", "0.500", "0.250"],
    ]
