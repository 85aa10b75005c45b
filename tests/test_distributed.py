"""Several ranks give what one process gives, and end together.

The ranks are processes on the CPU, connected by gloo, and on GPUs, connected by NCCL. Each world
starts once and runs all of `distributed_cases`.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES

import convt_lab as lab
from convt_lab.distributed import RowPlan, conv_transpose2d_rows

#: Seconds that a world may take; some times what it needs on two cores.
LIMIT = 300


def run_world(ranks, folder, names, limit, device="cpu"):
    """Run cases on new ranks; return each rank's exit status, output and outcomes."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("distributed_cases.py")),
                device,
                str(rank),
                str(ranks),
                str(folder),
                *names,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    end = time.monotonic() + limit
    results = []
    try:
        for rank, process in enumerate(processes):
            try:
                output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                output += f"\nended by the test after {limit} s"
            path = folder / f"{rank}.json"
            outcomes = json.loads(path.read_text()) if path.exists() else {}
            results.append((process.returncode, output, outcomes))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", 2), id="2-ranks"),
        pytest.param(("cpu", 4), id="4-ranks"),
        pytest.param(("cuda", 2), id="2-gpus", marks=pytest.mark.gpu),
        pytest.param(("cuda", 4), id="4-gpus", marks=pytest.mark.gpu),
    ],
)
def world(request, tmp_path_factory):
    device, ranks = request.param
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return run_world(ranks, tmp_path_factory.mktemp("world"), list(CASES), LIMIT, device)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_one_process(world, name):
    for rank, (_, output, outcomes) in enumerate(world):
        outcome = outcomes.get(name, f"not reached; the rank wrote:\n{output[-3000:]}")
        assert outcome == "passed", f"rank {rank}: {outcome}"


def test_all_ranks_end_well(world):
    assert [status for status, _, _ in world] == [0] * len(world)


@pytest.mark.parametrize(
    ("ranks", "name"), [(4, "a_rank_dies"), (2, "a_rank_dies_where_heights_are_asked_for")]
)
def test_a_rank_that_dies_ends_the_others(ranks, name, tmp_path):
    start = time.monotonic()
    results = run_world(ranks, tmp_path, [name], 45)
    # Less than the ranks' patience: they noticed, and did not wait in vain.
    assert time.monotonic() - start < 45
    for rank, (status, output, outcomes) in enumerate(results):
        assert status == (7 if rank == 1 else 1), (rank, output)
        if rank != 1:
            assert f"ExchangeError: rank {rank} of {ranks} could not" in outcomes[name]
            assert "has died" in outcomes[name]


def test_a_rank_that_is_late_ends_the_others(tmp_path):
    results = run_world(2, tmp_path, ["a_rank_is_late"], 20)
    status, output, outcomes = results[0]
    assert status == 1, output
    seconds = float(output.split("gave up after ")[1].split(" s")[0])
    assert 1.4 < seconds < 4
    assert "rank 0 of 2 could not" in outcomes["a_rank_is_late"]
    assert "in 1.5 s: that rank has died or failed, is late" in outcomes["a_rank_is_late"]


class TestTheExample:
    script = str(Path(__file__).parents[1] / "examples" / "distributed.py")

    def run(self, *command):
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=90, check=False
        )

    def test_it_checks_itself_and_counts_bytes(self):
        done = self.run(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", self.script),
            *("--height=13", "--width=12", "--channels=6", "--steps=1", "--stride=2"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows, images, channels = (
            [
                line.split()
                for line in done.stdout.splitlines()
                if line.startswith(f"{split} ") and "rank" in line
            ]
            for split in ("rows", "images", "channels")
        )
        assert [len(rows), len(images), len(channels)] == [2, 2, 2]
        # One row of 2 images, 6 channels and (12 - 1) * 2 + 7 columns, and its gradient back.
        assert [line[-2] for line in rows] == [f"{2 * 6 * 29 * 4:,}"] * 2
        assert [line[-2] for line in images + channels] == ["0"] * 4
        # The gradients of weight and bias; and of all the input.
        assert [line[-1] for line in rows + images] == [f"{(6 * 6 * 3 * 7 + 6) * 4:,}"] * 4
        assert [line[-1] for line in channels] == [f"{2 * 6 * 13 * 12 * 4:,}"] * 2

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [(["--height=0"], "--height=0: it must be at least 1"), ([], "start it with torchrun")],
    )
    def test_it_says_what_is_wrong(self, arguments, error):
        done = self.run(self.script, *arguments)
        assert done.returncode == 2
        assert error in done.stderr


def test_without_a_group_the_error_says_what_to_call():
    x = lab.Problem(batch=1, in_channels=1, out_channels=1, height=2, width=2).random_inputs()
    with pytest.raises(
        ValueError, match=r"group=None .* call torch.distributed.init_process_group"
    ):
        conv_transpose2d_rows(*x)


def test_importing_the_package_imports_nothing_of_this():
    """It would take ten times as long."""
    script = (
        "import sys, torch; before = set(sys.modules); import convt_lab; "
        "print(*[name for name in set(sys.modules) - before if name.startswith('torch.dist') "
        "or name.startswith('torch._dynamo') or name == 'convt_lab.distributed'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


class TestRowPlan:
    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("dilation", [1, 2])
    @pytest.mark.parametrize("kernel", [1, 2, 3, 5])
    def test_the_overlap_is_as_derived(self, stride, dilation, kernel):
        problem = lab.Problem(
            batch=1,
            in_channels=1,
            out_channels=1,
            height=40,
            width=4,
            kernel_size=(kernel, 1),
            stride=stride,
            dilation=dilation,
        )
        plan = RowPlan.for_heights(problem, [10, 13, 17])
        overlap = max(0, (kernel - 1) * dilation + 1 - stride)
        assert [len(plan.sent(0, 1)), len(plan.sent(1, 2))] == [overlap, overlap]
        assert [len(plan.sent(0, 2)), len(plan.sent(1, 0)), len(plan.sent(2, 1))] == [0, 0, 0]
        sent = problem.out_width * overlap * 4
        assert [plan.bytes_sent(rank) for rank in range(3)] == [sent, sent, 0]
        assert [plan.bytes_sent(rank, backward=True) for rank in range(3)] == [0, sent, sent]

    @pytest.mark.parametrize("heights", [[5], [2, 3], [0, 5, 0], [1, 0, 4], [0, 0, 0, 0, 5]])
    @pytest.mark.parametrize("padding", [0, 1, 3])
    def test_rows_are_owned_once(self, heights, padding):
        problem = lab.Problem(
            batch=1,
            in_channels=1,
            out_channels=1,
            height=5,
            width=4,
            kernel_size=(4, 3),
            stride=2,
            padding=(padding, 0),
            output_padding=(1, 0),
        )
        for plan in (
            RowPlan.for_heights(problem, heights),
            RowPlan.for_chunks(problem, len(heights)),
        ):
            owned = [row for rows in plan.output_rows for row in rows]
            assert owned == list(range(problem.out_height))
            had = [row for rows in plan.input_rows for row in rows]
            assert had == list(range(problem.height))

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda p: RowPlan.for_heights(p, [2, 2]), ValueError, "[2, 2] are 4 rows: they must"),
            (lambda p: RowPlan.for_heights(p, [6, -1]), ValueError, "heights[1]=-1: it must be at"),
            (lambda p: RowPlan.for_heights(p, [2.5] * 2), TypeError, "heights[0]=2.5 must be an"),
            (lambda p: RowPlan.for_heights(p, 5), TypeError, "heights=5 must be a sequence"),
            (lambda p: RowPlan.for_heights(None, [5]), TypeError, "problem=None must be a Problem"),
            (lambda p: RowPlan.for_chunks(p, 0), ValueError, "ranks=0: it must be at least 1"),
            (lambda p: RowPlan.for_chunks([5], 1), TypeError, "problem=[5] must be a Problem"),
        ],
    )
    def test_wrong_arguments(self, make, error, message):
        with pytest.raises(error, match=re.escape(message)):
            make(lab.Problem(height=5))

    def test_ranks_count_as_sequences_do(self):
        plan = RowPlan.for_heights(lab.Problem(height=5, kernel_size=3), [2, 3])
        assert plan.bytes_sent(-2) == plan.bytes_sent(0) > plan.bytes_sent(-1) == 0
        with pytest.raises(IndexError):
            plan.bytes_sent(2)

    def test_a_rank_without_rows_owns_none(self):
        problem = lab.Problem(batch=1, in_channels=1, out_channels=1, height=5, width=4)
        plan = RowPlan.for_heights(problem, [0, 2, 0, 3, 0])
        assert [bool(rows) for rows in plan.output_rows] == [False, True, False, True, False]
