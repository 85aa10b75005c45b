"""Problem agrees with PyTorch about what is legal, and counts what it says it counts."""

import dataclasses
import doctest
import itertools
import pickle
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SETTINGS, problem_set, problems
from torch.nn.functional import conv_transpose2d
from torch.utils.flop_counter import FlopCounterMode

from convt_lab.problem import MAX_EXTENT, Axis, Problem, ProblemError


def call_torch(problem: Problem, device: str = "meta", fill: float = 1.0) -> torch.Tensor:
    x, weight, bias = (
        None if shape is None else torch.full(shape, fill, device=device, dtype=torch.float64)
        for shape in (problem.input_shape, problem.weight_shape, problem.bias_shape)
    )
    return conv_transpose2d(x, weight, bias, **problem.arguments)


# --- what is legal ----------------------------------------------------------------------------


@SETTINGS
@given(problems())
def test_output_shape_is_that_of_torch(problem):
    assert call_torch(problem).shape == problem.output_shape


def test_torch_accepts_the_whole_set():
    for problem in problem_set():
        assert call_torch(problem, "cpu").shape == problem.output_shape


def random_call(pick) -> tuple:
    """Make shapes and arguments of which about two thirds are illegal, mostly for one reason."""

    def pair(legal, illegal):
        values = (pick(legal), pick(legal)) if pick(range(12)) else (pick(legal), pick(illegal))
        return values if pick(range(4)) else (values[-1],)

    groups = pick([1, 1, 2, 2, 3, 3] * 4 + [0, -1])
    c_in = pick([1, 2, 3]) * max(groups, 1) + (pick(range(15)) == 0)
    c_out_per_group = pick([1, 2])
    kernel = (pick([1, 2, 3] * 5 + [0]), pick([1, 2, 3] * 5 + [0]))
    input_shape = (
        pick([0, 1, 1, 2]),
        c_in + (pick(range(20)) == 0),
        *(pick([1, 2, 3, 4] * 10 + [0]) for _ in range(2)),
    )
    weight_shape = (c_in, c_out_per_group - (pick(range(30)) == 0), *kernel)
    bias_shape = pick([None, (c_out_per_group * groups,)])
    if bias_shape and pick(range(12)) == 0:
        bias_shape = pick([(c_out_per_group * groups + 1,), (1, c_out_per_group * groups)])
    if bias_shape and bias_shape[-1] < 0:
        bias_shape = None
    arguments = {
        "stride": pair([1, 2, 3], [0, -1]),
        "padding": pair([0, 0, 1, 2], [-1, 4]),
        "output_padding": pair([0, 0, 1], [-1, 2, 3]),
        "groups": groups,
        "dilation": pair([1, 2, 3], [0, -1]),
    }
    if pick(range(30)) == 0:
        arguments["stride"] = (1, 1, 1)
    if pick(range(30)) == 0:
        input_shape = pick([input_shape[2:], (1, *input_shape)])
    return input_shape, weight_shape, bias_shape, arguments


def refusal(function, *arguments, **keywords) -> Exception | None:
    """Call and give the error that says no, if there is one."""
    try:
        function(*arguments, **keywords)
    except RuntimeError as error:  # a ProblemError is one too
        return error
    return None


def test_torch_refuses_what_is_refused_and_nothing_else():
    # PyTorch is asked in float64 and with at least one image, because only then does it check
    # everything: its float32 path on the CPU takes an empty output and a dilation of 0, and an
    # empty batch excuses almost everything. Here legality depends on neither.
    pick = random.Random(7).choice
    outcomes = Counter()
    for _ in range(4000):
        input_shape, *shapes, arguments = random_call(pick)
        filled = (input_shape[0] or 1, *input_shape[1:]) if len(input_shape) == 4 else input_shape
        tensors = [
            None if shape is None else torch.ones(shape, dtype=torch.float64)
            for shape in (filled, *shapes)
        ]
        theirs = refusal(conv_transpose2d, *tensors, **arguments)
        ours = refusal(Problem.from_shapes, input_shape, *shapes, **arguments)
        assert (ours is None) == (theirs is None), (
            f"{input_shape}, {shapes}, {arguments}: torch says {theirs}, Problem {ours}"
        )
        if ours is None:
            problem = Problem.from_shapes(input_shape, *shapes, **arguments)
            tensors[0] = tensors[0][: input_shape[0]]
            assert problem.output_shape == conv_transpose2d(*tensors, **arguments).shape
        outcomes["accepted" if ours is None else str(ours).split("=")[0].split()[0]] += 1
    assert outcomes["accepted"] > 800
    for refused in (
        *("input", "weight", "bias", "stride", "padding", "output_padding"),
        *("dilation", "groups", "in_channels"),
    ):
        assert outcomes[refused] > 20, (refused, outcomes)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"batch": -1}, ["batch=-1", "at least 0"]),
        ({"in_channels": 0}, ["in_channels=0", "at least 1"]),
        ({"out_channels": -3}, ["out_channels=-3", "at least 1"]),
        ({"height": 0}, ["height=0", "at least 1"]),
        ({"width": 0}, ["width=0", "at least 1"]),
        ({"kernel_size": (0, 3)}, ["kernel_size=(0, 3)", "at least 1"]),
        ({"stride": 0}, ["stride=0", "at least 1"]),
        ({"stride": (2, -1)}, ["stride=(2, -1)", "at least 1"]),
        ({"padding": -1}, ["padding=-1", "at least 0"]),
        ({"output_padding": (0, -1)}, ["output_padding=(0, -1)", "at least 0"]),
        ({"dilation": [0]}, ["dilation=[0]", "at least 1"]),
        ({"groups": 0}, ["groups=0", "at least 1"]),
        ({"in_channels": 4, "groups": 3}, ["in_channels=4", "divisible by groups=3"]),
        (
            {"in_channels": 3, "out_channels": 4, "groups": 3},
            ["out_channels=4", "divisible by groups=3"],
        ),
        (
            {"stride": (1, 3), "dilation": (2, 1), "output_padding": 2},
            ["output_padding=(2, 2)", "along the rows it is 2", "stride is 1", "dilation 2"],
        ),
        (
            {"stride": (3, 2), "output_padding": (2, 2)},
            ["output_padding=(2, 2)", "along the columns it is 2", "at most 1"],
        ),
        (
            {"height": 2, "width": 9, "kernel_size": (2, 3), "padding": 2},
            ["padding=(2, 2)", "height", "(2 - 1) * 1 - 2 * 2 + 1 * (2 - 1) + 0 + 1 = -1"],
        ),
        (
            {"height": 9, "width": 4, "padding": (1, 2)},
            ["padding=(1, 2)", "width", "= 0,", "at least 1", "columns can be at most 1"],
        ),
        ({"stride": (1, 2, 3)}, ["stride=(1, 2, 3)", "3 values"]),
        ({"padding": ()}, ["padding=()", "0 values"]),
        ({"width": 2**31}, [f"width={2**31}", f"at most {MAX_EXTENT}"]),
        ({"dilation": 2**63}, [f"dilation={2**63}", f"at most {MAX_EXTENT}"]),
        ({"width": 2**30, "stride": 4}, [f"width={2**30}", "stride=4", f"at most {MAX_EXTENT}"]),
        ({"kernel_size": (3, 1), "dilation": 2**30}, ["height=1", "kernel_size=3", "rows"]),
    ],
)
def test_an_error_names_the_argument_its_value_and_what_would_be_right(arguments, parts):
    with pytest.raises(ProblemError) as caught:
        Problem(**arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "arguments", "parts"),
    [
        (((2, 3), (2, 2, 3, 3)), {}, ["input has shape [2, 3]", "[N, C_in, H, W]", "[C_in, H, W]"]),
        (((2, 3, 3), (2, 2, 3, 3)), {}, ["input has shape [2, 3, 3]", "[1, C_in, H, W]"]),
        (
            ((1, 2, 0, 3), (2, 2, 3, 3)),
            {},
            ["input has shape [1, 2, 0, 3]", "H must be at least 1"],
        ),
        (((1, 2, 3, 3), (2, 2, 3)), {}, ["weight has shape [2, 2, 3]", "[C_in, C_out/groups, KH"]),
        (((1, 2, 3, 3), (2, 0, 3, 3)), {}, ["weight has shape [2, 0, 3, 3]", "C_out/groups must"]),
        (
            ((1, 3, 3, 3), (2, 2, 3, 3)),
            {},
            ["input has shape [1, 3, 3, 3]", "weight has shape [2, 2, 3, 3]", "have 2 channels"],
        ),
        (((1, 2, 3, 3), (2, 2, 3, 3), (3,)), {}, ["bias has shape [3]", "must be [2]"]),
        (((1, 2, 3, 3), (2, 2, 3, 3), (2,)), {"groups": 2}, ["bias has shape [2]", "must be [4]"]),
        (((1, 2, 3, 3), (2, 2, 3, 3), (1, 2)), {}, ["bias has shape [1, 2]", "must be [2]"]),
        (((1, 2, 3, 3), (2, 2, 3, 3)), {"groups": -1}, ["groups=-1", "at least 1"]),
    ],
)
def test_from_shapes_names_the_tensor_its_shape_and_what_would_be_right(shapes, arguments, parts):
    with pytest.raises(ProblemError) as caught:
        Problem.from_shapes(*shapes, **arguments)
    for part in parts:
        assert part in str(caught.value)


def test_the_error_is_what_torch_raises_and_what_it_means():
    for kind in (RuntimeError, ValueError):
        with pytest.raises(kind, match="stride=0"):
            Problem(stride=0)


NO_INTEGERS = [
    2.0,
    True,
    None,
    "same",
    np.array([2, 1]),
    range(1, 3),
    (True, 1),
    (1.0, 2),
    (2, "1"),
]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize(
    "name", ["kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "batch"]
)
def test_a_value_of_a_wrong_type_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=name):
        Problem(**{name: value})
    if name in Problem().arguments:
        with pytest.raises(TypeError):
            conv_transpose2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), **{name: value})


@pytest.mark.parametrize("value", [1, None, "yes", torch.ones(1)], ids=repr)
def test_bias_is_true_or_false(value):
    with pytest.raises(TypeError, match="bias="):
        Problem(bias=value)


@pytest.mark.parametrize(
    ("value", "pair"),
    [
        (2, (2, 2)),
        ((2,), (2, 2)),
        ([2], (2, 2)),
        ((3, 2), (3, 2)),
        ([3, 2], (3, 2)),
        (torch.Size([3, 2]), (3, 2)),
        (np.int64(2), (2, 2)),
        ((np.int32(3), 2), (3, 2)),
        (torch.tensor(2), (2, 2)),
    ],
    ids=repr,
)
def test_pairs_are_taken_in_the_forms_that_torch_takes(value, pair):
    problem = Problem(height=9, width=9, kernel_size=value, stride=value, dilation=value)
    assert problem.kernel_size == problem.stride == problem.dilation == pair
    assert all(type(number) is int for number in problem.stride)
    expected = conv_transpose2d(
        torch.ones(1, 1, 9, 9), torch.ones(1, 1, *pair), stride=value, dilation=value
    )
    assert problem.output_shape == expected.shape


def test_extents_up_to_32_bits_are_legal_and_no_further():
    assert Problem(width=MAX_EXTENT).out_width == MAX_EXTENT
    assert Problem(width=2**30 - 2**15, stride=2).out_width == MAX_EXTENT - 1
    assert Problem(batch=MAX_EXTENT, height=MAX_EXTENT).output_shape[0] == MAX_EXTENT
    for arguments in (
        {"width": 2**30 + 1, "stride": 2},
        {"width": MAX_EXTENT, "kernel_size": 2},
        {"width": MAX_EXTENT, "kernel_size": 3, "padding": 1},
        {"width": MAX_EXTENT, "stride": 2, "padding": (0, 2**30)},
    ):
        with pytest.raises(ProblemError, match=r"width=.*at most 2147418112"):
            Problem(**arguments)


# --- what follows from it ---------------------------------------------------------------------


def test_from_shapes_gives_the_problem_back():
    for problem in problem_set():
        again = Problem.from_shapes(
            problem.input_shape, problem.weight_shape, problem.bias_shape, **problem.arguments
        )
        assert again == problem


def test_a_problem_is_a_value():
    problem = Problem(width=5, stride=(1, 2))
    assert problem == Problem(width=5, stride=[1, 2])
    assert len({problem, Problem(width=5, stride=(1, 2)), Problem(width=6)}) == 2
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert dataclasses.replace(problem, width=7).out_width == 13
    assert eval(repr(problem)) == problem
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.width = 6


def test_flops_are_those_of_the_flop_counter():
    for problem in problem_set()[::3]:
        with FlopCounterMode(display=False) as counter:
            call_torch(problem)
        assert problem.flops == counter.get_total_flops()


def test_multiply_adds_are_the_terms_of_all_outputs():
    for problem in problem_set():
        # With ones everywhere an output is the number of its terms.
        terms = call_torch(dataclasses.replace(problem, bias=False), "cpu").sum()
        assert problem.multiply_adds == terms
        assert 2 * problem.multiply_adds <= problem.flops


def test_the_example_in_the_docstring():
    assert doctest.testmod(sys.modules[Problem.__module__]) == (0, 2)


def test_compulsory_bytes():
    problem = Problem(
        batch=2, in_channels=3, out_channels=5, height=7, width=11, kernel_size=(2, 3), bias=True
    )
    assert problem.compulsory_bytes == 4 * (2 * 3 * 7 * 11 + 3 * 5 * 2 * 3 + 5 + 2 * 5 * 8 * 13)


def test_the_star():
    star = Problem.named("star")
    assert star.output_shape == (8, 64, 514, 518)
    assert star.weight_shape == (64, 64, 3, 7)
    assert star.bias_shape is None
    assert star.arguments == {
        "stride": (1, 1),
        "padding": (0, 0),
        "output_padding": (0, 0),
        "groups": 1,
        "dilation": (1, 1),
    }
    assert star.flops == 360_777_252_864
    assert 2 * star.multiply_adds == star.flops
    assert star.compulsory_bytes == 1_082_499_072


def test_named_problems():
    assert Problem.names() == ("star", "classic", "star_small", "channels_small", "strided_small")
    assert Problem.named("classic").input_shape == (16, 32, 128, 128)
    assert Problem.named("classic").weight_shape == (32, 64, 3, 7)
    assert Problem.named("star_small").input_shape == (1, 8, 16, 24)
    strided = Problem.named("strided_small")
    assert (strided.stride, strided.padding, strided.output_padding) == ((2, 2), (1, 1), (1, 1))
    for name in Problem.names():
        assert Problem.named(name).kernel_size == (3, 7)
    with pytest.raises(ProblemError, match=r"'moon'.*'star', 'classic', 'star_small'"):
        Problem.named("moon")


def test_random_inputs():
    problem = Problem(
        batch=3,
        in_channels=8,
        out_channels=6,
        height=20,
        width=30,
        kernel_size=5,
        groups=2,
        bias=True,
    )
    x, weight, bias = problem.random_inputs(seed=3)
    assert (tuple(x.shape), tuple(weight.shape)) == (problem.input_shape, problem.weight_shape)
    assert tuple(bias.shape) == problem.bias_shape
    assert x.dtype == weight.dtype == bias.dtype == torch.float32
    assert x.std() == pytest.approx(1, rel=0.05)
    assert weight.std() == pytest.approx(1 / np.sqrt(4 * 25), rel=0.1)
    generator = np.random.default_rng(3)
    assert (x.numpy() == generator.standard_normal(x.shape, dtype=np.float32)).all()
    # Without a bias the other two are the same.
    x_again, weight_again, no_bias = dataclasses.replace(problem, bias=False).random_inputs(3)
    assert no_bias is None
    assert torch.equal(x, x_again)
    assert torch.equal(weight, weight_again)
    assert not torch.equal(x, problem.random_inputs(seed=4)[0])
    assert problem.random_inputs(device="meta")[1].device.type == "meta"


# --- one axis ---------------------------------------------------------------------------------

axes = st.builds(
    Axis,
    size=st.integers(1, 9),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 12),
    padding=st.integers(0, 12),
    dilation=st.integers(1, 12),
    out_size=st.integers(1, 40),
)


@SETTINGS
@given(axes)
def test_taps_are_the_pairs_that_meet(axis):
    total = 0
    for o in range(axis.out_size):
        meeting = [
            (k, i)
            for k in range(axis.kernel)
            for i in range(axis.size)
            if i * axis.stride + k * axis.dilation == o + axis.padding
        ]
        assert axis.taps(o) == meeting
        total += len(meeting)
    assert axis.multiply_adds == total


@SETTINGS
@given(axes)
def test_steps_and_inverse_are_what_a_kernel_needs(axis):
    common = axis.common
    assert axis.stride % common == axis.dilation % common == 0
    assert axis.k_step * common == axis.stride
    assert axis.i_step * common == axis.dilation
    assert 0 <= axis.inverse < axis.k_step
    assert axis.inverse * axis.i_step % axis.k_step == 1 % axis.k_step
    for o in range(axis.out_size):
        pairs = axis.taps(o)
        if pairs:
            k0 = (o + axis.padding) // common * axis.inverse % axis.k_step
            assert (pairs[0][0] - k0) % axis.k_step == 0
        for (k, i), (next_k, next_i) in itertools.pairwise(pairs):
            assert (next_k - k, next_i - i) == (axis.k_step, -axis.i_step)


def test_axes_of_a_problem_are_rows_and_columns():
    problem = Problem(
        height=4,
        width=9,
        kernel_size=(3, 5),
        stride=(2, 3),
        padding=(1, 2),
        dilation=(3, 2),
        output_padding=(2, 1),
    )
    rows, columns = problem.axes
    assert rows == Axis(size=4, kernel=3, stride=2, padding=1, dilation=3, out_size=13)
    assert columns == Axis(size=9, kernel=5, stride=3, padding=2, dilation=2, out_size=30)
    assert (problem.out_height, problem.out_width) == (13, 30)
