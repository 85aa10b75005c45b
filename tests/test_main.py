"""The command line, and the ladder that it climbs."""

import ast
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import records_for_tests
import torch

import convt_lab as lab
import convt_lab.__main__ as command_line
from convt_lab import doctor, ladder, measure, measurements, records, reference
from convt_lab.stages import fma_stages
from tests.strategies import problem_set

PROBLEMS = problem_set(60)


def shape_of(problem):
    return "x".join(map(str, problem.input_shape))


@pytest.fixture
def main(capsys):
    """Return a function that runs a command and gives its exit status, stdout and stderr."""

    def run(*arguments):
        try:
            status = command_line.main([str(argument) for argument in arguments])
        except SystemExit as ending:
            status = ending.code
        captured = capsys.readouterr()
        return types.SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


class TestExactAndJudge:
    """The torch-based check is that of `convt_lab.reference`."""

    @pytest.mark.parametrize("problem", PROBLEMS, ids=shape_of)
    def test_exact_is_the_reference(self, problem):
        inputs = problem.random_inputs()
        truth = ladder.exact(*inputs, **problem.arguments)
        assert truth.expected.dtype == truth.scale.dtype == torch.float64
        for actual, expected in [
            (truth.expected, reference.scatter(*inputs, **problem.arguments)),
            (truth.scale, reference.condition_scale(*inputs, **problem.arguments)),
        ]:
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_judge_is_the_reference(self, batch):
        problem = lab.Problem(batch=batch, in_channels=3, out_channels=4, height=5, width=6)
        inputs = problem.random_inputs(seed=batch)
        truth = ladder.exact(*inputs, **problem.arguments)
        actual = truth.expected.float() + 1e-6
        self.check_against_reference(actual, truth, inputs)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 0.5])
    def test_one_wrong_pixel_in_the_second_image(self, value):
        problem = lab.Problem(batch=2, in_channels=2, out_channels=2, height=3, width=4)
        inputs = problem.random_inputs()
        truth = ladder.exact(*inputs, **problem.arguments)
        actual = truth.expected.float()
        actual[1, 1, 2, 3] = value
        assert not self.check_against_reference(actual, truth, inputs).is_right

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_and_should_be(self, value):
        x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        x[0, 0, 0, 0] = value
        truth = ladder.exact(x, weight)
        assert self.check_against_reference(truth.expected.float(), truth, (x, weight)).is_right
        other = torch.nan_to_num(truth.expected.float(), nan=1.0, posinf=1.0)
        assert not self.check_against_reference(other, truth, (x, weight)).is_right

    def test_zeros(self):
        x, weight = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        truth = ladder.exact(x, weight)
        assert ladder.judge(torch.zeros(1, 1, 2, 2), truth) == ladder.Errors(0.0, 0.0)
        off = torch.full((1, 1, 2, 2), 1e-30)
        assert ladder.judge(off, truth) == ladder.Errors(math.inf, math.inf)

    def test_half_a_step_below_the_normal_numbers_is_no_error(self):
        step = 2.0**-24  # of float16
        truth = ladder.exact(torch.full((1, 1, 2, 2), 1.3 * step), torch.ones(1, 1, 1, 1))
        near, next_ = (torch.full((1, 1, 2, 2), n * step, dtype=torch.float16) for n in (1, 2))
        assert torch.equal(near, truth.expected.half())
        assert ladder.judge(near, truth).condition == 0.0
        assert ladder.judge(next_, truth).condition == pytest.approx(2.0**24 * 0.2 / 1.3, 1e-6)
        assert ladder.judge(near.float(), truth).condition == pytest.approx(2.0**24 * 0.3 / 1.3)

    def test_another_shape_is_refused(self):
        truth = ladder.exact(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
        with pytest.raises(ValueError, match=r"actual has shape \[1, 1, 2, 1\]"):
            ladder.judge(torch.ones(1, 1, 2, 1), truth)

    @pytest.mark.gpu
    @pytest.mark.parametrize("problem", PROBLEMS[::4], ids=shape_of)
    def test_on_a_gpu(self, problem):
        inputs = problem.random_inputs(device="cuda")
        truth = ladder.exact(*inputs, **problem.arguments)
        expected = reference.scatter(*inputs, **problem.arguments)
        scale = reference.condition_scale(*inputs, **problem.arguments)
        np.testing.assert_allclose(truth.expected.cpu().numpy(), expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(truth.scale.cpu().numpy(), scale, rtol=1e-9, atol=1e-11)
        assert ladder.judge(truth.expected.float(), truth).is_right

    @staticmethod
    def check_against_reference(actual, truth, inputs):
        errors = ladder.judge(actual, truth)
        expected = truth.expected.numpy()
        known = {"expected": expected, "scale": truth.scale}
        # The sum of squares is taken image by image: the last digits may differ.
        assert errors.relative_l2 == pytest.approx(reference.relative_l2(actual, expected), 1e-12)
        assert errors.condition == pytest.approx(
            reference.condition_error(actual, *inputs, **known), 1e-12
        )
        return errors


class TestPoison:
    def test_memory_holds_nan_inside_and_the_settings_return(self):
        before = torch.are_deterministic_algorithms_enabled()
        with ladder.poisoned():
            assert torch.empty(100).isnan().all()
        assert torch.are_deterministic_algorithms_enabled() == before

    def test_the_settings_return_after_an_error(self):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            with pytest.raises(KeyError), ladder.poisoned():
                raise KeyError
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        torch.zeros(100, device="cuda")
        with ladder.poisoned():
            assert torch.empty(100, device="cuda").isnan().all()


class FakeStage:
    """A stage that computes with PyTorch and does something to the result."""

    precision = "float32"

    def __init__(self, change=lambda y: y):
        self.change = change

    def program(self, backend):
        return None

    def __call__(self, x, weight, bias, **arguments):
        return self.change(torch.nn.functional.conv_transpose2d(x, weight, bias, **arguments))


class BrokenStage(FakeStage):
    def program(self, backend):
        raise lab.CompileError("line 3: oops")


def with_nan(y):
    y[0, 0, 0, 0] = math.nan
    return y


def fail(y):
    raise lab.KernelError("it stopped")


class TestLadder:
    def test_every_stage_is_right_on_the_simulator(self, main):
        result = main("ladder", "--device", "cpu")
        assert result.status == 0, result.out
        lines = result.out.splitlines()
        assert lines[0].startswith("star_small: input [1, 8, 16, 24], weight [8, 8, 3, 7]")
        start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
        rows = [line.split() for line in lines[start + 1 : start + 1 + len(lab.stages)]]
        assert [row[0] for row in rows] == list(lab.stages)
        for name, backend, relative_l2, condition, *verdict in rows:
            rounds = lab.stages[name].precision == "tf32"
            assert (backend, " ".join(verdict)) == ("simulator", "ok, as TF32" if rounds else "ok")
            assert float(relative_l2) < (1e-3 if rounds else 1e-6)
            assert (float(condition) <= reference.FLOAT32_GATE) != rounds
        assert lines[-1] == f"all {len(lab.stages)} stages are right"

    def test_another_problem_and_seed(self, main):
        outputs = {
            main("ladder", "--device", "cpu", "--problem", "strided_small", "--seed", seed).out
            for seed in (1, 2)
        }
        assert len(outputs) == 2
        assert all(text.startswith("strided_small: ") for text in outputs)

    @pytest.mark.parametrize(
        ("stage", "expected"),
        [
            (FakeStage(lambda y: y + 1e-3), "WRONG"),
            (FakeStage(lambda y: y * (1 + 1e-5)), "WRONG"),
            (FakeStage(with_nan), "WRONG"),
            (FakeStage(torch.empty_like), "WRONG"),
            (FakeStage(lambda y: y[..., :-1]), "WRONG: ValueError"),
            (FakeStage(fail), "WRONG: KernelError"),
            (BrokenStage(), "WRONG: CompileError"),
        ],
        ids=["off", "rounded", "nan", "unwritten", "shape", "raises", "does not compile"],
    )
    def test_one_wrong_stage_fails_the_run(self, main, monkeypatch, stage, expected):
        fakes = {"right": FakeStage(), "wrong": stage, "after": FakeStage()}
        monkeypatch.setattr(ladder, "stages", fakes)
        result = main("ladder", "--device", "cpu")
        assert result.status == 1
        lines = {line.split(" ")[0]: line for line in result.out.splitlines() if line}
        assert lines["wrong"].endswith(expected)
        assert lines["right"].endswith("  ok")
        assert lines["after"].endswith("  ok")
        assert result.out.endswith("\nwrong: wrong\n")
        if ":" in expected:  # and its message
            assert f"\nwrong: {expected.partition(': ')[2]}: " in result.out

    def test_what_fails_every_stage_is_said_once(self, main, monkeypatch):
        monkeypatch.setattr(ladder, "stages", {"one": BrokenStage(), "two": BrokenStage()})
        result = main("ladder", "--device", "cpu")
        assert result.status == 1
        assert result.out.count("line 3: oops") == 1
        assert "\none, two: CompileError: line 3: oops\n" in result.out

    def test_a_gpu_is_asked_for_where_there_is_none(self, main, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = main("ladder", "--device", "cuda")
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert "torch sees no CUDA device" in result.err

    def test_a_long_simulation_is_announced(self, main, monkeypatch):
        monkeypatch.setattr(ladder, "climb", lambda *arguments: [])
        assert "will take long" in main("ladder", "--device", "cpu", "--problem", "star").err
        assert main("ladder", "--device", "cpu").err == ""

    @pytest.mark.gpu
    def test_on_a_gpu(self, main):
        result = main("ladder", "--problem", "classic")
        assert result.status == 0, result.out
        assert torch.cuda.get_device_name() in result.out
        assert "allow_tf32=False" in result.out
        baseline = next(line for line in result.out.splitlines() if line.startswith("cuDNN  "))
        ratio, runs = baseline.split()[-2:]
        assert ratio == "1.00"
        assert measure.RUNS <= int(runs) <= measure.MOST_RUNS


class TestTable:
    def test_times_and_their_ratios(self):
        right, timing = ladder.Errors(1e-7, 2.0), lambda s: measure.Timing((s,) * 5)
        text = ladder.table(
            [
                ladder.Row("first", "gpu", right, timing=timing(0.12)),
                ladder.Row("second", "gpu", right, timing=timing(0.03)),
                ladder.Row("wrong", "gpu", ladder.Errors(1.0, 1e5)),
                ladder.Row("third", "gpu", right, timing=timing(0.006)),
                ladder.Row("cuDNN", "PyTorch", ladder.Errors(3e-7, 9.0), timing=timing(0.009)),
            ]
        )
        cells = [line.split() for line in text.splitlines()]
        assert cells[0][-7:] == ["median", "time", "x", "before", "x", "cuDNN", "runs"]
        assert cells[1][4:] == ["ok", "120", "ms", "-", "0.07", "5"]
        assert cells[2][4:] == ["ok", "30", "ms", "4.00", "0.30", "5"]
        assert cells[3][4:] == ["WRONG", "-", "-", "-", "-"]
        assert cells[4][4:] == ["ok", "6", "ms", "-", "1.50", "5"]
        assert cells[5][4:] == ["9", "ms", "-", "1.00", "5"]
        assert len({len(line) for line in text.splitlines()}) == 1

    def test_only_what_is_right_is_timed(self, monkeypatch):
        timed = []

        def median_times(functions, on_run):
            timed.extend(functions)
            return {name: measure.Timing((1.0,)) for name in functions}

        monkeypatch.setattr(ladder, "median_times", median_times)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        rows = {
            "right": ladder.Row("right", "gpu", ladder.Errors(1e-7, 2.0)),
            "wrong": ladder.Row("wrong", "gpu", ladder.Errors(1.0, 99.0)),
            "failed": ladder.Row("failed", "gpu", failure=RuntimeError()),
            "cuDNN": ladder.Row("cuDNN", "PyTorch", ladder.Errors(1e-7, 9.0)),
        }
        ladder._time(rows, dict.fromkeys(rows, print))
        assert timed == ["right", "cuDNN"]
        assert rows["right"].timing.median == 1.0
        assert rows["wrong"].timing is None

    def test_a_stage_that_fails_while_it_is_timed_is_no_success(self, monkeypatch):
        def median_times(functions, on_run):
            raise RuntimeError("an illegal memory access")

        monkeypatch.setattr(ladder, "median_times", median_times)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        rows = {"stage": ladder.Row("stage", "gpu", ladder.Errors(1e-7, 2.0))}
        ladder._time(rows, dict.fromkeys(rows, print))
        assert not rows["stage"].is_right


class TestExport:
    def test_to_stdout(self, main):
        result = main("export", "coalesced")
        assert (result.status, result.err) == (0, "")
        names = {node.name for node in ast.parse(result.out).body if hasattr(node, "name")}
        assert {"ModelNew", "get_inputs", "get_init_inputs"} <= names

    def test_to_a_file(self, main, tmp_path):
        file = tmp_path / "model.py"
        assert main("export", "coalesced", "-o", file).status == 0
        text = file.read_text(encoding="utf-8")
        again = main("export", "register_blocked", "-o", file)
        assert again.status == 2
        assert again.err.count("\n") == 1
        assert "exists" in again.err
        assert "--force" in again.err
        assert file.read_text(encoding="utf-8") == text
        assert main("export", "register_blocked", "-o", file, "--force").status == 0
        assert "register_blocked" in file.read_text(encoding="utf-8")

    def test_to_a_folder_that_is_not_there(self, main, tmp_path):
        result = main("export", "coalesced", "-o", tmp_path / "no" / "model.py")
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert "model.py" in result.err


class TestDispatch:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        """A folder with one small record; the table would be written beside it."""
        records.save(records_for_tests.record(), tmp_path / "records" / "nvidia-h200.json")
        monkeypatch.setattr(measurements, "FILE", tmp_path / "data" / "dispatch.json")
        return tmp_path / "records"

    def test_the_table_is_made_from_the_records(self, main, folder):
        result = main("dispatch", "--records", folder)
        assert result.status == 0
        assert result.out.startswith("NVIDIA H200: of 2 measurements, chosen by those of other")
        assert result.err == f"wrote {measurements.FILE}\n"
        (table,) = measurements.load(measurements.FILE)
        assert len(table.measurements) == 2

    def test_it_can_be_judged_without_being_written(self, main, folder):
        result = main("dispatch", "--records", folder, "--no-write")
        assert "of 2 measurements" in result.out
        assert not measurements.FILE.exists()

    def test_without_records_the_table_stays(self, main, folder, tmp_path):
        for missing in (tmp_path / "nowhere", tmp_path):
            result = main("dispatch", "--records", missing)
            assert result.status == 2
            assert f"no record of a GPU in {missing}: name the folder" in result.err
            assert not measurements.FILE.exists()

    def test_a_damaged_record_is_named(self, main, folder):
        (folder / "nvidia-t4-operator.json").write_text("{}")
        result = main("dispatch", "--records", folder)
        assert result.status == 2
        assert result.err.count("\n") == 1
        assert "nvidia-t4-operator.json: schema is missing" in result.err
        assert not measurements.FILE.exists()


class TestCommandLine:
    def test_help_names_the_commands(self, main):
        result = main("--help")
        assert result.status == 0
        for command in ("ladder", "doctor", "export"):
            assert f"    {command} " in result.out
            assert main(command, "--help").status == 0

    def test_export_help_names_the_stages(self, main):
        words = main("export", "--help").out.replace(",", " ").split()
        assert set(fma_stages) <= set(words)

    def test_version(self, main):
        assert main("--version").out == f"convt_lab {lab.__version__}\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "COMMAND"),
            (["climb"], "'climb'"),
            (["export"], "STAGE"),
            (["export", "fast"], "'fast'"),
            (["ladder", "--problem", "big"], "'big'"),
            (["ladder", "--device", "gpu"], "'gpu'"),
            (["ladder", "--seed", "-1"], "'-1' is no integer of at least 0"),
            (["doctor", "now"], "now"),
        ],
    )
    def test_a_mistake_is_named_in_one_line(self, main, arguments, words):
        result = main(*arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("python -m convt_lab")
        assert result.err.count("\n") == 1
        assert words in result.err

    def test_the_doctor_is_called(self, main, monkeypatch):
        called = []
        monkeypatch.setattr(doctor, "doctor", lambda run_trial: called.append(run_trial) or 1)
        assert main("doctor").status == 1
        assert main("doctor", "--no-try").status == 1
        assert called == [True, False]

    def test_an_interrupt_is_quiet(self, main, monkeypatch):
        def interrupted(arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(command_line, "_doctor", interrupted)
        result = main("doctor")
        assert (result.status, result.out, result.err) == (130, "", "")

    def test_as_a_process_nothing_but_the_table_is_written(self):
        result = subprocess.run(
            [sys.executable, "-m", "convt_lab", "ladder", "--device", "cpu"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONWARNINGS": "error"},
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.isascii()

    def test_a_process_without_a_standard_output(self):
        command = f"{sys.executable} -m convt_lab export coalesced >&-"
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")

    def test_a_reader_that_leaves_early_is_no_error(self):
        command = f"{sys.executable} -m convt_lab export register_blocked | head -c 1"
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert (result.stdout, result.stderr) == ('"', "")
