"""What `make bench` measures on one GPU, in which order, and how it is shown and written.

Four parts: the GPU's ceilings; every stage that multiplies with FMA units and PyTorch's operator on
a set of shapes; how time and memory grow with the batch, the image, the channels and the kernel;
and the operator, with the other kernels, against PyTorch's own (`convt_lab.operator_bench`), which
has a record of its own. What a number means and how it is kept is told by `convt_lab.records`, how
it is timed by `convt_lab.measure`.

Nothing is timed that was not judged against float64 first. All that needs a GPU comes in through
`Instruments` and `Workload`, so that the order and the judging can be tried without one.
"""

from __future__ import annotations

import ctypes
import math
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tqdm import tqdm

from convt_lab import dispatch, measurements, operator_record, records
from convt_lab.backend import KERNEL_FOLDER, Array
from convt_lab.build import BuildError
from convt_lab.columns import aligned
from convt_lab.gpu import find_toolkit
from convt_lab.ladder import exact, judge, poisoned
from convt_lab.measure import (
    MOST_RUNS,
    NARROW,
    SUSTAINED_SECONDS,
    Clock,
    EventClock,
    Load,
    Sampler,
    Sustained,
    Timing,
    gpu_facts,
    median_times,
    sustained_time,
)
from convt_lab.problem import Problem, ProblemError
from convt_lab.program import BackendName
from convt_lab.program import compile as compile_source
from convt_lab.records import (
    BASELINE,
    CEILINGS,
    PYTORCH_ROWS,
    Ceiling,
    Ceilings,
    Point,
    Record,
    Row,
    RowErrors,
    Shape,
)
from convt_lab.stages import fma_stages
from convt_lab.tasks import Task, cold_times, cudnn_at_its_best, with_best_choice

__all__ = [
    "PARTS",
    "SHAPES",
    "Candidate",
    "Change",
    "Instruments",
    "Workload",
    "bench",
    "compare",
    "comparison",
    "converted",
    "drawn",
    "growth_candidates",
    "growth_problems",
    "measure_ceilings",
    "measure_problem",
    "pytorch_candidates",
    "stage_candidates",
    "tables",
]

#: What can be measured by itself, in the order of the measurement; all but the last belong to a
#: whole run.
PARTS = (*records.PARTS, "operator", "neighbours")

_OPERATOR_PARTS = ("operator", "neighbours")  # each has a record of its own

#: The problems of the part ``shapes``, in the order of the measurement.
SHAPES: Mapping[str, Problem] = MappingProxyType(
    {
        "star": Problem.named("star"),
        "classic": Problem.named("classic"),
        # Level 1 #65 of KernelBench until July 2025.
        "kernelbench_65_old": Problem(16, 32, 64, 128, 128, kernel_size=(3, 5)),
        "dcgan": Problem(128, 256, 128, 8, 8, kernel_size=4, stride=2, padding=1),
        "unet_up": Problem(4, 128, 64, 256, 256, kernel_size=2, stride=2),
        "few_channels": Problem(8, 3, 64, 512, 512, kernel_size=(3, 7)),
        "to_rgb": Problem(8, 64, 3, 512, 512, kernel_size=(3, 7)),
        "one_image": Problem(1, 32, 32, 64, 64, kernel_size=(3, 7)),
        "odd_sizes": Problem(7, 37, 53, 97, 131, kernel_size=(3, 7)),
        "wide_kernel": Problem(4, 64, 64, 256, 256, kernel_size=7, padding=3),
    }
)

#: What the curves of the part ``growth`` start from; each changes one thing.
_BASE = Problem(8, 32, 32, 128, 128, kernel_size=(3, 7))

_KERNELS = ((1, 1), (1, 3), (3, 3), (3, 5), (3, 7), (5, 5), (5, 9), (7, 7), (11, 11))

_MOST_CHOICES = 5  # how often cuDNN is asked to choose an algorithm, where that does not take long

_GEMM_SIDE = 8192
_COPY_BYTES = 2**30
_FMA_ROUNDS = 2000  # some 17 ms on an H200


@dataclass(frozen=True)
class Instruments:
    """What measures.

    Attributes
    ----------
    device
        Where the tensors are: ``"cuda"``.
    clock
        Times runs.
    sampler
        Reads the GPU's sensors meanwhile, or None.
    peak_bytes
        Runs a function that returns its output; returns the bytes that it allocated meanwhile
        beyond the output.
    choices
        How often cuDNN may choose its algorithm, of which the fastest counts; 0 to take what it
        chooses as it comes.
    """

    device: str
    clock: Clock
    sampler: Sampler | None
    peak_bytes: Callable[[Callable[[], object]], int]
    choices: int = 0


def _peak_bytes(function: Callable[[], object]) -> int:
    """Return what `function` allocates beyond its output, in bytes, by PyTorch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    output = function()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del output  # it was counted on both sides, as were the inputs
    return beyond


def _release(device: str) -> None:
    """Give cached memory back: cuDNN chooses among the algorithms whose workspace fits."""
    if device == "cuda":
        torch.cuda.empty_cache()


class Step(Protocol):
    """Told what is done next, for a progress bar."""

    def __call__(self, what: str) -> object:
        """Take note of `what`."""
        ...


def _silent(what: str) -> None:
    pass


# ---- Ceilings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Something whose rate is a ceiling.

    Attributes
    ----------
    name
        One of `records.CEILINGS`, which has the unit of the work.
    work
        Of one run.
    prepare
        Allocates what is needed; returns what runs it once.
    settings
        Makes the context to run in.
    """

    name: str
    work: int
    prepare: Callable[[], Callable[[], object]]
    settings: Callable[[], AbstractContextManager[object]] = nullcontext


#: Of kernels/fma_rate.cu: threads of a block, chains of a thread, steps of a round.
_FMA_THREADS, _FMA_CHAINS, _FMA_STEPS = 256, 16, 64


def fma_workload(
    multiprocessors: int,
    threads: int,
    rounds: int = _FMA_ROUNDS,
    backend: BackendName = "gpu",
    device: str = "cuda",
) -> Workload:
    """Return the micro-benchmark of kernels/fma_rate.cu, with all the threads that an SM takes.

    Parameters
    ----------
    multiprocessors
        SMs of the GPU.
    threads
        That an SM takes at a time.
    rounds
        Of a thread's loop.
    backend
        To compile for.
    device
        Where the result is.
    """
    source = (KERNEL_FOLDER / "fma_rate.cu").read_text()
    blocks = multiprocessors * max(1, threads // _FMA_THREADS)

    def prepare() -> Callable[[], object]:
        program = compile_source(source, backend, name="fma_rate")
        result = torch.zeros(blocks * _FMA_THREADS, device=device)
        array = Array.of("result", result, written=True)
        factor, addend = ctypes.c_float(0.5), ctypes.c_float(1.0)  # every chain tends to 2
        numbers = factor, addend, ctypes.c_int(rounds), ctypes.c_int(blocks)
        return partial(program.call, "fma_rate", array, *numbers)

    fmas = blocks * _FMA_THREADS * rounds * _FMA_STEPS * _FMA_CHAINS
    return Workload("fp32_fma", 2 * fmas, prepare)


def _copy_workload(l2_bytes: int, device: str = "cuda") -> Workload:
    size = max(_COPY_BYTES, 8 * l2_bytes)

    def prepare() -> Callable[[], object]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        return partial(torch.empty_like(source).copy_, source)

    return Workload("copy", 2 * size, prepare)


def _gemm_workload(
    name: str, dtype: torch.dtype, allow_tf32: bool, side: int = _GEMM_SIDE, device: str = "cuda"
) -> Workload:
    def prepare() -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (
            torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        out = torch.empty(side, side, dtype=dtype, device=device)
        return partial(torch.matmul, a, b, out=out)

    return Workload(name, 2 * side**3, prepare, partial(_matmul_tf32, allow_tf32))


@contextmanager
def _matmul_tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _workloads(properties: Any) -> dict[str, Workload | None]:
    """Return what gives each ceiling on the current GPU; None where it has no such units."""
    has_ampere_types = properties.major >= 8  # TF32 and bfloat16
    gemm = _gemm_workload
    found = {
        "fp32_fma": fma_workload(
            properties.multi_processor_count, properties.max_threads_per_multi_processor
        ),
        "copy": _copy_workload(properties.L2_cache_size),
        "gemm_float32": gemm("gemm_float32", torch.float32, allow_tf32=False),
        "gemm_tf32": gemm("gemm_tf32", torch.float32, allow_tf32=True),
        "gemm_float16": gemm("gemm_float16", torch.float16, allow_tf32=False),
        "gemm_bfloat16": gemm("gemm_bfloat16", torch.bfloat16, allow_tf32=False),
    }
    newer = ("gemm_tf32", "gemm_bfloat16")
    return {n: w if has_ampere_types or n not in newer else None for n, w in found.items()}


def measure_ceilings(
    workloads: Mapping[str, Workload | None], tools: Instruments, on_step: Step = _silent
) -> Iterator[tuple[str, Ceiling | None]]:
    """Measure rates, one after the other.

    Parameters
    ----------
    workloads
        By name; None for a ceiling that the GPU does not have.
    tools
        What measures.
    on_step
        Told each name.

    Yields
    ------
    (str, Ceiling or None)
        A name and its ceiling.
    """
    for name, workload in workloads.items():
        on_step(name)
        if workload is None:
            yield name, None
            continue
        with workload.settings():
            run = workload.prepare()
            cold = median_times({name: run}, tools.clock)[name]
            sustained = sustained_time(run, cold.median, tools.clock, tools.sampler)
        del run
        _release(tools.device)
        yield name, Ceiling(workload.work, CEILINGS[name], cold, sustained)


# ---- Stages and PyTorch on one problem -----------------------------------------------------------

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Candidate:
    """Something to judge and time: a row before it is measured.

    Attributes
    ----------
    row
        Its name, kind and settings; nothing measured.
    function
        Called as ``torch.nn.functional.conv_transpose2d`` is.
    """

    row: Row
    function: Callable[..., torch.Tensor]

    @property
    def form(self) -> tuple[str, str]:
        """The dtype and memory format of its inputs."""
        return self.row.dtype, self.row.memory_format

    def settings(self) -> AbstractContextManager[object]:
        """Return the context to run it in: PyTorch's switches; cuDNN takes its fastest."""
        if self.row.kind == "stage":
            return nullcontext()
        return cudnn_at_its_best(bool(self.row.allow_tf32))


def stage_candidates(names: Sequence[str] | None = None) -> list[Candidate]:
    """Return the stages called `names`; those that multiply with FMA units, in order, if None."""
    return [
        Candidate(Row(name, "stage", "float32", "contiguous", None, "ok"), fma_stages[name])
        for name in (fma_stages if names is None else names)
    ]


def pytorch_candidates(names: Sequence[str] = tuple(PYTORCH_ROWS)) -> list[Candidate]:
    """Return PyTorch's operator in the forms called `names`."""
    return [
        Candidate(Row(name, "pytorch", *PYTORCH_ROWS[name], "ok"), F.conv_transpose2d)
        for name in names
    ]


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def converted(inputs: _Inputs, dtype: str, memory_format: str) -> _Inputs:
    """Return x, weight and bias as ``float32`` or ``float16``, contiguous or channels last."""
    x, weight, bias = inputs
    form = dict(dtype=_DTYPES[dtype], memory_format=_FORMATS[memory_format])
    return x.to(**form), weight.to(**form), None if bias is None else bias.to(_DTYPES[dtype])


def measure_problem(
    problem: Problem,
    inputs: _Inputs,
    candidates: Sequence[Candidate],
    tools: Instruments,
    images: Sequence[int] | None = None,
    sustained: bool = True,
    on_step: Step = _silent,
) -> tuple[Row, ...]:
    """Judge every candidate, then time those that may be.

    Parameters
    ----------
    problem
        The shapes.
    inputs
        x [N, C_in, H, W], weight [C_in, C_out/groups, KH, KW] and bias, float32, on the device.
    candidates
        What to measure. A stage that is wrong is not timed; PyTorch is timed if it ran.
    tools
        What measures.
    images
        Which images to judge, where all would take too long (that no output is NaN is then seen to
        in the others). All if None.
    sustained
        Whether to time back to back too.
    on_step
        Told what is done next.

    Returns
    -------
    tuple of Row
        In the order of `candidates`.
    """
    with ExitStack() as open_threads:
        forms: dict[tuple[str, str], _Inputs] = {}
        tasks: dict[str, Task] = {}
        rows: dict[str, Row] = {}
        for candidate in candidates:
            name = candidate.row.name
            on_step(f"choosing {name}")
            rows[name] = candidate.row
            try:
                if candidate.form not in forms:
                    forms[candidate.form] = converted(inputs, *candidate.form)
                call = partial(candidate.function, *forms[candidate.form], **problem.arguments)
                tasks[name] = _task(candidate, call, tools)
            except Exception as error:
                rows[name] = _failed(candidate.row, error)
                continue
            if tasks[name].thread:
                open_threads.callback(tasks[name].thread.close)
        _release(tools.device)

        on_step("float64")
        x, weight, bias = inputs
        truth = exact(x if images is None else x[list(images)], weight, bias, **problem.arguments)
        for name, task in list(tasks.items()):
            on_step(f"judging {name}")
            try:
                rows[name] = _judged(rows[name], task, truth, images)
            except Exception as error:
                rows[name] = _failed(rows[name], error)
            if rows[name].status != "ok":
                del tasks[name]
        del truth
        _release(tools.device)

        for name, task in list(tasks.items()):
            on_step(f"memory of {name}")
            try:
                task.run(task)  # what cuDNN or a library allocates once
                peak_bytes = task.run(partial(tools.peak_bytes, task))
                rows[name] = replace(rows[name], peak_bytes=peak_bytes)
            except RuntimeError as error:
                rows[name] = _failed(rows[name], error)
                del tasks[name]

        def fails(name: str, error: Exception) -> None:
            rows[name] = _failed(rows[name], error)

        colds = cold_times(tasks, tools.clock, lambda name: on_step(f"cold {name}"), fails)
        for name, cold in colds.items():
            rows[name] = replace(rows[name], cold=cold)
            if not sustained:
                continue
            on_step(f"sustained {name}")
            try:
                rows[name] = replace(rows[name], sustained=_sustained(tasks[name], cold, tools))
            except RuntimeError as error:
                rows[name] = _failed(rows[name], error)
    return tuple(rows.values())


def _task(candidate: Candidate, call: Callable[[], torch.Tensor], tools: Instruments) -> Task:
    task = Task(candidate.row.name, call, candidate.settings)
    if candidate.row.kind != "pytorch":
        return task
    return with_best_choice(task, tools.clock, tools.device, tools.choices)


def _sustained(task: Task, cold: Timing, tools: Instruments) -> Sustained:
    with task.settings():
        work = partial(sustained_time, task.call, cold.median, tools.clock, tools.sampler)
        return task.run(work)


def _judged(row: Row, task: Task, exact_result: Any, images: Sequence[int] | None) -> Row:
    is_stage = row.kind == "stage"
    with poisoned() if is_stage else nullcontext():
        output = task.run(task)
    errors = judge(output if images is None else output[list(images)], exact_result)
    if images is not None and output.isnan().any().item():
        errors = replace(errors, relative_l2=math.inf, condition=math.inf)
    kept = RowErrors(errors.relative_l2, errors.condition, errors.gate)
    wrong = is_stage and not errors.is_right
    return replace(row, status="wrong" if wrong else "ok", errors=kept)


def _failed(row: Row, error: Exception) -> Row:
    """Return the row of what raised; a traceback would keep the tensors alive."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return replace(row, status="failed", failure=message[:500], cold=None, sustained=None)


# ---- Growth --------------------------------------------------------------------------------------


def growth_candidates(count: int = 3) -> list[Candidate]:
    """Return what the curves compare: the last stages, of which the fastest counts, and cuDNN.

    The stages compute in float32 and are compared with PyTorch in float32. An early stage is not
    worth its time here: the ladder is ordered by speed, nearly.

    Parameters
    ----------
    count
        How many stages, or all if there are fewer.
    """
    return stage_candidates(list(fma_stages)[-count:]) + pytorch_candidates((BASELINE,))


def growth_problems() -> dict[str, tuple[tuple[int, Problem], ...]]:
    """Return the points of each curve: the value on its axis, ascending, and the problem."""

    def doubling(first: int, last: int, *names: str) -> tuple[tuple[int, Problem], ...]:
        values = [first << i for i in range((last // first).bit_length())]
        return tuple((v, replace(_BASE, **dict.fromkeys(names, v))) for v in values)

    return {
        "batch": doubling(1, 64, "batch"),
        "side": doubling(32, 2048, "height", "width"),
        "channels": doubling(1, 256, "in_channels", "out_channels"),
        "kernel_area": tuple(
            (math.prod(kernel), replace(_BASE, kernel_size=kernel)) for kernel in _KERNELS
        ),
    }


def drawn(problem: Problem, seed: int, device: str) -> _Inputs:
    """Draw inputs as `Problem.random_inputs` does, but on the device: some are gigabytes."""
    generator = torch.Generator(device).manual_seed(seed)
    terms = problem.in_channels // problem.groups * math.prod(problem.kernel_size)
    x, weight = (
        torch.randn(shape, generator=generator, device=device)
        for shape in (problem.input_shape, problem.weight_shape)
    )
    return x, weight / math.sqrt(terms), None


# ---- The run -------------------------------------------------------------------------------------


@dataclass
class _Machine:
    """The GPU, and all that is measured with and on it."""

    gpu: records.GPU
    software: records.Software
    tools: Instruments
    workloads: Mapping[str, Workload | None]


@dataclass
class _Results:
    """What was measured so far."""

    ceilings: dict[str, Ceiling | None] = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=list)
    growth: dict[str, list[Point]] = field(default_factory=dict)
    operator: list[operator_record.Case] = field(default_factory=list)
    neighbours: list[operator_record.Case] = field(default_factory=list)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in records.PARTS if getattr(self, part))


def _measure(part: str, machine: _Machine, names: Sequence[str], seed: int, results: _Results):
    """Measure one part; what is finished is in `results` at any moment."""
    tools = machine.tools
    with _progress(part) as bar:

        def on_step(what: str, prefix: str = "") -> None:
            bar.set_postfix_str(f"{prefix}{what}")
            bar.update()

        if part == "ceilings":
            for name, ceiling in measure_ceilings(machine.workloads, tools, on_step):
                results.ceilings[name] = ceiling
        elif part == "shapes":
            candidates = stage_candidates() + pytorch_candidates()
            for name in names:
                problem = SHAPES[name]
                step = partial(on_step, prefix=f"{name}: ")
                with _room_for(name, tools.device):
                    draw = partial(problem.random_inputs, seed, tools.device)
                    rows = measure_problem(problem, draw(), candidates, tools, on_step=step)
                    results.shapes.append(Shape(name, problem, rows))
        elif part in _OPERATOR_PARTS:
            _measure_operator(part, machine, names, seed, getattr(results, part), on_step)
        else:
            for axis, points in growth_problems().items():
                results.growth[axis] = []
                for value, problem in points:
                    name = records.point_name(axis, value)
                    with _room_for(name, tools.device):
                        rows = measure_problem(
                            problem,
                            drawn(problem, seed, tools.device),
                            growth_candidates(),
                            tools,
                            images=sorted({0, problem.batch - 1}),
                            sustained=False,
                            on_step=partial(on_step, prefix=f"{name}: "),
                        )
                        results.growth[axis].append(Point(name, problem, rows, value))


def _measure_operator(
    part: str,
    machine: _Machine,
    names: Sequence[str],
    seed: int,
    cases: list[operator_record.Case],
    on_step: Step,
) -> None:
    from convt_lab import operator_bench  # which imports this module

    tools, known = machine.tools, operator_bench.problems(part)
    for name in names:
        arguments = name, known[name], machine.gpu, machine.software, tools, seed
        step = partial(_named_step, on_step, name)
        with _room_for(name, tools.device):
            cases.extend(
                operator_bench.measure_shape(
                    *arguments, with_operator=part == "operator", on_step=step
                )
            )


def _named_step(on_step: Step, name: str, what: str) -> None:
    on_step(f"{name}: {what}")


@contextmanager
def _room_for(name: str, device: str) -> Iterator[None]:
    """Leave out a problem that the GPU's memory does not hold, and say so."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{name} is left out: it does not fit in the GPU's memory", file=sys.stderr)
    _release(device)


def _progress(what: str) -> tqdm:
    """Return a progress bar on stderr, which is quiet where that is no terminal."""
    return tqdm(desc=what, disable=None, leave=False, file=sys.stderr)


@contextmanager
def _current_gpu() -> Iterator[_Machine]:
    """Describe the current CUDA device, and read its sensors as long as the context lasts."""
    import convt_lab

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = str(getattr(properties, "uuid", "")) or None
    uuid = uuid if uuid is None or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    facts = gpu_facts(["power.limit", "clocks.max.sm", "driver_version"], uuid)
    power, clock, driver = facts.values()
    version = torch.backends.cudnn.version() or 0
    with Sampler(uuid) as sampler:
        yield _Machine(
            gpu=records.GPU(
                name=properties.name,
                compute_capability=(properties.major, properties.minor),
                multiprocessors=properties.multi_processor_count,
                memory_bytes=properties.total_memory,
                l2_bytes=properties.L2_cache_size,
                power_limit_watts=_positive(power),
                max_sm_clock_mhz=_positive(clock),
                driver=driver,
            ),
            software=records.Software(
                convt_lab=convt_lab.__version__,
                torch=torch.__version__,
                cuda=torch.version.cuda or "none",
                cudnn=f"{version // 10000}.{version // 100 % 100}.{version % 100}",
            ),
            tools=Instruments("cuda", EventClock(), sampler, _peak_bytes, _MOST_CHOICES),
            workloads=_workloads(properties),
        )


def _positive(text: str | None) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _meaning(machine: _Machine) -> dict[str, str]:
    sampler = machine.tools.sampler
    power = sampler.power_field if sampler else "nothing"
    return {
        "cold": "median of single runs by CUDA events, the L2 cache flushed before each, after "
        "warm-ups, in interleaved rounds with the problem's other rows; fewer runs of what takes "
        "longer than 50 ms, and more of what varies, until the median's 95 % confidence interval "
        f"is within {100 * NARROW:g} %, {MOST_RUNS} at most",
        "sustained": f"one run's share of at least {SUSTAINED_SECONDS:g} s back to back by CUDA "
        "events, nothing flushed",
        "enqueue_seconds": "what Python takes to enqueue one run; where it is about as long as the "
        "run, the GPU waited for it",
        "sensors": f"clocks.sm, {power} and temperature.gpu of nvidia-smi, during sustained",
        "condition": "max|error| / (2^-24 * (|x| conv |w| + |b|)) against float64; a right float32 "
        "result has at most the gate",
        "pytorch": "torch.nn.functional.conv_transpose2d with torch.backends.cudnn.benchmark=True "
        "and benchmark_limit=0; the fastest of cuDNN's choices in several threads; "
        "torch.backends.cudnn.allow_tf32 as said; not gated",
        "peak_bytes": "one call's memory beyond inputs and output, by PyTorch's allocator",
        "shapes": "inputs of Problem.random_inputs(seed), every output judged",
        "growth": "inputs drawn on the GPU; the first and the last image judged",
        "gemm": f"torch.matmul, {_GEMM_SIDE} x {_GEMM_SIDE} x {_GEMM_SIDE}, normal values",
        "copy": "Tensor.copy_ on the device, bytes read plus bytes written",
    }


class _Terminated(KeyboardInterrupt):
    """The process was asked to end."""


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM be an interrupt, so that what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bench(
    parts: Sequence[str] | None = None,
    problems: Sequence[str] | None = None,
    out: Path | None = None,
    seed: int = 0,
    older: Path | None = None,
) -> int:
    """Measure, print the tables and write the record.

    Parameters
    ----------
    parts
        Some of `PARTS`; all but the last if None.
    problems
        Some of `SHAPES` or, for the operator, of its shapes; all if None. With names and no `parts`
        only `SHAPES` are measured.
    out
        The file to write; for ``operator`` and ``neighbours`` the one beside it whose name ends in
        that, unless nothing else is measured. If None, a whole run writes the GPU's records and the
        package's table of choices, and one of some parts or problems writes nothing.
    seed
        Of the random inputs.
    older
        A record to compare the ratios with.

    Returns
    -------
    int
        The exit status: 0, or 1 if a stage is wrong or a part was not finished.

    Raises
    ------
    BuildError
        If there is no GPU, or no nvcc.
    ProblemError
        If there is no problem or part of a name.
    RecordError
        If `older` is no record.
    OSError
        If `older` can't be read, or the place of the record not be written.
    """
    is_whole = parts is None and problems is None
    parts = _chosen_parts(parts, problems)
    names = _chosen_names(parts, problems)
    known = None if older is None else records.load(older)
    _require_gpu()

    began = time.monotonic()
    results = _Results()
    with _termination_interrupts(), _current_gpu() as machine:
        places = _Places.of(out, parts, machine.gpu.name if is_whole else None)
        for path in filter(None, (places.ladder, places.operator, places.neighbours)):
            _require_writable(path.parent)
        if is_whole:
            _require_writable(measurements.FILE.parent)

        def outcome() -> _Outcome:
            return _Outcome.of(results, machine, seed, time.monotonic() - began)

        part = ""
        try:
            for part in parts:
                _measure(part, machine, names.get(part, ()), seed, results)
        except BaseException as error:
            unfinished = outcome()
            unfinished.keep(places, part)
            if isinstance(error, BuildError) or not isinstance(error, Exception):
                raise
            print(unfinished.tables())
            message = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"\n{part} was not finished: {message}")
            return 1
        finished = outcome()

    print(finished.tables())
    written = finished.save(places)
    if is_whole:
        choices = measurements.tables_of_records(leave_out=dispatch.SLOW)
        measurements.save(choices, measurements.FILE)
        written.append(measurements.FILE)
    if known is not None and finished.ladder:
        print(f"\n{comparison(compare(finished.ladder, known), str(older))}")
    print(
        f"\nmeasured in {finished.seconds:.0f} s; "
        + (f"wrote {', '.join(map(str, written))}" if written else "not written")
    )
    wrong = finished.wrong()
    if wrong:
        print(f"wrong: {'; '.join(wrong)}")
    return 1 if wrong else 0


@dataclass(frozen=True)
class _Places:
    """Where the records are written, or None."""

    ladder: Path | None
    operator: Path | None
    neighbours: Path | None

    @classmethod
    def of(cls, out: Path | None, parts: Sequence[str], gpu: str | None) -> _Places:
        """Return the files for `parts`: beside `out`, or else those of a GPU's whole run."""
        if out is None:
            if gpu is None:
                return cls(None, None, None)
            out = records.FOLDER / f"{records.slug(gpu)}.json"
        places: dict[str, Path | None] = {"ladder": None}
        if any(part in records.PARTS for part in parts):
            places["ladder"] = out
        for part in _OPERATOR_PARTS:
            beside = out if len(parts) == 1 else out.with_name(f"{out.stem}-{part}{out.suffix}")
            places[part] = beside if part in parts else None
        return cls(**places)


@dataclass(frozen=True)
class _Outcome:
    """What a run has measured, as records; None where there is nothing."""

    seconds: float
    ladder: Record | None
    operator: operator_record.OperatorRecord | None
    neighbours: operator_record.OperatorRecord | None

    @classmethod
    def of(cls, results: _Results, machine: _Machine, seed: int, seconds: float) -> _Outcome:
        from convt_lab import operator_bench  # which imports this module

        common = dict(
            gpu=machine.gpu,
            software=machine.software,
            date=date.today().isoformat(),
            seed=seed,
            seconds=seconds,
        )
        ladder = Record(
            **common,
            parts=results.parts,
            meaning=_meaning(machine),
            ceilings=Ceilings(results.ceilings),
            shapes=tuple(results.shapes),
            growth={axis: tuple(points) for axis, points in results.growth.items()},
        )
        meaning = operator_bench.meaning()
        others = {
            part: operator_record.OperatorRecord(**common, meaning=meaning, cases=tuple(cases))
            if (cases := getattr(results, part))
            else None
            for part in _OPERATOR_PARTS
        }
        return cls(seconds, ladder if results.parts else None, **others)

    @property
    def others(self) -> dict[str, operator_record.OperatorRecord]:
        """The records of `_OPERATOR_PARTS` that there are."""
        found = {part: getattr(self, part) for part in _OPERATOR_PARTS}
        return {part: record for part, record in found.items() if record}

    def texts(self, places: _Places) -> Iterator[tuple[Path, str, Callable[[], None]]]:
        """Give each record's place and text, and what checks and writes it."""
        if self.ladder and places.ladder:
            save = partial(records.save, self.ladder, places.ladder)
            yield places.ladder, records.as_text(self.ladder), save
        for part, record in self.others.items():
            if path := getattr(places, part):
                save = partial(operator_record.save, record, path)
                yield path, operator_record.as_text(record), save

    def keep(self, places: _Places, part: str) -> None:
        """Write what there is beside the records' places, and say so."""
        finished = [*(self.ladder.parts if self.ladder else ()), *self.others]
        for path, text, _ in self.texts(places):
            records.write_text(_partial(path), text)
            print(
                f"{part} was not finished; {', '.join(finished)} as far as measured: "
                f"{_partial(path)}",
                file=sys.stderr,
            )

    def save(self, places: _Places) -> list[Path]:
        """Write the records; return their files."""
        written = []
        for path, _, save in self.texts(places):
            try:
                save()
            except records.RecordError:  # a mistake of ours: minutes on a GPU are not lost for it
                self.keep(places, "the record")
                raise
            _partial(path).unlink(missing_ok=True)
            written.append(path)
        return written

    def tables(self) -> str:
        from convt_lab import operator_bench

        parts = [tables(self.ladder)] if self.ladder else []
        return "\n\n".join([*parts, *map(operator_bench.tables, self.others.values())])

    def wrong(self) -> list[str]:
        """Return what of ours was wrong or failed."""
        from convt_lab import operator_bench

        return [
            *(_wrong_rows(self.ladder) if self.ladder else []),
            *(line for record in self.others.values() for line in operator_bench.wrong(record)),
        ]


def _chosen_parts(parts: Sequence[str] | None, problems: Sequence[str] | None) -> tuple[str, ...]:
    if parts is None:
        return PARTS[:-1] if problems is None else ("shapes",)
    for part in parts:
        if part not in PARTS:
            raise ProblemError(f"part {part!r}: must be one of {', '.join(map(repr, PARTS))}")
    if problems is not None and not {"shapes", *_OPERATOR_PARTS} & set(parts):
        raise ProblemError(
            f"problems are named but parts={','.join(parts)} leaves out shapes: add it, or operator"
        )
    return tuple(part for part in PARTS if part in parts)


def _chosen_names(
    parts: Sequence[str], problems: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Return the names of the problems to measure in each part that has names."""
    from convt_lab import operator_bench  # which imports this module

    known = {"shapes": SHAPES} | {p: operator_bench.problems(p) for p in _OPERATOR_PARTS}
    known = {part: tuple(names) for part, names in known.items() if part in parts}
    if problems is None:
        return known
    for name in problems:
        if not any(name in names for names in known.values()):
            there = dict.fromkeys(name for names in known.values() for name in names)
            raise ProblemError(f"problem {name!r}: must be one of {', '.join(map(repr, there))}")
    return {
        part: tuple(name for name in dict.fromkeys(problems) if name in names)
        for part, names in known.items()
    }


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise BuildError(
            "torch sees no CUDA device, and the simulator has no times to measure; see "
            "`python -m convt_lab doctor`"
        )
    if find_toolkit() is None:
        raise BuildError("no nvcc to build the stages with; see `python -m convt_lab doctor`")


def _require_writable(folder: Path) -> None:
    """Find out before the measurement, not after it, that its result can't be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _wrong_rows(record: Record) -> list[str]:
    curves = [point for points in record.growth.values() for point in points]
    return [
        f"{row.name} on {shape.name}" + (f" ({row.failure})" if row.failure else "")
        for shape in (*record.shapes, *curves)
        for row in shape.rows
        if row.kind == "stage" and not row.is_right
    ]


# ---- Two records ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A row's cold median over that of cuDNN float32, in two records.

    Attributes
    ----------
    shape, row
        Which.
    new, old
        The ratios.
    """

    shape: str
    row: str
    new: float
    old: float

    @property
    def percent(self) -> float:
        """By how much the new ratio is larger, in percent of the old one."""
        return 100 * (self.new / self.old - 1)


def compare(new: Record, old: Record) -> tuple[Change, ...]:
    """Compare what does not depend on the clock: each row's ratio to cuDNN float32.

    Parameters
    ----------
    new, old
        Two records.

    Returns
    -------
    tuple of Change
        One for each row that both have times of, on a shape of the same name and problem.
    """
    before = {shape.name: shape for shape in old.shapes}
    changes = []
    for shape in new.shapes:
        other = before.get(shape.name)
        if other is None or other.problem != shape.problem:
            continue
        old_ratios = _ratios(other)
        for row, ratio in _ratios(shape).items():
            if row in old_ratios:
                changes.append(Change(shape.name, row, ratio, old_ratios[row]))
    return tuple(changes)


def _ratios(shape: Shape) -> dict[str, float]:
    """Return each row's cold time over the baseline's, without the baseline itself."""
    seconds = {row.name: row.seconds() for row in shape.rows}
    base = seconds.pop(BASELINE, None)
    return {name: s / base for name, s in seconds.items() if s is not None} if base else {}


def comparison(changes: Sequence[Change], name: str) -> str:
    """Say how far the ratios of two records are apart; `name` is the older one's."""
    if not changes:
        return f"{name}: nothing to compare, no shape and row has times in both records"
    largest = max(changes, key=lambda change: abs(change.percent))
    middle = statistics.median(abs(change.percent) for change in changes)
    return (
        f"compared with {name}, time over {BASELINE}'s of {len(changes)} rows:\n"
        f"largest difference {largest.percent:+.1f} %: {largest.row} on {largest.shape}, "
        f"{largest.old:.4g} before, now {largest.new:.4g}; median difference {middle:.1f} %"
    )


# ---- Tables --------------------------------------------------------------------------------------

_LEGEND = f"""\
cold: median of single runs, L2 flushed before each; sustained: one run's share of
       {SUSTAINED_SECONDS:g} s back to back (* the GPU waited for Python)
TFLOP/s: by the definition's operations over the cold time; % FMA: of the FP32 FMA rate
x cuDNN: how many times as fast as {BASELINE}, cold
condition error: max|error| / (2^-24 * (|x| conv |w| + |b|)) against float64"""


def tables(record: Record) -> str:
    """Return a record as text: the ceilings, a table for each shape, one for each curve."""
    gpu, software = record.gpu, record.software
    capability = ".".join(map(str, gpu.compute_capability))
    parts = [
        f"{gpu.name}, compute capability {capability}, {gpu.multiprocessors} SMs; "
        f"PyTorch {software.torch}, CUDA {software.cuda}, cuDNN {software.cudnn}; "
        f"seed {record.seed}"
    ]
    if record.ceilings:
        parts.append(_ceiling_table(record))
    parts += [_shape_table(record, shape) for shape in record.shapes]
    if record.shapes:
        parts.append(_LEGEND)
    parts += [_growth_table(axis, points) for axis, points in record.growth.items()]
    return "\n\n".join(parts)


def _ceiling_table(record: Record) -> str:
    lines = [["ceiling", "cold", "sustained", "", "SM clock", "power"]]
    for name, ceiling in record.ceilings.items():
        if ceiling is None:
            lines.append([name, *["-"] * 5])
            continue
        rates = [f"{ceiling.rate(how) / 1e12:.4g}" for how in ("cold", "sustained")]
        unit = {"FLOP": "TFLOP/s", "byte": "TB/s"}[ceiling.unit]
        lines.append([name, *rates, unit, *_load_cells(ceiling.sustained.load)])
    return aligned(lines, left=(0, 3))


def _load_cells(load: Load) -> list[str]:
    clock, power = load.sm_clock_mhz, load.power_watts
    return [
        "-" if clock is None else f"{clock:.0f} MHz",
        "-" if power is None else f"{power:.0f} W",
    ]


def _shape_table(record: Record, shape: Shape) -> str:
    problem = shape.problem
    lines = [
        [
            *("row", "cold", "sustained", "SM clock", "power", "TFLOP/s", "x cuDNN", "% FMA"),
            *("rel. L2 error", "condition error", "memory", ""),
        ]
    ]
    for row in shape.rows:
        tflops, speedup = shape.tflops(row.name), shape.speedup(row.name)
        share = record.share_of_fma(shape.name, row.name)
        sustained = _milliseconds(row.seconds("sustained"))
        if row.sustained and row.sustained.is_host_bound:
            sustained += "*"
        lines.append(
            [
                row.name,
                _milliseconds(row.seconds()),
                sustained,
                *_load_cells(row.sustained.load if row.sustained else Load()),
                "-" if tflops is None else f"{tflops:.4g}",
                "-" if speedup is None else f"{speedup:.2f}",
                "-" if share is None else f"{100 * share:.1f}",
                *_error_cells(row),
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
                _verdict(row),
            ]
        )
    arguments = ", ".join(f"{key}={value}" for key, value in problem.arguments.items())
    title = (
        f"{shape.name}: input {list(problem.input_shape)}, weight {list(problem.weight_shape)}, "
        f"output {list(problem.output_shape)}\n{arguments}; {problem.flops / 1e9:.4g} GFLOP"
    )
    return f"{title}\n{aligned(lines, left=(0, 11))}"


def _error_cells(row: Row) -> list[str]:
    if row.errors is None:
        return ["-", "-"]
    return [f"{row.errors.relative_l2:.2e}", f"{row.errors.condition:.2f}"]


def _verdict(row: Row) -> str:
    if row.status == "failed":
        return f"FAILED: {row.failure.partition(':')[0]}"
    if row.kind == "pytorch":
        return ""
    return "ok" if row.is_right else "WRONG"


def _growth_table(axis: str, points: Sequence[Point]) -> str:
    lines = [[axis, "fastest stage", "ns/pixel", "memory", BASELINE, "memory", "x cuDNN"]]
    for point in points:
        best = point.best
        other = next((row for row in point.rows if row.name == BASELINE), None)
        speedup = best and point.speedup(best.name)
        lines.append(
            [
                str(point.value),
                best.name if best else "-",
                *_growth_cells(point, best),
                *_growth_cells(point, other),
                f"{speedup:.2f}" if speedup else "-",
            ]
        )
    return aligned(lines, left=(1,))


def _growth_cells(point: Point, row: Row | None) -> list[str]:
    seconds = point.seconds_per_pixel(row)
    peak = row and row.peak_bytes
    return [
        "-" if seconds is None else f"{1e9 * seconds:.4g}",
        "-" if peak is None else f"{peak / 2**20:.1f} MiB",
    ]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g} ms"
