"""Which tokens a cache holds, and which come before the text: known, or the site is left out."""

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_known_facts import WIDTH, captured, cuts, dense, llama, reduced, same, tokens
from torch import nn
from transformers import DynamicCache

import attnpatch
from attnpatch import Blocks, errors

KEPT = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, *range(24, 32)])


def evict(layers):
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, KEPT], layer.values[:, :, KEPT]


def from_all_layers(model, cache):
    model(tokens(32), past_key_values=cache)
    evict(cache.layers)


def from_the_last_layer(model, cache):
    model(tokens(32), past_key_values=cache)
    evict(cache.layers[1:])


def in_hooks(model, cache):
    """As presses do: every layer's cache is made smaller when its attention has ended."""
    attention = [layer.self_attn for layer in model.model.layers]
    hooks = [
        module.register_forward_hook(lambda module, *_: evict([cache.layers[module.layer_idx]]))
        for module in attention
    ]
    model(tokens(32), past_key_values=cache)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("way", [from_all_layers, from_the_last_layer, in_hooks])
def test_tokens_that_were_taken_out_of_a_cache(way, is_seen):
    """What comes after is in no map. Where nobody saw it, a cache of one length in all layers counts as a text of that."""
    model = llama()
    cache = DynamicCache(config=model.config)
    more = tokens(1, 2)
    if is_seen:

        def run():
            way(model, cache)
            model(more, past_key_values=cache, position_ids=torch.tensor([[32]]))
    else:
        with torch.no_grad():
            way(model, cache)

        def run():
            model(more, past_key_values=cache, position_ids=torch.tensor([[32]]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, run)
    out = {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    if way is from_the_last_layer:
        out -= {"model.layers.0.self_attn"}
    assert set(maps.left_out) == (out if is_seen or way is from_the_last_layer else set())
    assert all("evicted" in why for why in maps.left_out.values())


def test_a_window_keeps_the_latest_tokens():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    first, more = tokens(20), tokens(7, 2)
    ids = torch.cat([first, more], 1)
    with torch.no_grad():
        seen = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for cache in (DynamicCache(config=config), transformers.StaticCache(config=config, max_cache_len=64)):

        def run(cache=cache):
            model(first, past_key_values=cache)
            model(more, past_key_values=cache)

        same(
            captured(model, run).block_map.mass,
            torch.stack([reduced(p[0], cuts(27), cuts(27)) for p in seen]),
        )


class OfNewTokens(nn.Module):
    """Attention that looks at the tokens of its call alone, whatever the cache holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer_idx, self.project = 1, nn.Linear(32, 64)

    def split(self, x):
        return self.project(x).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)

    def forward(self, hidden_states, past_key_values=None, **_):
        q, k = self.split(hidden_states)
        mixed = F.scaled_dot_product_attention(q, k, k, is_causal=True)
        return mixed.transpose(1, 2).flatten(2), None


class LocalAttention(OfNewTokens):
    pass


def test_a_layer_that_looks_at_new_tokens_alone():
    model, seen = llama(), []
    model.model.layers[1].self_attn = module = LocalAttention().eval()

    def look(module, given, named):
        q, k = module.split(named["hidden_states"])
        seen.append((q @ k.mT / 8**0.5 + torch.full((8, 8), -torch.inf).triu(1)).softmax(-1)[0])

    module.register_forward_pre_hook(look, with_kwargs=True)
    cache = DynamicCache(config=model.config)

    def run():
        for place in (0, 8):
            model(tokens(16)[:, place : place + 8], past_key_values=cache)

    found = captured(model, run, Blocks.fixed(4)).block_map.mass[1]
    wanted = torch.block_diag(*[reduced(p, cuts(8, 4), cuts(8, 4)) for p in seen])
    same(found, wanted)


def soft_prompt(config, count):
    torch.manual_seed(0)
    return peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=count)).eval()


@pytest.mark.parametrize("is_generated", [True, False])
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("count", [8, 24])
def test_virtual_tokens_are_none_of_the_text(config, count, is_generated):
    """Also where there are as many of them as of the text's."""
    model, ids = soft_prompt(config, count), tokens(24)

    def run():
        if is_generated:
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        else:
            model(input_ids=ids)

    with pytest.warns(errors.AttnpatchWarning):
        maps = captured(model, run)
    assert len(maps.left_out) == 2
    assert not maps.sequences or not any(maps.sequences)


def test_the_model_below_a_soft_prompt_has_it_in_its_sequence():
    model, ids = soft_prompt(peft.PromptTuningConfig, 8), tokens(24)
    base = model.get_base_model()
    with attnpatch.capture(base, Blocks.fixed(WIDTH)) as maps, torch.no_grad():
        model(input_ids=ids)
        before = model.get_prompt(1)
    with torch.no_grad():
        whole = torch.cat([before, base.get_input_embeddings()(ids)], 1)
        seen = llama("eager")(inputs_embeds=whole, output_attentions=True).attentions
    same(maps.block_map.mass, torch.stack([reduced(p[0], cuts(32), cuts(32)) for p in seen]))


def test_without_its_adapter_a_soft_prompt_is_none():
    model, ids = soft_prompt(peft.PromptTuningConfig, 8), tokens(24)

    def run():
        with model.disable_adapter():
            model(input_ids=ids)

    same(captured(model, run).block_map.mass, dense(ids))


def test_the_encoder_of_beams_is_mapped():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    for name, weight in model.named_parameters():
        if ".q." in name or ".k." in name or "shared" in name:
            weight.data.mul_(2)
    ids = tokens(24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model.generate(ids, num_beams=4, max_new_tokens=8))
    assert sorted(maps.left_out) == [
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]
    assert all("beam search" in why for why in maps.left_out.values())
    with torch.no_grad():
        seen = model.encoder(ids, output_attentions=True).attentions
    same(maps.block_map.mass, torch.stack([reduced(p[0], cuts(24), cuts(24)) for p in seen]))


def test_requests_that_share_a_row_are_none_of_one_text():
    """Continuous batching."""
    model = llama()
    options = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=96, pad_token_id=0
    )

    sizes = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, page_size=16)
    given = {"generation_config": options, "continuous_batching_config": sizes, "warmup": False}

    def run():
        found = model.generate_batch([tokens(n)[0].tolist() for n in (12, 17)], **given)
        assert len(found) == 2

    with pytest.warns(errors.AttnpatchWarning, match="one request"):
        maps = captured(model, run)
    assert len(maps.left_out) == 2
    with pytest.raises(errors.CaptureError):
        _ = maps.block_map


class PackedLayer(transformers.cache_utils.DynamicLayer):
    """Keys in a form of its own."""

    def update(self, key_states, value_states, *_, **__):
        packed = vars(self).setdefault("packed", [])
        packed.append((key_states.clone(), value_states.clone()))
        self.is_initialized, self.keys = True, torch.tensor([])
        self.count = sum(keys.shape[2] for keys, _ in packed)
        return tuple(torch.cat([pair[i] for pair in packed], 2) for i in (0, 1))

    def get_seq_length(self):
        return vars(self).get("count", 0)


def packed(model):
    cache = DynamicCache(config=model.config)
    cache.layers = [PackedLayer() for _ in cache.layers]
    return {"past_key_values": cache}


def eight_bits(_):
    return {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


def in_groups(count):
    sizes = {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": count}
    return lambda _: {"cache_implementation": "quantized", "cache_config": sizes}


UNREADABLE = {
    "packed": packed,
    "fp8": eight_bits,
    "hqq 1": in_groups(1),
    "hqq 4": in_groups(4),
    "hqq": in_groups(64),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_of_a_cache_that_is_packed(kind, beams, batch):
    """Beams are refused there too; sequences that keep their places have the map of the model with that cache."""
    if kind == "packed" and beams > 1:
        pytest.skip("it reorders nothing")
    model, ids, seen = llama(), tokens(40).view(2, 20)[:batch], []
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": beams}
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(8)

    def run(model=model):
        return model.generate(ids, **options, **UNREADABLE[kind](model))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, run)
    if beams > 1:
        assert len(maps.left_out) == 2
        assert all("beam search" in why for why in maps.left_out.values())
        return
    if kind == "packed" and batch > 1:
        assert all("one sequence at a time" in why for why in maps.left_out.values())
        assert len(maps.left_out) == 2
        return
    eager = llama("eager")
    eager.load_state_dict(model.state_dict())
    hook = eager.model.layers[1].self_attn.register_forward_hook(lambda *given: seen.append(given[-1][1]))
    run(eager)
    hook.remove()
    whole = torch.cat([F.pad(p, (0, 26 - p.shape[-1])) for p in seen], 2)
    found = maps.block_map.mass.view(batch, 2, 4, 4)[:, 1]
    same(found, torch.stack([reduced(p, cuts(26), cuts(26)) for p in whole]))
