"""What the book shows: excerpts are verbatim, constants are the compiler's, pictures are true."""

import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex

import convt_lab as lab
from convt_lab import Problem, figures, reference

TEXT = """\
#include <cmath>

constexpr int SIZE = 3 * 7;  // not a { brace

// Twice the value.
// Two lines of it.
template <int N>
__device__ float
    twice(float x) {
  if (x > 0.0f) {  // }
    return 2.0f * x;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x += x;
  return x;
}

struct Pair {
  int a, b;
};

// The caller.
__global__ void caller(float* y) {
  const Pair pair = {1, 2};
  if (twice<1>(y[0]) > 1.0f) {
    y[0] = pair.a;
  }
}
"""

each_stage = pytest.mark.parametrize("stage", lab.stages.values(), ids=lambda stage: stage.name)


# --- code -----------------------------------------------------------------------------------------


def test_a_function_is_shown_with_its_comment_and_to_its_closing_brace():
    twice = figures.listing(TEXT, "twice")
    assert twice.text.startswith("// Twice the value.\n// Two lines of it.\ntemplate <int N>")
    assert twice.text.endswith("  return x;\n}")
    assert twice.text in TEXT
    caller = figures.listing(TEXT, "caller")
    assert caller.text == TEXT[TEXT.index("// The caller.") :].rstrip()
    assert figures.listing(TEXT, "Pair").text == "struct Pair {\n  int a, b;\n};"


def test_other_text_begins_at_the_line_that_holds_it():
    block = figures.listing(TEXT, "if (x > 0.0f)")
    assert block.text == "if (x > 0.0f) {  // }\n  return 2.0f * x;\n}"
    until = figures.listing(TEXT, "return 2.0f", "return x;").text
    assert until.splitlines()[0] == "  return 2.0f * x;"
    assert "#pragma unroll" in until.splitlines()
    assert until.endswith("x += x;")
    assert figures.listing(TEXT).text == TEXT.rstrip()


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ("nowhere", None, "no line contains 'nowhere'"),
        ("twice", "nowhere", "no line after line 7 contains 'nowhere'"),
        ("constexpr int SIZE", "#include", "no line after"),
    ],
)
def test_what_is_not_there_is_an_error(start, end, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        figures.listing(TEXT, start, end)


def test_what_never_closes_is_an_error():
    with pytest.raises(ValueError, match="nothing closes"):
        figures.listing("void f() {\n", "f")


@each_stage
def test_a_kernel_is_shown_verbatim(stage):
    kernel = figures.listing(stage, f"{stage.name}_kernel")
    assert kernel.text in stage.source
    assert kernel.text.endswith("\n}")
    assert kernel.text.count("__global__") == 1
    launcher = figures.listing(stage, stage.name)
    assert launcher.text in stage.source
    assert "cudaGetLastError" in launcher.text or "launch<" in launcher.text


def test_a_python_function_is_shown_without_its_docstring():
    shown = figures.listing(reference.scatter)
    assert shown.language == "python"
    assert '"""' not in shown.text
    assert "def scatter(" in shown.text
    assert shown.text.endswith("return _finish(output, bias, is_batched)")
    compile(shown.text, "scatter", "exec")


@pytest.mark.parametrize("stage", list(lab.stages.values())[1:], ids=lambda stage: stage.name)
def test_a_diff_holds_both_texts(stage):
    lines = figures.diff(stage.previous, stage).text.splitlines()
    assert [s[1:] for s in lines if s[:1] != "+"] == stage.previous.source.splitlines()
    assert [s[1:] for s in lines if s[:1] != "-"] == stage.source.splitlines()


def test_markdown_is_a_fence_in_the_right_language():
    markdown = figures.listing(TEXT, "Pair")._repr_markdown_()
    assert markdown == "`CUDA C++: Pair`\n\n```cuda\nstruct Pair {\n  int a, b;\n};\n```"
    assert "```diff\n" in figures.diff(*list(lab.stages.values())[:2])._repr_markdown_()


def test_constants_come_from_the_compiler():
    assert figures.constants(TEXT, "SIZE", "SIZE / 2 + 1") == {"SIZE": 21, "SIZE / 2 + 1": 11}
    values = figures.constants(lab.stages["register_blocked"], "Sizes<3, 7>::THREAD_W")
    assert f"FIXED ? {values['Sizes<3, 7>::THREAD_W']} :" in lab.stages["register_blocked"].source
    with pytest.raises(lab.CompileError):
        figures.constants(TEXT, "NO_SUCH_NAME")


# --- pictures -------------------------------------------------------------------------------------

LANE = np.arange(32)
PICTURES = {
    "stamps": lambda: figures.stamps(
        Problem(height=2, width=3, kernel_size=3),
        Problem(height=3, width=3, kernel_size=3, stride=2, padding=1, output_padding=1),
    ),
    "residues": lambda: figures.residues(
        Problem(width=5, kernel_size=(1, 7), stride=(1, 3), dilation=(1, 2)).axes[1]
    ),
    "request": lambda: figures.request({"a": (LANE, 40 + 0 * LANE), "b": (3 + 0 * LANE, LANE)}),
    "halo": lambda: figures.halo((4, 8), (3, 7)),
    "warp_tile": lambda: figures.warp_tile((16, 2), 4),
    "window": lambda: figures.window(20, 7, 28),
    "banks": lambda: figures.banks({"a": LANE[:8, None] * 48 + np.arange(4)}),
}
each_picture = pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES.keys())


def cells(axes) -> dict[tuple[int, int], str]:
    """The colours of a panel's cells by (row, column)."""
    found = {}
    for patch in axes.patches:
        if patch.get_fill() and patch.get_width() == 1:
            found[int(patch.get_y()), int(patch.get_x())] = to_hex(patch.get_facecolor())
    return found


def numbers(axes) -> dict[tuple[int, int], int]:
    """The numbers in a panel's cells by (row, column)."""
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text())
        for text in axes.texts
    }


@each_picture
def test_a_picture_is_a_png_and_the_same_every_time(draw):
    png, size = draw()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert 300 <= size["width"] <= 700  # pixels of a page
    assert draw()._repr_png_() == (png, size)


def test_every_picture_is_tested():
    others = {"Listing", "Picture", "constants", "diff", "listing"}
    assert set(figures.__all__) - others == set(PICTURES)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(height=2, width=3, kernel_size=(3, 2)),
        Problem(height=3, width=3, kernel_size=3, stride=2, padding=1, output_padding=1),
        Problem(height=2, width=4, kernel_size=2, stride=3, dilation=2),
    ],
)
def test_stamps_counts_what_scatter_sums(problem):
    axes = figures.stamps(problem).figure.axes[0]
    ones = np.ones(problem.input_shape), np.ones(problem.weight_shape)
    counts = reference.scatter(*ones, **problem.arguments)[0, 0]
    drawn = numbers(axes)
    for oh, ow in np.ndindex(counts.shape):
        assert drawn[oh + problem.padding[0], ow + problem.padding[1]] == counts[oh, ow]


def test_residues_shows_the_taps_and_no_others():
    axis = Problem(
        width=5, kernel_size=(1, 7), stride=(1, 3), dilation=(1, 2), padding=(0, 2)
    ).axes[1]
    axes = figures.residues(axis).figure.axes[0]
    colours = cells(axes)
    pale = colours[6, 1]  # would need an input before the first
    shown = {
        (k, o, i)
        for (k, o), i in numbers(axes).items()
        if colours[k, o] not in (pale, to_hex("white"))
    }
    assert shown == {(k, o, i) for o in range(axis.out_size) for k, i in axis.taps(o)}


def test_request_draws_the_lanes_and_their_sectors():
    h, w = 5 + LANE // 16, 12 + LANE % 16
    colours = list(cells(figures.request({"two rows": (h, w)}).figure.axes[0]).values())
    asked = colours.count(to_hex("#0072B2"))
    assert asked == 32
    came = asked + colours.count(to_hex("#F9E4B7"))
    assert came == 8 * len({(y, x // 8) for y, x in zip(h, w, strict=True)})


def test_banks_marks_conflicts_and_nothing_else():
    words = np.arange(4)
    picture = figures.banks({p: LANE[:8, None] * p + words for p in (48, 52)})
    conflicts, free = (set(cells(axes).values()) for axes in picture.figure.axes)
    assert conflicts == {to_hex("white"), to_hex("#D55E00")}
    assert free == {to_hex("white"), to_hex("#0072B2")}


def test_window_slides_by_one_for_each_tap():
    colours = cells(figures.window(20, 7, 28).figure.axes[0])
    for kw in range(7):
        dark = [j for j in range(28) if colours[kw, j] == to_hex("#0072B2")]
        assert dark == [pixel + 6 - kw for pixel in range(20)]


def test_matplotlib_is_imported_only_to_draw():
    code = (
        "import sys, convt_lab; assert 'convt_lab.figures' not in sys.modules; "
        "import convt_lab.figures; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
