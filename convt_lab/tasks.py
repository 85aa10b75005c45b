"""What is timed: a call with its inputs, in its settings, in its thread.

Threads are there for cuDNN's sake. It chooses an algorithm by one run of each, on a warm cache, so
that it takes now this and now that one of two which are nearly as fast, and PyTorch keeps the
choice for as long as the thread lives. Asking in several threads and keeping the fastest is what
makes two measurements comparable.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from convt_lab.measure import Clock, Timing, median_times

__all__ = [
    "FEWEST_CHOICES",
    "SECONDS_FOR_CHOICES",
    "Task",
    "TaskClock",
    "Thread",
    "cold_times",
    "cudnn_at_its_best",
    "with_best_choice",
]

#: How often cuDNN chooses at least, if it may choose that often.
FEWEST_CHOICES = 2

#: Seconds after which it is not asked to choose again.
SECONDS_FOR_CHOICES = 1.5

# Runs by which two choices are compared: of some 10 us a run's start is a good part, and varies.
_RUNS_TO_COMPARE, _RUNS_IF_SHORT, _SHORT = 3, 15, 200e-6

_T = TypeVar("_T")


def cudnn_at_its_best(allow_tf32: bool) -> AbstractContextManager[object]:
    """Return a context in which cuDNN tries every algorithm that it has, and takes the fastest."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=True, benchmark_limit=0, allow_tf32=allow_tf32
    )


class Thread:
    """A thread that runs what it is given, one after the other.

    Parameters
    ----------
    device
        ``"cuda"`` to work on the CUDA device that is current here.
    """

    def __init__(self, device: str) -> None:
        index = torch.cuda.current_device() if device == "cuda" else None
        initialise = (lambda: None) if index is None else partial(torch.cuda.set_device, index)
        self._executor = ThreadPoolExecutor(1, initializer=initialise)

    def run(self, work: Callable[[], _T]) -> _T:
        """Run `work`; return what it returns, raise what it raises."""
        return self._executor.submit(work).result()

    def close(self) -> None:
        """End the thread, and with it cuDNN's choices."""
        self._executor.shutdown()


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes
    ----------
    name
        Different from that of what it is compared with.
    call
        Enqueues the work on the current stream; returns the output.
    settings
        Makes the context to call it in.
    thread
        Where to call it; the thread that asks, if None.
    """

    name: str
    call: Callable[[], torch.Tensor]
    settings: Callable[[], AbstractContextManager[object]] = nullcontext
    thread: Thread | None = None

    def __call__(self) -> torch.Tensor:
        """Call it in its settings, here."""
        with self.settings():
            return self.call()

    def run(self, work: Callable[[], _T]) -> _T:
        """Run something in the task's thread."""
        return work() if self.thread is None else self.thread.run(work)


class TaskClock:
    """A clock that times each task in its own thread.

    Attributes
    ----------
    running
        The name of the task that was run last.
    """

    def __init__(self, clock: Clock) -> None:
        self.running = ""
        self._clock = clock

    def time(self, task: Task) -> float:
        """Run a task cold and return its seconds."""
        self.running = task.name
        return task.run(partial(self._clock.time, task))


def with_best_choice(task: Task, clock: Clock, device: str, choices: int) -> Task:
    """Let cuDNN choose an algorithm several times, each in a new thread.

    Parameters
    ----------
    task
        What is to be called.
    clock
        What times the choices.
    device
        ``"cuda"``, or ``"cpu"`` in tests.
    choices
        How often, at most; it is done less often where it takes long.

    Returns
    -------
    Task
        `task` in the thread of the fastest choice, which the caller closes; `task` itself if
        `choices` is 0.
    """
    best, fastest = None, math.inf
    begin = time.monotonic()
    for count in range(choices):
        if count >= FEWEST_CHOICES and time.monotonic() - begin > SECONDS_FOR_CHOICES:
            break
        tried = replace(task, thread=Thread(device))
        try:
            tried.run(tried)
            times = [TaskClock(clock).time(tried)]
            runs = _RUNS_IF_SHORT if times[0] < _SHORT else _RUNS_TO_COMPARE
            times += [TaskClock(clock).time(tried) for _ in range(runs - 1)]
        except BaseException:
            for opened in (tried, best):
                if opened:
                    opened.thread.close()
            raise
        seconds, loser = statistics.median(times), tried
        if best is None or seconds < fastest:
            best, fastest, loser = tried, seconds, best
        if loser:
            loser.thread.close()
    return best or task


def cold_times(
    tasks: MutableMapping[str, Task],
    clock: Clock,
    on_run: Callable[[str], object] | None = None,
    on_failure: Callable[[str, Exception], object] | None = None,
    runs: int | None = None,
) -> dict[str, Timing]:
    """Time tasks against each other, in interleaved rounds of cold runs.

    Parameters
    ----------
    tasks
        By name. What raises a RuntimeError is taken out, and the rest is done again.
    clock
        What times one run.
    on_run
        Called with a task's name after each of its runs.
    on_failure
        Called with the name and the error of what is taken out.
    runs
        As for `convt_lab.measure.median_times`.

    Returns
    -------
    dict of str to Timing
    """
    while tasks:
        watched = TaskClock(clock)
        try:
            return median_times(tasks, watched, on_run, runs)
        except RuntimeError as error:
            if on_failure:
                on_failure(watched.running, error)
            del tasks[watched.running]
    return {}
