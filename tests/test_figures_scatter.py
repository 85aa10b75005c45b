"""The animation of stamps: each frame holds what the reference has summed so far, and says so."""

import json
import re

import numpy as np
import pytest
from bs4 import BeautifulSoup

from convt_lab import Problem, figures_scatter, reference

PROBLEMS = [
    Problem(height=2, width=3, kernel_size=3, stride=2),
    Problem(height=2, width=3, kernel_size=(2, 3), stride=2, padding=1, output_padding=1),
    Problem(height=3, width=2, kernel_size=(3, 2), dilation=2),
    Problem(height=2, width=2, kernel_size=1, stride=3),
    Problem(height=4, width=1, kernel_size=3, stride=1, padding=(2, 0)),
]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def arrays(problem):
    """Positive integers that differ."""
    shapes = (problem.height, problem.width), problem.kernel_size
    return [np.arange(1, np.prod(shape) + 1).reshape(shape) for shape in shapes]


def stamped(problem, x, weight):
    """The reference's output, [OH, OW]."""
    return reference.scatter(x[None, None], weight[None, None], **problem.arguments)[0, 0]


@each_problem
def test_a_frame_holds_what_scatter_sums_of_the_pixels_so_far(problem):
    x, weight = arrays(problem)
    animation = figures_scatter.stamping(problem, x, weight)
    pixels = list(np.ndindex(*x.shape))
    assert [frame.pixel for frame in animation.frames] == [None, *pixels]
    so_far, before = np.zeros_like(x), np.zeros(problem.output_shape[2:])
    for frame in animation.frames[1:]:
        so_far[frame.pixel] = x[frame.pixel]
        y = stamped(problem, so_far, weight)
        assert frame.sums == {(oh, ow): y[oh, ow] for oh, ow in np.argwhere(y).tolist()}
        grown = y - before
        assert frame.added == {(h, w): grown[h, w] for h, w in np.argwhere(grown).tolist()}
        both = (grown > 0) & (before > 0)
        assert sorted(frame.met()) == sorted(map(tuple, np.argwhere(both).tolist()))
        count = re.search(r"products (\d+|none) falls? on pixels", frame.words)[1]
        assert int(count.replace("none", "0")) == both.sum()
        cropped = re.search(r"(\d+) lies? outside", frame.words)
        assert int(cropped[1] if cropped else 0) == weight.size - len(frame.added)
        before = y
    assert (animation.y == stamped(problem, x, weight)).all()


@each_problem
def test_the_table_has_each_product(problem):
    x, weight = arrays(problem)
    lines = figures_scatter.stamping(problem, x, weight).table().splitlines()
    height, width = problem.output_shape[2:]
    assert lines[0].split() == [str(ow) for ow in range(width)]
    assert len(lines) == 1 + height
    stamps = []
    for pixel in np.ndindex(*x.shape):
        alone = np.zeros_like(x)
        alone[pixel] = x[pixel]
        stamps.append(stamped(problem, alone, weight))
    for oh, line in enumerate(lines[1:]):
        first, *sums = line.split()
        assert first == str(oh)
        assert len(sums) == width
        for ow, addends in enumerate(sums):
            products = [stamp[oh, ow] for stamp in stamps if stamp[oh, ow]]
            assert list(map(int, addends.split("+"))) == (products or [0])


@each_problem
def test_without_scripts_the_page_has_the_last_frame(problem):
    x, weight = arrays(problem)
    animation = figures_scatter.stamping(problem, x, weight)
    last = animation.frames[-1]
    soup = BeautifulSoup(animation._repr_html_(), "html.parser")
    (root,) = soup.select(".stamping[role=group]")
    assert len(root["aria-label"]) > 40
    assert soup.select_one(".stamping-words").get_text() == last.words
    grids = {table["data-grid"]: table.select(".stamping-cell") for table in soup.select("table")}
    for name, array in (("input", x), ("kernel", weight)):
        assert [int(cell.get_text()) for cell in grids[name]] == array.flatten().tolist()
    places = np.ndindex(*problem.output_shape[2:])
    for place, cell in zip(places, grids["output"], strict=True):
        text = str(last.sums.get(place, "")) + (
            f"+{last.added[place]}" if place in last.added else ""
        )
        assert cell.get_text() == text
        assert ("is-new" in cell["class"]) == (place in last.added)
        assert ("is-sum" in cell["class"]) == (place in last.met())
    chosen = ["is-chosen" in cell["class"] for cell in grids["input"]]
    assert chosen == [place == last.pixel for place in np.ndindex(*x.shape)]
    assert len(json.loads(root["data-frames"])) == len(animation.frames)


def test_what_would_look_unstamped_is_an_error():
    problem = PROBLEMS[0]
    x, weight = arrays(problem)
    with pytest.raises(ValueError, match=r"x has the shape \(3, 2\); the problem has \(2, 3\)"):
        figures_scatter.stamping(problem, x.T, weight)
    for wrong in (weight - 1, weight - 9, weight * 0.5):
        with pytest.raises(ValueError, match="weight must hold positive integers, not"):
            figures_scatter.stamping(problem, x, wrong)
