"""The record of the kernels on tensor cores: what is measured, and what is written."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_bench import FakeClock

import convt_lab as lab
from convt_lab import records
from convt_lab.bench import Instruments
from convt_lab.reference import tf32_gate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import tensor_core_times as tool

RECORDS = sorted(records.FOLDER.glob("*-tensor-cores.json"))


def tools(clock):
    return Instruments("cpu", clock, None, lambda call: 0)


def test_every_way_is_judged_and_timed():
    clock, problem = FakeClock(0.002), lab.Problem(2, 16, 16, 6, 7, kernel_size=(3, 2))
    entry = tool.measure(problem, tools(clock))
    names = [row["name"] for row in entry["rows"]]
    assert names == [way.name for way in tool.ways()] == list(dict.fromkeys(names))
    for row in entry["rows"]:
        assert (row["cold_ms"], row["sustained_ms"]) == (2.0, 2.0)
        assert row["sm_clock_mhz"] is None
        assert list(row["errors"]) == list(tool.KINDS)
        # On the simulator Hopper's kernels sum by the definition.
        rounds = row["dtype"] == "float16" or row["kernel"] in ("tensor_core", tool.PYTORCH)
        for kind, errors in row["errors"].items():
            # Tensor cores cut off, which errs to one side where nothing cancels (test_kernels.py).
            most = 1.75 if kind in ("positive", "channels") else 1.0
            assert rounds or errors["condition"] <= most * entry["gate"]
            assert errors["relative_l2"] < 2e-3
    assert lab.Problem(**entry["problem"]) == problem
    json.dumps(entry, allow_nan=False)


def test_a_result_that_is_not_finite_is_no_record(monkeypatch):
    def broken(*data, **arguments):
        y = torch.nn.functional.conv_transpose2d(*data, **arguments)
        y[-1, -1, -1, -1] = math.nan
        return y

    monkeypatch.setattr(tool, "kernels", {**tool.kernels, "hopper": broken})
    problem = lab.Problem(1, 16, 16, 4, 4)
    with pytest.raises(ArithmeticError, match="hopper, float32 on normal inputs"):
        tool.measure(problem, tools(FakeClock()))


def test_the_distributions():
    problem = lab.Problem(1, 32, 8, 9, 9)
    by_kind = {kind: tool.drawn(problem, kind, 0, "cpu") for kind in tool.KINDS}
    x, weight = by_kind["normal"]
    assert max(x.min(), weight.min()) < 0
    assert min(t.min() for t in by_kind["positive"]) >= 0
    assert by_kind["lognormal"][0].min() > 0 > by_kind["lognormal"][1].min()
    sizes = (by_kind["channels"][0].abs().amax((0, 2, 3)) / x.abs().amax((0, 2, 3))).log10()
    assert sizes.min() < -2 < 2 < sizes.max()


def test_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        tool.main([])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
class TestRecords:
    def test_all_is_there(self, path):
        record = json.loads(path.read_text())
        assert list(record["problems"]) == list(tool.PROBLEMS)
        for name, entry in record["problems"].items():
            assert entry["problem"] == json.loads(json.dumps(asdict(lab.Problem.named(name))))
            rows = {row["name"]: row for row in entry["rows"]}
            assert list(rows) == [way.name for way in tool.ways()]
            for row in rows.values():
                assert min(row["samples_ms"]) <= row["cold_ms"] <= max(row["samples_ms"])
                most = max(2 * row["cold_ms"], 1.5 * row["enqueue_ms"])
                assert 0.5 * row["cold_ms"] < row["sustained_ms"] < most

    def test_errors_are_what_the_arithmetic_allows(self, path):
        for entry in json.loads(path.read_text())["problems"].values():
            problem = lab.Problem(**entry["problem"])
            terms = problem.in_channels * math.prod(problem.kernel_size)
            for row in entry["rows"]:
                for kind, errors in row["errors"].items():
                    if row["kernel"] == "pytorch":
                        continue
                    if row["dtype"] == "float16" or row["allow_tf32"]:
                        assert errors["condition"] <= tf32_gate(terms), row["name"]
                    elif kind != "positive":  # where cutting off errs to one side
                        assert errors["condition"] <= entry["gate"], (row["name"], kind)
