"""The part ``operator`` of `make bench`: the operator against PyTorch's own, on the 44 shapes.

Each shape is measured in each form of `operator_record.FORMS`: first PyTorch's own against every
kernel of ours that takes the case; then, with the choice that follows from these times, the
operator itself against PyTorch's own, because that is what its users get. How, is told by
`convt_lab.measure` and `convt_lab.tasks`; what a record holds, by `convt_lab.operator_record`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from convt_lab import dispatch, measurements, records
from convt_lab.bench import Instruments, Step, converted, drawn
from convt_lab.columns import aligned
from convt_lab.ladder import Exact, exact, judge, poisoned
from convt_lab.measure import FEWEST_RUNS, Timing
from convt_lab.neighbours import NEIGHBOURS
from convt_lab.operator import conv_transpose2d
from convt_lab.operator_record import FORMS, PYTORCH, Case, Cold, OperatorRecord, Result
from convt_lab.problem import Problem
from convt_lab.records import Node, RowErrors
from convt_lab.reference import tf32_gate
from convt_lab.stages import kernels
from convt_lab.tasks import Task, TaskClock, cold_times, cudnn_at_its_best, with_best_choice

__all__ = ["FILE", "Subjects", "measure_shape", "problems", "shapes", "tables", "wrong"]

#: The shapes that are measured.
FILE = Path(__file__).parent / "data" / "shapes.json"

#: What the operator may not be slower than, as a multiple of PyTorch's speed.
FLOOR = 0.97

# What is so much slower than PyTorch is timed by a few runs: it is never chosen.
_HOPELESS = 1.5

_MOST_CHOICES = 2  # of cuDNN: a shape has six forms
_HALF_GATE = 2.0**13  # units of 2^-24: half a unit in the last place of a float16

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@functools.cache
def shapes() -> Mapping[str, Problem]:
    """Return the shapes of ``data/shapes.json`` by name, in their order.

    Raises
    ------
    RecordError
        If the file is not as it should be.
    """
    found = {}
    for node in Node(records.read_json(FILE), "", str(FILE)).items():
        members = node.members()
        for name in ("name", "source"):
            if name not in members:
                raise node.wrong(f"an object with {name}")
        name = members["name"].text()
        arguments = {k: v for k, v in node.value.items() if k not in ("name", "source")}
        value = {**arguments, "bias": False}
        found[name] = records.read_problem(Node(value, node.place, str(FILE)))
    return found


def problems(part: str) -> Mapping[str, Problem]:
    """Return the problems of a part by name: ``operator`` or ``neighbours``."""
    return shapes() if part == "operator" else NEIGHBOURS


@dataclass(frozen=True)
class Subjects:
    """What is measured.

    Attributes
    ----------
    kernels
        Gives our kernels, by name, that take a problem in a dtype and memory format, with or
        without TF32.
    operator
        Called as ``torch.nn.functional.conv_transpose2d`` is; None to measure the kernels alone.
    explain
        Says what the operator would choose for the same arguments.
    """

    kernels: Callable[..., Mapping[str, Callable[..., torch.Tensor]]] = dispatch.candidates
    operator: Callable[..., torch.Tensor] | None = conv_transpose2d
    explain: Callable[..., dispatch.Choice] = dispatch.explain


def measure_shape(
    name: str,
    problem: Problem,
    gpu: records.GPU,
    software: records.Software,
    tools: Instruments,
    seed: int = 0,
    subjects: Subjects | None = None,
    with_operator: bool = True,
    on_step: Step = lambda what: None,
) -> Iterator[Case]:
    """Measure a shape in every form.

    Parameters
    ----------
    name
        Of the shape.
    problem
        The shape.
    gpu, software
        What it is measured on and with.
    tools
        What measures.
    seed
        Of the random inputs.
    subjects
        What is measured; the package's own if None.
    with_operator
        Whether to measure the operator too, and not only what it may choose.
    on_step
        Told what is done next.

    Yields
    ------
    Case
        One for each of `FORMS`, in that order.
    """
    subjects = subjects or Subjects()
    if not with_operator:
        subjects = replace(subjects, operator=None)
    single = drawn(problem, seed, tools.device)
    images = sorted({0, problem.batch - 1})
    for dtype in dict.fromkeys(form[0] for form in FORMS):
        on_step(f"{dtype}: float64")
        x, weight, bias = converted(single, dtype, "contiguous")
        truth = exact(x[images], weight, bias, **problem.arguments)
        for form in FORMS:
            if form[0] == dtype:
                inputs = converted((x, weight, bias), *form[:2])
                one = _One(problem, form, inputs, truth, images, tools, subjects)
                step = partial(_prefixed, on_step, " ".join([*form[:2], *["TF32"] * form[2]]))
                yield _measure(name, one, gpu, software, step)
                del inputs, one
        del truth, x, weight, bias


def _prefixed(on_step: Step, prefix: str, what: str) -> None:
    on_step(f"{prefix}: {what}")


@dataclass(frozen=True)
class _One:
    """A problem in one form, with all that is needed to measure it."""

    problem: Problem
    form: tuple[str, str, bool]
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    truth: Exact
    images: Sequence[int]
    tools: Instruments
    subjects: Subjects

    def task(self, name: str, function: Callable[..., torch.Tensor]) -> Task:
        call = partial(function, *self.inputs, **self.problem.arguments)
        return Task(name, call, partial(cudnn_at_its_best, self.form[2]))

    def judged(self, task: Task, is_ours: bool, rounds: bool = True) -> Result:
        """Run a task once and compare the result with float64.

        One of ours that never `rounds` to TF32 is held to float32's gate, whatever is allowed.
        """
        try:
            with poisoned() if is_ours else nullcontext():
                output = task.run(task)
            errors = judge(output[list(self.images)], self.truth)
            has_nan = output.isnan().any().item()
        except Exception as error:
            return _failed(error)
        condition = math.inf if has_nan else errors.condition
        relative = math.inf if has_nan else errors.relative_l2
        gate = _gate(self.problem, self.form, errors.gate, rounds)
        wrong = is_ours and not condition <= gate
        return Result("wrong" if wrong else "ok", errors=RowErrors(relative, condition, gate))


def _gate(
    problem: Problem, form: tuple[str, str, bool], float32_gate: float, rounds: bool
) -> float:
    dtype, _, allow_tf32 = form
    if dtype == "float16":
        return float32_gate + _HALF_GATE
    if not (allow_tf32 and rounds):
        return float32_gate
    taps = problem.kernel_size[0] * problem.kernel_size[1]
    return tf32_gate(problem.in_channels // problem.groups * taps)


def _rounds(kernel: Callable | None) -> bool:
    """Whether it may round float32 to TF32: PyTorch's own may, ours if they say so."""
    return kernel is None or getattr(kernel, "precision", "float32") == "tf32"


def _failed(error: Exception) -> Result:
    """Return the result of what raised; a traceback would keep the tensors alive."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return Result("failed", failure=message[:500])


def _measure(
    name: str, one: _One, gpu: records.GPU, software: records.Software, on_step: Step
) -> Case:
    case = Case(name, one.problem, *one.form, pytorch=Result("failed", "it was not run"))
    on_step("PyTorch chooses")
    pytorch = one.task(PYTORCH, F.conv_transpose2d)
    tools = one.tools
    try:
        choices = min(tools.choices, _MOST_CHOICES)
        pytorch = with_best_choice(pytorch, tools.clock, tools.device, choices)
    except RuntimeError as error:
        return replace(case, pytorch=_failed(error))
    try:
        results, tasks = _judge_all(one, pytorch, on_step)
        if len(results) > 1 or one.subjects.operator is None:
            _time(tasks, results, one, on_step)
        case = replace(case, pytorch=results.pop(PYTORCH), kernels=results)
        is_timed = case.pytorch.cold is not None
        is_alone = not results and case.pytorch.status == "ok"
        if one.subjects.operator is None or not (is_timed or is_alone):
            return case
        case = _with_operator(case, one, pytorch, gpu, software, on_step)
        if is_timed:
            return case
        # There was nothing to compare it with but the operator.
        return replace(case, pytorch=replace(case.pytorch, cold=case.pytorch_beside))
    finally:
        if pytorch.thread:
            pytorch.thread.close()


def _judge_all(
    one: _One, pytorch: Task, on_step: Step
) -> tuple[dict[str, Result], dict[str, Task]]:
    dtype, memory_format, tf32 = one.form
    kernels = one.subjects.kernels(
        one.problem, _DTYPES[dtype], memory_format == "channels_last", tf32=tf32
    )
    tasks = {PYTORCH: pytorch, **{n: one.task(n, kernel) for n, kernel in kernels.items()}}
    results = {}
    for task in tasks.values():
        on_step(f"judging {task.name}")
        rounds = _rounds(kernels.get(task.name))
        results[task.name] = one.judged(task, is_ours=task is not pytorch, rounds=rounds)
    return results, {n: task for n, task in tasks.items() if results[n].status == "ok"}


def _time(tasks: dict[str, Task], results: dict[str, Result], one: _One, on_step: Step) -> None:
    """Time tasks against each other, and write their times into `results`."""

    def fails(name: str, error: Exception) -> None:
        results[name] = _failed(error)

    def on_run(name: str) -> None:
        on_step(f"cold {name}")

    hopeless = _hopeless(tasks, one.tools, fails)
    hopeful = {n: task for n, task in tasks.items() if n not in hopeless}
    timings: dict[str, Timing] = {}
    timings |= cold_times(hopeful, one.tools.clock, on_run, fails)
    timings |= cold_times(hopeless, one.tools.clock, on_run, fails, FEWEST_RUNS)
    for name, timing in timings.items():
        results[name] = replace(results[name], cold=Cold.of(timing))


def _hopeless(
    tasks: dict[str, Task], tools: Instruments, fails: Callable[[str, Exception], None]
) -> dict[str, Task]:
    """Find what is far slower than PyTorch by one run of each; what fails is taken out."""
    clock, seconds = TaskClock(tools.clock), {}
    for name, task in list(tasks.items()):
        try:
            seconds[name] = clock.time(task)
        except RuntimeError as error:
            fails(name, error)
            del tasks[name]
    limit = _HOPELESS * seconds.get(PYTORCH, math.inf)
    return {name: tasks[name] for name, value in seconds.items() if value > limit}


def _with_operator(
    case: Case,
    one: _One,
    pytorch: Task,
    gpu: records.GPU,
    software: records.Software,
    on_step: Step,
) -> Case:
    """Measure the operator with the choice that follows from the case's own times."""
    alone = OperatorRecord(gpu, software, "2000-01-01", 0, 0.0, cases=(case,))
    with dispatch.only_by(measurements.table_of(alone)):
        on_step("judging the operator")
        # In PyTorch's thread: there cuDNN has made the choice that PyTorch was timed with.
        task = replace(one.task("operator", one.subjects.operator), thread=pytorch.thread)
        with task.settings():
            explained = one.subjects.explain(*one.inputs, **one.problem.arguments)
        is_ours = explained.kernel != PYTORCH
        rounds = _rounds(kernels[explained.kernel]) if explained.kernel in kernels else True
        result = one.judged(task, is_ours, rounds)
        results = {"operator": result, PYTORCH: case.pytorch}
        if result.status == "ok":
            failures: dict[str, Exception] = {}
            timings = cold_times(
                {PYTORCH: pytorch, "operator": task},
                one.tools.clock,
                lambda name: on_step(f"operator: cold {name}"),
                failures.__setitem__,
            )
            for name, timing in timings.items():
                results[name] = replace(results[name], cold=Cold.of(timing))
            for name, error in failures.items():
                results[name] = _failed(error)
    return replace(
        case,
        operator=results["operator"],
        choice=explained.kernel,
        pytorch_beside=results[PYTORCH].cold or case.pytorch.cold,
    )


def meaning() -> dict[str, str]:
    """Return what the numbers of a record stand for, in words."""
    return {
        "cold": "median of single runs by CUDA events, the L2 cache flushed before each, after "
        "warm-ups, in interleaved rounds with what it is compared with; as many runs as bring the "
        "median's 95 % confidence interval within 1 %, between 20 and 200 (fewer of what takes "
        "longer than 50 ms or half as long again as PyTorch)",
        "pytorch": "torch.nn.functional.conv_transpose2d with torch.backends.cudnn.benchmark=True "
        "and benchmark_limit=0; the fastest of cuDNN's choices in several threads",
        "operator": "convt_lab.conv_transpose2d, choosing by the case's own times, against "
        "pytorch_beside; where it leaves the work to PyTorch, with the same choice of cuDNN's",
        "channels_last": "input and weight both",
        "errors": "of the first and the last image; that no other output is NaN is seen to",
    }


# ---- What there is to say ------------------------------------------------------------------------


def wrong(record: OperatorRecord) -> list[str]:
    """Return what of ours was wrong or failed, in words."""
    found = []
    for case in record.cases:
        ours = dict(case.kernels) | ({"operator": case.operator} if case.operator else {})
        for name, result in ours.items():
            if result.status != "ok":
                detail = f" ({result.failure})" if result.failure else ""
                found.append(f"{name} on {case.shape}, {_form_name(case.form)}{detail}")
    return found


def _form_name(form: tuple[str, str, bool]) -> str:
    dtype, memory_format, allow_tf32 = form
    kind = "TF32" if dtype == "float32" and allow_tf32 else dtype
    return kind if memory_format == "contiguous" else f"{kind} last"


def tables(record: OperatorRecord) -> str:
    """Return a record as text: a line for each shape, a column for each form, and what follows.

    A cell is PyTorch's time over the operator's, and what the operator chose.
    """
    lines: list[list[str]] = [["shape", "PyTorch", *map(_form_name, FORMS)]]
    by_shape: dict[str, dict[Any, Case]] = {}
    for case in record.cases:
        by_shape.setdefault(case.shape, {})[case.form] = case
    for name, cases in by_shape.items():
        first = cases.get(FORMS[0])
        seconds = first and first.pytorch.seconds
        own = "-" if not seconds else f"{1000 * seconds:.4g} ms"
        lines.append([name, own, *(_cell(cases.get(form)) for form in FORMS)])
    summary = [["", "geometric mean", "worst", "", f"below {FLOOR:g}"]]
    for form in FORMS:
        cases = [case for case in record.of_form(form) if case.speedup]
        if not cases:
            continue
        worst, mean = record.worst(form), record.geometric_mean(form)
        below = sum(1 for case in cases if case.speedup < FLOOR)
        summary.append(
            [_form_name(form), f"{mean:.3f}", f"{worst.speedup:.3f}", worst.shape, f"{below}"]
        )
    grouped = [
        case for case in record.cases if case.problem.groups > 1 and case.speedup is not None
    ]
    text = (
        "PyTorch's time over the operator's, and the kernel where it is not PyTorch's own\n"
        f"{aligned(lines, left=(0, *range(2, 2 + len(FORMS))))}\n\n{aligned(summary, left=(0, 3))}"
    )
    if grouped:
        least = min(grouped, key=lambda case: case.speedup)
        text += (
            f"\n\ngroups and depthwise: at least {least.speedup:.2f} times as fast "
            f"({least.shape}, {_form_name(least.form)})"
        )
    return text


def _cell(case: Case | None) -> str:
    if case is None or case.operator is None:
        return "-"
    if case.speedup is None:
        return case.operator.status.upper()
    return f"{case.speedup:.2f}" + ("" if case.choice == PYTORCH else f" {case.choice}")
