"""Blocks for pictures and prompts: tiles of image tokens, words and tokens of a text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_blocks import make_tokenizer, real

import attnpatch
from attnpatch import Blocks
from attnpatch.errors import BlockError
from attnpatch.recording.block_sums import add_tile

# ---------------------------------------------------------------------------------------------------------------- tiles


def test_tiles_are_squares_of_an_image_row_by_row():
    partition = Blocks.tiles(4, 6, 2).resolve(real(24))
    assert partition.assignment.reshape(4, 6).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4, 5, 5],
        [3, 3, 4, 4, 5, 5],
    ]
    assert partition.labels == (("r0c0", "r0c1", "r0c2", "r1c0", "r1c1", "r1c2"),)
    assert partition.sizes.tolist() == [[4] * 6]
    assert partition.starts.tolist() == [[0, 2, 4, 12, 14, 16]]
    assert partition.ends.tolist() == [[8, 10, 12, 20, 22, 24]]


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), tile=st.integers(1, 11), start=st.integers(0, 3),
    more=st.integers(0, 3), left=st.booleans(),
)  # fmt: skip
def test_every_token_of_the_image_is_in_the_tile_it_lies_in(height, width, tile, start, more, left):
    blocks, length = Blocks.tiles(height, width, tile, start=start), start + height * width + more
    valid = real(length, length + 2, left=left)
    partition = blocks.resolve(valid)
    for row in range(2):
        seen = partition.assignment[row, valid[row]].tolist()
        assert set(seen[:start]) | set(seen[start + height * width :]) <= {-1}
        for i in range(height):
            for j in range(width):
                label = partition.labels[row][seen[start + i * width + j]]
                assert label == f"r{i // tile}c{j // tile}"
    assert (partition.assignment[~valid] == -1).all()
    assert partition.sizes.sum(1).tolist() == [height * width] * 2
    assert partition.num_blocks == len(partition.labels[0]) == (partition.sizes[0] > 0).sum()


def test_mass_of_tiles():
    """A tile is no run of tokens; its mass is still the sum over its tokens."""
    partition = Blocks.tiles(3, 5, 2).resolve(real(15, 15))
    probabilities = torch.softmax(torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(0)), -1)
    count, assignment = partition.num_blocks, partition.assignment[0]
    sums = torch.zeros(2, 3, count, count + 1, dtype=torch.float64)
    for each, tile in zip(sums, probabilities, strict=True):
        add_tile(each, tile, assignment, assignment)
    np.testing.assert_allclose(
        sums[..., :-1] / partition.sizes[0][:, None], dense_of(probabilities, partition), atol=1e-6
    )


def dense_of(probabilities, partition):
    """Block means by products with ones, in float64."""
    blocks = partition.assignment[0]
    member = (blocks[:, None] == torch.arange(partition.num_blocks)).double()
    return member.T / member.sum(0)[:, None] @ probabilities.double() @ member


def test_a_vision_model_is_captured_by_tiles():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    pixels = torch.rand(1, 3, 24, 24)
    with attnpatch.capture(model, blocks=Blocks.tiles(6, 6, 2, start=1)) as maps, torch.no_grad():
        weights = model(pixels, output_attentions=True).attentions
    partition = Blocks.tiles(6, 6, 2, start=1).resolve(real(37))
    for layer, dense in enumerate(weights):
        expected = dense_of(dense, partition).mean(1)[0]
        np.testing.assert_allclose(maps.block_map.mass[layer], expected, atol=1e-6)
    assert maps.block_map.query_labels[:4] == ("r0c0", "r0c1", "r0c2", "r1c0")


@pytest.mark.parametrize(
    ("given_", "said"),
    [((0, 4, 2), "at least 1"), ((4, 4, 0), "at least 1"), ((4, 2.5, 1), "width of the image is 2.5")],
)
def test_tiles_that_are_none(given_, said):
    with pytest.raises(BlockError, match=said):
        Blocks.tiles(*given_)


def test_an_image_given_in_pixels():
    with pytest.raises(BlockError, match="sequence 1 has 16 real tokens; give height and width in tokens"):
        Blocks.tiles(5, 5, 2).resolve(real(25, 16))
    with pytest.raises(BlockError, match="start of 0 or more"):
        Blocks.tiles(5, 5, 2, start=-1)


def test_tiles_print_as_they_are_made():
    assert repr(Blocks.tiles(4, 6, 2)) == "Blocks.tiles(4, 6, 2)"
    assert repr(Blocks.tiles(4, 6, 2, start=1)) == "Blocks.tiles(4, 6, 2, start=1)"
    assert Blocks.tiles(4, 6, 2) == Blocks.tiles(4, 6, 2) != Blocks.tiles(4, 6, 3)


# ---------------------------------------------------------------------------------------------------------------- words

TEXT = "the key  is red, fine?"


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "bpe": make_tokenizer(None),
        "trimmed": make_tokenizer(None, trim_offsets=True),
        "word level": make_tokenizer(None, kind="word"),
    }


@pytest.mark.parametrize("kind", ["bpe", "trimmed", "word level"])
def test_words_are_what_stands_between_spaces(tokenizers, kind):
    tokenizer = tokenizers[kind]
    blocks = Blocks.words(tokenizer, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    partition = blocks.resolve(real(len(ids)))
    assert partition.labels == (("the", "key", "is", "red,", "fine?"),)
    places = partition.assignment[0]
    if kind == "word level":
        # The start token is no word.
        assert places.tolist() == [-1, 0, 1, 2, 3, 3, 4, 4]
        return
    for block, word in enumerate(partition.labels[0]):
        chosen = [token for token, place in zip(ids, places.tolist(), strict=True) if place == block]
        assert tokenizer.decode(chosen).strip() == word
    assert (places >= 0).all()


def test_tokens_are_labelled_with_their_characters(tokenizers):
    tokenizer = tokenizers["word level"]
    blocks = Blocks.tokens(tokenizer, TEXT)
    partition = blocks.resolve(real(8, total=10))
    assert partition.assignment.tolist() == [[-1, 0, 1, 2, 3, 4, 5, 6, -1, -1]]
    assert partition.labels == (("the", "key", "is", "red", ",", "fine", "?"),)
    assert "Blocks.tokens(7 blocks to token 8: 'the'" in repr(blocks)


def test_padding_and_truncation_as_the_model_has_them(tokenizers):
    tokenizer = tokenizers["word level"]
    tokenizer.add_special_tokens({"pad_token": "<|eot|>"})
    expected = Blocks.words(tokenizer, TEXT)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert Blocks.words(tokenizer, TEXT, padding="max_length", max_length=20) == expected
    cut = Blocks.words(tokenizer, TEXT, truncation=True, max_length=4)
    assert cut.resolve(real(4)).labels == (("the", "key", "is"),)
    with pytest.raises(BlockError, match="sequence 0 has 4 real tokens"):
        expected.resolve(real(4))


def test_a_batch_of_prompts_one_of_them_empty(tokenizers):
    blocks = Blocks.words(tokenizers["word level"], ["", "the key", "fine"])
    partition = blocks.resolve(real(1, 3, 2))
    assert partition.labels == ((), ("the", "key"), ("fine",))
    assert partition.assignment.tolist() == [[-1, -1, -1], [-1, 0, 1], [-1, 0, -1]]
    assert partition.sizes.tolist() == [[0, 0], [1, 1], [1, 0]]
    assert "0 blocks to token 0" in repr(blocks)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["", ""]])
def test_no_words(tokenizers, prompt):
    with pytest.raises(BlockError, match="has no words"):
        Blocks.words(tokenizers["word level"], prompt)


def test_what_is_no_prompt(tokenizers):
    for prompt in (None, 3, [["the"]], {"the"}):
        with pytest.raises(BlockError, match="accepted is a string, or a list"):
            Blocks.words(tokenizers["bpe"], prompt)
    with pytest.raises(BlockError, match="no character offsets"):
        Blocks.tokens(object(), "the key")
