"""The exercises of the chapter on the sum seen from the output."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from convt_lab import reference
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem, ProblemError

__all__ = ["EXERCISES"]


def _small_integers(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Draw inputs in float64 whose sums have nothing to round: results must be equal."""
    generator = np.random.default_rng(0)
    shapes = (problem.input_shape, problem.weight_shape)
    x, weight = (generator.integers(-4, 5, shape).astype(np.float64) for shape in shapes)
    return x, weight


# ---- A convolution in its place ------------------------------------------------------------------

_STRIDE_1 = (
    Problem(1, 1, 1, 4, 4, kernel_size=1),
    Problem(1, 2, 3, 5, 4, kernel_size=3),
    Problem(2, 3, 4, 5, 6, kernel_size=(3, 4)),
    Problem(1, 3, 2, 5, 6, kernel_size=(3, 4), padding=2),
    Problem(2, 2, 3, 4, 5, kernel_size=(2, 5), padding=1, dilation=3),
)


def _judge_convolution(function: Callable) -> tuple[str | None, str]:
    for problem in _STRIDE_1:
        x, weight = _small_integers(problem)
        padding, dilation = problem.padding[0], problem.dilation[0]
        label = f"weight {list(weight.shape)}, padding={padding}, dilation={dilation}"
        found = function(weight.copy(), padding, dilation)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return f"{label}: it returns {found!r}, and should return (weight, (rows, columns))", ""
        theirs, paddings = np.asarray(found[0], np.float64), found[1]
        wanted = [problem.out_channels, problem.in_channels, *problem.kernel_size]
        if list(theirs.shape) != wanted:
            return (
                f"{label}: conv2d wants a weight [C_out, C_in, KH, KW], here {wanted}; "
                f"yours is {list(theirs.shape)}",
                "",
            )
        if not (
            isinstance(paddings, tuple | list)
            and len(paddings) == 2
            and all(isinstance(p, int | np.integer) and p >= 0 for p in paddings)
        ):
            return f"{label}: the padding must be two integers from 0 up, not {paddings!r}", ""
        y = torch.nn.functional.conv2d(
            torch.from_numpy(x),
            torch.from_numpy(theirs.copy()),
            padding=tuple(map(int, paddings)),
            dilation=dilation,
        )
        exact = reference.scatter(x, weight, **problem.arguments)
        if wrong := first_wrong(y.numpy(), exact, 0, "the convolution's output"):
            return f"{label}: {wrong}", ""
    return None, f"{len(_STRIDE_1)} transposed convolutions, each equal to a convolution"


# ---- Outputs that no tap reaches -----------------------------------------------------------------


def _judge_unreached(function: Callable) -> tuple[str | None, str]:
    cases = empty = 0
    for stride, dilation, kernel, size, padding, extra in product(
        (1, 2, 3, 4, 6), (1, 2, 3, 4), (1, 2, 3, 7), (1, 4), (0, 1), (0, 1, 2)
    ):
        try:
            problem = Problem(
                width=size,
                kernel_size=(1, kernel),
                stride=(1, stride),
                padding=(0, padding),
                output_padding=(0, extra),
                dilation=(1, dilation),
            )
        except ProblemError:
            continue
        # Ones stamped with ones: an output's value is the number of its terms.
        ones = np.ones(problem.input_shape), np.ones(problem.weight_shape)
        counts = reference.scatter(*ones, **problem.arguments).ravel()
        unreached = np.flatnonzero(counts == 0).tolist()
        found = function(size, kernel, stride, padding, extra, dilation)
        label = (
            f"size {size}, kernel {kernel}, stride {stride}, padding {padding}, "
            f"output_padding {extra}, dilation {dilation}"
        )
        try:
            outputs = sorted(int(o) for o in found)
        except (TypeError, ValueError):
            return f"{label}: it returns {found!r}, and should return a list of outputs", ""
        if outputs != unreached:
            missing = sorted(set(unreached) - set(outputs))
            beyond = [o for o in outputs if not 0 <= o < len(counts)]
            if beyond:
                what = f"there is no output {beyond[0]}, for there are {len(counts)}"
            elif missing:
                what = f"no tap reaches output {missing[0]}, and your list lacks it"
            elif reached := sorted(set(outputs) - set(unreached)):
                terms = int(counts[reached[0]])
                what = f"output {reached[0]} is in your list, and its sum has terms: {terms}"
            else:
                what = "an output is in your list twice"
            return f"{label}: {what}", ""
        cases, empty = cases + 1, empty + len(unreached)
    return None, f"{cases} axes agree with what stamping ones leaves at zero, {empty:,} outputs"


# ---- Loops without a test ------------------------------------------------------------------------


def _judge_tap_range(function: Callable) -> tuple[str | None, str]:
    outputs = 0
    for size, kernel, stride, padding in product(
        (1, 2, 5, 9), (1, 2, 3, 4, 7), (1, 2, 3, 4, 8), (0, 1, 3)
    ):
        out_size = (size - 1) * stride - 2 * padding + kernel
        for o in range(out_size):
            # Input i and tap k meet where i * stride + k == o + padding.
            taps = [
                k
                for k in range(kernel)
                if (o + padding - k) % stride == 0 and 0 <= (o + padding - k) // stride < size
            ]
            found = function(size, kernel, stride, padding, o)
            label = f"size {size}, kernel {kernel}, stride {stride}, padding {padding}, output {o}"
            if not isinstance(found, range):
                return f"{label}: it returns {found!r}, and should return a range", ""
            if list(found[: kernel + 1]) != taps:
                what = f"yours are the taps {_listed(found[: kernel + 1])}; "
                what += f"those that meet an input from 0 to {size - 1} are {_listed(taps)}"
                return f"{label}: {what}", ""
            outputs += 1
    return (
        None,
        f"{outputs:,} outputs: each tap in a range meets an input, and none is missing",
    )


def _listed(taps: range | list[int]) -> str:
    return ", ".join(map(str, taps)) or "none"


# ---- Phases with any dilation --------------------------------------------------------------------


def _phase_problems() -> list[Problem]:
    plain = [
        Problem(1, 2, 3, 5, 6, (3, 7), stride, padding=(0, 1))
        for stride in (1, 2, 3)  # the start is right on these
    ]
    dilated = [
        Problem(1, 2, 3, 5, 6, (3, 7), stride, padding=(0, 1), dilation=dilation)
        for dilation, stride in product((2, 3, 4), (1, 2, 3, 4, 6))
    ]
    mixed = Problem(2, 1, 2, 3, 4, (2, 5), (3, 4), (1, 3), (2, 1), (5, 6))
    return [*plain, *dilated, mixed]


def _judge_phases(function: Callable) -> tuple[str | None, str]:
    problems = _phase_problems()
    for problem in problems:
        x, weight = _small_integers(problem)
        exact = reference.scatter(x, weight, **problem.arguments)
        done: list[int] = []

        def gather(x: np.ndarray, weight: np.ndarray, dilation=1, done=done) -> np.ndarray:
            done.append(x.size * weight[0].size)
            return reference.gather(x, weight, dilation=dilation)

        y = np.asarray(function(x.copy(), weight.copy(), problem, gather))
        label = f"kernel 3×7, stride {problem.stride[0]}, dilation {problem.dilation[0]}"
        if problem is problems[-1]:
            label = f"kernel 2×5, stride {problem.stride}, dilation {problem.dilation}"
        if wrong := first_wrong(y, exact, 0, "output"):
            return f"{label}: {wrong}", ""
        if not done:
            return f"{label}: right, but it never calls the gather that it is given", ""
        whole = x.size * weight[0].size
        if sum(done) > whole:
            return (
                f"{label}: right, but it multiplies {sum(done):,} times, and each tap with each "
                f"input it meets once is {whole:,}: some taps are in more than one phase",
                "",
            )
    return None, f"{len(problems)} problems, every output equal, each tap in one phase"


EXERCISES = (
    FunctionExercise(
        name="gather.1",
        function="as_convolution",
        text='''
def as_convolution(weight, padding, dilation):
    """What conv2d must be given to do a transposed convolution of stride 1.

    weight [C_in, C_out, KH, KW]; returns conv2d's weight and its padding,
    a pair (rows, columns). Its dilation and stride are the same.
    """
    return weight, (padding, padding)
''',
        edits={
            "return weight, (padding, padding)": (
                "kernel_h, kernel_w = weight.shape[2:]\n"
                "    flipped = weight[:, :, ::-1, ::-1].swapaxes(0, 1)\n"
                "    rows = dilation * (kernel_h - 1) - padding\n"
                "    columns = dilation * (kernel_w - 1) - padding\n"
                "    return flipped, (rows, columns)"
            ),
        },
        judge=_judge_convolution,
        hints=(
            "With stride 1 the input is $i = o + p - k\\,d$: it falls as the tap rises. In an "
            "ordinary convolution, $i = o - p' + k'\\,d$, it rises. Count the taps from the other "
            "end.",
            "Put $k' = K - 1 - k$ into the second formula and compare it with the first. That "
            "gives $p'$, for each axis its own.",
            "`conv2d` wants the weight as `[C_out, C_in, KH, KW]`. In NumPy `[::-1]` reverses an "
            "axis and `swapaxes` swaps two.",
        ),
        why="With $s = 1$ the input is $i = o + p - k\\,d$, so the input index falls where an "
        "ordinary convolution's, $i = o - p' + k'\\,d$, rises. Count the taps from the other end, "
        "$k' = K - 1 - k$, and the two agree for $p' = d\\,(K - 1) - p$. So flip the kernel along "
        "both axes, swap its channel axes and pad by $d\\,(K - 1) - p$. Where the kernel is not "
        "square, the two paddings differ.",
    ),
    FunctionExercise(
        name="gather.2",
        function="unreached",
        text='''
def unreached(size, kernel, stride, padding, output_padding, dilation):
    """The outputs along an axis that no tap reaches: nothing but the bias."""
    common = int(np.gcd(stride, dilation))
    out_size = (size - 1) * stride - 2 * padding + dilation * (kernel - 1)
    out_size += output_padding + 1
    return [o for o in range(out_size) if (o + padding) % common]
''',
        whole='''
def unreached(size, kernel, stride, padding, output_padding, dilation):
    """The outputs along an axis that no tap reaches: nothing but the bias."""
    out_size = (size - 1) * stride - 2 * padding + dilation * (kernel - 1)
    out_size += output_padding + 1
    reached = {
        i * stride + k * dilation - padding for i in range(size) for k in range(kernel)
    }
    return [o for o in range(out_size) if o not in reached]
''',
        judge=_judge_unreached,
        hints=(
            "The common divisor is one reason among three. What if the kernel is smaller than the "
            "stride? What does output padding append?",
            "A residue class may hold no tap below `kernel`, and at the rims its taps may need "
            "inputs that don't exist. A search finds all of these at once.",
            "Every input and tap reach output `i * stride + k * dilation - padding`. Collect these "
            "in a set; what is not in it is the answer.",
        ),
        why="An output has no term if the common divisor of stride and dilation does not divide "
        "$o + p$; if its residue class has no tap in the kernel, as where the kernel is smaller "
        "than the stride; or if the taps that it has need inputs beyond the rim, as they may where "
        "output padding appends pixels. A search knows of no reasons and finds "
        "all. A kernel must write these outputs too: the memory it is given is not zero.",
    ),
    FunctionExercise(
        name="gather.3",
        function="tap_range",
        text='''
def tap_range(size, kernel, stride, padding, o):
    """The taps that reach output o, as a range, for dilation 1.

    A loop over it needs no test: each of its taps k meets an input
    (o + padding - k) // stride that exists.
    """
    return range((o + padding) % stride, kernel, stride)
''',
        edits={
            "return range((o + padding) % stride, kernel, stride)": (
                "q, r = divmod(o + padding, stride)\n"
                "    first = r + stride * max(0, q - (size - 1))\n"
                "    return range(first, min(kernel, o + padding + 1), stride)"
            ),
        },
        judge=_judge_tap_range,
        hints=(
            "The start has the right class, and taps whose input lies before the row or behind it. "
            "Number the taps by $t$, as $k = r + s\\,t$ and $i = q - t$ do: for which $t$ is "
            "$0 \\le q - t$?",
            "And for which is $q - t$ below `size`? So $t$ goes from `max(0, q - (size - 1))` to "
            "$q$, and the kernel may end before that.",
            "Tap and input: $k = r + s\\,t$. For $t = q$ that is $o + p$.",
        ),
        why="The input $i = q - t$ exists for $q - (W - 1) \\le t \\le q$, where $W$ is `size`. So "
        "the first tap is the class's own or the one that meets the last input, whichever is "
        "later; and no tap beyond $o + p$ has an input. Two comparisons for each output replace "
        "two for each tap. The kernels of the ladder bound their loops like this from `coalesced` "
        "on.",
    ),
    FunctionExercise(
        name="gather.4",
        function="by_phases",
        text='''
def by_phases(x, weight, problem, gather):
    """Compute a problem of any dilation as one of stride 1 for each phase.

    gather(x, weight, dilation) is the transposed convolution of stride 1, without
    padding; its dilation is a pair.
    """
    rows, columns = problem.axes
    n, c_out, out_height, out_width = problem.output_shape
    height, width = out_height + 2 * rows.padding, out_width + 2 * columns.padding
    canvas = np.zeros((n, c_out, height, width))
    for a in range(min(rows.stride, rows.kernel)):
        for b in range(min(columns.stride, columns.kernel)):
            taps = weight[:, :, a :: rows.stride, b :: columns.stride]
            part = gather(x, taps, (1, 1))
            grid = canvas[:, :, a :: rows.stride, b :: columns.stride]
            height, width = map(min, part.shape[2:], grid.shape[2:])
            grid[:, :, :height, :width] = part[:, :, :height, :width]
    bottom, right = rows.padding + out_height, columns.padding + out_width
    return canvas[:, :, rows.padding : bottom, columns.padding : right]
''',
        edits={
            "    for a in range(min(rows.stride, rows.kernel)):\n"
            "        for b in range(min(columns.stride, columns.kernel)):\n"
            "            taps = weight[:, :, a :: rows.stride, b :: columns.stride]\n"
            "            part = gather(x, taps, (1, 1))\n"
            "            grid = canvas[:, :, a :: rows.stride, b :: columns.stride]\n": (
                "    for a in range(min(rows.k_step, rows.kernel)):\n"
                "        for b in range(min(columns.k_step, columns.kernel)):\n"
                "            taps = weight[:, :, a :: rows.k_step, b :: columns.k_step]\n"
                "            part = gather(x, taps, (rows.i_step, columns.i_step))\n"
                "            top, left = a * rows.dilation, b * columns.dilation\n"
                "            grid = canvas[:, :, top :: rows.stride, left :: columns.stride]\n"
            )
        },
        judge=_judge_phases,
        hints=(
            "Which taps belong together? With dilation, every $s/g$-th, so there are $s/g$ "
            "phases with terms along an axis. `Axis.k_step` is $s/g$, and `Axis.i_step` is $d/g$.",
            "From one tap of a phase to the next the input falls by $d/g$: what kind of problem "
            "of stride 1 has that?",
            "Where on the canvas does the phase of first tap $a$ begin? Where this tap puts input "
            "$0$. Its outputs lie a stride apart from there on.",
        ),
        why="The remainder of $o + p$ modulo $s$ still decides the class, so there are $s$ phases "
        "along an axis. Those that $g$ does not divide are empty, which leaves $s/g$ with terms. "
        "In each of these the taps are every $s/g$-th, and from tap to tap the input falls by "
        "$d/g$: a problem of stride 1 with *dilation* $d/g$. Its outputs lie $s$ apart, beginning "
        "at the place that its first tap gives to input $0$, which is $k\\,d$ on the canvas. The "
        "package's GPU kernels sort further, by the remainder of the input index modulo $d/g$, "
        "until the dilation is $1$ as well.",
    ),
)
