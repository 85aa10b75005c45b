"""What the book says of a `convt_lab.decoder_record`: tables as text, sentences as Markdown lists.

Each function takes a record, or None where none was measured yet, and then says so.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable

import torch

from convt_lab.columns import aligned
from convt_lab.decoder import SegmentationNet
from convt_lab.decoder_record import CHOSEN_BY, PASSES, After, DecoderRecord, Mode, Network
from convt_lab.layer_profile import REST, flops_by_layer
from convt_lab.operator_record import PYTORCH

__all__ = [
    "NOT_MEASURED",
    "about",
    "choices",
    "errors",
    "everything",
    "flops_of",
    "gains",
    "gap",
    "layers",
    "left_over",
    "limits",
    "reasons",
    "suspicious",
    "verdict",
]

#: What every function returns for None.
NOT_MEASURED = (
    "Not measured yet: tools/decoder_profile.py measures this on an NVIDIA GPU and writes the "
    "record."
)

#: How many times an error may grow by the swap before it is said to be wrong.
GROWTH = 4.0

_WIDTH = 92


def _of_a_record(function: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(function)
    def of(record: DecoderRecord | None, *arguments: object, **keywords: object) -> str:
        return NOT_MEASURED if record is None else function(record, *arguments, **keywords)

    return of


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _ms(seconds: float) -> str:
    text = f"{1000 * seconds:.3f}"
    return "0.000" if text == "-0.000" else text


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _listed(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def flops_of(network: Network) -> dict[str, int]:
    """Return the floating-point operations of each layer's forward; nothing is computed."""
    with torch.device("meta"):
        model = SegmentationNet(network.classes, network.width)
        return flops_by_layer(model, torch.empty(network.input_shape))


@_of_a_record
def about(record: DecoderRecord) -> str:
    """Return what was measured, on what, when and how."""
    gpu, software, network = record.gpu, record.software, record.network
    lines = [
        f"**GPU:** {gpu.name}, {record.date}; driver {gpu.driver}, CUDA {software.cuda}, "
        f"PyTorch {software.torch}, cuDNN {software.cudnn}",
        f"**network:** `SegmentationNet(classes={network.classes}, width={network.width})`, "
        f"images {list(network.input_shape)}",
    ]
    for mode in record.modes:
        how = "float32" if mode.dtype == "float32" else f"float32 parameters, autocast {mode.dtype}"
        tf32 = f", `allow_tf32={mode.allow_tf32}`" if mode.dtype == "float32" else ""
        lines.append(f"**{mode.name}:** {how}{tf32}, {mode.memory_format.replace('_', ' ')}")
    return _bullets([*lines, *(f"**{name}:** {text}" for name, text in record.meaning.items())])


@_of_a_record
def layers(record: DecoderRecord, mode: str = "float32") -> str:
    """Return what each layer takes before the swap, by the profiler, beside its FLOPs."""
    one = record.mode(mode)
    profile, flops = one.before.profile, flops_of(record.network)
    inference, training = (profile.of(name) for name in PASSES)
    totals = math.fsum(inference.values()), math.fsum(training.values())

    def row(label: str, names: Iterable[str]) -> tuple[str, ...]:
        names = list(names)
        still, forward, backward = (
            math.fsum(half[name] for name in names)
            for half in (profile.inference, profile.forward, profile.backward)
        )
        work = sum(flops.get(name, 0) for name in names) / sum(flops.values())
        return (
            label,
            _percent(work),
            *(_ms(still), _percent(still / totals[0])),
            *(_ms(forward), _ms(backward), _percent((forward + backward) / totals[1])),
        )

    head = ("inference", "share", "forward", "backward", "share")
    rows = [(f"{mode}, ms", "FLOPs", *head)]
    for name in (*one.layers, REST):
        rows.append(row(name + (" *" if name in one.alone else ""), [name]))
    rows.append(row("all", inference))
    rows.append(row("all *", one.alone))
    note = "* transposed convolutions; the last share is that of forward and backward"
    return f"{aligned(rows, left=(0,))}\n{note}"


@_of_a_record
def verdict(record: DecoderRecord) -> str:
    """Return which layer is the bottleneck in each mode, in sentences."""
    flops = flops_of(record.network)
    lines = []
    for mode in record.modes:
        for name in PASSES:
            times = mode.before.profile.of(name)
            total = math.fsum(times.values())
            first, *others = sorted(mode.layers, key=times.__getitem__, reverse=True)[:3]
            transposed = math.fsum(times[layer] for layer in mode.alone) / total
            then = _listed(f"`{layer}` ({_percent(times[layer] / total)})" for layer in others)
            lines.append(
                f"**{mode.name}, {name}:** the slowest layer is `{first}` with "
                f"{_percent(times[first] / total)} of the time, and "
                f"{_percent(flops[first] / sum(flops.values()))} of the forward's operations; then "
                f"come {then}. All transposed convolutions take {_percent(transposed)}."
            )
    return _bullets(lines)


@_of_a_record
def limits(record: DecoderRecord) -> str:
    """Return how much a swap can bring at most, in each mode."""
    rows = [("", "", "share of the time", "at most times as fast")]
    for mode in record.modes:
        for name in PASSES:
            share = math.fsum(part for part, _ in mode.parts(mode.after[0], name))
            rows.append((mode.name, name, _percent(share), f"{mode.limit(name):.2f}"))
    return aligned(rows, left=(0, 1))


@_of_a_record
def choices(record: DecoderRecord) -> str:
    """Return what each layer takes by itself, and what was chosen for it."""
    tables = []
    for mode in record.modes:
        rows = [
            (f"{mode.name}, ms", "PyTorch", *(f"by {by}" for by in CHOSEN_BY), "takes", "x PyTorch")
        ]
        for name, alone in mode.alone.items():
            kernels = [mode.chosen_by(by).choices[name].kernel for by in CHOSEN_BY]
            chosen = alone.seconds[kernels[-1]]
            speedup = f"{alone.speedup(kernels[-1]):.2f}"
            rows.append((name, _ms(alone.seconds[PYTORCH]), *kernels, _ms(chosen), speedup))
        tables.append(aligned(rows, left=(0, 2, 3)))
    return "\n\n".join(tables)


@_of_a_record
def reasons(record: DecoderRecord, by: str = "tables", mode: str = "float32") -> str:
    """Return why each layer's kernel was chosen, as `convt_lab.explain` said it."""
    choices = record.mode(mode).chosen_by(by).choices
    who = {
        name: "PyTorch's own" if c.kernel == PYTORCH else c.kernel for name, c in choices.items()
    }
    return _bullets(f"`{name}`, {who[name]}: {c.reason}" for name, c in choices.items())


@_of_a_record
def gains(record: DecoderRecord, measured: bool = True) -> str:
    """Return what Amdahl's law predicts for the whole network, and what was measured.

    Parameters
    ----------
    record
        What was measured.
    measured
        False to leave that out.
    """
    tables, bound = [], False
    for mode in record.modes:
        head = (mode.name, "chosen by", "predicted")
        rows = [(*head, "measured", "before ms", "after ms") if measured else head]
        for name in PASSES:
            for after in mode.after:
                pair = after.times[name]
                row = (name, after.chosen_by, f"{mode.predicted(after, name):.2f}")
                if measured:
                    waited = pair.before.is_host_bound or pair.after.is_host_bound
                    bound |= waited
                    row += (f"{'! ' if waited else ''}{pair.speedup:.2f}",)
                    row += (_ms(pair.before.seconds), _ms(pair.after.seconds))
                rows.append(row)
        tables.append(aligned(rows, left=(0, 1)))
    return "\n\n".join(tables) + ("\n\n! the GPU waited for Python" if bound else "")


@_of_a_record
def gap(record: DecoderRecord, by: str = "measurements") -> str:
    """Return where a pass has become shorter, in milliseconds, after what was predicted.

    Parameters
    ----------
    record
        What was measured.
    by
        What the kernels were chosen by.
    """
    tables = []
    for mode in record.modes:
        after = mode.chosen_by(by)
        head = ("predicted", "forward *", "backward *", "elsewhere", "idle", "all")
        rows = [(f"{mode.name}, ms", *head)]
        rows += [(name, *map(_ms, mode.saved(after, name).values())) for name in PASSES]
        tables.append(aligned(rows, left=(0,)))
    return "\n\n".join([*tables, "* of the transposed convolutions, by the profiler"])


@_of_a_record
def errors(record: DecoderRecord) -> str:
    """Return the errors of scores and gradients against float64, before and after."""
    rows = [("", "", "scores", "loss", "worst gradient", "")]
    for mode in record.modes:
        named = [("before", mode.before.errors)]
        named += [(f"by {after.chosen_by}", after.errors) for after in mode.after]
        for what, error in named:
            worst = error.worst_gradient
            numbers = (error.scores, error.loss, error.gradients[worst])
            rows.append((mode.name, what, *(f"{number:.1e}" for number in numbers), worst))
    return aligned(rows, left=(0, 1, 5))


@_of_a_record
def left_over(record: DecoderRecord, by: str = "measurements") -> str:
    """Return what the swap leaves as it was, in sentences."""
    lines = []
    for mode in record.modes:
        after = mode.chosen_by(by)
        lines.append(
            f"**{mode.name}:** {_left_to_pytorch(mode, after)} {_of_the_rest(mode, after)}"
        )
    return _bullets(lines)


def _left_to_pytorch(mode: Mode, after: After) -> str:
    theirs = [name for name, choice in after.choices.items() if choice.kernel == PYTORCH]
    if not theirs:
        return "No layer is left to PyTorch."
    if len(theirs) == len(after.choices):
        if all(len(mode.alone[name].seconds) == 1 for name in theirs):
            return "Every layer is left to PyTorch: no kernel here takes it in this form."
        return "Every layer is left to PyTorch: no kernel here is faster."
    verb = "is" if len(theirs) == 1 else "are"
    return f"{_listed(f'`{name}`' for name in theirs)} {verb} left to PyTorch."


def _of_the_rest(mode: Mode, after: After) -> str:
    training = after.profile.of("training")
    total = math.fsum(training.values())
    backward = math.fsum(after.profile.backward[name] for name in mode.alone)
    forward = math.fsum(after.profile.forward[name] for name in mode.alone)
    shares = (backward, total - backward - forward, forward)
    return (
        "Of a training's kernels, after the swap, {} are the transposed layers' backward, which is "
        "PyTorch's, {} other layers and the loss, and {} what was swapped."
    ).format(*(_percent(share / total) for share in shares))


def suspicious(record: DecoderRecord) -> list[str]:
    """Return which errors are much larger than any of their kind before the swap, or not finite."""
    found = []
    for mode in record.modes:
        old = mode.before.errors
        usual = {"scores": old.scores} | dict.fromkeys(old.gradients, max(old.gradients.values()))
        for after in mode.after:
            for name, error in {"scores": after.errors.scores, **after.errors.gradients}.items():
                if not error <= GROWTH * usual.get(name, 0.0):
                    found.append(
                        f"{mode.name}, by {after.chosen_by}: the error of {name} is {error:.1e}, "
                        f"and {usual.get(name, math.nan):.1e} was usual before"
                    )
    return found


def everything(record: DecoderRecord) -> str:
    """Return all tables, for the one who measures."""
    parts = [about(record), *(layers(record, mode.name) for mode in record.modes), verdict(record)]
    parts += [choices(record), *(reasons(record, by) for by in CHOSEN_BY), limits(record)]
    parts += [gains(record), gap(record), errors(record), left_over(record)]
    lines = "\n\n".join(parts).splitlines()
    return "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="  ") if line.startswith("- ") else line
        for line in lines
    )
