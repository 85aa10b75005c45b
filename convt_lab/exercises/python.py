"""Exercises that are answered by a Python function or by numbers; both are checked by running."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from convt_lab.exercises.exercise import Exercise, Result, Source, edited

__all__ = ["FunctionExercise", "NumbersExercise"]

#: Characters of an argument that a message shows.
LONGEST = 60


@dataclass(frozen=True, kw_only=True)
class FunctionExercise(Exercise):
    """Write a Python function.

    Attributes
    ----------
    function
        Its name.
    text
        The starting text, in which ``np`` is NumPy.
    edits, whole
        The solution, as changes of the starting text or as a text of its own.
    judge
        Calls the function as it likes. Returns what is wrong, or None, and what to say if nothing
        is. An exception of the function is told by `check`.
    """

    function: str
    text: str
    judge: Callable[[Callable], tuple[str | None, str]]
    edits: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""

    @property
    def start(self) -> Source:
        """The starting text."""
        return Source(self.text.lstrip("\n"), "python", f"start of {self.name}")

    @property
    def solution(self) -> str:
        """The solution's text."""
        return self.whole.lstrip("\n") or edited(self.start, self.edits)

    def shown_solution(self) -> str:
        """Show the function."""
        return f"```python\n{self.solution.rstrip()}\n```"

    def check(self, answer: Any, backend: str) -> Result:
        """Take the function, or its text, and judge it."""
        note = []
        if isinstance(answer, str):
            note = ["This is the starting text, unchanged."] if answer == self.start else []
            try:
                answer = self._run_text(answer)
            except SyntaxError as error:
                return self.failed(f"Python refuses line {error.lineno}: {error.msg}")
            except Exception as error:  # the learner's own: told, not raised
                return self.failed(f"The text raises {type(error).__name__}: {error}")
        if not callable(answer):
            return self.failed(
                f"This exercise takes the function {self.function!r}, or the text that defines it; "
                f"this is of type {type(answer).__name__}."
            )
        if wrong := self._wrong_signature(answer):
            return self.failed(wrong)
        calls: list[str] = []

        def recorded(*arguments: Any) -> Any:
            calls.append(_shown_call(self.function, arguments))
            return answer(*arguments)

        try:
            wrong, right = self.judge(recorded)
        except Exception as error:  # the learner's own: told, not raised
            if not calls:  # not yet: a record is missing, say
                raise
            return self.failed(*note, f"{calls[-1]} raises {type(error).__name__}: {error}")
        return self.failed(*note, wrong) if wrong else self.passed(right)

    def _run_text(self, text: str) -> Callable | None:
        names: dict[str, Any] = {"np": np}
        exec(compile(text, self.name, "exec"), names)
        if self.function not in names:
            raise NameError(f"it defines no {self.function!r}")
        return names[self.function]

    def _wrong_signature(self, function: Callable) -> str | None:
        wanted = inspect.signature(self._run_text(self.start))
        try:
            inspect.signature(function).bind(*wanted.parameters)
        except (TypeError, ValueError) as error:
            return f"The check calls {self.function}{wanted}, which does not fit: {error}."
        return None


def _shown_call(name: str, arguments: Sequence[Any]) -> str:
    """Write a call, with the shapes of arrays in place of their values, and nothing at length."""
    shown = [
        f"<array {list(a.shape)}>" if isinstance(a, np.ndarray) and a.size > 8 else repr(a)
        for a in arguments
    ]
    short = [text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in shown]
    return f"{name}({', '.join(short)})"


@dataclass(frozen=True, kw_only=True)
class NumbersExercise(Exercise):
    """Predict numbers, which are then counted.

    Attributes
    ----------
    labels
        What each number is.
    guess
        Where to begin.
    values
        The solution.
    count
        Counts them, by running.
    tolerance
        How far a prediction may be off, relative to the number.
    """

    labels: tuple[str, ...]
    guess: tuple[float, ...]
    values: tuple[float, ...]
    count: Callable[[], tuple[float, ...]]
    tolerance: float = 0.0

    @property
    def start(self) -> tuple[float, ...]:
        """A guess."""
        return self.guess

    @property
    def solution(self) -> tuple[float, ...]:
        """The numbers."""
        return self.values

    def shown_solution(self) -> str:
        """List the numbers."""
        pairs = zip(self.labels, self.values, strict=True)
        return "\n".join(f"- {label}: `{value:g}`" for label, value in pairs)

    def check(self, answer: Any, backend: str) -> Result:
        """Compare each number with what is counted; a wrong one is told, the right one is not."""
        numbers = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
        if len(numbers) != len(self.labels) or not all(
            isinstance(n, Real) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
        ):
            wanted = ", ".join(self.labels)
            many = "one number" if len(self.labels) == 1 else f"{len(self.labels)} numbers"
            return self.failed(f"This exercise takes {many}: {wanted}. This is {answer!r}.")
        lines, passed = [], True
        for label, number, counted in zip(self.labels, numbers, self.count(), strict=True):
            if abs(number - counted) <= self.tolerance * abs(counted):
                lines.append(f"{label}: {number:g} is right; counted {counted:g}")
            else:
                passed = False
                side = "more" if counted > number else "fewer"
                lines.append(f"{label}: {number:g} is wrong; the simulator counts {side}")
        return self.passed(*lines) if passed else self.failed(*lines)
