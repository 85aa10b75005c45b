"""The stages on other GPUs, without those GPUs: what nvcc says of them, and what follows from it.

nvcc compiles every stage for every architecture and says how many registers and how much shared
memory each kernel takes. The stage's launcher, asked on the simulator, says with how many threads
and how much dynamic shared memory it runs. Occupancy follows from the two by formula. Times are
predicted by the roofline alone, a floor for any kernel that does the same arithmetic: nothing here
is measured.

``python -m convt_lab architectures`` writes ``records/architectures.json``:

- ``schema`` (1), ``what``, ``date``, ``nvcc`` (its version), ``flags`` (of nvcc);
- ``architectures``: the limits used, as `Architecture`, by name;
- ``problems``: ``flops`` and ``compulsory_bytes`` of the problems in the predictions, by name;
- ``kernels``: for each kernel and architecture ``stage``, ``kernel``, ``architecture`` and the
  fields of `Resources`, and ``launches``: for each launch on each problem of `PLANNED` ``problem``,
  ``grid``, ``threads``, ``dynamic_shared_bytes`` and the fields of `Occupancy`;
- ``gpus``: what the predictions assume of each GPU, as `Card`, by name;
- ``predicted``: for each stage, problem and GPU ``stage``, ``problem``, ``gpu``,
  ``multiplication_factor`` and the fields of `Prediction`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

from convt_lab.backend import KERNEL_FOLDER
from convt_lab.build import BuildError
from convt_lab.columns import aligned
from convt_lab.gpu import COMPILER_PACKAGES, find_toolkit
from convt_lab.problem import Problem
from convt_lab.simulator.planning import Launch, readable_name
from convt_lab.stages import Stage, fma_stages

__all__ = [
    "ARCHITECTURES",
    "CARDS",
    "FLAGS",
    "MULTIPLICATION_FACTOR",
    "PLANNED",
    "PREDICTED",
    "RECORD",
    "Architecture",
    "Card",
    "Occupancy",
    "Prediction",
    "Resources",
    "compile_all",
    "compile_stage",
    "launch_bounds",
    "make_record",
    "nvcc_version",
    "occupancy",
    "parse_ptxas",
    "predict",
    "tables",
    "write",
]

WARP = 32
MAX_REGISTERS_PER_THREAD = 255
SCHEMA = 1

#: The record in a checkout.
RECORD = Path(__file__).parents[1] / "records" / "architectures.json"

#: nvcc's flags that bear on the result, beside the architecture.
FLAGS = ("-O3", "-std=c++17")

#: The problems whose launches are planned, so that every path of a stage is among them ...
PLANNED = ("star", "classic", "strided_small")
#: ... and those large enough for a prediction to mean something.
PREDICTED = ("star", "classic")

#: By how much a stage needs fewer multiplications than the definition; 1 if it is not here.
#: winograd is F(2, 3) along the kernel's rows: 4 multiplications for 2 outputs of 3 taps, not 6.
MULTIPLICATION_FACTOR: Mapping[str, float] = MappingProxyType({"winograd": 1.5})


# ---- What a GPU has ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """The limits of a streaming multiprocessor (SM) that decide how many blocks it can hold.

    Attributes
    ----------
    warps_per_sm, blocks_per_sm
        How many can be resident at once.
    shared_bytes_per_sm, shared_bytes_per_block
        Shared memory, in bytes: of an SM, and what a block may use at most (opted in to).
    shared_granularity
        A block's shared memory is rounded up to a multiple of so many bytes.
    reserved_shared_bytes
        What the system takes for itself in each block, in bytes.
    registers_per_sm
        32-bit registers of an SM; also the most that a block may use.
    register_granularity
        A warp's registers are rounded up to a multiple of so many.
    partitions
        Parts of an SM with registers of their own; a warp's lie in one of them.
    """

    warps_per_sm: int
    blocks_per_sm: int
    shared_bytes_per_sm: int
    shared_bytes_per_block: int
    shared_granularity: int = 128
    reserved_shared_bytes: int = 1024
    registers_per_sm: int = 64 * 1024
    register_granularity: int = 256
    partitions: int = 4


_KIB = 1024

#: By nvcc's name. Warps, blocks, registers and shared memory: NVIDIA, CUDA C++ Programming Guide,
#: "Compute Capabilities", table "Technical Specifications per Compute Capability". Granularities
#: and the reserved kilobyte: NVIDIA's occupancy calculator (``cuda_occupancy.h`` of the toolkit).
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "sm_75": Architecture(
            32, 16, 64 * _KIB, 64 * _KIB, shared_granularity=256, reserved_shared_bytes=0
        ),
        "sm_80": Architecture(64, 32, 164 * _KIB, 163 * _KIB),
        "sm_86": Architecture(48, 16, 100 * _KIB, 99 * _KIB),
        "sm_89": Architecture(48, 24, 100 * _KIB, 99 * _KIB),
        "sm_90": Architecture(64, 32, 228 * _KIB, 227 * _KIB),
        "sm_120": Architecture(48, 24, 100 * _KIB, 99 * _KIB),
    }
)


@dataclass(frozen=True)
class Card:
    """What the vendor says of a GPU.

    Attributes
    ----------
    architecture
        nvcc's name for it.
    fp32_tflops
        Peak rate of the FP32 units at boost clock, in TFLOP/s; an FMA counts as two.
    memory_gb_per_s
        Peak memory bandwidth, in GB/s (10^9 bytes).
    source
        The vendor's document.
    """

    architecture: str
    fp32_tflops: float
    memory_gb_per_s: float
    source: str


#: GPUs for the predictions.
CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "TITAN RTX": Card(
            "sm_75",
            16.3,  # 4608 cores * 2 * 1.770 GHz
            672.0,
            "NVIDIA TITAN RTX, product specifications: 4608 cores, 1770 MHz boost, 672 GB/s",
        ),
        "T4": Card(
            "sm_75",
            8.1,
            320.0,  # 256 bits * 10 Gbit/s
            "NVIDIA T4 Tensor Core GPU, datasheet (8.1 TFLOPS) and product brief PB-09256-001 "
            "(up to 320 GB/s)",
        ),
        "A100 SXM4 40 GB": Card(
            "sm_80", 19.5, 1555.0, "NVIDIA A100 Tensor Core GPU Architecture, whitepaper"
        ),
        "RTX 4090": Card("sm_89", 82.6, 1008.0, "NVIDIA Ada GPU Architecture, whitepaper"),
        "H100 SXM5": Card("sm_90", 67.0, 3350.0, "NVIDIA H100 Tensor Core GPU, datasheet"),
    }
)


# ---- Occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Occupancy:
    """How much of an SM a kernel's blocks can fill.

    Attributes
    ----------
    blocks_per_sm
        Blocks that are resident at once; 0 if the kernel can't be launched.
    warps_per_sm
        Their warps.
    occupancy
        Their share of the warps that the SM could hold, from 0 to 1.
    limited_by
        What allows no further block: of ``"warps"``, ``"blocks"``, ``"registers"`` and
        ``"shared memory"``.
    """

    blocks_per_sm: int
    warps_per_sm: int
    occupancy: float
    limited_by: tuple[str, ...]


def occupancy(
    architecture: Architecture, threads: int, registers: int, shared_bytes: int = 0
) -> Occupancy:
    """Return how many blocks an SM can hold, by the formula of NVIDIA's occupancy calculator.

    Parameters
    ----------
    architecture
        Of `ARCHITECTURES`.
    threads
        Of a block, 1 to 1024.
    registers
        Of a thread, 0 to 255.
    shared_bytes
        Static and dynamic shared memory of a block together, in bytes.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads={threads}: a block has 1 to 1024")
    if not 0 <= registers <= MAX_REGISTERS_PER_THREAD:
        raise ValueError(f"registers={registers}: a thread has 0 to {MAX_REGISTERS_PER_THREAD}")
    if shared_bytes < 0:
        raise ValueError(f"shared_bytes={shared_bytes}: must be at least 0")
    warps = _ceil_div(threads, WARP)
    limits = {
        "warps": architecture.warps_per_sm // warps,
        "blocks": architecture.blocks_per_sm,
    }
    if registers:
        limits["registers"] = _blocks_by_registers(architecture, warps, registers)
    shared = _round_up(
        shared_bytes + architecture.reserved_shared_bytes, architecture.shared_granularity
    )
    if shared_bytes > architecture.shared_bytes_per_block:
        limits["shared memory"] = 0
    elif shared:
        limits["shared memory"] = architecture.shared_bytes_per_sm // shared
    blocks = min(limits.values())
    return Occupancy(
        blocks,
        blocks * warps,
        blocks * warps / architecture.warps_per_sm,
        tuple(name for name, limit in limits.items() if limit == blocks),
    )


def _blocks_by_registers(architecture: Architecture, warps: int, registers: int) -> int:
    per_warp = _round_up(registers * WARP, architecture.register_granularity)
    # Whether a block may start at all is decided as if each partition held as many of its warps.
    if per_warp * _round_up(warps, architecture.partitions) > architecture.registers_per_sm:
        return 0
    per_partition = architecture.registers_per_sm // architecture.partitions // per_warp
    return per_partition * architecture.partitions // warps


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(value: int, multiple: int) -> int:
    return _ceil_div(value, multiple) * multiple


# ---- Predicted times -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A floor for a time, from peak rates alone.

    Attributes
    ----------
    flops
        FP32 operations, an FMA counted as two, after `MULTIPLICATION_FACTOR`.
    bytes
        Input, weight and output once each.
    compute_ms, memory_ms
        What the arithmetic and the memory take at the peak rates, in milliseconds.
    ms
        The larger of the two: the prediction.
    bound
        ``"compute"`` or ``"memory"``.
    """

    flops: int
    bytes: int
    compute_ms: float
    memory_ms: float
    ms: float
    bound: str


def predict(card: Card, problem: Problem, factor: float = 1.0) -> Prediction:
    """Return the roofline's time for `problem` on `card`, at peak FP32 rate and peak bandwidth.

    Parameters
    ----------
    card
        Of `CARDS`.
    problem
        The transposed convolution, in float32.
    factor
        By how much the algorithm needs fewer multiplications. Only they are counted, not its
        transforms.
    """
    if not factor > 0:
        raise ValueError(f"factor={factor}: must be positive")
    flops = round(problem.flops / factor)
    compute_ms = flops / (card.fp32_tflops * 1e12) * 1e3
    memory_ms = problem.compulsory_bytes / (card.memory_gb_per_s * 1e9) * 1e3
    return Prediction(
        flops,
        problem.compulsory_bytes,
        round(compute_ms, 4),
        round(memory_ms, 4),
        round(max(compute_ms, memory_ms), 4),
        "compute" if compute_ms >= memory_ms else "memory",
    )


# ---- What nvcc says ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture, by ptxas.

    Attributes
    ----------
    registers
        Of a thread.
    static_shared_bytes
        Static shared memory of a block, in bytes.
    stack_bytes
        Local memory of a thread, in bytes, with that of functions that were not inlined.
    spill_store_bytes, spill_load_bytes
        Registers that did not fit and went to local memory, in bytes.
    max_threads
        Of a block, by the kernel's ``__launch_bounds__``; None without them.
    """

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    max_threads: int | None


def parse_ptxas(
    text: str, bounds: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Resources]:
    """Read what ``ptxas -v`` prints: each kernel's resources, by mangled name.

    Parameters
    ----------
    text
        The output of nvcc with ``-Xptxas -v`` for one architecture.
    bounds
        `launch_bounds` of the same compilation.
    """
    found = {}
    # A kernel's part goes on to the next kernel: functions that it calls are listed in it.
    parts = re.split(r"Compiling entry function '([^']+)' for '[^']+'", text)
    for symbol, part in zip(parts[1::2], parts[2::2], strict=True):
        used = re.search(r"Used (\d+) registers", part)
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        if used is None or not frames:
            raise ValueError(f"text: ptxas says nothing that can be read of {symbol!r}:\n{part}")
        shared = re.search(r"Used .*?(\d+)(?:\+\d+)? bytes smem", part)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
        found[symbol] = Resources(
            registers=int(used[1]),
            static_shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=stack,
            spill_store_bytes=stores,
            spill_load_bytes=loads,
            max_threads=bounds.get(symbol),
        )
    return found


def launch_bounds(ptx: str) -> dict[str, int]:
    """Return the most threads of a block that each kernel in `ptx` declares, by mangled name."""
    found = {}
    for symbol, directives in re.findall(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{", ptx):
        if match := re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", directives):
            x, y, z = (int(size or 1) for size in match.groups())
            found[symbol] = x * y * z
    return found


def _nvcc() -> Path:
    toolkit = find_toolkit()
    if toolkit is None:
        raise BuildError(
            "no nvcc, which says what a kernel takes: install a CUDA toolkit, or "
            f"`pip install {' '.join(COMPILER_PACKAGES)}`"
        )
    return toolkit / "bin" / "nvcc"


@functools.cache
def nvcc_version() -> str:
    """Return the version of the nvcc in use, such as ``13.0.88``.

    Raises
    ------
    BuildError
        If there is none.
    """
    result = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d+(?:\.\d+)+)", result.stdout)
    if match is None:
        raise BuildError(f"{_nvcc()} --version fails: {result.stdout}{result.stderr}")
    return match[1]


def compile_stage(stage: Stage, architecture: str) -> dict[str, Resources]:
    """Compile a stage for an architecture and return its kernels' resources, by mangled name.

    Parameters
    ----------
    stage
        Its .cu file is compiled for the device only; nothing is kept.
    architecture
        nvcc's name, such as ``"sm_90"``.

    Raises
    ------
    BuildError
        If there is no nvcc, or it refuses the file or warns of something.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(_nvcc()), "-cubin", f"-arch={architecture}", *FLAGS, f"-I{KERNEL_FOLDER}"),
            # The PTX is kept because it alone has the launch bounds.
            *("--keep", "--keep-dir", folder, "-o", f"{folder}/kernel.cubin"),
            *("-Xptxas", "-v", "-Werror", "all-warnings"),
            str(KERNEL_FOLDER / f"{stage.name}.cu"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(
                f"nvcc does not compile {stage.name} for {architecture}: "
                f"{result.stdout}{result.stderr}"
            )
        ptx = (Path(folder) / f"{stage.name}.ptx").read_text()
    return parse_ptxas(result.stdout + result.stderr, launch_bounds(ptx))


def compile_all(
    chosen: Iterable[Stage] | None = None, architectures: Sequence[str] = tuple(ARCHITECTURES)
) -> dict[tuple[str, str], dict[str, Resources]]:
    """Compile stages for architectures, on all cores: what `compile_stage` returns of each pair.

    Parameters
    ----------
    chosen
        All stages if None.
    architectures
        nvcc's names.

    Raises
    ------
    BuildError
        As `compile_stage`.
    """
    pairs = [
        (s, a) for s in (fma_stages.values() if chosen is None else chosen) for a in architectures
    ]
    _nvcc()  # its absence is said once, and before anything starts
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda pair: compile_stage(*pair), pairs)
        return {(s.name, a): found for (s, a), found in zip(pairs, results, strict=True)}


# ---- The record ----------------------------------------------------------------------------------


def _launch_rows(
    limits: Architecture, resources: Resources, launches: Iterable[tuple[str, Launch]]
) -> list[dict[str, Any]]:
    rows = []
    for problem, launch in launches:
        shared = resources.static_shared_bytes + launch.shared_bytes
        filled = occupancy(limits, launch.threads, resources.registers, shared)
        rows.append(
            {
                "problem": problem,
                "grid": list(launch.grid),
                "threads": launch.threads,
                "dynamic_shared_bytes": launch.shared_bytes,
                **asdict(filled),
                "limited_by": list(filled.limited_by),
            }
        )
    return rows


def _kernel_rows(
    compiled: Mapping[tuple[str, str], Mapping[str, Resources]],
) -> list[dict[str, Any]]:
    rows = []
    for (name, architecture), kernels in compiled.items():
        limit = ARCHITECTURES[architecture].shared_bytes_per_block
        planned = [
            (problem, launch)
            for problem in PLANNED
            for launch in fma_stages[name].launches(Problem.named(problem), limit)
        ]
        unknown = {launch.symbol for _, launch in planned} - set(kernels)
        if unknown:
            raise BuildError(f"{name} launches kernels that nvcc does not list: {sorted(unknown)}")
        for symbol, resources in kernels.items():
            own = [(p, launch) for p, launch in planned if launch.symbol == symbol]
            rows.append(
                {
                    "stage": name,
                    "kernel": readable_name(symbol),
                    "architecture": architecture,
                    **asdict(resources),
                    "launches": _launch_rows(ARCHITECTURES[architecture], resources, own),
                }
            )
    order = list(fma_stages)
    known = list(ARCHITECTURES)
    return sorted(
        rows,
        key=lambda row: (
            order.index(row["stage"]),
            row["kernel"],
            known.index(row["architecture"]),
        ),
    )


def _prediction_rows() -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "problem": problem,
            "gpu": gpu,
            "multiplication_factor": MULTIPLICATION_FACTOR.get(stage, 1.0),
            **asdict(predict(card, Problem.named(problem), MULTIPLICATION_FACTOR.get(stage, 1.0))),
        }
        for stage in fma_stages
        for problem in PREDICTED
        for gpu, card in CARDS.items()
    ]


def make_record(
    compiled: Mapping[tuple[str, str], Mapping[str, Resources]] | None = None,
) -> dict[str, Any]:
    """Return the record, see the module's text.

    Parameters
    ----------
    compiled
        What `compile_all` returned, which is called if this is None.

    Raises
    ------
    BuildError
        If nvcc or the simulator's compiler is missing or refuses a stage.
    """
    compiled = compile_all() if compiled is None else compiled
    return {
        "schema": SCHEMA,
        "what": "resources of every kernel by nvcc, occupancy by formula, and times predicted from "
        "peak rates; nothing is measured",
        "date": date.today().isoformat(),
        "nvcc": nvcc_version(),
        "flags": list(FLAGS),
        "architectures": {name: asdict(limits) for name, limits in ARCHITECTURES.items()},
        "problems": {
            name: {
                "flops": Problem.named(name).flops,
                "compulsory_bytes": Problem.named(name).compulsory_bytes,
            }
            for name in PREDICTED
        },
        "kernels": _kernel_rows(compiled),
        "gpus": {name: asdict(card) for name, card in CARDS.items()},
        "predicted": _prediction_rows(),
    }


def tables(record: Mapping[str, Any]) -> str:
    """Return the record's kernels and predictions as text for a person."""
    kernels = [
        (
            *("kernel", "architecture", "registers", "spills", "problem", "threads"),
            *("shared bytes", "blocks/SM", "occupancy", "limited by"),
        )
    ]
    for row in record["kernels"]:
        kernel = (row["kernel"], row["architecture"], str(row["registers"]))
        spills = row["spill_store_bytes"] + row["spill_load_bytes"]
        launches: dict[tuple[str, ...], list[str]] = {}
        for launch in row["launches"]:
            shared = row["static_shared_bytes"] + launch["dynamic_shared_bytes"]
            cells = (
                *(f"{launch['threads']}", f"{shared}", f"{launch['blocks_per_sm']}"),
                *(f"{launch['occupancy']:.0%}", ", ".join(launch["limited_by"])),
            )
            launches.setdefault(cells, []).append(launch["problem"])
        for cells, problems in launches.items():
            kernels.append((*kernel, str(spills), ", ".join(dict.fromkeys(problems)), *cells))
        if not launches:
            kernels.append((*kernel, str(spills), "none of these", "", "", "", "", ""))
    predictions = [("predicted", "problem", "multiplications", "ms", "bound by")]
    seen = set()
    for row in record["predicted"]:
        factor = row["multiplication_factor"]
        key = (row["gpu"], row["problem"], factor)
        if key not in seen:
            seen.add(key)
            times = "all" if factor == 1 else f"{factor:g} times fewer ({row['stage']})"
            predictions.append(
                (row["gpu"], row["problem"], times, f"{row['ms']:.3f}", row["bound"])
            )
    return "\n".join(
        [
            aligned(kernels, left={0, 1, 4, 9}),
            "",
            "Predicted from peak rates alone, the least time at which any such kernel could end:",
            aligned(predictions, left={0, 1, 2, 4}),
        ]
    )


def write(path: Path) -> str:
    """Compile everything, write the record to `path` and return its `tables`.

    Raises
    ------
    BuildError
        As `make_record`.
    OSError
        If the file can't be written.
    """
    record = make_record()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return tables(record)
