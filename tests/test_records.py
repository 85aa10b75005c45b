"""Records: what is written is what is read, and whatever is wrong in a file is named."""

import copy
import json
import math
import subprocess
import sys

import pytest
from records_for_tests import record, stage, untimed

from convt_lab import records
from convt_lab.records import RecordError

RECORD = record()
JSON = records.to_json(RECORD)


class TestFiles:
    def test_what_is_saved_is_loaded(self, tmp_path):
        path = tmp_path / "new" / "nvidia-h200.json"
        records.save(RECORD, path)
        assert records.load(path) == RECORD
        assert records.load_named("nvidia-h200", path.parent) == RECORD
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_the_samples_are_on_one_line(self, tmp_path):
        path = tmp_path / "a.json"
        records.save(RECORD, path)
        assert '"samples_seconds": [0.008, 0.008, 0.008, 0.008, 0.016]\n' in path.read_text()

    def test_measurements_lose_no_digit_that_they_have(self):
        row = stage("first", 1 / 3)
        kept = records.to_json(
            record(shapes=(records.Shape("s", RECORD.shapes[0].problem, (row,)),))
        )
        again = records.from_json(kept).shapes[0].row("first")
        assert again.seconds() == pytest.approx(1 / 3, rel=1e-6)
        assert again.seconds() != 1 / 3

    def test_an_invalid_record_is_not_written(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("before")
        with pytest.raises(RecordError, match="seed = -1"):
            records.save(record(seed=-1), path)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("step", ["write", "rename"])
    def test_what_was_there_outlives_a_failed_write(self, tmp_path, monkeypatch, step):
        path = tmp_path / "a.json"
        records.save(RECORD, path)

        def full(*arguments):
            raise OSError("no space left")

        if step == "write":
            monkeypatch.setattr(records.os, "fsync", full)
        else:
            monkeypatch.setattr(records.Path, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            records.save(record(seed=5), path)
        assert records.load(path) == RECORD
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
    def test_no_json(self, tmp_path, content):
        path = tmp_path / "a.json"
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"a\.json: is no JSON"):
            records.load(path)

    def test_a_name_that_is_not_there(self, tmp_path):
        (tmp_path / "nvidia-t4.json").touch()
        (tmp_path / "nvidia-t4-counters.json").touch()
        (tmp_path / "nvidia-h200.json.partial").touch()
        assert records.names(tmp_path) == ("nvidia-t4",)
        with pytest.raises(RecordError, match=r"no record 'nvidia-h200' in .*: 'nvidia-t4'$"):
            records.load_named("nvidia-h200", tmp_path)

    @pytest.mark.parametrize(
        ("gpu", "slug"),
        [
            ("NVIDIA H200", "nvidia-h200"),
            ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
            (" Tesla T4 (x) ", "tesla-t4-x"),
        ],
    )
    def test_slug(self, gpu, slug):
        assert records.slug(gpu) == slug

    def test_the_folder_is_the_repositorys(self):
        assert (records.FOLDER / "nvidia-h200-counters.json").is_file()
        assert (records.FOLDER.parent / "pyproject.toml").is_file()

    def test_the_package_alone_does_not_import_it(self):
        code = "import sys, convt_lab; sys.exit('convt_lab.bench' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestAccess:
    def test_rows_and_their_times(self):
        row = RECORD.shape("star").row("second")
        assert row.time_ms() == row.time_ms("cold") == 2.0
        assert row.time_ms("sustained") == pytest.approx(2.2)
        wrong = RECORD.shape("star").row("wrong")
        assert wrong.time_ms() is wrong.time_ms("sustained") is None
        assert not wrong.is_right
        with pytest.raises(ValueError, match="how='warm'"):
            row.time_ms("warm")

    def test_rates(self):
        star = RECORD.shape("star")
        flops = star.problem.flops
        assert star.tflops("second") == pytest.approx(flops / 0.002 / 1e12)
        assert star.tflops("wrong") is None
        assert star.speedup("second") == 2.0
        assert star.speedup("first") == 0.5
        assert star.speedup("second", over="first") == 4.0
        assert star.speedup("broken") is star.speedup("first", over="broken") is None
        assert star.speedup("first", over="unmeasured") is None

    def test_ceilings(self):
        assert RECORD.ceilings.fp32_fma == pytest.approx(6e13)
        assert RECORD.ceilings["fp32_fma"].rate("sustained") == pytest.approx(4.8e13)
        assert RECORD.ceilings.gemm_tf32 is None  # the GPU has none
        assert RECORD.ceilings.gemm_float16 is None  # not measured
        with pytest.raises(AttributeError, match="no ceiling 'fp64'; there are fp32_fma"):
            _ = RECORD.ceilings.fp64
        share = RECORD.share_of_fma("star", "second")
        assert share == pytest.approx(RECORD.shape("star").problem.flops / 0.002 / 6e13)
        assert RECORD.share_of_fma("star", "wrong") is None
        assert record(ceilings=records.Ceilings()).share_of_fma("star", "second") is None

    def test_curves(self):
        first, second = RECORD.growth["batch"]
        assert (first.value, second.value) == (1, 2)
        assert second.best.name == "second"
        pixels = 2 * 10 * 16
        assert second.seconds_per_pixel(second.best) == pytest.approx(0.01 / pixels)
        assert second.seconds_per_pixel(None) is None
        assert second.name == "batch 2"

    def test_the_best_is_a_stage_that_is_right(self):
        rows = (stage("slow", 0.9), untimed("broken", "failed", failure="x"))
        point = records.Point("batch 1", RECORD.shapes[0].problem, rows, 1)
        assert point.best.name == "slow"
        assert records.Point("batch 1", point.problem, rows[1:], 1).best is None

    def test_names_that_are_not_there(self):
        with pytest.raises(KeyError, match="no shape 'moon'; there are: 'star'"):
            RECORD.shape("moon")
        with pytest.raises(KeyError, match="no row 'third' on star; there are: 'first', 'second'"):
            RECORD.shape("star").row("third")

    def test_an_infinite_error_survives(self):
        text = json.dumps(JSON, allow_nan=False)
        assert records.from_json(json.loads(text)) == RECORD
        assert RECORD.shape("star").row("wrong").errors.relative_l2 == math.inf


DELETE = object()

# The place, what is put there, and what is said about it.
CORRUPTIONS = [
    ("schema", DELETE, "schema is missing: it must be 1"),
    ("schema", 2, "schema = 2: must be 1"),
    ("schema", True, "schema = true: must be 1"),
    ("what", "", 'what = "": must be a text that is not empty'),
    ("color", "red", "color is no field of this schema: it must be one of schema, what, gpu"),
    ("gpu", [], "gpu = []: must be an object"),
    ("gpu.name", DELETE, "gpu.name is missing"),
    ("gpu.name", 3, "gpu.name = 3: must be a text"),
    ("gpu.compute_capability", [9], "gpu.compute_capability = [9]: must be a list of two integers"),
    ("gpu.compute_capability", 9.0, "gpu.compute_capability = 9.0: must be a list"),
    ("gpu.multiprocessors", 0, "gpu.multiprocessors = 0: must be an integer of at least 1"),
    ("gpu.memory_bytes", 1.5, "gpu.memory_bytes = 1.5: must be an integer of at least 1"),
    ("gpu.l2_bytes", -1, "gpu.l2_bytes = -1: must be an integer of at least 0"),
    ("gpu.power_limit_watts", 0, "gpu.power_limit_watts = 0: must be a finite number above 0"),
    ("gpu.power_limit_watts", 10**400, "must be a finite number above 0"),
    ("gpu.max_sm_clock_mhz", "fast", 'gpu.max_sm_clock_mhz = "fast": must be a finite number'),
    ("gpu.driver", 580, "gpu.driver = 580: must be a text"),
    ("software.cudnn", None, "software.cudnn = null: must be a text"),
    ("date", "25.11.2026", 'date = "25.11.2026": must be a date in the form YYYY-MM-DD'),
    ("date", 20261125, "date = 20261125: must be a text"),
    ("seed", True, "seed = true: must be an integer of at least 0"),
    ("seconds", math.nan, "seconds = NaN: must be a finite number of at least 0"),
    ("parts.1", "shape", 'parts[1] = "shape": must be one of "ceilings", "shapes", "growth"'),
    ("parts", ["ceilings", "growth"], "must be empty, because parts does not name shapes"),
    ("meaning.cold", 1, "meaning.cold = 1: must be a text"),
    ("ceilings.fp64", None, "ceilings.fp64 is unknown: it must be one of fp32_fma, copy"),
    ("ceilings.copy.unit", "FLOP", 'ceilings.copy.unit = "FLOP": must be one of "byte"'),
    ("ceilings.copy.work", 0, "ceilings.copy.work = 0: must be an integer of at least 1"),
    ("ceilings.copy.cold", None, "ceilings.copy.cold = null: must be an object"),
    ("ceilings.copy.cold.samples_seconds", [], "samples_seconds = []: must be a list of at least"),
    ("shapes", {}, "shapes = {}: must be a list"),
    ("shapes.0.name", None, "shapes[0].name = null: must be a text"),
    ("shapes.0.problem.stride", DELETE, "shapes[0].problem.stride is missing"),
    ("shapes.0.problem.kernel_size", [0, 3], "shapes[0].problem: kernel_size=(0, 3): each value"),
    ("shapes.0.problem.batch", "2", "shapes[0].problem: batch='2' must be an integer"),
    ("shapes.0.rows.1.name", "first", 'rows[1].name = "first": must be another than those before'),
    ("shapes.0.rows.0.kind", "kernel", 'kind = "kernel": must be one of "stage", "pytorch"'),
    ("shapes.0.rows.0.dtype", "float64", 'rows[0].dtype = "float64": must be one of "float32"'),
    ("shapes.0.rows.0.memory_format", "NHWC", 'memory_format = "NHWC": must be one of'),
    ("shapes.0.rows.4.allow_tf32", 1, "shapes[0].rows[4].allow_tf32 = 1: must be true or false"),
    ("shapes.0.rows.4.name", "cudnn", 'name = "cudnn": must be one of cudnn_float32, cudnn_float3'),
    ("shapes.0.rows.4.dtype", "float16", 'name = "cudnn_float32": must be that of dtype float16'),
    ("shapes.0.rows.0.status", "wrong", 'status = "wrong": must be ok, as errors.condition is at'),
    ("shapes.0.rows.2.status", "ok", 'status = "ok": must be wrong, as errors.condition is above'),
    ("shapes.0.rows.0.status", "fine", 'status = "fine": must be one of "ok", "wrong", "failed"'),
    ("shapes.0.rows.3.failure", None, "rows[3].failure = null: must be a text if status is failed"),
    ("shapes.0.rows.0.failure", "x", 'rows[0].failure = "x": must be a text if status is failed'),
    ("shapes.0.rows.0.errors", None, "rows[0].errors = null: must be an object, as status is ok"),
    ("shapes.0.rows.0.errors.relative_l2", -1e-7, "errors.relative_l2 = -1e-07: must be a finite"),
    ("shapes.0.rows.0.errors.condition", "nan", 'condition = "nan": must be a finite number'),
    ("shapes.0.rows.0.errors.gate", 0, "errors.gate = 0: must be a finite number above 0"),
    ("shapes.0.rows.0.cold.samples_seconds.3", 0, "cold.samples_seconds[3] = 0: must be a finite"),
    ("shapes.0.rows.0.cold.median_seconds", 0.009, "must be the median of samples_seconds, 0.008"),
    ("shapes.0.rows.2.cold", JSON["shapes"][0]["rows"][0]["cold"], "null, as status is wrong"),
    ("shapes.0.rows.0.sustained.runs", 0, "sustained.runs = 0: must be an integer of at least 1"),
    ("shapes.0.rows.0.sustained.seconds", None, "sustained.seconds = null: must be a finite"),
    ("shapes.0.rows.0.sustained.power_watts", -1, "power_watts = -1: must be a finite number of"),
    ("shapes.0.rows.0.peak_bytes", -1, "rows[0].peak_bytes = -1: must be an integer of at least 0"),
    ("growth.width", [], "growth.width is unknown: it must be one of batch, side, channels"),
    ("growth.batch.1.value", 1, "growth.batch[1].value = 1: must be an integer of at least 2"),
    ("growth.batch.1.rows", None, "growth.batch[1].rows = null: must be a list"),
]


def corrupted(place, value):
    changed = copy.deepcopy(JSON)
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    target = changed
    for key in path:
        target = target[key]
    if value is DELETE:
        del target[last]
    else:
        target[last] = value
    return changed


class TestChecks:
    def test_the_record_itself_is_right(self):
        assert records.from_json(copy.deepcopy(JSON)) == RECORD

    @pytest.mark.parametrize(("place", "value", "message"), CORRUPTIONS)
    def test_what_is_wrong_is_named(self, place, value, message):
        with pytest.raises(RecordError) as caught:
            records.from_json(corrupted(place, value), "nvidia-h200.json")
        text = str(caught.value)
        assert text.startswith("nvidia-h200.json: ")
        assert message in text
        assert "\n" not in text

    def test_every_field_must_be_there(self):
        for place in places(JSON):
            with pytest.raises(RecordError):
                records.from_json(corrupted(place, DELETE))

    def test_no_field_takes_anything(self):
        for place in places(JSON):
            with pytest.raises(RecordError):
                records.from_json(corrupted(place, {"a": [1]}))

    @pytest.mark.parametrize("value", [None, [], "record", 1])
    def test_a_file_with_something_else(self, value):
        with pytest.raises(RecordError, match=r"the file = .*: must be an object"):
            records.from_json(value)

    def test_two_shapes_of_one_name(self):
        with pytest.raises(RecordError, match=r'shapes\[1\]\.name = "star": must be another'):
            records.from_json(records.to_json(record(shapes=RECORD.shapes * 2)))

    def test_a_long_value_is_cut(self):
        with pytest.raises(RecordError) as caught:
            records.from_json(corrupted("gpu", ["x" * 1000]))
        assert len(str(caught.value)) < 200


def places(value, path=""):
    """Every field that is not optional, by its path: not the names of a mapping's entries."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, f"{path}.{i}")
    if isinstance(value, dict):
        for name, item in value.items():
            place = f"{path}.{name}".lstrip(".")
            if path not in ("meaning", "ceilings", "growth"):
                yield place
            yield from places(item, place)


def test_every_record_that_is_kept_is_valid():
    kept = records.names()
    assert kept
    for name in kept:
        record = records.load_named(name)
        assert set(record.parts) == {"ceilings", "shapes", "growth"}
        for shape in record.shapes:
            for row in shape.rows:
                assert row.kind == "pytorch" or row.status == "ok", f"{row.name} on {shape.name}"


def test_where_records_are_is_said_where_there_is_no_folder(tmp_path):
    with pytest.raises(records.RecordError, match=r"no record 'nvidia-h200' in .*; .*-e \.`\)$"):
        records.load_named("nvidia-h200", tmp_path / "records")
    with pytest.raises(records.RecordError, match=r"there are: none$"):
        records.load_named("nvidia-h200", tmp_path)
