"""Wrong on purpose: the host's side of first_draft.cu, for the chapter that takes both apart."""

import ctypes

import torch

from convt_lab.backend import Array

program = None  # first_draft.cu, compiled; whoever loads this file sets it


def data_ptr(name, tensor):
    """Hand a kernel the address of a tensor's first value, and nothing else."""
    nbytes = tensor.numel() * tensor.element_size()
    return Array(name, tensor, tensor.data_ptr(), nbytes, "f4", True, tensor.device)


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def conv_transpose2d(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    """Take the place of torch.nn.functional.conv_transpose2d."""
    stride, padding, output_padding, dilation = map(
        pair, (stride, padding, output_padding, dilation)
    )
    batch, in_channels, *size = x.shape
    out_channels, _, *kernel = weight.shape
    out_size = [
        (i - 1) * s - 2 * p + d * (k - 1) + q + 1
        for i, s, p, d, k, q in zip(
            size, stride, padding, dilation, kernel, output_padding, strict=True
        )
    ]
    output = torch.full((batch, out_channels, *out_size), float("nan"))
    numbers = (batch, in_channels, out_channels, *size, *out_size, *kernel, *stride)
    numbers += (*padding, *output_padding, groups, *dilation)
    tensors = {"input": x, "weight": weight, "bias": bias, "output": output}
    pointers = [None if t is None else data_ptr(name, t) for name, t in tensors.items()]
    program.call("first_draft", *pointers, *map(ctypes.c_int, numbers))
    return output


class ConvTranspose2d(torch.nn.Module):
    """Take the place of torch.nn.ConvTranspose2d."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
    ):
        super().__init__()
        self.bias = bias  # whether there is one
        self.options = (stride, padding, output_padding, groups, dilation)
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels, *pair(kernel_size)))
        torch.nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        bias = self.bias if self.bias is not False else None
        return conv_transpose2d(x, self.weight, bias, *self.options)
