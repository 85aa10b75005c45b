"""The shapes of a transposed convolution: what is legal, how large the output is, what it costs.

Everything here is integer arithmetic. Nothing is computed, built or copied to a device; the
sums themselves are in :mod:`convt_lab.reference` and in the kernels.

The arithmetic is that of V. Dumoulin and F. Visin, "A guide to convolution arithmetic for deep
learning", 2016 (arXiv:1603.07285), section 4, with PyTorch's names and argument order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["Axis", "Problem", "ProblemError", "checked_integer", "checked_problem"]

MAX_EXTENT = 2**31 - 2**16
"""The largest extent of one axis: kernels count along an axis with 32 bits, and their last tile may
stick out by some hundred pixels. Across the whole tensor they count with 64 bits, so the number of
elements has no such limit."""


class ProblemError(ValueError, RuntimeError):
    """An argument has the right type but no transposed convolution with its value exists.

    It is a ValueError, which is what it means, and a RuntimeError, which is what
    ``torch.nn.functional.conv_transpose2d`` raises in its place.
    """


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution: which taps reach which output.

    Input ``i`` and tap ``k`` meet in output ``o`` if and only if
    ``i * stride + k * dilation == o + padding``. With ``g = gcd(stride, dilation)`` that has no
    solution unless ``g`` divides ``o + padding``. If it does, the taps are one residue class,
    ``k % k_step == (o + padding) // g * inverse % k_step``: the first lies in ``[0, k_step)``,
    and from one to the next ``k`` grows by `k_step` while ``i`` falls by `i_step`. So a kernel
    divides once for each output, and neither divides nor tests divisibility inside its loop.

    Parameters
    ----------
    size : int
        Extent of the input.
    kernel : int
        Number of taps.
    stride, padding, dilation : int
        As in ``torch.nn.functional.conv_transpose2d``.
    out_size : int
        Extent of the output (`output_padding` is in it already).
    """

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    out_size: int

    @property
    def common(self) -> int:
        """``g``, the greatest common divisor of stride and dilation."""
        return math.gcd(self.stride, self.dilation)

    @property
    def k_step(self) -> int:
        """Distance between neighbouring taps that reach one output: ``stride // g``."""
        return self.stride // self.common

    @property
    def i_step(self) -> int:
        """Distance between the inputs that those taps meet: ``dilation // g``."""
        return self.dilation // self.common

    @property
    def inverse(self) -> int:
        """The inverse of `i_step` modulo `k_step`, in ``[0, k_step)``."""
        return pow(self.i_step, -1, self.k_step)

    def taps(self, o: int) -> list[tuple[int, int]]:
        """Find the pairs (tap, input) that are summed into output `o`.

        Parameters
        ----------
        o : int
            Index of the output along this axis.

        Returns
        -------
        list of (int, int)
            ``(k, i)`` with ``0 <= k < kernel`` and ``0 <= i < size``, ``k`` ascending.
        """
        position = o + self.padding
        if position % self.common:
            return []
        k = position // self.common * self.inverse % self.k_step
        i = (position - k * self.dilation) // self.stride
        pairs = []
        while k < self.kernel and i >= 0:
            if i < self.size:
                pairs.append((k, i))
            k += self.k_step
            i -= self.i_step
        return pairs

    @property
    def multiply_adds(self) -> int:
        """Number of pairs (tap, input) that meet inside the output, not in the cropped rim."""
        pairs = 0
        for k in range(self.kernel):
            # The inputs i with 0 <= i * stride - offset < out_size.
            offset = self.padding - k * self.dilation
            first = max(0, -(-offset // self.stride))
            last = min(self.size - 1, (self.out_size - 1 + offset) // self.stride)
            pairs += max(0, last - first + 1)
        return pairs


@dataclass(frozen=True)
class Problem:
    """A two-dimensional transposed convolution, described by its shapes.

    Tensors are laid out as in PyTorch: input [N, C_in, H, W], weight
    [C_in, C_out/groups, KH, KW], bias [C_out], output [N, C_out, OH, OW] with
    ``OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1``.

    Parameters
    ----------
    batch : int
        N; 0 is legal and gives an empty output.
    in_channels, out_channels : int
        C_in and C_out, both divisible by `groups`.
    height, width : int
        H and W of the input.
    kernel_size, stride, padding, output_padding, dilation : int or pair of int
        One value for both axes, (rows, columns), or a sequence of one value. Kept as pairs.
        On each axis `output_padding` is smaller than `stride` or smaller than `dilation`.
    groups : int
        Number of groups into which input and output channels are split.
    bias : bool
        Whether there is a bias.

    Raises
    ------
    TypeError
        If an argument has a wrong type; as in PyTorch neither 2.0 nor True is an integer.
    ProblemError
        If no such convolution exists, or if it would need more than 32 bits along one axis.

    Notes
    -----
    What is legal is what ``torch.nn.functional.conv_transpose2d`` accepts in float64, for any
    type and any batch. PyTorch itself is laxer in two places: in float32 on the CPU it can
    return an empty output or take a dilation of 0, and an empty batch makes it skip the checks
    of dilation, output padding and extents.

    Examples
    --------
    >>> problem = Problem(batch=2, in_channels=4, out_channels=6, height=5, width=9,
    ...                   kernel_size=(3, 7), stride=2, padding=1, output_padding=1)
    >>> problem.stride, problem.output_shape
    ((2, 2), (2, 6, 10, 22))
    """

    batch: int = 1
    in_channels: int = 1
    out_channels: int = 1
    height: int = 1
    width: int = 1
    kernel_size: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    output_padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        """Normalise the arguments, then check each by itself and then those that must agree."""
        for name, lowest in _LOWEST_INTEGER.items():
            self._set(name, checked_integer(name, getattr(self, name), lowest))
        for name, lowest in _LOWEST_PAIR.items():
            self._set(name, _pair(name, getattr(self, name), lowest))
        if not isinstance(self.bias, bool | np.bool_):
            raise TypeError(
                f"bias={self.bias!r} must be True or False (whether there is one), "
                f"not {type(self.bias).__name__}"
            )
        self._set("bias", bool(self.bias))
        self._check_groups()
        self._check_output_padding()
        self._check_extents()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_groups(self) -> None:
        for name in ("in_channels", "out_channels"):
            channels = getattr(self, name)
            if channels % self.groups:
                raise ProblemError(f"{name}={channels} must be divisible by groups={self.groups}")

    def _check_output_padding(self) -> None:
        for name, extra, step, dilation in zip(
            ("rows", "columns"), self.output_padding, self.stride, self.dilation, strict=True
        ):
            if extra >= max(step, dilation):
                raise ProblemError(
                    f"output_padding={self.output_padding} must be smaller than stride or "
                    f"dilation: along the {name} it is {extra}, and stride is {step}, dilation "
                    f"{dilation}, so at most {max(step, dilation) - 1}"
                )

    def _check_extents(self) -> None:
        for side, name, axis, extra in zip(
            ("height", "width"), ("rows", "columns"), self.axes, self.output_padding, strict=True
        ):
            formula = (
                f"({side} - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + "
                f"output_padding + 1 = ({axis.size} - 1) * {axis.stride} - 2 * {axis.padding} + "
                f"{axis.dilation} * ({axis.kernel} - 1) + {extra} + 1 = {axis.out_size}"
            )
            if axis.out_size < 1:
                raise ProblemError(
                    f"padding={self.padding} leaves no output: its {side} would be {formula}, "
                    f"and must be at least 1; padding along the {name} can be at most "
                    f"{(axis.out_size + 2 * axis.padding - 1) // 2}"
                )
            # No index along the axis, not even that of a tap just outside the padded output,
            # exceeds this.
            span = axis.out_size + 2 * axis.padding + axis.dilation * (axis.kernel - 1)
            if span > MAX_EXTENT:
                raise ProblemError(
                    f"{side}={axis.size} is too much with stride={axis.stride}, "
                    f"padding={axis.padding}, dilation={axis.dilation} and "
                    f"kernel_size={axis.kernel} along the {name}: the output is {axis.out_size} "
                    f"long, and {span} with the padding and the kernel around it, which must be "
                    f"at most {MAX_EXTENT} to fit in 32 bits"
                )

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The two spatial axes, (rows, columns)."""
        rows, columns = (
            Axis(
                size=size,
                kernel=kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                out_size=(size - 1) * stride
                - 2 * padding
                + dilation * (kernel - 1)
                + output_padding
                + 1,
            )
            for size, kernel, stride, padding, dilation, output_padding in zip(
                (self.height, self.width),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.output_padding,
                strict=True,
            )
        )
        return rows, columns

    @property
    def out_height(self) -> int:
        """OH, the height of the output."""
        return self.axes[0].out_size

    @property
    def out_width(self) -> int:
        """OW, the width of the output."""
        return self.axes[1].out_size

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input, [N, C_in, H, W]."""
        return (self.batch, self.in_channels, self.height, self.width)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight, [C_in, C_out/groups, KH, KW]."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def bias_shape(self) -> tuple[int] | None:
        """Shape of the bias, [C_out], or None if there is none."""
        return (self.out_channels,) if self.bias else None

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, [N, C_out, OH, OW]."""
        return (self.batch, self.out_channels, self.out_height, self.out_width)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``torch.nn.functional.conv_transpose2d`` after the tensors."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
        }

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each input pixel and tap.

        It counts the products that padding crops away too and leaves the bias out: the
        convention of ``torch.utils.flop_counter``. See `multiply_adds` for the exact number.
        """
        return 2 * math.prod(self.input_shape) * math.prod(self.weight_shape[1:])

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds that reach the output: without those that padding crops away."""
        rows, columns = self.axes
        channel_pairs = self.in_channels * (self.out_channels // self.groups)
        return self.batch * channel_pairs * rows.multiply_adds * columns.multiply_adds

    @property
    def compulsory_bytes(self) -> int:
        """Bytes in float32 if input, weight and bias are read once and the output written once."""
        tensors = (self.input_shape, self.weight_shape, self.bias_shape, self.output_shape)
        return 4 * sum(math.prod(shape) for shape in tensors if shape is not None)

    def random_inputs(
        self, seed: int = 0, device: str | torch.device = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draw an input, a weight and a bias from the normal distribution.

        NumPy draws them and they are copied to the device, so they are the same everywhere. The
        weight is scaled by ``1 / sqrt(C_in/groups * KH * KW)``, which keeps outputs of the order
        of 1 whatever the shapes.

        Parameters
        ----------
        seed : int
            Seed of ``numpy.random.default_rng``.
        device : str or torch.device
            Where the tensors shall be.

        Returns
        -------
        x : torch.Tensor
            float32, [N, C_in, H, W].
        weight : torch.Tensor
            float32, [C_in, C_out/groups, KH, KW].
        bias : torch.Tensor or None
            float32, [C_out]; None if the problem has no bias.
        """
        import torch

        generator = np.random.default_rng(seed)

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            return generator.standard_normal(shape, dtype=np.float32)

        terms = self.in_channels // self.groups * math.prod(self.kernel_size)
        x = draw(self.input_shape)
        weight = draw(self.weight_shape) * np.float32(1 / math.sqrt(terms))
        bias = draw(self.bias_shape) if self.bias_shape else None
        x, weight, bias = (
            array if array is None else torch.from_numpy(array).to(device)
            for array in (x, weight, bias)
        )
        return x, weight, bias

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the problems that have one."""
        return tuple(_NAMED)

    @classmethod
    def named(cls, name: str) -> Problem:
        """Return a problem by its name.

        ``"star"`` is the problem of this lab, level 1 #65 of KernelBench in its present form;
        ``"classic"`` is the same with the sizes that it had until July 2025. The others
        are small enough for a simulator: ``"star_small"``, ``"channels_small"`` with more channels,
        and ``"strided_small"`` with a stride.

        Parameters
        ----------
        name : str
            One of `names`.

        Returns
        -------
        Problem
            The problem with that name.

        Raises
        ------
        ProblemError
            If there is no such name.
        """
        if name not in _NAMED:
            raise ProblemError(f"name={name!r} must be one of {', '.join(map(repr, _NAMED))}")
        return _NAMED[name]

    @classmethod
    def from_shapes(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
    ) -> Problem:
        """Describe the call ``conv_transpose2d(input, weight, bias, stride, ...)`` by its shapes.

        Parameters
        ----------
        input_shape : sequence of int
            Shape of the input, [N, C_in, H, W]; one image alone has N = 1.
        weight_shape : sequence of int
            Shape of the weight, [C_in, C_out/groups, KH, KW].
        bias_shape : sequence of int, optional
            Shape of the bias, [C_out].
        stride, padding, output_padding, groups, dilation
            As in ``torch.nn.functional.conv_transpose2d``, in its order.

        Returns
        -------
        Problem
            The problem that the call is.

        Raises
        ------
        TypeError, ProblemError
            As the class itself, and if ranks or channels don't agree.
        """
        input_shape = _shape("input", input_shape, ("N", "C_in", "H", "W"), (0, 1, 1, 1))
        weight_shape = _shape("weight", weight_shape, ("C_in", "C_out/groups", "KH", "KW"))
        groups = checked_integer("groups", groups, _LOWEST_INTEGER["groups"])
        batch, in_channels, height, width = input_shape
        if weight_shape[0] != in_channels:
            raise ProblemError(
                f"input has shape {list(input_shape)}, so {in_channels} channels, but weight has "
                f"shape {list(weight_shape)}, [C_in, C_out/groups, KH, KW]: input must have "
                f"{weight_shape[0]} channels"
            )
        out_channels = weight_shape[1] * groups
        if bias_shape is not None:
            bias_shape = tuple(bias_shape)
            if bias_shape != (out_channels,):
                raise ProblemError(
                    f"bias has shape {list(bias_shape)}: it must be [{out_channels}], one value "
                    f"for each of {weight_shape[1]} * {groups} output channels (weight has shape "
                    f"{list(weight_shape)}, groups={groups})"
                )
        return cls(
            batch=batch,
            in_channels=in_channels,
            out_channels=out_channels,
            height=height,
            width=width,
            kernel_size=weight_shape[2:],
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
            bias=bias_shape is not None,
        )


@dataclass(frozen=True)
class CroppedProblem(Problem):
    """A problem whose output ends elsewhere: what one rank computes of an image (`distributed`).

    No argument of PyTorch's says so, as padding crops as many rows at the start as at the end.

    Parameters
    ----------
    cropped_rows : int
        How many more rows of the output are left out at its end; negative for more rows instead.
    """

    cropped_rows: int = 0

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The two spatial axes, (rows, columns)."""
        rows, columns = Problem.axes.func(self)
        return replace(rows, out_size=rows.out_size - self.cropped_rows), columns

    @classmethod
    def of(cls, problem: Problem, cropped_rows: int) -> CroppedProblem:
        """Crop the output of `problem`."""
        values = {field.name: getattr(problem, field.name) for field in fields(Problem)}
        return cls(**values, cropped_rows=cropped_rows)

    @classmethod
    def between(cls, problem: Problem, above: int, below: int) -> CroppedProblem:
        """Leave out the output's first rows and its last ones; `problem` has no padding of rows."""
        values = {field.name: getattr(problem, field.name) for field in fields(Problem)}
        values["padding"] = (above, problem.padding[1])  # which crops as many rows at the end
        return cls(**values, cropped_rows=below - above)


_LOWEST_INTEGER = {
    "batch": 0,
    "in_channels": 1,
    "out_channels": 1,
    "height": 1,
    "width": 1,
    "groups": 1,
}
_LOWEST_PAIR = {
    "kernel_size": 1,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
}


def checked_problem(problem: object) -> Problem:
    """Return `problem` if it is one; raises TypeError if it is not."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problem={problem!r} must be a Problem, not {type(problem).__name__}")
    return problem


def checked_integer(name: str, value: object, lowest: int) -> int:
    """Check one integer argument: its type, then ``lowest <= value <= MAX_EXTENT``.

    Raises
    ------
    TypeError
        If `value` is no integer.
    ProblemError
        If it is out of this range.
    """
    number = _index(value)
    if number is None:
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
    _check_range(name, value, (number,), lowest)
    return number


def _pair(name: str, value: object, lowest: int) -> tuple[int, int]:
    """Check an argument that has a value for each axis and give it as (rows, columns)."""
    values = value if isinstance(value, tuple | list) else (value,)
    numbers = tuple(_index(v) for v in values)
    if None in numbers:
        wrong = type(values[numbers.index(None)]).__name__
        raise TypeError(
            f"{name}={value!r} must be an integer or a pair of integers (rows, columns), "
            f"not {wrong}" + (" inside it" if values is value else "")
        )
    if len(numbers) not in (1, 2):
        raise ProblemError(
            f"{name}={value!r} has {len(numbers)} values: it must be one integer or two "
            f"(rows, columns)"
        )
    _check_range(name, value, numbers, lowest)
    return numbers if len(numbers) == 2 else numbers * 2


def _index(value: object) -> int | None:
    """Return `value` as an int if it is an integer of any library, else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _check_range(name: str, value: object, numbers: Sequence[int], lowest: int) -> None:
    each = "each value" if len(numbers) > 1 else "it"
    if min(numbers) < lowest:
        raise ProblemError(f"{name}={value!r}: {each} must be at least {lowest}")
    if max(numbers) > MAX_EXTENT:
        raise ProblemError(
            f"{name}={value!r}: {each} must be at most {MAX_EXTENT}, which fits in 32 bits"
        )


def _shape(
    name: str, shape: Sequence[int], letters: Sequence[str], lowest: Sequence[int] = (1, 1, 1, 1)
) -> tuple[int, ...]:
    """Check a tensor's shape: its rank, and that no dimension is too small."""
    shape = tuple(shape)
    layout = "[" + ", ".join(letters) + "]"
    if len(shape) != len(letters):
        hint = ""
        if name == "input":
            hint = (
                "; give one image alone as [1, C_in, H, W]"
                if len(shape) == 3
                else ", or 3, [C_in, H, W], for one image alone"
            )
        raise ProblemError(
            f"{name} has shape {list(shape)}, {len(shape)} dimensions: it must have "
            f"{len(letters)}, {layout}{hint}"
        )
    for letter, size, least in zip(letters, shape, lowest, strict=True):
        if size < least:
            raise ProblemError(
                f"{name} has shape {list(shape)}, {layout}: {letter} must be at least {least}"
            )
    return shape


_NAMED = {
    "star": Problem(
        batch=8, in_channels=64, out_channels=64, height=512, width=512, kernel_size=(3, 7)
    ),
    "classic": Problem(
        batch=16, in_channels=32, out_channels=64, height=128, width=128, kernel_size=(3, 7)
    ),
    "star_small": Problem(
        batch=1, in_channels=8, out_channels=8, height=16, width=24, kernel_size=(3, 7)
    ),
    "channels_small": Problem(
        batch=1, in_channels=16, out_channels=32, height=16, width=24, kernel_size=(3, 7)
    ),
    "strided_small": Problem(
        in_channels=8,
        out_channels=8,
        height=10,
        width=14,
        kernel_size=(3, 7),
        stride=2,
        padding=1,
        output_padding=1,
    ),
}
