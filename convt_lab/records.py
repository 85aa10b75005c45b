"""Records: what `make bench` measured, one JSON file for each GPU model in ``records/``.

Chapters and tests read speeds from here and nowhere else. Reading checks everything: a file that
`load` accepts has every field that is described below, of the right type and within its range.

The file (schema 1)
-------------------
All times are in seconds, all sizes in bytes, all rates in what their ``unit`` says for a second.

``schema``
    1. Another version is refused.
``what``
    One sentence: what the file holds.
``gpu``
    ``name``; ``compute_capability``, such as ``[9, 0]``; ``multiprocessors``; ``memory_bytes``;
    ``l2_bytes``; and from nvidia-smi, null where it does not say: ``power_limit_watts``,
    ``max_sm_clock_mhz``, ``driver``.
``software``
    ``convt_lab``, ``torch``, ``cuda`` and ``cudnn``: versions.
``date``, ``seed``, ``seconds``
    The day, ``YYYY-MM-DD``; of the random inputs; that the whole run took.
``parts``
    Which of ``ceilings``, ``shapes`` and ``growth`` were measured. The others are empty.
``meaning``
    Names of this file -> what they stand for, in words, such as ``cold`` and ``sustained``.
``ceilings``
    Name -> null where the GPU has no such units, else ``work`` (of one run), ``unit`` (``FLOP`` or
    ``byte``), ``cold`` and ``sustained``. The names are `CEILINGS`.
``shapes``
    A list of ``name``, ``problem`` (the arguments of `Problem`) and ``rows``.
``growth``
    Axis -> a list of ``value``, ``problem`` and ``rows``. The axes are `AXES`; ``value`` is N, the
    side of the square input, C_in = C_out, or KH * KW, and grows along the list.

A row is one implementation on one problem:

``name``, ``kind``
    A stage's name and ``stage``; or one of `PYTORCH_ROWS` and ``pytorch``.
``dtype``, ``memory_format``, ``allow_tf32``
    Of the tensors: ``float32`` or ``float16``, ``contiguous`` or ``channels_last``. cuDNN's switch;
    null for a stage.
``status``, ``failure``
    ``ok``; ``wrong``, a stage that failed the gate and was not timed; or ``failed``, and then what
    was raised (else null). PyTorch's rows are judged but not gated.
``errors``
    Against float64: ``relative_l2``, ``condition`` (units of 2^-24 * (|x| conv |w| + |b|)) and
    ``gate``, the largest ``condition`` of a right float32 result. An infinite error is the string
    ``"inf"``. Null if it failed.
``cold``
    ``median_seconds`` and ``samples_seconds``, one for each run. Null if it was not timed.
``sustained``
    ``seconds`` of one run; ``runs``; ``enqueue_seconds``, Python's for one run (where that is about
    as long, the GPU waited for Python); ``samples``, how often the sensors were read meanwhile; and
    ``sm_clock_mhz``, ``power_watts`` (means) and ``temperature_c`` (highest), null where there was
    no reading. Null if it was not timed so.
``peak_bytes``
    Of one call's memory beyond inputs and output, by PyTorch's allocator. Null if not measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from convt_lab.measure import Load, Sustained, Timing
from convt_lab.problem import Problem, ProblemError

__all__ = [
    "AXES",
    "BASELINE",
    "CEILINGS",
    "FOLDER",
    "GPU",
    "PARTS",
    "PYTORCH_ROWS",
    "SCHEMA",
    "Ceiling",
    "Ceilings",
    "Node",
    "Point",
    "Record",
    "RecordError",
    "Row",
    "RowErrors",
    "Shape",
    "Software",
    "as_text",
    "from_json",
    "load",
    "load_named",
    "names",
    "point_name",
    "read_day",
    "read_errors",
    "read_gpu",
    "read_json",
    "read_problem",
    "read_software",
    "require_different",
    "require_schema",
    "rounded",
    "save",
    "slug",
    "text_of",
    "to_json",
    "write_text",
]

#: The version of the schema that is written and read.
SCHEMA = 1

#: Where the records lie: beside the package, in the repository.
FOLDER = Path(__file__).resolve().parents[1] / "records"

#: What can be measured by itself.
PARTS = ("ceilings", "shapes", "growth")

#: Ceilings, and the unit of their work.
CEILINGS: Mapping[str, str] = MappingProxyType(
    {
        "fp32_fma": "FLOP",
        "copy": "byte",
        "gemm_float32": "FLOP",
        "gemm_tf32": "FLOP",
        "gemm_float16": "FLOP",
        "gemm_bfloat16": "FLOP",
    }
)

#: PyTorch's operator in float32: what everything is compared with.
BASELINE = "cudnn_float32"

#: PyTorch's operator in the forms that are measured: (dtype, memory format, allow_tf32).
PYTORCH_ROWS: Mapping[str, tuple[str, str, bool]] = MappingProxyType(
    {
        BASELINE: ("float32", "contiguous", False),
        "cudnn_float32_channels_last": ("float32", "channels_last", False),
        "cudnn_tf32": ("float32", "contiguous", True),
        "cudnn_tf32_channels_last": ("float32", "channels_last", True),
        "cudnn_float16": ("float16", "contiguous", True),
        "cudnn_float16_channels_last": ("float16", "channels_last", True),
    }
)

#: What grows in the part ``growth``.
AXES = ("batch", "side", "channels", "kernel_area")

Kind = Literal["stage", "pytorch"]
Status = Literal["ok", "wrong", "failed"]
How = Literal["cold", "sustained"]

_T = TypeVar("_T")


class RecordError(ValueError):
    """A record is not as its schema says; the message names the file, the field and its value."""


# ---- What a record holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """The GPU that was measured; None where nvidia-smi did not say."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    power_limit_watts: float | None = None
    max_sm_clock_mhz: float | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Software:
    """Versions."""

    convt_lab: str
    torch: str
    cuda: str
    cudnn: str


@dataclass(frozen=True)
class RowErrors:
    """How wrong a result is, as `convt_lab.ladder.Errors`."""

    relative_l2: float
    condition: float
    gate: float


@dataclass(frozen=True)
class Row:
    """One implementation on one problem. The attributes are those of the module's description."""

    name: str
    kind: Kind
    dtype: str
    memory_format: str
    allow_tf32: bool | None
    status: Status
    failure: str | None = None
    errors: RowErrors | None = None
    cold: Timing | None = None
    sustained: Sustained | None = None
    peak_bytes: int | None = None

    @property
    def is_right(self) -> bool:
        """Whether it ran and, for a stage, gave the right result."""
        return self.status == "ok"

    def seconds(self, how: How = "cold") -> float | None:
        """Return the time of one run, in seconds: the cold median, or sustained; None if untimed.

        Raises
        ------
        ValueError
            If `how` is neither ``"cold"`` nor ``"sustained"``.
        """
        if how not in ("cold", "sustained"):
            raise ValueError(f"how={how!r}: must be 'cold' or 'sustained'")
        if how == "cold":
            return self.cold and self.cold.median
        return self.sustained and self.sustained.seconds

    def time_ms(self, how: How = "cold") -> float | None:
        """Return the same in milliseconds."""
        seconds = self.seconds(how)
        return None if seconds is None else 1000 * seconds


@dataclass(frozen=True)
class Shape:
    """A problem and what was measured on it.

    Attributes
    ----------
    name
        Of the problem.
    problem
        Its shapes.
    rows
        In the order of the measurement: the stages, then PyTorch.
    """

    name: str
    problem: Problem
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """Return the row of a stage or of PyTorch.

        Raises
        ------
        KeyError
            If there is none of that name.
        """
        return _named("row", name, self.rows, of=f" on {self.name}")

    def tflops(self, name: str, how: How = "cold") -> float | None:
        """Return a row's effective 10^12 FLOP/s, by `Problem.flops`; None if it was not timed."""
        seconds = self.row(name).seconds(how)
        return None if seconds is None else self.problem.flops / seconds / 1e12

    def speedup(self, name: str, over: str = BASELINE, how: How = "cold") -> float | None:
        """Return how many times as fast as row `over` row `name` is; None if one is not timed."""
        rows = {row.name: row for row in self.rows}
        own, other = self.row(name).seconds(how), over in rows and rows[over].seconds(how)
        return other / own if own and other else None


@dataclass(frozen=True)
class Point(Shape):
    """A point of a curve: a `Shape` with the value on the curve's axis.

    Attributes
    ----------
    value
        N, the side of the input, C_in = C_out, or KH * KW.
    """

    value: int = 0

    @property
    def best(self) -> Row | None:
        """The fastest stage that is right, or None."""
        timed = [r for r in self.rows if r.kind == "stage" and r.is_right and r.cold]
        return min(timed, key=lambda row: row.cold.median, default=None)

    def seconds_per_pixel(self, row: Row | None) -> float | None:
        """Return a row's cold seconds for each output pixel [n, oh, ow], of all channels."""
        batch, _, height, width = self.problem.output_shape
        seconds = row and row.seconds()
        return None if seconds is None else seconds / (batch * height * width)


@dataclass(frozen=True)
class Ceiling:
    """A rate that nothing of its kind exceeds on this GPU.

    Attributes
    ----------
    work
        Of one run, in `unit`.
    unit
        ``FLOP`` or ``byte`` (each byte read and each written).
    cold, sustained
        Its times.
    """

    work: int
    unit: str
    cold: Timing
    sustained: Sustained

    def rate(self, how: How = "cold") -> float:
        """Return FLOP/s or byte/s."""
        return self.work / (self.cold.median if how == "cold" else self.sustained.seconds)


class Ceilings(Mapping[str, "Ceiling | None"]):
    """The ceilings by name, and as attributes their cold rates: ``ceilings.fp32_fma`` in FLOP/s.

    An attribute is None where the GPU has no such units, or where nothing was measured.
    """

    def __init__(self, ceilings: Mapping[str, Ceiling | None] = MappingProxyType({})) -> None:
        self._ceilings = dict(ceilings)

    def __getitem__(self, name: str) -> Ceiling | None:
        return self._ceilings[name]

    def __iter__(self):
        return iter(self._ceilings)

    def __len__(self) -> int:
        return len(self._ceilings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ceilings) and self._ceilings == other._ceilings

    __hash__ = None

    def __repr__(self) -> str:
        return f"Ceilings({self._ceilings!r})"

    def __getattr__(self, name: str) -> float | None:
        if name not in CEILINGS:
            raise AttributeError(f"no ceiling {name!r}; there are {', '.join(CEILINGS)}")
        ceiling = self._ceilings.get(name)
        return ceiling and ceiling.rate()


@dataclass(frozen=True)
class Record:
    """One run of the benchmark on one GPU. The attributes are those of the module's description.

    Examples
    --------
    >>> record = load_named("nvidia-h200")  # doctest: +SKIP
    >>> record.shape("star").row("register_blocked").time_ms("sustained")  # doctest: +SKIP
    >>> record.ceilings.fp32_fma  # FLOP/s  # doctest: +SKIP
    >>> [point.value for point in record.growth["batch"]]  # doctest: +SKIP
    """

    gpu: GPU
    software: Software
    date: str
    seed: int
    seconds: float
    parts: tuple[str, ...]
    meaning: Mapping[str, str] = field(default_factory=dict)
    ceilings: Ceilings = field(default_factory=Ceilings)
    shapes: tuple[Shape, ...] = ()
    growth: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """Return what was measured on the problem of that name.

        Raises
        ------
        KeyError
            If it was not measured.
        """
        return _named("shape", name, self.shapes)

    def share_of_fma(self, shape: str, row: str, how: How = "cold") -> float | None:
        """Return a row's effective FLOP/s over the FP32 FMA rate; 1 is the ceiling.

        It can be larger for a method that needs fewer multiply-adds than the definition, or that
        uses other units. None if one of the two was not measured.
        """
        tflops, ceiling = self.shape(shape).tflops(row, how), self.ceilings.get("fp32_fma")
        return 1e12 * tflops / ceiling.rate(how) if tflops and ceiling else None


def _named(what: str, name: str, items: Sequence[_T], of: str = "") -> _T:
    for item in items:
        if item.name == name:
            return item
    known = ", ".join(repr(item.name) for item in items) or "none"
    raise KeyError(f"no {what} {name!r}{of}; there are: {known}")


# ---- Reading, with every check -------------------------------------------------------------------


class Node:
    """A JSON value with its place in the file; its methods check it and return it.

    Every kind of record is read with it, so that all say in the same words what is wrong.
    """

    def __init__(self, value: Any, place: str, file: str) -> None:
        self.value = value
        self.place = place
        self.file = file

    def wrong(self, right: str) -> RecordError:
        """Make the error: the file, the field, its value and what would be right."""
        shown = json.dumps(self.value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return RecordError(f"{self.file}: {self.place or 'the file'} = {shown}: must be {right}")

    def fields(self, *names: str) -> list[Node]:
        """Return the values of an object that has these fields and no others."""
        members = self.members()
        for name in names:
            if name not in members:
                raise RecordError(f"{self.file}: {self._at(name)} is missing: it must be there")
        for name in members:
            if name not in names:
                raise RecordError(
                    f"{self.file}: {self._at(name)} is no field of this schema: it must be "
                    f"one of {', '.join(names)}"
                )
        return [members[name] for name in names]

    def members(self) -> dict[str, Node]:
        """Return the values of an object by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {k: Node(v, self._at(k), self.file) for k, v in self.value.items()}

    def items(self) -> list[Node]:
        """Return the values of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Node(v, f"{self.place}[{i}]", self.file) for i, v in enumerate(self.value)]

    def optional(self, read: Callable[[Node], _T]) -> _T | None:
        """Return null as None, and anything else as `read` reads it."""
        return None if self.value is None else read(self)

    def text(self) -> str:
        """Return a text that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("a text that is not empty")
        return self.value

    def choice(self, *options: str) -> str:
        """Return a text that is one of `options`."""
        if self.value not in options:
            raise self.wrong("one of " + ", ".join(json.dumps(option) for option in options))
        return self.value

    def boolean(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def integer(self, lowest: int) -> int:
        """Return an integer of at least `lowest`."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < lowest:
            raise self.wrong(f"an integer of at least {lowest}")
        return self.value

    def number(self, lowest: float = 0.0) -> float:
        """Return a finite number of at least `lowest`."""
        if not self._is_number() or self.value < lowest:
            raise self.wrong(f"a finite number of at least {lowest:g}")
        return float(self.value)

    def positive(self) -> float:
        """Return a finite number above 0."""
        if not self._is_number() or self.value <= 0:
            raise self.wrong("a finite number above 0")
        return float(self.value)

    def error(self) -> float:
        """Return a finite number of at least 0, or what ``"inf"`` stands for."""
        if self.value == "inf":
            return math.inf
        if not self._is_number() or self.value < 0:
            raise self.wrong('a finite number of at least 0, or "inf"')
        return float(self.value)

    def _is_number(self) -> bool:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) <= sys.float_info.max  # an integer may have any number of digits

    def _at(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def from_json(value: Any, file: str = "record") -> Record:
    """Check a parsed JSON value and make a record of it.

    Parameters
    ----------
    value
        What ``json.load`` gives.
    file
        What to call it in messages.

    Returns
    -------
    Record

    Raises
    ------
    RecordError
        If it is not as the schema says; it names the file, the field, its value and what would be
        right.
    """
    root = Node(value, "", file)
    require_schema(root, SCHEMA)
    (_, what, gpu, software, day, seed, seconds, parts, meaning, ceilings, shapes, growth) = (
        root.fields(
            *("schema", "what", "gpu", "software", "date", "seed", "seconds", "parts"),
            *("meaning", "ceilings", "shapes", "growth"),
        )
    )
    what.text()
    chosen = tuple(part.choice(*PARTS) for part in parts.items())
    record = Record(
        gpu=read_gpu(gpu),
        software=read_software(software),
        date=read_day(day),
        seed=seed.integer(0),
        seconds=seconds.number(),
        parts=chosen,
        meaning={name: node.text() for name, node in meaning.members().items()},
        ceilings=Ceilings(
            {name: node.optional(_ceiling(name)) for name, node in _known(ceilings, CEILINGS)}
        ),
        shapes=tuple(_shape(node) for node in shapes.items()),
        growth={name: _curve(name, node) for name, node in _known(growth, AXES)},
    )
    require_different(shapes, [shape.name for shape in record.shapes], "name")
    for part, node in zip(PARTS, (ceilings, shapes, growth), strict=True):
        if node.value and part not in chosen:
            raise node.wrong(f"empty, because parts does not name {part}")
    return record


def require_schema(root: Node, schema: int) -> None:
    """Refuse a file of another version than `schema`."""
    version = root.members().get("schema")
    if version is None:
        raise RecordError(f"{root.file}: schema is missing: it must be {schema}")
    if version.value != schema or isinstance(version.value, bool):
        raise version.wrong(f"{schema}, the version that this package reads")


def _known(node: Node, names: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Node]]:
    members = node.members()
    for name, member in members.items():
        if name not in names:
            raise RecordError(
                f"{node.file}: {member.place} is unknown: it must be one of {', '.join(names)}"
            )
    return list(members.items())


def require_different(node: Node, names: Sequence[str], what: str) -> None:
    """Refuse a list in which a name occurs twice; `what` is the field that has it."""
    for index, name in enumerate(names):
        if name in names[:index]:
            again = Node(name, f"{node.place}[{index}].{what}", node.file)
            raise again.wrong("another than those before it")


def read_day(node: Node) -> str:
    """Return a date, ``YYYY-MM-DD``."""
    try:
        if date.fromisoformat(node.text()).isoformat() == node.value:
            return node.value
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
    raise node.wrong("a date in the form YYYY-MM-DD")


def read_gpu(node: Node) -> GPU:
    """Return a description of a GPU."""
    name, capability, sms, memory, l2, power, clock, driver = node.fields(*GPU.__dataclass_fields__)
    version = [part.integer(0) for part in capability.items()]
    if len(version) != 2:
        raise capability.wrong("a list of two integers, such as [9, 0]")
    return GPU(
        name=name.text(),
        compute_capability=(version[0], version[1]),
        multiprocessors=sms.integer(1),
        memory_bytes=memory.integer(1),
        l2_bytes=l2.integer(0),
        power_limit_watts=power.optional(Node.positive),
        max_sm_clock_mhz=clock.optional(Node.positive),
        driver=driver.optional(Node.text),
    )


def read_software(node: Node) -> Software:
    """Return versions."""
    return Software(*(version.text() for version in node.fields(*Software.__dataclass_fields__)))


def _ceiling(name: str) -> Callable[[Node], Ceiling]:
    def read(node: Node) -> Ceiling:
        work, unit, cold, sustained = node.fields("work", "unit", "cold", "sustained")
        return Ceiling(
            work=work.integer(1),
            unit=unit.choice(CEILINGS[name]),
            cold=_timing(cold),
            sustained=_sustained(sustained),
        )

    return read


def _timing(node: Node) -> Timing:
    median, samples = node.fields("median_seconds", "samples_seconds")
    timing = Timing(tuple(sample.positive() for sample in samples.items()))
    if not timing.samples:
        raise samples.wrong("a list of at least one time")
    if not math.isclose(median.positive(), timing.median, rel_tol=1e-6):
        raise median.wrong(f"the median of samples_seconds, {timing.median:g}")
    return timing


def _sustained(node: Node) -> Sustained:
    seconds, runs, enqueue, samples, clock, power, temperature = node.fields(
        *("seconds", "runs", "enqueue_seconds"),
        *("samples", "sm_clock_mhz", "power_watts", "temperature_c"),
    )
    load = Load(
        samples=samples.integer(0),
        sm_clock_mhz=clock.optional(Node.number),
        power_watts=power.optional(Node.number),
        temperature_c=temperature.optional(Node.number),
    )
    return Sustained(seconds.positive(), runs.integer(1), enqueue.number(), load)


def read_problem(node: Node) -> Problem:
    """Return a problem, all of whose arguments must be there."""
    fields = tuple(Problem.__dataclass_fields__)
    node.fields(*fields)
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in node.value.items()
    }
    try:
        return Problem(**arguments)
    except (ProblemError, TypeError) as error:
        raise RecordError(f"{node.file}: {node.place}: {error}") from None


def _rows(node: Node) -> tuple[Row, ...]:
    rows = tuple(_row(item) for item in node.items())
    require_different(node, [row.name for row in rows], "name")
    return rows


def _shape(node: Node) -> Shape:
    name, problem, rows = node.fields("name", "problem", "rows")
    return Shape(name.text(), read_problem(problem), _rows(rows))


def _curve(axis: str, node: Node) -> tuple[Point, ...]:
    points: list[Point] = []
    for item in node.items():
        value, problem, rows = item.fields("value", "problem", "rows")
        lowest = points[-1].value + 1 if points else 1
        number = value.integer(lowest)
        points.append(Point(point_name(axis, number), read_problem(problem), _rows(rows), number))
    return tuple(points)


def point_name(axis: str, value: int) -> str:
    """Return what a point of a curve is called: its axis and value."""
    return f"{axis} {value}"


def _row(node: Node) -> Row:
    (name, kind, dtype, layout, tf32, status, failure, errors, cold, sustained, peak) = node.fields(
        *Row.__dataclass_fields__
    )
    row = Row(
        name=name.text(),
        kind=kind.choice("stage", "pytorch"),
        dtype=dtype.choice("float32", "float16"),
        memory_format=layout.choice("contiguous", "channels_last"),
        allow_tf32=tf32.optional(Node.boolean),
        status=status.choice("ok", "wrong", "failed"),
        failure=failure.optional(Node.text),
        errors=errors.optional(read_errors),
        cold=cold.optional(_timing),
        sustained=sustained.optional(_sustained),
        peak_bytes=peak.optional(lambda n: n.integer(0)),
    )
    if row.kind == "pytorch":
        form = PYTORCH_ROWS.get(row.name)
        if form is None:
            raise name.wrong("one of " + ", ".join(PYTORCH_ROWS) + ", as kind is pytorch")
        if (row.dtype, row.memory_format, row.allow_tf32) != form:
            raise name.wrong(
                f"that of dtype {row.dtype}, memory_format {row.memory_format} and "
                f"allow_tf32 {json.dumps(row.allow_tf32)}"
            )
    if (row.failure is not None) != (row.status == "failed"):
        raise failure.wrong("a text if status is failed, else null")
    if row.errors is None and row.status != "failed":
        raise errors.wrong(f"an object, as status is {row.status}")
    if row.kind == "stage" and row.errors and row.status != "failed":
        passed = row.errors.condition <= row.errors.gate
        if passed != (row.status == "ok"):
            raise status.wrong(
                f"{'ok' if passed else 'wrong'}, as errors.condition is "
                f"{'at most' if passed else 'above'} errors.gate"
            )
    for timing, what in ((row.cold, cold), (row.sustained, sustained)):
        if timing is not None and row.status != "ok":
            raise what.wrong(f"null, as status is {row.status}")
    return row


def read_errors(node: Node) -> RowErrors:
    """Return how wrong a result is."""
    relative, condition, gate = node.fields(*RowErrors.__dataclass_fields__)
    return RowErrors(relative.error(), condition.error(), gate.positive())


# ---- Writing -------------------------------------------------------------------------------------


def to_json(record: Record) -> dict[str, Any]:
    """Return a record as what ``json.load`` would give, in the order of the schema."""
    value = {
        "schema": SCHEMA,
        "what": "times and errors of every stage and of PyTorch, and this GPU's ceilings",
        "gpu": asdict(record.gpu),
        "software": asdict(record.software),
        "date": record.date,
        "seed": record.seed,
        "seconds": rounded(record.seconds),
        "parts": list(record.parts),
        "meaning": dict(record.meaning),
        "ceilings": {
            name: ceiling
            and {
                "work": ceiling.work,
                "unit": ceiling.unit,
                "cold": _timing_json(ceiling.cold),
                "sustained": _sustained_json(ceiling.sustained),
            }
            for name, ceiling in record.ceilings.items()
        },
        "shapes": [{"name": shape.name, **_shape_json(shape)} for shape in record.shapes],
        "growth": {
            axis: [{"value": point.value, **_shape_json(point)} for point in points]
            for axis, points in record.growth.items()
        },
    }
    return json.loads(json.dumps(value, allow_nan=False))  # tuples are lists then


def _shape_json(shape: Shape) -> dict[str, Any]:
    return {"problem": asdict(shape.problem), "rows": [_row_json(row) for row in shape.rows]}


def _row_json(row: Row) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in Row.__dataclass_fields__},
        "errors": row.errors and {k: rounded(v) for k, v in asdict(row.errors).items()},
        "cold": row.cold and _timing_json(row.cold),
        "sustained": row.sustained and _sustained_json(row.sustained),
    }


def _timing_json(timing: Timing) -> dict[str, Any]:
    samples = [rounded(sample) for sample in timing.samples]
    return {"median_seconds": statistics.median(samples), "samples_seconds": samples}


def _sustained_json(sustained: Sustained) -> dict[str, Any]:
    load = {name: rounded(value, 5) for name, value in asdict(sustained.load).items()}
    return {
        "seconds": rounded(sustained.seconds),
        "runs": sustained.runs,
        "enqueue_seconds": rounded(sustained.enqueue_seconds),
        **load,
    }


def rounded(value: float | None, digits: int = 7) -> float | str | None:
    """Keep as many digits as a measurement has, so that the file stays small."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else "inf"


def save(record: Record, path: Path) -> None:
    """Write a record, all of it or nothing.

    Parameters
    ----------
    record
        What to write. It is checked as if it were read.
    path
        The file; its folder is made if need be. What is there is replaced.

    Raises
    ------
    RecordError
        If the record is not as the schema says; nothing is written then.
    OSError
        If it can't be written; what was there is as it was.
    """
    from_json(to_json(record), str(path))
    write_text(path, as_text(record))


def as_text(record: Record) -> str:
    """Return the text of a record's file; nothing is checked."""
    return text_of(to_json(record))


def text_of(value: Any) -> str:
    """Return a JSON value as text, as every record is written."""
    text = json.dumps(value, indent=1, allow_nan=False)
    # A list of numbers on one line: a run of twenty samples is not worth twenty lines.
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return text + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one beside it, so that no half of it is ever there.

    Raises
    ------
    OSError
        If it can't be written; what was there is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ---- Files ---------------------------------------------------------------------------------------


def load(path: Path | str) -> Record:
    """Read a record and check it.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Record

    Raises
    ------
    RecordError
        If the file is no JSON or not as the schema says.
    OSError
        If it can't be read.
    """
    return from_json(read_json(path), str(path))


def read_json(path: Path | str) -> Any:
    """Parse a JSON file.

    Raises
    ------
    RecordError
        If the file is no JSON.
    OSError
        If it can't be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
        raise RecordError(f"{path}: is no JSON: {error}") from None


def slug(gpu: str) -> str:
    """Return the name of a GPU's record: ``"NVIDIA H200"`` has ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def names(folder: Path = FOLDER) -> tuple[str, ...]:
    """Return the names of this module's records in `folder`, which also holds other kinds."""
    other = re.compile(
        r"architectures|.*-(accuracy|counters|decoder|distributed|history|neighbours|operator"
        r"|profiles|sanitizer|soak|tensor-cores)"
    )
    return tuple(sorted(p.stem for p in folder.glob("*.json") if not other.fullmatch(p.stem)))


def load_named(name: str, folder: Path = FOLDER) -> Record:
    """Read the record of a GPU by its name, such as ``nvidia-h200``.

    Raises
    ------
    RecordError
        If there is none of that name, or it is not as the schema says.
    """
    if name not in names(folder):
        known = ", ".join(map(repr, names(folder))) or "none"
        told = f"no record {name!r} in {folder}; there are: {known}"
        if not folder.is_dir():
            told += (
                " (records are in the project's repository, not in the package: install it from "
                "there with `pip install -e .`)"
            )
        raise RecordError(told)
    return load(folder / f"{name}.json")
