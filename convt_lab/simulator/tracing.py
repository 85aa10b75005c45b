"""Collects what tracer.h has counted, and puts it in terms of the kernel's source."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from convt_lab.backend import SOURCE_NAME, Array
from convt_lab.simulator import binutils
from convt_lab.simulator.report import BufferUse, Hazard, Report, Request, Site, totals_of
from convt_lab.simulator.translate import mask_comments_and_strings

__all__ = ["declare", "step_limit", "trace"]

#: Iterations of loops that all threads of a traced launch may take together: some minutes' worth.
MAX_STEPS = 4_000_000_000

_step_limit: ContextVar[int | None] = ContextVar("step_limit", default=None)


@contextmanager
def step_limit(steps: int) -> Iterator[None]:
    """Let the launches that are traced in this context take `steps` iterations of loops at most."""
    token = _step_limit.set(steps)
    try:
        yield
    finally:
        _step_limit.reset(token)


_GLOBAL, _STATIC_SHARED, _DYNAMIC_SHARED = range(3)
_OPERATIONS = ("", "load", "store", "atomic")
_KINDS = (
    *("race", "divergent_barrier", "out_of_bounds"),
    *("uninitialised_read", "write_conflict", "misaligned"),
)


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("space", ctypes.c_int),
        ("start", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("starts_unwritten", ctypes.c_uint32),
    ]


class _Trace(ctypes.Structure):
    _fields_ = [
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_size_t),
        ("blocks", ctypes.POINTER(ctypes.c_uint64)),
        ("block_count", ctypes.c_size_t),
        ("max_steps", ctypes.c_uint64),
    ]


class _Site(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint64),
        ("op", ctypes.c_int),
        ("buffer", ctypes.c_int),
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("requests", "active_lanes", "transactions"),
                *("bytes_requested", "bytes_moved", "ideal"),
            )
        ),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint64),
        ("op", ctypes.c_int),
        ("buffer", ctypes.c_int),
        ("bytes", ctypes.c_uint32),
        ("mask", ctypes.c_uint32),
        ("transactions", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64 * 32),
    ]


class _Index(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class _Hazard(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("buffer", ctypes.c_int),
        ("pc", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("count", ctypes.c_uint64),
        ("block", _Index),
        ("thread", _Index),
        ("other_block", _Index),
        ("other_thread", _Index),
    ]


def declare(runtime: ctypes.CDLL) -> None:
    """Tell ctypes the tracing functions' types (runtime.h)."""
    u64, size = ctypes.c_uint64, ctypes.c_size_t
    runtime.cudasim_trace_begin.argtypes = [ctypes.POINTER(_Trace)]
    runtime.cudasim_trace_fma.restype = u64
    runtime.cudasim_trace_tensor_fma.restype = u64
    runtime.cudasim_trace_steps.restype = u64
    runtime.cudasim_trace_blocks.restype = u64
    runtime.cudasim_trace_blocks.argtypes = [ctypes.POINTER(u64)]
    runtime.cudasim_trace_footprint.restype = u64
    runtime.cudasim_trace_footprint.argtypes = [size]
    for name, structure in (("sites", _Site), ("requests", _Request), ("hazards", _Hazard)):
        function = getattr(runtime, f"cudasim_trace_{name}")
        function.restype = size
        function.argtypes = [ctypes.POINTER(ctypes.POINTER(structure))]
    runtime.cudasim_trace_loads.restype = size
    runtime.cudasim_trace_loads.argtypes = [size, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint32))]


@contextmanager
def trace(
    runtime: ctypes.CDLL,
    library: ctypes.CDLL,
    source: str,
    arrays: Sequence[Array | None],
    addresses: Sequence[int],
    blocks: Sequence[int] | None,
) -> Iterator[Callable[[], Report]]:
    """Trace the launches in this context; yields a function that reports the counts so far."""
    path = Path(library._name)
    names, table = [], []
    for array, address in zip(arrays, addresses, strict=True):
        if array is not None and array.nbytes:
            names.append(array.name)
            granule = int(array.code[-1]) if array.code[-1].isdigit() else 1
            table.append(_Buffer(_GLOBAL, address, array.nbytes, granule, array.written))
    for name, start, nbytes in _static_shared_arrays(path):
        names.append(name)
        table.append(_Buffer(_STATIC_SHARED, start, nbytes, 4, 0))
    names.append(_dynamic_shared_name(source))
    table.append(_Buffer(_DYNAMIC_SHARED, 0, 0, 4, 0))

    chosen = sorted(set(blocks or ()))
    setup = _Trace(
        (_Buffer * len(table))(*table),
        len(table),
        (ctypes.c_uint64 * len(chosen))(*chosen),
        len(chosen),
        MAX_STEPS if _step_limit.get() is None else _step_limit.get(),
    )
    runtime.cudasim_trace_begin(setup)
    try:
        yield lambda: _report(runtime, path, source, names, table)
    finally:
        runtime.cudasim_trace_end()


def _report(
    runtime: ctypes.CDLL, path: Path, source: str, names: list[str], table: list[_Buffer]
) -> Report:
    sites = _array(runtime.cudasim_trace_sites, _Site)
    hazards = _array(runtime.cudasim_trace_hazards, _Hazard)
    requests = _array(runtime.cudasim_trace_requests, _Request)
    lines = _lines(path, tuple(sorted({item.pc for item in (*sites, *hazards)})))

    def place(item: Any) -> tuple[int, str, str, str]:
        space = "global" if table[item.buffer].space == _GLOBAL else "shared"
        return lines[item.pc], space, _OPERATIONS[item.op], names[item.buffer]

    of_place: dict[tuple, list[_Site]] = {}
    for site in sites:
        of_place.setdefault(place(site), []).append(site)
    costliest: dict[tuple, _Request] = {}
    for request in requests:
        best = costliest.get(place(request))
        # A line may load in pieces of several sizes: of equals the one that moves most.
        key = request.transactions, request.bytes
        if best is None or key > (best.transactions, best.bytes):
            costliest[place(request)] = request

    grid_blocks = ctypes.c_uint64()
    counted = tuple(_site(where, those) for where, those in sorted(of_place.items()))
    return Report(
        sites=counted,
        totals=MappingProxyType(totals_of(counted)),
        fma=runtime.cudasim_trace_fma(),
        tensor_fma=runtime.cudasim_trace_tensor_fma(),
        steps=runtime.cudasim_trace_steps(),
        hazards=_merge(_hazard(hazard, lines, names) for hazard in hazards),
        buffers=MappingProxyType(
            {
                names[i]: _use(runtime, i, names[i], buffer)
                for i, buffer in enumerate(table)
                if buffer.space == _GLOBAL
            }
        ),
        requests=tuple(_request(*item) for item in sorted(costliest.items(), key=lambda i: i[0])),
        blocks=runtime.cudasim_trace_blocks(ctypes.byref(grid_blocks)),
        grid_blocks=grid_blocks.value,
        source=source,
    )


def _array(function: Any, structure: type) -> list:
    start = ctypes.POINTER(structure)()
    count = function(ctypes.byref(start))
    return start[:count]


def _site(where: tuple[int, str, str, str], those: list[_Site]) -> Site:
    def total(name: str) -> int:
        return sum(getattr(site, name) for site in those)

    line, space, op, buffer = where
    cost = total("transactions")
    return Site(
        line=line,
        space=space,
        op=op,
        buffer=buffer,
        requests=total("requests"),
        active_lanes=total("active_lanes"),
        sectors=cost if space == "global" else 0,
        wavefronts=cost if space == "shared" else 0,
        bytes_requested=total("bytes_requested"),
        bytes_moved=total("bytes_moved"),
        ideal=total("ideal"),
    )


def _request(where: tuple[int, str, str, str], request: _Request) -> Request:
    offsets = tuple(
        request.offsets[lane] if request.mask >> lane & 1 else None for lane in range(32)
    )
    return Request(*where, request.bytes, offsets, request.transactions)


def _use(runtime: ctypes.CDLL, index: int, name: str, buffer: _Buffer) -> BufferUse:
    start = ctypes.POINTER(ctypes.c_uint32)()
    runtime.cudasim_trace_loads(index, ctypes.byref(start))
    count = buffer.bytes // buffer.granule
    loads = np.ctypeslib.as_array(start, (count,)).copy()
    return BufferUse(name, buffer.bytes, runtime.cudasim_trace_footprint(index), loads)


def _hazard(hazard: _Hazard, lines: dict[int, int], names: list[str]) -> Hazard:
    kind = _KINDS[hazard.kind]
    name = names[hazard.buffer] if hazard.buffer >= 0 else ""
    who = f"thread {hazard.thread} of block {hazard.block}"
    other = f"thread {hazard.other_thread}"
    at = f"byte {hazard.offset} of {name!r}"
    message = {
        "race": f"{who} and {other} of block {hazard.other_block} touch {at} with no barrier "
        "between them, and one of them writes",
        "divergent_barrier": f"{who} and {other} of its block do not reach the same __syncthreads",
        "out_of_bounds": f"{who} goes to {at}, which is outside it"
        if name
        else f"{who} goes to an address outside every buffer",
        "uninitialised_read": f"{who} reads {at}, which nothing has written",
        "write_conflict": f"{who} writes {at}, which {other} of block {hazard.other_block} has "
        "written too",
        "misaligned": f"{who} goes to {at} with a vector that must lie at a multiple of its size",
    }[kind]
    return Hazard(kind, lines[hazard.pc], name, message, hazard.count)


def _merge(hazards: Iterable[Hazard]) -> tuple[Hazard, ...]:
    """Keep one of each kind, line and buffer, the first, with the count of all."""
    merged: dict[tuple[int, str, str], Hazard] = {}
    for hazard in hazards:
        key = (hazard.line, hazard.kind, hazard.buffer)
        before = merged.get(key)
        merged[key] = replace(before, count=before.count + hazard.count) if before else hazard
    return tuple(merged[key] for key in sorted(merged))


@functools.lru_cache(maxsize=512)
def _lines(library: Path, addresses: tuple[int, ...]) -> dict[int, int]:
    """Return the source line of each code address, through whatever was inlined there.

    Code of a header that was inlined into the kernel counts for the kernel's line. Code of a header
    that was not keeps the header's line.
    """
    if not addresses:
        return {}
    output = binutils.ask("addr2line", "-a", "-i", "-e", str(library), *map(hex, addresses))
    lines: dict[int, int] = {}
    current, settled = 0, False
    for text in output.splitlines():
        if text.startswith("0x"):
            current, settled = int(text, 16), False
            continue
        match = re.match(r"(.*):(\d+)", text)
        if match is None or settled:
            continue
        settled = Path(match[1]).name == SOURCE_NAME
        if settled or current not in lines:
            lines[current] = int(match[2])
    return {address: lines.get(address, 0) for address in addresses}


@functools.lru_cache(maxsize=512)
def _static_shared_arrays(library: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, place and bytes of the library's thread-local variables, its shared arrays."""
    output = binutils.ask("readelf", "--symbols", "--wide", "--demangle", str(library))
    found = set()
    for text in output.splitlines():
        match = re.match(
            r"\s*\d+: ([0-9a-f]+)\s+(0x[0-9a-f]+|\d+) TLS\s+\w+\s+\w+\s+\d+ (.*)", text
        )
        if match:
            name = re.sub(r"^.*::", "", match[3].strip())
            found.add((name, int(match[1], 16), int(match[2], 0)))
    return tuple(sorted(found, key=lambda item: item[1]))


def _dynamic_shared_name(source: str) -> str:
    code = mask_comments_and_strings(source)
    declared = r"(?:\bextern\b[^;]*__shared__|\b__shared__\s+extern)\b"
    match = re.search(declared + r"[^;]*?\b([A-Za-z_]\w*)\s*\[\s*\]\s*[;\[]", code)
    return match[1] if match else "dynamic shared memory"
