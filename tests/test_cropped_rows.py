"""Every kernel computes an output that ends elsewhere than PyTorch's arguments can say.

`CroppedProblem` is one; a rank that owns some of an image's rows computes those (`distributed`).
"""

import numpy as np
import pytest
import torch
from strategies import inputs, problem_set
from test_kernels import DEVICES

import convt_lab as lab
from convt_lab.launcher import Launcher
from convt_lab.operator import conv_transpose2d_between
from convt_lab.problem import CroppedProblem, ProblemError
from convt_lab.reference import FLOAT32_GATE, scatter, terms_of, tf32_gate
from convt_lab.stages import fma_stages, kernels

#: What the random problems, many of which are of one row, have too few of.
TALL = [
    lab.Problem(2, 6, 5, 19, 33, kernel_size=(3, 7), bias=True),
    lab.Problem(1, 17, 40, 12, 20, kernel_size=(5, 3), dilation=(2, 1), bias=True),
    lab.Problem(1, 9, 70, 9, 24, kernel_size=4, stride=2, padding=1),
    lab.Problem(2, 1, 1, 21, 18, kernel_size=3, stride=2, padding=1, output_padding=1),
    lab.Problem(1, 6, 6, 14, 20, kernel_size=(3, 7), groups=6, bias=True),
    lab.Problem(1, 32, 32, 11, 14, kernel_size=3, stride=3, groups=4),
    lab.Problem(1, 30, 3, 16, 24, kernel_size=(3, 7), bias=True),
]


def problems_on(device):
    """Return few for the simulator, which is slow, and more for a GPU."""
    random = [p for p in problem_set() if p.batch and p.out_height > 1]
    return [*TALL, *random[:: 40 if device == "cpu" else 4]]


def crops_of(problem):
    """Crop one row and half of the rows; or let there be two more."""
    return sorted({1, problem.out_height // 2, -2})


def expected_of(part, x, weight, bias):
    """Return outputs in float64, and their condition scales."""
    arguments = part.arguments
    above = arguments["padding"][0]
    for name in ("padding", "output_padding"):
        arguments[name] = (0, arguments[name][1])

    def rows_of(*tensors):
        whole = scatter(*(None if t is None else t.numpy() for t in tensors), **arguments)
        missing = above + part.out_height - whole.shape[2]
        if missing > 0:  # no input reaches them
            rest = np.zeros((*whole.shape[:2], missing, whole.shape[3]))
            if tensors[2] is not None:
                rest += tensors[2].numpy()[:, None, None]
            whole = np.concatenate([whole, rest], axis=2)
        return whole[:, :, above : above + part.out_height]

    scale = rows_of(*(None if t is None else t.abs() for t in (x, weight, bias)))
    return rows_of(x, weight, bias), scale * 2.0**-24


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", kernels)
def test_every_kernel(name, device):
    kernel = kernels[name]
    ran = 0
    for problem in problems_on(device):
        x, weight, bias = inputs(problem, seed=3)
        for crop in crops_of(problem):
            part = CroppedProblem.of(problem, crop)
            assert part.out_height == problem.out_height - crop
            if not kernel.supports(part, torch.float32, False):
                continue
            ran += 1
            output = torch.full(part.output_shape, float("nan"), device=device)
            tensors = [None if t is None else t.to(device) for t in (x, weight, bias)]
            Launcher(kernel, part, torch.float32, False, torch.device(output.device))(
                *tensors, output
            )
            expected, scale = expected_of(part, x, weight, bias)
            assert output.shape == expected.shape
            error = np.abs(output.cpu().double().numpy() - expected)
            gate = FLOAT32_GATE if kernel.precision == "float32" else tf32_gate(terms_of(problem))
            assert (error <= gate * scale + 1e-30).all(), (problem, crop)
    assert ran >= 6, ran


def test_all_stages_are_among_them():
    assert set(fma_stages) < set(kernels)


def test_a_crop_of_everything_is_refused():
    problem = lab.Problem(height=3, kernel_size=2)
    with pytest.raises(ProblemError, match="leaves no output"):
        CroppedProblem.of(problem, problem.out_height)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("above", "below"), [(0, 0), (0, 2), (3, 0), (1, 2), (5, 5), (0, 9)])
def test_between(above, below, channels_last, device):
    problem = lab.Problem(2, 16, 8, 12, 9, kernel_size=(3, 7), stride=(1, 2), bias=True)
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, bias = (t.to(device) for t in inputs(problem, seed=1))
    x = x.contiguous(memory_format=order)
    arguments = tuple(problem.arguments.values())
    torch.use_deterministic_algorithms(True)  # and so what is allocated starts as NaN
    try:
        rows = conv_transpose2d_between(x, weight, bias, arguments, above, below)
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.is_contiguous(memory_format=order)
    whole = torch.nn.functional.conv_transpose2d(
        *(t.cpu().double() for t in (x, weight, bias)), **problem.arguments
    )
    expected = whole[:, :, above : whole.shape[2] - below]
    torch.testing.assert_close(rows.cpu().double(), expected, rtol=1e-5, atol=1e-5)
