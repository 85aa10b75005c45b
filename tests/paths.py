"""The ways that a call of the operator can go, each of which must pass the same tests.

On the CPU the operator is PyTorch's. So that the rest of it is tested without a GPU, too, the path
``simulator`` lets it treat the CPU as a device with kernels of ours: they run on the simulator, and
everything around them (plans, launches, autograd, vmap, compilation) is what it is on a GPU.
"""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

from convt_lab import dispatch, library
from convt_lab import plan as plans

#: The kernel that is chosen where a path asks for one of ours: of the ladder's, a general one.
KERNEL = "register_blocked"

#: PyTorch on the CPU; ours on the simulator; what the dispatch chooses on a GPU; ours on a GPU.
PATHS = [
    "cpu",
    "simulator",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cuda_ours", marks=pytest.mark.gpu),
]


def device_of(path):
    return "cuda" if path.startswith("cuda") else "cpu"


@contextmanager
def on_path(path, kernel=KERNEL):
    """Let calls go a path, to `kernel` if it is one of ours; yields the device's type."""
    if path not in ("simulator", "cuda_ours"):
        yield device_of(path)
        return
    with pytest.MonkeyPatch.context() as patch, kernels_on_the_cpu(patch, path == "simulator"):
        patch.setattr(dispatch, "choose", choose(kernel))
        yield device_of(path)


def choose(kernel):
    """Make a dispatch that chooses one kernel wherever it can be used, and PyTorch elsewhere."""

    def chosen(problem, dtype, device, *, channels_last, tf32):
        usable = plans.kernels[kernel].supports(problem, dtype, channels_last)
        return dispatch.Choice(kernel if usable else "pytorch", "a test says so")

    return chosen


def _is_on_the_cpu(tensor):
    return tensor.device.type == "cpu"


@contextmanager
def kernels_on_the_cpu(patch, is_wanted=True):
    patch.setattr(plans, "_plans", {})
    if not is_wanted:
        yield
        return
    for module in ("plan", "operator"):
        patch.setattr(sys.modules[f"convt_lab.{module}"], "has_kernels", _is_on_the_cpu)
    with torch.library._scoped_library("convt_lab", "IMPL") as registry:
        registry.impl("conv_transpose2d", library._computed, "CPU")
        yield


@contextmanager
def counting_runs():
    """Yield a list that gets the kernel's name whenever a plan runs one of ours."""
    runs = []
    run = plans.Plan.__call__

    def counted(plan, *tensors):
        runs.append(plan.kernel)
        return run(plan, *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans.Plan, "__call__", counted)
        yield runs


@contextmanager
def tf32(is_allowed):
    """Set whether cuDNN may compute float32 convolutions with TF32."""
    # Not cudnn.conv.fp32_precision: after that, whoever reads the older setting gets an error.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def without_tf32(device):
    return tf32(False) if device == "cuda" else nullcontext()
