"""Fused attention that returns its logsumexp: SDPA's own kernels, called through the operators below it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.ledger import ledger_of
from attnpatch.rows.precision import in_full
from attnpatch.sdpa_call import SdpaCall, additive

# Number of query rows for which the logsumexp is checked, and the tolerance. Kernels sum in float32; a kernel that
# returned it in another base was off by a third (pytorch#181645).
_ROWS, _OFF, _OFF_RELATIVE = 4, 1e-2, 1e-3
# The value that SDPA adds for cuDNN where a bool mask hides a key: that kernel returns NaN for rows of -inf.
CUDNN_HIDDEN = -65504.0
# Result of the check at the first use of each device, operator and kind of call.
_is_right: dict[tuple[Any, ...], bool] = {}


def _flash_cpu(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = call.key, call.value
    if call.enable_gqa and not _shares_heads():
        key, value = key.repeat_interleave(call.group, -3), value.repeat_interleave(call.group, -3)
    return compat.flash_attention_on_cpu(
        call.query, key, value, call.dropout_p, call.is_causal, attn_mask=call.additive_mask(), scale=call.given_scale
    )  # fmt: skip


@functools.cache
def _shares_heads() -> bool:
    """True if the CPU kernel takes grouped key heads as they are; then SDPA passes (and saves) them unrepeated."""
    query, key = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8)
    try:
        compat.flash_attention_on_cpu(query, key, key, 0.0, False)
    except RuntimeError:
        return False
    return True


def _flash_cuda(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel needs widths that are multiples of 8, to which SDPA pads; it takes grouped key heads as they are."""
    padded = map(_of_eights, (call.query, call.key, call.value))
    result, lse, *_ = compat.flash_attention(*padded, call.dropout_p, call.is_causal, False, scale=call.scale)
    return result[..., : call.value.shape[-1]], lse


def _efficient_cuda(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel reads a mask 8 elements at a time, so its rows are aligned; its logsumexp may be padded."""
    mask = call.additive_mask()
    if mask is not None:
        mask = aligned(mask).expand(*call.query.shape[:-1], call.kv_len)
    result, lse, *_ = compat.efficient_attention(
        call.query, call.key, call.value, mask, True, call.dropout_p, call.is_causal, scale=call.given_scale
    )
    return result, lse


def _cudnn(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    result, lse, *_ = compat.cudnn_attention(
        call.query, call.key, call.value, call.additive_mask(CUDNN_HIDDEN), True,
        call.dropout_p, call.is_causal, False, scale=call.given_scale,
    )  # fmt: skip
    return result, lse


def _of_eights(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor padded to a width that is a multiple of 8; itself if it is one (``pad`` by 0 would copy)."""
    missing = -tensor.shape[-1] % 8
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def aligned(mask: torch.Tensor) -> torch.Tensor:
    """A mask whose rows begin at multiples of 8 elements, as in SDPA (aten ``preprocess_mask``)."""
    if mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        return mask
    kv_len = mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, 8 - kv_len % 8))[..., :kv_len]


_KINDS = (("cpu", 1, _flash_cpu), ("cuda", 1, _flash_cuda), ("cuda", 2, _efficient_cuda), ("cuda", 3, _cudnn))
# For each device type and each kernel that SDPA chooses (``torch.nn.attention.SDPBackend``): the function that calls
# it, if torch has the kernel's operator.
OPERATORS: dict[tuple[str, int], Callable[[SdpaCall], tuple[torch.Tensor, torch.Tensor]]] = {
    (device, choice): function
    for (device, choice, function), kernel in zip(_KINDS, compat.KERNELS, strict=True)
    if kernel is not None
}


def why_not(call: SdpaCall, choice: int) -> str | None:
    """Why an SDPA call does not return a logsumexp, in a few words; ``None`` if it does.

    Args:
        call: The call.
        choice: The kernel that torch chooses.
    """
    query, mask = call.query, call.attn_mask
    if torch.is_autocast_enabled(query.device.type):
        return "autocast"  # it casts for SDPA, but not for the operators below
    if query.dim() != 4:
        return "another layout"
    if (query.device.type, choice) not in OPERATORS:
        return "another kernel"
    if query.device.type == "cuda" and mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return "another mask"
    if not _is_right.get(_kind(call, choice), True):
        return "a wrong logsumexp"
    return None


def with_lse(call: SdpaCall, choice: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of an SDPA call for which ``why_not`` is ``None``, and the logsumexp of each row.

    Args:
        call: The call.
        choice: The kernel that torch chooses.

    Returns:
        The attention output, and float32 ``[batch, heads, q_len]``, natural logarithm.
    """
    query = call.query
    result, lse = OPERATORS[query.device.type, choice](call)
    # Some kernels return padding at its end, or an extra dimension of 1.
    return result, lse.reshape(*query.shape[:2], -1)[..., : query.shape[-2]]


@torch.no_grad()
def is_right(call: SdpaCall, choice: int, lse: torch.Tensor) -> bool:
    """True if the logsumexp is right; checked for some rows at the first use of each kind of call."""
    kind = _kind(call, choice)
    if kind not in _is_right and ledger_of(call.query) is None:
        _is_right[kind] = all(_agrees(call, lse, head) for head in {0, call.key.shape[1] - 1})
    return _is_right.get(kind, True)


def _kind(call: SdpaCall, choice: int) -> tuple[Any, ...]:
    return call.device, choice, call.dtype, call.is_causal, call.attn_mask is None


def _agrees(call: SdpaCall, lse: torch.Tensor, key_head: int) -> bool:
    """True if the logsumexp is right for some rows of the query heads that share a key head, in the first sequence."""
    query, key, mask, q_len, kv_len = call.query, call.key, call.attn_mask, call.q_len, call.kv_len
    group = query.shape[1] // key.shape[1]
    heads = slice(key_head * group, (key_head + 1) * group)
    rows = torch.linspace(0, q_len - 1, min(_ROWS, q_len), device=query.device).long()
    dtype = torch.promote_types(query.dtype, torch.float32)
    with in_full(query):
        scores = (query[0, heads][:, rows].to(dtype) @ key[0, key_head].to(dtype).T) * call.scale
    if call.is_causal:
        scores.masked_fill_(torch.arange(kv_len, device=query.device) > rows[:, None], -math.inf)
    if mask is not None:
        scores.add_(additive(mask.expand(*query.shape[:-1], kv_len)[0, heads][:, rows], query.dtype))
    expected = scores.logsumexp(-1)
    there = expected.isfinite()
    off = (lse[0, heads][:, rows].to(dtype) - expected).abs()
    return bool((off <= _OFF + _OFF_RELATIVE * expected.abs())[there].all())
