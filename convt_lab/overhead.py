"""What a call of the operator costs on the CPU, beside PyTorch's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from convt_lab.operator import conv_transpose2d
from convt_lab.plan import plan_for

__all__ = ["call_overhead"]

# Calls between two synchronisations: fewer than a GPU's queue takes (about a thousand launches), so
# that no call waits for the GPU.
_CALLS = 200


def call_overhead(rounds: int = 30) -> dict[str, float | str]:
    """Measure the time for which a call keeps the CPU busy, for a tiny problem on the current GPU.

    Calls are enqueued without waiting for their results, ours and PyTorch's in turn, so that
    whatever else the machine does meets both.

    Parameters
    ----------
    rounds : int
        How many times 200 calls of each kind are timed; the fastest round counts.

    Returns
    -------
    dict
        ``pytorch_us`` and ``ours_us``: microseconds for each call without gradients;
        ``pytorch_with_grad_us`` and ``ours_with_grad_us``: with them (forward only); ``kernel``:
        what ran in ours.
    """
    x = torch.randn(1, 4, 4, 4, device="cuda")
    weight = torch.randn(4, 4, 3, 3, device="cuda")
    bias = torch.randn(4, device="cuda")
    leaf = weight.clone().requires_grad_()
    arguments = ((2, 2), (1, 1), (1, 1), 1, (1, 1))
    forms = {
        f"{name}{suffix}_us": (function, tensor)
        for suffix, tensor in (("", weight), ("_with_grad", leaf))
        for name, function in (("pytorch", F.conv_transpose2d), ("ours", conv_transpose2d))
    }

    def enqueue(function: Callable, tensor: torch.Tensor) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            function(x, tensor, bias, *arguments)
        return (time.perf_counter() - start) / _CALLS * 1e6

    best = {name: float("inf") for name in forms}
    for _ in range(1 + rounds):  # the first is a warm-up, which is slower
        for name, form in forms.items():
            best[name] = min(best[name], enqueue(*form))
    torch.cuda.synchronize()
    return {**best, "kernel": plan_for(x, weight, bias, *arguments).kernel}
