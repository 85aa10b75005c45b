"""Measures the stages that multiply on tensor cores beside PyTorch's own operator, on a GPU.

    python tools/tensor_core_times.py [--problems NAME...] [--output FILE]

On each problem every way is run cold, in rounds with the others, and then back to back; all that a
call does is timed, packing and scales too. Errors are against float64, for inputs of four
distributions. Both problems together are written to ``records/GPU-tensor-cores.json``, a part only
where ``--output`` says. It takes about a minute, once the kernels are built.

The record (schema 1): ``what``, ``gpu``, ``software``, ``date``, ``seed``, ``meaning``, and
``problems``: for each its ``problem`` (the arguments of `Problem`), ``gate`` (the largest condition
error of a right float32 result) and ``rows``. A row has ``name``, ``kernel`` (``"pytorch"`` or a
kernel of the package), ``dtype``, ``memory_format``, ``allow_tf32``; ``errors``, for each of
`KINDS` ``relative_l2`` and ``condition``; ``cold_ms``, ``samples_ms``, ``sustained_ms``,
``enqueue_ms`` and, during the runs back to back, ``sm_clock_mhz`` and ``power_watts``, null where
nothing was read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import records  # noqa: E402
from convt_lab.bench import Instruments, _current_gpu, converted, cudnn_at_its_best  # noqa: E402
from convt_lab.ladder import exact, judge, poisoned  # noqa: E402
from convt_lab.measure import SUSTAINED_SECONDS, sustained_time  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402
from convt_lab.reference import float32_gate  # noqa: E402
from convt_lab.stages import kernels  # noqa: E402
from convt_lab.tasks import Task, cold_times, with_best_choice  # noqa: E402

PROBLEMS = ("star", "classic")

#: What inputs are drawn from; `drawn` says how.
KINDS = ("normal", "positive", "lognormal", "channels")

PYTORCH = "pytorch"


@dataclass(frozen=True)
class Way:
    """One way to compute the operator.

    Attributes
    ----------
    kernel
        ``"pytorch"``, or a key of `convt_lab.stages.kernels`.
    dtype, memory_format
        Of the tensors.
    allow_tf32
        cuDNN's switch; of ours, whether it rounds float32 to TF32.
    """

    kernel: str
    dtype: str = "float32"
    memory_format: str = "contiguous"
    allow_tf32: bool = False

    @property
    def name(self) -> str:
        """All of it in words."""
        number = "TF32" if self.allow_tf32 else self.dtype
        last = ", channels last" if self.memory_format == "channels_last" else ""
        return f"{self.kernel}, {number}{last}"

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        """Called as ``torch.nn.functional.conv_transpose2d`` is."""
        return F.conv_transpose2d if self.kernel == PYTORCH else kernels[self.kernel]

    def settings(self) -> AbstractContextManager[object]:
        """Return the context to run it in."""
        return cudnn_at_its_best(self.allow_tf32) if self.kernel == PYTORCH else nullcontext()


def ways() -> list[Way]:
    """Return what is measured: ours, then PyTorch's, in the same forms."""
    forms = [
        ("float32", "contiguous", False),
        ("float32", "channels_last", False),
        ("float32", "contiguous", True),
        ("float32", "channels_last", True),
        ("float16", "contiguous", False),
        ("float16", "channels_last", False),
    ]
    found = [
        Way("tensor_core", allow_tf32=True),
        Way("tensor_core_split"),
        *(Way("hopper" if f[0] == "float32" and not f[2] else "hopper_single", *f) for f in forms),
    ]
    return found + [Way(PYTORCH, *form) for form in forms]


def drawn(problem: Problem, kind: str, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x and weight: normal, their magnitudes, x log-normal, or channels far apart.

    The last is normal, with each channel of x times a power of ten between -3 and 3.
    """
    x, weight, _ = problem.random_inputs(seed, device)
    if kind == "positive":
        return x.abs(), weight.abs()
    if kind == "lognormal":
        return x.exp(), weight
    if kind == "channels":
        generator = torch.Generator().manual_seed(seed)
        powers = 6 * torch.rand(problem.in_channels, 1, 1, generator=generator) - 3
        return x * (10.0**powers).to(device), weight
    return x, weight


def measure(problem: Problem, tools: Instruments, seed: int = 0) -> dict[str, Any]:
    """Judge and time every way on one problem; the record's entry.

    Raises
    ------
    ArithmeticError
        If a result of ours is not finite.
    """
    found = ways()
    errors: dict[str, dict[str, dict[str, float]]] = {way.name: {} for way in found}
    for kind in KINDS:
        inputs = drawn(problem, kind, seed, tools.device)
        truth = exact(*inputs, **problem.arguments)
        for way in found:
            with poisoned() if way.kernel != PYTORCH else nullcontext(), way.settings():
                result = judge(_call(way, problem, inputs)(), truth)
            finite = result.condition < float("inf")
            if way.kernel != PYTORCH and way.dtype == "float32" and not finite:
                raise ArithmeticError(f"{way.name} on {kind} inputs: an output is not finite")
            errors[way.name][kind] = {
                "relative_l2": records.rounded(result.relative_l2, 4),
                "condition": records.rounded(result.condition, 4),
            }
        del truth
    inputs = drawn(problem, "normal", seed, tools.device)
    tasks = {way.name: Task(way.name, _call(way, problem, inputs), way.settings) for way in found}
    for way in found:
        if way.kernel == PYTORCH:
            task = tasks[way.name]
            tasks[way.name] = with_best_choice(task, tools.clock, tools.device, tools.choices)
    try:
        colds = cold_times(dict(tasks), tools.clock)
        rows = [
            _row(way, tasks[way.name], colds[way.name], errors[way.name], tools) for way in found
        ]
    finally:
        for task in tasks.values():
            if task.thread:
                task.thread.close()
    gate = records.rounded(float32_gate(math.prod(problem.output_shape)), 4)
    return {"problem": asdict(problem), "gate": gate, "rows": rows}


def _call(way: Way, problem: Problem, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    data = converted((*inputs, None), way.dtype, way.memory_format)
    return partial(way.function, *data, **problem.arguments)


def _row(way: Way, task: Task, cold: Any, errors: Any, tools: Instruments) -> dict[str, Any]:
    with task.settings():
        sustained = task.run(
            partial(sustained_time, task.call, cold.median, tools.clock, tools.sampler)
        )
    return {
        "name": way.name,
        **asdict(way),
        "errors": errors,
        "cold_ms": records.rounded(1000 * cold.median, 5),
        "samples_ms": [records.rounded(1000 * sample, 5) for sample in cold.samples],
        "sustained_ms": records.rounded(1000 * sustained.seconds, 5),
        "enqueue_ms": records.rounded(1000 * sustained.enqueue_seconds, 5),
        "sm_clock_mhz": records.rounded(sustained.load.sm_clock_mhz, 4),
        "power_watts": records.rounded(sustained.load.power_watts, 4),
    }


def table(entries: dict[str, Any]) -> str:
    """Return the record's numbers as text."""
    lines = []
    for name, entry in entries.items():
        lines += [
            f"{name}, gate {entry['gate']}",
            f"{'':40} cold ms  sustained  rel. L2  condition: " + ", ".join(KINDS),
        ]
        for row in entry["rows"]:
            conditions = "".join(f"{row['errors'][kind]['condition']:10.4g}" for kind in KINDS)
            lines.append(
                f"{row['name']:40} {row['cold_ms']:7.3f} {row['sustained_ms']:10.3f} "
                f"{row['errors']['normal']['relative_l2']:.2e} {conditions}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=Problem.names(), default=list(PROBLEMS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: times are measured on an NVIDIA GPU")
    with _current_gpu() as machine:
        entries = {
            name: measure(Problem.named(name), machine.tools, arguments.seed)
            for name in arguments.problems
        }
    print(table(entries))
    path = arguments.output
    if path is None:
        if set(arguments.problems) != set(PROBLEMS):
            print("not written: a part of the record; name a file with --output", file=sys.stderr)
            return
        path = records.FOLDER / f"{records.slug(machine.gpu.name)}-tensor-cores.json"
    record = {
        "schema": 1,
        "what": "cold and sustained times, and errors, of tensor cores' kernels and of PyTorch",
        "gpu": machine.gpu.name,
        "software": asdict(machine.software),
        "date": date.today().isoformat(),
        "seed": arguments.seed,
        "meaning": {
            "cold_ms": "median of single runs by CUDA events, the L2 cache flushed before each, in "
            "interleaved rounds with all other rows; everything that a call does",
            "enqueue_ms": "what Python takes to enqueue one of the runs back to back: where it is "
            "about as long as the run, the GPU waited for it",
            "sustained_ms": f"one run's share of at least {SUSTAINED_SECONDS:g} s back to back, "
            "nothing flushed",
            "condition": "max|error| / (2^-24 * (|x| conv |w|)) against float64",
            "pytorch": "torch.nn.functional.conv_transpose2d, cudnn.benchmark on, the fastest of "
            "cuDNN's choices in several threads",
        },
        "problems": entries,
    }
    records.write_text(path, records.text_of(record))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
