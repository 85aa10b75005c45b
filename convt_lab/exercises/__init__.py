"""Exercises that check themselves: ``lab.exercises.check("coalesced.2", answer)`` runs an answer.

What an exercise asks for stands in its chapter. The way to a verdict: its entry, in the chapter's
module here, holds a text to start from; `start` gives it, you change it; `check` compiles the
answer, runs it on several small problems on the simulator, compares values with float64, looks for
hazards, and compares counters with the exercise's budget. Some exercises are
answered by a Python function or by numbers instead. A wrong answer is told what is wrong with it:
no exception is raised for it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from convt_lab.exercises import (
    coalesced,
    decoder,
    distributed,
    first_draft,
    gather,
    gpu_primer,
    hopper,
    ladder,
    measuring,
    naive_gather,
    operator,
    register_blocked,
    scatter_reference,
    shared_tiled,
    simulator,
    tensor_core,
    tensor_core_split,
    winograd,
)
from convt_lab.exercises.exercise import Exercise, Hints, Result, Solution

__all__ = ["Result", "check", "hint", "hints", "names", "solution", "start"]

_CHAPTERS = (
    *(scatter_reference, gather, first_draft),
    *(naive_gather, coalesced, shared_tiled, register_blocked, winograd, ladder),
    *(tensor_core, tensor_core_split, hopper, operator, decoder, distributed, simulator),
    *(gpu_primer, measuring),
)
_EXERCISES = MappingProxyType(
    {exercise.name: exercise for chapter in _CHAPTERS for exercise in chapter.EXERCISES}
)

#: The exercises' names, chapter by chapter.
names: tuple[str, ...] = tuple(_EXERCISES)


def check(name: str, answer: Any, backend: str = "simulator") -> Result:
    """Run an answer and say what is right and wrong about it.

    Parameters
    ----------
    name
        The exercise, such as ``"coalesced.2"``.
    answer
        What the exercise asks for. In CUDA C++: the whole text as a str; the kernel alone, where
        the text is a stage's file; or a dict of changes of the starting text, ``{old: new}``. Or a
        Python function, or its text. Or a number, or several in a tuple. Or a `solution`.
    backend
        ``"simulator"``; with ``"gpu"`` (or ``"auto"`` where there is a GPU) an answer in CUDA C++
        that the simulator finds right runs on the GPU as well, and its values are checked there
        too. Hazards and counters are the simulator's.

    Returns
    -------
    Result
        Print it. Its `passed` says whether the answer is right.

    Raises
    ------
    ValueError
        If there is no such exercise or back end. Nothing is raised for what is wrong in the answer.
    BuildError
        If there is no compiler that works, or no GPU where one is asked for.
    RecordError, FileNotFoundError
        If an exercise compares with a record that is not there: ``records`` is a folder of the
        repository, and an installed package has none.

    Notes
    -----
    A kernel or a launcher that runs for ever is stopped. A Python function is not: interrupt it.
    """
    exercise = _find(name)
    if backend not in ("simulator", "gpu", "auto"):
        raise ValueError(f"backend={backend!r}: must be 'simulator', 'gpu' or 'auto'")
    return exercise.check(answer.answer if isinstance(answer, Solution) else answer, backend)


def start(name: str) -> Any:
    """Return what an exercise begins with.

    Parameters
    ----------
    name
        The exercise.

    Returns
    -------
    str or tuple
        The text to change, which a notebook shows as code; or a guess, where numbers are asked for.

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    return _find(name).start


def hint(name: str, number: int = 1) -> str:
    """Return one of an exercise's hints.

    Parameters
    ----------
    name
        The exercise.
    number
        Which hint, from 1. Each tells more than the one before.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If there is no such exercise or hint.
    """
    texts = _find(name).hints
    if not isinstance(number, int) or not 1 <= number <= len(texts):
        raise ValueError(f"number={number!r}: {name} has hints 1 to {len(texts)}")
    return texts[number - 1]


def hints(name: str) -> Hints:
    """Return all hints of an exercise, which the book shows folded.

    Parameters
    ----------
    name
        The exercise.

    Returns
    -------
    Hints

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    return Hints(name, _find(name).hints)


def solution(name: str) -> Solution:
    """Return an exercise's solution, which the book shows folded, with what `check` says of it.

    Parameters
    ----------
    name
        The exercise.

    Returns
    -------
    Solution
        Its `answer` is what `check` takes, and `why` says why.

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    exercise = _find(name)
    return Solution(exercise, exercise.solution, exercise.why)


def _find(name: str) -> Exercise:
    if name not in _EXERCISES:
        raise ValueError(f"name={name!r}: no such exercise; there are {', '.join(names)}")
    return _EXERCISES[name]
