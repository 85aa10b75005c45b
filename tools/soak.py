"""Calls the operator very often, from two threads and on two streams, and looks for what grows.

    python tools/soak.py [--calls N] [--problems N] [--device cuda|cpu] [--output FILE]

Random problems of all dtypes and memory formats are called in random order, in strict float32 and
with TF32 by turns; most are problems for which the operator chooses kernels of this package. Every
result must have the bits of the problem's first call, made before by one thread alone (cuDNN is
told to be deterministic, where it computes). Memory, threads, open files and the build cache's
files are counted once everything has been called by every thread, then ten times on the way. It
fails if a result differs or one of them has grown at the end, and writes
``records/GPU-soak.json``, or where ``--output`` says. 100,000 calls take half a minute.

The record (schema 1): ``what``, ``gpu``, ``software``, ``date``, ``seed``, ``meaning``, ``calls``,
``seconds``, ``threads``, ``streams``, ``problems`` (how many), ``kernels`` (of each, how often it
is one of a problem's two), ``mismatches``, and ``counts``: ``after`` how many calls each was taken,
and the counters of `Counts`.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import conv_transpose2d, records  # noqa: E402
from convt_lab.bench import _current_gpu  # noqa: E402
from convt_lab.build import cache_folder  # noqa: E402
from convt_lab.plan import plan_for  # noqa: E402
from convt_lab.problem import Problem, ProblemError  # noqa: E402

THREADS = STREAMS = 2

#: How often counts are taken between the first and the last.
STEPS = 10

#: What a random problem may cost: multiply-adds, and elements of input or output.
MOST = {"cuda": (2_000_000_000, 3_000_000), "cpu": (10_000_000, 200_000)}

#: How often a problem is drawn again because PyTorch would compute it, for most of them.
TRIES = 40

#: By how many bytes memory may have grown that is kept for later: the process's, by Python and the
#: driver; the GPU's, by PyTorch's allocator, which holds what was ever in use at one moment, and
#: whose largest tensors here are of 12 MB, in two threads and on two streams.
SLACK = 16 * 2**20
SLACK_OF_ALLOCATOR = 64 * 2**20


def random_problem(rng: random.Random, device: str) -> Problem:
    """Draw a legal problem that is neither large nor empty."""
    most_work, most_elements = MOST[device]
    # Of each of batch, height and width.
    room = 5 if device == "cuda" else 1
    # The kernels for tensor cores are for many channels, as most networks' layers have.
    many = device == "cuda" and rng.random() < 0.6
    channels = [16, 32, 64, 96, 128] if many else [1, 2, 3, 8, 16, 32, 64]
    while True:
        groups = rng.choice([1, 1, 1, 2] if many else [1, 1, 1, 2, 4, 8])
        stride = rng.choice([1, 1, 2, 2, 3, 4])
        try:
            problem = Problem(
                batch=rng.randint(1, 4 * room),
                in_channels=groups * rng.choice(channels),
                out_channels=groups * rng.choice(channels),
                height=rng.randint(1, 40 * room),
                width=rng.randint(1, 72 * room),
                kernel_size=rng.choice([(3, 7), (3, 7), 1, 2, 3, 4, 5, (5, 9), 7]),
                stride=stride,
                padding=rng.randint(0, 3),
                output_padding=rng.randint(0, stride - 1),
                dilation=rng.choice([1, 1, 1, 2]),
                groups=groups,
                bias=rng.random() < 0.5,
            )
        except ProblemError:
            continue
        elements = max(math.prod(problem.input_shape), math.prod(problem.output_shape))
        if problem.multiply_adds <= most_work and elements <= most_elements:
            return problem


class Job:
    """A problem with its inputs, and the bits that a call must give.

    Parameters
    ----------
    rng
        Draws the problem, dtype and memory format.
    device
        Where the tensors are.
    """

    def __init__(self, rng: random.Random, device: str):
        # Of five, four shall be computed by kernels of ours, if enough such are found.
        for _ in range(TRIES if device == "cuda" and rng.random() < 0.8 else 1):
            self._draw(rng, device)
            if "pytorch" not in self.kernels.values():
                break
        self.outputs = {}
        for allow_tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = allow_tf32
            self.outputs[allow_tf32] = self.call()

    def _draw(self, rng: random.Random, device: str) -> None:
        self.problem = random_problem(rng, device)
        dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        generator = torch.Generator(device).manual_seed(rng.randrange(2**31))
        shapes = (self.problem.input_shape, self.problem.weight_shape, self.problem.bias_shape)
        x, weight, bias = (
            None
            if shape is None
            else torch.randn(shape, generator=generator, device=device).to(dtype)
            for shape in shapes
        )
        if rng.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        self.tensors = (x, weight, bias)
        self.kernels = {}
        for allow_tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = allow_tf32
            plan = plan_for(*self.tensors, *self.problem.arguments.values())
            self.kernels[allow_tf32] = plan.kernel

    @property
    def expected(self) -> torch.Tensor:
        """What a call must give with the present setting."""
        return self.outputs[torch.backends.cudnn.allow_tf32]

    def call(self) -> torch.Tensor:
        """Call the operator."""
        return conv_transpose2d(*self.tensors, **self.problem.arguments)

    def wrong(self, output: torch.Tensor) -> torch.Tensor:
        """Return how many elements have other bits than expected, without waiting for it."""
        bits = torch.int32 if output.dtype == torch.float32 else torch.int16
        expected = self.expected
        if output.stride() != expected.stride():
            return torch.tensor(output.numel(), device=output.device)
        return (output.view(bits) != expected.view(bits)).sum()


@dataclass(frozen=True)
class Counts:
    """What must not grow.

    Attributes
    ----------
    allocated_bytes, reserved_bytes
        Of PyTorch's allocator: in tensors, and taken from the GPU.
    gpu_bytes
        In use on the GPU, by whomever.
    process_bytes
        Resident memory of this process.
    threads, files, locked_files
        Of this process; the last are those of its open files that are locks of the build cache.
    cache_files
        In the build cache.
    """

    allocated_bytes: int
    reserved_bytes: int
    gpu_bytes: int
    process_bytes: int
    threads: int
    files: int
    locked_files: int
    cache_files: int

    @classmethod
    def taken(cls, device: str) -> Counts:
        """Count now; all work is waited for."""
        gc.collect()
        allocated = reserved = used = 0
        if device == "cuda":
            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            free, total = torch.cuda.mem_get_info()
            used = total - free
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                files.append(os.readlink(entry))
            except OSError:  # that of this very listing
                continue
        return cls(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            gpu_bytes=used,
            process_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            threads=len(list(Path("/proc/self/task").iterdir())),
            files=len(files),
            locked_files=sum(name.endswith(".lock") for name in files),
            cache_files=sum(1 for path in cache_folder().rglob("*") if path.is_file()),
        )

    def grown_since(self, earlier: Counts) -> dict[str, int]:
        """Return what has grown more than it may, by how much."""
        slack = {
            "process_bytes": SLACK,
            "reserved_bytes": SLACK_OF_ALLOCATOR,
            "gpu_bytes": SLACK_OF_ALLOCATOR,
        }
        grown = {name: value - getattr(earlier, name) for name, value in asdict(self).items()}
        return {name: more for name, more in grown.items() if more > slack.get(name, 0)}


class Worker:
    """One thread's calls, on all streams in turn.

    Parameters
    ----------
    jobs
        What it may call.
    seed
        Of the order.
    streams
        Of CUDA; empty on a CPU.
    """

    def __init__(self, jobs: Sequence[Job], seed: int, streams: Sequence[torch.cuda.Stream]):
        self.jobs, self.rng, self.streams = jobs, random.Random(seed), streams
        device = jobs[0].expected.device
        # A counter for each stream: nothing orders one stream's additions after another's.
        self.wrong = [torch.zeros((), dtype=torch.int64, device=device) for _ in streams or [0]]

    def everything(self) -> None:
        """Call every job once on every stream."""
        self._call(self.jobs)

    def calls(self, count: int) -> None:
        """Call so many jobs."""
        self._call(self.rng.choices(self.jobs, k=count))

    def _call(self, jobs: Sequence[Job]) -> None:
        for number, job in enumerate(jobs):
            which = number % len(self.wrong)
            with torch.cuda.stream(self.streams[which] if self.streams else None):
                self.wrong[which] += job.wrong(job.call())
            if self.streams and number % 64 == 63:
                # So that the queues, and what they hold, stay short.
                self.streams[which].synchronize()


class Team:
    """Workers, each in a thread of its own that lives as long as the team.

    cuDNN keeps what it has found out for each thread: new ones would make the process grow.
    """

    def __init__(self, workers: Sequence[Worker]):
        self.workers = workers
        self.threads = [ThreadPoolExecutor(max_workers=1) for _ in workers]

    def step(self, name: str, *arguments: Any) -> None:
        """Let every worker take a step, and wait for all; raise what one of them raised."""
        steps = [
            thread.submit(getattr(worker, name), *arguments)
            for thread, worker in zip(self.threads, self.workers, strict=True)
        ]
        wait(steps)
        for step in steps:
            step.result()


def soak(calls: int, problems: int, seed: int, device: str) -> dict[str, Any]:
    """Call and count; the record's part that was found out."""
    rng = random.Random(seed)
    torch.backends.cudnn.deterministic = True
    jobs = [Job(rng, device) for _ in range(problems)]
    streams = [torch.cuda.Stream() for _ in range(STREAMS)] if device == "cuda" else []
    if device == "cuda":
        torch.cuda.synchronize()
    workers = [Worker(jobs, seed + 1 + number, streams) for number in range(THREADS)]
    team = Team(workers)
    share = max(1, calls // STEPS // THREADS)
    for allow_tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = allow_tf32
        for _ in range(2):  # with an odd number of jobs, the second time on the other stream
            team.step("everything")
        team.step("calls", share)  # as full as the queues will be
    counts = [{"after": 0, **asdict(Counts.taken(device))}]
    begin = time.perf_counter()
    for step in range(1, STEPS + 1):
        torch.backends.cudnn.allow_tf32 = step % 2 == 0
        team.step("calls", share)
        counts.append({"after": step * share * THREADS, **asdict(Counts.taken(device))})
    seconds = time.perf_counter() - begin
    return {
        "calls": STEPS * share * THREADS,
        "seconds": records.rounded(seconds, 4),
        "threads": THREADS,
        "streams": len(streams),
        "problems": problems,
        "kernels": dict(sorted(Counter(k for job in jobs for k in job.kernels.values()).items())),
        "mismatches": sum(int(wrong) for worker in workers for wrong in worker.wrong),
        "counts": counts,
    }


def failures(found: dict[str, Any]) -> list[str]:
    """Say what is wrong with what was found."""
    told = []
    if found["mismatches"]:
        told.append(f"{found['mismatches']} elements differ from the first call's")
    first, last = (
        Counts(**{name: value for name, value in found["counts"][i].items() if name != "after"})
        for i in (0, -1)
    )
    for name, more in last.grown_since(first).items():
        told.append(f"{name} has grown by {more:,} in {found['calls']:,} calls")
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Soak, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--problems", type=int, default=151, help="how many (151)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    arguments = parser.parse_args(argv)
    for name in ("calls", "problems"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: it must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu tries it without one")
    found = soak(arguments.calls, arguments.problems, arguments.seed, arguments.device)
    for count in found["counts"]:
        print("  ".join(f"{name} {value:,}" for name, value in count.items()))
    print({name: value for name, value in found.items() if name != "counts"})
    record = {
        "schema": 1,
        "what": "many calls of the operator, from two threads and on two streams",
        "gpu": None,
        "software": {"torch": torch.__version__},
        "date": date.today().isoformat(),
        "seed": arguments.seed,
        "meaning": {
            "mismatches": "elements whose bits differ from those of the problem's first call",
            "counts": "taken once all had been called by all threads, and on the way; memory in "
            "bytes",
        },
        **found,
    }
    path = arguments.output
    if arguments.device == "cuda":
        with _current_gpu() as machine:
            record["gpu"], record["software"] = machine.gpu.name, asdict(machine.software)
        path = path or records.FOLDER / f"{records.slug(machine.gpu.name)}-soak.json"
    if path is not None:
        records.write_text(path, records.text_of(record))
        print(f"wrote {path}")
    if told := failures(found):
        raise SystemExit("\n".join(told))
    print("nothing differs, and nothing has grown")


if __name__ == "__main__":
    main()
