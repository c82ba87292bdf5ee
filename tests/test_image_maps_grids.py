"""Which rows and columns image tokens are: of references beside the image, of several pictures, of sizes nobody says.

Right by plain float64 probabilities (``dense_images.recording``), or left out with a reason; never by how many there are.
"""

import contextlib
import functools

import diffusers
import numpy as np
import pipelines
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of, recording
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import Blocks, errors

TEXT = 12


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs, return_dict=False)[0]


def captured(denoiser, inputs, **options):
    """What a denoiser's own probabilities are, and its maps; what it returns is the same."""
    with recording(denoiser) as calls:
        native = run(denoiser, inputs)
    with attnpatch.capture(denoiser, **options) as maps:
        made = run(denoiser, inputs)
    assert torch.equal(native, made)
    return calls[0].sites, maps


def assert_joint(maps, sites, text_first, image, text=TEXT):
    """Image to image and image to words, of the first picture; all else is in no block."""
    start = text if text_first else 0
    places = range(start, start + image)
    words = range(text) if text_first else range(image, image + text)
    block_map = maps["joint"]
    shown = [name for name in block_map.layers if name in sites]
    assert shown
    for name in shown:
        layer = block_map.mass[block_map.layers.index(name)].numpy()
        dense = sites[name][0].mean(0)
        for row in range(image):
            mine = dense[places[row]]
            expected = [*(mine[word] for word in words), *(mine[place] for place in places)]
            assert np.abs(layer[text + row] - expected).max() < 1e-6
    assert block_map.metadata["query_tiles"][1] * block_map.metadata["query_tiles"][2] == image


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
    assert all("in which rows and columns they lie is not said" in why for why in maps.left_out.values())
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

    class Doubled(torch.nn.Module):
        """Puts a reference beside the image, of which its host says nothing."""

        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.heads = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), 2

        def forward(self, hidden_states):
            query, key = (
                f(hidden_states).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.to_q, self.to_k)
            )
            return (
                torch.nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)
            )

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Doubled()

        def forward(self, hidden_states, timestep, img_shapes, **_):
            return self.attention(torch.cat([hidden_states] * 4, 1))

    torch.manual_seed(0)
    denoiser = Denoiser().eval()
    attnpatch.register(Doubled)
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(**inputs)
    assert maps.left_out == {"attention": "attends with 64 image tokens, the pictures it is given have 16"}


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
    assert set(maps.left_out.values()) == {"are neither the image's nor the text's: in no block"}


# ----------------------------------------------------------------------------------------------------- sizes unsaid


@functools.cache
def ltx():
    torch.manual_seed(0)
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip


def ltx_inputs(**more):
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, (2.0, 4.0, 2.0)), indexing="ij")).reshape(
        1, 3, -1
    )
    return {
        "hidden_states": numbers(1, 1, 16, 8),
        "encoder_hidden_states": numbers(7, 1, TEXT, 32),
        "timestep": torch.full((1,), 500),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "video_coords": coordinates,
        **more,
    }


def test_a_sequence_of_which_nothing_is_said():
    """16 tokens are no square because 16 is one."""
    sites, maps = captured(ltx(), ltx_inputs())
    assert set(maps.left_out) == set(sites)
    assert all("give blocks=Blocks.tiles(height, width, tile)" in why for why in maps.left_out.values())


@pytest.mark.parametrize("said", ["by the call", "by the user"])
def test_a_sequence_whose_shape_is_said(said):
    inputs = ltx_inputs(**({"num_frames": 2, "height": 4, "width": 2} if said == "by the call" else {}))
    blocks = Blocks.tiles(4, 2, 2, frames=2)
    sites, maps = captured(ltx(), inputs, blocks=blocks)
    (name,) = maps["self"].layers
    dense, tile = (
        sites[name][0].mean(0),
        [frame * 2 + row // 2 for frame in (0, 1) for row in range(4) for _ in (0, 1)],
    )
    expected = np.zeros((4, 4))
    for query in range(16):
        for key in range(16):
            expected[tile[query], tile[key]] += dense[query, key] / 4
    assert np.abs(maps["self"].mass[0].numpy() - expected).max() < 1e-6


def test_tiles_of_another_shape_than_the_call_says():
    """4 x 4 has as many tokens as 2 frames of 4 x 2, and is not their shape."""
    said = {"num_frames": 2, "height": 4, "width": 2}
    _, maps = captured(ltx(), ltx_inputs(**said), blocks=Blocks.tiles(4, 4, 2))
    assert maps.left_out and all("show no image of the size" in why for why in maps.left_out.values())


def test_tiles_of_another_shape_than_the_latents():
    """Latents of 4 x 16 with 64 tokens, and tiles of a square, which has 64 too."""
    unet = pipe_of("sd15").unet
    inputs = {
        "sample": numbers(1, 1, 4, 8, 32),
        "timestep": 5,
        "encoder_hidden_states": numbers(7, 1, TEXT, 32),
    }
    sites, maps = captured(unet, inputs, blocks=Blocks.tiles(8, 8, 2))
    assert set(maps.left_out) == {name for name in sites if name.endswith("attn1")}
    _, maps = captured(unet, inputs, blocks=Blocks.tiles(4, 16, 2))
    assert maps.left_out == {} and maps.keys() == ["self"]


# -------------------------------------------------------------------------------------------------------- frames


def cog(frames):
    torch.manual_seed(0)
    denoiser = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=8, time_embed_dim=8, text_embed_dim=32,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=4 * frames - 3, patch_size=2,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=False,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": numbers(1, 1, frames, 8, 4, 4),
        "encoder_hidden_states": numbers(7, 1, TEXT, 32),
        "timestep": torch.full((1,), 500),
    }
    return denoiser, inputs


@pytest.mark.parametrize("frames", [2, 4])
def test_frames_before_channels(frames):
    """8 channels are no 8 frames, of which 2 or 4 could be left."""
    sites, maps = captured(*cog(frames))
    block_map = maps["joint"]
    assert block_map.metadata["query_tiles"][0] == frames
    dense = next(iter(sites.values()))[0].mean(0)
    # Tiles are single latents, tokens two by two of them, after the text.
    layer = block_map.mass[0].numpy()[TEXT:, TEXT:].reshape(frames, 2, 2, 2, 2, frames, 2, 2, 2, 2)
    layer = layer.mean((2, 4)).sum((5 - 0, 7 - 0)).reshape(frames * 4, frames * 4)
    assert np.abs(layer - dense[TEXT:, TEXT:]).max() < 1e-6


def test_as_many_frames_as_channels():
    """Which is which does not show; a convolution over frames says it, where there is one."""
    sites, maps = captured(*cog(8))
    assert set(maps.left_out) == set(sites)
    wan = pipe_of("wan").transformer
    inputs = {"hidden_states": numbers(1, 1, 16, 16, 4, 6), "timestep": torch.full((1,), 5.0)}
    _, maps = captured(wan, {**inputs, "encoder_hidden_states": numbers(7, 1, TEXT, 32)})
    assert maps["cross"].metadata["query_tiles"] == [16, 4, 6] and maps.left_out == {}


def test_channels_last():
    """Latents as some hosts have them: frames, rows, columns, channels."""

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.config = Attention(), type("Config", (), {"in_channels": 16})

        def forward(self, hidden_states, timestep):
            return self.attention(hidden_states.flatten(1, 3))

    torch.manual_seed(0)
    denoiser = Last().eval()
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(numbers(1, 1, 2, 4, 6, 16), 5)
    assert maps.block_map.metadata["query_tiles"] == [2, 4, 6]
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(numbers(1, 1, 16, 4, 6, 16), 5)  # frames or channels first
    assert "in which rows and columns they lie is not said" in maps.left_out["attention"]


def test_an_image_that_looks_at_text_which_does_not_look():
    """Queries of the image, keys of both: heat maps can be had, and tokens of neither are said to be in no block."""

    class Joint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, sample, timestep, encoder_hidden_states):
            image, extra = sample.flatten(2).mT, torch.ones(1, 3, 16)
            return self.attention(image, torch.cat([encoder_hidden_states, extra, image], 1))

    torch.manual_seed(0)
    denoiser = Joint().eval()
    inputs = numbers(1, 1, 16, 4, 4), 5, numbers(7, 1, TEXT, 16)
    with torch.no_grad(), recording_of(denoiser) as probabilities:
        denoiser(*inputs)
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(*inputs)
    assert maps.keys() == ["image to text+image"]
    expected = probabilities[0][0].mean(0)[:, 5].reshape(4, 4)
    assert np.abs(maps.heat_map(5) - expected).max() < 1e-6
    assert maps.left_out == {"attention (3 tokens)": "are neither the image's nor the text's: in no block"}
    beside = probabilities[0][0].mean(0)[:, TEXT : TEXT + 3].sum(1)
    assert np.abs(maps.block_map.missing_mass[0].numpy() - beside).max() < 1e-6


# ---------------------------------------------------------------------------------------- sizes that change, blocks


def sizes(unet, **options):
    """A sampler that goes from small latents to large ones."""
    text = numbers(7, 1, TEXT, 32)
    steps = [
        {"sample": numbers(edge, 1, 4, edge, edge), "timestep": edge, "encoder_hidden_states": text}
        for edge in (16, 32)
    ]
    with recording(unet) as calls:
        for step in steps:
            run(unet, step)
    with attnpatch.capture(unet, blocks=Blocks.tiles(4, 4, 1), **options) as maps:
        for step in steps:
            run(unet, step)
    return calls, maps


def test_an_image_that_grows_while_it_is_sampled():
    """Steps apart show it in the tiles of one grid; in one mean there is no such map."""
    unet = pipe_of("sd15").unet
    calls, maps = sizes(unet, steps="all")
    for step, edge in ((0, 8), (1, 16)):
        name = maps["self"].layers[0]
        dense, each = calls[step].sites[name][0].mean(0), edge // 4
        tile = [row // each * 4 + column // each for row in range(edge) for column in range(edge)]
        expected = np.zeros((16, 16))
        for query in range(edge * edge):
            np.add.at(expected[tile[query]], tile, dense[query] / each**2)
        assert np.abs(maps["self"].mass[step, 0].numpy() - expected).max() < 1e-6
    _, maps = sizes(unet)
    assert len(maps.left_out) == 4
    assert all("capture with steps='all'" in why for why in maps.left_out.values())
    with pytest.raises(errors.CaptureError, match="nothing was captured"):
        maps.keys()


def test_blocks_that_do_not_fit_do_not_end_the_call():
    """Words of three texts for one prompt: the image is made, and what is wrong is said."""
    pipe = pipe_of("sd15")
    words = Blocks.words(pipe.tokenizer, [PROMPT, NEGATIVE, "lamp"])
    native = pipelines.run(pipe, "sd15")
    with attnpatch.capture(pipe, blocks=(Blocks.tiles(16, 16, 2), words)) as maps:
        assert np.array_equal(pipelines.run(pipe, "sd15"), native)
    assert set(maps.left_out) == {"step 0", "step 1"}
    assert "blocks were given for 3 sequences, the batch has 1" in repr(maps)
    with pytest.raises(errors.CaptureError, match="blocks were given for 3 sequences"):
        maps.heat_map("red")


# ------------------------------------------------------------------------------------------------ tokens taken away


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.heads = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), 2

    def forward(self, hidden_states, context=None):
        context = hidden_states if context is None else context
        query = self.to_q(hidden_states).unflatten(-1, (2, 8)).transpose(1, 2)
        key = self.to_k(context).unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


class Thrifty(torch.nn.Module):
    """Attends with some of the image's tokens only, or to some, of which there are 16 as in 4 x 4 of 8 x 8."""

    def __init__(self, few):
        super().__init__()
        self.patch, self.attention, self.few = torch.nn.Conv2d(4, 16, 2, 2), Attention(), few

    def forward(self, sample, timestep):
        tokens = self.patch(sample).flatten(2).mT
        return self.few(self.attention, tokens)


def merged(attention, tokens):
    order = tokens.norm(dim=-1).argsort(1)
    kept, rest = (tokens.gather(1, part[..., None].expand(-1, -1, 16)) for part in order.split([16, 48], 1))
    return attention(kept.scatter_reduce(1, torch.zeros(1, 48, 16, dtype=torch.long), rest, "mean"))


FEW = {
    "merged": merged,
    "keys that are every fourth": lambda attention, tokens: attention(tokens, tokens[:, ::4]),
    "the first": lambda attention, tokens: attention(tokens[:, :16]),
    "keys pooled in a row": lambda attention, tokens: attention(
        tokens, torch.nn.functional.avg_pool1d(tokens.mT, 4).mT
    ),
}


@pytest.mark.parametrize("case", FEW)
def test_tokens_that_are_not_all_of_the_image(case):
    torch.manual_seed(0)
    denoiser = Thrifty(FEW[case]).eval()
    with torch.no_grad(), attnpatch.capture(denoiser, blocks=Blocks.tiles(8, 8, 2)) as maps:
        denoiser(numbers(1, 1, 4, 16, 16), 5)
    side = "keys" if "keys" in case else "queries"
    assert maps.left_out == {"attention": f"attends with 16 {side} of which it is not known what they are"}


def test_keys_of_a_smaller_image():
    """Pooled by rows and columns they are the same image at another resolution."""

    def pooled(attention, tokens):
        small = torch.nn.functional.avg_pool2d(tokens.mT.reshape(1, 16, 8, 8), 2)
        return attention(tokens, small.flatten(2).mT)

    torch.manual_seed(0)
    denoiser = Thrifty(pooled).eval()
    inputs = numbers(1, 1, 4, 16, 16), 5
    with torch.no_grad(), recording_of(denoiser) as probabilities:
        denoiser(*inputs)
    with torch.no_grad(), attnpatch.capture(denoiser, blocks=Blocks.tiles(4, 4, 2)) as maps:
        denoiser(*inputs)
    dense, expected = probabilities[0][0].mean(0), np.zeros((4, 4))
    for query in range(64):
        for key in range(16):
            tile = query // 32 * 2 + query % 8 // 4
            expected[tile, key // 8 * 2 + key % 4 // 2] += dense[query, key] / 16
    assert np.abs(maps.block_map.mass[0].numpy() - expected).max() < 1e-6


@contextlib.contextmanager
def recording_of(denoiser):
    """float64 probabilities of the one attention of a module of ours."""
    found = []

    def keep(attention, args):
        hidden, context = args[0], args[-1]
        query = attention.to_q(hidden).unflatten(-1, (2, 8)).transpose(1, 2).double()
        key = attention.to_k(context).unflatten(-1, (2, 8)).transpose(1, 2).double()
        found.append(torch.softmax(query @ key.mT / 8**0.5, -1).numpy())

    handle = denoiser.attention.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
