"""The record of several GPUs: its schema, what follows from it, and the one in the repository."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
from distributed_record_for_tests import made_json

from convt_lab import distributed_record, records
from convt_lab.distributed import RowPlan
from convt_lab.records import RecordError

PATHS = sorted(records.FOLDER.glob("*-distributed.json"))
each_record = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def made(**counts):
    return distributed_record.from_json(made_json(**counts))


def changed(row: int, **fields) -> dict:
    value = made_json()
    value["rows"][row] |= fields
    return value


# --- reading --------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written():
    value = made_json()
    record = distributed_record.from_json(json.loads(json.dumps(value)))
    assert (record.gpu, record.gpus, record.link) == ("NVIDIA Test", 4, "NV18")
    assert len(record.rows) == len(value["rows"])
    for row, written in zip(record.rows, value["rows"], strict=True):
        assert (row.case, row.ranks, row.allow_tf32) == (
            written["case"],
            written["ranks"],
            written["allow_tf32"],
        )
        assert row.ms == written["ms"]
        assert row.ms_without_exchange == written.get("ms_without_exchange", row.ms)
        assert list(row.bytes_sent) == written.get("bytes_sent", [])
        assert [e.hidden for e in row.exchange] == [
            e["hidden_us"] for e in written.get("exchange", [])
        ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (changed(0, ms=7.0), r"rows[0].ms = 7.0: must be the median of rows[0].rounds_ms"),
        (changed(0, error="inf"), 'rows[0].error = "inf": must be a finite number'),
        (changed(0, case="wide"), 'must be one of "images", "rows", "tall"'),
        (changed(1, ranks=1), "must be the only row of its case, ranks and allow_tf32"),
        (changed(0, ranks=8), "must be beside a row of the same case on one GPU"),
        (changed(1, bytes_sent=[1, 2]), "bytes_sent is no field of this schema"),
        (changed(4, bytes_sent=[1]), "must be a list of 2, one for each rank"),
        (
            changed(4, exchange=[{"sent_us": 1, "hidden_us": 2, "call_us": 3}] * 2),
            "must be hidden_us at most sent_us, and that at most call_us",
        ),
        (
            changed(4, exchange=[{"sent_us": 1, "hidden_us": None, "call_us": 3}] * 2),
            "must be sent_us and hidden_us that are both null, or neither",
        ),
        (made_json() | {"gpus": 1}, "gpus = 1: must be an integer of at least 2"),
        (made_json() | {"schema": 2}, "schema = 2: must be 1"),
        ({**made_json(), "software": {"torch": "2"}}, "software.convt_lab is missing"),
    ],
)
def test_what_is_not_as_the_schema_says_is_refused(value, message):
    with pytest.raises(RecordError, match=re.escape(message)):
        distributed_record.from_json(value)


# --- what follows ---------------------------------------------------------------------------------


def test_efficiency_is_of_weak_or_of_strong_scaling():
    record = made()
    assert record.efficiency(record.row("rows", 1)) == 1
    assert record.efficiency(record.row("rows", 4)) == 8 / 8.375
    assert record.efficiency(record.row("images", 2, allow_tf32=True)) == 4 / 4.125
    assert record.efficiency(record.row("tall", 4)) == pytest.approx(8 / 4 / 2.375)
    with pytest.raises(KeyError, match="no row of 'tall' on 8 GPUs with allow_tf32=False"):
        record.row("tall", 8)


def test_tables_have_a_line_for_each_row():
    record = made(counts=(1, 2))
    lines = distributed_record.times(record).splitlines()
    assert len(lines) == 1 + len(record.rows)
    assert lines[0].split() == [
        *("case", "GPUs", "TF32", "ms", "spread", "efficiency", "none", "sent"),
        *("usual", "priority", "MB", "error"),
    ]
    tall = next(line.split() for line in lines if line.startswith("tall") and " 2 " in line)
    assert tall == [
        *("tall", "2", "off", "4.125", "2.0%", "0.970"),
        *("4.062", "4.156", "4.00", "1e-07"),
    ]
    lines = distributed_record.exchanges(record).splitlines()
    assert len(lines) == 1 + 2 * sum(bool(row.exchange) for row in record.rows)
    assert lines[2].split() == ["rows", "2", "off", "1", "40", "31", "78%"]


def test_a_profile_in_which_no_kernel_sends():
    unseen = {"sent_us": None, "hidden_us": None, "call_us": 900.0}
    record = distributed_record.from_json(changed(4, exchange=[unseen] * 2))
    lines = distributed_record.exchanges(record).splitlines()
    assert lines[1].split() == ["rows", "2", "off", "0", "-", "-", "-"]


# --- the repository's -----------------------------------------------------------------------------


@each_record
def test_a_record_is_whole_and_its_parts_agree(path):
    record = distributed_record.load(path)
    value = json.loads(path.read_text())
    counts = sorted({row.ranks for row in record.rows})
    assert counts == [count for count in (1, 2, 4, 8) if count <= record.gpus]
    assert len(record.rows) == len(counts) * len(distributed_record.CASES) * 2
    assert all(math.isfinite(row.error) for row in record.rows)
    for row, written in zip(record.rows, value["rows"], strict=True):
        # TF32 is as far from itself in another order of sums as float32 is.
        assert row.error < 1e-4
        alone = record.row(row.case, 1, row.allow_tf32)
        grown = replace(alone.problem, **_growth(row.case, alone.problem, row.ranks))
        assert row.problem == grown
        expected = statistics.median(alone.rounds_ms) / statistics.median(row.rounds_ms)
        expected /= row.ranks if row.case == "tall" else 1
        assert record.efficiency(row) == pytest.approx(expected)
        if row.bytes_sent:
            plan = RowPlan.for_heights(row.problem, [row.problem.height // row.ranks] * row.ranks)
            assert list(row.bytes_sent) == [plan.bytes_sent(rank) for rank in range(row.ranks)]
            assert written["kernel"] == row.kernel


def _growth(case, problem, ranks):
    return {
        "images": {"batch": problem.batch * ranks},
        "rows": {"height": problem.height * ranks},
        "tall": {},
    }[case]
