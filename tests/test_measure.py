"""Timing: which runs there are, in what order; what the sensors said; and on a GPU, that events
measure the GPU's work."""

import sys
import textwrap
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

    def test_what_is_not_sure_goes_on_until_it_is(self):
        noise = [0.9e-5, 1.1e-5] * 30
        clock = ScriptedClock({"a": [1e-5] * 3 + noise + [1e-5] * 200, "b": [1e-5] * 23})
        timings = measure.median_times(functions("a", "b"), clock)
        assert len(timings["b"].samples) == measure.RUNS
        count = len(timings["a"].samples)
        assert 60 < count < measure.MOST_RUNS
        assert timings["a"].spread <= measure.NARROW
        assert measure.Timing(timings["a"].samples[:-1]).spread > measure.NARROW

    @pytest.mark.parametrize(("seconds", "most"), [(1e-5, 200), (0.01, 100), (0.04, 25), (0.3, 5)])
    def test_what_is_never_sure_ends(self, seconds, most):
        noise = [0.8 * seconds, 1.2 * seconds] * 100
        clock = ScriptedClock({"a": [seconds] * 3 + noise})
        assert len(measure.median_times(functions("a"), clock)["a"].samples) == most

    def test_as_many_runs_as_asked_for(self):
        clock = ScriptedClock({"a": [1e-5] * 3 + [1e-5, 2e-5] * 3 + [9.0]})
        assert len(measure.median_times(functions("a"), clock, runs=6)["a"].samples) == 6

    def test_the_spread_is_that_of_the_order_statistics(self):
        # Of 100 samples, 9.8 places to either side of the middle, 49.5: numbers 39 and 60.
        values = [float(i) for i in range(100, 200)]
        timing = measure.Timing(tuple(reversed(values)))
        assert timing.median == 149.5
        assert timing.spread == pytest.approx((160 - 149.5) / 149.5)
        assert measure.Timing((2.0, 2.0, 2.0)).spread == 0
        assert measure.Timing((2.0,)).spread == 0
        assert measure.Timing((1.0, 2.0, 4.0)).spread == 1

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


class RepeatingClock:
    """Says how long runs take back to back: so many seconds each, one value for each attempt."""

    def __init__(self, *seconds, enqueue=1e-6):
        self.seconds = iter(seconds)
        self.enqueue = enqueue
        self.runs = []

    def repeat(self, function, runs):
        self.runs.append(runs)
        return measure.Repeats(runs * next(self.seconds), self.enqueue)


class TestSustained:
    def test_a_run_is_the_totals_share(self):
        clock = RepeatingClock(0.002)
        sustained = measure.sustained_time(print, 0.002, clock)
        assert sustained.seconds == pytest.approx(0.002)
        assert clock.runs == [sustained.runs] == [132]  # 5 % more than a quarter of a second
        assert sustained.load == measure.Load()

    @pytest.mark.parametrize("seconds", [0.3, 1.0, 60.0])
    def test_one_run_of_what_takes_long(self, seconds):
        clock = RepeatingClock(seconds)
        assert measure.sustained_time(print, seconds, clock).runs == 1

    def test_what_turns_out_faster_is_run_again(self):
        clock = RepeatingClock(0.001, 0.001)  # cold it took 2 ms
        sustained = measure.sustained_time(print, 0.002, clock, minimum=0.1)
        assert clock.runs == [53, 111]
        assert (sustained.runs, sustained.seconds) == (111, pytest.approx(0.001))

    def test_the_last_attempt_counts_if_all_are_short(self):
        clock = RepeatingClock(*[1e-4, 1e-5, 1e-6, 1e-7])
        sustained = measure.sustained_time(print, 0.001, clock, minimum=0.1)
        assert len(clock.runs) == 4
        assert sustained.runs == clock.runs[-1]
        assert sustained.seconds == pytest.approx(1e-7)

    def test_no_time_at_all_is_no_division_by_zero(self):
        clock = RepeatingClock(0.0, 0.0, 0.0, 0.0)
        assert measure.sustained_time(print, 0.0, clock, minimum=1e-4).seconds == 0

    @pytest.mark.parametrize(("enqueue", "is_bound"), [(1e-5, False), (5e-5, False), (9e-5, True)])
    def test_a_gpu_that_waits_for_python_is_known(self, enqueue, is_bound):
        clock = RepeatingClock(1e-4, enqueue=enqueue)
        assert measure.sustained_time(print, 1e-4, clock).is_host_bound == is_bound

    def test_the_sensors_are_asked_about_the_last_attempt(self):
        spans = []

        class Readings(measure.Sampler):
            def between(self, begin, end):
                spans.append((begin, end))
                return measure.Load(len(spans))

        clock = RepeatingClock(0.0005, 0.001)
        sustained = measure.sustained_time(print, 0.001, clock, Readings())
        assert sustained.load == measure.Load(2)
        assert spans[0][0] <= spans[0][1] <= spans[1][0] <= spans[1][1]


def fake_smi(tmp_path, body):
    """Return a command that stands for nvidia-smi; `body` may use `arguments` and `say(line)`."""
    script = tmp_path / "smi.py"
    script.write_text(
        "import sys, time\narguments = sys.argv[1:]\n"
        "def say(line):\n    print(line, flush=True)\n" + textwrap.dedent(body)
    )
    return [sys.executable, str(script)]


LOOP = """
fields = arguments[0].removeprefix("--query-gpu=").split(",")
assert arguments[1] == "--format=csv,noheader,nounits", arguments
values = {"clocks.sm": "1980", "power.draw": "650.5", "temperature.gpu": "45"}
if "-lms" not in arguments:
    say(", ".join(values.get(field, "[N/A]") for field in fields))
    sys.exit()
say("no numbers")
for count in range(1000):
    values["clocks.sm"] = str(1000 + 500 * (count % 2))
    say(", ".join(values[field] for field in fields))
    time.sleep(0.01)
"""


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestSampler:
    def test_it_reads_while_something_runs(self, tmp_path):
        with measure.Sampler(command=fake_smi(tmp_path, LOOP)) as sampler:
            begin = time.monotonic()
            wait_for(lambda: sampler.between(begin, time.monotonic()).samples >= 6)
            load = sampler.between(begin, time.monotonic())
            process = sampler._process
            assert process.poll() is None
        assert process.poll() is not None
        assert 1000 < load.sm_clock_mhz < 1500
        assert load.power_watts == 650.5
        assert load.temperature_c == 45
        assert sampler.power_field == "power.draw"
        later = time.monotonic()
        assert sampler.between(later, later + 1) == measure.Load()

    def test_the_instant_power_is_preferred(self, tmp_path):
        body = LOOP.replace('"power.draw":', '"power.draw.instant":')
        with measure.Sampler(command=fake_smi(tmp_path, body)) as sampler:
            assert sampler.power_field == "power.draw.instant"
            wait_for(lambda: sampler.between(0, time.monotonic()).samples)
        assert sampler.between(0, time.monotonic()).power_watts == 650.5

    def test_the_gpu_is_named(self, tmp_path):
        body = """
        assert arguments[arguments.index("-i") + 1] == "GPU-12-34"
        say("1, 2, 3")
        """
        with measure.Sampler("GPU-12-34", command=fake_smi(tmp_path, body)) as sampler:
            wait_for(lambda: sampler.between(0, time.monotonic()).samples)
        assert sampler.between(0, time.monotonic()) == measure.Load(1, 1.0, 2.0, 3.0)

    def test_a_sensor_that_says_nothing(self, tmp_path):
        body = 'say("1500, [Insufficient Permissions], [N/A]")'
        with measure.Sampler(command=fake_smi(tmp_path, body)) as sampler:
            wait_for(lambda: sampler.between(0, time.monotonic()).samples)
        assert sampler.between(0, time.monotonic()) == measure.Load(1, 1500.0, None, None)

    @pytest.mark.parametrize("body", ["sys.exit(9)", "print('no devices were found')", "1 / 0"])
    def test_an_nvidia_smi_that_fails(self, tmp_path, body):
        with measure.Sampler(command=fake_smi(tmp_path, body)) as sampler:
            sampler._process.wait(timeout=20)
        assert sampler.between(0, time.monotonic()) == measure.Load()

    def test_no_nvidia_smi(self):
        with measure.Sampler(command=["no-such-program"]) as sampler:
            assert sampler.between(0, time.monotonic()) == measure.Load()

    def test_one_that_does_not_end_is_ended(self, tmp_path, monkeypatch):
        body = """
        import signal
        if "-lms" in arguments:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                say("1, 2, 3")
                time.sleep(0.01)
        """
        monkeypatch.setattr(measure, "_END_TIMEOUT", 0.2)
        with measure.Sampler(command=fake_smi(tmp_path, body)) as sampler:
            wait_for(lambda: sampler.between(0, time.monotonic()).samples)
        assert sampler._process.returncode == -9


class TestFacts:
    def test_values_and_what_is_not_known(self, tmp_path):
        command = fake_smi(tmp_path, 'say("700.00, [N/A], , 580.65.06")')
        facts = measure.gpu_facts(["a", "b", "c", "d"], command=command)
        assert facts == {"a": "700.00", "b": None, "c": None, "d": "580.65.06"}

    @pytest.mark.parametrize("body", ["say('1, 2'); sys.exit(4)", "say('1')", "pass"])
    def test_a_failure_is_not_known_either(self, tmp_path, body):
        facts = measure.gpu_facts(["a", "b"], command=fake_smi(tmp_path, body))
        assert facts == {"a": None, "b": None}

    def test_no_nvidia_smi(self):
        assert measure.gpu_facts(["a"], command=["no-such-program"]) == {"a": None}


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

    def test_back_to_back(self):
        clock = measure.EventClock()
        x = torch.zeros(2**27, device="cuda")
        cold = measure.median_time(lambda: x.add_(1), clock).median
        sustained = measure.sustained_time(lambda: x.add_(1), cold, clock, minimum=0.05)
        # Far less than a run alone would be a share of too little time; more, the GPU's other work.
        assert sustained.seconds > 0.7 * cold
        assert sustained.runs * sustained.seconds >= 0.05
        assert sustained.seconds < 0.05  # one run's share, not all runs' time

    def test_slow_python_is_noticed(self):
        clock = measure.EventClock()
        x = torch.zeros(10, device="cuda")

        def slow_in_python():
            time.sleep(1e-3)
            x.add_(1)

        assert measure.sustained_time(slow_in_python, 1e-3, clock, minimum=0.05).is_host_bound
