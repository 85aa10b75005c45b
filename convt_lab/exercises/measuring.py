"""The exercises of the chapter on honest measurements.

What is measured here is drawn by a seeded generator, or is a pretended GPU, so that the true times
are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real

import numpy as np

from convt_lab.exercises.python import FunctionExercise

__all__ = ["EXERCISES", "Machine"]

_SERIES = 200


def _is_time(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# ---- One number out of many ----------------------------------------------------------------------


def _series() -> Iterator[tuple[str, float, list[float]]]:
    """Draw runs of kernels: (what befell them, the true time, the samples)."""
    generator = np.random.default_rng(0)
    for number in range(_SERIES):
        true = float(generator.uniform(1e-3, 9e-3))
        count = int(generator.integers(12, 15) if number % 2 else generator.integers(20, 41))
        warm_ups = int(generator.integers(0, 6))
        samples = true * (1 + 0.003 * generator.standard_normal(count))
        samples[:warm_ups] *= 1 + 10 * 0.5 ** np.arange(warm_ups)
        late = np.arange(5, count)
        interrupted = generator.choice(late, number % 3, False)
        samples[interrupted] *= generator.uniform(1.5, 6, len(interrupted))
        lucky = number % 5 == 0
        if lucky:  # a launch that was refused: no work, no time
            samples[generator.choice(np.setdiff1d(late, interrupted))] *= 0.01
        label = f"{count} runs, {warm_ups} of them warm-ups, {len(interrupted)} interrupted"
        yield label + (", one refused" if lucky else ""), true, samples.tolist()


def _judge_estimate(function: Callable) -> tuple[str | None, str]:
    wrong, first = 0, ""
    for label, true, samples in _series():
        found = function(list(samples))
        if not _is_time(found):
            return f"{label}: it returns {found!r}, which is no time", ""
        if abs(found / true - 1) > 0.01:
            first = first or (
                f"{label}: yours {1e3 * found:.3f} ms, and an undisturbed run takes "
                f"{1e3 * true:.3f} ms"
            )
            wrong += 1
    if wrong:
        return f"{first}\nmore than 1% off in {wrong} of {_SERIES} series", ""
    return None, f"within 1% of the true time in all of {_SERIES} series"


# ---- Which of two is faster ----------------------------------------------------------------------

_ROUNDS = 20


def _rounds(
    seed: int, factor: float, drift: float, interrupted: float
) -> Iterator[tuple[list[float], list[float]]]:
    """Draw comparisons in which theirs takes `factor` times as long as ours.

    drift: by how much the machine slows down from the first round to the last. interrupted: the
    share of their runs that something else gets in the way of.
    """
    generator = np.random.default_rng(seed)
    for _ in range(_SERIES):
        slower = 1 + drift * np.linspace(0, 1, _ROUNDS)
        ours, theirs = (1e-3 * slower * (1 + 0.01 * generator.standard_normal((2, _ROUNDS)))).copy()
        theirs *= factor
        hit = generator.random(_ROUNDS) < interrupted
        theirs[hit] *= generator.uniform(2, 5, int(hit.sum()))
        yield ours.tolist(), theirs.tolist()


#: What is compared: the text, the arguments of `_rounds`, and the right answer.
_COMPARISONS: tuple[tuple[str, tuple[int, float, float, float], str | None], ...] = (
    ("two kernels that take equally long", (0, 1.0, 0.0, 0.0), None),
    ("two that take equally long, on a machine that slows down", (1, 1.0, 0.3, 0.0), None),
    ("theirs takes 2% longer", (2, 1.02, 0.0, 0.0), "ours"),
    ("theirs takes 2% longer, on a machine that slows down", (3, 1.02, 0.3, 0.0), "ours"),
    (
        "ours takes 3% longer, and some of their runs are interrupted",
        (4, 1 / 1.03, 0, 0.1),
        "theirs",
    ),
)


def _judge_faster(function: Callable) -> tuple[str | None, str]:
    lines, passed = [], True
    for text, arguments, truth in _COMPARISONS:
        answers: list[object] = []
        for ours, theirs in _rounds(*arguments):
            found = function(ours, theirs)
            if found is not None and found not in ("ours", "theirs"):
                return (
                    f"{text}: it returns {found!r}, and should return 'ours', 'theirs' or None",
                    "",
                )
            answers.append(found)
        if truth is None:
            count = sum(answer is not None for answer in answers)
            met = count <= 0.1 * _SERIES
            bound = f"a winner is named in at most {_SERIES // 10}"
        else:
            count = answers.count(truth)
            met = count >= 0.9 * _SERIES
            bound = f"{truth!r} in at least {9 * _SERIES // 10}"
        passed = passed and met
        lines.append(f"{text}: {bound} of {_SERIES}; yours: {count}")
    return (None, "\n".join(lines)) if passed else ("\n".join(lines), "")


# ---- A pretended GPU -----------------------------------------------------------------------------


class Machine:
    """A GPU and the Python that feeds it, pretended: it knows what time it is for both.

    Parameters
    ----------
    cold, warm
        Seconds of a run whose inputs are not in the L2 cache, and of one whose are.
    """

    ENQUEUE = 120e-6  # seconds that Python needs to launch the kernel,
    BUILD = 30e-3  # more for the first time,
    CALL = 5e-6  # and for any other call
    FLUSH = 60e-6  # seconds of the GPU
    MOST_CALLS = 20_000

    def __init__(self, cold: float, warm: float) -> None:
        self.cold, self.warm = cold, warm
        self.runs = 0
        self._calls = 0
        self._python = self._gpu = 0.0  # what time it is; when the GPU will have done everything
        self._in_cache = False
        self._generator = np.random.default_rng(0)

    def __repr__(self) -> str:
        return "<machine>"

    def _enqueue(self, python: float, gpu: float) -> None:
        self._calls += 1
        if self._calls > self.MOST_CALLS:
            raise RuntimeError(f"more than {self.MOST_CALLS:,} calls: when does it end?")
        self._python += python
        self._gpu = max(self._gpu, self._python) + gpu

    def run(self) -> None:
        """Enqueue the kernel, and return before it is done."""
        seconds = self.warm if self._in_cache else self.cold
        seconds *= 1 + 0.004 * self._generator.standard_normal()
        if self._generator.random() < 0.08:  # interrupted
            seconds *= 4
        self._enqueue(self.ENQUEUE + (0 if self.runs else self.BUILD), seconds)
        self._in_cache = True
        self.runs += 1

    def flush(self) -> None:
        """Enqueue what empties the L2 cache."""
        self._enqueue(self.CALL, self.FLUSH)
        self._in_cache = False

    def busy(self, seconds: float) -> None:
        """Enqueue something that keeps the GPU busy for so long and leaves the cache alone."""
        if not _is_time(seconds) or not 0 <= seconds <= 1:
            raise ValueError(f"seconds={seconds!r}: must be from 0 to 1")
        self._enqueue(self.CALL, float(seconds))

    def event(self) -> float:
        """Enqueue an event: when the GPU passes it."""
        self._enqueue(self.CALL, 0)
        return self._gpu

    def seconds(self, begin: float, end: float) -> float:
        """Wait, and return the seconds from one event to the other."""
        self.wait()
        return end - begin

    def wait(self) -> None:
        """Wait until the GPU has done everything."""
        self._enqueue(self.CALL, 0)
        self._python = self._gpu

    def now(self) -> float:
        """Return what Python's clock says."""
        return self._python


def _judge_cold(function: Callable) -> tuple[str | None, str]:
    told = []
    for cold, warm in ((58e-6, 41e-6), (9e-6, 6e-6), (5.2e-3, 5.0e-3)):
        machine = Machine(cold, warm)
        found = function(machine)
        if not _is_time(found):
            return f"it returns {found!r}, which is no time", ""
        told.append(f"yours {1e6 * found:,.1f} µs; a cold run takes {1e6 * cold:,.1f}")
        if not machine.runs:
            return f"{told[-1]}, and yours runs nothing", ""
        if abs(found / cold - 1) > 0.02:
            return (
                f"{told[-1]}, and one with its inputs in the cache {1e6 * warm:,.1f}. Python takes "
                f"{1e6 * machine.ENQUEUE:,.0f} to enqueue the kernel and "
                f"{1e6 * machine.BUILD:,.0f} more for the first time; a flush takes the GPU "
                f"{1e6 * machine.FLUSH:,.0f}",
                "",
            )
    return None, "\n".join(told)


EXERCISES = (
    FunctionExercise(
        name="measuring.1",
        function="estimate",
        text='''
def estimate(samples):
    """The seconds of an undisturbed run, from samples in the order of the runs.

    Up to five runs at the beginning are slower, because something is built or
    allocated. Some of the others were interrupted, and a few did not run at all.
    """
    return sum(samples) / len(samples)
''',
        edits={"return sum(samples) / len(samples)": "return float(np.median(samples[5:]))"},
        judge=_judge_estimate,
        hints=(
            "What does a single run that took six times as long do to the mean? And one that did "
            "nothing to the minimum?",
            "Runs of which you know that they are different are no part of the sample. Leave them "
            "out before you ask for any average.",
            "`np.median` of `samples[5:]`.",
        ),
        why="The warm-ups are known to be different, so they don't count. Among the others the "
        "median ignores how far off the disturbed ones are, in both directions, as long as they "
        "are less than half. The mean is pulled up by each interrupted run, and the minimum is "
        "the run that never ran.",
    ),
    FunctionExercise(
        name="measuring.2",
        function="faster",
        text='''
def faster(ours, theirs):
    """Which is faster, "ours" or "theirs", or None if the samples don't say.

    Both are seconds, measured in rounds: ours[i] and theirs[i] ran one after the
    other.
    """
    return "ours" if np.median(ours) < np.median(theirs) else "theirs"
''',
        edits={
            '    return "ours" if np.median(ours) < np.median(theirs) else "theirs"': (
                "    ratios = np.sort(np.array(theirs) / np.array(ours))\n"
                "    middle, reach = (len(ratios) - 1) / 2, 1.96 * len(ratios) ** 0.5 / 2\n"
                "    low = ratios[int(np.floor(middle - reach))]\n"
                "    high = ratios[int(np.ceil(middle + reach))]\n"
                "    if low > 1:\n"
                '        return "ours"\n'
                '    return "theirs" if high < 1 else None'
            )
        },
        judge=_judge_faster,
        hints=(
            "If both take equally long, one median is still smaller than the other. When is a "
            "difference more than chance?",
            "What drifts from round to round is the same for both runs of a round. Divide first, "
            "round by round, and ask how sure the ratios are.",
            "The chapter's interval of a median works for ratios as well: of the sorted values the "
            "two that are `1.96 * sqrt(n) / 2` places from the middle. Is one inside it?",
        ),
        why="A ratio within a round has lost the drift. The interval of the median of the ratios "
        "asks for no distribution, so interrupted runs move it little. If one lies inside, the "
        "samples don't say who is faster, and whoever names a winner all the same draws lots. "
        "Counting the rounds that each wins, and asking whether a coin would do it as often, "
        "is as good.",
    ),
    FunctionExercise(
        name="measuring.3",
        function="cold_seconds",
        text='''
def cold_seconds(machine):
    """The seconds that a cold run of the machine's kernel takes on the GPU.

    machine.run()          enqueues the kernel and returns before it is done
    machine.flush()        enqueues what empties the L2 cache
    machine.busy(seconds)  enqueues something that keeps the GPU busy for so long
    machine.event()        enqueues an event and returns it
    machine.seconds(a, b)  waits, and returns the seconds from event a to event b
    machine.wait()         waits until the GPU has done everything
    machine.now()          what Python's clock says, in seconds
    """
    begin = machine.now()
    machine.run()
    return machine.now() - begin
''',
        edits={
            "    begin = machine.now()\n    machine.run()\n    return machine.now() - begin": (
                "    times = []\n"
                "    for _ in range(23):\n"
                "        machine.flush()\n"
                "        machine.busy(1e-3)\n"
                "        begin = machine.event()\n"
                "        machine.run()\n"
                "        end = machine.event()\n"
                "        times.append(machine.seconds(begin, end))\n"
                "    return float(np.median(times[3:]))"
            )
        },
        judge=_judge_cold,
        hints=(
            "Python's clock measures Python. Let the GPU take the time: an event before the "
            "kernel and one behind it. And one run is no sample.",
            "If the GPU has nothing to do when the first event comes, it passes it at once and "
            "waits for Python to launch the kernel. What must be in the queue before the event?",
            "In each round: `flush`, then `busy` for about a millisecond, then event, kernel, "
            "event. The median of the rounds, without the first ones.",
        ),
        why="The events are the GPU's own clock. While `busy` holds the GPU, Python has the time "
        "to enqueue event, kernel and event, so that nothing but the kernel lies between the two. "
        "The flush stands before them, outside of what is timed, and in every round. The first "
        "runs build something, and some later one is interrupted: hence warm-ups and a median.",
    ),
)
