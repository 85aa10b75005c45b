"""The operator's benchmark: what is judged, what is timed against what, and what is printed."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_operator_record import RECORD, case, record

from convt_lab import Problem, autotune, dispatch, measure, operator_bench
from convt_lab.bench import Instruments
from convt_lab.dispatch import Choice
from convt_lab.operator_record import FORMS
from convt_lab.records import RecordError

SMALL = Problem(3, 4, 6, 5, 6, kernel_size=(3, 7), groups=2)


class ByName:
    """A clock that knows how long each task takes, and keeps their order and threads."""

    def __init__(self, **seconds):
        self.seconds = {"pytorch": 0.002, "operator": 0.001} | seconds
        self.runs = []

    def time(self, task):
        task()
        self.runs.append((task.name, threading.current_thread()))
        return self.seconds[task.name]


class Ours:
    """A kernel that sums in float32, with something done to the result."""

    def __init__(self, change=lambda y: y, precision="float32"):
        self.change, self.precision = change, precision

    def __call__(self, x, weight, bias, **arguments):
        output = F.conv_transpose2d(x.float(), weight.float(), bias, **arguments)
        return self.change(output.to(x.dtype))


def broken(*arguments, **keywords):
    raise RuntimeError("it\nstopped")


def measured(kernels, clock=None, operator=None, choice="pytorch", choices=0, problem=SMALL):
    subjects = operator_bench.Subjects(
        kernels=lambda *form, tf32: kernels,
        operator=operator or Ours(),
        explain=lambda *inputs, **arguments: Choice(choice, "so it is"),
    )
    tools = Instruments("cpu", clock or ByName(), None, lambda call: 0, choices)
    return list(
        operator_bench.measure_shape(
            "small", problem, RECORD.gpu, RECORD.software, tools, subjects=subjects
        )
    )


class TestShapes:
    def test_there_are_44(self):
        shapes = operator_bench.shapes()
        assert len(shapes) == 44
        assert shapes["star (kernelbench 65)"] == Problem.named("star")
        assert shapes["depthwise up2 k4"] == Problem(
            8, 256, 256, 64, 64, kernel_size=4, stride=2, padding=1, groups=256
        )
        assert len(set(shapes.values())) == 44

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (dict(height=0), r"\[0\]: height=0"),
            (dict(colour=1), r"\[0\]\.colour is no field"),
            (dict(name=""), r"name = \"\""),
        ],
    )
    def test_a_wrong_one_is_named(self, monkeypatch, tmp_path, change, words):
        shape = json.loads(operator_bench.FILE.read_text())[0] | change
        (tmp_path / "shapes.json").write_text(json.dumps([shape]))
        monkeypatch.setattr(operator_bench, "FILE", tmp_path / "shapes.json")
        with pytest.raises(RecordError, match=words):
            operator_bench.shapes.__wrapped__()


class TestNeighbours:
    def test_they_are_others_and_of_every_kind(self):
        assert operator_bench.problems("operator") is operator_bench.shapes()
        near = operator_bench.problems("neighbours")
        assert not set(near.values()) & set(operator_bench.shapes().values())
        kinds = {dispatch.kind(problem) for problem in near.values()}
        assert len(kinds) == 6
        assert "4x96x112x112 to 96 k7x7 p3x3 g96" in near
        assert len(near) == len(set(near.values()))
        assert all(2 * p.compulsory_bytes < 2**31 for p in near.values())


class TestMeasuring:
    def test_every_form_is_measured(self):
        cases = measured({"ours": Ours()}, ByName(ours=0.0005))
        assert [case.form for case in cases] == list(FORMS)
        for one in cases:
            assert (one.shape, one.problem) == ("small", SMALL)
            assert one.pytorch.seconds == one.pytorch_beside.seconds == 0.002
            assert one.kernels["ours"].seconds == 0.0005
            assert one.operator.seconds == 0.001
            assert one.speedup == 2
            assert one.choice == "pytorch"

    def test_inputs_are_as_the_form_says(self):
        asked, seen = [], []

        def kernels(problem, dtype, channels_last, *, tf32):
            asked.append((dtype, channels_last, tf32))
            return {}

        def operator(x, weight, bias, **arguments):
            last = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)]
            assert last[0] == last[1] != x.is_contiguous()
            assert arguments == SMALL.arguments
            seen.append((x.dtype, last[0], torch.backends.cudnn.allow_tf32))
            assert torch.backends.cudnn.benchmark
            return F.conv_transpose2d(x, weight, bias, **arguments)

        explain = lambda *inputs, **arguments: Choice("pytorch", "")  # noqa: E731
        subjects = operator_bench.Subjects(kernels, operator, explain)
        tools = Instruments("cpu", ByName(), None, lambda call: 0)
        arguments = "small", SMALL, RECORD.gpu, RECORD.software, tools
        list(operator_bench.measure_shape(*arguments, subjects=subjects))
        single, half = torch.float32, torch.float16
        assert list(dict.fromkeys(seen)) == [
            (single, False, False),
            (single, True, False),
            (single, False, True),
            (single, True, True),
            (half, False, True),
            (half, True, True),
        ]
        assert asked == list(dict.fromkeys(seen))

    def test_the_operator_is_timed_against_pytorch_in_its_thread(self):
        clock = ByName(ours=0.0005)
        first = measured({"ours": Ours()}, clock, choices=2)[0]
        assert first.speedup == 2
        runs = clock.runs[: len(clock.runs) // 6]
        thread = dict(runs)["operator"]
        assert thread is not threading.current_thread()
        last = [name for name, _ in runs[-40:]]
        assert last == ["pytorch", "operator"] * 20
        assert {where for _, where in runs[-40:]} == {thread}
        before = runs[:-46]
        assert before[-1] == ("ours", threading.current_thread())
        assert before[-2] == ("pytorch", thread)
        assert not thread.is_alive()

    def test_the_operator_chooses_by_the_cases_own_times(self, monkeypatch):
        seen = []

        def explain(*inputs, **arguments):
            ((table,), before) = dispatch._only, dispatch.generation
            (one,) = table.measurements
            seen.append((one.form, one.pytorch, one.kernels, before))
            return Choice("ours", "")

        subjects = operator_bench.Subjects(lambda *form, tf32: {"ours": Ours()}, Ours(), explain)
        tools = Instruments("cpu", ByName(ours=0.0005), None, lambda call: 0)
        arguments = "small", SMALL, RECORD.gpu, RECORD.software, tools
        cases = list(operator_bench.measure_shape(*arguments, subjects=subjects))
        assert {case.choice for case in cases} == {"ours"}
        assert seen[2][:3] == (("float32", False, True), 0.002, {"ours": 0.0005})
        assert len({generation for *_, generation in seen}) == 6
        assert dispatch._only is None

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            (lambda y: y * (1 + 1e-5), ["wrong"] * 4 + ["ok"] * 2),  # half is rougher
            (lambda y: y * 1.01, ["wrong"] * 6),
            (torch.empty_like, ["wrong"] * 6),
            (lambda y: y[..., :-1], ["failed"] * 6),
        ],
        ids=["rounded", "off", "unwritten", "shape"],
    )
    def test_what_is_wrong_is_not_timed(self, change, status):
        cases = measured({"bad": Ours(change), "ours": Ours()}, ByName(ours=0.0005, bad=0.001))
        assert [one.kernels["bad"].status for one in cases] == status
        for one in cases:
            assert (one.kernels["bad"].cold is None) == (one.kernels["bad"].status != "ok")
            assert one.kernels["ours"].seconds == 0.0005
            assert one.operator.seconds == 0.001

    def test_only_what_rounds_to_tf32_may_be_as_wrong_as_that(self):
        """And only where it is allowed; a thousandth is too much for it, too."""
        rough, wrong = (Ours(lambda y, f=f: y * (1 + f), "tf32") for f in (3e-4, 1.1e-3))
        clock = ByName(rough=0.001, wrong=0.001)
        cases = measured({"rough": rough, "wrong": wrong}, clock)
        of_float32 = [one.kernels for one in cases[:4]]
        assert [one["rough"].status for one in of_float32] == ["wrong"] * 2 + ["ok"] * 2
        assert [one["wrong"].status for one in of_float32] == ["wrong"] * 4
        assert cases[2].kernels["rough"].errors.gate > 1000 > cases[0].kernels["rough"].errors.gate

    def test_a_nan_in_an_image_that_is_not_judged(self):
        def change(y):
            y[1, 0, 0, 0] = math.nan
            return y

        cases = measured({"bad": Ours(change)}, ByName(bad=0.001))
        assert {one.kernels["bad"].status for one in cases} == {"wrong"}

    def test_half_precision_is_judged_by_its_own_inputs(self):
        half = measured({"ours": Ours()}, ByName(ours=1.0))[4]
        assert half.dtype == "float16"
        assert 1e-5 < half.kernels["ours"].errors.relative_l2 < 4e-4  # the result's own rounding

    def test_a_wrong_operator_is_wrong_unless_it_is_pytorchs(self):
        off = Ours(lambda y: y * 1.01)
        for choice, status in (("ours", "wrong"), ("pytorch", "ok")):
            cases = measured({"ours": Ours()}, ByName(ours=0.0005), off, choice)
            assert {one.operator.status for one in cases} == {status}
            assert (cases[0].speedup is None) == (status == "wrong")

    @pytest.mark.parametrize("who", ["kernel", "operator", "pytorch"])
    def test_what_raises_fails_alone(self, monkeypatch, who):
        kernels = {"bad": broken if who == "kernel" else Ours(), "ours": Ours()}
        if who == "pytorch":
            monkeypatch.setattr(operator_bench, "F", type("F", (), {"conv_transpose2d": broken}))
        clock = ByName(ours=0.0005, bad=0.001)
        one = measured(kernels, clock, broken if who == "operator" else None)[0]
        failures = {
            "kernel": one.kernels and one.kernels["bad"].failure,
            "operator": one.operator and one.operator.failure,
            "pytorch": one.pytorch.failure,
        }
        assert failures.pop(who) == "RuntimeError: it stopped"
        assert not any(failures.values())
        assert (one.speedup is None) == (who != "kernel")

    def test_what_is_hopeless_is_timed_by_a_few_runs(self):
        clock = ByName(slow=0.0031, ours=0.0029)
        one = measured({"slow": Ours(), "ours": Ours()}, clock)[0]
        assert one.kernels["slow"].cold.runs == measure.FEWEST_RUNS
        assert one.kernels["ours"].cold.runs == measure.RUNS

    def test_nothing_is_measured_to_choose(self, monkeypatch):
        monkeypatch.setattr(autotune, "measure", lambda *arguments: pytest.fail("measured"))
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        measured({"ours": Ours()}, ByName(ours=0.0005))


class TestTables:
    def test_a_line_for_each_shape(self):
        made = record(
            case(0.001, 0.003, shape="a"),
            case(0.001, 0.00096, shape="b", choice="pytorch"),
            case(0.001, 0.004, shape="a", form=FORMS[4]),
        )
        text = operator_bench.tables(made)
        lines = [line.split() for line in text.splitlines()]
        assert ["a", "3", "ms", "3.00", "ours", "-", "-", "-", "4.00", "ours", "-"] in lines
        assert ["b", "0.96", "ms", "0.96", "-", "-", "-", "-", "-"] in lines
        mean = f"{math.sqrt(3 * 0.96):.3f}"
        assert ["float32", mean, "0.960", "b", "1"] in lines
        assert ["float16", "4.000", "4.000", "a", "0"] in lines
        assert text.isascii()

    def test_the_least_of_grouped_problems(self):
        grouped = replace(SMALL, groups=2)
        made = record(case(0.001, 0.003, shape="a"), case(0.001, 0.007, shape="b", problem=grouped))
        assert "groups and depthwise: at least 7.00 times as fast (b, float32)" in (
            operator_bench.tables(made)
        )
        assert "groups" not in operator_bench.tables(record(case()))

    def test_what_was_wrong(self):
        assert operator_bench.wrong(RECORD)[:2] == [
            "wrong on one, float32",
            "broken on one, float32 (KernelError: it stopped)",
        ]
        assert "wrong on one, float16 last" in operator_bench.wrong(RECORD)


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_small_problem(self):
        from convt_lab.bench import _current_gpu
        from convt_lab.stages import kernels

        # Large enough that cuDNN finds TF32 the fastest where it may use it.
        problem = Problem(8, 64, 64, 65, 128, kernel_size=(3, 7))
        with _current_gpu() as machine:
            arguments = "small", problem, machine.gpu, machine.software, machine.tools
            cases = list(operator_bench.measure_shape(*arguments))
        assert operator_bench.wrong(record(*cases)) == []
        assert [case.form for case in cases] == list(FORMS)
        assert cases[0].kernels
        for one in cases:
            assert set(one.kernels) <= set(kernels)
            assert 0.9 < one.speedup < 100
            # The choice follows from the times.
            assert (one.choice == one.best) or one.choice == "pytorch"
        errors = [one.pytorch.errors.relative_l2 for one in cases]
        assert errors[0] < 1e-5 < errors[2]  # with and without TF32
