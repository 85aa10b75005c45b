"""The build cache: libraries are built once, whole, and by one process at a time."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from kernels_for_tests import SCALE

import convt_lab as lab
from convt_lab import build as build_module
from convt_lab.build import BuildError, cache_folder, cached_library
from convt_lab.gpu import GPU
from convt_lab.simulator import Simulator


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / "cache"))


class Builder:
    """Counts its builds, each of which writes a library of one line."""

    def __init__(self):
        self.builds = 0

    def __call__(self, library: Path) -> None:
        self.builds += 1
        library.write_text(f"library {self.builds}")


def test_a_library_is_built_once():
    builder = Builder()
    first = cached_library("name", ["key"], builder)
    assert cached_library("name", ["key"], builder) == first
    assert builder.builds == 1
    assert first.name.startswith("name_")
    assert first.parent.parent == cache_folder()


def test_another_key_or_name_makes_another_library():
    builder = Builder()
    paths = {
        cached_library("name", ["key"], builder),
        cached_library("name", ["other key"], builder),
        cached_library("name", ["k", "ey"], builder),
        cached_library("other", ["key"], builder),
    }
    assert len(paths) == builder.builds == 4


@pytest.mark.parametrize("damage", ["truncate", "remove", "unseal", "change"])
def test_a_damaged_library_is_built_again(damage):
    builder = Builder()
    path = cached_library("name", ["key"], builder)
    if damage == "truncate":
        path.write_bytes(b"")
    elif damage == "change":
        path.write_text("library 7")
    elif damage == "remove":
        path.unlink()
    else:
        (path.parent / "sealed").unlink()
    assert cached_library("name", ["key"], builder).read_text() == "library 2"


def test_a_build_that_fails_leaves_nothing_that_counts_as_built():
    def failing(library: Path) -> None:
        library.write_text("half a lib")
        raise RuntimeError("the compiler was killed")

    with pytest.raises(RuntimeError, match="killed"):
        cached_library("name", ["key"], failing)
    assert cached_library("name", ["key"], Builder()).read_text() == "library 1"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot write the build cache .*file.*CONVT_LAB_CACHE"):
        cached_library("name", ["key"], Builder())


def test_the_cache_is_private():
    cached_library("name", ["key"], Builder())
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def _build_slowly(log: str) -> None:
    def build(library: Path) -> None:
        with open(log, "a") as file:
            file.write("begin\n")
        time.sleep(0.3)
        library.write_text("whole")
        with open(log, "a") as file:
            file.write("end\n")

    assert cached_library("name", ["key"], build).read_text() == "whole"


def _build_and_die(log: str) -> None:
    cached_library("name", ["key"], lambda library: (library.write_text("half"), os._exit(9)))


@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_want_the_same_library_build_it_once(tmp_path, count):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_build_slowly, args=(str(log),)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * count
    assert log.read_text().split() == ["begin", "end"]


def test_a_build_that_was_killed_is_done_again(tmp_path):
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_build_and_die, args=("",))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    _build_slowly(str(tmp_path / "log"))


def test_waiting_for_the_lock_ends(monkeypatch):
    monkeypatch.setattr(build_module, "LOCK_TIMEOUT", 0.1)

    def build(library: Path) -> None:
        # While this build holds the lock, another wants the same library.
        with pytest.raises(BuildError, match="another process or thread has been building name"):
            cached_library("name", ["key"], Builder())
        library.write_text("whole")

    cached_library("name", ["key"], build)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"'no-such-compiler' is not on PATH; install g\+\+"):
        Simulator().build("kernel", SCALE)


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_stage_builds_within_its_time_and_loads_at_once(self):
        start = time.perf_counter()
        source = lab.stages["coalesced"].source
        first = GPU().build("coalesced", source)
        cold = time.perf_counter() - start
        start = time.perf_counter()
        GPU().build("coalesced", source)
        warm = time.perf_counter() - start
        print(f"cold build {cold:.1f} s, warm {warm * 1e3:.1f} ms")
        assert first is not None

    def test_a_lock_that_a_killed_build_left_is_no_obstacle(self):
        library = None

        def remember(path):
            nonlocal library
            library = path

        cached_library("probe", ["key"], lambda path: (remember(path), path.write_text("x")))
        assert library is not None
        program = lab.compile(SCALE + "// once more\n", "gpu")
        assert "scale" in program.kernels

    def test_another_architecture_is_said(self, monkeypatch):
        import numpy as np

        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
        program = lab.compile(SCALE + "// for another GPU\n", "gpu")
        x = np.zeros(4, np.float32)
        with pytest.raises(lab.KernelError, match=r"built for 7\.5.*TORCH_CUDA_ARCH_LIST"):
            program.launch("scale", 1, 32, [x, x.copy(), 1.0, 4])

    def test_a_wrong_cuda_home_is_said(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(BuildError, match=r"CUDA_HOME=.* holds no bin/nvcc"):
            lab.compile(SCALE + "// with a wrong CUDA_HOME\n", "gpu")
