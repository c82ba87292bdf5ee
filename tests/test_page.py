"""The page as a file: what is in it, what cannot get out of it, and that it is written whole or not at all."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from typer.testing import CliRunner

from attnpatch.cli.app import app
from attnpatch.errors import BlockMapFileError, PageError
from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing import page
from attnpatch.viewing.files import load_maps
from attnpatch.viewing.page import in_script, packed, write_page

ROOT = Path(__file__).parents[1]
EVIL = [
    "<script>window.ran = true</script>",
    "</script><script>window.ran = true</script>",
    "<!-- <script>",
    "{{script}} {{numbers}}",
    "quotes \" and ' and \\ and \u2028 and \U0001f600 and a lone \udc80",
    "",
]


def block_map(batch=0, steps=0, layers=3, heads=0, queries=4, keys=4, seed=0, **fields):
    """Rows of probabilities in any of the shapes that a map can have."""
    shape = [*[batch] * bool(batch), *[steps] * bool(steps), layers, *[heads] * bool(heads), queries, keys]
    mass = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    labels = {"query": [f"q{i}" for i in range(queries)], "key": [f"k{i}" for i in range(keys)]}
    if queries == keys:
        labels["key"] = labels["query"]
    given = {
        "mass": mass,
        "layers": range(layers),
        "query_labels": labels["query"],
        "key_labels": labels["key"],
        "query_sizes": torch.arange(1, queries + 1),
        "key_sizes": torch.arange(2, keys + 2),
        "heads": range(heads) if heads else "mean",
        "steps": [f"t{i}" for i in range(steps)],
    }
    return BlockMap(**{**given, **fields})


def facts(text):
    """The JSON of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1))


def numbers(text):
    """All pictures of a page by the id of their element."""
    found = re.findall(r'<script type="application/octet-stream" id="n([-\d]+)">(.*?)</script>', text)
    return {name: unpacked(base64.b64decode(data)) for name, data in found}


def unpacked(data):
    planes = np.frombuffer(zlib.decompress(data, -zlib.MAX_WBITS), np.uint8).reshape(3, -1).astype(np.uint32)
    return (planes[0] << 24 | planes[1] << 16 | planes[2] << 8).view(np.float32)


SHAPES = [
    {},
    {"layers": 1},
    {"heads": 2},
    {"queries": 3, "keys": 7},
    {"batch": 2, "steps": 2, "layers": 2, "heads": 3, "queries": 2},
    {"steps": 1, "heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_position_of_the_sliders_has_its_numbers(shape, tmp_path):
    given = block_map(**shape)
    text = write_page({"map": given}, tmp_path / "page.html").read_text()
    (described,), held = facts(text), numbers(text)
    seen = 0
    for s in range(len(described["sequences"])):
        for t, step in enumerate(described["steps"]):
            for la, layer in enumerate(described["layers"]):
                for h, head in enumerate(described["heads"]):
                    expected = given.select(
                        layer=layer, head=head, sequence=s, step=step if given.steps else None
                    )
                    found = held[f"0-{s}-{t}-{la}-{h}"]
                    np.testing.assert_allclose(found, expected.mass.numpy().reshape(-1), rtol=2**-15)
                    seen += 1
    assert seen == len(held)


@given(arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_subnormal=True)))
def test_numbers_keep_their_upper_24_bits(values):
    found = unpacked(packed(values))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    ordinary = np.isfinite(values) & (np.abs(values) < 3e38)
    np.testing.assert_allclose(found[ordinary], values[ordinary], rtol=2**-16, atol=2e-43)
    assert (found[values == 0] == 0).all()
    assert (np.isinf(found[np.isinf(values)])).all()


def test_texts_and_names_stay_inside_the_json(tmp_path):
    count = len(EVIL)
    given = block_map(
        queries=count,
        keys=count,
        query_labels=EVIL,
        key_labels=EVIL,
        metadata={"texts": EVIL, "<b>": "</script>"},
    )
    name = '"><img src=x onerror=alert(1)>{{script}}</title></script>\udc80'
    text = write_page({name: given}, tmp_path / "page.html").read_text()
    (found,) = facts(text)
    assert found["name"] == name
    assert found["facts"] == {"<b>": "</script>"}
    side = found["sequences"][0]["query"]
    assert side["texts"] == side["labels"] == EVIL
    # Elements of the page, the data and nothing else.
    pictures = len(numbers(text))
    assert text.count("<script") == pictures + 2
    assert text.count("</script") == pictures + 2
    assert "<!--" not in text and "<img" not in text
    assert "\u2028" not in text


@given(st.text())
def test_json_in_a_script_is_json_without_tags(text):
    written = in_script([text])
    assert "<" not in written and written.isascii()
    assert json.loads(written) == [text]


def test_json_in_a_script_has_no_word_for_what_is_no_number():
    with pytest.raises(ValueError, match="not JSON compliant"):
        in_script(math.nan)


def test_masses_that_are_no_numbers_do_not_break_the_page(tmp_path):
    mass = torch.full((2, 2, 2), math.nan)
    text = write_page(
        {"map": block_map(layers=2, queries=2, keys=2, mass=mass)}, tmp_path / "page.html"
    ).read_text()
    assert facts(text)[0]["sequences"][0]["profile"][0][0]["own"] == [None, None]


def test_nothing_is_asked_of_the_network(tmp_path):
    text = write_page({"map": block_map()}, tmp_path / "page.html").read_text()
    assert not re.findall(
        r"\b(?:src|href|action)\s*=|@import|\burl\(|\bfetch\(|XMLHttpRequest|import\(", text
    )
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text).group(1)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


TEXTS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("batch", "texts", "expected"),
    [
        (0, TEXTS, [TEXTS]),
        (0, [TEXTS], [TEXTS]),
        (2, [TEXTS, TEXTS[::-1]], [TEXTS, TEXTS[::-1]]),
        (2, [TEXTS], [TEXTS, None]),
        (0, TEXTS[:3], [None]),
        (0, [1, 2, 3, 4], [["1", "2", "3", "4"]]),
        (0, "abcd", [None]),
        (0, None, [None]),
    ],
)
def test_texts_belong_to_their_blocks(batch, texts, expected, tmp_path):
    given = block_map(batch=batch, metadata={"texts": texts})
    (found,) = facts(write_page({"map": given}, tmp_path / "page.html").read_text())
    assert [one["query"]["texts"] for one in found["sequences"]] == expected
    assert [one["key"]["texts"] for one in found["sequences"]] == expected
    assert "texts" not in found["facts"]


def test_texts_of_one_side_only(tmp_path):
    given = block_map(queries=3, keys=4, metadata={"texts": TEXTS})
    (found,) = facts(write_page({"map": given}, tmp_path / "page.html").read_text())
    assert found["sequences"][0]["query"]["texts"] is None
    assert found["sequences"][0]["key"]["texts"] == TEXTS


def test_profiles_are_means_over_rows_with_tokens(tmp_path):
    given = block_map(heads=2, query_sizes=torch.tensor([1, 0, 2, 3]))
    (found,) = facts(write_page({"map": given}, tmp_path / "page.html").read_text())
    profile = found["sequences"][0]["profile"][0]
    mass = given.mass[:, :, [0, 2, 3]]
    expected = {
        "own": mass[:, :, range(3), [0, 2, 3]].mean(-1),
        "first": mass[..., 0].mean(-1),
        "largest": mass.amax(-1).mean(-1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(profile[0][name], values.mean(1), rtol=1e-4)
        for head in (0, 1):
            np.testing.assert_allclose(profile[1 + head][name], values[:, head], rtol=1e-4)


def test_shorter_sequences_of_a_batch_are_cut(tmp_path):
    labels = [["a", "b", "c", "d"], ["a", "b"]]
    sizes = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = block_map(
        batch=2, query_labels=labels, key_labels=labels, query_sizes=sizes, key_sizes=sizes,
        metadata={"sequences": [{"role": "prompt"}, {"role": "negative prompt"}]},
    )  # fmt: skip
    text = write_page({"map": given}, tmp_path / "page.html").read_text()
    (found,) = facts(text)
    assert [one["query"]["labels"] for one in found["sequences"]] == labels
    assert [one["name"] for one in found["sequences"]] == ["0 (prompt)", "1 (negative prompt)"]
    assert numbers(text)["0-1-0-0-0"].size == 4


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_page_is_written_whole_or_not_at_all(problem, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("the old page")

    def numbers_that_fail(index, block_map):
        yield "something"
        raise problem

    monkeypatch.setattr(page, "_numbers", numbers_that_fail)
    expected = PageError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        write_page({"map": block_map()}, target)
    if expected is PageError:
        assert "No space left on device" in str(raised.value) and "page.html" in str(raised.value)
    assert target.read_text() == "the old page"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(PageError, match="no block map"):
        write_page({}, tmp_path / "page.html")
    with pytest.raises(PageError, match="is a folder"):
        write_page({"map": block_map()}, tmp_path)
    with pytest.raises(PageError, match="No such file or directory"):
        write_page({"map": block_map()}, tmp_path / "missing" / "page.html")
    assert not list(tmp_path.iterdir())


def folder_of_many(tmp_path):
    """Two maps, weights, a file cut short, and files that are no business of ours."""
    block_map(seed=2).save(tmp_path / "0002.safetensors")
    block_map(seed=1).save(tmp_path / "0001.safetensors")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "0001.safetensors").read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("no map")
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


def test_a_folder_gives_its_maps_by_name(tmp_path):
    maps, skipped = load_maps(folder_of_many(tmp_path))
    assert list(maps) == ["0001.safetensors", "0002.safetensors"]
    assert maps["0002.safetensors"] == block_map(seed=2)
    assert len(skipped) == 2
    assert skipped[0].startswith("skipped model.safetensors") and "not a block map" in skipped[0]
    assert skipped[1].startswith("skipped short.safetensors")


def test_weights_are_not_read_to_see_that_they_are_no_map(tmp_path, monkeypatch):
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(BlockMap, "load", lambda path: pytest.fail("read"))
    with pytest.raises(BlockMapFileError, match="not a block map"):
        load_maps(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is nothing at"),
        (lambda path: path.mkdir(), "no .safetensors file"),
        (lambda path: (path.mkdir(), (path / "a.safetensors").write_text("?")), "1 other .safetensors files"),
    ],
)
def test_no_map_is_an_error(make, says, tmp_path):
    make(tmp_path / "given")
    with pytest.raises(PageError, match=says):
        load_maps(tmp_path / "given")


def view(*arguments):
    return CliRunner().invoke(app, ["view", *map(str, arguments)])


def test_view_says_what_it_wrote_and_what_it_left_out(tmp_path):
    (tmp_path / "maps").mkdir()
    out = tmp_path / "page.html"
    result = view(folder_of_many(tmp_path / "maps"), "--out", out)
    assert result.exit_code == 0
    assert result.stdout == f"{out}: 2 block maps, 0.1 MB, 2 files skipped\n"
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["attnpatch"] * 2
    assert "model.safetensors" in lines[0] and "short.safetensors" in lines[1]
    assert [one["name"] for one in facts(out.read_text())] == ["0001.safetensors", "0002.safetensors"]


def test_view_writes_page_html_if_not_told_otherwise(tmp_path, monkeypatch):
    block_map().save(tmp_path / "map.safetensors")
    monkeypatch.chdir(tmp_path)
    result = view("map.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "page.html: 1 block map, 0.1 MB\n"
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["nothing", "--out", "page.html"], "there is nothing at", 1),
        (["weights.safetensors"], "not a block map", 1),
        (["map.safetensors", "--out", "."], "is a folder", 2),
        (["map.safetensors", "--out", "map.safetensors"], "holds block maps", 2),
        ([".", "--out", "map.safetensors"], "holds block maps", 2),
        (["map.safetensors", "--out", "missing/page.html"], "No such file or directory", 1),
    ],
)
def test_view_answers_bad_input_in_one_line(arguments, says, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = block_map().save(tmp_path / "map.safetensors").read_bytes()
    save_file({"weight": torch.ones(3)}, tmp_path / "weights.safetensors")
    result = view(*arguments)
    assert result.exit_code == code and not result.stdout
    assert says in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.safetensors", "weights.safetensors"]
    assert (tmp_path / "map.safetensors").read_bytes() == saved


def test_sources_of_the_page_are_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = list((ROOT / "attnpatch" / "viewing" / "static").iterdir())
    assert len(sources) == len(page._SCRIPTS) + 2
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= held
