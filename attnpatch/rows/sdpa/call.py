"""The arguments of an SDPA call, and which of torch's kernels serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.ledger import is_plain, ledger_of
from attnpatch.rows import autocast
from attnpatch.rows.deferred.tensor import DeferredTensor, computed, is_pending, settle
from attnpatch.rows.sdpa import logsumexp

MATH_KERNEL = 0
# Devices whose torch can be asked for the kernel it would choose. MPS cannot, and holds the scores.
_CHOOSERS = frozenset(["cpu", "cuda", "xpu"])

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


def fused_choice(call: dict[str, Any]) -> int:
    """The kernel torch would choose (0: dense math)."""
    if is_pending(call["attn_mask"]):
        mask = call["attn_mask"]
        # Nobody looks at its values: as many rows as it has, in the memory of one.
        row = torch.empty(
            mask.shape[-1:], dtype=mask.dtype, device=mask.device, requires_grad=mask.requires_grad
        )
        call = {**call, "attn_mask": row.expand(mask.shape)}
    ledger = ledger_of(call["query"])
    if ledger is not None:
        return ledger.fused_choice(call)
    if call["query"].device.type not in _CHOOSERS:
        return MATH_KERNEL
    return compat.fused_sdp_choice(
        call["query"], call["key"], call["value"], call["attn_mask"], call["dropout_p"], call["is_causal"],
        scale=call["scale"], enable_gqa=call["enable_gqa"],
    )  # fmt: skip


def keeps_lse(call: dict[str, Any]) -> bool:
    """Whether the call goes to a fused kernel whose operator returns the logsumexp."""
    return logsumexp.why_not(call, fused_choice(call)) is None


def with_lse(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A call that ``keeps_lse``: its result, and float32 ``[batch, heads, q_len]``, the logsumexp of each row."""
    return logsumexp.with_lse(call, fused_choice(call))


def checked_lse(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same; ``None`` where the logsumexp is wrong, which the first use of a kind of call finds out."""
    choice = fused_choice(call)
    result, lse = logsumexp.with_lse(call, choice)
    return (result, lse) if logsumexp.is_right(call, choice, lse) else None


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


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """On CUDA the other fused kernels serve, if cuDNN's was not the only one allowed."""
    backends = torch.backends.cuda
    others = backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled()
    if not (others and backends.cudnn_sdp_enabled()):
        yield
        return
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        backends.enable_cudnn_sdp(True)
