"""Runs Nsight Compute's ``ncu`` and reads what it prints; for the tools beside this file.

It changes no setting of the GPU: clocks stay as they are.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

RECORDS = Path(__file__).parents[1] / "records"

_OPTIONS = ("--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none")

# To seconds, bytes and hertz. With base units most factors are 1; names differ between versions.
_PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_UNITS = {
    prefix + unit: factor
    for prefix, factor in _PREFIXES.items()
    for unit in ("s", "sec", "second", "byte", "hz", "Hz")
}


def function_name(kernel: str) -> str:
    """Return ncu's name of a kernel: neither namespaces nor template arguments."""
    return kernel.partition("<")[0].rpartition("::")[2]


def run(
    metrics: Iterable[str], kernels: Iterable[str], command: Sequence[str], options: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    """Profile `command` and return what ncu printed; the functions `kernels` are measured."""
    names = sorted({function_name(kernel) for kernel in kernels})
    if shutil.which("ncu") is None:
        raise SystemExit("ncu is not on PATH: install Nsight Compute, or add its folder to PATH")
    line = [
        *("ncu", *_OPTIONS, *options, "--metrics", ",".join(metrics)),
        *("--kernel-name", f"regex:^({'|'.join(names)})$"),
        *command,
    ]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def parse(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Read ncu's CSV: the unit of each column, and a row for each launch, in order."""
    table = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(table))
    units: dict[str, str] = {}
    if rows and not rows[0].get("ID"):  # the first row holds the units
        units = {name: unit or "" for name, unit in rows.pop(0).items() if name}
    return units, rows


def measure(
    metrics: Iterable[str],
    kernels: Iterable[str],
    command: Sequence[str],
    options: Sequence[str] = (),
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Profile `command` and return `parse` of it; leave out metrics that ncu does not know here.

    Parameters
    ----------
    metrics
        ncu's names. One that this GPU or version lacks is missing in the rows.
    kernels
        Names of the functions to measure.
    command
        What to run.
    options
        Further ones for ncu.

    Raises
    ------
    SystemExit
        If ncu fails, with its output, or is not there.
    """
    wanted = list(metrics)
    while True:
        output = run(wanted, kernels, command, options)
        rows = parse(output.stdout)
        if output.returncode == 0 and rows[1]:
            return rows
        said = f"{output.stdout}\n{output.stderr}"
        complaints = [line for line in said.splitlines() if re.match(r"==(ERROR|WARNING)==", line)]
        unknown = _unknown_metrics(wanted, complaints)
        if not unknown or len(unknown) == len(wanted):
            raise SystemExit(f"ncu failed (exit status {output.returncode}):\n{said}")
        print(f"ncu does not know: {', '.join(sorted(unknown))}", file=sys.stderr)
        wanted = [name for name in wanted if name not in unknown]


def _unknown_metrics(wanted: Iterable[str], complaints: Iterable[str]) -> set[str]:
    """Return the metrics that ncu complains about by name."""
    words = {
        word.strip(".,:'\"()")
        for line in complaints
        if "metric" in line.lower()
        for word in re.split(r"[\s,]+", line)
    }
    # It may name a metric without its suffixes, such as `.sum`.
    return {name for name in wanted if name in words or name.partition(".")[0] in words}


def number(text: str | None, unit: str = "") -> float | None:
    """Return a cell's number, in seconds, bytes or what else its unit is; None if there is none.

    ncu writes ``n/a`` for what it could not measure.
    """
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    if value != value:
        return None
    value *= _UNITS.get(unit, 1.0)
    return int(value) if value == int(value) else value


def version() -> str:
    """Return ncu's version."""
    output = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"Version (\S+)", output.stdout)
    return match[1] if match else "unknown"


def record_path(gpu: str, what: str) -> Path:
    """Return the file in records/ that holds `what` of the model `gpu`."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return RECORDS / f"{name}-{what}.json"


def without_gaps(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that there are."""
    return {name: value for name, value in values.items() if value is not None}
