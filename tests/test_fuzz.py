"""Arguments that nobody would choose: each call is right or raises; none crashes or hangs.

What is called is in `fuzz_cases`, which runs in processes of its own with a limit to their memory.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_cases import FUNCTIONS, ON_GPU

SCRIPT = str(Path(__file__).with_name("fuzz_cases.py"))

#: Calls of each function.
COUNT = 10_000


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, "cpu") for name in FUNCTIONS),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ON_GPU),
    ],
)
def test_nothing_is_wrong(name, device):
    done = subprocess.run(
        [sys.executable, SCRIPT, name, str(COUNT), "0", device],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, returned = done.stdout.splitlines()[-1].split(f"{COUNT} calls of {name}, ")
    # Many are legal: it is not only errors that are looked at.
    assert int(returned.split()[0]) > COUNT / 25
