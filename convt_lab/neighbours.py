"""Problems that are measured only so that the dispatch knows more of their like.

The 44 shapes of ``data/shapes.json`` are what networks have; between them are gaps. These stand in
the gaps: each kind of problem with few and many channels, small and large images, and the sizes of
kernel, stride and dilation that people use. `python -m convt_lab bench --only neighbours` measures
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from convt_lab.problem import Problem

__all__ = ["NEIGHBOURS", "described"]


def described(problem: Problem) -> str:
    """Return a name for a problem: its sizes."""
    p = problem
    parts = [f"{p.batch}x{p.in_channels}x{p.height}x{p.width} to {p.out_channels}"]
    parts.append(f"k{_pair(p.kernel_size)}")
    for letter, pair, usual in (
        ("s", p.stride, 1),
        ("p", p.padding, 0),
        ("o", p.output_padding, 0),
        ("d", p.dilation, 1),
    ):
        if pair != (usual, usual):
            parts.append(f"{letter}{_pair(pair)}")
    if p.groups > 1:
        parts.append(f"g{p.groups}")
    return " ".join(parts)


def _pair(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _same(*sizes: int, k: int | tuple[int, int], **arguments: object) -> Problem:
    """Return a problem of stride 1 whose output is as large as its input, if `k` is odd."""
    rows, columns = (k, k) if isinstance(k, int) else k
    return Problem(*sizes, kernel_size=k, padding=(rows // 2, columns // 2), **arguments)


_DENSE = (
    Problem(4, 16, 16, 256, 256, kernel_size=3),
    _same(2, 128, 128, 64, 64, k=3),
    _same(1, 64, 64, 128, 128, k=3),
    _same(1, 256, 256, 32, 32, k=3),
    _same(4, 64, 1, 256, 256, k=3),
    Problem(8, 64, 64, 128, 128, kernel_size=(3, 7)),
    Problem(1, 64, 64, 256, 256, kernel_size=(3, 7)),
    Problem(32, 16, 16, 64, 64, kernel_size=(3, 7)),
    _same(16, 32, 32, 64, 64, k=5),
    _same(2, 3, 32, 256, 256, k=7),
    _same(4, 32, 3, 256, 256, k=7),
    _same(2, 64, 64, 128, 128, k=9),
    _same(4, 48, 48, 96, 96, k=(1, 7)),
    _same(4, 48, 48, 96, 96, k=(7, 1)),
    Problem(4, 512, 256, 32, 32, kernel_size=1),
    Problem(2, 32, 32, 256, 256, kernel_size=3, dilation=2),
    Problem(2, 64, 64, 128, 128, kernel_size=5, dilation=(1, 3)),
)

_STRIDED = (
    Problem(8, 64, 32, 64, 64, kernel_size=4, stride=2, padding=1),
    Problem(2, 256, 256, 16, 16, kernel_size=4, stride=2, padding=1),
    Problem(1, 64, 3, 256, 256, kernel_size=4, stride=2, padding=1),
    Problem(1, 512, 256, 32, 32, kernel_size=2, stride=2),
    Problem(8, 32, 16, 128, 128, kernel_size=2, stride=2),
    Problem(4, 32, 16, 128, 128, kernel_size=3, stride=2, padding=1, output_padding=1),
    Problem(2, 64, 64, 64, 64, kernel_size=5, stride=2, padding=2, output_padding=1),
    Problem(8, 16, 1, 128, 128, kernel_size=9, stride=4, padding=4, output_padding=3),
    Problem(4, 21, 21, 32, 32, kernel_size=8, stride=4, padding=2),
    Problem(2, 32, 32, 64, 64, kernel_size=3, stride=3),
    Problem(2, 128, 64, 32, 32, kernel_size=6, stride=3, padding=1),
    Problem(4, 64, 64, 1, 4096, kernel_size=(1, 16), stride=(1, 8), padding=(0, 4)),
)

_DEPTHWISE = (
    _same(16, 128, 128, 56, 56, k=3, groups=128),
    _same(4, 96, 96, 112, 112, k=7, groups=96),
    _same(8, 144, 144, 56, 56, k=5, groups=144),
    _same(4, 64, 128, 64, 64, k=3, groups=64),
    Problem(4, 64, 64, 128, 128, kernel_size=4, stride=2, padding=1, groups=64),
    Problem(8, 512, 512, 32, 32, kernel_size=4, stride=2, padding=1, groups=512),
    Problem(8, 32, 32, 128, 128, kernel_size=8, stride=4, padding=2, groups=32),
    Problem(2, 256, 256, 64, 64, kernel_size=3, stride=2, padding=1, output_padding=1, groups=256),
)

_GROUPED = (
    _same(8, 64, 64, 64, 64, k=3, groups=2),
    _same(8, 128, 128, 56, 56, k=3, groups=8),
    _same(16, 512, 512, 14, 14, k=3, groups=32),
    Problem(4, 64, 64, 128, 128, kernel_size=(3, 7), groups=16),
    Problem(4, 128, 64, 64, 64, kernel_size=4, stride=2, padding=1, groups=4),
    Problem(4, 32, 64, 128, 128, kernel_size=(3, 5), stride=(2, 1), groups=8),
    Problem(8, 256, 256, 28, 28, kernel_size=3, stride=2, padding=1, output_padding=1, groups=32),
)

#: The problems, by name.
NEIGHBOURS: Mapping[str, Problem] = MappingProxyType(
    {described(problem): problem for problem in (*_DENSE, *_STRIDED, *_DEPTHWISE, *_GROUPED)}
)
