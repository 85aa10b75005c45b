"""The exercises of the chapter on a real network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from convt_lab import decoder_record, records
from convt_lab.exercises.cuda import KernelExercise, Launch
from convt_lab.exercises.exercise import first_wrong
from convt_lab.exercises.python import FunctionExercise
from convt_lab.module import ConvTranspose2d

__all__ = ["EXERCISES"]


# ---- Amdahl's law ------------------------------------------------------------------------------


def _judge_needed(function: Callable) -> tuple[str | None, str]:
    record = decoder_record.load(records.FOLDER / "nvidia-h200-decoder.json")
    asked = 0
    for mode in record.modes:
        for a_pass in ("inference", "training"):
            limit = mode.limit(a_pass)
            share = 1 - 1 / limit
            for wanted in (1.05, 1.5, 2.0, 2.5):
                found = function(share, wanted)
                asked += 1
                case = f"{mode.name}, {a_pass}, a share of {share:.3f}, wanted {wanted:g}"
                if wanted > limit:
                    if found is not None:
                        return (
                            f"{case}: {found:.3f}, but with no time at all for that part the whole "
                            f"is {limit:.3f} times as fast, so it must be None"
                            if isinstance(found, Real)
                            else f"{case}: {found!r} should be None",
                            "",
                        )
                    continue
                if not isinstance(found, Real) or not found > 0:
                    return f"{case}: {found!r} is no speed-up", ""
                reached = decoder_record.amdahl([(share, found)])
                if not abs(reached - wanted) <= 1e-6 * wanted:
                    return (
                        f"{case}: with a part {found:.3f} times as fast the whole is "
                        f"{reached:.3f} times as fast",
                        "",
                    )
    return None, f"{asked} questions about the chapter's network"


# ---- The swap ----------------------------------------------------------------------------------


class _Louder(torch.nn.ConvTranspose2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _layer(**settings: object) -> torch.nn.ConvTranspose2d:
    return torch.nn.ConvTranspose2d(4, 4, 3, **settings)


def _is_swapped(layer: torch.nn.Module) -> bool:
    return type(layer) is ConvTranspose2d


def _settings(swap: Callable) -> str | None:
    layers = [
        _layer(stride=2, padding=1, output_padding=1),
        _layer(groups=2, bias=False),
        _layer(dilation=2),
    ]
    model = torch.nn.Sequential(layers[0], torch.nn.Sequential(torch.nn.ReLU(), *layers[1:]))
    x = torch.rand(1, 4, 5, 6)
    keys, before = list(model.state_dict()), model(x)
    if swap(model, ConvTranspose2d) is not model:
        return "it must return the model that it was given"
    for name in ("0", "1.1", "1.2"):
        if not _is_swapped(model.get_submodule(name)):
            return f"the layer {name!r} is not swapped"
    if list(model.state_dict()) != keys:
        return "the keys of its state_dict have changed"
    after = model(x)
    if after.shape != before.shape or not torch.equal(after, before):
        return "it computes something else than before: a setting or a weight is lost"
    return None


def _optimizer(swap: Callable) -> str | None:
    model = torch.nn.Sequential(_layer())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    swap(model, ConvTranspose2d)
    held = optimizer.param_groups[0]["params"]
    if not all(any(p is q for q in held) for p in model.parameters()):
        return (
            "the swapped layer has Parameters of its own, and the optimizer goes on changing those "
            "that nobody uses any more"
        )
    return None


def _hooks(swap: Callable) -> str | None:
    model = torch.nn.Sequential(_layer())
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    swap(model, ConvTranspose2d)
    model(torch.rand(1, 4, 5, 5))
    return None if seen else "a hook that was on the layer is no longer called"


def _mode(swap: Callable) -> str | None:
    model = torch.nn.Sequential(_layer()).eval()
    swap(model, ConvTranspose2d)
    if model[0].training:
        return "the model is in eval mode, and the swapped layer is in training mode"
    return None


def _twice(swap: Callable) -> str | None:
    layer = _layer()
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Sequential(layer))
    swap(model, ConvTranspose2d)
    if model[0] is not model[2][0]:
        return "one layer has become two, which train apart from each other"
    return None if _is_swapped(model[0]) else "the layer is not swapped"


def _only_a_layer(swap: Callable) -> str | None:
    layer = swap(_layer(), ConvTranspose2d)
    return None if _is_swapped(layer) else "it is not swapped"


def _subclass(swap: Callable) -> str | None:
    model = torch.nn.Sequential(_Louder(4, 4, 3))
    swap(model, ConvTranspose2d)
    if type(model[0]) is not _Louder:
        return "it must be left alone: its forward does more, and would no longer do it"
    return None


def _parametrized(swap: Callable) -> str | None:
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(_layer()))
    kind = type(model[0])
    swap(model, ConvTranspose2d)
    if type(model[0]) is not kind:
        return "it must be left alone: its weight is computed at each call"
    return None


_MODELS: dict[str, Callable] = {
    "A model of three layers": _settings,
    "A model with an optimizer": _optimizer,
    "A layer with a hook": _hooks,
    "A model in eval mode": _mode,
    "A layer that is used twice": _twice,
    "A model that is a layer and nothing more": _only_a_layer,
    "A layer of a subclass": _subclass,
    "A layer with weight_norm": _parametrized,
}


def _judge_swap(function: Callable) -> tuple[str | None, str]:
    wrong = []
    for name, examine in _MODELS.items():
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                found = examine(function)
        except Exception as error:  # the learner's own: told, not raised
            found = f"it raises {type(error).__name__}: {str(error).splitlines()[0].rstrip(':')}"
        if found:
            wrong.append(f"{name}: {found}.")
    if wrong:
        return "\n".join(wrong), ""
    return None, f"{len(_MODELS)} models go on as before"


# ---- The check ---------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]

#: Of results with one rounding of float32, relative in the Euclidean norm; and with TF32's, say.
FINE, COARSE = 3e-7, 1e-2


def _exact() -> Tensors:
    generator = np.random.default_rng(0)
    return {
        "scores": generator.standard_normal((2, 5, 8, 8)),
        "loss": np.array(1.25),
        "up1.weight": generator.standard_normal((6, 4, 2, 2)),
        "up1.bias": 1e-9 * generator.standard_normal(4),
    }


def _with_errors(relative: float, seed: int) -> Tensors:
    """Results in float32, each with an error of that size."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, value in _exact().items():
        noise = generator.standard_normal(value.shape)
        size = relative * np.linalg.norm(value) / np.linalg.norm(noise)
        found[name] = np.asarray(value + size * noise, dtype=np.float32)
    return found


def _comparisons() -> Iterator[tuple[str, Tensors, Tensors, bool, str]]:
    """Yield what is compared, results before and after, whether they are as good, and why."""
    fine = _with_errors(FINE, 1)
    yield "float32, rounded otherwise", fine, _with_errors(FINE, 2), True, "the errors are alike"
    yield (
        *("bfloat16, rounded otherwise", _with_errors(COARSE, 1), _with_errors(COARSE, 2), True),
        "they differ from each other by more than from float64, and one is as good as the other",
    )
    better = _with_errors(COARSE, 1), _with_errors(FINE, 2), True
    yield "bfloat16 before, float32 after", *better, "the new errors are smaller"
    lucky = {**fine, "loss": np.float32(1.25)}
    lucky_after = {**fine, "loss": np.nextafter(np.float32(1.25), np.float32(2))}
    yield (
        *("a loss that was exact by luck, and is one rounding off now", lucky, lucky_after, True),
        "nothing in float32 can promise more",
    )
    yield (
        *("a layer that has lost digits", fine, _with_errors(5e-6, 2), False),
        "errors are many times those before, if still small",
    )
    tiny = {**fine, "up1.bias": np.zeros_like(fine["up1.bias"])}
    yield (
        *("a gradient of small values that is zero now", fine, tiny, False),
        "all of that gradient is wrong, however small it is",
    )
    scaled = {**fine, "up1.weight": 2 * fine["up1.weight"]}
    yield "a gradient that is twice what it should be", fine, scaled, False, "it is wrong"
    poisoned = {name: value.copy() for name, value in fine.items()}
    poisoned["scores"][0, 0, 0, 0] = np.nan
    yield "a NaN among the scores", fine, poisoned, False, "NaN is never right"
    yield "a NaN before and after", poisoned, poisoned, False, "NaN is never right"
    less = {name: value for name, value in fine.items() if name != "up1.weight"}
    yield "a gradient that is missing", fine, less, False, "a layer no longer learns"
    none = {**fine, "up1.weight": None}
    yield "a gradient that is None", fine, none, False, "a layer no longer learns"


def _judge_as_good(function: Callable) -> tuple[str | None, str]:
    wrong, count = [], 0
    for what, before, after, is_good, why in _comparisons():
        count += 1
        try:
            found = function(before, after, _exact())
        except Exception as error:  # the learner's own: told, not raised
            wrong.append(f"{what}: it raises {type(error).__name__}: {error}")
            continue
        if not isinstance(found, bool | np.bool_):
            return f"{what}: it returns {found!r}, and should return True or False", ""
        if found != is_good:
            wrong.append(f"{what}: yours says {bool(found)}, but {why}")
    return ("\n".join(wrong), "") if wrong else (None, f"{count} pairs of results, judged rightly")


# ---- Bilinear interpolation --------------------------------------------------------------------


def _judge_bilinear(function: Callable) -> tuple[str | None, str]:
    factors = (1, 2, 3, 4, 5, 8)
    for factor in factors:
        weights = np.asarray(function(factor), dtype=np.float64)
        taps = 2 * factor - factor % 2
        if weights.shape != (taps,):
            return (
                f"factor {factor}: {taps} weights are wanted, not shape {list(weights.shape)}",
                "",
            )
        x = torch.from_numpy(np.random.default_rng(factor).standard_normal((1, 1, 6)))
        exact = F.interpolate(x, scale_factor=factor, mode="linear")[0, 0]
        w = torch.from_numpy(weights)[None, None]
        y = F.conv_transpose1d(x, w, stride=factor, padding=factor // 2)[0, 0]
        inside = slice(factor, -factor)  # a neighbour on both sides
        wrong = first_wrong(y[inside].numpy(), exact[inside].numpy(), 1e-12, "the inner output")
        if wrong:
            return f"factor {factor}: {wrong}", ""
    return None, f"as interpolation does it, for factors from {factors[0]} to {factors[-1]}"


def _images() -> Sequence[Launch]:
    launches = []
    for height, width in ((1, 1), (3, 5), (9, 20)):
        generator = np.random.default_rng(width)
        x = np.abs(generator.standard_normal((height, width))).astype(np.float32)
        exact = F.interpolate(
            torch.from_numpy(x).double()[None, None], scale_factor=2, mode="bilinear"
        )[0, 0].numpy()
        y = np.full(exact.shape, np.nan, np.float32)
        launches.append(
            Launch(
                f"an image of {height}×{width}",
                math.ceil(y.size / 64),
                64,
                (x, y, height, width),
                1,
                exact,
                exact,  # positive: it is its own scale
            )
        )
    return launches


EXERCISES = (
    FunctionExercise(
        name="decoder.1",
        function="needed",
        text='''
def needed(share, wanted):
    """How many times as fast a part must be, for the whole to be `wanted` times.

    share: of the time that the part takes. None if no speed-up of it is enough.
    """
    return 1 + (wanted - 1) / share
''',
        edits={
            "    return 1 + (wanted - 1) / share\n": (
                "    left = 1 / wanted - (1 - share)  # of the time, for the part\n"
                "    return share / left if left > 0 else None\n"
            )
        },
        judge=_judge_needed,
        hints=(
            "Think in times, not in speed-ups. Let the whole take one second; how long may it take "
            "afterwards?",
            "Afterwards it may take `1 / wanted`, and the rest takes `1 - share`, as before. What "
            "is left for the part?",
            "The part takes `share` now and may take `1 / wanted - (1 - share)`. If that is not "
            "above zero, nothing is enough.",
        ),
        why="Amdahl's law, solved for the part: the whole may take `1 / wanted`, and the rest "
        "still takes `1 - share`. What is left has to hold the part. Where nothing is left, no "
        "kernel helps, and that is known before one is written. The start adds speed-ups, which "
        "are ratios; only times can be added.",
    ),
    FunctionExercise(
        name="decoder.2",
        function="swap",
        text='''
import torch


def swap(model, layer_class):
    """Let the transposed convolutions of a model compute as layer_class does."""
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, torch.nn.ConvTranspose2d):
                new = layer_class(
                    old.in_channels,
                    old.out_channels,
                    old.kernel_size,
                    old.stride,
                    old.padding,
                    old.output_padding,
                    old.groups,
                    old.bias is not None,
                    old.dilation,
                )
                new.load_state_dict(old.state_dict())
                setattr(parent, name, new)
    return model
''',
        whole='''
import torch


def swap(model, layer_class):
    """Let the transposed convolutions of a model compute as layer_class does."""
    for module in model.modules():
        if type(module) is torch.nn.ConvTranspose2d:
            module.__class__ = layer_class
    return model
''',
        judge=_judge_swap,
        hints=(
            "Everything that is lost hangs on the old object: its Parameters, its hooks, its mode, "
            "its other places in the model. Must there be a new one?",
            "A new class with the same attributes needs no new object: `module.__class__ = "
            "layer_class`.",
            "And `isinstance` says yes to subclasses, which are more than the class. Ask for "
            "`type(module) is torch.nn.ConvTranspose2d`.",
        ),
        why="`layer_class` differs from PyTorch's in its `forward` alone, so the object can stay "
        "and change its class. Everything that holds the layer goes on holding it: the optimizer, "
        "the hooks, the model's other places. A layer that is more than the plain class is left "
        "alone. `weight_norm` makes a subclass too, by which it computes the weight; remove the "
        "norm first, as one does for inference anyway. In a `forward` of your own, call "
        "`convt_lab.conv_transpose2d`.",
    ),
    FunctionExercise(
        name="decoder.3",
        function="as_good",
        text='''
def as_good(before, after, exact):
    """Whether the results after a swap are as good as those before it.

    Each is a dict of arrays, by name: scores, loss, gradients; exact is of float64.
    """
    return all(np.allclose(before[name], after[name]) for name in before)
''',
        whole='''
def as_good(before, after, exact):
    """Whether the results after a swap are as good as those before it."""

    def error(found, name):
        if found.get(name) is None:
            return np.nan
        return np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])

    def is_good(name):
        # A few roundings of float32 are nobody's fault. NaN is not less than anything.
        return error(after, name) <= max(1e-6, 2 * error(before, name))

    return all(is_good(name) for name in exact)
''',
        judge=_judge_as_good,
        hints=(
            "Where two results differ, neither is the truth. What do you have `exact` for?",
            "For each name compare two errors, each relative to float64 in the norm: the error "
            "after the swap with the one before it. `np.allclose` calls small values equal, "
            "whatever they are.",
            "Go through the names of `exact`, so that nothing can be missing. Allow twice the "
            "error before, or a few roundings of float32 (`1e-6`, say), whichever is more, and "
            "write the comparison so that NaN fails it.",
        ),
        why="The question is not whether the two agree but whether the errors are alike, and that "
        "takes a third result to judge by. Each tensor is judged by itself, relative to its own "
        "norm, so that a small one is not lost among large ones. `error <= allowed` is false for "
        "NaN; `not error > allowed` would let it pass.",
    ),
    FunctionExercise(
        name="decoder.4",
        function="bilinear",
        text='''
def bilinear(factor):
    """The weights of a transposed convolution that interpolates, in one dimension.

    It has stride `factor`, 2 * factor - factor % 2 taps and a padding of factor // 2.
    """
    taps = 2 * factor - factor % 2
    return np.ones(taps) / 2
''',
        edits={
            "    return np.ones(taps) / 2\n": (
                "    centre = (taps - 1) / 2\n"
                "    return 1 - np.abs(np.arange(taps) - centre) / factor\n"
            )
        },
        judge=_judge_bilinear,
        hints=(
            "The stamp of one input is what interpolation makes of an image with a single one in "
            "it: a tent. Where is its top, and where does it reach zero?",
            "The top is in the middle of the taps, between two of them if they are even in number. "
            "A neighbour's top is `factor` outputs away, and there this tent is zero.",
            "`1 - abs(k - centre) / factor`, with the centre at `(taps - 1) / 2`.",
        ),
        why="Between two inputs the value goes from one to the other in a straight line, so each "
        "input's weight falls in a straight line, to zero at its neighbour. With an even factor no "
        "output lies on an input, and the top is between two taps. `up3` and `up4` begin with the "
        "product of two such tents, for rows and columns.",
    ),
    KernelExercise(
        name="decoder.5",
        kernel="enlarge",
        text="""
// Bilinear interpolation by a factor of two: x [height, width], y [2 height, 2 width].
// An output lies a quarter of an input's size from the nearest one, and three quarters
// from the next.
__global__ void enlarge(const float* x, float* y, int height, int width) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= 4 * height * width) return;
  const int oh = index / (2 * width), ow = index % (2 * width);
  float sum = 0.0f;
  for (int kh = 0; kh < 2; ++kh) {
    for (int kw = 0; kw < 2; ++kw) {
      const int h = (oh + 1) / 2 - kh, w = (ow + 1) / 2 - kw;
      if (h < 0 || h >= height || w < 0 || w >= width) continue;
      const float weight_h = kh == oh % 2 ? 0.75f : 0.25f;
      const float weight_w = kw == ow % 2 ? 0.75f : 0.25f;
      sum += weight_h * weight_w * x[h * width + w];
    }
  }
  y[index] = sum;
}
""",
        launches=_images,
        edits={
            "      const int h = (oh + 1) / 2 - kh, w = (ow + 1) / 2 - kw;\n"
            "      if (h < 0 || h >= height || w < 0 || w >= width) continue;\n": (
                "      const int h = min(max((oh + 1) / 2 - kh, 0), height - 1);\n"
                "      const int w = min(max((ow + 1) / 2 - kw, 0), width - 1);\n"
            )
        },
        hints=(
            "In the first output, how much do the weights of the inputs that exist add up to?",
            "`F.interpolate` takes the outermost input again where there is none beyond it.",
            "Don't leave the input out; bring its index back into the image, with `min` and `max`.",
        ),
        why="The start does what `up3` and `up4` do: beyond the image there are no stamps, and the "
        "outermost outputs miss a quarter of their weights, those in the corners more. A constant "
        "image gets darker rims. `F.interpolate` repeats the last pixel instead. Inside, the two "
        "are the same, so a swap of one for the other would be wrong at the rims alone, where "
        "nobody looks. A transposed convolution can't repeat it, whatever its weights are: every "
        "input has the same stamp, wherever it lies.",
    ),
)
