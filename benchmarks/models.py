"""The shapes that are measured: random weights, fixed seeds."""

from __future__ import annotations

import torch


def llama(implementation: str, layers: int = 2) -> torch.nn.Module:
    """A Llama of 2 layers, hidden 1024, 16 heads, 4 key heads, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=65536, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1024, (batch, length), generator=generator)
