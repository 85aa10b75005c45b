"""The transposed convolution in NumPy, twice, and how wrong another result is.

:func:`scatter` is the definition: each input pixel stamps the kernel into the output.
:func:`gather` is the same sum seen from the output pixel, the way the kernels compute it. Both
compute in float64, whatever they are given, so either is the exact result as far as a float32
one is concerned. They are for reading and for checking, not for speed.

Shapes and argument order are PyTorch's; the arithmetic is explained by V. Dumoulin and F. Visin,
"A guide to convolution arithmetic for deep learning", 2016 (arXiv:1603.07285), section 4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from convt_lab.problem import Problem

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

__all__ = [
    "FLOAT32_GATE",
    "TF32_ROUNDOFF",
    "UNIT_ROUNDOFF",
    "condition_error",
    "condition_scale",
    "float32_gate",
    "gather",
    "relative_l2",
    "scatter",
    "tf32_gate",
    "truncation_gate",
]

UNIT_ROUNDOFF = 2.0**-24
"""u, half the distance from 1 to the next float32: the relative error of one rounding."""

TF32_ROUNDOFF = 2.0**-11
"""The same of TF32, the tensor cores' type of 11 significant bits."""

FLOAT32_GATE = 8.0
"""Largest :func:`condition_error` of a float32 kernel that counts as right.

A sum of n products, each step rounded once, is at most about n units wrong, but roundings mostly
cancel: a chain of float32 multiply-adds as long as the star problem's, 64 * 3 * 7 = 1344 terms,
stays at a few units, and sums in another order at less. Operands rounded to TF32 cost hundreds of
units; a term left out or multiplied by a wrong weight, thousands. So 8 separates right from wrong
with room on both sides, for up to a million outputs: see :func:`float32_gate`.
"""


def float32_gate(outputs: int) -> float:
    """Return the gate for the largest error among `outputs` outputs: 8 for up to a million.

    The condition error is a maximum. Roundings that mostly cancel leave errors that are close to
    normally distributed, and the largest of M such values grows like ``sqrt(2 ln M)``. The star
    problem has 136 million outputs, whose gate is 8 * sqrt(ln 136e6 / ln 1e6) = 9.3.
    """
    million = 1e6
    return FLOAT32_GATE * math.sqrt(math.log(max(outputs, million)) / math.log(million))


def terms_of(problem: Problem) -> int:
    """Return how many products an output is a sum of where instructions sum eight channels at once.

    Those that fill the last instruction count, too.
    """
    channels = -(-problem.in_channels // problem.groups // 8) * 8
    return channels * math.prod(problem.kernel_size)


def truncation_gate(terms: int, depth: int = 8) -> float:
    """Bound the condition error of a sum of exact products that tensor cores have taken.

    Parameters
    ----------
    terms
        Of an output, zeros among them counted: at most C_in / groups rounded up, times all taps.
    depth
        How many terms an instruction adds to its accumulator at once.

    Returns
    -------
    float
        Each instruction cuts its sum off, which is wrong by less than 2^-23 of it, two units; the
        bias is added with one rounding, and the result stored with another.
    """
    return 2.0 * math.ceil(terms / depth) + 2.0


def tf32_gate(terms: int) -> float:
    """Bound the condition error of a right result whose operands were rounded to TF32.

    Both operands of a product may be wrong by 2^-11 of themselves, so it may be by 2^-10 + 2^-22,
    and a sum of products by as much of the sum of their magnitudes; and see `truncation_gate`. No
    operand may be so small (below 2^-126) that TF32 has fewer digits left for it.

    Parameters
    ----------
    terms
        As for `truncation_gate`.

    Returns
    -------
    float
        In units of the condition error.
    """
    products = 2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2
    return products / UNIT_ROUNDOFF + (1 + products) * truncation_gate(terms)


@np.errstate(over="ignore", invalid="ignore")
def scatter(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> np.ndarray:
    """Transposed convolution by its definition: every input pixel stamps the kernel.

    Input pixel (h, w) adds ``x[n, ci, h, w] * weight[ci, co, kh, kw]`` to the canvas at
    ``(h * stride + kh * dilation, w * stride + kw * dilation)``. The output is the canvas
    without its outermost `padding` rows and columns.

    Parameters
    ----------
    x : array or tensor
        Input [N, C_in, H, W], or [C_in, H, W] for one image alone.
    weight : array or tensor
        [C_in, C_out/groups, KH, KW].
    bias : array or tensor, optional
        [C_out].
    stride, padding, output_padding, groups, dilation
        As in ``torch.nn.functional.conv_transpose2d``, in its order.

    Returns
    -------
    numpy.ndarray
        float64, [N, C_out, OH, OW], or [C_out, OH, OW] for one image alone. A NaN or an infinity
        in `x` or `weight` reaches exactly those outputs whose sum contains it.

    Raises
    ------
    TypeError
        If an argument has a wrong type, or an array holds no real numbers.
    ProblemError
        If no transposed convolution has these shapes and arguments.
    """
    problem, x, weight, bias, is_batched = _prepare(
        x, weight, bias, stride, padding, output_padding, groups, dilation
    )
    rows, columns = problem.axes
    n, c_out, out_height, out_width = problem.output_shape

    # All that the stamps can reach, and everything that is asked for, before cropping.
    canvas = np.zeros((n, c_out, out_height + 2 * rows.padding, out_width + 2 * columns.padding))
    for kh in range(rows.kernel):
        for kw in range(columns.kernel):
            # Where tap (kh, kw) of all the stamps lands: a stride apart in both directions.
            oh = slice(kh * rows.dilation, None, rows.stride)
            ow = slice(kw * columns.dilation, None, columns.stride)
            grid = canvas[:, :, oh, ow][:, :, : rows.size, : columns.size]
            grid += _mix_channels(x, weight[:, :, kh, kw], groups)

    output = canvas[
        :,
        :,
        rows.padding : rows.padding + out_height,
        columns.padding : columns.padding + out_width,
    ]
    return _finish(output, bias, is_batched)


@np.errstate(over="ignore", invalid="ignore")
def gather(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> np.ndarray:
    """Transposed convolution seen from the output: every output pixel collects its taps.

    Output pixel (oh, ow) sums ``x[n, ci, h, w] * weight[ci, co, kh, kw]`` over the channels and
    over the pairs of tap and input that meet in it, ``h * stride + kh * dilation == oh +
    padding`` and the same along the width: :meth:`convt_lab.problem.Axis.taps`. Nothing is
    padded with zeros, so nothing is multiplied by them.

    Parameters and result are those of :func:`scatter`, and so are the errors.

    Parameters
    ----------
    x : array or tensor
        Input [N, C_in, H, W], or [C_in, H, W] for one image alone.
    weight : array or tensor
        [C_in, C_out/groups, KH, KW].
    bias : array or tensor, optional
        [C_out].
    stride, padding, output_padding, groups, dilation
        As in ``torch.nn.functional.conv_transpose2d``, in its order.

    Returns
    -------
    numpy.ndarray
        float64, [N, C_out, OH, OW], or [C_out, OH, OW] for one image alone.

    Raises
    ------
    TypeError
        If an argument has a wrong type, or an array holds no real numbers.
    ProblemError
        If no transposed convolution has these shapes and arguments.
    """
    problem, x, weight, bias, is_batched = _prepare(
        x, weight, bias, stride, padding, output_padding, groups, dilation
    )
    rows, columns = problem.axes
    row_taps = [_tap_arrays(rows.taps(oh)) for oh in range(rows.out_size)]
    column_taps = [_tap_arrays(columns.taps(ow)) for ow in range(columns.out_size)]

    # Channels as [groups, channels of one group]: input channel i of group g meets the output
    # channels o of the same group, and no others.
    n, c_in, height, width = problem.input_shape
    _, c_out_per_group, *kernel = problem.weight_shape
    x = x.reshape(n, groups, c_in // groups, height, width)
    weight = weight.reshape(groups, c_in // groups, c_out_per_group, *kernel)
    output = np.empty((n, groups, c_out_per_group, rows.out_size, columns.out_size))
    for oh, (kh, h) in enumerate(row_taps):
        for ow, (kw, w) in enumerate(column_taps):
            # a and b run over the taps along the rows and along the columns.
            pixels = x[:, :, :, h[:, None], w]
            taps = weight[:, :, :, kh[:, None], kw]
            output[:, :, :, oh, ow] = np.einsum("ngiab,gioab->ngo", pixels, taps)
    return _finish(output.reshape(problem.output_shape), bias, is_batched)


def relative_l2(actual: Array, expected: Array) -> float:
    """Relative error in the Euclidean norm, ``|actual - expected| / |expected|``.

    Parameters
    ----------
    actual : array or tensor
        The result to judge.
    expected : array or tensor
        The result in float64, of the same shape.

    Returns
    -------
    float
        0 if they are equal; infinity if `actual` has a NaN or an infinity that `expected` has
        not, or the other way round, or if `expected` is 0 everywhere and `actual` is not.

    Raises
    ------
    ValueError
        If the shapes differ: nothing is broadcast.
    """
    actual, expected = _same_shape(actual, expected)
    finite = np.isfinite(expected)
    if not _agree_where_not_finite(actual, expected):
        return float("inf")
    error = _norm(actual[finite] - expected[finite])
    norm = _norm(expected[finite])
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm


def condition_scale(
    x: Array, weight: Array, bias: Array | None = None, **arguments: Any
) -> np.ndarray:
    """Sum of the absolute values of an output's terms, ``|x| ⊛ |weight| + |bias|``.

    That is the sum whose roundings an error is measured against: it tells an output that is
    small because its terms are from one that is small because its terms cancel.

    Parameters
    ----------
    x, weight, bias : array or tensor
        As for :func:`scatter`.
    **arguments
        `stride`, `padding`, `output_padding`, `groups` and `dilation`.

    Returns
    -------
    numpy.ndarray
        float64, of the shape of the output.
    """
    x, weight, bias = (
        array if array is None else np.abs(_float64(name, array))
        for name, array in (("input", x), ("weight", weight), ("bias", bias))
    )
    return scatter(x, weight, bias, **arguments)


def condition_error(
    actual: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    expected: Array | None = None,
    scale: Array | None = None,
    **arguments: Any,
) -> float:
    """Largest error, in units of the rounding of one float32 operation on the terms.

    It is ``max |actual - exact| / (u * (|x| ⊛ |weight| + |bias|))`` with u = 2^-24 and ⊛ the
    transposed convolution of absolute values: the error against the condition of the sum
    (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1). A
    result passes if ``condition_error(...) <= FLOAT32_GATE``.

    Parameters
    ----------
    actual : array or tensor
        The result to judge, [N, C_out, OH, OW] or [C_out, OH, OW].
    x, weight, bias : array or tensor
        What it was computed from, as for :func:`scatter`.
    expected : array or tensor, optional
        The exact result, if it is there already: ``scatter(x, weight, bias, **arguments)``.
    scale : array or tensor, optional
        ``condition_scale(x, weight, bias, **arguments)``, if it is there already.
    **arguments
        `stride`, `padding`, `output_padding`, `groups` and `dilation`.

    Returns
    -------
    float
        0 if nothing differs. Infinity, which passes no gate, if an output differs whose terms
        are all 0; if `actual` has a NaN or an infinity where the exact result is finite; and if
        the exact result is NaN or infinite and `actual` is not the same.

    Raises
    ------
    ValueError
        If `actual` has not the shape of the output: nothing is broadcast.

    Notes
    -----
    Underflow is not allowed for: terms below about 2^-126 lose digits in float32 that the
    measure expects.
    """
    if expected is None:
        expected = scatter(x, weight, bias, **arguments)
    actual, expected = _same_shape(actual, expected)
    if not _agree_where_not_finite(actual, expected):
        return float("inf")
    if scale is None:
        scale = condition_scale(x, weight, bias, **arguments)
    scale, _ = _same_shape(scale, expected, "scale")

    wrong = np.isfinite(expected) & (actual != expected)
    if not wrong.any():
        return 0.0
    difference = np.abs(actual[wrong] - expected[wrong])
    unit = UNIT_ROUNDOFF * scale[wrong]
    with np.errstate(divide="ignore"):
        return float(np.max(difference / unit))


def _prepare(
    x: Array, weight: Array, bias: Array | None, *arguments: Any
) -> tuple[Problem, np.ndarray, np.ndarray, np.ndarray | None, bool]:
    """Convert the tensors to float64, batch the input, check everything."""
    x = _float64("input", x)
    weight = _float64("weight", weight)
    bias = None if bias is None else _float64("bias", bias)
    is_batched = x.ndim != 3
    x = x if is_batched else x[None]
    problem = Problem.from_shapes(
        x.shape, weight.shape, None if bias is None else bias.shape, *arguments
    )
    return problem, x, weight, bias, is_batched


def _finish(output: np.ndarray, bias: np.ndarray | None, is_batched: bool) -> np.ndarray:
    """Add the bias and give one image alone back without a batch."""
    if bias is not None:
        output = output + bias[:, None, None]
    return np.ascontiguousarray(output if is_batched else output[0])


def _mix_channels(x: np.ndarray, tap: np.ndarray, groups: int) -> np.ndarray:
    """Multiply every pixel's C_in channels by one tap's [C_in, C_out/groups] weights."""
    n, c_in, height, width = x.shape
    c_out_per_group = tap.shape[1]
    pixels = x.reshape(n, groups, c_in // groups, height * width)
    matrices = tap.reshape(groups, c_in // groups, c_out_per_group).transpose(0, 2, 1)
    return (matrices @ pixels).reshape(n, groups * c_out_per_group, height, width)


def _tap_arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Turn the pairs (tap, input) of one output into an index array of each."""
    taps, inputs = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    return taps, inputs


def _float64(name: str, array: Array) -> np.ndarray:
    """Convert an array, or a tensor on any device, to float64; exact from any smaller type."""
    if hasattr(array, "detach"):
        if array.is_complex():
            raise TypeError(f"{name} has dtype {array.dtype}: it must hold real numbers")
        array = array.detach().cpu().double().numpy()
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}: it must hold real numbers")
    return array.astype(np.float64, copy=False)


def _same_shape(
    actual: Array, expected: Array, name: str = "actual"
) -> tuple[np.ndarray, np.ndarray]:
    """Convert both to float64 and refuse to compare unless their shapes are equal."""
    actual = _float64(name, actual)
    expected = _float64("expected", expected)
    if actual.shape != expected.shape:
        raise ValueError(
            f"{name} has shape {list(actual.shape)}: it must be {list(expected.shape)}, the "
            f"shape of the expected result"
        )
    return actual, expected


def _norm(values: np.ndarray) -> float:
    """Euclidean norm, without squares that overflow or vanish."""
    largest = float(np.max(np.abs(values), initial=0.0))
    return largest * float(np.linalg.norm(values / largest)) if largest else 0.0


def _agree_where_not_finite(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether both have the same NaNs and the same infinities."""
    special = ~(np.isfinite(actual) & np.isfinite(expected))
    return np.array_equal(actual[special], expected[special], equal_nan=True)
