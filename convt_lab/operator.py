"""The operator for engineers: `conv_transpose2d` in PyTorch's place.

On a CUDA GPU, float32 problems run on the ladder's last stage; PyTorch's own backward gives the
gradients. Everything else (other devices and dtypes, autocast, tracing by ``torch.compile``) is
handed to PyTorch, as is everything when no kernel can be built here.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

from convt_lab.build import BuildError
from convt_lab.errors import CompileError
from convt_lab.problem import Problem
from convt_lab.stages import stages

__all__ = ["conv_transpose2d"]

_LAST_STAGE = next(reversed(stages.values()))


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
        [N, C_in, H, W] or [C_in, H, W].
    weight
        [C_in, C_out/groups, KH, KW].
    bias
        [C_out], or None.
    stride, padding, output_padding, groups, dilation
        As PyTorch's.

    Returns
    -------
    torch.Tensor
        [N, C_out, OH, OW], or [C_out, OH, OW]. Gradients flow to input, weight and bias.

    Raises
    ------
    ProblemError
        If the arguments describe no legal problem (a ValueError and a RuntimeError).
    """
    if not _is_ours(input, weight, bias) or not _can_build():
        return F.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    problem = Problem.from_shapes(
        (1, *input.shape) if input.dim() == 3 else tuple(input.shape),
        tuple(weight.shape),
        None if bias is None else tuple(bias.shape),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
    )
    batched = input.unsqueeze(0) if input.dim() == 3 else input
    output = _ConvTranspose2d.apply(batched, weight, bias, problem)
    return output.squeeze(0) if input.dim() == 3 else output


class _ConvTranspose2d(torch.autograd.Function):
    """Our forward, PyTorch's backward (which can be differentiated again)."""

    @staticmethod
    def forward(input, weight, bias, problem):
        return _LAST_STAGE(input, weight, bias, **problem.arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, problem = inputs
        ctx.save_for_backward(input, weight)
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.problem = problem

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        problem = ctx.problem
        gradients = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            ctx.bias_shape,
            problem.stride,
            problem.padding,
            problem.dilation,
            True,  # transposed
            problem.output_padding,
            problem.groups,
            list(ctx.needs_input_grad[:3]),
        )
        return *gradients, None


def _is_ours(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain float32 tensors on one CUDA device, computed now and as they are."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    present = [t for t in tensors if t is not None]
    if not all(isinstance(t, torch.Tensor) for t in present):
        return False  # PyTorch's own message
    return not torch.overrides.has_torch_function(present) and all(
        t.device.type == "cuda"
        and t.device == present[0].device
        and t.dtype == torch.float32
        and t.layout == torch.strided
        for t in present
    )


@functools.cache
def _can_build() -> bool:
    """Whether the kernel can be built here; if not, say so once."""
    try:
        _LAST_STAGE.program("gpu")
    except (BuildError, CompileError) as error:
        warnings.warn(
            f"convt_lab falls back to PyTorch's conv_transpose2d: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
