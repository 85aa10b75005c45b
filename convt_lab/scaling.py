"""What it costs to split a transposed convolution among ranks, by a model: bytes and seconds.

The bytes are those that `convt_lab.distributed` sends. The seconds follow from a few rates:

    one rank's time = strip + max(interior, exchange)

The strip is what others own of its rows, and is computed first; then it travels while the interior,
which is what the rank owns, is computed. The model leaves out that received rows are added, and
that a GPU may be slower on a part than on the whole.

A kernel that gathers takes as long for an output row at the strip's edge as for any other, so a
strip of as many output rows as the stride costs as much as one input row of the interior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convt_lab.distributed import RowPlan
from convt_lab.operator_record import OperatorRecord
from convt_lab.problem import Problem, checked_integer

__all__ = [
    "LINKS",
    "SPLITS",
    "Machine",
    "Prediction",
    "bytes_sent",
    "flops_of_a_rank",
    "machine_of",
    "overlap",
    "predict",
]

#: What can be split.
SPLITS = ("images", "rows", "input channels", "output channels")

#: Bytes a second that NVIDIA says an H200's links carry one way: NVLink 900 GB/s both ways
#: together, an InfiniBand adapter 400 Gb/s. The chapter cites where.
LINKS = {"NVLink": 900e9 / 2, "InfiniBand": 400e9 / 8}


def overlap(kernel: int, stride: int, dilation: int) -> int:
    """Return how many output rows a rank adds to that the next one owns.

    Parameters
    ----------
    kernel, stride, dilation
        Along the rows: KH and its steps. The rank has rows enough that they end at the next one's.

    Returns
    -------
    int
    """
    return max(0, (kernel - 1) * dilation + 1 - stride)


# ---- Bytes ---------------------------------------------------------------------------------------


def bytes_sent(
    problem: Problem, split: str, ranks: int, element_size: int = 4
) -> tuple[float, float]:
    """Return how many bytes a rank sends in a forward and in a backward pass.

    Parameters
    ----------
    problem
        The whole one.
    split
        One of `SPLITS`.
    ranks
        How many there are, at least 1.
    element_size
        Bytes of a value.

    Returns
    -------
    tuple of float
        Of the rank that sends most. The output of a split by input channels is summed over the
        ranks, and so are the gradients of what is whole on every rank. For a sum each rank is taken
        to send twice the tensor's bytes, less one rank's share of them, which is the least that
        will do.

    Raises
    ------
    ValueError
        If `split` or `ranks` is wrong.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(map(repr, SPLITS))}")
    ranks = checked_integer("ranks", ranks, 1)

    def summed(*shapes: Sequence[int] | None) -> float:
        elements = sum(math.prod(shape) for shape in shapes if shape is not None)
        return 2 * (ranks - 1) / ranks * elements * element_size

    bias = (problem.out_channels,) if problem.bias else None
    parameters = summed(problem.weight_shape, bias)
    if split == "images":
        return 0.0, parameters
    if split == "rows":
        batch, channels, _, width = problem.output_shape
        row = batch * channels * width * element_size
        forward, backward = (float(row * max(rows)) for rows in _rows_sent(problem, ranks))
        return forward, backward + parameters
    if split == "input channels":
        return summed(problem.output_shape), summed(bias)
    return 0.0, summed(problem.input_shape)


def flops_of_a_rank(problem: Problem, ranks: int) -> tuple[float, float]:
    """Return a rank's floating-point operations in a forward and in a backward pass.

    The backward pass has twice the forward's: the gradient of the input, and that of the weight.

    Parameters
    ----------
    problem
        The whole one.
    ranks
        How many there are, at least 1.

    Returns
    -------
    tuple of float
    """
    ranks = checked_integer("ranks", ranks, 1)
    return problem.flops / ranks, 2 * problem.flops / ranks


def _rows_sent(problem: Problem, ranks: int) -> tuple[list[int], list[int]]:
    """Return how many rows each rank sends forward and backward, if all have as many as can be."""
    heights = [problem.height // ranks + (r < problem.height % ranks) for r in range(ranks)]
    plan = RowPlan.for_heights(problem, heights)
    forward, backward = [0] * ranks, [0] * ranks
    for source in range(ranks):
        added_to = plan.added_to(source)
        # Those before own nothing of it. Of a thousand ranks behind, only the next few do.
        for other in range(source + 1, ranks):
            if plan.output_rows[other].start >= added_to.stop:
                break
            sent = len(plan.sent(source, other))
            forward[source] += sent
            backward[other] += sent
    return forward, backward


# ---- Seconds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the model knows of GPUs and of the way from each to its neighbour.

    Attributes
    ----------
    flops_per_second
        What the operator's kernel reaches on one GPU, on a problem like the whole one.
    bytes_per_second
        What goes from a GPU to its neighbour, one way.
    call
        Seconds that a call of the operator takes at least, however small it is.
    message
        Seconds that an exchange takes at least, however few bytes it sends.
    """

    flops_per_second: float
    bytes_per_second: float
    call: float = 0.0
    message: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")
        for name in ("call", "message"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")


def machine_of(
    record: OperatorRecord, problem: Problem, bytes_per_second: float, allow_tf32: bool = False
) -> Machine:
    """Take a GPU's rates from the operator's record: contiguous float32, cold times.

    Parameters
    ----------
    record
        Of one GPU.
    problem
        One that was measured there; the operator's rate on it is taken.
    bytes_per_second
        Of the link.
    allow_tf32
        Whether float32 may be multiplied as TF32.

    Returns
    -------
    Machine
        Its `call` is the shortest time that the same kernel took on any problem.

    Raises
    ------
    ValueError
        If the problem was not measured.
    """
    cases = record.of_form(("float32", "contiguous", allow_tf32))
    for case in cases:
        if case.problem == problem and case.operator is not None and case.operator.seconds:
            times = [other.kernels[case.choice] for other in cases if case.choice in other.kernels]
            call = min(result.seconds for result in times if result.seconds)
            return Machine(problem.flops / case.operator.seconds, bytes_per_second, call)
    raise ValueError(f"problem={problem} is not in the record of {record.gpu.name}")


@dataclass(frozen=True)
class Prediction:
    """What a forward pass takes where rows are split.

    Attributes
    ----------
    alone
        Seconds of the whole problem on one GPU.
    ranks
        GPUs.
    strip, interior, exchange
        Seconds of the rank that takes longest.
    """

    alone: float
    ranks: int
    strip: float
    interior: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of all ranks together."""
        return self.strip + max(self.interior, self.exchange)

    @property
    def efficiency(self) -> float:
        """The speed-up over one GPU, divided by the number of GPUs."""
        return self.alone / self.ranks / self.seconds


def predict(problem: Problem, ranks: int, machine: Machine) -> Prediction:
    """Predict a forward pass whose rows are split as evenly as can be.

    Parameters
    ----------
    problem
        The whole one.
    ranks
        GPUs, at least 1.
    machine
        Their rates.

    Returns
    -------
    Prediction
    """
    ranks = checked_integer("ranks", ranks, 1)
    row = problem.flops / problem.height / machine.flops_per_second
    interior = math.ceil(problem.height / ranks) * row
    strip = exchange = 0.0
    if sent := bytes_sent(problem, "rows", ranks)[0]:
        rows = max(_rows_sent(problem, ranks)[0])
        strip = max(machine.call, rows / problem.stride[0] * row)
        exchange = machine.message + sent / machine.bytes_per_second
    return Prediction(problem.height * row, ranks, strip, interior, exchange)
