"""Random legal problems, shared by every test that must hold for all of them.

:func:`problem_set` is the set that each stage is tested on, on the simulator and on a GPU: the
same problems on every machine, the cheapest first, so that the first that fails is a small one.
:func:`problems` draws from the same family with hypothesis, which also shrinks what fails.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from convt_lab.problem import Problem

SETTINGS = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""Put ``@SETTINGS`` above ``@given(problems())``."""

MAX_TRIED_TAPS = 200_000
"""Multiply-adds if every tap were tried at every output: bounds a problem's time."""

KERNELS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (2, 5), (5, 2), (3, 7), (1, 9), (5, 9), (4, 4)]
SIZES = [1, 1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 31, 33, 37, 61, 64, 67, 101, 128, 131, 257]
GROUPS = [1, 1, 1, 1, 2, 2, 3, 4]
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 64, 65]

Pick = Callable[[Sequence[Any]], Any]


def build_problem(pick: Pick) -> Problem:
    """Make a legal problem by choices alone, none of which can turn out wrong.

    Parameters
    ----------
    pick : callable
        Chooses one element of a non-empty sequence.
    """
    # A compiled path exists for 3 x 7 with stride and dilation 1, so it gets its share.
    is_fast = pick(range(4)) == 0
    kernel_size = (3, 7) if is_fast else pick(KERNELS)
    stride = (1, 1) if is_fast else (pick(range(1, 5)), pick(range(1, 5)))
    dilation = (1, 1) if is_fast else (pick(range(1, 4)), pick(range(1, 4)))
    output_padding = tuple(pick(range(max(s, d))) for s, d in zip(stride, dilation, strict=True))
    batch = pick([1] * 10 + [2] * 6 + [3] * 4 + [0])

    def extents(size: Sequence[int]) -> list[int]:
        """Extents of the output of an input of that size, before padding crops it."""
        return [
            (i - 1) * s + d * (k - 1) + extra + 1
            for i, s, d, k, extra in zip(
                size, stride, dilation, kernel_size, output_padding, strict=True
            )
        ]

    def fits(size: Sequence[int], channels: Sequence[int]) -> bool:
        groups, c_in_per_group, c_out_per_group = channels
        out_height, out_width = extents(size)
        outputs = max(batch, 1) * groups * c_out_per_group * out_height * out_width
        tried = outputs * c_in_per_group * kernel_size[0] * kernel_size[1]
        return tried <= MAX_TRIED_TAPS

    # A tile is filled, and a second one begun, only by what is large.
    is_large = pick([False, True])

    def pick_fitting(options: Sequence[int], is_fitting: Callable[[int], bool]) -> int:
        fitting = [option for option in options if is_fitting(option)]
        return pick(fitting[len(fitting) // 2 :] if is_large else fitting)

    def pick_size(channels: Sequence[int]) -> tuple[int, int]:
        if pick([False, True, True]):
            width = pick_fitting(SIZES, lambda i: fits((1, i), channels))
            return pick_fitting(SIZES, lambda i: fits((i, width), channels)), width
        height = pick_fitting(SIZES, lambda i: fits((i, 1), channels))
        return height, pick_fitting(SIZES, lambda i: fits((height, i), channels))

    def pick_channels(size: Sequence[int]) -> tuple[int, int, int]:
        """Choose groups and the input and output channels of one group."""
        if pick(range(8)) == 0:  # depthwise
            return pick_fitting(CHANNELS, lambda c: fits(size, (c, 1, 1))), 1, 1
        groups = pick([g for g in GROUPS if fits(size, (g, 1, 1))])
        c_out = pick_fitting(CHANNELS, lambda c: fits(size, (groups, 1, c)))
        return groups, pick_fitting(CHANNELS, lambda c: fits(size, (groups, c, c_out))), c_out

    # What is chosen first has the free choice: sometimes the channels, sometimes the sizes.
    if pick([False, True]):
        channels = pick_channels((1, 1))
        size = pick_size(channels)
    else:
        size = pick_size((1, 1, 1))
        channels = pick_channels(size)
    groups, c_in_per_group, c_out_per_group = channels

    def pick_padding(axis: int) -> int:
        """Choose none, a little, "same", "full", past the kernel, or all that leaves an output."""
        most = (extents(size)[axis] - 1) // 2
        reach = dilation[axis] * (kernel_size[axis] - 1)
        return pick([p for p in (0, 0, 0, 1, 1, reach // 2, reach, reach + 2, most) if p <= most])

    return Problem(
        batch=batch,
        in_channels=groups * c_in_per_group,
        out_channels=groups * c_out_per_group,
        height=size[0],
        width=size[1],
        kernel_size=kernel_size,
        stride=stride,
        padding=(pick_padding(0), pick_padding(1)),
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=pick([False, True]),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw legal problems that the simulator runs in milliseconds."""
    return build_problem(lambda options: draw(st.sampled_from(options)))


@functools.cache
def problem_set(count: int = 300) -> tuple[Problem, ...]:
    """Return `count` different problems, the same on every machine, the cheapest first."""
    pick = random.Random(65).choice
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[build_problem(pick)] = None
    return tuple(sorted(found, key=lambda problem: problem.multiply_adds))


def inputs(
    problem: Problem, seed: int = 0, kind: str = "normal", device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw float32 data for a problem.

    Parameters
    ----------
    problem : Problem
        Gives the shapes.
    seed : int
        Seed of the generator.
    kind : str
        "normal", or "small_integers": from -4 to 4, whose sums float32 holds exactly.
    device : str or torch.device
        Where the tensors shall be.

    Returns
    -------
    x, weight, bias : torch.Tensor
        `bias` is None if the problem has none.
    """
    if kind == "normal":
        return problem.random_inputs(seed, device)
    if kind != "small_integers":
        raise ValueError(f"kind={kind!r} must be 'normal' or 'small_integers'")
    generator = np.random.default_rng(seed)
    x, weight, bias = (
        None
        if shape is None
        else torch.from_numpy(generator.integers(-4, 5, shape).astype(np.float32)).to(device)
        for shape in (problem.input_shape, problem.weight_shape, problem.bias_shape)
    )
    return x, weight, bias
