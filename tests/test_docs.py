"""The documentation builds as ``make docs`` builds it: strictly, without a broken link."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import attnpatch

pytest.importorskip("mkdocs")
ROOT = pathlib.Path(__file__).parents[1]


def test_docs_build(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text()
    shown = set(re.findall(r'id="(attnpatch[\w.]*)"', reference))
    names = {path.rpartition(".")[2] for path in shown}
    assert set(attnpatch.__all__) - {"errors"} <= names
    assert {
        "Maps",
        "ImageMaps",
        "TokenScores",
        "HeadScores",
        "Ranking",
        "Report",
        "Explanation",
        "Analysis",
    } <= names
    errors = {name for name, one in vars(attnpatch.errors).items() if isinstance(one, type)}
    assert len(errors) > 10 and {f"attnpatch.errors.{name}" for name in errors} <= shown
    pages = [page for page in tmp_path.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 10
    for page in pages:
        # Nothing is fetched when a page is read.
        text = page.read_text()
        assert "fonts.googleapis" not in text and 'src="http' not in text, page


def test_files_that_the_design_names_exist():
    """Paths are given from the package on; a file named alone is in the folder of the one before it."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", text)
    assert len(named) > 40
    assert [
        name for name in named if not ((ROOT / "attnpatch" / name).exists() or (ROOT / name).exists())
    ] == []


def test_points_below_points_are_nested():
    """The pages' Markdown nests a list by four spaces; with fewer, its points become points of the outer list."""
    for path in (ROOT / "docs").glob("*.md"):
        assert re.findall(r"^ {1,3}[*-] .*", path.read_text(encoding="utf-8"), re.MULTILINE) == [], path.name
