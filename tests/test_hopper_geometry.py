"""Where Hopper's kernels read and store, checked on any CPU, which has none of their instructions.

The simulator runs these kernels by the definition, so it sees nothing of the flat axis, the taps'
distances, the stripes, pairs of phases and bundles. `hopper_geometry.cu` follows all of that in
plain loops, with the kernels' own plan, tasks and steps.
"""

import ctypes
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convt_lab as lab
from convt_lab import Problem
from convt_lab.stages import _ConvTransposeProblem, kernels

SOURCE = Path(__file__).with_name("hopper_geometry.cu")
KERNELS = [name for name, kernel in kernels.items() if kernel.architecture == "9.0a"]
#: The ways to cut a problem that kernels choose from, and how many phases their tasks have.
PHASES = {"hopper": {1}, "hopper_pairs": {2}, "hopper_single": {1, 2}}
RIGHT, NOT_COVERED = 0, 1


@pytest.fixture(scope="module")
def library():
    return lab.compile(SOURCE.read_text(), "simulator", name="hopper_geometry").library


def emulated(library, kernel, problem, in_bundles=False):
    """Emulate a kernel on small integers; returns whether it can, and what its plan is like."""
    draw = np.random.default_rng(0)
    shapes = problem.input_shape, problem.weight_shape
    x, weight = (draw.integers(-8, 9, shape).astype(float) for shape in shapes)
    y, about = np.full(problem.output_shape, np.nan), np.zeros(4, np.int32)
    result = library[f"emulate_{kernel}"](
        *(ctypes.c_void_p(array.ctypes.data) for array in (x, weight, y)),
        _ConvTransposeProblem.of(problem),
        ctypes.c_bool(in_bundles),
        ctypes.c_void_p(about.ctypes.data),
    )
    names = "pair", "bundle", "stripes", "unit"
    plan = dict(zip(names, about.tolist(), strict=True))
    if result == NOT_COVERED:
        return None
    assert result == RIGHT, (result, problem, plan)
    exact = F.conv_transpose2d(*map(torch.from_numpy, (x, weight)), **problem.arguments).numpy()
    assert np.array_equal(y, exact), (problem, plan)
    return plan


def can_pair(problem):
    """Whether outputs of two phases are neighbours in rows, and see the same inputs."""
    columns = problem.axes[1]
    phases = min(columns.stride, problem.output_shape[3])
    sees_all = all(axis.i_step == 1 for axis in problem.axes)
    return sees_all and phases % 2 == 0 and problem.output_shape[3] % 2 == 0


def problems(kernel, count, seed=0):
    """Draw small problems that all kernels cover, this one in its own way, many of them strided."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        groups = draw.choice([1, 1, 1, 2])
        try:
            problem = Problem(
                batch=draw.choice([1, 2, 3]),
                in_channels=groups * draw.choice([16, 20, 24, 40]),
                out_channels=groups * draw.choice([16, 18, 70]),
                height=draw.randint(1, 9),
                width=draw.choice([1, 2, 5, 8, 11, 14, 40, 90, 300, 700]),
                kernel_size=(draw.randint(1, 5), draw.randint(1, 7)),
                stride=(draw.choice([1, 2, 2, 3, 4]), draw.choice([1, 2, 2, 3, 4])),
                padding=(draw.randint(0, 3), draw.randint(0, 3)),
                dilation=(draw.choice([1, 1, 1, 2]), draw.choice([1, 1, 1, 3])),
                groups=groups,
            )
        except lab.ProblemError:
            continue
        is_covered = all(kernels[name].covers(problem) for name in KERNELS)
        if is_covered and (1 in PHASES[kernel] or can_pair(problem)):
            found.append(problem)
    return found


@pytest.mark.parametrize("kernel", PHASES)
@pytest.mark.parametrize("in_bundles", [False, True])
def test_each_output_is_its_sum_and_stored_once(library, kernel, in_bundles):
    plans = [emulated(library, kernel, problem, in_bundles) for problem in problems(kernel, 60)]
    plans = [plan for plan in plans if plan]
    kinds = {(p["pair"], p["bundle"] > 1, p["stripes"] > 1, p["unit"]) for p in plans}
    assert {kind[0] for kind in kinds} == PHASES[kernel]
    assert in_bundles in {kind[1] for kind in kinds}
    assert {kind[2] for kind in kinds} == {False, True}
    assert {kind[3] for kind in kinds} == {1, 2}


@pytest.mark.parametrize("kernel", PHASES)
def test_every_stride_kernel_and_padding_along_a_row(library, kernel):
    for stride, width, size, padding in itertools.product((1, 2, 4), (3, 6), (1, 2, 5), (0, 1, 2)):
        arguments = dict(kernel_size=(1, size), stride=(1, stride), padding=(0, padding))
        try:
            problem = Problem(2, 16, 16, 2, width, **arguments)
        except lab.ProblemError:
            continue
        assert bool(emulated(library, kernel, problem)) == (
            1 in PHASES[kernel] or can_pair(problem)
        )
