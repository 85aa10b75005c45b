"""The picture of the kernels on tensor cores beside PyTorch, in the style of figures.py.

It is drawn from a record of ``tools/tensor_core_times.py``: what it compares was measured in one
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convt_lab.columns import aligned
from convt_lab.figures import (
    _BLUE,
    _GREY,
    _INK,
    _ORANGE,
    _PALE_BLUE,
    _PALE_ORANGE,
    Picture,
    Roof,
    _panels,
    _plain,
    _three_digits,
    constants,
)
from convt_lab.problem import Problem
from convt_lab.records import Ceilings
from convt_lab.stages import kernels

__all__ = ["roof_of", "ways"]

_PYTORCH = "pytorch"
_NAMES = {_PYTORCH: "PyTorch"}

#: What a call is for, in the order of the picture: a record's dtype and its `allow_tf32`.
_NUMBERS = {
    "float32": ("float32", False),
    "TF32": ("float32", True),
    "float16": ("float16", False),
}

#: What a kernel multiplies float32 as, and how many products make one, in the words of its source.
_SPLITS = {
    "tensor_core_split": ("bfloat16", "tensor::Split<float>::PRODUCTS"),
    "hopper": ("float16", "warpgroups::Halves<false, 1>::PRODUCTS"),
    "hopper_single": ("float16", "warpgroups::Single<float, false>::PRODUCTS"),
}


def roof_of(ceilings: Ceilings, kernel: str, number: str = "float32") -> Roof:
    """Return the ceiling of arithmetic that a kernel works under.

    Parameters
    ----------
    ceilings
        As measured.
    kernel
        A key of `convt_lab.stages.kernels`, or ``"pytorch"``.
    number
        ``"float32"``, ``"TF32"`` or ``"float16"``: what it is called for.

    Returns
    -------
    Roof
        That of the FMA units, or the rate of large matrix products of the type that the kernel
        multiplies, over the number of products that it needs for one.

    Raises
    ------
    ValueError
        If that ceiling was not measured.
    """
    if number == "float32" and (kernel == _PYTORCH or kernels[kernel].unit == "FMA"):
        name, products, ceiling = "FP32 FMA", 1, "fp32_fma"
    elif number != "float16" and kernel in _SPLITS:
        name, expression = _SPLITS[kernel]
        (products,) = constants(kernels[kernel], expression).values()
        ceiling = f"gemm_{name}"
    else:
        name, products, ceiling = number, 1, f"gemm_{number.lower()}"
    rate = getattr(ceilings, ceiling)
    if not rate:
        raise ValueError(f"ceilings.{ceiling} is {rate}: {kernel} cannot be compared with it")
    return Roof(name if products == 1 else f"{name}, {products} products", rate / products)


def ways(record: Mapping[str, Any], ceilings: Ceilings, *names: str) -> Picture:
    """Draw the cold time of every way of a record of kernels on tensor cores, a panel a problem.

    Parameters
    ----------
    record
        What ``tools/tensor_core_times.py`` has written.
    ceilings
        Of the same GPU; they may be of another run.
    *names
        Of the record's problems.

    Returns
    -------
    Picture
        Bars in three groups, by what a call is for: kernels of the package blue, PyTorch orange,
        pale where float32 is rounded or not asked for. Behind each is its time, and how many times
        as fast as PyTorch's of the same form it is; the mark across a bar is the least time by
        `roof_of`. The table has all of this.
    """
    entries = {name: _grouped(record["problems"][name]["rows"]) for name in names}
    labels = list(next(iter(entries.values())))
    places, tops = _places(labels)
    figure, panels = _panels(len(names), height=0.9 + 0.21 * (max(places.values()) + 1))
    tables = []
    for axes, (name, rows) in zip(panels, entries.items(), strict=True):
        flops = Problem(**record["problems"][name]["problem"]).flops
        table = [(name, "", "ms", "ratio", "TFLOP/s", "ceiling", "", "of it")]
        longest = max(row["cold_ms"] for row in rows.values())
        right = 1.95 * longest
        for x, head in ((0.76, "ms"), (1, "ratio")):
            axes.text(x * right, -1, head, ha="right", va="center", fontsize=8, color=_GREY)
        for (number, label), row in rows.items():
            y, time, is_ours = places[number, label], row["cold_ms"], row["kernel"] != _PYTORCH
            color, pale = (_BLUE, _PALE_BLUE) if is_ours else (_ORANGE, _PALE_ORANGE)
            fill = color if number == "float32" else pale
            axes.barh(y, time, 0.7, color=fill, edgecolor=color, linewidth=0.8)
            roof = roof_of(ceilings, row["kernel"], number)
            least = 1000 * flops / roof.flops_per_second
            axes.plot([least, least], [y - 0.46, y + 0.46], color=_INK, linewidth=1.6)
            theirs = rows[number, label.replace(row["kernel"], _NAMES[_PYTORCH])]["cold_ms"]
            ratio = f"{theirs / time:.2f}" if is_ours else ""
            for x, text in ((0.76, _three_digits(time)), (1, ratio)):
                axes.text(x * right, y, text, ha="right", va="center", fontsize=8, color=_INK)
            table.append(
                (number, label.replace("channels last", "last"), f"{time:.3f}", ratio,
                 f"{flops / time / 1e9:.1f}", f"{roof.flops_per_second / 1e12:.0f}",
                 roof.name.replace(", ", " / ").removesuffix(" products"), f"{least / time:.1%}")
            )  # fmt: skip
        axes.set_xlim(0, right)
        axes.locator_params(axis="x", nbins=8)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= longest])
        axes.set_ylim(max(places.values()) + 0.6, -1.6)
        first = axes is panels[0]
        axes.set_yticks(
            [*places.values()], [label if first else "" for _, label in places], fontsize=8
        )
        for number, top in tops.items():
            if first:
                axes.text(-0.02, top, number, transform=axes.get_yaxis_transform(), ha="right",
                          va="center", fontsize=8.5, fontweight="bold", color=_INK)  # fmt: skip
        axes.set_xlabel("milliseconds, cold", fontsize=9, color=_INK)
        axes.set_title(name, fontsize=11, color=_INK)
        _plain(axes)
        axes.tick_params(axis="y", length=0)
        tables.append(aligned(table, left=(0, 1, 6)))
    return Picture(figure, "kernels on tensor cores beside PyTorch", "\n\n".join(tables))


def _grouped(rows: list[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return a problem's rows by number and label: group after group, PyTorch's first."""
    found = {}
    for number, form in _NUMBERS.items():
        of_group = [row for row in rows if (row["dtype"], row["allow_tf32"]) == form]
        for row in sorted(of_group, key=lambda row: row["kernel"] != _PYTORCH):
            last = ", channels last" if row["memory_format"] == "channels_last" else ""
            found[number, _NAMES.get(row["kernel"], row["kernel"]) + last] = row
    return found


def _places(labels: list[tuple[str, str]]) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Return where the bars lie, and the groups' names above them."""
    places, tops = {}, {}
    for number, label in labels:
        if number not in tops:
            tops[number] = len(places) + 1.3 * len(tops) - 1
        places[number, label] = len(places) + 1.3 * (len(tops) - 1)
    return places, tops
