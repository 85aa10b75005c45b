"""Which kernel computes a problem: one of ours, or PyTorch's own.

`choose` decides, in this order: what can't run on a kernel of ours is PyTorch's; what was measured
on this very GPU is known; with autotuning (`convt_lab.autotune`) it is measured now; else the
shipped tables (`convt_lab.measurements`) tell how similar problems went. Nothing is looked up by
the name of a network: a problem is its properties, as `features` lists them.

The rule for similar problems is judged by `leave_one_out`, which chooses for each measured problem
as if it had not been measured.
"""

from __future__ import annotations

import functools
import heapq
import math
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from convt_lab import autotune, measurements
from convt_lab.measurements import Measurement, Table
from convt_lab.operator_record import PYTORCH
from convt_lab.problem import CroppedProblem, Problem
from convt_lab.records import RecordError
from convt_lab.stages import Kernel, check_tensors, kernels

__all__ = [
    "SLOW",
    "Choice",
    "LeaveOneOut",
    "candidates",
    "choose",
    "choose_by_table",
    "explain",
    "features",
    "generation",
    "leave_one_out",
    "only_by",
]

#: What is there to teach: slower than a later rung, or than what stands on it.
SLOW = ("naive_gather", "coalesced", "shared_tiled", "tensor_core")

#: Kernels that are made for groups of few channels, the more special first.
FOR_FEW_CHANNELS = ("one_channel", "few_channels")

#: How many times as fast as PyTorch a kernel must have been, to be chosen for the very problem ...
MARGIN = 1.02

#: ... for a similar one, and on another GPU model. With 1.2 one in a hundred of the table's
#: problems would be slower than PyTorch's by more than 3 % if the others chose for it, with 1.05
#: two.
MARGIN_SIMILAR, MARGIN_OTHER_GPU = 1.2, 1.5

#: Problems farther apart than this (see `distance`) say nothing about each other.
RADIUS = 3.0

_STEP = 1.0  # of another number of taps along an axis

#: How many similar problems are asked, at most.
NEIGHBOURS = 4

_NOTHING_SIMILAR = "nothing similar was measured"

#: FLOP for each compulsory byte below which memory is the limit, whatever the arithmetic.
_MEMORY_BOUND = 15.0

#: Changes whenever a choice that was given may be another now: who keeps choices compares it.
generation = 0

_lock = threading.Lock()
_measuring = threading.Lock()
_choices: dict[tuple, Choice] = {}
_MOST_CHOICES = 4096
_memory = autotune.Memory()
_only: tuple[Table, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """What computes a problem.

    Attributes
    ----------
    kernel
        ``"pytorch"`` or a key of `convt_lab.stages.kernels`.
    reason
        Why, in a sentence.
    lasts
        Whether it is the same as long as `settings` and `generation` are. If not, it is to be
        measured, and could not be just now.
    """

    kernel: str
    reason: str
    lasts: bool = field(default=True, repr=False, compare=False)

    def __str__(self) -> str:
        who = "PyTorch's own" if self.kernel == PYTORCH else self.kernel
        return f"{who}: {self.reason}"


def candidates(
    problem: Problem,
    dtype: torch.dtype,
    channels_last: bool,
    *,
    tf32: bool,
    capability: tuple[int, int] | None = None,
) -> dict[str, Kernel]:
    """Return our kernels that compute a problem in a form, but for the slow rungs.

    For float32, those that round it to TF32 (`Kernel.precision`) are among them only with `tf32`,
    as PyTorch's own would do it only then. And only those that a GPU of the compute capability
    `capability` can run: the current GPU's, if None; all, if there is none.
    """
    if capability is None and torch.cuda.is_available():
        capability = _gpu(torch.cuda.current_device())[1]
    return {
        name: kernel
        for name, kernel in kernels.items()
        if name not in SLOW
        and (tf32 or dtype != torch.float32 or kernel.precision == "float32")
        and (capability is None or kernel.runs_on(capability))
        and kernel.supports(problem, dtype, channels_last)
    }


def settings() -> tuple[bool, ...]:
    """Return PyTorch's settings on which a choice depends, beside those that are asked about."""
    # What torch.backends.cudnn.enabled, benchmark and deterministic return, in less time.
    return (
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
    )


def choose(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    *,
    channels_last: bool,
    tf32: bool,
) -> Choice:
    """Say what computes a problem fastest.

    Parameters
    ----------
    problem
        The shapes.
    dtype
        Of all tensors.
    device
        Where they are.
    channels_last
        Whether the output is to lie in memory as [N, H, W, C].
    tf32
        Whether PyTorch would be allowed TF32; it says nothing about dtypes but float32.

    Returns
    -------
    Choice
        The same as before, at no cost, as long as `settings` and `generation` are, if it lasts.

    Raises
    ------
    ValueError
        If ``CONVT_AUTOTUNE`` is neither 0 nor 1.
    """
    if device.type != "cuda":
        return Choice(PYTORCH, f"the tensors are on {device}, and our kernels run on CUDA GPUs")
    index = torch.cuda.current_device() if device.index is None else device.index
    tf32 = tf32 and dtype == torch.float32
    measures = autotune.is_on()
    key = problem, dtype, index, channels_last, tf32, measures, settings()
    choice = _choices.get(key)
    if choice is None:
        began = generation
        choice = _choose(problem, dtype, index, channels_last, tf32, measures)
        with _lock:
            if choice.lasts and generation == began:
                if len(_choices) >= _MOST_CHOICES:
                    _choices.clear()
                _choices[key] = choice
    return choice


def _choose(
    problem: Problem,
    dtype: torch.dtype,
    index: int,
    channels_last: bool,
    tf32: bool,
    measures: bool,
) -> Choice:
    name, capability = _gpu(index)
    ours = candidates(problem, dtype, channels_last, tf32=tf32, capability=capability)
    if not ours:
        form = f"{_name(dtype)}, {'channels last' if channels_last else 'contiguous'}"
        return Choice(PYTORCH, f"no kernel of ours takes this problem in {form}")
    if 0 in problem.output_shape:
        return Choice(PYTORCH, "the output is empty")
    lasts = True
    # PyTorch has no argument for a crop, so there is nothing to compare with.
    if _only is None and not isinstance(problem, CroppedProblem):
        case = autotune.case_name(problem, dtype, channels_last, tf32)
        environment = functools.partial(autotune.environment, index)
        times = _memory.recall(environment, case)
        if times is not None:
            return _by_times(times, ours, "measured here before")
        if measures:
            if _may_measure():
                with _measuring:  # one after the other; another thread may have been quicker
                    times = _memory.recall(environment, case)
                    if times is None:
                        times = _measured(problem, dtype, index, channels_last, ours, case)
                if times is not None:
                    return _by_times(times, ours, "measured here just now")
            else:
                lasts = False  # it is measured as soon as that is possible
    tables = _tables() if _only is None else _only
    choice = choose_by_tables(
        tables, name, capability, problem, _name(dtype), channels_last, tf32, tuple(ours)
    )
    return choice if lasts else replace(choice, lasts=False)


def _may_measure() -> bool:
    """Whether work that synchronises and allocates can be done now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, say
        or torch.cuda.is_current_stream_capturing()
    )


def _measured(
    problem: Problem,
    dtype: torch.dtype,
    index: int,
    channels_last: bool,
    ours: Mapping[str, Kernel],
    case: str,
) -> autotune.Times | None:
    """Measure and remember; None if that was not possible, which is said in a warning."""
    device = torch.device("cuda", index)
    try:
        times, failures = autotune.measure(problem, dtype, device, channels_last, ours)
    except RuntimeError as error:  # not enough memory, say
        _warn(f"convt_lab could not measure {problem}: {error}")
        return None
    for name, error in failures.items():
        _warn(f"convt_lab could not measure {name!r}: {type(error).__name__}: {error}")
    if not failures:  # what failed may run another day: it is not kept from that
        _memory.remember(autotune.environment(index), case, times)
        with _lock:
            _advance()
    return times


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=6)


def _by_times(times: autotune.Times, ours: Collection[str], how: str) -> Choice:
    """Choose the fastest, if it is clearly faster than PyTorch."""
    base = times[PYTORCH]
    timed = {name: seconds for name, seconds in times.items() if name in ours}
    best = min(timed, key=timed.__getitem__, default=None)
    if best is None:
        return Choice(PYTORCH, f"{how}: no kernel of ours ran")
    versus = f"{_milliseconds(timed[best])}, PyTorch's own {_milliseconds(base)}"
    if base / timed[best] < MARGIN:
        return Choice(PYTORCH, f"{how}: the best of ours, {best}, took {versus}")
    return Choice(best, f"{how}: it took {versus}, {base / timed[best]:.2f} times as long")


def _advance() -> None:
    """Make all choices that were given questionable; the lock is held."""
    global generation
    generation += 1
    _choices.clear()


@contextmanager
def only_by(*tables: Table) -> Iterator[None]:
    """Choose by these tables alone, in all threads, as long as the context lasts.

    Nothing is measured or remembered meanwhile. It is what a benchmark measures the operator with.
    """
    global _only
    before = _only
    with _lock:
        _only = tables
        _advance()
    try:
        yield
    finally:
        with _lock:
            _only = before
            _advance()


# ---- By tables -----------------------------------------------------------------------------------


@functools.cache
def _gpu(index: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


@functools.cache
def _tables() -> tuple[Table, ...]:
    """Return the shipped tables; none, with a warning, if the package is damaged."""
    try:
        return measurements.load()
    except (OSError, RecordError) as error:
        _warn(f"convt_lab chooses without its table of measurements: {error}; reinstall it")
        return ()


def features(problem: Problem) -> dict[str, float]:
    """Return what two problems are compared by: each the log2 of a size, weighted.

    Channels are those of a group. Kernel rows and columns count most, because kernels are built
    for some and not for others; output pixels least, because both sides grow with them.
    """
    (stride_h, stride_w), (dilation_h, dilation_w) = problem.stride, problem.dilation
    kernel_h, kernel_w = problem.kernel_size
    batch, channels, height, width = problem.output_shape
    weighted = {
        "input channels": (1.0, problem.in_channels // problem.groups),
        "output channels": (1.0, channels // problem.groups),
        "groups": (0.25, problem.groups),
        "kernel rows": (1.5, kernel_h),
        "kernel columns": (1.5, kernel_w),
        "stride of rows": (1.5, stride_h),
        "stride of columns": (1.5, stride_w),
        "dilation of rows": (1.0, dilation_h),
        "dilation of columns": (1.0, dilation_w),
        "output pixels": (0.5, batch * height * width),
        "output width": (0.25, width),
    }
    return {name: weight * math.log2(max(1, size)) for name, (weight, size) in weighted.items()}


def kind(problem: Problem) -> tuple[str, str]:
    """Return the class of a problem; problems of different classes are never compared."""
    if problem.groups == 1:
        channels = "dense"
    elif problem.groups == problem.in_channels:
        channels = "depthwise"
    else:
        channels = "grouped"
    return channels, "strided" if max(problem.stride) > 1 else "not strided"


@functools.lru_cache(maxsize=4096)
def _point(problem: Problem) -> tuple[float, ...]:
    return tuple(features(problem).values())


def distance(one: Problem, other: Problem) -> float:
    """Return how unlike two problems are; infinite if their kinds differ.

    It is the Euclidean distance of their features, and a step for each side of the kernel that
    differs: kernels are built for certain numbers of taps.
    """
    if kind(one) != kind(other):
        return math.inf
    sides = zip(one.kernel_size, other.kernel_size, strict=True)
    steps = sum(1 for side, other_side in sides if side != other_side)
    return math.hypot(math.dist(_point(one), _point(other)), _STEP * math.sqrt(steps))


def choose_by_tables(
    tables: Sequence[Table],
    gpu: str,
    capability: tuple[int, int],
    problem: Problem,
    dtype: str,
    channels_last: bool,
    tf32: bool,
    ours: Collection[str],
) -> Choice:
    """Choose by the table of a GPU, or of the one whose compute capability is nearest.

    Parameters
    ----------
    tables
        One for each GPU model that was measured.
    gpu, capability
        The GPU to choose for.
    problem, dtype, channels_last, tf32
        What is to be computed.
    ours
        Our kernels that can.

    Returns
    -------
    Choice
    """

    def unlikeness(table: Table) -> tuple[bool, int]:
        (major, minor), (own_major, own_minor) = table.compute_capability, capability
        return table.gpu != gpu, abs(10 * (major - own_major) + minor - own_minor)

    if not tables:
        return _without_measurements(problem, dtype, tf32, ours)
    table = min(tables, key=unlikeness)
    return choose_by_table(
        table, problem, dtype, channels_last, tf32, ours, is_other_gpu=table.gpu != gpu
    )


def choose_by_table(
    table: Table,
    problem: Problem,
    dtype: str,
    channels_last: bool,
    tf32: bool,
    ours: Collection[str],
    is_other_gpu: bool = False,
) -> Choice:
    """Choose by what one table says of the problem itself, or of similar ones.

    Parameters
    ----------
    table
        What was measured.
    problem, dtype, channels_last, tf32
        What is to be computed. For bfloat16 counts what was measured in float16, too.
    ours
        Our kernels that can.
    is_other_gpu
        Whether the table is another GPU model's: a kernel must have been faster by more then.

    Returns
    -------
    Choice
        A kernel of ours if it was clearly faster; PyTorch's own if not, or if nothing similar was
        measured (but see `_without_measurements`).
    """
    where = f"on {'another GPU, ' if is_other_gpu else ''}{table.gpu}"
    plain = measurements.without_bias(problem)
    known = _known(table, dtype, channels_last, tf32)
    same = [m for m in known if m.problem == plain]
    if same and not is_other_gpu:
        how = f"measured {where}{_other_dtypes(same[:1], dtype)}"
        return _by_times({PYTORCH: same[0].pytorch, **same[0].kernels}, ours, how)
    found = {}
    for name in ours:
        near = _nearest(plain, [m for m in known if name in m.kernels])
        if near:
            found[name] = min(_predicted(name, near), _ceiling(name, near, plain, known)), near
    if not found:
        return _without_measurements(problem, dtype, tf32, ours)
    best = max(found, key=lambda name: found[name][0])
    ratio, near = found[best]
    count = "a similar problem" if len(near) == 1 else f"{len(near)} similar problems"
    where += _other_dtypes([m for _, m in near], dtype)
    text = f"by {count} measured {where}, {best} is expected to be {ratio:.2f} times as fast as "
    needed = MARGIN_OTHER_GPU if is_other_gpu else MARGIN_SIMILAR
    nearest = near[0][1].ratio(best)
    if ratio >= needed and nearest >= 1:
        return Choice(best, f"{text}PyTorch's own")
    return Choice(PYTORCH, f"{text}it: too little to leave it to ours")


def _known(table: Table, dtype: str, channels_last: bool, tf32: bool) -> list[Measurement]:
    """Return what was measured in a form; for bfloat16, after that what was in float16.

    Both move as much, and are multiplied at the same rate.
    """
    forms = [(d, channels_last, tf32) for d in (dtype, *["float16"] * (dtype == "bfloat16"))]
    return [m for form in forms for m in table.measurements if m.form == form]


def _other_dtypes(known: Sequence[Measurement], dtype: str) -> str:
    """Say in which dtype problems were measured, where that is another."""
    others = sorted({m.dtype for m in known} - {dtype})
    return f" in {' and '.join(others)}" if others else ""


def _nearest(problem: Problem, known: Sequence[Measurement]) -> list[tuple[float, Measurement]]:
    """Return the nearest measured problems within the radius, with their distances, ascending."""
    near = ((distance(problem, m.problem), m) for m in known)
    within = [pair for pair in near if pair[0] <= RADIUS]
    return heapq.nsmallest(NEIGHBOURS, within, key=lambda pair: pair[0])


def _predicted(kernel: str, near: Sequence[tuple[float, Measurement]]) -> float:
    """Return the mean of the ratios (their logarithms'), the nearer ones counting more."""
    return _mean([gap for gap, _ in near], [m.ratio(kernel) for _, m in near])


def _ceiling(
    kernel: str,
    near: Sequence[tuple[float, Measurement]],
    problem: Problem,
    known: Sequence[Measurement],
) -> float:
    """Return what the ratio would be if the kernel took as little as it ever did.

    Packing weights and filling the GPU take their time however small a problem is, so a large one
    says too much good of a kernel. PyTorch's own is taken to need time for each byte as it did for
    the similar ones, and no less than it ever did.
    """
    scaled = [m.pytorch * problem.compulsory_bytes / m.problem.compulsory_bytes for _, m in near]
    pytorch = max(_mean([gap for gap, _ in near], scaled), min(m.pytorch for m in known))
    return pytorch / min(m.kernels[kernel] for m in known if kernel in m.kernels)


def _mean(gaps: Sequence[float], values: Sequence[float]) -> float:
    """Return the geometric mean of values, those at the smaller gaps counting more."""
    weights = [1 / (0.25 + gap) ** 2 for gap in gaps]
    total = math.fsum(w * math.log(value) for w, value in zip(weights, values, strict=True))
    return math.exp(total / math.fsum(weights))


def _without_measurements(
    problem: Problem, dtype: str, tf32: bool, ours: Collection[str]
) -> Choice:
    """Choose where nothing similar was measured: PyTorch's own, unless physics is plain.

    It is plain in float32 without TF32 for groups of few channels: moving the data is all that
    takes time, PyTorch is known to take ten times that (pytorch/pytorch#95604, #47341), and a
    kernel that is no rung is made for it.
    """
    intensity = problem.flops / max(1, problem.compulsory_bytes)
    special = [name for name in FOR_FEW_CHANNELS if name in ours]
    if (
        special
        and dtype == "float32"
        and not tf32
        and problem.groups > 1
        and intensity < _MEMORY_BOUND
    ):
        return Choice(
            special[0],
            f"{_NOTHING_SIMILAR}, but memory is the limit of so few channels in a group, "
            "which this kernel is made for and PyTorch's own is far from",
        )
    return Choice(PYTORCH, _NOTHING_SIMILAR)


# ---- How good the rule is ------------------------------------------------------------------------


@dataclass(frozen=True)
class LeaveOneOut:
    """How the rule for similar problems does on problems that were measured.

    Attributes
    ----------
    losses
        Each measurement, what was chosen by the other problems', and by how much that is slower
        than the fastest: 0.03 is 3 % slower.
    """

    losses: tuple[tuple[Measurement, Choice, float], ...]

    def with_similar(self) -> LeaveOneOut:
        """Return those of them for which something similar had been measured.

        For the others there was nothing to go by, and PyTorch's own computes nearly all of them:
        gains are missed, and nothing is lost.
        """
        return LeaveOneOut(
            tuple(loss for loss in self.losses if not loss[1].reason.startswith(_NOTHING_SIMILAR))
        )

    def share_above(self, loss: float = 0.03) -> float:
        """Return the share of the measurements whose choice loses more than `loss`."""
        lost = sum(1 for _, _, value in self.losses if value > loss)
        return lost / len(self.losses) if self.losses else 0.0

    def share_slower(self, loss: float = 0.03) -> float:
        """Return the share whose choice is slower than PyTorch by more than `loss`: the worst."""
        slower = sum(1 for m, choice, _ in self.losses if m.ratio(choice.kernel) < 1 - loss)
        return slower / len(self.losses) if self.losses else 0.0

    def summary(self, most: int = 10) -> str:
        """Return both shares, and the choices that lose most."""
        lines = [
            f"of {len(self.losses)} measurements, chosen by those of other problems: "
            f"{100 * self.share_above():.1f} % lose more than 3 % against the fastest, "
            f"{100 * self.share_slower():.1f} % against PyTorch"
        ]
        similar = self.with_similar()
        if len(similar.losses) < len(self.losses):
            lines.append(
                f"of the {len(similar.losses)} for which something similar was measured: "
                f"{100 * similar.share_above():.1f} % and {100 * similar.share_slower():.1f} %"
            )
        worst = sorted(self.losses, key=lambda item: -item[2])[:most]
        for measurement, choice, loss in worst:
            if loss > 0.03:
                dtype, last, tf32 = measurement.form
                form = " ".join([dtype, *["TF32"] * tf32, *["channels_last"] * last])
                p = measurement.problem
                lines.append(
                    f"  {100 * loss:6.1f} %  {choice.kernel} for {measurement.best()}: {form}, "
                    f"{list(p.input_shape)} * {list(p.weight_shape)}, stride {p.stride}, "
                    f"groups {p.groups}"
                )
        return "\n".join(lines)


def leave_one_out(table: Table) -> LeaveOneOut:
    """Choose for each measurement of a table by those of all other problems.

    Parameters
    ----------
    table
        What was measured. Other forms of the same problem are left out with it.

    Returns
    -------
    LeaveOneOut
    """
    losses = []
    for one in table.measurements:
        others = tuple(m for m in table.measurements if m.problem != one.problem)
        rest = Table(table.gpu, table.compute_capability, table.software, table.date, others)
        choice = choose_by_table(rest, one.problem, *one.form, tuple(one.kernels))
        loss = one.seconds(choice.kernel) / one.seconds(one.best()) - 1
        losses.append((one, choice, loss))
    return LeaveOneOut(tuple(losses))


# ---- For a person --------------------------------------------------------------------------------


def explain(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Choice:
    """Say which kernel `convt_lab.conv_transpose2d` would run for these arguments, and why.

    Nothing is computed, but where autotuning is on and the problem is new, it is measured, as the
    call itself would do.

    Parameters
    ----------
    input
        [N, C_in, H, W] or [C_in, H, W].
    weight
        [C_in, C_out/groups, KH, KW].
    bias
        [C_out], or None.
    stride, padding, output_padding, groups, dilation
        As PyTorch's.

    Returns
    -------
    Choice
        Its ``kernel`` is ``"pytorch"`` or a key of `convt_lab.stages.kernels`; as a string it is a
        sentence.

    Raises
    ------
    ProblemError, TypeError
        If the arguments describe no legal problem.
    ValueError
        If ``CONVT_AUTOTUNE`` is neither 0 nor 1.

    Examples
    --------
    >>> print(explain(torch.ones(1, 2, 5, 5), torch.ones(2, 3, 4, 4)))
    PyTorch's own: the tensors are on cpu, and our kernels run on CUDA GPUs
    """
    from convt_lab import plan  # which imports this module
    from convt_lab.library import dtype_under_autocast

    check_tensors(input, weight, bias)
    shape = (1, *input.shape) if input.dim() == 3 else input.shape
    problem = Problem.from_shapes(
        tuple(shape),
        tuple(weight.shape),
        None if bias is None else tuple(bias.shape),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
    )
    tensors = [t for t in (input, weight, bias) if t is not None]
    kind = input.device.type
    is_cast = torch.is_autocast_enabled(kind)
    dtypes = {dtype_under_autocast(t, kind) if is_cast else t.dtype for t in tensors}
    devices = {t.device for t in tensors}
    if len(dtypes) > 1 or len(devices) > 1:
        found = ", ".join(sorted(map(str, dtypes | devices)))
        return Choice(PYTORCH, f"the tensors are not of one dtype and device ({found})")
    is_last = False
    if kind == "cuda":
        batched = input.unsqueeze(0) if input.dim() == 3 else input
        is_last = plan._output_format(batched, weight, bias, problem) == torch.channels_last
    choice = choose(
        problem,
        *dtypes,
        input.device,
        channels_last=is_last,
        tf32=torch.backends.cudnn.conv.fp32_precision == "tf32",
    )
    if choice.kernel in plan.unbuildable:
        return Choice(PYTORCH, f"{choice.kernel} ({choice.reason}) can't be built here")
    return choice


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
