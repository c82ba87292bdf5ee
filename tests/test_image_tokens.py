"""Pictures among the tokens of a language model: tiles are of one that is there, or of none."""

import re

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks
from attnpatch.hosts.transformers.image_tokens import why_no_picture

PICTURE, VIDEO, PAD = 90, 91, 0


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
        text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=VIDEO, vision_start_token_id=92,
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


# ---------------------------------------------------------------------------------------------------- videos, and generate


def filmed(pictures, videos, apart=False):
    """One sequence with pictures, then videos, as a call's arguments. ``apart``: something between frames (Qwen3-VL)."""
    pieces = [(PICTURE, picture) for picture in pictures] + [(VIDEO, video) for video in videos]
    ids = [5, 6]
    for mark, (frames, height, width) in pieces:
        times = frames if apart and mark == VIDEO else 1
        ids += [*[92, *[mark] * (frames * height * width // 4 // times), 93, 7] * times]
    ids = torch.tensor([ids])
    numbers = torch.Generator().manual_seed(1)
    found = {"input_ids": ids, "mm_token_type_ids": (ids == PICTURE).long() + 2 * (ids == VIDEO).long()}
    for given, name, pixels in (
        (pictures, "image", "pixel_values"),
        (videos, "video", "pixel_values_videos"),
    ):
        if given:
            grids = torch.tensor(given)
            found[f"{name}_grid_thw"] = grids
            found[pixels] = torch.randn(int(grids.prod(1).sum()), 48, generator=numbers)
    return found


@pytest.mark.parametrize(
    ("given", "tiles", "said"),
    [
        (filmed([], [(2, 8, 8)]), (4, 4, 2, 3, 2), None),
        (
            filmed([], [(2, 8, 8)]),
            (8, 4, 2, 3, 1),
            r"has 4 x 4 from token 3 on \(2 frames\)",
        ),  # as many tokens
        (filmed([ONE], [(2, 8, 8)]), (4, 4, 2, 22, 2), None),
        (filmed([ONE], [(2, 8, 8)]), (4, 4, 2, 3, 1), None),
        (
            filmed([ONE], [(2, 8, 8)]),
            (4, 4, 2, 3, 2),
            r"no picture of 4 x 4 tokens from token 3 on \(2 frames\)",
        ),
        (filmed([], [(2, 8, 8)], apart=True), (4, 4, 2, 22, 1), None),
        (
            filmed([], [(2, 8, 8)], apart=True),
            (4, 4, 2, 3, 2),
            "has 4 x 4 from token 3 on, 4 x 4 from token 22 on",
        ),
    ],
)
def test_tiles_of_a_video(model, given, tiles, said):
    why = why_no_picture(model, given, tiles)
    assert why is None if said is None else re.search(said, why)


@pytest.mark.parametrize("copies", [1, 2])
def test_shapes_that_the_tower_was_given(model, copies):
    """``generate`` encodes pictures before it calls the model, which is told no shapes then."""
    given = filmed([ONE], [(2, 4, 4)])
    before = [given.pop("image_grid_thw"), given.pop("video_grid_thw")]
    given["input_ids"] = given["input_ids"].repeat_interleave(copies, 0)
    assert why_no_picture(model, given, (4, 4, 2, 3, 1), before) is None
    assert "has 4 x 4 from token 3 on, 2 x 2" in why_no_picture(model, given, (2, 8, 2, 3, 1), before)
    # Of another call: they do not fit, and nothing is said.
    for other in ([], before[:1], [torch.tensor([SMALL]), before[1]]):
        assert why_no_picture(model, given, (2, 8, 2, 3, 1), other) is None


@pytest.mark.parametrize(("size", "is_there"), [((4, 4), True), ((2, 8), False)])
def test_tiles_while_tokens_are_generated(model, size, is_there):
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    given = call([ONE], [ONE, SMALL])
    sites = "*language_model*"
    with torch.no_grad(), attnpatch.capture(model, Blocks.tiles(*size, 1, start=3), sites=sites) as maps:
        model.generate(**given, **options)
    if not is_there:
        assert "no picture of 2 x 8 tokens" in next(iter(maps.left_out.values()))
        with pytest.raises(attnpatch.errors.CaptureError):
            _ = maps.block_map
        return
    with torch.no_grad():
        native = model(**given, output_attentions=True).attentions
    for layer, dense in zip(maps.block_map.mass.transpose(0, 1), native, strict=True):
        for row, padded in enumerate((given["attention_mask"] == 0).sum(1).tolist()):
            places = slice(padded + 3, padded + 3 + 16)
            expected = dense[row].double().mean(0)[places, places]
            assert float((layer[row] - expected).abs().max()) < 1e-6
