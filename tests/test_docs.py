"""The documentation builds as ``make docs`` builds it: strictly, without a broken link."""

import os
import pathlib
import subprocess
import sys

import pytest

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
    for name in ("apply", "capture", "BlockMap", "BlockAttentionAnalyzer", "heat_map"):
        assert name in reference
    pages = [page for page in tmp_path.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 10
    for page in pages:
        # Nothing is fetched when a page is read.
        text = page.read_text()
        assert "fonts.googleapis" not in text and 'src="http' not in text, page
