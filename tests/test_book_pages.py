"""What the book's pages say of their age and of what they were built with."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import book_pages  # noqa: E402

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def sources(tmp_path):
    """A folder with one page, last written to on a day in 2031."""
    root = tmp_path / "sources"
    (root / "book").mkdir(parents=True)
    page = root / "book" / "intro.md"
    page.write_text("# Title\n")
    os.utime(page, (1_940_000_000, 1_940_000_000))
    return root


def commit(root: Path, day: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    dates = {f"GIT_{role}_DATE": f"{day}T12:00:00Z" for role in ("AUTHOR", "COMMITTER")}
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", *who, *command], cwd=root, env=os.environ | dates, check=True)


def test_without_git_the_newest_file_says_when(sources):
    assert book_pages.last_change(sources) == "2031-06-23 (by the dates of the files)"
    compiled = sources / "convt_lab" / "__pycache__" / "module.pyc"
    compiled.parent.mkdir(parents=True)
    compiled.touch()  # Python wrote it, not an author
    os.utime(compiled, (1_990_000_000, 1_990_000_000))
    assert book_pages.last_change(sources) == "2031-06-23 (by the dates of the files)"


@needs_git
def test_a_repository_says_when_and_which_commit(sources):
    commit(sources, "2024-02-29")
    assert book_pages.last_change(sources).startswith("2024-02-29 (commit ")
    assert book_pages.last_change(sources).endswith(")")
    assert "changed" not in book_pages.last_change(sources)
    (sources / "book" / "intro.md").write_text("# Another\n")
    assert book_pages.last_change(sources).endswith(", changed since)")


@needs_git
def test_a_repository_without_a_commit_says_nothing(sources):
    subprocess.run(["git", "init", "-q"], cwd=sources, check=True)
    assert book_pages.last_change(sources) == "2031-06-23 (by the dates of the files)"


@needs_git
def test_a_repository_around_the_sources_says_nothing(sources):
    commit(sources.parent, "2024-02-29")
    assert book_pages.last_change(sources) == "2031-06-23 (by the dates of the files)"


@needs_git
def test_an_archive_says_when_and_which_commit(sources, tmp_path):
    for name in (book_pages.ARCHIVED, ".gitattributes"):
        shutil.copy(ROOT / name, sources)
    assert "by the dates of the files" in book_pages.last_change(sources)  # not filled in
    commit(sources, "2024-02-29")
    archive, unpacked = tmp_path / "archive.tar", tmp_path / "unpacked"
    subprocess.run(["git", "archive", "-o", archive, "HEAD"], cwd=sources, check=True)
    shutil.unpack_archive(archive, unpacked, filter="data")
    said = book_pages.last_change(unpacked)
    assert said.startswith("2024-02-29 (commit ")
    assert said == book_pages.last_change(sources)


def test_versions_are_those_installed():
    said = book_pages.versions()
    for name in ("convt_lab", "torch", "Sphinx"):
        assert f"{name} {version(name)}," in said
    assert "MathJax 3.2.2" in said


def test_without_mathjax_the_build_says_what_to_do(monkeypatch):
    monkeypatch.setattr(book_pages, "MATHJAX", "no-such-package")
    with pytest.raises(book_pages.ExtensionError, match=r"pip install -r requirements\.txt"):
        book_pages.mathjax_folder()
