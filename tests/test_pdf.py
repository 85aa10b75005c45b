"""The PDF of the book: all chapters in order, links inside the file, folds open, numbers right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pypdf
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import browser as chromium  # noqa: E402
import pdf  # noqa: E402

needs_chromium = pytest.mark.skipif(chromium.find() is None, reason=chromium.HOW_TO_GET)
needs_the_book = pytest.mark.skipif(
    not (ROOT / "_build" / "html" / "index.html").is_file(),
    reason="needs the rendered book: run `make book`",
)

# As Sphinx writes it, as far as the PDF is concerned.
RENDERED = """
<html><head><link rel="stylesheet" href="../_static/book.css"></head><body>
<article class="bd-article"><section id="{name}"><h1>{title}</h1>
<section id="exercises"><h2>Exercises<a class="headerlink" href="#exercises">¶</a></h2>
{text}
</section></section></article>
<p class="last-updated">Last updated on 2024-02-29.</p>
</body></html>
"""
INTRO = """<p>See <a href="one.html#exercises">its exercises</a>, <a href="#exercises">my own</a>,
<a href="one.html">all of it</a>, <a href="../genindex.html">the index</a> and
<a href="https://example.org/">elsewhere</a>.</p><img src="../_images/dot.svg" alt="a dot">"""
ONE = """<details><summary>Solution</summary><p>Unfolded words.</p></details>
<details class="admonition hide"><summary>Show the check</summary><p>Checked words.</p></details>
"""
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="9"/></svg>'


@pytest.fixture
def small_book(tmp_path):
    """A book of an introduction and a chapter, rendered."""
    html = tmp_path / "_build" / "html"
    for folder in ("book", "_static", "_images"):
        (html / folder).mkdir(parents=True)
    (html / "_static" / "book.css").write_text("p { margin: 1em }")
    (html / "_images" / "dot.svg").write_text(DOT)
    for name, title, text in (("intro", "Before", INTRO), ("one", "1. The chapter", ONE)):
        page = RENDERED.format(name=name, title=title, text=text)
        (html / "book" / f"{name}.html").write_text(page)
    toc = {"root": "book/intro", "parts": [{"caption": "Part", "chapters": [{"file": "book/one"}]}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "_config.yml").write_text("title: A small <book>\nauthor: nobody")
    return tmp_path


def dangling(body: BeautifulSoup) -> list[str]:
    """The links inside the document that lead nowhere."""
    ids = [tag["id"] for tag in body.find_all(id=True)]
    assert len(ids) == len(set(ids)), "an id is there twice"
    inside = (a["href"] for a in body.find_all("a", href=re.compile("^#")))
    return [address for address in inside if address[1:] not in ids]


def test_chapters_are_joined_and_their_links_lead_inside(small_book):
    body, filling = pdf.join(small_book)
    assert [tag.text for tag in pdf.headings(body)] == [
        *("Before", "Exercises"),
        *("Part", "1. The chapter", "Exercises"),
    ]
    assert [tag.name for tag in pdf.headings(body)] == ["h2", "h3", "h1", "h2", "h3"]
    assert dangling(body) == []
    links = {a.text: a["href"] for a in body.find_all("a")}
    assert links == {
        "its exercises": "#one--exercises",
        "my own": "#exercises",
        "all of it": "#page-one",
        "elsewhere": "https://example.org/",
    }
    assert body.img["src"] == (small_book / "_build" / "html" / "_images" / "dot.svg").as_uri()
    assert [d.has_attr("open") for d in body.find_all("details")] == [True]
    assert "Checked words." in body.text
    assert "Show the check" not in body.text
    assert filling["title"] == "A small &lt;book&gt;"
    assert "2024-02-29" in filling["age"]


@needs_chromium
def test_the_pdf_can_be_searched_and_walked_through(small_book):
    reader = pypdf.PdfReader(pdf.write_pdf(small_book))
    assert reader.metadata.title == "A small <book>"
    texts = [page.extract_text() for page in reader.pages]
    title, contents, intro, part, chapter = texts
    assert "2024-02-29" in title
    assert "Unfolded words." in chapter
    assert "Checked words." in chapter
    assert part.split()[0] == "Part"
    # Each line of the contents ends with the page that has its text.
    lines = re.findall(r"^(Before|Exercises|Part|1\. The chapter) *(\d+)$", contents, re.MULTILINE)
    assert [int(number) for _, number in lines] == [3, 3, 4, 5, 5]
    for text, number in lines:
        assert text in texts[int(number) - 1]
    assert "its exercises" in intro
    links = [a.get_object() for page in reader.pages for a in page.get("/Annots", [])]
    assert len(links) == len(lines) + 4  # and those of the introduction
    assert [link["/A"]["/URI"] for link in links if "/A" in link] == ["https://example.org/"]
    assert sum("/Dest" in link for link in links) == len(links) - 1


@needs_the_book
def test_nothing_of_the_book_is_left_out_or_dangles():
    body, filling = pdf.join(ROOT)
    chapters = body.select("div.book-chapter")
    assert len(chapters) == sum(len(pages) for _, pages in pdf.parts(ROOT))
    assert all(chapter.find("h2") for chapter in chapters)
    assert dangling(body) == []
    for tag in body.find_all(src=re.compile("^file:")):
        assert Path(tag["src"].removeprefix("file://")).is_file()
    assert "mathjax/tex-chtml.js" in filling["scripts"]
    assert all(details.has_attr("open") for details in body.find_all("details"))


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "pdf.py", folder],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nowhere", "CHROMIUM": ""}, "no Chromium was found: install one"),
        ({"CHROMIUM": "/no/chromium"}, "CHROMIUM='/no/chromium' must be the path of a Chromium"),
    ],
)
def test_without_chromium_it_says_how_to_get_one(small_book, environment, message):
    done = run(small_book, **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_chromium
def test_without_a_rendered_page_it_says_what_to_do(small_book):
    (small_book / "_build" / "html" / "book" / "one.html").unlink()
    done = run(small_book)
    assert done.returncode == 1
    assert "has no page book/one: render the book first (make book)" in done.stderr


@needs_chromium
def test_a_browser_that_ends_is_an_error(tmp_path):
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 1\n")
    broken.chmod(0o755)
    with (
        chromium.Browser(str(broken)) as running,
        pytest.raises(chromium.BrowserError, match=r"(?s)ended by itself.*no display"),
    ):
        running.send("Browser.getVersion")
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 600\n")
    hangs.chmod(0o755)
    with (
        chromium.Browser(str(hangs)) as running,
        pytest.raises(chromium.BrowserError, match="not answered in time"),
    ):
        running.send("Browser.getVersion", seconds=1)
