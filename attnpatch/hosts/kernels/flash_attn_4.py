"""flash-attn 4 (the package ``flash_attn.cute``): what its functions' arguments mean.

A window is open on a side that is ``None``. Functions always return a pair; the logsumexp is ``None`` if nobody needs
it.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import (
    call_in_batches,
    call_in_packs,
    packed_lengths,
    pages,
    pair,
    reads,
    refuse,
)
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

_OPTIONS = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None"
)
_REFUSED = "qv gather_kv_indices score_mod mask_mod block_sparse_tensors"


@reads(
    f"q, k, v, qv=None, gather_kv_indices=None, {_OPTIONS}, aux_tensors=None, aux_scalars=None, "
    "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False"
)
def flash_attn_func(given: Any) -> KernelCall:
    refuse("flash-attn 4", given, _REFUSED)
    return call_in_batches((given.q, given.k, given.v), **_fields(given))


@reads(
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
    f"{_OPTIONS}, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, "
    "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False"
)
def flash_attn_varlen_func(given: Any) -> KernelCall:
    refuse("flash-attn 4", given, f"{_REFUSED} seqused_q")
    q, k, v, keys_used = given.q, given.k, given.v, given.seqused_k
    of_queries, of_keys, table = given.cu_seqlens_q, given.cu_seqlens_k, given.page_table
    if table is not None:
        k, v = pages(k, table), pages(v, table)
    if of_queries is None and of_keys is None:
        most = k.shape[1] if keys_used is None else int(keys_used.max())
        return call_in_batches((q, k[:, :most], v[:, :most]), kv_used=keys_used, **_fields(given))
    # One of both sides may still be in batches, which are packed sequences of one length.
    if of_queries is None:
        of_queries, q = _even(q), q.flatten(0, 1)
    if of_keys is None or table is not None:
        if of_keys is not None and keys_used is None:
            keys_used = of_keys.diff()
        of_keys, k, v = _even(k), k.flatten(0, 1), v.flatten(0, 1)
    lengths, starts = packed_lengths(of_queries, of_keys, keys_used)
    return call_in_packs((q, k, v), lengths=lengths, key_starts=starts, **_fields(given))


def _fields(given: Any) -> dict[str, Any]:
    return {
        "scale": given.softmax_scale,
        "is_causal": given.causal,
        "window": _window_of(given.window_size, given.causal),
        "softcap": given.softcap or 0.0,
        "sinks": given.learnable_sink,
        "returned": pair,
        "needs_lse": given.return_lse,
    }


def _even(tensor: torch.Tensor) -> torch.Tensor:
    """The cumulative lengths of ``[batch, length, ...]``."""
    return torch.arange(0, tensor.shape[0] * tensor.shape[1] + 1, tensor.shape[1])


def _window_of(sizes: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """A window of flash-attn 4, where a negative size moves the window's edge instead of opening it."""
    left, right = sizes
    if is_causal:
        right = 0
    if left is not None and right is not None and left + right < 0:
        return None, None
    if any(size is not None and size < 0 for size in (left, right)):
        raise CannotRead(
            f"flash-attn 4 is given a window of {tuple(sizes)}, which does not hold the query's own place"
        )
    return left, right
