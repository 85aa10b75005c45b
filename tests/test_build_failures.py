"""Builds that go wrong: each works all the same or ends in one message, and none hangs.

No test needs nvcc: the toolkits here are shell scripts, with which PyTorch builds a library that
g++ compiles.
"""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from kernels_for_tests import SCALE

from convt_lab import build as build_module
from convt_lab import gpu as gpu_module
from convt_lab import program as program_module
from convt_lab.build import (
    BuildError,
    cache_folder,
    cached_library,
    load_library,
    prune,
    run_tool,
)
from convt_lab.errors import CompileError
from convt_lab.gpu import GPU
from convt_lab.program import backend_named
from convt_lab.simulator import Simulator
from convt_lab.stages import kernels

RELEASE = "Cuda compilation tools, release 13.0, V13.0.88"

# What a good nvcc does here: an object with one function, in place of the kernel's.
GOOD = 'echo compiled >> "$HERE/log"; echo "int answer() { return 42; }" > "$out.c"\n'
GOOD += 'exec g++ -x c -fPIC -c "$out.c" -o "$out"'

# A compiler that hangs, deaf to signals, with a child that hangs as well.
HANG = "trap '' TERM INT HUP; sleep 300 & echo $$ $! > \"$HERE/running\"; wait"


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(folder, compile_script=GOOD, version=f"echo '{RELEASE}'"):
    """Write a CUDA toolkit whose nvcc is a shell script; $HERE is the folder, $out the object."""
    script(
        folder / "bin" / "nvcc",
        f"""HERE='{folder}'
        if [ "$1" = --version ]; then {version}; exit; fi
        echo "$@" > "$HERE/arguments"
        for argument; do [ "$previous" = -o ] && out=$argument; previous=$argument; done
        {compile_script}""",
    )
    (folder / "include").mkdir(exist_ok=True)
    (folder / "include" / "cuda_runtime.h").touch()
    # PyTorch links with its own libraries, which a CPU build of it lacks in part.
    script(
        folder / "bin" / "c++",
        """for argument; do
          shift
          case "$argument" in -l*|-L*) ;; *) set -- "$@" "$argument" ;; esac
        done
        exec g++ "$@\"""",
    )
    return folder


def use(monkeypatch, folder):
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("CXX", str(folder / "bin" / "c++"))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    for name in (
        *("CUDA_PATH", "CC", "TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC"),
        *("CONVT_LAB_BUILD_TIMEOUT", "MAX_JOBS"),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretend that there is a GPU and a toolkit; return the toolkit's folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    use(monkeypatch, toolkit(tmp_path / "cuda"))
    return tmp_path / "cuda"


def builds_left():
    """Return what is in the cache besides locks: libraries, and what builds left behind."""
    folder = cache_folder()
    return [p.name for p in folder.iterdir() if p.suffix != ".lock"] if folder.exists() else []


def is_running(process):
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def running_in(folder):
    """Return the processes that a hanging nvcc has noted."""
    wait_until(lambda: (folder / "running").exists() and (folder / "running").read_text().strip())
    return [int(word) for word in (folder / "running").read_text().split()]


def none_runs(processes):
    wait_until(lambda: not any(map(is_running, processes)), 5)


PRETEND = """
import os, sys, threading, time, torch
from convt_lab.build import BuildError, cache_folder, cached_library
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.version.cuda = "13.0"
from convt_lab.gpu import GPU
"""


def start(text, **options):
    """Start a Python that pretends to have a GPU and runs `text`."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PRETEND + textwrap.dedent(text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


# ---- A GPU's kernel, by PyTorch and nvcc -------------------------------------------------------


def test_a_good_toolkit_builds_once_and_leaves_a_library_and_its_seal(gpu):
    path = os.environ["PATH"]
    assert GPU().build("kernel", SCALE).answer() == 42
    assert GPU().build("kernel", SCALE).answer() == 42
    assert (gpu / "log").read_text() == "compiled\n"
    assert "-gencode=arch=compute_90a,code=sm_90a" in (gpu / "arguments").read_text()
    (folder,) = builds_left()
    kept = sorted(path.name for path in (cache_folder() / folder).iterdir())
    assert kept == [f"{folder.replace('-', '_')}.so", "sealed"]
    assert os.environ["PATH"] == path


def test_the_key_holds_the_tools_torch_and_the_architecture(gpu, monkeypatch):
    names = set()

    def build_again():
        GPU().build("kernel", SCALE)
        names.update(builds_left())
        return len(names)

    assert build_again() == 1
    with open(gpu / "bin" / "nvcc", "a") as file:
        file.write("# of the next version, at the same place\n")
    assert build_again() == 2
    with open(gpu / "bin" / "c++", "a") as file:
        file.write("# of the next version, too\n")
    assert build_again() == 3
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert build_again() == 4
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build_again() == 5
    monkeypatch.setattr(torch.version, "cuda", "13.9")
    assert build_again() == 6
    (gpu / "changed.cuh").write_text("// a header")
    headers = gpu_module.kernel_headers()
    monkeypatch.setattr(gpu_module, "kernel_headers", lambda: [*headers, gpu / "changed.cuh"])
    assert build_again() == 7
    assert build_again() == 7


def test_each_architecture_has_a_program(gpu, monkeypatch):
    """Two GPU models in one process: a library is of no use to the other."""
    backend_named.cache_clear()
    monkeypatch.setattr(program_module, "_declared_kernels", lambda source: [])
    programs = {}
    for capability in ((8, 9), (8, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        program = program_module.compile(SCALE, "gpu", name="of two")
        assert programs.setdefault(capability, program) is program
        assert kernels["coalesced"].program("gpu") is kernels["coalesced"].program("gpu")
    assert programs[8, 9].library._name != programs[8, 0].library._name
    assert len(builds_left()) == 4


FAILURES = {
    "host compiler": (
        "echo 'nvcc fatal   : Failed to preprocess host compiler properties.' >&2; exit 1",
        r"host compiler.*install g\+\+ of a version that it supports",
    ),
    "new host compiler": (
        "echo 'host_config.h:143:2: error: #error -- unsupported GNU version! gcc later than 15'"
        " >&2; exit 1",
        r"unsupported GNU version.*install g\+\+ of a version",
    ),
    "full disk": (
        "cat /dev/zero > /dev/full; exit 1",
        r"No space left.*make room.*CONVT_LAB_CACHE",
    ),
    "full disk, and a warning": (
        "echo 'kernel.cu(3): warning: unused'; echo 'fatal: No space left on device'; exit 1",
        r"No space left.*make room",
    ),
    "architecture": (
        "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_90'\" >&2; exit 1",
        r"compute_90.*TORCH_CUDA_ARCH_LIST",
    ),
    "killed": ("kill -9 $$", r"could not be built: Killed.*out of memory"),
    "garbage": ('echo garbage > "$out"', r"could not be built: .*(?s:.*)doctor"),
    "nothing": ("exit 0", r"could not be built: .*(?s:.*)doctor"),
    "bytes that are no text": ("printf '\\377\\376\\n'; exit 1", r"could not be built"),
    "silent": ("exit 1", r"could not be built"),
    "hang": (HANG, r"nvcc was not done after 1 s and was ended.*CONVT_LAB_BUILD_TIMEOUT"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_nvcc_that_fails(gpu, monkeypatch, failure):
    compile_script, message = FAILURES[failure]
    toolkit(gpu, compile_script)
    if failure == "hang":
        monkeypatch.setenv("CONVT_LAB_BUILD_TIMEOUT", "1")
    with pytest.raises(BuildError, match=message) as caught:
        GPU().build("kernel", SCALE)
    assert "-DTORCH_EXTENSION_NAME" not in str(
        caught.value
    )  # no command lines of hundreds of words
    assert builds_left() == []
    if failure == "hang":
        none_runs(running_in(gpu))
    # The same process builds as soon as the cause is gone.
    toolkit(gpu)
    monkeypatch.delenv("CONVT_LAB_BUILD_TIMEOUT", raising=False)
    assert GPU().build("kernel", SCALE).answer() == 42


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ('kernel.cu(3): error: identifier "oops" is undefined', 3),
        ("kernel.cu:7:10: fatal error: nothere.h: No such file or directory", 7),
        ('At end of source: error: expected a ";"', None),
        ('launchers(1): error: identifier "old" is undefined', None),
        ("launch.cuh(52): error: no pointer ... [with P=<int &>] at line 1 of launchers", None),
    ],
)
def test_a_source_that_nvcc_refuses(gpu, output, line):
    toolkit(gpu, f"echo '{output}'; exit 2")
    with pytest.raises(CompileError, match=re.escape(output)) as caught:
        GPU().build("kernel", SCALE)
    assert caught.value.line == line


def test_a_text_that_ends_too_early_for_nvcc(gpu):
    toolkit(gpu, """echo 'At end of source: error: expected a ";"'; exit 2""")
    backend_named.cache_clear()
    with pytest.raises(CompileError, match=r'ends in the middle .* line 2: .* expected a ";"') as e:
        program_module.compile("// a comment\nint y = 3\n\n", "gpu")
    assert e.value.line == 2


def test_much_that_nvcc_says(gpu):
    lines = 'for i in $(seq 200); do echo "kernel.cu($i): error: identifier is undefined"; done'
    toolkit(gpu, f"echo 'In file'; {lines}; exit 2")
    with pytest.raises(CompileError, match=r"\n\(189 more lines are left out\)$") as caught:
        GPU().build("kernel", SCALE)
    assert caught.value.line == 1
    assert len(str(caught.value).splitlines()) == 14


@pytest.mark.parametrize("kind", ["function", "variable"])
def test_a_function_that_nvcc_finds_nowhere(gpu, kind):
    toolkit(gpu, f"echo \"ptxas fatal   : Unresolved extern {kind} '_Z1fi'\"; exit 255")
    with pytest.raises(CompileError, match=r"^f\(int\) is declared, but nowhere defined"):
        GPU().build("kernel", SCALE)


@pytest.mark.parametrize(
    ("symbol", "error", "message"),
    [
        ("_Z1fi", CompileError, r"^f\(int\) is declared, but nowhere defined"),
        ("cudaGetDevice", BuildError, "undefined symbol: cudaGetDevice"),
        ("_ZN3c1012cuda_warningEv", BuildError, "undefined symbol: _ZN3c10"),
    ],
)
def test_a_function_that_the_loader_finds_nowhere(symbol, error, message):
    refused = ImportError(f"/cache/kernel.so: undefined symbol: {symbol}")
    with pytest.raises(error, match=message):
        raise gpu_module._failure(refused, "9.0")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("echo 'release 12.4, V12.4.1'", r"is of CUDA 12\.4, torch of CUDA 13\.0: set CUDA_HOME"),
        ("echo 'no licence' >&2; exit 3", r"ends with status 3: no licence; install"),
        ("sleep 300", r"not done after 0\.3 s and was ended"),
    ],
)
def test_an_nvcc_that_is_no_good(gpu, monkeypatch, version, message):
    monkeypatch.setenv("CONVT_LAB_BUILD_TIMEOUT", "0.3")
    toolkit(gpu, version=version)
    with pytest.raises(BuildError, match=message):
        GPU().build("kernel", SCALE)


def test_an_nvcc_that_is_no_program(gpu):
    (gpu / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(BuildError, match=r"nvcc does not run: .*CUDA_HOME"):
        GPU().build("kernel", SCALE)


def test_a_wrong_cuda_home(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(BuildError, match=r"CUDA_HOME=.*elsewhere.* holds no bin/nvcc: correct"):
        GPU().build("kernel", SCALE)


def test_no_nvcc(gpu, monkeypatch):
    monkeypatch.setattr(gpu_module, "find_toolkit", lambda: None)
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(BuildError, match=r"no nvcc: install a CUDA toolkit, or `pip install"):
        GPU().build("kernel", SCALE)


def test_no_ninja(gpu, monkeypatch):
    monkeypatch.setattr(gpu_module, "find_ninja", lambda: None)
    with pytest.raises(BuildError, match="no ninja: `pip install ninja`"):
        GPU().build("kernel", SCALE)


@pytest.mark.parametrize(
    ("ninja", "message"),
    [
        ("exit 1", "Ninja is required.*pip install"),
        ('[ "$1" = --version ] && echo 1.13 && exit; kill -9 $$', "could not be built"),
        # The supervisor itself, killed from below.
        ('[ "$1" = --version ] && echo 1.13 && exit; kill -9 $PPID; exit 1', "could not be built"),
    ],
)
def test_a_ninja_that_fails(gpu, monkeypatch, tmp_path, ninja, message):
    path = script(tmp_path / "ninja", ninja)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_module, "find_ninja", lambda: str(path))
        with pytest.raises(BuildError, match=message):
            GPU().build("kernel", SCALE)
    assert GPU().build("kernel", SCALE).answer() == 42


def test_no_host_compiler(gpu, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"'no-such-compiler' is not on PATH; install g\+\+"):
        GPU().build("kernel", SCALE)


def test_a_linker_that_writes_garbage(gpu):
    script(
        gpu / "bin" / "c++",
        'for last; do :; done; case "$*" in *-shared*) echo garbage > "$last" ;; '
        '*) exec g++ "$@" ;; esac',
    )
    with pytest.raises(BuildError, match=r"could not be built: .*(invalid ELF header|too short)"):
        GPU().build("kernel", SCALE)
    assert builds_left() == []


def test_an_architecture_that_is_none(gpu, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "nonsense")
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST='nonsense': .*correct or unset"):
        GPU().build("kernel", SCALE)


def test_no_setuptools(gpu, monkeypatch):
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    with pytest.raises(BuildError, match="pip install setuptools"):
        GPU().build("kernel", SCALE)


def test_a_gpu_that_torch_cannot_use(gpu, monkeypatch):
    def fail(device=None):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    with pytest.raises(BuildError, match="torch can't use the GPU: Cannot re-initialize CUDA"):
        GPU().build("kernel", SCALE)


@pytest.mark.parametrize(
    "name", ["with spaces", "Übersetzer ß 変換", "a/" * 30, "it is #1 & (best)"]
)
def test_a_cache_at_an_unusual_path_works(gpu, monkeypatch, tmp_path, name):
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / name))
    assert GPU().build("kernel", SCALE).answer() == 42


@pytest.mark.parametrize("name", ["cu da", "it's ß $HOME"])
def test_a_toolkit_at_an_unusual_path_works(gpu, monkeypatch, tmp_path, name):
    (tmp_path / name).symlink_to(gpu)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / name))
    assert GPU().build("kernel", SCALE).answer() == 42


def test_a_relative_cache_works(gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVT_LAB_CACHE", "here")
    assert GPU().build("kernel", SCALE).answer() == 42
    assert list((tmp_path / "here").glob("*/*.so"))


@pytest.mark.parametrize("name", ["a$HOME", "a:b", "a|b", "it's"])
def test_a_cache_at_a_path_that_ninja_misreads_is_refused(gpu, monkeypatch, tmp_path, name):
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / name))
    with pytest.raises(BuildError, match=r"in its path.*set CONVT_LAB_CACHE"):
        GPU().build("kernel", SCALE)


def test_a_file_system_that_forbids_programs(gpu, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.X_OK and access(path, mode))
    monkeypatch.setattr(gpu_module, "find_ninja", lambda: "/usr/bin/ninja")
    monkeypatch.setattr(gpu_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(BuildError, match=r"forbids programs.*noexec.*set CONVT_LAB_CACHE"):
        GPU().build("kernel", SCALE)


def test_threads_build_one_kernel_once_and_others_beside_it(gpu):
    toolkit(gpu, f"sleep 0.3; {GOOD}")
    environment = dict(os.environ)
    answers = []

    def build(name):
        answers.append(GPU().build(name, SCALE).answer())

    threads = [threading.Thread(target=build, args=(n,)) for n in ("one", "one", "one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [42] * 4
    assert (gpu / "log").read_text() == "compiled\n" * 2
    assert dict(os.environ) == environment


# ---- Builds that are ended from outside --------------------------------------------------------


def test_a_build_whose_process_is_killed(gpu):
    # The file of the compiler stays the same, and with it the library's key.
    toolkit(gpu, f'if [ -e "$HERE/good" ]; then {GOOD}; fi; {HANG}')
    worker = start('GPU().build("kernel", "x")')
    compilers = running_in(gpu)
    assert all(map(is_running, compilers))
    # Nothing more is to be written: a ninja that finds its pipe closed ends by itself.
    wait_until(lambda: list(cache_folder().glob("*.draft/main.o")))
    time.sleep(0.3)
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=10)
    none_runs(compilers)
    (left,) = builds_left()
    assert (cache_folder() / left / "lock").exists()  # PyTorch's own, which it would wait for
    (gpu / "good").touch()
    assert GPU().build("kernel", "x").answer() == 42
    (built,) = builds_left()
    assert left.startswith(built)


def test_a_build_that_is_interrupted(gpu):
    toolkit(gpu, f'if [ -e "$HERE/good" ]; then {GOOD}; fi; {HANG}')
    worker = start(
        """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        try:
            GPU().build("kernel", "x")
        except KeyboardInterrupt:
            print("interrupted")
        open(os.environ["CUDA_HOME"] + "/good", "w").close()
        print(GPU().build("kernel", "x").answer())
        """
    )
    compilers = running_in(gpu)
    worker.send_signal(signal.SIGINT)
    assert finish(worker).split() == ["interrupted", "42"]
    none_runs(compilers)
    assert [name for name in builds_left() if name.endswith(".draft")] == []


def test_a_process_that_is_forked_during_a_build(gpu):
    toolkit(gpu, f"sleep 0.5; {GOOD}")
    output = finish(
        start(
            """
            thread = threading.Thread(target=lambda: print(GPU().build("one", "x").answer()))
            thread.start()
            while not list(cache_folder().glob("*.draft/cuda.cu")):
                time.sleep(0.01)
            child = os.fork()
            if child == 0:  # another kernel, and the one that is being built
                answers = [GPU().build("two", "x").answer(), GPU().build("one", "x").answer()]
                os._exit(0 if answers == [42, 42] else 1)
            assert os.waitpid(child, 0)[1] == 0
            thread.join()
            """
        )
    )
    assert output.split() == ["42"]
    assert (gpu / "log").read_text() == "compiled\n" * 2


def test_a_fork_waits_while_a_program_is_started():
    output = finish(
        start(
            """
            from convt_lab.build import no_fork
            held = threading.Event()
            def hold():
                with no_fork():
                    held.set()
                    time.sleep(0.5)
            thread = threading.Thread(target=hold)
            thread.start()
            held.wait()
            start = time.monotonic()
            child = os.fork()
            if child == 0:
                with no_fork():  # held by nobody here
                    os._exit(0)
            print(time.monotonic() - start > 0.3, os.waitpid(child, 0)[1])
            thread.join()
            with no_fork():
                print("free")
            """
        )
    )
    assert output.split() == ["True", "0", "free"]


def test_what_killed_builds_left_is_removed_and_nothing_of_it_used(tmp_path):
    library = cached_library("name", ["key"], lambda path: path.write_text("whole"))
    folder = library.parent
    (folder / "sealed").unlink()  # as builds once left it, in the library's own place
    library.write_text("half")
    (folder / "lock").touch()
    draft = folder.with_name(f"{folder.name}.abc.draft")
    draft.mkdir()
    (draft / "lock").touch()
    assert cached_library("name", ["key"], lambda path: path.write_text("new")).read_text() == "new"
    assert builds_left() == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [library.name, "sealed"]


def test_a_tool_leaves_no_process(tmp_path):
    file = tmp_path / "written"
    status, output = run_tool(
        [
            *("sh", "-c"),
            "(trap '' HUP TERM; for i in $(seq 60); do date; sleep 0.05; done) "
            f">> {file} & echo done",
        ]
    )
    assert (status, output) == (0, "done\n")
    size = file.stat().st_size if file.exists() else 0
    time.sleep(0.2)
    assert (file.stat().st_size if file.exists() else 0) == size


def test_a_tools_status_is_told(tmp_path):
    assert run_tool(["sh", "-c", "exit 7"]) == (7, "")
    assert run_tool(["sh", "-c", "kill -9 $$"])[0] == 128 + 9
    status, output = run_tool(["no-such-tool"])
    assert (status, output) == (127, "no-such-tool does not run: No such file or directory\n")
    with pytest.raises(BuildError, match="does not run"):
        run_tool(["true"], tmp_path / "nowhere")


def test_a_program_that_ignores_how_its_children_end(monkeypatch):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(BuildError, match="ignores SIGCHLD"):
            run_tool(["true"])
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_cache_that_is_deleted_is_built_again(tmp_path):
    """Also the simulator's own part of it, which a process has loaded long since."""
    code = """
    import shutil, sys
    import numpy as np
    import convt_lab as lab
    from convt_lab.build import cache_folder
    for number in range(3):
        source = f"__global__ void run(int* x) {{ x[threadIdx.x] += {number}; }}"
        x = np.zeros(32, np.int32)
        lab.compile(source, "simulator").launch("run", 1, 32, [x])
        assert (x == number).all()
        shutil.rmtree(cache_folder())
    print("built again")
    """
    environment = os.environ | {"CONVT_LAB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "built again\n", done.stderr


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_limit_that_is_none(monkeypatch, value):
    monkeypatch.setenv("CONVT_LAB_BUILD_TIMEOUT", value)
    with pytest.raises(BuildError, match=f"CONVT_LAB_BUILD_TIMEOUT='{value}': must be a positive"):
        run_tool(["true"])


# ---- The simulator's kernels, by g++ -----------------------------------------------------------


@pytest.mark.parametrize(
    ("compile_script", "error", "message"),
    [
        ("cat /dev/zero > /dev/full; exit 1", BuildError, r"No space left.*make room"),
        (HANG, BuildError, r"was not done after 1 s and was ended.*CONVT_LAB_BUILD_TIMEOUT"),
        ("echo 'kernel.cu:2:1: error: oops' >&2; exit 1", CompileError, r"error: oops"),
        ("printf '\\377\\n' >&2; exit 1", CompileError, r"g\+\+ refused"),
        ("echo 'g++: fatal error: Killed signal terminated program'; exit 1", BuildError, "memory"),
        ("kill -9 $$", BuildError, "was killed: it ended with status 137"),
        ("echo \"g++: fatal error: cannot execute 'cc1plus'\"; exit 1", BuildError, "install g++"),
        ("echo '/usr/bin/ld: cannot find -lstdc++'; exit 1", BuildError, "install g++"),
        ("exit 0", BuildError, "reported no error and wrote nothing"),
    ],
)
def test_a_host_compiler_that_fails(monkeypatch, tmp_path, compile_script, error, message):
    Simulator()
    simulated = script(
        tmp_path / "bin" / "g++",
        f"HERE='{tmp_path}'; [ \"$1\" = --version ] && echo 'g++ 99' && exit; {compile_script}",
    )
    monkeypatch.setenv("CXX", str(simulated))
    monkeypatch.setenv("CONVT_LAB_BUILD_TIMEOUT", "1")
    with pytest.raises(error, match=message):
        Simulator().build("kernel", SCALE)
    assert not list(cache_folder().glob("kernel-*.draft"))
    if compile_script == HANG:
        none_runs(running_in(tmp_path))


@pytest.mark.parametrize("answer", ["exit 3", None])
def test_a_host_compiler_that_does_not_run(monkeypatch, tmp_path, answer):
    compiler = script(tmp_path / "bin" / "g++", answer)
    if answer is None:
        compiler.write_bytes(b"\x7fELF of another machine")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"--version ends with status"):
        Simulator().build("kernel", SCALE)


# ---- The cache folder --------------------------------------------------------------------------


def write(library):
    library.write_text("whole")


def test_a_folder_that_others_can_write_is_refused():
    library = cached_library("name", ["key"], write)
    cache_folder().chmod(0o777)
    with pytest.raises(BuildError, match=r"can be written by other users \(mode 0777\).*CONVT_LAB"):
        cached_library("name", ["key"], write)
    with pytest.raises(BuildError, match="can be written by other users"):
        cached_library("name", ["another"], write)
    cache_folder().chmod(0o700)
    library.parent.chmod(0o720)
    with pytest.raises(BuildError, match="can be written by other users"):
        cached_library("name", ["key"], write)


def test_a_folder_of_another_user_is_refused(monkeypatch):
    cached_library("name", ["key"], write)
    if os.geteuid() == 0:  # root's own folders are everybody's to use
        os.chown(cache_folder(), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BuildError, match=r"belongs to another user \(uid .*CONVT_LAB_CACHE"):
        cached_library("name", ["key"], write)


def test_folders_that_cannot_be_written(tmp_path):
    """In a process without root's rights: a cache and a home that are read-only."""
    base = tmp_path / "base"
    script_text = f"""
    import shutil, tempfile
    base = tempfile.mkdtemp()
    os.environ["CONVT_LAB_CACHE"] = cache = base + "/cache"
    write = lambda library: library.write_text("whole")
    built = cached_library("name", ["key"], write)
    for folder, folders, files in os.walk(base):
        for path in [folder, *(os.path.join(folder, f) for f in files)]:
            if os.geteuid() == 0:
                os.chown(path, 65534, 65534)
            os.chmod(path, 0o500)
    os.makedirs({str(base)!r}, exist_ok=True)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    assert cached_library("name", ["key"], write) == built  # what is there is used
    try:
        cached_library("name", ["another"], write)
    except BuildError as error:
        print(error)
    del os.environ["CONVT_LAB_CACHE"]
    os.environ.pop("XDG_CACHE_HOME", None)
    os.environ["HOME"] = base
    try:
        cached_library("name", ["another"], write)
    except BuildError as error:
        print(error)
    """
    lines = finish(start(script_text)).splitlines()
    assert len(lines) == 2, lines
    assert re.match(
        r"cannot write the build cache .*/cache: .*Permission denied.*set CONVT", lines[0]
    )
    assert re.match(r"cannot write the build cache .*\.cache/convt_lab: .*Permission", lines[1])


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files does what a full disk does, for everybody and at any place."""
    output = finish(
        start(
            """
            import resource
            from convt_lab.simulator import Simulator
            def attempt(what):
                try:
                    what()
                except BuildError as error:
                    print(str(error).replace("\\n", " "))
            # The library fits, its seal does not.
            resource.setrlimit(resource.RLIMIT_FSIZE, (32, 1 << 20))
            attempt(lambda: cached_library("name", ["key"], lambda path: path.write_text("whole")))
            # Neither does what a compiler writes.
            resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 1 << 20))
            attempt(lambda: Simulator().build("kernel", "__global__ void k() {}"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            whole = cached_library("name", ["key"], lambda path: path.write_text("whole"))
            print(whole.read_text())
            print(sorted(p.name[:4] for p in cache_folder().iterdir() if p.suffix != ".lock"))
            """
        )
    )
    first, second, third, fourth = output.splitlines()
    assert re.match(r"cannot write the build cache .*File too large.*set CONVT_LAB_CACHE", first)
    assert re.search(r"File (too large|size limit exceeded).*make room", second)
    assert third == "whole"
    assert fourth == "['name']"


def test_no_home(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "CONVT_LAB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder().is_absolute()  # from the list of users
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # this user isn't in it
    with pytest.raises(BuildError, match=r"home (folder|directory).*; set CONVT_LAB_CACHE"):
        cached_library("name", ["key"], write)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_path_that_is_too_long(monkeypatch, tmp_path, name):
    monkeypatch.setenv("CONVT_LAB_CACHE", str(tmp_path / name))
    with pytest.raises(BuildError, match=r"File name too long.*set CONVT_LAB_CACHE"):
        cached_library("name", ["key"], write)


@pytest.mark.parametrize("name", ["../../elsewhere", "with spaces", "x" * 400, "[*]"])
def test_any_name_stays_in_the_cache(name):
    library = cached_library(name, ["key"], write)
    assert library.parent.parent == cache_folder()
    assert cached_library(name, ["key"], write) == library


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("locks")])
def test_a_file_system_without_locks(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(build_module.FileLock, "acquire", fail)
    assert cached_library("name", ["key"], write).read_text() == "whole"

    def slow(library):
        # Meanwhile another process builds the same, and is quicker.
        quick.append(cached_library("name", ["both"], write).stat().st_ino)
        library.write_text("whole")

    quick = []
    assert cached_library("name", ["both"], slow).stat().st_ino == quick[0]  # and stays in place

    def rename(draft, folder):  # quicker by an instant
        shutil.copytree(draft, folder)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Path, "rename", rename)
    assert cached_library("name", ["instant"], write).read_text() == "whole"
    assert [name for name in builds_left() if name.endswith(".draft")] == []


def test_a_rename_that_is_forbidden(monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(BuildError, match="Operation not permitted; set CONVT_LAB_CACHE"):
            cached_library("name", ["key"], write)
    assert builds_left() == []
    assert cached_library("name", ["key"], write).read_text() == "whole"


def test_a_wait_is_announced_and_ends(monkeypatch, caplog):
    monkeypatch.setattr(build_module, "PATIENCE", 0.05)
    monkeypatch.setattr(build_module, "LOCK_TIMEOUT", 0.2)

    def build(library):
        # While this build holds the lock, another wants the same library.
        with pytest.raises(BuildError, match=r"has been building name.* end it, or set CONVT_LAB"):
            cached_library("name", ["key"], write)
        write(library)

    cached_library("name", ["key"], build)
    (record,) = caplog.records
    assert "another process or thread has been building name in" in record.getMessage()


@pytest.mark.parametrize("seal", ["none", "garbage", "another library's"])
def test_a_foreign_library_is_not_taken(seal):
    library = cached_library("name", ["key"], write)
    other = cached_library("name", ["another"], lambda path: path.write_text("another"))
    library.write_bytes(other.read_bytes())
    if seal == "none":
        (library.parent / "sealed").unlink()
    elif seal == "garbage":
        (library.parent / "sealed").write_bytes(b"\xff\xfe")
    else:
        (library.parent / "sealed").write_bytes((other.parent / "sealed").read_bytes())
    assert cached_library("name", ["key"], write).read_text() == "whole"


def test_a_library_that_cannot_be_loaded():
    library = cached_library("name", ["key"], write)
    with pytest.raises(BuildError, match=r"cannot load .*delete the folder"):
        load_library(library)


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("x.so: failed to map segment from shared object", "noexec.*set CONVT_LAB_CACHE"),
        ("libcudart.so.13: cannot open shared object file: No such file", "LD_LIBRARY_PATH"),
    ],
)
def test_why_a_library_cannot_be_loaded(monkeypatch, tmp_path, message, remedy):
    def fail(path):
        raise OSError(message)

    monkeypatch.setattr(build_module.ctypes, "CDLL", fail)
    with pytest.raises(BuildError, match=remedy):
        load_library(tmp_path / "x.so")


class TestPruning:
    @staticmethod
    def made(name, days_ago, size=1000):
        library = cached_library(name, ["key"], lambda path: path.write_bytes(bytes(size)))
        when = time.time() - days_ago * 86400
        os.utime(library.parent / "sealed", (when, when))
        return library.parent

    def test_what_was_not_used_for_long_goes(self):
        folders = [self.made("old", 31), self.made("young", 29)]
        new = self.made("new", 0)  # a build prunes
        assert sorted(builds_left()) == sorted([folders[1].name, new.name])

    def test_a_use_keeps_a_library(self):
        folder = self.made("old", 31)
        cached_library("old", ["key"], write)
        assert prune() == 0
        assert folder.name in builds_left()

    def test_a_clock_that_was_set_back(self):
        """What was built later than now is whole, is used, and then counts as any other."""
        folder = self.made("name", -400)
        for path in folder.iterdir():
            os.utime(path, (time.time() + 400 * 86400,) * 2)
        draft = cache_folder() / f"{folder.name}.x.draft"
        draft.mkdir()
        os.utime(draft, (time.time() + 400 * 86400,) * 2)
        assert prune() == 0
        library = cached_library("name", ["key"], lambda path: pytest.fail("it is built again"))
        assert library.parent == folder
        assert abs((folder / "sealed").stat().st_mtime - time.time()) < 60
        self.made("new", 0)  # a build beside it
        assert folder.name in builds_left()

    def test_above_the_limit_the_oldest_go_but_none_of_the_last_hour(self, monkeypatch):
        folders = [self.made(f"d{days}", days) for days in (3, 2, 1, 0)]
        monkeypatch.setattr(build_module, "CACHE_LIMIT", 2500)
        assert prune() == 2
        assert sorted(builds_left()) == sorted(folder.name for folder in folders[2:])
        monkeypatch.setattr(build_module, "CACHE_LIMIT", 0)
        assert prune() == 1
        assert builds_left() == [folders[3].name]

    def test_what_is_not_of_the_cache_stays(self):
        self.made("name", 0)
        mine = [
            cache_folder() / name
            for name in (
                "mine/thesis.tex",
                "essay.draft/text",
                "letters/sealed",
                "letters/b",
                "a.lock",
            )
        ]
        for file in mine:
            file.parent.mkdir(exist_ok=True)
            file.touch()
        for path in (*mine, *(file.parent for file in mine[:-1])):
            os.utime(path, (0, 0))
        prune()
        assert all(file.exists() for file in mine)

    def test_old_drafts_go(self):
        self.made("name", 0)
        old = [f"a-{'0' * 20}.x_1.draft", "convt_lab_trial-abcd_123.draft"]
        new = f"b-{'0' * 20}.x_1.draft"
        for name, when in ((old[0], 0), (old[1], 0), (new, time.time())):
            (cache_folder() / name).mkdir()
            os.utime(cache_folder() / name, (when, when))
        prune()
        assert not set(old) & set(builds_left())
        assert new in builds_left()


def test_the_files_are_private():
    library = cached_library("name", ["key"], write)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
