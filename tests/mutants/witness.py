"""A plugin of pytest that writes down what became of each test, and which package was tested."""

import json
import os
from pathlib import Path

import pytest

import convt_lab

_outcomes = {}
_failures = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        error = call.excinfo.value
        _failures.append(
            {
                "test": report.nodeid,
                "classes": _classes(error),
                "message": str(error),
                "when": report.when,
            }
        )
    if report.when == "call" or not report.passed:
        _outcomes[report.nodeid] = report.outcome
    return report


def _classes(error):
    """Name an exception's classes; of a group, those that all its members have."""
    if not isinstance(error, BaseExceptionGroup):
        return [kind.__name__ for kind in type(error).__mro__]
    first, *others = [_classes(member) for member in error.exceptions]
    return [name for name in first if all(name in classes for classes in others)]


def pytest_sessionfinish():
    found = {"package": convt_lab.__file__, "outcomes": _outcomes, "failures": _failures}
    Path(os.environ["MUTANT_REPORT"]).write_text(json.dumps(found), encoding="utf-8")
