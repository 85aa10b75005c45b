"""The exercises of the chapter on a draft and its mistakes: mend, and tell right from wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from convt_lab import reference
from convt_lab.exercises.cuda import KernelExercise, Launch
from convt_lab.exercises.python import FunctionExercise
from convt_lab.problem import Problem

__all__ = ["DRAFTS", "EXERCISES", "unseen"]


# ---- A second draft ------------------------------------------------------------------------------


def _rows() -> list[Launch]:
    """Make the launches so that each of the mistakes shows by itself, one after the other."""
    launches = []
    for c_in, c_out, groups, size, taps, stride, padding in (
        (1, 1, 1, 5, 1, 1, 0),  # no mistake shows
        (1, 1, 1, 6, 3, 2, 0),  # the rim
        (3, 2, 1, 6, 3, 2, 1),  # the bias
        (4, 6, 2, 5, 4, 3, 1),  # the groups
        (6, 3, 3, 40, 3, 1, 0),
    ):
        problem = Problem(
            in_channels=c_in,
            out_channels=c_out,
            width=size,
            kernel_size=(1, taps),
            stride=(1, stride),
            padding=(0, padding),
            groups=groups,
            bias=True,
        )
        tensors = problem.random_inputs()
        exact = reference.scatter(*tensors, **problem.arguments).reshape(c_out, -1)
        scale = reference.condition_scale(*tensors, **problem.arguments).reshape(c_out, -1)
        y = np.full(exact.shape, np.nan, np.float32)
        label = (
            f"C_in={c_in}, C_out={c_out}, groups={groups}, {size} inputs, {taps} taps, "
            f"stride {stride}, padding {padding}"
        )
        arrays = (tensor.numpy().copy() for tensor in tensors)
        numbers = (c_in, c_out, groups, size, taps, stride, padding, problem.out_width)
        grid = (math.ceil(problem.out_width / 32), c_out)
        launches.append(Launch(label, grid, 32, (*arrays, y, *numbers), 3, exact, scale))
    return launches


# ---- Offsets -------------------------------------------------------------------------------------


def _offsets() -> list[Launch]:
    launches = []
    for batch, c_out, height, width in (
        (2, 3, 4, 5),
        (128, 64, 514, 518),
        (1, 1, 60_000, 60_000),
        (70_000, 70_000, 1, 1),
    ):
        at = np.zeros(1, np.int64)
        exact = np.array([batch * c_out * height * width - 1], np.float64)
        last = (batch - 1, c_out - 1, height - 1, width - 1)
        label = f"the last value of [{batch}, {c_out}, {height}, {width}]"
        args = (at, *last, c_out, height, width)
        launches.append(Launch(label, 1, 1, args, 0, exact))
    return launches


# ---- One problem that finds them all -------------------------------------------------------------

_MOST_MULTIPLY_ADDS = 1_000
_MOST_VALUES = 10_000

Tensors = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _fitted(y: np.ndarray, problem: Problem) -> np.ndarray:
    """Crop a result to the output's shape; zeros where it is too small."""
    fitted = np.zeros(problem.output_shape)
    common = tuple(slice(min(a, b)) for a, b in zip(y.shape, fitted.shape, strict=True))
    fitted[common] = y[common]
    return fitted


def _with(problem: Problem, tensors: Tensors, **changes: Any) -> np.ndarray:
    """Compute with other arguments than were asked for, in an output of the right shape."""
    # Uncropped, so that there is an output whatever the arguments are.
    padding = changes.pop("padding", problem.padding)
    shift = changes.pop("shift", (0, 0))
    arguments = problem.arguments | changes
    arguments["padding"] = arguments["output_padding"] = 0
    y = reference.scatter(*tensors, **arguments)
    if tensors[2] is not None:  # which stands in the cropped outputs, too
        y -= tensors[2][:, None, None]
    top, left = (p + s for p, s in zip(padding, shift, strict=True))
    y = _fitted(y[:, :, top:, left:], problem)
    return y if tensors[2] is None else y + tensors[2][:, None, None]


def _layout(problem: Problem, tensors: Tensors) -> np.ndarray:
    x, weight, bias = tensors
    group_in, group_out = problem.in_channels // problem.groups, weight.shape[1]
    read = weight.reshape(problem.groups, group_out, group_in, *problem.kernel_size)
    return _with(problem, (x, read.swapaxes(1, 2).reshape(weight.shape), bias))


def _kernel_axes(problem: Problem, tensors: Tensors) -> np.ndarray:
    x, weight, bias = tensors
    read = weight.reshape(*weight.shape[:2], *problem.kernel_size[::-1])
    return _with(problem, (x, read.swapaxes(2, 3), bias))


def _flipped(problem: Problem, tensors: Tensors) -> np.ndarray:
    return _with(problem, (tensors[0], tensors[1][:, :, ::-1, ::-1], tensors[2]))


def _rows_for_columns(name: str) -> Callable[[Problem, Tensors], np.ndarray]:
    def draft(problem: Problem, tensors: Tensors) -> np.ndarray:
        return _with(problem, tensors, **{name: (getattr(problem, name)[0],) * 2})

    return draft


def _shifted(problem: Problem, tensors: Tensors) -> np.ndarray:
    return _with(problem, tensors, shift=problem.output_padding)


def _interleaved(problem: Problem, tensors: Tensors) -> np.ndarray:
    """Take output channel co for one of group co % groups."""
    x, weight, bias = tensors
    parts = x.reshape(len(x), problem.groups, -1, *x.shape[2:])
    group_out = problem.out_channels // problem.groups
    y = np.zeros(problem.output_shape)
    for co in range(problem.out_channels):
        # Its own weight, on the inputs of the wrong group.
        group = co // group_out
        block = weight.reshape(problem.groups, -1, *weight.shape[1:])[group]
        part = parts[:, co % problem.groups]
        one = reference.scatter(
            part, block[:, co % group_out][:, None], **problem.arguments | {"groups": 1}
        )
        y[:, co] = one[:, 0]
    return y if bias is None else y + bias[:, None, None]


def _no_bias(problem: Problem, tensors: Tensors) -> np.ndarray:
    return _with(problem, (*tensors[:2], None))


def _one_bias(problem: Problem, tensors: Tensors) -> np.ndarray:
    bias = tensors[2]
    return _with(problem, (*tensors[:2], None if bias is None else np.full_like(bias, bias[0])))


def _first_image(problem: Problem, tensors: Tensors) -> np.ndarray:
    y = _with(problem, tensors)
    return np.repeat(y[:1], len(y), axis=0)


def _pairs_of_channels(problem: Problem, tensors: Tensors) -> np.ndarray:
    x, weight, bias = tensors
    weight = weight.reshape(problem.groups, -1, *weight.shape[1:]).copy()
    weight[:, weight.shape[1] // 2 * 2 :] = 0
    return _with(problem, (x, weight.reshape(tensors[1].shape), bias))


def _fours_of_columns(problem: Problem, tensors: Tensors) -> np.ndarray:
    y = _with(problem, tensors)
    y[..., problem.out_width // 4 * 4 :] = np.nan
    return y


#: What is wrong with each, and the operator.
DRAFTS: Mapping[str, Callable[[Problem, Tensors], np.ndarray]] = MappingProxyType(
    {
        "reads the weight's channels as [C_out, C_in]": _layout,
        "reads the kernel as [KW, KH]": _kernel_axes,
        "flips the kernel": _flipped,
        "takes the rows' stride for the columns, too": _rows_for_columns("stride"),
        "takes the rows' padding for the columns, too": _rows_for_columns("padding"),
        "takes the rows' dilation for the columns, too": _rows_for_columns("dilation"),
        "adds output_padding to the index": _shifted,
        "takes channel co for one of group co % groups": _interleaved,
        "forgets the bias": _no_bias,
        "adds the first channel's bias to all": _one_bias,
        "computes the first image only, and copies it": _first_image,
        "takes a group's input channels in pairs, and no odd one": _pairs_of_channels,
        "writes columns in fours, and no rest": _fours_of_columns,
    }
)


def unseen(problem: Problem) -> list[str]:
    """Name the drafts whose result on a problem is right.

    Parameters
    ----------
    problem
        Small: each draft computes it in NumPy.

    Returns
    -------
    list of str
        Of the keys of `DRAFTS`.
    """
    tensors = tuple(None if t is None else t.double().numpy() for t in problem.random_inputs())
    exact = reference.scatter(*tensors, **problem.arguments)
    allowed = 1e-12 * reference.condition_scale(*tensors, **problem.arguments)
    return [
        name
        for name, draft in DRAFTS.items()
        if (np.abs(draft(problem, tensors) - exact) <= allowed).all()
    ]


def _judge_test_problem(function: Callable) -> tuple[str | None, str]:
    options = function()
    if not isinstance(options, dict):
        return f"it returns {options!r}, and should return a dict of Problem's arguments", ""
    try:
        problem = Problem(**options)
    except (TypeError, ValueError) as error:
        return f"there is no such problem: {error}", ""
    values = max(map(math.prod, (problem.input_shape, problem.weight_shape, problem.output_shape)))
    if values > _MOST_VALUES:
        return f"at most {_MOST_VALUES:,} values in a tensor; yours: {values:,}", ""
    multiply_adds = problem.multiply_adds
    cost = f"at most {_MOST_MULTIPLY_ADDS:,} multiply-adds; yours: {multiply_adds:,}"
    lines = [f"passes unseen: one that {name}" for name in unseen(problem)]
    if multiply_adds > _MOST_MULTIPLY_ADDS:
        lines.append(cost)
    return "\n".join(lines) or None, f"all {len(DRAFTS)} wrong operators fail on it\n{cost}"


# ---- Right or wrong ------------------------------------------------------------------------------


@functools.cache
def _results() -> tuple[tuple[str, bool, np.ndarray, np.ndarray, np.ndarray], ...]:
    """Make results: (what it is, whether it is right, y, exact, scale)."""
    problem = Problem(2, 8, 4, 6, 7, (3, 5), stride=2, padding=1, output_padding=1)
    x, weight, _ = problem.random_inputs()

    def case(text: str, is_right: bool, change: Callable | None = None, x=x, weight=weight):
        y = torch.nn.functional.conv_transpose2d(x, weight, **problem.arguments).numpy()
        exact = reference.scatter(x, weight, **problem.arguments)
        scale = reference.condition_scale(x, weight, **problem.arguments)
        return text, is_right, y if change is None else change(y), exact, scale

    def with_value(value: float) -> Callable:
        def change(y: np.ndarray) -> np.ndarray:
            y = y.copy()
            y[1, 2, 3, 4] = value
            return y

        return change

    def rounded(tensor: torch.Tensor) -> np.ndarray:
        """Keep ten bits of fraction, as TF32 does."""
        fraction, exponent = np.frexp(tensor.numpy())
        return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent)

    coarse = torch.from_numpy(rounded(x)), torch.from_numpy(rounded(weight))
    of_coarse = torch.nn.functional.conv_transpose2d(*coarse, **problem.arguments).numpy()
    no_terms = weight.clone()
    no_terms[:, :, 1::2] = 0  # the rows of an odd or an even oh get nothing
    empty = np.zeros((0, 4, 5, 5))
    return (
        case("PyTorch's own result", True),
        case("PyTorch's own result for inputs a million times as large", True, x=1e6 * x),
        case("inputs a millionth as large", True, x=1e-6 * x),
        case("inputs a millionth as large, and a result of zeros", False, np.zeros_like, 1e-6 * x),
        case("a single NaN", False, with_value(np.nan)),
        case("a single infinity", False, with_value(np.inf)),
        case("nothing but NaN", False, lambda y: np.full_like(y, np.nan)),
        case("one wrong value in the midst of right ones", False, with_value(0.0)),
        case("factors rounded to TF32", False, lambda y: of_coarse),
        case(
            "one image where there are two, and the second is the same",
            False,
            lambda y: y[:1],
            x=x[:1].repeat(2, 1, 1, 1),
        ),
        case("channels and rows swapped in the shape", False, lambda y: y.swapaxes(1, 2)),
        case(
            "a kernel with rows of zeros, so that some outputs are exactly zero",
            True,
            weight=no_terms,
        ),
        case(
            "1e-30 where a kernel with rows of zeros makes exactly zero",
            False,
            lambda y: np.where(y == 0, np.float32(1e-30), y),
            weight=no_terms,
        ),
        ("an empty batch", True, empty.astype(np.float32), empty, empty),
    )


def _judge_is_right(function: Callable) -> tuple[str | None, str]:
    wrong = []
    results = _results()
    for text, is_right, y, exact, scale in results:
        try:
            found = function(y.copy(), exact.copy(), scale.copy())
        except Exception as error:  # the learner's own: told, with the case
            wrong.append(f"{text}: it raises {type(error).__name__}: {error}")
            continue
        if not isinstance(found, bool | np.bool_):
            return f"{text}: it returns {found!r}, and should return True or False", ""
        if found != is_right:
            wrong.append(f"{text}: yours says {found}")
    return "\n".join(wrong) or None, f"{len(results)} results, right ones and wrong ones told apart"


EXERCISES = (
    KernelExercise(
        name="first_draft.1",
        kernel="second_draft",
        text="""
// A thread computes one output of a row, a block's y is its output channel.
// x [C_in, size], w [C_in, C_out/groups, taps], bias [C_out], y [C_out, out_size]
__global__ void second_draft(const float* x, const float* w, const float* bias, float* y,
                             int c_in, int c_out, int groups, int size, int taps,
                             int stride, int padding, int out_size) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x;
  const int co = blockIdx.y;
  if (o >= out_size) return;
  const int group_in = c_in / groups, group_out = c_out / groups;
  const int group = co % groups;
  float sum = 0.0f;
  for (int c = 0; c < group_in; ++c) {
    const int ci = group * group_in + c;
    sum += bias[co];
    for (int k = 0; k < taps; ++k) {
      if ((o + padding - k) % stride != 0) continue;
      const int i = (o + padding - k) / stride;
      if (i >= size) continue;
      sum = fmaf(x[ci * size + i], w[(ci * group_out + co % group_out) * taps + k], sum);
    }
  }
  y[co * out_size + o] = sum;
}
""",
        launches=_rows,
        edits={
            "co % groups;": "co / group_out;",
            "float sum = 0.0f;": "float sum = bias[co];",
            "    sum += bias[co];\n": "",
            "if (i >= size)": "if (i < 0 || i >= size)",
        },
        hints=(
            "There are three. The check's problems are sorted: each shows one mistake more, and "
            "says what is special about it.",
            "Which inputs does output zero ask for? How often is the bias added? Which output "
            "channels does the first of two groups have?",
            "PyTorch's groups are blocks of neighbouring channels: the first group has the first "
            "`group_out` output channels.",
        ),
        why="Output zero has only one tap with an input; the others ask for inputs before the row, "
        "which for all channels but the first is the end of the channel before, so that nothing "
        "crashes. The bias stands once in the sum and not once for each input channel, which one "
        "channel doesn't tell. And groups are blocks of channels, `co / group_out`; dealt out by "
        "`co % groups` they are right where each group has one output channel.",
    ),
    KernelExercise(
        name="first_draft.2",
        kernel="last_offset",
        text="""
#include <cstdint>

// Where the value [n, co, oh, ow] of an array [., c_out, out_h, out_w] is.
__device__ int64_t offset(int n, int co, int oh, int ow, int c_out, int out_h, int out_w) {
  return ((n * c_out + co) * out_h + oh) * out_w + ow;
}

__global__ void last_offset(int64_t* at, int n, int co, int oh, int ow,
                            int c_out, int out_h, int out_w) {
  *at = offset(n, co, oh, ow, c_out, out_h, out_w);
}
""",
        launches=_offsets,
        edits={
            "((n * c_out + co) * out_h + oh)": (
                "((static_cast<int64_t>(n) * c_out + co) * out_h + oh)"
            )
        },
        hints=(
            "In which type does C++ compute the product of two values of type `int`, whatever it "
            "is assigned to?",
            "If the first product has the wide type, all that follow have it, too.",
            "`static_cast<int64_t>(n)` is `n` in the wide type. Is it enough to convert the whole?",
        ),
        why="A product has the type of its factors. In the start all of them are `int`, so the "
        "offset is computed in the narrow type and widened when it is too late. If one factor of "
        "the first product is `int64_t`, then so is the product, and with it every further one. "
        "A cast around the whole expression, or one of the last factor alone, does not help.",
    ),
    FunctionExercise(
        name="first_draft.3",
        function="test_problem",
        text='''
def test_problem():
    """The arguments of one Problem on which every wrong operator fails."""
    return dict(
        batch=1,
        in_channels=4,
        out_channels=4,
        height=4,
        width=4,
        kernel_size=3,
        stride=2,
        padding=1,
        output_padding=1,
        dilation=1,
        groups=1,
        bias=True,
    )
''',
        whole='''
def test_problem():
    """The arguments of one Problem on which every wrong operator fails."""
    return dict(
        batch=2,
        in_channels=6,
        out_channels=4,
        height=2,
        width=3,
        kernel_size=(3, 2),
        stride=(2, 3),
        padding=(0, 1),
        output_padding=(1, 2),
        dilation=(1, 2),
        groups=2,
        bias=True,
    )
''',
        judge=_judge_test_problem,
        hints=(
            "The first point of the chapter's checklist: which of the numbers are equal, so that "
            "they could be swapped unseen?",
            "Rows and columns may have stride, padding and dilation of their own: a pair is "
            "`(rows, columns)`. More than one image, more than one group, and more than one "
            "channel of each kind in a group.",
            "An odd number of input channels in a group, and an output whose width is no multiple "
            "of four. Then make it small: two rows of three inputs can be enough.",
        ),
        why="Every argument has a value that changes the result, and no two that could be swapped "
        "are equal. Rows and columns differ in everything; a group has an odd number of input "
        "channels, and not as many output channels; the width of the output is no multiple of "
        "four. Such a problem is small, so that a test can afford it for every kernel, and its "
        "numbers can still be looked at when it fails.",
    ),
    FunctionExercise(
        name="first_draft.4",
        function="is_right",
        text='''
def is_right(y, exact, scale):
    """Whether a result in float32 is as good as rounding allows.

    exact is the result in float64, and scale is, for each output, the sum of the
    absolute values of its terms. What rounding explains is an error of at most
    8 * 2**-24 of that.
    """
    return not np.abs(y - exact).max() > 1e-3
''',
        edits={
            "    return not np.abs(y - exact).max() > 1e-3": (
                "    if y.shape != exact.shape:\n"
                "        return False\n"
                "    error = np.abs(y.astype(np.float64) - exact)\n"
                "    return bool((error <= 8 * 2**-24 * scale).all())"
            )
        },
        judge=_judge_is_right,
        hints=(
            "An error is large or small against the values that were added up. Compare each "
            "output's error with its own `scale`.",
            "Every comparison with NaN is false. So ask whether all errors are small enough, and "
            "not whether one is too large.",
            "NumPy stretches an axis of size one, so compare the shapes first. `all` of nothing is "
            "true, and `max` of nothing is an error.",
        ),
        why="A fixed bound is too strict for large values and blind for small ones; `scale` makes "
        "it one for all. The comparison is asked so that NaN fails it, output by output, so that "
        "one wrong value is not lost in a mean. The shapes come first, because NumPy would stretch "
        "one image to two. An output without any term has a scale of zero and must be exact.",
    ),
)
