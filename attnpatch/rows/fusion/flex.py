"""Soft-capped scores, which ``scaled_dot_product_attention`` lacks, by compiled FlexAttention."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Where FlexAttention is compiled to one kernel. On CPU rows are as fast, and need no compiler (docs/numbers.md).
DEVICES = frozenset(["cuda"])


@functools.cache
def compiled() -> Any:
    """FlexAttention holds all scores unless it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """``softmax(cap * tanh(scale * query @ key.T) + mask) @ value``.

    Args:
        query, key, value: ``[batch, heads, length, width]``.
        mask: ``[batch or 1, heads or 1, rows, keys]`` or ``None``.
        scale, cap: As above.

    Returns:
        ``[batch, heads, rows, width]``.
    """
    if mask is not None:
        mask = mask.expand(*query.shape[:2], -1, -1)

    def change(score: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
        score = cap * torch.tanh(score)
        return score if mask is None else score + mask[batch, head, row, column]

    return compiled()(query, key, value, score_mod=change, scale=scale)
