"""How long a kernel takes on a GPU: the median of cold runs, by CUDA events.

A run is cold when the L2 cache holds nothing of its inputs: something larger is written before
each. What is compared is measured in the same rounds, one run of each after the other, so that a
clock that drifts with the temperature drifts for all of them.

Only what `EventClock` does needs a GPU; how many runs there are and in what order is plain Python.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "FEWEST_RUNS",
    "RUNS",
    "WARM_UPS",
    "Clock",
    "EventClock",
    "Timing",
    "median_time",
    "median_times",
    "runs_for",
]

#: Timed runs of a kernel that takes at most 50 ms.
RUNS = 20

#: Timed runs of a kernel that takes long.
FEWEST_RUNS = 5

#: Runs before the timed ones: the first builds, allocates and lets cuDNN choose an algorithm.
WARM_UPS = 3

_SECONDS_FOR_RUNS = 1.0  # what all timed runs of one slow kernel may take together
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


class Clock(Protocol):
    """Anything that can run a function once and say how long it took."""

    def time(self, function: Callable[[], object]) -> float:
        """Run `function` cold and return its seconds."""
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
) -> dict[str, Timing]:
    """Time several functions against each other, in interleaved rounds of cold runs.

    Parameters
    ----------
    functions
        By name. Each enqueues its work on the current stream of the current CUDA device.
    clock
        What times one run; an `EventClock` if None.
    on_run
        Called with a function's name after each of its runs, warm-ups included: for a progress bar.

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

    wanted = {}
    for name in functions:
        for _ in range(WARM_UPS):
            seconds = run(name)
        wanted[name] = runs_for(seconds)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(max(wanted.values(), default=0)):
        for name in functions:
            if round_index < wanted[name]:
                samples[name].append(run(name))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


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
