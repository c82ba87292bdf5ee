"""Attention with soft-capped scores, which SDPA does not support, by compiled FlexAttention."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Devices on which FlexAttention compiles to one kernel. On CPU, by rows is as fast and needs no compiler
# (docs/numbers.md).
DEVICES = frozenset(["cuda"])


@functools.cache
def compiled() -> Any:
    """FlexAttention, compiled: uncompiled it would hold all scores."""
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
