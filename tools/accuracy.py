"""Compares every kernel, in every precision, with float64 on inputs that are meant to be hard.

    python tools/accuracy.py [--kernels NAME...] [--device cuda|cpu] [--output FILE]

It prints a table: for each kernel and kind of input the worst error of all problems, as a share of
the gate. It fails if a share is above 1; but on inputs of one sign and of wide range float32 sums
of many terms may leave the gate (PyTorch's do), and are judged by the bound that a sum in any order
has. A record of all kernels on a
GPU is written to ``records/GPU-accuracy.json``; that takes half a minute, once they are built.

The record (schema 1): ``what``, ``gpu``, ``software``, ``date``, ``seed``, ``meaning``,
``problems`` (the arguments of each) and ``rows``: ``kernel`` (a key of `convt_lab.stages.kernels`,
``operator`` or ``pytorch``), ``dtype``, ``allow_tf32``, ``precision`` (what operands are rounded
to: ``float32``, ``tf32``, ``float16`` or ``bfloat16``), and for each of `KINDS` that this precision
is judged on, under ``errors``: ``error``, the largest in units of the gate's kind, ``gate``,
``share`` (the largest of a problem's error over its gate), ``bound`` (the largest error that is
right, where that is more than the gate) and ``covered``, on how many problems.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import conv_transpose2d, records  # noqa: E402
from convt_lab.bench import _current_gpu  # noqa: E402
from convt_lab.ladder import Exact, exact, judge, poisoned  # noqa: E402
from convt_lab.plan import plan_for  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402
from convt_lab.reference import float32_gate, terms_of, tf32_gate, truncation_gate  # noqa: E402
from convt_lab.stages import kernels  # noqa: E402

#: The star's channels and kernel, a decoder's layer, groups, few channels, one channel a group;
#: large enough that the operator has kernels of its own for most.
PROBLEMS = (
    Problem(4, 64, 64, 128, 256, kernel_size=(3, 7)),
    Problem(8, 128, 64, 64, 64, kernel_size=4, stride=2, padding=1, bias=True),
    Problem(4, 256, 256, 65, 64, kernel_size=3, stride=2, padding=1, output_padding=1, groups=4),
    Problem(4, 96, 3, 256, 256, kernel_size=(3, 7), bias=True),
    Problem(4, 64, 64, 120, 128, kernel_size=4, stride=2, padding=1, groups=64),
)

#: The same on the simulator, in small.
SMALL = (
    Problem(1, 16, 8, 4, 24, kernel_size=(3, 7)),
    Problem(1, 8, 9, 5, 6, kernel_size=4, stride=2, padding=1, bias=True),
    Problem(1, 3, 3, 5, 6, kernel_size=4, stride=2, padding=1, groups=3),
)

#: What inputs are like, and the precisions that are judged on them. TF32 keeps no digits of what
#: is below its normal numbers, and 16 bits hold no large spread.
KINDS: dict[str, tuple[str, ...]] = {
    "normal": ("float32", "tf32", "float16", "bfloat16"),
    "positive": ("float32", "tf32", "float16", "bfloat16"),
    "lognormal": ("float32", "tf32"),
    "channels": ("float32", "tf32"),
    "wide": ("float32", "tf32"),
    "cancelling": ("float32", "tf32", "float16", "bfloat16"),
    "integers": ("float32", "tf32", "float16", "bfloat16"),
    "denormal": ("float32",),
    "not finite": ("float32", "tf32", "float16", "bfloat16"),
}

MEANING = {
    "normal": "x and weight from the normal distribution",
    "positive": "their magnitudes",
    "lognormal": "exp of x",
    "channels": "each channel of x times a power of ten between -3 and 3",
    "wide": "x times exp(4 n), n normal",
    "cancelling": "the second half of a group's channels repeats the first, its weights negated, "
    "but for a thousandth",
    "integers": "from -8 to 8: every sum is exact in float32, and nothing but that is right",
    "denormal": "x times 2^-130, which is below the smallest normal number, and weights of about 1",
    "not finite": "normal, with infinities of both signs and NaN in x: where and what float64 says",
}

#: On these a float32 result may leave the gate, up to the bound of `bound_of`.
BY_BOUND = ("positive", "lognormal", "channels", "wide")

PYTORCH = "pytorch"

ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def drawn(problem: Problem, kind: str, seed: int, device: str) -> tuple[torch.Tensor, ...]:
    """Draw x, weight and bias (or None) in float32."""
    x, weight, bias = problem.random_inputs(seed, device)
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device)

    if kind == "positive":
        x, weight = x.abs(), weight.abs()
    elif kind == "lognormal":
        x = x.exp()
    elif kind == "channels":
        x = x * 10.0 ** (6 * uniform(problem.in_channels, 1, 1) - 3)
    elif kind == "wide":
        x = x * (4 * torch.randn(x.shape, generator=generator)).exp().to(device)
    elif kind == "cancelling":
        for first in range(0, problem.in_channels, problem.in_channels // problem.groups):
            half = problem.in_channels // problem.groups // 2
            one, other = slice(first, first + half), slice(first + half, first + 2 * half)
            x[:, other] = x[:, one]
            weight[other] = -weight[one] * (1 + 0.001 * uniform(*weight[one].shape))
    elif kind == "integers":
        x = (17 * uniform(*x.shape)).floor() - 8
        weight = (17 * uniform(*weight.shape)).floor() - 8
        bias = None if bias is None else (17 * uniform(*bias.shape)).floor() - 8
    elif kind == "denormal":
        x, bias = x * 2.0**-130, None if bias is None else bias * 2.0**-130
        weight = weight / weight.std()
    elif kind == "not finite":
        flat = x.view(-1)
        places = (uniform(6) * flat.numel()).long()
        flat[places] = torch.tensor([torch.inf, -torch.inf, torch.nan] * 2, device=device)
    return x, weight, bias


@dataclass(frozen=True)
class Way:
    """One way to compute: a kernel, the operator or PyTorch, in one dtype.

    Attributes
    ----------
    kernel
        A key of `convt_lab.stages.kernels`, ``"operator"`` or ``"pytorch"``.
    dtype
        Of the tensors.
    allow_tf32
        Of the operator and PyTorch; of a kernel, whether it rounds float32 to TF32.
    """

    kernel: str
    dtype: torch.dtype = torch.float32
    allow_tf32: bool = False

    @property
    def precision(self) -> str:
        """What it may round operands to."""
        if self.dtype != torch.float32:
            return str(self.dtype).removeprefix("torch.")
        return "tf32" if self.allow_tf32 else "float32"

    def covers(self, problem: Problem, inputs: Sequence[torch.Tensor | None]) -> bool:
        """Whether it computes the problem itself; the operator, whether PyTorch does not."""
        if self.kernel == "operator":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.allow_tf32):
                plan = plan_for(*inputs, *problem.arguments.values())
            return not plan.is_pytorchs
        return self.kernel == PYTORCH or kernels[self.kernel].supports(problem, self.dtype, False)

    def call(self, problem: Problem, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Compute."""
        functions: dict[str, Callable[..., torch.Tensor]] = {
            "operator": conv_transpose2d,
            PYTORCH: F.conv_transpose2d,
        }
        function = functions.get(self.kernel) or kernels[self.kernel]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.allow_tf32):
            return function(*inputs, **problem.arguments)


def ways(names: Sequence[str]) -> Iterator[Way]:
    """Return all ways of these kernels."""
    for name in names:
        if name in kernels:
            for dtype in kernels[name].dtypes:
                is_tf32 = dtype == torch.float32 and kernels[name].precision == "tf32"
                yield Way(name, dtype, is_tf32)
        else:
            yield Way(name)
            yield Way(name, allow_tf32=True)
            yield Way(name, torch.float16)
            yield Way(name, torch.bfloat16)


def error_of(
    way: Way, actual: torch.Tensor, truth: Exact, problem: Problem, kind: str
) -> tuple[float, float]:
    """Return the error and its gate.

    Of float32 and TF32 it is the condition error. Of 16 bits, which are stored with one rounding,
    it is the largest of the error over what that rounding and the sum may be wrong by. Below
    the normal numbers each product and sum may be wrong by half of the least step besides, and the
    error is again a share of what is right.
    """
    if kind == "integers" and way.dtype == torch.float32:
        return float((actual.double() != truth.expected).sum()), 0.0
    if kind == "denormal":
        least = 2.0**-149
        allowed = float32_gate(actual.numel()) * 2.0**-24 * truth.scale
        allowed += (terms_of(problem) + 1) * least / 2
        return ((actual.double() - truth.expected).abs() / allowed).max().item(), 1.0
    if way.dtype == torch.float32:
        gate = float32_gate(actual.numel())
        if way.allow_tf32:
            gate = tf32_gate(terms_of(problem))
        return judge(actual, truth).condition, gate
    result, unit = actual.double(), ROUNDOFF[way.dtype]
    finite = truth.expected.isfinite()
    if not torch.equal(result[~finite].nan_to_num(1.5), truth.expected[~finite].nan_to_num(1.5)):
        return float("inf"), 1.0
    difference = (result - truth.expected).abs()
    step = torch.finfo(way.dtype).smallest_normal * torch.finfo(way.dtype).eps / 2
    # Sums are in float32, on tensor cores, which cut them off.
    units = max(float32_gate(actual.numel()), truncation_gate(terms_of(problem)))
    allowed = unit * truth.expected.abs() + units * 2.0**-24 * truth.scale
    shares = torch.where(finite, difference / (allowed + step), 0.0)
    return shares.nan_to_num(float("inf")).max().item(), 1.0


def bound_of(way: Way, problem: Problem, kind: str, gate: float) -> float:
    """Return the largest error that is right.

    A sum of n products in float32, in whatever order, is wrong by less than n + 2 units, its bias
    and the rounding of its products counted (N. J. Higham, "Accuracy and Stability of Numerical
    Algorithms", 2002, section 3.1).
    """
    if way.precision == "float32" and kind in BY_BOUND:
        return max(gate, terms_of(problem) + 2.0)
    return gate


def measure(names: Sequence[str], device: str, seed: int) -> list[dict[str, Any]]:
    """Judge these kernels; the record's rows."""
    found = list(ways(names))
    rows = {
        way: {
            "kernel": way.kernel,
            "dtype": str(way.dtype).removeprefix("torch."),
            "allow_tf32": way.allow_tf32,
            "precision": way.precision,
            "errors": {},
        }
        for way in found
    }
    for problem in PROBLEMS if device == "cuda" else SMALL:
        for kind, precisions in KINDS.items():
            drawn_inputs = drawn(problem, kind, seed, device)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                inputs = [None if t is None else t.to(dtype) for t in drawn_inputs]
                truth = None
                for way in found:
                    if way.dtype != dtype or way.precision not in precisions:
                        continue
                    if not way.covers(problem, inputs):
                        continue
                    truth = truth or exact(
                        *(None if t is None else t.float() for t in inputs), **problem.arguments
                    )
                    with poisoned():
                        actual = way.call(problem, inputs)
                    error, gate = error_of(way, actual, truth, problem, kind)
                    bound = bound_of(way, problem, kind, gate)
                    add(rows[way]["errors"], kind, error, gate, bound)
    return [row for row in rows.values() if row["errors"]]


def add(errors: dict[str, Any], kind: str, error: float, gate: float, bound: float) -> None:
    """Keep the worst of a kind's problems."""
    share = error / gate if gate else (0.0 if error == 0 else float("inf"))
    first = {"error": error, "gate": gate, "share": share, "bound": bound}
    entry = errors.setdefault(kind, {**first, "covered": 0})
    entry["covered"] += 1
    if not share <= entry["share"]:  # true for NaN
        entry.update(first)


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say which of our kernels are wrong on what."""
    return [
        f"{row['kernel']} in {row['precision']} on {kind} inputs: error {entry['error']:.4g}, "
        f"at most {entry['bound']:.4g} is right"
        for row in rows
        if row["kernel"] != PYTORCH
        for kind, entry in row["errors"].items()
        if not entry["error"] <= entry["bound"]
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the shares as text."""
    lines = [f"{'':30}" + "".join(f"{kind:>11}" for kind in KINDS)]
    for row in rows:
        shares = (row["errors"].get(kind) for kind in KINDS)
        cells = "".join(f"{'-' if s is None else format(s['share'], '.3f'):>11}" for s in shares)
        lines.append(f"{row['kernel'] + ', ' + row['precision']:30}{cells}")
    return "\n".join(lines)


def promise(rows: Sequence[dict[str, Any]]) -> str:
    """Return the shares as a Markdown table, for `book/api.md`; kernels that agree share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        shares = (row["errors"].get(kind) for kind in KINDS)
        cells = tuple("" if s is None else _short(s["share"]) for s in shares)
        names.setdefault((row["precision"], *cells), []).append(row["kernel"])
    lines = [f"| computed by | operands | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for (precision, *cells), kernels_ in names.items():
        lines.append(f"| {', '.join(kernels_)} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(share: float | str) -> str:
    share = float(share)
    return "∞" if share == float("inf") else f"{share:.1f}" if share < 10 else f"{share:,.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Judge, print and write the record."""
    every = [*kernels, "operator", PYTORCH]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=every, metavar="NAME")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu judges what runs without one")
    names = arguments.kernels or (every if arguments.device == "cuda" else list(kernels))
    rows = measure(names, arguments.device, arguments.seed)
    print(table(rows))
    told = failures(rows)
    problems = PROBLEMS if arguments.device == "cuda" else SMALL
    record = {
        "schema": 1,
        "what": "errors of every kernel against float64 on hard inputs",
        "gpu": None,
        "software": {"torch": torch.__version__},
        "date": date.today().isoformat(),
        "seed": arguments.seed,
        "meaning": {
            "error": "of float32 and tf32 max|error| / (2^-24 * (|x| conv |w| + |b|)); of 16 bits "
            "max|error| / (one rounding of the result + what a tensor core's sum may be wrong by); "
            "of denormals "
            "max|error| / (the gate of float32 + half of the least step for each term); of "
            "integers in float32 how many outputs differ",
            "gate": "the largest error on inputs that cancel, 8 and a little for many outputs",
            "share": "error / gate, the worst of all problems that the kernel covers",
            "bound": "the largest error that is right, in whatever order a sum is taken",
            **MEANING,
        },
        "problems": [asdict(problem) for problem in problems],
        "rows": rows,
    }
    path = arguments.output
    if arguments.device == "cuda":
        with _current_gpu() as machine:
            record["gpu"], record["software"] = machine.gpu.name, asdict(machine.software)
        if path is None and set(names) == set(every):
            path = records.FOLDER / f"{records.slug(machine.gpu.name)}-accuracy.json"
    if path is not None:
        for row in rows:
            for entry in row["errors"].values():
                entry.update({name: records.rounded(entry[name], 4) for name in entry})
        records.write_text(path, records.text_of(record))
        print(f"wrote {path}")
    if told:
        raise SystemExit("\n".join(told))


if __name__ == "__main__":
    main()
