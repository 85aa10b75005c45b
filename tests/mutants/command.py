"""The command that tries mutants and prints a table: which test caught which."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from mutants.mutant import Catch, Mutant, NotCaughtError, catch, check_unchanged, is_case
from mutants.registry import MUTANTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants that are named, or all; return 1 if one is not caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Make the package wrong, one change at a time, and list which test notices.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try; all if none")
    parser.add_argument("-l", "--list", action="store_true", help="only list them and their tests")
    parser.add_argument(
        "-j", "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="how many at a time"
    )
    chosen = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := sorted(set(chosen.names) - set(known)):
        parser.error(f"no mutant has the name {', '.join(unknown)}; --list lists them")
    mutants = [known[name] for name in sorted(set(chosen.names) or known)]
    if chosen.list:
        print_list(mutants)
        return 0
    gpus = torch.cuda.device_count()
    tried = [mutant for mutant in mutants if mutant.gpus <= gpus]
    with ThreadPoolExecutor(max_workers=chosen.jobs) as pool:
        unchanged = pool.submit(attempt, check_unchanged, tried)
        results = dict(zip(tried, pool.map(attempt_one, tried), strict=True))
    missed = {mutant: r for mutant, r in results.items() if isinstance(r, NotCaughtError)}
    print_table(mutants, results)
    print(f"\n{len(tried) - len(missed)} of {len(tried)} mutants were caught.")
    if unchanged.result() is not None:
        print(f"\nThe tests do not pass without a change: {unchanged.result()}")
    for mutant, error in missed.items():
        print(f"\n{mutant.name}: {error}")
    return int(bool(missed) or unchanged.result() is not None)


def attempt(function, *arguments):
    """Call a function; return an error that says that a mutant was not caught."""
    try:
        return function(*arguments)
    except NotCaughtError as error:
        return error


def attempt_one(mutant: Mutant) -> Catch | NotCaughtError:
    return attempt(catch, mutant)


def print_list(mutants: Sequence[Mutant]) -> None:
    """Print what each mutant is and which tests must catch it."""
    for mutant in mutants:
        print(f"{mutant.name} ({mutant.file}): {mutant.wrong}.")
        for test in mutant.tests:
            print(f"    {test}")


def print_table(mutants: Sequence[Mutant], results: dict[Mutant, Catch | NotCaughtError]) -> None:
    """Print a line for each test that caught a mutant."""
    width = max(len(mutant.name) for mutant in mutants) + 2
    print(f"{'mutant':{width}}caught by")
    for mutant in mutants:
        result = results.get(mutant)
        if result is None:
            lines = [f"(not tried: needs {mutant.gpus} GPU{'s' * (mutant.gpus > 1)})"]
        elif isinstance(result, NotCaughtError):
            lines = ["NOTHING"]
        else:
            lines = [first_case(result, test) for test in mutant.tests]
        for number, line in enumerate(lines):
            print(f"{mutant.name if number == 0 else '':{width}}{line}")


def first_case(found: Catch, test: str) -> str:
    """Return the node id of the first case of a test that failed, and how many more did."""
    cases = [case for case in found.tests if is_case(case, test)]
    return cases[0] + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
