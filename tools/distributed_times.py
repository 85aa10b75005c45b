"""Measures the operator on several GPUs of one machine: how it scales, and what sending costs.

    python tools/distributed_times.py [--output FILE]

It starts a process for each GPU. On 1, 2, 4 ... of them it computes

- ``images``: the star's batch on each GPU (weak scaling), as DTensors split by images;
- ``rows``: images of as many times the star's rows as there are GPUs (weak scaling), split by rows;
- ``tall``: one image of 8192 x 8192 pixels (strong scaling), split by rows.

Each is run back to back, in rounds with the others. Where rows are split it is run once more with
nothing sent, and once under torch.profiler, which tells when rows travelled and what was computed
meanwhile. Results are compared with one GPU's. The record is written to
``records/GPU-distributed.json``; it takes about two minutes, once the kernels are built.

The record (schema 1): ``what``, ``gpu``, ``gpus``, ``link`` (what ``nvidia-smi topo -m`` calls the
way from the first to the second), ``software`` (with ``nccl``), ``date``, ``seed``, ``meaning`` and
``rows``, each with ``case``, ``problem`` (the whole one's arguments of `Problem`), ``ranks``,
``allow_tf32``, ``kernel`` (that computes the first rank's own rows), ``ms`` and, for every round,
``rounds_ms``; ``error``, the largest against one GPU's result, relative to the largest value.
Where rows are split: ``ms_without_exchange`` and its ``rounds_ms_without_exchange``, ``bytes_sent``
(of each rank), and ``exchange``: of each rank's profile ``sent_us`` (from the first to the last
moment of its exchange's kernels), ``hidden_us`` (the part of it during which a kernel of the
operator ran) and ``call_us`` (from the first kernel's start to the last one's end).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import conv_transpose2d, distributed, records  # noqa: E402
from convt_lab.distributed import RowPlan, conv_transpose2d_rows  # noqa: E402
from convt_lab.plan import plan_for  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402

#: Rounds, of each of which the median is taken, and seconds that a round is to last.
ROUNDS, SECONDS = 9, 0.06

#: Pixels of a side of the image that is split.
TALL = 8192


def cases(ranks: int) -> dict[str, Problem]:
    """Return what is computed on so many GPUs together."""
    star = Problem.named("star")
    return {
        "images": replace(star, batch=star.batch * ranks),
        "rows": replace(star, height=star.height * ranks),
        "tall": replace(star, batch=1, height=TALL, width=TALL),
    }


# ---- One case on one rank ------------------------------------------------------------------------


class Part:
    """One rank's part of a case: its tensors, and the call.

    Parameters
    ----------
    case, problem
        A name of `cases`, and the whole problem.
    group
        The ranks that share it.
    seed
        Of input and weight, which are the same however many ranks there are.
    """

    def __init__(self, case: str, problem: Problem, group: dist.ProcessGroup, seed: int):
        self.case, self.problem, self.group = case, problem, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.plan = RowPlan.for_heights(problem, [problem.height // self.ranks] * self.ranks)
        whole = self._drawn(seed, problem.input_shape)
        self.weight = self._drawn(seed + 1, problem.weight_shape)
        self.input = self._own(whole).clone()
        self.mesh = DeviceMesh.from_group(group, "cuda")

    @staticmethod
    def _drawn(seed: int, shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(shape, device="cuda", generator=generator)

    def _own(self, input: torch.Tensor) -> torch.Tensor:
        if self.case == "images":
            return input.chunk(self.ranks)[self.rank]
        has = self.plan.input_rows[self.rank]
        return input[:, :, has.start : has.stop]

    @property
    def splits_rows(self) -> bool:
        """Whether anything is sent."""
        return self.case != "images" and self.ranks > 1

    def call(self) -> torch.Tensor:
        """Compute this rank's part of the output; on one GPU, as on any one."""
        arguments = self.problem.arguments
        if self.ranks == 1:
            return conv_transpose2d(self.input, self.weight, **arguments)
        if self.case == "images":
            weight = DTensor.from_local(self.weight, self.mesh, [Replicate()], run_check=False)
            input = DTensor.from_local(self.input, self.mesh, [Shard(0)], run_check=False)
            return conv_transpose2d(input, weight, **arguments).to_local()
        return conv_transpose2d_rows(
            self.input,
            self.weight,
            **arguments,
            group=self.group,
            heights=[len(rows) for rows in self.plan.input_rows],
        )

    def error(self, seed: int) -> float:
        """Return the largest difference from what one GPU computes, relative to the largest."""
        actual = self.call()
        whole = self._drawn(seed, self.problem.input_shape)
        expected = conv_transpose2d(whole, self.weight, **self.problem.arguments)
        del whole
        if self.case == "images":
            expected = expected.chunk(self.ranks)[self.rank]
        else:
            owns = self.plan.output_rows[self.rank]
            expected = expected[:, :, owns.start : owns.stop]
        scale = expected.abs().max()
        return (actual.sub_(expected).abs_().max() / scale).item()

    def kernel(self) -> str:
        """Name the kernel of the first rank's own rows, or that of its images."""
        arguments = self.problem.arguments
        cropped = 0
        if self.splits_rows:
            cropped = len(self.plan.added_to(0)) - len(self.plan.output_rows[0])
        return plan_for(
            self.input, self.weight, None, *arguments.values(), cropped_rows=cropped
        ).kernel


@contextmanager
def nothing_sent():
    """Let exchanges bring what happens to be in memory, at once."""
    original = distributed._Exchange

    class Nothing:
        def __init__(self, sends, receives, *_):
            self.receives = receives

        def wait(self):
            return self.receives

    distributed._Exchange = Nothing
    try:
        yield
    finally:
        distributed._Exchange = original


# ---- Measuring -----------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], runs: int, control: dist.ProcessGroup) -> float:
    """Return one run's share of `runs` back to back, of the rank that takes longest."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier(control)
    begin.record()
    for _ in range(runs):
        call()
    end.record()
    torch.cuda.synchronize()
    slowest = torch.tensor(begin.elapsed_time(end) / runs, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
    return slowest.item()


def profiled(call: Callable[[], object], control: dist.ProcessGroup) -> dict[str, float]:
    """Return when rows travelled and what ran meanwhile, in a profile's second call."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    call()
    torch.cuda.synchronize()
    dist.barrier(control)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events():
        is_nccls = event.name.startswith("nccl")
        # Besides its kernels there are spans that only mark what they belong to.
        if event.device_type != torch.autograd.DeviceType.CUDA or (
            is_nccls and "Kernel" not in event.name
        ):
            continue
        spans[is_nccls].append((event.time_range.start, event.time_range.end))
    starts, ends = zip(*spans[True], strict=True)
    sent = (min(starts), max(ends))
    # Kernels of one stream follow one another, so their parts of the interval add up.
    hidden = sum(max(0.0, min(end, sent[1]) - max(start, sent[0])) for start, end in spans[False])
    every = spans[True] + spans[False]
    return {
        "sent_us": sent[1] - sent[0],
        "hidden_us": hidden,
        "call_us": max(end for _, end in every) - min(start for start, _ in every),
    }


def measured(
    counts: Sequence[int],
    groups: dict[int, dist.ProcessGroup],
    controls: dict[int, dist.ProcessGroup],
    everyone: dist.ProcessGroup,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure all cases on this rank; the first rank's list is the record's rows."""
    rank = dist.get_rank()
    rows = []
    for allow_tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = allow_tf32
        for case in cases(1):
            parts, errors, runs = {}, {}, {}
            for count in counts:
                if rank < count:
                    problem = cases(count)[case]
                    part = Part(case, problem, groups[count], seed)
                    worst = torch.tensor(part.error(seed), dtype=torch.float64)
                    dist.all_reduce(worst, dist.ReduceOp.MAX, group=controls[count])
                    parts[count], errors[count] = part, worst.item()
                    milliseconds(part.call, 3, controls[count])
                    once = milliseconds(part.call, 3, controls[count])
                    runs[count] = max(2, round(1000 * SECONDS / once))
                torch.cuda.empty_cache()
                dist.barrier(everyone)
            times: dict[tuple[int, bool], list[float]] = {}
            for _ in range(ROUNDS):
                for count in counts:
                    if rank < count:
                        part, control = parts[count], controls[count]
                        found = times.setdefault((count, True), [])
                        found.append(milliseconds(part.call, runs[count], control))
                        if part.splits_rows:
                            with nothing_sent():
                                found = times.setdefault((count, False), [])
                                found.append(milliseconds(part.call, runs[count], control))
                    dist.barrier(everyone)
            for count in counts:
                if rank < count:
                    row = row_of(parts[count], allow_tf32, errors[count], times, controls[count])
                    rows.append(row)
                dist.barrier(everyone)
            del parts
            torch.cuda.empty_cache()
    return rows


def row_of(
    part: Part,
    allow_tf32: bool,
    error: float,
    times: dict[tuple[int, bool], list[float]],
    control: dist.ProcessGroup,
) -> dict[str, Any]:
    """Return a row of the record."""
    sent = times[part.ranks, True]
    row = {
        "case": part.case,
        "problem": asdict(part.problem),
        "ranks": part.ranks,
        "allow_tf32": allow_tf32,
        "kernel": part.kernel(),
        "error": records.rounded(error, 3),
        "ms": records.rounded(statistics.median(sent), 5),
        "rounds_ms": [records.rounded(value, 5) for value in sent],
    }
    if part.splits_rows:
        alone = times[part.ranks, False]
        profiles: list[Any] = [None] * part.ranks
        dist.all_gather_object(profiles, profiled(part.call, control), group=control)
        row |= {
            "ms_without_exchange": records.rounded(statistics.median(alone), 5),
            "rounds_ms_without_exchange": [records.rounded(value, 5) for value in alone],
            "bytes_sent": [part.plan.bytes_sent(rank) for rank in range(part.ranks)],
            "exchange": [
                {name: records.rounded(value, 5) for name, value in profile.items()}
                for profile in profiles
            ],
        }
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the record's numbers as text."""
    lines = [
        "case    TF32   GPUs        ms  efficiency  nothing sent  sent, hidden, call (us)   error"
    ]
    for row in rows:
        alone = next(
            r["ms"]
            for r in rows
            if r["ranks"] == 1 and all(r[key] == row[key] for key in ("case", "allow_tf32"))
        )
        efficiency = alone / row["ms"] / (row["ranks"] if row["case"] == "tall" else 1)
        exchanges = "; ".join(
            f"{e['sent_us']:.0f}, {e['hidden_us']:.0f}, {e['call_us']:.0f}"
            for e in row.get("exchange", [])
        )
        lines.append(
            f"{row['case']:7} {row['allow_tf32']!s:5} {row['ranks']:5} {row['ms']:9.3f} "
            f"{efficiency:11.3f} {row.get('ms_without_exchange') or '':>13}  {exchanges:25} "
            f"{row['error']:.1e} {row['kernel']}"
        )
    return "\n".join(lines)


def link() -> str | None:
    """Say how the first two GPUs are linked, in nvidia-smi's words."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    row = next((line.split() for line in done.stdout.splitlines() if line.startswith("GPU0")), [])
    return row[2] if len(row) > 2 else None


# ---- Processes -----------------------------------------------------------------------------------


def on_a_rank(arguments: argparse.Namespace) -> None:
    """Be one of the processes that `main` starts."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    limit = timedelta(seconds=120)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit, device_id=device)
    world = dist.get_world_size()
    counts = [count for count in (1, 2, 4, 8) if count <= world]
    groups = {count: dist.new_group(range(count), backend="nccl") for count in counts}
    controls = {count: dist.new_group(range(count), backend="gloo") for count in counts}
    everyone = dist.new_group(backend="gloo")
    if rank == 0:  # builds the kernels, once for all
        for case in cases(1):
            Part(case, cases(1)[case], groups[1], arguments.seed).call()
    dist.barrier(everyone)
    rows = measured(counts, groups, controls, everyone, arguments.seed)
    if rank == 0:
        print(table(rows))
        write(rows, world, arguments)
    dist.barrier(everyone)
    dist.destroy_process_group()


def write(rows: list[dict[str, Any]], gpus: int, arguments: argparse.Namespace) -> None:
    """Write the record."""
    from convt_lab.bench import _current_gpu

    with _current_gpu() as machine:
        path = arguments.output or (
            records.FOLDER / f"{records.slug(machine.gpu.name)}-distributed.json"
        )
        record = {
            "schema": 1,
            "what": "times of the operator on several GPUs, and what sending rows costs",
            "gpu": machine.gpu.name,
            "gpus": gpus,
            "link": link(),
            "software": {
                **asdict(machine.software),
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            },
            "date": date.today().isoformat(),
            "seed": arguments.seed,
            "meaning": {
                "images": "the star's batch on each GPU, split by images: weak scaling",
                "rows": "the star with as many times its rows as there are GPUs, split by rows: "
                "weak scaling",
                "tall": f"one image of {TALL} x {TALL} pixels with the star's channels and "
                "kernel, split by rows: strong scaling",
                "ms": "median of the rounds; a round is one run's share of some back to back "
                f"({SECONDS:g} s), on the GPU that took longest; one GPU calls the operator as "
                "if there were no others",
                "ms_without_exchange": "the same with nothing sent or received",
                "exchange": "of each rank, in a profile of one call: from the first to the last "
                "moment of NCCL's kernels, how much of that another kernel ran, and the call",
                "error": "largest difference from one GPU's result, relative to the largest value",
            },
            "rows": rows,
        }
    records.write_text(path, records.text_of(record))
    print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Start a process for each GPU, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ:
        on_a_rank(arguments)
        return
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"torch sees {gpus} CUDA devices: scaling is measured on 2 or more")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    given = sys.argv[1:] if argv is None else list(argv)
    raise SystemExit(
        subprocess.run(
            [sys.executable, *command, str(Path(__file__)), *given], check=False
        ).returncode
    )


if __name__ == "__main__":
    main()
