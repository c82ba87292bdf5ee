"""Probabilities beside a fused call: the kernel keeps them to itself, so they are computed again, some rows at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnpatch.rows.deferred import Observer, Passing

# Scores held at once on CPU: what the cache holds beside a head's keys.
CPU_SHOW_BYTES = 2 * 2**20
DEVICE_SHOW_BYTES = 64 * 2**20


@torch.no_grad()
def show(call: dict[str, Any], observer: Observer) -> None:
    """Show an observer the probabilities of an SDPA call, in float32 or better.

    Args:
        call: All arguments of the call by name.
        observer: Called once per tile.
    """
    query, key, mask = call["query"], call["key"], call["attn_mask"]
    if query.dim() == 2:
        query, key = query[None], key[None]
    q_len, kv_len, group = query.shape[-2], key.shape[-2], 1
    lead = (
        torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        if not call["enable_gqa"]
        else query.shape[:-2]
    )
    if call["enable_gqa"]:
        group = query.shape[-3] // key.shape[-3]
    outer = (*lead[:-1], lead[-1] // group)
    scale = 1.0 / math.sqrt(query.shape[-1]) if call["scale"] is None else call["scale"]
    query = query.expand(*lead, *query.shape[-2:]).unflatten(-3, (outer[-1], group))
    key = key.expand(*outer, *key.shape[-2:])
    if mask is not None:
        mask = mask.expand(*lead, q_len, kv_len).unflatten(-3, (outer[-1], group))
    lead_count = math.prod(lead)
    limit = (CPU_SHOW_BYTES if query.device.type == "cpu" else DEVICE_SHOW_BYTES) // (4 * group)
    for number, where in enumerate(
        torch.cartesian_prod(*map(torch.arange, outer)).reshape(-1, len(outer)).tolist()
    ):
        at = tuple(where)
        leads = torch.arange(number * group, (number + 1) * group)
        low = 0
        while low < q_len:
            # A causal tile sees the keys up to its last row only, so early tiles can be taller.
            seen = min(kv_len, max(low, 256)) if call["is_causal"] else kv_len
            high = min(q_len, low + max(16, limit // seen))
            stop = min(high, kv_len) if call["is_causal"] else kv_len
            scores = _scores(query[at][:, low:high] * scale, key[at][:stop])
            if mask is not None:
                _apply_mask(scores, mask[at][:, low:high])
            elif call["is_causal"]:
                corner = scores[..., low:]
                future = torch.ones(corner.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
                corner.masked_fill_(future, -math.inf)
            probabilities = torch.softmax(scores, -1)
            if mask is not None:
                # A row that may look at nothing puts no mass anywhere, as SDPA has it.
                probabilities.masked_fill_((scores.amax(-1) == -math.inf).unsqueeze(-1), 0.0)
            observer.observe(probabilities, Passing(leads, (low, high), lead_count, q_len, kv_len))
            low = high


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[group, rows, keys]`` in float32 or better; the query heads of a group share one product."""
    group, rows, width = query.shape
    scores = query.reshape(group * rows, width) @ key.transpose(0, 1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).view(group, rows, -1)


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), -math.inf)
    else:
        scores.add_(mask)
