"""The kernels that are no rungs against float64, on what they cover, in every type."""

import dataclasses
import itertools
import math
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.gpu import has_own_instructions
from convt_lab.reference import (
    FLOAT32_GATE,
    condition_error,
    relative_l2,
    scatter,
    terms_of,
    tf32_gate,
    truncation_gate,
)
from convt_lab.split import FORMATS
from convt_lab.stages import Call, _ConvTransposeProblem, fma_stages, kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = [name for name in kernels if name not in fma_stages]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: Those that sum in float32, in the order of the stages; tensor cores do neither.
IN_ORDER = ["one_channel", "few_channels"]

#: Those that take every legal problem, in every type, and hand down what they have no way for.
COMPLETE = ["tensor_core"]

#: Those with instructions of one architecture: elsewhere they sum by the definition.
HOPPERS = [name for name in KERNELS if kernels[name].architecture]

OF_HOPPERS = [(kernel, dtype) for kernel in HOPPERS for dtype in kernels[kernel].dtypes]

#: Of a call, where they are not one, or two with one that packs weights: scale, which 16 bits need
#: not, pack, multiply and repair.
LAUNCHES = {(kernel, dtype): 3 + (dtype == torch.float32) for kernel, dtype in OF_HOPPERS}

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
    if kernels[kernel].precision != "tf32":
        return False
    if kernel in HOPPERS:
        return device != "cpu" and has_own_instructions(
            torch.cuda.get_device_capability(), kernels[kernel].architecture
        )
    if kernels[kernel].variant(problem) != "tensor cores":
        return False
    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)


def to_11_bits(values):
    """Round float32 as float16 is, to the nearest, ties to even, whatever its exponent."""
    bits = values.view(torch.int32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF
    return torch.where(values.isfinite(), rounded.view(torch.float32), values)


def condition_errors(y, x, weight, bias, problem):
    """Return each output's condition error against float64, by the device that the tensors are on.

    What is not finite must be the same.
    """
    y, x, weight, bias = (None if t is None else t.double() for t in (y, x, weight, bias))
    expected = F.conv_transpose2d(x, weight, bias, **problem.arguments)
    finite = expected.isfinite()
    assert torch.equal(y[~finite].nan_to_num(1.5), expected[~finite].nan_to_num(1.5)), problem
    x, weight, bias = (None if t is None else t.abs().nan_to_num(0, 0) for t in (x, weight, bias))
    scale = 2.0**-24 * F.conv_transpose2d(x, weight, bias, **problem.arguments)
    error = (y - expected).abs()
    return torch.where(~finite | (error == 0), 0.0, error / scale)


def assert_rounded_once(y, x, weight, bias, problem):
    """Judge a result of operands with 11 bits by the gates of `assert_float32_is_right`.

    Outputs that were summed again by the definition are those of the operands as they are, and
    are judged as such.
    """
    exact = condition_errors(y, x, weight, bias, problem)
    rounded = condition_errors(y, to_11_bits(x), to_11_bits(weight), bias, problem)
    terms = terms_of(problem)
    assert exact.max() <= tf32_gate(terms), problem
    parts = torch.minimum(exact / FLOAT32_GATE, rounded / truncation_gate(terms, depth=4))
    assert parts.max() <= 1, problem


def assert_float32_is_right(kernel, y, x, weight, bias, problem, device="cpu"):
    """Judge a result: float32 by its gate, TF32 by two.

    The first is what rounding the operands may cost. The second takes the rounded operands for
    given, so that all but their own rounding is judged nearly as sharply as float32.
    """
    if not uses_tf32(kernel, problem, device):
        assert condition_error(y, x, weight, bias, **problem.arguments) <= FLOAT32_GATE, problem
        return
    if kernel in HOPPERS:
        assert_rounded_once(y, x, weight, bias, problem)
        return
    terms = terms_of(problem)
    rounded = [FORMATS["tf32"].round(t.numpy()) for t in (x, weight)]
    error = condition_error(y, *rounded, bias, **problem.arguments)
    assert error <= truncation_gate(terms, depth=4), problem  # the GPU's order is not told
    # Below the smallest normal number TF32 has fewer digits.
    normal = [(t == 0) | (t.abs() >= torch.finfo(torch.float32).tiny) for t in (x, weight)]
    if all(is_normal.all() for is_normal in normal):
        error = condition_error(y, x, weight, bias, **problem.arguments)
        assert error <= tf32_gate(terms), problem


def assert_16_bits_are_right(y, x, weight, bias, problem):
    """Judge a result in float16 or bfloat16: sums are in float32, and only storing rounds."""
    exact = (None if t is None else t.float() for t in (x, weight, bias))
    expected = scatter(*exact, **problem.arguments)
    size = np.abs(expected).max()
    np.testing.assert_allclose(
        y.double(), expected, rtol=1.01 * UNITS[y.dtype], atol=1e-5 * max(size, 1)
    )


def unaligned(x, offset, channels_last=False, device="cpu"):
    """Return a copy of `x` on `device` that begins so many values behind an aligned address."""
    stored = x.permute(0, 2, 3, 1) if channels_last else x
    room = torch.zeros(x.numel() + offset, dtype=x.dtype, device=device)
    copy = room[offset:].view(stored.shape).copy_(stored)
    return copy.permute(0, 3, 1, 2) if channels_last else copy


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
                assert_16_bits_are_right(y, *tensors, problem)

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
        for channels_last in formats(kernel):
            for _, problem in cases(kernel, dtype, channels_last, step=30, device=device):
                x, weight, bias = data_of(problem, dtype)
                y = run(
                    kernel, x, weight, bias, device, channels_last=channels_last,
                    **problem.arguments,
                )  # fmt: skip
                tensors = [None if t is None else t.to(device) for t in (weight, bias)]
                for offset in (1,) if channels_last else (1, 2):
                    shifted = unaligned(x, offset, channels_last, device)
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


def in_format(x, channels_last):
    order = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=order)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("kernel", HOPPERS)
class TestHopper:
    """Float16 and its few exponents, scales, sums that are cut off: what could go wrong.

    On the simulator all of that is only prepared, for sums by the definition.
    """

    PROBLEMS = (
        lab.Problem(2, 64, 64, 40, 50, kernel_size=(3, 7), bias=True),
        lab.Problem(2, 100, 200, 19, 31, kernel_size=4, stride=2, padding=1),
        lab.Problem(1, 256, 128, 24, 24, kernel_size=1),
        lab.Problem(16, 512, 256, 4, 4, kernel_size=2, stride=2),
    )
    SMALL = (
        lab.Problem(2, 32, 20, 4, 5, kernel_size=(2, 3), bias=True),
        lab.Problem(1, 20, 70, 3, 4, kernel_size=4, stride=2, padding=1),
        lab.Problem(1, 48, 16, 5, 6, kernel_size=1),
        lab.Problem(4, 36, 17, 2, 2, kernel_size=2, stride=2),
    )

    def data(self, number, device):
        problem = (self.SMALL if device == "cpu" else self.PROBLEMS)[number]
        tensors = inputs(problem, seed=number)
        return problem, *(None if t is None else t.to(device) for t in tensors)

    @staticmethod
    def judge(kernel, problem, x, weight, bias, channels_last, most=1.0):
        """Check the result; where float32's own FMAs leave the gate it may be `most` gates."""
        y = kernels[kernel](in_format(x, channels_last), weight, bias, **problem.arguments)
        if uses_tf32(kernel, problem, x.device.type):
            assert_rounded_once(y, x, weight, bias, problem)
            return
        gate = FLOAT32_GATE
        if most > 1.0:
            chain = kernels["register_blocked"](x, weight, bias, **problem.arguments)
            of_chain = condition_errors(chain, x, weight, bias, problem).max().item()
            gate = min(most * FLOAT32_GATE, max(FLOAT32_GATE, of_chain))
        assert condition_errors(y, x, weight, bias, problem).max() <= gate

    @pytest.mark.parametrize("number", range(len(PROBLEMS)))
    @pytest.mark.parametrize("kind", ["normal", "positive", "lognormal", "channels", "apart"])
    def test_inputs_of_many_kinds(self, kernel, channels_last, number, kind, device):
        problem, x, weight, bias = self.data(number, device)
        most = 1.0
        if kind in ("positive", "channels"):
            # Nothing cancels, or a few products are nearly all of an output, and tensor cores cut
            # off what they sum.
            most = 1.75
        if kind == "positive":
            x, weight = x.abs(), weight.abs()
        elif kind == "lognormal":
            x = x.exp()
        elif kind == "channels":
            scales = 10.0 ** (6 * torch.rand(problem.in_channels, generator=torch.Generator()) - 3)
            x = x * scales.to(device)[:, None, None]
        elif kind == "apart":  # too far for one scale, and infinite
            x[:, :, ::2] *= 1e-12
            x[0, 0, 0, 0], x[0, -1, -1, -1] = math.inf, 1e30
        self.judge(kernel, problem, x, weight, bias, channels_last, most)

    @pytest.mark.gpu
    def test_what_begins_early_waits_for_what_it_needs(self, kernel, channels_last):
        # Packing many weights takes as long as the rest, and each call has its own.
        problem = lab.Problem(1, 512, 256, 4, 4, kernel_size=4, stride=2, padding=1)
        data = [
            (in_format(x.cuda(), channels_last), weight.cuda())
            for x, weight, _ in (inputs(problem, seed) for seed in range(8))
        ]

        def call(x, weight):
            return kernels[kernel](x, weight, None, **problem.arguments)

        expected = []
        for x, weight in data:
            expected.append(call(x, weight))
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            of_graph = [call(x, weight) for x, weight in data]
        for _ in range(20):
            at_once = [call(x, weight) for x, weight in data]
            for y in of_graph:
                y.fill_(math.nan)
            graph.replay()
            assert all(map(torch.equal, at_once, expected))
            assert all(map(torch.equal, of_graph, expected))

    def test_weights_that_are_far_apart(self, kernel, channels_last, device):
        problem, x, weight, bias = self.data(0, device)
        weight[: problem.in_channels // 2, :7] *= 1e-12
        weight[3, 9, 1, 2] = math.nan
        self.judge(kernel, problem, x, weight, bias, channels_last)

    def test_a_scale_is_found_anew_where_it_must_be(self, kernel, channels_last, device):
        problem = lab.Problem(4, 64, 64, 60, 60, kernel_size=3)
        if device == "cpu":
            problem = lab.Problem(4, 32, 16, 5, 6, kernel_size=3)
        x, weight, bias = (None if t is None else t.to(device) for t in inputs(problem))
        for n, factor in enumerate((1e20, 1e-20, 0.0, 1.0)):
            x[n] *= factor
        x[3, 16:32] = 0
        self.judge(kernel, problem, x, weight, bias, channels_last)

    @pytest.mark.parametrize("factors", [(1e-25, 1e25), (1e25, 1e-25)], ids=str)
    def test_chunks_that_are_far_apart(self, kernel, channels_last, factors, device):
        """Their scales are so far apart that float32 does not have the quotient."""
        problem = lab.Problem(1, 256, 64, 12, 12, kernel_size=3)
        if device == "cpu":
            problem = lab.Problem(1, 256, 16, 4, 4, kernel_size=3)
        x, weight, bias = (None if t is None else t.to(device) for t in inputs(problem))
        x[:, 64:192] = 0
        x[:, :64] *= factors[0]
        x[:, 192:] *= factors[1]
        large = x[:, 192:] if factors[1] > 1 else x[:, :64]
        large[..., 1:] = 0  # so most outputs are sums of small ones alone
        self.judge(kernel, problem, x, weight, bias, channels_last)

    def test_the_same_small_numbers_whatever_is_beside_them(self, kernel, channels_last, device):
        """Nobody's scale is found with what a tile has of another group."""
        problem, x, weight, bias = self.data(0, device)
        problem = dataclasses.replace(problem, in_channels=2 * problem.in_channels,
                                      out_channels=2 * problem.out_channels, groups=2)  # fmt: skip
        x = torch.cat((1e-15 * x, 1e15 * x), dim=1)
        weight, bias = (torch.cat((t, t)) for t in (weight, bias * 1e-15))
        self.judge(kernel, problem, x, weight, bias, channels_last)


#: What differs in how pixels lie on one axis, in tiles, and are read as octets, pairs or values.
GEOMETRY = {
    "octets, pairs": lab.Problem(2, 24, 18, 5, 8, kernel_size=(3, 7), bias=True),
    "octets, odd width": lab.Problem(2, 24, 18, 5, 7, kernel_size=(3, 7), padding=(1, 3)),
    "no octets": lab.Problem(2, 17, 20, 5, 6, kernel_size=3, padding=1, bias=True),
    "no octets, odd width": lab.Problem(1, 35, 33, 5, 3, kernel_size=2),
    "rows begin in a pair": lab.Problem(1, 16, 17, 4, 10, kernel_size=(2, 4), padding=(0, 2)),
    "each phase another lead": lab.Problem(
        1, 16, 17, 4, 6, kernel_size=5, stride=3, padding=2, output_padding=1
    ),
    "phases of several sizes": lab.Problem(
        2, 16, 16, 3, 6, kernel_size=(4, 3), stride=(3, 2), padding=(2, 1), bias=True
    ),
    "a phase without a tap": lab.Problem(1, 16, 16, 4, 6, kernel_size=1, stride=2, bias=True),
    "inputs with gaps": lab.Problem(1, 24, 16, 5, 8, kernel_size=3, padding=1, dilation=2),
    "strides and gaps": lab.Problem(
        1, 16, 16, 5, 4, kernel_size=(2, 3), stride=(2, 3), dilation=(3, 2), bias=True
    ),
    "groups of octets": lab.Problem(2, 48, 60, 4, 6, kernel_size=3, groups=3, bias=True),
    "groups of others": lab.Problem(2, 51, 51, 4, 6, kernel_size=3, stride=2, groups=3),
    "a column": lab.Problem(3, 16, 16, 9, 1, kernel_size=(3, 1), padding=(1, 0)),
    "two columns": lab.Problem(3, 16, 16, 5, 2, kernel_size=3, padding=1),
    "three columns": lab.Problem(3, 32, 16, 5, 3, kernel_size=3, padding=1, bias=True),
    "images in one tile": lab.Problem(60, 16, 16, 2, 2, kernel_size=2, padding=1),
    "stripes": lab.Problem(1, 16, 16, 1, 800, kernel_size=(3, 2), padding=(1, 0)),
    "65 channels": lab.Problem(1, 16, 65, 3, 6, kernel_size=3, bias=True),
    "130 channels": lab.Problem(1, 24, 130, 3, 4, kernel_size=2, bias=True),
}


class TestHoppersGeometry:
    """Small problems of many kinds, in every form."""

    @pytest.mark.parametrize("name", GEOMETRY)
    @pytest.mark.parametrize(("kernel", "dtype"), OF_HOPPERS, ids=str)
    def test_in_both_formats_aligned_or_not(self, kernel, dtype, name, device):
        problem = GEOMETRY[name]
        x, weight, bias = data_of(problem, dtype)
        found = {}
        for channels_last in formats(kernel):
            y = run(
                kernel, x, weight, bias, device, channels_last=channels_last, **problem.arguments
            )
            found[channels_last] = y
            if dtype == torch.float32:
                assert_float32_is_right(kernel, y, x, weight, bias, problem, device)
            else:
                assert_16_bits_are_right(y, x, weight, bias, problem)
            others = [None if t is None else t.to(device) for t in (weight, bias)]
            for offset in (1, 2, 4):
                shifted = unaligned(x, offset, channels_last, device)
                again = kernels[kernel](shifted, *others, **problem.arguments)
                assert torch.equal(again.cpu(), y), offset
        if has_one_order(kernel, problem, device):
            assert torch.equal(found[False], found[True])


class TestHoppersWeights:
    """Where packed weights lie, which nothing on the simulator reads."""

    @staticmethod
    def packed(kernel, problem, x, weight, channels_last):
        """Return inverses of scales, and weights.

        Weights are [group, phase_h, phase_w, part_co, step, 64 of 128 channels, part, half, row,
        input channel], if groups have 16 input channels, which are one stage.
        """
        x = in_format(x, channels_last)
        call = Call(kernels[kernel], x, weight, None, *problem.arguments.values())
        kernels[kernel].program("simulator").call(call.launcher, *call.launcher_arguments)
        (memory,) = (
            argument.owner
            for argument in call.launcher_arguments
            if getattr(argument, "name", "") == "packed"
        )
        scales = -(-problem.out_channels // 64) * 256 if weight.dtype == torch.float32 else 0
        of_group = problem.out_channels // problem.groups
        parts = 1 + (of_group > 64)
        steps = 1
        for axis in problem.axes:
            steps *= (axis.kernel - 1) // axis.k_step + 1
        owners = (problem.groups, *problem.stride, -(-of_group // (64 * parts)))
        each = (steps, parts) if kernel == "hopper" else (parts, steps)
        shape = (*owners, *each, 1 + (kernel == "hopper"), 2, 64, 8)
        part = torch.float16 if weight.dtype == torch.float32 else weight.dtype
        packed = memory[scales : scales + 2 * math.prod(shape)].view(part).view(shape)
        inverses = memory[:scales].view(torch.float32)[: problem.out_channels]
        return inverses, packed if kernel == "hopper" else packed.transpose(4, 5)

    @pytest.mark.parametrize("of_group", [36, 72, 132])
    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
    @pytest.mark.parametrize(("kernel", "dtype"), OF_HOPPERS, ids=str)
    def test_each_has_its_place(self, kernel, dtype, channels_last, of_group):
        problem = lab.Problem(
            1, 32, 2 * of_group, 3, 4, kernel_size=(3, 4), stride=(2, 3), groups=2
        )
        x, weight, _ = data_of(problem, dtype)
        inverses, packed = self.packed(kernel, problem, x, weight, channels_last)
        packed = packed.double()
        weight = to_11_bits(weight) if kernel == "hopper_single" and len(inverses) else weight
        # Channels of a group that a row, which lanes hold two of, is the product of.
        rows = torch.arange(64)
        if channels_last:
            rows = rows // 16 * 16 + rows % 8 * 2 + rows // 8 % 2
        for group, part_co, part in itertools.product(range(2), *map(range, packed.shape[3:6:2])):
            channels = (part_co * packed.shape[5] + part) * 64 + rows
            exists = channels < of_group
            of_rows = channels.clamp(max=of_group - 1)
            for phase_h, phase_w in itertools.product(range(2), range(3)):
                # The later a tap, the earlier the input.
                taps = itertools.product(*(
                    reversed(range(phase, kernel, stride))
                    for phase, kernel, stride in zip(
                        (phase_h, phase_w), problem.kernel_size, problem.stride, strict=True
                    )
                ))  # fmt: skip
                for step, (kh, kw) in enumerate(taps):
                    halves = packed[group, phase_h, phase_w, part_co, step, part]
                    values = halves[0] + (halves[1] / 2048 if len(halves) == 2 else 0)
                    if len(inverses):
                        values = values * inverses[group * of_group + of_rows].double()[:, None]
                    own = weight[16 * group : 16 * group + 16, of_rows, kh, kw].double()
                    expected = torch.where(exists, own, 0).view(2, 8, 64).transpose(1, 2)
                    tolerance = 2.0**-22 if kernel == "hopper" else 0
                    assert ((values - expected).abs() <= tolerance * expected.abs()).all()

    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
    @pytest.mark.parametrize("kernel", HOPPERS)
    def test_channels_with_weights_too_far_apart_are_noted(self, kernel, channels_last):
        problem = lab.Problem(1, 32, 72, 3, 4, kernel_size=2, groups=2)
        x, weight, _ = data_of(problem)
        weight[8:16, 5, 1, 0] *= 1e-12  # of group 0
        weight[16:24, 35, 0, 1] *= 1e-12  # of group 1
        weight[24:28, 7, 1, 1] *= 1e-12  # but of an octet not all
        weight[:16, 9] *= 1e-12  # all of a channel
        inverses, _ = self.packed(kernel, problem, x, weight, channels_last)
        assert inverses.isnan().nonzero().flatten().tolist() == [5, 36 + 35]
        assert (inverses.nan_to_num(1).log2() % 1 == 0).all()


class TestImagesForSeveralLaunches:
    """Hopper's kernels take as many images at once as 32 bits can count."""

    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
    @pytest.mark.parametrize("batch", [4, 5])
    def test_each_launch_has_its_images(self, channels_last, batch, monkeypatch):
        source = (
            kernels["hopper"].source
            + """
            namespace warpgroups {
            template <bool LAST>
            struct Few : Halves<LAST, 1> {
              static constexpr double MAX_COUNT = 3200.0;
            };
            }
            HOPPER_LAUNCHER(few, float, warpgroups::Few<false>)
            HOPPER_LAUNCHER(few_channels_last, float, warpgroups::Few<true>)
            """
        )
        program = lab.compile(source, "simulator", name="few")
        module = sys.modules[Call.__module__]
        monkeypatch.setattr(module, "_program", lambda kernel, backend, target: program)
        few = dataclasses.replace(kernels["hopper"], name="few", covers=lambda problem: True)
        # Four images' inputs may lie 2920 values apart, five's 3560; five become three and two.
        problem = lab.Problem(batch, 16, 18, 5, 8, kernel_size=3, bias=True)
        x, weight, bias = data_of(problem)
        x = in_format(x, channels_last)
        launches = few.launches(problem, 227 * 1024, torch.float32, channels_last)
        assert len(launches) == 4 * (2 if batch == 5 else 1)
        y = few(x, weight, bias, **problem.arguments)
        assert_float32_is_right("hopper", y, x, weight, bias, problem)

    @pytest.mark.parametrize(("kernel", "dtype"), OF_HOPPERS, ids=str)
    def test_images_of_many_values(self, kernel, dtype):
        """One of 2^32 values is as many as there can be, or more; of 2^31 if channels come last."""
        for channels_last, side, images in [
            *((False, 3000, 5), (False, 8192, 1), (False, 9200, 1)),
            *((True, 2000, 5), (True, 4000, 2), (True, 5690, 1)),
        ]:
            problem = lab.Problem(5, 64, 64, side, side, kernel_size=(3, 7))
            launches = kernels[kernel].launches(problem, 227 * 1024, dtype, channels_last)
            assert len(launches) == math.ceil(5 / images) * LAUNCHES[kernel, dtype]
            larger = dataclasses.replace(problem, height=9300, width=9300)
            assert not kernels[kernel].supports(larger, dtype, channels_last)
        assert not kernels[kernel].supports(
            dataclasses.replace(problem, height=5800, width=5800), dtype, channels_last=True
        )


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


def has_one_order(kernel, problem, device):
    """Whether the kernel sums in the same order in both memory formats.

    `hopper` rounds its sums every few steps of a stage, and how many channels a stage has is the
    plan's choice, for each format; unless there is one chunk of them.
    """
    return device == "cpu" or kernel != "hopper" or problem.in_channels // problem.groups <= 16


@pytest.mark.parametrize("kernel", [k for k in KERNELS if kernels[k].takes_channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_both_memory_formats(kernel, dtype, device):
    """A sum that is taken again because of a NaN is right, too, and has other bits."""
    for number, problem in cases(kernel, dtype, True, 10, device):
        if not has_one_order(kernel, problem, device):
            continue
        tensors = data_of(problem, dtype, seed=number)
        y, last = (
            run(kernel, *tensors, device, channels_last=last, **problem.arguments)
            for last in (False, True)
        )
        assert torch.equal(y, last), problem


def test_more_than_2_32_threads():
    """One channel, a warp for each plane of one pixel: the block beyond writes where it should."""
    kernel = kernels["one_channel"]
    images, channels, first = 2**17 + 1, 2**10, 2**24  # of a block of 8 warps
    x = torch.zeros(images, channels, 1, 1, dtype=torch.float16)
    x[first * 8 // channels, :8] = 5
    weight = torch.zeros(channels, 1, 3, 3, dtype=torch.float16)
    weight[:, 0, 1, 1] = 1
    call = Call(kernel, x, weight, None, 1, 1, 0, channels, 1)
    call.output.fill_(math.nan)
    program = kernel.program("simulator")
    program.call(call.launcher, *call.launcher_arguments, trace=True, blocks=[first])
    assert call.output[-1, :8].flatten().tolist() == [5] * 8
    assert call.output.isnan().sum() == call.output.numel() - 8


@pytest.mark.gpu
def test_more_than_2_32_threads_of_a_gpu():
    channels = 2**10
    x = torch.randn(2**17 + 1, channels, 1, 1, dtype=torch.float16, device="cuda")
    weight = torch.zeros(channels, 1, 3, 3, dtype=torch.float16, device="cuda")
    weight[:, 0, 1, 1] = 1
    assert torch.equal(kernels["one_channel"](x, weight, padding=1, groups=channels), x)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("groups", [1, 2])
def test_more_than_2_31_outputs(kernel, groups, channels_last):
    few = lab.Problem(
        9, 2, 2, 8192, 8192, kernel_size=(2, 4), stride=2, padding=(0, 1), groups=groups
    )
    many = dataclasses.replace(
        few, batch=5, in_channels=16 * groups, out_channels=16 * groups, height=3072, width=3072
    )
    problem = many if kernel in HOPPERS else few
    dtype = torch.float16 if torch.float16 in kernels[kernel].dtypes else torch.float32
    if not kernels[kernel].supports(problem, dtype, channels_last):
        pytest.skip("the kernel is not for this problem in this memory format")
    x = torch.zeros(problem.input_shape, dtype=dtype, device="cuda")
    x[-1, -1, -3:, -5:] = torch.arange(15, device="cuda").view(3, 5)
    x = in_format(x, channels_last)
    weight = torch.ones(problem.weight_shape, dtype=dtype, device="cuda")
    y = kernels[kernel](x, weight, None, **problem.arguments)
    assert y.numel() > 2**31
    part = dataclasses.replace(problem, batch=1, height=8, width=8)
    expected = torch.nn.functional.conv_transpose2d(
        x[-1:, :, -8:, -8:].cpu().double(), weight.cpu().double(), **part.arguments
    )
    assert torch.equal(y[-1:, :, -12:, -12:].cpu().double(), expected[:, :, -12:, -12:])
    assert y[:-1].abs().max() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", HOPPERS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
def test_more_than_2_31_inputs(kernel, channels_last):
    """Opposite corners of two images, each of which has a launch of its own."""
    channels = 24 if channels_last else 64  # an image has 1.6 or 4.3 times 10^9 values
    problem = lab.Problem(2, channels, 64, 8192, 8192, kernel_size=(3, 7), padding=(1, 3))
    dtype = torch.float16 if torch.float16 in kernels[kernel].dtypes else torch.float32
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(problem.input_shape, dtype=dtype, device="cuda", memory_format=order).zero_()
    weight = torch.randint(-3, 4, problem.weight_shape, device="cuda").to(dtype)
    corners = [(slice(None, 9), slice(None, 9)), (slice(-9, None), slice(-9, None))]
    for image, (rows, columns) in zip((0, 1), corners, strict=True):
        of_corner = x[image, :, rows, columns]
        of_corner.copy_(torch.randint(-3, 4, of_corner.shape, device="cuda"))
    y = kernels[kernel](x, weight, None, **problem.arguments)
    for image, (rows, columns) in zip((0, 1), corners, strict=True):
        part = torch.nn.functional.conv_transpose2d(
            x[image : image + 1, :, rows, columns].cpu().double(),
            weight.cpu().double(),
            padding=(1, 3),
        )
        assert torch.equal(y[image : image + 1, :, rows, columns].cpu().double(), part)
        y[image, :, rows, columns] = 0
    y[0, :, :10, :12] = y[1, :, -10:, -12:] = 0  # what the corners reach
    assert y.count_nonzero() == 0


def test_one_function_asks_for_shared_memory():
    """It never takes back what another thread has asked for."""
    asking = [
        file.name
        for file in KERNEL_FOLDER.glob("*.cu*")
        if "cudaFuncSetAttribute(" in file.read_text()
    ]
    assert asking == ["shared_memory.cuh"]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", kernels)
def test_threads_whose_blocks_need_different_shared_memory(kernel):
    """The limit of a kernel's shared memory is one for all threads."""
    problems = [
        lab.Problem(2, 32, 32, *size, kernel_size=kernel_size, groups=groups)
        for size, kernel_size, groups in itertools.product(
            [(5, 9), (40, 90), (64, 300)], [1, 3, (3, 7), 7], [1, 2]
        )
    ]
    covered = [p for p in problems if kernels[kernel].supports(p, torch.float32, False)]
    assert covered or kernel == "one_channel"
    jobs = []
    for problem in covered:
        tensors = [t if t is None else t.cuda() for t in data_of(problem)]
        jobs.append((problem, tensors, kernels[kernel](*tensors, **problem.arguments)))

    def work(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for problem, tensors, expected in random.Random(seed).choices(jobs, k=200):
                assert torch.equal(kernels[kernel](*tensors, **problem.arguments), expected)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4 if jobs else 0)]:
            done.result()


@pytest.mark.parametrize("file", sorted(KERNEL_FOLDER.glob("*.cu*")), ids=lambda file: file.name)
def test_every_launch_is_on_the_launchers_stream(file):
    """The simulator has no streams, and tests on a GPU look at one kernel's only."""
    for launch in re.findall(r"<<<(.*?)>>>", file.read_text(), re.DOTALL):
        assert launch.split(",")[-1].strip() == "stream"


def plan(kernel, problem, dtype, channels_last):
    """Ask the kernel's own launcher what it would launch, whatever a stage would hand down."""
    pointers = (None,) * (4 + kernel.packs_weights)
    struct = _ConvTransposeProblem.of(problem)
    launcher = kernel.launcher(dtype, channels_last)
    return kernel.program("simulator").plan(launcher, *pointers, struct)


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
            # One output for each image, and large images.
            lab.Problem(1, 16, 16, 251, 251, kernel_size=1, padding=125),
            lab.Problem(1, 16, 16, 301, 301, kernel_size=1, padding=150),
            lab.Problem(1, 16, 16, 401, 401, kernel_size=1, padding=200),
            lab.Problem(1, 16, 16, 9, 9, kernel_size=(20, 4)),
            lab.Problem(1, 16, 16, 9, 9, kernel_size=(20, 3)),
            lab.Problem(1, 16, 16, 9, 900, kernel_size=(20, 3)),
        ]
        answers = set()
        for problem in [*problem_set(300)[::10], *MORE, *rare]:
            if problem.batch == 0:
                continue
            for dtype, channels_last in itertools.product(DTYPES, formats(kernel)):
                answer = kernels[kernel].supports(problem, dtype, channels_last)
                answers.add(answer)
                if answer:
                    # What every architecture has that the kernel is for.
                    least = kernels[kernel].min_capability
                    most = (227 if least >= (9, 0) else 96 if least >= (8, 0) else 60) * 1024
                    launches = kernels[kernel].launches(problem, most, dtype, channels_last)
                    usual = 1 + kernels[kernel].packs_weights
                    assert len(launches) == LAUNCHES.get((kernel, dtype), usual)
                    assert max(launch.shared_bytes for launch in launches) <= most
                elif dtype in kernels[kernel].dtypes:
                    with pytest.raises(lab.KernelError):
                        plan(kernels[kernel], problem, dtype, channels_last)
        assert answers == ({True} if kernel in COMPLETE else {False, True})

    @pytest.mark.parametrize("kernel", sorted(set(KERNELS) - set(COMPLETE) - set(lab.stages)))
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

    @pytest.mark.parametrize("stage", list(fma_stages))
    def test_a_stage_without_tensor_cores_is_for_contiguous_float32(self, stage):
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
        rounding = [name for name in kernels if kernels[name].precision == "tf32"]
        assert rounding == ["tensor_core", "hopper_single"]
        assert all(stage.precision == "float32" for stage in fma_stages.values())

    def test_the_gates(self):
        """TF32's is far above float32's, and cutting off operands would still not pass it."""
        assert FLOAT32_GATE < truncation_gate(21 * 64) < tf32_gate(21 * 64)
        assert tf32_gate(8) == pytest.approx(2.0**14, rel=1e-3)
        a, b = (np.full((1, 8, 1, 1), 1 + 2.0**-10 - 2.0**-22, np.float32) for _ in range(2))
        cut = np.full((1, 1, 1, 1), 8.0)
        assert condition_error(cut, a, b.reshape(8, 1, 1, 1)) > 1.9 * tf32_gate(8)

    def test_rounded_once_or_not_at_all(self):
        """Some outputs may be of operands with 11 bits and some of all bits, but none of others."""
        problem = lab.Problem(2, 64, 24, 9, 10, kernel_size=3, stride=2, bias=True)
        x, weight, bias = problem.random_inputs()
        assert torch.equal(to_11_bits(x.half().float()), x.half().float())
        assert torch.equal(to_11_bits(x.abs() + 1), (x.abs() + 1).half().float())
        assert to_11_bits(torch.tensor([math.inf, 1e-30])).tolist() == [math.inf, 2.0**-110 * 1298]

        def judge(*tensors):
            y = F.conv_transpose2d(*(t.double() for t in tensors), **problem.arguments).float()
            assert_rounded_once(y, x, weight, bias, problem)
            return y

        exact = judge(x, weight, bias)
        rounded = judge(to_11_bits(x), to_11_bits(weight), bias)
        mixed = torch.where(torch.arange(exact.shape[-1]) % 2 == 0, exact, rounded)
        assert_rounded_once(mixed, x, weight, bias, problem)
        cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
        for operand in (cut, to_11_bits(x).bfloat16().float(), x * math.nan):
            with pytest.raises(AssertionError):
                judge(operand, to_11_bits(weight), bias)
        with pytest.raises(AssertionError):
            judge(x, to_11_bits(weight), bias)
