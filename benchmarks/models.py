"""The shapes that are measured: random weights, fixed seeds."""

from __future__ import annotations

import torch


def llama(implementation: str, layers: int = 2, hidden: int = 1024) -> torch.nn.Module:
    """A Llama of 2 layers, hidden 1024, heads of 64, a key head for each 4 heads, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=65536, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# What each other shape is beside "2 layers, hidden 1024, 16 heads, float32".
_OTHERS = {
    "gptj": ("GPTJForCausalLM", {"n_embd": 1024, "n_inner": 2816, "n_layer": 2, "n_head": 16, "n_positions": 16384, "rotary_dim": 64}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 1024, "n_layer": 2, "n_head": 16}),
    "t5": ("T5EncoderModel", {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 2, "num_heads": 16}),
    "deberta": (
        "DebertaV2Model",
        {
            "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16,
            "max_position_embeddings": 16384, "relative_attention": True, "position_buckets": 256,
            "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm",
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
            "max_position_embeddings": 16384,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 16384,
        },
    ),
}  # fmt: skip


def eager(name: str) -> torch.nn.Module:
    """A model with attention written by hand, of the size of the Llama: one of ``_OTHERS``, or ``"llama"``."""
    import transformers

    if name == "llama":
        return llama("eager")
    torch.manual_seed(0)
    kind, fields = _OTHERS[name]
    model = getattr(transformers, kind)
    config = model.config_class(vocab_size=1024, attn_implementation="eager", pad_token_id=0, **fields)
    return model(config).eval()


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1024, (batch, length), generator=generator)
