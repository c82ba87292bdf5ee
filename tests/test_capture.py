"""What capture refuses, and what it says of what it saw."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnpatch
from attnpatch import Blocks, errors

LLAMA = zoo.BY_NAME["llama"]


def run(model, padding="none"):
    with torch.no_grad():
        return LLAMA.run(model, LLAMA.inputs(padding, torch.float32))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"blocks": 128}, "blocks=128.*Blocks.fixed"),
        ({"blocks": Blocks.fixed(8), "heads": "most"}, "heads='most'.*'mean'"),
        ({"blocks": Blocks.fixed(8), "heads": []}, r"heads=\[\]"),
        ({"blocks": Blocks.fixed(8), "layers": [2]}, r"layers with attention are 0, 1;.*-1 to -2"),
        ({"blocks": Blocks.fixed(8), "layers": 0}, "layers=0.*list"),
        ({"blocks": Blocks.fixed(8), "sites": "encoder.*"}, r"'encoder\.\*'.*model\.layers\.\*\.self_attn"),
    ],
)
def test_refused_before_the_model_runs(asked, words):
    model = LLAMA.build("sdpa")
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(errors.CaptureError, match=words), attnpatch.capture(model, **asked):
        pytest.fail("capture began")
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_head_that_there_is_not(implementation):
    model = LLAMA.build(implementation)
    with (
        pytest.warns(errors.AttnpatchWarning, match="there are 4 heads"),
        attnpatch.capture(model, blocks=Blocks.fixed(8), heads=[0, 9]) as maps,
    ):
        run(model)
    with pytest.raises(errors.CaptureError, match="there are 4 heads"):
        _ = maps.block_map


def test_nothing_captured():
    model = LLAMA.build("sdpa")
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        pass
    with pytest.raises(errors.CaptureError, match="inside the with block"):
        _ = maps.block_map


def test_a_short_call_of_a_patched_model_is_captured():
    model = LLAMA.build("sdpa")
    with attnpatch.patched(model), attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        run(model)
    assert maps.block_map.mass.sum() > 0.9


def test_a_compiled_model_shows_nothing_and_capture_says_so():
    case = zoo.BY_NAME["llama"]
    model = case.build("sdpa")
    compiled = torch.compile(model, backend="eager")
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps, torch.no_grad():
        case.run(compiled, case.inputs("none", torch.float32))
    with pytest.raises(errors.CaptureError, match="uncompiled"):
        _ = maps.block_map


def test_one_capture_at_a_time():
    model = LLAMA.build("sdpa")
    second = attnpatch.capture(model, blocks=Blocks.fixed(8))
    with (
        attnpatch.capture(model, blocks=Blocks.fixed(8)),
        pytest.raises(errors.PatchError, match="captured already"),
        second,
    ):
        pytest.fail("a second capture began")


def test_several_kinds_need_a_name():
    case = zoo.BY_NAME["t5"]
    model = case.build("eager")
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps, torch.no_grad():
        case.run(model, case.inputs("none", torch.float32))
    with pytest.raises(errors.CaptureError, match=r"several kinds.*EncDecAttention"):
        _ = maps.block_map
    with pytest.raises(errors.CaptureError, match="nothing was captured at 'x'"):
        _ = maps["x"]
    assert len(maps.keys()) == 3


def test_generate_of_an_encoder_decoder_is_one_sequence():
    """The encoder is called apart from the model and before it."""
    case = zoo.BY_NAME["t5"]
    model = case.build("sdpa")
    ids = case.inputs("none", torch.float32)["input_ids"]
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert len(maps.sequences) == 1
    assert len(maps.keys()) == 3
    cross = next(key for key in maps.keys() if "EncDec" in key)  # noqa: SIM118
    assert maps[cross].metadata["tokens"] == ids.shape[1]
    torch.testing.assert_close(maps[cross].mass.sum(-1), torch.ones(maps[cross].mass.shape[:-1]))


@pytest.mark.parametrize("name", ["Swin", "SamVision"])
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_of_a_host_are_refused(name, batch):
    """Also where there are as many windows as would pass for heads."""
    import transformers

    fields = {
        "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        "SamVision": {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "window_size": 4,
                      "num_attention_heads": 2, "output_channels": 8, "global_attn_indexes": [], "mlp_dim": 16},
    }[name]  # fmt: skip
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)).eval()
    with (
        pytest.warns(errors.AttnpatchWarning, match="in no map"),
        attnpatch.capture(model, blocks=Blocks.fixed(16)) as maps,
        torch.no_grad(),
    ):
        model(zoo.floats(batch, 3, 32, 32))
    with pytest.raises(errors.CaptureError, match=r"windows|put into another order"):
        _ = maps.block_map


def test_windows_are_refused():
    """Attention in windows that span the batch: no map over a sequence can show that."""

    class WindowAttention(nn.Module):
        def forward(self, x):
            windows = x.reshape(-1, 16, x.shape[-1])
            return (torch.softmax(windows @ windows.mT, -1) @ windows).reshape(x.shape)

    model = nn.Sequential(WindowAttention())
    with (
        pytest.warns(errors.AttnpatchWarning, match="windows"),
        attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps,
    ):
        model(zoo.floats(2, 24, 8))
    with pytest.raises(errors.CaptureError, match="windows"):
        _ = maps.block_map


def test_calls_and_their_maps():
    """Two calls are two sequences; the last is the map, all are kept."""
    model = LLAMA.build("sdpa")
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        run(model)
        run(model, "left")
    assert len(maps.sequences) == 2
    assert "2 sequences" in repr(maps)
    assert maps.block_map == maps.sequences[-1]["model.layers.*.self_attn"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prefix_computed_once_begins_a_sequence_each_time(implementation):
    """A copy of a cache is another sequence, whatever was captured before; of the prefix's own rows nothing is known."""
    model = LLAMA.build(implementation)
    ids = zoo.tokens(40)
    with torch.no_grad():
        with attnpatch.capture(model, blocks=Blocks.fixed(8)) as whole:
            model(ids)
        prefix = model(ids[:, :24], use_cache=True).past_key_values
        with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
            for _ in range(2):
                cache = copy.deepcopy(prefix)
                model(ids[:, 24:32], past_key_values=cache)
                model(ids[:, 32:], past_key_values=cache)
    assert len(maps.sequences) == 2
    for found in maps.sequences:
        (block_map,) = found.values()
        assert not block_map.mass[:, :3].any()
        torch.testing.assert_close(block_map.mass[:, 3:], whole.block_map.mass[:, 3:], atol=1e-6, rtol=0)


def test_the_model_computes_what_it_would(tmp_path):
    """Capture changes no output, and its map survives a file."""
    for implementation in ("eager", "sdpa"):
        model = LLAMA.build(implementation)
        native = run(model, "right")
        with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
            captured = run(model, "right")
        assert all(torch.equal(captured[name], native[name]) for name in native)
        loaded = attnpatch.BlockMap.load(maps.block_map.save(tmp_path / f"{implementation}.safetensors"))
        assert loaded == maps.block_map


def test_out_of_memory_while_watched_counts_nothing_twice():
    """A replay that begins again begins its sums again."""
    from test_rule import Eager, Limited, Stack

    attnpatch.register(Eager)
    model, x = Stack(Eager, 1), zoo.floats(2, 64, 8)
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(16)) as maps:
        model(x)
        calm = maps.block_map
        with Limited(2 * 64 * 20):
            model(x)
    assert maps.block_map == calm
    torch.testing.assert_close(maps.block_map.mass.sum(-1), torch.ones(2, 1, 4))


class SharedHeads(nn.Module):
    """Four heads of queries and two of keys."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x):
        query, key = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.query, self.key))
        found = nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        return found.transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SharedHeads()

    def forward(self, x):
        return checkpoint(self.attention, x, use_reentrant=False)


def test_a_checkpoint_around_shared_heads():
    """What a captured call saves is what the checkpoint expects."""
    model, x = Checkpointed(), torch.randn(1, 24, 32, requires_grad=True)
    (native,) = torch.autograd.grad(model(x).sum(), x)
    patched = attnpatch.patched(model, sites=["attention"], mode="never")
    with patched, attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        (captured,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(captured, native)
    assert not maps.left_out and maps.block_map.mass.shape == (1, 3, 3)


def test_a_checkpointed_layer_is_seen_once():
    """Gradient checkpointing runs each layer again in the backward pass."""
    model = LLAMA.build("eager").train()
    inputs = LLAMA.inputs("none", torch.float32)
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        model(**inputs).logits.sum().backward()
        plain = maps.block_map
        model.gradient_checkpointing_enable()
        model(**inputs).logits.sum().backward()
    assert len(maps.sequences) == 2
    torch.testing.assert_close(maps.block_map.mass, plain.mass)


def test_capture_under_autocast_changes_nothing():
    """The fused operator that returns the logsumexp is not one autocast knows; the call itself is."""
    model = LLAMA.build("sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = run(model)
        with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
            captured = run(model)
        with attnpatch.patched(model, mode="always", rows=32):
            by_rows = run(model)
    assert all(torch.equal(captured[name], native[name]) for name in native)
    assert all(by_rows[name].dtype == native[name].dtype for name in native)
    torch.testing.assert_close(maps.block_map.mass.sum(-1), torch.ones(maps.block_map.mass.shape[:-1]))
