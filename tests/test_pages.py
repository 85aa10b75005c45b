"""The rendered book in a browser: it reads offline and on a phone; the explorer tells the truth.

These tests load the pages that `make book` has written to _build/html into a headless Chromium that
reaches no network.
"""

import functools
import re
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urldefrag, urlsplit

import nbformat
import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup

from convt_lab import Problem, ProblemError, figures_scatter, reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import browser as chromium  # noqa: E402

import book  # noqa: E402

HTML = ROOT / "_build" / "html"
CHAPTERS = list(book.pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))
PAGES = [*CHAPTERS, "genindex", "search"]
PHONE = 390  # CSS pixels

pytestmark = pytest.mark.skipif(
    not (HTML / "index.html").is_file(), reason="needs the rendered book: run `make book`"
)


@pytest.fixture(scope="module")
def browser():
    if chromium.find() is None:
        pytest.skip(chromium.HOW_TO_GET)
    with chromium.Browser() as running:
        yield running


@pytest.fixture
def page(browser):
    opened = browser.page()
    yield opened
    opened.close()


def url(name: str) -> str:
    return (HTML / f"{name}.html").as_uri()


@functools.cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


each_page = pytest.mark.parametrize("name", PAGES)
each_chapter = pytest.mark.parametrize("name", CHAPTERS)

# --- every page -----------------------------------------------------------------------------------

# What a page looks like once it stands, everything that can be folded out being so.
LOOK = """
(async () => {
  document.querySelectorAll('details').forEach((details) => { details.open = true; });
  document.body.offsetHeight; // lays out what was folded: its fonts begin to load
  await document.fonts.ready;
  const formulas = [...document.querySelectorAll('.math')];
  const images = [...document.querySelectorAll('img')];
  return {
    formulas: formulas.length,
    notSet: formulas.filter((f) => !f.querySelector('mjx-container')).map((f) => f.textContent),
    // A macro that MathJax does not know comes out in red, and is no error to it.
    wrong: [...document.querySelectorAll('mjx-merror, mjx-container [mathcolor=red]')].map(
      (f) => f.textContent),
    unread: [...document.querySelectorAll('mjx-container')].filter(
      (f) => !f.querySelector('mjx-assistive-mml math')).length,
    fonts: [...document.fonts].filter((f) => f.family.startsWith('MJX')).map((f) => f.status),
    blocks: document.querySelectorAll('div.highlight').length,
    buttons: document.querySelectorAll('div.highlight button.copybtn').length,
    images: images.map((image) => ({
      source: image.src, alt: image.alt, loaded: image.complete && image.naturalWidth > 0 })),
  };
})()
"""

# What sticks out of the window and lies in no box that scrolls.
STICKS_OUT = """
(() => {
  const scrolls = (element) => element && element !== document.body &&
    (['auto', 'scroll'].includes(getComputedStyle(element).overflowX) ||
      scrolls(element.parentElement));
  const hidden = 'mjx-assistive-mml *, mjx-assistive-mml, .visually-hidden';
  return {
    page: document.documentElement.scrollWidth,
    elements: [...document.querySelectorAll('.bd-article-container *')].filter((element) => {
      const box = element.getBoundingClientRect();
      return box.width > 1 && (box.right > innerWidth + 1 || box.left < -1) &&
        !element.matches(hidden) && !scrolls(element.parentElement) && element.checkVisibility();
    }).map((element) => element.outerHTML.slice(0, 120)),
  };
})()
"""

# Code that is wider than its box: of a width at which windows often stand side by side, and of a
# phone's.
CUT_OFF = """
[...document.querySelectorAll(':is(.highlight-python, .highlight-cuda, .highlight-diff) pre')]
  .filter((pre) => pre.scrollWidth > pre.clientWidth + 1).map((pre) => pre.textContent.slice(0, 80))
"""
HALF_A_SCREEN = 1100


# The contrast of a text with what lies behind it, by WCAG 2's definition, for each of a selector.
CONTRASTS = """
((selector) => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((v) => {
      const s = v / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
    return 'white';
  };
  return [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility()).map((e) => {
    const pair = [getComputedStyle(e).color, behind(e)].map(luminance).sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
})
"""


TEXTS = [
    *(f"main {tag}" for tag in ("p", "li", "td", "th", "dt", "h1", "h2")),
    *("main a:not(.headerlink)", "main figcaption :not(.headerlink)", "#explorer *", ".stamping *"),
    *("main div.highlight pre span", "main code span", "main .sd-summary-text"),
    ".bd-footer-content p",
]


@pytest.fixture(scope="module")
def visit(browser):
    """Load a page once, in a wide window and then in a phone's, and keep what was seen."""

    @functools.cache
    def see(name: str) -> dict:
        opened = browser.page()
        opened.resize(1300)
        opened.go(url(name))
        seen = opened.evaluate(LOOK)
        opened.resize(HALF_A_SCREEN)
        seen["cut off"] = {HALF_A_SCREEN: opened.evaluate(CUT_OFF)}
        opened.resize(PHONE)
        seen["cut off"][PHONE] = opened.evaluate(CUT_OFF)
        seen["narrow"] = opened.evaluate(STICKS_OUT)
        for mode in ("light", "dark"):
            opened.evaluate(f"document.documentElement.dataset.theme = '{mode}'")
            opened.evaluate("new Promise((done) => setTimeout(done, 300))")  # it fades
            seen[mode] = {text: opened.evaluate(f"{CONTRASTS.strip()}('{text}')") for text in TEXTS}
        seen |= {"complaints": opened.complaints(), "requests": opened.requests()}
        opened.close()
        return seen

    return see


@each_page
def test_a_page_loads_without_network_and_complaints(visit, name):
    seen = visit(name)
    assert seen["complaints"] == []
    for request in seen["requests"]:
        address = urlsplit(request)
        assert address.scheme in ("file", "data", "blob"), request
        if address.scheme == "file":
            assert Path(unquote(address.path)).is_relative_to(HTML), request


@each_page
def test_formulas_are_typeset(visit, name):
    seen = visit(name)
    assert seen["notSet"] == []
    assert seen["wrong"] == []
    assert seen["unread"] == 0, "formulas without MathML for a screen reader"
    if seen["formulas"]:
        assert "loaded" in seen["fonts"]
    assert "error" not in seen["fonts"]


def test_some_pages_have_formulas(visit):
    assert sum(visit(name)["formulas"] for name in PAGES) > 30


@each_page
def test_a_phone_never_scrolls_sideways(visit, name):
    seen = visit(name)["narrow"]
    assert seen["elements"] == []
    assert seen["page"] == PHONE


@pytest.mark.parametrize("width", [HALF_A_SCREEN, PHONE])
@each_page
def test_no_line_of_code_is_cut_off(visit, name, width):
    assert visit(name)["cut off"][width] == []


@each_chapter
def test_the_longest_lines_fit_into_half_a_screen(page, name):
    """As they are, where they have the 100 characters that ruff and clang-format allow."""
    page.resize(HALF_A_SCREEN)
    page.go(url(name))
    sizes = page.evaluate("""
      [...document.querySelectorAll('.bd-article > section div.highlight pre')].map((pre) => {
        const line = document.createElement('span');
        line.textContent = 'x'.repeat(100);
        line.style.whiteSpace = 'pre';
        pre.append(line);
        const style = getComputedStyle(pre), width = line.getBoundingClientRect().width;
        line.remove();
        const room = pre.clientWidth - parseFloat(style.paddingLeft);
        return [parseFloat(style.fontSize), width <= room];
      })""")
    assert all(fits and size > 12 for size, fits in sizes)


def test_what_is_too_wide_scrolls_in_its_own_box(page):
    page.resize(PHONE)
    page.go(url("book/scatter_reference"))
    page.evaluate("""(async () => {
      const row = `<tr>${'<td>a cell</td>'.repeat(30)}</tr>`;
      const made = document.createElement('section');
      made.innerHTML = `<table class="table">${row}</table>
        <div class="cell_output"><table>${row}</table></div>
        <div class="highlight"><pre>${'x'.repeat(300)}</pre></div>
        <p><code class="literal"><span class="pre">${'x'.repeat(300)}</span></code></p>
        <div class="math">\\\\[${'x+'.repeat(100)}x\\\\]</div>`;
      document.querySelector('.bd-article').append(made);
      await MathJax.typesetPromise([made]);
    })()""")
    assert page.evaluate("document.querySelectorAll('.math mjx-container').length") > 0
    assert page.evaluate(STICKS_OUT) == {"page": PHONE, "elements": []}


@each_page
def test_every_image_is_there_and_has_a_text(visit, name):
    for image in visit(name)["images"]:
        assert image["loaded"], image
        assert len(image["alt"]) > 15, image
        assert not re.search(r"\.(png|svg|gif)$", image["alt"]), "the file's name is no text"


@pytest.mark.parametrize("name", [*PAGES, "index"])
def test_no_link_is_broken(name):
    path = HTML / f"{name}.html"
    for tag in parsed(path).find_all(["a", "link", "script", "img", "source"]):
        address = tag.get("href") or tag.get("src")
        if address is None or urlsplit(address).scheme:
            if tag.name != "a" and address:
                assert urlsplit(address).scheme == "data", f"{tag.name} from elsewhere: {address}"
            continue
        file, anchor = urldefrag(address)
        target = (path.parent / unquote(urlsplit(file).path)).resolve() if file else path
        assert target.is_relative_to(HTML), address
        assert target.is_file(), address
        if target.stem == "explorer" and "=" in anchor:
            continue  # settings; they have a test of their own
        if anchor:
            assert parsed(target).find(id=unquote(anchor)), f"{address}: no such place in {target}"


def test_previous_and_next_lead_through_the_book():
    path = (HTML / f"{CHAPTERS[0]}.html").resolve()
    led = [path]
    while following := parsed(path).select_one("a.right-next"):
        assert len(led) <= len(CHAPTERS), "they go round in circles"
        path = (path.parent / following["href"]).resolve()
        led.append(path)
        back = parsed(path).select_one("a.left-prev")
        assert (path.parent / back["href"]).resolve() == led[-2]
    assert led == [HTML / f"{name}.html" for name in CHAPTERS]


@each_chapter
def test_the_source_of_a_chapter_can_be_downloaded(name):
    path = HTML / f"{name}.html"
    (button,) = parsed(path).select("a.btn-download-source-button")
    source = next((ROOT / name).parent.glob(f"{Path(name).name}.*"))
    offered = path.parent / button["href"]
    assert offered.name == source.name
    if source.suffix == ".ipynb":
        cells, own = (nbformat.read(file, as_version=4).cells for file in (offered, source))
        assert [cell.source for cell in cells] == [cell.source for cell in own]


@each_chapter
def test_code_has_a_button_that_copies_it(visit, name):
    seen = visit(name)
    assert seen["buttons"] == seen["blocks"]


def test_the_search_finds_a_word(page):
    page.go(url("search") + "?q=coalesced")
    results = "document.querySelectorAll('#search-results li a').length"
    limit = time.monotonic() + 20
    while (found := page.evaluate(results)) < 3 and time.monotonic() < limit:
        time.sleep(0.1)  # they come one after another
    assert found >= 3
    assert page.complaints() == []


@pytest.mark.parametrize("mode", ["light", "dark"])
@each_chapter
def test_text_can_be_read_in_light_and_dark(visit, name, mode):
    for selector, contrasts in visit(name)[mode].items():
        assert min(contrasts, default=21) >= 4.5, selector  # WCAG 2, level AA


@each_chapter
def test_the_footer_names_the_last_change_and_the_versions(name):
    footer = parsed(HTML / f"{name}.html").select_one(".bd-footer-content").get_text()
    assert re.search(r"Last updated on \d{4}-\d\d-\d\d \(", footer)
    for version in (r"convt_lab \d", r"torch \d", r"Sphinx \d", r"MathJax 3\.", r"Python 3\.\d"):
        assert re.search(version, footer), version


# --- the explorer ---------------------------------------------------------------------------------

SHOWN = """
(() => {
  const place = (cell) => [Number(cell.dataset.h), Number(cell.dataset.w)];
  const all = (selector) => [...document.querySelectorAll(`#explorer ${selector}`)];
  const chosen = all('[aria-selected=true]');
  return {
    chosen: chosen.map((cell) => [cell.closest('[data-panel]').dataset.panel, ...place(cell)]),
    partners: all('td.is-partner').map((cell) =>
      [cell.closest('[data-panel]').dataset.panel, ...place(cell), cell.textContent]),
    taps: all('td.is-used').map((cell) => [...place(cell), cell.textContent]),
    cropped: all('td.is-cropped').map(place),
    words: all('.explorer-words p').map((line) => line.textContent),
  };
})()
"""

# Chooses each pixel of a grid as the Tab key would, and says what is then shown.
EACH_PIXEL = """
((side) => [...document.querySelectorAll(`#explorer [data-panel=${side}] [role=gridcell]`)].map(
  (cell) => { cell.focus(); return %s; }))
""" % SHOWN.strip()  # noqa: UP031


def problem_of(**settings) -> Problem:
    """A problem by the explorer's names."""
    height, width = settings.pop("input_size", (4, 4))
    return Problem(height=height, width=width, **settings)


PROBLEMS = [
    problem_of(kernel_size=3, stride=2, padding=1, output_padding=1),
    problem_of(kernel_size=3),
    problem_of(kernel_size=(3, 7), input_size=(3, 5)),
    problem_of(kernel_size=(3, 7), stride=(2, 1), padding=(1, 3), output_padding=(1, 0)),
    problem_of(kernel_size=2, stride=2),
    problem_of(kernel_size=2, stride=3, dilation=2, output_padding=2),
    problem_of(kernel_size=3, stride=2, dilation=2),
    problem_of(kernel_size=3, stride=2, dilation=3, padding=2),
    problem_of(kernel_size=(1, 4), stride=(1, 4), dilation=(3, 2), input_size=(5, 2)),
    problem_of(kernel_size=4, stride=1, padding=3, input_size=(5, 6)),
    problem_of(kernel_size=(5, 1), stride=(3, 2), dilation=(2, 1), padding=(4, 0)),
    problem_of(kernel_size=1, stride=5, output_padding=4, input_size=(2, 1)),
    problem_of(kernel_size=7, stride=4, dilation=5, padding=12, input_size=(12, 1)),
]


def hash_of(problem: Problem, **more) -> str:
    values = {
        "input_size": (problem.height, problem.width),
        "kernel_size": problem.kernel_size,
        "stride": problem.stride,
        "padding": problem.padding,
        "output_padding": problem.output_padding,
        "dilation": problem.dilation,
        **more,
    }
    return "#" + "&".join(f"{name}={','.join(map(str, pair))}" for name, pair in values.items())


def stamps(problem: Problem) -> dict:
    """For each input pixel the taps of its stamp that land in the output: {output: tap}.

    The package stamps a kernel whose every tap has another value, so that the output tells them.
    """
    taps = list(np.ndindex(problem.kernel_size))
    weight = np.arange(1.0, len(taps) + 1).reshape(problem.weight_shape)
    found = {}
    for h, w in np.ndindex(problem.height, problem.width):
        x = np.zeros(problem.input_shape)
        x[0, 0, h, w] = 1
        stamp = reference.scatter(x, weight, **problem.arguments)[0, 0]
        found[h, w] = {
            (int(oh), int(ow)): taps[int(stamp[oh, ow]) - 1]
            for oh, ow in zip(*np.nonzero(stamp), strict=True)
        }
    return found


def equations(words: list[str]) -> list[list[tuple[int, ...]]]:
    """The filled-in formulas along the rows and along the columns, checked, as (o, i, k)."""
    found = []
    for line in words[1:]:
        solved = re.findall(r"(\d+|−?-?\d+) = (\d+)·(\d+) − (\d+) \+ (\d+)·(\d+)", line)
        numbers = [[int(text.replace("−", "-")) for text in one] for one in solved]
        for o, i, stride, padding, k, dilation in numbers:
            assert o == i * stride - padding + k * dilation, line
        found.append([(o, i, k) for o, i, _, _, k, _ in numbers])
    assert len(found) == 2
    return found


def check_shown(shown: dict, side: str, place: tuple, problem: Problem, stamped: dict) -> None:
    """Compare what the explorer shows of one pixel with the package's stamps."""
    assert shown["chosen"] == [[side, *place]]
    if side == "output":
        meets = {i: outputs[place] for i, outputs in stamped.items() if place in outputs}
    else:
        meets = stamped[place]
    other = "input" if side == "output" else "output"
    assert {tuple(p) for p in shown["partners"]} == {
        (other, *pixel, f"{kh},{kw}") for pixel, (kh, kw) in meets.items()
    }
    assert {tuple(t) for t in shown["taps"]} == {
        (*tap, f"{h},{w}") for (h, w), tap in meets.items()
    }
    cropped = set(np.ndindex(problem.kernel_size)) - set(meets.values())
    assert {tuple(t) for t in shown["cropped"]} == (cropped if side == "input" else set())

    rows, columns = equations(shown["words"])
    first = shown["words"][0]
    counted = int(re.search(r"(\d+) (?:product|output)|no product", first)[1] or 0)
    assert counted == len(meets)
    if side == "output":
        for axis, o, solved in zip(problem.axes, place, (rows, columns), strict=True):
            assert [(k, i) for _, i, k in solved] == axis.taps(o)
    else:
        for i, solved in zip(place, (rows, columns), strict=True):
            assert {one[1] for one in solved} == {i}
        landed = {((oh, ow), (kh, kw)) for oh, _, kh in rows for ow, _, kw in columns}
        inside = set(np.ndindex(problem.output_shape[2:]))
        assert {one for one in landed if one[0] in inside} == set(meets.items())
        lost = re.search(r"(\d+) of them lands? outside", first)
        assert len(cropped) == (int(lost[1]) if lost else 0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: hash_of(p))
def test_the_explorer_shows_what_the_package_computes(page, problem):
    page.go(url("book/explorer") + hash_of(problem))
    stamped = stamps(problem)
    for side, shape in (
        ("input", (problem.height, problem.width)),
        ("output", problem.output_shape[2:]),
    ):
        all_shown = page.evaluate(f"{EACH_PIXEL.strip()}('{side}')")
        for place, shown in zip(np.ndindex(shape), all_shown, strict=True):
            check_shown(shown, side, place, problem, stamped)
    assert page.complaints() == []


def middle(page, side: str, place) -> tuple[float, float]:
    """Where in the window a pixel is, after scrolling to it."""
    return page.evaluate(f"""
        (() => {{
          const cell = document.querySelector(
            '[data-panel={side}] td[data-h="{place[0]}"][data-w="{place[1]}"]');
          cell.scrollIntoView({{ block: 'center', inline: 'center', behavior: 'instant' }});
          const box = cell.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")


def hash_on(page) -> dict[str, str]:
    page.evaluate("new Promise((done) => setTimeout(done, 400))")  # it follows after a moment
    return {k: v for k, (v,) in parse_qs(page.evaluate("location.hash.slice(1)")).items()}


@pytest.mark.parametrize("way", ["mouse", "finger", "finger on a phone"])
def test_the_explorer_follows_the_pointer(page, way):
    problem = PROBLEMS[3]
    stamped = stamps(problem)
    page.resize(390 if way == "finger on a phone" else 1200)
    page.go(url("book/explorer") + hash_of(problem))
    for side, place in (
        ("output", (5, 3)),
        ("input", (0, 2)),
        ("input", (3, 3)),
        ("output", (0, 0)),
    ):
        x, y = middle(page, side, place)
        (page.point if way == "mouse" else page.touch)(x, y)
        check_shown(page.evaluate(SHOWN), side, place, problem, stamped)
        assert hash_on(page)[side] == "{},{}".format(*place)


def test_the_explorer_follows_the_keys(page):
    problem = PROBLEMS[3]
    height, width = problem.output_shape[2:]
    stamped = stamps(problem)
    page.go(url("book/explorer") + hash_of(problem, output=(1, 1)))
    page.evaluate("document.querySelector('#explorer input[type=checkbox]').focus()")
    page.evaluate("addEventListener('keydown', (e) => { window.prevented = e.defaultPrevented; })")
    path = [
        ("Tab", {}, "input", (0, 0)),
        ("ArrowDown", {}, "input", (1, 0)),
        ("ArrowRight", {}, "input", (1, 1)),
        ("End", {"control": True}, "input", (3, 3)),
        ("ArrowDown", {}, "input", (3, 3)),  # the edge
        ("Tab", {}, "output", (0, 0)),
        ("ArrowUp", {}, "output", (0, 0)),
        ("End", {}, "output", (0, width - 1)),
        ("ArrowLeft", {}, "output", (0, width - 2)),
        ("End", {"control": True}, "output", (height - 1, width - 1)),
        ("ArrowUp", {}, "output", (height - 2, width - 1)),
        ("Home", {}, "output", (height - 2, 0)),
        ("Home", {"control": True}, "output", (0, 0)),
        ("Tab", {"shift": True}, "input", (0, 0)),
    ]
    for key, held, side, place in path:
        page.press(key, **held)
        check_shown(page.evaluate(SHOWN), side, place, problem, stamped)
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        if key != "Tab":
            assert page.evaluate("window.prevented"), "the key would scroll the page, too"


def test_the_explorer_takes_settings_from_its_fields(page):
    page.go(url("book/explorer"))
    field = "document.querySelector('#explorer input[data-name={}][data-axis=\"{}\"]')"
    page.evaluate(field.format("stride", 1) + ".focus()")
    page.press("ArrowUp")
    assert hash_on(page)["stride"] == "2,3"
    problem = problem_of(kernel_size=3, stride=(2, 3), padding=1, output_padding=1)
    heading = page.evaluate("document.querySelector('[data-panel=output] p').textContent")
    assert heading.startswith("output, {} × {}".format(*problem.output_shape[2:]))
    page.evaluate("document.querySelector('#explorer input[type=checkbox]').click()")
    ones = np.ones(problem.input_shape), np.ones(problem.weight_shape)
    counts = reference.scatter(*ones, **problem.arguments)[0, 0].astype(int)
    assert products_shown(page, counts.shape) == counts.tolist()

    page.evaluate(field.format("output_padding", 0) + ".focus()")
    page.press("ArrowUp")
    assert hash_on(page)["output_padding"] == "2,1"
    said = page.evaluate("document.querySelector('#explorer .explorer-problem').textContent")
    assert said.startswith("output_padding=(2, 1) must be smaller than stride or dilation")
    page.press("ArrowDown")
    assert page.evaluate("document.querySelector('#explorer .explorer-problem').hidden") is True


def products_shown(page, shape) -> list[list[int]]:
    """The numbers in the output grid; the chosen pixel's, too."""
    cells = "[...document.querySelectorAll('[data-panel=output] [role=gridcell]')]"
    numbers = page.evaluate(f"{cells}.map((cell) => Number(cell.textContent))")
    return np.reshape(numbers, shape).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel_size=3, stride=2, output_padding=2),
        dict(kernel_size=3, stride=(3, 1), output_padding=(2, 1)),
        dict(kernel_size=3, stride=2, dilation=4, output_padding=(3, 4)),
        dict(kernel_size=3, padding=3),
        dict(kernel_size=(3, 7), stride=2, padding=(5, 7), output_padding=1),
        dict(kernel_size=(0, 3)),
        dict(kernel_size=3, stride=(2, 0)),
        dict(kernel_size=3, padding=(-1, 0)),
        dict(kernel_size=3, dilation=0),
    ],
    ids=str,
)
def test_the_explorer_refuses_what_the_package_refuses(page, settings):
    pairs = {k: v if isinstance(v, tuple) else (v, v) for k, v in settings.items()}
    with pytest.raises(ProblemError) as raised:
        problem_of(**pairs)
    defaults = {"stride": (1, 1), "padding": (0, 0), "output_padding": (0, 0), "dilation": (1, 1)}
    given = {"input_size": (4, 4), **defaults, **pairs}
    text = "&".join(f"{name}={a},{b}" for name, (a, b) in given.items())
    page.go(url("book/explorer") + "#" + text)
    problem = "document.querySelector('#explorer .explorer-problem')"
    assert page.evaluate(f"{problem}.textContent") == str(raised.value)
    assert page.evaluate(f"{problem}.getAttribute('role')") == "alert"
    assert page.evaluate("document.querySelector('.explorer-grids').checkVisibility()") is False
    page.evaluate("location.hash = '#kernel_size=3'")  # and recovers
    page.evaluate("new Promise((done) => setTimeout(done))")
    assert page.evaluate(f"{problem}.checkVisibility()") is False
    assert page.evaluate("document.querySelector('.explorer-grids').checkVisibility()") is True


@pytest.mark.parametrize("text", ["stride=x", "stride=1,2,3", "stride=1.5", "kernel_size=8"])
def test_the_explorer_says_what_it_cannot_draw(page, text):
    page.go(url("book/explorer") + "#" + text)
    said = page.evaluate("document.querySelector('#explorer .explorer-problem').textContent")
    assert re.search(r"must be whole numbers|draws at most", said)
    assert page.complaints() == []


def test_the_settings_to_try_show_what_the_page_says(page):
    page.go(url("book/explorer"))
    count = page.evaluate("document.querySelectorAll('main ol a[href^=\"#\"]').length")
    assert count == 4
    shown = []
    for n in range(count):
        page.evaluate(f"document.querySelectorAll('main ol a[href^=\"#\"]')[{n}].click()")
        page.evaluate("new Promise((done) => setTimeout(done))")
        assert page.evaluate("document.querySelector('.explorer-problem').hidden") is True
        shown.append(page.evaluate(SHOWN) | {"hash": hash_on(page)})
        if shown[-1]["hash"].get("counts"):
            size = page.evaluate("document.querySelector('[data-panel=output] p').textContent")
            shape = tuple(map(int, re.match(r"output, (\d+) × (\d+)", size).groups()))
            shown[-1]["counts"] = np.array(products_shown(page, shape))
    _, checkerboard, common, crop = shown
    inner = checkerboard["counts"][1:-1, 1:-1]
    assert set(inner.flat) == {1, 2, 4}
    assert not common["counts"][1::2].any()
    assert not common["counts"][:, 1::2].any()
    assert common["counts"][::2, ::2].all()
    assert len(crop["taps"]) == 1
    assert len(crop["cropped"]) == 8


def test_what_the_page_leaves_to_be_found_is_so():
    """The even kernels have no checkerboard at stride 2; 2 and 3 share no factor."""
    for kernel in range(1, 8):
        axis = Problem(width=12, kernel_size=(1, kernel), stride=2).axes[1]
        inner = {len(axis.taps(o)) for o in range(kernel, axis.out_size - kernel)}
        assert (len(inner) == 1) == (kernel % 2 == 0)
    axis = Problem(width=5, kernel_size=(1, 3), stride=2, dilation=3).axes[1]
    assert any(axis.taps(o) for o in range(1, axis.out_size, 2))


# --- the animation --------------------------------------------------------------------------------

STAMPING = figures_scatter.stamping(
    Problem(height=2, width=3, kernel_size=3, stride=2),
    np.arange(1, 7).reshape(2, 3),
    np.arange(1, 10).reshape(3, 3),
)

STAMPED = """
(() => {
  const all = (grid, kind) =>
    [...document.querySelectorAll(`.stamping [data-grid=${grid}] .stamping-cell`)]
      .map((cell, i) => (cell.matches(kind) ? i : -1)).filter((i) => i >= 0);
  return {
    texts: [...document.querySelectorAll('.stamping [data-grid=output] .stamping-cell')].map(
      (cell) => cell.textContent),
    chosen: all('input', '.is-chosen'),
    fresh: all('output', '.is-new'),
    summed: all('output', '.is-sum'),
    words: document.querySelector('.stamping-words').textContent,
    slider: Number(document.querySelector('.stamping input').value),
    spoken: document.querySelector('.stamping input').getAttribute('aria-valuetext'),
    button: document.querySelector('.stamping button').textContent,
  };
})()
"""

# Goes to the animation, as a reader who scrolls does.
TO_STAMPS = "document.querySelector('.stamping').scrollIntoView({ behavior: 'instant' })"


def check_stamped(shown: dict, n: int) -> None:
    """Compare what the page shows with the package's frame."""
    frame = STAMPING.frames[n]
    width = STAMPING.output_shape[1]
    texts = [""] * np.prod(STAMPING.output_shape)
    for (oh, ow), value in frame.sums.items():
        texts[oh * width + ow] = str(value)
    for (oh, ow), value in frame.added.items():
        texts[oh * width + ow] += f"+{value}"
    assert shown["texts"] == texts
    assert shown["chosen"] == ([n - 1] if n else [])
    assert shown["fresh"] == sorted(oh * width + ow for oh, ow in frame.added)
    assert shown["summed"] == sorted(oh * width + ow for oh, ow in frame.met())
    assert shown["words"] == shown["spoken"] == frame.words
    assert shown["slider"] == n


def open_stamps(page, motion: str) -> None:
    """Load the chapter for a reader with this preference."""
    preference = {"name": "prefers-reduced-motion", "value": motion}
    page.send("Emulation.setEmulatedMedia", features=[preference])
    page.go(url("book/scatter_reference"))


def wait_until(page, condition: str, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < limit, condition
        time.sleep(0.05)


def test_the_stamps_step_and_pause_by_keyboard(page):
    open_stamps(page, "reduce")
    last = len(STAMPING.frames) - 1
    page.evaluate("document.querySelector('.stamping input').focus()")
    steps = [("Home", 0), *(("ArrowRight", n) for n in range(1, last + 1)), ("ArrowLeft", last - 1)]
    for key, n in [*steps, ("End", last), ("ArrowRight", last)]:
        page.press(key)
        check_stamped(page.evaluate(STAMPED), n)
    page.press("Tab", shift=True)
    assert page.evaluate("document.activeElement.matches('.stamping button')")
    page.press(" ")
    check_stamped(page.evaluate(STAMPED), 0)  # from the start, if it was at the end
    assert page.evaluate(STAMPED)["button"] == "Pause"
    wait_until(page, "document.querySelector('.stamping input').value == 2")
    page.press(" ")
    check_stamped(page.evaluate(STAMPED), 2)
    assert page.evaluate(STAMPED)["button"] == "Play"
    time.sleep(2)
    check_stamped(page.evaluate(STAMPED), 2)
    assert page.complaints() == []


def test_the_stamps_play_once_by_themselves_when_they_come_into_view(page):
    open_stamps(page, "no-preference")
    last = len(STAMPING.frames) - 1
    time.sleep(2)
    check_stamped(page.evaluate(STAMPED), last)  # nobody sees it yet
    page.evaluate(TO_STAMPS)
    wait_until(page, "document.querySelector('.stamping input').value == 0")
    assert page.evaluate(STAMPED)["button"] == "Pause"
    wait_until(page, f"document.querySelector('.stamping input').value == {last}")
    check_stamped(page.evaluate(STAMPED), last)
    time.sleep(2)
    assert page.evaluate(STAMPED)["button"] == "Play"
    check_stamped(page.evaluate(STAMPED), last)


def test_the_stamps_rest_for_a_reader_who_prefers_reduced_motion(page):
    open_stamps(page, "reduce")
    page.evaluate(TO_STAMPS)
    time.sleep(2)
    check_stamped(page.evaluate(STAMPED), len(STAMPING.frames) - 1)


def test_print_shows_the_last_stamp(page):
    open_stamps(page, "no-preference")
    page.evaluate(TO_STAMPS)
    wait_until(page, "document.querySelector('.stamping input').value == 1")
    page.pdf(60)
    shown = page.evaluate(STAMPED)
    check_stamped(shown, len(STAMPING.frames) - 1)
    assert shown["button"] == "Play"
    page.send("Emulation.setEmulatedMedia", media="print")
    assert not page.evaluate("document.querySelector('.stamping button').checkVisibility()")
