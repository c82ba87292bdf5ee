"""``Policy.workspace`` is a ceiling over masks, biases, scores and capture together, at a length that matters.

Held by counting the storages that operators make. Beside the workspace only what a native fused call would hold too is
allowed: hidden states, queries, keys, values and results, a few tensors of the size of a hidden state.
"""

import contextlib

import pytest
import torch
from live import Live
from torch import nn

import attnpatch

TOKENS = 8192
# A mask of so many tokens takes 64 MiB in bool and 256 MiB in float32, the scores of one head 256 MiB.
WORKSPACE = 48 * 2**20
WIDTH = 16
SIZES = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 1,
    "max_position_embeddings": TOKENS,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}


def llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**DECODER, num_hidden_layers=1, attn_implementation=attention))


def mistral(attention: str) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(**DECODER, num_hidden_layers=1, sliding_window=2048, attn_implementation=attention)
    return MistralModel(config)


def gemma2(attention: str) -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    kinds = ["sliding_attention", "full_attention"]
    return Gemma2Model(
        Gemma2Config(
            **DECODER, num_hidden_layers=2, layer_types=kinds, sliding_window=2048, query_pre_attn_scalar=16,
            attn_implementation=attention,
        )
    )  # fmt: skip


def gpt_oss(attention: str) -> nn.Module:
    from transformers import GptOssConfig, GptOssModel

    return GptOssModel(
        GptOssConfig(
            **DECODER, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=2048,
            layer_types=["sliding_attention"], attn_implementation=attention,
        )
    )  # fmt: skip


def t5(attention: str) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64,
        d_model=WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=1,
        attn_implementation=attention,
    )
    return T5EncoderModel(config)


def bert(attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(**SIZES, num_hidden_layers=1, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False)


def deberta(attention: str) -> nn.Module:
    """Its distances are whole numbers of 8 bytes, 128 MiB of them, which two terms look up both ways."""
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(
        DebertaV2Config(
            **SIZES, num_hidden_layers=1, relative_attention=True, position_buckets=16, pos_att_type=["c2p", "p2c"],
            position_biased_input=False, type_vocab_size=0,
        )
    )  # fmt: skip


CASES = {function.__name__: function for function in (llama, mistral, gemma2, gpt_oss, t5, bert, deberta)}
# Twenty steps make a distance a bias.
FEWER = {"deberta": 4096}


def inputs(length: int) -> dict[str, torch.Tensor]:
    """One sequence with padding on the left, which every mask has to show."""
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def held(model: nn.Module, tokens: int, capture: bool = False) -> Live:
    """Forced by rows under the ceiling."""
    given = inputs(tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(attnpatch.patched(model, mode="always", workspace=WORKSPACE))
        if capture:
            stack.enter_context(attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(512)))
        with Live() as live:
            model(**given)
        report = attnpatch.report(model)
    assert report.totals["by_rows"] and not report.totals["materialised"], report
    assert not capture or report.totals["captured"], report
    return live


def allowed(tokens: int) -> int:
    """Bytes that the model holds around any attention: so many tensors of the size of a hidden state.

    Residuals, norms, rotary tables, query, key, value and result, and what a feed-forward layer holds.
    """
    state = tokens * WIDTH * 4
    return 12 * state


@pytest.mark.parametrize(
    ("name", "attention", "capture"),
    [
        pytest.param(name, "eager", False, marks=[pytest.mark.long] if name in ("mistral", "bert") else [])
        for name in CASES
    ]
    + [(name, "sdpa", False) for name in ("llama", "bert")]
    + [pytest.param(name, "sdpa", False, marks=pytest.mark.long) for name in ("mistral", "t5")]
    + [("mistral", "eager", True), ("bert", "sdpa", True)],
)
def test_ceiling(name, attention, capture):
    """No storage and no sum of live ones is beyond it."""
    torch.manual_seed(0)
    model = CASES[name](attention).eval()
    tokens = FEWER.get(name, TOKENS)
    live = held(model, tokens, capture)
    assert live.largest <= WORKSPACE, live.what
    assert live.peak <= WORKSPACE + allowed(tokens), live.at_peak
    # And it is used: steps are not shrunk for nothing.
    assert live.peak >= 2**22, live.at_peak
