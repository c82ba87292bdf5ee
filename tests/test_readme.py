"""The README's Python runs as it stands, in a fresh process and an empty folder."""

import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "by_rows" in done.stdout
    assert "BlockMap" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"map.png", "map.safetensors", "attention_maps"}
    assert (tmp_path / "attention_maps" / "page.html").is_file()


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
