"""Tells whether an SDPA call can be cut into rows, and computes those of its arguments that must not be deferred."""

from __future__ import annotations

from typing import Any

from attnpatch.ledger import is_plain
from attnpatch.rows import autocast
from attnpatch.rows.deferred.tensor import DeferredTensor, computed, is_pending, materialize
from attnpatch.sdpa_call import SdpaCall


def materialized(args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """The arguments of a call with deferred tensors computed, except a mask that can be made by rows.

    A deferred query, key or value is computed whole: the matmul path does not support scores in that role.
    """
    named = SdpaCall.of(args, kwargs).arguments()
    mask = computed(named.pop("attn_mask"))
    named = materialize(named, "scaled_dot_product_attention")
    if isinstance(mask, DeferredTensor) and not _has_rows_of(mask, SdpaCall.of((), named)):
        mask = materialize(mask, "scaled_dot_product_attention")
    return (), {**named, "attn_mask": mask}


def _has_rows_of(mask: DeferredTensor, call: SdpaCall) -> bool:
    """True if a deferred mask can be cut at the same rows as the call."""
    scores = (*call.query.shape[:-1], call.kv_len)
    fits = mask.dim() <= len(scores) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    return fits and call.query.dim() >= 2 and call.q_len > 1 and not call.is_causal


def can_be_cut(call: SdpaCall) -> bool:
    operands, mask = [call.query, call.key, call.value], call.attn_mask
    if mask is not None and call.is_causal:
        return False  # torch raises an error for both together
    # A subclass (a causal bias object, a nested or distributed tensor) means more than its elements.
    tensors = [*operands, *([mask] if mask is not None and not is_pending(mask) else [])]
    plain = all(map(is_plain, tensors))
    if len({t.dtype for t in operands}) > 1 and autocast.narrow_dtype(call.device) is None:
        return False  # torch raises an error for different dtypes
    return plain and not any(t.is_nested or t.numel() == 0 for t in tensors) and call.query.dim() >= 2
