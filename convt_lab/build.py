"""Where compiled libraries are kept, and how they get there safely.

A library is named by a hash of everything that went into it, so that a change of source, flags or
tools makes a new one and a loaded file is never overwritten. Each attempt to build works in a
folder of its own; what it made is sealed (with the library's hash) and put into its place by one
rename, so that nothing half-built is ever in that place, whoever is killed when. A lock that the
operating system drops with its process keeps two processes from doing the same work; where a file
system has no locks, the work is done twice and the result is the same.

A library is loaded into the process, so it must be nobody else's: a cache folder that another user
owns or may write is refused.

``CONVT_LAB_CACHE`` chooses the folder, ``CONVT_LAB_BUILD_TIMEOUT`` the seconds that a compiler may
take.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from convt_lab import supervise

__all__ = [
    "BUILD_TIMEOUT",
    "CACHE_LIMIT",
    "KEPT_DAYS",
    "LOCK_TIMEOUT",
    "BuildError",
    "build_timeout",
    "cache_folder",
    "cached_library",
    "is_kept",
    "load_library",
    "no_fork",
    "outside_cause",
    "prune",
    "python",
    "run_tool",
    "seconds_of",
    "size_of",
    "supervised",
    "tool_identity",
    "unsafe_folder",
    "why_not_loaded",
]

#: Seconds that one run of a compiler may take, unless ``CONVT_LAB_BUILD_TIMEOUT`` says otherwise.
BUILD_TIMEOUT = 600.0

#: Seconds to wait for another process that builds the same library: longer than a build may take.
LOCK_TIMEOUT = 900.0

#: Seconds of waiting after which it is said what is waited for: as long as a large kernel takes to
#: build, so that two notebooks that want the same one print what each prints alone.
PATIENCE = 60.0

#: A library that was not used for so many days is deleted by some later build.
KEPT_DAYS = 30

#: Bytes of the cache above which a build deletes what was not used for longest.
CACHE_LIMIT = 2 * 2**30

# What a cache's entries are called here. The folder may be one that holds other things, too.
_OURS = re.compile(r"(\w{0,60}-[0-9a-f]{20}(\.\w+\.draft|\.lock)?|convt_lab_trial-\w{8}\.draft)")
_CHOOSE = "set CONVT_LAB_CACHE to a folder with room that you may write"
_SEAL = "sealed"
_DRAFT = ".draft"
_HOUR = 3600.0
_FORK_PATIENCE = 30.0  # seconds
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

# What a tool's output says if not the source but the machine is at fault, and what to do about it.
_CAUSES = {
    r"No space left on device|Disk quota exceeded|File too large|File size limit exceeded": (
        "a disk is full: make room, or set CONVT_LAB_CACHE (and TMPDIR, where compilers keep what "
        "is half done) to folders with room"
    ),
    r"Read-only file system": "a file system is read-only: set CONVT_LAB_CACHE and TMPDIR to "
    "folders that you may write",
    r"Cannot allocate memory|out of memory|virtual memory exhausted|(Killed|Terminated) signal|"
    r"^Killed$": (
        "the compiler ran out of memory or was killed: end other programs, or set MAX_JOBS=1"
    ),
    r"cannot execute '\w+'|cannot find -l(stdc\+\+|gcc\w*|m|c)(?=:|$)|crti\.o: No such file": (
        "the C++ compiler is not whole: install g++ and binutils, and see that both are on PATH"
    ),
}

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """A library could not be built for a reason outside its source: a missing tool, a full disk."""


# ---- The cache ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of compiled libraries: ``CONVT_LAB_CACHE``, or the user's cache.

    Raises
    ------
    BuildError
        If neither names a folder: there is no home folder, say.
    """
    chosen = os.environ.get("CONVT_LAB_CACHE")
    try:
        folder = Path(chosen or platformdirs.user_cache_dir("convt_lab")).expanduser()
        # A path relative to a home folder that isn't known is a "~" in the current folder.
        if folder.is_absolute() or (chosen and folder.parts[0] != "~"):
            return folder.absolute()
    except (OSError, RuntimeError) as error:  # no home folder; the current folder is gone
        raise BuildError(f"no folder for the build cache: {error}; {_CHOOSE}") from error
    raise BuildError(f"no folder for the build cache: no home folder is known; {_CHOOSE}")


def cached_library(name: str, key: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the library that `build` makes, building it unless a finished one is there.

    Parameters
    ----------
    name
        A readable name for the library: its folder and file begin with it.
    key
        Everything the result depends on: source, flags, versions.
    build
        Called with the path to write, in an otherwise empty folder. What else it leaves there is
        deleted. It is not called twice at the same time, unless the file system has no locks.

    Raises
    ------
    BuildError
        If the cache folder can't be written, another user could have written it, or another process
        holds the lock for too long.
    """
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)[:60]
    digest = hashlib.sha256("\0".join(key).encode(errors="surrogatepass")).hexdigest()[:20]
    cache = cache_folder()
    folder = cache / f"{name}-{digest}"
    library = folder / f"{name}_{digest}.so"
    try:
        _refuse_unsafe(cache, folder)
        if _is_sealed(library):
            _note_use(library)
            return library
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_unsafe(cache)
        with _locked(folder, name) as is_alone:
            _refuse_unsafe(folder)
            if not _is_sealed(library):
                if is_alone:  # these are of builds that were killed
                    for draft in cache.glob(f"{folder.name}.*{_DRAFT}"):
                        shutil.rmtree(draft, ignore_errors=True)
                _build_into(folder, library, build)
                prune()
    except OSError as error:
        raise BuildError(f"cannot write the build cache {cache}: {error}; {_CHOOSE}") from error
    return library


def is_kept(library: Path) -> bool:
    """Return whether a library is still in its cache, whole; if so, it is used now."""
    if not _is_sealed(library):
        return False
    _note_use(library)
    return True


def _build_into(folder: Path, library: Path, build: Callable[[Path], None]) -> None:
    """Build in a folder beside `folder`, and let it take `folder`'s place when it is whole."""
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=_DRAFT))
    try:
        made = draft / library.name
        build(made)
        if not made.exists():
            raise BuildError(f"{library.name}: the compiler reported no error and wrote nothing")
        for entry in draft.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != made:
                entry.unlink()
        (draft / _SEAL).write_text(_hash_of(made))
        if _is_sealed(library):  # another process, without locks, was quicker
            return
        shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
        try:
            draft.rename(folder)
        except OSError:
            if not _is_sealed(library):  # quicker by an instant
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a library's folder; yields whether there is a lock."""
    # Not reentrant in a thread, nor shared by threads: each has an object of its own.
    lock = FileLock(f"{folder}.lock")
    waited_for = f"another process or thread has been building {name} in {folder}"
    try:
        patience = min(PATIENCE, LOCK_TIMEOUT)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            if patience < LOCK_TIMEOUT:
                _log.warning(
                    "convt_lab: %s for %.0f s; waiting for it, up to %.0f s",
                    *(waited_for, patience, LOCK_TIMEOUT),
                )
            lock.acquire(timeout=LOCK_TIMEOUT - patience)
    except Timeout as error:
        raise BuildError(
            f"{waited_for} for {LOCK_TIMEOUT:.0f} s; "
            "end it, or set CONVT_LAB_CACHE to another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        # The lock goes with the file's descriptor at the latest: nothing here is worth an error.
        with contextlib.suppress(OSError):
            lock.release()


def _hash_of(library: Path) -> str:
    """Return the hash of the library under its name: another library's seal does not fit."""
    return hashlib.sha256(library.name.encode() + b"\0" + library.read_bytes()).hexdigest()


def _is_sealed(library: Path) -> bool:
    try:
        # Bytes: the seal may be any garbage.
        return (library.parent / _SEAL).read_bytes() == _hash_of(library).encode()
    except OSError:
        return False


def unsafe_folder(folder: Path) -> str | None:
    """Say why another user could have written what is in `folder`; None if nobody could.

    Root may write everywhere: a folder of root's is as safe as one's own.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid}; this process has {os.geteuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _refuse_unsafe(*folders: Path) -> None:
    for folder in folders:
        if reason := unsafe_folder(folder):
            raise BuildError(
                f"the build cache {folder} {reason}, who could run code in this process through "
                "it; set CONVT_LAB_CACHE to a folder of your own, or remove this one (it is made "
                "anew)"
            )


# ---- What is deleted ---------------------------------------------------------------------------


def _note_use(library: Path) -> None:
    """Set the seal's time, by which the cache is pruned."""
    seal = library.parent / _SEAL
    with contextlib.suppress(OSError):  # a cache that is only read is never pruned
        # Or before it, if the clock was set back since.
        if abs(time.time() - seal.stat().st_mtime) > _HOUR:
            os.utime(seal)


def prune() -> int:
    """Delete libraries that are no longer used; every build ends with it.

    Deleted is what was not used for `KEPT_DAYS` (the libraries of older sources, versions and
    flags), what builds that were killed have left, and, while the cache is larger than
    `CACHE_LIMIT`, what was not used for longest. Files of other names are not ours, and stay. What
    was used within the last hour is never deleted, and a library that a process has loaded stays
    usable in it.

    Returns
    -------
    int
        The number of libraries deleted.
    """
    now = time.time()
    found: list[tuple[float, int, Path]] = []  # last use, size, folder
    deleted = 0
    try:
        entries = list(os.scandir(cache_folder()))
    except OSError:
        return 0
    for entry in entries:
        if not _OURS.fullmatch(entry.name):
            continue
        path = Path(entry.path)
        try:
            if entry.name.endswith(".lock"):
                if now - entry.stat().st_mtime > KEPT_DAYS * 24 * _HOUR:
                    path.unlink()
            elif entry.name.endswith(_DRAFT):
                if now - entry.stat().st_mtime > 24 * _HOUR:
                    shutil.rmtree(path, ignore_errors=True)
            elif (path / _SEAL).exists():
                found.append(((path / _SEAL).stat().st_mtime, size_of(path), path))
        except OSError:  # another process deletes too
            continue
    total = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        age = now - used
        if age > KEPT_DAYS * 24 * _HOUR or (total > CACHE_LIMIT and age > _HOUR):
            shutil.rmtree(path, ignore_errors=True)
            total -= size
            deleted += 1
    return deleted


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    total = 0
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # deleted since
                total += os.lstat(os.path.join(directory, file)).st_size
    return total


# ---- Loading -----------------------------------------------------------------------------------


def load_library(library: Path) -> ctypes.CDLL:
    """Load a library of the cache.

    Raises
    ------
    BuildError
        If it can't be loaded: the cache forbids programs, or a library that it needs is missing.
    """
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot load {library}: {error}; {why_not_loaded(str(error))}") from error


def why_not_loaded(message: str) -> str:
    """Say what to do about a library that the loader refused with a message."""
    if "failed to map segment" in message or "Operation not permitted" in message:
        return (
            "its file system forbids programs (it is mounted noexec, perhaps): set CONVT_LAB_CACHE "
            "to a folder elsewhere"
        )
    if "cannot open shared object file" in message:
        return (
            "a library that it needs is missing: install it, or set LD_LIBRARY_PATH to its folder"
        )
    return f"delete the folder {cache_folder()}, and it is built again"


# ---- Tools -------------------------------------------------------------------------------------

# A process that is forked while another thread starts a program inherits the pipes between the two,
# and the thread waits for their end: for ever, if the forked process waits for the thread's lock.
# So forks wait until the program has started.
_starting = threading.RLock()
_fork = threading.local()


def _before_fork() -> None:
    _fork.waited = _starting.acquire(timeout=_FORK_PATIENCE)


def _after_fork_in_parent() -> None:
    if _fork.waited:
        _starting.release()


def _after_fork_in_child() -> None:
    global _starting
    _starting = threading.RLock()  # the threads that held the old one aren't here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


@contextmanager
def no_fork() -> Iterator[None]:
    """Let forks of this process wait, and other threads that want the same."""
    with _starting:
        yield


def build_timeout() -> float:
    """Return the seconds that one run of a compiler may take.

    Raises
    ------
    BuildError
        If ``CONVT_LAB_BUILD_TIMEOUT`` is no positive number.
    """
    try:
        return seconds_of("CONVT_LAB_BUILD_TIMEOUT", BUILD_TIMEOUT)
    except ValueError as error:
        raise BuildError(str(error)) from None


def seconds_of(variable: str, otherwise: float) -> float:
    """Return the seconds that an environment variable names, or `otherwise` if it is not set.

    Raises
    ------
    ValueError
        If it is no positive number.
    """
    chosen = os.environ.get(variable)
    if not chosen:
        return otherwise
    try:
        seconds = float(chosen)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{variable}={chosen!r}: must be a positive number of seconds")
    return seconds


def supervised(command: Sequence[str | Path], limit: float | None = None) -> list[str]:
    """Return the command that runs `command` for this process, within its time (see supervise.py).

    Parameters
    ----------
    command
        A program and its arguments.
    limit
        Seconds; `build_timeout` if None.
    """
    seconds = build_timeout() if limit is None else limit
    start = [python(), "-I", "-S", supervise.__file__]
    return [*start, str(os.getpid()), f"{seconds:g}", *map(str, command)]


def python() -> str:
    """Return a Python to start: this one, unless it is part of another program."""
    own = sys.executable or ""
    if os.path.basename(own).startswith("python"):
        return own
    beside = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    return str(beside) if beside.is_file() else shutil.which("python3") or own


def run_tool(
    command: Sequence[str | Path], folder: Path | None = None, limit: float | None = None
) -> tuple[int, str]:
    """Run a compiler or the like to its end, and let nothing of it go on.

    Parameters
    ----------
    command
        A program and its arguments.
    folder
        Where it runs.
    limit
        Seconds; `build_timeout` if None.

    Returns
    -------
    tuple of int and str
        Its exit status, and what it wrote to either output.

    Raises
    ------
    BuildError
        If it does not run, or is not done in time.
    """
    seconds = build_timeout() if limit is None else limit
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise BuildError(
            "this process ignores SIGCHLD, so no compiler's exit status reaches it: call "
            "signal.signal(signal.SIGCHLD, signal.SIG_DFL) first"
        )
    try:
        with no_fork():
            process = subprocess.Popen(
                supervised(command, seconds),
                cwd=folder,
                # Messages are read by people and by us: in English.
                env=os.environ | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
    except (OSError, ValueError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    with process:
        try:
            output, _ = process.communicate()
        except BaseException:  # an interrupt: the supervisor's end is the end of all
            process.kill()
            raise
    if process.returncode == supervise.TIMED_OUT:
        raise timed_out(str(command[0]), seconds)
    return process.returncode, output


def timed_out(tool: str, seconds: float) -> BuildError:
    """Make the error for a tool that was ended because its time was over."""
    return BuildError(
        f"{tool} was not done after {seconds:g} s and was ended; if this machine is only slow, set "
        "CONVT_LAB_BUILD_TIMEOUT to more seconds"
    )


def outside_cause(output: str) -> str | None:
    """Say what on the machine made a compiler fail, and what to do; None if its output has none."""
    for pattern, remedy in _CAUSES.items():
        if found := re.search(pattern, output, re.MULTILINE):
            return f"{found[0]}: {remedy} (the build cache is {cache_folder()})"
    return None


def tool_identity(program: str | Path) -> str:
    """Return what changes when a program is replaced: its path, size and time.

    It costs no start of the program, so that it can be a part of every key.
    """
    try:
        status = os.stat(program)
    except OSError:
        return f"{program} (missing)"
    return f"{os.path.realpath(program)} {status.st_size} {status.st_mtime_ns}"
