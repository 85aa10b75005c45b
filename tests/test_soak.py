"""`tools/soak.py` finds what differs and what grows; here on CPUs, where PyTorch computes."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import soak  # noqa: E402


@pytest.fixture(autouse=True)
def same_setting():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


def test_a_short_one(tmp_path):
    path = tmp_path / "record.json"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "soak.py"), "--device=cpu"),
            *("--calls=60", "--problems=5", f"--output={path}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # Other tests build kernels meanwhile, and the files of the cache are counted.
        env=os.environ | {"CONVT_LAB_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    assert record["calls"] == 60
    assert record["mismatches"] == 0
    assert [count["after"] for count in record["counts"]] == list(range(0, 61, 6))
    assert sum(record["kernels"].values()) == 2 * record["problems"]


def test_a_result_that_differs_is_counted():
    job = soak.Job(random.Random(1), "cpu")
    assert job.wrong(job.call()) == 0
    output = job.call()
    output.view(-1)[-1] = float("nan")
    assert job.wrong(output) == 1
    assert job.wrong(output.transpose(2, 3)) == output.numel()


def test_what_a_thread_raises_is_raised():
    job = soak.Job(random.Random(1), "cpu")
    job.call = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        soak.Team([soak.Worker([job], 0, [])]).step("calls", 1)


def test_growth_is_told():
    before = soak.Counts.taken("cpu")
    held = [open(__file__) for _ in range(3)]  # noqa: SIM115
    try:
        grown = soak.Counts.taken("cpu").grown_since(before)
    finally:
        for file in held:
            file.close()
    assert grown["files"] == 3
    after = replace(before, process_bytes=before.process_bytes + soak.SLACK)
    assert after.grown_since(before) == {}
    after = replace(before, allocated_bytes=1, process_bytes=before.process_bytes + 2 * soak.SLACK)
    assert set(after.grown_since(before)) == {"allocated_bytes", "process_bytes"}


def test_failures_are_told():
    counts = soak.Counts.taken("cpu")
    first = {"after": 0, **soak.asdict(counts)}
    last = {"after": 9, **soak.asdict(replace(counts, files=counts.files + 2))}
    found = {"mismatches": 7, "calls": 9, "counts": [first, last]}
    assert soak.failures(found) == [
        "7 elements differ from the first call's",
        "files has grown by 2 in 9 calls",
    ]
