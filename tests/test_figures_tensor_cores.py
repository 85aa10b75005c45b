"""The picture of tensor cores' kernels: every way of a record, beside PyTorch's of its form."""

from dataclasses import asdict

import pytest
import records_for_tests
from matplotlib.colors import to_hex

from convt_lab import Problem, figures_tensor_cores
from convt_lab.records import Ceilings
from convt_lab.stages import fma_stages

PROBLEM = Problem(2, 16, 16, 8, 8, kernel_size=(3, 7))
RATES = {"fp32_fma": 1, "gemm_tf32": 4, "gemm_float16": 9, "gemm_bfloat16": 12}  # 1e13 FLOP/s
CEILINGS = Ceilings(
    {name: records_for_tests.ceiling(rate * 10**10, "FLOP", 0.001) for name, rate in RATES.items()}
)

# Times of made-up runs, in milliseconds: kernel, dtype, whether channels come last, TF32.
TIMES = {
    ("tensor_core", "float32", False, True): 3.0,
    ("tensor_core_split", "float32", False, False): 4.0,
    ("hopper", "float32", False, False): 2.0,
    ("hopper", "float32", True, False): 1.0,
    ("hopper_single", "float16", False, False): 0.5,
    ("pytorch", "float32", False, False): 8.0,
    ("pytorch", "float32", True, False): 5.0,
    ("pytorch", "float32", False, True): 1.5,
    ("pytorch", "float16", False, False): 0.25,
}


def a_record() -> dict:
    rows = [
        {
            "kernel": kernel,
            "dtype": dtype,
            "memory_format": "channels_last" if is_last else "contiguous",
            "allow_tf32": allows,
            "cold_ms": time,
        }
        for (kernel, dtype, is_last, allows), time in TIMES.items()
    ]
    return {"problems": {"made up": {"problem": asdict(PROBLEM), "rows": rows}}}


def test_every_way_has_a_bar_and_its_ratio_to_the_same_form():
    picture = figures_tensor_cores.ways(a_record(), CEILINGS, "made up")
    (axes,) = picture.figure.axes
    rows = [
        ("float32", "PyTorch", 8.0, None),
        ("float32", "PyTorch, channels last", 5.0, None),
        ("float32", "tensor_core_split", 4.0, "2.00"),
        ("float32", "hopper", 2.0, "4.00"),
        ("float32", "hopper, channels last", 1.0, "5.00"),
        ("TF32", "PyTorch", 1.5, None),
        ("TF32", "tensor_core", 3.0, "0.50"),
        ("float16", "PyTorch", 0.25, None),
        ("float16", "hopper_single", 0.5, "0.50"),
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == [row[1] for row in rows]
    assert [bar.get_width() for bar in axes.patches] == [row[2] for row in rows]
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places == pytest.approx(list(axes.get_yticks()))
    texts = {(round(t.get_position()[1], 3), t.get_text()) for t in axes.texts}
    for place, (*_, time, ratio) in zip(places, rows, strict=True):
        assert (round(place, 3), f"{time:#.3g}") in texts
        assert ratio is None or (round(place, 3), ratio) in texts
    orange, pale = to_hex("#E69F00"), to_hex("#F9E4B7")
    fills = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    for fill, (number, label, *_) in zip(fills, rows, strict=True):
        assert (fill in (orange, pale)) == label.startswith("PyTorch")
        assert (fill == orange) == (label.startswith("PyTorch") and number == "float32")
    table = picture.table().splitlines()
    for line, (number, label, time, ratio) in zip(table[1:], rows, strict=True):
        assert line.startswith(number)
        assert f" {label.replace('channels last', 'last')} " in line
        assert f"{time:.3f}" in line.split()
        assert ratio is None or ratio in line.split()


def test_marks_are_the_least_time_of_each_way():
    picture = figures_tensor_cores.ways(a_record(), CEILINGS, "made up")
    (axes,) = picture.figure.axes
    rates = [1, 1, 12 / 6, 9 / 3, 9 / 3, 4, 4, 9, 9]  # in 10**13 FLOP/s
    expected = [1000 * PROBLEM.flops / (rate * 1e13) for rate in rates]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(expected)
    shares = [float(line.split()[-1][:-1]) for line in picture.table().splitlines()[1:]]
    times = [8, 5, 4, 2, 1, 1.5, 3, 0.25, 0.5]
    expected = [100 * least / time for least, time in zip(expected, times, strict=True)]
    assert shares == pytest.approx(expected, abs=0.051)


def test_roofs_are_named_after_what_multiplies():
    def name(*arguments):
        return figures_tensor_cores.roof_of(CEILINGS, *arguments).name

    assert {name(kernel) for kernel in (*fma_stages, "pytorch")} == {"FP32 FMA"}
    assert name("tensor_core", "TF32") == name("pytorch", "TF32") == "TF32"
    assert name("tensor_core_split") == "bfloat16, 6 products"
    assert name("hopper") == "float16, 3 products"
    # TF32's digits, in a type that the tensor cores take at twice the rate.
    assert name("hopper_single", "TF32") == name("hopper_single", "float16") == "float16"


def test_a_ceiling_that_was_not_measured_is_an_error():
    without = Ceilings({**CEILINGS, "gemm_float16": None})
    with pytest.raises(ValueError, match="gemm_float16 is None: hopper cannot be compared"):
        figures_tensor_cores.roof_of(without, "hopper")


def test_a_picture_is_the_same_every_time():
    def draw():
        return figures_tensor_cores.ways(a_record(), CEILINGS, "made up")._repr_png_()

    png, size = draw()
    assert png.startswith(b"\x89PNG")
    assert 300 <= size["width"] <= 700
    assert draw() == (png, size)
