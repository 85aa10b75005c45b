"""The pictures of Winograd's scheme and of a number's parts show what the arithmetic does."""

import re
from fractions import Fraction

import numpy as np
import pytest
from matplotlib.colors import to_hex

from convt_lab import figures_schemes
from convt_lab.split import FORMATS

# F(2, 3): of the inputs, of the weights, of the products.
HALF = Fraction(1, 2)
SCHEME = (
    [(1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)],
    [(1, 0, 0), (HALF, HALF, HALF), (HALF, -HALF, HALF), (0, 0, 1)],
    [(1, 1, 1, 0), (0, 1, -1, -1)],
)


def test_a_line_leads_from_every_term_to_its_sum_and_says_its_sign():
    (axes,) = figures_schemes.products(*SCHEME).figure.axes
    boxes = [(p.get_x(), p.get_x() + p.get_width(), p.get_y() + 0.5) for p in axes.patches]
    inputs, products, outputs = boxes[:4], boxes[4:8], boxes[8:]
    expected = {}
    for sources, targets, matrix in ((inputs, products, SCHEME[0]), (products, outputs, SCHEME[2])):
        for (left, _, y), factors in zip(targets, matrix, strict=True):
            for (_, right, y0), factor in zip(sources, factors, strict=True):
                if factor:
                    expected[right, left, y0, y] = factor
    drawn = {
        (*line.get_xdata(), *line.get_ydata()): 1 if line.get_linestyle() == "-" else -1
        for line in axes.lines
    }
    assert drawn == pytest.approx(expected)
    colors = {(line.get_linestyle(), to_hex(line.get_color())) for line in axes.lines}
    assert len(colors) == 2, "a colour for each sign"


def test_the_table_has_the_sums():
    lines = figures_schemes.products(*SCHEME).table().splitlines()[1:]
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[1] == ["m1", "d1 + d2", "1/2 (g0 + g1 + g2)", "+y0 +y1"]
    assert cells[3] == ["m3", "d1 - d3", "g2", "-y1"]


def drawn_parts(picture):
    """The value of every row, read from the digits, in units of the number's first one."""
    left, _ = picture.figure.axes
    rows = {}
    for text in left.texts:
        x, y = text.get_position()
        if text.get_text() in "01":
            rows.setdefault(int(y) // 2, [0.0, 1])[0] += int(text.get_text()) * 2.0 ** -int(x)
        elif text.get_text() == "−":
            rows.setdefault(int(y) // 2, [0.0, 1])[1] = -1
    return {row: sign * value for row, (value, sign) in rows.items()}


@pytest.mark.parametrize("value", [np.pi, np.e, 1.0, 0.1, 3e20, 5e-20])
@pytest.mark.parametrize(("name", "count"), [("bfloat16", 3), ("bfloat16", 2), ("tf32", 2)])
def test_the_digits_are_those_of_the_number_and_of_its_parts(value, name, count):
    picture = figures_schemes.parts(value, FORMATS[name], count)
    rows = drawn_parts(picture)
    number = float(np.float32(value))
    unit = 2.0 ** np.floor(np.log2(number))
    assert rows[0] * unit == number
    printed = [float(line.split()[-1]) for line in picture.table().splitlines()[1:]]
    found = [rows.get(i + 1, 0.0) * unit for i in range(count)]
    assert found == pytest.approx(printed[:-1], rel=1e-7)
    assert sum(found) == pytest.approx(number, rel=2.0**-15)
    if (name, count) == ("bfloat16", 3):
        assert sum(found) == number


def test_the_grid_names_all_products_and_colours_the_kept_ones():
    _, right = figures_schemes.parts(np.pi, FORMATS["bfloat16"], 3).figure.axes
    kept = {
        (int(patch.get_y()), int(patch.get_x()))
        for patch in right.patches
        if to_hex(patch.get_facecolor()) != "#ffffff"
    }
    assert kept == {(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0)}
    assert len(right.texts) == 9


@pytest.mark.parametrize(("value", "count"), [(0.0, 3), (float("inf"), 3), (1.0, 0), (1.0, 4)])
def test_what_can_not_be_drawn_is_refused(value, count):
    with pytest.raises(ValueError, match="must be"):
        figures_schemes.parts(value, FORMATS["bfloat16"], count)
