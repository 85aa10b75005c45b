"""Where compiled libraries are kept, and how they get there safely.

A library is named by a hash of everything that went into it, so that a change of source, flags or
tools makes a new one and a loaded file is never overwritten. A build holds a lock that the
operating system drops with its process, works in the library's own folder, and is finished only
when a seal (the library's own hash) has been written beside it: a build that was killed half-way is
simply done again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

__all__ = ["LOCK_TIMEOUT", "BuildError", "cache_folder", "cached_library"]

#: Seconds to wait for another process that builds the same library.
LOCK_TIMEOUT = 600.0

_SEAL = "sealed"


class BuildError(RuntimeError):
    """A library could not be built for a reason outside its source: a missing tool, a full disk."""


def cache_folder() -> Path:
    """Return the folder of compiled libraries: ``CONVT_LAB_CACHE``, or the user's cache."""
    chosen = os.environ.get("CONVT_LAB_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("convt_lab"))


def cached_library(name: str, key: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the library that `build` makes, building it unless a finished one is there.

    Parameters
    ----------
    name
        A readable name for the library: its folder and file begin with it.
    key
        Everything the result depends on: source, flags, versions.
    build
        Called with the path to write, in an otherwise empty folder, while a lock is held.

    Raises
    ------
    BuildError
        If the cache folder can't be written or another process holds the lock for too long.
    """
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:20]
    folder = cache_folder() / f"{name}-{digest}"
    library = folder / f"{name}_{digest}.so"
    if _is_sealed(library):
        return library
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=LOCK_TIMEOUT):
            if not _is_sealed(library):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(library)
                _seal(library)
    except Timeout as error:
        raise BuildError(
            f"another process has been building {name} in {folder} for {LOCK_TIMEOUT:.0f} s; "
            "end it, or set CONVT_LAB_CACHE to another folder"
        ) from error
    except OSError as error:
        raise BuildError(
            f"cannot write the build cache {cache_folder()}: {error}; "
            "set CONVT_LAB_CACHE to a folder with room that you may write"
        ) from error
    return library


def _hash_of(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _seal(library: Path) -> None:
    seal = library.parent / _SEAL
    draft = seal.with_suffix(".draft")
    draft.write_text(_hash_of(library))
    draft.replace(seal)


def _is_sealed(library: Path) -> bool:
    try:
        return (library.parent / _SEAL).read_text() == _hash_of(library)
    except OSError:
        return False
