"""Starting a kernel with little work on the CPU, for a problem that has been checked already.

`Kernel.__call__` is for learners: it takes whatever it is given and checks it every time. A
`Launcher` is for the operator: everything that depends on the problem alone is done once, when it
is made, and a call only passes four addresses on.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Literal

import torch

from convt_lab.problem import Problem
from convt_lab.program import backend_named
from convt_lab.stages import Kernel, _ConvTransposeProblem

__all__ = ["Launcher"]


def _stream_of(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


#: The current stream of a device, as an integer. What torch's own compiled code calls takes a
#: tenth of the time of making a Stream object; it is not public, so it may go.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)


class Launcher:
    """One kernel, built and bound to one problem.

    Parameters
    ----------
    kernel : Kernel
        The kernel.
    problem : Problem
        What it shall compute; it must have at least one output.
    dtype : torch.dtype
        Of the four tensors.
    channels_last : bool
        Whether input and output lie in memory as [N, H, W, C]; the weight is always contiguous.
    device : torch.device
        Where the tensors are. On the CPU the kernel runs on the simulator, without its guards: it
        is there so that this code can be tested without a GPU.

    Raises
    ------
    BuildError, CompileError
        If the kernel can't be built here.
    """

    __slots__ = (
        "_backend",
        "_device",
        "_function",
        "_index",
        "_library",
        "_name",
        "_packed_bytes",
        "_problem",
    )

    def __init__(
        self,
        kernel: Kernel,
        problem: Problem,
        dtype: torch.dtype,
        channels_last: bool,
        device: torch.device,
    ):
        self._index = device.index if device.type == "cuda" else None
        self._backend: Literal["gpu", "simulator"] = "gpu" if device.type == "cuda" else "simulator"
        # A program is built for the current device.
        with nullcontext() if self._index is None else torch.cuda.device(self._index):
            self._library = kernel.program(self._backend).library
            self._packed_bytes = kernel.packed_bytes(problem, dtype, channels_last, self._backend)
        self._name = kernel.launcher(dtype, channels_last)
        # An object of its own: the types are set for this use alone.
        self._function = self._library[self._name]
        self._function.argtypes = [
            *(ctypes.c_void_p,) * (4 + kernel.packs_weights),
            _ConvTransposeProblem,
            ctypes.c_void_p,
        ]
        self._function.restype = ctypes.c_int
        self._problem = _ConvTransposeProblem.of(problem)
        self._device = device

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Start the kernel on the current stream of the tensors' device, without waiting for it.

        Parameters
        ----------
        input, weight, bias, output
            Of the problem's shapes, dense, in the memory format and on the device that the launcher
            was made for. Nothing of that is checked.

        Raises
        ------
        KernelError
            If the launch is refused.
        """
        index = self._index
        if index is None or index == torch.cuda.current_device():
            self._start(input, weight, bias, output)
        else:
            with torch.cuda.device(index):
                self._start(input, weight, bias, output)

    def _start(self, input, weight, bias, output) -> None:
        pointers = (
            input.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
        )
        if self._packed_bytes:
            # Of the current stream: whoever gets the memory next waits for the kernel.
            packed = torch.empty(self._packed_bytes, dtype=torch.uint8, device=self._device)
            pointers = (*pointers, packed.data_ptr())
        code = self._function(
            *pointers,
            self._problem,
            None if self._index is None else _current_stream(self._index),
        )
        if code:
            raise backend_named(self._backend).error(self._library, code, self._name)
