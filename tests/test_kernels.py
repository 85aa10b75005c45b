"""The kernels that are no rungs against float64, on what they cover, in every type."""

import dataclasses
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.reference import (
    FLOAT32_GATE,
    condition_error,
    relative_l2,
    scatter,
    tf32_gate,
    truncation_gate,
)
from convt_lab.split import FORMATS
from convt_lab.stages import _ConvTransposeProblem, kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = [name for name in kernels if name not in lab.stages]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: Those that sum in float32, in the order of the stages; tensor cores do neither.
IN_ORDER = ["one_channel", "few_channels"]

#: Those that take every legal problem, in every type, and hand down what they have no way for.
COMPLETE = ["tensor_core"]

#: Of a call, where they are not one, or two with one that packs weights: scale, pack, multiply and
#: repair.
LAUNCHES = {"hopper": 4}

#: Of one rounding to the type.
UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Let what torch allocates start as NaN, so that a pixel nobody wrote can't look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def data_of(problem, dtype=torch.float32, **settings):
    return [None if t is None else t.to(dtype) for t in inputs(problem, **settings)]


def run(kernel, x, weight, bias=None, device="cpu", *, channels_last=False, **arguments):
    """Run a kernel on copies on `device`; the result is on the CPU."""
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = [None if t is None else t.to(device) for t in (x, weight, bias)]
    return kernels[kernel](*tensors, **arguments).cpu()


def uses_tf32(kernel, problem, device="cpu"):
    """Whether the kernel rounds float32 operands to TF32, and hands the problem to no other."""
    if kernels[kernel].precision != "tf32" or kernels[kernel].variant(problem) != "tensor cores":
        return False
    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)


def assert_float32_is_right(kernel, y, x, weight, bias, problem, device="cpu"):
    """Judge a result: float32 by its gate, TF32 by two.

    The first is what rounding the operands may cost. The second takes the rounded operands for
    given, so that all but their own rounding is judged nearly as sharply as float32.
    """
    if not uses_tf32(kernel, problem, device):
        assert condition_error(y, x, weight, bias, **problem.arguments) <= FLOAT32_GATE, problem
        return
    channels = -(-problem.in_channels // problem.groups // 8) * 8
    terms = channels * problem.kernel_size[0] * problem.kernel_size[1]
    rounded = [FORMATS["tf32"].round(t.numpy()) for t in (x, weight)]
    error = condition_error(y, *rounded, bias, **problem.arguments)
    assert error <= truncation_gate(terms, depth=4), problem  # the GPU's order is not told
    # Below the smallest normal number TF32 has fewer digits.
    normal = [(t == 0) | (t.abs() >= torch.finfo(torch.float32).tiny) for t in (x, weight)]
    if all(is_normal.all() for is_normal in normal):
        error = condition_error(y, x, weight, bias, **problem.arguments)
        assert error <= tf32_gate(terms), problem


def formats(kernel):
    return [False, True] if kernels[kernel].takes_channels_last else [False]


#: What the random problems have little of: many channels on one side, groups of several channels,
#: strides whose phases a thread has to share with others, rows of whole vectors and others, images
#: that fill several tiles, and more weights than shared memory holds.
MORE = [
    lab.Problem(2, 6, 6, 19, 64, kernel_size=(3, 7), groups=6, bias=True),
    lab.Problem(1, 4, 4, 33, 36, kernel_size=4, stride=2, padding=1, groups=4),
    lab.Problem(1, 2, 2, 5, 700, kernel_size=(3, 9), padding=(1, 4), groups=2),
    lab.Problem(1, 3, 3, 150, 9, kernel_size=5, stride=(1, 3), padding=2, groups=3, bias=True),
    lab.Problem(1, 40, 1, 12, 24, kernel_size=9, stride=2, padding=4, output_padding=1),
    lab.Problem(1, 30, 1, 9, 12, kernel_size=9, stride=3, padding=4, output_padding=2),
    lab.Problem(1, 40, 3, 9, 40, kernel_size=(3, 7), bias=True),
    lab.Problem(2, 20, 3, 8, 8, kernel_size=4, stride=2, padding=1, bias=True),
    lab.Problem(1, 3, 70, 7, 44, kernel_size=(3, 7), bias=True),
    lab.Problem(1, 32, 32, 14, 14, kernel_size=3, stride=2, padding=1, output_padding=1, groups=4),
    lab.Problem(
        1, 16, 32, 9, 24, kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1),
        groups=2, bias=True,
    ),
    lab.Problem(1, 8, 20, 5, 12, kernel_size=3, stride=5, padding=1, dilation=2),
    lab.Problem(1, 7, 7, 6, 9, kernel_size=16, stride=8),
    lab.Problem(1, 3, 5, 4, 5, kernel_size=2, stride=(16, 13), bias=True),
    lab.Problem(1, 2, 3, 5, 6, kernel_size=(3, 2), dilation=(15, 31)),
    lab.Problem(1, 5, 8, 3, 3, kernel_size=(8, 32), bias=True),
    lab.Problem(1, 2, 9, 70, 70, kernel_size=1),
    lab.Problem(1, 2, 2, 3, 66_003, kernel_size=3, padding=(1, 33_000)),
    lab.Problem(1, 90, 1, 2, 3, kernel_size=9, stride=2, padding=4, bias=True),
    # Sixteen channels and more on both sides.
    lab.Problem(2, 40, 72, 5, 7, kernel_size=2, stride=2),
    lab.Problem(1, 72, 130, 4, 5, kernel_size=1, bias=True),
    lab.Problem(1, 16, 16, 9, 70, kernel_size=7, padding=3),
    lab.Problem(3, 20, 24, 5, 6, kernel_size=4, stride=2, padding=1, bias=True),
    lab.Problem(
        2, 32, 48, 6, 7, kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1),
        groups=2, bias=True,
    ),
    lab.Problem(1, 33, 17, 11, 13, kernel_size=(3, 7)),
    lab.Problem(2, 36, 80, 1, 1, kernel_size=4, bias=True),
    lab.Problem(5, 16, 16, 3, 3, kernel_size=3, padding=1),
    lab.Problem(1, 16, 16, 2, 1100, kernel_size=(3, 7)),
    lab.Problem(1, 16, 66, 6, 5, kernel_size=3, stride=2, padding=1, output_padding=1),
    lab.Problem(1, 18, 19, 4, 6, kernel_size=(11, 3), padding=(5, 1), bias=True),
    lab.Problem(1, 17, 16, 3, 4, kernel_size=(1, 2), stride=(3, 2), bias=True),
]  # fmt: skip


#: On the simulator their blocks take long, few channels or many. On a GPU they get all problems.
SLOW = [] if os.environ.get("CONVT_LAB_LONG") else ["tensor_core_split", "tensor_core_narrow"]


def cases(kernel, dtype=torch.float32, channels_last=False, step=1, device="cpu"):
    """Yield (number, problem) of what the kernel covers."""
    more = MORE
    if kernel in SLOW and device == "cpu":
        more = MORE if step == 1 else MORE[::3]
        step *= 5
    for number, problem in enumerate([*problem_set(300)[::step], *more]):
        if problem.batch and kernels[kernel].supports(problem, dtype, channels_last):
            yield number, problem


@pytest.mark.parametrize("kernel", KERNELS)
class TestValues:
    def test_float64_agrees(self, kernel, device):
        count = 0
        for channels_last in formats(kernel):
            for number, problem in cases(kernel, channels_last=channels_last, device=device):
                x, weight, bias = data_of(problem, seed=number)
                y = run(
                    kernel, x, weight, bias, device, channels_last=channels_last,
                    **problem.arguments,
                )  # fmt: skip
                assert_float32_is_right(kernel, y, x, weight, bias, problem, device)
                count += 1
        assert count >= 30

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_in_half_the_bits_only_storing_rounds(self, kernel, dtype, device):
        for channels_last in formats(kernel):
            for number, problem in cases(kernel, dtype, channels_last, 3, device):
                tensors = data_of(problem, dtype, seed=number)
                y = run(kernel, *tensors, device, channels_last=channels_last, **problem.arguments)
                assert y.dtype == dtype
                exact = [None if t is None else t.float() for t in tensors]
                if kernel in IN_ORDER:
                    sums = run(
                        kernel, *exact, device, channels_last=channels_last, **problem.arguments
                    )
                    assert torch.equal(y, sums.to(dtype)), problem
                expected = scatter(*exact, **problem.arguments)
                size = np.abs(expected).max()
                np.testing.assert_allclose(
                    y.double(), expected, rtol=1.01 * UNITS[dtype], atol=1e-5 * max(size, 1)
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_small_integers_are_exact(self, kernel, dtype, device):
        for channels_last in formats(kernel):
            for number, problem in cases(kernel, dtype, channels_last, 7, device):
                tensors = data_of(problem, dtype, seed=number, kind="small_integers")
                expected = scatter(
                    *(None if t is None else t.float() for t in tensors), **problem.arguments
                )
                y = run(kernel, *tensors, device, channels_last=channels_last, **problem.arguments)
                rounded = torch.from_numpy(expected).to(dtype)
                assert torch.equal(y, rounded), problem

    def test_the_same_bits_each_time_and_the_stages_if_in_order(self, kernel, device):
        for number, problem in cases(kernel, step=7, device=device):
            x, weight, bias = data_of(problem, seed=number)
            y = run(kernel, x, weight, bias, device, **problem.arguments)
            assert torch.equal(y, run(kernel, x, weight, bias, device, **problem.arguments))
            if kernel in IN_ORDER:
                stage = lab.stages["coalesced"](x, weight, bias, **problem.arguments)
                assert torch.equal(y, stage), problem

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_storage_that_is_not_aligned(self, kernel, dtype, device):
        """Rows of whole vectors don't help if the first value lies between two."""
        for _, problem in cases(kernel, dtype, step=30, device=device):
            x, weight, bias = data_of(problem, dtype)
            y = run(kernel, x, weight, bias, device, **problem.arguments)
            for offset in (1, 2):
                room = torch.zeros(x.numel() + offset, dtype=dtype, device=device)
                shifted = room[offset:].view(x.shape).copy_(x)
                tensors = [None if t is None else t.to(device) for t in (weight, bias)]
                again = kernels[kernel](shifted, *tensors, **problem.arguments)
                assert torch.equal(again.cpu(), y), problem


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_stay_in_their_windows(kernel, value, dtype, device):
    """There is no product with what lies beyond the edge, nor with a tap that a phase lacks."""
    settings = [
        {"kernel_size": (3, 7), "padding": (1, 2)},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": (3, 4), "stride": (2, 5), "padding": 1, "dilation": (1, 3)},
    ]
    for setting in settings:
        of_groups = ({}, {"in_channels": 3, "out_channels": 3})
        for channels in (*of_groups, {"in_channels": 24, "out_channels": 24}):
            base = {"batch": 2, "in_channels": 6, "out_channels": 15, "height": 9, "width": 12}
            problem = lab.Problem(**{**base, "groups": 3, **channels, **setting})
            if not kernels[kernel].supports(problem, dtype):
                continue
            for place in ("x", "weight"):
                x, weight, _ = data_of(problem, dtype)
                if place == "x":
                    x[1, 2, 3, 4] = value
                    x[0, 0, 0, 0] = value
                else:
                    weight[1, 0, 0, -1] = value
                    weight[2, -1, 2, 0] = -value
                expected = torch.from_numpy(scatter(x.float(), weight.float(), **problem.arguments))
                assert not expected.isfinite().all()
                for channels_last in formats(kernel):
                    y = run(
                        kernel, x, weight, None, device, channels_last=channels_last,
                        **problem.arguments,
                    ).double()  # fmt: skip
                    assert torch.equal(y.isnan(), expected.isnan())
                    assert torch.equal(y[expected.isinf()], expected[expected.isinf()])
                    assert y.isfinite().equal(expected.isfinite())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("exponent", [-105, -115, -125, -135, -145])
def test_values_near_the_smallest_keep_their_digits(kernel, where, exponent, device):
    """Parts of a number may be too small where the number itself is not."""
    problem = lab.Problem(2, 20, 3, 5, 6, kernel_size=3, stride=2, padding=1)
    if kernel in COMPLETE:  # or it would be another's
        problem = dataclasses.replace(problem, out_channels=20)
    elif not kernels[kernel].supports(problem):
        others = [
            dataclasses.replace(problem, out_channels=20, groups=groups) for groups in (1, 20)
        ]
        problem = next(other for other in others if kernels[kernel].supports(other))
    x, weight, bias = data_of(problem)
    small, large = (x, weight) if where == "x" else (weight, x)
    small *= 2.0**exponent
    large *= 2.0**60
    y = run(kernel, x, weight, bias, device, **problem.arguments)
    assert_float32_is_right(kernel, y, x, weight, bias, problem, device)


@pytest.mark.gpu
class TestHopper:
    """Two float16 parts, a scale for each chunk, sums that are cut off: what could go wrong."""

    PROBLEMS = (
        lab.Problem(2, 64, 64, 40, 50, kernel_size=(3, 7), bias=True),
        lab.Problem(2, 100, 200, 19, 31, kernel_size=4, stride=2, padding=1),
        lab.Problem(1, 256, 128, 24, 24, kernel_size=1),
        lab.Problem(16, 512, 256, 4, 4, kernel_size=2, stride=2),
    )

    @staticmethod
    def error(kernel, problem, x, weight, bias):
        """Return the condition error against float64, on the GPU, where that takes no time."""
        y = kernels[kernel](x, weight, bias, **problem.arguments).double()
        x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
        expected = F.conv_transpose2d(x, weight, bias, **problem.arguments)
        finite = expected.isfinite()
        assert torch.equal(y[~finite].nan_to_num(1.5), expected[~finite].nan_to_num(1.5))
        x, weight, bias = (
            None if t is None else t.abs().nan_to_num(0, 0) for t in (x, weight, bias)
        )
        scale = 2.0**-24 * F.conv_transpose2d(x, weight, bias, **problem.arguments)
        error = (y - expected).abs()[finite]
        return torch.where(error == 0, 0.0, error / scale[finite]).max().item()

    @pytest.mark.parametrize("number", range(len(PROBLEMS)))
    @pytest.mark.parametrize("kind", ["normal", "positive", "lognormal", "channels", "apart"])
    def test_inputs_of_many_kinds(self, number, kind):
        problem = self.PROBLEMS[number]
        x, weight, bias = (None if t is None else t.cuda() for t in inputs(problem, seed=number))
        if kind == "positive":
            x, weight = x.abs(), weight.abs()
        elif kind == "lognormal":
            x = x.exp()
        elif kind == "channels":
            scales = 10.0 ** (6 * torch.rand(problem.in_channels, generator=torch.Generator()) - 3)
            x = x * scales.cuda()[:, None, None]
        elif kind == "apart":  # too far for one scale, and infinite
            x[:, :, ::2] *= 1e-12
            x[0, 0, 0, 0], x[0, -1, -1, -1] = math.inf, 1e30
        error, gate = self.error("hopper", problem, x, weight, bias), FLOAT32_GATE
        if kind in ("positive", "channels"):
            # Nothing cancels, or a few products are nearly all of an output: float32's own FMAs
            # leave the gate there, and tensor cores cut off what they sum.
            chain = self.error("register_blocked", problem, x, weight, bias)
            gate = min(1.75 * FLOAT32_GATE, max(FLOAT32_GATE, chain))
        assert error <= gate

    def test_weights_that_are_far_apart(self):
        problem = self.PROBLEMS[0]
        x, weight, bias = (t.cuda() for t in inputs(problem))
        weight[:32, :7] *= 1e-12
        weight[3, 9, 1, 2] = math.nan
        assert self.error("hopper", problem, x, weight, bias) <= FLOAT32_GATE

    def test_a_scale_is_found_anew_where_it_must_be(self):
        problem = lab.Problem(4, 64, 64, 60, 60, kernel_size=3)
        x, weight, bias = (None if t is None else t.cuda() for t in inputs(problem))
        for n, factor in enumerate((1e20, 1e-20, 0.0, 1.0)):
            x[n] *= factor
        x[3, 16:32] = 0
        assert self.error("hopper", problem, x, weight, bias) <= FLOAT32_GATE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_there_are_no_hazards(kernel, dtype):
    for channels_last in formats(kernel):
        order = torch.channels_last if channels_last else torch.contiguous_format
        for number, problem in cases(kernel, dtype, channels_last, step=25):
            if problem.multiply_adds > 100_000:
                continue
            x, *others = data_of(problem, dtype, seed=number)
            x = x.contiguous(memory_format=order)
            report = kernels[kernel].profile(x, *others, **problem.arguments)
            assert report.hazards == (), problem


@pytest.mark.parametrize("kernel", [k for k in KERNELS if kernels[k].takes_channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_both_memory_formats(kernel, dtype, device):
    """A sum that is taken again because of a NaN is right, too, and has other bits."""
    for number, problem in cases(kernel, dtype, True, 10, device):
        tensors = data_of(problem, dtype, seed=number)
        y, last = (
            run(kernel, *tensors, device, channels_last=last, **problem.arguments)
            for last in (False, True)
        )
        assert torch.equal(y, last), problem


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 2])
def test_more_than_2_31_outputs(kernel, groups):
    problem = lab.Problem(
        9, 2, 2, 8192, 8192, kernel_size=(2, 4), stride=2, padding=(0, 1), groups=groups
    )
    if not kernels[kernel].supports(problem, torch.float16):
        pytest.skip("not covered")
    x = torch.zeros(problem.input_shape, dtype=torch.float16, device="cuda")
    x[-1, -1, -3:, -5:] = torch.arange(15, device="cuda").view(3, 5).half()
    weight = torch.ones(problem.weight_shape, dtype=torch.float16, device="cuda")
    y = kernels[kernel](x, weight, None, **problem.arguments)
    assert y.numel() > 2**31
    part = dataclasses.replace(problem, batch=1, height=8, width=8)
    expected = torch.nn.functional.conv_transpose2d(
        x[-1:, :, -8:, -8:].cpu().double(), weight.cpu().double(), **part.arguments
    )
    assert torch.equal(y[-1:, :, -12:, -12:].cpu().double(), expected[:, :, -12:, -12:])
    assert y[:-1].abs().max() == 0


@pytest.mark.parametrize("file", sorted(KERNEL_FOLDER.glob("*.cu*")), ids=lambda file: file.name)
def test_every_launch_is_on_the_launchers_stream(file):
    """The simulator has no streams, and tests on a GPU look at one kernel's only."""
    for launch in re.findall(r"<<<(.*?)>>>", file.read_text(), re.DOTALL):
        assert launch.split(",")[-1].strip() == "stream"


class TestWhatIsCovered:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_launcher_agrees(self, kernel):
        """A launcher plans what is supported and refuses what is not."""
        rare = [
            lab.Problem(1, 1, 1, 5, 5, kernel_size=3, stride=17),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=(33, 1)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=(1, 32)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=(8, 32)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=(9, 32)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=3, dilation=(15, 1)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=3, dilation=(16, 1)),
            lab.Problem(1, 1, 1, 5, 5, kernel_size=(2, 3), stride=(16, 15), dilation=(200, 9)),
            lab.Problem(1, 1, 1, 2, 5 * 10**8, kernel_size=3),
            lab.Problem(1, 1, 1, 2, 10**9, kernel_size=3),
            lab.Problem(1, 500, 500, 7, 7, kernel_size=3, stride=2),
        ]
        answers = set()
        for problem in [*problem_set(300)[::10], *MORE, *rare]:
            if problem.batch == 0:
                continue
            for dtype in DTYPES:
                answer = kernels[kernel].supports(problem, dtype)
                answers.add(answer)
                if answer:
                    # What every architecture has that the kernel is for.
                    least = kernels[kernel].min_capability
                    most = (227 if least >= (9, 0) else 96 if least >= (8, 0) else 60) * 1024
                    launches = kernels[kernel].launches(problem, most, dtype)
                    assert len(launches) == LAUNCHES.get(kernel, 1 + kernels[kernel].packs_weights)
                    assert max(launch.shared_bytes for launch in launches) <= most
                elif dtype in kernels[kernel].dtypes:
                    with pytest.raises(lab.KernelError):
                        kernels[kernel].launches(problem, dtype=dtype)
        assert answers == ({True} if kernel in COMPLETE else {False, True})

    @pytest.mark.parametrize("kernel", sorted(set(KERNELS) - set(COMPLETE)))
    def test_what_is_not_covered_is_refused(self, kernel):
        problem = lab.Problem(1, 1, 1, 5, 5, kernel_size=3, stride=17)
        x, weight, bias = inputs(problem)
        with pytest.raises(ValueError, match=f"{kernel} does not cover"):
            kernels[kernel](x, weight, bias, **problem.arguments)
        assert not kernels[kernel].supports(problem)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_refusals(self, kernel):
        x, weight, _ = inputs(lab.Problem(1, 1, 1, 5, 5, kernel_size=3))
        with pytest.raises(TypeError, match="x has dtype"):
            kernels[kernel](x.double(), weight.double())
        other = (
            "and x" if torch.float16 in kernels[kernel].dtypes else "; this kernel is for float32"
        )
        with pytest.raises(TypeError, match=rf"weight has dtype torch\.float16 ?{other}"):
            kernels[kernel](x, weight.half())
        assert not kernels[kernel].supports(lab.Problem(), torch.float64)

    @pytest.mark.parametrize("stage", list(lab.stages))
    def test_a_stage_is_for_contiguous_float32(self, stage):
        problem = lab.Problem()
        assert lab.stages[stage].supports(problem)
        assert not lab.stages[stage].supports(problem, torch.float16)
        assert not lab.stages[stage].supports(problem, torch.float32, channels_last=True)
        assert lab.stages[stage].launcher() == stage

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_every_launcher_exists(self, kernel):
        source = (KERNEL_FOLDER / f"{kernel}.cu").read_text()
        for dtype in kernels[kernel].dtypes:
            for channels_last in formats(kernel):
                symbol = kernels[kernel].launcher(dtype, channels_last)
                assert f'extern "C" cudaError_t {symbol}(' in source or (
                    f"LAUNCHER({symbol}, " in source
                )
        assert kernels[kernel].launcher() == kernel
        assert kernels[kernel].launcher(torch.bfloat16) == f"{kernel}_bfloat16"

    def test_a_launcher_refuses_what_is_not_covered(self):
        program = kernels["few_channels"].program("simulator")
        problem = _ConvTransposeProblem.of(lab.Problem(kernel_size=33))
        with pytest.raises(lab.KernelError):
            program.call("few_channels", None, None, None, None, problem)


#: What the random problems have little of: channels enough that tensor cores are used, beyond one
#: tile and one chunk, in groups; phases of different sizes, and one without a tap.
OF_MANY_CHANNELS = [
    lab.Problem(2, 17, 67, 9, 11, kernel_size=(3, 7), padding=(1, 2), bias=True),
    lab.Problem(1, 40, 130, 5, 6, kernel_size=4, stride=2, padding=1),
    lab.Problem(3, 33, 24, 4, 7, kernel_size=3, stride=(2, 3), output_padding=(1, 2), groups=3),
    lab.Problem(1, 9, 8, 13, 12, kernel_size=(2, 3), stride=3, dilation=2, bias=True),
    lab.Problem(2, 16, 16, 8, 20, kernel_size=2, stride=3, bias=True),
    lab.Problem(1, 24, 20, 6, 5, kernel_size=3, stride=4, dilation=6, padding=2),
    lab.Problem(5, 64, 32, 1, 3, kernel_size=(1, 5), padding=(0, 2), groups=2, bias=True),
    lab.Problem(1, 8, 65, 1, 300, kernel_size=1),
]


class TestTensorCore:
    """What the rung without parts does beyond the tests for all kernels."""

    KERNEL = "tensor_core"

    @pytest.mark.parametrize(
        "problem", OF_MANY_CHANNELS, ids=lambda p: f"{p.input_shape} {p.weight_shape}"
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_channels(self, problem, dtype, device):
        tensors = data_of(problem, dtype)
        y = run(self.KERNEL, *tensors, device, **problem.arguments)
        assert torch.equal(y, run(self.KERNEL, *tensors, device, **problem.arguments))
        if dtype == torch.float32:
            assert kernels[self.KERNEL].variant(problem) == "tensor cores"
            assert_float32_is_right(self.KERNEL, y, *tensors, problem, device)
        else:
            expected = scatter(*(t if t is None else t.float() for t in tensors),
                               **problem.arguments)  # fmt: skip
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(y.double(), expected, rtol=1.01 * UNITS[dtype], atol=atol)
        if dtype != torch.float32 or device != "cpu":
            return
        report = kernels[self.KERNEL].profile(*tensors, **problem.arguments)
        assert report.hazards == ()
        assert report.fma == 0
        assert report.tensor_fma > 0

    def test_operands_are_rounded_not_cut_off(self):
        """Of values that are all positive, cutting off would take the same part from each."""
        problem = lab.Problem(1, 64, 16, 8, 8, kernel_size=3, bias=False)
        x, weight, _ = (t if t is None else t.abs() + 1 for t in problem.random_inputs())
        y = run(self.KERNEL, x, weight, **problem.arguments).double()
        expected = torch.from_numpy(scatter(x, weight, **problem.arguments))
        mean = ((y - expected) / expected).mean().abs().item()
        assert mean < 2.0**-14  # cut off: 2^-11 and more
        assert 2.0**-17 < relative_l2(y, expected) < 2.0**-11

    def test_most_of_the_random_problems_that_it_is_for_are_its_own(self):
        variants = [
            kernels[self.KERNEL].variant(problem)
            for problem in problem_set(300)
            if problem.batch and problem.in_channels >= 8 * problem.groups <= problem.out_channels
        ]
        assert variants.count("tensor cores") >= 0.6 * len(variants)
        assert variants.count("tensor cores") >= 20

    @pytest.mark.parametrize("change", [{"out_channels": 7}, {"in_channels": 3}, {"width": 3}])
    def test_what_would_leave_an_instruction_empty_is_winograds(self, change, device):
        settings = {"in_channels": 8, "out_channels": 8, "height": 1, "width": 4, "kernel_size": 3,
                    "padding": 1, **change}  # fmt: skip
        problem = lab.Problem(**settings, bias=True)
        assert kernels[self.KERNEL].variant(problem) == lab.stages["winograd"].variant(problem)
        x, weight, bias = data_of(problem)
        y = run(self.KERNEL, x, weight, bias, device, **problem.arguments)
        assert torch.equal(y, run("winograd", x, weight, bias, device, **problem.arguments))

    @pytest.mark.parametrize(
        "problem",
        [
            lab.Problem(1, 8, 8, 1, 4, kernel_size=(2, 300), bias=True),
            lab.Problem(1, 8, 8, 2, 3, kernel_size=(150, 2), stride=2),
            lab.Problem(1, 8, 8, 4, 5, kernel_size=(3, 4), dilation=(30, 20)),
            lab.Problem(1, 8, 8, 1, 1, kernel_size=3, stride=(2**29, 2**30 - 1), dilation=5),
            lab.Problem(1, 8, 9, 1, 1, kernel_size=(1, 3), stride=2**31 - 2**17, padding=(0, 1)),
        ],
        ids=lambda p: f"{p.kernel_size}, stride {p.stride}, dilation {p.dilation}",
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_enormous_kernels_and_steps(self, problem, dtype, device):
        tensors = data_of(problem, dtype)
        y = run(self.KERNEL, *tensors, device, **problem.arguments)
        if dtype == torch.float32:
            assert_float32_is_right(self.KERNEL, y, *tensors, problem, device)
            return
        exact = scatter(*(t if t is None else t.float() for t in tensors), **problem.arguments)
        atol = 1e-5 * max(1, np.abs(exact).max())
        np.testing.assert_allclose(y.double(), exact, rtol=1.01 * UNITS[dtype], atol=atol)

    def test_the_largest_numbers(self, device):
        """They would round to infinity."""
        problem = lab.Problem(1, 8, 8, 4, 6, kernel_size=3, padding=1)
        x, weight, _ = data_of(problem)
        x[0, 3, 2, 2] = torch.finfo(torch.float32).max
        weight[3] = 0.5
        y = run(self.KERNEL, x, weight, None, device, **problem.arguments)
        assert kernels[self.KERNEL].variant(problem) == "tensor cores"
        expected = scatter(x, weight, **problem.arguments)
        np.testing.assert_allclose(y.double(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class TestPrecision:
    def test_who_rounds_says_so(self):
        assert [name for name in kernels if kernels[name].precision == "tf32"] == ["tensor_core"]
        assert all(stage.precision == "float32" for stage in lab.stages.values())

    def test_the_gates(self):
        """TF32's is far above float32's, and cutting off operands would still not pass it."""
        assert FLOAT32_GATE < truncation_gate(21 * 64) < tf32_gate(21 * 64)
        assert tf32_gate(8) == pytest.approx(2.0**14, rel=1e-3)
        a, b = (np.full((1, 8, 1, 1), 1 + 2.0**-10 - 2.0**-22, np.float32) for _ in range(2))
        cut = np.full((1, 1, 1, 1), 8.0)
        assert condition_error(cut, a, b.reshape(8, 1, 1, 1)) > 1.9 * tf32_gate(8)
