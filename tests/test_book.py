"""The book's machinery: its contents, its build, and how its notebooks are stored and checked."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
EXEMPTIONS = {"nbval-ignore-output", "nbval-skip"}  # as tags; as comments in capitals

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a Python script or module in a process that knows nothing of this pytest."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def write_notebook(path: Path, source: str, printed: str) -> None:
    """A notebook of one cell that was run once and printed `printed`."""
    outputs = [new_output("stream", text=printed)] if printed else []
    cells = [
        new_markdown_cell("# A chapter", id="title"),
        new_code_cell(source, id="code", execution_count=1, outputs=outputs),
    ]
    nbformat.write(new_notebook(cells=cells), path)


# --- the contents ---------------------------------------------------------------------------------


def test_every_page_is_a_chapter_and_every_chapter_is_there():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    pages = [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]
    assert sorted([toc["root"], *chapters]) == sorted(f"book/{path.stem}" for path in pages)
    assert (ROOT / f"{toc['root']}.md").is_file()


@each_notebook
def test_stored_in_normal_form(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    done = run("tools/notebooks.py", "--no-execute", copy)
    assert done.returncode == 0, done.stdout
    assert copy.read_bytes() == path.read_bytes(), "run `make notebooks`"


@each_notebook
def test_no_cell_escapes_nbval(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    # nbval does not compare the outputs of a cell that was never run.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not EXEMPTIONS.intersection(cell.metadata.get("tags", []))
        for exemption in EXEMPTIONS:
            assert exemption.upper().replace("-", "_") not in cell.source


# --- the build ------------------------------------------------------------------------------------


@pytest.fixture
def mini_book(tmp_path, monkeypatch):
    """A book with this one's settings, an introduction and one chapter that prints 1."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # Sphinx leaves a log there when it fails
    book = tmp_path / "book"
    for folder in ("book/_static", "tools"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (
        "_config.yml",
        "book/_static/book.css",
        "book/_static/book.js",
        "book/references.bib",
        "tools/book_pages.py",
    ):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (book / "intro.md").write_text("# The introduction\n\nText.\n")
    toc = {"format": "jb-book", "root": "book/intro", "chapters": [{"file": "book/chapter"}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    write_notebook(book / "chapter.ipynb", "print(1)", "1\n")
    return tmp_path


def test_a_notebook_that_raises_fails_the_build_every_time(mini_book):
    chapter = mini_book / "book" / "chapter.ipynb"
    good = run("tools/book.py", mini_book)
    assert good.returncode == 0, good.stdout
    index = Path(good.stdout.splitlines()[-1])
    assert index == mini_book.resolve() / "_build" / "html" / "index.html"
    assert 'href="book/chapter.html">A chapter</a>' in index.read_text(encoding="utf-8")

    write_notebook(chapter, "raise RuntimeError('on purpose')", "")
    for attempt in ("the first time", "the second time"):
        bad = run("tools/book.py", mini_book)
        assert bad.returncode != 0, attempt
        assert "on purpose" in bad.stdout, attempt


def test_a_warning_fails_the_build_every_time(mini_book):
    (mini_book / "book" / "intro.md").write_text("# The introduction\n\n{ref}`no-such-place`\n")
    for attempt in ("the first time", "the second time"):
        bad = run("tools/book.py", mini_book)
        assert bad.returncode != 0, attempt
        assert "no-such-place" in bad.stdout, attempt


# --- the stored outputs ---------------------------------------------------------------------------


def test_a_changed_stored_output_fails_nbval(tmp_path):
    write_notebook(tmp_path / "good.ipynb", "print(1)", "1\n")
    write_notebook(tmp_path / "changed.ipynb", "print(1)", "2\n")
    write_notebook(tmp_path / "live.ipynb", "print('live: 3 ms')", "live: 4 ms\n")
    notebooks = sorted(tmp_path.glob("*.ipynb"))
    done = run("-m", "pytest", "@tools/nbval.args", "-p", "no:cacheprovider", *notebooks)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 2 passed" in done.stdout
    assert "changed.ipynb::Cell 0" in done.stdout


def test_executing_twice_changes_nothing(tmp_path):
    path = tmp_path / "chapter.ipynb"
    write_notebook(path, "import time\nprint(1, flush=True)\nprint('live:', time.time())", "")
    for outcome in ("written", "unchanged"):
        done = run("tools/notebooks.py", path)
        assert done.returncode == 0, done.stdout
        assert outcome in done.stdout


def test_a_notebook_that_raises_is_not_rewritten(tmp_path):
    path = tmp_path / "chapter.ipynb"
    write_notebook(path, "raise RuntimeError('on purpose')", "")
    before = path.read_bytes()
    done = run("tools/notebooks.py", path)
    assert done.returncode == 1
    assert "on purpose" in done.stdout
    assert path.read_bytes() == before
