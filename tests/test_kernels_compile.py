"""nvcc accepts the kernel files that are no stage, without warnings and without spills.

The stages are compiled for all architectures in test_architectures.py.
"""

import re
import subprocess

import pytest

import convt_lab as lab
from convt_lab.architectures import ARCHITECTURES
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.gpu import find_toolkit
from convt_lab.stages import kernels

pytestmark = pytest.mark.skipif(find_toolkit() is None, reason="needs nvcc: no CUDA toolkit found")


OTHERS = sorted({path.stem for path in KERNEL_FOLDER.glob("*.cu")} - set(lab.stages))


CASES = [
    *((name, architecture) for name in OTHERS for architecture in ARCHITECTURES),
    *((n, f"sm_{k.architecture.replace('.', '')}") for n, k in kernels.items() if k.architecture),
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_no_warnings_and_no_spills(name, architecture, tmp_path):
    command = [
        str(find_toolkit() / "bin" / "nvcc"),
        *("-c", "-O3", "-std=c++17", f"-arch={architecture}", f"-I{KERNEL_FOLDER}"),
        *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Xcompiler", "-Wall,-Wextra"),
        *("-Werror", "all-warnings", "-o", str(tmp_path / "kernel.o")),
        str(KERNEL_FOLDER / f"{name}.cu"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills
    assert set(spills) == {("0", "0")}


def test_a_warning_would_be_seen(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(int* x) { int unused = 3; }")
    command = [str(find_toolkit() / "bin" / "nvcc"), "-c", "-Werror", "all-warnings", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0
    assert "unused" in result.stderr
