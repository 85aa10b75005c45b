"""The README: what it says about the package is so."""

import re
import subprocess
import sys
from pathlib import Path

import convt_lab as lab

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_the_stages_in_order():
    section = README.split("## The stages")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(lab.stages)


def test_the_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    names = {}
    for example in examples:
        exec(example, names)
    assert names["layer"](names["x"]).shape == (2, 6, 15, 23)
    assert names["y"].shape == (2, 6, 17, 25)
    assert (names["values"] == 9).all()


def test_the_commands_exist():
    commands = re.findall(r"^python -m convt_lab (\w+)", README, re.MULTILINE)
    assert commands
    usage = subprocess.run(
        [sys.executable, "-m", "convt_lab", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in commands:
        assert re.search(rf"\b{command}\b", usage), command
