"""Pictures among the tokens of a language model: tiles are of one that is there, or of none."""

import re

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks
from attnpatch.hosts.transformers.image_tokens import why_no_picture

PICTURE, PAD = 90, 0


@pytest.fixture(scope="module")
def model():
    """Qwen2-VL: four patches are one token of the language model."""
    torch.manual_seed(0)
    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()


def call(*rows):
    """Each row's pictures in patches; a start, a picture, an end and a word each, padded on the left."""
    ids = [
        [5, 6, *(t for f, h, w in row for t in [92, *[PICTURE] * (f * h * w // 4), 93, 7])] for row in rows
    ]
    longest = max(map(len, ids))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids])
    grids = torch.tensor([picture for row in rows for picture in row])
    patches = int(grids.prod(1).sum())
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "image_grid_thw": grids,
        "pixel_values": torch.randn(patches, 48, generator=torch.Generator().manual_seed(1)),
        "mm_token_type_ids": (ids == PICTURE).long(),
    }


ONE, SMALL, LARGE = (1, 8, 8), (1, 4, 4), (1, 8, 12)
CASES = [
    ([[ONE]], (4, 4, 2), 3, None),
    ([[ONE]], (2, 8, 2), 3, "the first sequence has 4 x 4 from token 3 on"),  # as many tokens
    ([[ONE]], (4, 4, 2), 2, "no picture of 4 x 4 tokens from token 2 on"),
    ([[ONE]], (8, 8, 2), 3, "no picture of 8 x 8"),  # patches
    ([[ONE, ONE]], (4, 4, 2), 3, None),
    ([[ONE, ONE]], (4, 4, 2), 22, None),
    ([[ONE, ONE]], (8, 4, 2), 3, "4 x 4 from token 3 on, 4 x 4 from token 22 on"),
    ([[SMALL, LARGE]], (4, 4, 2), 3, "2 x 2 from token 3 on, 4 x 6 from token 10 on"),
    ([[SMALL, LARGE]], (4, 6, 2), 10, None),
    ([[LARGE, SMALL]], (2, 2, 1), 30, None),
    ([[(2, 4, 4)]], (2, 2, 1), 3, r"2 x 2 from token 3 on \(2 frames\)"),
    ([[ONE], [ONE, SMALL]], (4, 4, 2), 3, None),  # padded
    ([[ONE], [SMALL]], (4, 4, 2), 3, "no picture of 4 x 4"),  # not in each of the batch
]


@pytest.mark.parametrize(("rows", "size", "start", "said"), CASES)
def test_tiles_are_of_a_picture(model, rows, size, start, said):
    why = why_no_picture(model, call(*rows), (*size, start, 1))
    assert why is None if said is None else re.search(said, why)


def test_calls_that_say_nothing_of_pictures(model):
    given = call([ONE])
    for name in ("input_ids", "image_grid_thw"):
        assert why_no_picture(model, {**given, name: None}, (9, 9, 1, 0, 1)) is None
    assert why_no_picture(torch.nn.Linear(2, 2), given, (9, 9, 1, 0, 1)) is None


@pytest.mark.parametrize("start", [3, 22])
def test_one_of_two_equal_pictures(model, start):
    """The language model's own probabilities, reduced by a loop."""
    given, found = call([ONE, ONE]), []

    def keep(module, args, result):
        found.append(result[1][0].double().mean(0).numpy())

    handles = [layer.self_attn.register_forward_hook(keep) for layer in model.model.language_model.layers]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    blocks = Blocks.tiles(4, 4, 2, start=start)
    with torch.no_grad(), attnpatch.capture(model, blocks=blocks, sites="*language_model*") as maps:
        model(**given)
    for layer, dense in zip(maps.block_map.mass, found, strict=True):
        for query in range(4):
            for key in range(4):
                rows, columns = (
                    [
                        start + r * 4 + c
                        for r in range(16 // 4)
                        for c in range(4)
                        if (r // 2) * 2 + c // 2 == tile
                    ]
                    for tile in (query, key)
                )
                expected = sum(dense[i][j] for i in rows for j in columns) / len(rows)
                assert abs(float(layer[query, key]) - expected) < 1e-6


@pytest.mark.parametrize("rows", [[[SMALL, LARGE]], [[LARGE]]])
def test_tiles_of_no_picture_are_in_no_map(model, rows):
    """Which the sequence has room for: the call goes on, and the reason names the pictures there are."""
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.tiles(4, 4, 2, start=3)) as maps:
        model(**call(*rows))
    why = {why for site, why in maps.left_out.items() if "language_model" in site}
    assert len(why) == 1 and "4 x 6 from token" in why.pop()
    assert "no picture of 4 x 4 tokens" in repr(maps)
    with pytest.raises(attnpatch.errors.CaptureError):
        _ = maps.block_map
