"""PyTorch's own tests of conv_transpose2d and ConvTranspose2d, on the operator and on each stage.

The samples are those that PyTorch's test-suite draws from (``torch.testing._internal``): the OpInfo
of ``nn.functional.conv_transpose2d`` and the ModuleInfo of ``nn.ConvTranspose2d``.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from paths import PATHS, counting_runs, device_of, on_path, without_tf32

import convt_lab as lab
from convt_lab.reference import FLOAT32_GATE, condition_error

#: The dtypes that PyTorch's operator supports somewhere, and some that it does not.
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCES = {torch.float16: (1e-2, 1e-2), torch.bfloat16: (5e-2, 5e-2)}


@functools.cache
def infos():
    """Import what PyTorch knows about the operator and the module; it takes some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's affair
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db

    # The import forbids to set torch.backends' flags but by context managers; other tests do.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    (op,) = (info for info in op_db if info.name == "nn.functional.conv_transpose2d")
    (module,) = (info for info in module_db if info.module_cls is torch.nn.ConvTranspose2d)
    return op, module


def test_no_dtype_is_forgotten():
    op, _ = infos()
    assert op.dtypes | op.dtypesIfCUDA <= set(DTYPES)


@pytest.fixture(params=PATHS)
def path(request):
    with on_path(request.param) as device, without_tf32(device):
        yield request.param


def samples(device, dtype, requires_grad=False):
    op, _ = infos()
    torch.manual_seed(0)
    found = list(op.reference_inputs(device, dtype, requires_grad=requires_grad))
    assert len(found) >= 12
    return found


def agree(ours, theirs, dtype):
    rtol, atol = TOLERANCES.get(dtype, (1e-4, 1e-4))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, check_stride=True)


def same_outcome(sample, dtype):
    """Where PyTorch promises nothing, ours does what PyTorch does, be it an error."""
    tensors = [t if t is None else t.to(dtype) for t in (sample.input, *sample.args)]
    try:
        theirs = F.conv_transpose2d(*tensors, **sample.kwargs)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error)):
            lab.conv_transpose2d(*tensors, **sample.kwargs)
    else:
        agree(lab.conv_transpose2d(*tensors, **sample.kwargs), theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_samples(path, dtype):
    device = device_of(path)
    if dtype not in infos()[0].supported_dtypes(device):
        same_outcome(samples(device, torch.float32)[0], dtype)
        return
    with counting_runs() as runs:
        for sample in samples(device, dtype):
            ours = lab.conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
            theirs = F.conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
            agree(ours, theirs, dtype)
            if dtype == torch.float32:
                tensors = [t if t is None else t.cpu() for t in (sample.input, *sample.args)]
                assert condition_error(ours.cpu(), *tensors, **sample.kwargs) <= FLOAT32_GATE
    if path in ("simulator", "cuda_ours") and dtype == torch.float32:
        assert len(runs) == len(samples(device, dtype))  # else PyTorch was compared with itself


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128], ids=str
)
def test_gradients_of_samples(path, dtype):
    for sample in samples(device_of(path), dtype, requires_grad=True):
        leaves = [t for t in (sample.input, *sample.args) if t is not None]
        results = []
        for function in (lab.conv_transpose2d, F.conv_transpose2d):
            y = function(sample.input, *sample.args, **sample.kwargs)
            torch.manual_seed(1)
            results.append((y, *torch.autograd.grad(y, leaves, torch.randn_like(y))))
        for ours, theirs in zip(*results, strict=True):
            agree(ours, theirs, dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_gradcheck_of_samples(path):
    """In float64, which is PyTorch's kernel: the formulas around it are ours."""
    device = device_of(path)
    for sample in samples(device, torch.float64, requires_grad=True):
        leaves = [t for t in (sample.input, *sample.args) if t is not None]

        def function(*tensors, sample=sample):
            return lab.conv_transpose2d(*tensors, **sample.kwargs)

        checks = dict(nondet_tol=1e-12, fast_mode=True)
        assert torch.autograd.gradcheck(
            function, leaves, check_forward_ad=True, check_batched_grad=True, **checks
        )
        assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", lab.stages)
def test_samples_on_each_stage(stage, device):
    for sample in samples(device, torch.float32):
        y = lab.stages[stage](sample.input, *sample.args, **sample.kwargs)
        tensors = [t if t is None else t.cpu() for t in (sample.input, *sample.args)]
        assert condition_error(y.cpu(), *tensors, **sample.kwargs) <= FLOAT32_GATE, sample.kwargs


def module_inputs(device, dtype, training):
    _, module = infos()
    torch.manual_seed(0)
    found = module.module_inputs_func(module, device, dtype, requires_grad=True, training=training)
    assert len(found) >= 2
    return found


def made(cls, arguments, device, dtype):
    torch.manual_seed(2)
    return cls(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_module_inputs(path, dtype, training):
    device = device_of(path)
    for given in module_inputs(device, dtype, training):
        results = []
        for cls in (lab.ConvTranspose2d, torch.nn.ConvTranspose2d):
            layer = made(cls, given.constructor_input, device, dtype).train(training)
            x = given.forward_input.args[0].detach().clone().requires_grad_()
            y = layer(x, *given.forward_input.args[1:], **given.forward_input.kwargs)
            y.backward(torch.ones_like(y))
            results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        for ours, theirs in zip(*results, strict=True):
            agree(ours, theirs, dtype)


def test_module_memory_formats(path):
    """The output's strides are PyTorch's, whichever of input and weight is channels last."""
    device = device_of(path)
    formats = (torch.contiguous_format, torch.channels_last)
    for given in module_inputs(device, torch.float32, False):
        x = given.forward_input.args[0]
        if x.dim() != 4:
            continue
        for of_input in formats:
            for of_weight in formats:
                outputs = [
                    made(cls, given.constructor_input, device, torch.float32).to(
                        memory_format=of_weight
                    )(x.to(memory_format=of_input))
                    for cls in (lab.ConvTranspose2d, torch.nn.ConvTranspose2d)
                ]
                agree(*outputs, torch.float32)
