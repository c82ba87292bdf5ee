"""Sequences in parts that attend only to themselves: pictures in one sequence, windows of one, chunks."""

import functools

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as config25
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as model25
from transformers.models.qwen2_vl import configuration_qwen2_vl as config2
from transformers.models.qwen2_vl import modeling_qwen2_vl as model2

import attnpatch
from attnpatch import Blocks

WIDTH, HEADS = 32, 2
SIZES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "num_heads": HEADS, "depth": 2}


@functools.cache
def tower(kind, attention="eager"):
    """A vision tower; that of Qwen2.5-VL attends in windows of 4 x 4 patches in its first layer."""
    torch.manual_seed(0)
    if kind == "qwen2":
        config = config2.Qwen2VLVisionConfig(embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2, **SIZES)
        made = model2.Qwen2VisionTransformerPretrainedModel
    else:
        config = config25.Qwen2_5_VLVisionConfig(
            hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH, window_size=16,
            fullatt_block_indexes=[1], **SIZES,
        )  # fmt: skip
        made = model25.Qwen2_5_VisionTransformerPretrainedModel
    return made._from_config(config, attn_implementation=attention).eval()


def pictures(*grids):
    grids = torch.tensor(grids)
    patches = torch.randn(int(grids.prod(1).sum()), 48, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": patches, "grid_thw": grids}


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def dense(attention, given):
    """The probabilities of all patches ``[heads, patches, patches]`` in float64, from a layer's own inputs."""
    (hidden,), kwargs = given
    cos, sin = (each.double() for each in kwargs["position_embeddings"])
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    query, key, _ = (hidden.double() @ weight.T + bias).view(len(hidden), 3, HEADS, -1).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", turned(query, cos, sin), turned(key, cos, sin))
    found = torch.zeros_like(scores)
    for low, high in zip(kwargs["cu_seqlens"][:-1].tolist(), kwargs["cu_seqlens"][1:].tolist(), strict=True):
        part = scores[:, low:high, low:high] / query.shape[-1] ** 0.5
        found[:, low:high, low:high] = part.softmax(-1)
    return found


def handed(layers, run):
    """What each layer's attention is called with."""
    found = []
    hooks = [
        layer.attn.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(((args or (kwargs["hidden_states"],))[:1], kwargs)),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def by_blocks(probabilities, size):
    """Means over rows and sums over keys of blocks, by a loop."""
    count = probabilities.shape[-1]
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return torch.tensor(
        [
            [sum(float(probabilities[i, j]) for i in one for j in other) / len(one) for other in blocks]
            for one in blocks
        ]
    )


GRIDS = {
    "one": [(1, 8, 8)],
    "equal": [(1, 4, 4), (1, 4, 4)],
    "small then large": [(1, 4, 4), (1, 8, 12)],
    "large then small": [(1, 8, 4), (1, 4, 4), (1, 4, 8)],
    "frames": [(2, 4, 4), (1, 4, 8)],
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", GRIDS)
def test_pictures_in_one_sequence(case, attention):
    """Blocks of five patches lie across the pictures' borders."""
    model, given = tower("qwen2", attention), pictures(*GRIDS[case])
    layers = handed(model.blocks, lambda: model(**given))
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(5)) as maps:
        model(**given)
    assert not maps.left_out
    for layer, block, inputs in zip(maps.block_map.mass, model.blocks, layers, strict=True):
        assert (layer - by_blocks(dense(block.attn, inputs).mean(0), 5)).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", GRIDS)
def test_windows(case, attention):
    """The tower moves its patches window by window before its layers; a layer by itself is mapped in that order."""
    model, given = tower("qwen2.5", attention), pictures(*GRIDS[case])
    layers = handed(model.blocks, lambda: model(**given))
    for block, inputs in zip(model.blocks, layers, strict=True):
        with torch.no_grad(), attnpatch.capture(block, Blocks.fixed(5)) as maps:
            model(**given)
        assert (maps.block_map.mass[0] - by_blocks(dense(block.attn, inputs).mean(0), 5)).abs().max() < 1e-6


def test_further_numbers_of_parts():
    """Heads apart, measures, samples and gradients."""
    model, given = tower("qwen2", "sdpa"), pictures(*GRIDS["small then large"])
    layers = handed(model.blocks, lambda: model(**given))
    exact = [dense(block.attn, inputs) for block, inputs in zip(model.blocks, layers, strict=True)]
    measures = ("received", "entropy", "sink")
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(5), heads="all", measures=measures) as maps:
        model(**given)
    found = maps.measured()
    for number, layer in enumerate(exact):
        for head in range(HEADS):
            assert (maps.block_map.mass[number, head] - by_blocks(layer[head], 5)).abs().max() < 1e-6
            assert abs(float(found["sink"][number, head]) - float(layer[head, :, 0].mean())) < 1e-6
            entropy = -torch.special.xlogy(layer[head], layer[head]).sum(-1).mean()
            assert abs(float(found["entropy"][number, head] - entropy)) < 1e-5
            assert (found["received"][number, head] - layer[head].sum(0)).abs().max() < 1e-4
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(5), sample_rows=5) as maps:
        model(**given)
    for number, layer in enumerate(exact):
        assert (maps.block_map.mass[number] - by_blocks(layer.mean(0), 5)).abs().max() < 1e-6


def test_gradients_of_parts():
    """The later part comes first in the backward pass."""
    model, given = tower("qwen2", "sdpa"), pictures(*GRIDS["small then large"])
    with attnpatch.capture(model, Blocks.fixed(4), weighting="gradient") as maps:
        model(**given).last_hidden_state.square().sum().backward()
    whole = maps.block_map.mass
    assert not maps.left_out and whole.shape == (2, 28, 28)
    for grid, patches, blocks in ((0, slice(0, 16), slice(0, 4)), (1, slice(16, 112), slice(4, 28))):
        alone = {
            "hidden_states": given["hidden_states"][patches],
            "grid_thw": given["grid_thw"][grid : grid + 1],
        }
        with attnpatch.capture(model, Blocks.fixed(4), weighting="gradient") as maps:
            model(**alone).last_hidden_state.square().sum().backward()
        torch.testing.assert_close(whole[:, blocks, blocks], maps.block_map.mass, rtol=1e-3, atol=1e-7)
    assert not whole[:, :4, 4:].any() and not whole[:, 4:, :4].any()


# -------------------------------------------------------------------------------------------------- other ways to cut


class Chunks(nn.Module):
    """Attends inside chunks of its sequence, ``[first, last)`` each."""

    def __init__(self, chunks, value=float("-inf")):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.chunks, self.value = nn.Linear(16, 48), chunks, value

    def scores(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def weights(self, query, key, mask):
        scores = query @ key.mT * 8**-0.5
        return scores if mask is None else scores.masked_fill(~mask[:, None, None], self.value)

    def forward(self, x, mask=None):
        query, key, value = self.scores(x)
        found = torch.zeros_like(value)
        for low, high in self.chunks:
            part = None if mask is None else mask[:, low:high]
            weights = self.weights(query[:, :, low:high], key[:, :, low:high], part).softmax(-1)
            found[:, :, low:high] = weights @ value[:, :, low:high]
        return found.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, attention_mask=None):
        return self.attention(x, attention_mask)


def tokens(count=21):
    return torch.randn(2, count, 16, generator=torch.Generator().manual_seed(3))


def captured(attention, *given):
    model = Model(attention).eval()
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(4)) as maps:
        model(*given)
    return maps


@pytest.mark.parametrize(
    "chunks", [[(0, 8), (8, 16), (16, 21)], [(8, 21), (0, 8)], [(0, 2), (2, 21)]], ids=str
)
def test_chunks_in_any_order(chunks):
    attention, x = Chunks(chunks), tokens()
    maps = captured(attention, x)
    assert not maps.left_out
    with torch.no_grad():
        query, key, _ = attention.scores(x)
        expected = torch.zeros(2, 2, 21, 21)
        for low, high in chunks:
            part = attention.weights(query[:, :, low:high], key[:, :, low:high], None)
            expected[:, :, low:high, low:high] = part.softmax(-1)
    for row, probabilities in zip(maps.block_map.mass, expected.mean(1), strict=True):
        assert (row[0] - by_blocks(probabilities, 4)).abs().max() < 1e-6


REFUSED = {
    "overlap": [(0, 12), (8, 21)],
    "overlap and cut off": [(0, 12), (8, 17)],  # 21 tokens in all
    "a gap": [(0, 8), (12, 21)],
    "cut off": [(0, 8), (8, 16)],
    "one token": [(0, 20), (20, 21)],
    "twice": [(0, 12), (0, 12)],
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_are_not_the_sequence(case):
    maps = captured(Chunks(REFUSED[case]), tokens())
    assert maps.left_out and "attention" in maps.left_out
    with pytest.raises(attnpatch.errors.CaptureError):
        _ = maps.block_map


@pytest.mark.parametrize("is_told", [True, False])
def test_padding_of_parts(is_told):
    """Padding of a later part must be known when the first one is summed: only the model's mask tells."""
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, -3:] = mask[1, 5:7] = False
    attention, x = Chunks([(0, 8), (8, 21)]), tokens()

    class Hidden(Model):
        def forward(self, x, hidden=None):
            return self.attention(x, mask)

    if not is_told:
        model = Hidden(attention).eval()
        with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(4)) as maps:
            model(x)
        assert "contradict" in maps.left_out["attention"]
        return
    maps = captured(attention, x, mask)
    assert not maps.left_out
    with torch.no_grad():
        query, key, _ = attention.scores(x)
        expected = torch.zeros(2, 2, 21, 21)
        for low, high in attention.chunks:
            part = attention.weights(query[:, :, low:high], key[:, :, low:high], mask[:, low:high])
            expected[:, :, low:high, low:high] = part.softmax(-1)
    for row, probabilities, real in zip(maps.block_map.mass, expected.mean(1), mask, strict=True):
        own = by_blocks(probabilities[real][:, real], 4)
        assert (row[0, : len(own), : len(own)] - own).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_tiles_of_a_tower_whose_patches_come_square_by_square(kind):
    """The first four patches are a square of two rows; tiles would count them as one row."""
    model, given = tower(kind), pictures((1, 8, 8))
    with torch.no_grad(), attnpatch.capture(model, Blocks.tiles(8, 8, 2)) as maps:
        model(**given)
    reason = "may come in squares of 2 x 2" if kind == "qwen2" else "another order"
    assert all(reason in why for why in maps.left_out.values()) and len(maps.left_out) >= 2


def test_tiles_beside_a_tower():
    """Tiles of the language model's tokens are not tiles of the tower's patches, although these are enough."""
    from test_image_tokens import ONE, call, model

    whole, given = model.__wrapped__(), call([ONE])
    with torch.no_grad(), attnpatch.capture(whole, Blocks.tiles(4, 4, 2, start=3)) as maps:
        whole(**given)
    assert len(maps.keys()) == 1 and "language_model" in maps.keys()[0]
    assert list(maps.left_out) == ["model.visual.blocks.0.attn"]


def test_parts_of_the_whole_model():
    """Pictures in Qwen2-VL: its tower's patches beside its language model's tokens."""
    from test_image_tokens import LARGE, SMALL, call, model

    whole, given = model.__wrapped__(), call([SMALL, LARGE])
    assert isinstance(whole, transformers.Qwen2VLForConditionalGeneration)
    layers = handed(whole.model.visual.blocks, lambda: whole(**given))
    with torch.no_grad(), attnpatch.capture(whole, Blocks.fixed(5)) as maps:
        whole(**given)
    assert not maps.left_out
    (kind,) = (kind for kind in maps.keys() if "visual" in kind)  # noqa: SIM118
    own = by_blocks(dense(whole.model.visual.blocks[0].attn, layers[0]).mean(0), 5)
    assert (maps[kind].mass[0] - own).abs().max() < 1e-6
