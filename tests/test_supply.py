"""What the project depends on: pinned, its licences listed; and no network at run time."""

import re
import subprocess
import sys
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import licences  # noqa: E402

REQUIREMENTS = (ROOT / "requirements.txt").read_text()


def test_every_line_is_a_pin():
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.splitlines()]
    lines = [line for line in lines if line and not line.startswith("-")]
    assert len(licences.pins(REQUIREMENTS)) == len(lines)


def test_what_is_pinned_needs_nothing_that_is_not():
    """Torch's own CUDA packages differ from build to build, and are torch's to choose."""

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {plain(name) for name in licences.pins(REQUIREMENTS)} | {"pip"}
    missing = set()
    for name in licences.pins(REQUIREMENTS):
        for need in metadata.requires(name) or []:
            wanted, _, condition = need.partition(";")
            other = plain(re.match(r"[A-Za-z0-9._-]+", wanted).group())
            is_torchs = name == "torch" and other.startswith(("nvidia", "cuda", "triton"))
            if not condition and not is_torchs and other not in pinned:
                missing.add((name, other))
    assert missing == set()


def test_the_list_of_licences_is_of_what_is_installed():
    assert (ROOT / "DEPENDENCIES.md").read_text() == licences.table(REQUIREMENTS)


def test_pins_are_read_without_comments_and_conditions():
    text = "# a==1\nb_c==2.0  # why\nd==3; python_version < '3.12'\n\n-e .\n"
    assert licences.pins(text) == {"b_c": "2.0", "d": "3"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("License: BSD 3-Clause", "BSD 3-Clause"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: ISC License", "ISC License"),
        (
            "License: Copyright\n  All rights\nClassifier: License :: OSI Approved :: BSD License",
            "BSD License",
        ),
    ],
)
def test_a_licence_is_told_shortly(monkeypatch, told, expected):
    message = message_from_string(told)
    monkeypatch.setattr(licences.metadata, "metadata", lambda _: message)
    assert licences.licence("any") == expected


def test_a_package_without_a_licence_is_named(monkeypatch):
    message = message_from_string("License: UNKNOWN")
    monkeypatch.setattr(licences.metadata, "metadata", lambda _: message)
    with pytest.raises(ValueError, match="any tells no licence"):
        licences.licence("any")


# What a user does: the operator, the layer, a stage on the simulator, a picture. Python tells of
# every connection and every name that is looked up, whoever wants it.
OFFLINE = """
import sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise AssertionError(f"{event} {arguments}")
    if event in ("socket.connect", "socket.sendto") and not isinstance(arguments[1], str | bytes):
        raise AssertionError(f"{event} {arguments[1:]}")

sys.addaudithook(watch)

import torch
import convt_lab as lab
from convt_lab import figures, records

x, weight, bias = lab.Problem.named("star_small").random_inputs()
lab.conv_transpose2d(x, weight)
lab.ConvTranspose2d(2, 3, 3)(torch.ones(1, 2, 4, 4))
lab.stages["coalesced"](x, weight)
lab.stages["coalesced"].profile(x, weight)
lab.explain(x, weight)
figures.bars(records.load_named("nvidia-h200"), "star")
if sys.argv[1:] == ["--ask"]:
    import socket
    socket.getaddrinfo("localhost", 80)
print("done")
"""


def run_offline(*arguments):
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_nothing_is_asked_of_the_network_at_run_time():
    done = run_offline()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


def test_who_asks_is_found():
    done = run_offline("--ask")
    assert done.returncode == 1
    assert "AssertionError: socket.getaddrinfo" in done.stderr
