"""From CUDA C++ text to kernels that Python can call, on a GPU or on the simulator.

`compile` takes any text with ``__global__`` functions; `Program.launch` starts one of them. A
kernel needs no launcher of its own: a line for each is appended to the text, what it needs
(``kernels/launch.cuh``) is included before the text, and the compiler tells the parameters' types.
The text's own lines keep their numbers.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from convt_lab.backend import LAUNCHERS_NAME, SOURCE_NAME, Array, Backend, launchers_line
from convt_lab.errors import CompileError, KernelError
from convt_lab.simulator import Simulator
from convt_lab.simulator.planning import Launch
from convt_lab.simulator.report import Report
from convt_lab.simulator.translate import mask_comments_and_strings, mask_unused

__all__ = ["Kernel", "Parameter", "Program", "backend_named", "compile"]

BackendName = Literal["auto", "gpu", "simulator"]


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: its name in the source and its type as the compiler sees it.

    `code` is NumPy's, such as ``f4`` or ``i8``; a pointer's is ``*f4`` or ``*const f4``.
    """

    name: str
    code: str

    @property
    def is_pointer(self) -> bool:
        """Whether an array is wanted."""
        return self.code.startswith("*")

    @property
    def is_const(self) -> bool:
        """Whether the kernel only reads through the pointer."""
        return self.code.startswith("*const ")

    @property
    def element(self) -> str:
        """The code of the value, or of what the pointer points to."""
        return self.code.removeprefix("*").removeprefix("const ")


@dataclass(frozen=True)
class Kernel:
    """A ``__global__`` function that can be launched by name."""

    name: str
    symbol: str
    parameters: tuple[Parameter, ...]


@functools.cache
def backend_named(name: str) -> Backend:
    """Return the back end called `name`; ``auto`` stands for what can be used here."""
    if name == "auto":
        from convt_lab.gpu import find_toolkit

        usable = torch.cuda.is_available() and find_toolkit() is not None
        return backend_named("gpu" if usable else "simulator")
    if name == "simulator":
        return Simulator()
    if name == "gpu":
        from convt_lab.gpu import GPU

        return GPU()
    raise ValueError(f"backend={name!r}: must be 'auto', 'gpu' or 'simulator'")


def compile(source: str, backend: BackendName = "auto", *, name: str = "kernel") -> Program:
    """Compile CUDA C++ `source`.

    Parameters
    ----------
    source
        Any CUDA C++ text with ``__global__`` functions. It may include ``problem.cuh`` and standard
        headers.
    backend
        ``"gpu"`` (nvcc, the current device), ``"simulator"`` (g++, the CPU), or ``"auto"``: the GPU
        if there is one and nvcc to compile for it, else the simulator.
    name
        What to call the library, for messages and the build cache.

    Returns
    -------
    Program

    Raises
    ------
    CompileError
        If the compiler refuses the source; `line` is the line in `source`.
    TypeError, ValueError
        If `source` is no text, or only the name of a file.
    BuildError
        If a tool is missing or the build cache can't be written.
    """
    if not isinstance(source, str):
        raise TypeError(f"source is a {type(source).__name__}; pass the CUDA C++ text as a str")
    if re.fullmatch(r"\s*[^\n;{}#\"]*\.cuh?\s*", source) and not source.lstrip().startswith("//"):
        raise ValueError(f"source={source!r}: pass the text, not the name of a file")
    chosen = backend_named(backend)
    return _compile(source, chosen, name, chosen.target())


@functools.lru_cache(maxsize=256)
def _compile(source: str, backend: Backend, name: str, target: str) -> Program:
    return Program(source, backend, name)


class Program:
    """Compiled CUDA C++.

    Attributes
    ----------
    source
        The text that was compiled.
    backend
        ``"gpu"`` or ``"simulator"``.
    kernels
        The kernels that `launch` can start, by name.
    """

    def __init__(self, source: str, backend: Backend, name: str):
        self.source = source
        self.backend = backend.name
        self._backend = backend
        _check_braces(source)
        declared = _declared_kernels(source)
        header = f'#include "launch.cuh"\n#line 1 "{SOURCE_NAME}"'
        lines = [f"CONVT_LAB_LAUNCHABLE({k.symbol}, {k.qualified})" for k in declared]
        footer = "\n".join([f'#line 1 "{LAUNCHERS_NAME}"', *lines])
        self._name = name
        self._text = f"{header}\n{source}\n{footer}\n"
        try:
            self.library = backend.build(name, self._text)
        except CompileError as error:
            number = launchers_line(str(error))
            if number is None and "At end of source" in str(error):  # nvcc, where no line is ours
                number = len(lines) + 1
            if error.line is None and number is not None:
                raise _refused_launcher(source, declared, number, str(error)) from error
            raise
        self.kernels: Mapping[str, Kernel] = MappingProxyType(
            {k.name: self._kernel(k) for k in declared}
        )

    def __repr__(self) -> str:
        return f"<Program on the {self.backend}: {', '.join(self.kernels) or 'no kernels'}>"

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        trace: bool = False,
        *,
        blocks: Sequence[int] | None = None,
    ) -> Report | None:
        """Run a kernel and wait until its results are in the caller's arrays.

        Parameters
        ----------
        name
            The ``__global__`` function.
        grid, block
            Blocks in the grid and threads in a block: one to three integers.
        args
            One for each parameter: contiguous NumPy arrays or tensors for pointers (None is the
            null pointer), numbers for the rest, converted to the declared type. Arrays are written
            in place; on the GPU back end, those that are not on the GPU are copied there and back.
        shared_bytes
            Dynamic shared memory of a block, in bytes.
        trace
            Count what every warp does and look for hazards, on the simulator. It takes some ten to
            a hundred times as long.
        blocks
            With `trace`: run these blocks only, by linear index (x fastest), for a launch that is
            too large to trace whole.

        Returns
        -------
        Report or None
            With `trace`, what was counted.

        Raises
        ------
        KernelError
            If the launch's configuration is refused or the kernel fails.
        TypeError, ValueError
            If the arguments don't fit the kernel's declaration.
        """
        kernel = self._find(name)
        grid_size, block_size = _extent("grid", grid), _extent("block", block)
        limit = self._backend.max_shared_bytes()
        if not isinstance(shared_bytes, Integral) or not 0 <= shared_bytes <= limit:
            raise ValueError(
                f"shared_bytes={reprlib.repr(shared_bytes)}: must be an integer from 0 to {limit}"
            )

        def start(library: ctypes.CDLL, values: list[Any]) -> int:
            pointers = [ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values]
            return getattr(library, f"convt_lab_launch_{kernel.symbol}")(
                (ctypes.c_uint * 3)(*grid_size),
                (ctypes.c_uint * 3)(*block_size),
                ctypes.c_size_t(shared_bytes),
                (ctypes.c_void_p * max(1, len(pointers)))(*pointers),
                ctypes.c_void_p(self._backend.stream()),
            )

        values = _match_arguments(kernel, args)
        if trace:
            return self._traced(name, values, start, _block_numbers(blocks, grid_size))
        if blocks is not None:
            raise ValueError(
                f"blocks={reprlib.repr(blocks)}: only a traced launch can run some of the blocks"
            )
        self._run(name, values, start)
        self._backend.synchronize(self.library, name)
        return None

    def call(
        self, launcher: str, *args: Any, trace: bool = False, blocks: Sequence[int] | None = None
    ) -> Report | None:
        """Call a launcher of the source's own (``extern "C" cudaError_t launcher(..., stream)``).

        `args` are `Array` (a pointer), None (the null pointer) or ctypes values; the stream is
        added. The launch is not waited for. `trace` and `blocks` are as for `launch`.
        """

        def start(library: ctypes.CDLL, values: list[Any]) -> int:
            return getattr(library, launcher)(*values, ctypes.c_void_p(self._backend.stream()))

        values = [ctypes.c_void_p(None) if a is None else a for a in args]
        if trace:
            return self._traced(launcher, values, start, blocks)
        self._run(launcher, values, start)
        return None

    def plan(
        self, launcher: str, *args: Any, max_shared_bytes: int | None = None
    ) -> tuple[Launch, ...]:
        """Return what a launcher of the source's own would launch; nothing runs.

        `args` are ctypes values or None (the null pointer), as for `call`; no array is needed. The
        launcher is told that a block may have `max_shared_bytes` of shared memory, sm_90's if None.
        It takes the simulator.
        """
        backend = self._backend
        if not isinstance(backend, Simulator):
            raise ValueError("plan needs the simulator: compile with backend='simulator'")
        values = [ctypes.c_void_p(None) if a is None else a for a in args]
        with backend.plan(self.library, max_shared_bytes) as launches:
            code = getattr(self.library, launcher)(*values, ctypes.c_void_p(backend.stream()))
            if code != 0:
                raise backend.error(self.library, code, launcher)
        return tuple(launches)

    def _run(self, name: str, values: list[Any], start: _Start) -> None:
        arrays = [v for v in values if isinstance(v, Array)]
        with self._backend.lend(arrays) as addresses:
            code = start(self.library, _with_addresses(values, addresses))
            if code != 0:
                raise self._backend.error(self.library, code, name)

    def _traced(
        self, name: str, values: list[Any], start: _Start, blocks: Sequence[int] | None
    ) -> Report:
        backend = self._backend
        if not isinstance(backend, Simulator):
            raise ValueError("trace=True needs the simulator: compile with backend='simulator'")
        library = self._instrumented
        arrays = [v for v in values if isinstance(v, Array)]
        with (
            backend.lend(arrays) as addresses,
            backend.trace(library, self.source, arrays, addresses, blocks) as report,
        ):
            code = start(library, _with_addresses(values, addresses))
            if code != 0:
                error = backend.error(library, code, name)
                error.report = report()
                raise error
            return report()

    @functools.cached_property
    def _instrumented(self) -> ctypes.CDLL:
        """The same text, built to be traced; made when it is first needed."""
        return self._backend.build(f"{self._name}_traced", self._text, traced=True)

    def _kernel(self, declared: _Declared) -> Kernel:
        tell = getattr(self.library, f"convt_lab_signature_{declared.symbol}")
        tell.restype = ctypes.c_char_p
        codes = tell().decode().split(";")[:-1]
        names = declared.parameters
        if len(names) != len(codes):  # a macro in the list: the compiler knows better
            names = tuple(f"argument {i}" for i in range(len(codes)))
        return Kernel(
            declared.name,
            declared.symbol,
            tuple(Parameter(n, c) for n, c in zip(names, codes, strict=True)),
        )

    def _find(self, name: str) -> Kernel:
        if name not in self.kernels:
            known = ", ".join(map(repr, self.kernels)) or "none"
            raise KernelError(
                f"no kernel {name!r} to launch; the source has: {known} "
                "(templates can't be launched by name: instantiate them in a kernel of your own)"
            )
        return self.kernels[name]


# ---- What a launch is given --------------------------------------------------------------------

_Start = Callable[[ctypes.CDLL, list[Any]], int]


def _with_addresses(values: list[Any], addresses: list[int]) -> list[Any]:
    remaining = iter(addresses)
    return [ctypes.c_void_p(next(remaining)) if isinstance(v, Array) else v for v in values]


def _block_numbers(blocks: Sequence[int] | None, grid: tuple[int, ...]) -> Sequence[int] | None:
    count = grid[0] * grid[1] * grid[2]
    if blocks is not None and (
        not len(blocks) or not all(isinstance(b, Integral) and 0 <= b < count for b in blocks)
    ):
        raise ValueError(
            f"blocks={reprlib.repr(blocks)}: must be linear block numbers from 0 to {count - 1}"
        )
    return blocks


_INTEGER_TYPES = {
    "i1": ctypes.c_int8,
    "i2": ctypes.c_int16,
    "i4": ctypes.c_int32,
    "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u2": ctypes.c_uint16,
    "u4": ctypes.c_uint32,
    "u8": ctypes.c_uint64,
}
_FLOAT_TYPES = {"f4": ctypes.c_float, "f8": ctypes.c_double}


def _extent(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, Integral) else value
    if (
        not isinstance(sizes, Sequence)
        or not 1 <= len(sizes) <= 3
        or not all(isinstance(s, Integral) for s in sizes)
    ):
        raise ValueError(f"{name}={reprlib.repr(value)}: must be one to three integers")
    if any(not 1 <= s < 2**31 for s in sizes):
        raise ValueError(f"{name}={reprlib.repr(value)}: every size must be from 1 to {2**31 - 1}")
    return tuple(int(s) for s in (*sizes, 1, 1, 1)[:3])


def _match_arguments(kernel: Kernel, args: Sequence[Any]) -> list[Any]:
    """Return `args` as arrays and ctypes values, checked against the kernel's declaration."""
    wanted = kernel.parameters
    if len(args) != len(wanted):
        declared = ", ".join(f"{_type_name(p.code)} {p.name}" for p in wanted)
        raise TypeError(
            f"args has {len(args)} values; {kernel.name} takes {len(wanted)}: ({declared})"
        )
    return [
        (_pointer if p.is_pointer else _number)(kernel, p, a)
        for p, a in zip(wanted, args, strict=True)
    ]


def _pointer(kernel: Kernel, parameter: Parameter, value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise TypeError(
            f"{kernel.name}: {parameter.name!r} is a pointer ({_type_name(parameter.code)}); "
            f"pass a NumPy array or a tensor, not {_shown(value)}"
        )
    try:
        array = Array.of(parameter.name, value, written=not parameter.is_const)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{kernel.name}: {error}") from None
    element = parameter.element
    if not element.startswith("V") and array.code != element:
        wanted = np.dtype(element).name
        how = (
            f"array.astype(np.{wanted})"
            if isinstance(value, np.ndarray)
            else f"tensor.to(torch.{wanted})"
        )
        if array.written:
            how += ", which is a new one: the results will be in it"
        raise TypeError(
            f"{kernel.name}: {parameter.name!r} points to {_type_name(element)}; "
            f"the {_kind(value)} passed has dtype {value.dtype}: pass dtype {wanted} ({how})"
        )
    return array


def _number(kernel: Kernel, parameter: Parameter, value: Any) -> Any:
    code = parameter.code
    problem = f"{kernel.name}: {parameter.name!r} is declared {_type_name(code)}"
    if code.startswith("V"):
        raise TypeError(
            f"{kernel.name}: {parameter.name!r} is {_type_name(code)}, which launch can't pass: "
            "give the kernel a struct's members, one by one, and what else it is by a pointer"
        )
    if isinstance(value, np.ndarray | torch.Tensor):
        how = (
            "value.item()"
            if math.prod(value.shape) == 1
            else "one of its values, such as value[0].item()"
        )
        raise TypeError(f"{problem}, a number; not {_shown(value)}: pass {how}")
    if code == "b1":
        if isinstance(value, bool | np.bool_):
            return ctypes.c_bool(value)
        raise TypeError(f"{problem}; pass a bool, not {_shown(value)}")
    if code in _INTEGER_TYPES:
        if not isinstance(value, Integral | np.bool_):
            raise TypeError(f"{problem}; pass an integer, not {_shown(value)}")
        bits = 8 * int(code[1])
        low, high = (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if code[0] == "i" else (0, 2**bits - 1)
        )
        if not low <= value <= high:
            raise ValueError(f"{problem}, which holds {low} to {high}; got {value}")
        return _INTEGER_TYPES[code](int(value))
    if code in _FLOAT_TYPES:
        if not isinstance(value, Real):
            raise TypeError(f"{problem}; pass a number, not {_shown(value)}")
        return _FLOAT_TYPES[code](float(value))
    raise TypeError(
        f"{problem}; launch passes pointers, integers, float, double and bool; "
        "give the kernel such parameters"
    )


_TYPE_NAMES = {
    "b1": "bool",
    "i1": "signed char",
    "i2": "short",
    "i4": "int",
    "i8": "long long",
    "u1": "unsigned char",
    "u2": "unsigned short",
    "u4": "unsigned",
    "u8": "unsigned long long",
    "f4": "float",
    "f8": "double",
    "f16": "long double",
    "V0": "void",
}


def _type_name(code: str) -> str:
    """Return a type as C++ writes it; of a struct or the like, only the size is known."""
    if code.startswith("*const "):
        return f"const {_type_name(code.removeprefix('*const '))}*"
    if code.startswith("*"):
        return f"{_type_name(code[1:])}*"
    return _TYPE_NAMES.get(code) or f"a struct or the like of {code[1:]} bytes"


def _kind(value: np.ndarray | torch.Tensor) -> str:
    return "array" if isinstance(value, np.ndarray) else "tensor"


def _shown(value: Any) -> str:
    """Describe a value in a few words: of arrays and lists, only what they are."""
    if isinstance(value, np.ndarray | torch.Tensor):
        article = "an" if isinstance(value, np.ndarray) else "a"
        name = type(value).__name__
        return f"{article} {_kind(value)} ({name}, shape {tuple(value.shape)}, {value.dtype})"
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str | bytes):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


# ---- What the source declares ------------------------------------------------------------------


@dataclass(frozen=True)
class _Declared:
    name: str
    line: int
    qualified: str  # with its namespaces
    symbol: str  # the same as one C identifier
    parameters: tuple[str, ...]


_TEMPLATE = re.compile(r"\btemplate\s*<[^;{}]*$")


def _declared_kernels(source: str) -> list[_Declared]:
    """Find the non-template ``__global__`` functions, with their namespaces and parameter names."""
    code = mask_unused(mask_comments_and_strings(source))
    found: dict[str, _Declared] = {}
    position = 0
    while (start := code.find("__global__", position)) >= 0:
        position = start + len("__global__")
        head, _, tail = code[position:].partition("{")
        header = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", " ", head)
        match = re.search(r"\bvoid\s+(?:__launch_bounds__\b\s*)?([A-Za-z_]\w*)\s*\(", header)
        if match is None or not tail or ";" in header:  # no definition
            continue
        scopes = _scopes(code[:start])
        before = re.split(r"[;{}]", code[:start])[-1]
        if scopes is None or _TEMPLATE.search(before):
            continue
        qualified = "::".join([*scopes, match[1]])
        names = _parameter_names(header[match.end() :])
        symbol = qualified.replace("::", "_")
        line = code.count("\n", 0, start) + 1
        found[qualified] = _Declared(match[1], line, qualified, symbol, names)
    return list(found.values())


def _refused_launcher(
    source: str, declared: Sequence[_Declared], number: int, message: str
) -> CompileError:
    """Explain why an appended line is refused where the text itself is not."""
    found = re.search(r"error: (.*)", message)
    complaint = found[1] if found else message
    code = re.sub(r"^[ \t]*#.*", "", mask_comments_and_strings(source), flags=re.MULTILINE).rstrip()
    ends = code.endswith((";", "}")) and not re.match(r"expected|.* at end of ", complaint)
    if not ends or number > len(declared):
        line = code.count("\n") + 1
        return CompileError(
            f"the text ends in the middle of something, in line {line}: is a ';' or a ')' missing? "
            f"The compiler says: {complaint}",
            line,
        )
    kernel = declared[number - 1]
    return CompileError(
        f"the kernel {kernel.name!r} in line {kernel.line} can't be launched by its name: does an "
        "#if leave it out (only #if 0 is understood), do two kernels have this name, or does it "
        f"take a reference? Delete it, rename it, or let it take a pointer. The compiler says: "
        f"{complaint}",
        kernel.line,
    )


def _check_braces(source: str) -> None:
    """Raise if braces do not match: compilers complain at the end, and of all that is behind them.

    Where macros or conditions hold a part of a pair, only the compiler can tell.
    """
    code = mask_unused(mask_comments_and_strings(source))
    code = re.sub(r"\\\n", "  ", code)  # a macro is one line; positions stay
    directives = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
    if any(d[0].count("{") != d[0].count("}") for d in directives.finditer(code)):
        return
    conditions = [d for d in directives.finditer(code) if re.match(r"\s*#\s*(if|el|endif)", d[0])]
    places = [d.start() for d in conditions]
    for start, end in itertools.pairwise(places):
        if code.count("{", start, end) != code.count("}", start, end):
            return
    code = directives.sub(lambda match: " " * len(match[0]), code)
    open_braces: list[int] = []
    for match in re.finditer(r"[{}]", code):
        line = source.count("\n", 0, match.start()) + 1
        if match[0] == "{":
            open_braces.append(line)
        elif open_braces:
            open_braces.pop()
        else:
            raise CompileError(
                f"the '}}' in line {line} closes nothing: it is one too many, or a '{{' is missing "
                "before it",
                line,
            )
    if open_braces:
        raise CompileError(
            f"the '{{' in line {open_braces[-1]} is never closed: its own '}}' is missing, or "
            "that of a block inside it",
            open_braces[-1],
        )


def _scopes(before: str) -> list[str] | None:
    """Return the named namespaces open at the end of `before`, or None inside anything else."""
    open_scopes: list[str | None] = []
    start = 0
    for index, character in enumerate(before):
        if character == "{":
            opener = before[start:index].rstrip()
            if match := re.search(r"\bnamespace\b([\w:\s]*)$", opener):
                open_scopes.append("".join(match[1].split()))
            else:
                # A linkage block's string is blanked: `extern "C" {` reads as `extern`.
                open_scopes.append("" if re.search(r"\bextern$", opener) else None)
        elif character == "}" and open_scopes:
            open_scopes.pop()
        if character in ";{}":
            start = index + 1
    if None in open_scopes:
        return None
    return [scope for scope in open_scopes if scope]


def _parameter_names(text: str) -> tuple[str, ...]:
    """Return the names in a parameter list; `text` begins after its opening parenthesis."""
    depth, current, parts = 0, "", []
    for character in text:
        if character == ")" and depth == 0:
            break
        depth += (character in "(<[") - (character in ")>]")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if current.strip() and current.strip() != "void":
        parts.append(current)
    named = [part.partition("=")[0] for part in parts]  # without a default
    names = [re.search(r"([A-Za-z_]\w*)\s*(?:\[[^\]]*\])?\s*$", part) for part in named]
    return tuple(match[1] if match else f"argument {i}" for i, match in enumerate(names))
