"""Lists the licence of every pinned package, as the installed package itself tells it.

    python tools/licences.py > DEPENDENCIES.md

A test compares the file with what is installed, so a new pin needs a new list.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;#]+)")

HEAD = """# Dependencies and their licences

Made by `python tools/licences.py`, from what each package of [requirements.txt](requirements.txt)
says of itself. At run time `convt_lab` needs filelock, ninja, numpy, platformdirs, torch and tqdm,
and matplotlib for pictures; the rest builds and tests the book.

| package | version | licence |
|---|---|---|
"""


def pins(text: str) -> dict[str, str]:
    """Return the version of each package that a requirements file pins, by name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {m["name"]: m["version"] for line in lines if (m := _PIN.match(line))}


def licence(package: str) -> str:
    """Return an installed package's licence: its expression, its short name, or its classifiers.

    Raises
    ------
    ValueError
        If it tells none.
    """
    told = metadata.metadata(package)
    short = (told.get("License") or "").strip()
    if expression := told.get("License-Expression"):
        return expression
    if short and short != "UNKNOWN" and "\n" not in short and len(short) <= 40:
        return short
    kinds = [
        kind.rpartition("::")[2].strip()
        for kind in told.get_all("Classifier") or []
        if kind.startswith("License")
    ]
    if not kinds:
        raise ValueError(f"{package} tells no licence")
    return ", ".join(kinds)


def table(text: str) -> str:
    """Return the file for what a requirements file pins."""
    rows = [f"| {name} | {version} | {licence(name)} |" for name, version in pins(text).items()]
    return HEAD + "\n".join(sorted(rows, key=str.lower)) + "\n"


if __name__ == "__main__":
    print(table((ROOT / "requirements.txt").read_text()), end="")
