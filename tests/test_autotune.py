"""Autotuning: when it measures, what it measures, and that what it remembers can't be spoilt."""

import json
import multiprocessing
import os
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from convt_lab import Problem, autotune
from convt_lab.build import BuildError

PROBLEM = Problem(2, 3, 4, 5, 6, kernel_size=(3, 7), bias=True)
HERE = "NVIDIA H200, driver 1"


def here():
    return HERE


class ByName:
    """A clock that knows how long each task takes."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.runs = []

    def time(self, task):
        task()
        self.runs.append(task.name)
        return self.seconds[task.name]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def memory(folder):
    return autotune.Memory(lambda: folder)


class TestWhen:
    @pytest.mark.parametrize(
        ("value", "benchmark", "is_on"),
        [
            ("1", False, True),
            ("0", True, False),
            ("", True, True),
            ("", False, False),
            (None, True, True),
            (None, False, False),
        ],
    )
    def test_the_variable_decides_and_else_cudnns_switch(
        self, monkeypatch, value, benchmark, is_on
    ):
        monkeypatch.delenv("CONVT_AUTOTUNE", raising=False)
        if value is not None:
            monkeypatch.setenv("CONVT_AUTOTUNE", value)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        assert autotune.is_on() is is_on

    @pytest.mark.parametrize("value", ["yes", "2", "on", " 1"])
    def test_another_value_is_refused(self, monkeypatch, value):
        monkeypatch.setenv("CONVT_AUTOTUNE", value)
        with pytest.raises(ValueError, match=r"CONVT_AUTOTUNE=.*: must be 1 .* 0 .* not set") as e:
            autotune.is_on()
        assert repr(value) in str(e.value)


class TestNames:
    def test_a_case_is_all_that_a_time_depends_on(self, monkeypatch):
        base = (PROBLEM, torch.float32, False, False)
        names = {autotune.case_name(*base)}
        changes = (
            (0, Problem(2, 3, 4, 5, 6, kernel_size=(3, 7))),
            (0, Problem(2, 3, 4, 5, 6, kernel_size=(7, 3), bias=True)),
            (0, Problem(2, 3, 4, 5, 6, kernel_size=(3, 7), padding=1, bias=True)),
            (1, torch.float16),
            (2, True),
            (3, True),
        )
        for place, value in changes:
            names.add(autotune.case_name(*base[:place], value, *base[place + 1 :]))
        for switch in ("benchmark", "deterministic", "enabled"):
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.backends.cudnn, switch, not getattr(torch.backends.cudnn, switch)
                )
                names.add(autotune.case_name(*base))
        assert len(names) == 1 + len(changes) + 3
        name = autotune.case_name(PROBLEM, torch.float16, True, False)
        assert name.startswith("float16 channels_last: input 2x3x5x6 weight 3x4x3x7 stride 1x1 ")

    def test_an_environment_changes_with_each_of_its_parts(self, monkeypatch, tmp_path):
        source = tmp_path / "a.cu"
        source.write_text("one")
        driver = tmp_path / "driver"
        driver.write_text("NVRM version: NVIDIA UNIX Module  580.65.06  Sun\nGCC version: 12.1")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        monkeypatch.setattr(autotune, "kernel_headers", lambda: [source])
        monkeypatch.setattr(autotune, "_DRIVER_FILE", driver)
        ask = autotune.environment.__wrapped__
        first = ask(0)
        assert "NVIDIA H200, driver 580.65.06, torch " in first
        assert "CUDA 13.0, cuDNN 91900, kernels " in first
        seen = {first}
        source.write_text("two")
        seen.add(ask(0))
        driver.write_text("NVRM version: 590.1\n")
        seen.add(ask(0))
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
        seen.add(ask(0))
        monkeypatch.setattr(torch, "__version__", "9.9")
        seen.add(ask(0))
        assert len(seen) == 5

    def test_without_the_kernel_modules_file_nvidia_smi_is_asked(self, monkeypatch, tmp_path):
        monkeypatch.setattr(autotune, "_DRIVER_FILE", tmp_path / "none")
        properties = type("Properties", (), {"uuid": "12"})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        for answer, driver in (("580.1", "580.1"), (None, "unknown")):
            monkeypatch.setattr(
                autotune,
                "gpu_facts",
                lambda fields, uuid, answer=answer: {"driver_version": answer},
            )
            assert autotune._driver(0) == driver


class TestMemory:
    def test_what_one_process_remembers_another_recalls(self, folder):
        assert memory(folder).recall(here, "case") is None
        memory(folder).remember(HERE, "case", {"pytorch": 2.0, "ours": 1.0})
        assert memory(folder).recall(here, "case") == {"pytorch": 2.0, "ours": 1.0}
        assert memory(folder).recall(here, "other") is None
        assert memory(folder).recall(lambda: "another driver", "case") is None
        assert sorted(p.name for p in folder.iterdir()) == ["autotune.json", "autotune.json.lock"]

    def test_nothing_is_asked_of_the_machine_where_nothing_is_remembered(self, folder):
        assert memory(folder).recall(lambda: pytest.fail("asked"), "case") is None

    def test_what_others_added_meanwhile_is_kept(self, folder):
        one, two = memory(folder), memory(folder)
        assert one.recall(here, "a") is two.recall(here, "a") is None
        one.remember(HERE, "a", {"pytorch": 1.0})
        two.remember(HERE, "b", {"pytorch": 2.0})
        one.remember("elsewhere", "a", {"pytorch": 3.0})
        fresh = memory(folder)
        assert fresh.recall(here, "a") == {"pytorch": 1.0}
        assert fresh.recall(here, "b") == {"pytorch": 2.0}
        assert fresh.recall(lambda: "elsewhere", "a") == {"pytorch": 3.0}
        assert one.recall(here, "b") == {"pytorch": 2.0}  # it has seen it when it wrote

    def test_processes_at_once_lose_nothing(self, folder):
        context = multiprocessing.get_context("spawn")
        start = context.Barrier(2)
        workers = [context.Process(target=_remember_many, args=(folder, i, start)) for i in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        result = memory(folder)
        for worker in range(2):
            for case in range(20):
                found = result.recall(here, f"{worker} {case}")
                assert found == {"pytorch": 1.0 + worker + case}
        assert not [p for p in folder.iterdir() if p.suffix == ".tmp"]

    def test_threads_at_once_lose_nothing(self, folder):
        shared = memory(folder)
        threads = [
            threading.Thread(target=shared.remember, args=(HERE, str(i), {"pytorch": 1.0 + i}))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [memory(folder).recall(here, str(i)) for i in range(8)] == [
            {"pytorch": 1.0 + i} for i in range(8)
        ]

    def test_the_folder_is_one_that_a_build_accepts(self, folder, monkeypatch):
        before = os.umask(0)
        try:
            memory(folder).remember(HERE, "case", {"pytorch": 1.0})
        finally:
            os.umask(before)
        assert folder.stat().st_mode & 0o777 == 0o700

    def test_it_does_not_grow_forever(self, folder, monkeypatch):
        monkeypatch.setattr(autotune, "MOST_CASES", 3)
        monkeypatch.setattr(autotune, "MOST_ENVIRONMENTS", 2)
        one = memory(folder)
        for i in range(5):
            one.remember(HERE, str(i), {"pytorch": 1.0})
        assert [i for i in range(5) if memory(folder).recall(here, str(i))] == [2, 3, 4]
        for name in ("b", "c"):
            one.remember(name, "0", {"pytorch": 1.0})
        names = list(json.loads((folder / "autotune.json").read_text())["environments"])
        assert names == ["b", "c"]


def _remember_many(folder, worker, start):
    mine = memory(folder)
    mine.recall(here, "")
    start.wait(60)
    for case in range(20):
        mine.remember(HERE, f"{worker} {case}", {"pytorch": 1.0 + worker + case})


GOOD = {
    "schema": 1,
    "what": "x",
    "environments": {HERE: {"case": {"seconds": {"pytorch": 1.0}, "date": "2026-11-25"}}},
}


class TestTrouble:
    """Whatever is wrong with the file: one warning, and memory in the process."""

    def works_in_memory(self, folder, words):
        mine = memory(folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mine.recall(here, "case")
            mine.remember(HERE, "case", {"pytorch": 5.0})
            mine.remember(HERE, "other", {"pytorch": 6.0})
        (warning,) = caught
        assert warning.category is RuntimeWarning
        assert re.search(f"for this process only: .*{words}", str(warning.message))
        assert mine.recall(here, "case") == {"pytorch": 5.0}
        assert mine.recall(here, "other") == {"pytorch": 6.0}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mine.remember(HERE, "more", {"pytorch": 7.0})
            assert mine.recall(here, "more") == {"pytorch": 7.0}

    def test_the_good_file_is_read(self, folder):
        folder.mkdir()
        (folder / "autotune.json").write_text(json.dumps(GOOD))
        assert memory(folder).recall(here, "case") == {"pytorch": 1.0}

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "is no JSON"),
            ('{"schema": 1, "what"', "is no JSON"),
            ("\xff\xfe", "is no JSON"),
            ("[" * 100_000, "is no JSON"),
            ("[]", "must be an object"),
            (json.dumps({**GOOD, "schema": 2}), "schema = 2: must be 1"),
            (json.dumps({**GOOD, "environments": 5}), "environments = 5: must be an object"),
            (json.dumps(GOOD).replace("1.0", "-1.0"), r"seconds\.pytorch = -1\.0"),
            (json.dumps(GOOD).replace("1.0", "NaN"), r"seconds\.pytorch = NaN"),
            (json.dumps(GOOD).replace("pytorch", "ours"), "an object with pytorch"),
            (json.dumps(GOOD).replace("2026-11-25", "now"), "date"),
        ],
        ids=lambda value: re.sub(r"\W+", "-", value)[:30],
    )
    def test_a_damaged_file_is_left_alone(self, folder, content, words):
        folder.mkdir()
        file = folder / "autotune.json"
        file.write_text(content, encoding="latin-1")
        before = file.read_bytes()
        self.works_in_memory(folder, rf"{words}.*delete the file")
        assert file.read_bytes() == before

    def test_a_file_that_is_damaged_later(self, folder):
        mine = memory(folder)
        mine.remember(HERE, "case", {"pytorch": 1.0})
        (folder / "autotune.json").write_text("{")
        with pytest.warns(RuntimeWarning, match="is no JSON"):
            mine.remember(HERE, "other", {"pytorch": 2.0})
        assert mine.recall(here, "case") == {"pytorch": 1.0}
        assert mine.recall(here, "other") == {"pytorch": 2.0}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_is_only_read(self, folder):
        folder.mkdir(mode=0o500)
        self.works_in_memory(folder, "set CONVT_LAB_CACHE")

    @pytest.mark.parametrize("step", ["fsync", "mkdir", "lock"])
    def test_a_file_system_that_is_only_read(self, folder, monkeypatch, step):
        def refuse(*arguments, **keywords):
            raise OSError(30, "Read-only file system")

        where = {
            "fsync": (autotune.records.os, "fsync"),
            "mkdir": (autotune.Path, "mkdir"),
            "lock": (autotune.FileLock, "acquire"),
        }
        with monkeypatch.context() as patch:
            patch.setattr(*where[step], refuse)
            self.works_in_memory(folder, "Read-only file system.*set CONVT_LAB_CACHE")

    def test_a_file_in_the_folders_place(self, folder):
        folder.write_text("")
        self.works_in_memory(folder, "set CONVT_LAB_CACHE")

    def test_no_folder(self, folder):
        def nowhere():
            raise BuildError("no home folder is known")

        mine = autotune.Memory(nowhere)
        with pytest.warns(RuntimeWarning, match="no home folder is known"):
            mine.remember(HERE, "case", {"pytorch": 5.0})
        assert mine.recall(here, "case") == {"pytorch": 5.0}

    def test_a_lock_that_is_never_given_back(self, folder, monkeypatch):
        monkeypatch.setattr(autotune, "LOCK_TIMEOUT", 0.1)
        folder.mkdir()
        with autotune.FileLock(folder / "autotune.json.lock"):
            self.works_in_memory(folder, r"autotune\.json\.lock")

    @pytest.mark.parametrize("error", [NotImplementedError(), OSError(38, "no locks")])
    def test_a_file_system_without_locks(self, folder, monkeypatch, error):
        def no_locks(*arguments, **keywords):
            raise error

        monkeypatch.setattr(autotune.FileLock, "acquire", no_locks)
        memory(folder).remember(HERE, "case", {"pytorch": 1.0})
        assert memory(folder).recall(here, "case") == {"pytorch": 1.0}


class TestMeasuring:
    def measure(self, kernels, clock, problem=PROBLEM, dtype=torch.float32, channels_last=False):
        device = torch.device("cpu")
        return autotune.measure(problem, dtype, device, channels_last, kernels, clock)

    def test_all_are_timed_against_each_other(self):
        clock = ByName(pytorch=0.002, ours=0.001)
        times, failures = self.measure({"ours": F.conv_transpose2d}, clock)
        assert times == {"pytorch": 0.002, "ours": 0.001}
        assert failures == {}
        assert clock.runs[-4:] == ["pytorch", "ours"] * 2
        assert clock.runs.count("ours") == 3 + autotune.RUNS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_inputs_are_those_of_the_problem(self, dtype, channels_last):
        problem = Problem(2, 4, 6, 5, 6, kernel_size=3, stride=2, padding=1, groups=2, bias=True)

        def kernel(x, weight, bias, **arguments):
            assert (x.shape, weight.shape) == (problem.input_shape, problem.weight_shape)
            assert bias.shape == problem.bias_shape
            assert arguments == problem.arguments
            assert {x.dtype, weight.dtype, bias.dtype} == {dtype}
            assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert x.is_contiguous() != channels_last
            assert x.isfinite().all()
            assert not torch.is_grad_enabled()
            return F.conv_transpose2d(x, weight, bias, **arguments)

        clock = ByName(pytorch=1.0, ours=1.0)
        _, failures = self.measure({"ours": kernel}, clock, problem, dtype, channels_last)
        assert failures == {}

    def test_the_users_random_numbers_stay_as_they_are(self):
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        self.measure({}, ByName(pytorch=1.0))
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("error", [BuildError("no nvcc"), torch.OutOfMemoryError("full")])
    def test_a_kernel_that_does_not_run_is_left_out(self, error):
        def broken(*arguments, **keywords):
            raise error

        clock = ByName(pytorch=0.002, ours=0.001)
        times, failures = self.measure({"broken": broken, "ours": F.conv_transpose2d}, clock)
        assert times == {"pytorch": 0.002, "ours": 0.001}
        assert failures == {"broken": error}

    def test_a_kernel_that_fails_later_is_left_out_too(self):
        calls = []

        def tired(*arguments, **keywords):
            calls.append(1)
            if len(calls) > 5:
                raise RuntimeError("an illegal memory access")

        times, failures = self.measure({"tired": tired}, ByName(pytorch=0.002, tired=0.001))
        assert times == {"pytorch": 0.002}
        assert list(failures) == ["tired"]

    def test_where_pytorch_does_not_run_nothing_is_known(self, monkeypatch):
        def full(*arguments, **keywords):
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(autotune, "F", type("F", (), {"conv_transpose2d": full}))
        with pytest.raises(torch.OutOfMemoryError):
            self.measure({}, ByName())


@pytest.mark.gpu
class TestOnAGPU:
    def test_measured_and_remembered(self, folder):
        from convt_lab.stages import stages

        problem = Problem(4, 16, 16, 64, 64, kernel_size=(3, 7))
        kernels = {"register_blocked": stages["register_blocked"]}
        device = torch.device("cuda", 0)
        times, failures = autotune.measure(problem, torch.float32, device, False, kernels)
        assert failures == {}
        assert set(times) == {"pytorch", "register_blocked"}
        assert all(0 < seconds < 0.1 for seconds in times.values())
        environment = autotune.environment(0)
        assert torch.cuda.get_device_name(0) in environment
        assert "unknown" not in environment
        memory(folder).remember(environment, "case", times)
        assert set(memory(folder).recall(lambda: environment, "case")) == set(times)
