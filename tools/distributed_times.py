"""Measures the operator on several GPUs of one machine: how it scales, and what sending costs.

    python tools/distributed_times.py [--output FILE] [--cpus N]

It starts a process for each GPU. On 1, 2, 4 ... of them it computes

- ``images``: the star's batch on each GPU (weak scaling), where nothing is sent;
- ``rows``: images of as many times the star's rows as there are GPUs (weak scaling), split by rows;
- ``tall``: one image of 8192 x 8192 pixels (strong scaling), split by rows.

Each is run back to back, in rounds with the others. Where rows are split it is run once more with
nothing sent, and a few times under torch.profiler, which tells when rows travelled and what was
computed meanwhile. Results are compared with one GPU's. The record is written to
``records/GPU-distributed.json``. ``--cpus`` tries all of it on so many processes without a GPU,
with small images; no times of those are of any use, and nothing is profiled.

The record (schema 1): ``what``, ``gpu``, ``gpus``, ``link`` (what ``nvidia-smi topo -m`` calls the
way from the first to the second), ``software`` (with ``nccl``), ``date``, ``seed``, ``meaning`` and
``rows``, each with ``case``, ``problem`` (the whole one's arguments of `Problem`), ``ranks``,
``allow_tf32``, ``kernel`` (that computes the first rank's own rows), ``ms`` and, for every round,
``rounds_ms``; ``error``, the largest against one GPU's result, relative to the largest value.
Where rows are split: ``ms_at_usual_priority`` (of NCCL's streams, which else is a high one) and
``ms_without_exchange``, each with its rounds (``rounds_ms_...``); ``bytes_sent`` (of each rank);
and ``exchange``: of one exchange of each rank, in a profile of some calls back to back, ``sent_us``
(how long its kernel ran) and ``hidden_us`` (the part of it during which a kernel of the operator
ran), and ``call_us`` (the mean from one exchange to the next).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import conv_transpose2d, distributed, distributed_record, records  # noqa: E402
from convt_lab.bench import _current_gpu  # noqa: E402
from convt_lab.distributed import RowPlan, conv_transpose2d_rows  # noqa: E402
from convt_lab.measure import EventClock, Repeats  # noqa: E402
from convt_lab.plan import plan_for  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402

#: Rounds, of which the median is taken after one that warms up, and seconds that each is to last.
ROUNDS, SECONDS = 9, 0.06

#: Calls of a profile, and for how many of its cycles a GPU first does nothing (about 60 ms).
PROFILED, SLEEP = 12, 120_000_000

#: Pixels of a side of the image that is split; without a GPU.
TALL, SMALL = 8192, 24


def cases(ranks: int, device: str) -> dict[str, Problem]:
    """Return what is computed on so many GPUs (or processes) together."""
    star, side = Problem.named("star" if device == "cuda" else "star_small"), TALL
    if device == "cpu":
        side = SMALL
    return {
        "images": replace(star, batch=star.batch * ranks),
        "rows": replace(star, height=star.height * ranks),
        "tall": replace(star, batch=1, height=side, width=side),
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
    device
        ``cuda`` or ``cpu``.
    """

    def __init__(
        self, case: str, problem: Problem, group: dist.ProcessGroup, seed: int, device: str
    ):
        self.case, self.problem, self.group, self.device = case, problem, group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.plan = RowPlan.for_heights(problem, [problem.height // self.ranks] * self.ranks)
        whole = self._drawn(seed, problem.input_shape)
        self.weight = self._drawn(seed + 1, problem.weight_shape)
        self.input = self._own(whole).clone()

    def _drawn(self, seed: int, shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, generator=generator)

    def _own(self, input: torch.Tensor) -> torch.Tensor:
        if self.case == "images":
            return input.chunk(self.ranks)[self.rank]
        has = self.plan.input_rows[self.rank]
        return input[:, :, has.start : has.stop]

    @property
    def splits_rows(self) -> bool:
        """Whether anything is sent."""
        return self.case != "images" and self.ranks > 1

    def call(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Compute this rank's part of the output, by another group; on one GPU, as on any one."""
        arguments = self.problem.arguments
        if not self.splits_rows:
            return conv_transpose2d(self.input, self.weight, **arguments)
        return conv_transpose2d_rows(
            self.input,
            self.weight,
            **arguments,
            group=group or self.group,
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
        """Name the kernel of this rank's own rows, or that of its images."""
        crop = (0, 0)
        if self.splits_rows:
            crop = distributed._Part.of(self.plan, self.rank).own.crop
        arguments = self.problem.arguments.values()
        return plan_for(self.input, self.weight, None, *arguments, crop=crop).kernel


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


class HostClock:
    """Times what has ended when its function returns, as all that runs on a CPU."""

    def repeat(self, function: Callable[[], object], runs: int) -> Repeats:
        """Run `function` as often as `runs` says."""
        begin = time.perf_counter()
        for _ in range(runs):
            function()
        seconds = time.perf_counter() - begin
        return Repeats(seconds, seconds / runs)


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure together: the first `count`, and how they are connected.

    Attributes
    ----------
    count
        How many there are.
    group
        For what the operator sends; NCCL's streams have a high priority.
    usual
        The same with the priority that they usually have.
    control
        Of CPUs, for what the measurement sends.
    clock
        This rank's.
    device
        ``cuda`` or ``cpu``.
    """

    count: int
    group: dist.ProcessGroup
    usual: dist.ProcessGroup
    control: dist.ProcessGroup
    clock: EventClock | HostClock
    device: str

    @property
    def has_this(self) -> bool:
        """Whether this rank is one of them."""
        return dist.get_rank() < self.count

    def worst(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.item()

    def milliseconds(self, call: Callable[[], object], runs: int) -> float:
        """Return one run's share of `runs` back to back, of the rank that takes longest."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.control)
        return self.worst(1000 * self.clock.repeat(call, runs).seconds / runs)


def profiled(call: Callable[[], object], control: dist.ProcessGroup) -> dict[str, float | None]:
    """Return when rows travelled and what ran meanwhile; None where no kernel carried them.

    Of the exchange that took the median time, in the second half of `PROFILED` calls. All are
    enqueued before the first begins: else the profile would show how long the CPU takes to start
    kernels that it is watching.
    """
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    # Where the profiler has been at work before, it does not hold up the first call.
    with profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)
    ) as profiler:
        for _ in range(2):
            torch.cuda.synchronize()
            dist.barrier(control)
            torch.cuda._sleep(SLEEP)
            for _ in range(PROFILED):
                call()
            torch.cuda.synchronize()
            profiler.step()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        is_nccls = event.name.startswith("nccl")
        # Besides its kernels there are spans that only mark what they belong to.
        if event.device_type != torch.autograd.DeviceType.CUDA or (
            is_nccls and "Kernel" not in event.name
        ):
            continue
        spans[is_nccls].append((event.time_range.start, event.time_range.end))
    ours, nccls = (sorted(spans[is_nccls]) for is_nccls in (False, True))
    if len(nccls) < PROFILED:
        whole = ours[-1][1] - ours[1][0]  # the first is asleep
        return {"sent_us": None, "hidden_us": None, "call_us": whole / PROFILED}
    late = nccls[PROFILED // 2 :]
    call_us = (late[-1][0] - late[0][0]) / (len(late) - 1)
    begin, end = sorted(late[1:], key=lambda span: span[1] - span[0])[len(late) // 2]
    # Kernels of one stream may overlap: each begins where those before it have ended.
    hidden, done = 0.0, begin
    for start, stop in ours:
        hidden += max(0.0, min(stop, end) - max(start, done))
        done = max(done, stop)
    return {"sent_us": end - begin, "hidden_us": hidden, "call_us": call_us}


def measured(teams: Sequence[Ranks], everyone: dist.ProcessGroup, seed: int) -> list[dict]:
    """Measure all cases on this rank; the first rank's list is the record's rows."""
    rows = []
    rounds = ROUNDS if teams[0].device == "cuda" else 1

    def together(step: Callable[[Ranks], object]) -> None:
        # One team after another, the ranks that are not in it waiting.
        for team in teams:
            if team.has_this:
                step(team)
            dist.barrier(everyone)

    for allow_tf32, case in itertools.product((False, True), cases(1, teams[0].device)):
        torch.backends.cudnn.allow_tf32 = allow_tf32
        found: dict[int, Measurement] = {}

        def begin(team: Ranks) -> None:
            found[team.count] = Measurement.begun(team, case, allow_tf32, seed)  # noqa: B023
            if team.device == "cuda":
                torch.cuda.empty_cache()

        together(begin)
        for number in range(rounds + 1):
            together(lambda team: found[team.count].run(counts=number > 0))  # noqa: B023
        together(lambda team: rows.append(found[team.count].row()))  # noqa: B023
    return rows


@dataclass
class Measurement:
    """One case on some ranks: `begun`, then a `run` in each round, then the record's `row`."""

    team: Ranks
    part: Part
    allow_tf32: bool
    error: float
    runs: int
    sent: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)

    @classmethod
    def begun(cls, team: Ranks, case: str, allow_tf32: bool, seed: int) -> Measurement:
        """Compare with one GPU, and find out how often a round is to run."""
        part = Part(case, cases(team.count, team.device)[case], team.group, seed, team.device)
        error = team.worst(part.error(seed))
        once = [team.milliseconds(part.call, 3) for _ in range(2)][1]
        return cls(team, part, allow_tf32, error, max(2, round(1000 * SECONDS / once)))

    def run(self, counts: bool) -> None:
        """Run for a round, which counts unless it is there for the GPUs to become warm."""
        sent = self.team.milliseconds(self.part.call, self.runs)
        self.sent += [sent] if counts else []
        if self.part.splits_rows:
            usual = self.team.milliseconds(lambda: self.part.call(self.team.usual), self.runs)
            self.usual += [usual] if counts else []
            with nothing_sent():
                alone = self.team.milliseconds(self.part.call, self.runs)
            self.alone += [alone] if counts else []

    def row(self) -> dict[str, Any]:
        """Return a row of the record."""
        part, team = self.part, self.team
        row = {
            "case": part.case,
            "problem": asdict(part.problem),
            "ranks": part.ranks,
            "allow_tf32": self.allow_tf32,
            "kernel": part.kernel(),
            "error": records.rounded(self.error, 3),
            "ms": records.rounded(statistics.median(self.sent), 5),
            "rounds_ms": [records.rounded(value, 5) for value in self.sent],
        }
        if not part.splits_rows:
            return row
        row |= {
            "ms_at_usual_priority": records.rounded(statistics.median(self.usual), 5),
            "rounds_ms_at_usual_priority": [records.rounded(value, 5) for value in self.usual],
            "ms_without_exchange": records.rounded(statistics.median(self.alone), 5),
            "rounds_ms_without_exchange": [records.rounded(value, 5) for value in self.alone],
            "bytes_sent": [part.plan.bytes_sent(rank) for rank in range(part.ranks)],
        }
        if team.device == "cuda":
            profiles: list[Any] = [None] * part.ranks
            found = profiled(part.call, team.control)
            dist.all_gather_object(profiles, found, group=team.control)
            row["exchange"] = [
                {name: records.rounded(value, 5) for name, value in profile.items()}
                for profile in profiles
            ]
        return row


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
    device = "cpu" if arguments.cpus else "cuda"
    settings: dict[str, Any] = {"timeout": timedelta(seconds=120)}
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", **settings)
    rank, world = dist.get_rank(), dist.get_world_size()
    backend = "nccl" if device == "cuda" else "gloo"
    high = None
    if device == "cuda":
        high = dist.ProcessGroupNCCL.Options()
        high.is_high_priority_stream = True
    clock = EventClock() if device == "cuda" else HostClock()
    teams = [
        Ranks(
            count,
            dist.new_group(range(count), backend=backend, pg_options=high, **settings),
            dist.new_group(range(count), backend=backend, **settings),
            dist.new_group(range(count), backend="gloo", **settings),
            clock,
            device,
        )
        for count in (1, 2, 4, 8)
        if count <= world
    ]
    everyone = dist.new_group(backend="gloo", **settings)
    if rank == 0:  # builds the kernels, once for all
        for case, problem in cases(1, device).items():
            Part(case, problem, teams[0].group, arguments.seed, device).call()
    dist.barrier(everyone)
    rows = measured(teams, everyone, arguments.seed)
    if rank == 0:
        write(rows, world, device, arguments)
    dist.barrier(everyone)
    dist.destroy_process_group()


def write(
    rows: list[dict[str, Any]], ranks: int, device: str, arguments: argparse.Namespace
) -> None:
    """Write the record; of processes without a GPU only where it is told to."""
    record = {
        "schema": 1,
        "what": "times of the operator on several GPUs, and what sending rows costs",
        "gpu": None,
        "gpus": ranks,
        "link": None,
        "software": {"torch": torch.__version__},
        "date": date.today().isoformat(),
        "seed": arguments.seed,
        "meaning": {
            "images": "the star's batch on each GPU, nothing sent: weak scaling",
            "rows": "the star with as many times its rows as there are GPUs, split by rows: "
            "weak scaling",
            "tall": f"one image of {TALL} x {TALL} pixels with the star's channels and kernel, "
            "split by rows: strong scaling",
            "ms": "median of the rounds; a round is one run's share of some back to back "
            f"({SECONDS:g} s), on the GPU that took longest; one GPU calls the operator as if "
            "there were no others",
            "ms_at_usual_priority": "the same where NCCL's streams have the priority that they "
            "usually have; else they have a high one",
            "ms_without_exchange": "the same with nothing sent or received",
            "exchange": f"of each rank, in a profile of {PROFILED} calls back to back, of the "
            "exchange that took the median time: how long NCCL's kernel ran, and how much of that "
            "another kernel ran; and from one exchange to the next",
            "error": "largest difference from one GPU's result, relative to the largest value",
        },
        "rows": rows,
    }
    path = arguments.output
    if device == "cuda":
        with _current_gpu() as machine:
            record["gpu"] = machine.gpu.name
            record["software"] = {
                **asdict(machine.software),
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            }
        record["link"] = link()
        path = path or records.FOLDER / f"{records.slug(machine.gpu.name)}-distributed.json"
    if path is not None:
        records.write_text(path, records.text_of(record))
        print(f"wrote {path}")
    if device == "cuda":
        found = distributed_record.load(path)
        print(distributed_record.times(found))
        print(distributed_record.exchanges(found))


def main(argv: Sequence[str] | None = None) -> None:
    """Start a process for each GPU, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--cpus", type=int, metavar="N", help="try it without a GPU")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" in os.environ:
        on_a_rank(arguments)
        return
    ranks = arguments.cpus or torch.cuda.device_count()
    if ranks < 2:
        raise SystemExit(f"torch sees {ranks} CUDA devices: scaling is measured on 2 or more")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    given = sys.argv[1:] if argv is None else list(argv)
    done = subprocess.run([sys.executable, *command, str(Path(__file__)), *given], check=False)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
