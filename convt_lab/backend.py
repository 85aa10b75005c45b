"""What the two back ends have in common: turn CUDA C++ into a library, and lend it arrays.

This module knows neither back end; `convt_lab.gpu` and `convt_lab.simulator` implement it.
"""

from __future__ import annotations

import ctypes
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convt_lab.errors import CompileError, KernelError

__all__ = [
    "KERNEL_FOLDER",
    "LAUNCHERS_NAME",
    "SOURCE_NAME",
    "Array",
    "Backend",
    "compile_error",
    "error_string",
    "kernel_headers",
    "launchers_line",
    "undefined_error",
]

#: The stages' .cu files, and the headers that they share.
KERNEL_FOLDER = Path(__file__).parent / "kernels"

#: What compilers call the user's text in their messages.
SOURCE_NAME = "kernel.cu"

#: What they call the lines that are appended to it.
LAUNCHERS_NAME = "launchers"

_FIRST_ERROR = re.compile(rf"{re.escape(SOURCE_NAME)}[:(](\d+)[):].*?error")
# What a message shows of a compiler's output begins with the first line that one of these is in.
_RELEVANT = (_FIRST_ERROR, re.compile("error"))
_LAUNCHERS_LINE = re.compile(  # in nvcc's words, too
    rf"\b{LAUNCHERS_NAME}[:(](?P<a>\d+)|at line (?P<b>\d+) of {LAUNCHERS_NAME}"
)
_CONTEXT = re.compile(r": (In|At) .*:$")  # g++'s line above an error: in which function it is
_MOST_LINES = 12

# The linker's, the loader's and ptxas's words for a function without a body.
_UNDEFINED = (
    # ld gives the text's lines, but at times with the name of the file that holds it.
    re.compile(
        rf"(?:(?:{re.escape(SOURCE_NAME)}|\w+\.cpp):(?P<line>\d+): )?"
        r"undefined reference to `(?P<n>.+)'"
    ),
    re.compile(r"undefined symbol: (?P<n>_Z(?!N?(?:3c10|2at|5torch|St|K?S))\w+)"),
    re.compile(r"Unresolved extern (?:function|variable) '(?P<n>\w+)'"),
)


def kernel_headers() -> list[Path]:
    """Return the files that every kernel may include: a part of every build's key.

    A stage includes the one before it for what it leaves to it.
    """
    return sorted([*KERNEL_FOLDER.glob("*.cuh"), *KERNEL_FOLDER.glob("*.cu")])


def compile_error(compiler: str, output: str) -> CompileError:
    """Make the error for a compiler's refusal, with the first line that it points at."""
    match = _FIRST_ERROR.search(output)
    return CompileError(
        f"{compiler} refused the kernel:\n{_shortened(output)}", int(match[1]) if match else None
    )


def _shortened(output: str) -> str:
    """Return the lines of a compiler's output that matter most: one slip can make hundreds."""
    lines = output.strip().splitlines()
    if len(lines) <= _MOST_LINES:
        return output
    start = 0
    for pattern in _RELEVANT:
        found = next((i for i, line in enumerate(lines) if pattern.search(line)), None)
        if found is not None:
            start = found - 1 if found and _CONTEXT.search(lines[found - 1]) else found
            break
    shown = lines[start : start + _MOST_LINES]
    return "\n".join([*shown, f"({len(lines) - len(shown)} more lines are left out)"])


def launchers_line(output: str) -> int | None:
    """Return which of the appended lines a compiler's output points at first, if it does."""
    match = _LAUNCHERS_LINE.search(output)
    return int(match["a"] or match["b"]) if match else None


def undefined_error(output: str) -> CompileError | None:
    """Make the error for a function without a body, if that is what a tool complains of."""
    for pattern in _UNDEFINED:
        if match := pattern.search(output):
            line = match.groupdict().get("line")
            return CompileError(
                f"{_demangled(match['n'])} is declared, but nowhere defined: give it a body in "
                "this text, with these types of parameters",
                int(line) if line else None,
            )
    return None


def _demangled(symbol: str) -> str:
    """Return a symbol's name as it is in the source, or the symbol if nothing here can tell."""
    try:
        demangle = getattr(ctypes.CDLL("libstdc++.so.6"), "__cxa_demangle")
    except (OSError, AttributeError):
        return symbol
    demangle.restype = ctypes.c_char_p
    name = demangle(symbol.encode(), None, None, None)
    return name.decode() if name else symbol


def error_string(library: ctypes.CDLL, code: int) -> str:
    """Return CUDA's words for an error code, as a library that was built here has them."""
    library.convt_lab_error_string.restype = ctypes.c_char_p
    return library.convt_lab_error_string(code).decode()


@dataclass(frozen=True)
class Array:
    """A caller's array or tensor, as a launch sees it.

    Attributes
    ----------
    name
        The parameter it is passed for.
    owner
        The NumPy array or tensor itself, kept alive.
    address, nbytes
        Where its bytes are.
    code
        Its dtype in NumPy's letters, such as ``f4``; ``bf2`` for bfloat16.
    written
        Whether the kernel may write it.
    device
        ``cpu``, or the CUDA device.
    """

    name: str
    owner: np.ndarray | torch.Tensor
    address: int
    nbytes: int
    code: str
    written: bool
    device: torch.device

    @classmethod
    def of(cls, name: str, value: np.ndarray | torch.Tensor, *, written: bool) -> Array:
        """Describe `value`; it must be contiguous, because a kernel sees plain memory."""
        if isinstance(value, torch.Tensor):
            if not value.is_contiguous():
                raise ValueError(
                    f"argument {name!r} is a non-contiguous tensor with strides {value.stride()}; "
                    "pass value.contiguous()"
                )
            if value.layout != torch.strided:
                raise TypeError(f"argument {name!r} has layout {value.layout}; pass a dense tensor")
            code = _torch_code(value.dtype)
            nbytes = value.numel() * value.element_size()
            return cls(name, value, value.data_ptr(), nbytes, code, written, value.device)
        if not value.flags.c_contiguous:
            raise ValueError(
                f"argument {name!r} is a non-contiguous array with strides {value.strides}; "
                "pass numpy.ascontiguousarray(value)"
            )
        if value.dtype.hasobject or value.dtype.names:
            raise TypeError(f"argument {name!r} has dtype {value.dtype}; pass an array of numbers")
        if not value.dtype.isnative:
            raise TypeError(f"argument {name!r} has dtype {value.dtype}; pass native byte order")
        code = f"{value.dtype.kind}{value.dtype.itemsize}"
        cpu = torch.device("cpu")
        if written and not value.flags.writeable:
            raise ValueError(
                f"argument {name!r} is written by the kernel (its pointer is not const), "
                "and the array passed is read-only"
            )
        return cls(name, value, value.ctypes.data, value.nbytes, code, written, cpu)


def _torch_code(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "b1"
    if dtype is torch.bfloat16:
        return "bf2"
    kind = "c" if dtype.is_complex else "f" if dtype.is_floating_point else "i"
    if kind == "i" and not dtype.is_signed:
        kind = "u"
    return f"{kind}{dtype.itemsize}"


class Backend(ABC):
    """Builds CUDA C++ and runs it somewhere."""

    name: str

    def target(self) -> str:
        """Say what `build` builds for now: a library is of use where this is the same."""
        return ""

    @abstractmethod
    def build(self, name: str, source: str, *, traced: bool = False) -> ctypes.CDLL:
        """Compile `source` (or find it compiled) and load it; `traced`: instrumented, if it can be.

        Raises
        ------
        CompileError
            If the compiler refuses the source.
        BuildError
            If the tools or the cache folder are not in order.
        """

    @abstractmethod
    @contextmanager
    def lend(self, arrays: Sequence[Array | None]) -> Iterator[list[int]]:
        """Give every array an address that a kernel may use (None: a null pointer).

        What the kernel wrote is in the caller's arrays when the context ends without an error.
        """

    @abstractmethod
    def stream(self) -> int | None:
        """Return the stream to launch on, as a pointer."""

    @abstractmethod
    def synchronize(self, library: ctypes.CDLL, kernel: str) -> None:
        """Wait for the launches so far; raise `KernelError` if one of them failed."""

    @abstractmethod
    def error(self, library: ctypes.CDLL, code: int, kernel: str) -> KernelError:
        """Make the exception for a launch that returned `code`."""

    @abstractmethod
    def max_shared_bytes(self) -> int:
        """Return the largest dynamic shared memory of one block, in bytes."""
