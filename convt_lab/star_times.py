"""How long the star takes: by a stage's row in a record, and on the reader's own GPU.

The chapters of the ladder show both below each other. What depends on the reader's machine is on
lines that begin with ``live:``, which are not compared with the stored outputs.
"""

from __future__ import annotations

import torch

from convt_lab.columns import aligned
from convt_lab.measure import Clock, median_time
from convt_lab.problem import Problem
from convt_lab.program import backend_named
from convt_lab.records import BASELINE, Record, load_named
from convt_lab.stages import Stage

__all__ = ["live", "recorded"]


def recorded(stage: Stage, record: Record | None = None) -> str:
    """Return a table of cold times on the star: the stage's, its predecessor's and PyTorch's.

    Parameters
    ----------
    stage
        One that multiplies with FMA units: the benchmark times those.
    record
        By default the NVIDIA H200's.

    Returns
    -------
    str
        Times in milliseconds, and the FMA rate that they amount to, by the definition's FMAs, as a
        share of the measured one.
    """
    record = record or load_named("nvidia-h200")
    star = record.shape("star")
    named = {row.name: row.name for row in (stage.previous, stage) if row}
    named[BASELINE] = "PyTorch (cuDNN), float32"
    least = star.problem.flops / record.ceilings.fp32_fma
    table = [
        (f"star on {record.gpu.name}, cold", "ms", "of the FMA rate"),
        ("the definition's FMAs alone", f"{1000 * least:.3f}", "100.0%"),
    ]
    for row, name in named.items():
        share = record.share_of_fma("star", row)
        table.append((name, f"{star.row(row).time_ms():.3f}", f"{share:.1%}"))
    return aligned(table, left=(0,))


def live(stage: Stage, clock: Clock | None = None) -> str:
    """Time the star on this machine's GPU, cold, and return a line that says how long it took.

    Parameters
    ----------
    stage
        Any.
    clock
        What times one run; an `EventClock` if None.

    Returns
    -------
    str
        It begins with ``live:``. Without a GPU, and nvcc to compile for it, it says so.
    """
    if backend_named("auto").name != "gpu":
        return "live: no GPU here that kernels can be built for"
    problem = Problem.named("star")
    x, weight, bias = problem.random_inputs(device="cuda")
    timing = median_time(lambda: stage(x, weight, bias, **problem.arguments), clock)
    gpu, milliseconds = torch.cuda.get_device_name(), 1000 * timing.median
    return f"live: {gpu}, {milliseconds:.3f} ms, the median of {len(timing.samples)} runs"
