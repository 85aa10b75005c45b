"""Profiles every stage with Nsight Compute, on a GPU: what keeps each kernel busy, and what waits.

    python tools/kernel_profiles.py [--problems NAME...] [--stages NAME...] [--output FILE]

It needs ``ncu`` on PATH and the right to read the GPU's counters, and takes some minutes: ncu runs
a kernel once for each group of metrics that fits the counters. All stages on both problems are
written to ``records/GPU-profiles.json``; a part of them only where ``--output`` says.

The record (schema 1): ``what``, ``gpu``, ``date``, ``torch``, ``cuda``, ``ncu``; ``units`` of the
plain names; ``metrics``, plain name -> the metric that gave it; ``missing``, plain names that
nothing gave; and ``profiles``, "stage problem" -> a list with an object for each kernel launched,
in order: ``kernel``, the plain names that have a value, and ``stalls``, reason -> warps that waited
for it, on average, for each instruction that their scheduler issued.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import nsight_compute
from nsight_compute import without_gaps

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

_ACTIVE = "avg.pct_of_peak_sustained_active"

#: Plain name -> unit, and the metrics that may give it, the best first. GPUs name some differently.
METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "duration_seconds": ("s", ("gpu__time_duration.sum",)),
    "sm_clock_hz": ("Hz", ("sm__cycles_elapsed.avg.per_second",)),
    "issue_slots_busy_percent": (
        "%",
        (f"sm__inst_issued.{_ACTIVE}", f"smsp__issue_active.{_ACTIVE}"),
    ),
    "fma_pipe_percent": (
        "%",
        (
            f"sm__inst_executed_pipe_fma.{_ACTIVE}",
            f"sm__pipe_fma_cycles_active.{_ACTIVE}",
            f"smsp__inst_executed_pipe_fma.{_ACTIVE}",
        ),
    ),
    "fma": ("operations", ("smsp__sass_thread_inst_executed_op_ffma_pred_on.sum",)),
    "dram_read_bytes": ("byte", ("dram__bytes_read.sum",)),
    "dram_write_bytes": ("byte", ("dram__bytes_write.sum",)),
    "l2_bytes": ("byte", ("lts__t_bytes.sum",)),
    "l2_to_l1_sectors": (
        "sectors of 32 bytes",
        ("lts__t_sectors_srcunit_tex_op_read.sum", "l1tex__m_xbar2l1tex_read_sectors.sum"),
    ),
    "l1_global_load_sectors": (
        "sectors of 32 bytes",
        ("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",),
    ),
    "l1_hit_percent": ("%", ("l1tex__t_sector_hit_rate.pct",)),
    "shared_load_wavefronts": (
        "wavefronts",
        ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",),
    ),
    "shared_store_wavefronts": (
        "wavefronts",
        ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",),
    ),
    "shared_load_bank_conflicts": (
        "wavefronts",
        ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",),
    ),
    "shared_store_bank_conflicts": (
        "wavefronts",
        ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",),
    ),
    "local_load_sectors": (
        "sectors of 32 bytes",
        ("l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum",),
    ),
    "local_store_sectors": (
        "sectors of 32 bytes",
        ("l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum",),
    ),
    "achieved_occupancy_percent": ("%", (f"sm__warps_active.{_ACTIVE}",)),
    "theoretical_occupancy_percent": ("%", ("sm__maximum_warps_per_active_cycle_pct",)),
    "blocks": ("blocks", ("launch__grid_size",)),
    "threads_per_block": ("threads", ("launch__block_size",)),
    "registers_per_thread": ("registers", ("launch__registers_per_thread",)),
    "static_shared_bytes": ("byte", ("launch__shared_mem_per_block_static",)),
    "dynamic_shared_bytes": ("byte", ("launch__shared_mem_per_block_dynamic",)),
}

#: Why a warp that could have issued an instruction did not; "selected" is the one that did.
STALLS = (
    *("math_pipe_throttle", "wait", "short_scoreboard", "long_scoreboard", "barrier"),
    *("dispatch_stall", "not_selected", "lg_throttle", "mio_throttle", "no_instruction"),
    "selected",
)


def stall_metric(reason: str) -> str:
    """Return ncu's name for a reason of `STALLS`."""
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


def all_metrics() -> list[str]:
    """Return every metric to ask for, once each."""
    named = [metric for _, candidates in METRICS.values() for metric in candidates]
    return [*dict.fromkeys(named), *map(stall_metric, STALLS)]


class Case:
    """A stage on a named problem."""

    def __init__(self, stage: str, problem: str):
        import convt_lab as lab
        from convt_lab.simulator.planning import readable_name

        self.stage, self.problem = stage, problem
        launches = lab.stages[stage].launches(lab.Problem.named(problem))
        #: What ncu will see, in order.
        self.kernels = [readable_name(launch.symbol) for launch in launches]

    def __str__(self) -> str:
        return f"{self.stage} {self.problem}"


def cases_of(stages: Sequence[str], problems: Sequence[str]) -> list[Case]:
    """Return the cases in the order in which they run."""
    return [Case(stage, problem) for problem in problems for stage in stages]


def launch_all(stages: Sequence[str], problems: Sequence[str], rounds: int) -> None:
    """Run every case `rounds` times, round by round."""
    import torch

    import convt_lab as lab

    named = {name: lab.Problem.named(name) for name in problems}
    inputs = {name: problem.random_inputs(device="cuda") for name, problem in named.items()}
    for _ in range(rounds):
        for name in problems:
            for stage in stages:
                lab.stages[stage](*inputs[name], **named[name].arguments)
                torch.cuda.synchronize()


def profiles_of(
    cases: Sequence[Case], units: Mapping[str, str], rows: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Return the record's ``units``, ``metrics``, ``missing`` and ``profiles``.

    Parameters
    ----------
    cases
        What ran.
    units, rows
        What `nsight_compute.measure` returned: a row for each launch.
    """
    expected = [(case, kernel) for case in cases for kernel in case.kernels]
    if len(rows) != len(expected):
        raise SystemExit(f"ncu saw {len(rows)} launches of {len(expected)}")

    def value(row: Mapping[str, str], metric: str) -> float | None:
        return nsight_compute.number(row.get(metric), units.get(metric, ""))

    chosen = {}
    for name, (_, candidates) in METRICS.items():
        # One metric for all launches, so that they can be compared.
        counts = {m: sum(value(row, m) is not None for row in rows) for m in candidates}
        best = max(candidates, key=lambda metric: counts[metric])
        if counts[best]:
            chosen[name] = best
    reasons = [r for r in STALLS if any(value(row, stall_metric(r)) is not None for row in rows)]
    profiles: dict[str, list[dict[str, Any]]] = {}
    for (case, kernel), row in zip(expected, rows, strict=True):
        seen = row.get("Kernel Name", "")
        if nsight_compute.function_name(kernel) not in seen:
            raise SystemExit(f"ncu saw {seen!r} in place of {kernel} ({case})")
        values = without_gaps({name: value(row, metric) for name, metric in chosen.items()})
        stalls = without_gaps({reason: value(row, stall_metric(reason)) for reason in reasons})
        profiles.setdefault(str(case), []).append({"kernel": kernel, **values, "stalls": stalls})
    return {
        "units": {name: METRICS[name][0] for name in chosen}
        | ({"stalls": "warps per instruction issued"} if reasons else {}),
        "metrics": chosen | {f"stalls.{reason}": stall_metric(reason) for reason in reasons},
        "missing": [name for name in METRICS if name not in chosen]
        + [f"stalls.{reason}" for reason in STALLS if reason not in reasons],
        "profiles": profiles,
    }


def table(record: Mapping[str, Any]) -> str:
    """Return the profiles as text for a person."""
    lines = [
        f"{'stage, problem, kernel':58}{'ms':>10}{'issue %':>9}{'FMA %':>8}{'warps %':>9}"
        f"{'DRAM GB':>9}  stalls per instruction"
    ]

    def cell(value: float | None, scale: float, form: str, width: int) -> str:
        return ("-" if value is None else format(value * scale, form)).rjust(width)

    for case, kernels in record["profiles"].items():
        for values in kernels:
            dram = [values.get(f"dram_{way}_bytes") for way in ("read", "write")]
            top = sorted(
                ((v, r) for r, v in values["stalls"].items() if r != "selected"), reverse=True
            )
            lines.append(
                f"{case + ', ' + values['kernel']:58}"
                + cell(values.get("duration_seconds"), 1e3, ".3f", 10)
                + cell(values.get("issue_slots_busy_percent"), 1, ".1f", 9)
                + cell(values.get("fma_pipe_percent"), 1, ".1f", 8)
                + cell(values.get("achieved_occupancy_percent"), 1, ".1f", 9)
                + cell(None if None in dram else sum(dram), 1e-9, ".2f", 9)
                + "  "
                + ", ".join(f"{reason} {v:.2f}" for v, reason in top[:3])
            )
    if record["missing"]:
        lines.append(f"not measured here: {', '.join(record['missing'])}")
    return "\n".join(lines)


def profile(stages: Sequence[str], problems: Sequence[str]) -> dict[str, Any]:
    """Measure and return the record."""
    import torch

    cases = cases_of(stages, problems)
    launch_all(stages, problems, rounds=1)  # builds everything, so that ncu watches launches only
    gpu = torch.cuda.get_device_name()
    torch.cuda.empty_cache()  # room for the process that ncu watches
    kernels = [kernel for case in cases for kernel in case.kernels]
    units, rows = nsight_compute.measure(
        all_metrics(),
        kernels,
        [sys.executable, __file__, "--launch", "--stages", *stages, "--problems", *problems],
        # The first round warms up and is not measured.
        ["--launch-skip", str(len(kernels))],
    )
    return {
        "schema": 1,
        "what": "one launch of each kernel, warmed up, by Nsight Compute; its caches are emptied "
        "before each pass and its clocks are as they were",
        "gpu": gpu,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ncu": nsight_compute.version(),
        **profiles_of(cases, units, rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the record."""
    import torch

    import convt_lab as lab
    from convt_lab.stages import fma_stages

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    problems = ["star", "classic"]
    parser.add_argument("--problems", nargs="+", choices=lab.Problem.names(), default=problems)
    known = list(fma_stages)
    parser.add_argument("--stages", nargs="+", choices=known, default=known)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: profiles are taken on an NVIDIA GPU")
    if arguments.launch:
        launch_all(arguments.stages, arguments.problems, rounds=2)
        return
    record = profile(arguments.stages, arguments.problems)
    print(table(record))
    path = arguments.output
    if path is None:
        if set(arguments.stages) != set(fma_stages) or set(arguments.problems) != set(problems):
            print("not written: a part of the record; name a file with --output", file=sys.stderr)
            return
        path = nsight_compute.record_path(record["gpu"], "profiles")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}: {sum(map(len, record['profiles'].values()))} launches")


if __name__ == "__main__":
    main()
