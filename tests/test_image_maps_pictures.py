"""The image among several pictures of one sequence: by their positions or shapes, never by how many tokens there are."""

import functools

import diffusers
import numpy as np
import pipelines
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of, recording
from image_denoisers import TEXT, Attention, assert_joint, captured, numbers
from pipelines import PROMPT

import attnpatch
from attnpatch import Blocks, errors

# ------------------------------------------------------------------------------------- pictures by their positions


@functools.cache
def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@functools.cache
def flux2():
    torch.manual_seed(0)
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), mlp_ratio=2.0,
    ).eval()  # fmt: skip


def positions(*pictures, width=3, distance=1, offset=(0, 0)):
    """As Kontext and Flux.2 number them: picture, row, column."""
    found = []
    for number, (rows, columns) in enumerate(pictures):
        grid = torch.zeros(rows, columns, width)
        grid[..., 0] = number * distance
        grid[..., 1] = torch.arange(rows)[:, None] + offset[0] * number
        grid[..., 2] = torch.arange(columns)[None] + offset[1] * number
        found.append(grid.reshape(-1, width))
    return torch.cat(found)


def flux_inputs(ids):
    tokens = ids.shape[-2]
    return {
        "hidden_states": numbers(1, 1, tokens, 16),
        "timestep": torch.full((1,), 0.5),
        "encoder_hidden_states": numbers(7, 1, TEXT, 32),
        "pooled_projections": numbers(8, 1, 32),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


@pytest.mark.parametrize(
    "pictures",
    [
        [(4, 6)],
        [(4, 6), (4, 6)],
        [(4, 4)] * 4,  # as many tokens as 8 x 8
        [(4, 6), (2, 3), (6, 4)],
        [(2, 8), (4, 4)],
        [(1, 6), (1, 6)],
    ],
    ids=str,
)
def test_references_beside_the_image(pictures):
    """Flux Kontext: the image is the first picture of the sequence."""
    sites, maps = captured(flux(), flux_inputs(positions(*pictures)))
    rows, columns = pictures[0]
    assert maps["joint"].metadata["query_tiles"] == [1, rows, columns]
    assert_joint(maps, sites, True, rows * columns)
    assert list(maps.left_out) == [f"picture {n} of {len(pictures)}" for n in range(2, len(pictures) + 1)]
    assert all("in no block" in why for why in maps.left_out.values())


@pytest.mark.parametrize("change", ["batched", "bfloat16", "side by side"])
def test_other_ways_to_number_them(change):
    """For each of a batch, in half precision, and as one beside the other without a number of the picture."""
    pictures, more = [(4, 6), (4, 4)], {}
    if change == "side by side":
        more = {"distance": 0, "offset": (0, 6)}
    ids = positions(*pictures, **more)
    ids = ids[None] if change == "batched" else ids.to(torch.bfloat16) if change == "bfloat16" else ids
    inputs = flux_inputs(ids)
    if change == "bfloat16":
        inputs["img_ids"] = ids.float()
    sites, maps = captured(flux(), inputs)
    assert_joint(maps, sites, True, 24)


UNORDERED = {
    "shuffled": lambda ids: ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))],
    "columns first": lambda ids: ids.reshape(4, 6, 3).transpose(0, 1).reshape(-1, 3),
    "all the same": torch.zeros_like,
    "some left out": lambda ids: ids[torch.arange(24) % 5 > 0],
    "the end left out": lambda ids: ids[:21],
}


@pytest.mark.parametrize("case", UNORDERED)
def test_positions_that_are_no_rows(case):
    """No map, whatever the number of tokens would fit."""
    sites, maps = captured(flux(), flux_inputs(UNORDERED[case](positions((4, 6)))))
    assert set(maps.left_out) == set(sites)
    assert all(
        "the call does not say in which rows and columns they lie" in why for why in maps.left_out.values()
    )
    with pytest.raises(errors.CaptureError, match="nothing was captured"):
        maps.keys()


def test_references_of_flux_2():
    """Positions of four numbers, for each of the batch; references of other sizes."""
    ids = positions((4, 6), (4, 6), (2, 4), width=4, distance=10)
    inputs = flux_inputs(ids[None])
    del inputs["pooled_projections"]
    inputs["txt_ids"] = torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], 1)[None]
    inputs["guidance"] = torch.full((1,), 3.0)
    sites, maps = captured(flux2(), inputs)
    assert_joint(maps, sites, True, 24)
    assert {"picture 2 of 3", "picture 3 of 3"} <= set(maps.left_out)


def test_rows_and_columns_last():
    """Positions of four numbers of which the last two are the row and the column."""
    inputs = flux_inputs(torch.cat([torch.zeros(24, 1), positions((4, 6))], 1)[None])
    del inputs["pooled_projections"]
    inputs.update(txt_ids=torch.zeros(1, TEXT, 4), guidance=torch.full((1,), 3.0))
    sites, maps = captured(flux2(), inputs)
    assert_joint(maps, sites, True, 24)
    assert maps["joint"].metadata["query_tiles"] == [1, 4, 6]


def kontext():
    """Flux Kontext's pipeline, of Flux's parts."""
    pipe = pipe_of("flux")
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    made = diffusers.FluxKontextPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipeline_with_a_reference():
    """Words and the image; the reference is not taken for a part of it."""
    pipe = kontext()
    call = {
        "image": pipelines.image(), "prompt": PROMPT, "height": 32, "width": 48, "max_area": 32 * 48,
        "num_inference_steps": 2, "output_type": "np", "max_sequence_length": 40, "_auto_resize": False,
    }  # fmt: skip
    with recording(pipe.transformer) as calls:
        native = pipe(generator=torch.Generator().manual_seed(0), **call).images
    with attnpatch.capture(pipe) as maps:
        made = pipe(generator=torch.Generator().manual_seed(0), **call).images
    assert np.array_equal(native, made)
    image = (native.shape[1] // 4) * (native.shape[2] // 4)
    sites = [site[0] for each in calls for site in each.sites.values()]
    assert sites[0].shape[-1] > 40 + image
    for word in ("red", "lamp"):
        column = np.mean([s[:, 40 : 40 + image, PROMPT.split().index(word)].mean(0) for s in sites], axis=0)
        heat = maps.heat_map(word)
        assert heat.shape == (native.shape[1] // 4, native.shape[2] // 4)
        assert np.abs(heat.flatten() - column).max() < 1e-6


# --------------------------------------------------------------------------------------------- pictures by their shapes


@functools.cache
def qwen():
    torch.manual_seed(0)
    return diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def qwen_inputs(shapes, tokens):
    return {
        "hidden_states": numbers(1, 1, tokens, 16),
        "timestep": torch.full((1,), 0.5),
        "encoder_hidden_states": numbers(7, 1, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(1, TEXT),
        "img_shapes": shapes,
    }


@pytest.mark.parametrize(
    ("shapes", "tokens"),
    [
        ([(1, 4, 6)], 24),
        ([[(1, 4, 6)]], 24),
        ([[(1, 4, 6), (1, 4, 6)]], 48),
        ([[(1, 4, 6), (1, 4, 6), (1, 4, 6), (1, 4, 6)]], 96),
        ([[(1, 4, 6), (1, 2, 3), (1, 6, 4)]], 54),
    ],
    ids=str,
)
def test_pictures_of_qwen_image(shapes, tokens):
    """Qwen-Image-Edit: the image, then the pictures it is edited from."""
    sites, maps = captured(qwen(), qwen_inputs(shapes, tokens))
    assert_joint(maps, sites, True, 24)
    assert maps["joint"].metadata["query_tiles"] == [1, 4, 6]


def test_shapes_that_are_not_the_tokens():
    """Two pictures in the sequence, and the shape of one."""
    inputs = qwen_inputs([[(1, 4, 4)]], 16)

    class Denoiser(torch.nn.Module):
        """Puts references beside the image, of which its host says nothing."""

        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, hidden_states, timestep, img_shapes, **_):
            return self.attention(torch.cat([hidden_states] * 4, 1))

    torch.manual_seed(0)
    denoiser = Denoiser().eval()
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(**inputs)
    assert maps.left_out == {
        "attention": "it attends with 64 image tokens, and the pictures that it is given have 16"
    }


def test_pictures_among_the_tokens_of_text():
    """OmniGen: references stand in the text's sequence, and the image after it."""
    torch.manual_seed(0)
    rope = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    denoiser = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        num_layers=2, pad_token_id=0, vocab_size=97, pos_embed_max_size=16, rope_scaling=rope,
        time_step_dim=32, rope_base=10000, max_position_embeddings=64, original_max_position_embeddings=64,
    ).eval()  # fmt: skip
    before, image = 16 + 1, 4 * 6
    inputs = {
        "hidden_states": numbers(1, 1, 4, 8, 12),
        "timestep": torch.full((1,), 0.5),
        "input_ids": torch.arange(1, 17)[None],
        "input_img_latents": [numbers(2, 1, 4, 4, 6), numbers(3, 1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 8], [9, 13]]},
        "attention_mask": torch.ones(1, before + image, before + image),
        "position_ids": torch.arange(before + image)[None],
    }
    sites, maps = captured(denoiser, inputs, blocks=Blocks.tiles(4, 6, 1))
    assert len(maps.block_map.layers) == 2
    for name, layer in zip(maps.block_map.layers, maps.block_map.mass.numpy(), strict=True):
        assert np.abs(layer - sites[name][0].mean(0)[before:, before:]).max() < 1e-6
    assert set(maps.left_out.values()) == {
        "these tokens are not known to be the image's or the text's; they are in no block"
    }
