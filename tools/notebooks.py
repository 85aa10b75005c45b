"""Execute notebooks in place and write them in their normal form.

Usage: python tools/notebooks.py [--no-execute] NOTEBOOK...

The normal form keeps sources, outputs, execution counts and cell ids, and drops what changes from
run to run or from machine to machine: times, the kernel's version, the editor's own metadata. An
output that differs from the stored one only in what nbval does not compare (nbval.cfg) stays as it
was stored. So executing twice changes nothing.
"""

import argparse
import re
import sys
import time
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.plugin import get_sanitize_patterns

PATTERNS = get_sanitize_patterns(Path(__file__).with_name("nbval.cfg").read_text(encoding="utf-8"))
CELL_TIMEOUT = 600  # seconds
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_METADATA = ("mystnb", "tags")  # what the book's builder and nbval read


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel in `folder`, as Jupyter Book and nbval do."""
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNEL["name"],
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Make one output of all that went to stdout, and one of stderr.

    How a stream is cut into messages depends on timing.
    """
    joined, streams = [], {}
    for output in outputs:
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
            continue
        if output.output_type == "stream":
            streams[output.name] = output
        joined.append(output)
    return joined


def normalise(notebook: NotebookNode) -> None:
    """Bring a notebook into its normal form."""
    notebook.nbformat_minor = 5  # the first with cell ids
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL))
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in CELL_METADATA if cell.metadata.get(key)}
        )
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
    nbformat.validate(notebook)


def sanitised(value: object) -> object:
    """A copy of an output, a list of outputs or a part of one, as nbval compares it."""
    if isinstance(value, dict):
        return {key: sanitised(part) for key, part in value.items()}
    if isinstance(value, list):
        return [sanitised(part) for part in value]
    if isinstance(value, str):
        for pattern, replacement in PATTERNS:
            value = re.sub(pattern, replacement, value)
    return value


def keep_stored_outputs(executed: NotebookNode, stored: NotebookNode) -> None:
    """Take back the stored outputs wherever nbval would see no difference."""
    for new, old in zip(executed.cells, stored.cells, strict=True):
        if new.cell_type == "code" and sanitised(new.outputs) == sanitised(old.outputs):
            new.outputs = old.outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--no-execute", action="store_true", help="keep the outputs as they are")
    options = parser.parse_args()

    failed = False
    for path in options.notebooks:
        print(f"{path} ... ", end="", flush=True)
        start = time.perf_counter()
        before = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=4)
        normalise(notebook)
        if not options.no_execute:
            stored = deepcopy(notebook)
            try:
                execute(notebook, path.parent)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                print(f"raised, left as it was\n{error}")
                failed = True
                continue
            normalise(notebook)
            keep_stored_outputs(notebook, stored)
        after = nbformat.writes(notebook) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
        outcome = "unchanged" if after == before else "written"
        print(f"{outcome} ({time.perf_counter() - start:.1f} s)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
