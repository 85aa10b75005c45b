"""The exercises of the chapter on the definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from convt_lab import reference
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem

__all__ = ["EXERCISES"]


def _judge_output_padding(function: Callable) -> tuple[str | None, str]:
    count = 0
    for size, kernel, stride, padding, dilation in product(
        range(9, 14), (1, 2, 3, 5), (1, 2, 3, 4), (0, 1), (1, 2)
    ):
        if padding > dilation * (kernel - 1) // 2:
            continue
        small = torch.nn.functional.conv2d(
            torch.zeros(1, 1, 1, size),
            torch.zeros(1, 1, 1, kernel),
            stride=(1, stride),
            padding=(0, padding),
            dilation=(1, dilation),
        ).shape[3]
        sizes = {
            extra: Problem(
                width=small,
                kernel_size=(1, kernel),
                stride=(1, stride),
                padding=(0, padding),
                output_padding=(0, extra),
                dilation=(1, dilation),
            ).out_width
            for extra in range(stride)
        }
        found = function(size, kernel, stride, padding, dilation)
        if found not in sizes or sizes[found] != size:
            what = (
                f"leads to {sizes[found]}"
                if found in sizes
                else f"is none of 0 to {stride - 1}, which this stride allows"
            )
            return (
                f"size {size}, kernel {kernel}, stride {stride}, padding {padding}, dilation "
                f"{dilation}: the convolution makes {small} of {size}, and an output_padding of "
                f"{found!r} {what}",
                "",
            )
        count += 1
    return None, f"{count} convolutions led back to the size they came from"


def _counted_stamps(stride: int, kernel: int, dilation: int) -> tuple[int, int]:
    """Stamp ones on ones; away from the rim, the fewest and the most stamps of an output."""
    rim = dilation * (kernel - 1)
    inputs = 2 * rim // stride + 2 * stride + 2
    ones = np.ones((1, 1, 1, inputs)), np.ones((1, 1, 1, kernel))
    counts = reference.scatter(*ones, stride=(1, stride), dilation=(1, dilation)).ravel()
    inner = counts[rim : len(counts) - rim].astype(int)
    return int(inner.min()), int(inner.max())


def _judge_stamps(function: Callable) -> tuple[str | None, str]:
    cases = list(product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 7), (1, 2, 3, 4)))
    for stride, kernel, dilation in cases:
        found, counted = (
            function(stride, kernel, dilation),
            _counted_stamps(stride, kernel, dilation),
        )
        if not np.array_equal(np.asarray(found, dtype=object), np.asarray(counted, dtype=object)):
            return (
                f"stride {stride}, kernel {kernel}, dilation {dilation}: yours says {found!r}; "
                f"stamping ones counts {counted[0]} to {counted[1]}",
                "",
            )
    return None, f"{len(cases)} cases agree with what stamping ones counts"


_IMAGES = (
    Problem(1, 1, 1, 2, 3, kernel_size=2),
    Problem(1, 2, 3, 3, 2, kernel_size=(2, 3), stride=2),
    Problem(1, 3, 2, 4, 3, kernel_size=3, stride=1, padding=1),
    Problem(1, 2, 4, 3, 4, kernel_size=(3, 2), stride=3, output_padding=2),
    Problem(1, 2, 3, 3, 3, kernel_size=3, stride=2, dilation=3),
    Problem(1, 2, 3, 4, 5, kernel_size=(2, 3), stride=2, padding=1, output_padding=1, dilation=2),
)


def _judge_scatter(function: Callable) -> tuple[str | None, str]:
    for problem in _IMAGES:
        x, weight, _ = (t if t is None else t.double().numpy() for t in problem.random_inputs())
        exact = reference.scatter(x, weight, **problem.arguments)[0]
        scale = reference.condition_scale(x, weight, **problem.arguments)[0]
        options = {
            name: getattr(problem, name)[0]
            for name in ("stride", "padding", "output_padding", "dilation")
        }
        y = np.asarray(function(x[0], weight, *options.values()))
        if wrong := first_wrong(y, exact, 1e-12 * scale, "the result"):
            shown = ", ".join(f"{name}={value}" for name, value in options.items())
            return f"x {list(x[0].shape)}, weight {list(weight.shape)}, {shown}: {wrong}", ""
    return None, f"{len(_IMAGES)} images agree with the reference"


EXERCISES = (
    FunctionExercise(
        name="scatter_reference.1",
        function="output_padding",
        text='''
def output_padding(size, kernel, stride, padding, dilation):
    """The output_padding that leads back to `size` after a convolution."""
    return 0
''',
        edits={
            "return 0": "return (size + 2 * padding - dilation * (kernel - 1) - 1) % stride",
        },
        judge=_judge_output_padding,
        hints=(
            "How long is the convolution's output? It divides by the stride and drops a remainder.",
            "What the division drops is what the transposed convolution can't know.",
            "The convolution gives `(size + 2 * padding - dilation * (kernel - 1) - 1) // stride "
            "+ 1`.",
        ),
        why="A convolution divides by the stride and rounds down, so as many neighbouring sizes as "
        "the stride says share a result. Without output padding the transposed convolution returns "
        "the smallest of them; the remainder of the division is how far `size` is above that. It "
        "is smaller than the stride: one more would belong to the next result.",
    ),
    FunctionExercise(
        name="scatter_reference.2",
        function="stamps",
        text='''
def stamps(stride, kernel, dilation):
    """The fewest and the most stamps that an output away from the rim gets."""
    return kernel // stride, -(-kernel // stride)
''',
        whole='''
def stamps(stride, kernel, dilation):
    """The fewest and the most stamps that an output away from the rim gets."""
    common = int(np.gcd(stride, dilation))
    step = stride // common  # from one tap of an output to the next
    fewest = 0 if common > 1 else kernel // step
    return fewest, -(-kernel // step)
''',
        judge=_judge_stamps,
        hints=(
            "How far apart are two taps that reach the same output? Neighbouring stamps begin a "
            "stride apart, and neighbouring taps of a stamp lie a dilation apart.",
            "They are stride / g apart, where g is the greatest common divisor of stride and "
            "dilation. An output gets as many of the kernel's taps as fit, rounded down or up.",
            "Stamps begin at multiples of the stride, and their taps follow in steps of the "
            "dilation. If both are even, which outputs does no stamp reach?",
        ),
        why="The taps that reach one output lie `stride / g` apart, so an output gets the kernel "
        "divided by that, rounded down or up. With a common divisor other than one some outputs "
        "are never reached. All outputs get the same number if and only if `g` is one and the "
        "stride divides the kernel. That avoids the uneven overlap behind the checkerboard.",
    ),
    FunctionExercise(
        name="scatter_reference.3",
        function="scatter",
        text='''
def scatter(x, weight, stride, padding, output_padding, dilation):
    """x [C_in, H, W], weight [C_in, C_out, KH, KW]; returns [C_out, OH, OW]."""
    _, height, width = x.shape
    _, c_out, kernel_h, kernel_w = weight.shape
    canvas = np.zeros((c_out, (height - 1) * stride + kernel_h, (width - 1) * stride + kernel_w))
    for h in range(height):
        for w in range(width):
            stamp = np.einsum("i,iokl->okl", x[:, h, w], weight)
            rows = slice(h * stride, h * stride + kernel_h)
            columns = slice(w * stride, w * stride + kernel_w)
            canvas[:, rows, columns] += stamp
    return canvas
''',
        whole='''
def scatter(x, weight, stride, padding, output_padding, dilation):
    """x [C_in, H, W], weight [C_in, C_out, KH, KW]; returns [C_out, OH, OW]."""
    _, height, width = x.shape
    _, c_out, kernel_h, kernel_w = weight.shape
    span_h = dilation * (kernel_h - 1) + 1
    span_w = dilation * (kernel_w - 1) + 1
    canvas_h = (height - 1) * stride + span_h + output_padding
    canvas_w = (width - 1) * stride + span_w + output_padding
    canvas = np.zeros((c_out, canvas_h, canvas_w))
    for h in range(height):
        for w in range(width):
            stamp = np.einsum("i,iokl->okl", x[:, h, w], weight)
            rows = slice(h * stride, h * stride + span_h, dilation)
            columns = slice(w * stride, w * stride + span_w, dilation)
            canvas[:, rows, columns] += stamp
    return canvas[:, padding : canvas_h - padding, padding : canvas_w - padding]
''',
        judge=_judge_scatter,
        hints=(
            "Take the options one by one: the check goes on to the next when one is right.",
            "Output padding makes the canvas larger at its end and moves nothing. Padding crops "
            "both ends after all stamps are down.",
            "A dilated stamp covers `dilation * (kernel - 1) + 1` pixels, and a slice with a third "
            "value, `slice(start, stop, dilation)`, takes every `dilation`-th of them.",
        ),
        why="A dilated stamp spans `dilation * (kernel - 1) + 1` pixels and touches every "
        "`dilation`-th of them. Output padding only makes the canvas larger; padding crops it at "
        "both ends when everything is stamped.",
    ),
)
