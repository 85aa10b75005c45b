"""Runs one command so that nothing of it outlives its own end, its time limit or its caller.

A compiler is a tree of processes (ninja, nvcc, cicc, ptxas), each of which may hang, and which live
on if only its root is killed. This file is run as a program, without the package::

    python -I -S supervise.py CALLER LIMIT COMMAND...

CALLER is the process id of whoever starts it, LIMIT a number of seconds. Two processes share the
work, because either may be killed without warning: the outer one is what the caller waits for; the
guard leads a session of its own, in which the command runs, and ends the whole session as soon as
the command is done, its time is over or the outer process is gone.

It imports little: it is started for every compilation.
"""

import os
import signal
import sys
import time

#: The exit status of a command that was ended because its time was over.
TIMED_OUT = 124

#: What is said then, on standard error.
TIMED_OUT_TEXT = "was not done in its time"

_CANNOT_RUN = 127
_CALLER_GONE = 125

#: The exit statuses if the command did not run, and above which a signal has ended it.
NOT_RUN = (_CANNOT_RUN, _CALLER_GONE)
KILLED = 128


def main(arguments: list[str]) -> int:
    """Run the command, and return its exit status (128 and its number, if a signal ended it)."""
    caller, limit, *command = arguments
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # to end at once is enough: see the guard
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how the command ended
    outer = os.getpid()
    guard = os.fork()
    if guard == 0:
        os._exit(_guard(outer, float(limit), command))
    pause = _Pause()
    while True:
        done, status = os.waitpid(guard, os.WNOHANG)
        if done:
            return _exit_status(status)
        if os.getppid() != int(caller):
            return _CALLER_GONE
        pause()


def _guard(outer: int, limit: float, command: list[str]) -> int:
    os.setsid()
    deadline = time.monotonic() + limit
    try:
        # Python ignores these two signals, and a child would inherit that.
        process = os.posix_spawnp(
            command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        os.write(2, f"{command[0]} does not run: {error.strerror}\n".encode(errors="replace"))
        return _CANNOT_RUN
    pause = _Pause()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = _exit_status(status)
            break
        if os.getppid() != outer:
            code = _CALLER_GONE
            break
        if time.monotonic() > deadline:
            os.write(2, f"{command[0]} {TIMED_OUT_TEXT}\n".encode(errors="replace"))
            code = TIMED_OUT
            break
        pause()
    # After a regular end, too: whatever the command left behind would go on writing.
    _end_session()
    return code


class _Pause:
    """Sleeps: briefly at first, for what is done at once, then longer."""

    def __init__(self) -> None:
        self.seconds = 0.002

    def __call__(self) -> None:
        time.sleep(self.seconds)
        self.seconds = min(0.05, self.seconds * 1.5)


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end_session() -> None:
    """Kill every other process of this session."""
    # Not a process group: ninja makes one for each of its commands.
    for _ in range(100):  # a process that waits for a dead disk can't be killed: don't wait for it
        others = _others_in_session()
        if not others:
            return
        for process in others:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:  # gone by itself
                continue
        time.sleep(0.005)


def _others_in_session() -> list[int]:
    me, found = os.getpid(), []
    try:
        processes = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:  # no Linux
        return []
    for process in processes:
        try:
            with open(f"/proc/{process}/stat", "rb") as file:
                state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):  # gone since
            continue
        # A dead process stays in the list until its parent has asked for it.
        if int(session) == me and process != me and state not in (b"Z", b"X"):
            found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
