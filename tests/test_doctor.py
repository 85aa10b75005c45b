"""The doctor: what is missing or broken is said, with what mends it, and nothing raises."""

import ctypes
import errno
import os
import re
import stat
import types

import pytest
import torch

from convt_lab import doctor


def program(path, script):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(folder, script):
    """Write what `find_toolkit` takes for a CUDA toolkit; nvcc is the script."""
    program(folder / "bin" / "nvcc", script)
    return folder


def finding(what):
    (found,) = [f for f in doctor.diagnose() if f.what == what]
    return found


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU; return the function that sets its compute capability."""

    def pretend(major, minor):
        properties = types.SimpleNamespace(
            name="NVIDIA Pretend", major=major, minor=minor, total_memory=16 * 2**30
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))

    return pretend


class TestTools:
    def test_a_missing_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        found = finding("g++")
        assert (found.state, found.remedy) == ("missing", "apt install g++")
        assert found.blocks == ("simulator", "gpu")

    def test_a_compiler_that_fails(self, monkeypatch, tmp_path):
        program(tmp_path / "g++", "echo 'cannot find cc1plus' >&2; exit 3")
        monkeypatch.setenv("PATH", str(tmp_path))
        found = finding("g++")
        assert found.state == "wrong"
        assert "ends with status 3: cannot find cc1plus" in found.text
        assert found.remedy == "apt install --reinstall g++"

    def test_a_wrong_cxx(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        found = finding("g++")
        assert (found.state, found.remedy) == ("wrong", "unset CXX")
        assert "CXX='no-such-compiler'" in found.text

    def test_a_compiler_that_works(self):
        found = finding("g++")
        assert (found.state, found.remedy) == ("ok", None)
        assert re.search(r"\d+\.\d+", found.text)

    def test_a_missing_ninja(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_ninja", lambda: None)
        found = finding("ninja")
        assert (found.state, found.remedy) == ("missing", "pip install ninja")
        assert found.blocks == ("gpu",)

    def test_a_ninja_that_hangs(self, monkeypatch, tmp_path):
        ninja = program(tmp_path / "ninja", "exec sleep 60")
        monkeypatch.setattr(doctor, "find_ninja", lambda: str(ninja))
        monkeypatch.setattr(doctor, "_TOOL_TIMEOUT", 0.1)
        found = finding("ninja")
        assert found.state == "wrong"
        assert "does not answer within" in found.text


class TestNvcc:
    def test_none(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_toolkit", lambda: None)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        found = finding("nvcc")
        assert (found.state, found.blocks) == ("missing", ("gpu",))
        assert found.remedy.startswith("pip install 'nvidia-cuda-nvcc==13.0.*' '")

    def test_none_for_an_older_cuda(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_toolkit", lambda: None)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert finding("nvcc").remedy.startswith("install CUDA toolkit 12.8")

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_a_wrong_cuda_home(self, monkeypatch, variable, tmp_path):
        monkeypatch.setenv(variable, str(tmp_path))
        found = finding("nvcc")
        assert (found.state, found.remedy) == ("wrong", f"unset {variable}")
        assert f"{variable}={str(tmp_path)!r} holds no bin/nvcc" in found.text

    def test_one_that_fails(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "echo 'no licence'; exit 1")))
        found = finding("nvcc")
        assert (found.state, found.blocks) == ("wrong", ("gpu",))
        assert "ends with status 1: no licence" in found.text
        assert found.remedy

    def test_one_that_does_not_run(self, monkeypatch, tmp_path):
        toolkit(tmp_path, "").joinpath("bin", "nvcc").write_bytes(b"\x7fELF of another machine")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        found = finding("nvcc")
        assert found.state == "wrong"
        assert "does not run: " in found.text

    @pytest.mark.parametrize(
        ("release", "built_for", "state"),
        [
            ("13.0", "13.0", "ok"),
            ("13.2", "13.0", "ok"),
            ("12.8", "13.0", "wrong"),
            ("12.8", None, "ok"),
        ],
    )
    def test_its_major_version_is_torchs(self, monkeypatch, tmp_path, release, built_for, state):
        script = f"echo 'Cuda compilation tools, release {release}, V{release}.88'"
        monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, script)))
        monkeypatch.setattr(torch.version, "cuda", built_for)
        found = finding("nvcc")
        assert found.state == state
        assert found.text.startswith(f"{release}, ")
        assert bool(found.remedy) == (state == "wrong")
        assert found.blocks == (("gpu",) if state == "wrong" else ())


class TestGpu:
    def test_none(self, no_gpu):
        found = finding("GPU")
        assert (found.state, found.blocks) == ("missing", ("gpu",))
        assert "simulator" in found.text

    def test_none_visible(self, no_gpu, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        found = finding("GPU")
        assert "CUDA_VISIBLE_DEVICES=''" in found.text
        assert found.remedy == "unset CUDA_VISIBLE_DEVICES"

    def test_one(self, gpu):
        gpu(9, 0)
        found = finding("GPU")
        assert (found.state, found.blocks) == ("ok", ())
        assert found.text == "NVIDIA Pretend, compute capability 9.0, 16 GiB"

    def test_one_that_is_too_old(self, gpu):
        gpu(6, 1)
        found = finding("GPU")
        assert (found.state, found.blocks) == ("wrong", ("gpu",))
        assert "7.5 or higher is needed" in found.text

    @pytest.mark.parametrize(
        ("architectures", "capability", "state"),
        [
            ("8.0", (8, 0), "ok"),
            ("7.5;8.0", (8, 6), "ok"),
            ("7.5 8.9", (8, 6), "wrong"),
            ("8.0", (9, 0), "wrong"),
            ("8.0+PTX", (9, 0), "ok"),
            ("9.0+PTX", (8, 0), "wrong"),
            ("9.0a", (9, 0), "ok"),
            ("10.0a", (10, 3), "wrong"),
            ("Hopper", (9, 0), "ok"),
        ],
    )
    def test_the_architectures_to_build_for(
        self, gpu, monkeypatch, architectures, capability, state
    ):
        gpu(*capability)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        found = finding("arch list")
        assert found.state == state
        assert found.remedy == (None if state == "ok" else "unset TORCH_CUDA_ARCH_LIST")

    def test_an_architecture_that_is_none(self, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;nonsense")
        found = finding("arch list")
        assert (found.state, found.blocks) == ("wrong", ("gpu",))
        assert "nonsense" in found.text
        assert found.remedy == "unset TORCH_CUDA_ARCH_LIST"

    def test_the_architectures_are_not_mentioned_unless_set(self):
        assert "arch list" not in [f.what for f in doctor.diagnose()]


class TestDriverAndTorch:
    @pytest.fixture
    def driver(self, monkeypatch):
        """Pretend that a driver is there, which supports CUDA up to a version."""

        def pretend(version):
            def tell(pointer):
                pointer._obj.value = version
                return 0

            library = types.SimpleNamespace(cuDriverGetVersion=tell)
            monkeypatch.setattr(ctypes, "CDLL", lambda name: library)

        return pretend

    @pytest.fixture(autouse=True)
    def _no_nvidia_smi(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))

    def test_no_driver(self, monkeypatch):
        monkeypatch.setattr(doctor, "_driver_cuda_version", lambda: None)
        found = finding("driver")
        assert found.state == "missing"
        assert found.remedy

    def test_a_driver(self, driver, monkeypatch, tmp_path):
        program(tmp_path / "nvidia-smi", "echo 580.159.04")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        driver(13020)
        found = finding("driver")
        assert (found.state, found.text) == ("ok", "580.159.04, for CUDA up to 13.2")

    def test_a_driver_that_is_too_old(self, driver, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        driver(12040)
        found = finding("driver")
        assert found.state == "wrong"
        assert "for CUDA up to 12.4, older than torch's CUDA 13.0" in found.text
        assert found.remedy

    def test_a_broken_nvidia_smi(self, driver, tmp_path):
        program(tmp_path / "nvidia-smi", "echo 'Driver/library version mismatch'; exit 18")
        driver(13000)
        assert "status 18: Driver/library version mismatch" in finding("driver").text

    def test_a_cpu_build_of_torch_beside_a_driver(self, driver, monkeypatch):
        driver(13000)
        monkeypatch.setattr(torch.version, "cuda", None)
        found = finding("torch")
        assert (found.state, found.blocks) == ("wrong", ("gpu",))
        assert re.fullmatch(r"pip install --force-reinstall torch==[\d.]+", found.remedy)

    def test_an_old_torch(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
        found = finding("torch")
        assert (found.state, found.remedy) == ("wrong", "pip install 'torch>=2.11'")


class TestCache:
    def test_it_is_made_and_measured(self, tmp_path):
        (tmp_path / "cache" / "name-key").mkdir(mode=0o700, parents=True)
        (tmp_path / "cache").chmod(0o700)
        (tmp_path / "cache" / "name-key" / "library.so").write_bytes(bytes(3 * 2**20))
        found = finding("build cache")
        assert found.state == "ok"
        assert f"{tmp_path / 'cache'}, writable, 3.0 MiB in 1 library; " in found.text
        assert "not used for 30 days go, and the oldest above 2 GiB" in found.text
        assert os.listdir(tmp_path / "cache") == ["name-key"]

    def test_one_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / "file" / "cache"))
        found = finding("build cache")
        assert (found.state, found.blocks) == ("wrong", ("simulator", "gpu"))
        assert "CONVT_LAB_CACHE" in found.remedy

    def test_one_that_others_can_write(self, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        found = finding("build cache")
        assert (found.state, found.blocks) == ("wrong", ("simulator", "gpu"))
        assert "can be written by other users (mode 0777)" in found.text
        assert "CONVT_LAB_CACHE" in found.remedy

    def test_one_that_forbids_programs(self, monkeypatch):
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
        found = finding("build cache")
        assert found.state == "wrong"
        assert "forbids programs" in found.text

    def test_no_home(self, monkeypatch):
        monkeypatch.setenv("CONVT_LAB_CACHE", "~nobody-of-this-name/cache")
        found = finding("build cache")
        assert (found.state, found.blocks) == ("wrong", ("simulator", "gpu"))
        assert "no folder for the build cache" in found.text

    def test_a_full_disk(self, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", full)
        found = finding("build cache")
        assert found.state == "wrong"
        assert "can't be written: " in found.text
        assert "No space left on device" in found.text

    def test_a_time_limit_that_is_none(self, monkeypatch):
        monkeypatch.setenv("CONVT_LAB_BUILD_TIMEOUT", "soon")
        found = finding("build cache")
        assert (found.state, found.remedy) == ("wrong", "unset CONVT_LAB_BUILD_TIMEOUT")


def test_a_check_that_raises_is_a_finding(monkeypatch):
    def check():
        raise PermissionError("not yours")

    monkeypatch.setitem(doctor._CHECKS, "nvcc", check)
    found = finding("nvcc")
    assert found.state == "wrong"
    assert "PermissionError: not yours" in found.text
    assert len(doctor.diagnose()) == len(doctor._CHECKS) - 1  # no arch list


def test_each_finding_is_one_line_and_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for found in doctor.diagnose():
        first, *rest = str(found).splitlines()
        assert re.match(r"\S.* (ok|missing|wrong) +\S", first)
        assert len(rest) == (found.remedy is not None)


class TestTrial:
    def test_the_simulator(self, tmp_path):
        found = doctor.try_backend("simulator")
        assert found.state == "ok", found
        assert re.fullmatch(r"compiled and ran a kernel in \d+\.\d s", found.text)
        assert os.listdir(tmp_path / "cache") == []

    def test_a_compiler_that_only_tells_its_version(self, monkeypatch, tmp_path, capsys, no_gpu):
        answer = 'case "$1" in --version) echo g++ 99;; *) echo no disk >&2; exit 1;; esac'
        compiler = program(tmp_path / "bin" / "g++", answer)
        monkeypatch.setenv("CXX", str(compiler))
        assert finding("g++").state == "ok"
        assert doctor.doctor() == 1
        lines = capsys.readouterr().out.splitlines()
        (start,) = [i for i, line in enumerate(lines) if line.startswith("try simulator wrong")]
        assert "no disk" in "".join(lines[start:])
        assert lines[-1] == "verdict: neither the simulator nor the GPU can be used here"

    def test_a_process_that_crashes(self, monkeypatch):
        crash = types.SimpleNamespace(returncode=-11, stdout="", stderr="")
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: crash)
        found = doctor.try_backend("gpu")
        assert (found.state, found.blocks) == ("wrong", ("gpu",))
        assert "signal 11" in found.text

    @pytest.mark.gpu
    def test_the_gpu(self):
        found = doctor.try_backend("gpu")
        assert found.state == "ok", found


class TestVerdict:
    @pytest.mark.parametrize(
        ("usable", "verdict", "status"),
        [
            ("simulator", "the simulator can be used here, the GPU cannot", 0),
            ("gpu", "the GPU can be used here, the simulator cannot", 0),
            ("simulator gpu", "the simulator and the GPU can be used here", 0),
            ("", "neither the simulator nor the GPU can be used here", 1),
        ],
    )
    def test_it_names_what_can_be_used(self, monkeypatch, capsys, usable, verdict, status):
        monkeypatch.setattr(doctor, "usable_backends", lambda findings: usable.split())
        assert doctor.doctor(run_trial=False) == status
        assert capsys.readouterr().out.splitlines()[-1] == f"verdict: {verdict} (not tried)"

    def test_without_a_gpu(self, capsys, no_gpu):
        assert doctor.doctor(run_trial=False) == 0
        output = capsys.readouterr().out
        assert "verdict: the simulator can be used here, the GPU cannot" in output
        assert "try " not in output
