"""Tiles over the pictures of a prompt, on the page: what is embedded, what is drawn, keys, phone, both themes."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_page import facts
from test_page_browser import PHONE, block_map, browser, opened, settled, until  # noqa: F401 (fixtures)

import attnpatch.viewing.page as page_module
from attnpatch.errors import PageError
from attnpatch.viewing.page import write_page

LABELS = ["text, before image 1"]
LABELS += [f"image 1 r{i}c{j}" for i in range(2) for j in range(3)]
LABELS += [f"image 2 r{i}c{j}" for i in range(2) for j in range(2)]
LABELS += ["image 2 other", "text", "answer"]
# 3 x 5 tokens in tiles of 2: the last row and the last column are narrower.
SIZES = [7, 4, 4, 2, 2, 2, 1, 4, 4, 4, 4, 1, 5, 3]


def of_images(**fields):
    """A map of a prompt with two pictures. The answer looks at r1c2 of the first one, whose tile is the smallest."""
    given = block_map(count=len(LABELS), layers=2)
    mass = given.mass.clone()
    mass[:, -1] = 0.001
    mass[1, -1, LABELS.index("image 1 r1c2")] = 0.3
    mass[1, -1, LABELS.index("image 2 r0c1")] = 0.6
    sizes = torch.tensor(SIZES)
    return block_map(
        **{
            "count": len(LABELS), "layers": 2, "mass": mass, "query_labels": LABELS, "key_labels": LABELS,
            "query_sizes": sizes, "key_sizes": sizes, "metadata": {"model": "m"}, **fields,
        }
    )  # fmt: skip


def picture(width, height, colour=(200, 60, 40)):
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = colour
    return Image.fromarray(pixels)


PICTURES = [picture(500, 300), picture(1600, 1200)]


def embedded(path):
    """The pictures in a page, in order."""
    text = path.read_text()
    found = re.findall(r'<script type="application/octet-stream" id="p(\d+)">([^<]*)</script>', text)
    assert [int(number) for number, _ in found] == [*range(len(found))]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in found]


def test_pictures_are_embedded_once_and_small(tmp_path):
    path = write_page({"one": of_images(), "two": of_images()}, tmp_path / "page.html", PICTURES)
    assert [image.size for image in embedded(path)] == [(500, 300), (640, 480)]
    for shown in facts(path.read_text()):
        first, second = shown["sequences"][0]["grids"]
        assert (first["name"], first["heights"], first["widths"]) == ("image 1", [2, 1], [2, 2, 1])
        assert first["blocks"] == [[1, 2, 3], [4, 5, 6]] and second["blocks"] == [[7, 8], [9, 10]]
        assert [grid["picture"]["id"] for grid in (first, second)] == ["p0", "p1"]
    assert path.stat().st_size < 300_000


def test_kinds_of_pictures(tmp_path):
    PICTURES[0].save(tmp_path / "one.png")
    half = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    for given in (
        str(tmp_path / "one.png"),
        tmp_path / "one.png",
        np.asarray(PICTURES[0]),
        torch.zeros(3, 8, 9),
        half,
    ):
        (image,) = embedded(write_page({"m": of_images()}, tmp_path / "page.html", {"image 2": given}))
    assert image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("pictures", "says"),
    [
        ("one.png", "give a list of pictures"),
        (5, "give a list of pictures"),
        ([PICTURES[0]] * 3, "no map has tiles of 'image 3'; there are tiles of: 'image 1', 'image 2'"),
        ({"cat": PICTURES[0]}, "no map has tiles of 'cat'"),
        (["none.png"], "none.png' cannot be used"),
        ([object()], "cannot be used"),
        ([[PICTURES[0]]] * 2, "pictures of 2 sequences are given, and a map has 1"),
    ],
)
def test_pictures_that_cannot_be_meant(pictures, says, tmp_path):
    with pytest.raises(PageError, match=re.escape(says)) as caught:
        write_page({"m": of_images()}, tmp_path / "page.html", pictures)
    assert "\n" not in str(caught.value) and not (tmp_path / "page.html").exists()


def test_a_batch_has_pictures_of_its_own(tmp_path):
    one = of_images()
    batch = of_images(
        mass=torch.stack([one.mass, one.mass]), query_labels=[LABELS] * 2, key_labels=[LABELS] * 2,
        query_sizes=torch.tensor([SIZES] * 2), key_sizes=torch.tensor([SIZES] * 2),
    )  # fmt: skip
    with pytest.raises(PageError, match="which pictures belong to which"):
        write_page({"m": batch}, tmp_path / "page.html", PICTURES)
    path = write_page({"m": batch}, tmp_path / "page.html", [PICTURES[:1], PICTURES[1:]])
    (shown,) = facts(path.read_text())
    assert [one["grids"][0]["picture"]["id"] for one in shown["sequences"]] == ["p0", "p1"]
    assert shown["sequences"][0]["grids"][1]["picture"] is None


@pytest.fixture
def shown(opened, monkeypatch):  # noqa: F811
    """Opens a page of a map with pictures."""

    def show(given=None, pictures=PICTURES, **options):
        plain = write_page
        monkeypatch.setattr("test_page_browser.write_page", lambda maps, path: plain(maps, path, pictures))
        page = opened(of_images() if given is None else given, **options)
        monkeypatch.setattr("test_page_browser.write_page", plain)
        until(
            page,
            "!document.getElementById('pictures').hidden && document.querySelectorAll('#pictures figcaption b').length > 0 || document.getElementById('picture-panel').hidden",
        )
        page.wait_for_timeout(100)
        return page

    return show


COLOUR = """([grid, x, y]) => {
    const canvas = document.querySelectorAll("#pictures canvas")[grid];
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    return [...context.getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data];
}"""


def test_colours_are_numbers_per_token(shown):
    """The answer's row: 0.3 on a tile of one token, 0.6 on one of four. The first tile is the brightest."""
    page = shown()
    assert "answer" in page.locator("#picture-title").inner_text().lower()
    captions = page.locator("#pictures figcaption").all_inner_texts()
    assert captions[0].startswith("Image 1: ") and "most at r1c2 (0.300)" in captions[0]
    assert "most at r0c1 (0.600)" in captions[1]
    bright, dim = page.evaluate(COLOUR, [0, 0.9, 0.9]), page.evaluate(COLOUR, [0, 0.1, 0.1])
    other = page.evaluate(COLOUR, [1, 0.75, 0.25])
    assert bright[0] > bright[2] + 60 and dim[0] <= dim[2] + 30  # yellow, and nearly grey
    assert sum(dim[:2]) < sum(other[:2]) < sum(bright[:2])
    # The narrow tile begins at 4/5 of the width, and at 2/3 of the height.
    assert page.evaluate(COLOUR, [0, 0.81, 0.7])[0] > 150 and page.evaluate(COLOUR, [0, 0.78, 0.7])[0] < 150
    page.locator("#heat").uncheck()
    page.wait_for_timeout(100)
    red, green, blue, _ = page.evaluate(COLOUR, [0, 0.2, 0.2])
    assert red > 170 and green < 90 and blue < 90


def test_a_tile_is_chosen_by_pointer_and_keys(shown):
    page = shown()
    canvas = page.locator("#pictures canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    assert "image 1 r0c1" in page.locator("#tooltip").inner_text()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    settled(page)
    assert page.evaluate("state.cursor") == {"row": 13, "column": 2}
    canvas.focus()
    for key, column in (
        ("ArrowRight", 3),
        ("ArrowRight", 3),
        ("ArrowDown", 6),
        ("ArrowLeft", 5),
        ("ArrowUp", 2),
    ):
        page.keyboard.press(key)
        settled(page)
        assert page.evaluate("state.cursor.column") == column
    assert "image 1 r0c1" in page.locator("#spoken").inner_text()
    about = page.evaluate("document.querySelector('#pictures canvas').ariaLabel")
    assert about == "Image 1, 2 rows of 3 tiles. Arrow keys move to another tile."
    # Another row: the picture takes its colours.
    before = page.locator("#pictures figcaption").first.inner_text()
    page.evaluate("select({row: 12, column: 2}, 12)")
    page.wait_for_timeout(150)
    assert page.locator("#pictures figcaption").first.inner_text() != before


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 800}, {"width": 400, "height": 844}, PHONE])
def test_nothing_is_wider_than_the_window(shown, theme, viewport):
    page = shown(viewport=viewport, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for box in page.locator("#pictures canvas").all():
        assert 150 < box.bounding_box()["width"] <= viewport["width"] - 24


def test_without_pictures_and_without_tiles(shown, opened):  # noqa: F811
    page = shown(pictures=None)
    assert page.locator("#pictures canvas").count() == 2 and page.locator("#picture-panel").is_visible()
    assert page.evaluate(COLOUR, [0, 0.9, 0.9])[0] > 200
    assert opened(block_map()).locator("#picture-panel").is_hidden()


def test_a_picture_of_many_frames(shown):
    labels = [f"video 1 f{k} r0c{j}" for k in range(70) for j in range(2)]
    mass = torch.rand(1, 140, 140, generator=torch.Generator().manual_seed(0)).softmax(-1)
    sizes = torch.ones(140, dtype=torch.int64)
    given = of_images(
        mass=mass, layers=1, query_labels=labels, key_labels=labels, query_sizes=sizes, key_sizes=sizes
    )
    page = shown(given, pictures={"video 1 f1": PICTURES[0]})
    assert page.locator("#pictures canvas").count() == 64
    assert page.locator("#picture-note").inner_text() == "6 more pictures are not shown."


def test_blocks_of_a_part_keep_their_own_column(opened):  # noqa: F811
    """A part of a map whose blocks bear one label: the page knows which column is a row's own."""
    given = block_map(count=6, query_labels=["same"] * 6, key_labels=["same"] * 6)
    part = given.isel(query=[3, 5], key=[1, 5])
    page = opened(part, at_mean=True)
    page.evaluate("select({row: 1, column: 0}, 1)")
    page.wait_for_timeout(100)
    assert page.evaluate("[0, 1].map((row) => columnOfRow(theSequence(), row))") == [-1, 1]
    assert page.evaluate("[0, 1].map((column) => rowOfColumn(theSequence(), column))") == [-1, 1]
    chosen = page.evaluate("[...document.querySelectorAll('#text .block')].map((one) => one.ariaSelected)")
    assert chosen == ["false", "true"]
    found = page.evaluate("theSequence().profile[0][0]")
    assert "own" not in found  # only one of the two rows has a column of its own


def test_the_policy_of_the_page_allows_no_more_than_before():
    assert "img-src" not in page_module._POLICY
