"""The operator for engineers: `conv_transpose2d` in PyTorch's place.

On a CUDA GPU a call runs on the kernel that `convt_lab.dispatch` chooses for it, which may be
PyTorch's own; PyTorch's own backward gives the gradients. DTensors go to `convt_lab.distributed`.
Whatever else a call may be (other devices and dtypes, other subclasses of tensors) is handed to
PyTorch, as is everything whose kernel can't be built here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch.utils._device import DeviceContext

from convt_lab.library import (
    DirectFunction,
    TransformableFunction,
    cast_for_autocast,
    has_dtensor,
    torch_operator,
)
from convt_lab.plan import DTYPES, Plan, has_kernels, plan_for
from convt_lab.problem import Problem, ProblemError
from convt_lab.stages import check_tensors, is_channels_last

__all__ = ["conv_transpose2d", "conv_transpose2d_between", "kernel_between"]

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> torch.Tensor:
    """Compute a 2-D transposed convolution, as ``torch.nn.functional.conv_transpose2d`` does.

    Parameters
    ----------
    input
        [N, C_in, H, W] or [C_in, H, W], of any dtype and on any device that PyTorch's own function
        takes. Kernels of this package serve float32, float16 and bfloat16 on CUDA GPUs. An input
        that is dense neither as [N, C, H, W] nor as [N, H, W, C] is copied first.
    weight
        [C_in, C_out/groups, KH, KW].
    bias
        [C_out], or None.
    stride, padding, output_padding, dilation
        One integer, a sequence of one, or one of two (rows, columns).
    groups
        Number of groups into which the channels are split.

    Returns
    -------
    torch.Tensor
        [N, C_out, OH, OW], or [C_out, OH, OW], with the strides that PyTorch's own output would
        have: channels last if input or weight is. Gradients of any order flow to input, weight and
        bias, in reverse and in forward mode, and under ``torch.func``'s transforms.

    Raises
    ------
    ProblemError
        If the arguments describe no legal problem (a ValueError and a RuntimeError).
    TypeError
        If an argument has a wrong type.
    KernelError
        If the GPU refuses a launch.

    Warns
    -----
    RuntimeWarning
        Once for each kernel that can't be built here, in whose place PyTorch computes.

    Notes
    -----
    A call runs on the current stream of the input's device and waits for nothing, so it may be
    captured in a CUDA graph; call it once before, because the first call may build a kernel. It
    raises a RuntimeError in a process that was forked from one that had used CUDA.

    What kernels of this package compute is deterministic; what PyTorch computes is so if
    ``torch.backends.cudnn.deterministic`` is set. float32 is computed with TF32 only if
    ``torch.backends.cudnn`` allows that for convolutions (``conv.fp32_precision``, or
    ``allow_tf32``).

    DTensors may be split by images, rows, channels or groups; `convt_lab.distributed` says how.

    ``torch.compile`` sees the operator ``torch.ops.convt_lab.conv_transpose2d``. ``torch.export``,
    ``torch.fx``, ``torch.jit.trace`` and, of the layer, ``torch.jit.script`` see PyTorch's own, so
    that what they write runs without this package.

    Examples
    --------
    >>> x, weight = torch.ones(1, 2, 3, 3), torch.ones(2, 4, 2, 2)
    >>> conv_transpose2d(x, weight, stride=2).shape
    torch.Size([1, 4, 6, 6])
    """
    arguments = (stride, padding, output_padding, groups, dilation)
    if torch.compiler.is_compiling():
        return _traced(input, weight, bias, *arguments)
    if not _may_be_ours(input, weight, bias):
        if has_dtensor(input, weight, bias):
            return _on_dtensors(input, weight, bias, *arguments)
        return _pytorchs(input, weight, bias, *arguments)
    if input.dim() == 3:
        return conv_transpose2d(input.unsqueeze(0), weight, bias, *arguments).squeeze(0)
    tensors = (input, weight, bias)
    if torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):
        tensors = [cast_for_autocast(t, input.device.type) for t in tensors]
    if _is_transformed():
        if _is_functionalized():
            return _pytorchs(input, weight, bias, *arguments)
        arguments = _as_the_schema_has(*arguments)
        if torch._C._are_functorch_transforms_active():
            return TransformableFunction.apply(*tensors, *arguments)
        return torch_operator(*tensors, *arguments)
    try:
        plan = plan_for(*tensors, *arguments)
    except (ProblemError, TypeError):
        # Nearly always PyTorch refuses it, too; it may take what is only too large for us.
        plan = None
    if plan is None or plan.is_pytorchs:
        return _pytorchs(input, weight, bias, *arguments)
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return DirectFunction.apply(*tensors, plan)
    return plan(*tensors)


def conv_transpose2d_between(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arguments: tuple,
    above: int,
    below: int,
    kernel: str | None = None,
) -> torch.Tensor:
    """Compute an output without its first and last rows, in memory of its own.

    There is no autograd and no autocast in it, nor are the tensors DTensors.

    Parameters
    ----------
    input, weight, bias
        As in `conv_transpose2d`, batched.
    arguments
        stride, padding, output_padding, groups and dilation, as pairs; padding[0] and
        output_padding[0] are 0.
    above, below
        How many rows are left out at the start and at the end, at least 0; at least one is left.
    kernel
        One of `convt_lab.stages.kernels` to compute it, if it can; None for whichever suits it.
    """
    if plan := _plan_between(input, weight, bias, arguments, (above, below), kernel):
        return plan(input, weight, bias)
    output = conv_transpose2d(input, weight, bias, *arguments)
    if not above and not below:
        return output
    order = torch.channels_last if is_channels_last(output) else torch.contiguous_format
    return output[:, :, above : output.shape[2] - below].contiguous(memory_format=order)


def kernel_between(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arguments: tuple,
    above: int,
    below: int,
) -> str | None:
    """Return which kernel of ours `conv_transpose2d_between` would choose; None for PyTorch's."""
    plan = _plan_between(input, weight, bias, arguments, (above, below))
    return plan and plan.kernel


def _plan_between(input, weight, bias, arguments, crop, kernel=None) -> Plan | None:
    if not _may_be_ours(input, weight, bias) or torch._C._len_torch_dispatch_stack() > 0:
        return None
    plan = plan_for(input, weight, bias, *arguments, crop=crop, kernel=kernel)
    return None if plan.is_pytorchs else plan


def _may_be_ours(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether these are plain tensors on a device that has kernels of ours.

    Subclasses have rules of their own, for PyTorch's operators. So have the graphs that
    ``torch.jit`` traces. Tensors that stand for their negatives or for zeros hold other values in
    memory than they mean.
    """
    return (
        _are_plain(input, weight, bias)
        and has_kernels(input)
        and _is_dense(input)
        and _is_dense(weight)
        and (bias is None or _is_dense(bias))
        and torch._C._get_tracing_state() is None
    )


def _are_plain(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        type(input) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and (bias is None or type(bias) in _PLAIN_TYPES)
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_neg() and not tensor._is_zerotensor()


def _is_transformed() -> bool:
    """Whether more than the result is asked for, so that PyTorch's dispatcher must see the call.

    That is the case under modes (such as a flop counter), ``torch.func``'s transforms and forward
    differentiation, and where a profiler shall find the call's name.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._is_torch_function_mode_enabled() and _has_mode_that_matters())
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def _has_mode_that_matters() -> bool:
    """Whether a torch function mode is on that may ask about convolutions.

    ``torch.set_default_device`` leaves one on that does not.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(type(mode) is DeviceContext for mode in modes)


def _is_functionalized() -> bool:
    """Whether ``torch.func.functionalize`` is on, which has no rule for functions of autograd."""
    kind = torch._C._functorch.TransformType.Functionalize
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == kind for interpreter in stack)


def _traced(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> torch.Tensor:
    """Call what a compiler shall see. Sizes may be symbols, so nothing asks for their values."""
    if has_dtensor(input, weight, bias):
        return _on_dtensors(input, weight, bias, stride, padding, output_padding, groups, dilation)
    # Not is_exporting(): torch 2.11's compiler takes that to be always true.
    if (
        torch.compiler._is_exporting_flag
        or not _are_plain(input, weight, bias)
        or not has_kernels(input)
        or input.dtype not in DTYPES
        or input.dim() not in (3, 4)
    ):
        return F.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    batched = input.unsqueeze(0) if input.dim() == 3 else input
    output = torch.ops.convt_lab.conv_transpose2d(
        batched,
        weight,
        bias,
        *_as_the_schema_has(stride, padding, output_padding, groups, dilation),
    )
    return output.squeeze(0) if input.dim() == 3 else output


def _on_dtensors(*arguments: Any) -> torch.Tensor:
    # What it needs of PyTorch takes longer to import than all of this package.
    from convt_lab.distributed import conv_transpose2d_dtensor

    return conv_transpose2d_dtensor(*arguments)


def _as_the_schema_has(
    stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any
) -> tuple:
    """Return the arguments of our own operator: pairs (rows, columns) of integers, and `groups`.

    Sizes may be symbols, so what has no meaning is left to the operator to refuse.
    """
    return (
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("output_padding", output_padding),
        _integer("groups", groups),
        _pair("dilation", dilation),
    )


def _pair(name: str, value: Any) -> Any:
    values = value if isinstance(value, tuple | list) else (value,)
    numbers = tuple(_integer(name, each) for each in values)
    return numbers * 2 if len(numbers) == 1 else numbers


def _integer(name: str, value: Any) -> Any:
    # The schema takes a bool for an integer, and raises a RuntimeError for what is none.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be made of integers, not {type(value).__name__}")
    return value if isinstance(value, int | torch.SymInt) else value.__index__()


# ---- PyTorch's function, and what is wrong if it refuses -----------------------------------------


def _pytorchs(*arguments: Any) -> torch.Tensor:
    try:
        output = F.conv_transpose2d(*arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        _explain(error, arguments)
    if not isinstance(output, torch.Tensor):  # a node of torch.fx
        return output
    # Where there is an error, some of PyTorch's kernels return nothing, or something of nothing.
    input, weight, bias, *_ = arguments
    if not torch.jit.is_tracing() and (output.numel() == 0) != (input.numel() == 0):
        _check(arguments)
    # A weight or bias without data is no error to PyTorch: what it returns is not computed.
    device = input.device
    if device.type != "meta" and (
        weight.device != device or (bias is not None and bias.device != device)
    ):
        _check(arguments)
    return output


def _explain(error: Exception, arguments: tuple) -> NoReturn:
    """Raise PyTorch's error, in our words first if the arguments are at fault."""
    try:
        _check(arguments)
    except (ProblemError, TypeError) as ours:
        if isinstance(ours, ProblemError) and isinstance(error, RuntimeError | ValueError):
            raise ProblemError(f"{ours} (PyTorch: {error})") from None
        if isinstance(ours, TypeError) and isinstance(error, TypeError):
            raise TypeError(f"{ours} (PyTorch: {error})") from None
    raise error


def _check(arguments: tuple) -> None:
    input, weight, bias, *rest = arguments
    check_tensors(input, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ProblemError(
                f"{name} is on {tensor.device} and input on {input.device}: all tensors must be on "
                "one device"
            )
    Problem.from_shapes(
        (1, *input.shape) if input.dim() == 3 else input.shape,
        weight.shape,
        None if bias is None else bias.shape,
        *rest,
    )
