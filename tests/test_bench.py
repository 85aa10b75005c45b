"""The benchmark: what it measures, in which order, what it refuses, and what it keeps."""

import math
import os
import re
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from records_for_tests import PROBLEM, pytorch, record, stage

import convt_lab as lab
import convt_lab.__main__ as command_line
from convt_lab import (
    Problem,
    bench,
    figures,
    measure,
    measurements,
    operator_bench,
    operator_record,
    records,
    tasks,
)
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.measure import Load, Repeats, Sampler
from convt_lab.records import PYTORCH_ROWS, Row, Shape
from convt_lab.stages import fma_stages

SMALL = Problem(2, 3, 4, 5, 6, kernel_size=(3, 7))


class FakeClock:
    """Runs functions and says that each took a millisecond; keeps what it was asked for."""

    def __init__(self, seconds=0.001):
        self.seconds = seconds
        self.repeated = []

    def time(self, function):
        function()
        return self.seconds

    def repeat(self, function, runs):
        function()
        self.repeated.append(runs)
        return Repeats(runs * self.seconds, 1e-6)


class FakeStage:
    """PyTorch's operator on the CPU, with something done to the result; keeps its calls."""

    def __init__(self, change=lambda y: y):
        self.change = change
        self.calls = 0

    def __call__(self, x, weight, bias, **arguments):
        self.calls += 1
        return self.change(F.conv_transpose2d(x, weight, bias, **arguments))


def fail(y):
    raise lab.KernelError("it\nstopped")


def tools(clock=None, sampler=None, peak_bytes=lambda call: call().numel()):
    return bench.Instruments("cpu", clock or FakeClock(), sampler, peak_bytes)


def candidate(name, function):
    return bench.Candidate(Row(name, "stage", "float32", "contiguous", None, "ok"), function)


def measured(candidates, problem=SMALL, instruments=None, **arguments):
    rows = bench.measure_problem(
        problem, problem.random_inputs(), candidates, instruments or tools(), **arguments
    )
    return {row.name: row for row in rows}


class TestProblem:
    def test_a_right_stage_is_judged_and_timed(self):
        clock = FakeClock()
        row = measured([candidate("right", FakeStage())], instruments=tools(clock))["right"]
        assert row.is_right
        assert 0 < row.errors.relative_l2 < 1e-6
        assert row.errors.condition <= row.errors.gate
        assert row.cold.samples == (0.001,) * measure.RUNS
        assert row.sustained.seconds == pytest.approx(0.001)
        assert row.sustained.runs * 0.001 >= measure.SUSTAINED_SECONDS
        assert clock.repeated == [row.sustained.runs]

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            (lambda y: y * (1 + 1e-5), "wrong"),
            (torch.empty_like, "wrong"),
            (lambda y: y[..., :-1], "failed"),
            (fail, "failed"),
        ],
        ids=["rounded", "unwritten", "shape", "raises"],
    )
    def test_a_wrong_stage_is_not_timed(self, change, status):
        wrong, right = FakeStage(change), FakeStage()
        rows = measured([candidate("wrong", wrong), candidate("right", right)])
        row = rows["wrong"]
        assert row.status == status
        assert wrong.calls == 1
        assert row.cold is row.sustained is row.peak_bytes is None
        assert rows["right"].is_right
        assert right.calls > measure.RUNS
        assert (row.failure is None) == (status == "wrong")

    def test_a_failure_is_told_in_one_line(self):
        row = measured([candidate("wrong", FakeStage(fail))])["wrong"]
        assert row.failure == "KernelError: it stopped"

    def test_everything_is_judged_before_anything_is_timed(self):
        order = []
        stages = [
            candidate(name, FakeStage(lambda y, name=name: order.append(name) or y))
            for name in ("a", "b")
        ]
        measured(stages, instruments=tools(peak_bytes=lambda call: 0))
        assert order[:2] == ["a", "b"]  # judged
        assert order[2:4] == ["a", "b"]  # memory
        assert order[4:10] == ["a"] * 3 + ["b"] * 3  # warm-ups
        assert order[10:50] == ["a", "b"] * 20  # rounds
        assert order[50:] == ["a", "b"]  # sustained

    def test_what_fails_while_it_is_timed_fails_alone(self):
        class Tired(FakeStage):
            def __call__(self, *arguments, **keywords):
                if self.calls == 10:
                    raise RuntimeError("an illegal memory access")
                return super().__call__(*arguments, **keywords)

        rows = measured([candidate("tired", Tired()), candidate("right", FakeStage())])
        assert rows["tired"].failure == "RuntimeError: an illegal memory access"
        assert rows["tired"].cold is None
        assert len(rows["right"].cold.samples) == measure.RUNS

    def test_a_failure_in_the_sustained_runs_leaves_no_times(self):
        class Failing(FakeClock):
            def repeat(self, function, runs):
                raise RuntimeError("too hot")

        row = measured([candidate("a", FakeStage())], instruments=tools(Failing()))["a"]
        assert row.failure == "RuntimeError: too hot"
        assert row.cold is row.sustained is None

    def test_memory_is_asked_for(self):
        def peak(call):
            assert call().shape == SMALL.output_shape
            return 123

        row = measured([candidate("a", FakeStage())], instruments=tools(peak_bytes=peak))["a"]
        assert row.peak_bytes == 123

    def test_the_sensors_are_read_meanwhile(self):
        class Readings(Sampler):
            def between(self, begin, end):
                assert begin <= end
                return Load(3, 1500.0, 700.0, 60.0)

        row = measured([candidate("a", FakeStage())], instruments=tools(sampler=Readings()))["a"]
        assert row.sustained.load == Load(3, 1500.0, 700.0, 60.0)

    def test_a_curve_needs_no_sustained_time(self):
        clock = FakeClock()
        row = measured([candidate("a", FakeStage())], instruments=tools(clock), sustained=False)
        assert row["a"].cold
        assert row["a"].sustained is None
        assert clock.repeated == []

    @pytest.mark.parametrize(
        ("image", "value", "is_right"),
        [(0, 1.0, False), (2, 1.0, False), (1, 1.0, True), (1, math.nan, False)],
    )
    def test_only_some_images_are_judged_but_none_may_be_nan(self, image, value, is_right):
        def change(y):
            y[image, 0, 0, 0] += value
            return y

        problem = Problem(3, 3, 4, 5, 6, kernel_size=3)
        rows = measured([candidate("a", FakeStage(change))], problem, images=[0, 2])
        assert rows["a"].is_right == is_right

    def test_a_stage_writes_into_poisoned_memory(self):
        filled = []
        stage = FakeStage(lambda y: filled.append(torch.empty(50).isnan().all().item()) or y)
        measured([candidate("a", stage)])
        assert filled[0]
        assert not torch.are_deterministic_algorithms_enabled()


class TestPyTorch:
    def test_its_forms(self, monkeypatch):
        seen = {}

        def function(x, weight, bias, **arguments):
            backend = torch.backends.cudnn
            formats = torch.contiguous_format, torch.channels_last
            seen[len(seen)] = (
                x.dtype,
                weight.dtype,
                *(x.is_contiguous(memory_format=f) for f in formats),
                *(weight.is_contiguous(memory_format=f) for f in formats),
                backend.allow_tf32,
                backend.benchmark,
            )
            return F.conv_transpose2d(x.float(), weight.float(), bias, **arguments)

        monkeypatch.setattr(bench, "F", type("F", (), {"conv_transpose2d": function}))
        before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
        forms = bench.pytorch_candidates()
        assert [form.row.name for form in forms] == list(PYTORCH_ROWS)
        rows = measured(forms)
        assert all(row.status == "ok" for row in rows.values())
        single, half = torch.float32, torch.float16
        nchw, nhwc = (True, False), (False, True)
        assert [seen[i] for i in range(6)] == [
            (single, single, *nchw, *nchw, False, True),
            (single, single, *nhwc, *nhwc, False, True),
            (single, single, *nchw, *nchw, True, True),
            (single, single, *nhwc, *nhwc, True, True),
            (half, half, *nchw, *nchw, True, True),
            (half, half, *nhwc, *nhwc, True, True),
        ]
        assert set(seen.values()) == {seen[i] for i in range(6)}  # timed as judged
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before

    def test_cudnn_tries_every_algorithm(self, monkeypatch):
        asked = {}
        monkeypatch.setattr(torch.backends.cudnn, "flags", lambda **flags: asked.update(flags))
        for form in bench.pytorch_candidates(("cudnn_float32", "cudnn_tf32")):
            form.settings()
            assert asked == dict(
                enabled=True,
                benchmark=True,
                benchmark_limit=0,
                allow_tf32=form.row.name == "cudnn_tf32",
            )

    def test_the_fastest_of_cudnns_choices_is_the_one_that_is_measured(self, monkeypatch):
        here = threading.current_thread()
        speeds = iter((0.004, 0.002, 0.003))
        speed_of = threading.local()

        def function(x, weight, bias, **arguments):
            if not hasattr(speed_of, "seconds"):  # a thread's first call chooses
                speed_of.seconds = next(speeds)
            return F.conv_transpose2d(x, weight, bias, **arguments)

        class Clock(FakeClock):
            def time(self, function):
                function()
                return speed_of.seconds

            def repeat(self, function, runs):
                function()
                return Repeats(runs * speed_of.seconds, 1e-6)

        def peak(call):
            call()
            assert threading.current_thread() is not here
            return int(1000 * speed_of.seconds)

        monkeypatch.setattr(bench, "F", type("F", (), {"conv_transpose2d": function}))
        before = threading.active_count()
        instruments = bench.Instruments("cpu", Clock(), None, peak, choices=3)
        row = measured(bench.pytorch_candidates(("cudnn_float32",)), instruments=instruments)
        row = row["cudnn_float32"]
        assert next(speeds, None) is None  # asked three times, and not for the judging
        assert row.cold.samples == (0.002,) * measure.RUNS
        assert row.sustained.seconds == pytest.approx(0.002)
        assert row.peak_bytes == 2
        assert threading.active_count() == before

    def test_where_choosing_takes_long_it_is_not_done_often(self, monkeypatch):
        threads = set()

        def function(x, weight, bias, **arguments):
            threads.add(threading.current_thread())
            return F.conv_transpose2d(x, weight, bias, **arguments)

        monkeypatch.setattr(bench, "F", type("F", (), {"conv_transpose2d": function}))
        monkeypatch.setattr(tasks, "SECONDS_FOR_CHOICES", 0.0)
        instruments = bench.Instruments("cpu", FakeClock(), None, lambda call: 0, choices=5)
        measured(bench.pytorch_candidates(("cudnn_float32",)), instruments=instruments)
        assert len(threads) == tasks.FEWEST_CHOICES

    def test_what_fails_while_it_is_chosen_fails_alone(self, monkeypatch):
        def function(x, weight, bias, **arguments):
            if x.dtype == torch.float16:
                raise RuntimeError("no algorithm")
            return F.conv_transpose2d(x, weight, bias, **arguments)

        monkeypatch.setattr(bench, "F", type("F", (), {"conv_transpose2d": function}))
        before = threading.active_count()
        instruments = bench.Instruments("cpu", FakeClock(), None, lambda call: 0, choices=2)
        forms = bench.pytorch_candidates(("cudnn_float16", "cudnn_float32"))
        rows = measured([*forms, candidate("a", FakeStage())], instruments=instruments)
        assert rows["cudnn_float16"].failure == "RuntimeError: no algorithm"
        assert rows["cudnn_float32"].is_right
        assert rows["cudnn_float32"].sustained
        assert list(rows) == ["cudnn_float16", "cudnn_float32", "a"]
        assert threading.active_count() == before

    def test_it_is_judged_but_not_gated(self):
        rows = measured(bench.pytorch_candidates(("cudnn_float32", "cudnn_float16")))
        assert rows["cudnn_float32"].errors.relative_l2 < 1e-6
        half = rows["cudnn_float16"]
        assert 1e-5 < half.errors.relative_l2 < 1e-2
        assert half.errors.condition > half.errors.gate
        assert half.cold is not None

    def test_the_stages_are_those_of_the_registry(self):
        assert [c.row.name for c in bench.stage_candidates()] == list(fma_stages)
        assert bench.stage_candidates(["coalesced"])[0].function is lab.stages["coalesced"]


class TestGrowth:
    def test_the_points(self):
        curves = bench.growth_problems()
        assert tuple(curves) == records.AXES
        values = {axis: [value for value, _ in points] for axis, points in curves.items()}
        assert values == {
            "batch": [1, 2, 4, 8, 16, 32, 64],
            "side": [32, 64, 128, 256, 512, 1024, 2048],
            "channels": [1, 2, 4, 8, 16, 32, 64, 128, 256],
            "kernel_area": [1, 3, 9, 15, 21, 25, 45, 49, 121],
        }
        for value, problem in curves["batch"]:
            assert problem == Problem(value, 32, 32, 128, 128, kernel_size=(3, 7))
        for value, problem in curves["side"]:
            assert problem == Problem(8, 32, 32, value, value, kernel_size=(3, 7))
        for value, problem in curves["channels"]:
            assert problem == Problem(8, value, value, 128, 128, kernel_size=(3, 7))
        for value, problem in curves["kernel_area"]:
            assert math.prod(problem.kernel_size) == value
            assert problem.input_shape == (8, 32, 128, 128)
        # Inputs, output and as much again fit in 40 GB.
        assert all(2 * p.compulsory_bytes < 4e10 for points in curves.values() for _, p in points)

    @pytest.mark.parametrize("count", [1, 2, 3, 9])
    def test_the_last_stages_compete_however_many_there_are(self, monkeypatch, count):
        names = [f"stage_{i}" for i in range(count)]
        monkeypatch.setattr(bench, "fma_stages", dict.fromkeys(names, FakeStage()))
        chosen = [c.row.name for c in bench.growth_candidates()]
        assert chosen == [*names[-3:], "cudnn_float32"]

    def test_inputs_are_of_the_order_of_one(self):
        problem = Problem(4, 8, 8, 30, 30, kernel_size=5)
        x, weight, bias = bench.drawn(problem, 3, "cpu")
        assert (x.shape, weight.shape) == (problem.input_shape, problem.weight_shape)
        assert bias is None
        output = F.conv_transpose2d(x, weight)
        assert 0.5 < output[..., 4:-4, 4:-4].std() < 2
        again, other = bench.drawn(problem, 3, "cpu")[0], bench.drawn(problem, 4, "cpu")[0]
        assert torch.equal(x, again)
        assert not torch.equal(x, other)


class TestCeilings:
    def test_rates_and_what_a_gpu_has_not(self):
        ran = []
        load = bench.Workload("copy", 4 * 10**9, lambda: lambda: ran.append("copy"))
        workloads = {"gemm_tf32": None, "copy": load}
        ceilings = dict(bench.measure_ceilings(workloads, tools()))
        assert list(ceilings) == ["gemm_tf32", "copy"]
        assert ceilings["gemm_tf32"] is None
        assert ceilings["copy"].rate() == pytest.approx(4e12)
        assert ceilings["copy"].unit == "byte"
        assert len(ran) == measure.WARM_UPS + measure.RUNS + 1

    @pytest.mark.parametrize(
        ("major", "missing"), [(7, {"gemm_tf32", "gemm_bfloat16"}), (9, set())]
    )
    def test_which_there_are(self, major, missing):
        properties = type("Properties", (), {})()
        properties.major, properties.multi_processor_count = major, 132
        properties.max_threads_per_multi_processor, properties.L2_cache_size = 2048, 2**28
        workloads = bench._workloads(properties)
        assert list(workloads) == list(records.CEILINGS)
        assert {name for name, load in workloads.items() if load is None} == missing
        assert workloads["copy"].work >= 2 * 4 * 2**28  # several times the L2 cache
        fmas = 132 * 2048 * 16 * 64 * bench._FMA_ROUNDS
        assert workloads["fp32_fma"].work == 2 * fmas

    def test_the_fma_kernel_does_what_is_counted(self):
        workload = bench.fma_workload(3, 600, rounds=2, backend="simulator", device="cpu")
        run = workload.prepare()
        report = run(trace=True)
        assert workload.work == 2 * report.fma == 2 * 3 * 512 * 2 * 64 * 16
        assert not report.hazards
        result = run.args[1].owner
        assert result.shape == (3 * 512,)
        assert (result == 16 * 2).all()  # every chain is at its limit

    def test_the_fma_kernels_constants(self):
        source = (KERNEL_FOLDER / "fma_rate.cu").read_text()
        known = bench._FMA_THREADS, bench._FMA_CHAINS, bench._FMA_STEPS
        names = "THREADS", "CHAINS", "STEPS"
        assert figures.constants(source, *names) == dict(zip(names, known, strict=True))

    @pytest.mark.parametrize("allowed", [False, True])
    def test_gemm(self, allowed):
        workload = bench._gemm_workload("gemm_tf32", torch.float32, allowed, side=8, device="cpu")
        before = torch.backends.cuda.matmul.allow_tf32
        with workload.settings():
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            a, b = workload.prepare().args
            product = workload.prepare()()
        assert torch.backends.cuda.matmul.allow_tf32 == before
        torch.testing.assert_close(product, a @ b)
        assert workload.work == 2 * 8**3

    def test_copy(self, monkeypatch):
        monkeypatch.setattr(bench, "_COPY_BYTES", 64)
        workload = bench._copy_workload(0, device="cpu")
        assert workload.work == 128
        assert (workload.prepare()() == 1).all()


GPU = record().gpu


@pytest.fixture
def lab_on_cpu(monkeypatch, tmp_path):
    """The benchmark with small problems, fake stages and a fake clock; gives its folder."""

    @contextmanager
    def current_gpu():
        workload = bench.Workload("fp32_fma", 10**9, lambda: lambda: None)
        yield bench._Machine(GPU, record().software, tools(), {"fp32_fma": workload})

    monkeypatch.setattr(bench, "_require_gpu", lambda: None)
    monkeypatch.setattr(bench, "_current_gpu", current_gpu)
    monkeypatch.setattr(bench, "SHAPES", {"star": SMALL, "moon": Problem(1, 2, 2, 4, 4)})
    monkeypatch.setattr(
        bench,
        "growth_problems",
        lambda: {"batch": ((1, Problem(1, 2, 2, 4, 4)), (2, Problem(2, 2, 2, 4, 4)))},
    )
    monkeypatch.setattr(bench, "fma_stages", {"first": FakeStage(), "second": FakeStage()})
    small = {"small": Problem(2, 2, 2, 4, 4)}
    monkeypatch.setattr(operator_bench, "problems", lambda part: small)
    subjects = operator_bench.Subjects(kernels=lambda *form, tf32: {"ours": FakeStage()})
    monkeypatch.setattr(operator_bench, "Subjects", lambda: subjects)
    monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
    monkeypatch.setattr(measurements, "FILE", tmp_path / "package" / "dispatch.json")
    return tmp_path / "records"


@pytest.fixture
def main(capsys):
    """Return a function that runs a command and gives its exit status, stdout and stderr."""

    def run(*arguments):
        try:
            status = command_line.main([str(argument) for argument in arguments])
        except SystemExit as ending:
            status = ending.code
        return status, *capsys.readouterr()

    return run


class TestRun:
    def test_a_whole_run_writes_the_gpus_record(self, main, lab_on_cpu):
        status, out, err = main("bench", "--seed", 7)
        assert (status, err) == (0, "")
        files = sorted(path.name for path in lab_on_cpu.iterdir())
        assert files == ["nvidia-h200-operator.json", "nvidia-h200.json"]
        result = records.load_named("nvidia-h200", lab_on_cpu)
        assert result.parts == records.PARTS
        assert result.seed == 7
        assert [shape.name for shape in result.shapes] == ["star", "moon"]
        names = ["first", "second", *PYTORCH_ROWS]
        assert [row.name for row in result.shape("star").rows] == names
        assert all(row.sustained for row in result.shape("star").rows)
        assert [point.value for point in result.growth["batch"]] == [1, 2]
        assert [row.name for row in result.growth["batch"][0].rows] == [*names[:2], names[2]]
        assert result.ceilings.fp32_fma == pytest.approx(1e12)
        assert result.gpu == GPU
        assert {"cold", "sustained"} <= set(result.meaning)
        operator = operator_record.load(lab_on_cpu / "nvidia-h200-operator.json")
        assert [case.form for case in operator.cases] == list(operator_record.FORMS)
        assert (operator.gpu, operator.seed) == (GPU, 7)
        (table,) = measurements.load(measurements.FILE)
        assert table.gpu == GPU.name
        assert {m.problem for m in table.measurements} == {
            *(case.problem for case in operator.cases),
            *(shape.problem for shape in result.shapes),
            *(point.problem for point in result.growth["batch"]),
        }
        files = [lab_on_cpu / name for name in ("nvidia-h200.json", "nvidia-h200-operator.json")]
        assert out.endswith(f"; wrote {files[0]}, {files[1]}, {measurements.FILE}\n")

    def test_the_seed_draws_the_inputs(self, main, lab_on_cpu):
        errors = set()
        for seed in (1, 1, 2):
            main("bench", "--seed", seed)
            errors.add(records.load_named("nvidia-h200", lab_on_cpu).shape("star").rows[0].errors)
        assert len(errors) == 2

    @pytest.mark.parametrize(
        ("arguments", "parts", "shapes"),
        [
            (["--only", "ceilings"], ("ceilings",), []),
            (["--only", "growth,ceilings"], ("ceilings", "growth"), []),
            (["--problems", "moon"], ("shapes",), ["moon"]),
            (["--only", "shapes,ceilings", "--problems", "moon"], ("ceilings", "shapes"), ["moon"]),
        ],
    )
    def test_a_run_of_some_parts_leaves_the_record_alone(
        self, main, lab_on_cpu, arguments, parts, shapes
    ):
        status, out, _ = main("bench", *arguments)
        assert status == 0
        assert not lab_on_cpu.exists()
        assert out.endswith("; not written\n")
        file = lab_on_cpu.parent / "some.json"
        assert main("bench", *arguments, "--out", file)[0] == 0
        assert not lab_on_cpu.exists()
        result = records.load(file)
        assert result.parts == parts
        assert [shape.name for shape in result.shapes] == shapes

    def test_the_operator_alone(self, main, lab_on_cpu):
        file = lab_on_cpu.parent / "some.json"
        status, out, _ = main("bench", "--only", "operator", "--out", file)
        assert status == 0
        assert [case.shape for case in operator_record.load(file).cases] == ["small"] * 6
        assert "geometric mean" in out
        assert out.endswith(f"wrote {file}\n")
        assert not measurements.FILE.exists()
        assert main("bench", "--only", "operator", "--problems", "small")[0] == 0

    def test_the_neighbours_are_measured_without_the_operator(self, main, lab_on_cpu):
        file = lab_on_cpu.parent / "near.json"
        assert main("bench", "--only", "neighbours", "--out", file)[0] == 0
        cases = operator_record.load(file).cases
        assert [case.kernels["ours"].seconds for case in cases] == [0.001] * 6
        assert {case.operator for case in cases} == {None}

    def test_both_records_of_a_run_of_some_parts(self, main, lab_on_cpu):
        file = lab_on_cpu.parent / "some.json"
        assert main("bench", "--only", "operator,ceilings", "--out", file)[0] == 0
        assert records.load(file).parts == ("ceilings",)
        assert len(operator_record.load(file.with_name("some-operator.json")).cases) == 6

    def test_the_operators_cases_before_the_one_that_fails_are_kept(
        self, main, lab_on_cpu, monkeypatch
    ):
        measure_shape = operator_bench.measure_shape

        def breaks_off(*arguments, **keywords):
            for count, case in enumerate(measure_shape(*arguments, **keywords)):
                if count == 2:
                    raise RuntimeError("the bus fell off")
                yield case

        monkeypatch.setattr(operator_bench, "measure_shape", breaks_off)
        status, out, err = main("bench")
        assert status == 1
        assert "operator was not finished: RuntimeError: the bus fell off" in out
        assert err.count("ceilings, shapes, growth, operator as far as measured") == 2
        kept = operator_record.load(lab_on_cpu / "nvidia-h200-operator.json.partial")
        assert len(kept.cases) == 2
        assert records.load(lab_on_cpu / "nvidia-h200.json.partial").parts == records.PARTS
        assert not measurements.FILE.exists()

    def test_a_wrong_kernel_of_the_operators_fails_the_run(self, main, lab_on_cpu, monkeypatch):
        subjects = operator_bench.Subjects()
        bad = FakeStage(lambda y: y + 1)
        monkeypatch.setattr(
            operator_bench,
            "Subjects",
            lambda: replace(subjects, kernels=lambda *form, tf32: {"bad": bad}),
        )
        status, out, _ = main("bench", "--only", "operator")
        assert status == 1
        assert "wrong: bad on small, float32; bad on small, float32 last; " in out

    def test_a_wrong_stage_is_recorded_and_fails_the_run(self, main, lab_on_cpu, monkeypatch):
        stages = {
            "first": FakeStage(),
            "second": FakeStage(lambda y: y + 1),
            "third": FakeStage(fail),
        }
        monkeypatch.setattr(bench, "fma_stages", stages)
        status, out, _ = main("bench")
        assert status == 1
        row = records.load_named("nvidia-h200", lab_on_cpu).shape("moon").row("second")
        assert (row.status, row.cold) == ("wrong", None)
        last = out.splitlines()[-1]
        assert last.startswith("wrong: second on star; third on star (KernelError: it stopped); ")
        assert "second on batch 2" in last
        assert "first" not in last

    def test_what_is_finished_outlives_a_part_that_fails(self, main, lab_on_cpu, monkeypatch):
        def broken():
            raise RuntimeError("the bus fell off")

        monkeypatch.setattr(bench, "growth_problems", broken)
        lab_on_cpu.mkdir()
        (lab_on_cpu / "nvidia-h200.json").write_text("an older record")
        status, out, err = main("bench")
        assert status == 1
        assert (lab_on_cpu / "nvidia-h200.json").read_text() == "an older record"
        assert not (lab_on_cpu / "nvidia-h200-operator.json.partial").exists()
        kept = records.load(lab_on_cpu / "nvidia-h200.json.partial")
        assert kept.parts == ("ceilings", "shapes")
        assert len(kept.shapes) == 2
        assert "growth was not finished; ceilings, shapes as far as measured: " in err
        assert "nvidia-h200.json.partial" in err
        assert out.endswith("growth was not finished: RuntimeError: the bus fell off\n")
        monkeypatch.undo()

    def test_the_shapes_before_the_one_that_fails_are_kept(self, main, lab_on_cpu, monkeypatch):
        measure_problem = bench.measure_problem

        def second_fails(problem, *arguments, **keywords):
            if problem != SMALL:
                raise RuntimeError("the bus fell off")
            return measure_problem(problem, *arguments, **keywords)

        monkeypatch.setattr(bench, "measure_problem", second_fails)
        assert main("bench", "--only", "shapes", "--out", lab_on_cpu / "a.json")[0] == 1
        kept = records.load(lab_on_cpu / "a.json.partial")
        assert [shape.name for shape in kept.shapes] == ["star"]
        assert not (lab_on_cpu / "a.json").exists()

    @pytest.mark.parametrize("how", ["interrupt", "termination"])
    def test_an_interrupt_keeps_what_there_is(self, main, lab_on_cpu, monkeypatch, how):
        def interrupted():
            if how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
            return {}

        monkeypatch.setattr(bench, "growth_problems", interrupted)
        before = signal.getsignal(signal.SIGTERM)
        assert main("bench")[0] == 130
        assert records.load(lab_on_cpu / "nvidia-h200.json.partial").parts == ("ceilings", "shapes")
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_record_that_is_not_as_it_should_be_is_kept_too(self, main, lab_on_cpu, monkeypatch):
        monkeypatch.setattr(bench, "SHAPES", {"": SMALL})
        status, _, err = main("bench", "--only", "shapes", "--out", lab_on_cpu / "a.json")
        assert status == 2
        assert 'shapes[0].name = ""' in err
        assert not (lab_on_cpu / "a.json").exists()
        assert '"name": "first"' in (lab_on_cpu / "a.json.partial").read_text()

    def test_a_finished_run_clears_away_the_unfinished_one(self, main, lab_on_cpu):
        lab_on_cpu.mkdir()
        (lab_on_cpu / "nvidia-h200.json.partial").touch()
        (lab_on_cpu / "nvidia-h200-operator.json.partial").touch()
        assert main("bench")[0] == 0
        files = sorted(path.name for path in lab_on_cpu.iterdir())
        assert files == ["nvidia-h200-operator.json", "nvidia-h200.json"]

    def test_a_problem_too_large_for_the_memory_is_left_out(self, main, lab_on_cpu, monkeypatch):
        exact = bench.exact

        def small_memory(x, *arguments, **keywords):
            if x.shape == SMALL.input_shape:
                raise torch.OutOfMemoryError("no")
            return exact(x, *arguments, **keywords)

        monkeypatch.setattr(bench, "exact", small_memory)
        status, _, err = main("bench")
        assert status == 0
        assert "star is left out: it does not fit" in err
        shapes = records.load_named("nvidia-h200", lab_on_cpu).shapes
        assert [shape.name for shape in shapes] == ["moon"]

    def test_a_folder_that_is_none_is_found_out_before_the_measurement(
        self, main, lab_on_cpu, monkeypatch
    ):
        monkeypatch.setattr(bench, "_measure", None)  # would raise
        (lab_on_cpu.parent / "file").touch()
        status, out, err = main("bench", "--out", lab_on_cpu.parent / "file" / "a.json")
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "file" in err

    def test_compared_with_an_older_record(self, main, lab_on_cpu):
        file = lab_on_cpu.parent / "older.json"
        main("bench", "--out", file)
        status, out, _ = main("bench", "--compare", file)
        assert status == 0
        assert f"compared with {file}, time over cudnn_float32's of 14 rows:" in out
        assert "largest difference +0.0 %" in out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--only", "shape"], "'shape': must be one of 'ceilings', 'shapes', 'growth'"),
            (["--only", "operator", "--problems", "moon"], "'moon': must be one of 'small'"),
            (["--problems", "sun"], "problem 'sun': must be one of 'star', 'moon'"),
            (["--only", "growth", "--problems", "moon"], "leaves out shapes"),
            (["--seed", "x"], "'x' is no integer"),
            (["--compare", "no/record.json"], "no/record.json"),
            (["--compare", __file__], "test_bench.py: is no JSON"),
        ],
    )
    def test_a_mistake_is_named_in_one_line(self, main, lab_on_cpu, arguments, words):
        status, out, err = main("bench", *arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert words in err

    def test_without_a_gpu(self, main, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        status, out, err = main("bench")
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "torch sees no CUDA device" in err

    def test_without_a_compiler(self, main, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(bench, "find_toolkit", lambda: None)
        status, _, err = main("bench")
        assert status == 2
        assert "no nvcc" in err

    def test_the_problems(self):
        assert bench.SHAPES["star"] == Problem.named("star")
        assert bench.SHAPES["classic"] == Problem.named("classic")
        assert len(set(bench.SHAPES.values())) == len(bench.SHAPES)


class TestCompare:
    def shapes(self, *pairs, problem=PROBLEM):
        rows = [stage(name, seconds) for name, seconds in pairs]
        return record(shapes=(Shape("star", problem, (*rows, pytorch("cudnn_float32", 0.004))),))

    def test_ratios_and_their_change(self):
        old = self.shapes(("a", 0.002), ("b", 0.008), ("gone", 0.001))
        new = self.shapes(("a", 0.003), ("b", 0.0088), ("new", 0.001))
        changes = bench.compare(new, old)
        assert [(c.shape, c.row) for c in changes] == [("star", "a"), ("star", "b")]
        assert [(c.new, c.old) for c in changes] == [(0.75, 0.5), (pytest.approx(2.2), 2.0)]
        assert [c.percent for c in changes] == [pytest.approx(50), pytest.approx(10)]
        text = bench.comparison(changes, "old.json")
        assert "largest difference +50.0 %: a on star, 0.5 before, now 0.75" in text
        assert text.endswith("median difference 30.0 %")

    def test_a_faster_gpu_is_no_change(self):
        old = self.shapes(("a", 0.002))
        rows = (stage("a", 0.001), pytorch("cudnn_float32", 0.002))
        (change,) = bench.compare(record(shapes=(Shape("star", PROBLEM, rows),)), old)
        assert change.percent == pytest.approx(0)

    def test_a_row_that_became_faster_can_be_the_largest(self):
        changes = bench.compare(
            self.shapes(("a", 0.001), ("b", 0.002)), self.shapes(("a", 0.002), ("b", 0.0015))
        )
        assert "largest difference -50.0 %: a" in bench.comparison(changes, "x")

    @pytest.mark.parametrize("older", [(), (Shape("star", SMALL, record().shapes[0].rows),)])
    def test_nothing_in_common(self, older):
        changes = bench.compare(self.shapes(("first", 0.002)), record(shapes=older))
        assert changes == ()
        assert "nothing to compare" in bench.comparison(changes, "old.json")

    def test_without_the_baseline(self):
        alone = record(shapes=(Shape("star", PROBLEM, (stage("first", 0.002),)),))
        assert bench.compare(record(), alone) == bench.compare(alone, record()) == ()


class TestTables:
    def cells(self, name, text):
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        return re.split(r"  +", line)

    def test_a_shape(self):
        text = bench.tables(record(growth={}))
        share = 100 * PROBLEM.flops / 0.002 / 6e13
        tflops = PROBLEM.flops / 0.002 / 1e12
        assert self.cells("second", text) == [
            *("second", "2 ms", "2.2 ms", "1980 MHz", "650 W", f"{tflops:.4g}", "2.00"),
            *(f"{share:.1f}", "3.00e-07", "2.00", "0.0 MiB", "ok"),
        ]
        assert self.cells("wrong", text)[-4:] == ["inf", "100000.00", "-", "WRONG"]
        assert self.cells("broken", text)[-1] == "FAILED: KernelError"
        assert self.cells("cudnn_float32", text)[-1] == "1.0 MiB"
        assert "star: input [2, 4, 8, 10], weight [4, 6, 3, 7], output [2, 6, 10, 16]" in text
        assert text.isascii()

    def test_ceilings(self):
        text = bench.tables(record())
        cells = ["fp32_fma", "60", "48", "TFLOP/s", "1980 MHz", "650 W"]
        assert self.cells("fp32_fma", text) == cells
        assert self.cells("copy", text)[1:4] == ["4", "3.2", "TB/s"]
        assert self.cells("gemm_tf32", text) == ["gemm_tf32", *"-----"]

    def test_curves(self):
        text = bench.tables(record(shapes=(), ceilings=records.Ceilings()))
        lines = [re.split(r"  +", line.strip()) for line in text.splitlines()[-3:]]
        assert lines[0][:3] == ["batch", "fastest stage", "ns/pixel"]
        per_pixel = f"{1e9 * 0.005 / 160:.4g}"
        assert lines[1][:4] == ["1", "second", per_pixel, "0.0 MiB"]
        assert lines[2][-1] == f"{0.004 / 0.01:.2f}"

    def test_a_gpu_that_waits_for_python_is_marked(self):
        waiting = measure.Sustained(2e-5, 100, 1.9e-5)
        rows = (stage("first", 1e-5, sustained=waiting), pytorch("cudnn_float32", 1e-5))
        text = bench.tables(record(shapes=(Shape("star", PROBLEM, rows),)))
        assert self.cells("first", text)[2] == "0.02 ms*"
        assert "*" not in self.cells("cudnn_float32", text)[2]


class TestMachine:
    @pytest.fixture
    def machine(self, monkeypatch):
        """Return a function that describes a GPU of certain properties."""
        asked = []

        def describe(facts, **changes):
            values = dict(
                name="NVIDIA H200",
                major=9,
                minor=0,
                multi_processor_count=132,
                max_threads_per_multi_processor=2048,
                total_memory=150 * 10**9,
                L2_cache_size=60 * 2**20,
                uuid="12-34",
            )
            properties = type("Properties", (), values | changes)()

            def gpu_facts(fields, uuid):
                asked.append(uuid)
                return dict(zip(fields, facts, strict=True))

            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            monkeypatch.setattr(torch.version, "cuda", "13.0")
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
            monkeypatch.setattr(bench, "EventClock", FakeClock)
            monkeypatch.setattr(bench, "gpu_facts", gpu_facts)
            monkeypatch.setattr(
                bench, "Sampler", lambda uuid: Sampler(uuid, command=["no-such-program"])
            )
            with bench._current_gpu() as machine:
                made = record(
                    gpu=machine.gpu, software=machine.software, meaning=bench._meaning(machine)
                )
            records.from_json(records.to_json(made))  # it can be written
            return machine, asked

        return describe

    def test_what_is_known_is_noted(self, machine):
        described, asked = machine(["700.00", "1980", "580.65.06"])
        assert described.gpu == records.GPU(
            *("NVIDIA H200", (9, 0), 132, 150 * 10**9, 60 * 2**20, 700.0, 1980.0, "580.65.06")
        )
        assert described.software == records.Software(
            lab.__version__, str(torch.__version__), "13.0", "9.19.0"
        )
        assert asked == ["GPU-12-34"]
        assert described.tools.device == "cuda"
        assert list(described.workloads) == list(records.CEILINGS)

    def test_what_is_not_known_is_none(self, machine):
        described, asked = machine([None, "[N/A]", None], uuid="")
        assert described.gpu.power_limit_watts is described.gpu.max_sm_clock_mhz is None
        assert described.gpu.driver is None
        assert asked == [None]


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_small_problem(self, main, monkeypatch, tmp_path):
        monkeypatch.setattr(bench, "SHAPES", {"small": Problem(2, 8, 8, 33, 40, kernel_size=3)})
        file = tmp_path / "small.json"
        status, out, _ = main("bench", "--problems", "small", "--out", file)
        assert status == 0, out
        result = records.load(file)
        assert result.gpu.name == torch.cuda.get_device_name()
        for row in result.shape("small").rows:
            assert row.is_right
            assert 0 < row.seconds("cold") < 1e-2
            assert row.sustained.runs * row.sustained.seconds > 0.2
        errors = {row.name: row.errors.relative_l2 for row in result.shape("small").rows}
        assert errors["cudnn_float32"] < 1e-5
        assert errors["cudnn_float16"] > 1e-5

    def test_no_matrix_product_exceeds_the_fma_rate(self):
        instruments = bench.Instruments("cuda", measure.EventClock(), None, bench._peak_bytes)
        workloads = bench._workloads(torch.cuda.get_device_properties(0))
        chosen = {name: workloads[name] for name in ("fp32_fma", "gemm_float32", "gemm_float16")}
        rates = {n: c.rate() for n, c in bench.measure_ceilings(chosen, instruments)}
        assert rates["fp32_fma"] / 3 < rates["gemm_float32"] < rates["fp32_fma"]
        assert rates["gemm_float16"] > 2 * rates["gemm_float32"]  # no TF32 crept in, nor out

    def test_peak_memory(self):
        x = torch.zeros(2**20, device="cuda")

        def call():
            return (x + 1) * 2  # one array in between, as large as the output

        torch.cuda.empty_cache()
        assert 4 * 2**20 <= bench._peak_bytes(call) < 6 * 2**20
        assert bench._peak_bytes(lambda: x + 1) == 0
