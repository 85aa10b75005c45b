"""The random problems cover what a kernel can get wrong, and are the same every time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from strategies import MAX_TRIED_TAPS, SETTINGS, inputs, problem_set, problems

from convt_lab.problem import Problem
from convt_lab.reference import condition_scale

PRIMES = {7, 11, 13, 17, 23, 31, 37, 61, 67, 101, 131, 257}


def drawn_by_hypothesis() -> list[Problem]:
    drawn = []

    @SETTINGS
    @given(problems())
    def collect(problem):
        drawn.append(problem)

    collect()
    return drawn


@pytest.fixture(scope="module", params=["problem_set", "hypothesis"])
def drawn(request) -> list[Problem]:
    return list(problem_set()) if request.param == "problem_set" else drawn_by_hypothesis()


def is_fast(problem: Problem) -> bool:
    """Whether the kernel compiled for 3 x 7 takes this problem."""
    return problem.kernel_size == (3, 7) and problem.stride == (1, 1) and problem.dilation == (1, 1)


def per_group(problem: Problem) -> tuple[int, int]:
    return problem.in_channels // problem.groups, problem.out_channels // problem.groups


FEATURES = {
    **{f"stride {s}": (lambda p, s=s: s in p.stride, 40) for s in (1, 2, 3, 4)},
    **{f"dilation {d}": (lambda p, d=d: d in p.dilation, 40) for d in (1, 2, 3)},
    "stride and dilation share a factor": (lambda p: any(a.common > 1 for a in p.axes), 40),
    "different strides": (lambda p: p.stride[0] != p.stride[1], 40),
    "output padding": (lambda p: any(p.output_padding), 40),
    "output padding not below the stride": (
        lambda p: any(o >= s for o, s in zip(p.output_padding, p.stride, strict=True)),
        20,
    ),
    "groups with several channels": (lambda p: p.groups > 1 and min(per_group(p)) > 1, 30),
    "depthwise": (lambda p: p.groups == p.in_channels > 1, 30),
    "many input channels": (lambda p: per_group(p)[0] >= 8, 30),
    "many output channels": (lambda p: per_group(p)[1] > 32, 10),
    "padding past the kernel": (
        lambda p: any(
            pad > a.dilation * (a.kernel - 1) + 1 for pad, a in zip(p.padding, p.axes, strict=True)
        ),
        20,
    ),
    "no padding": (lambda p: p.padding == (0, 0), 20),
    "batch 0": (lambda p: p.batch == 0, 5),
    "batch 3": (lambda p: p.batch == 3, 20),
    "width 1": (lambda p: p.width == 1, 20),
    "height 1": (lambda p: p.height == 1, 20),
    "prime sizes": (lambda p: p.width in PRIMES or p.height in PRIMES, 60),
    "wider than a block": (lambda p: p.out_width > 128, 20),
    "1 x 1 kernel": (lambda p: p.kernel_size == (1, 1), 5),
    "5 x 9 kernel": (lambda p: p.kernel_size == (5, 9), 5),
    "bias": (lambda p: p.bias, 80),
    "no bias": (lambda p: not p.bias, 80),
    "3 x 7 fast": (is_fast, 30),
    "3 x 7 fast with padding": (lambda p: is_fast(p) and any(p.padding), 15),
    "3 x 7 fast with groups": (lambda p: is_fast(p) and p.groups > 1, 10),
    "3 x 7 fast, C_out no multiple of 8": (lambda p: is_fast(p) and per_group(p)[1] % 8, 15),
    "3 x 7 fast, wide": (lambda p: is_fast(p) and p.out_width > 64, 5),
    "3 x 7 not fast": (lambda p: p.kernel_size == (3, 7) and not is_fast(p), 5),
    "something to add": (lambda p: p.multiply_adds > 1000, 150),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_there(drawn, feature):
    has_it, least = FEATURES[feature]
    assert sum(bool(has_it(problem)) for problem in drawn) >= least


def test_problems_are_many_and_small(drawn):
    assert len(drawn) == 300
    assert len(set(drawn)) >= 280
    assert max(problem.multiply_adds for problem in drawn) <= MAX_TRIED_TAPS
    for problem in drawn:
        assert all(1 <= stride <= 4 for stride in problem.stride)
        assert all(1 <= dilation <= 3 for dilation in problem.dilation)
        assert max(problem.kernel_size) <= 9


def test_problem_set_is_the_same_in_another_process():
    there = subprocess.run(
        [sys.executable, "-c", "import strategies; print(strategies.problem_set())"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert there == repr(problem_set())


def test_problem_set_is_distinct_and_cheapest_first():
    costs = [problem.multiply_adds for problem in problem_set()]
    assert len(set(problem_set())) == 300
    assert costs == sorted(costs)


def test_small_integers_have_sums_that_float32_holds_exactly():
    for problem in problem_set():
        x, weight, bias = inputs(problem, seed=1, kind="small_integers")
        assert (x == x.round()).all()
        assert (weight == weight.round()).all()
        scale = condition_scale(x, weight, bias, **problem.arguments)
        assert np.max(scale, initial=0) < 2**24


def test_inputs_are_deterministic_and_kinds_are_checked():
    problem = Problem(batch=2, in_channels=3, width=50, bias=True)
    for kind in ("normal", "small_integers"):
        first, again, other = (inputs(problem, seed, kind) for seed in (0, 0, 1))
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert not (first[0] == other[0]).all()
    with pytest.raises(ValueError, match="'uniform'"):
        inputs(problem, kind="uniform")
