"""Which rows and columns image tokens are: of sizes that nobody says, that change, of frames, of tokens taken away."""

import functools

import diffusers
import numpy as np
import pipelines
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of, recording
from image_denoisers import TEXT, Attention, captured, numbers, recording_of, run
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import Blocks, errors

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
    assert maps.left_out and all("fit no image of this one's shape" in why for why in maps.left_out.values())


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


def video_of(model, frames, height, width):
    """A video denoiser with patches over several frames; of its tokens alone, other grids fit the latents as well."""
    torch.manual_seed(0)
    name, patch = model
    if name == "wan":
        denoiser = diffusers.WanTransformer3DModel(
            patch_size=patch, num_attention_heads=2, attention_head_dim=12, in_channels=5, out_channels=5, text_dim=32,
            freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip
        latents = numbers(1, 1, 5, frames, height, width)
        return denoiser.eval(), {"hidden_states": latents, "timestep": torch.full((1,), 5)}
    if name == "hunyuan":
        denoiser = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=5, out_channels=5, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, patch_size=patch[1], patch_size_t=patch[0], guidance_embeds=False, text_embed_dim=32,
            pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        )  # fmt: skip
        more = {"encoder_attention_mask": torch.ones(1, TEXT), "pooled_projections": numbers(2, 1, 8)}
        latents = numbers(1, 1, 5, frames, height, width)
        return denoiser.eval(), {"hidden_states": latents, "timestep": torch.full((1,), 5.0), **more}
    tokens = frames // patch[0] * height // 2 * width // 2
    denoiser = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=5, out_channels=5, time_embed_dim=8, text_embed_dim=32,
        num_layers=1, sample_width=width, sample_height=height, sample_frames=4 * frames - 3, patch_size=2,
        patch_size_t=None if patch[0] == 1 else patch[0], max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    more = {"image_rotary_emb": (numbers(2, tokens, 16), numbers(3, tokens, 16))}
    latents = numbers(1, 1, frames, 5, height, width)
    return denoiser.eval(), {"hidden_states": latents, "timestep": torch.full((1,), 5), **more}


PATCHES = [
    (("cog", (2, 2, 2)), (2, 16, 24)),
    (("cog", (2, 2, 2)), (2, 6, 8)),
    (("cog", (1, 2, 2)), (4, 8, 12)),
    (("hunyuan", (2, 2, 2)), (2, 8, 12)),
    (("hunyuan", (1, 2, 2)), (4, 8, 8)),
    (("wan", (2, 2, 2)), (2, 8, 12)),
    (("wan", (4, 1, 1)), (4, 8, 8)),
    (("wan", (1, 2, 2)), (4, 8, 8)),
]


@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_frames_that_are_merged_into_tokens(case):
    """As many tokens may be all frames at fewer rows and columns, or fewer frames."""
    (name, patch), size = case
    denoiser, inputs = video_of((name, patch), *size)
    sites, maps = captured(denoiser, {**inputs, "encoder_hidden_states": numbers(7, 1, TEXT, 32)})
    grid = [edge // step for edge, step in zip(size, patch, strict=True)]
    count, kind = np.prod(grid), "self" if name == "wan" else "joint"
    found = maps.map(kind, own_grid=True)
    assert found.metadata["query_tiles"] == grid
    start = TEXT if name == "cog" else 0
    for number, site in enumerate(found.layers):
        dense = sites[site][0].mean(0)[start : start + count, start : start + count]
        assert np.abs(found.mass[number, -count:, -count:].numpy() - dense).max() < 1e-6


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
    assert "the call does not say in which rows and columns they lie" in maps.left_out["attention"]


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
    assert maps.left_out == {
        "attention (3 tokens)": "these tokens are not known to be the image's or the text's; they are in no block"
    }
    beside = probabilities[0][0].mean(0)[:, TEXT : TEXT + 3].sum(1)
    assert np.abs(maps.block_map.unassigned_mass[0].numpy() - beside).max() < 1e-6


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
    assert "blocks were given for 3 sequences, but the batch has 1" in repr(maps)
    with pytest.raises(errors.CaptureError, match="blocks were given for 3 sequences"):
        maps.heat_map("red")


# ------------------------------------------------------------------------------------------------ tokens taken away


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
    told = f"it attends with 16 {side} that are not known to be the image's or the text's"
    followed = {"merged": "(gather)", "keys pooled in a row": told}
    assert list(maps.left_out) == ["attention"]
    assert followed.get(case, "come from a slice or an index") in maps.left_out["attention"]


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
