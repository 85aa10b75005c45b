"""Tables as text: the one way in which every table of the package is laid out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Return rows of cells as lines whose columns stand below each other.

    Parameters
    ----------
    rows
        All of one length.
    left
        The columns that are aligned to the left; the others are to the right.

    Returns
    -------
    str
        Lines without spaces at their ends.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
