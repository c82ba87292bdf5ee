"""The Python of pages of docs/ runs as it stands, in a fresh process and an empty folder, and prints what the page says."""

import pathlib
import re

import fresh
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
# What a page's examples leave behind.
WRITTEN = {
    "maps.md": {"change.png", "map.png", "maps"},
    "rag.md": {"rag.png"},
    "tokens.md": {"tokens.png"},
    "vision.md": {"where.png", "page.html"},
    "heads.md": {"heads.png"},
}


@pytest.mark.parametrize("page", WRITTEN)
def test_examples_run(page, tmp_path):
    text = (DOCS / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    rest = re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL)
    done = fresh.run("-c", code, cwd=tmp_path, ignore_warnings=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN[page]
    for shown in re.findall(r"```\n(.*?)```", rest, re.DOTALL):
        for line in shown.splitlines():
            assert " ".join(line.split()) in " ".join(done.stdout.split()), line
