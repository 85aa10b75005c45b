"""The operator on several processes: batches, channels or the rows of an image split among ranks.

There is no engine here: the ranks are those of ``torch.distributed``. `conv_transpose2d_rows` takes
each rank's rows of an image; `conv_transpose2d_dtensor` is what `convt_lab.conv_transpose2d` does
with DTensors.

Batch and channels
------------------
The operator is linear in input and weight, and images do not meet. So along one axis of ranks::

    split            input     weight    bias      output    sent
    images           Shard(0)  -         -         Shard(0)  nothing
    input channels   Shard(1)  Shard(0)  one rank  Partial   nothing: the output is a sum to come
    output channels  -         Shard(1)  Shard(0)  Shard(1)  nothing
    groups           Shard(1)  Shard(0)  Shard(0)  Shard(1)  nothing
    rows             Shard(2)  -         -         Shard(2)  the overlaps, see below

Where a tensor is whole (-) on every rank and the output is split, its gradient is a sum over ranks.

Rows
----
Input row h adds to the output rows oh = h * stride - padding + kh * dilation, kh = 0 ... KH - 1. A
rank with the rows h0 <= h < h1 thus adds to

    h0 * stride - padding <= oh < (h1 - 1) * stride - padding + (KH - 1) * dilation + 1,

cropped to 0 <= oh < OH. Let it own the output rows from h0 * stride - padding up to where the next
rank's begin, h1 * stride - padding; the first also owns what padding leaves above, the last what
is below. Then what a rank computes of others' rows is the difference of the two ends,

    (KH - 1) * dilation + 1 - stride  rows (none if that is negative),

at the top of the next rank's. They are sent there and added: overlap-add. A convolution needs its
neighbour's *input* rows before it starts (a halo exchange); here the neighbour's *output* rows are
added at the end. Each is the other's gradient: the backward pass needs the gradient of all rows
that a rank added to, so the owners send those rows of it back.

`RowPlan` computes messages as intersections of "what a rank adds to" with "what a rank owns". So it
takes any owners, kernels that reach over several ranks, and ranks without rows.

The rows to send are computed first and travel while the rank computes its own.
"""

from __future__ import annotations

import datetime
import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from convt_lab.library import cast_for_autocast, convolution_backward
from convt_lab.operator import conv_transpose2d, conv_transpose2d_between, kernel_between
from convt_lab.plan import MAX_PLANS, spelling_of
from convt_lab.problem import Problem, ProblemError, checked_integer, checked_problem
from convt_lab.stages import check_tensors, is_channels_last

__all__ = ["ExchangeError", "RowPlan", "conv_transpose2d_dtensor", "conv_transpose2d_rows"]

Tensor = torch.Tensor


class ExchangeError(RuntimeError):
    """Another rank did not send or take its rows: it died, failed, or is later than the timeout."""


# ---- Which rows go where -------------------------------------------------------------------------


@dataclass(frozen=True)
class RowPlan:
    """Which rows each rank has, owns and sends.

    Attributes
    ----------
    problem : Problem
        The whole image's.
    input_rows : tuple of range
        Of each rank, the rows of the input that it has. In order, they make up the input.
    output_rows : tuple of range
        Of each rank, the rows of the output that it gets. In order, they make up the output.

    Examples
    --------
    >>> plan = RowPlan.for_heights(Problem(height=8, kernel_size=(3, 7), stride=1), [4, 4])
    >>> plan.output_rows, plan.sent(0, 1)
    ((range(0, 4), range(4, 10)), range(4, 6))
    """

    problem: Problem
    input_rows: tuple[range, ...]
    output_rows: tuple[range, ...]

    @classmethod
    def for_heights(cls, problem: Problem, heights: Sequence[int]) -> RowPlan:
        """Let each rank own the output rows from its first input row's on.

        Parameters
        ----------
        problem : Problem
            The whole image's.
        heights : sequence of int
            How many rows of the input each rank has, at least 0; in all those of `problem`.

        Returns
        -------
        RowPlan

        Raises
        ------
        TypeError, ValueError
            If `problem` or `heights` is wrong.
        """
        rows = checked_problem(problem).axes[0]
        heights = _checked_heights(heights)
        if sum(heights) != problem.height:
            raise ValueError(
                f"heights={heights!r} are {sum(heights)} rows: they must be the problem's "
                f"{problem.height}"
            )
        input_rows = _consecutive(heights)
        starts = [
            rows.out_size
            if has.start == rows.size
            else min(max(has.start * rows.stride - rows.padding, 0), rows.out_size)
            for has in input_rows
        ]
        ends = [*starts[1:], rows.out_size]
        return cls(problem, input_rows, tuple(map(range, starts, ends)))

    @classmethod
    def for_chunks(cls, problem: Problem, ranks: int) -> RowPlan:
        """Split input and output as ``torch.chunk`` and DTensors do.

        Parameters
        ----------
        problem : Problem
            The whole image's.
        ranks : int
            Number of ranks, at least 1.

        Returns
        -------
        RowPlan

        Raises
        ------
        TypeError, ValueError
            If `problem` or `ranks` is wrong.
        """
        rows = checked_problem(problem).axes[0]
        ranks = checked_integer("ranks", ranks, 1)
        return cls(problem, _chunks(rows.size, ranks), _chunks(rows.out_size, ranks))

    def added_to(self, rank: int) -> range:
        """Return the rows of the output that the input rows of `rank` add to."""
        has, rows = self.input_rows[rank], self.problem.axes[0]
        if not has:
            return range(0)
        first = has.start * rows.stride - rows.padding
        last = (has.stop - 1) * rows.stride - rows.padding + (rows.kernel - 1) * rows.dilation
        return _common(range(first, last + 1), range(rows.out_size))

    def sent(self, source: int, destination: int) -> range:
        """Return the rows of the output that one rank computes and another owns."""
        return _common(self.added_to(source), self.output_rows[destination])

    def bytes_sent(self, rank: int, element_size: int = 4, backward: bool = False) -> int:
        """Return how many bytes `rank` sends in a forward pass, or in a backward pass."""
        batch, channels, _, width = self.problem.output_shape
        ranks = range(len(self.input_rows))
        rank = ranks[rank]  # -1 is the last, as for all that is indexed here
        others = [other for other in ranks if other != rank]
        rows = sum(
            len(self.sent(other, rank) if backward else self.sent(rank, other)) for other in others
        )
        return batch * channels * rows * width * element_size


def _checked_heights(heights: Sequence[int]) -> list[int]:
    if not isinstance(heights, Iterable):
        raise TypeError(f"heights={heights!r} must be a sequence of integers, one for each rank")
    return [checked_integer(f"heights[{i}]", height, 0) for i, height in enumerate(heights)]


def _consecutive(lengths: Sequence[int]) -> tuple[range, ...]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))


def _chunks(length: int, parts: int) -> tuple[range, ...]:
    step = math.ceil(length / parts)
    return tuple(
        range(min(part * step, length), min((part + 1) * step, length)) for part in range(parts)
    )


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


# ---- One rank's products with some rows of the output --------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """The part of some output rows that comes from the rows that one rank has.

    `wanted` are these output rows, `inputs` the rank's rows that add to them, counted from its
    first, and `block` the output rows, not cropped, that `inputs` add to.
    """

    wanted: range
    inputs: range
    block: range

    @classmethod
    def of(cls, plan: RowPlan, rank: int, wanted: range) -> _Piece:
        has, rows = plan.input_rows[rank], plan.problem.axes[0]
        reach = (rows.kernel - 1) * rows.dilation
        first = -((reach - wanted.start - rows.padding) // rows.stride)  # rounds up
        last = (wanted.stop - 1 + rows.padding) // rows.stride
        inputs = _common(has, range(first, last + 1)) if wanted else range(0)
        if not inputs:
            return cls(wanted, range(0), range(wanted.start, wanted.start))
        start = inputs.start * rows.stride - rows.padding
        stop = (inputs.stop - 1) * rows.stride - rows.padding + reach + 1
        local = range(inputs.start - has.start, inputs.stop - has.start)
        return cls(wanted, local, range(start, stop))

    @functools.cached_property
    def covered(self) -> range:
        """Those of the wanted rows that the inputs add to."""
        return _common(self.block, self.wanted)

    @functools.cached_property
    def crop(self) -> tuple[int, int]:
        """How many rows of the block are not wanted: the first, and the last."""
        return self.covered.start - self.block.start, self.block.stop - self.covered.stop

    def compute(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: _Part,
        kernel: str | None = None,
    ) -> Tensor:
        """Return [N, C_out, len(wanted), OW], in memory of its own."""
        dense, covered = torch.contiguous_format, None
        if self.inputs:
            covered = conv_transpose2d_between(
                _slice(input, self.inputs), weight, bias, part.arguments, *self.crop, kernel
            )
            if self.covered == self.wanted:
                return covered
            dense = torch.channels_last if is_channels_last(covered) else dense
        rows = input.new_zeros(part.shape_of(self.wanted)).contiguous(memory_format=dense)
        if bias is not None:
            rows += bias[:, None, None]
        if covered is not None:
            _slice(rows, self.covered, self.wanted.start).copy_(covered)
        return rows

    def kernel(self, input: Tensor, weight: Tensor, bias: Tensor | None, part: _Part) -> str | None:
        """Return which kernel of ours computes it, if one does."""
        if not self.inputs:
            return None
        rows = _slice(input, self.inputs)
        return kernel_between(rows, weight, bias, part.arguments, *self.crop)

    def differentiate(
        self,
        grad_rows: Tensor,
        input: Tensor,
        weight: Tensor,
        part: _Part,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what `grad_rows`, of the wanted rows, give to the gradients of inputs, weight."""
        covered = _slice(grad_rows, self.covered, self.wanted.start)
        grad_block = F.pad(covered, (0, 0, *self.crop)) if any(self.crop) else covered
        grad_input, grad_weight, _ = convolution_backward(
            grad_block, _slice(input, self.inputs), weight, None, part.arguments, (*needed, False)
        )
        return grad_input, grad_weight


@dataclass(frozen=True)
class _Part:
    """What one rank does of a plan. It depends on shapes alone, and is found once.

    `own` is what it computes of its own rows, `sends` what it computes of other ranks', and
    `receives` the rows of its own to which others add; `arguments` are those of a call that neither
    crops rows nor extends them.
    """

    own: _Piece
    sends: tuple[tuple[int, _Piece], ...]
    receives: tuple[tuple[int, range], ...]
    arguments: tuple
    output_shape: tuple[int, int, int, int]

    @classmethod
    @functools.lru_cache(maxsize=MAX_PLANS)
    def of(cls, plan: RowPlan, rank: int) -> _Part:
        problem = plan.problem
        others = [r for r in range(len(plan.input_rows)) if r != rank and problem.batch > 0]
        sent = [(other, plan.sent(rank, other)) for other in others]
        received = [(other, plan.sent(other, rank)) for other in others]
        arguments = problem.arguments
        for name in ("padding", "output_padding"):
            arguments[name] = (0, arguments[name][1])
        return cls(
            _Piece.of(plan, rank, plan.output_rows[rank]),
            tuple((other, _Piece.of(plan, rank, rows)) for other, rows in sent if rows),
            tuple((other, rows) for other, rows in received if rows),
            tuple(arguments.values()),
            problem.output_shape,
        )

    def shape_of(self, rows: range) -> tuple[int, int, int, int]:
        """Return the shape of some rows of the output."""
        batch, channels, _, width = self.output_shape
        return batch, channels, len(rows), width


def _slice(tensor: Tensor, rows: range, first: int = 0) -> Tensor:
    return tensor[:, :, rows.start - first : rows.stop - first]


# ---- Sending rows --------------------------------------------------------------------------------


class _Exchange:
    """Rows on their way to and from other ranks, from construction to `wait`."""

    def __init__(
        self,
        sends: dict[int, Tensor],
        receives: dict[int, Tensor],
        group: dist.ProcessGroup,
        timeout: datetime.timedelta | None,
    ):
        self.receives = receives
        # Kept, because the memory must live until they are sent.
        self.sends = {peer: tensor.contiguous() for peer, tensor in sends.items()}
        self.timeout = timeout
        self.group = group
        ways = [("send rows to", dist.isend, peer, self.sends[peer]) for peer in self.sends]
        ways += [("receive rows from", dist.irecv, peer, receives[peer]) for peer in receives]
        self.names = [f"{verb} rank {peer}" for verb, _, peer, _ in ways]
        operations = [
            dist.P2POp(operation, tensor, group=group, group_peer=peer)
            for _, operation, peer, tensor in ways
        ]
        try:
            self.works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise self._failure(" or ".join(self.names), error) from error

    def wait(self) -> dict[int, Tensor]:
        """Return what was received, by rank, when it is all there (on a GPU: to its stream)."""
        # NCCL makes one piece of work of all messages, gloo one of each.
        names = self.names
        if len(self.works) != len(names):
            names = [" or ".join(names)] * len(self.works)
        for work, name in zip(self.works, names, strict=True):
            try:
                _wait(work, self.timeout)
            except RuntimeError as error:
                raise self._failure(name, error) from error
        return self.receives

    def _failure(self, what: str, error: RuntimeError) -> ExchangeError:
        limit = "" if self.timeout is None else f" in {self.timeout.total_seconds():g} s"
        return ExchangeError(
            f"rank {dist.get_rank(self.group)} of {dist.get_world_size(self.group)} could not "
            f"{what}{limit}: that rank has died or failed, is late, or made another call "
            f"({dist.get_backend(self.group)}: {_first_line(error)})"
        )


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wait(work: dist.Work, timeout: datetime.timedelta | None) -> None:
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)


class _RowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: _Part,
        group: dist.ProcessGroup,
        timeout: datetime.timedelta | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.part, ctx.group, ctx.timeout = part, group, timeout
        own = part.own
        # A few rows by themselves may be another kernel's, which rounds in another way.
        kernel = own.kernel(input, weight, bias, part) if part.sends else None
        exchange = _Exchange(
            {
                other: piece.compute(input, weight, None, part, kernel)
                for other, piece in part.sends
            },
            {other: input.new_empty(part.shape_of(rows)) for other, rows in part.receives},
            group,
            timeout,
        )
        output = own.compute(input, weight, bias, part)
        received = exchange.wait()
        for other, rows in part.receives:
            _slice(output, rows, own.wanted.start).add_(received[other])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        input, weight = ctx.saved_tensors
        part, own = ctx.part, ctx.part.own
        needed = ctx.needs_input_grad[:2]
        grad_input = grad_weight = None

        def add(piece: _Piece, grad_rows: Tensor) -> None:
            nonlocal grad_input, grad_weight
            if not piece.inputs:
                return
            of_input, of_weight = piece.differentiate(grad_rows, input, weight, part, needed)
            if grad_input is None and len(piece.inputs) == input.shape[2]:
                grad_input = of_input
            elif needed[0]:
                grad_input = torch.zeros_like(input) if grad_input is None else grad_input
                _slice(grad_input, piece.inputs).add_(of_input)
            if needed[1]:
                grad_weight = of_weight if grad_weight is None else grad_weight + of_weight

        if any(needed):
            # What was received is sent, and the other way round.
            exchange = _Exchange(
                {
                    other: _slice(grad_output, rows, own.wanted.start)
                    for other, rows in part.receives
                },
                {
                    other: grad_output.new_empty(part.shape_of(piece.wanted))
                    for other, piece in part.sends
                },
                ctx.group,
                ctx.timeout,
            )
            add(own, grad_output)
            received = exchange.wait()
            for other, piece in part.sends:
                add(piece, received[other])
        # A rank without rows has no part in them, nor has one all of whose products are cropped.
        if needed[0] and grad_input is None:
            grad_input = torch.zeros_like(input)
        if needed[1] and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None


@torch.compiler.disable  # which rows are sent, and when, is decided here
def conv_transpose2d_rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    heights: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float | None = None,
) -> Tensor:
    """Compute a transposed convolution of images whose rows are split among ranks.

    Every rank of `group` calls this with its rows, in the ranks' order, and with the same weight,
    bias and arguments. It gets its rows of the output; all ranks' together are the output.

    Parameters
    ----------
    input
        [N, C_in, this rank's rows, W]; the rows may be uneven, and 0.
    weight, bias, stride, padding, output_padding, groups, dilation
        As in `convt_lab.conv_transpose2d`; padding crops the whole image.
    heights
        How many rows each rank has. If None, the ranks tell one another at each call, and see
        whether they agree on all else; to give `heights` saves that wait.
    group
        The ranks; all of them if None.
    timeout
        Seconds to wait for another rank; if None, the group's own (``init_process_group``). With
        NCCL, a number makes the host wait for the exchange.

    Returns
    -------
    Tensor
        [N, C_out, rows, OW]: the output rows from ``first * stride - padding`` on, where `first` is
        this rank's first input row, up to the next rank's (`RowPlan.for_heights`).

    Raises
    ------
    ProblemError
        If the arguments describe no legal problem, or differ between ranks.
    ValueError, TypeError
        If `heights` or `timeout` is wrong.
    ExchangeError
        If another rank dies, fails or is too late.

    Notes
    -----
    Gradients are of first order. That of `input` is complete. Those of `weight` and `bias` are
    this rank's part of a sum over the group: all-reduce them, as for data parallelism but without
    the mean. Every rank must run the backward pass, those without rows too: it sends rows as well.

    Give NCCL's streams a high priority when you make the group: ``pg_options`` with
    ``is_high_priority_stream``. A kernel that computes a rank's own rows may stay on all of the
    GPU's multiprocessors until it ends. If it starts before NCCL's, nothing travels meanwhile.
    """
    timeout = _checked_timeout(timeout)
    check_tensors(input, weight, bias)
    if input.dim() != 4:
        raise ProblemError(
            f"input has shape {list(input.shape)}: it must have four axes, "
            "[N, C_in, this rank's rows, W]"
        )
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError(
            "group=None means all ranks, and there are none: call "
            "torch.distributed.init_process_group first"
        )
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group={group!r} must be a group that this process belongs to")
    tensors = _cast((input, weight, bias))
    arguments = (stride, padding, output_padding, groups, dilation)
    if heights is None:
        # The whole height is not known yet: check all else, with one that padding can't use up.
        rows = padding[0] if isinstance(padding, tuple | list) and padding else padding
        enough = 1 + 2 * max(0, operator.index(rows)) if hasattr(rows, "__index__") else 1
        local = _problem(*tensors, enough, arguments)
        heights = _gathered_heights(tensors, local, group, timeout)
    else:
        heights = _heights_of_ranks(heights, input.shape[2], rank, ranks)
    shapes = input.shape, weight.shape, None if bias is None else bias.shape
    part = _part_of_heights(rank, heights, shapes, arguments)
    return _RowsFunction.apply(*tensors, part, group, timeout)


_parts: dict[tuple, _Part] = {}


def _part_of_heights(rank: int, heights: list[int], shapes: tuple, arguments: tuple) -> _Part:
    """Return what a rank does that has an input, weight and maybe bias of these shapes."""
    key = rank, tuple(heights), shapes, spelling_of(arguments)
    part = _parts.get(key)
    if part is None:
        (batch, channels, _, width), weight, bias = shapes
        whole = (batch, channels, sum(heights), width)
        problem = Problem.from_shapes(whole, weight, bias, *arguments)
        part = _Part.of(RowPlan.for_heights(problem, heights), rank)
        if len(_parts) >= MAX_PLANS:
            _parts.clear()
        _parts[key] = part
    return part


def _cast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Cast for autocast before anything is sent, so that messages have the output's dtype."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    return [cast_for_autocast(tensor, device_type) for tensor in tensors]


def _problem(
    input: Tensor, weight: Tensor, bias: Tensor | None, height: int, arguments: tuple
) -> Problem:
    shape = (*input.shape[:2], height, input.shape[3])
    return Problem.from_shapes(
        shape, weight.shape, None if bias is None else bias.shape, *arguments
    )


def _checked_timeout(timeout: object) -> datetime.timedelta | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout={timeout!r} must be a number of seconds, or None")
    if not 0.001 <= timeout < math.inf:
        raise ValueError(f"timeout={timeout!r} must be finite and at least 0.001 seconds")
    return datetime.timedelta(seconds=timeout)


def _heights_of_ranks(heights: Sequence[int], height: int, rank: int, ranks: int) -> list[int]:
    heights = _checked_heights(heights)
    if len(heights) != ranks:
        raise ValueError(
            f"heights={heights!r} has {len(heights)} values: there must be {ranks}, one for each "
            "rank of the group"
        )
    if heights[rank] != height:
        raise ValueError(
            f"heights={heights!r} says that rank {rank} has {heights[rank]} rows, but its input "
            f"has {height}"
        )
    return heights


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _gathered_heights(
    tensors: Sequence[Tensor | None],
    local: Problem,
    group: dist.ProcessGroup,
    timeout: datetime.timedelta | None,
) -> list[int]:
    """Tell the other ranks this one's height and arguments; return all heights, if all agree."""
    input, weight, bias = tensors
    if input.dtype not in _DTYPES:
        raise TypeError(f"input has dtype {input.dtype}: it must be one of {_DTYPES}")
    gradient = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    facts = {
        "input's dtype": (_DTYPES.index(input.dtype),),
        "input's batch, channels and width": (local.batch, local.in_channels, local.width),
        "weight's shape": local.weight_shape,
        "whether there is a bias": (int(bias is not None),),
        "whether input or weight requires a gradient": (int(gradient),),
        **{
            name: value if isinstance(value, tuple) else (value,)
            for name, value in local.arguments.items()
        },
        "height": (input.shape[2],),
    }
    mine = torch.tensor([i for value in facts.values() for i in value], device=input.device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        _wait(dist.all_gather(everyones, mine, group=group, async_op=True), timeout)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {dist.get_rank(group)} of {len(everyones)} could not learn the other ranks' "
            "heights: a rank has died or failed, or is late "
            f"({dist.get_backend(group)}: {_first_line(error)})"
        ) from error
    heights = []
    for values in (everyone.tolist() for everyone in everyones):
        start = 0
        for name, value in facts.items():
            theirs = tuple(values[start : start + len(value)])
            start += len(value)
            if name != "height" and theirs != value:
                raise ProblemError(
                    f"the ranks' calls differ in {name}: {value} on rank {dist.get_rank(group)}, "
                    f"{theirs} on rank {len(heights)} (dtypes count from 0 in {_DTYPES}); they "
                    "must be the same"
                )
        heights.append(values[-1])
    return heights


# ---- DTensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """How one axis of a mesh of ranks shares the work: the placements of all tensors.

    `input`, `weight` and `bias` are what the local call needs, `output` is what it returns, and
    the others are what its gradients are.
    """

    output: Placement
    input: Placement
    weight: Placement
    bias: Placement
    grad_input: Placement
    grad_weight: Placement
    grad_bias: Placement


_whole, _sum = Replicate(), Partial()
_SPLITS = {
    "nothing": _Split(_whole, _whole, _whole, _whole, _whole, _whole, _whole),
    "images": _Split(Shard(0), Shard(0), _whole, _whole, Shard(0), _sum, _sum),
    "rows": _Split(Shard(2), Shard(2), _whole, _whole, Shard(2), _sum, _sum),
    # The bias counts on the first rank only, and so does its gradient.
    "input channels": _Split(_sum, Shard(1), Shard(0), _whole, Shard(1), Shard(0), _sum),
    "output channels": _Split(Shard(1), _whole, Shard(1), Shard(0), _sum, Shard(1), Shard(0)),
    "groups": _Split(Shard(1), Shard(1), Shard(0), Shard(0), Shard(1), Shard(0), Shard(0)),
}


@torch.compiler.disable
def conv_transpose2d_dtensor(
    input: DTensor,
    weight: DTensor,
    bias: DTensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> DTensor:
    """Compute a transposed convolution of DTensors, as `convt_lab.conv_transpose2d` does with them.

    Along each axis of the mesh, the placements of input and weight decide what is split:

    - input ``Shard(0)``: images;
    - input ``Shard(2)``: rows, whose overlaps are exchanged (`conv_transpose2d_rows`);
    - input ``Shard(1)``, or weight ``Shard(0)`` with a whole input: input channels, the output
      being ``Partial()``; with groups that divide evenly, groups;
    - weight ``Shard(1)`` with a whole input: output channels.

    What does not fit is redistributed first: ``Partial()`` inputs are summed, and a weight sharded
    in another way (as FSDP does) is gathered. Where rows are split, gradients are of first order.

    Parameters
    ----------
    input
        [N, C_in, H, W] or [C_in, H, W].
    weight, bias, stride, padding, output_padding, groups, dilation
        As in `convt_lab.conv_transpose2d`; tensors are DTensors on the input's mesh.

    Returns
    -------
    DTensor
        [N, C_out, OH, OW], or [C_out, OH, OW].

    Raises
    ------
    TypeError
        If a tensor is no DTensor.
    ValueError
        If the meshes differ, the columns are split, the rows are split along two axes of the mesh,
        or this rank's rows are not what ``Shard(2)`` gives it.
    ProblemError
        If the arguments describe no legal problem.
    ExchangeError
        If another rank dies, fails or is later than the group's timeout, while rows are exchanged.
    """
    mesh = _common_mesh(input, weight, bias)
    input, weight, bias = _cast((input, weight, bias))
    if input.dim() == 3:
        return conv_transpose2d_dtensor(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation
        ).squeeze(0)
    problem = Problem.from_shapes(
        input.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )
    names = _splits_for(input, weight, problem)
    splits = [_SPLITS[name] for name in names]

    def local(tensor: DTensor, name: str) -> Tensor:
        placements = [getattr(split, name) for split in splits]
        grad_placements = [getattr(split, f"grad_{name}") for split in splits]
        moved = tensor.redistribute(placements=placements)
        return moved.to_local(grad_placements=grad_placements)

    tensors = [local(input, "input"), local(weight, "weight")]
    tensors.append(None if bias is None else local(bias, "bias"))
    if bias is not None and not _is_first(mesh, names, "input channels"):
        # Not left out: each rank takes part in the sum that the bias's gradient is.
        tensors[2] = torch.where(torch.zeros_like(tensors[2], dtype=torch.bool), tensors[2], 0)
    for axis, name in enumerate(names):
        if name == "groups":
            groups //= mesh.size(axis)
    arguments = (stride, padding, output_padding, groups, dilation)
    meta = F.conv_transpose2d(
        torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device="meta"),
        torch.empty_strided(weight.shape, weight.stride(), dtype=input.dtype, device="meta"),
        None,
        *(problem.arguments.values()),
    )
    output = _local_call(tensors, problem, arguments, mesh, names)
    return DTensor.from_local(
        output,
        mesh,
        [split.output for split in splits],
        run_check=False,
        shape=meta.shape,
        stride=meta.stride(),
    )


def _common_mesh(input: Tensor, weight: Tensor, bias: Tensor | None) -> DeviceMesh:
    tensors = {"input": input, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if not (isinstance(tensor, DTensor) or (tensor is None and name == "bias")):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, and another argument is a DTensor: {name} "
                "must be one too (torch.distributed.tensor.distribute_tensor makes one)"
            )
    mesh = input.device_mesh
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(
                f"{name} is on the mesh {tensor.device_mesh}: it must be on the input's, {mesh}"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(f"input is on the mesh {mesh}, which this rank is no part of")
    return mesh


def _splits_for(input: DTensor, weight: DTensor, problem: Problem) -> list[str]:
    """Name what each axis of the mesh splits."""
    names = []
    groups = problem.groups
    for axis, (of_input, of_weight) in enumerate(
        zip(input.placements, weight.placements, strict=True)
    ):
        ranks = input.device_mesh.size(axis)
        splits_channels = of_input.is_shard(1) or (
            of_weight.is_shard(0) and not of_input.is_shard()
        )
        if of_input.is_shard(0):
            name = "images"
        elif of_input.is_shard(2):
            name = "rows"
        elif of_input.is_shard(3):
            raise ValueError(
                f"input has the placements {input.placements}: its columns can't be split; "
                "redistribute it to Shard(2), its rows"
            )
        elif problem.groups == 1 and splits_channels:
            name = "input channels"
        elif problem.groups > 1 and splits_channels and groups % ranks == 0:
            name = "groups"
            groups //= ranks
        elif problem.groups == 1 and of_weight.is_shard(1):
            name = "output channels"
        else:
            name = "nothing"
        names.append(name)
    if names.count("rows") > 1:
        raise ValueError(
            f"input has the placements {input.placements}: one axis of the mesh can split the "
            "rows, not two"
        )
    return names


def _is_first(mesh: DeviceMesh, names: Sequence[str], name: str) -> bool:
    """Whether this rank is the first along all axes of the mesh that split `name`."""
    coordinates = zip(mesh.get_coordinate(), names, strict=True)
    return all(coordinate == 0 for coordinate, split in coordinates if split == name)


def _local_call(
    tensors: list[Tensor | None],
    problem: Problem,
    arguments: tuple,
    mesh: DeviceMesh,
    names: Sequence[str],
) -> Tensor:
    """Compute this rank's part; it may have no channels, or no rows."""
    input, weight, bias = tensors
    groups = arguments[3]
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        rows = problem.out_height
        if "rows" in names:
            axis = names.index("rows")
            rows = len(_chunks(rows, mesh.size(axis))[mesh.get_local_rank(axis)])
        shape = (input.shape[0], weight.shape[1] * groups, rows, problem.out_width)
        # The sums are zero. They tie the output to all tensors, so that each gets a gradient.
        output = input.new_zeros(shape) + (input[:, :0].sum() + weight.sum())
        return output if bias is None else output + bias[:, None, None]
    if "rows" not in names:
        return conv_transpose2d(input, weight, bias, *arguments)
    axis = names.index("rows")
    plan = RowPlan.for_chunks(
        _problem(input, weight, bias, problem.height, arguments), mesh.size(axis)
    )
    rank = mesh.get_local_rank(axis)
    if input.shape[2] != len(plan.input_rows[rank]):
        raise ValueError(
            f"input has {input.shape[2]} rows on rank {rank} of its mesh's axis {axis}: Shard(2) "
            f"of {problem.height} rows gives it {len(plan.input_rows[rank])} (uneven rows can be "
            "split by conv_transpose2d_rows)"
        )
    part = _Part.of(plan, rank)
    return _RowsFunction.apply(input, weight, bias, part, mesh.get_group(axis), None)


def _dispatched(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
    """Serve the bare operator where autograd is not in the way, as in inference mode."""
    return conv_transpose2d_dtensor(*args, **(kwargs or {}))


# Not torch.distributed.tensor.experimental.register_sharding: such a rule can't send rows, and
# torch 2.13 keeps its outcome without a look at stride, padding and dilation, which are lists.
torch.library.register_torch_dispatch("convt_lab::conv_transpose2d", DTensor, _dispatched)
