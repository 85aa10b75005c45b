"""What the operator does with a call, decided once for each kind of call.

A `Plan` says which kernel computes a call, or that PyTorch does. `plan_for` looks it up by
everything that it depends on: shapes, strides, dtypes and devices of the tensors, the arguments,
and PyTorch's settings. So a network's layer is checked, dispatched and built once, and from then
on costs a look-up.
"""

from __future__ import annotations

import marshal
import os
import warnings

import torch

from convt_lab import dispatch
from convt_lab.build import BuildError
from convt_lab.errors import CompileError
from convt_lab.gpu import check_fork
from convt_lab.launcher import Launcher
from convt_lab.problem import CroppedProblem, Problem
from convt_lab.stages import kernels

__all__ = ["DTYPES", "Plan", "allows_tf32", "has_kernels", "plan_for", "spelling_of"]

#: Dtypes that kernels of ours may have.
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

#: How many plans are kept. Where shapes change from call to call, old ones are of no use.
MAX_PLANS = 4096

_plans: dict[tuple, Plan] = {}

#: Names of kernels that could not be built here: PyTorch computes in their place.
unbuildable: set[str] = set()

if hasattr(os, "register_at_fork"):
    # A fork makes plans of its own, where it is told that no GPU works in it.
    os.register_at_fork(after_in_child=lambda: _plans.clear())


class Plan:
    """How one kind of call is computed.

    Attributes
    ----------
    problem : Problem
        The call's shapes and arguments.
    kernel : str
        A key of `convt_lab.stages.kernels`, or ``"pytorch"``.
    lasts : bool
        Whether the next call of the kind is computed so, too (see `dispatch.Choice`).
    """

    __slots__ = (
        "_copied_bias",
        "_copied_weight",
        "_device",
        "_dtype",
        "_input_format",
        "_launcher",
        "_shape",
        "_strides",
        "kernel",
        "lasts",
        "problem",
    )

    def __init__(self, problem: Problem, kernel: str = "pytorch", lasts: bool = True):
        self.problem = problem
        self.kernel = kernel
        self.lasts = lasts

    @property
    def is_pytorchs(self) -> bool:
        """Whether PyTorch computes it."""
        return self.kernel == "pytorch"

    def __call__(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the call with a kernel of ours (there must be one), on the current stream.

        The output is all that is allocated, but for a copy of an input that is not dense in the
        output's memory format, of a weight or bias that is not contiguous, and of a weight that the
        kernel packs.
        """
        if self._input_format is not None:
            input = input.contiguous(memory_format=self._input_format)
        if self._copied_weight:
            weight = weight.contiguous()
        if self._copied_bias:
            bias = bias.contiguous()
        output = torch.empty_strided(
            self._shape, self._strides, dtype=self._dtype, device=self._device
        )
        self._launcher(input, weight, bias, output)
        return output

    @classmethod
    def make(
        cls,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        arguments: tuple,
        tf32: bool,
        crop: tuple[int, int] = (0, 0),
        kernel: str | None = None,
    ) -> Plan:
        """Check the call, choose a kernel for it and build that.

        Raises
        ------
        TypeError, ProblemError
            If the arguments describe no legal problem.
        RuntimeError
            In a process that was forked from one that had used CUDA.
        """
        if has_kernels(input):
            check_fork()
        problem = Problem.from_shapes(
            input.shape, weight.shape, None if bias is None else bias.shape, *arguments
        )
        if crop != (0, 0):
            problem = CroppedProblem.between(problem, *crop)
        if not _is_computable(input, weight, bias) or 0 in problem.output_shape:
            return cls(problem)
        dtype, device = input.dtype, input.device
        memory_format = _output_format(input, weight, bias, problem)
        channels_last = memory_format == torch.channels_last
        lasts = True
        if kernel is None or not kernels[kernel].supports(problem, dtype, channels_last):
            choice = dispatch.choose(problem, dtype, device, channels_last=channels_last, tf32=tf32)
            kernel, lasts = choice.kernel, choice.lasts
        if kernel == "pytorch" or not kernels[kernel].supports(problem, dtype, channels_last):
            return cls(problem, lasts=lasts)
        launcher = _launcher(kernel, problem, dtype, channels_last, device)
        if launcher is None:
            return cls(problem, lasts=lasts)
        plan = cls(problem, kernel, lasts)
        plan._launcher = launcher
        plan._dtype, plan._device = dtype, device
        plan._shape = problem.output_shape
        plan._strides = torch.empty(
            plan._shape, device="meta", memory_format=memory_format
        ).stride()
        is_dense = input.is_contiguous(memory_format=memory_format)
        plan._input_format = None if is_dense else memory_format
        plan._copied_weight = not weight.is_contiguous()
        plan._copied_bias = bias is not None and not bias.is_contiguous()
        return plan


def has_kernels(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is on a device for which there are kernels of ours."""
    return tensor.is_cuda


def allows_tf32() -> bool:
    """Return whether PyTorch may compute float32 convolutions with TF32 on a GPU.

    This is the setting that cuDNN's convolutions follow. ``torch.backends.cudnn.allow_tf32`` sets
    it, too; to read that one raises an error where the newer settings have been used.
    """
    # What torch.backends.cudnn.conv.fp32_precision returns, in a tenth of the time.
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


def plan_for(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    output_padding: int | tuple[int, ...],
    groups: int,
    dilation: int | tuple[int, ...],
    crop: tuple[int, int] = (0, 0),
    kernel: str | None = None,
) -> Plan:
    """Return the plan for a call with a batched input, all tensors of which are dense.

    With `crop`, the plan's output lacks so many of its first and of its last rows
    (`CroppedProblem`), and the call has no padding of rows; if the plan is PyTorch's, who has no
    argument for that, whoever asks must crop. `kernel` is one that is known to suit such calls:
    where it covers this one, nothing else is asked.

    Raises
    ------
    TypeError, ProblemError
        If the arguments describe no legal problem.
    """
    arguments = (stride, padding, output_padding, groups, dilation)
    tf32 = input.dtype is torch.float32 and allows_tf32()
    key = (
        spelling_of(arguments),
        input.shape,
        input.stride(),
        input.dtype,
        input.device,
        weight.shape,
        weight.stride(),
        weight.dtype,
        weight.device,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
        tf32,
        crop,
        kernel,
        dispatch.settings(),
        dispatch.generation,
    )
    plan = _plans.get(key)
    if plan is None:
        plan = Plan.make(input, weight, bias, arguments, tf32, crop, kernel)
        if plan.lasts:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def spelling_of(arguments: tuple) -> bytes | str:
    """Return a key for arguments: of a dict's own, 2, 2.0 and (for 1) True would be the same."""
    try:
        return marshal.dumps(arguments, 2)
    except ValueError:  # integers of another kind, such as NumPy's
        return repr(arguments)


def _is_computable(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the tensors fit together and are of a kind that a kernel may have."""
    return (
        input.dtype in DTYPES
        and has_kernels(input)
        and all(
            t is None or (t.dtype == input.dtype and t.device == input.device)
            for t in (weight, bias)
        )
    )


def _output_format(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: Problem
) -> torch.memory_format:
    """Return the memory format that PyTorch's own output would have.

    It depends on which library PyTorch would call. These are the functions that PyTorch asks when
    it traces a convolution, so what is compiled and what is computed agree.
    """
    library = torch._C._select_conv_backend(
        input,
        weight,
        bias=bias,
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        transposed=True,
        output_padding=problem.output_padding,
        groups=problem.groups,
    )
    return torch._C._conv_determine_backend_memory_format(input, weight, library)


def _launcher(
    name: str, problem: Problem, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Launcher | None:
    """Make a launcher; None, with one warning for each kernel, if it can't be built here."""
    if name in unbuildable:
        return None
    try:
        return Launcher(kernels[name], problem, dtype, channels_last, device)
    except (BuildError, CompileError) as error:
        unbuildable.add(name)
        warnings.warn(
            f"convt_lab falls back to PyTorch's conv_transpose2d where it would run {name!r}: "
            f"{error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
