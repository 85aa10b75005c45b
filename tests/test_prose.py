"""The book's words: numbers that have a source, pictures with a text, chapters with the same bones.

A chapter shows its numbers as the outputs of cells, which nbval compares. What is left in the prose
is checked here: every number is a setting that the text itself chooses ("stride 2"), a fact of the
hardware, or a claim that this file compares with the code.
"""

import functools
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import convt_lab as lab
from convt_lab import (
    Problem,
    architectures,
    decoder,
    decoder_record,
    decoder_report,
    dispatch,
    distributed_record,
    doctor,
    figures,
    figures_blocks,
    figures_tensor_cores,
    measure,
    measurements,
    operator_bench,
    operator_record,
    records,
    reference,
    scaling,
)
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.exercises.first_draft import DRAFTS
from convt_lab.problem import Axis, CroppedProblem
from convt_lab.split import FORMATS
from convt_lab.stages import fma_stages, kernels

sys.path.append(str(Path(__file__).resolve().parent.parent / "book"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import accuracy
import drafts.checks
import drafts.versions

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((ROOT / "book").glob("*.*")) if path.suffix != ".bib"}
STAR = Problem.named("star")

each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", [p for p in PAGES if PAGES[p].suffix == ".ipynb"])
each_stage = pytest.mark.parametrize("stage", lab.stages.values(), ids=lambda stage: stage.name)


def accuracy_rows() -> list:
    return json.loads((records.FOLDER / "nvidia-h200-accuracy.json").read_text())["rows"]


def cells(page: str) -> list:
    return nbformat.read(PAGES[page], as_version=4).cells


def prose(page: str) -> str:
    """A page's text, captions and alternative texts, without code, formulas and references."""
    if PAGES[page].suffix == ".md":
        parts = [PAGES[page].read_text(encoding="utf-8")]
    else:
        parts = []
        for cell in cells(page):
            shown = cell.metadata.get("mystnb", {})
            figure, image = shown.get("figure", {}), shown.get("image", {})
            parts += [cell.source] if cell.cell_type == "markdown" else []
            parts += [figure.get("caption", ""), image.get("alt", "")]
    text = "\n".join(parts)
    for left_out in (
        r"^```.*?^```$",  # code
        r"\$\$.*?\$\$(?: \([\w-]+\))?",
        r"\$[^$\n]+\$",
        r"\{[\w:]+\}`[^`]*`",  # references
        r"`[^`\n]+`",
    ):
        text = re.sub(left_out, "…", text, flags=re.DOTALL | re.MULTILINE)
    return text


# --- numbers --------------------------------------------------------------------------------------

# Chosen by the text: the reader sees them used in the cells.
SETTINGS = [
    r"(?:strides?|dilation|padding|kernel|stage|Exercise)[ -](?:of )?\d+(?:×\d+)?",
    r"^\d+\. ",  # items of a list
    r"\b\d×\d kernel",
]
# Of every GPU that CUDA runs on; NVIDIA's guides say so.
HARDWARE = [
    "32 neighbours",  # a warp
    "32 neighbouring lanes",
    "the 32 lanes",
    "32 bytes",  # a sector
    "32 *banks*",
    "32 banks",
    "32 words",  # one for each bank
    "4 bytes",
    "16 bytes",
    "16-byte",
    "64-bit",
    "32 bits",
    "255 registers",
    "65,536 registers",
]


def slowest_stage() -> str:
    rows = [row for row in records.load_named("nvidia-h200").shape("star").rows if row.seconds()]
    return max(rows, key=lambda row: row.seconds()).name


#: Those that the GPU primer lists.
FLOAT32_STAGES = ("naive_gather", "coalesced", "shared_tiled", "register_blocked", "winograd")


@functools.cache
def architecture_record() -> dict:
    return json.loads(architectures.RECORD.read_text())


def blocks_on_sm(stage: str, architecture: str) -> int:
    """Of a stage's launch on the star."""
    (blocks,) = (
        launch["blocks_per_sm"]
        for row in architecture_record()["kernels"]
        if (row["stage"], row["architecture"]) == (stage, architecture)
        for launch in row["launches"]
        if launch["problem"] == "star"
    )
    return blocks


def ceiling_load(name: str) -> measure.Load:
    return records.load_named("nvidia-h200").ceilings[name].sustained.load


def ladder_row(shape: str, name: str, over: str) -> float:
    """A stage's cold time over another's."""
    shape = records.load_named("nvidia-h200").shape(shape)
    return shape.row(name).seconds() / shape.row(over).seconds()


@functools.cache
def star_profile(stage: str) -> dict:
    profiles = json.loads((records.FOLDER / "nvidia-h200-profiles.json").read_text())["profiles"]
    (profile,) = profiles[f"{stage} star"]
    return profile


def star_seconds(stage: str) -> float:
    return star_profile(stage)["duration_seconds"]


def first_level_seconds(stage: str) -> float:
    """The least time for a stage's sectors on the star, at four a clock for each SM."""
    profile, gpu = star_profile(stage), records.load_named("nvidia-h200").gpu
    cycles = profile["l1_global_load_sectors"] / 4 / gpu.multiprocessors
    return cycles / profile["sm_clock_hz"]


def slots_for_an_fma(stage: str) -> float:
    """Of four schedulers to an SM, for a warp's worth of FMAs, as the ladder chapter has it."""
    profile, gpu = star_profile(stage), records.load_named("nvidia-h200").gpu
    slots = 4 * gpu.multiprocessors * profile["sm_clock_hz"] * profile["duration_seconds"]
    return profile["issue_slots_busy_percent"] / 100 * slots / (profile["fma"] / 32)


def fastest_hold_fewest_warps() -> bool:
    of_star = [star_profile(name) for name in FLOAT32_STAGES]
    by_time, by_warps = (
        sorted(of_star, key=lambda profile: profile[key])[:2]
        for key in ("duration_seconds", "achieved_occupancy_percent")
    )
    return by_time == by_warps


def exercise_axis() -> Axis:
    """Of the gather chapter's exercise on paper."""
    return Problem(width=9, kernel_size=(1, 7), stride=(1, 2), dilation=(1, 3)).axes[1]


def draft_tile(draft: drafts.versions.Draft) -> tuple[int, int]:
    return tuple(figures.constants(draft.cuda, "TILE_H", "TILE_W").values())


def constant(stage: str, name: str) -> int:
    return figures.constants(lab.stages[stage], name)[name]


def hoppers(name: str) -> int:
    name = f"warpgroups::{name}"
    return figures.constants(kernels["hopper"], name)[name]


def inputs_of_tile(height: int) -> int:
    """Inputs that 256 outputs need, that many rows high."""
    return (height + STAR.kernel_size[0] - 1) * (256 // height + STAR.kernel_size[1] - 1)


def share_of_work(*layers: str) -> float:
    """Of the decoder chapter's network, by operations of the forward."""
    flops = decoder_report.flops_of(decoder_record.NETWORK)
    return sum(flops[layer] for layer in layers) / sum(flops.values())


def most_bytes() -> str:
    """The transposed convolution of that network that moves the most."""
    size = decoder_record.NETWORK
    with torch.device("meta"):
        network = decoder.SegmentationNet(size.classes, size.width)
        problems = decoder.problems_of(network, torch.empty(size.input_shape))
    return max(problems, key=lambda name: problems[name].compulsory_bytes)


def backward_over_forward() -> float:
    """The operations of that network's backward over those of its forward."""
    size = decoder_record.NETWORK
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        scores = decoder.SegmentationNet(size.classes, size.width)(torch.empty(size.input_shape))
        forward = counter.get_total_flops()
        scores.sum().backward()
    return counter.get_total_flops() / forward - 1


@functools.cache
def of_operator(form: int) -> tuple[operator_record.Case, ...]:
    """The operator chapter's cases of one of `FORMS`; 0, 2, 4: float32, TF32, float16."""
    record = operator_record.load(records.FOLDER / "nvidia-h200-operator.json")
    return record.of_form(operator_record.FORMS[form])


def by_ours(form: int) -> float:
    cases = of_operator(form)
    return sum(case.choice != operator_record.PYTORCH for case in cases) / len(cases)


def best_of_ours_on_wide(form: int) -> float:
    """Against PyTorch, the geometric mean."""
    logs = []
    for case in of_operator(form):
        timed = [result.seconds for result in case.kernels.values() if result.seconds]
        if min(case.problem.in_channels, case.problem.out_channels) >= 32 * case.problem.groups:
            logs.append(math.log(case.pytorch.seconds / min(timed)))
    return math.exp(math.fsum(logs) / len(logs))


def wide_by_ours(form: int, kernel: str | None = None) -> float:
    """The share of the wide problems that a kernel computes, or any of ours."""
    choices = [case.choice for case in of_operator(form) if is_wide(case)]
    ours = [c for c in choices if c == kernel or (kernel is None and c != operator_record.PYTORCH)]
    return len(ours) / len(choices)


def largest_error(*kernels: str) -> float:
    """The condition error in float32."""
    return max(c.kernels[k].errors.condition for c in of_operator(0) for k in kernels
               if k in c.kernels)  # fmt: skip


def case_of(shape: str, form: int = 0) -> operator_record.Case:
    (case,) = (case for case in of_operator(form) if case.shape == shape)
    return case


def seconds_of(shape: str, kernel: str) -> float:
    """In float32, contiguous."""
    return case_of(shape).kernels[kernel].seconds


def is_wide(case: operator_record.Case) -> bool:
    p = case.problem
    return min(p.in_channels, p.out_channels) >= 32 * p.groups


def taps(case: operator_record.Case) -> float:
    """Of an output, on average."""
    return math.prod(case.problem.kernel_size) / math.prod(case.problem.stride)


def chosen(kernel: str, form: int = 0, wide: bool | None = None) -> list[operator_record.Case]:
    """The cases that a kernel computes; all of them, or those that are wide, or that are not."""
    return [
        case
        for case in of_operator(form)
        if case.choice == kernel and wide in (None, is_wide(case))
    ]


def is_winograd(problem: lab.Problem) -> bool:
    """Whether Winograd's scheme is the operator's choice for strict float32 on an NVIDIA H200."""
    ours = dispatch.candidates(problem, torch.float32, False, tf32=False, capability=(9, 0))
    choice = dispatch.choose_by_tables(
        measurements.load(), "NVIDIA H200", (9, 0), problem, "float32", False, False, ours
    )
    return choice.kernel == "winograd" and lab.stages["winograd"].variant(problem) == "F(2, 3)"


def rate_over_fmas(shape: str, kernel: str, form: int = 0) -> float:
    """By the definition's FMAs, over the measured rate of the FMA units."""
    case = case_of(shape, form)
    result = case.pytorch if kernel == operator_record.PYTORCH else case.kernels[kernel]
    ceiling = records.load_named("nvidia-h200").ceilings.fp32_fma
    return case.problem.flops / result.seconds / ceiling


def is_depthwise(case: operator_record.Case) -> bool:
    return case.problem.groups == case.problem.in_channels > 1


def slowdown_of_depthwise() -> float:
    """In channels_last over contiguous, of the operator's times in float32, the least."""
    return min(
        last.operator.seconds / case.operator.seconds
        for form in (0, 2)
        for case, last in zip(of_operator(form), of_operator(form + 1), strict=True)
        if is_depthwise(case)
    )


@functools.cache
def without_similar() -> tuple[dispatch.LeaveOneOut, dispatch.LeaveOneOut]:
    """All choices by the other problems, and those of them where nothing similar was measured."""
    (table,) = measurements.load()
    judged = dispatch.leave_one_out(table)
    with_similar = judged.with_similar().losses
    return judged, dispatch.LeaveOneOut(
        tuple(loss for loss in judged.losses if not any(loss is other for other in with_similar))
    )


def chosen_without_similar() -> bool:
    """Whether PyTorch computes them, but for some groups, none loses, and the top is of them."""
    judged, others = without_similar()
    top = sorted(judged.losses, key=lambda loss: -loss[2])[:5]
    return (
        all(
            choice.kernel == operator_record.PYTORCH
            or (m.problem.groups > 1 and m.form == ("float32", False, False))
            for m, choice, _ in others.losses
        )
        and others.share_slower(0.0) == 0
        and all(any(loss is other for other in others.losses) for loss in top)
    )


@functools.cache
def network_record() -> decoder_record.DecoderRecord:
    return decoder_record.load(records.FOLDER / "nvidia-h200-decoder.json")


def share_of_time(mode: str, *layers: str) -> float:
    """Of an inference, before the swap."""
    inference = network_record().mode(mode).before.profile.inference
    return sum(inference[layer] for layer in layers) / sum(inference.values())


def left_alone(mode: str, by: str = "measurements") -> set[str]:
    """The layers that are left to PyTorch."""
    choices = network_record().mode(mode).chosen_by(by).choices
    return {name for name, choice in choices.items() if choice.kernel == operator_record.PYTORCH}


def choices_of_record(by: str, mode: str = "float32") -> dict[str, str]:
    choices = network_record().mode(mode).chosen_by(by).choices
    return {name: choice.kernel for name, choice in choices.items()}


def predictions_met(mode: str, passes: tuple[str, ...] = ("inference", "training")) -> float:
    """The share of the predictions for a whole pass that are met within three hundredths."""
    of_mode = network_record().mode(mode)
    met = [
        abs(after.times[name].speedup / of_mode.predicted(after, name) - 1) < 0.03
        for after in of_mode.after
        for name in passes
    ]
    return sum(met) / len(met)


def speedup(mode: str, by: str, a_pass: str = "inference") -> float:
    return network_record().mode(mode).chosen_by(by).times[a_pass].speedup


def python_over_kernels(mode: str, by: str, a_pass: str) -> float:
    """After the swap."""
    after = network_record().mode(mode).chosen_by(by)
    return after.times[a_pass].after.enqueue_seconds / sum(after.profile.of(a_pass).values())


def tensor_core_rows() -> list[dict[str, dict]]:
    """Of the star and of the classic shape, by name."""
    record = json.loads((records.FOLDER / "nvidia-h200-tensor-cores.json").read_text())
    shapes = [record["problems"][name] for name in ("star", "classic")]
    return [{row["name"]: row for row in shape["rows"]} for shape in shapes]


def tensor_core_ms(name: str) -> float:
    """Cold, on the star."""
    return tensor_core_rows()[0][name]["cold_ms"]


@functools.cache
def turns_of_star() -> list[list[str]]:
    """The table of the hopper chapter's picture of turns, without its head and its last line."""
    return [line.split() for line in figures_blocks.turns(STAR).table().splitlines()[1:-1]]


def share_of_roof(kernel: str, number: str = "float32") -> float:
    """Of a tensor-core rung, on the star: what the ladder's last roofline shows."""
    roof = figures_tensor_cores.roof_of(records.load_named("nvidia-h200").ceilings, kernel, number)
    seconds = tensor_core_rows()[0][f"{kernel}, {number}"]["cold_ms"] / 1000
    return STAR.flops / seconds / roof.flops_per_second


def least_traffic_to_meet_slope() -> float:
    """Of the three rungs on tensor cores: over the bytes that must move."""
    ceilings = records.load_named("nvidia-h200").ceilings
    rungs = ("tensor_core", "TF32"), ("tensor_core_split", "float32"), ("hopper", "float32")
    roofs = (figures_tensor_cores.roof_of(ceilings, *rung).flops_per_second for rung in rungs)
    return STAR.flops / STAR.compulsory_bytes * ceilings.copy / max(roofs)


def a_swap_costs_python() -> bool:
    """In inferences in which nearly nothing else changes."""
    after = network_record().mode("bfloat16 last").after
    times = [each.times["inference"] for each in after]
    return all(t.after.enqueue_seconds > 1.05 * t.before.enqueue_seconds for t in times)


def kernels_over_clock(mode: str, a_pass: str) -> float:
    """The least, before the swap and after it."""
    mode = network_record().mode(mode)
    return min(
        sum(profile.of(a_pass).values()) / clock.seconds
        for after in mode.after
        for profile, clock in (
            (mode.before.profile, after.times[a_pass].before),
            (after.profile, after.times[a_pass].after),
        )
    )


def program_over_mean(form: int) -> float:
    """The speedup of a program that runs every shape once, over the geometric mean."""
    cases = of_operator(form)
    program = math.fsum(case.pytorch_beside.seconds for case in cases) / math.fsum(
        case.operator.seconds for case in cases
    )
    return program / math.exp(math.fsum(math.log(case.speedup) for case in cases) / len(cases))


def share_of_two_longest() -> float:
    """Of PyTorch's time on all shapes."""
    seconds = sorted(case.pytorch_beside.seconds for case in of_operator(0))
    return math.fsum(seconds[-2:]) / math.fsum(seconds)


#: The image that the chapter on several GPUs splits.
TALL = replace(STAR, batch=1, height=8192, width=8192)


@functools.cache
def split_tall(ranks: int, link: str) -> scaling.Prediction:
    record = operator_record.load(records.FOLDER / "nvidia-h200-operator.json")
    return scaling.predict(TALL, ranks, scaling.machine_of(record, STAR, scaling.LINKS[link]))


def exchange_in_rows(link: str) -> float:
    split = split_tall(2, link)
    return split.exchange / (split.alone / TALL.height)


@functools.cache
def on_gpus() -> distributed_record.DistributedRecord:
    return distributed_record.load(records.FOLDER / "nvidia-h200-distributed.json")


def beyond_one_gpu(allow_tf32: bool) -> list[float]:
    """Milliseconds that the star's rows take beyond one GPU's, with nothing sent."""
    alone = on_gpus().row("rows", 1, allow_tf32).ms
    rows = [on_gpus().row("rows", ranks, allow_tf32) for ranks in (2, 4)]
    return [row.ms_without_exchange - alone for row in rows]


def blocks_of_the_strip() -> int:
    """How many blocks of `hopper` multiply where a rank sends the star's overlap."""
    overlap = scaling.overlap(STAR.kernel_size[0], STAR.stride[0], STAR.dilation[0])
    strip = CroppedProblem.between(replace(STAR, height=overlap), overlap, 0)
    _, _, multiply, _ = kernels["hopper"].launches(strip, 227 * 1024, torch.float32, False)
    return math.prod(multiply.grid)


def part_of_the_star(allow_tf32: bool) -> float:
    """What share of one GPU's time that is, in the mean."""
    return statistics.mean(beyond_one_gpu(allow_tf32)) / on_gpus().row("rows", 1, allow_tf32).ms


def shortest_call(allow_tf32: bool) -> float:
    """In milliseconds, as the model has it."""
    record = operator_record.load(records.FOLDER / "nvidia-h200-operator.json")
    return 1000 * scaling.machine_of(record, STAR, scaling.LINKS["NVLink"], allow_tf32).call


def bytes_per_flop(split: str, ranks: int) -> float:
    """Of the star, forward and backward."""
    sent, work = scaling.bytes_sent(STAR, split, ranks), scaling.flops_of_a_rank(STAR, ranks)
    return sum(sent) / sum(work)


# What a page says, and whether it is so: True if the phrase itself is made from the code, or names
# what the cell beside it sets or prints.
CLAIMS = {
    "intro": {
        "it is wrong in eleven ways": lambda: len(drafts.versions.MENDS) == 11,
        "Three more stages multiply with other units": lambda: (
            len(lab.stages) - len(fma_stages) == 3
        ),
        "number 65 of level 1": "level 1 #65" in Problem.named.__doc__,
        f"N = {STAR.batch}": True,
        f"C_in = {STAR.in_channels}, C_out = {STAR.out_channels}": True,
        f"{STAR.height} × {STAR.width} pixels": True,
        " × ".join(map(str, STAR.kernel_size)): True,
        "| 1, 0, none |": (STAR.stride, STAR.padding, STAR.bias) == ((1, 1), (0, 0), False),
        "Python 3.11": 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text(),
    },
    "scatter_reference": {
        "The kernel is 1, 10, 100 and the input 1, 2, 3": True,  # the first cell
        "from 1 in the corners to 9 in the middle": True,  # printed below the picture
        "alternate between 1, 2 and 4": True,
    },
    "explorer": {},  # tests/test_pages.py follows its links
    "naive_gather": {
        "32 rows high": True,  # a lane for each
        "less than a hundredth of the FMA rate": lambda: (
            records.load_named("nvidia-h200").share_of_fma("star", "naive_gather") < 0.01
        ),
        "to serve all those sectors takes about a fifth of it": lambda: (
            0.18 < first_level_seconds("naive_gather") / star_seconds("naive_gather") < 0.22
        ),
        "Most goes to what no count of sectors shows": lambda: (
            star_profile("naive_gather")["issue_slots_busy_percent"] > 70
        ),
    },
    "coalesced": {
        "32 dark pixels": True,  # a lane for each
        f"{STAR.width - 1} pixels wide instead of {STAR.width}": True,
        "about seven times as fast": lambda: (
            6.5 < ladder_row("star", "naive_gather", "coalesced") < 7.5
        ),
        "about fifteen others": lambda: 14.5 < slots_for_an_fma("coalesced") - 1 < 15.5,
    },
    "shared_tiled": {
        "the time has hardly moved": lambda: (
            0.98 < ladder_row("star", "shared_tiled", "coalesced") < 1
        ),
        "had been served by the L1 cache nearly always": lambda: (
            star_profile("coalesced")["l1_hit_percent"] > 90
        ),
        "consists of 32 *…*": True,  # banks
        "3 by 7 inputs": STAR.kernel_size == (3, 7),
        "256 outputs": lambda: (
            constant("shared_tiled", "TILE_H") * constant("shared_tiled", "TILE_W") == 256
        ),
        "8×32 needs the fewest": min((2**i for i in range(9)), key=inputs_of_tile) == 8,
    },
    "register_blocked": {
        "some eighteen times as fast as the stage before": lambda: (
            17 < ladder_row("star", "shared_tiled", "register_blocked") < 19
        ),
        "a little faster than cuDNN": lambda: (
            1 < ladder_row("star", records.BASELINE, "register_blocked") < 1.2
        ),
        "More than three quarters of the FMA rate": lambda: (
            0.75 < records.load_named("nvidia-h200").share_of_fma("star", "register_blocked") < 0.8
        ),
        "A block is four bars, one for each warp": lambda: (
            constant("register_blocked", "Sizes<4>::WARPS_CO") == 4
        ),
        "eight rows of twelve, with a longer row of inputs": lambda: (
            constant("register_blocked", "Sizes<4>::THREAD_CO") == 8
            and constant("register_blocked", "Sizes<4>::THREAD_W") == 12
        ),
        "8 bytes": lambda: constant("register_blocked", "Sizes<4>::WINDOW") % 4 == 2,  # a pair
        "3×7": lambda: lab.stages["register_blocked"].variant(STAR) == "3x7",
    },
    "winograd": {
        "less than the definition's FMAs alone would": lambda: (
            records.load_named("nvidia-h200").share_of_fma("star", "winograd") > 1
        ),
        "by which this stage would take about two thirds of the one before": lambda: (
            0.65 < star_profile("winograd")["fma"] / star_profile("register_blocked")["fma"] < 0.7
            and ladder_row("star", "winograd", "register_blocked") > 0.72
        ),
        "an SM has room for eight warps": lambda: (
            blocks_on_sm("winograd", "sm_90") * constant("winograd", "f23::THREADS") == 8 * 32
        ),
        "3×7": lambda: lab.stages["winograd"].variant(STAR) == "F(2, 3)",
        "8 bytes": lambda: constant("winograd", "f23::WINDOW") % 4 == 2,  # a pair
    },
    "tensor_core": {
        "several times slower than the products alone, and than cuDNN with TF32": lambda: (
            tensor_core_ms("tensor_core, TF32") > 3 * tensor_core_ms("pytorch, TF32")
            and tensor_core_ms("tensor_core, TF32")
            > 3000 * STAR.flops / records.load_named("nvidia-h200").ceilings.gemm_tf32
        ),
        "no faster than cuDNN in float32": lambda: (
            tensor_core_ms("tensor_core, TF32") > 0.99 * tensor_core_ms("pytorch, float32")
        ),
    },
    "tensor_core_split": {
        "it takes less time than": lambda: (
            tensor_core_ms("tensor_core_split, float32") < tensor_core_ms("tensor_core, TF32")
        ),
        "more than half as fast as the products alone": lambda: (
            tensor_core_ms("tensor_core_split, float32")
            < 2 * 6000 * STAR.flops / records.load_named("nvidia-h200").ceilings.gemm_bfloat16
        ),
        "well ahead of cuDNN's float32": lambda: (
            tensor_core_ms("pytorch, float32") > 1.5 * tensor_core_ms("tensor_core_split, float32")
        ),
    },
    "hopper": {
        "64 rows": lambda: hoppers("CO") == 64,
        "64 output channels": lambda: hoppers("CO") == 64,
        "16 input channels": lambda: hoppers("CI") == 16,
        "16 values of 16 bits": lambda: (
            hoppers("CI") == 16 and torch.finfo(torch.float16).bits == 16
        ),
        "16 bytes": lambda: hoppers("OCTET") * 2 == 16,
        "compute capability 9.0": lambda: (
            kernels["hopper"].min_capability == (9, 0) and kernels["hopper"].architecture == "9.0a"
        ),
        "then two short dark bars of large ones, each with a thin bar of sums behind it, three": (
            lambda: (
                [row[1] for row in turns_of_star() if row[0] == "0"]
                == 3 * ["small", "scaled", "large", "scaled", "large", "scaled"]
            )
        ),
        "has one bar that ends in the first third": lambda: (
            int(turns_of_star()[-1][-1]) < int(turns_of_star()[-2][-1]) / 3
        ),
        # In the words of another chapter.
        "four for two rows of a 3-row kernel": lambda: (
            lab.stages["winograd"].summary
            == "Two rows of outputs from four products in place of six."
        ),
        "Still cuDNN is ahead there on most wide shapes": lambda: wide_by_ours(5) < 0.3,
        "more accurate than those of PyTorch's float32 on all four kinds": lambda: all(
            ours["condition"] < theirs["condition"]
            for rows in tensor_core_rows()
            for ours, theirs in zip(
                rows["hopper, float32"]["errors"].values(),
                rows["pytorch, float32"]["errors"].values(),
                strict=True,
            )
        ),
        "the largest error of many millions is about at the gate": lambda: (
            0.95
            < tensor_core_rows()[0]["hopper, float32"]["errors"]["positive"]["condition"]
            / reference.float32_gate(math.prod(STAR.output_shape))
            < 1.05
        ),
        "and that of … above it, on the star": lambda: (
            tensor_core_rows()[0]["tensor_core_split, float32"]["errors"]["positive"]["condition"]
            > reference.float32_gate(math.prod(STAR.output_shape))
        ),
        "sustained times of the fast paths are Python's": lambda: all(
            row["enqueue_ms"] > 0.95 * row["sustained_ms"] > 1.2 * row["cold_ms"]
            for row in tensor_core_rows()[1].values()
            if row["kernel"] == "hopper_single"
        ),
        "PyTorch is not as far behind": lambda: (
            max(case_of(name).speedup for name in ("unet up 4", "1x1"))
            < min(case_of(name).speedup for name in ("star (kernelbench 65)", "7x7 stride 1"))
        ),
    },
    "ladder": {
        "3×7": lambda: lab.stages["register_blocked"].variant(STAR) == "3x7",
        "The last three rungs multiply on tensor cores": lambda: (
            [name for name in lab.stages if name not in fma_stages]
            == list(lab.stages)[-3:]
            == ["tensor_core", "tensor_core_split", "hopper"]
        ),
        "uses a ninth of it, which leaves it below …": lambda: (
            abs(9 * share_of_roof("tensor_core", "TF32") - 1) < 0.05
            and tensor_core_rows()[0]["tensor_core, TF32"]["cold_ms"]
            > records.load_named("nvidia-h200").shape("star").row("register_blocked").time_ms()
        ),
        "… uses more than half of a lower one, and … three quarters of its own": lambda: (
            0.5 < share_of_roof("tensor_core_split") < 0.6 and 0.72 < share_of_roof("hopper") < 0.78
        ),
        "more than three times as much before one met the slope": lambda: (
            3 < least_traffic_to_meet_slope() < 4
        ),
    },
    "operator": {
        "on 44 shapes": lambda: len(operator_bench.shapes()) == 44,
        "in six forms": lambda: len(operator_record.FORMS) == 6,
        "nearly all problems are computed by a kernel of ours": lambda: (
            min(by_ours(0), by_ours(1)) > 0.9
        ),
        "With TF32 and in float16 it is most of the contiguous ones": lambda: (
            min(by_ours(2), by_ours(4)) > 0.6
        ),
        "half of them with TF32, and a third in float16": lambda: (
            0.45 < by_ours(3) < 0.55 and 0.3 < by_ours(5) < 0.36
        ),
        "most of them go to …": lambda: (
            len(chosen("hopper", wide=True)) > 0.7 * sum(map(is_wide, of_operator(0)))
        ),
        "has 64 rows, for as many output channels": lambda: (
            figures.constants(kernels["hopper"], "warpgroups::CO") == {"warpgroups::CO": 64}
            and max(case.problem.out_channels for case in chosen("tensor_core_split")) <= 32
            and max(map(taps, chosen("tensor_core_split"))) < 10
        ),
        "The two largest gains of the table are here": lambda: all(
            case.choice in ("one_channel", "few_channels") and case.problem.groups > 1
            for case in sorted(of_operator(0), key=lambda case: case.speedup)[-2:]
        ),
        "is a little ahead of …, and for …": lambda: (
            1
            < seconds_of("grouped 4, 3x7", "tensor_core_split")
            / seconds_of("grouped 4, 3x7", "winograd")
            < 1.2
            and case_of("grouped 4, 3x7").choice == "hopper"
        ),
        "more than twice the rate of …": lambda: (
            2
            < seconds_of("star (kernelbench 65)", "tensor_core_split")
            / seconds_of("star (kernelbench 65)", "hopper")
            < 3
        ),
        "three quarters of what three products allow": lambda: (
            0.7
            < case_of("star (kernelbench 65)").problem.flops
            / seconds_of("star (kernelbench 65)", "hopper")
            / (records.load_named("nvidia-h200").ceilings.gemm_float16 / 3)
            < 0.8
        ),
        "both are faster than any kernel can be": lambda: all(
            rate_over_fmas("star (kernelbench 65)", kernel) > 1.05
            for kernel in ("tensor_core_split", "hopper")
        ),
        "The tensor-core kernels, … among them, are no less accurate": lambda: (
            largest_error("hopper", "tensor_core_split", "tensor_core_narrow")
            <= largest_error("register_blocked", "winograd")
        ),
        "on a few shapes its worst output would not pass": lambda: (
            1 < sum(c.pytorch.errors.condition > c.pytorch.errors.gate for c in of_operator(0)) < 6
        ),
        "The kernels that use tensor cores take that format, and no others do": lambda: (
            {name for form in (1, 3, 5) for case in of_operator(form) for name in case.kernels}
            == {name for name in kernels if name.startswith(("hopper", "tensor_core_"))}
        ),
        "ahead of PyTorch on every shape that is not depthwise": lambda: all(
            case.speedup > 1 and case.choice != operator_record.PYTORCH
            for case in of_operator(1)
            if not is_depthwise(case)
        ),
        "With TF32 about half of the wide shapes gain, in float16 few": lambda: (
            0.45 < wide_by_ours(3) < 0.55 and wide_by_ours(5) < 0.2
        ),
        "computes two thirds of the wide shapes, and half of them": lambda: (
            0.63 < wide_by_ours(2, "hopper_single") < 0.7
            and 0.42 < wide_by_ours(3, "hopper_single") < 0.55
        ),
        "as good on the whole where tensors are contiguous, and better": lambda: (
            0.95 < best_of_ours_on_wide(4) < 1.05 and best_of_ours_on_wide(5) < 0.7
        ),
        "at twice TF32's rate": lambda: (
            1.8
            < records.load_named("nvidia-h200").ceilings.gemm_float16
            / records.load_named("nvidia-h200").ceilings.gemm_tf32
            < 2.2
        ),
        "for 128 output channels, and for the next 128 anew": lambda: (
            hoppers("CO") * hoppers("MULTIPLIERS") == 128
        ),
        "several times slower there than contiguous": lambda: slowdown_of_depthwise() > 3,
        "and … is ahead there": lambda: (
            case_of("kernelbench 81", 1).choice == "hopper"
            and case_of("kernelbench 81").choice == operator_record.PYTORCH
        ),
        "often large ones, and never loses against PyTorch": chosen_without_similar,
        "about two fifths of PyTorch's time": lambda: 0.36 < share_of_two_longest() < 0.44,
        "the program gains clearly more than the mean": lambda: program_over_mean(0) > 1.15,
        "With TF32 it gains more, too, and in float16 less": lambda: (
            1.15 < program_over_mean(2) < program_over_mean(0) and program_over_mean(4) < 1
        ),
        "100 by 100 pixels": True,  # the exercise's image
    },
    "decoder": {
        "about a thousandth of the work": lambda: round(share_of_work("up3", "up4"), 3) == 0.001,
        "moves more bytes than any other": lambda: most_bytes() == "up4",
        "about twice the forward's operations": lambda: 1.9 < backward_over_forward() < 2.1,
        "about a tenth of an inference, and … more": lambda: (
            0.08 < share_of_time("float32", "up4") < 0.12 < share_of_time("float32", "wide")
        ),
        "together take more than half": lambda: (
            0.5 < share_of_time("bfloat16 last", "up3", "up4") < 0.6
        ),
        "In float32 … computes …, … and …. With TF32 … does, except that the tables": lambda: all(
            choices_of_record(by, mode)[name] == kernel
            or (by, mode, name) == ("tables", "TF32", "up1")
            for by in ("measurements", "tables")
            for mode, kernel in (("float32", "hopper"), ("TF32", "hopper_single"))
            for name in ("up1", "up2", "wide")
        ),
        "leave … to PyTorch.": lambda: choices_of_record("tables", "TF32")["up1"] == "pytorch",
        "and two of the three stay with it; in channels last all do": lambda: (
            left_alone("bfloat16") == {"up1", "up2"}
            and left_alone("bfloat16 last") >= {"up1", "up2", "wide"}
        ),
        "the tables are wrong about …": lambda: (
            choices_of_record("tables", "bfloat16 last")["up4"] == "tensor_core_narrow"
            and "up4" in left_alone("bfloat16 last")
        ),
        "the predictions are met within three hundredths": lambda: (
            predictions_met("float32") == predictions_met("TF32", ("inference",)) == 1
        ),
        "run the same kernels. By the clock the second gained little": lambda: (
            choices_of_record("tables", "bfloat16") == choices_of_record("measurements", "bfloat16")
            and speedup("bfloat16", "measurements") < 1.2 < speedup("bfloat16", "tables")
        ),
        "Python took longer than the kernels": lambda: (
            python_over_kernels("bfloat16", "measurements", "inference") > 1.5
        ),
        "the network takes longer than before": lambda: speedup("bfloat16 last", "tables") < 0.9,
        "a swapped layer costs Python a little": a_swap_costs_python,
        "add up to more than the whole pass, before the swap and after it": lambda: (
            min(kernels_over_clock(mode, "training") for mode in ("float32", "TF32")) > 1.05
        ),
    },
    "distributed": {
        "The last two rows of ranks 0 and 1": lambda: scaling.overlap(3, 1, 1) == 2,
        # Cited: those of the page's sources.
        "NVLink with 900 GB/s, both directions together": lambda: (
            scaling.LINKS["NVLink"] == 900e9 / 2
        ),
        "InfiniBand adapters of 400 Gb/s": lambda: scaling.LINKS["InfiniBand"] == 400e9 / 8,
        "a system of 1,024 GPUs": True,
        "In its 128 servers of 8": 128 * 8 == 1024,
        "the quotient doubles, at least": lambda: all(
            bytes_per_flop(split, 2 * ranks) > 1.99 * bytes_per_flop(split, ranks)
            for split in scaling.SPLITS
            for ranks in (2, 4)
        ),
        "is hidden behind a row or two, over InfiniBand behind a dozen": lambda: (
            1 < exchange_in_rows("NVLink") < 2 and 11 < exchange_in_rows("InfiniBand") < 13
        ),
        "Eight GPUs, and 1,024": True,  # in the cell below
        "Of 1,024 GPUs some neighbours": True,
        "over one to 1,024 GPUs": True,
        "stay near one up to dozens of GPUs": lambda: (
            split_tall(64, "InfiniBand").efficiency > 0.95
        ),
        "8192 by 8192 pixels": (TALL.height, TALL.width) == (8192, 8192),
        "1,024 GPUs leave eight rows to each, and the efficiency falls far": lambda: (
            TALL.height / 1024 == 8 and split_tall(1024, "InfiniBand").efficiency < 0.6
        ),
        "an all-reduce over 1,024 ranks": True,
        "with times on two and four GPUs": lambda: {r.ranks for r in on_gpus().rows} == {1, 2, 4},
        "Images scale as predicted, as nothing is sent. The tall image does nearly": lambda: all(
            on_gpus().efficiency(row) > (0.97 if row.case == "images" else 0.93)
            for row in on_gpus().rows
            if row.case != "rows"
        ),
        "wherever rows travel, they travel while the interior is computed": lambda: all(
            exchange.hidden == exchange.sent for row in on_gpus().rows for exchange in row.exchange
        ),
        "takes a tenth of a millisecond longer": lambda: all(
            0.08 < ms < 0.13 for tf32 in (False, True) for ms in beyond_one_gpu(tf32)
        ),
        "The strip has too few rows to occupy all multiprocessors": lambda: (
            blocks_of_the_strip() < 132
        ),
        "more than three times what the model takes for a strip": lambda: all(
            3 < ms / shortest_call(tf32) < 4.5
            for tf32 in (False, True)
            for ms in beyond_one_gpu(tf32)
        ),
        "a twentieth of the star's time, and a tenth of it with TF32": lambda: (
            0.04 < part_of_the_star(False) < 0.06 and 0.09 < part_of_the_star(True) < 0.13
        ),
        "times that vary by some percent": lambda: all(
            0.02 < max(row.rounds_ms) / min(row.rounds_ms) - 1 < 0.25 for row in on_gpus().rows
        ),
    },
    "api": {
        accuracy.promise(accuracy_rows()): True,  # made from the record
        "1 is the largest that is right": True,  # a share of the gate
        "16-bit formats": True,
        "rounding to 16 bits": True,
        "of another normal one times 4": lambda: "exp(4 n)" in accuracy.MEANING["wide"],
        "at most n + 2 units": lambda: (
            accuracy.bound_of(accuracy.Way("coalesced"), accuracy.SMALL[0], "wide", 8.0)
            == reference.terms_of(accuracy.SMALL[0]) + 2
        ),
        "3308 units, where a sum of that many terms has 1346": lambda: (
            accuracy.failures(accuracy_rows())
            == ["winograd in float32 on wide inputs: error 3308, at most 1346 is right"]
        ),
        "where the kernel is 3×7 and channels are some dozens": lambda: is_winograd(
            lab.Problem(2, 256, 128, 32, 64, (3, 7), padding=1, groups=4)
        ),
        "no sum is Winograd's": lambda: not any(map(is_winograd, accuracy.PROBLEMS)),
    },
    "gpu_primer": {
        "takes 32 neighbouring threads": True,  # a warp
        "no sectors but 32 …": True,  # banks
        "Neighbours that read neighbours cost four sectors": True,  # printed above it
        "a stride of 33": True,  # printed above it
        "32 words is the worst": True,  # printed above it
        "vectors of 8 and 16 bytes": True,  # float2 and float4
        "a block of 256 threads": True,  # in the cell below
        "The fastest two hold the fewest warps": fastest_hold_fewest_warps,
        "rows of 100 floats": True,
        "rows of 104": True,
        "rows of 4": True,
        "400 bytes apart": lambda: 100 * 4 == 400,
        "uses 128 registers, and its blocks have 256 threads": True,
        "in steps of 256, 8 for each lane": lambda: (
            {a.register_granularity for a in architectures.ARCHITECTURES.values()} == {32 * 8}
        ),
        "the one to 120": lambda: 128 - 8 == 120,
    },
    "bibliography": {},
    "running": {
        "Python 3.11 or newer": lambda: doctor._OLDEST_PYTHON == (3, 11),
        "PyTorch 2.11 or newer": lambda: doctor._OLDEST_TORCH == (2, 11),
        "compute capability 7.5 or higher": lambda: doctor._OLDEST_GPU == (7, 5),
        "a PyTorch of CUDA 13": lambda: (
            torch.version.cuda is None or "pip install" in doctor._install_nvcc()
        ),
        "are of compute capability 7.5": lambda: (
            {architectures.CARDS[card].architecture for card in ("T4", "TITAN RTX")} == {"sm_75"}
        ),
        "the project has no record of such a GPU": lambda: all(
            tuple(records.load_named(name).gpu.compute_capability) != (7, 5)
            for name in records.names()
        ),
        "without spilling a register": lambda: (
            not any(
                row["spill_store_bytes"] + row["spill_load_bytes"]
                for row in architecture_record()["kernels"]
                if row["architecture"] == "sm_75" and row["stage"] in FLOAT32_STAGES
            )
        ),
        "It holds 32 warps, half of an H200's, and has 64 KiB": lambda: (
            architectures.ARCHITECTURES["sm_75"].warps_per_sm == 32
            and architectures.ARCHITECTURES["sm_90"].warps_per_sm == 2 * 32
            and architectures.ARCHITECTURES["sm_75"].shared_bytes_per_sm == 64 * 1024
        ),
        "room for one block on an SM where the H200 takes three and one": lambda: (
            [
                blocks_on_sm(stage, architecture)
                for architecture in ("sm_75", "sm_90")
                for stage in ("register_blocked", "winograd")
            ]
            == [1, 1, 3, 1]
        ),
        "from compute capability 8.0 on": True,  # cp.async: NVIDIA's PTX manual
        "needs 8.0, and … 9.0": lambda: (
            kernels["tensor_core_split"].min_capability == (8, 0)
            and kernels["hopper"].min_capability == (9, 0)
        ),
        "Tensor cores know float16 alone": lambda: (
            "These GPUs know float16 alone" in (KERNEL_FOLDER / "mma.cuh").read_text()
        ),
        "8.1 TFLOP/s and 320 GB/s": lambda: (
            (architectures.CARDS["T4"].fp32_tflops, architectures.CARDS["T4"].memory_gb_per_s)
            == (8.1, 320)
        ),
        "at least 44.5 ms with the definition's FMAs": lambda: (
            {
                round(row["ms"], 1)
                for row in architecture_record()["predicted"]
                if (row["gpu"], row["problem"]) == ("T4", "star")
                and row["multiplication_factor"] == 1
            }
            == {44.5}
        ),
    },
    "measuring": {
        "with 95 % confidence": lambda: measure._CONFIDENCE == 1.96,
        "Twenty runs at first": lambda: measure.RUNS == 20,
        "further than 1 % of the median": lambda: measure.NARROW == 0.01,
        "for about a millisecond before each run": lambda: measure._SECONDS_AHEAD == 1e-3,
        "at least a quarter of a second": lambda: measure.SUSTAINED_SECONDS == 0.25,
        "the two kernels are equally fast": lambda: (
            abs(ladder_row("one_image", "winograd", "register_blocked") - 1) < 0.02
        ),
        "PyTorch on the same shape is faster back to back: all of it fits": lambda: (
            records.load_named("nvidia-h200").shape("one_image").problem.compulsory_bytes
            < records.load_named("nvidia-h200").gpu.l2_bytes
        ),
        "The FMA kernel and the copy run at the highest clock": lambda: all(
            ceiling_load(name).sm_clock_mhz == 1980 for name in ("fp32_fma", "copy")
        ),
        "they reach the power limit, the clock gives way": lambda: all(
            ceiling_load(name).power_watts > records.load_named("nvidia-h200").gpu.power_limit_watts
            and ceiling_load(name).sm_clock_mhz < 1700
            for name in ("gemm_tf32", "gemm_float16", "gemm_bfloat16")
        ),
        "really takes 1.1 times as long": True,  # in the cell below
        "a copy of 16 MB": True,  # in the check
        "runs of 5 ms and one of 25 ms": True,  # in the check, which prints the rest
        "the median says 25 ms": True,
    },
    "glossary": {
        "At most 1024": True,  # of every GPU that CUDA runs on; the simulator refuses more
        "7.5 for Turing, 9.0 for Hopper": lambda: (
            architectures.CARDS["T4"].architecture == "sm_75"
            and records.load_named("nvidia-h200").gpu.compute_capability == (9, 0)
        ),
        "of the 32 parts": True,  # banks
        "one of the 32 of its": True,  # lanes of a warp
        "32 neighbouring threads": True,
        "within which the dilation is 1 as well": True,  # kernels/phase.cuh; test_stages runs them
        "10 bits of fraction where float32 has 23": lambda: (
            torch.finfo(torch.float32).eps == 2**-23 and FORMATS["tf32"].digits == 1 + 10
        ),
    },
    "gather": {
        "a kernel of 3×4 taps": True,  # the problem above the picture
        "Output 6 has the even taps: 0 with input 3 and 2 with input 0; tap 4": lambda: (
            exercise_axis().taps(6) == [(0, 3), (2, 0)] and 6 - 4 * exercise_axis().dilation < 0
        ),
        "Output 7 has the odd taps: 1 with input 2": lambda: exercise_axis().taps(7) == [(1, 2)],
        "which taps reach output 6, and output 7": True,
        "the inverse of 3 modulo 2 is 1": lambda: exercise_axis().inverse == pow(3, -1, 2) == 1,
    },
    "first_draft": {
        "It has eleven mistakes": lambda: len(drafts.versions.MENDS) == 11,
        "Which of the eleven mistakes": lambda: len(drafts.checks.CHECKS) == 11,
        "compute capability 7.5": True,  # a TITAN RTX, as NVIDIA's list of GPUs has it
        "values 1, 10, 100 and 1000": True,  # in the cell below
        "The last two are true of … as well, the slowest kernel of the book": lambda: (
            "float sum" in lab.stages["naive_gather"].source
            and "__restrict__" in lab.stages["naive_gather"].source
            and slowest_stage() == "naive_gather"
        ),
        "tiles of 16×16 pixels": lambda: draft_tile(drafts.versions.Draft.read()) == (16, 16),
        "In a tile 16 wide a warp covers two rows": lambda: (
            draft_tile(drafts.versions.Draft.read())[1] * 2 == 32
        ),
        "In a tile 32 wide it is one row": lambda: (
            draft_tile(drafts.versions.Draft.mended())[1] == 32
        ),
        "32 neighbouring threads": True,  # a warp
        "A request for 32 neighbouring floats touches four": True,  # of 4 bytes, eight to a sector
        "rows of 64 pixels": True,  # in the cell below
        "end at 65,535": True,  # the simulator's message above says so, as NVIDIA's guides do
        "point 2 of the checklist": True,
        "Thirteen operators are each wrong in one way": lambda: len(DRAFTS) == 13,
        "The greatest common divisor is 2": lambda: math.gcd(2, 2) == 2,
        "reads the weight the other way round, so it computes one output channel": lambda: (
            drafts.versions.Draft.read()(torch.zeros(1, 1, 1, 1), torch.zeros(1, 9, 1, 1)).shape[1]
            == 1
        ),
    },
    "simulator": {
        "8 bytes": True,  # vectors of two floats
    },
}


@each_page
def test_every_number_has_a_source(page):
    text = prose(page)
    for claim, is_so in CLAIMS[page].items():
        assert is_so() if callable(is_so) else is_so, f"no longer true: {claim!r}"
        assert claim in text, f"no longer said, so no longer to be checked: {claim!r}"
    for said in sorted([*CLAIMS[page], *HARDWARE], key=len, reverse=True):
        text = text.replace(said, "…")
    for setting in SETTINGS:
        text = re.sub(setting, "…", text, flags=re.MULTILINE | re.IGNORECASE)
    left = [
        text[max(0, m.start() - 30) : m.end() + 30] for m in re.finditer(r"(?<!\w)\d[\d.,]*", text)
    ]
    assert not left, "print these in a cell, or add a claim that is compared with the code"


# --- pictures and code ----------------------------------------------------------------------------


@each_chapter
def test_every_picture_has_a_text_and_a_caption(page):
    for cell in cells(page):
        shapes = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        if {"image/png", "text/html"} & shapes:
            shown = cell.metadata.get("mystnb", {})
            text = shown.get("image", {}).get("alt", "")
            if "text/html" in shapes:  # which says it itself
                (output,) = cell.outputs
                text = re.search(r'aria-label="([^"]*)"', output.data["text/html"])[1]
            assert len(text) > 40, cell.source
            assert shown["figure"]["caption"]
            assert f"{{numref}}`{shown['figure']['name']}`" in "".join(
                c.source for c in cells(page) if c.cell_type == "markdown"
            ), f"{shown['figure']['name']} is never referred to"


@each_chapter
def test_no_output_is_a_warning_or_an_error(page):
    for cell in cells(page):
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"


COLUMNS = 86  # that the page has room for where it is narrowest on a screen, beside its contents


@each_chapter
def test_what_a_cell_prints_fits_the_page(page):
    for cell in cells(page):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            is_text = data.keys() <= {"text/plain"}  # what is more is not shown as text
            text = output.get("text", data.get("text/plain", "") if is_text else "")
            wide = [line for line in text.splitlines() if len(line) > COLUMNS]
            assert not wide, cell.source


@each_page
def test_kernels_are_shown_from_their_files_and_never_pasted(page):
    if PAGES[page].suffix == ".md":
        typed = PAGES[page].read_text(encoding="utf-8")
    else:
        typed = "\n".join(cell.source for cell in cells(page))
    typed = {" ".join(line.split()) for line in typed.splitlines()}
    for stage in lab.stages.values():
        own = {" ".join(line.split()) for line in stage.source.splitlines()}
        pasted = {line for line in typed & own if len(line) > 60}
        assert not pasted


# --- chapters -------------------------------------------------------------------------------------

BONES = ["The idea", "The prediction", "The code", "The run", "What limits it", "Exercises"]


@each_stage
def test_every_stage_has_a_chapter_with_the_same_bones(stage):
    page = stage.chapter.removeprefix("book/")
    text = "\n".join(c.source for c in cells(page) if c.cell_type == "markdown")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in BONES] == BONES
    following = {other.previous.name: other for other in lab.stages.values() if other.previous}
    if stage.name in following:
        assert f"{{doc}}`{following[stage.name].name}`" in text, "what limits it leads on"


@each_stage
def test_every_stage_shows_its_time_on_the_star(stage):
    if stage.unit == "FMA":
        star = records.load_named("nvidia-h200").shape("star")
        milliseconds = star.row(stage.name).time_ms()
    else:
        rows = tensor_core_rows()[0].values()
        milliseconds = next(row for row in rows if row["kernel"] == stage.name)["cold_ms"]
    page = stage.chapter.removeprefix("book/")
    shown = [o.text for c in cells(page) for o in c.get("outputs", []) if "text" in o]
    lines = [line for text in shown for line in text.splitlines() if stage.name in line]
    assert any(f" {milliseconds:.3f}" in line for line in lines)


@each_chapter
def test_every_exercise_has_a_folded_solution_and_a_check(page):
    numbers, solutions, checks = [], 0, 0
    for cell in cells(page):
        if cell.cell_type == "markdown":
            found = re.findall(r"^:::\{admonition\} Exercise (\d+)$", cell.source, re.M)
            numbers += map(int, found)
            solutions += len(re.findall(r"^:::\{dropdown\} Solution$", cell.source, re.M))
        elif "hide-cell" in cell.metadata.get("tags", []):
            checks += 1
            assert cell.outputs, "a check shows what it found"
        elif "exercises.solution(" in cell.source:
            # It shows both; test_exercises.py says what.
            assert f'"{page}.{numbers[-1]}"' in cell.source, "under its own exercise"
            solutions += 1
            checks += 1
    assert numbers == list(range(1, len(numbers) + 1)) != []
    assert len(numbers) == solutions == checks
