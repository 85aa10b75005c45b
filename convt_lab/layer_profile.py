"""What each layer of a network costs: its FLOPs, and its time by ``torch.profiler``.

The profiler knows operators. `labelled` tells it where each layer's forward begins and ends, and
`by_layer` finds the backward that belongs to it: autograd numbers the operations of the forward,
and the profiler writes that number beside both halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["REST", "LayerProfile", "by_layer", "flops_by_layer", "labelled"]

#: What is no layer's: what the model computes between its layers, and the loss.
REST = "the rest"

_LABEL = "layer "
_BACKWARD = 1  # the scope of autograd's nodes


def flops_by_layer(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int]:
    """Count the floating-point operations of each direct child's forward.

    Parameters
    ----------
    model
        It is run once, without gradients. On the ``meta`` device that costs nothing.
    *inputs
        Of the model.

    Returns
    -------
    dict of str to int
        By the layers' names, in their order. Convolutions and matrix products count, other
        operations do not.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    counts = counter.get_flop_counts()
    prefix = type(model).__name__
    return {
        name: sum(counts.get(f"{prefix}.{name}", {}).values()) for name, _ in model.named_children()
    }


@dataclass
class LayerProfile:
    """What was done for a layer, in all of its calls together.

    Attributes
    ----------
    calls
        How often its forward ran.
    forward, backward
        Seconds: of the GPU's kernels, or of the CPU.
    operators
        What its forward called, in order; not what those called in turn.
    nodes
        The autograd nodes of its backward, in the order in which they ran.
    """

    calls: int = 0
    forward: float = 0.0
    backward: float = 0.0
    operators: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)


@contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """Let ``torch.profiler`` see each direct child of a model by its name, in the context.

    Parameters
    ----------
    model
        Its children are the layers. One that calls itself again is one layer.
    """
    hooks = []
    for name, layer in model.named_children():
        ranges: list[torch.profiler.record_function] = []

        def enter(layer: nn.Module, inputs: Any, name: str = name, ranges: list = ranges) -> None:
            ranges.append(torch.profiler.record_function(_LABEL + name))
            ranges[-1].__enter__()

        def leave(layer: nn.Module, inputs: Any, output: Any, ranges: list = ranges) -> None:
            ranges.pop().__exit__(None, None, None)

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_layer(profiler: torch.profiler.profile, device: str = "cpu") -> dict[str, LayerProfile]:
    """Add up what a profiler saw, by layer.

    Parameters
    ----------
    profiler
        A profile, finished, of a model that was `labelled` meanwhile.
    device
        ``"cuda"`` for the time of the GPU's kernels, ``"cpu"`` for the CPU's.

    Returns
    -------
    dict of str to LayerProfile
        By the layers' names, in the order in which they first ran; then `REST`, whose backward is
        0: it has all that is left of either. Where nothing is labelled, everything is `REST`'s.
    """
    seconds = _of_kernels if device == "cuda" else _of_cpu
    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU and not e.is_async]
    layers: dict[str, LayerProfile] = {}
    owner: dict[int, str] = {}  # of a node, by its number in the forward
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.name.startswith(_LABEL):
            name = event.name.removeprefix(_LABEL)
            layer = layers.setdefault(name, LayerProfile())
            layer.calls += 1
            layer.forward += seconds(event)
            layer.operators += [child.name for child in event.cpu_children]
            # An operation looks at the next number, and a node takes it. So it belongs to the last
            # layer that looked.
            owner |= dict.fromkeys(_numbers(event), name)
        elif event.scope == _BACKWARD and event.sequence_nr in owner:
            layer = layers[owner[event.sequence_nr]]
            layer.backward += seconds(event)
            layer.nodes.append(event.name)
    everything = sum(seconds(event) for event in events if event.cpu_parent is None)
    found = sum(layer.forward + layer.backward for layer in layers.values())
    return {**layers, REST: LayerProfile(forward=max(0.0, everything - found))}


def _of_cpu(event: FunctionEvent) -> float:
    return event.cpu_time_total / 1e6


def _of_kernels(event: FunctionEvent) -> float:
    """Return the seconds of the kernels that an event and what it called have launched.

    A label lies on the GPU's timeline, too, over its kernels, and may be listed among them.
    """
    own = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
    return own / 1e6 + sum(_of_kernels(child) for child in event.cpu_children)


def _numbers(event: FunctionEvent) -> Iterator[int]:
    """Yield autograd's numbers of what an event has called."""
    for child in event.cpu_children:
        if child.sequence_nr >= 0:
            yield child.sequence_nr
        yield from _numbers(child)
