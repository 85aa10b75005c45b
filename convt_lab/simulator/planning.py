"""What a launcher would launch: its kernels, grids, blocks and shared memory, with nothing run."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from convt_lab.simulator import binutils

__all__ = ["Launch", "plan", "readable_name"]


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, as its launcher asks for it.

    Attributes
    ----------
    symbol
        The kernel's mangled name, the same for g++ and nvcc.
    grid
        Blocks along x, y and z.
    block
        Threads of a block along x, y and z.
    shared_bytes
        Dynamic shared memory of a block, in bytes.
    stream
        The handle of the stream that it would go to; 0 is the default stream.
    """

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return math.prod(self.block)


class _Planned(ctypes.Structure):
    """``CudasimPlanned`` of runtime.h."""

    _fields_ = [
        ("kernel", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    ]


def readable_name(symbol: str) -> str:
    """Return the name in the source of the kernel `symbol`: template arguments, no parameters.

    ``_Z4fillILi1EEvPf`` is ``fill<1>``.
    """
    return binutils.ask("c++filt", "--no-params", symbol).strip().removeprefix("void ")


@contextmanager
def plan(
    runtime: ctypes.CDLL, library: ctypes.CDLL, max_shared_bytes: int | None
) -> Iterator[list[Launch]]:
    """Note the launches in this context and run none of them; the list is filled at its end."""
    launches: list[Launch] = []
    runtime.cudasim_plan_begin(ctypes.c_size_t(max_shared_bytes or 0))
    try:
        yield launches
        start = ctypes.POINTER(_Planned)()
        count = runtime.cudasim_planned(ctypes.byref(start))
        # Copies: what the pointer leads to goes with the plan.
        noted = [
            (item.kernel, tuple(item.grid), tuple(item.block), item.shared_bytes, item.stream)
            for item in start[:count]
        ]
    finally:
        runtime.cudasim_plan_end()
    symbols = _functions(library, [item[0] for item in noted])
    launches += [Launch(symbols[kernel], *rest) for kernel, *rest in noted]


def _functions(library: ctypes.CDLL, addresses: list[int]) -> dict[int, str]:
    """Return the mangled names of the functions at `addresses` in `library`."""
    if not addresses:
        return {}
    distinct = sorted(set(addresses))
    output = binutils.ask("addr2line", "-f", "-e", library._name, *map(hex, distinct))
    return dict(zip(distinct, output.splitlines()[::2], strict=True))  # name, then file and line
