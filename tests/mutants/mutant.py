"""What a mutant is, and how it is tried: on a copy of the package, by tests named beforehand.

A mutant is caught if each of its tests fails for the right reason: an assertion, or an error that
the mutant says it will cause. A change that no longer fits the file, a test that is no longer
there, a kernel that does not compile and a run that takes too long are errors, never a catch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What the named tests need of the repository.
COPIED = ("convt_lab", "tests", "pyproject.toml")

#: Seconds that one run of the tests may take, most of them for building kernels.
TIME_LIMIT = 300.0

#: Exceptions that say that a test has judged: `Failed` is what pytest.raises and pytest.fail raise.
VERDICTS = frozenset({"AssertionError", "Failed"})


class NotCaughtError(Exception):
    """A mutant was not caught, or can't be tried as it is written."""


@dataclass(frozen=True)
class Edit:
    """A change of one file.

    Attributes
    ----------
    old
        Text of the file, which must stand there once (or `count` times).
    new
        What stands there instead.
    count
        How many times.
    """

    old: str
    new: str
    count: int = 1


@dataclass(frozen=True)
class Mutant:
    """One wrong variant.

    Attributes
    ----------
    name
        Short, for lists and for choosing it.
    wrong
        What is wrong, in a sentence.
    file
        The changed file, from the repository's root.
    edits
        Its changes.
    tests
        Node ids, from the folder of the tests, each of which must fail. Of a function with
        parameters one case must.
    errors
        Exceptions that count as a failure here, because the mutant causes them. A failed assertion
        always counts.
    gpus
        How many GPUs its tests need.
    """

    name: str
    wrong: str
    file: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    errors: tuple[str, ...] = ()
    gpus: int = 0


@dataclass(frozen=True)
class Failure:
    """A test that failed: its node id, the exception's classes, its message, and when."""

    test: str
    classes: tuple[str, ...]
    message: str
    when: str


@dataclass(frozen=True)
class Catch:
    """A mutant and the tests that caught it."""

    mutant: Mutant
    failures: tuple[Failure, ...]
    seconds: float

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(failure.test for failure in self.failures)


@dataclass(frozen=True)
class Run:
    """What became of a run of some tests."""

    status: int
    output: str
    outcomes: dict[str, str]  # of each test: passed, failed or skipped
    failures: tuple[Failure, ...]

    def of(self, test: str) -> dict[str, str]:
        """Return the outcomes of a test's cases."""
        return {case: result for case, result in self.outcomes.items() if is_case(case, test)}


def is_case(case: str, test: str) -> bool:
    """Whether a node id is that of a test, or of one of its cases."""
    return case == test or case.startswith((f"{test}[", f"{test}::"))


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """Return the text of the mutant's file with its changes.

    Raises
    ------
    NotCaughtError
        If they do not fit.
    """
    text = (root / mutant.file).read_text(encoding="utf-8")
    for edit in mutant.edits:
        found = text.count(edit.old)
        if found != edit.count or edit.old == edit.new:
            raise NotCaughtError(
                f"{mutant.name} no longer fits {mutant.file}, in which this stands {found} times, "
                f"not {edit.count}:\n{edit.old}"
            )
        text = text.replace(edit.old, edit.new)
    return text


@contextmanager
def copy_of_the_package(mutant: Mutant | None = None) -> Iterator[Path]:
    """Yield a folder with a copy of what the tests need, changed by a mutant."""
    with tempfile.TemporaryDirectory(prefix="convt_lab_mutant_") as folder:
        root = Path(folder).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, root / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, root / name)
        if mutant is not None:
            (root / mutant.file).write_text(mutated(mutant, root), encoding="utf-8")
        yield root


def run_tests(root: Path, tests: Sequence[str], time_limit: float = TIME_LIMIT) -> Run:
    """Run tests of a copy on that copy, in a process of their own.

    Raises
    ------
    NotCaughtError
        If they do not come to an end, or another package than the copy's is tested.
    """
    report = root / "report.json"
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MUTANT_REPORT": str(report),
    }
    options = ["-p", "mutants.witness", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={root}"]
    try:
        process = subprocess.run(
            [*command, *(f"tests/{test}" for test in dict.fromkeys(tests))],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired as error:
        raise NotCaughtError(f"the tests were not done after {time_limit:g} s") from error
    try:
        seen = json.loads(report.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotCaughtError(f"pytest did not start:\n{process.stdout}") from error
    if Path(seen["package"]).parent != root / "convt_lab":
        raise NotCaughtError(f"the tests ran on {seen['package']}, not on the copy in {root}")
    outcomes = {_without_folder(case): outcome for case, outcome in seen["outcomes"].items()}
    failures = tuple(
        Failure(_without_folder(f["test"]), tuple(f["classes"]), f["message"], f["when"])
        for f in seen["failures"]
    )
    return Run(process.returncode, process.stdout, outcomes, failures)


def _without_folder(case: str) -> str:
    return case.removeprefix("tests/")


def catch(mutant: Mutant, time_limit: float = TIME_LIMIT) -> Catch:
    """Try a mutant.

    Raises
    ------
    NotCaughtError
        If a test of its does not catch it, with the reason.
    """
    began = time.monotonic()
    with copy_of_the_package(mutant) as root:
        run = run_tests(root, mutant.tests, time_limit)
    if run.status not in (0, 1):
        raise NotCaughtError(f"pytest ended with status {run.status}:\n{run.output}")
    for test in mutant.tests:
        if "failed" not in run.of(test).values():
            raise NotCaughtError(f"{test} does not notice that {mutant.wrong}\n{run.output}")
    for failure in run.failures:
        expected = VERDICTS | set(mutant.errors)
        if failure.when != "call" or expected.isdisjoint(failure.classes):
            raise NotCaughtError(
                f"{failure.test} fails for another reason than its judgement, at its "
                f"{failure.when}: {failure.classes[0]}: {failure.message}\n{run.output}"
            )
    return Catch(mutant, run.failures, time.monotonic() - began)


def check_unchanged(mutants: Sequence[Mutant], time_limit: float = 2 * TIME_LIMIT) -> None:
    """Let the tests of some mutants run on an unchanged copy, where all must pass.

    Tests for GPUs may be skipped instead, if that is all that the mutants want of them.

    Raises
    ------
    NotCaughtError
        If one does not.
    """
    with copy_of_the_package() as root:
        run = run_tests(root, [test for mutant in mutants for test in mutant.tests], time_limit)
    if run.status != 0:
        raise NotCaughtError(
            f"without a change, pytest ends with status {run.status}:\n{run.output}"
        )
    for mutant in mutants:
        for test in mutant.tests:
            outcomes = set(run.of(test).values())
            if not outcomes or ("passed" not in outcomes and not mutant.gpus):
                raise NotCaughtError(f"without a change, {test} does not pass:\n{run.output}")
