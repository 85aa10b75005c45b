"""The times that a chapter of the ladder shows."""

import pytest
import torch

import convt_lab as lab
from convt_lab import Problem, records, star_times
from convt_lab.stages import fma_stages


class Clock:
    """Runs the function, and says that it took two milliseconds."""

    def time(self, function):
        function()
        return 0.002


def test_recorded_has_the_stage_the_one_before_and_pytorch():
    lines = star_times.recorded(lab.stages["coalesced"]).splitlines()
    record = records.load_named("nvidia-h200")
    names = ["naive_gather", "coalesced", "cudnn_float32"]
    assert record.gpu.name in lines[0]
    for line, name in zip(lines[2:], names, strict=True):
        ms, share = line.split()[-2:]
        assert float(ms) == pytest.approx(record.shape("star").row(name).time_ms(), abs=5e-4)
        assert share == f"{record.share_of_fma('star', name):.1%}"


def test_recorded_of_the_first_has_no_stage_before():
    lines = star_times.recorded(lab.stages["naive_gather"]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["the", "naive_gather", "PyTorch"]


def test_the_least_time_is_that_of_the_fmas_at_the_measured_rate():
    record = records.load_named("nvidia-h200")
    (line,) = (x for x in star_times.recorded(lab.stages["winograd"]).splitlines() if "alone" in x)
    ms = float(line.split()[-2])
    rate = 2 * Problem.named("star").multiply_adds / (ms / 1000)
    assert rate == pytest.approx(record.ceilings.fp32_fma, rel=1e-3)


@pytest.mark.parametrize("stage", fma_stages.values(), ids=lambda stage: stage.name)
def test_every_fma_stage_is_recorded(stage):
    assert f"\n{stage.name} " in star_times.recorded(stage)


def test_without_a_gpu_the_line_says_so(monkeypatch):
    monkeypatch.setattr(star_times, "backend_named", lambda name: lab.program.Simulator())
    assert star_times.live(lab.stages["coalesced"]) == (
        "live: no GPU here that kernels can be built for"
    )


def test_with_a_gpu_the_stage_is_timed_on_the_star(monkeypatch):
    calls = []

    class Stage:
        def __call__(self, x, weight, bias, **arguments):
            calls.append((tuple(x.shape), arguments))

    class OnGPU:
        name = "gpu"

    star = Problem.named("star")
    inputs = (torch.empty(star.input_shape, device="meta"), None, None)

    def random_inputs(problem, seed=0, device="cpu"):
        assert (problem, device) == (star, "cuda")
        return inputs

    monkeypatch.setattr(star_times, "backend_named", lambda name: OnGPU())
    monkeypatch.setattr(Problem, "random_inputs", random_inputs)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    line = star_times.live(Stage(), Clock())
    assert line == "live: A GPU, 2.000 ms, the median of 20 runs"
    assert set(map(str, calls)) == {str((star.input_shape, star.arguments))}


@pytest.mark.gpu
def test_on_this_gpu():
    line = star_times.live(lab.stages["register_blocked"])
    assert line.startswith(f"live: {torch.cuda.get_device_name()}, ")
