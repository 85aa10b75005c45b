"""A Sphinx extension for the book's pages: they load nothing from elsewhere, and say their age.

- MathJax is served from the book. Its files come from the package sphinx-mathjax-offline; only
  those that are needed for TeX are copied.
- Thebe, which Jupyter Book puts on every page to run code on some server, is left out.
- The footer names the last change of the sources and the versions that the book was built with.
"""

import importlib.util
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

MATHJAX = "sphinx-mathjax-offline"
MATHJAX_FILES = ("tex-chtml.js", "output/chtml/fonts/woff-v2")
VERSIONS = ("convt_lab", "torch", "numpy", "matplotlib", "jupyter-book", "Sphinx")
SOURCES = ("book/*", "convt_lab/**/*", "records/*", "_toc.yml")
ARCHIVED = ".git_archival.txt"  # `git archive` fills it in: see .gitattributes


def mathjax_folder() -> Path:
    """The folder that MathJax was installed to."""
    spec = importlib.util.find_spec(MATHJAX)
    if spec is None:
        raise ExtensionError(f"{MATHJAX} is missing: pip install -r requirements.txt")
    return Path(spec.origin).parent / "static" / "mathjax"


def last_change(root: Path) -> str:
    """When the sources changed last: by git, by the archive they came in, or by their own dates."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    # Not a repository that is only around it, and one that has a commit.
    if top and Path(top).resolve() == root.resolve() and git("rev-parse", "--verify", "HEAD"):
        date, commit = git("log", "-1", "--format=%cs %h").split()
        changed = ", changed since" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"{date} (commit {commit}{changed})"
    archived = root / ARCHIVED
    if archived.is_file():
        date, _, commit = archived.read_text(encoding="utf-8").strip().partition(" ")
        if "Format" not in date:
            return f"{date} (commit {commit})"
    files = [path for pattern in SOURCES for path in root.glob(pattern)]
    newest = max(
        path.stat().st_mtime for path in files if path.is_file() and "__pycache__" not in path.parts
    )
    return f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d} (by the dates of the files)"


def versions() -> str:
    """What the book is built with, for a person."""
    names = [f"{name} {version(name)}" for name in VERSIONS]
    script = (mathjax_folder() / MATHJAX_FILES[0]).read_text(encoding="utf-8")
    mathjax = re.search(r'VERSION="([\d.]+)"', script)[1]
    return ", ".join([*names, f"MathJax {mathjax}", f"Python {python_version()}"])


def configure(app: Sphinx, config) -> None:
    """Point at the book's own MathJax, and fill the footer."""
    mathjax_folder()
    config.mathjax_path = "mathjax/tex-chtml.js"
    config.html_last_updated_fmt = last_change(Path(app.srcdir))
    config.html_theme_options["extra_footer"] = f"<p>Built with {versions()}.</p>"


def without_thebe(app: Sphinx, config) -> None:
    """Take Thebe's listeners away; Jupyter Book itself can't be told to do without.

    The one that brings its style sheet stays: pages name that in any case.
    """
    for event in ("env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[event]):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Put MathJax beside the pages."""
    if exception is not None or app.builder.format != "html":
        return
    for name in MATHJAX_FILES:
        source, target = mathjax_folder() / name, Path(app.outdir, "_static", "mathjax", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", configure)
    app.connect("config-inited", without_thebe)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True}
