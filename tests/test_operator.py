"""The operator and the layer, in PyTorch's place."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab import operator as operator_module
from convt_lab.build import BuildError
from convt_lab.reference import FLOAT32_GATE, condition_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROBLEM = lab.Problem(
    2, 4, 6, 5, 9, (3, 7), stride=(2, 1), padding=(1, 2), output_padding=(1, 0), groups=2, bias=True
)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def data(device):
    return PROBLEM.random_inputs(1, device)


def test_it_is_right_on_the_random_problems(device):
    for number, problem in enumerate(problem_set(300)[::5]):
        x, weight, bias = inputs(problem, seed=number, device=device)
        y = lab.conv_transpose2d(x, weight, bias, **problem.arguments)
        x, weight, bias = (None if t is None else t.cpu() for t in (x, weight, bias))
        error = condition_error(y.cpu(), x, weight, bias, **problem.arguments)
        assert error <= FLOAT32_GATE, problem


@pytest.mark.gpu
def test_on_a_gpu_the_last_stage_runs():
    x, weight, bias = PROBLEM.random_inputs(1, "cuda")
    assert torch.equal(
        lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments),
        list(lab.stages.values())[-1](x, weight, bias, **PROBLEM.arguments),
    )


def test_positional_arguments_unbatched_and_empty(data):
    x, weight, bias = data
    p = PROBLEM
    rest = (weight, bias, p.stride, p.padding, p.output_padding, p.groups, p.dilation)
    expected = F.conv_transpose2d(x, *rest)
    for given, wanted in [(x, expected), (x[1], expected[1]), (x[:0], expected[:0])]:
        y = lab.conv_transpose2d(given, *rest)
        assert y.shape == wanted.shape
        assert torch.allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, None)])
def test_gradients_of_any_subset(data, needed):
    results = []
    for function in (lab.conv_transpose2d, F.conv_transpose2d):
        leaves = [
            None if n is None else t.clone().requires_grad_(bool(n))
            for t, n in zip(data, needed, strict=True)
        ]
        y = function(*leaves, **PROBLEM.arguments)
        y.backward(torch.ones_like(y) / 7)
        results.append([None if t is None else t.grad for t in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-4)


def test_second_derivatives(device):
    problem = lab.Problem(1, 2, 2, 3, 4, (2, 3), stride=2, bias=True)
    results = []
    for function in (lab.conv_transpose2d, F.conv_transpose2d):
        leaves = [t.requires_grad_() for t in problem.random_inputs(3, device)]
        y = function(*leaves, **problem.arguments)
        (grad_x,) = torch.autograd.grad((y**3).sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad((grad_x**2).sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_pytorchs(data, dtype):
    data = [t.to(dtype) for t in data]
    ours = lab.conv_transpose2d(*data, **PROBLEM.arguments)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, F.conv_transpose2d(*data, **PROBLEM.arguments))


def test_autocast_is_honoured(device, data):
    with torch.autocast(device, dtype=torch.bfloat16):
        assert lab.conv_transpose2d(*data, **PROBLEM.arguments).dtype == torch.bfloat16


def test_illegal_arguments_are_refused(data):
    for change in ({"output_padding": 3}, {"groups": 3}, {"stride": 0}, {"padding": 50}):
        with pytest.raises(RuntimeError):
            lab.conv_transpose2d(*data, **{**PROBLEM.arguments, **change})


@pytest.mark.gpu
def test_current_stream_and_device_guard():
    x, weight, bias = PROBLEM.random_inputs(1, "cuda")
    expected = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = lab.conv_transpose2d(late, weight, bias, **PROBLEM.arguments)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_an_output_of_more_than_2_to_31_elements():
    x = torch.zeros(3, 1, 30000, 28000, device="cuda")
    x[2, 0, -1, -1] = 1.0
    weight = torch.arange(1.0, 22.0, device="cuda").reshape(1, 1, 3, 7)
    for stage in lab.stages.values():
        y = stage(x, weight)
        assert y.numel() > 2**31
        assert torch.equal(y[2, 0, -3:, -7:], weight[0, 0])
        assert y[:2].count_nonzero() == 0
        del y


class TestWithoutACompiler:
    def test_it_falls_back_to_pytorch_with_one_warning(self, data, monkeypatch):
        def missing(name):
            raise BuildError("no nvcc: install it")

        monkeypatch.setattr(operator_module, "_is_ours", lambda *tensors: True)
        monkeypatch.setattr(type(operator_module._LAST_STAGE), "program", lambda *a: missing(a))
        operator_module._can_build.cache_clear()
        with pytest.warns(RuntimeWarning, match="falls back to PyTorch.*no nvcc"):
            y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        operator_module._can_build.cache_clear()
        assert torch.equal(y, F.conv_transpose2d(*data, **PROBLEM.arguments))


class TestTheLayer:
    ARGUMENTS = ((4, 6, (3, 7)), {"stride": 2, "padding": 1, "groups": 2})

    def pair(self, device="cpu"):
        layers = []
        for kind in (lab.ConvTranspose2d, torch.nn.ConvTranspose2d):
            torch.manual_seed(3)
            layers.append(kind(*self.ARGUMENTS[0], **self.ARGUMENTS[1], device=device))
        return layers

    def test_initial_values_state_and_repr(self):
        ours, theirs = self.pair()
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)

    def test_forward_and_output_size(self, device):
        ours, theirs = self.pair(device)
        x = torch.randn(2, 4, 5, 6, device=device)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        for size in ([9, 15], [10, 16], (2, 6, 10, 15)):
            y = ours(x, output_size=size)
            assert y.shape == theirs(x, output_size=size).shape
            assert torch.allclose(y, theirs(x, output_size=size), atol=1e-5)
        with pytest.raises(ValueError, match="output size"):
            ours(x, output_size=[40, 40])

    def test_it_learns(self, device):
        layer, _ = self.pair(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = torch.randn(2, 4, 5, 6, device=device)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)


def test_importing_builds_nothing_and_needs_no_book(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, convt_lab; "
        "assert not {'matplotlib', 'IPython', 'jupyter_book', 'torch.utils.cpp_extension'}"
        " & sys.modules.keys()"
    )
    environment = {"PATH": "", "CONVT_LAB_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()
