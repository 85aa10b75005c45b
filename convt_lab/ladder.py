"""The whole ladder on one problem: is every stage right, and how fast is each on this GPU.

What is exact is told by PyTorch in float64, on the device where the stages run, so that even a
large problem is judged in seconds. `exact` and `judge` give the numbers of `convt_lab.reference`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from convt_lab.build import BuildError
from convt_lab.columns import aligned
from convt_lab.measure import Timing, median_times
from convt_lab.problem import Problem
from convt_lab.program import backend_named
from convt_lab.reference import FLOAT32_GATE, UNIT_ROUNDOFF, float32_gate, terms_of, tf32_gate
from convt_lab.stages import Stage, stages

__all__ = ["Errors", "Exact", "Row", "climb", "exact", "judge", "ladder", "poisoned", "table"]

#: The name of PyTorch's own operator in the table.
BASELINE = "cuDNN"

_LONG_SIMULATION = 10**9  # multiply-adds: some seconds for each stage


@dataclass(frozen=True)
class Exact:
    """What a result is compared with, in float64 on the device of the inputs.

    Attributes
    ----------
    expected
        The transposed convolution, [N, C_out, OH, OW].
    scale
        The sum of its terms' absolute values, ``|x| ⊛ |weight| + |bias|``, of the same shape.
    """

    expected: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """How wrong a result is: `reference.relative_l2` and `reference.condition_error`.

    `gate` is the largest condition error that is right: `reference.float32_gate` of the outputs, or
    for a stage that rounds to TF32 `reference.tf32_gate`.
    """

    relative_l2: float
    condition: float
    gate: float = FLOAT32_GATE

    @property
    def is_right(self) -> bool:
        """Whether it is as right as its arithmetic can be asked to be; NaN is not."""
        return self.condition <= self.gate


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    name
        Of the stage, or `BASELINE`.
    backend
        ``gpu``, ``simulator`` or ``PyTorch``.
    errors
        None if it raised.
    failure
        What it raised, or None.
    timing
        None if it was not timed.
    """

    name: str
    backend: str
    errors: Errors | None = None
    failure: Exception | None = None
    timing: Timing | None = None

    @property
    def is_right(self) -> bool:
        """Whether it ran and gave the right result."""
        return self.errors is not None and self.errors.is_right


def exact(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **arguments: Any
) -> Exact:
    """Compute the transposed convolution in float64 by PyTorch, one image at a time.

    Parameters
    ----------
    x, weight, bias
        [N, C_in, H, W], [C_in, C_out/groups, KH, KW] and [C_out] or None, on one device.
    **arguments
        `stride`, `padding`, `output_padding`, `groups` and `dilation`.

    Returns
    -------
    Exact
        The same as `reference.scatter` and `reference.condition_scale` give.
    """
    problem = Problem.from_shapes(
        x.shape, weight.shape, None if bias is None else bias.shape, **arguments
    )
    expected, scale = (
        torch.empty(problem.output_shape, dtype=torch.float64, device=x.device) for _ in range(2)
    )
    weight, bias = (None if t is None else t.detach().double() for t in (weight, bias))
    positive = [None if t is None else t.abs() for t in (weight, bias)]
    for n in range(problem.batch):  # PyTorch's workspace for all of them may be too large
        image = x[n : n + 1].detach().double()
        expected[n] = F.conv_transpose2d(image, weight, bias, **arguments)[0]
        scale[n] = F.conv_transpose2d(image.abs(), *positive, **arguments)[0]
    return Exact(expected, scale)


def judge(actual: torch.Tensor, exact: Exact) -> Errors:
    """Compare a result with the exact one, image by image.

    Parameters
    ----------
    actual
        [N, C_out, OH, OW], on the device of `exact`. Where its type has but steps left, below its
        smallest normal number, half a step counts as no error: no result comes nearer.
    exact
        From `exact`.

    Returns
    -------
    Errors
        Infinite where `reference.relative_l2` and `reference.condition_error` are.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if actual.shape != exact.expected.shape:
        raise ValueError(
            f"actual has shape {list(actual.shape)}: it must be {list(exact.expected.shape)}"
        )
    gate = float32_gate(actual.numel())
    kind = torch.finfo(actual.dtype)
    half_step = kind.smallest_normal * kind.eps / 2
    squares = norm = worst = 0.0
    for result, expected, scale in zip(actual, exact.expected, exact.scale, strict=True):
        result = result.double()
        same = (result == expected) | (result.isnan() & expected.isnan())
        difference = torch.where(same, 0.0, (result - expected).abs())
        beyond = (difference - half_step).clamp(min=0.0)
        units = torch.where(same, 0.0, beyond / (UNIT_ROUNDOFF * scale))
        squares += difference.square().sum().item()
        norm += torch.where(expected.isfinite(), expected, 0.0).square().sum().item()
        worst = max(worst, _or_infinite(units.max().item()))
    squares = _or_infinite(squares)
    if norm == 0:
        return Errors(0.0 if squares == 0 else math.inf, worst, gate)
    return Errors(math.sqrt(squares / norm), worst, gate)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


@contextmanager
def poisoned() -> Iterator[None]:
    """Let every tensor that is allocated without a value hold NaN, on any device."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _full_float32() -> Iterator[None]:
    """Let cuDNN compute in float32, not TF32, with the algorithm that it finds fastest."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def climb(problem: Problem, device: str, seed: int = 0) -> list[Row]:
    """Run every stage on one problem, judge it and, on a GPU, time it.

    Parameters
    ----------
    problem
        The shapes.
    device
        ``"cuda"``, or ``"cpu"`` for the simulator.
    seed
        Of the random inputs.

    Returns
    -------
    list of Row
        The stages in order; on a GPU PyTorch's own operator follows, judged but not gated.
    """
    backend = "gpu" if device == "cuda" else "simulator"
    rows = {name: Row(name, backend) for name in stages}
    if device == "cuda":
        rows[BASELINE] = Row(BASELINE, "PyTorch")

    with _progress("building", len(stages)) as bar:
        for name, stage in stages.items():
            bar.set_postfix_str(name)
            try:
                stage.program(backend)
            except Exception as error:
                rows[name] = replace(rows[name], failure=error)
            bar.update()

    runnable = [name for name, row in rows.items() if row.failure is None]
    with _progress("checking", 1 + len(runnable)) as bar:
        bar.set_postfix_str("float64")
        inputs = problem.random_inputs(seed, device)
        functions = {name: _call_of(name, problem, inputs) for name in rows}
        truth = exact(*inputs, **problem.arguments)
        bar.update()
        for name in runnable:
            bar.set_postfix_str(name)
            try:
                with poisoned() if name in stages else _full_float32():
                    output = functions[name]()
                errors = judge(output, truth)
                if _rounds_to_tf32(name):
                    errors = replace(errors, gate=tf32_gate(terms_of(problem)))
                rows[name] = replace(rows[name], errors=errors)
                del output
            except Exception as error:
                rows[name] = replace(rows[name], failure=error)
            bar.update()
    del truth

    if device == "cuda":
        _time(rows, functions)
    return list(rows.values())


def _rounds_to_tf32(name: str) -> bool:
    return name in stages and stages[name].precision == "tf32"


def _call_of(name: str, problem: Problem, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Return the call that is checked and timed."""
    function: Stage | Callable = stages.get(name, F.conv_transpose2d)
    return partial(function, *inputs, **problem.arguments)


def _time(rows: dict[str, Row], functions: dict[str, Callable[[], Any]]) -> None:
    """Time the stages that are right, and PyTorch; put the timings into `rows`."""
    chosen = {
        name: functions[name]
        for name, row in rows.items()
        if row.is_right or (name == BASELINE and row.failure is None)
    }
    torch.cuda.empty_cache()  # cuDNN chooses among the algorithms whose workspace fits
    with _progress("timing", None) as bar, _full_float32():

        def on_run(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        try:
            timings = median_times(chosen, on_run=on_run)
        except RuntimeError as error:
            rows.update({name: replace(rows[name], errors=None, failure=error) for name in chosen})
            return
    for name, timing in timings.items():
        rows[name] = replace(rows[name], timing=timing)


def _progress(what: str, total: int | None) -> tqdm:
    """Return a progress bar on stderr, which is quiet where that is no terminal."""
    return tqdm(total=total, desc=what, disable=None, leave=False, file=sys.stderr)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, with columns for times if any was timed."""
    timed = any(row.timing for row in rows)
    head = ["stage", "back end", "rel. L2 error", "condition error", ""]
    if timed:
        head += ["median time", "x before", f"x {BASELINE}", "runs"]
    seconds = {row.name: row.timing.median for row in rows if row.timing}
    lines = [head]
    for previous, row in zip([None, *rows], rows, strict=False):
        line = [row.name, row.backend, *_error_cells(row)]
        if timed:
            before = seconds.get(previous.name) if previous and row.name != BASELINE else None
            line += _time_cells(row, before, seconds.get(BASELINE))
        lines.append(line)
    return aligned(lines, left=(0, 1, 4))


def _error_cells(row: Row) -> list[str]:
    if row.errors is None:
        return ["-", "-", "WRONG: " + type(row.failure).__name__]
    right = "ok, as TF32" if _rounds_to_tf32(row.name) else "ok"
    verdict = "" if row.name == BASELINE else right if row.is_right else "WRONG"
    return [f"{row.errors.relative_l2:.2e}", f"{row.errors.condition:.2f}", verdict]


def _time_cells(row: Row, before: float | None, baseline: float | None) -> list[str]:
    if row.timing is None:
        return ["-"] * 4
    median = row.timing.median

    def ratio(other: float | None) -> str:
        return "-" if other is None else f"{other / median:.2f}"

    return [_milliseconds(median), ratio(before), ratio(baseline), str(len(row.timing.samples))]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"


def _default_device() -> str:
    return "cuda" if backend_named("auto").name == "gpu" else "cpu"


def _title(name: str, problem: Problem, seed: int) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in problem.arguments.items())
    shapes = f"input {list(problem.input_shape)}, weight {list(problem.weight_shape)}"
    return (
        f"{name}: {shapes}, output {list(problem.output_shape)}\n"
        f"{arguments}; float32, NCHW, seed {seed}; {problem.flops / 1e9:.4g} GFLOP"
    )


def _machine(device: str) -> str:
    if device == "cpu":
        return "simulated on the CPU (no times: the simulator does not model them)"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    version = torch.backends.cudnn.version() or 0
    cudnn = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}; "
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    )


_LEGEND = """\
condition error: max|error| / (2^-24 * (|x| conv |w| + |b|)) against float64; at most
       {:.1f} is right for the largest of {:,} errors, {:.0f} where operands are rounded to TF32"""

_TIME_LEGEND = f"""\
median time: of cold runs (L2 cache flushed before each), CUDA events, all in interleaved rounds
x before, x {BASELINE}: how many times as fast as the stage before, and as {BASELINE}
{BASELINE}: torch.nn.functional.conv_transpose2d in float32, NCHW, with
       torch.backends.cudnn.allow_tf32=False and torch.backends.cudnn.benchmark=True"""


def ladder(name: str | None = None, device: str | None = None, seed: int = 0) -> int:
    """Run every stage on a named problem and print the table.

    Parameters
    ----------
    name
        The problem's; ``star`` on a GPU and ``star_small`` on the simulator if None.
    device
        ``"cuda"`` or ``"cpu"``; the GPU if None and there is one, with nvcc to build for it.
    seed
        Of the random inputs.

    Returns
    -------
    int
        The exit status: 0 if every stage is right, else 1.

    Raises
    ------
    BuildError
        If `device` is ``"cuda"`` and torch sees no GPU.
    ProblemError
        If there is no problem of that name.
    """
    device = device or _default_device()
    if device == "cuda" and not torch.cuda.is_available():
        raise BuildError(
            "device 'cuda': torch sees no CUDA device; use --device cpu for the simulator, "
            "and see `python -m convt_lab doctor`"
        )
    name = name or ("star" if device == "cuda" else "star_small")
    problem = Problem.named(name)
    print(_title(name, problem, seed))
    print(_machine(device), flush=True)
    if device == "cpu" and problem.multiply_adds > _LONG_SIMULATION:
        print(
            f"simulating {problem.multiply_adds / 1e9:.3g} thousand million multiply-adds for each "
            "stage will take long; --problem star_small is quick",
            file=sys.stderr,
        )
    rows = climb(problem, device, seed)
    print()
    print(table(rows))
    print()
    outputs = math.prod(problem.output_shape)
    print(_LEGEND.format(float32_gate(outputs), outputs, tf32_gate(terms_of(problem))))
    if device == "cuda":
        print(_TIME_LEGEND)
    wrong = [row for row in rows if row.name in stages and not row.is_right]
    failed: dict[str, list[str]] = {}  # one tool that is missing fails every stage alike
    for row in rows:
        if row.failure is not None:
            message = f"{type(row.failure).__name__}: {row.failure}"
            failed.setdefault(message, []).append(row.name)
    for message, names in failed.items():
        print(f"\n{', '.join(names)}: {message}")
    print(
        f"\nwrong: {', '.join(row.name for row in wrong)}"
        if wrong
        else f"\nall {len(stages)} stages are right"
    )
    return 1 if wrong else 0
