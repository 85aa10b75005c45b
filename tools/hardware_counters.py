"""Measures with Nsight Compute, on a GPU, what the simulator counts; writes it to records/.

    python tools/hardware_counters.py

It needs ``ncu`` on PATH and the right to read the GPU's counters. `tests/test_counters.py` compares
the simulator's counters with the file.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

#: The simulator's total -> the GPU's counter.
METRICS = {
    "global_load_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "global_store_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "global_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "global_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "shared_load_requests": "smsp__inst_executed_op_shared_ld.sum",
    "shared_store_requests": "smsp__inst_executed_op_shared_st.sum",
    "shared_load_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "shared_store_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
    "fma": "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum",
    "async_copies": "smsp__inst_executed_op_ldgsts.sum",
}

#: Where a GPU counts otherwise than the source reads, and why.
EXPLAINED = {
    "shared_load_requests": "register_blocked: the GPU counts instructions issued, also those that "
    "every lane of the warp skips (outputs that do not exist); the wavefronts, which only lanes "
    "that take part cause, agree",
    "shared_store_requests": "shared_tiled and register_blocked: the GPU also counts stores that "
    "all lanes of a warp skip; and asynchronous copies write shared memory without a store "
    "instruction, where the simulator counts a store",
    "shared_store_wavefronts": "register_blocked: asynchronous copies write shared memory without "
    "a store instruction, where the simulator counts a store",
}


def run_all_cases() -> None:
    """Launch every case once, in order (in the process that ncu watches)."""
    from counter_cases import CASES

    for case in CASES:
        case.run("gpu")


def measure() -> list[dict[str, str]]:
    """Return ncu's rows, a launch each, in the order of the cases."""
    from counter_cases import CASES

    kernels = sorted({case.kernel for case in CASES})
    command = [
        *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--metrics", ",".join(METRICS.values())),
        *("--kernel-name", f"regex:^({'|'.join(kernels)})$"),
        *(sys.executable, __file__, "--launch"),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    table = [line for line in output.stdout.splitlines() if line.startswith('"')]
    if output.returncode != 0 or not table:
        raise SystemExit(f"ncu failed:\n{output.stdout}\n{output.stderr}")
    rows = list(csv.DictReader(table))
    return rows[1:] if not rows[0]["ID"] else rows  # the first row holds the units


def main() -> None:
    """Measure and write the record."""
    import torch
    from counter_cases import CASES

    run_all_cases()  # builds everything, so that ncu watches launches only
    rows = measure()
    if len(rows) != len(CASES):
        raise SystemExit(f"ncu saw {len(rows)} launches of {len(CASES)}")
    counters = {}
    for case, row in zip(CASES, rows, strict=True):
        if case.kernel not in row["Kernel Name"]:
            raise SystemExit(f"ncu saw {row['Kernel Name']} in place of {case.kernel}")
        counters[str(case)] = {
            name: int(float(row[metric].replace(",", "")))
            for name, metric in METRICS.items()
            if row.get(metric) not in (None, "", "n/a")
        }
    version = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=True)
    gpu = torch.cuda.get_device_name()
    record = {
        "schema": 1,
        "what": "counters of one launch each, by Nsight Compute",
        "gpu": gpu,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ncu": re.search(r"Version (\S+)", version.stdout)[1],
        "metrics": METRICS,
        "explained": EXPLAINED,
        "counters": counters,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = ROOT / "records" / f"{name}-counters.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}: {len(counters)} launches")


if __name__ == "__main__":
    run_all_cases() if "--launch" in sys.argv else main()
