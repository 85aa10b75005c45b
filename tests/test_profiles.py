"""The tools that run Nsight Compute, with a stand-in for it that prints what it would."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.append(str(TOOLS))

import hardware_counters  # noqa: E402
import kernel_profiles  # noqa: E402
import nsight_compute  # noqa: E402

UNITS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "byte",
    "dram__bytes_write.sum": "Kbyte",
    "sm__cycles_elapsed.avg.per_second": "Ghz",
}


def printed(rows, units=UNITS):
    """Return ncu's CSV of `rows`, with the text that ncu and the program print around it."""
    names = ["ID", "Kernel Name", *dict.fromkeys(name for row in rows for name in row)]
    names = list(dict.fromkeys(names))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, quoting=csv.QUOTE_ALL, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerow({name: units.get(name, "") for name in names})
    for index, row in enumerate(rows):
        writer.writerow({"ID": str(index), **row})
    return f"==PROF== Connected to process 1\nhello\n{text.getvalue()}==PROF== Disconnected\n"


@pytest.fixture
def ncu(monkeypatch, tmp_path):
    """Return a function that puts a stand-in on PATH, and the file with its arguments."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def install(output, status=0, complaint_about=None):
        (tmp_path / "output").write_text(output)
        script = ["#!/bin/sh", f'echo "$*" >> {tmp_path}/arguments']
        if complaint_about:
            # As ncu does: the name without its suffix, and nothing measured.
            script += [
                f'case "$*" in *{complaint_about}*)',
                f"echo '==ERROR== Failed to find metric {complaint_about}'; exit 9;; esac",
            ]
        script += [f"cat {tmp_path}/output", f"exit {status}"]
        (tmp_path / "ncu").write_text("\n".join(script) + "\n")
        (tmp_path / "ncu").chmod(0o755)
        return tmp_path / "arguments"

    return install


class TestNumber:
    @pytest.mark.parametrize(
        ("text", "unit", "expected"),
        [
            ("1,234,567", "", 1234567),
            ("12.5", "%", 12.5),
            ("1500", "ns", 1.5e-6),
            ("2", "msecond", 2e-3),
            ("3", "Mbyte", 3_000_000),
            ("1.5", "Ghz", 1_500_000_000),
            ("7", "register/thread", 7),
            ("0", "byte", 0),
        ],
    )
    def test_values(self, text, unit, expected):
        assert nsight_compute.number(text, unit) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("text", ["n/a", "(!) n/a", "", None, "nan"])
    def test_none(self, text):
        assert nsight_compute.number(text) is None


class TestMeasure:
    def test_rows_and_units(self, ncu):
        arguments = ncu(printed([{"Kernel Name": "k", "a.sum": "1"}], {"a.sum": "byte"}))
        units, rows = nsight_compute.measure(["a.sum"], ["k", "k"], ["program", "x"], ["--more"])
        assert units["a.sum"] == "byte"
        assert [(row["ID"], row["Kernel Name"], row["a.sum"]) for row in rows] == [("0", "k", "1")]
        given = arguments.read_text()
        assert "--clock-control none" in given
        assert "--more --metrics a.sum --kernel-name regex:^(k)$ program x" in given

    def test_without_a_row_of_units(self):
        text = '"ID","Kernel Name","a"\n"0","k","1"\n'
        assert nsight_compute.parse(text) == ({}, [{"ID": "0", "Kernel Name": "k", "a": "1"}])

    def test_an_unknown_metric_is_left_out(self, ncu, capsys):
        arguments = ncu(printed([{"Kernel Name": "k", "a.sum": "1"}]), complaint_about="sm__b")
        _, rows = nsight_compute.measure(["a.sum", "sm__b.avg.pct"], ["k"], ["program"])
        assert rows[0]["a.sum"] == "1"
        assert [line.count("sm__b") for line in arguments.read_text().splitlines()] == [1, 0]
        assert "sm__b.avg.pct" in capsys.readouterr().err

    def test_failure_shows_what_ncu_said(self, ncu):
        ncu("==ERROR== ERR_NVGPUCTRPERM - no permission to the counters\n", status=1)
        with pytest.raises(SystemExit, match=r"status 1[^$]*ERR_NVGPUCTRPERM"):
            nsight_compute.measure(["a.sum"], ["k"], ["program"])

    def test_nothing_measured(self, ncu):
        ncu("==WARNING== No kernels were profiled.\n")
        with pytest.raises(SystemExit, match="No kernels were profiled"):
            nsight_compute.measure(["a.sum"], ["k"], ["program"])

    def test_no_ncu(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SystemExit, match="not on PATH"):
            nsight_compute.measure(["a.sum"], ["k"], ["program"])

    def test_version_and_path(self, ncu):
        ncu("NVIDIA (R) Nsight Compute\nVersion 2025.3.1.0 (build 1) (public-release)\n")
        assert nsight_compute.version() == "2025.3.1.0"
        path = nsight_compute.record_path("NVIDIA H200", "profiles")
        assert path == TOOLS.parent / "records" / "nvidia-h200-profiles.json"


class TestHardwareCounters:
    def test_asks_for_every_metric_and_kernel(self, ncu):
        arguments = ncu(printed([{"Kernel Name": "global_words"}, {"Kernel Name": "x"}]))
        rows = hardware_counters.measure()
        assert [row["Kernel Name"] for row in rows] == ["global_words", "x"]
        given = arguments.read_text()
        assert ",".join(hardware_counters.METRICS.values()) in given
        assert "|global_words|" in given
        assert given.endswith("hardware_counters.py --launch\n")


class TestProfiles:
    ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"

    @pytest.fixture
    def cases(self):
        return kernel_profiles.cases_of(["coalesced", "register_blocked"], ["star"])

    def row(self, kernel, **others):
        return {
            "Kernel Name": kernel,
            "gpu__time_duration.sum": "2,000,000",
            "dram__bytes_read.sum": "1000",
            "dram__bytes_write.sum": "3",
            "sm__cycles_elapsed.avg.per_second": "1.98",
            # The first choice gives nothing here, the second does.
            f"sm__inst_issued.{kernel_profiles._ACTIVE}": "n/a",
            self.ISSUE: "85.5",
            kernel_profiles.stall_metric("wait"): "1.25",
            kernel_profiles.stall_metric("barrier"): "(!) n/a",
            **others,
        }

    def profiles(self, cases, rows):
        return kernel_profiles.profiles_of(cases, *nsight_compute.parse(printed(rows)))

    def test_cases_know_their_kernels(self, cases):
        assert [str(case) for case in cases] == ["coalesced star", "register_blocked star"]
        assert cases[0].kernels == ["coalesced_kernel"]
        assert cases[1].kernels[-1].startswith("register_blocked_kernel<")

    def test_values_and_gaps(self, cases):
        kernels = [kernel for case in cases for kernel in case.kernels]
        rows = [self.row(f"void {kernel}(const float *)") for kernel in kernels]
        rows[0]["dram__bytes_read.sum"] = "n/a"
        found = self.profiles(cases, rows)
        assert list(found["profiles"]) == ["coalesced star", "register_blocked star"]
        (first,) = found["profiles"]["coalesced star"]
        last = found["profiles"]["register_blocked star"][-1]
        assert first == {
            "kernel": "coalesced_kernel",
            "duration_seconds": pytest.approx(2e-3),
            "sm_clock_hz": pytest.approx(1.98e9),
            "issue_slots_busy_percent": 85.5,
            "dram_write_bytes": 3000,
            "stalls": {"wait": 1.25},
        }
        assert last["dram_read_bytes"] == 1000
        assert found["metrics"]["issue_slots_busy_percent"] == self.ISSUE
        assert found["metrics"]["stalls.wait"] == kernel_profiles.stall_metric("wait")
        assert "fma_pipe_percent" in found["missing"]
        assert "stalls.barrier" in found["missing"]
        assert set(found["missing"]).isdisjoint(found["metrics"])
        assert set(found["units"]) == {n for n in found["metrics"] if "." not in n} | {"stalls"}

    def test_table(self, cases):
        kernels = [kernel for case in cases for kernel in case.kernels]
        rows = [self.row(kernel) for kernel in kernels]
        del rows[0]["gpu__time_duration.sum"]
        lines = kernel_profiles.table(self.profiles(cases, rows)).splitlines()
        assert len(lines) == 1 + len(rows) + 1
        assert "wait 1.25" in lines[1]
        assert "2.000" not in lines[1]
        assert "2.000" in lines[2]
        assert lines[-1].startswith("not measured here: fma_pipe_percent")

    def test_another_kernel_or_number_of_launches(self, cases):
        count = sum(len(case.kernels) for case in cases)
        with pytest.raises(SystemExit, match="in place of coalesced_kernel"):
            self.profiles(cases, [self.row("fill")] * count)
        with pytest.raises(SystemExit, match=f"saw 1 launches of {count}"):
            self.profiles(cases, [self.row("coalesced_kernel")])

    def test_no_metric_is_asked_for_twice(self):
        metrics = kernel_profiles.all_metrics()
        assert len(metrics) == len(set(metrics))

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match="no CUDA device"):
            kernel_profiles.main([])

    def test_the_whole_run(self, ncu, monkeypatch, tmp_path, capsys):
        """Everything but the launches themselves."""
        case = kernel_profiles.Case("register_blocked", "classic")
        arguments = ncu(printed([self.row(kernel) for kernel in case.kernels]))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA Test")
        monkeypatch.setattr(nsight_compute, "version", lambda: "1.0")
        launched = []
        monkeypatch.setattr(kernel_profiles, "launch_all", lambda *a, **k: launched.append((a, k)))
        command = ["--stages", "register_blocked", "--problems", "classic"]
        kernel_profiles.main(command)
        assert "a part of the record" in capsys.readouterr().err
        path = tmp_path / "record.json"
        kernel_profiles.main([*command, "--output", str(path)])
        record = json.loads(path.read_text())
        assert record["schema"] == 1
        assert record["gpu"] == "NVIDIA Test"
        assert list(record["profiles"]) == ["register_blocked classic"]
        assert f"--launch-skip {len(case.kernels)} " in arguments.read_text()
        assert launched[0] == ((["register_blocked"], ["classic"]), {"rounds": 1})
