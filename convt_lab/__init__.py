"""convt_lab: how a GPU kernel is made fast, told with one operator, the 2-D transposed convolution.

Engineers import `conv_transpose2d` and `ConvTranspose2d`; learners use `stages`, `compile`,
`Problem` and `reference`. Importing the package builds nothing and touches no GPU.
"""

import importlib
from types import ModuleType

from convt_lab import reference
from convt_lab.build import BuildError
from convt_lab.dispatch import explain
from convt_lab.errors import CompileError, KernelError
from convt_lab.module import ConvTranspose2d, replace_conv_transpose
from convt_lab.operator import conv_transpose2d
from convt_lab.problem import Problem, ProblemError
from convt_lab.program import Program, compile
from convt_lab.stages import Stage, stages

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "CompileError",
    "ConvTranspose2d",
    "KernelError",
    "Problem",
    "ProblemError",
    "Program",
    "Stage",
    "compile",
    "conv_transpose2d",
    "exercises",
    "explain",
    "reference",
    "replace_conv_transpose",
    "stages",
]


def __getattr__(name: str) -> ModuleType:
    """Import the exercises when they are first asked for: the library alone needs none of them."""
    if name == "exercises":
        return importlib.import_module("convt_lab.exercises")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
