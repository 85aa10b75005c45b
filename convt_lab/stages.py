"""The ladder: the stages in order, each one .cu file, each callable like PyTorch's function.

To add a stage, write ``kernels/NAME.cu`` with an ``extern "C"`` launcher called NAME (see
``kernels/problem.cuh`` and any other stage) and add a line to the registry below.

A kernel that is no rung serves the operator. Like the rungs that multiply on tensor cores, it may
cover a class of problems only, and more types and memory formats than float32, with a launcher for
each. A rung hands down what it does not cover; such a kernel refuses it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from convt_lab.backend import KERNEL_FOLDER, Array, Backend
from convt_lab.gpu import check_fork, has_own_instructions
from convt_lab.problem import Axis, Problem, checked_integer, checked_problem
from convt_lab.program import BackendName, Program, backend_named
from convt_lab.program import compile as compile_source
from convt_lab.simulator.planning import Launch
from convt_lab.simulator.report import Report

__all__ = [
    "Call",
    "Kernel",
    "Stage",
    "check_tensors",
    "fma_stages",
    "is_channels_last",
    "kernels",
    "stages",
]

Tensor = torch.Tensor | np.ndarray


class _ConvTransposeProblem(ctypes.Structure):
    """``ConvTransposeProblem`` of kernels/problem.cuh, field for field."""

    _fields_ = [
        (field, ctypes.c_int)
        for field in (
            *("batch", "in_channels", "out_channels", "groups"),
            *("height", "width", "out_height", "out_width"),
            *("kernel_h", "kernel_w", "stride_h", "stride_w"),
            *("padding_h", "padding_w", "dilation_h", "dilation_w"),
        )
    ]

    @classmethod
    def of(cls, problem: Problem) -> _ConvTransposeProblem:
        channels = (problem.batch, problem.in_channels, problem.out_channels, problem.groups)
        sizes = (problem.height, problem.width, problem.out_height, problem.out_width)
        pairs = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
        return cls(*channels, *sizes, *(value for pair in pairs for value in pair))


@dataclass(frozen=True)
class Kernel:
    """A CUDA kernel for transposed convolutions: a .cu file with a launcher for each type.

    Attributes
    ----------
    name
        Of the kernel, its .cu file and its launcher for contiguous float32.
    summary
        Its idea in one sentence.
    dtypes
        The types that input, weight, bias and output may have, all the same; sums are in float32.
    takes_channels_last
        Whether it has launchers for input and output in ``torch.channels_last`` too.
    covers
        Says which legal problems it is for.
    covers_last
        The same for input and output in ``torch.channels_last``, if it is not the same.
    packs_weights
        Whether its launchers need memory for a copy of the weight in an order of their own, the
        size of which ``LAUNCHER_packed_bytes`` tells; it is written in each call.
    min_capability
        The least compute capability of a GPU that has its instructions.
    architecture
        The one architecture that has its instructions, such as ``"9.0a"``, or None. Elsewhere, and
        on the simulator, the kernel is right but sums by the definition: slow, and without rounding
        float32 first.
    precision
        What float32 values are multiplied as: ``"float32"``, with its accuracy, by whatever means;
        or ``"tf32"``, rounded to 11 significant bits first. The operator takes a kernel of the
        second kind for float32 only where PyTorch may use TF32. It says nothing about other types.
    unit
        What multiplies: the FMA units, or tensor cores.
    """

    name: str
    summary: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    takes_channels_last: bool = False
    covers: Callable[[Problem], bool] = lambda problem: True
    covers_last: Callable[[Problem], bool] | None = None
    packs_weights: bool = False
    min_capability: tuple[int, int] = (0, 0)
    architecture: str | None = None
    precision: Literal["float32", "tf32"] = "float32"
    unit: Literal["FMA", "tensor core"] = "FMA"

    def supports(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> bool:
        """Return whether it computes `problem` in `dtype`, in that memory format."""
        checked_problem(problem)
        return (
            dtype in self.dtypes
            and (self.takes_channels_last or not channels_last)
            and (self.covers_last if channels_last and self.covers_last else self.covers)(problem)
        )

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether such a GPU has its instructions, and kernels are built to use them."""
        return self.min_capability <= capability and (
            self.architecture is None or has_own_instructions(capability, self.architecture)
        )

    def kernel_for(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        capability: tuple[int, int] | None = None,
    ) -> Kernel:
        """Return the kernel that computes `problem` when this one is called: itself.

        Parameters
        ----------
        problem, dtype, channels_last
            What it is called with.
        capability
            The GPU's compute capability, or None on the simulator.

        Raises
        ------
        ValueError
            If it does not cover the problem.
        """
        if not self.supports(problem, dtype, channels_last):
            raise ValueError(f"{self.name} does not cover {problem}")
        return self

    def launcher(self, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> str:
        """Return the C symbol of the launcher for `dtype` and the memory format.

        It takes (input, weight, bias, output, ConvTransposeProblem, stream), and between output and
        problem the memory for a packed weight if `packs_weights`. The weight is contiguous either
        way.
        """
        suffix = "" if dtype == torch.float32 else f"_{str(dtype).removeprefix('torch.')}"
        return f"{self.name}{suffix}{'_channels_last' if channels_last else ''}"

    @property
    def source(self) -> str:
        """The text of its .cu file."""
        return (KERNEL_FOLDER / f"{self.name}.cu").read_text()

    def program(self, backend: BackendName = "auto") -> Program:
        """Return it compiled for `backend`, and there for the current device.

        The work is done once for each architecture.
        """
        chosen = backend_named(backend)
        return _program(self, chosen, chosen.target())

    def packed_bytes(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        backend: BackendName = "auto",
    ) -> int:
        """Return how much memory its packed weight takes for `problem`; 0 if it packs none."""
        kernel = self.kernel_for(problem, dtype, channels_last)
        channels_last &= kernel.takes_channels_last
        if not kernel.packs_weights:
            return 0
        name = f"{kernel.launcher(dtype, channels_last)}_packed_bytes"
        ask = kernel.program(backend).library[name]  # an object of its own
        ask.argtypes, ask.restype = [_ConvTransposeProblem], ctypes.c_int64
        return ask(_ConvTransposeProblem.of(problem))

    def variant(self, problem: Problem) -> str:
        """Say which of the kernel's paths runs for `problem`: ``general``, or a special one's name.

        It asks the compiled kernel on the simulator, which decides as on a GPU.
        """
        kernel = self.kernel_for(problem)
        ask = getattr(kernel.program("simulator").library, f"{kernel.name}_variant", None)
        if ask is None:
            return "general"
        ask.restype = ctypes.c_char_p
        return ask(_ConvTransposeProblem.of(problem)).decode()

    def launches(
        self,
        problem: Problem,
        max_shared_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> tuple[Launch, ...]:
        """Return the launches that it would make for `problem`, in order; nothing runs.

        For an output without elements there are none.

        It asks the compiled launcher on the simulator, which decides as on a GPU whose
        blocks may have `max_shared_bytes` of shared memory (sm_90's if None).
        """
        if max_shared_bytes is not None:
            max_shared_bytes = checked_integer("max_shared_bytes", max_shared_bytes, 1)
        kernel = self.kernel_for(problem, dtype, channels_last)
        if 0 in problem.output_shape:
            return ()
        channels_last &= kernel.takes_channels_last
        # Input, weight, bias, output, packed weight: a launcher only hands them on.
        pointers = (None,) * (4 + kernel.packs_weights)
        return kernel.program("simulator").plan(
            kernel.launcher(dtype, channels_last),
            *pointers,
            _ConvTransposeProblem.of(problem),
            max_shared_bytes=max_shared_bytes,
        )

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
    ) -> Tensor:
        """Compute a transposed convolution with this kernel.

        Parameters
        ----------
        x
            Input, [N, C_in, H, W] or [C_in, H, W], float32 or another of `dtypes`. A CUDA tensor
            runs on its GPU; a CPU tensor or NumPy array runs on the simulator.
        weight
            [C_in, C_out/groups, KH, KW], of the same type, on the same device.
        bias
            [C_out], of the same type, on the same device, or None.
        stride, padding, output_padding, groups, dilation
            As for ``torch.nn.functional.conv_transpose2d``.

        Returns
        -------
        torch.Tensor or numpy.ndarray
            [N, C_out, OH, OW] (or without N), of the kind of `x`; channels last if `x` is and the
            kernel takes it so. No gradient flows through it.

        Raises
        ------
        ProblemError
            If the arguments describe no legal problem (a ValueError and a RuntimeError).
        ValueError
            If the kernel does not cover the problem.
        TypeError
            If a dtype is not one of the kernel's or an argument has a wrong type.
        """
        call = Call(self, x, weight, bias, stride, padding, output_padding, groups, dilation)
        device = call.output.device
        if call.output.numel() > 0:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                call.kernel.program("gpu" if device.type == "cuda" else "simulator").call(
                    call.launcher, *call.launcher_arguments
                )
        output = call.output.squeeze(0) if call.is_unbatched else call.output
        return output.numpy() if isinstance(x, np.ndarray) else output

    def profile(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
        *,
        blocks: Sequence[int] | None = None,
    ) -> Report:
        """Count what the kernel's warps do on a problem, on the simulator wherever `x` is.

        Parameters
        ----------
        x, weight, bias, stride, padding, output_padding, groups, dilation
            As for calling the kernel.
        blocks
            Trace (and run) these blocks only, by linear index, where all would take too long.

        Returns
        -------
        Report
        """
        arrays = (("x", x), ("weight", weight), ("bias", bias))
        tensors = [None if t is None else _as_tensor(n, t, self.dtypes).cpu() for n, t in arrays]
        call = Call(self, *tensors, stride, padding, output_padding, groups, dilation)
        if call.output.numel() == 0:
            raise ValueError("the output is empty: there is nothing to profile")
        return call.kernel.program("simulator").call(
            call.launcher, *call.launcher_arguments, trace=True, blocks=blocks
        )


@dataclass(frozen=True)
class Stage(Kernel):
    """One rung of the ladder: callable for every legal problem, and explained by a chapter.

    What its kernel is not for, it hands down the ladder: `kernel_for` says to which stage.
    """

    def kernel_for(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        capability: tuple[int, int] | None = None,
    ) -> Stage:
        """Return the stage that computes `problem` when this one is called.

        It is this one, or the nearest before it that covers the problem, has its instructions on a
        GPU of that `capability` and rounds float32 no more than this one does.

        Parameters
        ----------
        problem, dtype, channels_last
            What it is called with. A stage before it may be given a contiguous copy.
        capability
            The GPU's compute capability, or None on the simulator.

        Raises
        ------
        ValueError
            If no stage computes `dtype`.
        """
        stage: Stage | None = self
        while stage is not None:
            if (
                stage.supports(problem, dtype, channels_last and stage.takes_channels_last)
                and (capability is None or stage.runs_on(capability))
                and (dtype != torch.float32 or stage.precision in (self.precision, "float32"))
            ):
                return stage
            stage = stage.previous
        raise ValueError(f"{self.name}: no stage computes {problem} in {dtype}")

    @property
    def chapter(self) -> str:
        """The chapter that explains it, as a path within the book."""
        return f"book/{self.name}"

    @property
    def previous(self) -> Stage | None:
        """The stage before, or None for the first."""
        names = list(stages)
        index = names.index(self.name)
        return stages[names[index - 1]] if index else None


class Call:
    """The arguments of a kernel's call, checked, and the output to fill."""

    def __init__(self, kernel, x, weight, bias, stride, padding, output_padding, groups, dilation):
        arrays = {"x": x, "weight": weight, "bias": bias}
        tensors = {
            name: _as_tensor(name, array, kernel.dtypes)
            for name, array in arrays.items()
            if array is not None or name != "bias"
        }
        dtype = tensors["x"].dtype
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype} and x {dtype}; convert one")
        device = _common_device(tensors)
        self.is_unbatched = tensors["x"].dim() == 3
        if self.is_unbatched:
            tensors["x"] = tensors["x"].unsqueeze(0)
        problem = Problem.from_shapes(
            tuple(tensors["x"].shape),
            tuple(tensors["weight"].shape),
            None if bias is None else tuple(tensors["bias"].shape),
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            dilation=dilation,
        )
        channels_last = kernel.takes_channels_last and is_channels_last(tensors["x"])
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        kernel = self.kernel = kernel.kernel_for(problem, dtype, channels_last, capability)
        channels_last &= kernel.takes_channels_last
        self.launcher = kernel.launcher(dtype, channels_last)
        shape, order = problem.output_shape, torch.contiguous_format
        if channels_last:
            order = torch.channels_last
            # What a launcher is given is [N, H, W, C].
            tensors["x"] = tensors["x"].permute(0, 2, 3, 1)
        self.output = torch.empty(shape, dtype=dtype, device=device, memory_format=order)
        if device.type == "cpu":
            self.output.fill_(float("nan"))  # a pixel that the kernel forgets must not look right
        written = self.output.permute(0, 2, 3, 1) if channels_last else self.output
        packed = []
        if kernel.packs_weights and self.output.numel() > 0:
            backend = "gpu" if device.type == "cuda" else "simulator"
            size = kernel.packed_bytes(problem, dtype, channels_last, backend)
            memory = torch.empty(size, dtype=torch.uint8, device=device)
            packed = [Array.of("packed", memory, written=True)]

        def read(parameter: str, name: str) -> Array | None:
            if name not in tensors:
                return None
            return Array.of(parameter, tensors[name].contiguous(), written=False)

        self.launcher_arguments = (
            read("input", "x"),
            read("weight", "weight"),
            read("bias", "bias"),
            Array.of("output", written, written=True),
            *packed,
            _ConvTransposeProblem.of(problem),
        )


def check_tensors(input: object, weight: object, bias: object) -> None:
    """Raise a TypeError for what is no tensor; a bias may be None."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not (isinstance(tensor, torch.Tensor) or (tensor is None and name == "bias")):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__} {tensor!r:.99}")


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether `x` lies in memory as [N, H, W, C] and not as [N, C, H, W] too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _as_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if isinstance(value, np.ndarray):
        if str(value.dtype) not in types.split(" or "):
            raise TypeError(f"{name} has dtype {value.dtype}; this kernel is for {types}")
        # A copy if need be: torch takes neither negative strides nor read-only memory.
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    elif not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor or a NumPy array, not {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; this kernel is for {types}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; pass a dense tensor")
    return value.detach()


def _common_device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    device = tensors["x"].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x on {device}; move one of them")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"x is on {device}; the stages run on the CPU (simulated) or a CUDA GPU")
    if device.type == "cuda":
        check_fork()
    return device


@functools.cache
def _program(kernel: Kernel, backend: Backend, target: str) -> Program:
    return compile_source(kernel.source, backend.name, name=kernel.name)


_STORED = (torch.float32, torch.float16, torch.bfloat16)


def _fits_cells(problem: Problem) -> bool:
    """Say what ``covers`` of kernels/cells.cuh says."""

    def reach(axis: Axis) -> int:
        """Bound how many inputs in a row one cell of outputs meets."""
        return ((axis.kernel - 1) * axis.dilation + axis.stride - 1) // axis.stride + 1

    rows, columns = problem.axes
    return (
        max(rows.stride, columns.stride) <= 16
        and max(reach(rows), reach(columns)) <= 32
        and rows.kernel * -(-reach(columns) // 4) * 4 <= 256
        and rows.stride * columns.out_size * 4 < 2**31
    )


def _fits_tensor_core_split(problem: Problem) -> bool:
    """Say what ``covers`` of kernels/tensor_core_split.cu says."""
    inputs = 1
    for axis in problem.axes:
        if axis.stride * axis.i_step > 16:
            return False
        inputs *= 8 + (axis.kernel - 1) // axis.k_step + 2
    return inputs <= 560 and problem.height * problem.width < 2**31


def _fits_tensor_core_narrow(problem: Problem) -> bool:
    """Say what ``covers`` of kernels/tensor_core_narrow.cu says."""
    inputs = 1
    for axis in problem.axes:
        if axis.stride > 16:
            return False
        inputs *= 15 + ((axis.kernel - 1) * axis.dilation + axis.stride - 1) // axis.stride + 1
    return inputs <= 512 and problem.height * problem.width < 2**31


def _fits_hopper(problem: Problem, channels_last: bool = False) -> bool:
    """Say what ``covers`` of kernels/warpgroup_plan.cuh says."""
    counts, taps = [], []
    for axis in problem.axes:
        period = axis.stride * axis.i_step
        if period > 16:
            return False
        counts.append(max(1, (axis.out_size - 1) // period + 1))
        taps.append((axis.kernel - 1) // axis.k_step + 1)
    # Launches have as many images as can be counted in 32 bits: one must be.
    planes = problem.in_channels if channels_last else 16 + 8 + 1
    inputs = planes * problem.height * problem.width
    positions = 2 * (counts[0] + taps[0]) * (counts[1] + taps[1] + 2)
    return (
        min(problem.in_channels, problem.out_channels) // problem.groups >= 16
        and (taps[0] - 1) * (taps[1] + 33) + taps[1] <= 700
        and max(inputs, positions) < 2_147_000_000
    )


#: The ladder, in order.
stages: Mapping[str, Stage] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            Stage("naive_gather", "One thread for each output value, all taps tried."),
            Stage("coalesced", "Lanes run along the output's width; only the taps that count."),
            Stage("shared_tiled", "A block fetches its inputs once, into shared memory."),
            Stage("register_blocked", "Each thread keeps a block of outputs in registers."),
            Stage("winograd", "Two rows of outputs from four products in place of six."),
            Stage(
                "tensor_core",
                "Tensor cores: an FMA loop becomes an instruction that multiplies tiles.",
                dtypes=_STORED,
                precision="tf32",
                unit="tensor core",
            ),
            Stage(
                "tensor_core_split",
                "Tensor cores, with float32 as three bfloat16 parts.",
                dtypes=_STORED,
                takes_channels_last=True,
                covers=_fits_tensor_core_split,
                packs_weights=True,
                min_capability=(8, 0),
                unit="tensor core",
            ),
            Stage(
                "hopper",
                "Hopper's tensor cores, with float32 in two float16 parts.",
                takes_channels_last=True,
                covers=_fits_hopper,
                covers_last=functools.partial(_fits_hopper, channels_last=True),
                packs_weights=True,
                min_capability=(9, 0),
                architecture="9.0a",
                unit="tensor core",
            ),
        )
    }
)

#: The rungs that multiply with FMA units, in order: what simulator and GPU count alike.
fma_stages: Mapping[str, Stage] = MappingProxyType(
    {name: stage for name, stage in stages.items() if stage.unit == "FMA"}
)

#: Kernels that are no rungs, which serve the operator.
_OTHERS = (
    Kernel(
        "one_channel",
        "Each thread slides over the inputs of its outputs, which are of all phases.",
        dtypes=_STORED,
        covers=lambda problem: problem.out_channels == problem.groups and _fits_cells(problem),
    ),
    Kernel(
        "few_channels",
        "The same for up to eight channels at once, which share the inputs.",
        dtypes=_STORED,
        covers=_fits_cells,
    ),
    Kernel(
        "tensor_core_narrow",
        "Tensor cores for few output channels: pixels are the rows of its products.",
        dtypes=_STORED,
        takes_channels_last=True,
        covers=_fits_tensor_core_narrow,
        packs_weights=True,
        min_capability=(8, 0),
        unit="tensor core",
    ),
    Kernel(
        "hopper_single",
        "Hopper's tensor cores, each value multiplied once.",
        dtypes=_STORED,
        takes_channels_last=True,
        covers=_fits_hopper,
        covers_last=functools.partial(_fits_hopper, channels_last=True),
        packs_weights=True,
        min_capability=(9, 0),
        architecture="9.0a",
        precision="tf32",
        unit="tensor core",
    ),
)

#: All kernels: the ladder's, then those that are no rungs.
kernels: Mapping[str, Kernel] = MappingProxyType(
    {**stages, **{kernel.name: kernel for kernel in _OTHERS}}
)
