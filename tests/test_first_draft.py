"""The book's first draft: each mistake is in it, its mend takes it out, and the rest is right.

The checks themselves are the chapter's, book/drafts/checks.py.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab.reference import FLOAT32_GATE, condition_error, scatter

sys.path.append(str(Path(__file__).resolve().parent.parent / "book"))
from drafts import checks
from drafts.versions import MENDS, Draft

each_mend = pytest.mark.parametrize("name", [mend.name for mend in MENDS])


def test_every_mistake_has_a_mend_and_a_check():
    assert list(checks.CHECKS) == [mend.name for mend in MENDS]


@each_mend
def test_a_mistake_is_found_and_its_mend_takes_it_out(name):
    before = Draft.without(name)
    after = before.mend(name)
    assert checks.outcome(name, before).startswith("fails: ")
    assert checks.outcome(name, after) == "passes"
    assert checks.blamed() is None  # a refused launch leaves nothing behind


@each_mend
def test_no_mend_brings_back_an_earlier_mistake(name):
    draft = Draft.without(name).mend(name)
    names = list(checks.CHECKS)
    outcomes = {each: checks.outcome(each, draft) for each in names[: names.index(name) + 1]}
    assert set(outcomes.values()) == {"passes"}, outcomes


def test_a_mend_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="has not once 'TILE_H = 16;'"):
        Draft.mended().mend("tile")


def test_the_weight_layout_hides_behind_symmetric_weights():
    """The draft is right where both channel counts are equal and w[i, o] is w[o, i]."""
    draft, problem = Draft.read(), lab.Problem(2, 3, 3, height=4, width=5, kernel_size=(2, 3))
    x, weight, _ = inputs(problem)
    symmetric = (weight + weight.transpose(0, 1)) / 2
    for kernel, is_right in ((weight, False), (symmetric.contiguous(), True)):
        error = condition_error(draft(x, kernel), x, kernel)
        assert (error <= FLOAT32_GATE) == is_right


def test_output_padding_shifts_the_draft_by_itself():
    draft = Draft.without("output padding")
    problem = lab.Problem(height=4, width=5, kernel_size=3, stride=2, output_padding=1)
    x, weight, _ = inputs(problem, kind="small_integers")
    y = draft(x, weight, **problem.arguments).double().numpy()
    expected = scatter(x, weight, **problem.arguments)
    np.testing.assert_array_equal(y[..., :-1, :-1], expected[..., 1:, 1:])


def test_the_draft_can_be_launched_as_it_stands():
    """As a learner would: the kernel by its name, with arrays and numbers."""
    x, w = np.float32([[[[1, 2, 3]]]]), np.float32([[[[1, 10, 100]]]])
    y = np.full((1, 1, 1, 7), np.nan, np.float32)
    numbers = (1, 1, 1, 1, 3, 1, 7, 1, 3, 1, 2, 0, 0, 0, 0, 1, 1, 1)
    program = lab.compile(Draft.read().cuda)
    program.launch("first_draft_kernel", (1, 1, 1), (16, 16), [x, w, None, y, *numbers])
    assert y.astype(int).tolist() == [[[[1, 10, 102, 20, 203, 30, 300]]]]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_tally_is_of_the_taps_and_divisions_in_the_text(stride):
    problem = lab.Problem(1, 2, 3, 5, 6, kernel_size=(2, 3), stride=stride, padding=1)
    outputs = int(np.prod(problem.output_shape))
    tried, divided = Draft.without("taps").tally(problem)
    assert (tried, divided) == (outputs * 2 * 6, 4 * tried)
    tried, divided = Draft.mended().tally(problem)
    report = Draft.mended().profile(problem)
    assert report.fma == problem.multiply_adds <= tried < outputs * 2 * 6 / stride**2 * 1.5
    # Outside the loops: two axes, each at most once to find the step, `stride` times the first
    # tap, and twice to find the input.
    assert 0 < divided <= outputs * 2 * (2 * stride + 2)


def test_the_mended_draft_agrees_with_float64_on_random_problems():
    draft = Draft.mended()
    wrong = {}
    for number, problem in enumerate(problem_set(300)):
        x, weight, bias = inputs(problem, seed=number)
        y = draft(x, weight, bias, **problem.arguments)
        error = condition_error(y, x, weight, bias, **problem.arguments)
        if not error <= FLOAT32_GATE:
            wrong[problem] = error
    assert wrong == {}


@pytest.mark.parametrize("bias", [True, False])
def test_the_mended_layer_takes_the_place_of_pytorchs(bias):
    theirs = torch.nn.ConvTranspose2d(4, 6, (3, 5), 2, 1, 1, groups=2, bias=bias)
    ours = Draft.mended().layer(4, 6, (3, 5), 2, 1, 1, groups=2, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
