"""The cost model: its bytes are those that are sent, and its seconds follow from rates."""

import math
import re
from dataclasses import replace

import pytest

from convt_lab import Problem, operator_record, records, scaling
from convt_lab.distributed import RowPlan
from convt_lab.scaling import Machine

STAR = Problem.named("star")
MACHINE = Machine(flops_per_second=1e12, bytes_per_second=1e9)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_the_overlap_is_what_a_plan_sends(kernel, stride, dilation):
    problem = Problem(
        height=40, kernel_size=(kernel, 1), stride=(stride, 1), dilation=(dilation, 1)
    )
    plan = RowPlan.for_heights(problem, [20, 20])
    assert len(plan.sent(0, 1)) == scaling.overlap(kernel, stride, dilation)


@pytest.mark.parametrize("bias", [True, False])
def test_bytes_of_each_split(bias):
    problem = replace(STAR, bias=bias)
    parameters = (64 * 64 * 21 + 64 * bias) * 4 * 2 * 7 / 8
    assert scaling.bytes_sent(problem, "images", 8) == (0, parameters)
    output, input = math.prod(problem.output_shape) * 4, math.prod(problem.input_shape) * 4
    assert scaling.bytes_sent(problem, "input channels", 8) == (
        output * 2 * 7 / 8,
        64 * 4 * 2 * 7 / 8 * bias,
    )
    assert scaling.bytes_sent(problem, "output channels", 8) == (0, input * 2 * 7 / 8)
    rows = 8 * 64 * 2 * 518 * 4
    assert scaling.bytes_sent(problem, "rows", 8) == (rows, rows + parameters)
    assert scaling.bytes_sent(problem, "rows", 8, element_size=2)[0] == rows / 2
    for split in scaling.SPLITS:
        assert scaling.bytes_sent(problem, split, 1) == (0, 0)


@pytest.mark.parametrize("height", [3, 8, 21])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_bytes_of_rows_are_the_plans(height, padding, stride):
    problem = Problem(
        height=height, kernel_size=(5, 3), stride=stride, padding=(padding, 0), dilation=(2, 1)
    )
    for ranks in (1, 2, 5, 9):
        heights = [height // ranks + (rank < height % ranks) for rank in range(ranks)]
        plan = RowPlan.for_heights(problem, heights)
        forward, backward = (
            max(plan.bytes_sent(rank, backward=way) for rank in range(ranks))
            for way in (False, True)
        )
        weight = scaling.bytes_sent(problem, "images", ranks)[1]
        assert scaling.bytes_sent(problem, "rows", ranks) == (forward, backward + weight)


def test_rows_of_ranks_that_have_fewer_than_the_kernel_go_further():
    problem = Problem(height=8, kernel_size=(7, 1))
    forward, _ = scaling.bytes_sent(problem, "rows", 8)
    # Each has a row, adds to seven and owns one; the last owns all that it adds to.
    assert forward == 6 * problem.out_channels * problem.width * 4


def test_the_work_of_a_rank():
    assert scaling.flops_of_a_rank(STAR, 1) == (STAR.flops, 2 * STAR.flops)
    assert scaling.flops_of_a_rank(STAR, 4) == (STAR.flops / 4, STAR.flops / 2)


def test_a_prediction_is_made_of_its_parts():
    one = scaling.predict(STAR, 1, MACHINE)
    assert (one.strip, one.exchange) == (0, 0)
    assert one.seconds == one.alone == STAR.flops / 1e12
    assert one.efficiency == 1
    two = scaling.predict(STAR, 2, MACHINE)
    assert two.interior == pytest.approx(one.seconds / 2)
    assert two.strip == pytest.approx(one.seconds / 512 * 2)
    assert two.exchange == pytest.approx(8 * 64 * 2 * 518 * 4 / 1e9)
    assert two.seconds == two.strip + two.interior
    assert two.efficiency == pytest.approx(256 / 258)
    slow = scaling.predict(STAR, 2, replace(MACHINE, bytes_per_second=1e7))
    assert slow.seconds == slow.strip + slow.exchange > two.seconds
    late = scaling.predict(STAR, 2, replace(MACHINE, message=3.0))
    assert late.seconds == late.strip + 3.0 + two.exchange
    fixed = scaling.predict(STAR, 2, replace(MACHINE, call=2.0))
    assert fixed.strip == 2.0


def test_a_strip_costs_by_the_stride_and_nothing_where_stamps_do_not_meet():
    strided = replace(STAR, stride=2)
    row = strided.flops / strided.height / 1e12
    assert scaling.predict(strided, 4, MACHINE).strip == pytest.approx(row / 2)
    apart = scaling.predict(replace(STAR, stride=3), 4, replace(MACHINE, call=1.0, message=1.0))
    assert (apart.strip, apart.exchange, apart.efficiency) == (0, 0, pytest.approx(1))


def test_uneven_rows_wait_for_the_rank_with_most():
    assert scaling.predict(replace(STAR, height=9), 8, MACHINE).interior == pytest.approx(
        2 * STAR.flops / 512 / 1e12
    )


@pytest.mark.parametrize("tf32", [False, True])
def test_a_machine_has_the_rates_of_the_operators_record(tf32):
    record = operator_record.load(records.FOLDER / "nvidia-h200-operator.json")
    machine = scaling.machine_of(record, STAR, 5e10, tf32)
    cases = record.of_form(("float32", "contiguous", tf32))
    case = next(case for case in cases if case.shape.startswith("star"))
    assert machine.flops_per_second == STAR.flops / case.operator.seconds
    assert (machine.bytes_per_second, machine.message) == (5e10, 0)
    same = [c.kernels[case.choice].seconds for c in cases if case.choice in c.kernels]
    assert machine.call == min(seconds for seconds in same if seconds is not None)
    with pytest.raises(ValueError, match=r"batch=9.* is not in the record of NVIDIA H200"):
        scaling.machine_of(record, replace(STAR, batch=9), 5e10, tf32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.bytes_sent(STAR, "columns", 2), "split='columns': must be one of 'images"),
        (lambda: scaling.bytes_sent(STAR, "rows", 0), "ranks=0: it must be at least 1"),
        (lambda: scaling.predict(STAR, True, MACHINE), "ranks=True must be an integer"),
        (lambda: scaling.flops_of_a_rank(STAR, 1.5), "ranks=1.5 must be an integer"),
        (lambda: Machine(0, 1), "flops_per_second=0 must be above 0"),
        (lambda: Machine(1, math.nan), "bytes_per_second=nan must be above 0"),
        (lambda: Machine(1, 1, call=-1), "call=-1 must be at least 0"),
        (lambda: Machine(1, 1, message=-1), "message=-1 must be at least 0"),
    ],
)
def test_wrong_arguments(call, message):
    error = TypeError if "must be an integer" in message else ValueError
    with pytest.raises(error, match=re.escape(message)):
        call()
