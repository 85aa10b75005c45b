"""What the dispatch knows: how long PyTorch and our kernels took on problems that were measured.

The package ships it as ``data/dispatch.json``, which is made from the records of the repository
(``python -m convt_lab dispatch``, and `make bench` at its end), because an installed package has no
records. Reading checks everything, as in `convt_lab.records`.

The file (schema 1)
-------------------
``schema``, ``what``
    1; what the file holds, in a sentence.
``tables``
    A list, one table for each GPU model:

    ``gpu``, ``compute_capability``
        Its name, and such as ``[9, 0]``.
    ``software``, ``date``
        As in `convt_lab.records`.
    ``measurements``
        A list of ``problem`` (the arguments of `Problem`); ``dtype``; ``channels_last``; ``tf32``,
        whether PyTorch was allowed TF32 (false for all dtypes but float32); ``pytorch``, its
        seconds; and ``kernels``, name -> seconds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convt_lab import operator_record, records
from convt_lab.operator_record import OperatorRecord
from convt_lab.problem import Problem
from convt_lab.records import Node, Record, Software

if TYPE_CHECKING:
    from convt_lab.decoder_record import DecoderRecord

__all__ = [
    "FILE",
    "SCHEMA",
    "Measurement",
    "Table",
    "as_text",
    "from_json",
    "load",
    "save",
    "table_of",
    "tables_of_records",
    "without",
]

#: The version of the schema that is written and read.
SCHEMA = 1

#: The tables that the package ships.
FILE = Path(__file__).parent / "data" / "dispatch.json"

#: Dtypes that were measured, as they are called in files.
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Measurement:
    """One problem in one form: seconds of PyTorch's operator, and of each kernel of ours.

    Attributes
    ----------
    problem
        The shapes.
    dtype
        Such as ``float32``.
    channels_last
        Whether the output lies in memory as [N, H, W, C].
    tf32
        Whether PyTorch was allowed TF32; False for all dtypes but float32.
    pytorch
        Seconds of PyTorch's own.
    kernels
        Name -> seconds, of those kernels of ours that take it.
    """

    problem: Problem
    dtype: str
    channels_last: bool
    tf32: bool
    pytorch: float
    kernels: Mapping[str, float]

    @property
    def form(self) -> tuple[str, bool, bool]:
        """Dtype, memory format and TF32."""
        return self.dtype, self.channels_last, self.tf32

    @property
    def key(self) -> tuple[Problem, tuple[str, bool, bool]]:
        """What it is a measurement of; that there is a bias makes no difference worth noting."""
        return without_bias(self.problem), self.form

    def ratio(self, kernel: str) -> float:
        """Return how many times as fast as PyTorch a kernel is; 1 for ``pytorch`` itself."""
        return self.pytorch / self.seconds(kernel)

    def seconds(self, kernel: str) -> float:
        """Return the seconds of a kernel, or of ``pytorch``."""
        return self.pytorch if kernel == operator_record.PYTORCH else self.kernels[kernel]

    def best(self, among: Collection[str] | None = None) -> str:
        """Return the fastest of PyTorch and the kernels in `among` (all if None)."""
        names = [name for name in self.kernels if among is None or name in among]
        return min([operator_record.PYTORCH, *names], key=self.seconds)


@dataclass(frozen=True)
class Table:
    """What was measured on one GPU model. The attributes are those of the module's description."""

    gpu: str
    compute_capability: tuple[int, int]
    software: Software
    date: str
    measurements: tuple[Measurement, ...] = ()


def without_bias(problem: Problem) -> Problem:
    """Return the same problem without a bias."""
    return replace(problem, bias=False) if problem.bias else problem


def without(tables: Iterable[Table], problems: Collection[Problem]) -> tuple[Table, ...]:
    """Return the tables as if some problems had not been measured."""
    left_out = set(map(without_bias, problems))
    return tuple(
        replace(
            table,
            measurements=tuple(m for m in table.measurements if m.problem not in left_out),
        )
        for table in tables
    )


# ---- From the records ----------------------------------------------------------------------------


def table_of(
    *found: OperatorRecord,
    ladder: Record | None = None,
    decoder: DecoderRecord | None = None,
    leave_out: Collection[str] = (),
) -> Table:
    """Make the table of one GPU model.

    Parameters
    ----------
    found
        The operator's record, and its neighbours'. What several hold is taken from the first.
    ladder
        The ladder's record: its shapes and curves are further float32 problems. There must be at
        least one record.
    decoder
        A network's record, in which each of its layers was measured by itself.
    leave_out
        Kernels that are never chosen.

    Returns
    -------
    Table
    """
    measured: dict[Any, Measurement] = {}
    for measurement in (
        *(m for record in found for m in _of_operator(record)),
        *_of_ladder(ladder),
        *_of_decoder(decoder),
    ):
        kernels = {n: s for n, s in measurement.kernels.items() if n not in leave_out}
        measured.setdefault(measurement.key, replace(measurement, kernels=kernels))
    source = found[0] if found else ladder
    capability = source.gpu.compute_capability
    return Table(
        source.gpu.name, capability, source.software, source.date, tuple(measured.values())
    )


def _of_operator(record: OperatorRecord) -> Iterable[Measurement]:
    for case in record.cases:
        if case.pytorch.seconds is None:
            continue
        kernels = {name: r.seconds for name, r in case.kernels.items() if r.seconds is not None}
        yield Measurement(
            problem=without_bias(case.problem),
            dtype=case.dtype,
            channels_last=case.memory_format == "channels_last",
            tf32=case.dtype == "float32" and case.allow_tf32,
            pytorch=case.pytorch.seconds,
            kernels=kernels,
        )


def _of_ladder(record: Record | None) -> Iterable[Measurement]:
    if record is None:
        return
    curves = [point for points in record.growth.values() for point in points]
    for shape in (*record.shapes, *curves):
        seconds = {row.name: row.seconds() for row in shape.rows if row.seconds() is not None}
        kernels = {row.name: seconds.get(row.name) for row in shape.rows if row.kind == "stage"}
        kernels = {name: value for name, value in kernels.items() if value is not None}
        for pytorch, tf32 in ((records.BASELINE, False), ("cudnn_tf32", True)):
            if pytorch in seconds and kernels:
                problem = without_bias(shape.problem)
                yield Measurement(problem, "float32", False, tf32, seconds[pytorch], kernels)


def _of_decoder(record: DecoderRecord | None) -> Iterable[Measurement]:
    for mode in record.modes if record else ():
        for layer in mode.alone.values():
            kernels = dict(layer.seconds)
            yield Measurement(
                problem=without_bias(layer.problem),
                dtype=mode.dtype,
                channels_last=mode.memory_format == "channels_last",
                tf32=mode.dtype == "float32" and mode.allow_tf32,
                pytorch=kernels.pop(operator_record.PYTORCH),
                kernels=kernels,
            )


def tables_of_records(folder: Path | None = None, leave_out: Collection[str] = ()) -> list[Table]:
    """Make a table of each GPU that has records in a folder, the repository's if None.

    Raises
    ------
    RecordError
        If a record is not as its schema says.
    """
    # Whoever only looks a table up does not need torch's profiler.
    from convt_lab import decoder_record

    folder = folder or records.FOLDER
    ladders = {name: records.load(folder / f"{name}.json") for name in records.names(folder)}
    others: dict[str, list[OperatorRecord]] = {}
    for what in ("operator", "neighbours"):
        for name in operator_record.names(folder, what):
            record = operator_record.load(folder / f"{name}.json")
            others.setdefault(name.removesuffix(f"-{what}"), []).append(record)
    return [
        table_of(
            *others.get(name, ()),
            ladder=ladders.get(name),
            decoder=decoder_record.find(f"{name}-decoder", folder),
            leave_out=leave_out,
        )
        for name in sorted({*ladders, *others})
    ]


# ---- The file ------------------------------------------------------------------------------------


def from_json(value: Any, file: str = "dispatch.json") -> tuple[Table, ...]:
    """Check a parsed JSON value and make tables of it.

    Raises
    ------
    RecordError
        If it is not as the schema says; it names the file, the field, its value and what would be
        right.
    """
    root = Node(value, "", file)
    records.require_schema(root, SCHEMA)
    _, what, tables = root.fields("schema", "what", "tables")
    what.text()
    result = tuple(_table(node) for node in tables.items())
    records.require_different(tables, [table.gpu for table in result], "gpu")
    return result


def _table(node: Node) -> Table:
    gpu, capability, software, day, measurements = node.fields(*Table.__dataclass_fields__)
    version = [part.integer(0) for part in capability.items()]
    if len(version) != 2:
        raise capability.wrong("a list of two integers, such as [9, 0]")
    return Table(
        gpu=gpu.text(),
        compute_capability=(version[0], version[1]),
        software=records.read_software(software),
        date=records.read_day(day),
        measurements=tuple(read_measurement(item) for item in measurements.items()),
    )


def read_measurement(node: Node) -> Measurement:
    """Return a measurement, every field of which must be there."""
    problem, dtype, channels_last, tf32, pytorch, kernels = node.fields(
        *Measurement.__dataclass_fields__
    )
    measurement = Measurement(
        problem=records.read_problem(problem),
        dtype=dtype.choice(*DTYPES),
        channels_last=channels_last.boolean(),
        tf32=tf32.boolean(),
        pytorch=pytorch.positive(),
        kernels={name: member.positive() for name, member in kernels.members().items()},
    )
    if measurement.tf32 and measurement.dtype != "float32":
        raise tf32.wrong(f"false, as dtype is {measurement.dtype}")
    return measurement


def measurement_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as what ``json.load`` would give."""
    value = {
        **{name: getattr(measurement, name) for name in Measurement.__dataclass_fields__},
        "problem": asdict(measurement.problem),
        "pytorch": records.rounded(measurement.pytorch, 5),
        "kernels": {name: records.rounded(s, 5) for name, s in measurement.kernels.items()},
    }
    return json.loads(json.dumps(value, allow_nan=False))  # tuples are lists then


def as_text(tables: Iterable[Table]) -> str:
    """Return the text of a file, one line for each measurement; nothing is checked."""
    blocks = []
    for table in tables:
        head = {
            "gpu": table.gpu,
            "compute_capability": list(table.compute_capability),
            "software": asdict(table.software),
            "date": table.date,
        }
        lines = [json.dumps(measurement_json(m), allow_nan=False) for m in table.measurements]
        measured = ",\n".join(lines)
        blocks.append(f'{json.dumps(head)[:-1]}, "measurements": [\n{measured}\n]}}')
    what = "seconds of PyTorch's conv_transpose2d and of convt_lab's kernels, to choose by"
    body = ",\n".join(blocks)
    return f'{{"schema": {SCHEMA}, "what": {json.dumps(what)}, "tables": [\n{body}\n]}}\n'


def save(tables: Iterable[Table], path: Path) -> None:
    """Write tables, all of them or nothing, after they were checked as if they were read.

    Raises
    ------
    RecordError
        If they are not as the schema says; nothing is written then.
    OSError
        If the file can't be written; what was there is as it was.
    """
    text = as_text(tables)
    from_json(json.loads(text), str(path))
    records.write_text(path, text)


def load(path: Path = FILE) -> tuple[Table, ...]:
    """Read tables and check them.

    Raises
    ------
    RecordError
        If the file is no JSON or not as the schema says.
    OSError
        If it can't be read.
    """
    return from_json(records.read_json(path), str(path))
