"""The exported file: it stands alone, and it computes what PyTorch computes.

Without a GPU the file's own Python runs too: nvcc's part is played by the simulator.
"""

import ast
import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import convt_lab as lab
from convt_lab import export
from convt_lab.gpu import _runtime_link_flags, _search_path, find_toolkit
from convt_lab.stages import _ConvTransposeProblem, fma_stages

# Arguments of ModelNew, and the input's shape.
SETTINGS = [
    dict(args=(4, 8, (3, 7)), shape=(2, 4, 9, 13)),
    dict(args=(3, 5, 3), bias=True, shape=(1, 3, 7, 6)),
    dict(
        args=(4, 6, (3, 7)), stride=(2, 3), padding=(1, 2), groups=2, bias=True, shape=(2, 4, 5, 8)
    ),
    dict(args=(2, 2, (2, 4)), stride=2, padding=1, output_padding=1, shape=(1, 2, 6, 5)),
    dict(args=(2, 3, 3), stride=(1, 2), output_padding=(0, 1), shape=(0, 2, 4, 4)),
]


@pytest.fixture(params=list(fma_stages))
def stage(request):
    return lab.stages[request.param]


def load(stage) -> types.ModuleType:
    """Execute the exported text as KernelBench does: from a string, in a namespace of its own."""
    module = types.ModuleType(f"exported_{stage.name}")
    exec(compile(export.exported_file(stage), f"{stage.name}.py", "exec"), vars(module))
    return module


@pytest.fixture
def simulated(monkeypatch):
    """Return a loader of exported files whose `load_inline` builds with the simulator."""

    def load_simulated(stage) -> types.ModuleType:
        module = load(stage)

        def load_inline(**arguments):
            (source,) = arguments["cuda_sources"]
            return lab.compile(source, "simulator", name="exported").library._name

        module.load_inline = load_inline
        return module

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    no_stream = types.SimpleNamespace(cuda_stream=None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: no_stream)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return load_simulated


def model_and_input(module, setting):
    setting = dict(setting)
    args, shape = setting.pop("args"), setting.pop("shape")
    torch.manual_seed(1)
    return module.ModelNew(*args, **setting), torch.randn(shape)


class TestText:
    def test_it_stands_alone(self, stage):
        tree = ast.parse(export.exported_file(stage))
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
        assert imported == {"ctypes", "functools", "hashlib", "torch"}

    def test_the_cuda_source_includes_no_file_of_the_package(self, stage):
        source = export.cuda_source(stage)
        assert '#include "' not in source
        assert "#pragma once" not in source
        assert source.count("struct ConvTransposeProblem {") == 1
        assert "#include <cuda_runtime.h>" in source

    def test_it_says_what_it_is(self, stage):
        docstring = ast.get_docstring(ast.parse(export.exported_file(stage)))
        for words in (stage.name, stage.summary, "convt_lab export", "MIT licence", "ModelNew"):
            assert words in docstring

    def test_it_names_the_licences_owner(self, stage):
        licence = Path(__file__).resolve().parent.parent / "LICENSE"
        owner = next(x for x in licence.read_text().splitlines() if x.startswith("Copyright"))
        assert f"# {owner}\n" in export.exported_file(stage)

    def test_no_line_is_too_long(self, stage):
        lines = export.exported_file(stage).splitlines()
        assert max(map(len, lines)) <= 100

    def test_the_struct_is_that_of_the_stages(self, stage):
        struct = load(stage).Problem
        assert struct._fields_ == _ConvTransposeProblem._fields_
        assert ctypes.sizeof(struct) == ctypes.sizeof(_ConvTransposeProblem)

    def test_the_problem_is_the_star(self, stage):
        module = load(stage)
        problem = lab.Problem.named("star")
        settings = module.get_init_inputs()
        assert settings == [problem.in_channels, problem.out_channels, problem.kernel_size]
        module.height = module.width = 3  # the rest of it is half a gigabyte
        (x,) = module.get_inputs()
        assert x.shape == (problem.batch, problem.in_channels, 3, 3)
        assert 0 <= x.min() <= x.max() < 1
        assert (load(stage).height, load(stage).width) == (problem.height, problem.width)

    def test_an_unknown_header_is_named(self, monkeypatch):
        stage = lab.stages["coalesced"]
        monkeypatch.setattr(type(stage), "source", '#include "own.h"\n')
        with pytest.raises(ValueError, match=r'coalesced includes "own.h"'):
            export.cuda_source(stage)

    def test_a_header_is_inlined_once(self, monkeypatch):
        stage = lab.stages["coalesced"]
        monkeypatch.setattr(type(stage), "source", 2 * '#include "problem.cuh"\n')
        assert export.cuda_source(stage).count("struct Axis {") == 1


class TestOnTheSimulator:
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_it_computes_what_pytorch_computes(self, stage, setting, simulated):
        model, x = model_and_input(simulated(stage), setting)
        layer = model.conv_transpose2d
        actual = model(x)
        expected = layer(x)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)

    def test_the_launcher_is_called_as_written(self, stage):
        """The source alone, through ctypes, with the struct by value."""
        problem = lab.Problem.named("strided_small")
        x, weight, _ = problem.random_inputs()
        output = torch.full(problem.output_shape, torch.nan)
        library = lab.compile(export.cuda_source(stage), "simulator", name="exported").library
        struct = _ConvTransposeProblem.of(problem)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight)]
        code = getattr(library, stage.name)(
            *pointers, None, ctypes.c_void_p(output.data_ptr()), struct, None
        )
        assert code == 0
        expected = lab.reference.scatter(x, weight, **problem.arguments)
        np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-5)

    def test_a_transposed_input_and_weight(self, simulated):
        model, _ = model_and_input(simulated(lab.stages["coalesced"]), SETTINGS[0])
        x = torch.randn(13, 9, 4, 2).permute(3, 2, 1, 0)
        weight = model.conv_transpose2d.weight
        weight.data = weight.detach().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        assert not x.is_contiguous()
        assert not weight.is_contiguous()
        torch.testing.assert_close(model(x), model.conv_transpose2d(x).detach())

    def test_a_launch_that_fails_is_reported(self, simulated):
        module = simulated(lab.stages["coalesced"])
        model, x = model_and_input(module, SETTINGS[0])
        module.library().coalesced.restype = lambda code: 98
        with pytest.raises(RuntimeError, match=r"coalesced was not launched: .* \(CUDA error 98\)"):
            model(x)


class TestModel:
    @pytest.fixture
    def module(self):
        return load(lab.stages["coalesced"])

    @pytest.mark.parametrize("setting", SETTINGS[:4], ids=str)
    def test_the_same_seed_gives_the_parameters_of_the_layer(self, module, setting):
        model, _ = model_and_input(module, setting)
        others = {k: v for k, v in setting.items() if k not in ("args", "shape")}
        torch.manual_seed(1)
        layer = torch.nn.ConvTranspose2d(*setting["args"], **{"bias": False, **others})
        state = layer.state_dict()
        mine = model.state_dict()
        assert list(mine) == [f"conv_transpose2d.{name}" for name in state]
        for name, value in state.items():
            assert torch.equal(mine[f"conv_transpose2d.{name}"], value)

    def test_importing_and_constructing_builds_nothing(self, module, monkeypatch):
        def build(**arguments):
            raise AssertionError("built")

        monkeypatch.setattr(module, "load_inline", build)
        module.ModelNew(*module.get_init_inputs())

    def test_the_cpu_is_refused(self, module):
        model, x = model_and_input(module, SETTINGS[0])
        with pytest.raises(ValueError, match="x is on cpu: it must be on a CUDA GPU"):
            model(x)

    def test_another_dtype_is_refused(self, module, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        model, x = model_and_input(module, SETTINGS[0])
        with pytest.raises(TypeError, match=r"x has dtype torch.float16: it must be torch.float32"):
            model(x.half())
        with pytest.raises(TypeError, match=r"weight has dtype torch.float64"):
            model.double()(x)

    @pytest.mark.parametrize("shape", [(4, 9, 13), (1, 3, 9, 13), (1, 4, 0, 13)])
    def test_another_shape_is_refused(self, module, monkeypatch, shape):
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        model, _ = model_and_input(module, SETTINGS[0])
        with pytest.raises(ValueError, match="x has shape"):
            model(torch.zeros(shape))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("stride", 0),
            ("stride", (1, 2, 3)),
            ("padding", -1),
            ("output_padding", 1),
            ("kernel_size", (3, 7, 1)),
        ],
    )
    def test_an_illegal_setting_is_named(self, module, name, value):
        settings = {"kernel_size": (3, 7), name: value}
        with pytest.raises(ValueError, match=name):
            module.ModelNew(2, 2, **settings)


class TestWrite:
    def test_an_existing_file_is_kept(self, stage, tmp_path):
        file = tmp_path / "model.py"
        export.write(stage, file)
        assert file.read_text(encoding="utf-8") == export.exported_file(stage)
        file.write_text("mine")
        with pytest.raises(FileExistsError):
            export.write(stage, file)
        assert file.read_text() == "mine"
        export.write(stage, file, overwrite=True)
        assert "ModelNew" in file.read_text()

    def test_on_a_full_disk_no_half_is_left(self, stage, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        kept, new = tmp_path / "kept.py", tmp_path / "new.py"
        kept.write_text("mine")
        for file, overwrite in ((kept, True), (new, False), (new, True)):
            with pytest.raises(OSError, match="No space left"):
                export.write(stage, file, overwrite)
        assert kept.read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["kept.py"]

    def test_a_device_stays_one(self, stage):
        export.write(stage, "/dev/null", overwrite=True)
        assert not os.path.isfile("/dev/null")


@pytest.mark.skipif(find_toolkit() is None, reason="needs nvcc: none was found")
def test_nvcc_compiles_the_source_without_warnings(stage, tmp_path):
    file = tmp_path / f"{stage.name}.cu"
    file.write_text(export.cuda_source(stage))
    nvcc = find_toolkit() / "bin" / "nvcc"
    flags = ["-c", "-O1", "-std=c++17", "-arch=sm_80", "-Werror", "all-warnings"]
    result = subprocess.run(
        [nvcc, *flags, file, "-o", tmp_path / "out.o"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


GPU_SCRIPT = """
import importlib.util, sys, torch
sys.modules["convt_lab"] = None  # importing it raises

spec = importlib.util.spec_from_file_location("exported", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

for setting in eval(sys.argv[2]):
    args, shape = setting.pop("args"), setting.pop("shape")
    model = module.ModelNew(*args, **setting).cuda()
    x = torch.randn(shape, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        actual = model(x)
        expected = model.conv_transpose2d.double()(x.double())
    stream.synchronize()
    assert actual.shape == expected.shape and actual.dtype == torch.float32, setting
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
print("all agree")
"""


@pytest.mark.gpu
def test_the_file_alone_on_a_gpu(stage, tmp_path):
    """A process of its own that can't import convt_lab, with the tools where PyTorch looks."""
    file = tmp_path / "exported.py"
    export.write(stage, file)
    large = dict(args=(16, 32, (3, 7)), shape=(2, 16, 61, 131))
    toolkit = find_toolkit()
    _runtime_link_flags(toolkit, tmp_path)  # pip's compiler packages have no libcudart.so
    environment = os.environ | {
        "CUDA_HOME": str(toolkit),
        "PATH": _search_path(),
        "LIBRARY_PATH": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    result = subprocess.run(
        [sys.executable, "-c", GPU_SCRIPT, str(file), repr([*SETTINGS, large])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "all agree"
