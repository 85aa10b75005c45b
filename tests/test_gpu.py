"""For which architectures kernels are built, and whose instructions they may use."""

import pytest
import torch

from convt_lab import gpu


@pytest.fixture
def chosen(monkeypatch):
    def choose(value):
        if value is None:
            monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        else:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)

    return choose


class TestArchitectures:
    @pytest.mark.parametrize(
        ("capability", "architecture"),
        [((7, 5), "7.5"), ((8, 6), "8.6"), ((9, 0), "9.0a"), ((12, 0), "12.0")],
    )
    @pytest.mark.parametrize("value", [None, "", "native"])
    def test_the_devices_own(self, capability, architecture, value, chosen, monkeypatch):
        chosen(value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert gpu.architectures() == architecture

    def test_a_choice_is_honoured(self, chosen):
        chosen("8.0;9.0")
        assert gpu.architectures() == "8.0;9.0"


class TestOwnInstructions:
    @pytest.mark.parametrize(
        ("capability", "value", "answer"),
        [
            ((9, 0), None, True),
            ((9, 0), "native", True),
            ((9, 0), "9.0a", True),
            ((9, 0), "8.0 9.0a+PTX", True),
            ((9, 0), "8.0;9.0", False),
            ((9, 0), "9.0+PTX", False),
            ((8, 6), None, False),
            ((8, 6), "9.0a", False),
            ((10, 0), None, False),
            ((10, 0), "9.0a", False),
        ],
    )
    def test_hoppers(self, capability, value, answer, chosen):
        chosen(value)
        assert gpu.has_own_instructions(capability, "9.0a") == answer
