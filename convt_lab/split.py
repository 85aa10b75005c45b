"""Numbers of few digits, as tensor cores multiply them, and float32 as a sum of several.

It is a model, in NumPy, of what ``kernels/mma.cuh`` does: rounding to a `Format`, splitting into
parts, and sums that are cut off rather than rounded. Accuracy depends on nothing else, so it can be
studied here at once for many formats and orders of summation. Nothing here is for speed.

Splitting a number to multiply it exactly is T. J. Dekker's, "A floating-point technique for
extending the available precision", Numerische Mathematik 18, 1971. On tensor cores it is found in
S. Markidis et al., "NVIDIA Tensor Core Programmability, Performance & Precision", 2018
(arXiv:1803.04014), and with sums added outside them in H. Ootomo and R. Yokota, "Recovering single
precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022
(arXiv:2203.03341).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

__all__ = ["FORMATS", "Format", "matrix_product", "pairs_of", "scale_of", "split", "truncated"]


def _to_tf32(values: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties away from zero, as ``cvt.rna.tf32.f32`` does."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _to_float16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties to even; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Format:
    """A type of the tensor cores' operands.

    Attributes
    ----------
    name
        As its type is called.
    digits
        Significant bits.
    exponents
        The least and the largest binary exponent of a normal number.
    depth
        Along k, of one instruction.
    round
        Rounds an array of float32 to it; the result is float32 again.
    """

    name: str
    digits: int
    exponents: tuple[int, int]
    depth: int
    round: Callable[[np.ndarray], np.ndarray]


#: The formats by name.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        format.name: format
        for format in (
            Format("tf32", 11, (-126, 127), 8, _to_tf32),
            Format("bfloat16", 8, (-126, 127), 16, _to_bfloat16),
            Format("float16", 11, (-14, 15), 16, _to_float16),
        )
    }
)


def split(values: np.ndarray, format: Format, parts: int) -> tuple[np.ndarray, ...]:
    """Split float32 into parts, each of which the format holds.

    Parameters
    ----------
    values
        float32, of any shape.
    format
        Of the parts.
    parts
        How many. The first is `values` rounded, the next what is left of them rounded, and so on.

    Returns
    -------
    tuple of numpy.ndarray
        float32. Their sum is `values` if there are as many digits as they have.
    """
    rest = np.asarray(values, dtype=np.float32)
    found = []
    for _ in range(parts):
        found.append(format.round(rest))
        rest = rest - found[-1]  # exact: the digits that rounding took away
    return tuple(found)


def pairs_of(parts: int) -> tuple[tuple[int, int], ...]:
    """Return which parts are multiplied, the smallest products first.

    A product of parts i and j is about 2^-digits(i + j) of the whole. Those with i + j >= parts are
    as small as what the parts leave out, and are left out too.
    """
    every = [(i, j) for i in range(parts) for j in range(parts - i)]
    return tuple(sorted(every, key=lambda pair: (-sum(pair), pair[0])))


def scale_of(values: np.ndarray, format: Format) -> float:
    """Return the power of two that brings the largest magnitude near the format's largest.

    Parts lie below the numbers that they are parts of, and float16 has few exponents: so values are
    multiplied by this before they are split, and products divided by it, both without an error. It
    is 1 for a format with the exponents of float32.
    """
    largest = float(np.max(np.abs(values)))
    if largest == 0 or format.exponents[1] >= np.finfo(np.float32).maxexp - 1:
        return 1.0
    return 2.0 ** (format.exponents[1] - 1 - int(np.floor(np.log2(largest))))


def truncated(values: np.ndarray) -> np.ndarray:
    """Cut float64 off to float32, towards zero."""
    nearest = values.astype(np.float32)
    is_above = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(is_above, np.nextafter(nearest, np.float32(0)), nearest)


def matrix_product(
    a: np.ndarray,
    b: np.ndarray,
    format: Format,
    parts: int = 1,
    interval: int | None = None,
    scaled: bool = False,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Multiply float32 matrices as tensor cores do.

    Parameters
    ----------
    a, b
        float32, [M, K] and [K, N].
    format
        What they are multiplied as.
    parts
        Into how many parts they are split; `pairs_of` says which are multiplied.
    interval
        How many instructions along k are summed by the tensor cores, for each pair of parts, before
        an ordinary addition adds that to the rest (*promotion*). All of them if None.
    scaled
        Whether to multiply both by `scale_of` first.
    pairs
        Other pairs of parts than `pairs_of` has, or in another order.

    Returns
    -------
    numpy.ndarray
        float32, [M, N]. An instruction sums its products exactly, adds the accumulator and cuts the
        sum off to float32.
    """
    scales = [scale_of(m, format) if scaled else 1.0 for m in (a, b)]
    left, right = (
        [part.astype(np.float64) for part in split(m * np.float32(scale), format, parts)]
        for m, scale in zip((a, b), scales, strict=True)
    )
    steps = range(0, a.shape[1], format.depth)
    size = len(steps) if interval is None else interval
    total = np.zeros((a.shape[0], b.shape[1]), dtype=np.float32)
    for first in range(0, len(steps), size):
        accumulator = np.zeros_like(total)
        for i, j in pairs_of(parts) if pairs is None else pairs:
            for k in steps[first : first + size]:
                those = slice(k, k + format.depth)
                accumulator = truncated(accumulator + left[i][:, those] @ right[j][those])
        total = total + accumulator
    return total / np.float32(scales[0]) / np.float32(scales[1])
