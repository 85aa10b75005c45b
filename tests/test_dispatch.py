"""Dispatch: which kernel is chosen, by what, and what it is called for a person."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from convt_lab import Problem, autotune, decoder_record, dispatch, measurements, plan, records
from convt_lab.dispatch import Choice, choose_by_table
from convt_lab.measurements import Measurement, Table
from convt_lab.problem import CroppedProblem
from convt_lab.stages import kernels

DENSE = Problem(8, 32, 32, 128, 128, kernel_size=(3, 7))
GPU = torch.device("cuda", 0)
FORM = ("float32", False, False)


def measured(problem, pytorch=2.0, form=FORM, **kernels):
    return Measurement(problem, *form, pytorch, kernels)


def table(*measurements, gpu="NVIDIA H200", capability=(9, 0)):
    software = records.Software("0.1.0", "2.11.0", "13.0", "9.19.0")
    return Table(gpu, capability, software, "2026-11-25", measurements)


class FakeKernel:
    """Takes what its arguments say."""

    def __init__(
        self,
        dtypes=(torch.float32,),
        channels_last=False,
        covers=lambda problem: True,
        precision="float32",
    ):
        self.dtypes, self.channels_last, self.covers = dtypes, channels_last, covers
        self.precision = precision

    def runs_on(self, capability):
        return True

    def supports(self, problem, dtype, channels_last):
        takes = dtype in self.dtypes and (self.channels_last or not channels_last)
        return takes and self.covers(problem)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that isn't there, two kernels, an empty memory, and a stand-in for measuring.

    Returns a namespace: what is in it decides what happens, and it counts the measurements.
    """

    state = SimpleNamespace(
        times={"pytorch": 2.0, "a": 1.0, "b": 4.0},
        failures={},
        measurements=0,
        is_capturing=False,
    )

    def measure(problem, dtype, device, channels_last, kernels):
        state.measurements += 1
        if isinstance(state.times, Exception):
            raise state.times
        assert set(kernels) <= {"a", "b"}
        return state.times, state.failures

    monkeypatch.setattr(dispatch, "kernels", {"a": FakeKernel(), "b": FakeKernel()})
    monkeypatch.setattr(dispatch, "_gpu", lambda index: ("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(dispatch, "_tables", lambda: (table(),))
    monkeypatch.setattr(dispatch, "_memory", autotune.Memory(lambda: tmp_path))
    monkeypatch.setattr(dispatch, "_choices", {})
    dispatch._warn.cache_clear()
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(autotune, "environment", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.is_capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CONVT_AUTOTUNE", raising=False)
    return state


def choose(problem=DENSE, dtype=torch.float32, device=GPU, channels_last=False, tf32=False):
    return dispatch.choose(problem, dtype, device, channels_last=channels_last, tf32=tf32)


class TestWithoutAKernel:
    @pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
    def test_another_device(self, device):
        choice = choose(device=torch.device(device))
        assert choice.kernel == "pytorch"
        assert f"the tensors are on {device}" in choice.reason

    def test_another_dtype(self, gpu):
        choice = choose(dtype=torch.float64)
        assert choice == Choice(
            "pytorch", "no kernel of ours takes this problem in float64, contiguous"
        )

    def test_another_memory_format(self, gpu):
        assert "in float32, channels last" in choose(channels_last=True).reason

    def test_a_problem_that_no_kernel_covers(self, gpu, monkeypatch):
        never = FakeKernel(covers=lambda problem: problem.groups > 1)
        monkeypatch.setattr(dispatch, "kernels", {"a": never})
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        assert choose().kernel == "pytorch"
        assert gpu.measurements == 0
        assert choose(replace(DENSE, groups=2)).kernel == "a"

    def test_an_empty_output(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        assert choose(replace(DENSE, batch=0)) == Choice("pytorch", "the output is empty")
        assert gpu.measurements == 0

    def test_the_slow_rungs_are_no_candidates(self):
        found = dispatch.candidates(DENSE, torch.float32, False, tf32=True)
        assert "register_blocked" in found
        assert not set(found) & set(dispatch.SLOW)
        assert set(dispatch.SLOW) < set(kernels)
        expected = {n for n, k in kernels.items() if n not in dispatch.SLOW and k.covers(DENSE)}
        if not torch.cuda.is_available():  # which might be too old for some
            assert set(found) == expected

    def test_a_gpu_must_have_the_instructions(self):
        def found(capability):
            return dispatch.candidates(
                DENSE, torch.float32, False, tf32=False, capability=capability
            )

        assert "tensor_core_split" in found((8, 0))
        assert "tensor_core_split" in found((9, 0))
        assert set(found((7, 5))) == set(found((8, 0))) - {
            "tensor_core_split",
            "tensor_core_narrow",
        }

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "tf32", "own"),
        [
            (torch.float32, False, {"hopper"}),
            (torch.float32, True, {"hopper", "hopper_single"}),
            (torch.float16, False, {"hopper_single"}),
            (torch.bfloat16, True, {"hopper_single"}),
        ],
    )
    def test_hoppers_own_are_for_hopper_alone(self, dtype, tf32, own, channels_last, monkeypatch):
        problem = Problem(1, 32, 32, 20, 20, kernel_size=3)

        def found(capability):
            return set(
                dispatch.candidates(problem, dtype, channels_last, tf32=tf32, capability=capability)
            )

        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        assert found((9, 0)) - found((8, 9)) == own
        assert not own & found((10, 0))
        assert not own & found((12, 0))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")  # then they would be slow
        assert not own & found((9, 0))


class TestPrecision:
    """Float32 is never rounded to TF32 where PyTorch would not do it."""

    @pytest.fixture
    def faster(self, gpu, monkeypatch):
        """The fastest kernel by far is one that rounds."""
        rounding = FakeKernel((torch.float32, torch.float16), precision="tf32")
        monkeypatch.setattr(dispatch, "kernels", {"a": rounding, "b": FakeKernel()})
        gpu.times = {"pytorch": 2.0, "a": 0.1, "b": 1.0}
        return gpu

    def test_the_candidates(self, faster):
        def found(dtype, tf32):
            return set(dispatch.candidates(DENSE, dtype, False, tf32=tf32, capability=(9, 0)))

        assert found(torch.float32, True) == {"a", "b"}
        assert found(torch.float32, False) == {"b"}
        assert found(torch.float16, False) == found(torch.float16, True) == {"a"}

    def test_measured_now(self, faster, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        assert choose(tf32=False).kernel == "b"
        assert choose(tf32=True).kernel == "a"

    def test_measured_before_by_whoever(self, faster):
        """A memory that holds it, of another version say, is no reason to take it."""
        for tf32 in (False, True):
            case = autotune.case_name(DENSE, torch.float32, False, tf32)
            dispatch._memory.remember("GPU 0", case, faster.times)
        assert choose(tf32=False).kernel == "b"
        assert choose(tf32=True).kernel == "a"

    @pytest.mark.parametrize("problem", [DENSE, replace(DENSE, batch=7)], ids=["same", "similar"])
    def test_by_a_table(self, faster, monkeypatch, problem):
        of_form = [
            measured(DENSE, form=("float32", False, tf32), a=0.1, b=0.5) for tf32 in (False, True)
        ]
        monkeypatch.setattr(dispatch, "_tables", lambda: (table(*of_form),))
        assert choose(problem, tf32=False).kernel == "b"
        assert choose(problem, tf32=True).kernel == "a"

    def test_the_package_has_two(self, monkeypatch):
        monkeypatch.setattr(dispatch, "SLOW", ())
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

        def found(tf32, capability):
            return set(
                dispatch.candidates(DENSE, torch.float32, False, tf32=tf32, capability=capability)
            )

        def rounding(capability):
            assert found(False, capability) < found(True, capability)
            return found(True, capability) - found(False, capability)

        assert rounding((8, 0)) == {"tensor_core"}
        assert rounding((9, 0)) == {"tensor_core", "hopper_single"}


class TestAutotuning:
    def test_a_new_problem_is_measured_once(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        choice = choose()
        assert choice.kernel == "a"
        assert "measured here just now: it took 1e+03 ms, PyTorch's own 2e+03 ms" in choice.reason
        assert choose().kernel == "a"
        assert gpu.measurements == 1
        choose(replace(DENSE, batch=9))
        choose(device=torch.device("cuda", 1))
        assert gpu.measurements == 3

    def test_and_remembered_by_the_next_process(self, gpu, monkeypatch, tmp_path):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        choose()
        monkeypatch.setattr(dispatch, "_memory", autotune.Memory(lambda: tmp_path))
        monkeypatch.setattr(dispatch, "_choices", {})
        for value in ("0", "1"):
            monkeypatch.setenv("CONVT_AUTOTUNE", value)
            assert "measured here before" in choose().reason
        assert gpu.measurements == 1

    def test_cudnns_switch_asks_for_it(self, gpu, monkeypatch):
        choose()
        assert gpu.measurements == 0
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        choose()
        assert gpu.measurements == 1

    def test_never(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "0")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        assert choose().reason == "nothing similar was measured"
        assert gpu.measurements == 0

    def test_a_value_that_means_nothing(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "maybe")
        with pytest.raises(ValueError, match="CONVT_AUTOTUNE='maybe'"):
            choose()

    @pytest.mark.parametrize("state", ["capture", "compile", "fake"])
    def test_not_while_nothing_may_be_measured(self, gpu, monkeypatch, state):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        before = dispatch.generation
        with monkeypatch.context() as patch:
            gpu.is_capturing = state == "capture"
            if state == "compile":
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            if state == "fake":
                patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
            choice = choose()
            assert choice.reason == "nothing similar was measured"
            assert not choice.lasts  # whoever keeps it asks again
            assert gpu.measurements == 0
        assert dispatch.generation == before  # and nobody else does
        gpu.is_capturing = False
        assert choose().kernel == "a"
        assert gpu.measurements == 1

    def test_a_crop_is_not_measured(self, gpu, monkeypatch):
        """PyTorch has no argument for it, and what the whole took says nothing about a part."""
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        assert choose().reason.startswith("measured here just now")
        cropped = CroppedProblem.between(DENSE, 1, 0)
        assert choose(cropped).reason == "nothing similar was measured"
        assert choose(cropped).lasts
        assert gpu.measurements == 1

    def test_during_a_capture_what_is_remembered_counts(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        choose()
        gpu.is_capturing = True
        monkeypatch.setattr(dispatch, "_choices", {})
        before = dispatch.generation
        assert choose().kernel == "a"
        assert dispatch.generation == before

    @pytest.mark.parametrize(
        ("times", "kernel"),
        [
            ({"pytorch": 2.0, "a": 1.97, "b": 3.0}, "pytorch"),
            ({"pytorch": 2.0, "a": 1.9, "b": 1.5}, "b"),
            ({"pytorch": 2.0}, "pytorch"),
        ],
    )
    def test_the_fastest_wins_if_it_is_clearly_faster(self, gpu, monkeypatch, times, kernel):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        gpu.times = times
        assert choose().kernel == kernel

    def test_where_it_fails_the_table_decides(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        monkeypatch.setattr(dispatch, "_tables", lambda: (table(measured(DENSE, a=1.0)),))
        gpu.times = torch.OutOfMemoryError("full")
        with pytest.warns(RuntimeWarning, match="could not measure Problem.*full"):
            choice = choose()
        assert choice.kernel == "a"
        assert "on NVIDIA H200" in choice.reason
        choose()
        assert gpu.measurements == 1  # and it is not tried at each call

    def test_what_ran_only_in_part_is_not_remembered(self, gpu, monkeypatch, tmp_path):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        gpu.failures = {"b": RuntimeError("no nvcc")}
        with pytest.warns(RuntimeWarning, match="could not measure 'b': RuntimeError: no nvcc"):
            assert choose().kernel == "a"
        assert not list(tmp_path.iterdir())

    def test_threads_at_once_measure_once(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        measure = autotune.measure

        def slow(*arguments):
            time.sleep(0.05)
            return measure(*arguments)

        monkeypatch.setattr(autotune, "measure", slow)
        found = []
        threads = [threading.Thread(target=lambda: found.append(choose())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {choice.kernel for choice in found} == {"a"}
        assert len(found) == 8
        assert gpu.measurements == 1

    def test_tf32_says_nothing_about_half_precision(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        half = FakeKernel(dtypes=(torch.float16, torch.float32))
        monkeypatch.setattr(dispatch, "kernels", {"a": half})
        for tf32 in (False, True):
            choose(dtype=torch.float16, tf32=tf32)
        assert gpu.measurements == 1
        for tf32 in (False, True):
            choose(tf32=tf32)
        assert gpu.measurements == 3


class TestRepeats:
    def test_a_choice_is_made_once(self, gpu, monkeypatch):
        calls = []
        by_tables = dispatch.choose_by_tables

        def counted(*arguments):
            calls.append(1)
            return by_tables(*arguments)

        monkeypatch.setattr(dispatch, "choose_by_tables", counted)
        assert choose() is choose()
        assert len(calls) == 1

    def test_not_every_choice_is_kept(self, gpu, monkeypatch):
        monkeypatch.setattr(dispatch, "_MOST_CHOICES", 3)
        for batch in range(1, 20):
            choose(replace(DENSE, batch=batch))
            assert len(dispatch._choices) <= 3

    def test_the_generation_changes_with_what_is_known(self, gpu, monkeypatch):
        before = dispatch.generation
        choose()
        assert dispatch.generation == before
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        choose()
        assert dispatch.generation != before
        measured_at = dispatch.generation
        choose()
        assert dispatch.generation == measured_at

    def test_a_benchmark_can_choose_by_its_own_table(self, gpu, monkeypatch):
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        choose()
        before = dispatch.generation
        with dispatch.only_by(table(measured(DENSE, b=0.5))):
            assert dispatch.generation != before
            assert choose().kernel == "b"
            assert choose(replace(DENSE, batch=1000)).kernel == "pytorch"
            inside = dispatch.generation
        assert dispatch.generation not in (before, inside)
        assert choose().kernel == "a"
        assert gpu.measurements == 1


def by_table(*measurements, problem=DENSE, form=FORM, ours=("a", "b"), **arguments):
    return choose_by_table(table(*measurements), problem, *form, ours, **arguments)


class TestTable:
    def test_the_problem_itself(self):
        far = replace(DENSE, batch=9)
        choice = by_table(measured(far, a=9.0, b=0.1), measured(DENSE, a=1.0, b=3.0))
        assert choice == Choice(
            "a",
            "measured on NVIDIA H200: it took 1e+03 ms, PyTorch's own 2e+03 ms, 2.00 times as long",
        )

    def test_the_problem_itself_where_pytorch_is_faster(self):
        choice = by_table(measured(DENSE, a=2.5, b=2.2))
        assert choice.kernel == "pytorch"
        assert "the best of ours, b, took 2.2e+03 ms" in choice.reason

    def test_a_bias_makes_no_difference(self):
        assert (
            "measured on"
            in by_table(measured(DENSE, a=1.0), problem=replace(DENSE, bias=True)).reason
        )

    def test_a_kernel_that_does_not_take_it_is_never_chosen(self):
        assert by_table(measured(DENSE, a=1.0, b=0.5), ours=("a",)).kernel == "a"
        near = measured(replace(DENSE, batch=7), a=1.0, b=0.5)
        assert by_table(near, ours=("a",)).kernel == "a"
        assert by_table(near, ours=()).kernel == "pytorch"

    def test_the_nearest_decide(self):
        near = replace(DENSE, batch=9)
        far = replace(DENSE, batch=64)
        good, bad = {"a": 1.0}, {"a": 4.0}
        assert by_table(measured(near, **good), measured(far, **bad)).kernel == "a"
        assert by_table(measured(near, **bad), measured(far, **good)).kernel == "pytorch"

    def test_no_more_than_the_nearest_few_decide(self):
        crowd = [measured(replace(DENSE, batch=40 + i), a=20.0) for i in range(20)]
        near = [measured(replace(DENSE, batch=8, width=125 + 2 * i), a=1.0) for i in range(4)]
        choice = by_table(*crowd, *near)
        assert choice.kernel == "a"
        assert "by 4 similar problems measured on NVIDIA H200, a is expected to be 2.00" in (
            choice.reason
        )

    @pytest.mark.parametrize(
        ("seconds", "kernel"), [(2.0 / 1.15, "pytorch"), (2.0 / 1.25, "a"), (2.1, "pytorch")]
    )
    def test_a_similar_problem_must_favour_it_clearly(self, seconds, kernel):
        assert by_table(measured(replace(DENSE, batch=7), a=seconds)).kernel == kernel

    def test_the_nearest_may_not_speak_against_it(self):
        near = measured(replace(DENSE, batch=9), a=2.05)
        next_ = measured(replace(DENSE, batch=10), a=0.1)
        choice = by_table(near, next_)
        assert choice.kernel == "pytorch"
        assert "too little to leave it to ours" in choice.reason

    def test_no_time_is_expected_that_a_kernel_never_reached(self):
        large, small = replace(DENSE, batch=64), replace(DENSE, batch=4)
        seen = measured(large, 2.0, a=0.5)
        unlike = replace(DENSE, kernel_size=(11, 11))
        assert by_table(seen, problem=small).kernel == "a"
        # PyTorch's own was as quick as it would have to be, and this kernel never was ...
        assert by_table(seen, measured(unlike, 0.01, b=9.0), problem=small).kernel == "pytorch"
        # ... or was, once.
        assert by_table(seen, measured(unlike, 0.01, a=0.02), problem=small).kernel == "a"

    def test_the_better_of_two_kernels(self):
        near = measured(replace(DENSE, batch=7), a=1.0, b=0.9)
        assert by_table(near).kernel == "b"
        assert by_table(near, measured(replace(DENSE, batch=6), b=50.0)).kernel == "a"

    @pytest.mark.parametrize(
        "other",
        [
            replace(DENSE, groups=2),
            replace(DENSE, groups=32),
            replace(DENSE, stride=2),
            replace(DENSE, kernel_size=(11, 11)),
            replace(DENSE, in_channels=2),
            replace(DENSE, dilation=9),
        ],
        ids=["grouped", "depthwise", "strided", "kernel", "channels", "dilation"],
    )
    def test_what_is_not_similar_says_nothing(self, other):
        assert by_table(measured(other, a=0.1)) == Choice("pytorch", "nothing similar was measured")

    def test_similar_is_not_the_same_kernel_size(self):
        """A kernel for three rows of seven taps says little about one for other sizes."""
        same_taps = replace(DENSE, batch=32)
        fewer_taps = replace(DENSE, kernel_size=(3, 6))
        assert dispatch.distance(DENSE, same_taps) < dispatch.distance(DENSE, fewer_taps)

    @pytest.mark.parametrize("form", [("float16", *FORM[1:]), ("float32", True, False)])
    def test_another_form_says_nothing(self, form):
        assert by_table(measured(DENSE, form=form, a=0.1)).kernel == "pytorch"
        assert by_table(measured(DENSE, a=0.1), form=form).kernel == "pytorch"

    def test_tf32_is_another_form(self):
        allowed = ("float32", False, True)
        both = measured(DENSE, a=1.0), measured(DENSE, 0.5, form=allowed, a=1.0)
        assert by_table(*both).kernel == "a"
        assert by_table(*both, form=allowed).kernel == "pytorch"

    def test_bfloat16_has_neighbours_of_both_dtypes(self):
        half, other = ("float16", False, False), ("bfloat16", False, False)
        near = measured(replace(DENSE, batch=7), form=half, a=1.0)
        nearer = measured(replace(DENSE, batch=8, width=129), form=other, a=1.0)
        assert (
            "by a similar problem measured on NVIDIA H200, a is"
            in by_table(nearer, form=other).reason
        )
        both = by_table(near, nearer, form=other).reason
        assert "by 2 similar problems measured on NVIDIA H200 in float16, a is" in both
        assert by_table(nearer, form=half).kernel == "pytorch"

    def test_bfloat16_is_as_float16_was(self):
        half, other = ("float16", False, False), ("bfloat16", False, False)
        choice = by_table(measured(DENSE, form=half, a=1.0), form=other)
        assert choice.kernel == "a"
        assert "on NVIDIA H200 in float16" in choice.reason
        own = measured(DENSE, form=other, a=9.0)
        assert by_table(measured(DENSE, form=half, a=1.0), own, form=other).kernel == "pytorch"

    def test_the_distance_is_one(self):
        problems = [
            DENSE,
            replace(DENSE, batch=2),
            replace(DENSE, kernel_size=3),
            replace(DENSE, stride=2),
            replace(DENSE, groups=4, in_channels=64),
        ]
        for one in problems:
            for other in problems:
                gap = dispatch.distance(one, other)
                assert gap == dispatch.distance(other, one)
                assert (gap == 0) == (one == other)

    def test_every_feature_counts(self):
        changes = dict(
            in_channels=64,
            out_channels=64,
            height=256,
            width=256,
            kernel_size=(5, 7),
            dilation=2,
            batch=9,
        )
        for name, value in changes.items():
            assert dispatch.distance(DENSE, replace(DENSE, **{name: value})) > 0, name
        strided = replace(DENSE, stride=2)
        assert dispatch.distance(strided, replace(DENSE, stride=(2, 4))) > 0


class TestOtherGPUs:
    def choose(self, *tables, capability=(8, 6), problem=DENSE):
        return dispatch.choose_by_tables(
            tables, "NVIDIA A10", capability, problem, *FORM, ("a", "b")
        )

    def test_the_nearest_capability_speaks(self):
        hopper = table(measured(DENSE, a=0.5))
        turing = table(measured(DENSE, b=0.5), gpu="Tesla T4", capability=(7, 5))
        assert self.choose(hopper, turing).kernel == "a"
        assert self.choose(hopper, turing, capability=(7, 0)).kernel == "b"
        choice = self.choose(hopper)
        assert "on another GPU, NVIDIA H200" in choice.reason

    def test_it_must_be_faster_by_more(self):
        assert self.choose(table(measured(DENSE, a=2.0 / 1.45))).kernel == "pytorch"
        assert self.choose(table(measured(DENSE, a=2.0 / 1.55))).kernel == "a"

    def test_its_own_table_comes_first(self):
        own = table(measured(DENSE, b=0.5), gpu="NVIDIA A10", capability=(8, 6))
        twin = table(measured(DENSE, a=0.1), gpu="NVIDIA A40", capability=(8, 6))
        assert self.choose(twin, own).kernel == "b"

    def test_no_table(self):
        assert self.choose() == Choice("pytorch", "nothing similar was measured")


class TestWithoutMeasurements:
    DEPTHWISE = Problem(8, 64, 64, 64, 64, kernel_size=4, stride=2, padding=1, groups=64)

    def choose(self, problem=DEPTHWISE, form=FORM, ours=("register_blocked", "few_channels")):
        return by_table(problem=problem, form=form, ours=ours)

    def test_where_memory_is_the_limit_a_kernel_made_for_it_is_taken(self):
        choice = self.choose()
        assert choice.kernel == "few_channels"
        assert "memory is the limit" in choice.reason
        both = self.choose(ours=("tensor_core_split", "few_channels", "one_channel"))
        assert both.kernel == "one_channel"

    @pytest.mark.parametrize(
        "changes",
        [
            dict(problem=DENSE),
            dict(problem=Problem(8, 512, 512, 64, 64, kernel_size=7, groups=2)),
            dict(form=("float32", False, True)),
            dict(form=("float16", False, False)),
            dict(ours=("register_blocked",)),
            dict(ours=("tensor_core_split", "tensor_core_narrow")),
        ],
        ids=["dense", "arithmetic", "tf32", "half", "rungs", "tensor cores"],
    )
    def test_else_it_is_pytorchs(self, changes):
        assert self.choose(**changes).kernel == "pytorch"


class TestLeaveOneOut:
    def test_losses_and_their_shares(self):
        one, two, three = DENSE, replace(DENSE, batch=9), replace(DENSE, stride=2)
        made = table(
            measured(one, 2.0, a=1.0), measured(two, 2.0, a=4.0), measured(three, 2.0, a=1.0)
        )
        result = dispatch.leave_one_out(made)
        # one goes by two: PyTorch, half as fast; two by one: a, half as fast as PyTorch; three has
        # nobody.
        assert [(choice.kernel, loss) for _, choice, loss in result.losses] == [
            ("pytorch", 1.0),
            ("a", 1.0),
            ("pytorch", 1.0),
        ]
        assert result.share_above() == 1
        assert result.share_slower() == pytest.approx(1 / 3)
        assert "100.0 % lose more than 3 % against the fastest, 33.3 % against PyTorch" in (
            result.summary()
        )

    def test_a_rule_that_is_right(self):
        made = table(*(measured(replace(DENSE, batch=n), a=1.0) for n in (7, 8, 9)))
        result = dispatch.leave_one_out(made)
        assert result.share_above() == result.share_slower() == 0
        assert result.summary().count("\n") == 0

    def test_other_forms_of_a_problem_do_not_tell(self):
        tf32 = ("float32", False, True)
        made = table(measured(DENSE, a=1.0), measured(DENSE, form=tf32, a=1.0))
        assert {c.kernel for _, c, _ in dispatch.leave_one_out(made).losses} == {"pytorch"}

    def test_what_had_nothing_similar_is_told_apart(self):
        # Two problems that speak for each other, and one that is far from both.
        far = replace(DENSE, kernel_size=(31, 31), in_channels=2)
        near = replace(DENSE, height=DENSE.height + 8)
        made = table(*(measured(problem, a=0.5) for problem in (DENSE, near, far)))
        result = dispatch.leave_one_out(made)
        assert [m.problem for m, _, _ in result.with_similar().losses] == [DENSE, near]
        assert result.share_above() == pytest.approx(1 / 3)
        assert result.with_similar().share_above() == 0
        assert "of the 2 for which something similar was measured: 0.0 %" in result.summary()

    def test_the_shipped_tables(self):
        for shipped in measurements.load():
            result = dispatch.leave_one_out(shipped)
            print(f"{shipped.gpu}: {result.summary()}")
            assert result.share_slower() <= 0.05
            # Where nothing similar was measured PyTorch computes, and there is nothing to judge.
            similar = result.with_similar()
            assert len(similar.losses) > 0.6 * len(result.losses)
            assert similar.share_slower() <= 0.05
            assert similar.share_above() <= 0.15


class TestShipped:
    def test_the_layers_of_the_recorded_network_are_in_it(self):
        (table,) = measurements.load()
        record = decoder_record.load(records.FOLDER / "nvidia-h200-decoder.json")
        known = {m.key: m for m in table.measurements}
        own = [layer.problem for mode in record.modes for layer in mode.alone.values()]
        for mode in record.modes:
            last, tf32 = mode.memory_format == "channels_last", mode.dtype == "float32"
            for layer in mode.alone.values():
                form = mode.dtype, last, tf32 and mode.allow_tf32
                found = known[measurements.without_bias(layer.problem), form]
                assert layer.seconds == {"pytorch": found.pytorch, **found.kernels}
        (rest,) = measurements.without([table], own)
        assert {m.problem for m in rest.measurements} == {m.problem for m in table.measurements} - {
            measurements.without_bias(problem) for problem in own
        }

    def test_it_is_what_the_records_say(self):
        tables = measurements.tables_of_records(leave_out=dispatch.SLOW)
        assert measurements.FILE.read_text() == measurements.as_text(tables), (
            "run `python -m convt_lab dispatch`"
        )

    def test_a_damaged_package_chooses_all_the_same(self, monkeypatch, tmp_path):
        (tmp_path / "dispatch.json").write_text("{")
        monkeypatch.setattr(
            measurements, "load", lambda load=measurements.load: load(tmp_path / "dispatch.json")
        )
        dispatch._warn.cache_clear()
        with pytest.warns(RuntimeWarning, match="is no JSON.*reinstall it"):
            assert dispatch._tables.__wrapped__() == ()

    def test_importing_reads_nothing(self):
        code = (
            "import convt_lab.dispatch as d, sys; "
            "sys.exit(d._tables.cache_info().currsize or d._memory._was_read)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestExplain:
    def test_on_the_cpu(self):
        choice = dispatch.explain(torch.ones(2, 5, 5), torch.ones(2, 3, 4, 4), torch.ones(3))
        assert str(choice) == (
            "PyTorch's own: the tensors are on cpu, and our kernels run on CUDA GPUs"
        )

    def test_a_kernel_of_ours(self):
        assert str(Choice("winograd", "it is fast")) == "winograd: it is fast"

    def test_tensors_that_do_not_fit(self):
        x, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 3, 4, 4, dtype=torch.float64)
        choice = dispatch.explain(x, weight)
        assert str(choice).startswith("PyTorch's own: the tensors are not of one dtype and device")
        assert "torch.float32, torch.float64" in choice.reason

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(dict(stride=0), "stride=0"), (dict(groups=3), "in_channels"), (dict(padding=9), "pad")],
    )
    def test_a_call_that_is_none(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            dispatch.explain(torch.ones(1, 2, 5, 5), torch.ones(2, 3, 4, 4), **arguments)

    def test_a_kernel_that_can_not_be_built(self, monkeypatch):
        monkeypatch.setattr(dispatch, "choose", lambda *_, **__: Choice("hopper", "it is fast"))
        monkeypatch.setattr(plan, "unbuildable", {"hopper"})
        choice = dispatch.explain(torch.ones(1, 2, 5, 5), torch.ones(2, 3, 4, 4))
        assert str(choice) == "PyTorch's own: hopper (it is fast) can't be built here"

    def test_autocast_leaves_float64(self, monkeypatch):
        asked = []
        monkeypatch.setattr(dispatch, "choose", lambda *a, **_: asked.append(a) or Choice("a", "b"))
        x, weight = torch.ones(1, 2, 5, 5), torch.ones(2, 3, 4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dispatch.explain(x, weight)
            dispatch.explain(x.double(), weight.double())
            mixed = dispatch.explain(x, weight.double())
        assert [dtype for _, dtype, *_ in asked] == [torch.bfloat16, torch.float64]
        assert "torch.bfloat16, torch.float64" in mixed.reason

    def test_what_the_choice_is_asked(self, monkeypatch):
        seen = {}

        def ask(problem, dtype, device, **form):
            seen.update(problem=problem, dtype=dtype, device=device, **form)
            return Choice("a", "b")

        monkeypatch.setattr(dispatch, "choose", ask)
        x, weight = torch.ones(4, 5, 6), torch.ones(4, 3, 2, 3)
        dispatch.explain(x, weight, torch.ones(6), 2, (1, 0), 1, 2, 1)
        assert seen["problem"] == Problem(
            *(1, 4, 6, 5, 6),
            kernel_size=(2, 3),
            stride=2,
            padding=(1, 0),
            output_padding=1,
            groups=2,
            bias=True,
        )
        assert (seen["dtype"], seen["device"]) == (torch.float32, torch.device("cpu"))
        assert seen["tf32"] == (torch.backends.cudnn.conv.fp32_precision == "tf32")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dispatch.explain(x, weight, groups=2)
        assert seen["dtype"] == torch.bfloat16


@pytest.mark.gpu
class TestOnAGPU:
    def test_explain(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path))
        monkeypatch.setattr(dispatch, "_memory", autotune.Memory())
        x = torch.randn(2, 16, 40, 50, device="cuda")
        weight = torch.randn(16, 16, 3, 7, device="cuda")
        for value, words in (("0", "measured on"), ("1", "measured here just now")):
            monkeypatch.setenv("CONVT_AUTOTUNE", value)
            choice = dispatch.explain(x, weight)
            assert choice.kernel in ("pytorch", *kernels)
            assert words in choice.reason or "similar" in choice.reason
        assert (tmp_path / "autotune.json").is_file()
        last = x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)
        assert dispatch.explain(*last).kernel in ("pytorch", *kernels)

    def test_a_capture_is_left_alone(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path))
        monkeypatch.setenv("CONVT_AUTOTUNE", "1")
        monkeypatch.setattr(dispatch, "_memory", autotune.Memory())
        x = torch.randn(2, 16, 41, 51, device="cuda")
        weight = torch.randn(16, 16, 3, 7, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            choice = dispatch.explain(x, weight)
            x + 1
        assert "just now" not in choice.reason
        assert "measured here just now" in dispatch.explain(x, weight).reason
