"""A transposed convolution on several processes, compared with the same on one.

On CPUs, with gloo:

    torchrun --nproc-per-node 4 examples/distributed.py

On GPUs, with NCCL, one process for each:

    torchrun --nproc-per-node 4 examples/distributed.py --height 8192 --width 8192

The work is split in three ways: the rows of the images, the images, and the output channels. For
each, every rank's line gives the largest error of output and gradients, relative to the largest
value; the median time of a forward and a backward pass with the sums of gradients; the bytes of
rows that the rank sends in both; and the bytes of gradients that are summed over all ranks (how
many bytes a rank sends for that is the backend's choice). The exit status is 0 if all agree.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import convt_lab as lab
from convt_lab.distributed import RowPlan, conv_transpose2d_rows

Tensors = list[torch.Tensor]

#: Largest error relative to the largest value: float32 sums that are taken in another order.
TOLERANCE = 1e-4


def main() -> None:
    options = parsed()
    device = connected(options.timeout)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = lab.Problem(
        batch=options.batch,
        in_channels=options.channels,
        out_channels=options.channels,
        height=options.height,
        width=options.width,
        kernel_size=(3, 7),
        stride=options.stride,
        bias=True,
    )
    tensors = [torch.as_tensor(t, device=device) for t in problem.random_inputs(seed=0)]
    torch.manual_seed(1)
    grad_output = torch.randn(problem.output_shape).to(device)

    say(f"{ranks} ranks, {dist.get_backend()}, {device.type}; {problem}")
    expected = None
    if rank == 0:

        def alone() -> Tensors:
            return passes(lab.conv_transpose2d, tensors, grad_output, problem)

        expected, seconds = timed(alone, options.steps, device, lambda: None)
        say(f"one process: {seconds * 1e3:.2f} ms")
    expected = shared(expected, [problem.output_shape, *(t.shape for t in tensors)], device)

    say(f"{'split':9} {'rank':7} {'error':>8} {'ms':>9} {'bytes sent':>14} {'bytes summed':>14}")
    agree = True
    for name, split in (("rows", by_rows), ("images", by_images), ("channels", by_channels)):
        run, parts, sent, summed = split(problem, tensors, grad_output)
        results, seconds = timed(run, options.steps, device, dist.barrier)
        error = max(
            relative_error(result, whole[part])
            for result, whole, part in zip(results, expected, parts, strict=True)
        )
        lines = [None] * ranks
        dist.all_gather_object(lines, (error, seconds, sent, summed))
        for other, (error, seconds, sent, summed) in enumerate(lines):
            agree = agree and error <= TOLERANCE  # false for NaN
            say(
                f"{name:9} rank {other:<2} {error:8.1e} {seconds * 1e3:9.2f} "
                f"{sent:14,} {summed:14,}"
            )
    say("all agree with one process" if agree else f"an error is not below {TOLERANCE:g}")
    dist.destroy_process_group()
    if not agree:
        raise SystemExit(1)


# ---- Three ways to split: what to run, which part of the whole each result is, the bytes ---------


def by_rows(problem: lab.Problem, tensors: Tensors, grad_output: torch.Tensor) -> tuple:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # As even as can be; some ranks have no rows if there are fewer rows than ranks.
    heights = [problem.height // ranks + (r < problem.height % ranks) for r in range(ranks)]
    plan = RowPlan.for_heights(problem, heights)
    has, owns = (rows_slice(rows[rank]) for rows in (plan.input_rows, plan.output_rows))
    input, weight, bias = tensors
    own = [input[has].contiguous(), weight, bias]

    def run() -> Tensors:
        def call(*leaves, **arguments):
            return conv_transpose2d_rows(*leaves, **arguments, heights=heights)

        results = passes(call, own, grad_output[owns], problem)
        for gradient in results[2:]:
            dist.all_reduce(gradient)
        return results

    sent = plan.bytes_sent(rank) + plan.bytes_sent(rank, backward=True)
    return run, [owns, has, ..., ...], sent, weight.nbytes + bias.nbytes


def by_images(problem: lab.Problem, tensors: Tensors, grad_output: torch.Tensor) -> tuple:
    summed = tensors[1].nbytes + tensors[2].nbytes
    whole = Replicate()
    return *by_placements(problem, tensors, grad_output, [Shard(0), whole, whole]), 0, summed


def by_channels(problem: lab.Problem, tensors: Tensors, grad_output: torch.Tensor) -> tuple:
    placements = [Replicate(), Shard(1), Shard(0)]
    return *by_placements(problem, tensors, grad_output, placements), 0, tensors[0].nbytes


def by_placements(
    problem: lab.Problem, tensors: Tensors, grad_output: torch.Tensor, placements: list
) -> tuple[Callable[[], Tensors], list]:
    mesh = init_device_mesh(grad_output.device.type, (dist.get_world_size(),))
    own = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)]
    output_placement = Shard(0) if placements[0] == Shard(0) else Shard(1)
    own_grad_output = distribute_tensor(grad_output, mesh, [output_placement])

    def run() -> Tensors:
        results = passes(lab.conv_transpose2d, own, own_grad_output, problem)
        # What each rank has a part of is summed here.
        gradients = [
            gradient.redistribute(placements=[placement])
            for gradient, placement in zip(results[1:], placements, strict=True)
        ]
        return [results[0].to_local(), *(gradient.to_local() for gradient in gradients)]

    return run, [
        part(length, placement)
        for length, placement in zip(
            [grad_output.shape, *(t.shape for t in tensors)],
            [output_placement, *placements],
            strict=True,
        )
    ]


def part(shape: torch.Size, placement: Shard | Replicate) -> tuple | type(...):
    """Return the index of this rank's part, as torch.chunk splits."""
    if placement.is_replicate():
        return ...
    step = -(-shape[placement.dim] // dist.get_world_size())
    start = step * dist.get_rank()
    return (slice(None),) * placement.dim + (slice(start, start + step),)


def rows_slice(rows: range) -> tuple:
    return (slice(None), slice(None), slice(rows.start, rows.stop))


# ---- One forward and one backward pass -----------------------------------------------------------


def passes(
    call: Callable, tensors: Tensors, grad_output: torch.Tensor, problem: lab.Problem
) -> Tensors:
    """Return the output and the gradients of input, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = call(*leaves, **problem.arguments)
    output.backward(grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def timed(
    run: Callable[[], Tensors], steps: int, device: torch.device, together: Callable[[], None]
) -> tuple[Tensors, float]:
    """Return the results and the median time, after one run that counts for nothing."""
    results = run()
    seconds = []
    for _ in range(steps):
        together()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return results, statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ---- Ranks ---------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("batch", 2, "images"),
        ("channels", 16, "channels, of the input and of the output"),
        ("height", 256, "rows of the images"),
        ("width", 256, "columns of the images"),
        ("stride", 1, "stride of rows and columns"),
        ("steps", 5, "how often each is timed"),
        ("timeout", 120, "seconds until a rank gives up on another"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args()
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"--{name}={value}: it must be at least 1")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/distributed.py")
    return options


def connected(timeout: int) -> torch.device:
    """Join the other ranks; return this rank's device."""
    local_rank = int(os.environ["LOCAL_RANK"])
    limit = datetime.timedelta(seconds=timeout)
    # A GPU for each process on this machine, or none.
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.backends.cudnn.allow_tf32 = False  # which would round more than sums differ
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Else a kernel that is on all multiprocessors could keep NCCL's waiting until it ends.
        high = dist.ProcessGroupNCCL.Options()
        high.is_high_priority_stream = True
        dist.init_process_group("nccl", timeout=limit, device_id=device, pg_options=high)
        return device
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo", timeout=limit)
    return torch.device("cpu")


def shared(tensors: Tensors | None, shapes: list, device: torch.device) -> Tensors:
    """Give rank 0's tensors to all ranks."""
    if tensors is None:
        tensors = [torch.empty(shape, device=device) for shape in shapes]
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
    return tensors


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
