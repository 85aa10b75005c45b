"""The exercises of the chapter that measures the operator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convt_lab import decoder_record, dispatch, measurements, operator_record, records, reference
from convt_lab.exercises.cuda import Budget, KernelExercise, Launch
from convt_lab.exercises.python import FunctionExercise
from convt_lab.measurements import Measurement
from convt_lab.operator_record import FORMS, PYTORCH
from convt_lab.problem import Problem

__all__ = ["EXERCISES"]

#: Of a value's two halves, in units of a float32's rounding.
MISSING = 4.0

#: How far a rule may be behind the fastest kernel: in the mean, and on any problem.
MEAN, WORST = 1.05, 1.5

#: How often a guess may be slower than PyTorch's own, and how much faster it must be in the mean.
SLOWER, FASTER = 0.05, 1.7
#: A choice that is slower by less than this counts as none.
NOISE = 0.03


def _judge_halves(function: Callable) -> tuple[str | None, str]:
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(4096).astype(np.float32)
    kinds = {
        "normal": normal,
        "very large": normal * np.float32(1e30),
        "very small": normal * np.float32(1e-30),
        "up to a thousand times apart": normal * 10.0 ** -(np.arange(4096) % 4).astype(np.float32),
        "zero": np.zeros(8, np.float32),
    }
    worst = 0.0
    for kind, values in kinds.items():
        with np.errstate(all="ignore"):  # what overflows is told
            high, low, scale = function(values.copy())
        for name, part in (("high", high), ("low", low)):
            if getattr(part, "dtype", None) != np.float16 or part.shape != values.shape:
                return f"{kind} values: {name} must be float16 of shape {list(values.shape)}", ""
            if not np.isfinite(part).all():
                at = int(np.argmin(np.isfinite(part)))
                return f"{kind} values: {name} of {values[at]:.6g} is {part[at]}", ""
        if not (0 < scale < math.inf and math.frexp(float(scale))[0] == 0.5):
            return f"{kind} values: scale={scale!r} is no power of two, so dividing rounds", ""
        found = (high.astype(np.float64) + low.astype(np.float64) / 2048) / float(scale)
        error = np.abs(found - values)
        wrong = ~(error <= MISSING * reference.UNIT_ROUNDOFF * np.abs(values.astype(np.float64)))
        if wrong.any():
            at = int(np.argmax(wrong))
            return (
                f"{kind} values: {values[at]:.9g} is split into {high[at]} and {low[at]} with "
                f"scale {scale:g}, which is {found[at]:.9g}; {int(wrong.sum()):,} of "
                f"{wrong.size:,} miss more than {MISSING:g} units of a float32's rounding",
                "",
            )
        if kind != "zero":
            units = error / (reference.UNIT_ROUNDOFF * np.abs(values.astype(np.float64)))
            worst = max(worst, float(units.max()))
    return None, f"{len(kinds)} kinds of values, and at most {worst:.2f} units are missing"


def _measured() -> list[tuple[str, Problem, Mapping[str, float]]]:
    """Name, problem and seconds by kernel in float32: the record's shapes, the decoder's layers."""
    record = operator_record.load(records.FOLDER / "nvidia-h200-operator.json")
    found = []
    for case in record.of_form(FORMS[0]):
        seconds = {name: result.seconds for name, result in case.kernels.items()}
        found.append((case.shape, case.problem, {PYTORCH: case.pytorch.seconds, **seconds}))
    layers = decoder_record.load(records.FOLDER / "nvidia-h200-decoder.json").mode("float32").alone
    for name, alone in layers.items():
        found.append((f"the decoder's {name}", alone.problem, alone.seconds))
    return found


def _judge_rule(function: Callable) -> tuple[str | None, str]:
    behind = []
    measured = _measured()
    for name, problem, seconds in measured:
        kernel = function(problem, frozenset(seconds))
        if kernel not in seconds:
            return (
                f"{name}: it returns {kernel!r}; this problem is taken by "
                f"{', '.join(sorted(seconds))}",
                "",
            )
        behind.append((seconds[kernel] / min(seconds.values()), name, kernel))
    mean = math.exp(math.fsum(math.log(times) for times, _, _ in behind) / len(behind))
    lines = [
        f"in the mean at most {MEAN:g} times as long as the fastest; yours: {mean:.2f}",
        f"on any of {len(measured)} problems at most {WORST:g} times; yours: {max(behind)[0]:.2f}",
    ]
    if mean <= MEAN and max(behind)[0] <= WORST:
        return None, "\n".join(lines)
    for times, name, kernel in sorted(behind, reverse=True)[:5]:
        if times > MEAN:
            lines.append(f"{name}: {kernel}, {times:.2f} times")
    return "\n".join(lines), ""


@functools.cache
def _with_neighbours() -> list[tuple[Measurement, tuple[tuple[float, dict[str, float]], ...]]]:
    """Each measurement that has similar ones, with these: distance, and ratio by kernel."""
    found = []
    for table in measurements.load():
        for one in table.measurements:
            near = []
            for other in table.measurements:
                if other.form != one.form or other.problem == one.problem:
                    continue
                distance = dispatch.distance(one.problem, other.problem)
                ratios = {name: other.ratio(name) for name in other.kernels if name in one.kernels}
                if distance <= dispatch.RADIUS and ratios:
                    near.append((distance, ratios))
            if near:
                found.append((one, tuple(sorted(near, key=lambda pair: pair[0]))))
    return found


def _judge_guess(function: Callable) -> tuple[str | None, str]:
    gains = []
    for one, near in _with_neighbours():
        kernel = function([(distance, dict(ratios)) for distance, ratios in near])
        known = {name for _, ratios in near for name in ratios}
        if kernel not in (known | {PYTORCH}):
            names = ", ".join(sorted(known))
            return f"it returns {kernel!r}, and should return {PYTORCH!r} or one of {names}", ""
        gains.append(one.ratio(kernel))
    slower = sum(gain < 1 - NOISE for gain in gains) / len(gains)
    mean = math.exp(math.fsum(map(math.log, gains)) / len(gains))
    text = "\n".join(
        (
            f"{len(gains)} problems, each guessed from the others",
            f"slower than PyTorch: at most {SLOWER:.0%}; yours: {slower:.1%}",
            f"in the mean at least {FASTER:g} times as fast; yours: {mean:.2f}",
        )
    )
    return (None, text) if slower <= SLOWER and mean >= FASTER else (text, "")


def _enlarged() -> Sequence[Launch]:
    launches = []
    generator = np.random.default_rng(0)
    for channels, size in ((1, 1), (3, 37), (2, 512)):
        x = generator.standard_normal((channels, size)).astype(np.float32)
        w = generator.standard_normal((channels, 4)).astype(np.float32)
        exact, scale = np.zeros((2, channels, 2 * size + 2))
        for k in range(4):
            taps = w[:, k, None].astype(np.float64)
            exact[:, k : k + 2 * size : 2] += x * taps
            scale[:, k : k + 2 * size : 2] += np.abs(x * taps)
        y = np.full((channels, 2 * size), np.nan, np.float32)
        launches.append(
            Launch(
                f"{channels} channels of {size} inputs",
                (math.ceil(2 * size / 64), channels),
                64,
                (x, w, y, size),
                2,
                exact[:, 1:-1],
                scale[:, 1:-1],
            )
        )
    return launches


EXERCISES = (
    FunctionExercise(
        name="operator.1",
        function="halves",
        text='''
def halves(values):
    """Two float16 for each float32, and a scale.

    (high + low / 2048) / scale is the value, nearly.
    """
    scale = 1.0
    scaled = values * np.float32(scale)
    high = scaled.astype(np.float16)
    low = ((scaled - high.astype(np.float32)) * 2048).astype(np.float16)
    return high, low, scale
''',
        edits={
            "    scale = 1.0\n": (
                "    largest = np.abs(values).max()\n"
                "    exponent = np.frexp(largest)[1] if largest > 0 else 0\n"
                "    scale = 2.0 ** (15 - exponent)\n"
            )
        },
        judge=_judge_halves,
        hints=(
            "What is the largest float16, and what becomes of a float32 beyond it? What becomes of "
            "one that is far below the smallest?",
            "Multiply all values by one number that brings the largest of them near the end of "
            "float16's range. By a power of two nothing is rounded.",
            "`np.frexp(largest)[1]` is the exponent e of a value below `2.0**e`. Bring it to "
            "fifteen, and think of values that are all zero.",
        ),
        why="Float16 ends at `65504`, so the scale brings the largest value between `2**14` and "
        "`2**15`. The first half loses what lies below its eleven digits. The second keeps it, "
        "magnified, so that it does not fall among the smallest float16, which have few digits. "
        "One scale serves values that are not too far apart. In `hopper` a chunk of inputs has "
        "one, and what is too small beside the rest of its chunk makes its outputs fall back to "
        "the definition.",
    ),
    FunctionExercise(
        name="operator.2",
        function="choose",
        text='''
def choose(problem, kernels):
    """The kernel for a problem in float32, by rules of your own.

    problem: a `Problem`, with in_channels, out_channels, groups, kernel_size,
    stride and the rest.
    kernels: the names of those that take it, and "pytorch".
    """
    if "hopper" in kernels:
        return "hopper"
    return "pytorch"
''',
        whole='''
def choose(problem, kernels):
    """The kernel for a problem in float32."""
    channels_in = problem.in_channels // problem.groups
    channels_out = problem.out_channels // problem.groups
    if "one_channel" in kernels:  # it takes nothing else
        return "one_channel"
    if min(problem.stride) > max(problem.kernel_size):  # most outputs get no stamp
        return "pytorch"
    if problem.groups > 1 and channels_in <= 8:
        return "few_channels"
    is_strided = max(problem.stride) > 1
    if min(channels_in, channels_out) < 16:
        return "tensor_core_narrow" if is_strided else "winograd"
    if min(channels_in, channels_out) < 32:
        return "tensor_core_narrow"
    return "hopper" if "hopper" in kernels else "pytorch"
''',
        judge=_judge_rule,
        hints=(
            "Look at the problems that the check names: how many channels does a group have on "
            "either side, and is there a stride?",
            "The list below *Which kernel, and why* is nearly a program. Begin with what is most "
            "special: `one_channel` takes few problems, and is good at all of them.",
            "Groups of few channels go to `few_channels`; few channels on one side to "
            "`tensor_core_narrow` with a stride, and to `winograd` without. One problem has a "
            "stride larger than its kernel.",
        ),
        why="A handful of rules about channels, groups and stride comes close to the fastest, and "
        "picks the fastest for each of the decoder's layers, which are not in the chapter's table. "
        "What such rules can't know is where their borders lie on another GPU, or in another form. "
        "So the operator asks a table that a benchmark wrote, and nobody has to find the borders "
        "by hand.",
    ),
    FunctionExercise(
        name="operator.3",
        function="guess",
        text='''
def guess(near):
    """The kernel for a problem that nobody measured, or "pytorch".

    near: similar problems, the nearest first: (distance, {kernel: times as fast as
    PyTorch}), of the kernels that take the new problem.
    """
    distance, ratios = near[0]
    return max(ratios, key=ratios.get)
''',
        whole='''
def guess(near):
    """The kernel for a problem that nobody measured, or "pytorch"."""
    logarithms = {}
    for distance, ratios in near[:4]:
        for kernel, ratio in ratios.items():
            logarithms.setdefault(kernel, []).append(np.log(ratio))
    means = {kernel: np.exp(np.mean(of)) for kernel, of in logarithms.items()}
    best = max(means, key=means.get)
    return best if means[best] >= 1.2 else "pytorch"
''',
        judge=_judge_guess,
        hints=(
            "The start always takes one of ours, even where none was as fast as PyTorch. Where "
            "would you leave the problem to PyTorch?",
            "A single similar problem may be an odd one. Take a few, and the mean of each "
            "kernel's ratios: the geometric one, since these are ratios.",
            "Take the kernel with the best mean of the nearest four, if the mean is at least "
            "`1.2`. Without that margin the best of several uncertain means is too good to be "
            "true.",
        ),
        why="Two things help. The mean over a few neighbours evens out what is special about one "
        "of them. The margin is for a subtler error: the best of several uncertain estimates is "
        "more often too high than too low. It costs gains where a kernel is a little faster, and "
        "saves disappointments. The operator does the same, with nearer problems counting more, "
        "and with one more bound.",
    ),
    KernelExercise(
        name="operator.4",
        kernel="enlarge",
        text="""
// Depthwise, stride 2, four taps, padding 1: x [channels, size], w [channels, 4],
// y [channels, 2 size]. Tap k of input i adds to output 2 i + k - 1 of its channel.
// There is a thread for each output of a channel; it is all right to leave most of
// them without work.
__global__ void enlarge(const float* x, const float* w, float* y, int size) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x, channel = blockIdx.y;
  if (o >= 2 * size) return;
  float sum = 0.0f;
  for (int k = (o + 1) % 2; k < 4; k += 2) {
    const int i = (o + 1 - k) / 2;
    if (i < 0 || i >= size) continue;
    sum = fmaf(x[channel * size + i], w[channel * 4 + k], sum);
  }
  y[channel * 2 * size + o] = sum;
}
""",
        launches=_enlarged,
        budgets=(
            Budget("requests", most=80),
            Budget("requests", most=32, op="store", buffer="y"),
        ),
        whole="""
constexpr int INPUTS = 2;  // of a thread, with both outputs of each

// Depthwise, stride 2, four taps, padding 1: x [channels, size], w [channels, 4],
// y [channels, 2 size]. Output 2 i has tap 1 of input i and tap 3 of the one before;
// output 2 i + 1 has tap 2 of input i and tap 0 of the next one.
__global__ void enlarge(const float* x, const float* w, float* y, int size) {
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * INPUTS;
  const int channel = blockIdx.y;
  if (first >= size) return;
  const float4 taps = reinterpret_cast<const float4*>(w)[channel];
  float window[INPUTS + 2];
#pragma unroll
  for (int j = 0; j < INPUTS + 2; ++j) {
    const int i = first - 1 + j;
    window[j] = i >= 0 && i < size ? x[channel * size + i] : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < INPUTS; ++j) {
    if (first + j >= size) return;
    const float even = fmaf(window[j], taps.w, window[j + 1] * taps.y);
    const float odd = fmaf(window[j + 2], taps.x, window[j + 1] * taps.z);
    reinterpret_cast<float2*>(y)[channel * size + first + j] = make_float2(even, odd);
  }
}
""",
        hints=(
            "An input is needed for how many outputs? Let one thread own all of those that two "
            "neighbouring inputs own: the even and the odd phase together.",
            "Two inputs with both neighbours are a window of four, and the four taps of a channel "
            "are a `float4`. The sums of both phases are written out, without a loop over taps.",
            "An even output and the odd one after it are a `float2`. Rows have an even number of "
            "outputs, so it is aligned in each of them; a `float4` would not be.",
        ),
        why="An input that has been fetched serves the outputs of both phases, a window of four "
        "serves four outputs, and a pair is stored at once. That is what `one_channel` does, in "
        "two dimensions, for any stride and kernel. Memory is the limit of such layers, so what "
        "counts is how few requests bring each byte.",
    ),
)
