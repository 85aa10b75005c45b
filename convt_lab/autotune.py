"""Measuring a problem the first time it is seen, and remembering it beyond the process.

What was measured is kept in ``autotune.json`` in the cache folder (see `convt_lab.build`), by all
that a time depends on: the GPU, its driver, PyTorch, cuDNN, the kernels' sources; and by problem,
dtype, memory format and PyTorch's settings. The file is replaced as a whole, under a lock and with
what other processes have added meanwhile. A file that can't be read or written is said once and
does no other harm: what is measured then lasts as long as the process.

``CONVT_AUTOTUNE`` says when to measure: 1, each problem that is not remembered; 0, never. If it is
not set, ``torch.backends.cudnn.benchmark`` decides, which asks PyTorch to do the same. The variable
is read where a problem is new to the process; PyTorch's setting is followed at every call.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from convt_lab import records
from convt_lab.backend import kernel_headers
from convt_lab.build import BuildError, cache_folder
from convt_lab.errors import CompileError
from convt_lab.measure import Clock, EventClock, gpu_facts
from convt_lab.operator_record import PYTORCH
from convt_lab.problem import Problem
from convt_lab.records import Node, RecordError
from convt_lab.tasks import Task, cold_times

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "VARIABLE",
    "Memory",
    "case_name",
    "environment",
    "is_on",
    "measure",
]

#: The environment variable that says when to measure.
VARIABLE = "CONVT_AUTOTUNE"

#: What the file is called, in the cache folder.
FILE_NAME = "autotune.json"

#: The version of the file that is written and read.
SCHEMA = 1

#: Seconds to wait for another process that writes the file.
LOCK_TIMEOUT = 10.0

#: How many environments and, in each, how many problems are kept: those that were used last.
MOST_ENVIRONMENTS, MOST_CASES = 8, 4096

#: Timed runs of PyTorch and of each kernel: a choice between what is nearly as fast matters little.
RUNS = 7

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

#: Seconds by name, ``pytorch`` or a kernel's.
Times = Mapping[str, float]


def is_on() -> bool:
    """Return whether to measure problems that nothing is remembered of.

    Raises
    ------
    ValueError
        If ``CONVT_AUTOTUNE`` is set to anything but 0 and 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE}={value!r}: must be 1 (measure each problem once), 0 (never measure) or "
            "not set (measure if torch.backends.cudnn.benchmark is True)"
        )
    return torch.backends.cudnn.benchmark if value == "" else value == "1"


# ---- What a time depends on ----------------------------------------------------------------------


@functools.cache
def environment(index: int) -> str:
    """Return everything outside a problem on which times depend, in one line.

    Parameters
    ----------
    index
        Of the CUDA device.
    """
    sources = hashlib.sha256()
    for path in kernel_headers():
        sources.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (
        torch.cuda.get_device_name(index),
        f"driver {_driver(index)}",
        f"torch {torch.__version__}",
        f"CUDA {torch.version.cuda}",
        f"cuDNN {torch.backends.cudnn.version()}",
        f"kernels {sources.hexdigest()[:16]}",
    )
    return ", ".join(parts)


def _driver(index: int) -> str:
    """Return the driver's version as the kernel module says it, else as nvidia-smi does."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\b\d+\.\d+(\.\d+)*\b", _DRIVER_FILE.read_text(errors="replace")):
            return found[0]
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) or None
    uuid = uuid if uuid is None or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return gpu_facts(["driver_version"], uuid)["driver_version"] or "unknown"


def case_name(problem: Problem, dtype: torch.dtype, channels_last: bool, tf32: bool) -> str:
    """Return what a measurement is called: a problem, its form, and PyTorch's settings."""
    cudnn = torch.backends.cudnn
    words = [
        str(dtype).removeprefix("torch."),
        "channels_last" if channels_last else "contiguous",
        *(["tf32"] if tf32 else []),
        *(["cudnn.benchmark"] if cudnn.benchmark else []),
        *(["cudnn.deterministic"] if cudnn.deterministic else []),
        *([] if cudnn.enabled else ["cudnn disabled"]),
    ]
    sizes = (
        f"input {_by(problem.input_shape)} weight {_by(problem.weight_shape)} "
        f"stride {_by(problem.stride)} padding {_by(problem.padding)} "
        f"output_padding {_by(problem.output_padding)} dilation {_by(problem.dilation)} "
        f"groups {problem.groups} bias {int(problem.bias)}"
    )
    return f"{' '.join(words)}: {sizes}"


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


# ---- Memory --------------------------------------------------------------------------------------


class Memory:
    """What was measured, in this process and in those before it.

    Parameters
    ----------
    folder
        Gives the folder of the file; `cache_folder` if None. It is made when something is written.

    Notes
    -----
    Threads may use it at once. A file that is damaged, of another version or out of reach is said
    in one warning, and left as it is.
    """

    def __init__(self, folder: Callable[[], Path] | None = None) -> None:
        self._folder = folder or cache_folder
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, dict[str, Any]]] = {}
        self._was_read = False
        self._is_broken = False

    def recall(self, environment: Callable[[], str], case: str) -> Times | None:
        """Return the seconds that were measured of a case, or None.

        Parameters
        ----------
        environment
            Gives the environment's name; it is asked only if something is remembered at all.
        case
            From `case_name`.
        """
        with self._lock:
            if not self._was_read:
                self._was_read = True
                with self._reported():
                    self._known = _merged(_read(self._path), self._known)
            if not self._known:
                return None
            found = self._known.get(environment(), {}).get(case)
            return found and found["seconds"]

    def remember(self, environment: str, case: str, seconds: Times) -> None:
        """Keep what was measured of a case, in the file too unless that is impossible."""
        entry = {"seconds": dict(seconds), "date": date.today().isoformat()}
        with self._lock:
            self._known = _merged(self._known, {environment: {case: entry}})
            if self._is_broken:
                return
            with self._reported():
                path = self._path
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _file_lock(path):
                    self._known = _merged(_read(path), self._known)
                    records.write_text(
                        path, records.text_of({"schema": SCHEMA, **_file(self._known)})
                    )

    @property
    def _path(self) -> Path:
        return self._folder() / FILE_NAME

    @contextlib.contextmanager
    def _reported(self):
        """Say what is wrong with the file, once, and go on without it."""
        try:
            yield
        except (OSError, BuildError, RecordError, Timeout) as error:
            if self._is_broken:
                return
            self._is_broken = True
            damaged = isinstance(error, RecordError)
            remedy = "delete the file" if damaged else "set CONVT_LAB_CACHE to a folder of your own"
            message = f"{type(error).__name__}: {error}" if isinstance(error, Timeout) else error
            warnings.warn(
                f"convt_lab keeps measured times for this process only: {message}; {remedy}",
                RuntimeWarning,
                stacklevel=2,
            )


def _file(known: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    return {"what": "measured seconds; see convt_lab/autotune.py", "environments": known}


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what a file holds, checked; nothing if there is none."""
    try:
        value = records.read_json(path)
    except FileNotFoundError:
        return {}
    root = Node(value, "", str(path))
    records.require_schema(root, SCHEMA)
    _, what, environments = root.fields("schema", "what", "environments")
    what.text()
    return {
        name: {case: _entry(entry) for case, entry in cases.members().items()}
        for name, cases in environments.members().items()
    }


def _entry(node: Node) -> dict[str, Any]:
    seconds, day = node.fields("seconds", "date")
    values = {name: value.positive() for name, value in seconds.members().items()}
    if PYTORCH not in values:
        raise seconds.wrong(f"an object with {PYTORCH}")
    return {"seconds": values, "date": records.read_day(day)}


def _merged(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """Return both, `new` where both have it and last, without what was used longest ago."""
    merged = {name: dict(cases) for name, cases in old.items()}
    for name, cases in new.items():
        before = merged.pop(name, {})
        for case, entry in cases.items():
            before.pop(case, None)
            before[case] = entry
        merged[name] = dict(list(before.items())[-MOST_CASES:])
    return dict(list(merged.items())[-MOST_ENVIRONMENTS:])


@contextlib.contextmanager
def _file_lock(path: Path):
    """Hold the lock of a file; where a file system has no locks, the last writer wins."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)  # a Timeout is an OSError without a number
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


# ---- Measuring -----------------------------------------------------------------------------------


def measure(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    kernels: Mapping[str, Callable[..., torch.Tensor]],
    clock: Clock | None = None,
) -> tuple[Times, dict[str, Exception]]:
    """Time PyTorch's operator, in the settings as they are, and kernels on random inputs.

    Parameters
    ----------
    problem
        The shapes.
    dtype
        Of all tensors.
    device
        Where they are.
    channels_last
        Whether input and weight are so; else they are contiguous.
    kernels
        By name; called as ``torch.nn.functional.conv_transpose2d`` is.
    clock
        What times a run; an `EventClock` if None.

    Returns
    -------
    tuple of Times and dict
        Seconds by name, ``pytorch`` and those kernels that ran; and what the others raised.

    Raises
    ------
    RuntimeError
        If PyTorch itself did not run: there is not enough memory, say.
    """
    failures: dict[str, Exception] = {}
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.no_grad())
        if device.type == "cuda":
            settings.enter_context(torch.cuda.device(device))
            settings.enter_context(torch.autocast("cuda", enabled=False))
        inputs = _inputs(problem, dtype, device, channels_last)
        calls = {PYTORCH: F.conv_transpose2d, **kernels}
        tasks: dict[str, Task] = {}
        for name, function in calls.items():
            task = Task(name, functools.partial(function, *inputs, **problem.arguments))
            try:
                task()  # it may have to be built
            except (BuildError, CompileError, RuntimeError) as error:
                if name == PYTORCH:
                    raise
                failures[name] = error
            else:
                tasks[name] = task
        times = cold_times(tasks, clock or EventClock(), None, failures.__setitem__, RUNS)
    if PYTORCH not in times:
        raise failures[PYTORCH]
    return {name: timing.median for name, timing in times.items()}, failures


def _inputs(
    problem: Problem, dtype: torch.dtype, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw inputs with a generator of its own: the user's random numbers stay as they are."""
    generator = torch.Generator(device).manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, weight = (
        draw(shape).contiguous(memory_format=memory_format)
        for shape in (problem.input_shape, problem.weight_shape)
    )
    return x, weight, draw(problem.bias_shape) if problem.bias else None
