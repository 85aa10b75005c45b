"""The book's words: numbers that have a source, pictures with a text, chapters with the same bones.

A chapter shows its numbers as the outputs of cells, which nbval compares. What is left in the prose
is checked here: every number is a setting that the text itself chooses ("stride 2"), a fact of the
hardware, or a claim that this file compares with the code.
"""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import convt_lab as lab
from convt_lab import Problem, decoder, decoder_record, decoder_report, figures

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((ROOT / "book").glob("*.*")) if path.suffix != ".bib"}
STAR = Problem.named("star")

each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", [p for p in PAGES if PAGES[p].suffix == ".ipynb"])
each_stage = pytest.mark.parametrize("stage", lab.stages.values(), ids=lambda stage: stage.name)


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
    "65,536 of them",
]


def constant(stage: str, name: str) -> int:
    return figures.constants(lab.stages[stage], name)[name]


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


# What a page says, and whether it is so: True if the phrase itself is made from the code, or names
# what the cell beside it sets or prints.
CLAIMS = {
    "intro": {
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
        "for 1 and 2. With 3 it": True,  # output paddings, printed by the solution
        "not be 3?": True,
    },
    "naive_gather": {
        "32 rows high": True,  # a lane for each
    },
    "coalesced": {
        "32 dark pixels": True,  # a lane for each
        f"{STAR.width - 1} pixels wide instead of {STAR.width}": True,
        "32 outputs lie above": True,
        "16 pixels": True,  # the exercise's width
        "With 16 columns": True,
    },
    "shared_tiled": {
        "3 by 7 inputs": STAR.kernel_size == (3, 7),
        "256 outputs": lambda: (
            constant("shared_tiled", "TILE_H") * constant("shared_tiled", "TILE_W") == 256
        ),
        "8×32 is best": min((2**i for i in range(9)), key=inputs_of_tile) == 8,
    },
    "register_blocked": {
        "8 bytes": lambda: constant("register_blocked", "Sizes<4>::WINDOW") % 4 == 2,  # a pair
        "3×7": lambda: lab.stages["register_blocked"].variant(STAR) == "3x7",
    },
    "winograd": {
        "3×7": lambda: lab.stages["winograd"].variant(STAR) == "F(2, 3)",
        "8 bytes": lambda: constant("winograd", "f23::WINDOW") % 4 == 2,  # a pair
    },
    "ladder": {
        "3×7": lambda: lab.stages["register_blocked"].variant(STAR) == "3x7",
    },
    "decoder": {
        "about a thousandth of the work": lambda: round(share_of_work("up3", "up4"), 3) == 0.001,
        "moves more bytes than any other": lambda: most_bytes() == "up4",
        "about twice the forward's operations": lambda: 1.9 < backward_over_forward() < 2.1,
    },
    "api": {},
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
        outputs = cell.get("outputs", [])
        if any("image/png" in output.get("data", {}) for output in outputs):
            shown = cell.metadata.get("mystnb", {})
            assert len(shown.get("image", {}).get("alt", "")) > 40, cell.source
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


@each_chapter
def test_every_exercise_has_a_folded_solution_and_a_check(page):
    exercises = solutions = checks = 0
    for cell in cells(page):
        if cell.cell_type == "markdown":
            exercises += len(re.findall(r"^:::\{admonition\} Exercise \d+$", cell.source, re.M))
            solutions += len(re.findall(r"^:::\{dropdown\} Solution$", cell.source, re.M))
        elif "hide-cell" in cell.metadata.get("tags", []):
            checks += 1
            assert cell.outputs, "a check shows what it found"
    assert 1 <= exercises <= 3
    assert exercises == solutions == checks
