"""Timing: which runs there are, in what order; and on a GPU, that events measure the GPU's work."""

import time

import pytest
import torch

from convt_lab import measure


class ScriptedClock:
    """Runs nothing faster or slower: it takes each run's seconds from its own list."""

    def __init__(self, seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order = []

    def time(self, function):
        name = function()
        self.order.append(name)
        return next(self.seconds[name])


def functions(*names):
    return {name: lambda name=name: name for name in names}


class TestRuns:
    @pytest.mark.parametrize(
        ("seconds", "runs"),
        [(0.0, 20), (1e-6, 20), (0.049, 20), (0.1, 10), (0.125, 8), (0.2, 5), (60.0, 5)],
    )
    def test_fewer_of_what_takes_long(self, seconds, runs):
        assert measure.runs_for(seconds) == runs

    def test_the_warm_ups_are_not_counted(self):
        clock = ScriptedClock({"a": [9.0] * 2 + [0.001] + [0.002] * 20})
        timing = measure.median_times(functions("a"), clock)["a"]
        assert timing.samples == (0.002,) * 20

    def test_rounds_are_interleaved_and_a_slow_function_leaves_early(self):
        clock = ScriptedClock({"slow": [1.0] * 8, "fast": [0.001] * 23})
        timings = measure.median_times(functions("slow", "fast"), clock)
        warm_ups, rounds = clock.order[:6], clock.order[6:]
        assert warm_ups == ["slow"] * 3 + ["fast"] * 3
        assert rounds == ["slow", "fast"] * 5 + ["fast"] * 15
        assert {name: len(t.samples) for name, t in timings.items()} == {"slow": 5, "fast": 20}

    def test_progress_is_told_of_every_run(self):
        clock = ScriptedClock({"a": [0.001] * 23})
        told = []
        measure.median_times(functions("a"), clock, told.append)
        assert told == ["a"] * 23

    def test_nothing_to_time(self):
        assert measure.median_times({}, ScriptedClock({})) == {}

    def test_an_outlier_does_not_move_the_median(self):
        clock = ScriptedClock({"a": [0.5] * 4 + [7.0] + [0.5] * 3})
        assert measure.median_time(lambda: "a", clock).median == 0.5


@pytest.mark.gpu
class TestEventClock:
    def test_it_measures_the_gpus_work_and_not_pythons(self):
        clock = measure.EventClock()
        x = torch.zeros(2**20, device="cuda")
        assert 0 < measure.median_time(lambda: x.add_(1), clock).median < 1e-4

        def slow_in_python():
            time.sleep(2e-4)
            x.add_(1)

        assert measure.median_time(slow_in_python, clock).median < 1.5e-4

    def test_more_work_takes_longer(self):
        clock = measure.EventClock()
        small = torch.zeros(2**22, device="cuda")
        large = torch.zeros(2**27, device="cuda")
        timings = measure.median_times(
            {"small": lambda: small.add_(1), "large": lambda: large.add_(1)}, clock
        )
        ratio = timings["large"].median / timings["small"].median
        assert 10 < ratio < 64
