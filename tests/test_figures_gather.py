"""The gather chapter's picture: letters and colours are those of the residue classes."""

import pytest
from matplotlib.colors import to_hex

from convt_lab import Problem, figures_gather

PROBLEMS = [
    Problem(height=3, width=4, kernel_size=(3, 4), stride=2, padding=1, output_padding=1),
    Problem(height=4, width=5, kernel_size=(2, 3), stride=(1, 3), dilation=(1, 2)),
    Problem(height=4, width=3, kernel_size=(2, 3), stride=2, dilation=(2, 3), padding=(1, 0)),
    Problem(height=2, width=2, kernel_size=1, stride=2),
]


def letters(axes):
    """The letters of a panel, by (row, column)."""
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text()
        for text in axes.texts
    }


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_an_output_has_the_letter_of_the_taps_that_reach_it(problem):
    # An image around it, so that no tap of a class lies outside.
    rows, columns = problem.axes
    taps, outputs = map(letters, figures_gather.phases(problem).figure.axes)
    assert set(taps) == {(kh, kw) for kh in range(rows.kernel) for kw in range(columns.kernel)}
    reached = 0
    for oh in range(rows.out_size):
        for ow in range(columns.out_size):
            pairs = [(kh, kw) for kh, _ in rows.taps(oh) for kw, _ in columns.taps(ow)]
            reached += bool(pairs)
            assert {taps[pair] for pair in pairs} <= {outputs.get((oh, ow))}
    assert reached > 0
    # Taps of two letters never meet in one output, so no two classes share a letter.
    steps = rows.k_step, columns.k_step
    classes = {tap: (tap[0] % steps[0], tap[1] % steps[1]) for tap in taps}
    assert len(set(zip(taps.values(), classes.values(), strict=True))) == len(set(taps.values()))


def test_outputs_that_no_tap_meets_have_no_letter_and_the_colour_of_nothing():
    problem = Problem(height=2, width=2, kernel_size=2, stride=2, dilation=2)
    axes = figures_gather.phases(problem).figure.axes[1]
    colours = {
        (int(patch.get_y()), int(patch.get_x())): to_hex(patch.get_facecolor())
        for patch in axes.patches
    }
    assert set(letters(axes)) == {(oh, ow) for oh in (0, 2, 4) for ow in (0, 2, 4)}
    assert {colours[place] for place in colours if place not in letters(axes)} == {"#ececec"}


def test_the_table_counts_outputs_and_lists_taps():
    lines = figures_gather.phases(PROBLEMS[0]).table().splitlines()
    assert lines[1].split(maxsplit=2) == ["A", "12", "(0, 0) (0, 2) (2, 0) (2, 2)"]
    counts = [int(line.split()[1]) for line in lines[1:]]
    assert sum(counts) == PROBLEMS[0].out_height * PROBLEMS[0].out_width
    assert "none" in figures_gather.phases(PROBLEMS[3]).table()


def test_more_classes_than_letters_are_refused():
    with pytest.raises(ValueError, match="9 classes"):
        figures_gather.phases(Problem(kernel_size=3, stride=3))
