"""The operator in PyTorch's place: its interface, and how it runs."""

import subprocess
import sys
import threading
import types
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import KERNEL, PATHS, choose, counting_runs, device_of, on_path, tf32, without_tf32
from strategies import inputs, problem_set

import convt_lab as lab
from convt_lab import dispatch, library
from convt_lab import operator as operator_module
from convt_lab import plan as plans
from convt_lab.build import BuildError
from convt_lab.operator import conv_transpose2d_between, kernel_between
from convt_lab.overhead import call_overhead
from convt_lab.reference import condition_error, float32_gate
from convt_lab.stages import Kernel

PROBLEM = lab.Problem(
    2, 4, 6, 5, 9, (3, 7), stride=(2, 1), padding=(1, 2), output_padding=(1, 0), groups=2, bias=True
)
gpu = pytest.mark.gpu
OURS = ["simulator", pytest.param("cuda_ours", marks=gpu)]


@pytest.fixture(params=PATHS)
def path(request):
    with on_path(request.param) as device, without_tf32(device):
        yield request.param


@pytest.fixture
def device(path):
    return device_of(path)


@pytest.fixture
def data(device):
    return PROBLEM.random_inputs(1, device)


@pytest.fixture
def simulated():
    """Let the operator run kernels of ours on the CPU; the names of those that ran."""
    with on_path("simulator"), counting_runs() as runs:
        yield runs


@pytest.fixture
def ours_on_gpu():
    with on_path("cuda_ours"), counting_runs() as runs:
        yield runs


class TestArguments:
    def test_positional_arguments_unbatched_and_empty(self, data):
        x, weight, bias = data
        p = PROBLEM
        rest = (weight, bias, p.stride, p.padding, p.output_padding, p.groups, p.dilation)
        expected = F.conv_transpose2d(x, *rest)
        for given, wanted in [(x, expected), (x[1], expected[1]), (x[:0], expected[:0])]:
            y = lab.conv_transpose2d(given, *rest)
            assert y.shape == wanted.shape
            assert torch.allclose(y, wanted, atol=1e-5)

    def test_keywords_are_pytorchs(self, data):
        x, weight, bias = data
        arguments = dict(input=x, weight=weight, bias=bias, **PROBLEM.arguments)
        torch.testing.assert_close(
            lab.conv_transpose2d(**arguments), F.conv_transpose2d(**arguments)
        )

    @pytest.mark.parametrize("value", [2, (2,), [2], (2, 2), [2, 2], np.int64(2), torch.Size([2])])
    def test_spellings_of_a_pair(self, data, value):
        x, weight, _ = data
        for name in ("stride", "padding", "dilation"):
            assert torch.equal(
                lab.conv_transpose2d(x, weight, **{name: value}),
                lab.conv_transpose2d(x, weight, **{name: (2, 2)}),
            )

    def test_equal_keys_of_another_type_are_told_apart(self, data):
        """1 == 1.0 == True, but PyTorch takes only the first for a stride."""
        x, weight, _ = data
        lab.conv_transpose2d(x, weight, stride=1)
        for wrong in (1.0, True, (1, 1.0)):
            with pytest.raises(TypeError, match="stride"):
                lab.conv_transpose2d(x, weight, stride=wrong)

    def test_infinite_padding_of_an_int(self, data):
        x, weight, _ = data
        with pytest.raises((TypeError, RuntimeError)):
            lab.conv_transpose2d(x, weight, padding="same")


WRONG = {
    "output_padding": dict(output_padding=3),
    "groups": dict(groups=3),
    "stride": dict(stride=0),
    "padding": dict(padding=50),
    "dilation": dict(dilation=-1),
}


class TestErrors:
    @pytest.mark.parametrize("name", WRONG)
    def test_a_wrong_value_is_named(self, data, name):
        arguments = {**PROBLEM.arguments, **WRONG[name]}
        value = next(iter(WRONG[name].values()))
        for kind in (lab.ProblemError, RuntimeError, ValueError):
            with pytest.raises(kind, match=f"{name}.*{value}"):
                lab.conv_transpose2d(*data, **arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, w, b: (x[:, :3], w, b), "input has shape .*, so 3 channels"),
            (lambda x, w, b: (x, w, b[:2]), r"bias has shape \[2\]: it must be \[6\]"),
            (lambda x, w, b: (x[0, 0], w, b), "input"),
            (lambda x, w, b: (x, w[0], b), "weight"),
        ],
    )
    def test_shapes_that_do_not_agree(self, data, change, message):
        tensors = change(*data)
        with pytest.raises(RuntimeError):
            F.conv_transpose2d(*tensors, **PROBLEM.arguments)
        with pytest.raises(RuntimeError, match=message):
            lab.conv_transpose2d(*tensors, **PROBLEM.arguments)

    def test_an_error_says_what_pytorch_says_too(self, data):
        with pytest.raises(lab.ProblemError, match=r"at most 1 \(PyTorch: output padding must be"):
            lab.conv_transpose2d(*data, **{**PROBLEM.arguments, "output_padding": 3})

    @pytest.mark.parametrize("place", ["input", "weight", "bias"])
    def test_what_is_no_tensor(self, data, place):
        arguments = dict(zip(("input", "weight", "bias"), data, strict=True))
        with pytest.raises(TypeError, match=f"{place} must be a tensor"):
            lab.conv_transpose2d(**{**arguments, place: [1.0]}, **PROBLEM.arguments)

    def test_dtypes_that_differ(self, data):
        x, weight, bias = data
        for tensors in [(x.double(), weight, bias), (x, weight.half(), bias)]:
            with pytest.raises(RuntimeError) as theirs:
                F.conv_transpose2d(*tensors, **PROBLEM.arguments)
            with pytest.raises(RuntimeError) as ours:
                lab.conv_transpose2d(*tensors, **PROBLEM.arguments)
            assert str(ours.value) == str(theirs.value)

    @gpu
    def test_devices_that_differ(self):
        x, weight, bias = PROBLEM.random_inputs(1, "cuda")
        for tensors in [(x.cpu(), weight, bias), (x, weight.cpu(), bias), (x, weight, bias.cpu())]:
            with pytest.raises(RuntimeError, match=r"device|type"):
                lab.conv_transpose2d(*tensors, **PROBLEM.arguments)

    def test_a_tensor_without_data_among_others(self, device):
        """PyTorch returns what happens to be in memory."""
        x, weight, bias = PROBLEM.random_inputs(1, device)
        for tensors in [(x, weight.to("meta"), bias), (x, weight, bias.to("meta"))]:
            with pytest.raises(lab.ProblemError, match=rf"is on meta and input on {x.device}"):
                lab.conv_transpose2d(*tensors, **PROBLEM.arguments)
        assert lab.conv_transpose2d(*(t.to("meta") for t in (x, weight))).is_meta


class TestGradients:
    @pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 1, None)])
    def test_any_subset(self, data, needed):
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

    def test_second_derivatives(self, device):
        problem = lab.Problem(1, 2, 2, 3, 4, (2, 3), stride=2, bias=True)
        results = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):
            leaves = [t.requires_grad_() for t in problem.random_inputs(3, device)]
            y = function(*leaves, **problem.arguments)
            (grad_x,) = torch.autograd.grad((y**3).sum(), leaves[0], create_graph=True)
            results.append(torch.autograd.grad((grad_x**2).sum(), leaves))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    def test_memory_format_of_gradients(self, data):
        results = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):
            x = data[0].to(memory_format=torch.channels_last).requires_grad_()
            weight = data[1].clone().requires_grad_()
            y = function(x, weight, data[2], **PROBLEM.arguments)
            results.append(torch.autograd.grad(y.sum(), (x, weight)))
        for ours, theirs in zip(*results, strict=True):
            assert ours.stride() == theirs.stride()

    def test_inference_mode_and_no_grad(self, data):
        leaves = [t.clone().requires_grad_() for t in data]
        expected = F.conv_transpose2d(*data, **PROBLEM.arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = lab.conv_transpose2d(*leaves, **PROBLEM.arguments)
            assert not y.requires_grad
            assert y.is_inference() == (mode is torch.inference_mode)
            assert torch.allclose(y, expected, atol=1e-5)

    def test_a_tensor_changed_after_the_call_is_noticed(self, data):
        x, weight, bias = (t.clone().requires_grad_() for t in data)
        y = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


TRANSFORMS = {
    "grad": lambda f, *t: torch.func.grad(lambda *t: (f(*t) ** 2).sum(), (0, 1, 2))(*t),
    "vjp": lambda f, *t: torch.func.vjp(f, *t)[1](f(*t)),
    "jvp": lambda f, *t: torch.func.jvp(f, t, tuple(2 * s + 1 for s in t)),
    "jvp_of_bias": lambda f, x, w, b: torch.func.jvp(lambda b: f(x, w, b), (b,), (b + 1,)),
    "jvp_of_input": lambda f, x, w, b: torch.func.jvp(lambda x: f(x, w, b), (x,), (x + 1,)),
    "jacrev": lambda f, *t: torch.func.jacrev(f, 1)(*t),
    "jacfwd": lambda f, *t: torch.func.jacfwd(f, 1)(*t),
    "hessian": lambda f, *t: torch.func.hessian(lambda *t: (f(*t) ** 2).sum(), 1)(*t),
    "grad_of_grad": lambda f, *t: torch.func.grad(
        lambda *t: torch.func.grad(lambda *t: (f(*t) ** 3).sum())(*t).square().sum(), 1
    )(*t),
    "per_sample_gradients": lambda f, x, w, b: torch.func.vmap(
        torch.func.grad(lambda w, x: (f(x, w, b) ** 2).sum()), (None, 0)
    )(w, x),
    "vmap_of_vmap": lambda f, x, w, b: torch.func.vmap(
        torch.func.vmap(f, (0, None, None)), (0, None, None)
    )(torch.stack([x, 2 * x])[:, :, None], w, b),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own use
class TestTransforms:
    """torch.func and forward differentiation: as PyTorch's operator, which has a rule for each."""

    @pytest.fixture
    def small(self, device):
        return lab.Problem(2, 4, 6, 3, 4, (3, 2), stride=2, groups=2, bias=True).random_inputs(
            2, device
        )

    @staticmethod
    def of(function):
        return lambda *tensors: function(*tensors, stride=2, groups=2)

    def compare(self, transform, *tensors):
        ours = transform(self.of(lab.conv_transpose2d), *tensors)
        theirs = transform(self.of(F.conv_transpose2d), *tensors)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_as_pytorchs(self, small, name):
        self.compare(TRANSFORMS[name], *small)

    @pytest.mark.parametrize("weight_dim", [None, 0, 2])
    @pytest.mark.parametrize("input_dim", [None, 0, 4])
    @pytest.mark.parametrize("bias_dim", [None, 1])
    def test_vmap(self, small, input_dim, weight_dim, bias_dim):
        dims = (input_dim, weight_dim, bias_dim)
        if dims == (None, None, None):
            pytest.skip("vmap wants an example")
        stacked = [
            t if d is None else torch.stack([t, t + 1, 2 - t], d)
            for t, d in zip(small, dims, strict=True)
        ]
        self.compare(lambda f, *t: torch.func.vmap(f, dims, out_dims=1)(*t), *stacked)
        # The bare operator has a rule of its own.
        bare = torch.func.vmap(
            lambda *t: library.torch_operator(*t, (2, 2), (0, 0), (0, 0), 2), dims
        )(*stacked)
        torch.testing.assert_close(
            bare, torch.func.vmap(self.of(F.conv_transpose2d), dims)(*stacked), rtol=1e-3, atol=1e-3
        )

    def test_vmap_of_one_image_each(self, small):
        self.compare(lambda f, *t: torch.func.vmap(f, (0, None, None))(*t), *small)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_dual_numbers(self, small, place):
        def tangent(function, *tensors):
            with torch.autograd.forward_ad.dual_level():
                tensors = list(tensors)
                tensors[place] = torch.autograd.forward_ad.make_dual(
                    tensors[place], tensors[place] + 1
                )
                return torch.autograd.forward_ad.unpack_dual(function(*tensors)).tangent

        self.compare(tangent, *small)

    def test_the_bare_operator(self, small):
        def bare(*tensors, stride, groups):
            return library.torch_operator(*tensors, (2, 2), (0, 0), (0, 0), groups)

        for name in ("grad", "jvp", "hessian"):
            transform = TRANSFORMS[name]
            torch.testing.assert_close(
                transform(self.of(bare), *small),
                transform(self.of(F.conv_transpose2d), *small),
                rtol=1e-3,
                atol=1e-3,
            )


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_autocast(self, data, device, dtype, needs_grad):
        results = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):
            leaves = [t.clone().requires_grad_(needs_grad) for t in data]
            with torch.autocast(device, dtype=dtype):
                y = function(*leaves, **PROBLEM.arguments)
                wide = function(*(t.double() for t in leaves), **PROBLEM.arguments)
                mixed = function(leaves[0].to(dtype), *leaves[1:], **PROBLEM.arguments)
            assert (y.dtype, wide.dtype, mixed.dtype) == (dtype, torch.float64, dtype)
            if needs_grad:
                y.float().sum().backward()
                assert all(t.grad.dtype == torch.float32 for t in leaves)
            results.append([y, wide, mixed, *([t.grad for t in leaves] if needs_grad else [])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("path", OURS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast_where_a_kernel_of_ours_takes_the_type(self, path, dtype):
        with on_path(path, "few_channels") as device, counting_runs() as runs:
            data = PROBLEM.random_inputs(1, device)
            results = []
            for function in (lab.conv_transpose2d, F.conv_transpose2d):
                with torch.autocast(device, dtype=dtype):
                    y = function(*data, **PROBLEM.arguments)
                    wide = function(*(t.double() for t in data), **PROBLEM.arguments)
                assert (y.dtype, wide.dtype) == (dtype, torch.float64)
                results.append((y, wide))
        assert runs == ["few_channels"]
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)

    def test_autocast_that_is_off_or_of_another_device(self, data, device):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=False):
            assert lab.conv_transpose2d(*data, **PROBLEM.arguments).dtype == torch.float32
        other = "cpu" if device == "cuda" else "cuda"
        if other == "cpu" or torch.cuda.is_available():
            with torch.autocast(other, dtype=torch.bfloat16):
                assert lab.conv_transpose2d(*data, **PROBLEM.arguments).dtype == torch.float32

    def test_autocast_under_transforms(self, data, device):
        """vmap is left out: PyTorch's own convolutions forget autocast there, ours do not."""
        results = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):

            def of(*tensors, function=function):
                return function(*tensors, **PROBLEM.arguments)

            with torch.autocast(device, dtype=torch.bfloat16):
                results.append(torch.func.vjp(of, *data)[0])
        assert results[0].dtype == results[1].dtype == torch.bfloat16
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)

    def test_tf32_is_asked_for_as_pytorch_does(self, simulated, monkeypatch):
        """The legacy setting and the newer one are the same switch for a convolution."""
        asked = []

        def chosen(*arguments, channels_last, tf32):
            asked.append(tf32)
            return choose(KERNEL)(*arguments, channels_last=channels_last, tf32=tf32)

        monkeypatch.setattr(dispatch, "choose", chosen)
        data = PROBLEM.random_inputs(1)
        for is_allowed in (True, False, True):
            with tf32(is_allowed):
                lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert asked == [True, False]  # the third time it is known
        code = (
            "import torch, convt_lab.plan as plan\n"
            "for value in (True, False, True):\n"
            "    torch.backends.cudnn.allow_tf32 = value\n"
            "    assert plan.allows_tf32() == value == torch.backends.cudnn.allow_tf32\n"
            "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"  # the legacy getter raises now
            "assert not plan.allows_tf32()\n"
            "torch.backends.cudnn.conv.fp32_precision = 'tf32'\n"
            "assert plan.allows_tf32()\n"
            "torch.backends.cudnn.conv.fp32_precision = 'none'\n"
            "torch.backends.fp32_precision = 'ieee'\n"
            "assert not plan.allows_tf32()\n"
            "torch.backends.fp32_precision = 'tf32'\n"
            "assert plan.allows_tf32()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestOtherTensors:
    def test_meta_and_fake_tensors(self, data):
        from torch._subclasses.fake_tensor import FakeTensorMode

        x, weight, bias = data
        expected = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        meta = lab.conv_transpose2d(*(t.to("meta") for t in data), **PROBLEM.arguments)
        assert meta.is_meta
        assert meta.shape == expected.shape
        last = x.to(memory_format=torch.channels_last)
        for given in (x, last):
            expected = lab.conv_transpose2d(given, weight, bias, **PROBLEM.arguments)
            with FakeTensorMode() as mode:
                tensors = [mode.from_tensor(t) for t in (given, weight, bias)]
                fake = lab.conv_transpose2d(*tensors, **PROBLEM.arguments)
            assert fake.device == expected.device
            assert fake.shape == expected.shape
            assert fake.stride() == expected.stride()

    def test_zeros_without_memory(self, data):
        x, weight, bias = data
        zeros = [torch._efficientzerotensor(t.shape, device=t.device) for t in data]
        for tensors in [(zeros[0], weight, bias), (x, zeros[1], bias), (x, weight, zeros[2])]:
            real = [torch.zeros_like(t) if t._is_zerotensor() else t for t in tensors]
            torch.testing.assert_close(
                lab.conv_transpose2d(*tensors, **PROBLEM.arguments),
                F.conv_transpose2d(*real, **PROBLEM.arguments),
            )

    def test_subclasses_keep_their_rules(self, data):
        seen = []

        class Logged(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                return super().__torch_function__(function, types, args, kwargs)

        y = lab.conv_transpose2d(data[0].as_subclass(Logged), *data[1:], **PROBLEM.arguments)
        assert isinstance(y, Logged)
        assert F.conv_transpose2d in seen

    def test_subclasses_keep_their_rules_under_a_compiler(self, simulated):
        class Doubled(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                y = super().__torch_function__(function, types, args, kwargs)
                return 2 * y if function is F.conv_transpose2d else y

        x, weight, bias = PROBLEM.random_inputs(1)
        expected = F.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        compiled = torch.compile(lab.conv_transpose2d, backend="eager", fullgraph=True)
        y = compiled(x.as_subclass(Doubled), weight, bias, **PROBLEM.arguments)
        assert torch.equal(y.as_subclass(torch.Tensor), 2 * expected)
        assert simulated == []

    def test_functionalization(self, data):
        expected = lab.conv_transpose2d(*data, **PROBLEM.arguments)

        def call(*tensors):
            return lab.conv_transpose2d(*tensors, **PROBLEM.arguments)

        y = torch.func.functionalize(call)(*data)
        torch.testing.assert_close(y, expected)
        vmapped = torch.func.vmap(torch.func.functionalize(call), (0, None, None))(
            data[0].unsqueeze(0), *data[1:]
        )
        torch.testing.assert_close(vmapped[0], expected)

    def test_symbolic_tracing(self, data):
        layer = lab.ConvTranspose2d(PROBLEM.in_channels, 6, 3, groups=2).to(data[0].device)
        traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
        assert any(node.target is F.conv_transpose2d for node in traced.graph.nodes)
        torch.testing.assert_close(traced(data[0]), layer(data[0]))

    def test_a_default_device_changes_nothing(self, data, monkeypatch):
        """It leaves a mode on, which has nothing to say about convolutions."""
        monkeypatch.setattr(operator_module, "torch_operator", None)
        expected = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        with torch.device("meta"):
            y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert torch.equal(y, expected)

    @pytest.mark.parametrize("stride", [2.0, "a", True, None, (1, 1.5)])
    def test_modes_change_no_errors(self, data, stride):
        from torch.utils.flop_counter import FlopCounterMode

        for mode in (nullcontext(), FlopCounterMode(display=False)):
            with mode, pytest.raises(TypeError, match="stride"):
                lab.conv_transpose2d(*data, stride=stride)

    def test_what_only_pytorch_takes_is_pytorchs_in_modes_too(self, simulated):
        from torch.utils.flop_counter import FlopCounterMode

        x, weight = torch.ones(0, 1, 3, 3), torch.ones(1, 1, 2, 2)
        expected = F.conv_transpose2d(x, weight, dilation=6, output_padding=5)
        for mode in (nullcontext(), FlopCounterMode(display=False)):
            with mode:
                y = lab.conv_transpose2d(x, weight, dilation=6, output_padding=5)
            assert y.shape == expected.shape

    def test_a_module_that_is_being_imported(self, data, monkeypatch):
        """By another thread: what it defines is not there yet."""
        half = types.ModuleType("torch.distributed.tensor")
        monkeypatch.setitem(sys.modules, "torch.distributed.tensor", half)
        y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert y.shape == PROBLEM.output_shape

    @pytest.mark.parametrize("name", ["benchmark", "deterministic", "enabled"])
    def test_a_setting_of_pytorchs_is_followed_at_once(self, simulated, monkeypatch, name):
        asked = []

        def chosen(*arguments, **form):
            asked.append(arguments)
            return dispatch.Choice("pytorch", "a test says so")

        monkeypatch.setattr(dispatch, "choose", chosen)
        data = PROBLEM.random_inputs(1)
        for _ in range(2):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert len(asked) == 1
        monkeypatch.setattr(torch.backends.cudnn, name, not getattr(torch.backends.cudnn, name))
        for _ in range(2):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert len(asked) == 2

    def test_a_choice_that_does_not_last_is_asked_for_again(self, simulated, monkeypatch):
        lasts = iter([False, False, True])
        monkeypatch.setattr(
            dispatch,
            "choose",
            lambda *_, **__: dispatch.Choice("pytorch", "a test says so", next(lasts)),
        )
        data = PROBLEM.random_inputs(1)
        for _ in range(5):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert list(lasts) == []

    def test_modes_see_the_call(self, data):
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils.flop_counter import FlopCounterMode

        seen = []

        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        with Log():
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert seen
        counts = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):
            with FlopCounterMode(display=False) as counter:
                function(*data, **PROBLEM.arguments)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_a_default_device(self, data):
        expected = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        with torch.device("meta"):
            y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert torch.equal(y, expected)

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    def test_tracing_by_torch_jit_gives_a_graph(self, data):
        def function(*tensors):
            return lab.conv_transpose2d(*tensors, **PROBLEM.arguments)

        traced = torch.jit.trace(function, tuple(data))
        double = (2 * data[0], *data[1:])
        torch.testing.assert_close(traced(*double), function(*double))

    def test_profilers_find_its_name(self, simulated):
        data = PROBLEM.random_inputs(1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert "convt_lab::conv_transpose2d" in [event.key for event in profile.key_averages()]
        assert simulated == [KERNEL]


class TestPlans:
    """What is decided once, and when it is decided anew."""

    def test_on_the_cpu_pytorchs_kernel_runs(self):
        x, weight, bias = PROBLEM.random_inputs(1)
        with counting_runs() as runs:
            y = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        assert torch.equal(y, F.conv_transpose2d(x, weight, bias, **PROBLEM.arguments))
        assert runs == []

    def test_a_kernel_of_ours_runs_once_for_each_call(self, simulated):
        x, weight, bias = PROBLEM.random_inputs(1)
        expected = lab.stages[KERNEL](x, weight, bias, **PROBLEM.arguments)
        leaves = [x, weight.requires_grad_(), bias]
        for tensors in ((x, weight.detach(), bias), leaves):
            assert torch.equal(lab.conv_transpose2d(*tensors, **PROBLEM.arguments), expected)
        assert simulated == [KERNEL, KERNEL]

    @pytest.mark.parametrize(("above", "below"), [(0, 0), (2, 0), (4, 1), (0, 4), (3, 2)])
    def test_some_rows_by_a_kernel_of_ours(self, simulated, above, below):
        """Also where padding could not crop as many rows at both ends."""
        problem = lab.Problem(2, 4, 6, 4, 9, kernel_size=(3, 7), bias=True)
        x, weight, bias = problem.random_inputs(1)
        arguments = tuple(problem.arguments.values())
        whole = lab.stages[KERNEL](x, weight, bias, *arguments)
        rows = conv_transpose2d_between(x, weight, bias, arguments, above, below)
        assert torch.equal(rows, whole[:, :, above : 6 - below])
        assert simulated == [KERNEL]
        assert kernel_between(x, weight, bias, arguments, above, below) == KERNEL

    def test_a_kernel_that_is_named_is_taken(self, simulated):
        problem = lab.Problem(2, 4, 6, 4, 9, kernel_size=(3, 7), bias=True)
        x, weight, bias = problem.random_inputs(1)
        arguments = tuple(problem.arguments.values())
        # The second is for another kind of problem.
        for name, runs in (("coalesced", "coalesced"), ("one_channel", KERNEL), (None, KERNEL)):
            rows = conv_transpose2d_between(x, weight, bias, arguments, 2, 1, name)
            assert torch.allclose(rows, F.conv_transpose2d(x, weight, bias)[:, :, 2:5], atol=1e-5)
            assert simulated.pop() == runs

    def test_a_choice_is_made_once(self, simulated, monkeypatch):
        made = []
        monkeypatch.setattr(
            dispatch, "choose", lambda *a, **k: (made.append(a[0]), choose(KERNEL)(*a, **k))[1]
        )
        data = PROBLEM.random_inputs(1)
        for _ in range(3):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert made == [PROBLEM]
        lab.conv_transpose2d(data[0].mT.contiguous().mT, *data[1:], **PROBLEM.arguments)
        assert len(made) == 2
        monkeypatch.setattr(dispatch, "generation", dispatch.generation + 1)
        lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert len(made) == 3

    @pytest.mark.parametrize(
        "change",
        [
            lambda x, w, b: (x[:1], w, b),
            lambda x, w, b: (x.mT.contiguous().mT, w, b),
            lambda x, w, b: (x, w.mT.contiguous().mT, b),
            lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
            lambda x, w, b: (x, w, None),
            lambda x, w, b: (x.half(), w.half(), b.half()),
            lambda x, w, b: (x.to(memory_format=torch.channels_last), w, b),
        ],
        ids=["batch", "input", "weight", "bias", "no bias", "dtype", "channels last"],
    )
    def test_a_call_that_differs_in_one_thing_has_a_plan_of_its_own(self, simulated, change):
        data = PROBLEM.random_inputs(1)
        changed = change(*data)
        for _ in range(2):
            for tensors in (data, changed):
                y = lab.conv_transpose2d(*tensors, **PROBLEM.arguments)
                expected = F.conv_transpose2d(*tensors, **PROBLEM.arguments)
                torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3, check_stride=True)
        assert len(plans._plans) == 2

    def test_dtypes_that_differ_after_a_call_whose_dtypes_agree(self, simulated):
        x, weight, bias = PROBLEM.random_inputs(1)
        with tf32(False):  # where it is allowed, it tells float32 from the others as well
            lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
            for wrong in [(x.half(), weight, bias), (x, weight.half(), bias)]:
                with pytest.raises(RuntimeError, match="type"):
                    lab.conv_transpose2d(*wrong, **PROBLEM.arguments)

    def test_without_cudnn_pytorchs_output_may_lie_otherwise(self, simulated, monkeypatch):
        """So what is planned with it is not used without."""
        data = PROBLEM.random_inputs(1)
        lab.conv_transpose2d(*data, **PROBLEM.arguments)
        monkeypatch.setattr(torch.backends.cudnn, "enabled", not torch.backends.cudnn.enabled)
        lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert len(plans._plans) == 2

    def test_their_number_is_bounded(self, simulated, monkeypatch):
        monkeypatch.setattr(plans, "MAX_PLANS", 3)
        weight = torch.ones(1, 1, 2, 2)
        for width in range(1, 9):
            lab.conv_transpose2d(torch.ones(1, 1, 2, width), weight)
            assert len(plans._plans) <= 3

    def test_a_kernel_is_not_given_what_it_does_not_take(self, simulated, monkeypatch):
        """Even if the dispatch says so."""
        monkeypatch.setattr(dispatch, "choose", lambda *a, **k: dispatch.Choice(KERNEL, "wrong"))
        monkeypatch.setattr(Kernel, "supports", lambda *arguments: False)
        data = PROBLEM.random_inputs(1)
        y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        assert torch.equal(y, F.conv_transpose2d(*data, **PROBLEM.arguments))
        assert simulated == []

    def test_without_a_compiler_pytorch_computes_with_one_warning(self, simulated, monkeypatch):
        def missing(*arguments):
            raise BuildError("no nvcc: install it")

        monkeypatch.setattr(plans, "unbuildable", set())
        monkeypatch.setattr(Kernel, "program", missing)
        data = PROBLEM.random_inputs(1)
        with pytest.warns(RuntimeWarning, match=f"falls back to PyTorch.*{KERNEL}.*no nvcc"):
            y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lab.conv_transpose2d(*data, **PROBLEM.arguments)
            lab.conv_transpose2d(data[0][:1], *data[1:], **PROBLEM.arguments)
        assert torch.equal(y, F.conv_transpose2d(*data, **PROBLEM.arguments))
        assert simulated == []
        monkeypatch.setattr(dispatch, "choose", choose("coalesced"))
        plans._plans.clear()
        with pytest.warns(RuntimeWarning, match="coalesced"):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)

    def test_what_is_too_large_for_ours_goes_to_pytorch(self, simulated):
        x = torch.zeros(1, 1, 2, 1).expand(1, 1, 2, 1)
        weight = torch.ones(1, 1, 1, 1)
        stride = (2**31, 1)  # a problem of ours has at most 2^31 - 2^16 rows
        with pytest.raises(lab.ProblemError, match="at most"):
            lab.Problem.from_shapes(x.shape, weight.shape, stride=stride)
        with torch.device("meta"):
            y = lab.conv_transpose2d(x.to("meta"), weight.to("meta"), stride=stride)
        assert y.shape == (1, 1, 2**31 + 1, 1)

    def test_threads(self, simulated):
        data = PROBLEM.random_inputs(1)
        expected = lab.conv_transpose2d(*data, **PROBLEM.arguments)
        wrong = []

        def work():
            for number in range(20):
                x = data[0] if number % 2 else data[0].clone()
                y = lab.conv_transpose2d(x, *data[1:], **PROBLEM.arguments)
                if not torch.equal(y, expected):
                    wrong.append(number)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_launch_that_is_refused_raises(self, simulated, monkeypatch):
        data = PROBLEM.random_inputs(1)
        lab.conv_transpose2d(*data, **PROBLEM.arguments)
        (plan,) = plans._plans.values()
        broken = plans.Launcher(
            plans.kernels[KERNEL], PROBLEM, torch.float32, False, torch.device("cpu")
        )
        broken._function = lambda *arguments: 1
        monkeypatch.setattr(plan, "_launcher", broken)
        with pytest.raises(lab.KernelError, match=KERNEL):
            lab.conv_transpose2d(*data, **PROBLEM.arguments)


class TestOnAGPU:
    pytestmark = gpu

    def test_the_current_stream_with_a_producer_that_sleeps(self, ours_on_gpu):
        x, weight, bias = PROBLEM.random_inputs(1, "cuda")
        expected = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        for needs_grad in (False, True):
            stream = torch.cuda.Stream()
            late = torch.zeros_like(x, requires_grad=needs_grad)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)
                with torch.no_grad():
                    late.copy_(x)
                y = lab.conv_transpose2d(late, weight, bias, **PROBLEM.arguments)
                assert not stream.query()  # the call has waited for nothing
            stream.synchronize()
            assert torch.equal(y, expected)
        assert set(ours_on_gpu) == {KERNEL}

    @pytest.mark.parametrize("kernel", ["dispatch", KERNEL])
    def test_a_captured_graph_is_replayed_with_new_inputs(self, kernel, monkeypatch):
        if kernel == KERNEL:
            monkeypatch.setattr(dispatch, "choose", choose(KERNEL))
        monkeypatch.setattr(plans, "_plans", {})
        x, weight, bias = PROBLEM.random_inputs(1, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        for seed in (2, 3):
            new = PROBLEM.random_inputs(seed, "cuda")
            for old, value in zip((x, weight, bias), new, strict=True):
                old.copy_(value)
            graph.replay()
            assert torch.equal(y, lab.conv_transpose2d(*new, **PROBLEM.arguments))

    # PyTorch's own doing: it warms the layer up on a stream of its own.
    @pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
    def test_make_graphed_callables(self, ours_on_gpu):
        torch.manual_seed(0)
        layer = lab.ConvTranspose2d(4, 6, (3, 7), stride=2, device="cuda")
        plain = lab.ConvTranspose2d.from_torch(layer)
        x = torch.randn(2, 4, 5, 6, device="cuda", requires_grad=True)
        graphed = torch.cuda.make_graphed_callables(layer, (x,))
        for seed in range(3):
            torch.manual_seed(seed)
            new = torch.randn(2, 4, 5, 6, device="cuda")
            results = []
            for function in (graphed, plain):
                leaf = new.clone().requires_grad_()
                y = function(leaf)
                gradients = torch.autograd.grad(y.square().sum(), (leaf, *plain.parameters()))
                results.append((y.clone(), *(g.clone() for g in gradients)))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
    def test_a_second_gpu(self, ours_on_gpu):
        data = PROBLEM.random_inputs(1, "cuda:1")
        expected = lab.stages[KERNEL](*data, **PROBLEM.arguments).cpu()
        for current in (0, 1):
            with torch.cuda.device(current):
                y = lab.conv_transpose2d(*data, **PROBLEM.arguments)
                assert torch.cuda.current_device() == current
            assert y.device == torch.device("cuda:1")
            assert torch.equal(y.cpu(), expected)
        first = lab.conv_transpose2d(*(t.to("cuda:0") for t in data), **PROBLEM.arguments)
        assert first.device == torch.device("cuda:0")
        assert torch.equal(first.cpu(), expected)
        leaves = [t.requires_grad_() for t in data]
        lab.conv_transpose2d(*leaves, **PROBLEM.arguments).sum().backward()
        assert all(t.grad.device == torch.device("cuda:1") for t in leaves)
        with pytest.raises(RuntimeError, match="device"):
            lab.conv_transpose2d(data[0], data[1].to("cuda:0"), **PROBLEM.arguments)

    @pytest.mark.parametrize("stage", [*lab.stages, "operator"])
    def test_an_output_of_more_than_2_to_31_elements(self, stage):
        function = lab.conv_transpose2d if stage == "operator" else lab.stages[stage]
        x = torch.zeros(3, 1, 30000, 28000, device="cuda")
        x[2, 0, -1, -1] = 1.0
        weight = torch.arange(1.0, 22.0, device="cuda").reshape(1, 1, 3, 7)
        with tf32(False):
            y = function(x, weight)
        assert y.numel() > 2**31
        assert torch.equal(y[2, 0, -3:, -7:], weight[0, 0])
        assert y[:2].count_nonzero() == 0

    def test_nothing_but_the_output_is_allocated(self, ours_on_gpu):
        x, weight, bias = PROBLEM.random_inputs(1, "cuda")
        y = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        del y
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        y = lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
        assert y.is_contiguous()

    def test_no_call_waits(self, ours_on_gpu):
        x, weight, bias = PROBLEM.random_inputs(1, "cuda")
        lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            lab.conv_transpose2d(x, weight, bias, **PROBLEM.arguments)
            lab.conv_transpose2d(x.mT.contiguous().mT, weight, bias, **PROBLEM.arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_float32_is_right_under_the_dispatch_without_tf32(self):
        with tf32(False):
            for number, problem in enumerate(problem_set(300)[::5]):
                tensors = inputs(problem, seed=number, device="cuda")
                y = lab.conv_transpose2d(*tensors, **problem.arguments)
                tensors = [None if t is None else t.cpu() for t in tensors]
                error = condition_error(y.cpu(), *tensors, **problem.arguments)
                assert error <= float32_gate(y.numel()), problem

    def test_the_call_costs_little_on_the_cpu(self, ours_on_gpu):
        cost = call_overhead()
        assert cost["kernel"] == KERNEL
        print(cost)  # judged where it is measured in peace
        assert all(value > 0 for name, value in cost.items() if name.endswith("_us"))


def test_importing_builds_nothing_and_needs_no_book(tmp_path):
    code = (
        "import sys, convt_lab; "
        "assert not {'matplotlib', 'IPython', 'jupyter_book', 'torch.utils.cpp_extension'}"
        " & sys.modules.keys()"
    )
    environment = {"PATH": "", "CONVT_LAB_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()
