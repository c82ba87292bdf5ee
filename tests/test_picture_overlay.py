"""The row of a map with Blocks.images over a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnpatch import BlockMap
from attnpatch.capturing.picture_overlay import picture_heat, plot_on_picture
from attnpatch.errors import CaptureError

# 3 x 5 tokens in tiles of 2: the last row and the last column are narrower; then a whole of 1 tile, and text.
SIZES = [4, 4, 2, 2, 2, 1]
LABELS = (*(f"image 1 r{i}c{j}" for i in range(2) for j in range(3)), "image 1 whole r0c0", "text", "answer")


def block_map(**changes):
    sizes = torch.tensor([*SIZES, 1, 2, 1])
    mass = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    fields = {
        "mass": mass, "layers": (3, 5), "query_labels": LABELS, "key_labels": LABELS, "query_sizes": sizes,
        "key_sizes": sizes,
    }  # fmt: skip
    return BlockMap(**{**fields, **changes})


def test_heat_covers_the_tokens_of_the_picture():
    """By hand: the mass of a tile divided by its tokens, at each of its tokens."""
    one = block_map()
    for layer, number in ((3, 0), (5, 1)):
        heat = picture_heat(one, layer=layer)
        assert heat.shape == (3, 5)
        for row in range(3):
            for column in range(5):
                tile = row // 2 * 3 + column // 2
                assert heat[row, column] == pytest.approx(float(one.mass[number, -1, tile]) / SIZES[tile])
    mean = picture_heat(one, query="text")
    assert mean[0, 0] == pytest.approx(float(one.mass[:, 7, 0].mean()) / 4)
    assert picture_heat(one, "image 1 whole").shape == (1, 1)


def test_steps_are_averaged():
    mass = torch.rand(2, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    heat = picture_heat(block_map(mass=mass, steps=(0, 1)), layer=5)
    assert heat[0, 0] == pytest.approx(float(mass[:, 1, -1, 0].mean()) / 4)


def test_one_panel_for_each_layer(tmp_path):
    image = Image.fromarray(np.zeros((30, 50, 3), dtype=np.uint8))
    figure = plot_on_picture(image, block_map(), layers=["mean", 5])
    shown = {text.get_text() for axes in figure.axes for text in [axes.title, *axes.texts]} | {
        text.get_text() for text in figure.texts
    }
    assert any("mean over layers" in text for text in shown) and any("layer 5" in text for text in shown)
    assert plot_on_picture(image, block_map(), path=tmp_path / "a.png") == tmp_path / "a.png"
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"picture": "image 2"}, "no tiles of 'image 2'; it has tiles of: 'image 1', 'image 1 whole'"),
        ({"query": "reply"}, "no query block 'reply'"),
        ({"query": 9}, "no query block 9"),
        ({"layer": None}, "2 layers in one picture"),
        ({"layer": 4}, "layer"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(CaptureError, match=said):
        picture_heat(block_map(), **options)


def test_an_answer_that_was_not_generated_is_not_the_last_block():
    sizes = torch.tensor([*SIZES, 1, 2, 0])
    one = block_map(query_sizes=sizes)
    assert np.array_equal(picture_heat(one), picture_heat(one, query="text")) and picture_heat(one).any()
    with pytest.raises(CaptureError, match="query='all' names 8 query blocks"):
        picture_heat(one, query="all")
