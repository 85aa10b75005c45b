"""The back end for NVIDIA GPUs: builds a kernel's CUDA C++ with nvcc and launches it.

The kernel files are free of torch, so a build takes seconds;
`torch.utils.cpp_extension.load_inline` runs nvcc and the linker, and the launchers are called
through ctypes on torch's current device and stream. A library that is already built is loaded
without asking any tool. Whatever goes wrong in a build ends in a `BuildError` that says what to do,
or in a `CompileError` if the source is at fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from convt_lab import supervise
from convt_lab.backend import (
    KERNEL_FOLDER,
    SOURCE_NAME,
    Array,
    Backend,
    compile_error,
    error_string,
    kernel_headers,
    launchers_line,
    undefined_error,
)
from convt_lab.build import (
    BuildError,
    build_timeout,
    cached_library,
    load_library,
    no_fork,
    outside_cause,
    run_tool,
    supervised,
    timed_out,
    tool_identity,
    why_not_loaded,
)
from convt_lab.errors import KernelError

__all__ = [
    "COMPILER_PACKAGES",
    "GPU",
    "architectures",
    "check_fork",
    "find_ninja",
    "find_toolkit",
    "has_own_instructions",
]

#: What holds nvcc for a torch from PyPI, where no CUDA toolkit is installed.
COMPILER_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")


def check_fork() -> None:
    """Raise if this process can't use GPUs because it is the fork of one that has.

    Raises
    ------
    RuntimeError
        With what to do. CUDA's own error, from whatever comes first, is "initialization error".
    """
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            f"process {os.getpid()} was forked from one that had used CUDA, so no GPU works in it: "
            "start processes by the 'spawn' method (multiprocessing.get_context('spawn'), or "
            "multiprocessing_context='spawn' of a DataLoader), or use CUDA in the parent only"
        )


_FLAGS = ("-O3", "-std=c++17", "-lineinfo")
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice

# What nvcc and the linker say if not the source but the machine is at fault, and what to do.
_CAUSES = {
    r"Ninja is required": "ninja does not run: `pip install --force-reinstall ninja`",
    r"Failed to preprocess host compiler properties|host compiler .* not found|"
    r"unsupported (GNU|clang) version|Host compiler targets unsupported OS|"
    r"gcc: .*No such file|(sh: .*|^)(gcc|g\+\+): (command )?not found": (
        "nvcc has no host compiler that it can use: install g++ of a version that it supports, and "
        "set CC and CXX to it if it is not the first one on PATH"
    ),
    r"Unsupported gpu architecture '?[\w.]+'?": (
        "this nvcc does not build for that GPU: set TORCH_CUDA_ARCH_LIST to the GPU's own "
        "architecture or unset it, or set CUDA_HOME to another toolkit"
    ),
    r"cannot find -lcudart": (
        "the CUDA toolkit is not whole: set CUDA_HOME to another, or install the CUDA runtime"
    ),
    r"(cuda_runtime|crt/host_config)\.h: No such file": (
        "the CUDA toolkit has no headers: set CUDA_HOME to a whole one"
    ),
    r"cannot find -l(c10|torch)\w*": (
        "this PyTorch can't be linked with: install a CUDA build of it"
    ),
}


def find_toolkit() -> Path | None:
    """Return the folder of a CUDA toolkit with nvcc, or None.

    In this order: ``CUDA_HOME`` or ``CUDA_PATH`` (if set, nothing else is tried), the nvcc on PATH,
    ``/usr/local/cuda``, and the compiler packages that pip installs beside torch.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if chosen := os.environ.get(variable):
            return Path(chosen) if (Path(chosen) / "bin" / "nvcc").is_file() else None
    candidates = []
    if on_path := shutil.which("nvcc"):
        # A wrapper outside a toolkit (in /usr/local/bin, say) is no toolkit.
        candidates.append(Path(on_path).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            candidates.extend(sorted(Path(folder).glob("cu[0-9]*"), reverse=True))
    for folder in candidates:
        if (folder / "bin" / "nvcc").is_file() and (
            folder / "include" / "cuda_runtime.h"
        ).is_file():
            return folder
    return None


def architectures() -> str:
    """Return the architectures to build for, in the form of ``TORCH_CUDA_ARCH_LIST``.

    That variable is honoured; without it (or with ``native``), the current device's own, and for
    compute capability 9.0 the variant that has all of its instructions, ``9.0a``.

    Raises
    ------
    BuildError
        If the device does not tell.
    """
    chosen = _chosen_architectures()
    if chosen is not None:
        return chosen
    try:
        major, minor = torch.cuda.get_device_capability()
    except Exception as error:  # of many kinds: no driver, a forked process, a wrong device
        raise BuildError(f"torch can't use the GPU: {_first_line(error)}") from error
    return _own_architecture((major, minor))


def has_own_instructions(capability: tuple[int, int], architecture: str) -> bool:
    """Return whether what is built for a GPU may use the instructions of an architecture alone.

    Parameters
    ----------
    capability
        The GPU's compute capability.
    architecture
        Such as ``"9.0a"``. Code for it runs on GPUs of compute capability 9.0, no older and no
        newer ones; and a ``TORCH_CUDA_ARCH_LIST`` may leave it out.
    """
    if architecture != f"{capability[0]}.{capability[1]}a":
        return False
    chosen = _chosen_architectures()
    built = _own_architecture(capability) if chosen is None else chosen
    return architecture in re.split(r"[ ;+]+", built)


def _own_architecture(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}{'a' if capability == (9, 0) else ''}"


def _chosen_architectures() -> str | None:
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return None if chosen in ("", "native") else chosen


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _search_path() -> str:
    """Return PATH with the folder of the ninja package, whose environment may not be activated."""
    path = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError, AttributeError):  # none, or another module of that name
        import ninja

        path = os.pathsep.join([ninja.BIN_DIR, path])
    return path


def find_ninja() -> str | None:
    """Return the path of the ninja that builds, or None."""
    return shutil.which("ninja", path=_search_path())


def _runtime_link_flags(toolkit: Path, folder: Path) -> list[str]:
    """Let ``-lcudart`` find the runtime where pip's packages hold only ``libcudart.so.N``."""
    libraries = [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / "x86_64-linux" / "lib"]
    if any((library / "libcudart.so").exists() for library in libraries):
        return []
    for library in libraries:
        for versioned in sorted(library.glob("libcudart.so.*")):
            (folder / "libcudart.so").symlink_to(versioned)
            return [_for_ninja(f"-L{folder}")]
    return []


class GPU(Backend):
    """Runs kernels on torch's current CUDA device and stream."""

    name = "gpu"

    def build(self, name: str, source: str, *, traced: bool = False) -> ctypes.CDLL:
        """Compile with nvcc through ``load_inline``, for `architectures`."""
        if traced:
            raise ValueError("trace=True needs the simulator: compile with backend='simulator'")
        if not torch.cuda.is_available():
            raise BuildError("backend 'gpu': torch sees no CUDA device; use backend='simulator'")
        wanted = architectures()
        toolkit = find_toolkit()
        text = f'#include <cuda_runtime.h>\n#line 1 "{SOURCE_NAME}"\n{source}'

        def build(library: Path) -> None:
            if toolkit is None:
                home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
                raise BuildError(
                    f"CUDA_HOME={home!r} holds no bin/nvcc: correct or unset it"
                    if home
                    else "no nvcc: install a CUDA toolkit, or `pip install "
                    f"{' '.join(COMPILER_PACKAGES)}` of torch's CUDA version ({torch.version.cuda})"
                )
            _load_inline(library, text, toolkit, wanted)

        headers = [path.read_text(encoding="utf-8") for path in kernel_headers()]
        key = [text, *headers, " ".join(_FLAGS), *_identity_of_tools(toolkit), wanted]
        return load_library(cached_library(name, key, build))

    @contextmanager
    def lend(self, arrays: Sequence[Array | None]) -> Iterator[list[int]]:
        """Pass CUDA tensors as they are; copy others to the current device and back."""
        device = torch.device("cuda", torch.cuda.current_device())
        copies: dict[tuple[int, int], torch.Tensor] = {}
        addresses = []
        for array in arrays:
            if array is None:
                addresses.append(0)
            elif array.device == device:
                addresses.append(array.address)
            elif array.device.type == "cuda":
                raise ValueError(
                    f"argument {array.name!r} is on {array.device}, the current device is "
                    f"{device}; move it, or launch under torch.cuda.device(...)"
                )
            else:
                place = (array.address, array.nbytes)
                if place not in copies:
                    copies[place] = _host_bytes(array).to(device)
                addresses.append(copies[place].data_ptr())
        yield addresses
        for array in arrays:
            if array is not None and array.written and array.device.type == "cpu":
                _host_bytes(array).copy_(copies[array.address, array.nbytes])

    def target(self) -> str:
        """Return the architectures of the current device, or those that the user chose."""
        # Without a device `build` says what is missing.
        return architectures() if torch.cuda.is_available() else ""

    def stream(self) -> int:
        """Return torch's current stream."""
        return torch.cuda.current_stream().cuda_stream

    def synchronize(self, library: ctypes.CDLL, kernel: str) -> None:
        """Wait for the current stream."""
        try:
            torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise KernelError(f"{kernel} failed on the GPU: {error}") from error

    def error(self, library: ctypes.CDLL, code: int, kernel: str) -> KernelError:
        """Describe a CUDA error code."""
        text = error_string(library, code)
        if code == _NO_KERNEL_IMAGE:
            major, minor = torch.cuda.get_device_capability()
            text += f": built for {architectures()}, this GPU is {major}.{minor}; correct or unset "
            text += "TORCH_CUDA_ARCH_LIST"
        return KernelError(f"{kernel} failed on the GPU: {text} (CUDA error {code})")

    def max_shared_bytes(self) -> int:
        """Return what the current device allows a block to opt in to."""
        return _max_shared_bytes(torch.cuda.current_device())


@functools.cache
def _max_shared_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _host_bytes(array: Array) -> torch.Tensor:
    """Return the array's own memory as a tensor of bytes."""
    memory = (ctypes.c_ubyte * array.nbytes).from_address(array.address) if array.nbytes else b""
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))


# ---- Building ----------------------------------------------------------------------------------


def _identity_of_tools(toolkit: Path | None) -> list[str]:
    """Return what a library depends on besides its source: a part of its key."""
    programs = ["bin/nvcc", "bin/ptxas", "nvvm/bin/cicc", "include/cuda_runtime.h"]
    tools = [tool_identity(toolkit / program) for program in programs] if toolkit else ["no nvcc"]
    if chosen := os.environ.get("PYTORCH_NVCC"):  # torch runs it in nvcc's place
        tools.append(f"{chosen} {tool_identity(shutil.which(chosen) or chosen)}")
    # nvcc takes CC, or the gcc on PATH; torch links with CXX.
    for compiler in (os.environ.get("CC") or "gcc", os.environ.get("CXX") or "c++"):
        tools.append(tool_identity(shutil.which(compiler) or compiler))
    return [*tools, str(torch.__version__), str(torch.version.cuda)]


def _load_inline(library: Path, source: str, toolkit: Path, wanted: str) -> None:
    """Build `source` into `library`, in whose folder all happens."""
    folder = library.parent
    if unusable := re.search(r"[$:|'\"`\\\n]", str(folder)):
        raise BuildError(
            f"the build cache {folder} has {unusable[0]!r} in its path, which ninja or nvcc would "
            "misread: set CONVT_LAB_CACHE to another folder"
        )
    ninja = find_ninja()
    if ninja is None:
        raise BuildError("no ninja: `pip install ninja`")
    chosen = os.environ.get("CXX")
    compiler = shutil.which(chosen) if chosen else shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise BuildError(
            f"no C++ compiler to link with: {chosen or 'c++'!r} is not on PATH; "
            "install g++ or set CXX to a path"
        )
    _check_release(toolkit)
    tools = _supervised_ninja(folder, ninja)
    # Flags only where the variable does not say it: torch takes any flag with "arch" in it for one
    # that chooses the architecture, and leaves out its own.
    number = wanted.replace(".", "")
    flags = [] if _chosen_architectures() else [f"-gencode=arch=compute_{number},code=sm_{number}"]
    home = str(toolkit)
    if shlex.quote(home) != home:  # torch puts it into command lines as it is; they run in `folder`
        home = "cuda"
        (folder / home).symlink_to(toolkit, target_is_directory=True)
    # A name that was never built: torch remembers those that were, even if they failed.
    name = f"{library.stem}_{secrets.token_hex(4)}"
    try:
        # torch builds in this process: it reads PATH and settings of its own module, which are
        # changed while it does.
        with no_fork(), _torch_settings(home) as cpp_extension:
            path = os.pathsep.join([str(tools), _search_path()])
            # The check of the compiler is for code that uses torch's own classes.
            with _environment(PATH=path, CXX=compiler, TORCH_DONT_CHECK_COMPILER_ABI="1"):
                cpp_extension.load_inline(
                    name=name,
                    cpp_sources=[],
                    cuda_sources=[source],
                    extra_cuda_cflags=[*_FLAGS, *flags],
                    extra_ldflags=_runtime_link_flags(toolkit, folder),
                    extra_include_paths=[_for_ninja(KERNEL_FOLDER, quote=False)],
                    build_directory=str(folder),
                    is_python_module=False,
                    no_implicit_headers=True,
                )
        (folder / f"{name}.so").rename(library)
    except Exception as error:  # torch, setuptools and the loader raise errors of many kinds
        raise _failure(error, wanted) from error


@contextmanager
def _torch_settings(toolkit: str) -> Iterator[ModuleType]:
    """Yield torch's builder, set to build with the toolkit at a path."""
    from torch.utils import cpp_extension

    # Both are read from the environment or made once, when the module is imported. torch puts the
    # folder of its libraries into a command line as it is.
    old = cpp_extension.CUDA_HOME, cpp_extension.TORCH_LIB_PATH
    cpp_extension.CUDA_HOME = toolkit
    cpp_extension.TORCH_LIB_PATH = _for_ninja(old[1])
    try:
        yield cpp_extension
    finally:
        cpp_extension.CUDA_HOME, cpp_extension.TORCH_LIB_PATH = old


def _for_ninja(argument: str | Path, *, quote: bool = True) -> str:
    """Return an argument as a ninja file has it, in which the shell and ninja read it."""
    text = shlex.quote(str(argument)) if quote else str(argument)
    return text.replace("$", "$$")


def _supervised_ninja(folder: Path, ninja: str) -> Path:
    """Make a folder with a ``ninja`` that ends in time and with this process; return the folder.

    torch waits for ninja without a limit, and ninja's compilers outlive both.
    """
    tools = folder / "tools"
    scratch = folder / "scratch"  # what a killed nvcc leaves goes with the folder
    tools.mkdir()
    scratch.mkdir()
    script = tools / "ninja"
    command = shlex.join(supervised([ninja]))
    script.write_text(
        f'#!/bin/sh\nexport TMPDIR={shlex.quote(str(scratch))} LC_ALL=C\nexec {command} "$@"\n',
        encoding="utf-8",
        errors="surrogateescape",
    )
    script.chmod(0o700)
    if not os.access(script, os.X_OK):
        raise BuildError(
            f"the file system of the build cache {folder.parent} forbids programs (it is mounted "
            "noexec, perhaps), and libraries with them: set CONVT_LAB_CACHE to a folder elsewhere"
        )
    return tools


def _check_release(toolkit: Path) -> None:
    """Refuse an nvcc that does not run or is of another CUDA than torch."""
    nvcc = toolkit / "bin" / "nvcc"
    status, output = run_tool([nvcc, "--version"], limit=min(60.0, build_timeout()))
    if status != 0:
        raise BuildError(
            f"{nvcc} --version ends with status {status}: {output.strip() or 'no message'}; "
            "install the CUDA toolkit again, or set CUDA_HOME to another"
        )
    found = re.search(r"release (\d+)\.\d+", output)
    built_for = str(torch.version.cuda).partition(".")[0]
    if found and found[1] != built_for:
        raise BuildError(
            f"{nvcc} is of CUDA {found[0].removeprefix('release ')}, torch of CUDA "
            f"{torch.version.cuda}: set CUDA_HOME to a toolkit of CUDA {built_for}"
        )


def _failure(error: Exception, wanted: str) -> Exception:
    """Make the error that a failed build ends in: the source's fault, or the machine's."""
    if isinstance(error, BuildError):
        return error
    text = _without_commands(str(error)) or type(error).__name__
    if isinstance(error.__cause__, OSError):  # the loader's own words
        text += f" ({error.__cause__})"
    if "Could not load" in text or ".so: " in text:
        text += f"; {why_not_loaded(text)}"
    if supervise.TIMED_OUT_TEXT in text:
        return timed_out("nvcc", build_timeout())
    if isinstance(error, ValueError) and "arch" in text:
        return BuildError(f"TORCH_CUDA_ARCH_LIST={wanted!r}: {text}; correct or unset it")
    causes = [outside_cause(text)]
    causes += [f"{m[0]}: {cure}" for p, cure in _CAUSES.items() if (m := re.search(p, text, re.M))]
    for cause in filter(None, causes):
        return BuildError(f"the GPU's kernel could not be built: {cause}")
    if undefined := undefined_error(text):
        return undefined
    refusal = compile_error("nvcc", text)
    at_end = launchers_line(text) is not None or "At end of source: error" in text
    if refusal.line is not None or at_end:
        return refusal
    text = "\n".join(text.splitlines()[:60])
    if isinstance(error, ImportError):
        text += "; torch builds with setuptools: `pip install setuptools`"
    return BuildError(
        f"the GPU's kernel could not be built: {text}\n"
        "`python -m convt_lab doctor` says what is missing here"
    )


def _without_commands(output: str) -> str:
    """Return what tools said, without ninja's account of the commands that it ran."""
    kept = []
    lines = iter(re.sub(r"^Error building extension '\w*': ", "", output).splitlines())
    for line in lines:
        if line.startswith("FAILED: "):
            next(lines, None)  # the command
        elif not re.match(r"\[\d+/\d+\] |ninja: build stopped", line):
            kept.append(line)
    return "\n".join(kept).strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
