"""The exercises of the chapter on several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from convt_lab import reference
from convt_lab.distributed import RowPlan
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem
from convt_lab.scaling import Machine, predict

__all__ = ["EXERCISES"]


def _shown(**values: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


_HEIGHTS = ([4, 4], [3, 5, 4], [6, 1, 1, 4], [2, 2, 2, 2])


def _judge_messages(function: Callable) -> tuple[str | None, str]:
    count = 0
    for heights, kernel, stride, dilation in product(_HEIGHTS, (1, 2, 3, 7), (1, 2, 4), (1, 2)):
        problem = Problem(
            height=sum(heights),
            kernel_size=(kernel, 1),
            stride=(stride, 1),
            dilation=(dilation, 1),
        )
        plan = RowPlan.for_heights(problem, heights)
        sent = {
            (source, other): len(plan.sent(source, other))
            for source, other in product(range(len(heights)), repeat=2)
            if source != other and plan.sent(source, other)
        }
        found = function(heights, kernel, stride, dilation)
        if found != sent:
            shown = _shown(heights=heights, kernel=kernel, stride=stride, dilation=dilation)
            return f"{shown}: yours says {found!r}; sent is {sent!r}", ""
        count += 1
    return None, f"{count} splits agree with what the ranks send"


def _judge_overlap_add(function: Callable) -> tuple[str | None, str]:
    draw = np.random.default_rng(0)
    count = 0
    for height, cut, kernel, stride, dilation in product(
        (5, 6), (1, 3), (1, 2, 3), (1, 2, 4), (1, 2)
    ):
        image = draw.standard_normal((1, 1, height, 3))
        weight = draw.standard_normal((1, 1, kernel, 2))
        arguments = {"stride": (stride, 1), "dilation": (dilation, 1)}
        exact, top, bottom = (
            reference.scatter(part, weight, **arguments)[0, 0]
            for part in (image, image[:, :, :cut], image[:, :, cut:])
        )
        found = np.asarray(function(top, bottom, cut, stride))
        if wrong := first_wrong(found, exact, 1e-12, "the output"):
            shown = _shown(height=height, cut=cut, kernel=kernel, stride=stride, dilation=dilation)
            return f"{shown}: {wrong}", ""
        count += 1
    return None, f"{count} images agree with the reference"


def _judge_gradient(function: Callable) -> tuple[str | None, str]:
    draw = np.random.default_rng(0)
    count = 0
    for count_here, count_next, kernel, stride in product((2, 4), (3, 5), (1, 2, 3, 4), (1, 2, 3)):
        taps = draw.standard_normal(kernel)
        rows = (count_here + count_next - 1) * stride + kernel
        grad_output = draw.standard_normal(rows)
        # Input row h is in the output rows h * stride + kh, times tap kh.
        exact = np.array(
            [grad_output[h * stride : h * stride + kernel] @ taps for h in range(count_here)]
        )
        cut = count_here * stride
        asked: list[int] = []

        def ask(rows: int, behind: np.ndarray = grad_output[cut:], asked: list = asked):
            asked.append(rows)
            return behind[:rows].copy()

        found = np.asarray(function(grad_output[:cut].copy(), ask, taps, stride))
        shown = _shown(input_rows=count_here, kernel=kernel, stride=stride)
        if wrong := first_wrong(found, exact, 1e-12, "the gradient"):
            return f"{shown}: {wrong}", ""
        needed = max(0, kernel - stride)
        if sum(asked) > needed:
            return f"{shown}: {sum(asked)} rows are asked for, and {needed} are needed", ""
        count += 1
    return None, f"{count} gradients agree, and no row was sent in vain"


_MACHINES = (
    Machine(1e12, 1e12),
    Machine(1e12, 1e7),
    Machine(1e12, 1e12, call=2e-5),
    Machine(1e12, 1e8, call=1e-6, message=2e-5),
)
_PROBLEMS = (
    Problem(1, 16, 16, 512, 64, kernel_size=(3, 7)),
    Problem(2, 8, 16, 256, 128, kernel_size=5, stride=2),
)


def _judge_most_ranks(function: Callable) -> tuple[str | None, str]:
    count = 0
    for problem, machine, least in product(_PROBLEMS, _MACHINES, (0.5, 0.8, 0.95)):
        counts = [2**i for i in range(problem.height.bit_length()) if 2**i <= problem.height // 4]
        predictions = [predict(problem, ranks, machine) for ranks in counts]
        most = max(p.ranks for p in predictions if p.efficiency >= least)
        split = predictions[-1]
        found = function(split.alone, split.strip, split.exchange, counts, least)
        if found != most:
            shown = _shown(
                alone=f"{split.alone:.3g}", strip=f"{split.strip:.3g}",
                exchange=f"{split.exchange:.3g}", least=least,
            )  # fmt: skip
            return f"{shown}: yours says {found!r}; by the model it is {most}", ""
        count += 1
    return None, f"{count} cases agree with the model"


EXERCISES = (
    FunctionExercise(
        name="distributed.1",
        function="messages",
        text='''
def messages(heights, kernel, stride, dilation):
    """{(source, destination): output rows sent}; `heights` are the ranks' input rows."""
    overlap = max(0, kernel - stride)
    if overlap == 0:
        return {}
    return {(rank, rank + 1): overlap for rank in range(len(heights) - 1)}
''',
        whole='''
def messages(heights, kernel, stride, dilation):
    """{(source, destination): output rows sent}; `heights` are the ranks' input rows."""
    starts = [sum(heights[:rank]) for rank in range(len(heights) + 1)]
    last = (sum(heights) - 1) * stride + (kernel - 1) * dilation + 1
    owned = [start * stride for start in starts[:-1]] + [last]
    sent = {}
    for source in range(len(heights)):
        end = (starts[source + 1] - 1) * stride + (kernel - 1) * dilation + 1
        for other in range(source + 1, len(heights)):
            rows = min(end, owned[other + 1]) - owned[other]
            if rows > 0:
                sent[source, other] = rows
    return sent
''',
        judge=_judge_messages,
        hints=(
            "The start counts the overlap as if the dilation were one, and gives all of it to the "
            "next rank.",
            "What a rank adds to ends where the last row's stamp ends. What the next one owns ends "
            "where the rank after it begins.",
            "A message is what two ranges have in common: what the source adds to, and what the "
            "destination owns.",
        ),
        why="A rank adds to `h0 * stride` and what follows, to the end of its last row's stamp, "
        "and owns the rows up to where the next rank's begin. If the next rank owns fewer rows "
        "than the overlap, the rest goes to the one after it. Ranges need no cases for that.",
    ),
    FunctionExercise(
        name="distributed.2",
        function="overlap_add",
        text='''
def overlap_add(top, bottom, cut, stride):
    """Join the outputs [rows, OW] of the first `cut` input rows and of the others."""
    return np.concatenate([top, bottom])
''',
        whole='''
def overlap_add(top, bottom, cut, stride):
    """Join the outputs [rows, OW] of the first `cut` input rows and of the others."""
    start = cut * stride  # where the stamp of the first row below the cut begins
    rows = max(len(top), start + len(bottom))
    output = np.zeros((rows, top.shape[1]))
    output[: len(top)] += top
    output[start:] += bottom[: rows - start]
    return output
''',
        judge=_judge_overlap_add,
        hints=(
            "In which output row does the stamp of the first row below the cut begin?",
            "Lay both parts on a canvas of zeros, each where it begins, and add.",
            "With a stride larger than the kernel no stamp reaches some rows between the parts.",
        ),
        why="The lower part begins at output row `cut * stride`. Rows that both parts have are "
        "added. Where the stride is larger than the stamp there is a gap instead, and the canvas "
        "has zeros there.",
    ),
    FunctionExercise(
        name="distributed.3",
        function="grad_input",
        text='''
def grad_input(grad_own, ask, taps, stride):
    """The gradient of a rank's input rows, for an image of one column.

    `grad_own` is the gradient of the output rows that the rank owns, `stride` for each of its
    input rows. `ask(rows)` gets the first rows of the next rank's, which has to send them.
    """
    grad = np.concatenate([grad_own, np.zeros(len(taps))])
    count = len(grad_own) // stride
    return np.array([grad[h * stride : h * stride + len(taps)] @ taps for h in range(count)])
''',
        edits={
            "np.zeros(len(taps))": "ask(max(0, len(taps) - stride))",
        },
        judge=_judge_gradient,
        hints=(
            "Which output rows did the rank's last input row add to? The gradient needs them all.",
            "Those that another rank owns are the ones that were sent forward, no more.",
            "As many as the overlap: the number of taps less the stride, or none.",
        ),
        why="The gradient of an input row gathers the gradients of all output rows that it added "
        "to. The forward pass sent the last of them away, so the backward pass gets their gradient "
        "back: the same rows, the other way.",
    ),
    FunctionExercise(
        name="distributed.4",
        function="most_ranks",
        text='''
def most_ranks(alone, strip, exchange, counts, least):
    """The largest of `counts` ranks that is at least as efficient as `least`.

    `alone` is one GPU's time for the whole. A strip and an exchange take the same, however many
    ranks there are; a single rank has neither.
    """
    return max(ranks for ranks in counts if alone / ranks >= exchange)
''',
        whole='''
def most_ranks(alone, strip, exchange, counts, least):
    """The largest of `counts` ranks that is at least as efficient as `least`.

    `alone` is one GPU's time for the whole. A strip and an exchange take the same, however many
    ranks there are; a single rank has neither.
    """
    most = 1
    for ranks in counts:
        seconds = strip + max(alone / ranks, exchange) if ranks > 1 else alone
        if alone / (ranks * seconds) >= least:
            most = max(most, ranks)
    return most
''',
        judge=_judge_most_ranks,
        hints=(
            "The start asks until when the exchange is hidden. A hidden exchange is not yet an "
            "efficient split, and an efficient split may show some of its exchange.",
            "The time of a rank is `strip + max(alone / ranks, exchange)`.",
            "The efficiency is `alone / ranks` over that time. A single rank's is one.",
        ),
        why="Efficiency is what the rank would take by its share alone, over what it takes. The "
        "strip counts always, the exchange where it is longer than the interior. With more ranks "
        "the share shrinks and the rest does not, so from some number on every further rank costs "
        "more than it saves.",
    ),
)
