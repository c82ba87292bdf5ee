"""Which layer a site is: by the model's own numbers, also where other layers have no attention."""

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks, errors
from attnpatch.recording.layers import pattern_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_implementation": "eager", "use_cache": False,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
# Class of the configuration, what it takes, layers with attention, and where these are.
HYBRIDS = {
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2}, [1, 3]),
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [2], "mamba_chunk_size": 8}, [2]),
    "granite": (
        "GraniteMoeHybrid",
        {**MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_chunk_size": 8,
         "num_local_experts": 0, "shared_intermediate_size": 32, "num_experts_per_tok": 0},
        [1, 3],
    ),
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 9, "expert_layer_offset": 8,
         "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4, **EXPERTS},
        [1, 3],
    ),
    "qwen3_next": (
        "Qwen3Next",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 8, "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0, 1, 2, 3], **EXPERTS},
        [3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_of_a_hybrid_have_the_models_numbers(name):
    kind, more, expected = HYBRIDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    seen = {}
    for number in expected:
        model.get_submodule(f"model.layers.{number}.self_attn").register_forward_hook(
            lambda module, args, result, number=number: seen.__setitem__(number, result[1][0])
        )
    ids = torch.arange(1, 13)[None]
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(4)) as maps:
        model(ids)
    assert maps.block_map.layers == tuple(expected)
    for number in expected:
        weights = seen[number].mean(0)
        reduced = [[weights[q : q + 4, k : k + 4].sum() / 4 for k in (0, 4, 8)] for q in (0, 4, 8)]
        found = maps.block_map.select(layer=number).mass[0]
        torch.testing.assert_close(found, torch.tensor(reduced), atol=1e-6, rtol=0)
    for asked in (expected, [expected[-1]], [-1]):
        with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(4), layers=asked) as some:
            model(ids)
        names = tuple(expected if asked == expected else expected[-1:])
        assert some.block_map == maps.block_map.select(layer=list(names))
        assert some.block_map.layers == names


# Attention under other names, some of it in a part that layers share out among them.
OTHERS = {
    "RecurrentGemma": (
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "recurrent", "attention"]},
        {"model.layers.*.temporal_block": (2,)},
    ),
    "NemotronH": (
        {"layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
         "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
        {"model.layers.*.mixer": (1, 3)},
    ),
    "Zamba2": (
        {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4,
         "mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 2,
         "chunk_size": 8, "adapter_rank": 4},
        {"model.layers.*.shared_transformer.self_attn": (1, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_layers_whose_attention_has_another_name(name):
    more, expected = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**SMALL, head_dim=8, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(4)) as maps:
        model(torch.arange(1, 13)[None])
    assert {kind: maps[kind].layers for kind in maps.keys()} == expected  # noqa: SIM118


def test_a_layer_without_attention_cannot_be_asked_for():
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL, **HYBRIDS["lfm2"][1]))
    for layers in ([0], [1, 2], [-3], [4]):
        with (
            pytest.raises(errors.CaptureError, match=r"layers with attention are 1, 3; .* -1 to -2"),
            attnpatch.capture(model, blocks=Blocks.fixed(4), layers=layers),
        ):
            pytest.fail("capture began")


def unet(*last):
    return [
        f"down_blocks.{block}.attentions.{part}.transformer_blocks.0.{name}"
        for block in (0, 1)
        for part in (0, 1)
        for name in last
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.1.self_attn", "model.layers.3.self_attn"], {"model.layers.*.self_attn": [1, 3]}),
        (["model.layers.7.self_attn"], {"model.layers.*.self_attn": [7]}),
        (["1", "3"], {"*": [1, 3]}),
        (["towers.0.layers.2.attn", "towers.0.layers.5.attn"], {"towers.*.layers.*.attn": [2, 5]}),
        (
            [f"decoder.block.{i}.layer.{j}" for i in (0, 1) for j in ("0.SelfAttention", "1.EncDecAttention")],
            {"decoder.block.*.layer.0.SelfAttention": [0, 1], "decoder.block.*.layer.1.EncDecAttention": [0, 1]},
        ),
        (["layers.1.mixers.0", "layers.3.mixers.1"], {"layers.*.mixers.*": [1, 3]}),
        # Two attentions of one layer.
        (
            [f"blocks.{i}.attn{j}" for i in (0, 2) for j in (1, 2)],
            {"blocks.*.attn1": [0, 2], "blocks.*.attn2": [0, 2]},
        ),
        (["blocks.4.attn1", "blocks.4.attn2"], {"blocks.*.attn1": [4], "blocks.*.attn2": [4]}),
        (["blocks.0.attn1", "blocks.1.attn2"], {"blocks.*.attn*": [0, 1]}),
        # Two numbers to tell sites apart: counted.
        (unet("attn2"), {"down_blocks.*.attentions.*.transformer_blocks.0.attn2": [0, 1, 2, 3]}),
        (
            unet("attn1", "attn2"),
            {f"down_blocks.*.attentions.*.transformer_blocks.0.attn{i}": [0, 1, 2, 3] for i in (1, 2)},
        ),
        (["block1.0.attn", "block1.1.attn", "block2.0.attn"], {"block*.*.attn": [0, 1, 2]}),
        # No number that stands alone.
        (["attn1", "attn2"], {"attn*": [0, 1]}),
        (["", "head"], {"": [0], "head": [0]}),
    ],
)  # fmt: skip
def test_groups_and_numbers(names, expected):
    places = pattern_of(names)
    found = {}
    for name in names:
        group, number = places[name]
        found.setdefault(group, []).append(number)
    assert found == expected
