"""Asks binutils, which come with every g++, about a library that was built here."""

from __future__ import annotations

import os
import subprocess

from convt_lab.build import BuildError

__all__ = ["ask"]


def ask(program: str, *arguments: str) -> str:
    """Return what one of binutils' programs prints.

    Parameters
    ----------
    program
        Its name, such as ``readelf``.
    *arguments
        What it is given.

    Raises
    ------
    BuildError
        If it is not on PATH, or fails: the library has been deleted, say.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{program} does not run ({error}): install binutils") from error
    if done.returncode != 0:
        raise BuildError(f"{program} failed: {done.stderr.strip()}")
    return done.stdout
