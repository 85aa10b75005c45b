"""The back end that needs no GPU: builds CUDA C++ with g++ and runs a kernel's threads as fibers.

The kernel's source is the one that nvcc gets. `translate` rewrites the two constructs that C++
lacks, ``include/`` gives a meaning to CUDA's keywords and built-ins, and ``runtime.cpp`` runs the
grid: blocks spread over the CPU's cores, a block's threads as stacks that one core switches between
at barriers. It computes what a GPU computes, bit for bit where the kernel says which operations are
fused (``fmaf``). It does not model time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from convt_lab import supervise
from convt_lab.backend import (
    SOURCE_NAME,
    Array,
    Backend,
    compile_error,
    error_string,
    kernel_headers,
    undefined_error,
)
from convt_lab.build import (
    BuildError,
    cached_library,
    is_kept,
    load_library,
    outside_cause,
    run_tool,
    seconds_of,
    tool_identity,
)
from convt_lab.errors import CompileError, KernelError
from convt_lab.simulator.planning import Launch, plan
from convt_lab.simulator.report import Report
from convt_lab.simulator.tracing import declare, trace
from convt_lab.simulator.translate import mask_comments_and_strings, translate, uses_goto

__all__ = ["Simulator", "find_compiler"]

_FOLDER = Path(__file__).parent
_INCLUDE = _FOLDER / "include"

# -ffp-contract=off: what is fused is what the source calls fmaf. -fno-gnu-unique: statics of
# templates (shared arrays) stay each library's own. -fno-strict-aliasing: kernels read floats
# through float4*.
_FLAGS = (
    *("-std=c++17", "-fPIC", "-pthread"),
    *("-ffp-contract=off", "-fno-gnu-unique", "-fno-strict-aliasing"),
)
# -z defs: a function without a body is found here, where its name is known, and not by the loader.
_LINK_FLAGS = ("-shared", "-pthread", "-Wl,-Bsymbolic", "-Wl,-z,defs")
_SPEED_FLAGS = ("-O2", "-g1")
# A call before every access (see tracer.h), in code in which each access of the source stands once:
# lanes at the same place must be at the same address. No scalar replacement: a float4 stays one
# access. C++20 has the constant destructors that marked loops in constexpr functions need.
_TRACE_FLAGS = (
    *("-std=c++20", "-Og", "-gdwarf-4", "-fsanitize=thread", "-DCUDASIM_TRACE"),
    *("-fno-exceptions", "-fno-tree-sra", "-fno-tree-vectorize", "-fno-tree-dominator-opts"),
)
# A loop made of gotos carries no mark: with this it counts its steps, so that it ends.
_GOTO_FLAGS = ("-fsanitize-coverage=trace-pc",)


# An address further from a buffer than its guards reach (runtime.cpp) has nothing to do with it.
_REACH = 8 << 30

#: Seconds that a launch may take, unless ``CONVT_LAB_LAUNCH_TIMEOUT`` says otherwise.
LAUNCH_TIMEOUT = 3600.0


def launch_timeout() -> float:
    """Return the seconds that a launch may take.

    Raises
    ------
    ValueError
        If ``CONVT_LAB_LAUNCH_TIMEOUT`` is no positive number.
    """
    return seconds_of("CONVT_LAB_LAUNCH_TIMEOUT", LAUNCH_TIMEOUT)


def find_compiler() -> str | None:
    """Return the path of the C++ compiler: ``CXX`` if set, else g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


@functools.cache
def _compiler_version(compiler: str) -> str:
    status, output = run_tool([compiler, "--version"], limit=60)
    if status != 0:
        raise BuildError(f"{compiler} --version ends with status {status}: {output.strip()}")
    return output.partition("\n")[0]


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Let fmaf be one instruction where the processor has it; the result is the same either way."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ()
    return ("-mfma",) if flags and "fma" in flags[1].split() else ()


def _compile(
    name: str,
    source: str,
    extra: Sequence[str],
    headers: Mapping[str, str],
    libraries: Sequence[Path] = (),
    *,
    traced: bool = False,
) -> Path:
    """Build C++ `source`, which may include `headers` (texts by name), into a cached library."""
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or "g++"
        raise BuildError(
            f"no C++ compiler: {wanted!r} is not on PATH; install g++ or set CXX to a path"
        )
    flags = [*_FLAGS, *_machine_flags(), *(_TRACE_FLAGS if traced else _SPEED_FLAGS), *extra]

    def build(library: Path) -> None:
        file = library.with_suffix(".cpp")
        file.write_text(source, encoding="utf-8", errors="surrogatepass")
        for header, text in headers.items():
            (library.parent / header).parent.mkdir(exist_ok=True)
            (library.parent / header).write_text(text, encoding="utf-8")
        # Compiling and linking apart, because linking must not bring in the sanitizer's library.
        unit = library.with_suffix(".o")
        for command in (
            [compiler, *flags, "-c", str(file), "-o", str(unit)],
            [compiler, *_LINK_FLAGS, str(unit), *map(str, libraries), "-o", str(library)],
        ):
            status, output = run_tool(command, library.parent)
            if cause := status != 0 and outside_cause(output):
                raise BuildError(f"{compiler} failed: {cause}")
            if status in supervise.NOT_RUN or status > supervise.KILLED:
                what = output.strip() or f"it ended with status {status}"
                raise BuildError(f"{compiler} does not run, or was killed: {what}")
            if status != 0:
                raise undefined_error(output) or compile_error("g++", output)

    version = f"{tool_identity(compiler)} {_compiler_version(compiler)} {platform.machine()}"
    key = [source, " ".join(flags), version, *headers.values(), *map(str, libraries)]
    return cached_library(name, key, build)


def _runtime_path() -> Path:
    """Return the runtime's library, the same in all of this process's life."""
    if not is_kept(_built_runtime()):  # the user or another process has deleted it
        _built_runtime.cache_clear()
    return _built_runtime()


@functools.cache
def _built_runtime() -> Path:
    headers = {
        name: (_FOLDER / name).read_text() for name in ("runtime.h", "symbols.h", "tracer.h")
    }
    try:
        return _compile("runtime", (_FOLDER / "runtime.cpp").read_text(), ["-I."], headers)
    except CompileError as error:
        raise BuildError(f"{find_compiler()} can't compile the simulator: {error}") from error


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = load_library(_runtime_path())
    declare(library)
    library.cudasim_failure.restype = ctypes.POINTER(_Failure)
    library.cudasim_planned.restype = ctypes.c_size_t
    library.cudasim_allocate.restype = ctypes.c_void_p
    library.cudasim_allocate.argtypes = [ctypes.c_size_t]
    library.cudasim_release.argtypes = [ctypes.c_void_p]
    library.cudasim_overrun.restype = ctypes.c_bool
    library.cudasim_overrun.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_longlong),
    ]
    library.cudasim_limit_seconds.argtypes = [ctypes.c_double]
    return library


class _Index(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class _Failure(ctypes.Structure):
    """``CudasimFailure`` of runtime.h."""

    NONE = 0
    BAD_ACCESS = 1
    BAD_CONFIGURATION = 5
    STOPPED = 8
    NO_ADDRESS = 2**64 - 1

    _fields_ = [
        ("kind", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("block", _Index),
        ("thread", _Index),
        ("text", ctypes.c_char * 256),
    ]


class Simulator(Backend):
    """Runs kernels on the CPU."""

    name = "simulator"

    def __init__(self) -> None:
        # Of each thread's launch under way, as `lent`: name, address and bytes of its arrays.
        self._thread = threading.local()

    def build(self, name: str, source: str, *, traced: bool = False) -> ctypes.CDLL:
        """Compile with g++ against the simulator's headers and runtime."""
        # Float atomics give sums that depend on the order of the blocks: run those on one core, so
        # that a kernel gives the same bits every time.
        workers = 1 if re.search(r"\batomic[A-Z]", mask_comments_and_strings(source)) else 0
        code = translate(source, mark_loops=traced)
        text = f'#include <cuda_runtime.h>\n#line 1 "{SOURCE_NAME}"\n{code}'
        headers = {
            path.name: translate(path.read_text(), mark_loops=traced) for path in kernel_headers()
        }
        headers |= {
            path.relative_to(_INCLUDE).as_posix(): path.read_text()
            for path in sorted(_INCLUDE.rglob("*.*h"))
        }
        headers["runtime.h"] = (_FOLDER / "runtime.h").read_text()
        flags = ["-I.", f"-DCUDASIM_WORKERS={workers}"]
        if traced and uses_goto(source):
            flags += _GOTO_FLAGS
        path = _compile(name, text, flags, headers, [_runtime_path()], traced=traced)
        return load_library(path)

    @contextmanager
    def trace(
        self,
        library: ctypes.CDLL,
        source: str,
        arrays: Sequence[Array | None],
        addresses: Sequence[int],
        blocks: Sequence[int] | None,
    ) -> Iterator[Callable[[], Report]]:
        """Trace the launches in this context, of a `library` that was built to be traced.

        Yields a function that returns what has been counted so far.
        """
        with trace(_runtime(), library, source, arrays, addresses, blocks) as report:
            yield report

    @contextmanager
    def plan(
        self, library: ctypes.CDLL, max_shared_bytes: int | None = None
    ) -> Iterator[list[Launch]]:
        """Note the launches in this context and run none; yields a list, filled at the end.

        Launchers are told that a block may have `max_shared_bytes`; as always if None.
        """
        with plan(_runtime(), library, max_shared_bytes) as launches:
            yield launches

    @contextmanager
    def lend(self, arrays: Sequence[Array | None]) -> Iterator[list[int]]:
        """Copy the arrays to memory among unmapped addresses, and back afterwards.

        Arrays that overlap share one copy, so that aliasing is what it would be on a GPU.
        """
        runtime = _runtime()
        runtime.cudasim_limit_seconds(launch_timeout())
        present = sorted((a for a in arrays if a is not None), key=lambda array: array.address)
        with ExitStack() as cleanup:
            spans: list[list[int]] = []  # start, end, copy
            for array in present:
                if array.device.type != "cpu":
                    raise ValueError(
                        f"argument {array.name!r} is on {array.device}; "
                        "the simulator takes CPU arrays"
                    )
                end = array.address + array.nbytes
                if spans and array.address < spans[-1][1]:
                    spans[-1][1] = max(spans[-1][1], end)
                else:
                    spans.append([array.address, end, 0])
            for span in spans:
                start, end, _ = span
                span[2] = runtime.cudasim_allocate(end - start)
                if not span[2]:
                    raise MemoryError(f"the simulator could not allocate {end - start} bytes")
                cleanup.callback(runtime.cudasim_release, span[2])
                ctypes.memmove(span[2], start, end - start)

            def copy_of(array: Array) -> int:
                span = next(s for s in reversed(spans) if s[0] <= array.address)
                return span[2] + array.address - span[0]

            self._thread.lent = [(a.name, copy_of(a), a.nbytes) for a in present]
            yield [0 if a is None else copy_of(a) for a in arrays]
            place = ctypes.c_longlong()
            for start, end, copy in spans:
                if runtime.cudasim_overrun(copy, end - start, ctypes.byref(place)):
                    self._raise_overrun(copy + place.value)
            for array in present:
                if array.written and array.nbytes:
                    ctypes.memmove(array.address, copy_of(array), array.nbytes)

    def _raise_overrun(self, address: int) -> NoReturn:
        """Tell of a write that was found when all had run, so that nobody knows the thread."""
        raise KernelError(
            f"a write outside every buffer: {self._place(address)}; launch it with trace=True to "
            "see the line"
        )

    def stream(self) -> None:
        """Return the null stream: a simulated launch is over when it returns."""
        return None

    def synchronize(self, library: ctypes.CDLL, kernel: str) -> None:
        """Return at once: see `stream`."""

    def error(self, library: ctypes.CDLL, code: int, kernel: str) -> KernelError:
        """Describe the failed launch: which thread did what to which buffer."""
        failure = _runtime().cudasim_failure().contents
        # Asked for in any case, so that the error is not told once more.
        words, text = error_string(library, code), failure.text.decode()
        if failure.kind == _Failure.NONE:  # no launch failed: the launcher itself gave up
            return KernelError(f"{kernel} failed: {words} (CUDA error {code})")
        if failure.kind == _Failure.BAD_CONFIGURATION:
            return KernelError(f"{kernel} was not launched: {text}")
        where = f"block {failure.block}, thread {failure.thread}"
        if failure.kind == _Failure.STOPPED and text != "interrupted":
            text += f": {launch_timeout():g} s (CONVT_LAB_LAUNCH_TIMEOUT); does it ever end?"
        if failure.kind == _Failure.BAD_ACCESS and failure.address != _Failure.NO_ADDRESS:
            text = f"{text}: {self._place(failure.address)}"
        return KernelError(f"{kernel} stopped in {where}: {text}")

    def _place(self, address: int) -> str:
        """Say where `address` is relative to the nearest buffer of the launch."""

        def distance(lent: tuple[str, int, int]) -> int:
            _, start, nbytes = lent
            return max(start - address, address - (start + nbytes))

        if address < 4096:
            return f"address {address:#x} (a null pointer)"
        nearest = min(getattr(self._thread, "lent", ()), key=distance, default=None)
        if nearest is None or distance(nearest) > _REACH:
            return f"address {address:#x}"
        name, start, nbytes = nearest
        if address < start:
            return f"{start - address} bytes before the start of {name!r}"
        if address < start + nbytes:
            return f"{address - start} bytes from the start of {name!r} ({nbytes} bytes)"
        return f"{address - start - nbytes} bytes past the end of {name!r} ({nbytes} bytes)"

    def max_shared_bytes(self) -> int:
        """Return sm_90's limit; the runtime also counts the static arrays."""
        return 227 * 1024
