"""``Policy.workspace`` is a ceiling over masks, biases, scores and capture together, at a length that matters.

Held by counting the storages that operators make. What a native fused call would also hold (the model's own hidden
states, queries, keys, values, outputs) is measured on the same model with a flag in the place of its mask.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from live import Live
from torch import nn

import attnpatch

TOKENS = 16384
WORKSPACE = 64 * 2**20  # a mask of these lengths takes 256 MiB in bool and 1 GiB in float32
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}


def llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**DECODER, num_hidden_layers=1, attn_implementation=attention))


def mistral(attention: str) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(**DECODER, num_hidden_layers=1, sliding_window=4096, attn_implementation=attention)
    return MistralModel(config)


def gemma2(attention: str) -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    kinds = ["sliding_attention", "full_attention"]
    return Gemma2Model(
        Gemma2Config(
            **DECODER, num_hidden_layers=2, layer_types=kinds, sliding_window=4096, query_pre_attn_scalar=16,
            attn_implementation=attention,
        )
    )  # fmt: skip


def gpt_oss(attention: str) -> nn.Module:
    from transformers import GptOssConfig, GptOssModel

    return GptOssModel(
        GptOssConfig(
            **DECODER, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=4096,
            layer_types=["sliding_attention"], attn_implementation=attention,
        )
    )  # fmt: skip


def t5(attention: str) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, attn_implementation=attention
    )
    return T5EncoderModel(config)


def bert(attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(**SIZES, num_hidden_layers=1, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False)


CASES = {function.__name__: function for function in (llama, mistral, gemma2, gpt_oss, t5, bert)}


def inputs(length: int) -> dict[str, torch.Tensor]:
    """One sequence with padding on the left, which every mask has to show."""
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: nn.Module, length: int = TOKENS, capture: bool = False) -> Live:
    """Forced by rows under the ceiling; what was held."""
    given = inputs(length)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(attnpatch.patched(model, mode="always", workspace=WORKSPACE))
        if capture:
            stack.enter_context(attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(1024)))
        with Live() as live:
            model(**given)
        totals = attnpatch.report(model).totals
    assert totals["by_rows"] and not totals["materialised"], totals
    return live


@pytest.mark.parametrize("attention", ["sdpa","eager"])
@pytest.mark.parametrize("name", CASES)
def test_ceiling(name, attention):
    if attention == "sdpa" and name in ("gemma2", "gpt_oss"):
        pytest.skip("the host has no SDPA for it")
    torch.manual_seed(0)
    import time
    model = CASES[name](attention).eval()
    t=time.time()
    live = run(model)
    print(name, attention, time.time()-t, live.peak/2**20, live.largest/2**20, live.what, flush=True)
    print(live.at_peak)
