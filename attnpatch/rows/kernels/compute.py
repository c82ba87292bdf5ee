"""What a kernel computes, by torch's functions: the modes serve these, so it runs by rows and gives maps as ever."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation.row_masks import RowFunctionNode
from attnpatch.rows.deferred.tensor import materialize, wrap
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.changed_scores import changed
from attnpatch.rows.kernels.packing import Packing


def attention(call: KernelCall, site: AttentionCall | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result of a call, and the logsumexp of its scores if the call needs it.

    Args:
        call: The call.
        site: The attention call in which its masks are deferred; ``None``: masks are made whole.

    Returns:
        ``[batch, heads, q_len, value_dim]`` in the dtype of the query; float32 ``[batch, heads, q_len]`` or ``None``.
    """
    packing = Packing.of(call, site)
    parts = [_of_one(piece, site) for piece in packing.calls]
    lse = packing.joined([lse for _, lse in parts if lse is not None], -math.inf) if call.needs_lse else None
    return packing.joined([result for result, _ in parts], 0.0), lse


def in_place_of(call: KernelCall, site: AttentionCall | None) -> Any:
    """What the kernel would return, computed by torch's functions; arguments as in ``attention``."""
    with torch.autocast(call.query.device.type, enabled=False):
        if call.writes is not None:
            call.writes()
        made = call.returned(*attention(call, site))
    with compat.DisableTorchFunction():
        # With a single key, the product with the values looks like scores itself.
        made = materialize(made, "the result of a kernel's call")
        # Scripts view what a kernel returns, which is contiguous.
        return compat.tree_map(lambda one: one.contiguous() if isinstance(one, torch.Tensor) else one, made)


def masked(call: KernelCall, site: AttentionCall | None) -> torch.Tensor | None:
    """The mask and bias of a call as one tensor, or ``None``; deferred in a site."""
    if not call.has_mask:
        return None
    if not isinstance(call.mask, torch.Tensor):
        return _deferred(call, site)
    others = dataclasses.replace(call, mask=None)
    if not others.has_mask and not others.is_only_causal:
        return call.mask
    if not call.mask.requires_grad:
        return _deferred(call, site)
    # The gradient of a learned bias needs torch's functions.
    rest = _deferred(others, site)
    if rest.dtype == torch.bool:
        return torch.where(rest, call.mask, -math.inf)
    return rest + call.mask


def _deferred(call: KernelCall, site: AttentionCall | None) -> torch.Tensor:
    """All rows of a call's mask; deferred in a site."""
    if site is None or call.q_len < 2:
        return _rows(call, 0, call.q_len)
    few = _rows(call, 0, 1)
    shape = (*few.shape[:-2], call.q_len, call.kv_len)
    return wrap(RowFunctionNode(functools.partial(_rows, call), shape, few.dtype, few.device), site)


def _rows(call: KernelCall, low: int, high: int) -> torch.Tensor:
    """Rows of a call's mask. Modes must not see how they are made: they would defer distances between positions."""
    with compat.DisableTorchFunction():
        return call.mask_rows(low, high)


def _of_one(call: KernelCall, site: AttentionCall | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``attention``, for a call that is not packed."""
    if not call.kv_len or not call.q_len:
        result = call.query.new_zeros((*call.query.shape[:-1], call.value.shape[-1]))
        return result, result.new_full(result.shape[:-1], -math.inf, dtype=torch.float32)
    mask = masked(call, site)
    is_narrow = call.query.dtype not in (torch.float32, torch.float64)
    # ALiBi's biases are large numbers; a narrow mask would round them.
    if call.is_softmax_of_masked and not call.needs_lse and not (is_narrow and call.slopes is not None):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(call.query.dtype)
        return F.scaled_dot_product_attention(**call.as_sdpa(mask).arguments()), None
    scores = scores_of(call, mask, site)
    weights = weights_of(call, scores)
    value = call.value.to(weights.dtype)
    if call.dropout_p:
        weights = torch.dropout(weights, call.dropout_p, True)
    result = (weights @ _for_each_head(value, call.group)).to(call.query.dtype)
    return result, _lse_of(call, scores) if call.needs_lse else None


def _lse_of(call: KernelCall, scores: torch.Tensor) -> torch.Tensor:
    """The logsumexp of scores and of a sink: float32 ``[batch, heads, q_len]``."""
    lse = torch.logsumexp(scores, -1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(lse.dtype).view(1, -1, 1))
    return lse.float()


def scores_of(call: KernelCall, mask: torch.Tensor | None, site: AttentionCall | None) -> torch.Tensor:
    """The scores before softmax, in float32 or better: ``[batch, heads, q_len, kv_len]``."""
    dtype = call.dtype
    key = _for_each_head(call.key.to(dtype), call.group)
    scores = (call.query.to(dtype) * call.factor) @ key.transpose(-2, -1)
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.change is not None:
        scores = changed(scores, call.change, site)
    if mask is None and call.is_only_causal:
        mask = _deferred(call, site)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask.logical_not(), -math.inf)
    return scores + mask.to(dtype)


def weights_of(call: KernelCall, scores: torch.Tensor) -> torch.Tensor:
    """Softmax of scores; zeros in a row that has no open key."""
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    weights = torch.softmax(scores, -1)
    if not call.has_mask and call.change is None:
        return weights
    return weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


def _for_each_head(keys: torch.Tensor, group: int) -> torch.Tensor:
    """Keys or values ``[batch, key_heads, ...]``, repeated for the query heads that share them."""
    if group == 1:
        return keys
    batch, heads = keys.shape[:2]
    repeated = keys[:, :, None].expand(batch, heads, group, *keys.shape[2:])
    return repeated.reshape(batch, heads * group, *keys.shape[2:])
