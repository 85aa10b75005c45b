"""Render the book: execute every notebook, treat every warning as an error.

Usage: python tools/book.py [FOLDER]

FOLDER holds _config.yml and _toc.yml (default: the repository's root). The pages go to
FOLDER/_build/html; the last line printed is the path of the page to open. The exit status is not
zero when a notebook raises or anything warns.
"""

import argparse
import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

INDEX = """\
<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta http-equiv="refresh" content="0; url={first}">
    <title>{title}</title>
  </head>
  <body>
    <h1>{title}</h1>
    <ul>
{links}
    </ul>
  </body>
</html>
"""


def pages(toc: dict | list) -> Iterator[str]:
    """The pages of a table of contents, in reading order, without suffix."""
    if isinstance(toc, list):
        for entry in toc:
            yield from pages(entry)
    else:
        yield from (toc[key] for key in ("root", "file") if key in toc)
        for key in ("parts", "chapters", "sections"):
            yield from pages(toc.get(key, []))


def page_title(page: Path) -> str:
    """A built page's title, without the book's."""
    title = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(title[1]).rsplit(" — ", 1)[0].strip()


def write_index(folder: Path, built: Path) -> Path:
    """Write index.html: it leads to the first page and links every other one.

    Jupyter Book's own is a redirect alone, which leaves a reader whose browser does not follow it
    with an empty page.
    """
    title = yaml.safe_load((folder / "_config.yml").read_text(encoding="utf-8"))["title"]
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    names = [f"{name}.html" for name in pages(toc)]
    links = (
        f'      <li><a href="{name}">{html.escape(page_title(built / name))}</a></li>'
        for name in names
    )
    index = built / "index.html"
    index.write_text(
        INDEX.format(title=html.escape(title), first=names[0], links="\n".join(links)),
        encoding="utf-8",
    )
    return index


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    folder = parser.parse_args().folder.resolve()

    # --all: a page is stale when the package changes, which Sphinx cannot see. -W without
    # --keep-going would stop at the first warning; raise_on_error in _config.yml makes a notebook
    # that raises an error of its own, since -W alone forgets it the second time.
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", "--all", "-W", "--keep-going", folder]
    status = subprocess.run(command, check=False).returncode
    if status:
        print("The book was not built: see the warnings and errors above.", file=sys.stderr)
        return status
    print("The book is built. Open this page:")
    print(write_index(folder, folder / "_build" / "html"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
