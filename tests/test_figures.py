"""What the book shows: excerpts are verbatim, constants are the compiler's, pictures are true."""

import re
import subprocess
import sys

import numpy as np
import pytest
import records_for_tests
from counter_cases import PATTERN_CASES
from decoder_record_for_tests import made_record
from matplotlib.colors import to_hex
from matplotlib.text import Text

import convt_lab as lab
from convt_lab import Problem, dispatch, figures, operator_record, reference
from convt_lab.simulator.report import BufferUse, Report, Request, Site, totals_of
from convt_lab.stages import fma_stages, kernels

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

each_stage = pytest.mark.parametrize("stage", fma_stages.values(), ids=lambda stage: stage.name)


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
    # By itself, or through the functions of its variants.
    assert "cudaGetLastError" in launcher.text or re.search(r"\blaunch\w*\(", launcher.text)


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
    stage = lab.stages["register_blocked"]
    values = figures.constants(stage, "Sizes<4>::THREAD_W", "Sizes<4>::WARP_W")
    assert f"THREAD_W = {values['Sizes<4>::THREAD_W']};" in stage.source
    assert values["Sizes<4>::WARP_W"] == 32 * values["Sizes<4>::THREAD_W"]
    with pytest.raises(lab.CompileError):
        figures.constants(TEXT, "NO_SUCH_NAME")


# --- pictures -------------------------------------------------------------------------------------

LANE = np.arange(32)


COUNTED = {
    space: [case for case in PATTERN_CASES if case.space == space] for space in ("global", "shared")
}


def one_request(space, offsets, size=4, cost=0):
    """A load as a report would hold it."""
    taken = tuple(None if offset is None else int(offset) for offset in offsets)
    return Request(2, space, "load", "x", size, taken, cost)


def a_report():
    """Three sites on two lines, and a buffer of two planes of 2×3."""

    def site(line, space, op, sectors, wavefronts):
        return Site(line, space, op, "x", 1, 32, sectors, wavefronts, 128, 128, 4)

    sites = (
        site(2, "global", "load", 1200, 0),
        site(2, "shared", "store", 0, 34),
        site(20, "global", "store", 7, 0),
    )
    use = BufferUse("x", 48, 2, np.array([0, 5, 5, 7, 7, 7, *[1] * 6], np.uint32))
    source = "\n".join(f"  int line_{n};" for n in range(1, 23))
    return Report(sites, totals_of(sites), 0, (), {"x": use}, (), 1, 1, source)


def operators_record(**speedups):
    """One in which the operator chose each kernel of that name, and was so many times as fast."""
    seconds = {name: operator_record.Cold(0.001 / s, 20, 0.0) for name, s in speedups.items()}
    pytorch = operator_record.Cold(0.001, 20, 0.0)
    cases = [
        operator_record.Case(
            *(f"problem of {name}", Problem(), *operator_record.FORMS[0]),
            pytorch=operator_record.Result(cold=pytorch),
            operator=operator_record.Result(cold=cold),
            choice=name,
            pytorch_beside=pytorch,
        )
        for name, cold in seconds.items()
    ]
    untimed = operator_record.Case(
        *("untimed", Problem(), *operator_record.FORMS[0]), operator_record.Result("failed", "no")
    )
    made = records_for_tests.record()
    parts = made.gpu, made.software, made.date, 0, 1.0, {}, (*cases, untimed)
    return operator_record.OperatorRecord(*parts)


CHOICES = {"pytorch": 1.0, **{name: 2.0 + i for i, name in enumerate(kernels)}}
CHOICES = {name: speedup for name, speedup in CHOICES.items() if name not in dispatch.SLOW}

ROOFS = [figures.Roof("FMA", 10e12), figures.Roof("tensor cores", 80e12)]
POINTS = {
    "slow": figures.RooflinePoint(2.0, 4e12),
    "like it": figures.RooflinePoint(2.01, 4.02e12),
    "fast": figures.RooflinePoint(100.0, 12e12),
    "fast, executed": figures.RooflinePoint(50.0, 6e12, kind="executed"),
    "unprofiled": figures.RooflinePoint(100.0, 12.5e12, "tensor cores", kind="fewest bytes"),
    "bound": figures.RooflinePoint(1.0, 5e12, "tensor cores", kind="bound"),
}

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
    "flat_axis": lambda: figures.flat_axis((3, 5), 8, (2, 3)),
    "window": lambda: figures.window(20, 7, 28),
    "fragments": lambda: figures.fragments(lane=5),
    "promotion": lambda: figures.promotion({"a": {8: 1.5, 64: 9.0}, "b": {64: 3.0}}, gate=8.0),
    "banks": lambda: figures.banks({"a": LANE[:8, None] * 48 + np.arange(4)}),
    "coalescing": lambda: figures.coalescing(one_request("global", 8 * LANE)),
    "reuse": lambda: figures.reuse(a_report(), "x", (2, 2, 3)),
    "cost_by_line": lambda: figures.cost_by_line(a_report()),
    "bars": lambda: figures.bars(records_for_tests.record(), "star"),
    "roofline": lambda: figures.roofline(ROOFS, 5e12, POINTS),
    "growth": lambda: figures.growth(records_for_tests.record()),
    "speedups": lambda: figures.speedups(operators_record(**CHOICES), operator_record.FORMS[0]),
    "layer_times": lambda: figures.layer_times(made_record(), "TF32", after="tables"),
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
    others = {"Listing", "Picture", "Roof", "RooflinePoint", "constants", "diff", "listing"}
    others |= {"pixels_of"}
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


@pytest.mark.parametrize("stage", ["naive_gather", "coalesced"])
def test_request_draws_what_a_trace_has(stage):
    problem = Problem(height=40, width=32, kernel_size=(3, 7))  # rows begin where sectors do
    report = lab.stages[stage].profile(*problem.random_inputs())
    (request,) = (r for r in report.requests if (r.buffer, r.op) == ("input", "load"))
    h, w = figures.pixels_of(request, problem.width)
    asked_for = [offset for offset in request.offsets if offset is not None]
    assert (4 * (h * problem.width + w)).tolist() == asked_for
    assert max(w) < problem.width
    colours = list(cells(figures.request({"": (h, w)}).figure.axes[0]).values())
    asked = colours.count(to_hex("#0072B2"))
    assert asked == len(h)
    assert asked + colours.count(to_hex("#F9E4B7")) == 8 * request.cost


def test_pixels_of_shared_memory_or_of_vectors_are_an_error():
    for request in (one_request("shared", LANE), one_request("global", 16 * LANE, size=16)):
        with pytest.raises(ValueError, match="must be of global memory, 4 bytes for each lane"):
            figures.pixels_of(request, 8)


def test_flat_axis_frames_what_the_taps_multiply():
    rows, axis = figures.flat_axis((3, 5), 8, (2, 3)).figure.axes
    on_axis = numbers(axis)
    assert on_axis == {(0, place): place for place in range(24)}
    assert numbers(rows) == {divmod(place, 8): place for place in range(24)}
    framed = {
        divmod(p, 8) for output in (16, 20) for p in (output - k for k in (0, 1, 2, 8, 9, 10))
    }
    inset = [p for p in rows.patches if not p.get_fill()]
    assert {(int(p.get_y()), int(p.get_x())) for p in inset} == framed
    grey = {place for place, fill in cells(rows).items() if fill == to_hex("#ECECEC")}
    assert grey == {(h, w) for h in range(3) for w in range(5, 8)}


def test_banks_marks_conflicts_and_nothing_else():
    words = np.arange(4)
    picture = figures.banks({p: LANE[:8, None] * p + words for p in (48, 52)})
    conflicts, free = (set(cells(axes).values()) for axes in picture.figure.axes)
    assert conflicts == {to_hex("white"), to_hex("#D55E00")}
    assert free == {to_hex("white"), to_hex("#0072B2")}


BLUE, RED, PALE_ORANGE, ORANGE = (to_hex(c) for c in ("#0072B2", "#D55E00", "#F9E4B7", "#E69F00"))


def patches(axes, colour) -> list:
    """The filled rectangles of one colour."""
    return [p for p in axes.patches if p.get_fill() and to_hex(p.get_facecolor()) == colour]


@pytest.mark.parametrize("case", COUNTED["shared"], ids=str)
def test_banks_of_a_request_give_the_wavefronts_that_were_counted(case):
    request = next(
        r
        for r in reversed(case.run("simulator", trace=True).requests)
        if (r.space, r.op) == ("shared", "load")
    )
    picture = figures.banks(request)
    parts = picture.table().splitlines()[2:]
    assert len(picture.figure.axes) == len(parts)
    assert len(parts) in {4: (1,), 8: (2,), 16: (2, 4)}[request.bytes]
    wavefronts = [
        int(re.search(r"(\d+) wavefront", a.get_title("left"))[1]) for a in picture.figure.axes
    ]
    assert wavefronts == [int(row.split()[1]) for row in parts]
    assert sum(wavefronts) == request.cost == case.expected
    # A bank is red where several words lie in it.
    for axes, count in zip(picture.figure.axes, wavefronts, strict=True):
        assert bool(patches(axes, RED)) == (count > 1)


def test_banks_of_a_request_leave_out_lanes_that_take_no_part():
    offsets = [4 * n if n in (3, 8) else None for n in range(32)]
    (axes,) = figures.banks(one_request("shared", offsets, cost=1)).figure.axes
    assert {(p.get_y(), p.get_x()) for p in patches(axes, BLUE)} == {(3, 3), (8, 8)}


@pytest.mark.parametrize("case", COUNTED["global"], ids=str)
def test_coalescing_draws_the_sectors_that_were_counted(case):
    request = case.run("simulator", trace=True).requests[0]
    picture = figures.coalescing(request)
    rows = [row.split() for row in picture.table().splitlines()[2:]]
    assert len(patches(picture.figure.axes[0], PALE_ORANGE)) == len(rows) == request.cost
    assert request.cost == case.expected
    distinct = {offset for offset in request.offsets if offset is not None}
    assert sum(int(row[-1]) for row in rows) == len(distinct) * request.bytes
    assert len(patches(picture.figure.axes[0], BLUE)) == len(distinct)


def test_coalescing_says_which_lanes_a_sector_serves():
    offsets = [None, 4, 0, None, 996, *[32] * 27]
    picture = figures.coalescing(one_request("global", offsets, cost=3))
    assert picture.table().splitlines() == [
        "load of 'x' in line 2: 30 lanes, 4 bytes each, 3 sectors",
        "sector  lanes  bytes asked for, of 32",
        "     0  1-2                         8",
        "     1  5-31                        4",
        "    31  4                           4",
    ]


def test_a_request_of_the_other_memory_is_an_error():
    with pytest.raises(ValueError, match="banks are shared memory's"):
        figures.banks(one_request("global", LANE))
    with pytest.raises(ValueError, match="sectors are global memory's"):
        figures.coalescing(one_request("shared", LANE))


def test_reuse_draws_the_counts_of_one_plane():
    picture = figures.reuse(a_report(), "x", (2, 2, 3))
    (image,) = picture.figure.axes[0].images
    assert image.get_array().tolist() == [[0, 5, 5], [7, 7, 7]]
    rows = [row.split() for row in picture.table().splitlines()[1:]]
    assert rows == [["reads", "values"], ["0", "1"], ["5", "2"], ["7", "3"]]
    other = figures.reuse(a_report(), "x", (2, 2, 3), plane=[1])
    assert (other.figure.axes[0].images[0].get_array() == 1).all()
    with pytest.raises(ValueError, match="must have 1 indices"):
        figures.reuse(a_report(), "x", (2, 2, 3), plane=[1, 0])


def test_cost_by_line_puts_a_bar_beside_each_line():
    picture = figures.cost_by_line(a_report())
    assert picture.table().splitlines() == [
        "line  sectors  wavefronts  source",
        "   2    1,200          34  int line_2;",
        "  20        7              int line_20;",
    ]
    axes = picture.figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"1,234", "7", "int line_2;"} <= set(texts)
    assert "int line_5;" in texts
    assert "int line_6;" not in texts  # cut out
    sectors = [p.get_width() for p in patches(axes, BLUE)]
    wavefronts = [p.get_width() for p in patches(axes, ORANGE)]
    assert sectors[0] / 1200 == pytest.approx(sectors[1] / 7) == pytest.approx(wavefronts[0] / 34)


@each_stage
def test_the_bars_of_a_stage_add_up_to_its_totals(stage):
    problem = Problem.named("star_small")
    report = stage.profile(*problem.random_inputs(), **problem.arguments)
    rows = figures.cost_by_line(report).table().splitlines()[1:]
    shown = sum(int(n.replace(",", "")) for row in rows for n in re.findall(r"[\d,]+", row[4:25]))
    assert shown == sum(site.cost for site in report.sites)
    x = report.buffers["input"]
    picture = figures.reuse(report, "input", problem.input_shape)
    plane = x.loads[: problem.height * problem.width]
    assert picture.figure.axes[0].images[0].get_array().sum() == plane.sum()


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


# --- measured -------------------------------------------------------------------------------------


def test_bars_draw_every_time_and_the_least_one():
    record = records_for_tests.record()
    shape = record.shapes[0]
    picture = figures.bars(record, shape.name)
    (axes,) = picture.figure.axes
    timed = [row for row in shape.rows if row.cold]
    assert [bar.get_width() for bar in axes.patches] == [row.time_ms() for row in timed]
    assert len(patches(axes, BLUE)) == sum(row.kind == "stage" for row in timed)
    assert len(patches(axes, ORANGE)) == len(patches(axes, PALE_ORANGE)) == 1
    (line,) = axes.lines
    assert line.get_xdata()[0] == 1000 * shape.problem.flops / record.ceilings.fp32_fma
    table = picture.table().splitlines()
    assert [row.split()[0] for row in table] == [shape.name, *(row.name for row in shape.rows)]
    assert table[1].split()[1] == f"{timed[0].time_ms():.3f}"
    assert "failed" in picture.table()


def test_bars_write_their_times_in_a_column_that_no_line_crosses():
    record = records_for_tests.record()
    (axes,) = figures.bars(record, "star").figure.axes
    timed = [row for row in record.shapes[0].rows if row.cold]
    assert [float(text.get_text()) for text in axes.texts] == [row.time_ms() for row in timed]
    (right,) = {text.get_position()[0] for text in axes.texts}
    assert right == axes.get_xlim()[1]
    (line,) = axes.lines
    figure = axes.figure
    figure.draw_without_rendering()
    crossed = axes.transData.transform((line.get_xdata()[0], 0))[0]
    assert all(text.get_window_extent().x0 > crossed for text in axes.texts)


def test_the_roofline_has_its_ridges_and_all_points():
    picture = figures.roofline(ROOFS, 5e12, POINTS)
    (axes,) = picture.figure.axes
    first, second, *dots = axes.lines
    assert first.get_xydata()[1].tolist() == [2.0, 10.0]
    assert second.get_xydata()[1].tolist() == [16.0, 80.0]
    drawn = {tuple(dot.get_xydata()[0]): dot for dot in dots}
    assert set(drawn) == {(p.intensity, p.flops_per_second / 1e12) for p in POINTS.values()}
    looks = {
        (dot.get_marker(), to_hex(dot.get_markerfacecolor())) for dot in drawn.values()
        if dot.get_markerfacecolor() != "none"
    }  # fmt: skip
    assert len(looks) == 4 == len({point.kind for point in POINTS.values()})
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["bytes as profiled", "as executed", "bytes that must move", "at most"]
    rows = [row.split() for row in picture.table().splitlines()]
    assert [row[-1] for row in rows[1:]] == ["40.0%", "40.2%", "120.0%", "60.0%", "15.6%", "100.0%"]
    assert [row[-2] for row in rows[1:4]] == ["FMA", "FMA", "FMA"]
    assert rows[5][-3:-1] == ["tensor", "cores"]
    assert rows[6][-2] == "copy"


def test_the_ridge_of_a_single_roof_is_marked():
    (axes,) = figures.roofline(ROOFS[:1], 5e12, {"slow": POINTS["slow"]}).figure.axes
    assert [2.0, 2.0] in [list(line.get_xdata()) for line in axes.lines]
    sides = {t.get_text(): t.get_position()[0] for t in axes.texts if "limit" in t.get_text()}
    assert sides["memory is the limit"] < 2.0 < sides["arithmetic is the limit"]


def test_points_in_one_place_share_a_name_and_are_still_told_apart():
    (axes,) = figures.roofline(ROOFS, 5e12, POINTS).figure.axes
    named = {text.get_text() for text in axes.texts}
    assert "slow, like it" in named
    assert not {"slow", "like it"} & named
    sizes = {
        dot.get_markersize(): dot.get_markerfacecolor() for dot in axes.lines
        if len(dot.get_xdata()) == 1 and 2.0 <= dot.get_xdata()[0] < 3
    }  # fmt: skip
    assert len(sizes) == 2
    assert sizes[max(sizes)] == "none"  # a ring


def test_no_name_lies_on_another():
    crowd = {
        f"kernel number {i}": figures.RooflinePoint(90 + i, (5 + i / 4) * 1e12) for i in range(6)
    }
    (axes,) = figures.roofline(ROOFS, 5e12, crowd).figure.axes
    axes.figure.draw_without_rendering()
    # Of the words alone, without the lines that lead to them.
    boxes = [Text.get_window_extent(t) for t in axes.texts if t.get_text() in crowd]
    assert len(boxes) == len(crowd)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_spread_moves_only_what_is_too_near():
    assert figures._spread([0, 30, 60], 10) == [0, 30, 60]
    assert figures._spread([0, 2, 60], 10) == pytest.approx([-4, 6, 60])
    assert figures._spread([0, 1, 8], 10) == pytest.approx([-7, 3, 13])


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            figures.RooflinePoint(1, 1e12, "none"),
            r"roof='none' of x: must be one of \['FMA', 'tens",
        ),
        (
            figures.RooflinePoint(1, 1e12, kind="guess"),
            r"kind='guess' of x: must be one of \['meas",
        ),
    ],
)
def test_a_roofline_refuses_what_it_cannot_place(point, message):
    with pytest.raises(ValueError, match=message):
        figures.roofline(ROOFS, 5e12, {"x": point})


def test_growth_draws_the_best_stage_and_cudnn():
    record = records_for_tests.record()
    picture = figures.growth(record)
    axes = picture.figure.axes
    rows = picture.table().splitlines()[1:]
    assert len(rows) == sum(map(len, record.growth.values()))
    for panel, points in zip(axes, record.growth.values(), strict=False):
        stage, cudnn = panel.lines
        assert stage.get_xdata().tolist() == [point.value for point in points]
        for line, rows_of in ((stage, lambda p: p.best), (cudnn, lambda p: p.row("cudnn_float32"))):
            expected = [1e9 * point.seconds_per_pixel(rows_of(point)) for point in points]
            assert line.get_ydata() == pytest.approx(expected)


def test_speedups_mark_every_choice_in_its_own_way():
    picture = figures.speedups(operators_record(**CHOICES), operator_record.FORMS[0])
    (axes,) = picture.figure.axes
    marks = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    best_first = sorted(CHOICES, key=CHOICES.get, reverse=True)
    assert [line.get_xdata()[0] for line in marks] == pytest.approx(
        [CHOICES[name] for name in best_first]
    )
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"problem of {n}" for n in best_first]
    looks = {(m.get_marker(), to_hex(m.get_markerfacecolor())) for m in marks}
    assert len(looks) == len(CHOICES)  # told apart without their edges' colour
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(named) == sorted(CHOICES)
    rows = [row.split()[-4:] for row in picture.table().splitlines()[1:]]
    assert [row[0] for row in rows] == best_first
    for name, speedup, pytorch, own in rows:
        assert (pytorch, float(own)) == ("1.0000", pytest.approx(1 / CHOICES[name], abs=1e-4))
        assert float(speedup) == pytest.approx(CHOICES[name])


def test_speedups_without_some_choices_name_only_the_others():
    few = operators_record(pytorch=0.9, one_channel=4.0)
    (axes,) = figures.speedups(few, operator_record.FORMS[0]).figure.axes
    assert axes.get_xlim()[0] < 0.9
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"pytorch", "one_channel"}


def test_fragments_are_what_the_instruction_takes():
    """Multiply numbers by the identity: each must come out where the picture says that it went."""
    source = """
    #include "mma.cuh"
    __global__ void multiply(const float* a, const float* b, float* c) {
      uint32_t left[4], right[2];
      for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a[threadIdx.x * 4 + i]);
      for (int i = 0; i < 2; ++i) right[i] = __float_as_uint(b[threadIdx.x * 2 + i]);
      float sum[4] = {};
      mma<Tf32>(sum, left, right);
      for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = sum[i];
    }
    """
    program = lab.compile(source, backend="simulator")

    def registers(name, matrix):
        shape, holder = figures._FRAGMENTS[name]
        held = np.full((32, np.prod(shape) // 32), np.nan, dtype=np.float32)
        for place in np.ndindex(*shape):
            held[holder(*place)] = matrix[place]
        assert not np.isnan(held).any()  # each holds as many as the others
        return held

    def product(a, b):
        c = np.full((32, 4), np.nan, dtype=np.float32)
        program.launch("multiply", 1, 32, [registers("A", a), registers("B", b), c])
        shape, holder = figures._FRAGMENTS["C"]
        return np.array([[c[holder(i, j)] for j in range(shape[1])] for i in range(shape[0])])

    a = np.arange(128.0).reshape(16, 8)
    np.testing.assert_array_equal(product(a, np.eye(8)), a)
    b = np.arange(64.0).reshape(8, 8)
    np.testing.assert_array_equal(product(np.eye(16)[:, :8], b)[:8], b)


def test_fragments_draws_all_lanes_and_frames_one():
    picture = figures.fragments(lane=5)
    assert [axes.get_title(loc="left") for axes in picture.figure.axes] == ["B", "A", "C"]
    for axes in picture.figure.axes:
        (rows, columns), holder = figures._FRAGMENTS[axes.get_title(loc="left")]
        owners = {place: holder(*place)[0] for place in np.ndindex(rows, columns)}
        assert numbers(axes) == owners
        framed = {(int(p.get_y()), int(p.get_x())) for p in axes.patches if not p.get_fill()}
        assert framed == {place for place, lane in owners.items() if lane == 5}


def test_promotion_draws_each_line_and_the_gate():
    picture = figures.promotion({"a": {8: 1.5, 64: 9.0}, "b": {64: 3.0}}, gate=8.0)
    (axes,) = picture.figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["a"].get_xydata().tolist() == [[8, 1.5], [64, 9]]
    assert lines["b"].get_xydata().tolist() == [[64, 3]]
    assert set(lines["gate"].get_ydata()) == {8.0}
    table = [line.split() for line in picture.table().splitlines()]
    assert table == [["terms", "8", "64"], ["a", "1.5", "9.0"], ["b", "3.0"]]
