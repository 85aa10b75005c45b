"""What the ranks of `test_distributed` run: each case on all ranks, compared with one process.

``python distributed_cases.py DEVICE RANK RANKS FOLDER NAME...`` is one rank, on the CPU and
connected by gloo if DEVICE is ``cpu``, on a GPU of its own and connected by NCCL if it is ``cuda``.
It runs the cases NAME in order and writes into FOLDER what became of each. It stops at the first
that fails, because the ranks are no longer in step then.
"""

import datetime
import itertools
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.nn.parallel import DistributedDataParallel

import convt_lab as lab
from convt_lab import distributed
from convt_lab.distributed import ExchangeError, RowPlan, conv_transpose2d_rows

#: Seconds until a rank gives up on another, in all cases but those that measure it.
PATIENCE = 60

#: Where all tensors are: ``cpu`` or ``cuda``.
DEVICE = "cpu"

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert error <= tolerance * scale, (error, scale)


def drawn(shape, weight_shape, bias, arguments, dtype=torch.float64):
    """Return input, weight and bias, and of PyTorch's on one process output and gradients."""
    torch.manual_seed(7)
    tensors = [torch.randn(shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)]
    groups = arguments.get("groups", 1)
    tensors.append(torch.randn(weight_shape[1] * groups, dtype=dtype) if bias else None)
    leaves = copies(tensors)
    output = F.conv_transpose2d(*leaves, **arguments)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return tensors, output.detach(), grad_output, gradients


def copies(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


# ---- Rows ----------------------------------------------------------------------------------------


def check_rows(
    heights, kernel_size, bias=True, dtype=torch.float64, tolerance=1e-10, told=False, **arguments
):
    rank = dist.get_rank()
    shape = (2, 4, sum(heights), 5)
    weight_shape = (4, 3, *kernel_size)
    tensors, output, grad_output, gradients = drawn(shape, weight_shape, bias, arguments, dtype)
    problem = lab.Problem.from_shapes(
        shape, weight_shape, None if tensors[2] is None else tensors[2].shape, **arguments
    )
    plan = RowPlan.for_heights(problem, heights)
    has, owns = plan.input_rows[rank], plan.output_rows[rank]
    own = copies([tensors[0][:, :, has.start : has.stop], *tensors[1:]])
    rows = conv_transpose2d_rows(*own, **arguments, heights=heights if told else None)
    assert_close(rows, output[:, :, owns.start : owns.stop], tolerance)
    assert rows.is_contiguous()
    rows.backward(grad_output[:, :, owns.start : owns.stop])
    assert_close(own[0].grad, gradients[0][:, :, has.start : has.stop], tolerance)
    for leaf, gradient in zip(own[1:], gradients[1:], strict=True):
        if leaf is not None:
            dist.all_reduce(leaf.grad)
            assert_close(leaf.grad, gradient, tolerance)


def all_heights():
    """Return even and uneven splits, with ranks without rows, and fewer rows than ranks."""
    return {
        2: [[4, 4], [5, 2], [1, 6], [0, 5], [5, 0], [1, 0]],
        4: [[3, 3, 3, 3], [4, 1, 2, 5], [1, 1, 1, 1], [0, 3, 0, 2], [2, 0, 0, 2], [0, 0, 1, 0]],
    }[dist.get_world_size()]


@case
def rows_of_every_stride_and_dilation():
    for stride, dilation, heights in itertools.product((1, 2, 3), (1, 2), all_heights()):
        check_rows(heights, (3, 2), stride=stride, dilation=dilation)


@case
def rows_and_kernels_that_reach_over_several_ranks():
    for heights in all_heights():
        check_rows(heights, (7, 1), dilation=(2, 1))
        check_rows(heights, (7, 2), stride=2)


@case
def rows_that_no_kernel_reaches():
    for heights in all_heights():
        check_rows(heights, (1, 2), stride=3, output_padding=2)
        check_rows(heights, (1, 1), stride=2, bias=False)


@case
def rows_cropped_by_padding():
    for heights in all_heights():
        if sum(heights) < 4:
            continue
        check_rows(heights, (3, 3), padding=1)
        check_rows(heights, (3, 3), padding=(2, 0))
        check_rows(heights, (4, 3), stride=2, padding=(4, 1), output_padding=1)
        check_rows(heights, (2, 3), stride=(3, 1), padding=(3, 2), dilation=(2, 1))


@case
def rows_of_random_problems():
    rng = random.Random(5)
    for _ in range(40):
        heights = [rng.choice([0, 1, 2, 3, 6]) for _ in range(dist.get_world_size())]
        heights[rng.randrange(len(heights))] += 4
        stride, dilation, kernel = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 5)
        check_rows(
            heights,
            (kernel, 3),
            bias=rng.random() < 0.5,
            told=rng.random() < 0.5,
            stride=stride,
            dilation=dilation,
            padding=rng.randint(0, 1),
            output_padding=rng.randint(0, max(stride, dilation) - 1),
            groups=rng.choice([1, 2, 4]),
        )


@case
def rows_in_float32():
    for heights in all_heights():
        check_rows(heights, (5, 3), stride=2, dtype=torch.float32, tolerance=1e-5)


@case
def rows_by_kernels_of_ours():
    """On GPUs: kernels that crop the rows themselves, in float32."""
    ranks = dist.get_world_size()
    torch.manual_seed(8)
    for arguments in (dict(), dict(stride=2, padding=1), dict(dilation=2, groups=2)):
        x, weight, bias = torch.randn(2, 32, 5 * ranks, 40), torch.randn(32, 24, 3, 7), None
        if arguments.get("groups") != 2:
            bias = torch.randn(24)
        expected = F.conv_transpose2d(
            x.double(), weight.double(), None if bias is None else bias.double(), **arguments
        )
        heights = [5] * ranks
        problem = lab.Problem.from_shapes(
            x.shape, weight.shape, None if bias is None else bias.shape, **arguments
        )
        plan = RowPlan.for_heights(problem, heights)
        has, owns = (rows[dist.get_rank()] for rows in (plan.input_rows, plan.output_rows))
        rows = conv_transpose2d_rows(
            x[:, :, has.start : has.stop], weight, bias, **arguments, heights=heights
        )
        assert_close(rows.double(), expected[:, :, owns.start : owns.stop], 1e-5)


@case
def rows_in_channels_last():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # In float64 PyTorch's own output is not channels last on a GPU.
    (x, weight, _), output, _, _ = drawn(
        (2, 4, 3 * ranks, 5), (4, 3, 3, 3), False, {}, torch.float32
    )
    rows = x[:, :, 3 * rank : 3 * rank + 3].contiguous(memory_format=torch.channels_last)
    rows = conv_transpose2d_rows(rows, weight)
    assert_close(rows, output[:, :, 3 * rank : 3 * rank + rows.shape[2]], 1e-5)
    assert rows.is_contiguous(memory_format=torch.channels_last)


@case
def rows_of_a_smaller_group():
    group = dist.new_group([0, dist.get_world_size() - 1], timeout=datetime.timedelta(seconds=9))
    rank = dist.get_rank(group)
    if rank < 0:
        ones = torch.ones(1, 1, 2, 2)
        told = error_of(ValueError, conv_transpose2d_rows, ones, ones, group=group)
        assert "must be a group that this process belongs to" in told, told
        return
    (x, weight, _), output, _, _ = drawn((2, 4, 6, 5), (4, 3, 3, 3), False, {})
    rows = conv_transpose2d_rows(x[:, :, 3 * rank : 3 * rank + 3], weight, group=group, timeout=9)
    assert_close(rows, output[:, :, 3 * rank : 3 * rank + rows.shape[2]])


@case
def rows_under_autocast():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (x, weight, bias), output, _, _ = drawn(
        (2, 4, 3 * ranks, 5), (4, 3, 3, 3), True, {}, torch.float32
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rows = conv_transpose2d_rows(x[:, :, 3 * rank : 3 * rank + 3], weight, bias)
    assert rows.dtype is torch.bfloat16
    assert_close(rows.float(), output[:, :, 3 * rank : 3 * rank + rows.shape[2]], 0.05)


@case
def rows_in_a_compiled_function():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (x, weight, _), output, _, _ = drawn((2, 4, 3 * ranks, 5), (4, 3, 3, 3), False, {})

    @torch.compile(backend="eager")
    def doubled(rows):
        return conv_transpose2d_rows(rows * 2, weight, heights=[3] * ranks)

    rows = doubled(x[:, :, 3 * rank : 3 * rank + 3])
    assert_close(rows, 2 * output[:, :, 3 * rank : 3 * rank + rows.shape[2]])


@case
def rows_travel_while_the_interior_is_computed():
    """Look at the order of things, forward and backward, and count the bytes."""
    events = []

    def watched(owner, name, label):
        original = getattr(owner, name)

        def watching(self, *arguments):
            events.append(label(self, *arguments))
            return original(self, *arguments)

        setattr(owner, name, watching)
        return lambda: setattr(owner, name, original)

    rank, ranks = dist.get_rank(), dist.get_world_size()
    heights = [6] * ranks
    problem = lab.Problem.from_shapes((2, 4, 6 * ranks, 5), (4, 3, 3, 3))
    plan = RowPlan.for_heights(problem, heights)
    sent = []

    def start(exchange, sends, *_):
        sent.append(sum(tensor.nbytes for tensor in sends.values()))
        return "start"

    undo = [
        watched(distributed._Piece, "compute", lambda piece, *_: len(piece.wanted)),
        watched(distributed._Piece, "differentiate", lambda piece, *_: len(piece.wanted)),
        watched(distributed._Exchange, "__init__", start),
        watched(distributed._Exchange, "wait", lambda exchange: "wait"),
    ]
    try:
        x = torch.randn(2, 4, 6, 5, requires_grad=True)
        weight = torch.randn(problem.weight_shape)
        rows = conv_transpose2d_rows(x, weight, heights=heights)
        own, overlap = len(plan.output_rows[rank]), problem.kernel_size[0] - 1
        to_next = [overlap] if rank < ranks - 1 else []
        assert events == [*to_next, "start", own, "wait"], events
        assert sent == [plan.bytes_sent(rank)], sent
        assert sent == [2 * 3 * overlap * problem.out_width * 4 if to_next else 0], sent
        events.clear()
        rows.sum().backward()
        assert events == ["start", own, "wait", *to_next], events
    finally:
        for restore in undo:
            restore()


@case
def the_strip_is_computed_by_the_kernel_of_the_ranks_own_rows():
    """A few rows by themselves may be another kernel's, which rounds in another way."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    asked, used = [], []
    original = distributed.kernel_between, distributed.conv_transpose2d_between

    def ask(input, *_):
        asked.append(input.shape[2])
        return "the own rows' kernel"

    def compute(*arguments):
        *arguments, kernel = arguments
        used.append(kernel)
        return original[1](*arguments)

    distributed.kernel_between, distributed.conv_transpose2d_between = ask, compute
    try:
        x, weight = torch.randn(2, 4, 6, 5), torch.randn(4, 3, 3, 3)
        conv_transpose2d_rows(x, weight, heights=[6] * ranks)
    finally:
        distributed.kernel_between, distributed.conv_transpose2d_between = original
    if rank < ranks - 1:
        assert asked == [6]
        assert used == ["the own rows' kernel", None]
    else:
        assert asked == []
        assert used == [None]


def error_of(kind, call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@case
def integers_of_numpy():
    x, weight = torch.ones(1, 2, 3, 4), torch.ones(2, 2, 3, 3)
    y = conv_transpose2d_rows(x, weight, padding=np.int64(1), stride=(np.int32(2), 1))
    assert torch.equal(y, conv_transpose2d_rows(x, weight, padding=1, stride=(2, 1)))


@case
def wrong_arguments():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, weight = torch.ones(1, 2, 3, 4), torch.ones(2, 2, 3, 3)
    call = conv_transpose2d_rows
    told = error_of(ValueError, call, x, weight, heights=[3] * (ranks + 1))
    assert f"has {ranks + 1} values: there must be {ranks}" in told, told
    told = error_of(ValueError, call, x, weight, heights=[4] * ranks)
    assert f"says that rank {rank} has 4 rows, but its input has 3" in told, told
    told = error_of(ValueError, call, x, weight, heights=[-1] * ranks)
    assert "heights[0]=-1: it must be at least 0" in told, told
    told = error_of(TypeError, call, x, weight, timeout="long")
    assert "timeout='long' must be a number of seconds" in told, told
    told = error_of(ValueError, call, x, weight, timeout=0)
    assert "timeout=0 must be finite and at least" in told, told
    told = error_of(TypeError, call, x, [1.0])
    assert "weight must be a tensor, not list" in told, told
    told = error_of(ValueError, call, x[0], weight)
    assert "input has shape [2, 3, 4]: it must have four axes" in told, told
    told = error_of(ValueError, call, x, torch.ones(3, 2, 3, 3))
    assert "input must have 3 channels" in told, told


@case
def calls_that_differ_between_ranks():
    rank = dist.get_rank()
    x, weight = torch.ones(1, 2, 3, 4), torch.ones(2, 2, 3, 3)
    call = conv_transpose2d_rows
    told = error_of(ValueError, call, x, weight, stride=1 + (rank == 1))
    mine, theirs = ((1, 1), (2, 2)) if rank != 1 else ((2, 2), (1, 1))
    assert f"the ranks' calls differ in stride: {mine} on rank {rank}, {theirs} on" in told, told
    told = error_of(ValueError, call, x.requires_grad_(rank == 0), weight)
    assert "differ in whether input or weight requires a gradient" in told, told
    told = error_of(ValueError, call, x.to(torch.float64 if rank else torch.float32), weight)
    assert "differ in input's dtype" in told, told


# ---- DTensors ------------------------------------------------------------------------------------


def check_dtensors(
    mesh, of_input, of_weight, of_bias, shape, weight_shape, bare=False, **arguments
):
    """Compare output and gradients; return the output's placements."""
    arguments = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1} | (
        arguments
    )
    tensors, output, grad_output, gradients = drawn(
        shape, weight_shape, of_bias is not None, arguments
    )
    leaves = [
        None if t is None else distribute_tensor(t, mesh, placements).requires_grad_()
        for t, placements in zip(tensors, (of_input, of_weight, of_bias), strict=True)
    ]
    if bare:
        pairs = {k: v if k == "groups" else [v, v] for k, v in arguments.items()}
        actual = torch.ops.convt_lab.conv_transpose2d(*leaves, **pairs)
    else:
        actual = lab.conv_transpose2d(*leaves, **arguments)
    assert isinstance(actual, DTensor)
    assert actual.stride() == output.stride()
    assert_close(actual.full_tensor(), output)
    actual.backward(distribute_tensor(grad_output, mesh, [Replicate()] * mesh.ndim))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf is not None:
            assert_close(leaf.grad.full_tensor(), gradient)
    return tuple(actual.placements)


@case
def dtensors_of_every_placement():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    placements = [Replicate(), Shard(0), Shard(1), Shard(2)]
    cases = itertools.product(placements, placements, (1, 2, 4), (True, False))
    for i, (of_input, of_weight, groups, bare) in enumerate(cases):
        check_dtensors(
            mesh,
            [of_input],
            [of_weight],
            [[Replicate()], [Shard(0)], None][i % 3],
            (3, 4, 9, 5),
            (4, 3, 3, 2),
            bare,
            stride=1 + i % 3,
            dilation=1 + i % 2,
            padding=i % 2,
            groups=groups,
        )


@case
def dtensors_on_more_ranks_than_there_is_to_split():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    whole = [Replicate()]
    for stride, dilation in itertools.product((1, 2, 3), (1, 2)):
        arguments = dict(stride=stride, dilation=dilation)
        for shape, weight_shape, of_input, of_weight in (
            ((1, 2, 4, 3), (2, 2, 3, 3), [Shard(0)], whole),
            ((1, 1, 4, 3), (1, 2, 3, 3), [Shard(1)], whole),
            ((1, 2, 4, 3), (2, 1, 3, 3), whole, [Shard(1)]),
            ((1, 2, 1, 3), (2, 2, 3, 3), [Shard(2)], whole),
            ((1, 2, 3, 3), (2, 2, 5, 3), [Shard(2)], whole),
        ):
            check_dtensors(mesh, of_input, of_weight, whole, shape, weight_shape, **arguments)


@case
def dtensors_send_nothing_where_nothing_need_be_sent():
    """The output stays as split as the table in the module says."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    ranks = dist.get_world_size()
    whole = [Replicate()]
    for of_input, of_weight, of_bias, groups, expected in (
        ([Shard(0)], whole, whole, 1, "S(0)"),
        ([Shard(1)], [Shard(0)], whole, 1, "P(sum)"),
        (whole, [Shard(1)], [Shard(0)], 1, "S(1)"),
        ([Shard(1)], [Shard(0)], [Shard(0)], ranks, "S(1)"),
        ([Shard(2)], whole, whole, 1, "S(2)"),
    ):
        placements = check_dtensors(
            mesh, of_input, of_weight, of_bias, (4, 4, 8, 3), (4, 4, 3, 3), groups=groups
        )
        assert list(map(str, placements)) == [expected], (placements, expected)


@case
def dtensors_on_a_mesh_of_two_axes():
    ranks = dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (ranks // 2, 2))
    whole = Replicate()
    for of_input, of_weight in (
        ([Shard(0), Shard(2)], [whole, whole]),
        ([Shard(2), Shard(0)], [whole, whole]),
        ([Shard(2), Shard(1)], [whole, Shard(0)]),
        ([Shard(2), whole], [whole, Shard(1)]),
        ([Shard(1), whole], [Shard(0), Shard(1)]),
        ([Shard(0), Shard(0)], [whole, whole]),
        ([Shard(1), Shard(1)], [whole, whole]),
    ):
        for groups in (1, 2):
            check_dtensors(
                mesh,
                of_input,
                of_weight,
                [whole, whole],
                (4, 4, 5, 3),
                (4, 2, 3, 3),
                stride=2,
                groups=groups,
            )


@case
def dtensors_where_autograd_is_off():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    (x, weight, _), output, _, _ = drawn((2, 4, 6, 5), (4, 3, 3, 3), False, {"stride": 2})
    x, weight = distribute_tensor(x, mesh, [Shard(2)]), distribute_tensor(weight, mesh, [Shard(0)])
    with torch.inference_mode():
        bare = torch.ops.convt_lab.conv_transpose2d(x, weight, None, [2, 2])
        assert_close(bare.full_tensor(), output)
        assert_close(lab.conv_transpose2d(x, weight, stride=2).full_tensor(), output)
    with torch.no_grad():
        alone = lab.conv_transpose2d(x[0], weight, stride=2)
        assert_close(alone.full_tensor(), output[0])


@case
def dtensors_under_autocast():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    tensors, output, grad_output, gradients = drawn(
        (2, 4, 6, 5), (4, 3, 3, 3), True, {"stride": 2}, torch.float32
    )
    for placement in (Shard(0), Shard(1), Shard(2)):
        leaves = [
            distribute_tensor(t, mesh, [p]).requires_grad_()
            for t, p in zip(tensors, (placement, Replicate(), Replicate()), strict=True)
        ]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = lab.conv_transpose2d(*leaves, stride=2)
        assert actual.dtype is torch.bfloat16
        assert_close(actual.full_tensor().float(), output, 0.05)
        actual.float().backward(distribute_tensor(grad_output, mesh, [Replicate()]))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert leaf.grad.dtype is torch.float32
            assert_close(leaf.grad.full_tensor(), gradient, 0.05)


@case
def dtensors_in_the_layer_under_a_compiler():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    torch.manual_seed(3)
    layer = lab.ConvTranspose2d(4, 3, 3, stride=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = layer(x) * 2
    split = torch.distributed.tensor.distribute_module(layer, mesh)
    compiled = torch.compile(lambda x: split(x) * 2, backend="eager")
    assert_close(compiled(distribute_tensor(x, mesh, [Shard(2)])).full_tensor(), expected)


@case
def wrong_dtensors():
    ranks = dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (ranks,))
    x, weight = torch.ones(2, 2, 5, 4), torch.ones(2, 2, 3, 3)
    whole = distribute_tensor(weight, mesh, [Replicate()])
    call = lab.conv_transpose2d
    told = error_of(TypeError, call, distribute_tensor(x, mesh, [Shard(0)]), weight)
    assert "weight is a Tensor, and another argument is a DTensor: weight must be" in told, told
    told = error_of(ValueError, call, distribute_tensor(x, mesh, [Shard(3)]), whole)
    assert "its columns can't be split; redistribute it to Shard(2)" in told, told
    told = error_of(ValueError, call, distribute_tensor(x, mesh, [Shard(2)]), whole, padding=9)
    assert "leaves no output" in told, told
    uneven = DTensor.from_local(
        x[:, :, : 2 + 3 * (dist.get_rank() == ranks - 1)],
        mesh,
        [Shard(2)],
        shape=(2, 2, 2 * ranks + 3, 4),
        stride=((2 * ranks + 3) * 8, (2 * ranks + 3) * 4, 4, 1),
    )
    told = error_of(ValueError, call, uneven, whole)
    assert "uneven rows can be split by conv_transpose2d_rows" in told, told
    plane = init_device_mesh(DEVICE, (ranks // 2, 2))
    told = error_of(ValueError, call, distribute_tensor(x, plane, [Shard(0)] * 2), whole)
    assert "weight is on the mesh" in told, told
    twice = distribute_tensor(x, plane, [Shard(2)] * 2)
    told = error_of(ValueError, call, twice, distribute_tensor(weight, plane, [Replicate()] * 2))
    assert "one axis of the mesh can split the rows, not two" in told, told


# ---- The layer under PyTorch's data parallelism --------------------------------------------------


def model():
    torch.manual_seed(11)
    return nn.Sequential(
        lab.ConvTranspose2d(3, 8, (3, 7), stride=2, padding=1),
        nn.ReLU(),
        lab.ConvTranspose2d(8, 4, 3, groups=2, dilation=2, bias=False),
        nn.ReLU(),
        lab.ConvTranspose2d(4, 1, 2, output_padding=1, stride=2),
    )


def train(parallel, x, target, gradients_of):
    """Train for three steps; return each step's loss and gradients."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(parallel(x), target)
        loss.backward()
        steps.append((loss.detach(), gradients_of(parallel)))
        optimizer.step()
    return steps


def check_training(parallelize, gradients_of):
    ranks = dist.get_world_size()
    torch.manual_seed(12)
    x = torch.randn(2 * ranks, 3, 4, 5)
    with torch.no_grad():
        target = torch.randn_like(model()(x))
    expected = train(model(), x, target, lambda m: [p.grad for p in m.parameters()])
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    actual = train(parallelize(model()), x[own], target[own], gradients_of)
    for (loss, gradients), (expected_loss, expected_gradients) in zip(
        actual, expected, strict=True
    ):
        dist.all_reduce(loss)
        assert_close(loss / ranks, expected_loss, 1e-5)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient, expected_gradient, 1e-5)
    losses = [loss.item() for loss, _ in expected]
    assert losses[0] > losses[1] > losses[2], losses


@case
def data_parallel_training():
    check_training(DistributedDataParallel, lambda m: [p.grad.clone() for p in m.parameters()])


@case
def fully_sharded_training():
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))

    def parallelize(layers):
        for layer in layers:
            if isinstance(layer, lab.ConvTranspose2d):
                fully_shard(layer, mesh=mesh)
        return fully_shard(layers, mesh=mesh)

    check_training(parallelize, lambda m: [p.grad.full_tensor() for p in m.parameters()])


# ---- Ranks that die or are late: these cases end in an error on purpose --------------------------


def rows_forward_and_backward(**keywords):
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    rows = conv_transpose2d_rows(x, torch.ones(2, 2, 3, 3), **keywords)
    rows.sum().backward()


def a_rank_dies():
    heights = [4] * dist.get_world_size()
    rows_forward_and_backward(heights=heights)
    if dist.get_rank() == 1:
        os._exit(7)
    rows_forward_and_backward(heights=heights)


def a_rank_dies_where_heights_are_asked_for():
    rows_forward_and_backward()
    if dist.get_rank() == 1:
        os._exit(7)
    rows_forward_and_backward()


def a_rank_is_late():
    heights = [4] * dist.get_world_size()
    rows_forward_and_backward(heights=heights)
    if dist.get_rank() == 1:
        time.sleep(5)
    start = time.monotonic()
    try:
        rows_forward_and_backward(heights=heights, timeout=1.5)
    except ExchangeError:
        print(f"gave up after {time.monotonic() - start:.1f} s", flush=True)
        raise


FATAL_CASES = {
    function.__name__: function
    for function in (a_rank_dies, a_rank_dies_where_heights_are_asked_for, a_rank_is_late)
}


def main(device, rank, ranks, folder, names):
    global DEVICE
    DEVICE = device
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device(device, rank))
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    outcomes = {}
    for name in names:
        try:
            (CASES | FATAL_CASES)[name]()
            dist.barrier()
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name] != "passed":
            os._exit(1)  # no goodbye to ranks that may wait for something else
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
