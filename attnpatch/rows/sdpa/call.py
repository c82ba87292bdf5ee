"""The arguments of an SDPA call by name, and whether it can be cut in rows."""

from __future__ import annotations

from typing import Any

from attnpatch.ledger import is_plain
from attnpatch.rows import autocast
from attnpatch.rows.deferred.tensor import DeferredTensor, computed, is_pending, settle

_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an SDPA call by name."""
    return {**_DEFAULTS, **dict(zip(_ORDER, args, strict=False)), **kwargs}


def settled(args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """A call with deferred tensors among its arguments, computed but for the mask, of which rows will do.

    Scores that were computed by hand and then used as a query or a key are not what the matmul path is for.
    """
    call = arguments(args, kwargs)
    mask = computed(call.pop("attn_mask"))
    call = settle(call, "scaled_dot_product_attention")
    if isinstance(mask, DeferredTensor) and not _has_rows_of(mask, call):
        mask = settle(mask, "scaled_dot_product_attention")
    return (), {**call, "attn_mask": mask}


def _has_rows_of(mask: DeferredTensor, call: dict[str, Any]) -> bool:
    """Whether a deferred mask can be cut as the call is."""
    query, key = call["query"], call["key"]
    scores = (*query.shape[:-1], key.shape[-2])
    fits = mask.dim() <= len(scores) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    return fits and query.dim() >= 2 and query.shape[-2] > 1 and not call["is_causal"]


def can_be_cut(call: dict[str, Any]) -> bool:
    query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    tensors = [query, key, value, *([mask] if mask is not None and not is_pending(mask) else [])]
    # A subclass (a causal bias object, a nested or distributed tensor) means more than its elements.
    if mask is not None and call["is_causal"]:
        return False  # torch refuses both together, in its own words
    plain = all(map(is_plain, tensors))
    if len({t.dtype for t in tensors[:3]}) > 1 and autocast.narrow_dtype(query.device) is None:
        return False  # the same
    return plain and not any(t.is_nested or t.numel() == 0 for t in tensors) and query.dim() >= 2
