"""Runs NVIDIA's compute-sanitizer over every kernel, on a GPU; writes what it says to records/.

    python tools/compute_sanitizer.py [--kernels NAME,...] [--tools NAME,...] [--jobs N]
                                      [--output FILE] [--logs FOLDER]
    python tools/compute_sanitizer.py --planted-only

It needs ``compute-sanitizer`` on PATH or in the CUDA toolkit. Each kernel runs in each of its forms
(dtype and memory format) on problems that it covers, and so does the operator on its ways, under
memcheck, racecheck, initcheck and synccheck, in several processes at a time. Before that each tool
has to find a bug that was planted for it: one that does not can't be trusted. The exit status is 1
if anything was reported, if a process failed, or if a planted bug was missed.

All tools on all kernels are written to ``records/GPU-sanitizer.json``, whatever they say; a part of
them only where ``--output`` says. ``--device cpu`` runs everything on the simulator, which the
sanitizer does not see, to try this tool.

The record (schema 1): ``what``, ``gpu``, ``date``, ``software`` (versions), ``seconds``;
``planted``, tool -> the bug and the head of its report; ``problems``, how many different ones ran;
``cases``, kernel and form -> how many of them; ``operator``, its way -> what computed, and how
often; and ``tools``, tool -> ``command``, ``processes``, ``cases``, ``seconds`` (of all its
processes), ``summaries`` (line -> how often), ``reports`` and ``failures``, and ``elsewhere``,
reports in kernels that are not this package's (PyTorch's, cuDNN's); and ``failures`` of the whole.
If all is well, all lists but ``elsewhere`` are empty.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import convt_lab as lab  # noqa: E402
from convt_lab import dispatch, measurements, records  # noqa: E402
from convt_lab.backend import KERNEL_FOLDER, SOURCE_NAME  # noqa: E402
from convt_lab.build import BuildError, build_timeout, supervised  # noqa: E402
from convt_lab.gpu import find_toolkit  # noqa: E402
from convt_lab.measure import gpu_facts  # noqa: E402
from convt_lab.plan import plan_for  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402
from convt_lab.reference import scatter  # noqa: E402
from convt_lab.stages import Kernel, kernels  # noqa: E402
from convt_lab.supervise import TIMED_OUT  # noqa: E402

#: Each tool and its options, the slowest first: it shall not be what is waited for at the end.
TOOLS: Mapping[str, tuple[str, ...]] = {
    "racecheck": (),
    "initcheck": (),
    # Without room between two allocations an access past the end of one may be inside the next.
    # PyTorch asks CUDA for what it may lack, which are errors to memcheck; our launchers' errors
    # are raised.
    "memcheck": ("--padding", "4096", "--report-api-errors", "no"),
    "synccheck": (),
}

#: Tools that look at our kernels only. Not initcheck: it has to see what PyTorch's kernels write.
#: Not memcheck, which costs little.
FILTERED = ("racecheck", "synccheck")

#: The sanitizer's exit status if it has reported something.
REPORTED = 86

_OPTIONS = (
    *("--error-exitcode", str(REPORTED)),
    *("--print-limit", "1000"),
    *("--target-processes", "all"),
    *("--show-backtrace", "device"),
    # The next case shall run after a report, too.
    *("--destroy-on-device-error", "kernel"),
    *("--launch-timeout", "120"),
)

#: What every process is given. Without its cache PyTorch's allocator asks CUDA for each tensor, so
#: that the sanitizer knows where one ends.
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "CUDA_MODULE_LOADING": "LAZY",
    "CONVT_AUTOTUNE": "0",
    "OMP_NUM_THREADS": "2",
    "LC_ALL": "C",
}

#: The operator among the names of kernels.
OPERATOR = "operator"

#: Largest error, as a share of the largest output, of a result that was computed at all: it is no
#: test of accuracy.
GATE = 2.0**-6

#: Multiply-adds of a problem that the simulator is given.
MOST_ON_THE_CPU = 30_000


# ---- What runs -----------------------------------------------------------------------------------

#: Small and odd: edges of tiles, phases without a tap, and rows of whole vectors and others.
PROBLEMS = (
    # Few channels.
    Problem(1, 1, 1, 1, 1),
    Problem(1, 1, 1, 5, 5, kernel_size=3, bias=True),
    Problem(2, 3, 5, 7, 9, kernel_size=(3, 7), padding=(1, 3), bias=True),
    Problem(1, 4, 8, 13, 24, kernel_size=(3, 7)),
    Problem(1, 2, 3, 6, 11, kernel_size=4, stride=2, padding=1),
    Problem(2, 3, 2, 5, 6, kernel_size=3, stride=2, padding=1, output_padding=1, bias=True),
    Problem(1, 3, 4, 4, 7, kernel_size=(2, 5), stride=(3, 2), dilation=(2, 1)),
    Problem(1, 5, 7, 3, 33, kernel_size=(1, 9), padding=(0, 4)),
    Problem(3, 2, 5, 9, 4, kernel_size=(5, 2), stride=(1, 4), bias=True),
    Problem(1, 2, 2, 8, 8, kernel_size=3, dilation=3, padding=3),
    Problem(1, 7, 3, 11, 17, kernel_size=(5, 9), padding=(2, 4), bias=True),
    Problem(1, 4, 6, 2, 2, kernel_size=2, stride=3),
    Problem(
        *(1, 3, 3, 4, 5), kernel_size=3, stride=(2, 3), dilation=(4, 3), output_padding=(3, 2)
    ),
    Problem(1, 8, 9, 1, 64, kernel_size=1, bias=True),
    Problem(1, 1, 4, 67, 3, kernel_size=(3, 1), padding=(1, 0)),
    Problem(1, 2, 9, 3, 131, kernel_size=(2, 3), padding=(0, 1), bias=True),
    Problem(1, 5, 8, 3, 3, kernel_size=(8, 17)),
    Problem(1, 3, 5, 4, 5, kernel_size=2, stride=(16, 13), bias=True),
    Problem(1, 2, 3, 5, 6, kernel_size=(3, 2), dilation=(9, 14)),
    Problem(1, 7, 7, 6, 9, kernel_size=16, stride=8, padding=4),
    Problem(2, 4, 12, 5, 30, kernel_size=(3, 7), padding=(2, 6), bias=True),
    Problem(1, 3, 70, 7, 20, kernel_size=(3, 7), bias=True),
    Problem(1, 6, 10, 9, 16, kernel_size=(3, 3), padding=2),
    Problem(1, 2, 3, 2, 700, kernel_size=(1, 5), stride=(1, 2), padding=(0, 3)),
    Problem(1, 1, 1, 20, 131, kernel_size=4, stride=(1, 2), padding=(0, 5)),
    Problem(1, 2, 2, 3, 3, kernel_size=90, bias=True),
    # One output channel, or few, of many input channels.
    Problem(1, 2, 1, 31, 37, kernel_size=(3, 7), padding=(1, 3)),
    Problem(2, 5, 1, 6, 7, kernel_size=4, stride=2, padding=1, bias=True),
    Problem(1, 40, 1, 9, 20, kernel_size=9, stride=2, padding=4, output_padding=1),
    Problem(1, 90, 1, 2, 3, kernel_size=9, stride=2, padding=4, bias=True),
    Problem(1, 33, 3, 9, 40, kernel_size=(3, 7), bias=True),
    Problem(2, 20, 3, 8, 8, kernel_size=4, stride=2, padding=1),
    Problem(1, 64, 2, 5, 7, kernel_size=5, stride=(1, 2), padding=2, dilation=(2, 1), bias=True),
    # Groups of one channel, of few, and of different numbers of channels.
    Problem(2, 6, 6, 9, 64, kernel_size=(3, 7), groups=6, bias=True),
    Problem(1, 4, 4, 19, 36, kernel_size=4, stride=2, padding=1, groups=4),
    Problem(1, 2, 2, 5, 300, kernel_size=(3, 9), padding=(1, 4), groups=2),
    Problem(1, 3, 3, 60, 9, kernel_size=5, stride=(1, 3), padding=2, groups=3, bias=True),
    Problem(1, 5, 5, 11, 13, kernel_size=3, stride=2, padding=1, output_padding=1, groups=5),
    Problem(2, 3, 3, 8, 16, kernel_size=(2, 3), dilation=(2, 3), groups=3),
    Problem(1, 4, 4, 6, 6, kernel_size=1, stride=2, groups=4, bias=True),
    Problem(1, 9, 9, 10, 10, kernel_size=(1, 4), stride=(1, 4), groups=9),
    Problem(3, 2, 2, 33, 34, kernel_size=3, padding=1, groups=2, bias=True),
    Problem(1, 8, 4, 7, 9, kernel_size=3, groups=4, bias=True),
    Problem(1, 12, 18, 5, 6, kernel_size=3, stride=2, groups=6),
    Problem(2, 8, 12, 6, 10, kernel_size=(3, 5), padding=(1, 2), groups=4, bias=True),
    Problem(1, 24, 36, 5, 9, kernel_size=(3, 7), padding=(1, 3), groups=3),
    Problem(1, 48, 48, 6, 5, kernel_size=3, stride=2, padding=1, groups=4, bias=True),
    Problem(2, 8, 6, 3, 4, kernel_size=(2, 5), stride=(2, 4), groups=2, bias=True),
    Problem(2, 4, 66, 2, 1, kernel_size=(5, 2), stride=(4, 1), groups=2),
    Problem(2, 20, 36, 1, 1, kernel_size=(3, 7), padding=(1, 3), groups=4),
    Problem(1, 6, 90, 1, 1, kernel_size=(3, 7), padding=(1, 3), groups=3, bias=True),
    # Sixteen channels and more on both sides.
    Problem(1, 16, 16, 8, 8, kernel_size=3, padding=1),
    Problem(2, 40, 72, 5, 7, kernel_size=2, stride=2),
    Problem(1, 72, 130, 4, 5, kernel_size=1, bias=True),
    Problem(1, 16, 16, 9, 70, kernel_size=7, padding=3),
    Problem(3, 20, 24, 5, 6, kernel_size=4, stride=2, padding=1, bias=True),
    Problem(
        *(2, 32, 48, 6, 7), kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1),
        groups=2, bias=True,
    ),
    Problem(1, 33, 17, 11, 13, kernel_size=(3, 7)),
    Problem(2, 36, 80, 1, 1, kernel_size=4, bias=True),
    Problem(5, 16, 16, 3, 3, kernel_size=3, padding=1),
    Problem(1, 16, 18, 2, 300, kernel_size=(3, 7), padding=(1, 0)),
    Problem(1, 16, 66, 6, 5, kernel_size=3, stride=2, padding=1, output_padding=1),
    Problem(1, 18, 19, 4, 6, kernel_size=(11, 3), padding=(5, 1), bias=True),
    Problem(1, 17, 16, 3, 4, kernel_size=(1, 2), stride=(3, 2), bias=True),
    Problem(2, 64, 64, 12, 14, kernel_size=(3, 7), padding=(1, 3), bias=True),
    Problem(1, 48, 32, 7, 9, kernel_size=3, dilation=2, padding=2),
    Problem(1, 64, 16, 16, 16, kernel_size=4, stride=2, padding=1),
    Problem(1, 32, 64, 10, 10, kernel_size=5, padding=2, groups=2, bias=True),
    Problem(2, 96, 64, 3, 3, kernel_size=3, stride=3),
    Problem(1, 128, 32, 4, 4, kernel_size=2, stride=2, bias=True),
    Problem(1, 24, 40, 1, 33, kernel_size=(1, 5), padding=(0, 2)),
    Problem(4, 16, 32, 2, 2, kernel_size=3, stride=2, padding=1, output_padding=1),
    Problem(1, 31, 65, 5, 8, kernel_size=(2, 3), stride=(1, 2), bias=True),
    Problem(1, 64, 128, 6, 6, kernel_size=1, stride=2),
    Problem(1, 16, 24, 17, 5, kernel_size=(5, 3), stride=(4, 1), padding=(2, 1), dilation=(1, 2)),
    Problem(1, 80, 96, 7, 11, kernel_size=(3, 7), padding=(1, 3)),
    Problem(2, 64, 32, 1, 3, kernel_size=(1, 5), padding=(0, 2), groups=2, bias=True),
    Problem(1, 24, 20, 6, 5, kernel_size=3, stride=4, dilation=6, padding=2),
    Problem(1, 256, 128, 5, 6, kernel_size=3, padding=1, bias=True),
    Problem(1, 40, 64, 13, 12, kernel_size=(2, 3), stride=3, dilation=2),
)  # fmt: skip

#: How many cases of a kernel run, about, ...
CASES = 24

#: ... but for those that choose among many compiled variants by the shape: they get all problems.
OF_MANY_VARIANTS = ("register_blocked", "winograd", "one_channel", "few_channels", "tensor_core")

#: The operator's ways besides those to each kernel: what the shipped tables choose; tensors that
#: are copied first, because they are dense in no format; an input without a batch; and backward.
WAYS = ("as measured", "strided tensors", "one image", "gradients")

#: What computes on the ways that ask for no kernel in particular.
_ANY_PROBLEM = "register_blocked"


@dataclass(frozen=True)
class Case:
    """One call of a kernel, or of the operator.

    Attributes
    ----------
    kernel
        A key of `convt_lab.stages.kernels`, or `OPERATOR`.
    problem
        The shapes.
    dtype
        Of all tensors, such as ``float32``.
    channels_last
        Whether the input lies in memory as [N, H, W, C].
    offset
        How many values lie before the input in its memory: with 1 it is not aligned.
    way
        Of the operator: one of `WAYS`, or the kernel that it shall run.
    """

    kernel: str
    problem: Problem
    dtype: str = "float32"
    channels_last: bool = False
    offset: int = 0
    way: str = ""

    @property
    def form(self) -> str:
        """Kernel, dtype and memory format, or the operator's way: what cases are counted by."""
        if self.kernel == OPERATOR:
            return f"{OPERATOR}, {self.way}"
        memory_format = "channels_last" if self.channels_last else "contiguous"
        return f"{self.kernel} {self.dtype} {memory_format}"

    def __str__(self) -> str:
        return f"{self.form}, {self.problem}"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        """Return the case that ``dataclasses.asdict`` made an object of."""
        problem = {n: tuple(v) if isinstance(v, list) else v for n, v in fields["problem"].items()}
        return cls(**{**fields, "problem": Problem(**problem)})


def forms(kernel: Kernel) -> list[tuple[torch.dtype, bool]]:
    """Return the dtypes and memory formats (whether channels last) that a kernel takes."""
    formats = (False, True) if kernel.takes_channels_last else (False,)
    return [(dtype, channels_last) for dtype in kernel.dtypes for channels_last in formats]


def chosen_problems(
    kernel: Kernel,
    form: tuple[torch.dtype, bool],
    count: int,
    phase: float = 0.0,
    problems: Sequence[Problem] = PROBLEMS,
) -> list[Problem]:
    """Choose problems that a kernel covers in a form.

    Parameters
    ----------
    kernel
        The kernel.
    form
        A dtype, and whether the input is channels last.
    count
        How many, if there are so many.
    phase
        Where the first step begins: of two that differ by half a step the problems do, too.
    problems
        What to choose from, in steps of the same length.
    """
    dtype, channels_last = form
    covered = [
        problem
        for problem in problems
        if kernel.supports(problem, dtype, channels_last)
        # Of one channel or one pixel both formats are the same.
        and not (channels_last and 1 in (problem.in_channels, problem.height * problem.width))
    ]
    count = min(count, len(covered))
    return [
        covered[int((phase + index) * len(covered) / count) % len(covered)]
        for index in range(count)
    ]


def cases_of_kernel(
    name: str, count: int | None = None, problems: Sequence[Problem] = PROBLEMS
) -> list[Case]:
    """Return some `count` cases of a kernel, divided among its forms: six of each, if not more."""
    of = forms(kernels[name])
    if count is None:
        count = len(problems) * len(of) if name in OF_MANY_VARIANTS else CASES
    share = max(min(6, count), count // len(of))
    first = list(kernels).index(name) / len(kernels)
    cases = []
    for number, (dtype, last) in enumerate(of):
        phase = first + number / len(of)
        for problem in chosen_problems(kernels[name], (dtype, last), share, phase, problems):
            offset = (0, 1, 0, 2)[len(cases) % 4]
            cases.append(Case(name, problem, _name(dtype), last, offset))
    return cases


def cases_of_operator(count: int = CASES, problems: Sequence[Problem] = PROBLEMS) -> list[Case]:
    """Return the operator's cases: some `count` on `WAYS`, and some for each kernel."""
    any_form, share = (torch.float32, False), max(1, count // len(WAYS))
    cases = []
    for number, way in enumerate(WAYS):
        phase = number / len(WAYS)
        for problem in chosen_problems(kernels[_ANY_PROBLEM], any_form, share, phase, problems):
            if way == "one image":
                problem = replace(problem, batch=1)
            cases.append(Case(OPERATOR, problem, way=way))
    for name, kernel in kernels.items():
        if name in dispatch.SLOW:
            continue
        of = forms(kernel)
        for number, (dtype, last) in enumerate(of):
            share = max(1, 3 // len(of))
            for problem in chosen_problems(
                kernel, (dtype, last), share, number / len(of), problems
            ):
                cases.append(Case(OPERATOR, problem, _name(dtype), last, way=name))
    return cases


def all_cases(names: Iterable[str], count: int | None = None, device: str = "cuda") -> list[Case]:
    """Return the cases of kernels and of the operator.

    Parameters
    ----------
    names
        Keys of `convt_lab.stages.kernels`, and `OPERATOR`.
    count
        How many of each, about; as many as are worth it if None.
    device
        On the CPU, the simulator's: problems that take it no time only.
    """
    problems = PROBLEMS
    if device == "cpu":
        problems = tuple(p for p in PROBLEMS if p.multiply_adds <= MOST_ON_THE_CPU)
    cases = []
    for name in names:
        if name == OPERATOR:
            cases += cases_of_operator(CASES if count is None else count, problems)
        else:
            cases += cases_of_kernel(name, count, problems)
    return cases


def shards(cases: Iterable[Case], count: int) -> list[list[Case]]:
    """Divide cases into at most `count` parts of about the same size.

    A kernel's cases of one dtype stay together: each process has to load and instrument what it
    runs.
    """
    units: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        units.setdefault((case.kernel, case.dtype), []).append(case)
    parts: list[list[Case]] = [[] for _ in range(min(count, len(units)))]
    for unit in sorted(units.values(), key=len, reverse=True):
        min(parts, key=len).extend(unit)
    return parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- The process that the sanitizer watches ------------------------------------------------------


def drive(spec: Path) -> None:
    """Run what a specification says, and tell of each case in a line of JSON.

    The exit status is 0 whatever the results are, so that another one means that the process did
    not come to its end.

    Parameters
    ----------
    spec
        A JSON file with ``tool``, ``device``, and ``cases``, a list, or ``planted``, true.
    """
    work = json.loads(spec.read_text(encoding="utf-8"))
    device = torch.device(work["device"])
    poison_outputs(work["tool"])
    torch.backends.cudnn.allow_tf32 = False
    if work.get("planted"):
        _say(case=0, failure=_attempt(partial(run_planted, work["tool"], device)))
    for number, fields in enumerate(work.get("cases", ())):
        begun = time.monotonic()
        ran: list[str] = []
        case = Case.from_json(fields)
        failure = _attempt(partial(run_case, case, number, device, ran))
        seconds = round(time.monotonic() - begun, 3)
        _say(case=number, failure=failure, ran=ran, seconds=seconds)
        if failure and device.type == "cuda" and _attempt(torch.cuda.synchronize):
            return  # the context is lost, and with it every case to come
    _say(done=True)


def poison_outputs(tool: str) -> None:
    """Let what PyTorch allocates start as NaN, so that a pixel that nobody wrote can't look right.

    For initcheck memory has to stay as nobody has written it.
    """
    poisons = tool != "initcheck"
    torch.utils.deterministic.fill_uninitialized_memory = poisons
    torch.use_deterministic_algorithms(poisons, warn_only=True)


def run_case(case: Case, seed: int, device: torch.device, ran: list[str]) -> str | None:
    """Run a case and say what is wrong with its result, if anything.

    Parameters
    ----------
    case
        What to run.
    seed
        Of its random data.
    device
        A GPU, or the CPU for the simulator.
    ran
        Gets the name of what has computed: a kernel, or ``pytorch``.
    """
    dtype = getattr(torch, case.dtype)
    x, weight, bias = (None if t is None else t.to(dtype) for t in case.problem.random_inputs(seed))
    expected = scatter(x, weight, bias, **case.problem.arguments)
    x = laid_out(x, case.channels_last, case.offset)
    if case.way == "strided tensors":
        x, weight, bias = map(_dense_in_no_format, (x, weight, bias))
    tensors = [None if t is None else moved(t, device) for t in (x, weight, bias)]
    call = _call_operator if case.kernel == OPERATOR else _call_kernel
    y = call(case, tensors, ran).detach().cpu().double().numpy()
    if y.shape != expected.shape:
        return f"the output's shape is {y.shape}, not {expected.shape}"
    error = np.abs(y - expected).max() / max(np.abs(expected).max(), np.finfo(float).tiny)
    # Not >, which a NaN is not.
    return None if error <= GATE else f"wrong by {error:.2g} of the largest output"


def laid_out(x: torch.Tensor, channels_last: bool, offset: int = 0) -> torch.Tensor:
    """Return a copy of `x` in a memory format, `offset` values after its memory's begin."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    strides = torch.empty(x.shape, device="meta", memory_format=order).stride()
    room = torch.zeros(offset + x.numel(), dtype=x.dtype)
    return room.as_strided(x.shape, strides, offset).copy_(x)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor's whole memory to a device: its strides stay, and no kernel runs for it."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((size,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _dense_in_no_format(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    room = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    return room[..., ::2].copy_(tensor)


def _call_kernel(
    case: Case, tensors: Sequence[torch.Tensor | None], ran: list[str]
) -> torch.Tensor:
    ran.append(case.kernel)
    return kernels[case.kernel](*tensors, **case.problem.arguments)


def _call_operator(
    case: Case, tensors: Sequence[torch.Tensor | None], ran: list[str]
) -> torch.Tensor:
    x, weight, bias = tensors
    arguments = case.problem.arguments
    has_gradients = case.way == "gradients"
    for tensor in (x, weight):
        tensor.requires_grad_(has_gradients)
    with _chosen(case, x.device):
        y = lab.conv_transpose2d(x[0] if case.way == "one image" else x, weight, bias, **arguments)
        ran.append(plan_for(x, weight, bias, **arguments).kernel)
    if has_gradients:
        y.backward(torch.ones_like(y))
        for tensor in (x, weight):
            if not tensor.grad.cpu().isfinite().all():
                raise ArithmeticError("a gradient is not finite")
    return y[None] if case.way == "one image" else y


def _chosen(case: Case, device: torch.device) -> AbstractContextManager[object]:
    """Let the dispatch choose what the case's way says."""
    if case.way == "as measured" or device.type != "cuda":
        return nullcontext()
    kernel = case.way if case.way in kernels else _ANY_PROBLEM
    plain = measurements.without_bias(case.problem)
    table = measurements.Table(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        records.Software("", "", "", ""),
        "",
        tuple(
            measurements.Measurement(plain, case.dtype, channels_last, False, 1.0, {kernel: 0.5})
            for channels_last in (False, True)
        ),
    )
    return dispatch.only_by(table)


def _attempt(work: Callable[[], str | None]) -> str | None:
    """Do something; return what it returns, or what it raised, in a line."""
    try:
        return work()
    except Exception as error:  # of any kind: the sanitizer's report says more
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


# ---- Planted bugs --------------------------------------------------------------------------------

#: Threads of a planted kernel's block, and values of its arrays.
THREADS = 128

PLANTED_SOURCE = """
constexpr int THREADS = 128;

__global__ void planted_write_past_the_end(const float* x, float* y) {
  y[threadIdx.x + 1] = x[threadIdx.x];
}

__global__ void planted_race(const float* x, float* y) {
  __shared__ float tile[THREADS];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}

__global__ void planted_uninitialised_read(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x] + 1.0f;
}

// Threads that have ended are not missed at a barrier, so these go on.
__global__ void planted_divergent_barrier(const float* x, float* y) {
  __shared__ float tile[THREADS];
  tile[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) __syncthreads();
  y[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}
"""

#: Tool -> the kernel with the bug that it has to report.
PLANTED = {
    "racecheck": "planted_race",
    "initcheck": "planted_uninitialised_read",
    "memcheck": "planted_write_past_the_end",
    "synccheck": "planted_divergent_barrier",
}


def planted_program(device: str) -> lab.Program:
    """Return the planted bugs, compiled for a device as the package's kernels are."""
    backend = "gpu" if device == "cuda" else "simulator"
    return lab.compile(PLANTED_SOURCE, backend, name="planted_bugs")


def run_planted(tool: str, device: torch.device) -> None:
    """Launch the kernel with the bug that `tool` is for."""
    if tool == "initcheck":
        x = torch.empty(THREADS, device=device)
    else:  # different values: racecheck passes over a race that changes none
        x = torch.arange(THREADS, dtype=torch.float32).to(device)
    y = torch.zeros(THREADS, device=device)
    planted_program(device.type).launch(PLANTED[tool], 1, THREADS, [x, y])


# ---- The sanitizer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sanitizer:
    """A compute-sanitizer.

    Attributes
    ----------
    program
        Its path.
    version
        Such as ``2025.3.1.0``.
    filter_option
        What its version calls the option that limits a tool to some kernels.
    extra
        Further options, for every tool.
    """

    program: str
    version: str
    filter_option: str
    extra: tuple[str, ...] = ()

    @classmethod
    def find(cls, extra: Sequence[str] = ()) -> Sanitizer:
        """Find it on PATH or in the CUDA toolkit.

        Raises
        ------
        SystemExit
            If there is none, or it does not run.
        """
        toolkit = find_toolkit()
        folders = [] if toolkit is None else [toolkit / "bin", toolkit / "compute-sanitizer"]
        path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
        program = shutil.which("compute-sanitizer", path=path)
        if program is None:
            raise SystemExit(
                "compute-sanitizer is neither on PATH nor in the CUDA toolkit "
                f"({toolkit or 'there is none'}): install it, or add its folder to PATH"
            )
        version, usage = (_output_of([program, option]) for option in ("--version", "--help"))
        found = re.search(r"[Vv]ersion (\d[\w.]*)", version)
        is_new = re.search(r"--kernel-name\b", usage)
        return cls(
            program,
            found[1] if found else "unknown",
            "--kernel-name" if is_new else "--kernel-regex",
            tuple(extra),
        )

    def command(self, tool: str, log: Path | str, functions: Iterable[str] = ()) -> list[str]:
        """Return the command that runs `tool`, but for the program to run.

        Parameters
        ----------
        tool
            One of `TOOLS`.
        log
            The file for the sanitizer's own output; the program's stays on the standard ones.
        functions
            Names of CUDA functions: what the tools in `FILTERED` are limited to.
        """
        chosen = sorted(functions) if tool in FILTERED else ()
        filters = (word for name in chosen for word in (self.filter_option, f"kns={name}"))
        return [
            *(self.program, "--tool", tool, *_OPTIONS, *TOOLS[tool], *self.extra, *filters),
            *("--log-file", str(log)),
        ]


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"{command[0]} does not run: {error}") from None
    return done.stdout + done.stderr


def kernel_functions() -> set[str]:
    """Return the names of the package's ``__global__`` functions, templates too."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in KERNEL_FOLDER.glob("*.cu*"))
    return set(re.findall(r"__global__\b[^;{]*?\b(\w+_kernel)\s*\(", text))


# ---- What it says --------------------------------------------------------------------------------

_LINE = re.compile(r"^={8,9}(?:$| )(.*)$", re.MULTILINE)
_SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: ([\d,]+) errors?|RACECHECK SUMMARY: ([\d,]+) hazards? displayed)\b"
)
#: Heads that say nothing.
_HARMLESS = re.compile(r"COMPUTE-SANITIZER$|LEAK SUMMARY: 0 bytes")
#: Heads of reports that may have no line that says where.
_REPORT = re.compile(
    r"(Invalid|Misaligned|Uninitialized|Unused|Host API|Barrier error|Warpgroup MMA|Malloc/Free|"
    r"Leaked|Potential|Deadlock|Program hit|(Error|Warning|Info): (Race|Potential))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Report:
    """One report of the sanitizer: its first line, and those that are indented under it."""

    head: str
    details: tuple[str, ...] = ()

    @property
    def is_message(self) -> bool:
        """Whether it is about the run, not about a kernel."""
        return not (_REPORT.match(self.head) or self.details)

    @property
    def text(self) -> str:
        """All of its lines."""
        return "\n".join([self.head, *self.details])

    def is_in(self, functions: Iterable[str]) -> bool:
        """Return whether it may be about some functions or the package's files.

        It is not if it says where, and names none of them.
        """
        if not any(re.match(r"at |Device Frame", line) for line in self.details):
            return True
        files = [SOURCE_NAME, *(path.name for path in KERNEL_FOLDER.glob("*.cu*"))]
        names = "|".join(map(re.escape, functions))
        places = "|".join(map(re.escape, files))
        return bool(re.search(rf"\b({names})\b|[ /]({places}):\d", self.text))

    def to_json(self) -> dict[str, Any]:
        """Return it without what differs from thread to thread."""
        where = [line for line in self.details if not re.match(r"by thread|Address|and is", line)]
        return {"report": self.head, "where": where[:8]}


def parse(log: str) -> tuple[list[Report], list[str]]:
    """Read the sanitizer's output.

    Parameters
    ----------
    log
        Its log, in which other lines may stand.

    Returns
    -------
    tuple of list of Report and list of str
        What it reports, in order, and its summary lines.
    """
    found: list[tuple[str, list[str]]] = []
    summaries, is_open = [], False
    for body in _LINE.findall(log):
        line = body.strip()
        if _SUMMARY.match(line):
            summaries.append(line)
            is_open = False
        elif not line or _HARMLESS.match(line):
            is_open = False
        elif is_open and (body.startswith(" ") or line.startswith("and ")):
            found[-1][1].append(line)
        else:
            found.append((line, []))
            is_open = True
    return [Report(head, tuple(details)) for head, details in found], summaries


def reported(summaries: Iterable[str]) -> int:
    """Return how many errors and hazards the summary lines tell of."""
    matches = filter(None, map(_SUMMARY.match, summaries))
    return sum(int((match[1] or match[2]).replace(",", "")) for match in matches)


@dataclass(frozen=True)
class Run:
    """What came of one process.

    Attributes
    ----------
    tool
        The sanitizer's.
    name
        What it ran.
    cases
        How many cases it ran.
    seconds
        That it took.
    summaries
        The sanitizer's summary lines.
    reports
        In our kernels, or without a place.
    elsewhere
        In others.
    failures
        Why the process can't be relied on, or which results are wrong.
    ran
        The operator's ways, and what has computed on them.
    """

    tool: str
    name: str
    cases: int
    seconds: float
    summaries: tuple[str, ...]
    reports: tuple[Report, ...] = ()
    elsewhere: tuple[Report, ...] = ()
    failures: tuple[str, ...] = ()
    ran: tuple[tuple[str, str], ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether nothing of ours was reported, and all went well."""
        return not (self.reports or self.failures)

    def __str__(self) -> str:
        said = "; ".join(dict.fromkeys(self.summaries)) or "no summary"
        others = f", {len(self.elsewhere)} of them elsewhere" if self.elsewhere else ""
        return (
            f"{self.tool:9} {self.name}: {said}{others} ({self.cases} cases, {self.seconds:.0f} s)"
        )


def judge(
    tool: str,
    name: str,
    cases: Sequence[Case],
    status: int,
    log: str,
    output: str,
    errors: str = "",
    *,
    seconds: float = 0.0,
    functions: Iterable[str] = (),
) -> Run:
    """Say what came of a process.

    Parameters
    ----------
    tool, name
        What ran.
    cases
        That it was to run, in order.
    status
        Its exit status.
    log
        What the sanitizer wrote.
    output, errors
        What the process wrote to the standard output, JSON lines among it, and to the error output.
    seconds
        That it took.
    functions
        Our CUDA functions.
    """
    told, other = _json_lines(output)
    results = {line["case"]: line for line in told if "case" in line}
    is_done = any("done" in line for line in told)
    said = _tail(errors) or _tail(other) or "no message"
    found, summaries = parse(log)
    reports = [report for report in found if not report.is_message]
    is_ours = [report.is_in(functions) for report in reports]
    failures = [
        *_wrong_results(cases, results),
        *_untimely_end(cases, len(results), is_done, status, seconds, said),
        *(f"the sanitizer says: {r.head}" for r in dict.fromkeys(found) if r.is_message),
        *_gaps(summaries, len(reports), status, log),
    ]
    return Run(
        tool,
        name,
        len(results),
        seconds,
        tuple(summaries),
        tuple(report for report, ours in zip(reports, is_ours, strict=True) if ours),
        tuple(report for report, ours in zip(reports, is_ours, strict=True) if not ours),
        tuple(failures),
        tuple(
            (cases[number].way, kernel)
            for number, line in results.items()
            if number < len(cases) and cases[number].kernel == OPERATOR
            for kernel in line.get("ran", ())
        ),
    )


def _wrong_results(
    cases: Sequence[Case], results: Mapping[int, Mapping[str, Any]]
) -> Iterator[str]:
    for number, line in results.items():
        # A planted bug is no case, and may fail.
        if line.get("failure") and number < len(cases):
            yield f"{cases[number]}: {line['failure']}"


def _untimely_end(
    cases: Sequence[Case], count: int, is_done: bool, status: int, seconds: float, said: str
) -> Iterator[str]:
    where = f" after {count} of {len(cases)} cases"
    if count < len(cases):
        where += f", at {cases[count]}"
    if status == TIMED_OUT:
        yield f"was not done after {seconds:.0f} s and was ended{where}"
    elif not is_done or status not in (0, REPORTED):
        yield f"ended with status {status}{where}: {said}"
    elif count < len(cases):
        yield f"ran {count} of {len(cases)} cases"


def _gaps(summaries: Sequence[str], reports: int, status: int, log: str) -> Iterator[str]:
    """Say what the sanitizer's log lacks."""
    unseen = reported(summaries) - reports
    if not summaries and status != TIMED_OUT:
        yield f"the sanitizer wrote no summary: {_tail(log) or 'its log is empty'}"
    if unseen > 0:
        yield f"the sanitizer counts {unseen} reports more than its log shows"
    elif status == REPORTED and not reports:
        yield "the sanitizer's exit status says that it has reported something"


def _json_lines(output: str) -> tuple[list[dict[str, Any]], str]:
    """Return the objects among the lines, and the other lines: anybody may print something."""
    objects, others = [], []
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            others.append(line)
    return objects, "\n".join(others)


def _tail(text: str, lines: int = 6) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-lines:])


# ---- Processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """Starts the processes.

    Attributes
    ----------
    sanitizer
        What watches them.
    folder
        For their logs.
    device
        ``"cuda"``, or ``"cpu"`` for a trial.
    limit
        Seconds that each of them has.
    functions
        Our CUDA functions, and the planted ones.
    """

    sanitizer: Sanitizer
    folder: Path
    device: str
    limit: float
    functions: frozenset[str]

    def check(self, tool: str, cases: Sequence[Case], number: int) -> Run:
        """Run cases under a tool; `number` tells its files from those of other processes."""
        spec = {"tool": tool, "device": self.device, "cases": [asdict(case) for case in cases]}
        names = ", ".join(dict.fromkeys(case.kernel for case in cases))
        return self._watched(f"{tool}-{number}", names, spec, cases)

    def planted(self, tool: str) -> Run:
        """Run a tool's planted bug under it."""
        spec = {"tool": tool, "device": self.device, "planted": True}
        return self._watched(f"{tool}-planted", PLANTED[tool], spec, ())

    def build(self, name: str) -> str | None:
        """Build a kernel, so that no compiler runs under the sanitizer; return what went wrong."""
        command = [sys.executable, __file__, "--build", name]
        status, _ = self._run(f"build-{name}", command, build_timeout())
        return (
            f"{name} can't be built: {_tail(self._read(f'build-{name}.err'))}" if status else None
        )

    def _watched(self, stem: str, name: str, spec: Mapping[str, Any], cases: Sequence[Case]) -> Run:
        file = self.folder / f"{stem}.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        log = self.folder / f"{stem}.log"
        log.unlink(missing_ok=True)  # an older one must not speak for a process that wrote none
        command = [
            *self.sanitizer.command(spec["tool"], log, self.functions),
            *(sys.executable, __file__, "--drive", str(file)),
        ]
        status, seconds = self._run(stem, command, self.limit)
        return judge(
            *(spec["tool"], name, cases, status),
            *(self._read(f"{stem}.{end}") for end in ("log", "out", "err")),
            seconds=seconds,
            functions=self.functions,
        )

    def _run(self, stem: str, command: Sequence[str], limit: float) -> tuple[int, float]:
        begun = time.monotonic()
        with (
            open(self.folder / f"{stem}.out", "wb") as output,
            open(self.folder / f"{stem}.err", "wb") as errors,
        ):
            done = subprocess.run(
                supervised(command, limit),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                check=False,
            )
        return done.returncode, time.monotonic() - begun

    def _read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def build_planted(device: str) -> None:
    """Build the planted bugs, so that no compiler runs under the sanitizer.

    Raises
    ------
    SystemExit
        If they can't be built.
    """
    try:
        planted_program(device)
    except (BuildError, lab.CompileError) as error:
        raise SystemExit(f"the planted bugs can't be built: {error}") from None


def missed_bugs(runs: Iterable[Run]) -> list[str]:
    """Say which planted bugs were not reported by their tools."""
    return [
        f"{run.tool} did not report {run.name}: {'; '.join(run.failures) or 'it found nothing'}"
        for run in runs
        if not any(run.name in report.text for report in run.reports)
    ]


def check_all(
    runner: Runner,
    tools: Iterable[str],
    parts: Sequence[Sequence[Case]],
    pool: ThreadPoolExecutor,
) -> list[Run]:
    """Run every part under every tool, and print each run as it ends."""
    waiting = [
        pool.submit(runner.check, tool, part, number)
        for tool in tools
        for number, part in enumerate(parts)
    ]
    runs = []
    for future in as_completed(waiting):
        runs.append(future.result())
        print_run(runs[-1])
    return sorted(runs, key=lambda run: (list(TOOLS).index(run.tool), run.name))


def print_run(run: Run) -> None:
    """Print a run's line, and what was found."""
    print(run, flush=True)
    for report, count in Counter(json.dumps(report.to_json()) for report in run.reports).items():
        fields = json.loads(report)
        print(f"  {count} x {fields['report']}", *fields["where"], sep="\n      ")
    for failure in run.failures:
        print(f"  FAILED: {failure}")


def unreached(cases: Iterable[Case], runs: Iterable[Run], device: str) -> list[str]:
    """Say which kernels the operator was asked for and never ran: its ways are not checked then."""
    if device != "cuda":
        return []
    wanted = {case.way for case in cases if case.kernel == OPERATOR and case.way in kernels}
    failures = []
    for tool in dict.fromkeys(run.tool for run in runs):
        reached = {
            way for run in runs if run.tool == tool for way, kernel in run.ran if way == kernel
        }
        failures += [f"{tool}: the operator never ran {name}" for name in sorted(wanted - reached)]
    return failures


# ---- The record ----------------------------------------------------------------------------------


def record_of(
    sanitizer: Sanitizer,
    planted: Sequence[Run],
    runs: Sequence[Run],
    cases: Sequence[Case],
    functions: Iterable[str],
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Return the record, as the module's description tells."""
    is_gpu = device == "cuda"
    cudnn = torch.backends.cudnn.version() or 0
    of_operator: dict[str, Counter[str]] = {}
    for way, kernel in (pair for run in runs for pair in run.ran):
        of_operator.setdefault(way, Counter())[kernel] += 1
    return {
        "schema": 1,
        "what": "what NVIDIA's compute-sanitizer reports of every kernel in every form, and of the "
        "operator, on small problems",
        "gpu": torch.cuda.get_device_name() if is_gpu else "none: a trial on the simulator",
        "date": date.today().isoformat(),
        "software": {
            "convt_lab": lab.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
            "driver": gpu_facts(["driver_version"])["driver_version"] if is_gpu else None,
            "compute_sanitizer": sanitizer.version,
        },
        "seconds": round(seconds, 1),
        "planted": {run.tool: _planted_json(run) for run in planted},
        "problems": len({case.problem for case in cases}),
        "cases": dict(Counter(case.form for case in cases)),
        "operator": {way: dict(counts) for way, counts in sorted(of_operator.items())},
        "tools": {
            tool: {
                "command": _shown(sanitizer.command(tool, "LOG", functions)),
                **_tool_json([run for run in runs if run.tool == tool]),
            }
            for tool in dict.fromkeys(run.tool for run in runs)
        },
    }


def _planted_json(run: Run) -> dict[str, str]:
    heads = [report.head for report in run.reports if run.name in report.text]
    return {"bug": run.name, "report": heads[0] if heads else "none"}


def _tool_json(runs: Sequence[Run]) -> dict[str, Any]:
    def counted(reports: Iterable[Report]) -> list[dict[str, Any]]:
        counts = Counter(json.dumps(report.to_json()) for report in reports)
        return [{**json.loads(text), "count": count} for text, count in counts.items()]

    return {
        "processes": len(runs),
        "cases": sum(run.cases for run in runs),
        "seconds": round(sum(run.seconds for run in runs), 1),
        "summaries": dict(Counter(line for run in runs for line in run.summaries)),
        "reports": counted(report for run in runs for report in run.reports),
        "elsewhere": counted(report for run in runs for report in run.elsewhere),
        "failures": [failure for run in runs for failure in run.failures],
    }


def _shown(command: Sequence[str]) -> str:
    """Return a command without this machine's paths."""
    own = f"python tools/{Path(__file__).name} --drive SPEC"
    return " ".join([Path(command[0]).name, *command[1:], own])


# ---- The command line ----------------------------------------------------------------------------


def _list_of(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no {what}: name some of {', '.join(known)}"
                )
        return names

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*kernels, OPERATOR]
    parser.add_argument(
        "--kernels", type=_list_of(names, "kernel"), default=names, metavar="NAME,...",
        help=f"check these only; the operator is {OPERATOR!r}",
    )  # fmt: skip
    parser.add_argument(
        "--tools", type=_list_of(list(TOOLS), "tool"), default=list(TOOLS), metavar="NAME,...",
        help=f"of {', '.join(TOOLS)}",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, help="of each kernel, about, where fewer shall do")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time (8)")
    parser.add_argument("--shards", type=int, default=4, help="processes of each tool (4)")
    parser.add_argument(
        "--timeout", type=float, default=240.0, help="seconds for each process (240)"
    )
    parser.add_argument("--planted-only", action="store_true", help="find the planted bugs only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs there")
    parser.add_argument(
        "--sanitizer-options", default="", metavar="TEXT", help="further ones, for every tool"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial on the simulator"
    )
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", choices=list(kernels), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print and write the record; return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.drive:
        drive(arguments.drive)
        return 0
    if arguments.build:
        kernels[arguments.build].program("gpu")
        return 0
    sanitizer = Sanitizer.find(shlex.split(arguments.sanitizer_options))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: the sanitizer checks on an NVIDIA GPU")
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
        return _check(arguments, sanitizer, arguments.logs.resolve(), _is_whole(arguments, parser))
    with tempfile.TemporaryDirectory() as folder:
        return _check(arguments, sanitizer, Path(folder), _is_whole(arguments, parser))


def _is_whole(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Return whether everything is checked that belongs into the record."""
    return (
        arguments.device == "cuda"
        and set(arguments.kernels) == set(parser.get_default("kernels"))
        and set(arguments.tools) == set(parser.get_default("tools"))
        and arguments.cases is None
    )


def _check(
    arguments: argparse.Namespace, sanitizer: Sanitizer, folder: Path, is_whole: bool
) -> int:
    begun = time.monotonic()
    device, tools = arguments.device, [tool for tool in TOOLS if tool in arguments.tools]
    functions = frozenset(kernel_functions() | set(PLANTED.values()))
    runner = Runner(sanitizer, folder, device, arguments.timeout, functions)
    left_out = _left_out(device)
    names = [name for name in arguments.kernels if name not in left_out]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        builds = [pool.submit(runner.build, name) for name in _to_build(arguments, names)]
        build_planted(device)
        planted = list(pool.map(runner.planted, tools))
        if missed := missed_bugs(planted):
            pool.shutdown(wait=False, cancel_futures=True)
            print("the check can't be trusted:", *missed, sep="\n  ")
            return 1
        for run in planted:
            print(f"{run.tool:9} finds {run.name}: {_planted_json(run)['report']}", flush=True)
        if arguments.planted_only:
            return 0
        if unbuilt := [text for build in builds if (text := build.result())]:
            raise SystemExit("\n".join(unbuilt))
        print(f"everything is built after {time.monotonic() - begun:.0f} s", flush=True)
        cases = [c for c in all_cases(names, arguments.cases, device) if c.way not in left_out]
        runs = check_all(runner, tools, shards(cases, arguments.shards), pool)
    failures = unreached(cases, runs, device)
    print(*failures, sep="\n", end="\n" if failures else "")
    seconds = time.monotonic() - begun
    record = record_of(sanitizer, planted, runs, cases, functions, seconds, device)
    _write({**record, "failures": failures}, arguments.output, is_whole)
    is_clean = not failures and all(run.is_clean for run in runs)
    print("nothing was reported" if is_clean else "the check has failed: see above")
    return 0 if is_clean else 1


def _left_out(device: str) -> list[str]:
    """Return the kernels whose instructions the GPU lacks."""
    if device != "cuda":
        return []
    capability = torch.cuda.get_device_capability()
    names = [name for name, kernel in kernels.items() if kernel.min_capability > capability]
    for name in names:
        print(f"{name} is left out: this GPU lacks its instructions")
    return names


def _to_build(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the kernels to build before they run: on the simulator whoever comes first does it."""
    if arguments.planted_only or arguments.device != "cuda":
        return []
    # The operator may run any.
    return [name for name in kernels if name in names or OPERATOR in names]


def _write(record: Mapping[str, Any], path: Path | None, is_whole: bool) -> None:
    if path is None and not is_whole:
        print("not written: a part of the record; name a file with --output", file=sys.stderr)
        return
    if path is None:
        path = records.FOLDER / f"{records.slug(record['gpu'])}-sanitizer.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}: {sum(record['cases'].values())} cases for each tool")


if __name__ == "__main__":
    sys.exit(main())
