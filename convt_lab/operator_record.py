"""The operator's record: ours against PyTorch on the 44 shapes, one JSON file for each GPU.

``records/<gpu>-operator.json`` is written by `make bench` beside the ladder's record. The tables of
`convt_lab.measurements`, by which the operator chooses, are made from it. Reading checks
everything, as in `convt_lab.records`.

``records/<gpu>-neighbours.json`` is of the same form: further problems, measured for those tables
alone, without the operator itself.

The file (schema 1)
-------------------
All times are in seconds.

``schema``, ``what``, ``gpu``, ``software``, ``date``, ``seed``, ``seconds``, ``meaning``
    As in `convt_lab.records`.
``cases``
    A list. A case is a problem in one form:

    ``shape``, ``problem``
        A name, and the arguments of `Problem`.
    ``dtype``, ``memory_format``, ``allow_tf32``
        Of all tensors: ``float32`` or ``float16``, ``contiguous`` or ``channels_last``; and cuDNN's
        switch, true with float16, for which it says nothing. No two cases of a problem agree in
        all three.
    ``pytorch``, ``kernels``
        PyTorch's own operator; name -> each of our kernels that takes the case.
    ``operator``
        `convt_lab.conv_transpose2d`, or null where it was not measured.
    ``choice``
        What the operator chose: ``pytorch`` or a kernel's name; null with ``operator``.
    ``pytorch_beside``
        PyTorch's time in the rounds in which the operator was timed; null with ``operator``.

``pytorch``, each kernel and ``operator`` have

``status``, ``failure``
    ``ok``; ``wrong``, above the gate and not timed (what PyTorch computes is not gated); or
    ``failed``, and then what was raised (else null).
``errors``
    ``relative_l2``, ``condition`` and ``gate`` as in `convt_lab.records`, against float64 with the
    inputs as they are in that dtype. The gate is that of float32; of TF32 for what may round to it
    (PyTorch's own and the kernels that say so, where TF32 is allowed); and of rounding the result
    in float16. Null if it failed.
``cold``
    ``seconds``, the median of cold runs; ``runs``, their number; ``spread``, how far the median's
    95 % confidence interval reaches, over it. Null if it was not timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convt_lab import records
from convt_lab.measure import Timing
from convt_lab.problem import Problem
from convt_lab.records import GPU, Node, RowErrors, Software, Status

__all__ = [
    "FORMS",
    "PYTORCH",
    "SCHEMA",
    "Case",
    "Cold",
    "OperatorRecord",
    "Result",
    "as_text",
    "from_json",
    "load",
    "names",
    "save",
    "to_json",
]

#: The version of the schema that is written and read.
SCHEMA = 1

#: What a choice is called that leaves the work to PyTorch.
PYTORCH = "pytorch"

#: The forms in which each problem is measured: (dtype, memory format, allow_tf32).
FORMS = tuple(
    (dtype, memory_format, allow_tf32)
    for dtype, allow_tf32 in (("float32", False), ("float32", True), ("float16", True))
    for memory_format in ("contiguous", "channels_last")
)


@dataclass(frozen=True)
class Cold:
    """The median of cold runs, in seconds; their number; and how sure the median is."""

    seconds: float
    runs: int
    spread: float

    @classmethod
    def of(cls, timing: Timing) -> Cold:
        """Summarise a timing."""
        return cls(timing.median, len(timing.samples), timing.spread)


@dataclass(frozen=True)
class Result:
    """One implementation on one case. The attributes are those of the module's description."""

    status: Status = "ok"
    failure: str | None = None
    errors: RowErrors | None = None
    cold: Cold | None = None

    @property
    def seconds(self) -> float | None:
        """The median of cold runs; None if it was not timed."""
        return self.cold and self.cold.seconds


@dataclass(frozen=True)
class Case:
    """A problem in one form. The attributes are those of the module's description."""

    shape: str
    problem: Problem
    dtype: str
    memory_format: str
    allow_tf32: bool
    pytorch: Result
    kernels: Mapping[str, Result] = field(default_factory=dict)
    operator: Result | None = None
    choice: str | None = None
    pytorch_beside: Cold | None = None

    @property
    def form(self) -> tuple[str, str, bool]:
        """Dtype, memory format and whether TF32 is allowed: one of `FORMS`."""
        return self.dtype, self.memory_format, self.allow_tf32

    @property
    def speedup(self) -> float | None:
        """How many times as fast as PyTorch the operator is; None if one was not timed."""
        own = self.operator and self.operator.seconds
        return self.pytorch_beside.seconds / own if own and self.pytorch_beside else None

    @property
    def best(self) -> str | None:
        """The fastest of PyTorch and the kernels that are right; None if nothing was timed."""
        seconds = {PYTORCH: self.pytorch.seconds}
        seconds |= {name: result.seconds for name, result in self.kernels.items()}
        timed = {name: value for name, value in seconds.items() if value is not None}
        return min(timed, key=timed.__getitem__, default=None)


@dataclass(frozen=True)
class OperatorRecord:
    """One run on one GPU. The attributes are those of the module's description.

    Examples
    --------
    >>> record = load("records/nvidia-h200-operator.json")  # doctest: +SKIP
    >>> record.geometric_mean(("float32", "contiguous", False))  # doctest: +SKIP
    """

    gpu: GPU
    software: Software
    date: str
    seed: int
    seconds: float
    meaning: Mapping[str, str] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()

    def of_form(self, form: tuple[str, str, bool]) -> tuple[Case, ...]:
        """Return the cases of one of `FORMS`, in the order of the measurement."""
        return tuple(case for case in self.cases if case.form == form)

    def geometric_mean(self, form: tuple[str, str, bool]) -> float | None:
        """Return the geometric mean of a form's speedups over PyTorch; None if there are none."""
        speedups = [case.speedup for case in self.of_form(form) if case.speedup]
        if not speedups:
            return None
        return math.exp(math.fsum(map(math.log, speedups)) / len(speedups))

    def worst(self, form: tuple[str, str, bool]) -> Case | None:
        """Return the case of a form in which the operator is slowest against PyTorch."""
        timed = [case for case in self.of_form(form) if case.speedup]
        return min(timed, key=lambda case: case.speedup, default=None)


# ---- Reading, with every check -------------------------------------------------------------------


def from_json(value: Any, file: str = "record") -> OperatorRecord:
    """Check a parsed JSON value and make a record of it.

    Parameters
    ----------
    value
        What ``json.load`` gives.
    file
        What to call it in messages.

    Raises
    ------
    RecordError
        If it is not as the schema says; it names the file, the field, its value and what would be
        right.
    """
    root = Node(value, "", file)
    records.require_schema(root, SCHEMA)
    _, what, gpu, software, day, seed, seconds, meaning, cases = root.fields(
        *("schema", "what", "gpu", "software", "date", "seed", "seconds", "meaning", "cases")
    )
    what.text()
    record = OperatorRecord(
        gpu=records.read_gpu(gpu),
        software=records.read_software(software),
        date=records.read_day(day),
        seed=seed.integer(0),
        seconds=seconds.number(),
        meaning={name: node.text() for name, node in meaning.members().items()},
        cases=tuple(_case(node) for node in cases.items()),
    )
    keys = [f"{case.shape}, {' '.join(map(str, case.form))}" for case in record.cases]
    records.require_different(cases, keys, "shape and form")
    return record


def _case(node: Node) -> Case:
    (shape, problem, dtype, layout, tf32, pytorch, kernels, operator, choice, beside) = node.fields(
        *Case.__dataclass_fields__
    )
    results = {name: _result(member) for name, member in kernels.members().items()}
    if PYTORCH in results:
        raise kernels.wrong(f"without {PYTORCH}, which has a field of its own")
    chosen = choice.optional(lambda n: n.choice(PYTORCH, *results))
    case = Case(
        shape=shape.text(),
        problem=records.read_problem(problem),
        dtype=dtype.choice("float32", "float16"),
        memory_format=layout.choice("contiguous", "channels_last"),
        allow_tf32=tf32.boolean(),
        pytorch=_result(pytorch, is_gated=False),
        kernels=results,
        operator=operator.optional(lambda n: _result(n, is_gated=chosen != PYTORCH)),
        choice=chosen,
        pytorch_beside=beside.optional(_cold),
    )
    if case.form not in FORMS:
        raise tf32.wrong(f"true, as dtype is {case.dtype}")
    for value, other in ((case.choice, choice), (case.pytorch_beside, beside)):
        if (value is None) != (case.operator is None):
            raise other.wrong("null if operator is null, and only then")
    return case


def _result(node: Node, is_gated: bool = True) -> Result:
    status, failure, errors, cold = node.fields(*Result.__dataclass_fields__)
    result = Result(
        status=status.choice("ok", "wrong", "failed"),
        failure=failure.optional(Node.text),
        errors=errors.optional(records.read_errors),
        cold=cold.optional(_cold),
    )
    if (result.failure is not None) != (result.status == "failed"):
        raise failure.wrong("a text if status is failed, else null")
    if result.errors is None and result.status != "failed":
        raise errors.wrong(f"an object, as status is {result.status}")
    if result.errors and result.status != "failed":
        passed = not is_gated or result.errors.condition <= result.errors.gate
        if passed != (result.status == "ok"):
            raise status.wrong(
                "ok" if passed else "wrong, as errors.condition is above errors.gate"
            )
    if result.cold is not None and result.status != "ok":
        raise cold.wrong(f"null, as status is {result.status}")
    return result


def _cold(node: Node) -> Cold:
    seconds, runs, spread = node.fields(*Cold.__dataclass_fields__)
    return Cold(seconds.positive(), runs.integer(1), spread.number())


# ---- Writing -------------------------------------------------------------------------------------


def to_json(record: OperatorRecord) -> dict[str, Any]:
    """Return a record as what ``json.load`` would give, in the order of the schema."""
    return {
        "schema": SCHEMA,
        "what": "times and errors of conv_transpose2d, of each kernel that it may choose, and of "
        "PyTorch's own",
        "gpu": {**asdict(record.gpu), "compute_capability": list(record.gpu.compute_capability)},
        "software": asdict(record.software),
        "date": record.date,
        "seed": record.seed,
        "seconds": records.rounded(record.seconds),
        "meaning": dict(record.meaning),
        "cases": [_case_json(case) for case in record.cases],
    }


def _case_json(case: Case) -> dict[str, Any]:
    problem = asdict(case.problem)
    return {
        **{name: getattr(case, name) for name in Case.__dataclass_fields__},
        "problem": {k: list(v) if isinstance(v, tuple) else v for k, v in problem.items()},
        "pytorch": _result_json(case.pytorch),
        "kernels": {name: _result_json(result) for name, result in case.kernels.items()},
        "operator": case.operator and _result_json(case.operator),
        "pytorch_beside": case.pytorch_beside and _rounded(case.pytorch_beside),
    }


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "status": result.status,
        "failure": result.failure,
        "errors": result.errors and _rounded(result.errors),
        "cold": result.cold and _rounded(result.cold),
    }


def _rounded(value: Any) -> dict[str, Any]:
    return {name: records.rounded(number, 6) for name, number in asdict(value).items()}


def as_text(record: OperatorRecord) -> str:
    """Return the text of a record's file; nothing is checked."""
    return records.text_of(to_json(record))


def save(record: OperatorRecord, path: Path) -> None:
    """Write a record, all of it or nothing, after it was checked as if it were read.

    Raises
    ------
    RecordError
        If the record is not as the schema says; nothing is written then.
    OSError
        If it can't be written; what was there is as it was.
    """
    from_json(to_json(record), str(path))
    records.write_text(path, as_text(record))


def load(path: Path | str) -> OperatorRecord:
    """Read a record and check it.

    Raises
    ------
    RecordError
        If the file is no JSON or not as the schema says.
    OSError
        If it can't be read.
    """
    return from_json(records.read_json(path), str(path))


def names(folder: Path | None = None, what: str = "operator") -> Sequence[str]:
    """Return the names of the records in a folder, that of the repository if None.

    Parameters
    ----------
    folder
        Where they are.
    what
        ``operator`` or ``neighbours``, with which a name ends.
    """
    return sorted(p.stem for p in (folder or records.FOLDER).glob(f"*-{what}.json"))
