"""The two NumPy references equal each other, PyTorch and SciPy, and the measures let no NaN by."""

import itertools

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from strategies import inputs, problem_set
from torch.nn.functional import conv2d, conv_transpose2d

from convt_lab.problem import Problem, ProblemError
from convt_lab.reference import (
    FLOAT32_GATE,
    UNIT_ROUNDOFF,
    condition_error,
    condition_scale,
    float32_gate,
    gather,
    relative_l2,
    scatter,
    tf32_gate,
    truncation_gate,
)

SMALL_PROBLEMS = [
    Problem(height=3, width=4, kernel_size=(2, 3)),
    Problem(batch=2, in_channels=2, out_channels=3, height=3, width=2, kernel_size=3, padding=1),
    Problem(height=3, width=4, kernel_size=(2, 3), stride=(2, 3), output_padding=(1, 2)),
    Problem(height=3, width=4, kernel_size=(3, 2), dilation=(2, 3), output_padding=(1, 2)),
    Problem(height=4, width=3, kernel_size=3, stride=(4, 2), dilation=(2, 4), padding=(3, 2)),
    Problem(height=7, width=8, kernel_size=(2, 1), padding=(3, 2)),
    Problem(
        batch=2,
        in_channels=4,
        out_channels=6,
        height=2,
        width=3,
        kernel_size=(2, 3),
        stride=(3, 2),
        padding=1,
        dilation=(1, 3),
        output_padding=(2, 1),
        groups=2,
        bias=True,
    ),
]


def in_float64(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def terms(problem: Problem):
    """Give every pair of an input and a weight element, and the output that they meet in."""
    c_in = problem.in_channels // problem.groups
    c_out = problem.out_channels // problem.groups
    for n, ci, h, w in np.ndindex(problem.input_shape):
        for o, kh, kw in np.ndindex(problem.weight_shape[1:]):
            oh = h * problem.stride[0] + kh * problem.dilation[0] - problem.padding[0]
            ow = w * problem.stride[1] + kw * problem.dilation[1] - problem.padding[1]
            if 0 <= oh < problem.out_height and 0 <= ow < problem.out_width:
                co = ci // c_in * c_out + o
                yield (n, ci, h, w), (ci, o, kh, kw), (n, co, oh, ow)


# --- the sums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [scatter, gather])
@pytest.mark.parametrize("problem", SMALL_PROBLEMS)
def test_it_is_the_sum_over_all_that_meet(function, problem):
    x, weight, bias = (
        None if t is None else t.numpy() for t in inputs(problem, kind="small_integers")
    )
    expected = np.zeros(problem.output_shape)
    if bias is not None:
        expected += bias[:, None, None]
    for at_input, at_weight, at_output in terms(problem):
        expected[at_output] += x[at_input] * weight[at_weight]
    actual = function(x, weight, bias, **problem.arguments)
    assert actual.dtype == np.float64
    assert actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, expected)


def test_scatter_gather_and_torch_agree_on_every_problem():
    for number, problem in enumerate(problem_set()):
        x, weight, bias = inputs(problem, seed=number)
        expected = conv_transpose2d(*in_float64(x, weight, bias), **problem.arguments)
        for function in (scatter, gather):
            actual = function(x, weight, bias, **problem.arguments)
            assert actual.shape == problem.output_shape
            assert relative_l2(actual, expected) <= 1e-12, (function, problem)
            error = condition_error(actual, x, weight, bias, expected=expected, **problem.arguments)
            assert error <= 1e-6, (function, problem)


@pytest.mark.parametrize("function", [scatter, gather])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (7, 11)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 7), (4, 2)])
def test_with_stride_1_it_is_the_full_convolution(function, size, kernel_size):
    generator = np.random.default_rng(0)
    x, kernel = generator.standard_normal(size), generator.standard_normal(kernel_size)
    actual = function(x[None], kernel[None, None])
    np.testing.assert_allclose(actual[0], convolve2d(x, kernel, mode="full"), atol=1e-13)


def test_it_is_the_adjoint_of_the_convolution():
    for problem in problem_set():
        x, weight, _ = in_float64(*inputs(problem, seed=1))
        # conv2d is defined on any y, of which an output padding of a stride or more is too much
        # by some rows or columns of its result.
        y = torch.randn(problem.output_shape, dtype=torch.float64, generator=torch.manual_seed(2))
        arguments = {k: v for k, v in problem.arguments.items() if k != "output_padding"}
        if problem.batch == 0:
            continue
        conv_y = conv2d(y, weight, **arguments)[..., : problem.height, : problem.width]
        assert conv_y.shape == x.shape
        left = np.vdot(scatter(x, weight, **problem.arguments), y.numpy())
        right = float((x * conv_y).sum())
        size = np.vdot(condition_scale(x, weight, **problem.arguments), y.abs().numpy())
        assert abs(left - right) <= 1e-12 * size, problem


@pytest.mark.parametrize("function", [scatter, gather])
def test_it_takes_arrays_and_tensors_of_any_real_type(function):
    problem = Problem(batch=2, in_channels=3, height=4, width=5, kernel_size=2, bias=True)
    x, weight, bias = inputs(problem, kind="small_integers")
    expected = function(x, weight, bias)
    for convert in (
        lambda t: t.numpy(),
        lambda t: t.numpy().astype(np.int8),
        lambda t: t.numpy()[::-1].copy()[::-1],
        lambda t: t.double().numpy(),
        lambda t: t.half(),
        lambda t: t.bfloat16(),
        lambda t: t.long(),
        lambda t: t.clone().requires_grad_(),
    ):
        actual = function(convert(x), convert(weight), convert(bias))
        np.testing.assert_array_equal(actual, expected)
    for wrong in (x.to(torch.complex64), x.numpy().astype(complex), np.full(x.shape, "a")):
        with pytest.raises(TypeError, match=r"input has dtype .*real"):
            function(wrong, weight, bias)


@pytest.mark.parametrize("function", [scatter, gather])
def test_one_image_and_no_image(function):
    problem = Problem(
        batch=2,
        in_channels=4,
        out_channels=6,
        height=3,
        width=5,
        kernel_size=3,
        groups=2,
        stride=2,
        bias=True,
    )
    x, weight, bias = inputs(problem)
    both = function(x, weight, bias, 2, 0, 0, 2)
    one = function(x[1], weight, bias, 2, 0, 0, 2)
    assert one.shape == problem.output_shape[1:]
    np.testing.assert_allclose(one, both[1], rtol=1e-12)
    assert function(x[:0], weight, bias, 2, 0, 0, 2).shape == (0, *both.shape[1:])


@pytest.mark.parametrize("function", [scatter, gather])
def test_inputs_are_left_alone(function):
    problem = Problem(batch=1, height=3, width=3, kernel_size=2, bias=True)
    tensors = in_float64(*inputs(problem))
    before = [tensor.clone() for tensor in tensors]
    output = function(*tensors)
    output += 1
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("function", [scatter, gather])
def test_illegal_calls_are_refused(function):
    x, weight = np.ones((1, 2, 3, 3)), np.ones((2, 2, 2, 2))
    for arguments, part in (
        ({"stride": 0}, "stride=0"),
        ({"groups": 3}, "groups=3"),
        ({"bias": np.ones(3)}, r"bias has shape \[3\]"),
        ({"padding": 2}, r"padding=\(2, 2\)"),
    ):
        with pytest.raises(ProblemError, match=part):
            function(x, weight, **arguments)
    with pytest.raises(ProblemError, match=r"input has shape \[2, 3\]"):
        function(x[0, 0, :2], weight)


# --- NaN and infinity -------------------------------------------------------------------------


@pytest.mark.parametrize("function", [scatter, gather])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("problem", SMALL_PROBLEMS)
def test_what_is_not_finite_reaches_the_outputs_that_sum_it_and_no_others(function, value, problem):
    ones = [None if s is None else np.ones(s) for s in (problem.input_shape, problem.weight_shape)]
    for which, shape in enumerate((problem.input_shape, problem.weight_shape)):
        reached = {}
        for term in terms(problem):
            reached.setdefault(term[which], set()).add(term[2])
        for at in itertools.islice(np.ndindex(shape), 0, None, 5):
            operands = [array.copy() for array in ones]
            operands[which][at] = value
            output = function(*operands, **problem.arguments)
            hit = {tuple(map(int, where)) for where in np.argwhere(~np.isfinite(output))}
            assert hit == reached.get(at, set())
            assert all(np.array_equal(output[where], value, equal_nan=True) for where in hit)


@pytest.mark.parametrize("function", [scatter, gather])
def test_infinities_cancel_to_nan_and_are_not_lost_in_zeros(function):
    x = np.array([[[1.0, np.inf, 0.0, 2.0]]])
    weight = np.array([[[[1.0, -1.0]]]])
    np.testing.assert_array_equal(function(x, weight)[0, 0], [1, np.inf, -np.inf, 2, -2])
    np.testing.assert_array_equal(
        function(np.array([[[np.inf, np.inf, 0.0]]]), weight)[0, 0], [np.inf, np.nan, -np.inf, 0]
    )
    # Infinity times a zero of the weight is a term like any other.
    weight[...] = [1.0, 0.0]
    np.testing.assert_array_equal(function(x, weight)[0, 0], [1, np.inf, np.nan, 2, 0])


# --- the measures -----------------------------------------------------------------------------

PROBLEM = Problem(
    batch=2,
    in_channels=4,
    out_channels=6,
    height=5,
    width=7,
    kernel_size=(3, 7),
    groups=2,
    stride=(2, 1),
    padding=1,
    bias=True,
)


def test_equal_results_have_no_error():
    x, weight, bias = inputs(PROBLEM)
    exact = scatter(x, weight, bias, **PROBLEM.arguments)
    assert relative_l2(exact, exact) == 0
    assert condition_error(exact, x, weight, bias, **PROBLEM.arguments) == 0


def test_one_planted_error_is_measured():
    x, weight, bias = inputs(PROBLEM)
    exact = scatter(x, weight, bias, **PROBLEM.arguments)
    scale = condition_scale(x, weight, bias, **PROBLEM.arguments)
    for at in ((0, 0, 0, 0), (1, 5, 8, 10), (0, 3, 4, 5)):
        actual = exact.copy()
        actual[at] += 12 * UNIT_ROUNDOFF * scale[at]
        error = condition_error(actual, x, weight, bias, **PROBLEM.arguments)
        assert error == pytest.approx(12)
        assert error == condition_error(
            torch.from_numpy(actual), x, weight, bias, expected=exact, scale=scale
        )
        expected = 12 * UNIT_ROUNDOFF * scale[at] / np.sqrt((exact**2).sum())
        assert relative_l2(actual, exact) == pytest.approx(expected)


def test_the_scale_is_the_sum_of_absolute_terms():
    x, weight = np.array([[[1.0, -2.0]]]), np.array([[[[3.0, -1.0]]]])
    bias = np.array([-0.5])
    np.testing.assert_array_equal(condition_scale(x, weight, bias)[0, 0], [3.5, 7.5, 2.5])
    np.testing.assert_array_equal(scatter(x, weight, bias)[0, 0], [2.5, -7.5, 1.5])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(wrong):
    x, weight, bias = inputs(PROBLEM)
    exact = scatter(x, weight, bias, **PROBLEM.arguments)
    for at in ((0, 0, 0, 0), (1, 5, 8, 10)):
        actual = exact.copy()
        actual[at] = wrong
        assert condition_error(actual, x, weight, bias, **PROBLEM.arguments) == np.inf
        assert relative_l2(actual, exact) == np.inf
    all_wrong = np.full_like(exact, wrong)
    assert condition_error(all_wrong, x, weight, bias, **PROBLEM.arguments) == np.inf
    assert relative_l2(all_wrong, exact) == np.inf


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_where_the_exact_result_is_not_finite_the_same_is_right_and_all_else_wrong(special):
    x, weight, bias = inputs(PROBLEM)
    weight = weight.abs()
    x[0, 1, 2, 3] = special
    exact = scatter(x, weight, bias, **PROBLEM.arguments)
    places = np.argwhere(~np.isfinite(exact))
    assert 0 < len(places) < exact.size
    arguments = (x, weight, bias)
    assert condition_error(exact, *arguments, **PROBLEM.arguments) == 0
    assert relative_l2(exact, exact) == 0
    for replacement in {np.nan, np.inf, -np.inf, 0.0, 3e38}:
        if np.array_equal(replacement, special, equal_nan=True):
            continue
        actual = exact.copy()
        actual[tuple(places[-1])] = replacement
        assert condition_error(actual, *arguments, **PROBLEM.arguments) == np.inf
        assert relative_l2(actual, exact) == np.inf
    # An error elsewhere is still seen.
    actual = np.where(np.isfinite(exact), exact + 1, exact)
    assert FLOAT32_GATE < condition_error(actual, *arguments, **PROBLEM.arguments) < np.inf
    assert 0 < relative_l2(actual, exact) < np.inf


def test_where_nothing_is_summed_the_output_is_exactly_zero():
    problem = Problem(width=3, stride=2)  # every second output has no terms
    x, weight = np.ones(problem.input_shape), np.ones(problem.weight_shape)
    exact = scatter(x, weight, **problem.arguments)
    assert exact[0, 0, 0].tolist() == [1, 0, 1, 0, 1]
    assert condition_error(exact, x, weight, **problem.arguments) == 0
    actual = exact.copy()
    actual[0, 0, 0, 1] = 1e-30
    assert condition_error(actual, x, weight, **problem.arguments) == np.inf
    actual[0, 0, 0, 1] = -0.0
    assert condition_error(actual, x, weight, **problem.arguments) == 0
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0
    assert relative_l2([0, 1e-300, 0], np.zeros(3)) == np.inf


def test_an_empty_batch_has_no_error():
    empty = np.ones((0, 1, 3, 3))
    assert condition_error(empty, np.ones((0, 1, 2, 2)), np.ones((1, 1, 2, 2))) == 0
    assert relative_l2(empty, empty) == 0


def test_nothing_is_broadcast():
    x, weight = np.ones((2, 1, 3, 3)), np.ones((1, 1, 2, 2))
    exact = scatter(x, weight)
    for actual in (exact[:1], exact[0], exact[:, :, :1], np.float64(0), exact.ravel()):
        with pytest.raises(ValueError, match=r"actual has shape .* \[2, 1, 4, 4\]"):
            condition_error(actual, x, weight)
        with pytest.raises(ValueError, match=r"actual has shape .* \[2, 1, 4, 4\]"):
            relative_l2(actual, exact)
    with pytest.raises(ValueError, match="scale has shape"):
        condition_error(exact, x, weight, scale=exact[:1])


# --- what the gate lets through and what it stops -----------------------------------------------


def test_pytorch_in_float32_passes_on_every_problem():
    for number, problem in enumerate(problem_set()):
        x, weight, bias = inputs(problem, seed=number)
        actual = conv_transpose2d(x, weight, bias, **problem.arguments)
        error = condition_error(actual, x, weight, bias, **problem.arguments)
        assert error <= FLOAT32_GATE, problem


def chain(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum [terms, N] times [terms, C_out] in float32, one term after the other."""
    total = np.zeros((x.shape[1], weight.shape[1]), np.float32)
    for x_term, weight_term in zip(x, weight, strict=True):
        total += x_term[:, None] * weight_term
    return total


def test_the_gate_separates_float32_from_tf32_and_from_a_missing_term():
    # One output pixel with all the terms of the star: 64 channels and 3 x 7 taps.
    problem = Problem(
        batch=8,
        in_channels=64,
        out_channels=64,
        height=3,
        width=7,
        kernel_size=(3, 7),
        padding=(2, 6),
    )
    x, weight, _ = (None if t is None else t.numpy() for t in inputs(problem))
    assert problem.output_shape == (8, 64, 1, 1)
    x_terms = x[:, :, ::-1, ::-1].reshape(8, -1).T
    weight_terms = weight.transpose(0, 2, 3, 1).reshape(-1, 64)

    def error(x_terms, weight_terms):
        actual = chain(x_terms, weight_terms)[:, :, None, None]
        return condition_error(actual, x, weight, **problem.arguments)

    def tf32(array):
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)

    assert 1 < error(x_terms, weight_terms) <= FLOAT32_GATE
    assert FLOAT32_GATE < 100 < error(tf32(x_terms), tf32(weight_terms)) < 2**11
    assert error(x_terms[1:], weight_terms[1:]) > 1000


def test_weights_in_a_wrong_order_within_a_group_do_not_pass():
    seen = 0
    for problem in problem_set():
        c_in = problem.in_channels // problem.groups
        if problem.groups == 1 or c_in == 1 or problem.multiply_adds == 0:
            continue
        x, weight, bias = inputs(problem)
        # The order that a kernel takes that counts groups fastest instead of slowest.
        wrong = weight.unflatten(0, (c_in, problem.groups)).transpose(0, 1).flatten(0, 1)
        actual = conv_transpose2d(x, wrong, bias, **problem.arguments)
        assert condition_error(actual, x, weight, bias, **problem.arguments) > FLOAT32_GATE
        seen += 1
    assert seen >= 30


def test_the_gate_grows_with_the_number_of_outputs_and_not_below_a_million():
    assert float32_gate(0) == float32_gate(10**6) == FLOAT32_GATE
    star = 8 * 64 * 514 * 518
    assert float32_gate(star) == pytest.approx(9.3, abs=0.05)


def test_the_gates_of_truncated_sums_and_of_tf32():
    """What they bound, in units of 2^-24: 2^-23 an instruction; 2^-11 of each operand."""
    assert truncation_gate(8) == 4
    assert truncation_gate(9) == truncation_gate(16) == 6
    assert truncation_gate(16, depth=16) == 4
    assert tf32_gate(8) == pytest.approx((2 * 2.0**-11 + 2.0**-22) / UNIT_ROUNDOFF + 4, rel=1e-3)
    assert tf32_gate(16) > tf32_gate(8) > 1000 * FLOAT32_GATE
