"""The operator against float64, on random problems and on the properties that define it."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import PATHS, counting_runs, device_of, on_path, without_tf32
from strategies import SETTINGS, inputs, problem_set, problems

import convt_lab as lab
from convt_lab.reference import FLOAT32_GATE, condition_error, scatter, tf32_gate
from convt_lab.stages import kernels

#: Many channels with one in and one out for each group, which few random problems have.
DEPTHWISE = [
    lab.Problem(2, 32, 32, 9, 13, 4, stride=2, padding=1, groups=32, bias=True),
    lab.Problem(1, 8, 8, 8, 16, 3, stride=2, padding=1, output_padding=1, groups=8),
    lab.Problem(1, 17, 17, 5, 7, (3, 7), dilation=(2, 1), groups=17, bias=True),
]


@pytest.fixture(params=PATHS)
def path(request):
    with on_path(request.param) as device, without_tf32(device):
        yield request.param


def contiguous(t):
    return t


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else t


def sliced(t):
    """Return the same values from among others, at an odd offset and with gaps."""
    storage = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), device=t.device)
    view = storage[..., 3 : 3 + 2 * t.shape[-1] : 2]
    return view.copy_(t)


def shifted(t):
    """Return a dense tensor whose first value is not at the beginning of an aligned vector."""
    return torch.full((t.numel() + 1,), float("nan"), device=t.device)[1:].view(t.shape).copy_(t)


def channels_last(t):
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def negated(t):
    """Return a tensor whose memory holds the negatives."""
    return torch._neg_view(-t)


LAYOUTS = [contiguous, transposed, sliced, shifted, channels_last, negated]


@settings(SETTINGS, max_examples=100)
@given(problems(), st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3), st.booleans())
def check_random_problem(path, problem, layouts, one_image):
    device = device_of(path)
    tensors = inputs(problem, device=device)
    expected = scatter(*(None if t is None else t.cpu() for t in tensors), **problem.arguments)
    x, weight, bias = (
        None if t is None else layout(t) for t, layout in zip(tensors, layouts, strict=True)
    )
    if one_image and problem.batch > 0:
        x, expected, tensors = x[-1], expected[-1:], (tensors[0][-1:], *tensors[1:])
    y = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
    theirs = F.conv_transpose2d(x, weight, bias, **problem.arguments)
    assert y.stride() == theirs.stride() or y.numel() == 0
    if x.dim() == 3:
        assert y.dim() == 3
        y = y.unsqueeze(0)
    tensors = [None if t is None else t.cpu() for t in tensors]
    error = condition_error(y.cpu(), *tensors, expected=expected, **problem.arguments)
    assert error <= FLOAT32_GATE


def test_random_problems(path):
    with counting_runs() as runs:
        check_random_problem(path)
    if path in ("simulator", "cuda_ours"):
        assert len(runs) > 30


def test_small_integers_are_exact(path):
    for number, problem in enumerate(problem_set(300)[::6]):
        x, weight, bias = inputs(problem, number, "small_integers", device_of(path))
        y = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
        again = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
        assert torch.equal(y, again)
        tensors = [None if t is None else t.cpu() for t in (x, weight, bias)]
        np.testing.assert_array_equal(
            y.double().cpu().numpy(), scatter(*tensors, **problem.arguments), repr(problem)
        )


def test_gradients_of_random_problems(path):
    """Against the gradients that PyTorch computes in float64 on the CPU."""
    device = device_of(path)
    for number, problem in enumerate(problem_set(300)[::10]):
        tensors = inputs(problem, number)
        results = []
        for function, kind in (
            (lab.conv_transpose2d, dict(device=device, copy=True)),
            (F.conv_transpose2d, dict(dtype=torch.float64)),
        ):
            leaves = [
                None if t is None else t.detach().to(**kind).requires_grad_() for t in tensors
            ]
            y = function(*leaves, **problem.arguments)
            torch.manual_seed(number)
            cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
            y.backward(cotangent)
            results.append([t.grad.double().cpu() for t in leaves if t is not None])
        for ours, theirs in zip(*results, strict=True):
            scale = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_it_is_the_adjoint_of_a_convolution(path):
    for number, problem in enumerate(problem_set(300)[::10]):
        if problem.batch == 0:
            continue
        x, weight, _ = inputs(problem, number, device=device_of(path))
        y = lab.conv_transpose2d(x, weight, None, **problem.arguments).double()
        other = torch.randn_like(y)
        forward = F.conv2d(
            other,
            weight.double(),
            None,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
        )
        # `output_padding` may add outputs that let the convolution reach further than the input.
        forward = forward[..., : problem.height, : problem.width]
        one, two = (y * other).sum(), (x.double() * forward).sum()
        scale = (y * other).abs().sum() + 1
        assert abs(one - two) <= 1e-5 * scale, problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_window(path, value):
    if path in ("cpu", "cuda"):
        pytest.skip("of some of PyTorch's kernels it is not true")
    problem = lab.Problem(1, 4, 3, 6, 9, (3, 2), stride=(2, 3), padding=(1, 0), groups=1)
    x, weight, bias = inputs(problem, device=device_of(path))
    x[0, 1, 2, 5] = value
    y = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
    expected = scatter(x.cpu(), weight.cpu(), None, **problem.arguments)
    np.testing.assert_array_equal(np.isfinite(y.cpu().numpy()), np.isfinite(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(path, dtype):
    """As right as the dtype allows: inputs rounded to it, sums better than it, one rounding."""
    for number, problem in enumerate(problem_set(300)[::15]):
        tensors = [
            None if t is None else t.to(dtype) for t in inputs(problem, number, device="cpu")
        ]
        y = lab.conv_transpose2d(
            *(None if t is None else t.to(device_of(path)) for t in tensors), **problem.arguments
        )
        assert y.dtype == dtype
        wide = [None if t is None else t.double() for t in tensors]
        expected = torch.from_numpy(scatter(*wide, **problem.arguments))
        size = torch.from_numpy(
            scatter(*(None if t is None else t.abs() for t in wide), **problem.arguments)
        )
        allowed = torch.finfo(dtype).eps * (size + 1e-6) * (64 if dtype == torch.float64 else 2)
        assert ((y.cpu().double() - expected).abs() <= allowed).all(), problem


ALL_PROBLEMS = (*problem_set(300), *DEPTHWISE)
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("path", ["simulator", pytest.param("cuda_ours", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kernel", kernels)
def test_each_kernel_in_each_dtype_and_memory_format(kernel, path):
    """Every kernel that the dispatch may choose, through the operator."""
    device = device_of(path)
    with on_path(path, kernel), without_tf32(device), counting_runs() as runs:
        for dtype in kernels[kernel].dtypes:
            for channels_last in (False, True)[: 1 + kernels[kernel].takes_channels_last]:
                covered = [
                    problem
                    for problem in ALL_PROBLEMS
                    if kernels[kernel].supports(problem, dtype, channels_last) and problem.batch > 0
                ]
                assert covered, "give it a problem"
                runs.clear()
                for number, problem in enumerate(covered[:: max(1, len(covered) // 8)]):
                    check_kernel(kernel, problem, number, dtype, channels_last, device)
                assert kernel in runs


def check_kernel(kernel, problem, number, dtype, channels_last, device):
    order = torch.channels_last if channels_last else torch.contiguous_format
    tensors = [None if t is None else t.to(dtype) for t in inputs(problem, number)]
    x, weight, bias = (None if t is None else t.to(device) for t in tensors)
    x = x.to(memory_format=order)
    y = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
    assert y.stride() == F.conv_transpose2d(x, weight, bias, **problem.arguments).stride()
    wide = [None if t is None else t.double() for t in tensors]
    expected = torch.from_numpy(scatter(*wide, **problem.arguments))
    size = torch.from_numpy(
        scatter(*(None if t is None else t.abs() for t in wide), **problem.arguments)
    )
    # Sums are in float32; a narrower output is rounded once, operands where the kernel says so.
    rounds = dtype == torch.float32 and kernels[kernel].precision == "tf32"
    terms = problem.in_channels * problem.kernel_size[0] * problem.kernel_size[1]
    gate = tf32_gate(terms) if rounds else FLOAT32_GATE
    allowed = (gate * UNITS[torch.float32] + UNITS[dtype]) * size + 1e-7
    assert ((y.cpu().double() - expected).abs() <= allowed).all(), problem


@functools.cache
def deterministic_problem():
    return problem_set(300)[150]


def test_deterministic_algorithms(path):
    problem = deterministic_problem()
    leaves = [
        None if t is None else t.requires_grad_() for t in inputs(problem, device=device_of(path))
    ]
    torch.use_deterministic_algorithms(True)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        results = []
        for _ in range(2):
            y = lab.conv_transpose2d(*leaves, **problem.arguments)
            assert not y.isnan().any()
            gradients = torch.autograd.grad(y.square().sum(), [t for t in leaves if t is not None])
            results.append((y, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = deterministic
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
