"""The README's Python runs as it stands, in a fresh process and an empty folder."""

import pathlib
import re

import fresh

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run(tmp_path):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    done = fresh.run("-c", "\n".join(blocks), cwd=tmp_path, ignore_warnings=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"maps"}
    assert (tmp_path / "maps" / "page.html").is_file()
    # It prints what the README says it prints.
    rest = re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL)
    (shown,) = re.findall(r"```\n(.*?)```", rest, re.DOTALL)
    for line in shown.splitlines():
        assert " ".join(line.split()) in " ".join(done.stdout.split()), line
    total = next(line for line in done.stdout.splitlines() if line.startswith("total"))
    native, by_rows = total.split()[1:3]
    assert int(by_rows) >= 4 and native == "0"


def test_it_can_be_read_in_a_minute():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
