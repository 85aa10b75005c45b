"""The operator as PyTorch's dispatcher, compiler and autograd know it.

``torch.ops.convt_lab.conv_transpose2d`` takes batched inputs and pairs. It has kernels for CUDA
(ours, or PyTorch's where `convt_lab.dispatch` prefers it) and for all other devices (PyTorch's), a
fake kernel, and rules for autocast, autograd (forward mode, too), ``vmap`` and the flop counter.

`convt_lab.operator` has the function that people call. It takes a shorter way where nothing but
the result is asked for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from convt_lab.plan import Plan, plan_for
from convt_lab.problem import ProblemError

__all__ = [
    "DirectFunction",
    "TransformableFunction",
    "cast_for_autocast",
    "convolution_backward",
    "dtype_under_autocast",
    "has_dtensor",
    "torch_operator",
]

Tensor = torch.Tensor
Pair = tuple[int, int]

_library = torch.library.Library("convt_lab", "DEF")
_library.define(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
    "SymInt[2] padding=0, SymInt[2] output_padding=0, SymInt groups=1, SymInt[2] dilation=1) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch_operator = torch.ops.convt_lab.conv_transpose2d.default


def has_dtensor(*tensors: Any) -> bool:
    """Return whether one of these is a DTensor, without importing what defines them."""
    # Where there is a DTensor, its module has been imported; that takes most of a second.
    module = sys.modules.get("torch.distributed.tensor")
    # While another thread imports it, the module is there and the class is not.
    kind = getattr(module, "DTensor", None)
    return kind is not None and any(isinstance(t, kind) for t in tensors)


# ---- Computing ---------------------------------------------------------------------------------


def _pytorchs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    groups: int = 1,
    dilation: Pair = (1, 1),
) -> Tensor:
    return torch.ops.aten.convolution.default(
        input, weight, bias, stride, padding, dilation, True, output_padding, groups
    )


def _computed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    groups: int = 1,
    dilation: Pair = (1, 1),
) -> Tensor:
    arguments = (
        tuple(stride),
        tuple(padding),
        tuple(output_padding),
        groups,
        tuple(dilation),
    )
    try:
        plan = plan_for(input, weight, bias, *arguments)
    except ProblemError:  # PyTorch refuses it, too, or takes what is too large for us
        plan = None
    if plan is None or plan.is_pytorchs:
        return _pytorchs(input, weight, bias, *arguments)
    return plan(input, weight, bias)


_library.impl("conv_transpose2d", _computed, "CUDA")
_library.impl("conv_transpose2d", _pytorchs, "CompositeExplicitAutograd")

# PyTorch's rule for its own operator gives the shape and, on every device, the strides.
torch.library.register_fake("convt_lab::conv_transpose2d", _pytorchs, lib=_library)


# ---- Gradients ---------------------------------------------------------------------------------


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    out_channels: int | None,
    arguments: tuple,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients of input, weight and bias: PyTorch's, which can be differentiated."""
    stride, padding, output_padding, groups, dilation = arguments
    return torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None if out_channels is None else [out_channels],
        stride,
        padding,
        dilation,
        True,  # transposed
        output_padding,
        groups,
        list(needed),
    )


class DirectFunction(torch.autograd.Function):
    """Differentiates the run of a plan. It knows no transforms, and costs little for that."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        """Run the plan."""
        ctx.save_for_backward(input, weight)
        ctx.problem = plan.problem
        return plan(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        """Return the gradients of input, weight and bias."""
        input, weight = ctx.saved_tensors
        problem = ctx.problem
        gradients = convolution_backward(
            grad_output,
            input,
            weight,
            problem.out_channels if problem.bias else None,
            tuple(problem.arguments.values()),
            ctx.needs_input_grad[:3],
        )
        return *gradients, None


class TransformableFunction(torch.autograd.Function):
    """Differentiates the operator, backward and forward, under any of ``torch.func``'s transforms.

    Its arguments are the operator's.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        """Call the operator without autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            return torch_operator(input, weight, bias, *arguments)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Keep what the gradients depend on."""
        input, weight, bias, *arguments = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)
        ctx.out_channels = None if bias is None else bias.shape[0]
        ctx.arguments = tuple(arguments)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        """Return the gradients of input, weight and bias."""
        gradients = convolution_backward(
            grad_output,
            *ctx.saved_tensors,
            ctx.out_channels,
            ctx.arguments,
            ctx.needs_input_grad[:3],
        )
        return *gradients, *(None,) * len(ctx.arguments)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_: Any) -> Tensor:
        """Return the output's tangent: the operator is linear in input and weight, and in bias."""
        input, weight = ctx.saved_tensors
        terms = []
        if input_tangent is not None:
            terms.append(_apply(input_tangent, weight, None, *ctx.arguments))
        if weight_tangent is not None:
            terms.append(_apply(input, weight_tangent, None, *ctx.arguments))
        total = sum(terms[1:], terms[0]) if terms else None
        if bias_tangent is None:
            return total
        bias_tangent = bias_tangent[:, None, None]
        if total is not None:
            return total + bias_tangent
        # The bias alone has a tangent: the output's has its shape and strides all the same.
        return torch.zeros_like(_apply(input, weight, None, *ctx.arguments)) + bias_tangent

    @staticmethod
    def vmap(info, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int | None]:
        """Compute all examples by one call."""
        return _batched(_apply, info, in_dims, *inputs)


def _apply(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """Call the operator in a way that all transforms can follow."""
    if torch._C._are_functorch_transforms_active():
        return TransformableFunction.apply(input, weight, bias, *arguments)
    return torch_operator(input, weight, bias, *arguments)


def _differentiable(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    groups: int = 1,
    dilation: Pair = (1, 1),
) -> Tensor:
    arguments = (stride, padding, output_padding, groups, dilation)
    if torch._C._are_functorch_transforms_active():
        # Inside of a transform of a call of the bare operator, too late for a Function. PyTorch's
        # own operator has rules for that.
        return _pytorchs(input, weight, bias, *arguments)
    if has_dtensor(input, weight, bias):
        from convt_lab.distributed import conv_transpose2d_dtensor

        return conv_transpose2d_dtensor(input, weight, bias, *arguments)
    is_needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias)
    )
    if is_needed or torch.autograd.forward_ad._current_level >= 0:
        return TransformableFunction.apply(input, weight, bias, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch_operator(input, weight, bias, *arguments)


_library.impl("conv_transpose2d", _differentiable, "Autograd")


# ---- vmap --------------------------------------------------------------------------------------


def _batched(
    call: Callable[..., Tensor],
    info: Any,
    in_dims: tuple,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    groups: int = 1,
    dilation: Pair = (1, 1),
) -> tuple[Tensor, int]:
    """Compute B examples, whose place in each tensor `in_dims` says, by one `call`.

    With one weight for all, examples are images of a larger batch. With a weight for each, they are
    groups: [N, B * C_in, H, W] with weight [B * C_in, C_out/groups, KH, KW] and B * groups groups.
    """
    input_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    examples = info.batch_size
    if weight_dim is None:
        shared_bias = bias if bias_dim is None else None
        folded = input if input_dim is None else input.movedim(input_dim, 0).flatten(0, 1)
        output = call(
            folded, weight, shared_bias, stride, padding, output_padding, groups, dilation
        )
        if input_dim is not None:
            output = output.unflatten(0, (examples, -1))
        if bias_dim is not None:
            output = output + bias.movedim(bias_dim, 0)[:, None, :, None, None]
        return output, 0
    # [N, B, C_in, H, W], [B, C_in, C_out/groups, KH, KW] and [B, C_out]
    input = _example_at(input, input_dim, 1, examples)
    weight = weight.movedim(weight_dim, 0)
    bias = None if bias is None else _example_at(bias, bias_dim, 0, examples).flatten()
    output = call(
        input.flatten(1, 2),
        weight.flatten(0, 1),
        bias,
        stride,
        padding,
        output_padding,
        groups * examples,
        dilation,
    )
    return output.unflatten(1, (examples, -1)), 1


def _example_at(tensor: Tensor, dim: int | None, wanted: int, examples: int) -> Tensor:
    """Bring the examples to axis `wanted`, repeating a tensor that all share."""
    if dim is not None:
        return tensor.movedim(dim, wanted)
    tensor = tensor.unsqueeze(wanted)
    return tensor.expand(*tensor.shape[:wanted], examples, *tensor.shape[wanted + 1 :])


torch.library.register_vmap(
    "convt_lab::conv_transpose2d", functools.partial(_batched, torch_operator), lib=_library
)


# ---- Autocast ----------------------------------------------------------------------------------


def cast_for_autocast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    """Cast as autocast does for PyTorch's convolutions; float64 and integers stay."""
    return None if tensor is None else tensor.to(dtype_under_autocast(tensor, device_type))


def dtype_under_autocast(tensor: Tensor, device_type: str) -> torch.dtype:
    """Return the dtype to which `cast_for_autocast` casts."""
    is_cast = (
        tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and tensor.device.type == device_type
    )
    return torch.get_autocast_dtype(device_type) if is_cast else tensor.dtype


def _autocast(device_type: str, key: torch._C.DispatchKey):
    excluded = torch._C.DispatchKeySet(key)

    def cast(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
        tensors = [cast_for_autocast(t, device_type) for t in (input, weight, bias)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch_operator(*tensors, *rest)

    return cast


for _device_type in ("CPU", "CUDA"):
    _key = f"Autocast{_device_type}"
    _library.impl(
        "conv_transpose2d",
        _autocast(_device_type.lower(), getattr(torch._C.DispatchKey, _key)),
        _key,
    )


# ---- Flops -------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.convt_lab.conv_transpose2d)
def _flops(input_shape, weight_shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape), transposed=True)
