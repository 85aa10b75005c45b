"""Pictures for the chapter on several GPUs, in the style of :mod:`convt_lab.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convt_lab.columns import aligned
from convt_lab.distributed import RowPlan
from convt_lab.figures import (
    _BLUE,
    _GREEN,
    _GREY,
    _INK,
    _ORANGE,
    _RED,
    Picture,
    _box,
    _label,
    _mix,
    _panels,
    _plain,
)

__all__ = ["efficiencies", "rows_on_ranks"]

_COLORS = (_BLUE, _ORANGE, _GREEN, _RED)
_STYLES = ("-", "--", ":", "-.")
#: Of a column of rows, and from one column to the next.
_COLUMN, _STEP = 1.0, 1.55


def rows_on_ranks(plan: RowPlan) -> Picture:
    """Draw which rows each rank has, adds to, owns and sends.

    Parameters
    ----------
    plan
        Of a small image, for at most four ranks, each of which has rows.

    Returns
    -------
    Picture
        From left to right: the input's rows, what each rank adds to, and the output's rows, all
        numbered and in the colour of the rank that has or owns them. What a rank computes of
        another's rows is framed in its own colour, with an arrow to where it is added. The table
        has the same numbers.

    Raises
    ------
    ValueError
        If there are more ranks than colours, or one has no rows.
    """
    ranks = len(plan.input_rows)
    if ranks > len(_COLORS) or not all(plan.input_rows):
        raise ValueError(
            f"plan has the input rows {plan.input_rows}: at most {len(_COLORS)} ranks can be "
            "drawn, and each must have rows"
        )
    problem = plan.problem
    tall = max(problem.height, problem.axes[0].out_size)
    figure, (axes,) = _panels(1, height=0.26 * tall + 0.75)
    pale = [_mix("#FFFFFF", color, 0.35) for color in _COLORS]
    owner = {oh: rank for rank in range(ranks) for oh in plan.output_rows[rank]}

    def cell(column: int, row: int, fill: str) -> None:
        _box(axes, column * _STEP, row, _COLUMN, 1, fill)
        _label(axes, column * _STEP + _COLUMN / 2, row + 0.5, str(row))

    for rank in range(ranks):
        for h in plan.input_rows[rank]:
            cell(0, h, pale[rank])
        for oh in plan.output_rows[rank]:
            cell(ranks + 1, oh, pale[rank])
        for oh in plan.added_to(rank):
            cell(rank + 1, oh, pale[owner[oh]])
    for source in range(ranks):
        for other in range(ranks):
            if source != other and (sent := plan.sent(source, other)):
                _send(axes, source, other, sent)

    titles = ["input", *(f"rank {rank}\nadds to" for rank in range(ranks)), "output"]
    axes.set_xlim(-0.1, (ranks + 1) * _STEP + _COLUMN + 0.1)
    axes.set_ylim(tall + 0.1, -0.1)
    axes.set_yticks([])
    axes.set_xticks([i * _STEP + _COLUMN / 2 for i in range(ranks + 2)], titles)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, colors=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return Picture(figure, "rows on ranks", _rows_table(plan))


def _send(axes, source: int, other: int, sent: range) -> None:
    """Frame rows in their source's column; an arrow leads to their place in the owner's."""
    from matplotlib.patches import FancyArrowPatch, Rectangle

    left = (source + 1) * _STEP
    frame = Rectangle(
        (left + 0.03, sent.start + 0.06), _COLUMN - 0.06, len(sent) - 0.12, fill=False,
        edgecolor=_COLORS[source], linewidth=2.4, linestyle="--", zorder=3,
    )  # fmt: skip
    axes.add_patch(frame)
    right = (other + 1) * _STEP + (_COLUMN if other < source else 0)
    start = left + (0 if other < source else _COLUMN)
    middle = (sent.start + sent.stop) / 2
    arrow = FancyArrowPatch(
        (start, middle), (right, middle), arrowstyle="-|>", mutation_scale=13, linewidth=1.6,
        color=_COLORS[source], shrinkA=1, shrinkB=1, zorder=4,
    )  # fmt: skip
    axes.add_patch(arrow)


def _rows_table(plan: RowPlan) -> str:
    ranks = range(len(plan.input_rows))
    rows = [("rank", "has input", "adds to", "owns", "sends")]
    for rank in ranks:
        sends = [
            f"{_span(plan.sent(rank, other))} to rank {other}"
            for other in ranks
            if other != rank and plan.sent(rank, other)
        ]
        spans = plan.input_rows[rank], plan.added_to(rank), plan.output_rows[rank]
        rows.append((str(rank), *map(_span, spans), ", ".join(sends) or "nothing"))
    return aligned(rows, left=(4,))


def _span(rows: range) -> str:
    if not rows:
        return "none"
    return f"{rows.start}-{rows.stop - 1}" if len(rows) > 1 else str(rows.start)


def efficiencies(lines: Mapping[str, Sequence[tuple[int, float]]], across: str) -> Picture:
    """Draw how efficiency falls.

    Parameters
    ----------
    lines
        At most four: name -> pairs of (what is across, efficiency), in order of the first.
    across
        What is across, for the axis, which is logarithmic.

    Returns
    -------
    Picture
        The table has a column for each line; where a line has no value, it is empty.
    """
    figure, (axes,) = _panels(1, height=3.0)
    for (name, pairs), color, style in zip(lines.items(), _COLORS, _STYLES, strict=False):
        axes.plot(*zip(*pairs, strict=True), style, color=color, linewidth=1.8, label=name)
    axes.axhline(1, color=_GREY, linewidth=0.8, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.06)
    values = sorted({x for pairs in lines.values() for x, _ in pairs})
    axes.set_xticks(values)
    axes.set_xlabel(across, fontsize=9, color=_INK)
    axes.set_ylabel("efficiency", fontsize=9, color=_INK)
    _plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    columns = [dict(pairs) for pairs in lines.values()]
    rows = [(across, *lines)]
    rows += [
        (f"{x:,}", *(f"{column[x]:.3f}" if x in column else "" for column in columns))
        for x in values
    ]
    return Picture(figure, "efficiency", aligned(rows))
