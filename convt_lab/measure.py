"""How long a kernel takes on a GPU: the median of cold runs, and sustained, by CUDA events.

A run is cold when the L2 cache holds nothing of its inputs: something larger is written before
each. What is compared is measured in the same rounds, one run of each after the other, so that a
clock that drifts with the temperature drifts for all of them.

Sustained is the time of one run among many, back to back for a quarter of a second: with what the
run before left in the cache, and with the clock that the GPU's power limit allows. A `Sampler`
reads clock, power and temperature meanwhile.

Only what `EventClock` does needs a GPU; how many runs there are and in what order is plain Python.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "FEWEST_RUNS",
    "MOST_RUNS",
    "NARROW",
    "RUNS",
    "SUSTAINED_SECONDS",
    "WARM_UPS",
    "Clock",
    "EventClock",
    "Load",
    "Repeats",
    "Sampler",
    "Sustained",
    "Timing",
    "gpu_facts",
    "median_time",
    "median_times",
    "runs_for",
    "sustained_time",
]

#: Timed runs of a kernel that takes at most 50 ms, unless its median is not sure by then.
RUNS = 20

#: Timed runs at most of a kernel whose median is not sure.
MOST_RUNS = 200

#: A median is sure if its confidence interval reaches no further than this share of it.
NARROW = 0.01

#: Timed runs of a kernel that takes long.
FEWEST_RUNS = 5

#: Runs before the timed ones: the first builds, allocates and lets cuDNN choose an algorithm.
WARM_UPS = 3

#: Seconds for which a sustained measurement keeps the GPU busy, at least.
SUSTAINED_SECONDS = 0.25

_SECONDS_FOR_RUNS = 1.0  # what all timed runs of one slow kernel may take together
_HOST_BOUND = 0.8  # of a run's seconds: Python's own pace varies by that much
_CONFIDENCE = 1.96  # standard deviations to either side: 95 %
_ENQUEUED_FREELY = 16  # runs: their launches fit in the driver's queue, so that none waits
_ATTEMPTS = 4  # at a sustained measurement that turns out too short
_SECONDS_AHEAD = 1e-3  # how long the GPU is kept busy before a run, while Python prepares it


@dataclass(frozen=True)
class Timing:
    """The timed runs of one function.

    Attributes
    ----------
    samples
        Seconds, one value for each run, in the order of the runs.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """How far the median's 95 % confidence interval reaches to its farther side, over it.

        The interval is that of the order statistics, which asks for no particular distribution:
        of n sorted samples the two that are ``1.96 * sqrt(n) / 2`` places from the middle.
        """
        ordered, count = sorted(self.samples), len(self.samples)
        reach = _CONFIDENCE * math.sqrt(count) / 2
        low = ordered[max(0, math.floor((count - 1) / 2 - reach))]
        high = ordered[min(count - 1, math.ceil((count - 1) / 2 + reach))]
        return max(high - self.median, self.median - low) / self.median


@dataclass(frozen=True)
class Repeats:
    """One function run back to back.

    Attributes
    ----------
    seconds
        Of all runs together, on the GPU.
    enqueue_seconds
        What Python takes to enqueue one run.
    """

    seconds: float
    enqueue_seconds: float


@dataclass(frozen=True)
class Load:
    """What the GPU's own sensors said in a span of time; None where they said nothing.

    Attributes
    ----------
    samples
        How often they were read.
    sm_clock_mhz, power_watts
        The mean of the samples.
    temperature_c
        The highest, in degrees Celsius.
    """

    samples: int = 0
    sm_clock_mhz: float | None = None
    power_watts: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Sustained:
    """A function's time among many runs, back to back.

    Attributes
    ----------
    seconds
        Of one run: the total over their number.
    runs
        Their number.
    enqueue_seconds
        What Python takes to enqueue one run.
    load
        Clock, power and temperature meanwhile.
    """

    seconds: float
    runs: int
    enqueue_seconds: float
    load: Load = Load()

    @property
    def is_host_bound(self) -> bool:
        """Whether the GPU waited for Python, so that `seconds` is no property of the kernel."""
        return self.enqueue_seconds > _HOST_BOUND * self.seconds


class Clock(Protocol):
    """Anything that can run a function and say how long it took."""

    def time(self, function: Callable[[], object]) -> float:
        """Run `function` cold and return its seconds."""
        ...

    def repeat(self, function: Callable[[], object], runs: int) -> Repeats:
        """Run `function` as often as `runs` says, back to back."""
        ...


class EventClock:
    """Times work on the current CUDA device and stream, each run with a cold L2 cache.

    Before a run it writes a buffer of four times the L2 cache's size, as often as keeps the GPU
    busy for a millisecond. That empties the cache of the run's inputs, and by the time the GPU
    reaches the run, Python has enqueued all of it: what is timed is the GPU's work, not Python's.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        megabyte = 2**20
        flushed_bytes = 4 * max(properties.L2_cache_size, 8 * megabyte)
        self._buffer = torch.empty(flushed_bytes, dtype=torch.uint8, device="cuda")
        self._writes = 1
        for _ in range(WARM_UPS):
            seconds = self._between_events(self._buffer.zero_)
        self._writes = max(1, math.ceil(_SECONDS_AHEAD / max(seconds, 1e-6)))

    def time(self, function: Callable[[], object]) -> float:
        """Run `function`, which enqueues work on the current stream; return the work's seconds."""
        for _ in range(self._writes):
            self._buffer.zero_()
        return self._between_events(function)

    def repeat(self, function: Callable[[], object], runs: int) -> Repeats:
        """Enqueue `function` `runs` times with nothing between; wait for the last."""
        counted = min(runs, _ENQUEUED_FREELY)
        enqueued = 0.0

        def all_runs() -> None:
            nonlocal enqueued
            begin = time.perf_counter()
            for _ in range(counted):
                function()
            enqueued = time.perf_counter() - begin
            for _ in range(runs - counted):
                function()

        torch.cuda.synchronize()  # the queue is empty
        seconds = self._between_events(all_runs)
        return Repeats(seconds, enqueued / counted)

    @staticmethod
    def _between_events(function: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def runs_for(seconds: float) -> int:
    """Return how many timed runs a function gets that takes about `seconds`.

    `RUNS` up to 50 ms, fewer the longer it takes, but at least `FEWEST_RUNS`.
    """
    affordable = RUNS if seconds <= 0 else int(_SECONDS_FOR_RUNS / seconds)
    return max(FEWEST_RUNS, min(RUNS, affordable))


def median_times(
    functions: Mapping[str, Callable[[], object]],
    clock: Clock | None = None,
    on_run: Callable[[str], object] | None = None,
    runs: int | None = None,
) -> dict[str, Timing]:
    """Time several functions against each other, in interleaved rounds of cold runs.

    Each gets as many runs as `runs_for` says; then those whose median is not sure (`NARROW`) go on
    for as long as that takes, up to `MOST_RUNS` or a second. Those are kernels of some
    microseconds, of which a run's start is a good part.

    Parameters
    ----------
    functions
        By name. Each enqueues its work on the current stream of the current CUDA device.
    clock
        What times one run; an `EventClock` if None.
    on_run
        Called with a function's name after each of its runs, warm-ups included: for a progress bar.
    runs
        How many timed runs each gets, whatever its time and spread; None for the above.

    Returns
    -------
    dict of str to Timing
        With the names and the order of `functions`.
    """
    clock = clock or EventClock()

    def run(name: str) -> float:
        seconds = clock.time(functions[name])
        if on_run:
            on_run(name)
        return seconds

    wanted, most = {}, {}
    for name in functions:
        for _ in range(WARM_UPS):
            seconds = run(name)
        wanted[name] = runs_for(seconds) if runs is None else runs
        most[name] = _most_runs(seconds) if runs is None else runs
    samples: dict[str, list[float]] = {name: [] for name in functions}

    def goes_on(name: str) -> bool:
        count = len(samples[name])
        if count < wanted[name]:
            return True
        return count < most[name] and Timing(tuple(samples[name])).spread > NARROW

    going = list(functions)
    while going := [name for name in going if goes_on(name)]:
        for name in going:
            samples[name].append(run(name))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _most_runs(seconds: float) -> int:
    """Return how many runs a function gets whose median stays unsure: a second's, up to 200."""
    affordable = int(_SECONDS_FOR_RUNS / max(seconds, _SECONDS_AHEAD))
    return max(runs_for(seconds), min(MOST_RUNS, affordable))


def median_time(function: Callable[[], object], clock: Clock | None = None) -> Timing:
    """Time one function: the median of at least `FEWEST_RUNS` cold runs, after `WARM_UPS`.

    Parameters
    ----------
    function
        Enqueues its work on the current stream of the current CUDA device.
    clock
        What times one run; an `EventClock` if None.

    Returns
    -------
    Timing
    """
    return median_times({"function": function}, clock)["function"]


def sustained_time(
    function: Callable[[], object],
    estimate: float,
    clock: Clock,
    sampler: Sampler | None = None,
    minimum: float = SUSTAINED_SECONDS,
) -> Sustained:
    """Time one function among many runs, back to back for at least `minimum` seconds.

    Parameters
    ----------
    function
        Enqueues its work on the current stream of the current CUDA device.
    estimate
        Seconds of one run, such as the median of cold ones.
    clock
        What times the runs.
    sampler
        What reads the GPU's sensors meanwhile; None for nothing.
    minimum
        Seconds that all runs take together, at least. It is done over with more runs if they took
        less, a few times at most: the last of them counts.

    Returns
    -------
    Sustained
    """
    runs = max(1, math.ceil(1.05 * minimum / max(estimate, 1e-6)))
    for _ in range(_ATTEMPTS):
        begin = time.monotonic()
        repeats = clock.repeat(function, runs)
        load = sampler.between(begin, time.monotonic()) if sampler else Load()
        if repeats.seconds >= minimum:
            break
        runs, finished = math.ceil(1.1 * runs * minimum / max(repeats.seconds, 1e-6)), runs
    else:
        runs = finished
    return Sustained(repeats.seconds / runs, runs, repeats.enqueue_seconds, load)


_SMI = ("nvidia-smi",)
_END_TIMEOUT = 5.0  # seconds
_SMI_TIMEOUT = 30.0  # seconds; without persistence mode the driver is loaded first


def gpu_facts(
    fields: Sequence[str], uuid: str | None = None, command: Sequence[str] = _SMI
) -> dict[str, str | None]:
    """Ask nvidia-smi about a GPU; what it does not know or may not say is None.

    Parameters
    ----------
    fields
        Names that ``nvidia-smi --help-query-gpu`` lists.
    uuid
        Of the GPU, ``GPU-...``; the first one if None.
    command
        What to start in place of nvidia-smi.

    Returns
    -------
    dict of str to str or None
        With the names and the order of `fields`, without units.
    """
    try:
        result = subprocess.run(
            [*command, *_query(fields, uuid)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SMI_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(fields)
    lines = result.stdout.splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if result.returncode != 0 or len(cells) != len(fields):
        return dict.fromkeys(fields)
    return {
        field: None if not cell or cell.startswith("[") or cell == "N/A" else cell
        for field, cell in zip(fields, cells, strict=True)
    }


def _query(fields: Sequence[str], uuid: str | None) -> list[str]:
    only = ["-i", uuid] if uuid else ["-i", "0"]
    return [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *only]


class Sampler:
    """Reads a GPU's clock, power and temperature while something else runs on it.

    It reads what nvidia-smi prints, some twenty lines a second, and changes no setting. Without
    nvidia-smi, or where it may not look, every `Load` is empty.

    Parameters
    ----------
    uuid
        Of the GPU, ``GPU-...``; the first one if None.
    interval_ms
        Milliseconds between two readings.
    command
        What to start in place of nvidia-smi.

    Attributes
    ----------
    power_field
        The sensor of `Load.power_watts`: ``power.draw.instant`` where the driver has it, else
        ``power.draw``, which on some GPUs is the mean of the last second.

    Examples
    --------
    >>> with Sampler() as sampler:  # doctest: +SKIP
    ...     begin = time.monotonic()
    ...     work()
    ...     load = sampler.between(begin, time.monotonic())
    """

    def __init__(
        self, uuid: str | None = None, interval_ms: int = 50, command: Sequence[str] = _SMI
    ) -> None:
        self.power_field = "power.draw"
        self._uuid = uuid
        self._interval_ms = interval_ms
        self._command = tuple(command)
        self._samples: list[tuple[float, tuple[float | None, ...]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        instant = "power.draw.instant"
        if _number(gpu_facts([instant], self._uuid, self._command)[instant]) is not None:
            self.power_field = instant
        fields = ("clocks.sm", self.power_field, "temperature.gpu")
        with contextlib.suppress(OSError):  # no nvidia-smi: there is nothing to read
            self._process = subprocess.Popen(
                [*self._command, *_query(fields, self._uuid), "-lms", str(self._interval_ms)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None or self._thread is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(timeout=_END_TIMEOUT)
        self._process.stdout.close()

    def between(self, begin: float, end: float) -> Load:
        """Summarise what was read from `begin` to `end`, seconds of ``time.monotonic()``."""
        rows = [values for moment, values in list(self._samples) if begin <= moment <= end]
        clock, power, temperature = (
            [value for value in column if value is not None]
            for column in (zip(*rows, strict=True) if rows else ([], [], []))
        )
        return Load(
            samples=len(rows),
            sm_clock_mhz=statistics.fmean(clock) if clock else None,
            power_watts=statistics.fmean(power) if power else None,
            temperature_c=max(temperature) if temperature else None,
        )

    def _read(self) -> None:
        for line in self._process.stdout:
            values = tuple(_number(cell) for cell in line.split(","))
            if len(values) == 3 and any(value is not None for value in values):
                self._samples.append((time.monotonic(), values))


def _number(text: str | None) -> float | None:
    """Return what a sensor says, or None where it says ``[N/A]`` or the like."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
