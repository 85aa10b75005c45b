"""The operator's record and the tables made from it: what is written is what is read."""

import copy
import json
import math

import pytest
from records_for_tests import record as ladder_record

from convt_lab import Problem, measurements, operator_record, records
from convt_lab.measure import Timing
from convt_lab.measurements import Measurement
from convt_lab.operator_record import Case, Cold, OperatorRecord, Result
from convt_lab.records import RecordError, RowErrors

PROBLEM = Problem(2, 4, 6, 8, 10, kernel_size=(3, 7), bias=True)
RIGHT = RowErrors(3e-7, 2.0, 8.0)
FORM = ("float32", "contiguous", False)


def result(seconds, **changes):
    return Result(**{"errors": RIGHT, "cold": Cold(seconds, 20, 0.001), **changes})


def case(operator=0.001, pytorch=0.002, form=FORM, shape="one", problem=PROBLEM, choice="ours"):
    wrong = result(1, status="wrong", errors=RowErrors(math.inf, 1e5, 8.0), cold=None)
    broken = Result("failed", "KernelError: it stopped")
    kernels = {"ours": result(operator), "wrong": wrong, "broken": broken}
    beside = Cold(pytorch, 20, 0.0)
    return Case(
        *(shape, problem, *form, result(pytorch), kernels, result(operator), choice, beside)
    )


def record(*cases):
    gpu = records.GPU("NVIDIA H200", (9, 0), 132, 150 * 10**9, 60 * 2**20, 700.0)
    software = records.Software("0.1.0", "2.11.0", "13.0", "9.19.0")
    return OperatorRecord(gpu, software, "2026-11-25", 0, 100.0, {"cold": "a median"}, cases)


RECORD = record(
    case(),
    case(form=("float16", "channels_last", True)),
    Case("two", Problem(), *FORM, pytorch=Result("failed", "RuntimeError: no")),
)
JSON = operator_record.to_json(RECORD)


class TestFiles:
    def test_what_is_saved_is_loaded(self, tmp_path):
        path = tmp_path / "records" / "nvidia-h200-operator.json"
        operator_record.save(RECORD, path)
        assert operator_record.load(path) == RECORD
        assert operator_record.names(path.parent) == ["nvidia-h200-operator"]
        assert records.names(path.parent) == ()

    def test_an_invalid_record_is_not_written(self, tmp_path):
        path = tmp_path / "a.json"
        with pytest.raises(RecordError, match=r"shape and form"):
            operator_record.save(record(case(), case()), path)
        assert not path.exists()

    def test_a_timing_is_summarised(self):
        timing = Timing((1.0, 2.0, 4.0))
        assert Cold.of(timing) == Cold(2.0, 3, timing.spread)


def at(value, place):
    for step in place:
        value = value[step]
    return value


CASE = ("cases", 0)
WRONG = [
    (("schema",), 2, "schema = 2: must be 1"),
    (("cases",), {}, "cases = {}: must be a list"),
    ((*CASE, "dtype"), "bfloat16", "must be one of"),
    ((*CASE, "color"), 1, r"cases\[0\]\.color is no field"),
    (("cases", 1, "allow_tf32"), False, "must be true, as dtype is float16"),
    ((*CASE, "kernels", "pytorch"), JSON["cases"][0]["pytorch"], "without pytorch"),
    ((*CASE, "choice"), "theirs", r"choice = \"theirs\": must be one of \"pytorch\", \"ours\""),
    ((*CASE, "choice"), None, "null if operator is null, and only then"),
    ((*CASE, "pytorch_beside"), None, "null if operator is null, and only then"),
    ((*CASE, "pytorch", "cold", "seconds"), 0, "above 0"),
    ((*CASE, "kernels", "ours", "cold", "runs"), 0, "at least 1"),
    ((*CASE, "kernels", "ours", "errors", "condition"), 9.0, "wrong, as errors.condition"),
    ((*CASE, "kernels", "wrong", "status"), "ok", "wrong, as errors.condition"),
    ((*CASE, "operator", "errors", "condition"), 9.0, "wrong, as errors.condition"),
    ((*CASE, "kernels", "broken", "failure"), None, "a text if status is failed"),
    ((*CASE, "operator", "errors"), None, "an object, as status is ok"),
    ((*CASE, "kernels", "wrong", "cold"), {"seconds": 1.0, "runs": 1, "spread": 0}, "must be null"),
]


class TestChecks:
    @pytest.mark.parametrize(("place", "value", "words"), WRONG)
    def test_what_is_wrong_is_named(self, place, value, words):
        changed = copy.deepcopy(JSON)
        at(changed, place[:-1])[place[-1]] = value
        with pytest.raises(RecordError, match=words):
            operator_record.from_json(changed)

    @pytest.mark.parametrize("field", list(JSON["cases"][0]))
    def test_what_is_missing_is_named(self, field):
        changed = copy.deepcopy(JSON)
        del changed["cases"][0][field]
        with pytest.raises(RecordError, match=rf"cases\[0\]\.{field} is missing"):
            operator_record.from_json(changed)

    def test_pytorch_is_not_gated_even_as_the_operators_choice(self):
        rough = result(0.001, errors=RowErrors(1e-3, 900.0, 8.0))
        made = record(Case("one", PROBLEM, *FORM, rough, {}, rough, "pytorch", Cold(1.0, 5, 0.0)))
        assert operator_record.from_json(operator_record.to_json(made)) == made

    def test_the_right_record_is_right(self):
        assert operator_record.from_json(JSON) == RECORD


class TestNumbers:
    def test_speedups(self):
        assert case(operator=0.001, pytorch=0.003).speedup == pytest.approx(3)
        assert RECORD.cases[2].speedup is None
        made = record(
            case(0.001, 0.004, shape="a"),
            case(0.001, 0.001, shape="b"),
            case(0.001, 0.016, shape="c"),
        )
        assert made.geometric_mean(FORM) == pytest.approx(4)
        assert made.worst(FORM).shape == "b"
        other = ("float32", "contiguous", True)
        assert made.geometric_mean(other) is made.worst(other) is None

    def test_the_best_is_right(self):
        assert case(operator=0.001).best == "ours"
        assert case(operator=0.003).best == "pytorch"
        assert RECORD.cases[2].best is None


class TestMeasurements:
    def test_of_the_operators_record(self):
        table = measurements.table_of(RECORD)
        plain = Problem(2, 4, 6, 8, 10, kernel_size=(3, 7))
        assert (table.gpu, table.compute_capability) == ("NVIDIA H200", (9, 0))
        assert table.measurements == (
            Measurement(plain, "float32", False, False, 0.002, {"ours": 0.001}),
            Measurement(plain, "float16", True, False, 0.002, {"ours": 0.001}),
        )

    def test_of_the_ladders_record(self):
        table = measurements.table_of(ladder=ladder_record(), leave_out=["first"])
        assert [(m.problem.batch, m.tf32, m.pytorch) for m in table.measurements] == [
            (2, False, 0.004),
            (1, False, 0.004),
        ]
        assert {tuple(m.kernels) for m in table.measurements} == {("second",)}

    def test_the_operators_record_comes_first(self):
        star = ladder_record().shapes[0].problem
        both = measurements.table_of(
            record(case(pytorch=0.5, problem=star)), ladder=ladder_record()
        )
        assert len(both.measurements) == 2
        (one,) = [m for m in both.measurements if m.problem == star]
        assert one.pytorch == 0.5

    def test_of_a_folder(self, tmp_path):
        records.save(ladder_record(), tmp_path / "nvidia-h200.json")
        (tmp_path / "nvidia-h200-profiles.json").write_text("{}")
        (table,) = measurements.tables_of_records(tmp_path)
        assert len(table.measurements) == 2
        operator_record.save(RECORD, tmp_path / "nvidia-h200-operator.json")
        operator_record.save(RECORD, tmp_path / "nvidia-t4-operator.json")
        near = record(case(problem=Problem(3), shape="near"), case(pytorch=7.0))
        operator_record.save(near, tmp_path / "nvidia-h200-neighbours.json")
        one, two = measurements.tables_of_records(tmp_path)
        assert records.names(tmp_path) == ("nvidia-h200",)
        assert one.gpu == two.gpu == "NVIDIA H200"
        assert len(one.measurements) == 2 + 1 + 1  # the ladder's star is the operator's `one`
        assert [m.problem for m in one.measurements[:3]].count(Problem(3)) == 1
        assert 7.0 not in {m.pytorch for m in one.measurements}
        assert {m.dtype for m in one.measurements} == {"float32", "float16"}
        assert len(two.measurements) == 2

    def test_what_is_saved_is_loaded(self, tmp_path):
        tables = [measurements.table_of(RECORD)]
        path = tmp_path / "data" / "dispatch.json"
        measurements.save(tables, path)
        assert measurements.load(path) == tuple(tables)
        assert len(path.read_text().splitlines()) == 2 + 1 + 2 + 1

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ('"schema": 1', '"schema": 7', "schema = 7: must be 1"),
            ('"tf32": false', '"tf32": true', "must be false, as dtype is float16"),
            ('"float16"', '"float8"', r"measurements\[1\]\.dtype"),
            ("0.001", "-1", r"kernels\.ours = -1: must be a finite number above 0"),
            ("[9, 0]", "[9]", "a list of two integers"),
            ('"height": 8', '"height": 0', r"problem: height=0"),
            ('"what"', '"why"', "what is missing"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, old, new, words):
        text = measurements.as_text([measurements.table_of(RECORD)])
        path = tmp_path / "dispatch.json"
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(RecordError, match=words):
            measurements.load(path)

    def test_a_gpu_has_one_table(self, tmp_path):
        table = measurements.table_of(RECORD)
        with pytest.raises(RecordError, match="another than those before it"):
            measurements.save([table, table], tmp_path / "a.json")
        assert not list(tmp_path.iterdir())

    def test_the_best(self):
        made = Measurement(PROBLEM, "float32", False, False, 2.0, {"a": 1.0, "b": 0.5, "c": 3.0})
        assert made.best() == "b"
        assert made.best(["a", "c"]) == "a"
        assert made.best(["c"]) == made.best([]) == "pytorch"
        assert (made.ratio("a"), made.ratio("pytorch")) == (2.0, 1.0)

    def test_the_numbers_are_json(self):
        json.loads(measurements.as_text([measurements.table_of(RECORD)]))
