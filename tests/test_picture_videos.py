"""Blocks.images for videos of LLaVA-OneVision and Kimi K2.5, and for Idefics 2, whose tokens show whole pieces of a picture."""

import types

import numpy as np
import pytest
import torch
from test_pictures import SPOTS, dense, grids_of
from vision_language import EDGE, FAMILIES, PATCH, embeddings, hosts_function, idefics2, inputs_of, picture

import attnpatch
from attnpatch.blocks.spec import Blocks
from attnpatch.errors import BlockError


def onevision_inputs(processor, text, frames, images=()):
    """The output for a text with ``<v>`` in place of each video; ``frames`` has a list of pictures for each.

    The real video processor needs torchvision. Frames are scaled as the image processor does; the processor's own code
    writes the tokens.
    """
    pixels = [
        np.stack([np.asarray(each).transpose(2, 0, 1) / 127.5 - 1 for each in video]) for video in frames
    ]
    videos = {"pixel_values_videos": torch.tensor(np.stack(pixels), dtype=torch.float32)}
    given = dict(processor.image_processor(images, return_tensors="pt")) if images else {}
    for number in range(len(frames)):
        text = text.replace("<v>", processor.replace_video_token(videos, number), 1)
    for number in range(len(images)):
        text = text.replace("{}", processor.replace_image_token(given, number), 1)
    return {**processor.tokenizer([text], return_tensors="pt"), **videos, **given}


def kimi_inputs(processor, text, frames):
    """As ``onevision_inputs``, for parts of at most four frames; the host's own code makes patches and tokens."""
    processor.video_processor = types.SimpleNamespace(merge_size=2, temporal_patch_size=4)
    patchify = hosts_function(
        "models/kimi_k25/image_processing_kimi_k25.py", "Kimi_K25ImageProcessor", "patchify"
    )
    patches, grids = [], []
    for video in frames:
        for start in range(0, len(video), 4):
            part = [
                patchify(
                    processor.video_processor,
                    torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 255,
                    PATCH,
                )
                for each in video[start : start + 4]
            ]
            patches += [each[0].flatten(0, 1) for each in part]
            grids.append([len(part), *part[0][1:]])
    grid = torch.tensor(grids)
    for video in frames:
        parts, merged = -(-len(video) // 4), grid[0, 1:].prod() // 4
        written = "".join(f" one {processor.video_token * int(merged)} two " for _ in range(parts))
        text = text.replace("<v>", written, 1)
    return {
        **processor.tokenizer([text], return_tensors="pt"),
        "pixel_values_videos": torch.cat(patches),
        "video_grid_thw": grid,
    }


def changed_places(blocks, difference):
    """For each grid, row and column of the token that changes most, and how much it changes."""
    change = difference[0].norm(dim=-1)
    found = {}
    for grid, (_, _, places) in grids_of(blocks).items():
        token = max(places, key=lambda place: float(change[place]))
        found[grid] = places[token], float(change[token])
    return found


def test_frames_of_onevision():
    """A spot in one frame changes the tokens of its tile in that frame, and no token of another frame."""
    processor, model = FAMILIES["llava_onevision"]()
    still = [picture(EDGE, EDGE)] * 3
    text = "one <v> two <v> what ?"
    plain = onevision_inputs(processor, text, [still, still])
    blocks = Blocks.images(processor, plain, tile=1)
    grids = grids_of(blocks)
    assert [*grids] == [f"video {video} f{frame}" for video in (1, 2) for frame in range(3)]
    assert {grid[:2] for grid in grids.values()} == {(2, 2)}
    before = embeddings(model, plain)
    for frame, spot in enumerate([(0.2, 0.8), (0.8, 0.2), (0.7, 0.7)]):
        other = [*still[:frame], picture(EDGE, EDGE, spot), *still[frame + 1 :]]
        inputs = onevision_inputs(processor, text, [still, other])
        found = changed_places(blocks, embeddings(model, inputs) - before)
        mine = found.pop(f"video 2 f{frame}")
        assert mine[0] == (int(spot[0] * 2), int(spot[1] * 2)) and mine[1] > 0
        assert all(change == 0 for _, change in found.values())
    labels = [blocks.labels_by_sequence[0][block] for block in blocks.block_of_token[0]]
    assert [label for label in labels if label.endswith("other")] == ["video 1 f2 other", "video 2 f2 other"]


def test_a_picture_and_a_video_of_onevision():
    processor, _ = FAMILIES["llava_onevision"]()
    still = [picture(EDGE, EDGE)] * 2
    inputs = onevision_inputs(processor, "<v> one {} ?", [still], [picture(EDGE, EDGE)])
    assert [*grids_of(Blocks.images(processor, inputs, tile=1))] == [
        "video 1 f0", "video 1 f1", "image 1 whole", "image 1",
    ]  # fmt: skip


def features_of_kimi(processor, model, inputs):
    """What the model puts in place of video tokens, and zeros elsewhere: ``[1, tokens, channels]``.

    Its own ``get_video_features`` counts the tokens of a part of several frames wrongly (transformers 5.23), so it cannot
    be called; its parts are.
    """
    with torch.no_grad():
        pooled = model.model.vision_tower(
            inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]
        ).pooler_output
        features = model.model.mm_projector(pooled).squeeze(1)
    mask = inputs["input_ids"] == processor.video_token_id
    found = torch.zeros(*mask.shape, features.shape[-1])
    found[mask] = features
    return found


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_parts_of_a_video_of_kimi(frames):
    """A spot in one frame changes the tokens of its tile in that frame's part alone."""
    processor, model = FAMILIES["kimi"]()
    still = [picture(48, 64)] * frames
    plain = kimi_inputs(processor, "<v> what ?", [still])
    blocks = Blocks.images(processor, plain, tile=1)
    grids = grids_of(blocks)
    assert [*grids] == [f"video part {part + 1}" for part in range(-(-frames // 4))]
    assert {grid[:2] for grid in grids.values()} == {(3, 4)}
    before = features_of_kimi(processor, model, plain)
    for frame in {0, frames - 1}:
        for spot in SPOTS:
            other = [*still[:frame], picture(48, 64, spot), *still[frame + 1 :]]
            inputs = kimi_inputs(processor, "<v> what ?", [other])
            found = changed_places(blocks, features_of_kimi(processor, model, inputs) - before)
            mine = found.pop(f"video part {frame // 4 + 1}")
            assert mine[0] == (int(spot[0] * 3), int(spot[1] * 4)) and mine[1] > 0
            assert all(change == 0 for _, change in found.values())


@pytest.mark.parametrize("split", [False, True])
def test_pieces_of_idefics2(split):
    """A spot changes the tokens of its quarter, those of the picture whole, and no others; two pictures in a batch."""
    processor, model = idefics2(split)
    texts, other = ["one {} two {} ?", "{} this ?"], picture(48, 64)
    plain = inputs_of(processor, texts, [[picture(64, 48), other], [other]])
    blocks = Blocks.images(processor, plain)
    before = embeddings(model, plain)
    for spot in [(0.2, 0.8), (0.8, 0.2), (0.2, 0.2), (0.8, 0.8)]:
        inputs = inputs_of(processor, texts, [[picture(64, 48, spot), other], [other]])
        change = (embeddings(model, inputs) - before).norm(dim=-1)
        real = plain["attention_mask"][0] != 0
        of_token = [blocks.labels_by_sequence[0][block] for block in blocks.block_of_token[0]]
        changed = {label for label, one in zip(of_token, change[0][real].tolist(), strict=True) if one > 0}
        quarter = f"image 1 r{int(spot[0] * 2)}c{int(spot[1] * 2)}"
        assert changed == ({quarter, "image 1 whole r0c0"} if split else {"image 1 r0c0"})
        assert float(change[1].max()) == 0
    assert all(
        of_token.count(label) == 4 for label in of_token if label.startswith("image 1 ") and "c" in label
    )


@pytest.mark.parametrize("kind", ["idefics2", "onevision"])
def test_maps(kind):
    """Sums of the language model's own probabilities by a loop over tokens."""
    if kind == "idefics2":
        processor, model = idefics2(split=True)
        inputs = inputs_of(processor, ["one {} what ?"], [[picture(64, 64, (0.2, 0.2))]])
    else:
        processor, model = FAMILIES["llava_onevision"]()
        inputs = onevision_inputs(processor, "one <v> what ?", [[picture(EDGE, EDGE)] * 3])
    blocks = Blocks.images(processor, inputs)
    with torch.no_grad(), attnpatch.capture(model, blocks) as maps:
        model(**inputs)
    assert not maps.left_out
    of_token = blocks.block_of_token[0]
    for mass, weights in zip(maps.block_map.mass, dense(model, inputs), strict=True):
        expected = torch.zeros(mass.shape, dtype=torch.float64)
        for i, query in enumerate(of_token):
            for j, key in enumerate(of_token):
                expected[query, key] += weights[0, i, j] / of_token.count(query)
        assert float((mass - expected).abs().max()) < 1e-5


def test_facts_that_contradict_each_other():
    processor, _ = FAMILIES["llava_onevision"]()
    inputs = onevision_inputs(processor, "one <v> what ?", [[picture(EDGE, EDGE)] * 3])
    pixels = inputs["pixel_values_videos"]
    for given, says in (
        (None, "inputs have no pixel_values_videos"),
        (pixels[:, :2], "fewer videos|no .* contiguous|of 0 frames"),
        (torch.cat([pixels[:, :2]] * 2), "contiguous tokens"),
        (torch.cat([pixels, pixels]), "more videos than the tokens"),
        (torch.cat([pixels, pixels], 1), "6 frames has no 25 contiguous tokens"),
    ):
        with pytest.raises(BlockError, match=says):
            Blocks.images(processor, {**inputs, "pixel_values_videos": given})
    processor, _ = FAMILIES["kimi"]()
    inputs = kimi_inputs(processor, "<v> what ?", [[picture(48, 64)] * 2])
    grid = inputs["video_grid_thw"]
    for given, says in (
        (None, "inputs have no video_grid_thw"),
        (torch.cat([grid, grid]), "more parts of videos"),
        (grid + torch.tensor([[0, 2, 0]]), "contiguous tokens instead of 4 x 4"),
        (grid - torch.tensor([[0, 2, 0]]), "contiguous tokens instead of 0 x 0"),
    ):
        with pytest.raises(BlockError, match=says):
            Blocks.images(processor, {**inputs, "video_grid_thw": given})
    processor, _ = idefics2()
    inputs = dict(inputs_of(processor, ["one {} what ?"], [[picture(64, 64)]]))
    with pytest.raises(BlockError, match="inputs have no pixel_values"):
        Blocks.images(processor, {**inputs, "pixel_values": None})
    processor.image_processor.do_image_splitting = True
    with pytest.raises(BlockError, match="4 image tokens in 1 runs"):
        Blocks.images(processor, inputs)
