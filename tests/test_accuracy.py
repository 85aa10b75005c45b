"""`tools/accuracy.py` judges rightly, and finds what is wrong; here on the simulator."""

import json
import sys
from pathlib import Path

import pytest
import torch

import convt_lab as lab
from convt_lab.ladder import exact
from convt_lab.stages import kernels

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import accuracy  # noqa: E402

PROBLEM = accuracy.SMALL[0]


def judged(kind, change, way=None):
    """Change what is right, and judge that."""
    inputs = accuracy.drawn(PROBLEM, kind, 0, "cpu")
    truth = exact(*inputs, **PROBLEM.arguments)
    way = way or accuracy.Way("coalesced")
    actual = change(truth.expected.to(way.dtype))
    return accuracy.error_of(way, actual, truth, PROBLEM, kind)


@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_what_is_rounded_once_is_right(kind):
    for way in (
        accuracy.Way("coalesced"),
        accuracy.Way("tensor_core", torch.float16),
        accuracy.Way("tensor_core", torch.bfloat16),
    ):
        if way.precision in accuracy.KINDS[kind]:
            error, gate = judged(kind, lambda right: right, way)
            assert error <= gate


@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_what_is_wrong_is_not(kind):
    error, gate = judged(kind, lambda right: right * 1.01)
    assert error > gate
    error, gate = judged(kind, lambda right: torch.full_like(right, torch.nan))
    assert not error <= gate
    way = accuracy.Way("tensor_core", torch.bfloat16)
    if way.precision in accuracy.KINDS[kind]:
        error, gate = judged(kind, lambda right: right * 1.02, way)
        assert error > gate


def test_lost_denormals_are_found():
    smallest = torch.finfo(torch.float32).smallest_normal
    error, gate = judged("denormal", lambda right: torch.where(right.abs() < smallest, 0.0, right))
    assert error > gate


def test_nan_in_place_of_infinity_is_found():
    assert judged("not finite", lambda right: right.nan_to_num(torch.nan, torch.nan))[0] == float(
        "inf"
    )


def test_the_worst_problem_counts():
    errors = {}
    for error in (2.0, 5.0, 3.0):
        accuracy.add(errors, "normal", error, 8.0, 8.0)
    assert errors["normal"] == {
        "error": 5.0, "gate": 8.0, "share": 0.625, "bound": 8.0, "covered": 3
    }  # fmt: skip
    accuracy.add(errors, "normal", float("nan"), 8.0, 8.0)
    rows = [{"kernel": "coalesced", "precision": "float32", "errors": errors}]
    assert accuracy.failures(rows) == [
        "coalesced in float32 on normal inputs: error nan, at most 8 is right"
    ]
    rows[0]["kernel"] = "pytorch"
    assert accuracy.failures(rows) == []


def test_only_sums_of_one_sign_or_wide_range_are_judged_by_the_bound():
    way = accuracy.Way("coalesced")
    terms = 16 * 3 * 7
    assert accuracy.bound_of(way, PROBLEM, "positive", 8.0) == terms + 2
    assert accuracy.bound_of(way, PROBLEM, "normal", 8.0) == 8.0
    tf32 = accuracy.Way("tensor_core", allow_tf32=True)
    assert accuracy.bound_of(tf32, PROBLEM, "positive", 9000.0) == 9000.0


def test_every_kernel_and_dtype_is_judged():
    found = {(way.kernel, way.dtype) for way in accuracy.ways([*kernels, "operator"])}
    assert found == {
        *((name, dtype) for name, kernel in kernels.items() for dtype in kernel.dtypes),
        *(("operator", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    }


def test_a_run(tmp_path, capsys):
    path = tmp_path / "record.json"
    accuracy.main(["--device=cpu", f"--output={path}", "--kernels", "coalesced", "one_channel"])
    record = json.loads(path.read_text())
    assert [(row["kernel"], row["dtype"]) for row in record["rows"]] == [
        ("coalesced", "float32"),
        ("one_channel", "float32"),
        ("one_channel", "float16"),
        ("one_channel", "bfloat16"),
    ]
    assert set(record["rows"][0]["errors"]) == set(accuracy.KINDS)
    assert lab.Problem(**{
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record["problems"][0].items()
    }) == PROBLEM  # fmt: skip
    assert "coalesced, float32" in capsys.readouterr().out


class TestThePromise:
    """What book/api.md says is what the record holds."""

    rows = json.loads((ROOT / "records" / "nvidia-h200-accuracy.json").read_text())["rows"]
    page = (ROOT / "book" / "api.md").read_text()

    def test_what_is_promised_is_kept(self):
        assert accuracy.promise(self.rows) in self.page
        (broken,) = accuracy.failures(self.rows)
        assert broken.startswith("winograd in float32 on wide inputs")

    def test_pytorch_leaves_the_gate_too(self):
        (row,) = (r for r in self.rows if r["kernel"] == "pytorch" and r["precision"] == "float32")
        for kind in ("positive", "lognormal", "channels", "wide"):
            assert row["errors"][kind]["share"] > 1
