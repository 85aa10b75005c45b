"""Measures a network before and after its transposed convolutions are swapped, on a GPU.

    python tools/decoder_profile.py [--modes NAME...] [--batch N] [--output FILE]
    python tools/decoder_profile.py --trial --output FILE

The network is `convt_lab.decoder.SegmentationNet`; what is measured is told by
`convt_lab.decoder_record`. It takes about a minute, once the kernels are built. All modes together
are written to ``records/GPU-decoder.json``; a part of them, or another batch, only where
``--output`` says. ``--trial`` does everything once with a tiny network on the CPU, to see that it
works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from convt_lab import autotune, decoder_report, dispatch, measurements, records  # noqa: E402
from convt_lab.bench import _current_gpu  # noqa: E402
from convt_lab.decoder import (  # noqa: E402
    SegmentationNet,
    explained,
    outcome,
    problems_of,
    scenes,
)
from convt_lab.decoder_record import (  # noqa: E402
    CHOSEN_BY,
    MODES,
    NETWORK,
    PASSES,
    After,
    Alone,
    Chosen,
    DecoderRecord,
    Errors,
    Mode,
    Network,
    Pair,
    Profile,
    Run,
    Time,
    save,
)
from convt_lab.layer_profile import by_layer, labelled  # noqa: E402
from convt_lab.measure import RUNS, Clock, Repeats, median_times  # noqa: E402
from convt_lab.measurements import Measurement, Table  # noqa: E402
from convt_lab.module import replace_conv_transpose  # noqa: E402
from convt_lab.operator_record import PYTORCH, Cold  # noqa: E402
from convt_lab.problem import Problem  # noqa: E402
from convt_lab.tasks import cudnn_at_its_best  # noqa: E402

#: What a trial measures.
TRIAL = Network(classes=3, width=2, input_shape=(2, 3, 32, 48))

#: Passes that are profiled together, after as many that warm up.
PROFILED = 10

_ENQUEUED = 5  # passes of which the quickest to enqueue counts
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A mode, and where and how it is measured."""

    name: str
    device: str
    clock: Clock
    profiles: int = PROFILED
    runs: int = RUNS

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[MODES[self.name][0]]

    @property
    def allow_tf32(self) -> bool:
        return MODES[self.name][1]

    @property
    def channels_last(self) -> bool:
        return MODES[self.name][2] == "channels_last"

    def cudnn(self) -> AbstractContextManager[object]:
        """Let cuDNN compute as the mode says, forward and backward."""
        return cudnn_at_its_best(self.allow_tf32)

    def autocast(self) -> AbstractContextManager[object]:
        """Let the forward, and nothing else, compute in the mode's dtype."""
        is_on = self.dtype != torch.float32
        return torch.autocast(self.device, self.dtype) if is_on else nullcontext()

    def laid(self, value: nn.Module | Tensor) -> nn.Module | Tensor:
        """Bring images, or a model's parameters, into the mode's memory format."""
        is_last = self.channels_last
        return value.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)


# ---- The passes ----------------------------------------------------------------------------------


def passes_of(
    model: nn.Module, images: Tensor, labels: Tensor, setting: Setting
) -> dict[str, Callable[[], object]]:
    """Return by name what runs each of `PASSES` once."""

    def inference() -> Tensor:
        model.eval()
        with setting.cudnn(), torch.no_grad(), setting.autocast():
            return model(images)

    def training() -> Tensor:
        model.train()
        model.zero_grad(set_to_none=True)
        with setting.cudnn():
            with setting.autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

    return {"inference": inference, "training": training}


def profiled(
    model: nn.Module, runs: Mapping[str, Callable[[], object]], setting: Setting
) -> Profile:
    """Return the seconds by layer of each pass, the mean of some runs."""
    activities = [ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    found = {}
    for name in PASSES:
        for _ in range(setting.profiles):
            runs[name]()
        _wait(setting.device)
        with labelled(model), profile(activities=activities, acc_events=True) as profiler:
            for _ in range(setting.profiles):
                runs[name]()
            _wait(setting.device)
        layers = by_layer(profiler, setting.device)
        for half in ("forward", "backward"):
            found[name, half] = {
                layer: getattr(cost, half) / setting.profiles for layer, cost in layers.items()
            }
    return Profile(
        inference=found["inference", "forward"],
        forward=found["training", "forward"],
        backward=found["training", "backward"],
    )


def timed(
    before: Mapping[str, Callable[[], object]],
    after: Mapping[str, Callable[[], object]],
    setting: Setting,
) -> dict[str, Pair]:
    """Time each pass of two networks against each other."""
    pairs = {}
    for name in PASSES:
        both = {"before": before[name], "after": after[name]}
        timings = median_times(both, setting.clock, runs=setting.runs)
        enqueued = {
            which: min(setting.clock.repeat(run, 1).enqueue_seconds for _ in range(_ENQUEUED))
            for which, run in both.items()
        }
        times = [Time(Cold.of(timings[which]), enqueued[which]) for which in both]
        pairs[name] = Pair(*times)
    return pairs


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- The errors ----------------------------------------------------------------------------------


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    """Return `convt_lab.reference.relative_l2`, on the tensors' device; infinite for NaN."""
    actual, exact = actual.double(), exact.double()
    error, norm = (actual - exact).norm().item(), exact.norm().item()
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm if math.isfinite(error) else math.inf


def errors_of(
    model: nn.Module, images: Tensor, labels: Tensor, exact: Mapping[str, Tensor], setting: Setting
) -> Errors:
    """Compare a network with float64: the scores, the loss and every gradient."""
    model.train()
    with setting.cudnn():
        found = outcome(model, images, labels, setting.autocast)
    errors = {name: relative_l2(found[name], value) for name, value in exact.items()}
    scores, loss = errors.pop("scores"), errors.pop("loss")
    return Errors(scores, loss, errors)


# ---- The layers by themselves --------------------------------------------------------------------


def alone(
    problems: Mapping[str, Problem], setting: Setting, candidates: Callable[..., Mapping]
) -> dict[str, Alone]:
    """Time each layer's forward by itself: PyTorch's operator and every kernel that takes it."""
    found = {}
    for name, problem in problems.items():
        kernels = candidates(problem, setting.dtype, setting.channels_last, tf32=setting.allow_tf32)
        with setting.cudnn():
            seconds, failures = autotune.measure(
                problem,
                setting.dtype,
                torch.device(setting.device),
                setting.channels_last,
                kernels,
                setting.clock,
            )
        for kernel, error in failures.items():
            print(f"{setting.name}: {kernel} did not run for {name}: {error}", file=sys.stderr)
        found[name] = Alone(problem, dict(seconds))
    return found


def table_of(
    found: Mapping[str, Alone], setting: Setting, gpu: records.GPU, software: records.Software
) -> Table:
    """Return what was measured as a table that the operator can choose by."""
    dtype = MODES[setting.name][0]
    form = dtype, setting.channels_last, dtype == "float32" and setting.allow_tf32
    measured: dict[Problem, Measurement] = {}
    for one in found.values():
        kernels = {name: s for name, s in one.seconds.items() if name != PYTORCH}
        plain = measurements.without_bias(one.problem)
        measured[plain] = Measurement(plain, *form, one.seconds[PYTORCH], kernels)
    today = date.today().isoformat()
    return Table(gpu.name, gpu.compute_capability, software, today, tuple(measured.values()))


# ---- A mode --------------------------------------------------------------------------------------


def measure_mode(
    before: nn.Module,
    images: Tensor,
    labels: Tensor,
    exact: Mapping[str, Tensor],
    setting: Setting,
    gpu: records.GPU,
    software: records.Software,
    candidates: Callable[..., Mapping] = dispatch.candidates,
    on_step: Callable[[str], object] = lambda what: None,
) -> Mode:
    """Measure a network in one mode, before and after its layers are swapped.

    Parameters
    ----------
    before
        The network as PyTorch has it; it stays as it is.
    images, labels
        Its input, and the classes.
    exact
        What `outcome` gives in float64.
    setting
        The mode.
    gpu, software
        What it is measured on and with.
    candidates
        Gives our kernels, by name, that take a problem in a dtype and memory format.
    on_step
        Told what is done next.
    """
    before = setting.laid(copy.deepcopy(before))
    after = replace_conv_transpose(copy.deepcopy(before))
    images = setting.laid(images)

    on_step("the layers by themselves")
    found = alone(problems_of(before, images), setting, candidates)
    on_step("PyTorch's layers")
    old = passes_of(before, images, labels, setting)
    run = Run(
        errors_of(before, images, labels, exact, setting),
        profiled(before, old, setting),
    )
    tables = {
        # As if no layer of the network had been measured before: they are in the tables, too.
        "tables": measurements.without(
            measurements.load(), [layer.problem for layer in found.values()]
        ),
        "measurements": (table_of(found, setting, gpu, software),),
    }
    swapped = []
    for by in CHOSEN_BY:
        on_step(f"swapped layers, chosen by {by}")
        with dispatch.only_by(*tables[by]):
            with setting.cudnn(), setting.autocast():
                choices = explained(after, images)
            new = passes_of(after, images, labels, setting)
            swapped.append(
                After(
                    chosen_by=by,
                    choices={n: Chosen(c.kernel, c.reason) for n, c in choices.items()},
                    errors=errors_of(after, images, labels, exact, setting),
                    profile=profiled(after, new, setting),
                    times=timed(old, new, setting),
                )
            )
    return Mode(
        setting.name,
        *MODES[setting.name],
        layers=tuple(name for name, _ in before.named_children()),
        alone=found,
        before=run,
        after=tuple(swapped),
    )


def measure_all(
    names: Sequence[str],
    network: Network,
    gpu: records.GPU,
    software: records.Software,
    device: str,
    clock: Clock,
    profiles: int = PROFILED,
    runs: int = RUNS,
    seed: int = 0,
    candidates: Callable[..., Mapping] = dispatch.candidates,
) -> DecoderRecord:
    """Measure a network in some modes and return the record."""
    began = time.monotonic()
    torch.manual_seed(seed)
    model = SegmentationNet(network.classes, network.width).to(device)
    batch, _, height, width = network.input_shape
    images, labels = scenes(batch, height, width, network.classes, seed, device)
    print("float64")
    exact = outcome(copy.deepcopy(model).double(), images.double(), labels)
    modes = []
    for name in names:
        modes.append(
            measure_mode(
                model,
                images,
                labels,
                exact,
                Setting(name, device, clock, profiles, runs),
                gpu,
                software,
                candidates,
                on_step=partial(print, f"{name}:"),
            )
        )
        if device == "cuda":
            torch.cuda.empty_cache()
    return DecoderRecord(
        gpu=gpu,
        software=software,
        date=date.today().isoformat(),
        seed=seed,
        seconds=time.monotonic() - began,
        network=network,
        meaning=meaning(profiles, runs),
        modes=tuple(modes),
    )


def meaning(profiles: int, runs: int) -> dict[str, str]:
    """Return what the numbers of a record stand for, in words."""
    return {
        "cold": f"median of {runs} single passes by CUDA events, the L2 cache flushed before each, "
        "after warm-ups, in rounds of one pass before and one after",
        "profile": f"mean of {profiles} passes under torch.profiler, after as many without it; the "
        "durations of the kernels that a layer launched",
        "alone": "one call of the layer's operator in the mode's dtype on random inputs, cold, the "
        f"median of {autotune.RUNS}",
        "pytorch": "torch.backends.cudnn.benchmark=True and benchmark_limit=0, before and after; "
        "cuDNN chooses once for both networks",
        "tables": "chosen by the tables that the package ships, but for what they hold of the "
        "network's own layers; nothing measured",
        "measurements": "chosen by the record's own times of the layers by themselves, as with "
        "CONVT_AUTOTUNE=1",
        "training": "forward, cross-entropy and backward, without the optimizer's step",
        "errors": "of a training pass with PyTorch's initial weights, relative to float64 in the "
        "Euclidean norm",
        "enqueue_seconds": f"the least of {_ENQUEUED} passes",
    }


# ---- The command ---------------------------------------------------------------------------------


class WallClock:
    """Stands in for an `EventClock` in a trial."""

    def time(self, function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    def repeat(self, function: Callable[[], object], runs: int) -> Repeats:
        seconds = math.fsum(self.time(function) for _ in itertools.repeat(None, runs))
        return Repeats(seconds, seconds / runs)


def trial() -> DecoderRecord:
    """Do everything once with a tiny network on the CPU."""
    gpu = records.GPU("a trial on the CPU", (0, 0), 1, 1, 0)
    software = records.Software("trial", torch.__version__, "none", "none")
    return measure_all(
        list(MODES),
        TRIAL,
        gpu,
        software,
        "cpu",
        WallClock(),
        profiles=1,
        runs=1,
        candidates=lambda *form, tf32: {},  # on a CPU ours would run on the simulator
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--batch", type=int, default=NETWORK.input_shape[0])
    parser.add_argument("--trial", action="store_true", help="a tiny network, on the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record to write")
    arguments = parser.parse_args(argv)
    # The profiler's library else says on stderr whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if arguments.batch < 1:
        parser.error(f"--batch {arguments.batch}: must be at least 1")
    if arguments.trial and arguments.output is None:
        parser.error("--trial: say with --output where to write; it is no record")
    if not arguments.trial and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: a network is measured on an NVIDIA GPU")

    if arguments.trial:
        record = trial()
    else:
        network = Network(
            NETWORK.classes, NETWORK.width, (arguments.batch, *NETWORK.input_shape[1:])
        )
        with _current_gpu() as machine:
            record = measure_all(
                arguments.modes,
                network,
                machine.gpu,
                machine.software,
                machine.tools.device,
                machine.tools.clock,
            )
    print(f"\n{decoder_report.everything(record)}\n\nmeasured in {record.seconds:.0f} s")
    path = arguments.output
    if path is None:
        if set(arguments.modes) != set(MODES) or arguments.batch != NETWORK.input_shape[0]:
            print("not written: a part of the record; name a file with --output", file=sys.stderr)
            return
        path = records.FOLDER / f"{records.slug(record.gpu.name)}-decoder.json"
    save(record, path)
    print(f"wrote {path}")
    worse = decoder_report.suspicious(record)
    if worse:
        raise SystemExit("wrong: " + "; ".join(worse))


if __name__ == "__main__":
    main()
