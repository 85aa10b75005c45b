"""Print the rendered book into one PDF, through a headless Chromium.

Usage: python tools/pdf.py [FOLDER]

FOLDER is what was given to tools/book.py (default: the repository's root); the book must have been
rendered. The chapters are joined into one page, FOLDER/_build/pdf/book.html, with a title and a
table of contents, and printed to FOLDER/_build/pdf/book.pdf: folds are open, links lead inside the
file, the headings are its outline. It is printed twice, because the page numbers in the table of
contents are known only after the first time.
"""

import argparse
import html
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pypdf
import yaml
from browser import HOW_TO_GET, Browser, BrowserError, find
from bs4 import BeautifulSoup, Tag

import book

STYLE = Path(__file__).with_name("pdf.css")
SECONDS = 300  # for printing; a book of a hundred pages takes some ten
DEEPEST = 3  # headings in the table of contents: parts, chapters, sections
FOOTER = (
    '<div style="width: 100%; text-align: center; font: 8pt sans-serif">'
    '<span class="pageNumber"></span></div>'
)
PAGE = """\
<!DOCTYPE html>
<html lang="en" data-theme="light" data-mode="light">
<head>
<meta charset="utf-8">
<title>{title}</title>
{styles}
<style>{style}</style>
{scripts}
</head>
<body>
<header class="book-title">
<p class="title">{title}</p>
<p>{author}</p>
<p>{age}</p>
</header>
<nav class="book-contents">
<p class="title">Contents</p>
{contents}
</nav>
<main class="bd-content">
{body}
</main>
</body>
</html>
"""


class Chapter:
    """A rendered page: its article, whose links and names will fit into the whole."""

    def __init__(self, path: Path):
        self.path = path
        self.soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        self.article = self.soup.select_one("article.bd-article")
        for tag in self.article.select("a.headerlink"):
            tag.decompose()

    @property
    def id(self) -> str:
        """The name of the chapter as a whole."""
        return f"page-{self.path.stem}"

    def resolve(self, address: str) -> Path:
        """The file that a relative address means."""
        return (self.path.parent / unquote(urlsplit(address).path)).resolve()


def parts(folder: Path) -> list[tuple[str | None, list[str]]]:
    """The parts of the book, (caption, pages); the first is the introduction and has no caption."""
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    listed = toc.get("parts") or [{"chapters": toc.get("chapters", [])}]
    return [
        (None, [toc["root"]]),
        *((part.get("caption"), list(book.pages(part))) for part in listed),
    ]


def give_unique_names(chapters: list[Chapter]) -> dict[tuple[Path, str], str]:
    """Rename ids that several pages have; return each page's (file, id) -> id in the whole."""
    taken: set[str] = set()
    names = {}
    for chapter in chapters:
        names[chapter.path, ""] = chapter.id
        for tag in chapter.article.find_all(id=True):
            own = tag["id"]
            tag["id"] = own if own not in taken else f"{chapter.path.stem}--{own}"
            taken.add(tag["id"])
            names.setdefault((chapter.path, own), tag["id"])
    return names


def mend_addresses(chapter: Chapter, names: dict[tuple[Path, str], str]) -> None:
    """Let links to pages lead inside the file, and everything else to where it is."""
    for tag in chapter.article.find_all(["a", "img", "script", "link"]):
        key = "href" if tag.name in ("a", "link") else "src"
        address = tag.get(key)
        if not address or urlsplit(address).scheme:
            continue
        file, anchor = urldefrag(address)
        target = chapter.resolve(file) if file else chapter.path
        if tag.name != "a":
            tag[key] = target.as_uri()
        elif (target, unquote(anchor)) in names:
            tag["href"] = f"#{names[target, unquote(anchor)]}"
        else:
            tag.unwrap()  # the index, a download, a setting of the explorer: not in print


def unfold(chapter: Chapter) -> None:
    """Open what is folded; an offer to show a cell says nothing in print."""
    for details in chapter.article.find_all("details"):
        if "hide" in details.get("class", []):
            details.summary.decompose()
            details.name = "div"  # else the browser puts a summary of its own there
        else:
            details["open"] = ""


def lower_headings(article: Tag) -> None:
    """Make room for the parts above the chapters."""
    for level in range(5, 0, -1):
        for heading in article.find_all(f"h{level}"):
            heading.name = f"h{level + 1}"


def headings(body: BeautifulSoup) -> list[Tag]:
    """All headings, in the order in which Chromium puts them into the outline."""
    return body.find_all([f"h{level}" for level in range(1, 7)])


def contents(body: BeautifulSoup, numbers: list[int] | None) -> str:
    """The table of contents, with page numbers or, to begin with, room for them."""
    lines = []
    for n, heading in enumerate(headings(body)):
        level = int(heading.name[1])
        if level <= DEEPEST:
            # A section carries the id, its heading does not.
            named = heading if heading.get("id") else heading.find_parent(id=True)
            number = numbers[n] if numbers else 100
            lines.append(
                f'<a class="level-{level}" href="#{named["id"]}">'
                f"<span>{html.escape(heading.get_text())}</span><span>{number}</span></a>"
            )
    return "\n".join(lines)


def join(folder: Path) -> tuple[BeautifulSoup, dict[str, str]]:
    """All articles as one document, and what is left to fill into PAGE."""
    built = folder / "_build" / "html"
    listed = parts(folder)
    missing = [p for _, pages in listed for p in pages if not (built / f"{p}.html").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{built} has no page {', '.join(missing)}: render the book first (make book)"
        )
    chapters = {p: Chapter((built / f"{p}.html").resolve()) for _, pages in listed for p in pages}
    names = give_unique_names(list(chapters.values()))
    body = BeautifulSoup("", "html.parser")
    for n, (caption, pages) in enumerate(listed):
        if caption:
            part = body.new_tag("h1", id=f"part-{n}", attrs={"class": "book-part"})
            part.string = caption
            body.append(part)
        for page in pages:
            chapter = chapters[page]
            mend_addresses(chapter, names)
            unfold(chapter)
            lower_headings(chapter.article)
            whole = body.new_tag("div", id=chapter.id, attrs={"class": "book-chapter bd-article"})
            whole.append(chapter.article)
            body.append(whole)

    first = next(iter(chapters.values()))
    config = yaml.safe_load((folder / "_config.yml").read_text(encoding="utf-8"))
    sheets = first.soup.select("link[rel=stylesheet]")
    scripts = {
        str(tag): None if tag.get("src") is None else chapter.resolve(tag["src"]).as_uri()
        for chapter in chapters.values()
        for tag in chapter.soup.select("head script, body > script")
        if "MathJax" in tag.text or "mathjax" in tag.get("src", "")
    }
    age = [first.soup.select_one(at) for at in (".last-updated", ".extra_footer")]
    return body, {
        "title": html.escape(config["title"]),
        "author": html.escape(config["author"]),
        "age": html.escape(" ".join(" ".join(tag.get_text().split()) for tag in age if tag)),
        "styles": "\n".join(
            f'<link rel="stylesheet" href="{first.resolve(sheet["href"]).as_uri()}">'
            for sheet in sheets
        ),
        "style": STYLE.read_text(encoding="utf-8"),
        "scripts": "\n".join(
            f'<script defer src="{address}"></script>' if address else text
            for text, address in scripts.items()
        ),
    }


def page_numbers(pdf: Path) -> list[int]:
    """The page of each entry of a PDF's outline, counted from 1."""
    reader = pypdf.PdfReader(pdf)

    def walk(outline: list) -> list[int]:
        found = []
        for entry in outline:
            if isinstance(entry, list):
                found += walk(entry)
            else:
                found.append(reader.get_destination_page_number(entry) + 1)
        return found

    return walk(reader.outline)


def write_pdf(folder: Path) -> Path:
    """Join, print, number, print again; return the PDF's path."""
    body, filling = join(folder)
    joined, printed = (folder / "_build" / "pdf" / name for name in ("book.html", "book.pdf"))
    joined.parent.mkdir(parents=True, exist_ok=True)
    numbers = None
    with Browser() as browser:
        for _ in range(2):
            joined.write_text(
                PAGE.format(**filling, contents=contents(body, numbers), body=body),
                encoding="utf-8",
            )
            page = browser.page()
            page.go(joined.as_uri())
            printed.write_bytes(
                page.pdf(
                    SECONDS,
                    preferCSSPageSize=True,
                    printBackground=True,
                    displayHeaderFooter=True,
                    headerTemplate="<span></span>",
                    footerTemplate=FOOTER,
                    generateTaggedPDF=True,
                    generateDocumentOutline=True,
                )
            )
            complaints = page.complaints()
            if complaints:
                raise BrowserError("\n".join([f"{joined} complains:", *complaints]))
            page.close()
            numbers = page_numbers(printed)
            if len(numbers) != len(headings(body)):
                raise BrowserError(
                    f"the outline of {printed} has {len(numbers)} entries, the book "
                    f"{len(headings(body))} headings: is this Chromium older than 2024?"
                )
    return printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=book.ROOT)
    folder = parser.parse_args().folder.resolve()
    try:
        if find() is None:
            raise BrowserError(HOW_TO_GET)
        printed = write_pdf(folder)
    except (BrowserError, FileNotFoundError) as error:
        print(f"The PDF was not made: {error}", file=sys.stderr)
        return 1
    print("The book is printed. Open this file:")
    print(printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
