"""What this machine has of what the lab needs, and the command that gets what it has not.

Every check reports; none raises, however broken the tool that it asks. The last word is not a
check's but a trial's: on each back end that seems usable a kernel is compiled and run, in a process
of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import convt_lab.program
from convt_lab.build import (
    CACHE_LIMIT,
    KEPT_DAYS,
    BuildError,
    build_timeout,
    cache_folder,
    size_of,
    unsafe_folder,
)
from convt_lab.gpu import COMPILER_PACKAGES, find_ninja, find_toolkit
from convt_lab.simulator import find_compiler

__all__ = ["BACKENDS", "Finding", "diagnose", "doctor", "try_backend", "usable_backends"]

#: The back ends, and what each is called here.
BACKENDS = {"simulator": "the simulator", "gpu": "the GPU"}

_EVERY_BACKEND = tuple(BACKENDS)
_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
_OLDEST_GPU = (7, 5)
_TOOL_TIMEOUT = 30.0  # seconds that a tool may take to tell its version
_TRIAL_TIMEOUT = 300.0
_PROBE_BYTES = 2**20  # about what a build needs while it runs

State = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    what
        What was looked for.
    state
        ``ok``, ``missing`` or ``wrong``.
    text
        What was found.
    remedy
        The command that mends it, or None.
    blocks
        The back ends that can't be used because of it.
    """

    what: str
    state: State
    text: str
    remedy: str | None = None
    blocks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.what:<13} {self.state:<8} {self.text}"]
        if self.remedy:
            lines.append(f"{'':<22} to mend: {self.remedy}")
        return "\n".join(lines)


def diagnose() -> list[Finding]:
    """Look for everything that the lab needs.

    Returns
    -------
    list of Finding
        One for each check, in a fixed order.
    """
    findings = []
    for what, check in _CHECKS.items():
        try:
            finding = check()
        except Exception as error:  # a diagnosis must not end at the first surprise
            text = f"the check itself failed: {type(error).__name__}: {_first_line(str(error))}"
            finding = Finding(what, "wrong", text)
        if finding is not None:
            findings.append(finding)
    return findings


def usable_backends(findings: Sequence[Finding]) -> list[str]:
    """Return the back ends that no finding blocks."""
    blocked = {backend for finding in findings for backend in finding.blocks}
    return [backend for backend in BACKENDS if backend not in blocked]


def try_backend(backend: str) -> Finding:
    """Compile and run a small kernel, from nothing, in a process of its own.

    Parameters
    ----------
    backend
        ``"simulator"`` or ``"gpu"``.

    Returns
    -------
    Finding
        It blocks the back end unless the kernel gave the right result.
    """
    what = f"try {backend}"

    def failed(text: str) -> Finding:
        return Finding(what, "wrong", text, blocks=(backend,))

    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        # An empty cache beside the real one: what was built before can't hide a broken compiler.
        with tempfile.TemporaryDirectory(
            prefix="convt_lab_trial-", suffix=".draft", dir=cache_folder()
        ) as folder:
            package = str(Path(__file__).resolve().parent.parent)
            search = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            result = subprocess.run(
                [sys.executable, "-c", f"from convt_lab import doctor; doctor._trial({backend!r})"],
                env=os.environ | {"CONVT_LAB_CACHE": folder, "PYTHONPATH": os.pathsep.join(search)},
                capture_output=True,
                text=True,
                timeout=_TRIAL_TIMEOUT,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return failed(f"the kernel was not done after {_TRIAL_TIMEOUT:.0f} s")
    except (BuildError, OSError) as error:
        return failed(str(error))
    if result.returncode == 0:
        return Finding(what, "ok", result.stdout.strip())
    if result.returncode < 0:
        return failed(f"the process was ended by signal {-result.returncode}")
    lines = (result.stderr.strip() or "no message").splitlines()
    return failed(f"\n{'':<22} ".join(lines))


def _trial(backend: str) -> None:
    """Run the trial in this process: print the outcome, or end with a message and status 1."""
    source = """
    __global__ void scale(float* x, float factor, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) x[i] *= factor;
    }
    """
    start = time.monotonic()
    x = np.arange(100, dtype=np.float32)
    try:
        convt_lab.program.compile(source, backend).launch("scale", 4, 32, [x, 2.0, 100])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if not np.array_equal(x, 2 * np.arange(100)):
        sys.exit(f"the kernel ran, and gave a wrong result: {x}")
    print(f"compiled and ran a kernel in {time.monotonic() - start:.1f} s")


def doctor(run_trial: bool = True) -> int:
    """Print what is here, and try it.

    Parameters
    ----------
    run_trial
        Whether to compile and run a kernel on each back end that seems usable.

    Returns
    -------
    int
        The exit status: 0 if a back end can be used, else 1.
    """
    findings = diagnose()
    print("\n".join(map(str, findings)), flush=True)
    usable = usable_backends(findings)
    if run_trial:
        for backend in list(usable):
            finding = try_backend(backend)
            print(finding, flush=True)
            if backend in finding.blocks:
                usable.remove(backend)
    print(f"\nverdict: {_verdict(usable)}" + ("" if run_trial else " (not tried)"))
    return 0 if usable else 1


def _verdict(usable: Sequence[str]) -> str:
    names = [BACKENDS[backend] for backend in usable]
    others = [name for backend, name in BACKENDS.items() if backend not in usable]
    if not others:
        return f"{' and '.join(names)} can be used here"
    if not names:
        return f"neither {' nor '.join(others)} can be used here"
    return f"{names[0]} can be used here, {others[0]} cannot"


# ---- The checks --------------------------------------------------------------------------------


def _python() -> Finding:
    text = f"{sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < _OLDEST_PYTHON:
        oldest = _dotted(_OLDEST_PYTHON)
        remedy = f"apt install python{oldest} python{oldest}-venv"
        return Finding("Python", "wrong", f"{text}; {oldest} or later is needed", remedy)
    return Finding("Python", "ok", text)


def _torch() -> Finding:
    is_for_cpu = torch.version.cuda is None
    text = f"{torch.__version__}, " + (
        "a CPU build" if is_for_cpu else f"CUDA {torch.version.cuda}"
    )
    if _numbers(torch.__version__) < _OLDEST_TORCH:
        oldest = _dotted(_OLDEST_TORCH)
        remedy = f"pip install 'torch>={oldest}'"
        return Finding("torch", "wrong", f"{text}; {oldest} or later is needed", remedy)
    if is_for_cpu and _has_driver():
        text += ", on a machine with an NVIDIA driver"
        return Finding("torch", "wrong", text, _install_cuda_torch(), blocks=("gpu",))
    return Finding("torch", "ok", text)


def _gpu() -> Finding:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    if not is_available:
        text = "torch sees no NVIDIA GPU: kernels run on the simulator"
        if caught:
            text += f" ({_first_line(str(caught[-1].message))})"
        remedy = None
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            text += f"; CUDA_VISIBLE_DEVICES={visible!r}"
            remedy = "unset CUDA_VISIBLE_DEVICES"
        return Finding("GPU", "missing", text, remedy, blocks=("gpu",))
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    text = "; ".join(
        f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
        for device in devices
    )
    if torch.cuda.get_device_capability() < _OLDEST_GPU:
        text += f"; compute capability {_dotted(_OLDEST_GPU)} or higher is needed"
        return Finding("GPU", "wrong", text, blocks=("gpu",))
    return Finding("GPU", "ok", text)


def _driver() -> Finding:
    supported = _driver_cuda_version()
    version = _driver_version()
    if supported is None:
        text = "no NVIDIA driver, or none that loads" + (f" ({version})" if version else "")
        remedy = "with an NVIDIA GPU: ubuntu-drivers install (or https://www.nvidia.com/drivers)"
        return Finding("driver", "missing", text, remedy)
    text = f"{version or 'version unknown'}, for CUDA up to {_dotted(supported)}"
    built_for = torch.version.cuda
    if built_for and supported[0] < _numbers(built_for)[0]:
        text += f", older than torch's CUDA {built_for}"
        remedy = "ubuntu-drivers install (or https://www.nvidia.com/drivers), then restart"
        return Finding("driver", "wrong", text, remedy)
    return Finding("driver", "ok", text)


def _nvcc() -> Finding:
    toolkit = find_toolkit()
    built_for = torch.version.cuda
    if toolkit is None:
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if chosen := os.environ.get(variable):
                text = f"{variable}={chosen!r} holds no bin/nvcc"
                return Finding("nvcc", "wrong", text, f"unset {variable}", blocks=("gpu",))
        text = "no CUDA toolkit; only a GPU needs one"
        if on_path := shutil.which("nvcc"):
            text = f"{on_path} lies in no CUDA toolkit"
        return Finding("nvcc", "missing", text, _install_nvcc(), blocks=("gpu",))
    nvcc = toolkit / "bin" / "nvcc"
    works, answer = _ask(nvcc, "--version")
    if not works:
        return Finding("nvcc", "wrong", f"{nvcc} {answer}", _install_nvcc(), blocks=("gpu",))
    release = re.search(r"release (\d+\.\d+)", answer)
    text = f"{release[1] if release else 'version unknown'}, {nvcc}"
    if release and built_for and _numbers(release[1])[0] != _numbers(built_for)[0]:
        text += f"; torch was built with CUDA {built_for}"
        remedy = f"set CUDA_HOME to a toolkit of CUDA {built_for}, or {_install_nvcc()}"
        return Finding("nvcc", "wrong", text, remedy, blocks=("gpu",))
    return Finding("nvcc", "ok", text)


def _ninja() -> Finding:
    binary = find_ninja()
    module = "with" if importlib.util.find_spec("ninja") else "without"
    if binary is None:
        text = f"not on PATH, {module} a Python module; only a GPU needs it"
        return Finding("ninja", "missing", text, "pip install ninja", blocks=("gpu",))
    works, answer = _ask(binary, "--version")
    if not works:
        remedy = "pip install --force-reinstall ninja"
        return Finding("ninja", "wrong", f"{binary} {answer}", remedy, blocks=("gpu",))
    return Finding("ninja", "ok", f"{_first_line(answer)}, {binary}, {module} the Python module")


def _compiler() -> Finding:
    compiler = find_compiler()
    if compiler is None:
        if chosen := os.environ.get("CXX"):
            text = f"CXX={chosen!r} is no program on PATH"
            return Finding("g++", "wrong", text, "unset CXX", blocks=_EVERY_BACKEND)
        return Finding("g++", "missing", "not on PATH", "apt install g++", blocks=_EVERY_BACKEND)
    works, answer = _ask(compiler, "--version")
    if not works:
        remedy = "unset CXX" if os.environ.get("CXX") else "apt install --reinstall g++"
        return Finding("g++", "wrong", f"{compiler} {answer}", remedy, blocks=_EVERY_BACKEND)
    return Finding("g++", "ok", f"{_first_line(answer)}, {compiler}")


def _cache() -> Finding:
    what, remedy = "build cache", "export CONVT_LAB_CACHE=/path/to/a/folder/of/yours"

    def wrong(text: str) -> Finding:
        return Finding(what, "wrong", text, remedy, blocks=_EVERY_BACKEND)

    try:
        folder = cache_folder()
        build_timeout()
    except BuildError as error:
        message = str(error)
        if message.startswith("CONVT_LAB_BUILD_TIMEOUT"):
            return Finding(
                what, "wrong", message, "unset CONVT_LAB_BUILD_TIMEOUT", blocks=_EVERY_BACKEND
            )
        return wrong(message.partition("; set ")[0])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if reason := unsafe_folder(folder):
            return wrong(f"{folder} {reason}: libraries in it are not loaded")
        with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fchmod(file.fileno(), 0o700)
            may_load = os.access(file.name, os.X_OK)
    except OSError as error:
        return wrong(f"{folder} can't be written: {error}")
    if not may_load:
        return wrong(f"{folder} is on a file system that forbids programs (mounted noexec?)")
    libraries = len(list(folder.glob("*/*.so")))
    return Finding(
        what,
        "ok",
        f"{folder}, writable, {size_of(folder) / 2**20:.1f} MiB in {libraries} "
        f"{'library' if libraries == 1 else 'libraries'}; those not used for {KEPT_DAYS} days go, "
        f"and the oldest above {CACHE_LIMIT / 2**30:.0f} GiB",
    )


def _architectures() -> Finding | None:
    """Look whether the present GPU runs what TORCH_CUDA_ARCH_LIST asks for, if that is set."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not chosen:
        return None
    what, text = "arch list", f"TORCH_CUDA_ARCH_LIST={chosen!r}"
    if unknown := _unknown_architecture():
        remedy = "unset TORCH_CUDA_ARCH_LIST"
        return Finding(what, "wrong", f"{text}: {unknown}", remedy, blocks=("gpu",))
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not _covers(chosen, capability):
            text += f" leaves out this GPU, {_dotted(capability)}"
            remedy = "unset TORCH_CUDA_ARCH_LIST"
            return Finding(what, "wrong", text, remedy, blocks=("gpu",))
    return Finding(what, "ok", text)


_CHECKS: dict[str, Callable[[], Finding | None]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "driver": _driver,
    "nvcc": _nvcc,
    "ninja": _ninja,
    "g++": _compiler,
    "build cache": _cache,
    "arch list": _architectures,
}


# ---- What the checks ask -----------------------------------------------------------------------


def _ask(program: str | Path, *arguments: str) -> tuple[bool, str]:
    """Run a tool. Return whether it worked, and its output or what went wrong."""
    try:
        result = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TOOL_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"does not answer within {_TOOL_TIMEOUT:.0f} s"
    except OSError as error:
        return False, f"does not run: {error.strerror or error}"
    if result.returncode != 0:
        message = _first_line(result.stderr) or _first_line(result.stdout) or "no message"
        return False, f"ends with status {result.returncode}: {message}"
    return True, result.stdout


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or _driver_cuda_version() is not None


def _driver_cuda_version() -> tuple[int, int] | None:
    """Return the latest CUDA that the driver supports, or None if there is no driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return divmod(version.value // 10, 100) if status == 0 and version.value else None


def _driver_version() -> str | None:
    """Return the driver's own version, from nvidia-smi or the kernel module, or why not."""
    if program := shutil.which("nvidia-smi"):
        works, answer = _ask(program, "--query-gpu=driver_version", "--format=csv,noheader")
        if works and answer.strip():
            return _first_line(answer)
        if not works:
            return f"nvidia-smi {answer}"
    try:
        module = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", module)
    return found[0] if found else None


def _install_cuda_torch() -> str:
    return f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"


def _install_nvcc() -> str:
    built_for = torch.version.cuda
    if built_for is None:
        return f"with an NVIDIA GPU: {_install_cuda_torch()}, then ask again"
    if _numbers(built_for)[0] < 13:  # pip's packages of older compilers are no whole toolkit
        return (
            f"install CUDA toolkit {built_for}: https://developer.nvidia.com/cuda-toolkit-archive"
        )
    return "pip install " + " ".join(f"'{name}=={built_for}.*'" for name in COMPILER_PACKAGES)


def _unknown_architecture() -> str | None:
    """Return what torch says against TORCH_CUDA_ARCH_LIST, if it says anything."""
    if os.environ["TORCH_CUDA_ARCH_LIST"].strip() in ("", "native"):
        return None
    from torch.utils import cpp_extension

    read = getattr(cpp_extension, "_get_cuda_arch_flags", None)  # torch has no public name for it
    try:
        if read is not None:
            read()
    except ValueError as error:
        return _first_line(str(error))
    return None


def _covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures`, as torch reads the list, runs on a GPU."""
    for entry in re.split(r"[;\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            return True  # a name such as Hopper: torch knows what it means
        built_for = int(match[1]), int(match[2])
        if built_for == capability:
            return True
        if match[3]:
            continue  # architecture-specific code runs nowhere else
        same_major = built_for[0] == capability[0]
        if (same_major or match[4]) and built_for < capability:
            return True
    return False


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
