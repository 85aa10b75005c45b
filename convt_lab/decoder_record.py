"""The record of a whole network before and after its layers were swapped, one file for each GPU.

``records/<gpu>-decoder.json`` is written by ``tools/decoder_profile.py``, which trains and runs
`convt_lab.decoder.SegmentationNet`. The book's chapter on real networks reads it. Reading checks
everything, as in `convt_lab.records`.

The file (schema 1)
-------------------
All times are in seconds; a *pass* is ``inference`` (forward without gradients) or ``training``
(forward, loss and backward).

``schema``, ``what``, ``gpu``, ``software``, ``date``, ``seed``, ``seconds``, ``meaning``
    As in `convt_lab.records`.
``network``
    ``classes`` and ``width`` of the network; ``input_shape``, [N, 3, H, W].
``modes``
    A list. A mode is a precision in a memory format:

    ``name``
        Different from the other modes'.
    ``dtype``, ``allow_tf32``, ``memory_format``
        ``float32``; or ``bfloat16`` or ``float16`` by autocast, with float32 parameters. cuDNN's
        switch; true with autocast, for which it says nothing. ``contiguous`` or ``channels_last``,
        of images and parameters.
    ``layers``
        The network's layers by name, in their order.
    ``alone``
        Each transposed convolution layer by name: ``problem``, the arguments of `Problem`;
        ``seconds``, name -> its forward by itself, of ``pytorch`` and of each kernel of ours that
        takes it.
    ``before``
        The network as PyTorch has it: ``errors`` and ``profile``.
    ``after``
        A list, the network with its layers swapped: ``chosen_by``, ``tables`` (those that the
        package ships) or ``measurements`` (the mode's own, ``alone``: what autotuning finds);
        ``choices``, layer -> ``kernel`` and ``reason``; ``errors`` and ``profile``; and ``times``,
        pass -> ``before`` and ``after``, timed in the same rounds.

``errors``
    Relative to float64, in the Euclidean norm: ``scores``, ``loss`` and ``gradients``, name -> of
    each parameter, and of ``images``. An infinite error is the string ``"inf"``.
``profile``
    By ``torch.profiler``: ``inference``, ``forward`` and ``backward`` (the two halves of training),
    each layer -> seconds of its kernels. ``the rest`` is what no layer launched; that of a training
    is in ``forward``.
``times``, ``before`` and ``after``
    ``cold``, as in `convt_lab.operator_record`; ``enqueue_seconds``, what Python takes to enqueue
    the pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convt_lab import records
from convt_lab.layer_profile import REST
from convt_lab.operator_record import PYTORCH, Cold
from convt_lab.problem import Problem
from convt_lab.records import GPU, Node, Software

__all__ = [
    "CHOSEN_BY",
    "MODES",
    "NETWORK",
    "PASSES",
    "SCHEMA",
    "After",
    "Alone",
    "Chosen",
    "DecoderRecord",
    "Errors",
    "Mode",
    "Network",
    "Pair",
    "Profile",
    "Run",
    "Time",
    "amdahl",
    "find",
    "from_json",
    "load",
    "save",
    "to_json",
]

#: The version of the schema that is written and read.
SCHEMA = 1

PASSES = ("inference", "training")

#: What the operator may have chosen by.
CHOSEN_BY = ("tables", "measurements")

#: The modes that are measured, by name: (dtype, allow_tf32, memory format).
MODES: Mapping[str, tuple[str, bool, str]] = {
    "float32": ("float32", False, "contiguous"),
    "TF32": ("float32", True, "contiguous"),
    "bfloat16": ("bfloat16", True, "contiguous"),
    "bfloat16 last": ("bfloat16", True, "channels_last"),
}


def amdahl(parts: Sequence[tuple[float, float]]) -> float:
    """Return how many times as fast a whole becomes whose parts become faster.

    Parameters
    ----------
    parts
        Of each part its share of the whole's time, and how many times as fast it becomes; infinity
        if it takes no time any more. What is left of the whole stays as it is.

    Returns
    -------
    float
        Amdahl's law: 1 / (1 - sum of share * (1 - 1 / speedup)).

    Raises
    ------
    ValueError
        If a share is negative, a speed-up is not positive, or the shares exceed 1 together.

    Examples
    --------
    >>> amdahl([(0.5, 2.0)])
    1.3333333333333333
    """
    for share, speedup in parts:
        if not share >= 0:
            raise ValueError(f"share={share!r} must be at least 0")
        if not speedup > 0:
            raise ValueError(f"speedup={speedup!r} must be above 0")
    total = math.fsum(share for share, _ in parts)
    if not total <= 1 + 1e-9:
        raise ValueError(f"the shares are {total:g} together: at most 1 is right")
    left = 1 - math.fsum(share * (1 - 1 / speedup) for share, speedup in parts)
    return 1 / left if left > 0 else math.inf


# ---- What a record holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The network's size, and its input's."""

    classes: int
    width: int
    input_shape: tuple[int, int, int, int]


#: What is measured: large enough that the GPU, not Python, takes the time.
NETWORK = Network(classes=21, width=64, input_shape=(8, 3, 512, 512))


@dataclass(frozen=True)
class Alone:
    """A transposed convolution layer by itself: PyTorch's operator and our kernels."""

    problem: Problem
    seconds: Mapping[str, float]

    def speedup(self, kernel: str) -> float:
        """Return how many times as fast as PyTorch's a kernel is; 1 for PyTorch's own."""
        return self.seconds[PYTORCH] / self.seconds[kernel]


@dataclass(frozen=True)
class Errors:
    """How far a run is from float64. The attributes are those of the module's description."""

    scores: float
    loss: float
    gradients: Mapping[str, float]

    @property
    def worst_gradient(self) -> str:
        """The name of the gradient with the largest error."""
        return max(self.gradients, key=self.gradients.__getitem__)


@dataclass(frozen=True)
class Profile:
    """Seconds of the kernels by layer. The attributes are those of the module's description."""

    inference: Mapping[str, float]
    forward: Mapping[str, float]
    backward: Mapping[str, float]

    def of(self, a_pass: str) -> dict[str, float]:
        """Return the seconds by layer of ``inference``, or of both halves of ``training``."""
        if a_pass not in PASSES:
            raise ValueError(f"a_pass={a_pass!r} must be one of {', '.join(PASSES)}")
        if a_pass == "inference":
            return dict(self.inference)
        return {name: self.forward[name] + self.backward[name] for name in self.forward}

    def forward_of(self, a_pass: str) -> Mapping[str, float]:
        """Return the seconds by layer of a pass's forward: all that a swapped layer changes."""
        return self.inference if a_pass == "inference" else self.forward


@dataclass(frozen=True)
class Run:
    """One network in one mode."""

    errors: Errors
    profile: Profile


@dataclass(frozen=True)
class Chosen:
    """What computes a layer: ``pytorch`` or a kernel's name; and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Time:
    """A pass of a network, by the clock."""

    cold: Cold
    enqueue_seconds: float

    @property
    def seconds(self) -> float:
        """The median of cold runs."""
        return self.cold.seconds

    @property
    def is_host_bound(self) -> bool:
        """Whether Python takes about as long to enqueue the pass as the GPU to do it."""
        return self.enqueue_seconds > 0.8 * self.seconds


@dataclass(frozen=True)
class Pair:
    """The network before and after, timed in the same rounds."""

    before: Time
    after: Time

    @property
    def speedup(self) -> float:
        """How many times as fast the network has become."""
        return self.before.seconds / self.after.seconds


@dataclass(frozen=True)
class After:
    """The network with its layers swapped. The attributes are those of the module's description."""

    chosen_by: str
    choices: Mapping[str, Chosen]
    errors: Errors
    profile: Profile
    times: Mapping[str, Pair]


@dataclass(frozen=True)
class Mode:
    """A precision in a memory format. The attributes are those of the module's description."""

    name: str
    dtype: str
    allow_tf32: bool
    memory_format: str
    layers: tuple[str, ...]
    alone: Mapping[str, Alone]
    before: Run
    after: tuple[After, ...]

    def chosen_by(self, what: str) -> After:
        """Return the network whose kernels were chosen by one of `CHOSEN_BY`.

        Raises
        ------
        KeyError
            If that was not measured.
        """
        for after in self.after:
            if after.chosen_by == what:
                return after
        raise KeyError(f"nothing was chosen by {what!r} in mode {self.name}")

    def parts(self, after: After, a_pass: str) -> list[tuple[float, float]]:
        """Return share and speed-up of each transposed layer's forward, for `amdahl`.

        Shares are those of the kernels' time in the network before, by its profile; speed-ups are
        those of the layers by themselves, with the kernels that were chosen.
        """
        total = math.fsum(self.before.profile.of(a_pass).values())
        forward = self.before.profile.forward_of(a_pass)
        return [
            (forward[name] / total, alone.speedup(after.choices[name].kernel))
            for name, alone in self.alone.items()
        ]

    def predicted(self, after: After, a_pass: str) -> float:
        """Return by Amdahl's law how many times as fast the network should become."""
        return amdahl(self.parts(after, a_pass))

    def limit(self, a_pass: str) -> float:
        """Return how many times as fast it would be if those forwards took no time at all."""
        return amdahl([(share, math.inf) for share, _ in self.parts(self.after[0], a_pass)])

    def saved(self, after: After, a_pass: str) -> dict[str, float]:
        """Return how many seconds a pass takes less than before, and where.

        ``predicted``
            In the transposed layers' forward, by what the layers take by themselves.
        ``forward``
            The same, as the profiler saw it.
        ``backward``
            In the transposed layers' backward, which is PyTorch's before and after.
        ``elsewhere``
            In all other kernels.
        ``idle``
            Between the kernels: what the clock saw and the profiler did not.
        ``all``
            By the clock: the sum of the four before.
        """
        old, new = self.before.profile, after.profile
        forward_old, forward_new = old.forward_of(a_pass), new.forward_of(a_pass)
        whole = {name: s - new.of(a_pass)[name] for name, s in old.of(a_pass).items()}
        forward = {name: forward_old[name] - forward_new[name] for name in self.alone}
        pair = after.times[a_pass]
        clock = pair.before.seconds - pair.after.seconds
        return {
            "predicted": math.fsum(
                forward_old[name] * (1 - 1 / alone.speedup(after.choices[name].kernel))
                for name, alone in self.alone.items()
            ),
            "forward": math.fsum(forward.values()),
            "backward": math.fsum(whole[name] - forward[name] for name in self.alone),
            "elsewhere": math.fsum(s for name, s in whole.items() if name not in self.alone),
            "idle": clock - math.fsum(whole.values()),
            "all": clock,
        }


@dataclass(frozen=True)
class DecoderRecord:
    """One run on one GPU. The attributes are those of the module's description.

    Examples
    --------
    >>> record = load("records/nvidia-h200-decoder.json")  # doctest: +SKIP
    >>> mode = record.mode("float32")  # doctest: +SKIP
    >>> mode.chosen_by("measurements").times["training"].speedup  # doctest: +SKIP
    """

    gpu: GPU
    software: Software
    date: str
    seed: int
    seconds: float
    network: Network
    meaning: Mapping[str, str] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ()

    def mode(self, name: str) -> Mode:
        """Return the mode of that name.

        Raises
        ------
        KeyError
            If it was not measured.
        """
        for mode in self.modes:
            if mode.name == name:
                return mode
        known = ", ".join(repr(mode.name) for mode in self.modes) or "none"
        raise KeyError(f"no mode {name!r}; there are: {known}")


# ---- Reading, with every check -------------------------------------------------------------------


def from_json(value: Any, file: str = "record") -> DecoderRecord:
    """Check a parsed JSON value and make a record of it.

    Parameters
    ----------
    value
        What ``json.load`` gives.
    file
        What to call it in messages.

    Raises
    ------
    RecordError
        If it is not as the schema says; it names the file, the field, its value and what would be
        right.
    """
    root = Node(value, "", file)
    records.require_schema(root, SCHEMA)
    _, what, gpu, software, day, seed, seconds, meaning, network, modes = root.fields(
        *("schema", "what", "gpu", "software", "date", "seed", "seconds", "meaning"),
        *("network", "modes"),
    )
    what.text()
    record = DecoderRecord(
        gpu=records.read_gpu(gpu),
        software=records.read_software(software),
        date=records.read_day(day),
        seed=seed.integer(0),
        seconds=seconds.number(),
        network=_network(network),
        meaning={name: node.text() for name, node in meaning.members().items()},
        modes=tuple(_mode(node) for node in modes.items()),
    )
    records.require_different(modes, [mode.name for mode in record.modes], "name")
    return record


def _network(node: Node) -> Network:
    classes, width, shape = node.fields(*Network.__dataclass_fields__)
    sizes = tuple(size.integer(1) for size in shape.items())
    if len(sizes) != 4 or sizes[1] != 3:
        raise shape.wrong("a list [N, 3, H, W]")
    return Network(classes.integer(1), width.integer(1), sizes)


def _mode(node: Node) -> Mode:
    name, dtype, tf32, layout, layers, alone, before, after = node.fields(
        *Mode.__dataclass_fields__
    )
    names = tuple(layer.text() for layer in layers.items())
    records.require_different(layers, names, "name")
    transposed = {name: _alone(member) for name, member in _members(alone, names).items()}
    mode = Mode(
        name=name.text(),
        dtype=dtype.choice("float32", "float16", "bfloat16"),
        allow_tf32=tf32.boolean(),
        memory_format=layout.choice("contiguous", "channels_last"),
        layers=names,
        alone=transposed,
        before=_run(before, names),
        after=tuple(_after(item, names, transposed) for item in after.items()),
    )
    if mode.dtype != "float32" and not mode.allow_tf32:
        raise tf32.wrong(f"true, as dtype is {mode.dtype}")
    if not mode.after:
        raise after.wrong("a list of at least one network")
    records.require_different(after, [one.chosen_by for one in mode.after], "chosen_by")
    return mode


def _members(node: Node, known: Sequence[str], all_of: Sequence[str] = ()) -> dict[str, Node]:
    """Return the values of an object by name, whose names are `known` and hold `all_of`."""
    members = node.members()
    for name, member in members.items():
        if name not in known:
            raise records.RecordError(
                f"{member.file}: {member.place} is unknown: it must be one of {', '.join(known)}"
            )
    for name in all_of:
        if name not in members:
            raise node.wrong(f"an object with {name}")
    return members


def _alone(node: Node) -> Alone:
    problem, seconds = node.fields(*Alone.__dataclass_fields__)
    times = {name: member.positive() for name, member in seconds.members().items()}
    if PYTORCH not in times:
        raise seconds.wrong(f"an object with {PYTORCH}")
    return Alone(records.read_problem(problem), times)


def _run(node: Node, layers: Sequence[str]) -> Run:
    errors, profile = node.fields(*Run.__dataclass_fields__)
    return Run(_errors(errors), _profile(profile, layers))


def _errors(node: Node) -> Errors:
    scores, loss, gradients = node.fields(*Errors.__dataclass_fields__)
    members = {name: member.error() for name, member in gradients.members().items()}
    if not members:
        raise gradients.wrong("an object with at least one gradient")
    return Errors(scores.error(), loss.error(), members)


def _profile(node: Node, layers: Sequence[str]) -> Profile:
    def read(half: Node) -> dict[str, float]:
        names = (*layers, REST)
        return {name: n.number() for name, n in _members(half, names, all_of=names).items()}

    profile = Profile(*map(read, node.fields(*Profile.__dataclass_fields__)))
    for half in ("inference", "forward", "backward"):
        if not any(getattr(profile, half).values()):
            raise node.wrong(f"a profile whose {half} takes some time")
    return profile


def _after(node: Node, layers: Sequence[str], alone: Mapping[str, Alone]) -> After:
    by, choices, errors, profile, times = node.fields(*After.__dataclass_fields__)
    chosen = {}
    for name, member in _members(choices, list(alone), all_of=list(alone)).items():
        kernel, reason = member.fields(*Chosen.__dataclass_fields__)
        chosen[name] = Chosen(kernel.choice(*alone[name].seconds), reason.text())
    pairs = zip(PASSES, times.fields(*PASSES), strict=True)
    return After(
        chosen_by=by.choice(*CHOSEN_BY),
        choices=chosen,
        errors=_errors(errors),
        profile=_profile(profile, layers),
        times={name: Pair(*map(_time, n.fields("before", "after"))) for name, n in pairs},
    )


def _time(node: Node) -> Time:
    cold, enqueue = node.fields(*Time.__dataclass_fields__)
    seconds, runs, spread = cold.fields(*Cold.__dataclass_fields__)
    return Time(Cold(seconds.positive(), runs.integer(1), spread.number()), enqueue.number())


# ---- Writing -------------------------------------------------------------------------------------


def to_json(record: DecoderRecord) -> dict[str, Any]:
    """Return a record as what ``json.load`` would give, in the order of the schema."""
    gpu = {**asdict(record.gpu), "compute_capability": list(record.gpu.compute_capability)}
    return {
        "schema": SCHEMA,
        "what": "a network with transposed convolutions before and after its layers were swapped: "
        "times by layer and as a whole, and errors",
        "gpu": gpu,
        "software": asdict(record.software),
        "date": record.date,
        "seed": record.seed,
        "seconds": records.rounded(record.seconds),
        "meaning": dict(record.meaning),
        "network": _plain(asdict(record.network)),
        "modes": [_plain(asdict(mode)) for mode in record.modes],
    }


def _plain(value: Any) -> Any:
    """Round numbers, and make lists of tuples."""
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return records.rounded(value, 5) if isinstance(value, float) else value


def save(record: DecoderRecord, path: Path) -> None:
    """Write a record, all of it or nothing, after it was checked as if it were read.

    Raises
    ------
    RecordError
        If the record is not as the schema says; nothing is written then.
    OSError
        If it can't be written; what was there is as it was.
    """
    value = to_json(record)
    from_json(value, str(path))
    records.write_text(path, records.text_of(value))


def load(path: Path | str) -> DecoderRecord:
    """Read a record and check it.

    Raises
    ------
    RecordError
        If the file is no JSON or not as the schema says.
    OSError
        If it can't be read.
    """
    return from_json(records.read_json(path), str(path))


def find(name: str = "nvidia-h200-decoder", folder: Path | None = None) -> DecoderRecord | None:
    """Read the record of that name in a folder, that of the repository if None; None if not there.

    Raises
    ------
    RecordError
        If it is no JSON or not as the schema says.
    """
    path = (folder or records.FOLDER) / f"{name}.json"
    return load(path) if path.is_file() else None
