"""`tools/distributed_times.py` measures and writes what it says, tried on CPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from convt_lab.distributed import RowPlan
from convt_lab.problem import Problem

TOOL = Path(__file__).parents[1] / "tools" / "distributed_times.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "record.json"
    done = run("--cpus", "2", "--output", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_all_cases_are_measured_on_one_rank_and_on_two(record):
    found = [(row["case"], row["ranks"], row["allow_tf32"]) for row in record["rows"]]
    assert found == [
        (case, ranks, allow_tf32)
        for allow_tf32 in (False, True)
        for case in ("images", "rows", "tall")
        for ranks in (1, 2)
    ]


def test_ranks_agree(record):
    for row in record["rows"]:
        assert 0 <= row["error"] < 1e-5, row
        assert row["error"] == 0 or row["ranks"] == 2


def test_weak_and_strong_scaling(record):
    rows = {(row["case"], row["ranks"]): row["problem"] for row in record["rows"]}
    assert rows["images", 2]["batch"] == 2 * rows["images", 1]["batch"]
    assert rows["rows", 2]["height"] == 2 * rows["rows", 1]["height"]
    assert rows["tall", 2] == rows["tall", 1]


def test_only_rows_are_sent(record):
    for row in record["rows"]:
        is_split = row["case"] != "images" and row["ranks"] == 2
        assert ("ms_without_exchange" in row) == is_split
        if is_split:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in row["problem"].items()}
            problem = Problem(**values)
            plan = RowPlan.for_heights(problem, [problem.height // 2] * 2)
            assert row["bytes_sent"] == [plan.bytes_sent(0), 0]


def test_one_gpu_is_too_few():
    done = run("--cpus", "1")
    assert done.returncode == 1
    assert "scaling is measured on 2 or more" in done.stderr
