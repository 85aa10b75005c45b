"""The command line: ``python -m convt_lab ladder | bench | dispatch | doctor | export STAGE``.

Exit status: 0 for success; 1 if a stage is wrong or nothing can run here; 2 for a command that
can't be carried out, with one line on stderr that says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from convt_lab import __version__
from convt_lab.build import BuildError
from convt_lab.problem import Problem, ProblemError
from convt_lab.records import RecordError
from convt_lab.stages import fma_stages

__all__ = ["main"]

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# What says in its message why a command can't be carried out.
_REFUSED = (
    BuildError,
    ProblemError,
    RecordError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _ladder(arguments: argparse.Namespace) -> int:
    from convt_lab.ladder import ladder

    return ladder(arguments.problem, arguments.device, arguments.seed)


def _bench(arguments: argparse.Namespace) -> int:
    from convt_lab.bench import bench

    return bench(
        parts=arguments.only,
        problems=arguments.problems,
        out=arguments.out,
        seed=arguments.seed,
        older=arguments.compare,
    )


def _dispatch(arguments: argparse.Namespace) -> int:
    from convt_lab import dispatch, measurements, records

    tables = measurements.tables_of_records(arguments.records, leave_out=dispatch.SLOW)
    if not tables:  # of an empty one the operator would leave everything to PyTorch
        folder = arguments.records or records.FOLDER
        raise RecordError(f"no record of a GPU in {folder}: name the folder that has them")
    for table in tables:
        print(f"{table.gpu}: {dispatch.leave_one_out(table).summary()}")
    if not arguments.no_write:
        measurements.save(tables, measurements.FILE)
        print(f"wrote {measurements.FILE}", file=sys.stderr)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from convt_lab.doctor import doctor

    return doctor(run_trial=not arguments.no_try)


def _export(arguments: argparse.Namespace) -> int:
    from convt_lab.export import exported_file, write

    stage = fma_stages[arguments.stage]
    if arguments.output is None:
        print(exported_file(stage), end="")
        return 0
    try:
        write(stage, arguments.output, overwrite=arguments.force)
    except FileExistsError:
        raise FileExistsError(
            f"{arguments.output} exists: name another file, or pass --force to replace it"
        ) from None
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


def _architectures(arguments: argparse.Namespace) -> int:
    from convt_lab.architectures import write

    print(write(arguments.output))
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m convt_lab",
        description="The transposed convolution, from its definition to a fast CUDA kernel.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"convt_lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ladder = commands.add_parser(
        "ladder",
        help="run every stage on one problem: error, back end and, on a GPU, time",
        description="Run every stage on one problem and compare it with float64. On a GPU, time "
        "each and compare it with the stage before and with cuDNN. The exit status is 1 if any "
        "stage is wrong.",
    )
    ladder.add_argument(
        "--problem",
        choices=Problem.names(),
        help="the problem's name (default: star on a GPU, star_small on the simulator)",
    )
    ladder.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="cuda, or cpu for the simulator (default: cuda if there are a GPU and nvcc)",
    )
    ladder.add_argument(
        "--seed", type=_seed, default=0, help="seed of the random inputs (default: 0)"
    )
    ladder.set_defaults(run=_ladder)

    bench = commands.add_parser(
        "bench",
        help="measure ceilings, every stage and PyTorch on this GPU, and write the record",
        description="Measure on a GPU its ceilings, every stage and PyTorch on a set of shapes, "
        "how time and memory grow, and the operator against PyTorch's own; print it and write "
        "records/GPU.json, records/GPU-operator.json and the table that the operator chooses by. A "
        "run of some parts or problems writes only where --out says. The exit status is 1 if any "
        "stage is wrong or a part could not be finished.",
    )
    bench.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="PART[,PART]",
        help="measure these parts only: ceilings, shapes, growth, operator; or neighbours, which a "
        "whole run leaves out",
    )
    bench.add_argument(
        "--problems",
        nargs="+",
        metavar="NAME",
        help="measure the shapes of these names only, such as: star classic; with --only operator "
        "those of convt_lab/data/shapes.json",
    )
    bench.add_argument("--out", type=Path, metavar="FILE", help="the file to write")
    bench.add_argument(
        "--seed", type=_seed, default=0, help="seed of the random inputs (default: 0)"
    )
    bench.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="an older record: print how far its times, as multiples of cuDNN's, are from the new",
    )
    bench.set_defaults(run=_bench)

    dispatch = commands.add_parser(
        "dispatch",
        help="make the table that the operator chooses by from the records",
        description="Make convt_lab/data/dispatch.json, by which the operator chooses between "
        "kernels and PyTorch's own, from the records. Say how well the choice does for problems "
        "that were not measured: each measured one is chosen for by the others.",
    )
    dispatch.add_argument(
        "--records", type=Path, metavar="FOLDER", help="where they are (default: records/)"
    )
    dispatch.add_argument("--no-write", action="store_true", help="only say how well it does")
    dispatch.set_defaults(run=_dispatch)

    doctor = commands.add_parser(
        "doctor",
        help="say what was found here, and how to get what is missing",
        description="Look for everything that the simulator and a GPU need, give the command that "
        "gets what is missing, and try each: compile and run a kernel. The exit status is 1 if "
        "neither works.",
    )
    doctor.add_argument("--no-try", action="store_true", help="only look, compile and run nothing")
    doctor.set_defaults(run=_doctor)

    export = commands.add_parser(
        "export",
        help="write a stage as one Python file that needs PyTorch alone",
        description="Write a stage as one self-contained Python file, in the form in which "
        "KernelBench takes solutions (ModelNew, get_inputs, get_init_inputs). To run, it needs a "
        "CUDA build of PyTorch, nvcc and ninja.",
    )
    export.add_argument(
        "stage", choices=tuple(fma_stages), metavar="STAGE", help=", ".join(fma_stages)
    )
    export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the file to write (default: stdout)"
    )
    export.add_argument("--force", action="store_true", help="replace FILE if it exists")
    export.set_defaults(run=_export)

    architectures = commands.add_parser(
        "architectures",
        help="what nvcc says of every stage for other GPUs, and what follows from it",
        description="Compile every stage for six architectures with nvcc; print and record each "
        "kernel's registers, shared memory, spills and occupancy, and times predicted from peak "
        "rates. It needs nvcc and g++, no GPU, and takes a minute.",
    )
    architectures.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("records/architectures.json"),
        help="the record to write (default: %(default)s)",
    )
    architectures.set_defaults(run=_architectures)
    return parser


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv
        The arguments; those of the process if None.

    Returns
    -------
    int
        The exit status. A command that can't be carried out raises SystemExit(2) after one line on
        stderr.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments)
        if sys.stdout is not None:  # it is, where the process was started without
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _REFUSED as error:
        parser.error(str(error) or type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
