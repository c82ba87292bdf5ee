"""Blocks.images: which tokens show which part of a picture, by what a white spot in the picture changes."""

import re

import pytest
import torch
from vision_language import (
    FAMILIES,
    embeddings,
    inputs_of,
    internvl,
    llava,
    llava_next,
    picture,
    tokenizer_with,
)

import attnpatch
from attnpatch.blocks.spec import Blocks
from attnpatch.errors import BlockError, CaptureError

SPOTS = [(0.15, 0.85), (0.85, 0.15), (0.43, 0.65), (0.9, 0.9)]
# Height and width of pictures: CLIP's processor cuts the middle out, so there they are square.
SIZES = {
    "llava": [(32, 32)],
    "llava_with_class_token": [(32, 32)],
    "llava_onevision": [(64, 64), (32, 96), (90, 20)],
    "llava_next": [(32, 64), (64, 64), (40, 90), (90, 40), (20, 90), (90, 20)],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, *FAMILIES[request.param]()


def grids_of(blocks, row=0):
    """For each grid its numbers of rows and columns, and row and column of each token by position."""
    found = {}
    for token, block in enumerate(blocks.block_of_token[row]):
        match = re.fullmatch(r"(.*) r(\d+)c(\d+)", blocks.labels_by_sequence[row][block])
        if match:
            found.setdefault(match[1], {})[token] = int(match[2]), int(match[3])
    return {
        name: (1 + max(r for r, _ in places.values()), 1 + max(c for _, c in places.values()), places)
        for name, places in found.items()
    }


def test_a_spot_changes_the_tokens_of_its_tile(family):
    """The layout is the model's own: what changes among the language model's inputs, for each spot of the picture."""
    name, processor, model = family
    for size in SIZES.get(name, [(64, 64), (48, 96), (96, 48)]):
        plain = inputs_of(processor, ["{} what is this ?"], [[picture(*size)]])
        before = embeddings(model, plain)
        blocks = Blocks.images(processor, plain, tile=1)
        for spot in SPOTS:
            inputs = inputs_of(processor, ["{} what is this ?"], [[picture(*size, spot)]])
            assert Blocks.images(processor, inputs, tile=1) == blocks
            change = (embeddings(model, inputs) - before)[0].norm(dim=-1)
            for grid, (rows, columns, places) in grids_of(blocks).items():
                token = max(places, key=lambda place: float(change[place]))
                assert float(change[token]) > 0
                expected = int(spot[0] * rows), int(spot[1] * columns)
                assert places[token] == expected, (name, size, grid, spot)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32), (48, 96), (30, 33)])
def test_pictures_that_internvl_cuts(size):
    """A spot changes the tokens of its tile, among the pieces and in the picture whole; two pictures of other sizes."""
    processor, model = internvl(pieces=True)
    other = picture(64, 32)
    texts = ["one {} two {} what is this ?"]
    plain = inputs_of(processor, texts, [[picture(*size), other]])
    blocks = Blocks.images(processor, plain, tile=1, images=[picture(*size), other])
    before = embeddings(model, plain)
    for spot in [(0.15, 0.85), (0.85, 0.15), (0.9, 0.9)]:
        inputs = inputs_of(processor, texts, [[picture(*size, spot), other]])
        change = (embeddings(model, inputs) - before)[0].norm(dim=-1)
        for grid, (rows, columns, places) in grids_of(blocks).items():
            if grid.startswith("image 1"):
                token = max(places, key=lambda place: float(change[place]))
                assert places[token] == (int(spot[0] * rows), int(spot[1] * columns)), (grid, spot)
    assert grids_of(blocks)["image 2"][:2] == (8 // 2, 4 // 2)
    for wrong in ([picture(*size)], [other, picture(96, 32)], [5], 5):
        with pytest.raises(BlockError):
            Blocks.images(processor, plain, images=wrong)


@pytest.mark.parametrize("size", [(96, 96), (96, 64), (64, 96)])
def test_a_grid_that_the_model_resizes(size):
    """LLaVA-OneVision makes a large grid smaller: a token is a mean of places, so the spot is within a tile of it."""
    processor, model = FAMILIES["llava_onevision"]()
    plain = inputs_of(processor, ["{} what is this ?"], [[picture(*size)]])
    before = embeddings(model, plain)
    blocks = Blocks.images(processor, plain, tile=1)
    for spot in [*SPOTS, (0.5, 0.1)]:
        inputs = inputs_of(processor, ["{} what is this ?"], [[picture(*size, spot)]])
        change = (embeddings(model, inputs) - before)[0].norm(dim=-1)
        rows, columns, places = grids_of(blocks)["image 1"]
        assert rows * columns < size[0] * size[1] // 64
        row, column = places[max(places, key=lambda place: float(change[place]))]
        assert abs(row + 0.5 - spot[0] * rows) <= 1.5 and abs(column + 0.5 - spot[1] * columns) <= 1.5


def test_several_pictures_of_onevision_are_not_cut():
    processor, _ = FAMILIES["llava_onevision"]()
    two = [picture(64, 64)] * 2
    pictures = processor.image_processor([two], return_tensors="pt")
    parts = [processor.replace_image_token(pictures, number) for number in range(2)]
    encoded = processor.tokenizer([f"one {parts[0]} two {parts[1]} ?"], return_tensors="pt")
    blocks = Blocks.images(processor, {**encoded, **pictures}, tile=1)
    assert {name: grid[:2] for name, grid in grids_of(blocks).items()} == {
        "image 1": (4, 4),
        "image 2": (4, 4),
    }
    assert [label for label in blocks.labels_by_sequence[0] if "other" in label] == [
        "image 1 other",
        "image 2 other",
    ]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "pixtral",
            lambda given: given.update(image_sizes=torch.tensor([[64, 40]])),
            "no 8 rows of 5 tokens",
        ),
        ("pixtral", lambda given: given.update(image_sizes=torch.tensor([[64, 64]] * 2)), "more pictures"),
        ("pixtral", lambda given: given.pop("image_sizes"), "no image_sizes"),
        (
            "llava_onevision",
            lambda given: given.update(image_sizes=torch.tensor([[20, 90]])),
            "contiguous image tokens",
        ),
        ("llava_onevision", lambda given: given.pop("batch_num_images"), "no batch_num_images"),
    ],
)
def test_facts_that_contradict_each_other(name, change, says):
    processor, _ = FAMILIES[name]()
    inputs = dict(inputs_of(processor, ["{} what is this ?"], [[picture(64, 64)]]))
    change(inputs)
    with pytest.raises(BlockError, match=says):
        Blocks.images(processor, inputs)


def test_every_token_has_a_block(family):
    """Image tokens are in the picture's blocks and text is around them; two pictures in the batch, one of them padded."""
    name, processor, _ = family
    processor.tokenizer.padding_side = "left"
    texts = ["one {} two {} what is this ?", "{} ?"]
    size = SIZES.get(name, [(48, 96)])[0]
    inputs = inputs_of(processor, texts, [[picture(*size)] * 2, [picture(*size)]])
    blocks = Blocks.images(processor, inputs)
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_tokens_to_ids(
        tokenizer.image_token if hasattr(tokenizer, "image_token") else "<image>"
    )
    for row, pictures in enumerate((2, 1)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] != 0].tolist()
        labels = [blocks.labels_by_sequence[row][block] for block in blocks.block_of_token[row]]
        assert len(labels) == len(ids)
        for token, label in zip(ids, labels, strict=True):
            # A token that names a piece is the picture's, too.
            assert label.startswith("image") or token != mark
        assert {label.split()[1] for label in labels if label.startswith("image")} == {
            str(number + 1) for number in range(pictures)
        }
        assert labels[-1] == "text"
        assert blocks.texts_by_sequence[row][-1].endswith("?")
        assert blocks.labels_by_sequence[row].index("text") == len(blocks.labels_by_sequence[row]) - 1


def dense(model, inputs):
    """The mean over heads of the language model's own probabilities, by layer: ``[batch, queries, keys]``."""
    found = []

    def keep(module, args, result):
        found.append(result[1].double().mean(1))

    handles = [
        module.register_forward_hook(keep)
        for name, module in model.named_modules()
        if re.search(r"(language|text)_model\.layers\.\d+\.self_attn$", name)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_map_of_tiles(family):
    """Sums of the language model's own probabilities by a loop over tokens; the vision tower is in no map."""
    _, processor, model = family
    inputs = inputs_of(processor, ["one {} what is this ?"], [[picture(64, 64, (0.2, 0.2))]])
    blocks = Blocks.images(processor, inputs, tile=2)
    with torch.no_grad(), attnpatch.capture(model, blocks) as maps:
        model(**inputs)
    found = maps.block_map
    assert not maps.left_out
    of_token = blocks.block_of_token[0]
    assert len(of_token) == inputs["input_ids"].shape[1]
    layers = dense(model, inputs)
    assert len(layers) == len(found.layers) == 2
    for mass, weights in zip(found.mass, layers, strict=True):
        expected = torch.zeros(mass.shape, dtype=torch.float64)
        for i, query in enumerate(of_token):
            for j, key in enumerate(of_token):
                expected[query, key] += weights[0, i, j] / of_token.count(query)
        assert float((mass - expected).abs().max()) < 1e-5
    assert found.metadata["texts"][-1] == blocks.texts_by_sequence[0][-1]
    assert found.key_sizes.sum() == len(of_token)


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
def test_generated_tokens_are_a_block(name):
    processor, model = FAMILIES[name]()
    processor.tokenizer.padding_side = "left"
    inputs = inputs_of(processor, ["one {} what is this ?", "{} ?"], [[picture(64, 64)], [picture(64, 64)]])
    blocks = Blocks.images(processor, inputs)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), attnpatch.capture(model, blocks) as maps:
        model.generate(**inputs, **options)
    found = maps.block_map
    for row in range(2):
        assert found.query_labels[row][-2:] == ("text", "answer")
        assert found.query_sizes[row][len(found.query_labels[row]) - 1] == 3
        assert found.metadata["texts"][row][-1] == "answer"


def test_tiles_of_several_tokens():
    processor, _ = llava()
    inputs = inputs_of(processor, ["{} ?"], [[picture(32, 32)]])
    blocks = Blocks.images(processor, inputs, tile=3)
    # 4 x 4 tokens in tiles of 3: the last row and the last column are narrower.
    assert list(blocks.block_of_token[0]) == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 2, 2, 2, 3, 4]
    assert blocks.labels_by_sequence[0] == (
        *(f"image 1 r{i}c{j}" for i in range(2) for j in range(2)),
        "text",
    )
    named = Blocks.images(processor, inputs, rest="question", after="reply")
    assert named.labels_by_sequence[0][-1] == "question" and named.after == "reply"
    assert "Blocks.images(17 blocks to token 17" in repr(named)


# -------------------------------------------------------------------------------------------------- videos, by their grids


def filmed(mark, frames, apart):
    """Tokens of a video of 4 x 6 tokens, and the positions of each frame; ``apart``: text between frames (Qwen3-VL)."""
    ids, places = [4], []
    for _ in range(frames):
        if apart or not places:
            ids.append(10)
        places.append(range(len(ids), len(ids) + 24))
        ids += [mark] * 24
        if apart:
            ids.append(11)
    return [*ids, 5], places


@pytest.mark.parametrize(("name", "apart"), [("qwen2_vl", False), ("qwen3_vl", True)])
def test_frames_of_a_video(name, apart):
    processor, _ = FAMILIES[name]()
    ids, places = filmed(processor.video_token_id, 3, apart)
    inputs = {"input_ids": torch.tensor([ids]), "video_grid_thw": torch.tensor([[3, 8, 12]])}
    blocks = Blocks.images(processor, inputs, tile=1)
    found = grids_of(blocks)
    assert [*found] == ["video 1 f0", "video 1 f1", "video 1 f2"]
    for (rows, columns, own), expected in zip(found.values(), places, strict=True):
        assert (rows, columns) == (4, 6)
        assert own == {token: divmod(place, 6) for place, token in enumerate(expected)}


def test_pictures_and_videos_of_one_prompt():
    processor, _ = FAMILIES["qwen2_vl"]()
    image, video = processor.image_token_id, processor.video_token_id
    inputs = {
        "input_ids": torch.tensor([[4, *[video] * 8, 5, *[image] * 6, 6, *[image] * 4]]),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
    }
    found = grids_of(Blocks.images(processor, inputs, tile=1))
    assert {name: (rows, columns, min(own)) for name, (rows, columns, own) in found.items()} == {
        "video 1 f0": (2, 2, 1), "video 1 f1": (2, 2, 5), "image 1": (2, 3, 10), "image 2": (2, 2, 17),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- what is refused


def changed(inputs, **changes):
    return {**{name: inputs[name] for name in inputs}, **changes}


def test_facts_that_are_missing_or_contradict_each_other():
    processor, _ = FAMILIES["qwen2_vl"]()
    inputs = inputs_of(processor, ["one {} ?"], [[picture(64, 64)]])
    grid = inputs["image_grid_thw"]
    for changes, said in (
        ({"image_grid_thw": None}, "inputs have no image_grid_thw"),
        ({"input_ids": None}, "inputs have no input_ids"),
        ({"image_grid_thw": grid - torch.tensor([[0, 2, 0]])}, "fewer pictures than the tokens"),
        ({"image_grid_thw": torch.cat([grid, grid])}, "more pictures than the tokens"),
        ({"input_ids": [[4, 5], [4]]}, "return_tensors='pt'"),
        ({"input_ids": torch.full_like(inputs["input_ids"], 4)}, "there are no image tokens"),
    ):
        with pytest.raises(BlockError, match=said) as error:
            Blocks.images(processor, changed(inputs, **changes))
        assert "\n" not in str(error.value)
    for tile in (0, -1, 1.5):
        with pytest.raises(BlockError, match="edge of a tile"):
            Blocks.images(processor, inputs, tile=tile)
    with pytest.raises(BlockError, match="accepted is what the processor returned"):
        Blocks.images(processor, [1, 2])


def test_settings_that_are_missing():
    processor, _ = llava()
    inputs = inputs_of(processor, ["one {} ?"], [[picture(32, 32)]])
    known = Blocks.images(processor, inputs)
    del processor.image_token_id  # as in older releases
    assert Blocks.images(processor, inputs) == known
    name, processor.image_token = processor.image_token, None
    with pytest.raises(BlockError, match="image_token_id is missing"):
        Blocks.images(processor, inputs)
    processor.image_token = name
    processor.patch_size = None
    with pytest.raises(BlockError, match="patch_size is None"):
        Blocks.images(processor, inputs)
    processor.patch_size, processor.num_additional_image_tokens = 8, 0
    with pytest.raises(BlockError, match="do not tell whether a class token"):
        Blocks.images(processor, inputs)
    processor.num_additional_image_tokens = 1
    for shape, said in (
        ((2, 3, 32, 32), "2 pictures of 16 tokens"),
        ((1, 3, 24, 32), "12 tokens each"),
        ((3, 32, 32), "of 4 dim"),
    ):
        with pytest.raises(BlockError, match=said):
            Blocks.images(processor, changed(inputs, pixel_values=torch.zeros(shape)))


def test_llava_next_needs_the_size_of_the_picture():
    processor, _ = llava_next()
    inputs = inputs_of(processor, ["one {} ?"], [[picture(32, 64)]])
    with pytest.raises(BlockError, match="no image_sizes"):
        Blocks.images(processor, changed(inputs, image_sizes=None))
    with pytest.raises(BlockError, match="needs 88 contiguous image tokens"):
        Blocks.images(processor, changed(inputs, image_sizes=torch.tensor([[64, 64]])))


def test_pictures_that_are_cut_in_an_unknown_way():
    """InternVL's processor does not say into how many rows."""
    processor, _ = internvl(pieces=True)
    inputs = inputs_of(processor, ["one {} ?"], [[picture(64, 128)]])
    with pytest.raises(BlockError, match=r"images=\["):
        Blocks.images(processor, inputs)


class OwnProcessor:
    """A processor that nobody knows."""

    tokenizer = tokenizer_with(image_token="<image>")
    image_token_id = tokenizer.image_token_id


def test_layouts_that_are_not_known():
    inputs = {"input_ids": torch.tensor([[10] * 16])}
    with pytest.raises(BlockError, match="OwnProcessor: it is not known how its image tokens are arranged"):
        Blocks.images(OwnProcessor(), inputs)


def test_other_inputs_than_the_models():
    processor, model = llava()
    inputs = inputs_of(processor, ["one {} what is this ?"], [[picture(32, 32)]])
    blocks = Blocks.images(processor, inputs)
    shorter = changed(inputs, **{name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")})
    with torch.no_grad(), attnpatch.capture(model, blocks) as maps:
        model(**shorter)
    with pytest.raises(CaptureError, match="the prompt has 21 tokens, but sequence 0 has 20"):
        _ = maps.block_map
    with (
        pytest.raises(CaptureError, match="attention of the language model"),
        attnpatch.capture(model, blocks, sites="*vision*"),
    ):
        pass
