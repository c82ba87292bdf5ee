"""Keys that are made of what a cache holds: latents that are expanded, buffers that are filled piece by piece."""

import warnings

import pytest
import torch
import transformers
from test_known_facts import Whole, attend, captured, cuts, reduced, same, tokens
from transformers import DynamicCache, StaticCache

import attnpatch

ROW = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(0))


def latent(implementation):
    """Multi-head latent attention: the cache holds one narrow vector of each token."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=2, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    return model


def generated(**options):
    return lambda model: model.generate(tokens(21), max_new_tokens=5, do_sample=False, **options)


def in_pieces(make):
    def run(model):
        cache, ids = make(model), tokens(30)
        for piece in ids.split([9, 9, 1, 1, 10], 1):
            model(piece, past_key_values=cache)
        return torch.cat([ids, ids[:, :1]], 1)

    return run


def cut(model):
    cache, ids = DynamicCache(config=model.config), tokens(30)
    model(ids[:, :24], past_key_values=cache)
    cache.crop(-5)
    model(ids[:, 19:], past_key_values=cache)
    return torch.cat([ids, ids[:, :1]], 1)


WAYS = {
    "dynamic": generated(),
    "static": generated(cache_implementation="static"),
    "chunks": generated(prefill_chunk_size=8),
    "fp8": generated(cache_implementation="quantized", cache_config={"backend": "fp8"}),
    "dynamic by hand": in_pieces(lambda model: DynamicCache(config=model.config)),
    "static by hand": in_pieces(lambda model: StaticCache(config=model.config, max_cache_len=40)),
    "cut": cut,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
def test_latents_that_are_expanded_behind_the_cache(way, implementation):
    model, ids = latent(implementation), []
    maps = captured(model, lambda: ids.append(WAYS[way](model)))
    ids = ids[0][:, :-1]
    count = ids.shape[1]
    with torch.no_grad():
        seen = latent("eager")(ids, output_attentions=True, use_cache=False).attentions
    wanted = torch.stack([reduced(p[0], cuts(count), cuts(count)) for p in seen])
    # 8 bits: not the numbers of a pass without them, but the same tokens.
    bound = 0.05 if way == "fp8" else 1e-6
    torch.testing.assert_close(maps.block_map.mass.double(), wanted.double(), atol=bound, rtol=0)


# ------------------------------------------------------------------------------------------------------- buffers


def halves(x, first, second):
    keys = x.new_empty(x.shape)
    keys[..., :8].copy_(first[..., :8])
    keys[..., 8:].copy_(second[..., 8:])
    return keys


def in_order(x):
    return attend(x, halves(x, x * 2, x + 1))


def of_two_caches(x):
    """Both halves behind what the module kept of each: its own ``x[:, :8]`` would be a cache's."""
    keep = torch.ones(1, 3, 16)
    first, second = (torch.cat([keep, x * factor], 1) for factor in (2, 3))
    return attend(x, halves(first, first, second)[:, 3:])


def of_two_orders(x):
    return attend(x, halves(x, x, x[:, ORDER]))


def two_times(x):
    keys = x.new_empty(x.shape)
    keys[:, :12] = x[:, :12]
    keys[:, 12:] = x[:, 12:]
    keys[:, :12] = x[:, 12:]
    return attend(x, keys)


def piece_by_piece(x):
    keys = torch.zeros_like(x)
    for start in (16, 0, 8):
        keys[:, start : start + 8] = x[:, start : start + 8]
    return attend(x, keys)


def swapped(x):
    keys = torch.zeros_like(x)
    keys[:, 12:], keys[:, :12] = x[:, :12], x[:, 12:]
    return attend(x, keys)


def partly(x):
    keys = torch.zeros_like(x)
    keys[:, :12] = x[:, :12]
    return attend(x, keys)


def across(x):
    keys = torch.zeros_like(x)
    keys[:, 4:16] = x[:, :12]
    keys[:, :12] = x[:, :12]
    return attend(x, keys)


def on_buffer(model):
    with attnpatch.patched(model, sites=["attention"], mode="never"):
        return captured(model, lambda: model(ROW))


BUFFERS = {
    in_order: lambda x: halves(x, x * 2, x + 1),
    of_two_caches: None,
    of_two_orders: None,
    two_times: None,
    piece_by_piece: lambda x: x,
    swapped: None,
    partly: None,
    across: None,
}


@pytest.mark.parametrize("function", BUFFERS)
def test_a_buffer_that_is_filled_in_pieces(function):
    """As ``cat`` of them; what lies elsewhere than in its place is left out."""
    model, keys = Whole(function), BUFFERS[function]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = on_buffer(model)
    if keys is None:
        assert list(maps.left_out) == ["attention"]
        return
    seen = (ROW @ keys(ROW).mT).softmax(-1)
    same(maps.block_map.mass[0], reduced(seen, cuts(24), cuts(24)))


def test_keys_that_something_has_reshaped_meanwhile():
    """A quantiser looks at joined keys in groups; they are what they were."""

    def function(x):
        keys = torch.cat([x, torch.ones(1, 16, 16)], 1)
        keys.reshape(5, 128).amin(0)
        return attend(x, keys)

    model = Whole(function)
    maps = on_buffer(model)
    seen = (ROW @ torch.cat([ROW, torch.ones(1, 16, 16)], 1).mT).softmax(-1)
    same(maps.block_map.mass[0], reduced(seen, cuts(24), cuts(24)))
