"""The back end for NVIDIA GPUs: builds a kernel's CUDA C++ with nvcc and launches it.

The kernel files are free of torch, so a build takes seconds;
`torch.utils.cpp_extension.load_inline` runs nvcc and the linker, and the launchers are called
through ctypes on torch's current device and stream. A library that is already built is loaded
without asking any tool.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from convt_lab.backend import (
    KERNEL_FOLDER,
    SOURCE_NAME,
    Array,
    Backend,
    compile_error,
    kernel_headers,
)
from convt_lab.build import BuildError, cached_library
from convt_lab.errors import KernelError

__all__ = ["COMPILER_PACKAGES", "GPU", "architectures", "find_ninja", "find_toolkit"]

#: What holds nvcc for a torch from PyPI, where no CUDA toolkit is installed.
COMPILER_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")

_FLAGS = ("-O3", "-std=c++17", "-lineinfo")
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


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

    That variable is honoured; without it, the current device's own.
    """
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


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
    with contextlib.suppress(ImportError):
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
            return [f"-L{folder}"]
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

        tools = f"{toolkit} {torch.__version__} {torch.version.cuda}"
        headers = [path.read_text() for path in kernel_headers()]
        key = [text, *headers, " ".join(_FLAGS), tools, wanted]
        return ctypes.CDLL(str(cached_library(name, key, build)))

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
        library.convt_lab_error_string.restype = ctypes.c_char_p
        text = library.convt_lab_error_string(code).decode()
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


def _load_inline(library: Path, source: str, toolkit: Path, wanted: str) -> None:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit)  # read once, when the module is imported
    # What a killed build leaves, and what the next one would wait for for ever. The caller's lock
    # says that no other build is under way in this folder.
    (library.parent / "lock").unlink(missing_ok=True)
    try:
        with _environment(TORCH_CUDA_ARCH_LIST=wanted, PATH=_search_path()):
            cpp_extension.load_inline(
                name=library.stem,
                cpp_sources=[],
                cuda_sources=[source],
                extra_cuda_cflags=[*_FLAGS, f"-I{KERNEL_FOLDER}"],
                extra_ldflags=_runtime_link_flags(toolkit, library.parent),
                build_directory=str(library.parent),
                is_python_module=False,
                no_implicit_headers=True,
            )
    except RuntimeError as error:
        text = str(error)
        if re.search(rf"{re.escape(SOURCE_NAME)}\(\d+\)", text):
            raise compile_error("nvcc", text) from error
        raise BuildError(f"the build of {library.stem} failed: {text}") from error
