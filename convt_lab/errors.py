"""The errors that compiling and launching a kernel can end in."""

from __future__ import annotations

__all__ = ["CompileError", "KernelError"]


class CompileError(RuntimeError):
    """The compiler refused a kernel's source.

    Attributes
    ----------
    line
        The line of the source (from 1) that the first error points at, or None.
    """

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


class KernelError(RuntimeError):
    """A launch failed: a bad configuration, a fault, or an error that the GPU reported.

    Attributes
    ----------
    report
        What the simulator had counted when the launch stopped, or None.
    """

    def __init__(self, message: str, report: object | None = None):
        super().__init__(message)
        self.report = report
