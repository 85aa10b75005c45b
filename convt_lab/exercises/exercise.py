"""What an exercise is, whatever it asks for, and what an answer to it is told.

An exercise holds a text to start from and its solution as small changes of that text, so that the
two cannot drift apart. Each kind of exercise judges by running: see `cuda` and `python`.
"""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convt_lab import figures
from convt_lab.simulator.report import Report

__all__ = ["Exercise", "Hints", "Result", "Solution", "Source", "edited", "first_wrong"]

#: Characters in a line of a verdict: what fits on a page of the book.
WIDTH = 72


class Source(str):
    """A text to change: a `str`, shown in a notebook as code."""

    __slots__ = ("language", "title")

    def __new__(cls, text: str, language: str, title: str) -> Source:
        """Make it from the text, the highlighter's name of its language, and a title."""
        source = super().__new__(cls, text)
        source.language, source.title = language, title
        return source

    @property
    def listing(self) -> figures.Listing:
        """The text as a notebook shows it."""
        return figures.Listing(self.rstrip("\n"), self.language, self.title)

    def __repr__(self) -> str:
        return f"<{self.title}>"

    def _repr_markdown_(self) -> str:
        return self.listing._repr_markdown_()


def edited(text: str, edits: Mapping[str, str]) -> str:
    """Return `text` with each key of `edits` replaced by its value.

    Raises
    ------
    ValueError
        If a key does not stand in the text exactly once.
    """
    for old, new in edits.items():
        found = text.count(old)
        if found != 1:
            raise ValueError(f"the text to replace must stand there once, not {found} times: {old}")
        text = text.replace(old, new)
    return text


def first_wrong(
    actual: np.ndarray, exact: np.ndarray, allowed: np.ndarray | float, name: str
) -> str | None:
    """Tell the first value that is not right, or None. NaN is never right.

    `allowed` is the absolute error that a value may have.
    """
    if actual.shape != exact.shape:
        return f"{name} has shape {list(actual.shape)} and should have {list(exact.shape)}"
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(actual.astype(np.float64) - exact) <= allowed)
    if not wrong.any():
        return None
    at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    index = ", ".join(str(int(i)) for i in at)
    return (
        f"{name}[{index}] is {float(actual[at]):.7g} and should be {float(exact[at]):.7g}; "
        f"{int(wrong.sum()):,} of {wrong.size:,} values are wrong"
    )


@dataclass(frozen=True)
class Result:
    """What `check` found.

    Attributes
    ----------
    name
        Of the exercise.
    passed
        Whether the answer is right.
    text
        The verdict and what helps, a few lines. It is what is printed.
    report
        The simulator's report of the launch that was judged last, or None.
    """

    name: str
    passed: bool
    text: str
    report: Report | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [f"{self.name}: {'right' if self.passed else 'not yet'}"]
        for line in self.text.splitlines():
            # Code is indented, and stays as it is.
            is_code = line.startswith("    ") or not line
            lines += [line] if is_code else textwrap.wrap(line, WIDTH, subsequent_indent="  ")
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class Hints:
    """All hints of an exercise, folded when a notebook is rendered."""

    name: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(self.texts, 1))

    def __repr__(self) -> str:
        return f"<hints for {self.name}>"

    def _repr_markdown_(self) -> str:
        # Each folded in the fold, so that the first does not give the others away.
        folds = [f":::{{dropdown}} Hint {i}\n{text}\n:::" for i, text in enumerate(self.texts, 1)]
        return "\n".join(["::::{admonition} Hints", ":class: dropdown", "", *folds, "::::"])


@dataclass(frozen=True)
class Solution:
    """The solution of an exercise: an answer, and why it is one.

    Attributes
    ----------
    answer
        What `check` takes: a text, or numbers.
    why
        The reason, for a reader.
    """

    exercise: Exercise = field(repr=False)
    answer: Any
    why: str

    def __str__(self) -> str:
        return str(self.answer)

    def __repr__(self) -> str:
        return f"<solution of {self.exercise.name}>"

    def _repr_markdown_(self) -> str:
        """Show it folded, with what the check says: a solution that is shown has been run."""
        result = self.exercise.check(self.answer, "simulator")
        shown = self.exercise.shown_solution()
        return (
            f"::::{{admonition}} Solution\n:class: dropdown\n{self.why}\n\n{shown}\n\n"
            f"The check says:\n\n```text\n{result}\n```\n::::"
        )


@dataclass(frozen=True, kw_only=True)
class Exercise(ABC):
    """One exercise.

    Attributes
    ----------
    name
        The chapter's name, a point and a number.
    hints
        From the first nudge to nearly the solution.
    why
        Why the solution is right, in Markdown.
    """

    name: str
    hints: tuple[str, ...]
    why: str

    @property
    @abstractmethod
    def start(self) -> Any:
        """What the learner begins with."""

    @property
    @abstractmethod
    def solution(self) -> Any:
        """An answer that passes."""

    @abstractmethod
    def shown_solution(self) -> str:
        """Return the solution in Markdown."""

    @abstractmethod
    def check(self, answer: Any, backend: str) -> Result:
        """Judge an answer; what is wrong with it is told, never raised."""

    def passed(self, *lines: str, report: Report | None = None) -> Result:
        """Make the result of a right answer."""
        return Result(self.name, True, "\n".join(lines), report)

    def failed(self, *lines: str, report: Report | None = None) -> Result:
        """Make the result of a wrong answer."""
        return Result(self.name, False, "\n".join(lines), report)
