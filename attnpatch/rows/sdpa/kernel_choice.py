"""Tells which of torch's kernels serves an SDPA call, and whether that kernel returns its logsumexp."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from attnpatch import compat
from attnpatch.ledger import ledger_of
from attnpatch.rows.deferred.tensor import is_pending
from attnpatch.rows.sdpa import logsumexp
from attnpatch.sdpa_call import SdpaCall

MATH_KERNEL = 0
# Devices for which torch can be asked which kernel it would choose. MPS is not one of them, because its attention holds
# the scores.
_CHOOSERS = frozenset(["cpu", "cuda", "xpu"])


def fused_choice(call: SdpaCall) -> int:
    """The kernel torch would choose (0: dense math)."""
    mask = call.attn_mask
    if is_pending(mask):
        # The choice does not depend on the mask's values, so one row, expanded, stands in for the mask.
        row = torch.empty(
            mask.shape[-1:], dtype=mask.dtype, device=mask.device, requires_grad=mask.requires_grad
        )
        call = dataclasses.replace(call, attn_mask=row.expand(mask.shape))
    ledger = ledger_of(call.query)
    if ledger is not None:
        return ledger.fused_choice(call)
    if call.device.type not in _CHOOSERS:
        return MATH_KERNEL
    return compat.fused_sdp_choice(
        call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal,
        scale=call.given_scale, enable_gqa=call.enable_gqa,
    )  # fmt: skip


def keeps_lse(call: SdpaCall) -> bool:
    """True if the call goes to a fused kernel whose operator returns the logsumexp."""
    return logsumexp.why_not(call, fused_choice(call)) is None


def with_lse(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a call that ``keeps_lse``, and the logsumexp of each row, float32 ``[batch, heads, q_len]``."""
    return logsumexp.with_lse(call, fused_choice(call))


def checked_lse(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As ``with_lse``; ``None`` if the logsumexp is wrong, which is checked at the first use of each kind of call."""
    choice = fused_choice(call)
    result, lse = logsumexp.with_lse(call, choice)
    return (result, lse) if logsumexp.is_right(call, choice, lse) else None


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside the block SDPA does not use cuDNN's kernel, unless that is the only fused kernel allowed."""
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
