"""Exercises that are answered in CUDA C++: a stage's file, changed, or a kernel of one's own.

An answer is compiled for the simulator and traced on several small problems. A launch that runs for
ever ends at a limit of steps, and one that leaves its buffers is stopped. What was computed is
judged against float64, then the hazards, and, if all of that is in order, the counters of the last
problem against the exercise's budgets. A GPU is asked only after the simulator has found nothing.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from convt_lab import figures, reference
from convt_lab.build import BuildError, python
from convt_lab.errors import CompileError, KernelError
from convt_lab.exercises.exercise import Exercise, Result, Source, edited, first_wrong
from convt_lab.problem import Problem
from convt_lab.program import Program, backend_named
from convt_lab.program import compile as compile_source
from convt_lab.simulator.report import Hazard, Report, Site
from convt_lab.simulator.tracing import step_limit
from convt_lab.simulator.translate import mask_comments_and_strings
from convt_lab.stages import Call, Stage, stages

__all__ = ["Budget", "KernelExercise", "Launch", "StageExercise"]

#: Iterations of loops that a traced launch may take: many times what any exercise needs.
MAX_STEPS = 20_000_000

#: Seconds that the launchers may take for all problems, in a process of their own.
HOST_SECONDS = 30.0

#: Hazards that are told at once.
MAX_HAZARDS = 3

#: Characters of the learner's line that a message quotes.
QUOTED = 80


@dataclass(frozen=True)
class Budget:
    """A bound for a counter of the simulator.

    Attributes
    ----------
    quantity
        One of the names in `_QUANTITIES`.
    most, least
        The bounds, or None.
    space, op
        Which accesses, for a quantity that is of accesses.
    buffer
        Of one buffer alone: the parameter's name in the starting text.
    """

    quantity: str
    most: float | None = None
    least: float | None = None
    space: str = "global"
    op: str = "load"
    buffer: str | None = None

    def judge(self, report: Report, names: Mapping[str, str]) -> tuple[bool, str, int]:
        """Compare with a report; `names` are the answer's own, of the starting text's parameters.

        Returns
        -------
        tuple of bool, str and int
            Whether it is met, the sentence, and the line that costs most, or 0.
        """
        of, value_of = _QUANTITIES[self.quantity]
        buffer = names.get(self.buffer or "", self.buffer)
        sites = [
            s
            for s in report.sites
            if (s.space, s.op) == (self.space, self.op) and buffer in (None, s.buffer)
        ]
        value = value_of(sites, report)
        line = max(sites, key=lambda s: (s.cost, s.requests)).line if of and sites else 0
        met = (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )
        bounds = [
            f"at {word} {_number(bound)}"
            for word, bound in (("least", self.least), ("most", self.most))
            if bound is not None
        ]
        if self.least == self.most:
            bounds = [f"exactly {_number(self.most)}"]
        subject = f"{self.op}s of {buffer!r}: " if buffer else f"{self.space} {self.op}s: "
        sentence = (
            f"{subject if of else ''}{' and '.join(bounds)} {self.quantity}; "
            f"yours: {_number(value)}" + (f", line {line}" if line else "")
        )
        return met, sentence, line


def _number(value: float) -> str:
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def _total(name: str) -> Callable[[Sequence[Site], Report], float]:
    return lambda sites, report: sum(getattr(site, name) for site in sites)


def _per_request(name: str) -> Callable[[Sequence[Site], Report], float]:
    def value(sites: Sequence[Site], report: Report) -> float:
        requests = sum(site.requests for site in sites)
        return sum(getattr(site, name) for site in sites) / requests if requests else 0.0

    return value


def _fmas_per_load(sites: Sequence[Site], report: Report) -> float:
    """Divide by the loads of single lanes, as a thread counts them."""
    lanes = sum(site.active_lanes for site in sites)
    return report.fma / lanes if lanes else math.inf


# Of each: whether it is of accesses, and how it is counted.
_QUANTITIES: dict[str, tuple[bool, Callable[[Sequence[Site], Report], float]]] = {
    "sectors per request": (True, _per_request("sectors")),
    "wavefronts per request": (True, _per_request("wavefronts")),
    "requests": (True, _total("requests")),
    "FMAs per load": (True, _fmas_per_load),
    "FMAs": (False, lambda sites, report: report.fma),
    "multiply-adds of tensor cores": (False, lambda sites, report: report.tensor_fma),
    "iterations of loops": (False, lambda sites, report: report.steps),
}


@dataclass(frozen=True)
class _Run:
    """One small problem for an answer.

    `trace` returns the output and the report, `on_gpu` the output; `output` is what the output is
    called.
    """

    label: str
    exact: np.ndarray
    allowed: np.ndarray  # the absolute error that a right answer may have
    output: str
    trace: Callable[[], tuple[np.ndarray, Report]]
    on_gpu: Callable[[], np.ndarray]
    forgives: frozenset[str] = frozenset()  # buffers that may be read before they are written


@dataclass(frozen=True, kw_only=True)
class _CudaExercise(Exercise):
    """What both kinds share.

    Attributes
    ----------
    edits
        The solution as changes of the starting text.
    whole
        The solution as a text of its own, where it has little in common with the start.
    budgets
        For the counters of the last problem.
    min_capability
        The least compute capability of a GPU that has the instructions.
    """

    edits: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""
    budgets: tuple[Budget, ...] = ()
    min_capability: tuple[int, int] = (0, 0)

    @property
    def solution(self) -> str:
        """The solution's text."""
        return self.whole or edited(self.start, self.edits)

    def shown_solution(self) -> str:
        """Show a diff, without what is far from the changes, or the whole text."""
        if self.whole:
            return f"```cuda\n{self.whole.strip()}\n```"
        return _short_diff(self.start, self.solution)

    @abstractmethod
    def _whole_text(self, answer: str) -> str:
        """Complete what may be a part of the text."""

    @abstractmethod
    def _compile(self, text: str, backend: str) -> Any:
        """Compile; what it returns is handed to `_runs`."""

    @abstractmethod
    def _wrong_signature(self, compiled: Any, text: str) -> str | None:
        """Say how the answer can't be called, or None."""

    def _wrong_on_host(self, text: str) -> str | None:
        """Say what is wrong with the answer's own code for the CPU, or None."""
        return None

    @abstractmethod
    def _runs(self, compiled: Any) -> Iterator[_Run]:
        """Yield the problems."""

    @abstractmethod
    def _names(self, compiled: Any) -> Mapping[str, str]:
        """Return the answer's names of the starting text's parameters."""

    def check(self, answer: Any, backend: str) -> Result:
        """Compile the answer, run it, and judge values, hazards and counters."""
        if isinstance(answer, Mapping):
            try:
                answer = edited(self.start, answer)
            except ValueError as error:
                return self.failed(f"A change of the starting text does not fit: {error}")
        if not isinstance(answer, str):
            return self.failed(
                f"This exercise takes CUDA C++ as a str, or a dict of changes "
                f"{{old: new}} of the starting text; this is of type {type(answer).__name__}."
            )
        note = ["This is the starting text, unchanged."] if answer == self.start else []
        try:
            text = self._whole_text(answer)
            compiled = self._compile(text, "simulator")
        except ValueError as error:
            return self.failed(*note, str(error))
        except CompileError as error:
            return self.failed(*note, *_compiler_says(error, answer))
        if wrong := self._wrong_signature(compiled, text) or self._wrong_on_host(text):
            return self.failed(*note, wrong)

        reports = []
        for run in self._runs(compiled):
            wrong, report = _judge_run(run, answer)
            if wrong:
                return self.failed(*note, *wrong, report=report)
            reports.append(report)
        lines = [f"right values on {len(reports)} problems, no hazards"]
        met = True
        for budget in self.budgets:
            is_met, sentence, line = budget.judge(reports[-1], self._names(compiled))
            lines.append(sentence)
            if not is_met:
                met = False
                lines += _quoted(answer, line)
        if not met:
            return self.failed(*note, *lines, report=reports[-1])
        if backend_named(backend).name == "gpu":
            if (
                torch.cuda.is_available()
                and torch.cuda.get_device_capability() < self.min_capability
            ):
                needs = ".".join(map(str, self.min_capability))
                lines.append(f"not run on this GPU: it takes compute capability {needs}")
            elif (wrong := self._check_on_gpu(text)) is not None:
                return self.failed(wrong, report=reports[-1])
            else:
                lines.append("right values on the GPU, too")
        return self.passed(*lines, report=reports[-1])

    def _check_on_gpu(self, text: str) -> str | None:
        """Run it on the GPU too; what is wrong there, or None."""
        try:
            for run in self._runs(self._compile(text, "gpu")):
                if wrong := _first_wrong(run, run.on_gpu()):
                    return f"Right on the simulator, but on the GPU, {run.label}:\n{wrong}"
        except BuildError:  # not the answer's fault
            raise
        except RuntimeError as error:
            return f"Right on the simulator, but not on the GPU: {error}"
        return None


def _judge_run(run: _Run, answer: str) -> tuple[list[str], Report | None]:
    """Return what is wrong, and the report; nothing if the run is in order."""
    try:
        with step_limit(MAX_STEPS):
            y, report = run.trace()
    except (TypeError, ValueError) as error:
        return [f"The check can't call it: {error}"], None
    except KernelError as error:
        hazards = error.report.hazards if isinstance(error.report, Report) else ()
        lines = [f"With {run.label}, {error}."]
        if "more steps" in str(error):
            lines = [
                f"With {run.label}, the launch has not come to an end after {MAX_STEPS:,} "
                "iterations of its loops: one of them runs for ever."
            ]
        return lines + _told(hazards, answer), error.report
    wrong = _first_wrong(run, y)
    hazards = [
        h
        for h in report.hazards
        if not (h.kind == "uninitialised_read" and h.buffer in run.forgives)
    ]
    if wrong or hazards:
        lines = [f"With {run.label}:", wrong] if wrong else [f"With {run.label}, right values, but"]
        return lines + _told(hazards, answer), report
    return [], report


def _first_wrong(run: _Run, y: np.ndarray) -> str | None:
    """Tell the first output that is not right, or None."""
    text = first_wrong(y, run.exact, run.allowed, run.output)
    if text and " is nan and" in text:
        text += " (NaN: the output is full of it before the launch, and so is shared memory)"
    return text


def _told(hazards: Sequence[Hazard], answer: str) -> list[str]:
    lines = []
    for hazard in hazards[:MAX_HAZARDS]:
        lines.append(f"{hazard.kind} in line {hazard.line}: {hazard.message}")
        lines += _quoted(answer, hazard.line)
    if len(hazards) > MAX_HAZARDS:
        lines.append(f"and {len(hazards) - MAX_HAZARDS} more")
    return lines


def _quoted(text: str, line: int) -> list[str]:
    lines = text.splitlines()
    return [f"    {_cut(lines[line - 1].strip())}"] if 1 <= line <= len(lines) else []


def _cut(line: str) -> str:
    """Return as much of a line as fits the page; the number before it says where the rest is."""
    return line if len(line) <= QUOTED else f"{line[: QUOTED - 2]} …"


def _compiler_says(error: CompileError, answer: str) -> list[str]:
    """Return the first complaint, with the learner's line."""
    complaints = [line for line in str(error).splitlines() if "error:" in line]
    of_line = [c for c in complaints if error.line and f":{error.line}:" in c]
    first = (of_line or complaints or [str(error)])[0]
    message = first.partition("error:")[2].strip() or first
    if error.line is None:
        return [f"The compiler refuses it: {message}"]
    return [f"The compiler refuses line {error.line}: {message}", *_quoted(answer, error.line)]


def _short_diff(before: str, after: str) -> str:
    """Return a diff in Markdown, with a few lines around each change."""
    listing = figures.diff(
        figures.Listing(before, "cuda", "start"), figures.Listing(after, "cuda", "solution")
    )
    lines = listing.text.splitlines()
    near = {
        j
        for i, line in enumerate(lines)
        if line.startswith(("+", "-"))
        for j in range(i - 2, i + 3)
    }
    shown, last = [], -1
    for i, line in enumerate(lines):
        if i in near:
            if i != last + 1:
                shown.append(" …")
            shown.append(line)
            last = i
    if last != len(lines) - 1:
        shown.append(" …")
    return "```diff\n" + "\n".join(shown) + "\n```"


# ---- A stage's file ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer(Stage):
    """A stage with another text."""

    text: str = ""

    @property
    def source(self) -> str:
        """The answer."""
        return self.text


# Lets the launchers run, and no kernel.
_TRY_LAUNCHERS = """
import pickle, sys
from convt_lab.exercises import cuda
stage, text, problems = pickle.load(sys.stdin.buffer)
print("the begin", end=" ", flush=True)
try:
    for problem in problems:
        cuda._Answer(stage, "", text=text).launches(problem)
except Exception:
    pass  # it is told when it runs
sys.stdout.write("the end")
"""


@dataclass(frozen=True, kw_only=True)
class StageExercise(_CudaExercise):
    """Change a stage's own file.

    Attributes
    ----------
    stage
        Its name.
    spoilt
        What is changed in the file to make the starting text.
    problems
        What the answer is run on.
    """

    stage: str
    spoilt: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...]

    @property
    def start(self) -> Source:
        """The stage's file, with the exercise's changes."""
        text = edited(stages[self.stage].source, self.spoilt)
        return Source(text, "cuda", f"{self.stage}.cu for {self.name}")

    def _whole_text(self, answer: str) -> str:
        if _declaration(answer, self.stage, "cudaError_t"):
            return answer
        if re.search(r'extern\s*"C"\s*cudaError_t', answer):
            raise ValueError(
                f"The answer has a launcher, and none that is called {self.stage!r}: that is the "
                "name by which it is called."
            )
        kernel = f"{self.stage}_kernel"
        if not re.search(rf"\b{kernel}\s*\(", mask_comments_and_strings(answer)):
            raise ValueError(
                f"The answer holds neither the launcher {self.stage!r} nor the kernel {kernel!r}: "
                "it must be the whole file, or the kernel alone."
            )
        # The kernel alone: it takes its place in the file, and keeps its own line numbers.
        old = figures.listing(self.start, kernel).text
        before, _, after = self.start.partition(old)
        line = (before + old).count("\n") + 2
        return (
            f'#line 1 "{self.stage}.cu"\n{before}\n#line 1 "kernel.cu"\n{answer}\n'
            f'#line {line} "{self.stage}.cu"\n{after.lstrip(chr(10))}'
        )

    def _compile(self, text: str, backend: str) -> _Answer:
        answer = _Answer(self.stage, "", text=text)
        answer.program(backend)
        return answer

    def _wrong_signature(self, compiled: _Answer, text: str) -> str | None:
        wanted = _declaration(self.start, self.stage, "cudaError_t")
        if _types(_declaration(text, self.stage, "cudaError_t")) != _types(wanted):
            return f"The launcher must keep its parameters: {self.stage}({wanted})."
        return None

    def _wrong_on_host(self, text: str) -> str | None:
        """Try launchers that are not the start's where they can be ended, and bring nothing down.

        On the simulator a launcher is code of this process: a loop in it that never ends could not
        be interrupted, and a crash would be ours.
        """
        kernel = f"{self.stage}_kernel"
        host, own = (t.replace(figures.listing(t, kernel).text, "") for t in (self.start, text))
        if host == own:
            return None
        try:
            done = subprocess.run(
                # As this process finds modules, and not what lies in the current folder.
                [python(), "-P", "-c", _TRY_LAUNCHERS],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                input=pickle.dumps((self.stage, str(text), self.problems)),
                capture_output=True,
                timeout=HOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return (
                f"The launcher {self.stage!r} has not come to an end after {HOST_SECONDS:g} "
                "seconds, with no kernel run: a loop in the code for the CPU runs for ever."
            )
        if not done.stdout.startswith(b"the begin"):
            said = done.stderr.decode(errors="replace").strip()
            raise BuildError(f"a new Python can't try the launcher: {said[-500:]}")
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            return f"The launcher {self.stage!r} crashes ({name}) before any kernel runs."
        if not done.stdout.endswith(b"the end"):
            return f"The launcher {self.stage!r} ends the whole process: it must return an error."
        return None

    def _names(self, compiled: _Answer) -> Mapping[str, str]:
        return {}

    def _runs(self, compiled: _Answer) -> Iterator[_Run]:
        for problem in self.problems:
            x, weight, bias = problem.random_inputs()
            arguments = problem.arguments
            exact = reference.scatter(x, weight, bias, **arguments)
            scale = reference.condition_scale(x, weight, bias, **arguments)

            def trace(x=x, weight=weight, bias=bias, arguments=arguments):
                call = Call(compiled, x, weight, bias, *arguments.values())
                program = compiled.program("simulator")
                report = program.call(call.launcher, *call.launcher_arguments, trace=True)
                return call.output.numpy(), report

            def on_gpu(x=x, weight=weight, bias=bias, arguments=arguments):
                tensors = (None if t is None else t.cuda() for t in (x, weight, bias))
                call = Call(compiled, *tensors, *arguments.values())
                call.output.fill_(float("nan"))
                compiled.program("gpu").call(call.launcher, *call.launcher_arguments)
                return call.output.cpu().numpy()

            allowed = reference.FLOAT32_GATE * reference.UNIT_ROUNDOFF * scale
            yield _Run(_described(problem), exact, allowed, "output", trace, on_gpu)


def _described(problem: Problem) -> str:
    """Name what is not as in the plainest problem."""
    plain = Problem()
    image = f"input {problem.height}×{problem.width}, kernel " + "×".join(
        map(str, problem.kernel_size)
    )
    rest = [
        f"{name}={value[0] if isinstance(value, tuple) and value[0] == value[1] else value}"
        for name in (
            *("batch", "in_channels", "out_channels", "stride", "padding"),
            *("output_padding", "dilation", "groups", "bias"),
        )
        if (value := getattr(problem, name)) != getattr(plain, name)
    ]
    return ", ".join([image, *rest])


def _declaration(text: str, name: str, kind: str) -> str | None:
    """Return the parameters of the definition of `name`, between its parentheses."""
    code = mask_comments_and_strings(text)
    match = re.search(rf"\b{kind}\b[^;{{}}]*?\b{name}\s*\(([^)]*)\)", code)
    return " ".join(match[1].split()) if match else None


def _types(parameters: str | None) -> list[str]:
    """Drop the names of parameters."""
    return [re.sub(r"\s*\w+\s*$", "", p).strip() for p in (parameters or "").split(",")]


def _kinds(parameters: str) -> list[str]:
    """Return the types of parameters without what a kernel may add or leave out."""
    return [re.sub(r"const|__restrict__|\s", "", kind) for kind in _types(parameters)]


# ---- A kernel of one's own ---------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch of the learner's kernel.

    Attributes
    ----------
    label
        What the problem is, for messages.
    grid, block
        As for `Program.launch`.
    args
        As for `Program.launch`; the output among them is NaN, or holds what it must begin with.
    output
        Its place among `args`.
    exact
        What the output must be, float64 and of its shape.
    scale
        The sum of the absolute values of each output's terms; None if the output must be exact.
    """

    label: str
    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    args: tuple[Any, ...]
    output: int
    exact: np.ndarray
    scale: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class KernelExercise(_CudaExercise):
    """Write or mend a kernel.

    Attributes
    ----------
    kernel
        Its name.
    text
        The starting text.
    launches
        Makes the launches, each with arrays of its own.
    """

    kernel: str
    text: str
    launches: Callable[[], Sequence[Launch]]

    @property
    def start(self) -> Source:
        """The starting text."""
        return Source(self.text.lstrip("\n"), "cuda", f"start of {self.name}")

    def _whole_text(self, answer: str) -> str:
        return answer

    def _compile(self, text: str, backend: str) -> Program:
        return compile_source(text, backend, name="exercise")

    def _wrong_signature(self, compiled: Program, text: str) -> str | None:
        if self.kernel not in compiled.kernels:
            found = ", ".join(map(repr, compiled.kernels)) or "none"
            return (
                f"The answer has no kernel {self.kernel!r} (a __global__ function that is no "
                f"template); it has {found}."
            )
        wanted = _declaration(self.start, self.kernel, "__global__")
        theirs = _declaration(text, self.kernel, "__global__")
        count = len(compiled.kernels[self.kernel].parameters)
        if count != len(wanted.split(",")) or (theirs and _kinds(theirs) != _kinds(wanted)):
            return f"The kernel must keep its parameters: {self.kernel}({wanted})."
        return None

    def _names(self, compiled: Program) -> Mapping[str, str]:
        wanted = _declaration(self.start, self.kernel, "__global__").split(",")
        ours = [re.search(r"(\w+)\s*$", p)[1] for p in wanted]
        theirs = [p.name for p in compiled.kernels[self.kernel].parameters]
        return dict(zip(ours, theirs, strict=True))

    def _runs(self, compiled: Program) -> Iterator[_Run]:
        for launch in self.launches():
            y = launch.args[launch.output]
            name = compiled.kernels[self.kernel].parameters[launch.output].name

            def start(trace: bool, launch=launch) -> Report | None:
                return compiled.launch(
                    self.kernel, launch.grid, launch.block, launch.args, trace=trace
                )

            allowed = np.zeros(launch.exact.shape)
            if launch.scale is not None:
                allowed = reference.FLOAT32_GATE * reference.UNIT_ROUNDOFF * launch.scale
            yield _Run(
                label=launch.label,
                exact=launch.exact,
                allowed=allowed,
                output=name,
                trace=lambda start=start, y=y: (start(True), y)[::-1],
                on_gpu=lambda start=start, y=y: (start(False), y)[1],
                forgives=frozenset() if np.isnan(y).all() else frozenset({name}),
            )
