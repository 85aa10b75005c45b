"""Measures with Nsight Compute, on a GPU, what the simulator counts; writes it to records/.

    python tools/hardware_counters.py

It needs ``ncu`` on PATH and the right to read the GPU's counters. `tests/test_counters.py` compares
the simulator's counters with the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import nsight_compute

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
    "shared_load_requests": "register_blocked and winograd: the GPU counts instructions issued, "
    "also those that every lane of the warp skips",
    "shared_load_wavefronts": "register_blocked's general path: it keeps what a block computes in "
    "shared memory, as `tile`, and the compiler reads neighbouring members at once and keeps some "
    "in registers, where the source reads each whenever it is named",
    "shared_store_requests": "register_blocked and winograd: asynchronous copies write shared "
    "memory without a store instruction, where the simulator counts a store; winograd: the GPU "
    "also counts stores that every lane of a warp skips",
    "shared_store_wavefronts": "register_blocked and winograd: asynchronous copies write shared "
    "memory without a store instruction, where the simulator counts a store",
}


def run_all_cases() -> None:
    """Launch every case once, in order (in the process that ncu watches)."""
    from counter_cases import CASES

    for case in CASES:
        case.run("gpu")


def measure() -> list[dict[str, str]]:
    """Return ncu's rows, a launch each, in the order of the cases."""
    from counter_cases import CASES

    kernels = {case.kernel for case in CASES}
    _, rows = nsight_compute.measure(
        METRICS.values(), kernels, [sys.executable, __file__, "--launch"]
    )
    return rows


def main() -> None:
    """Measure and write the record."""
    import torch
    from counter_cases import CASES

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: counters are measured on an NVIDIA GPU")
    run_all_cases()  # builds everything, so that ncu watches launches only
    rows = measure()
    if len(rows) != len(CASES):
        raise SystemExit(f"ncu saw {len(rows)} launches of {len(CASES)}")
    counters = {}
    for case, row in zip(CASES, rows, strict=True):
        if nsight_compute.function_name(case.kernel) not in row["Kernel Name"]:
            raise SystemExit(f"ncu saw {row['Kernel Name']} in place of {case.kernel}")
        counters[str(case)] = {
            name: int(value)
            for name, metric in METRICS.items()
            if (value := nsight_compute.number(row.get(metric))) is not None
        }
    gpu = torch.cuda.get_device_name()
    record = {
        "schema": 1,
        "what": "counters of one launch each, by Nsight Compute",
        "gpu": gpu,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ncu": nsight_compute.version(),
        "metrics": METRICS,
        "explained": EXPLAINED,
        "counters": counters,
    }
    path = nsight_compute.record_path(gpu, "counters")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}: {len(counters)} launches")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    run_all_cases() if parser.parse_args().launch else main()
