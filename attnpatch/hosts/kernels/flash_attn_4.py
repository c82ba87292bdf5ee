"""flash-attn 4 (the package ``flash_attn.cute``): what its functions' arguments mean.

A window is open on a side that is ``None``. Functions always return a pair; the logsumexp is ``None`` if nobody needs
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.hosts.kernels.reading import (
    by_batch,
    first,
    packed,
    packed_lengths,
    pages,
    refuse,
    unpacked,
)
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

OPEN = (None, None)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Any] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> KernelCall:
    _refuse(
        qv=qv,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
    )
    return KernelCall(
        *map(by_batch, (q, k, v)),
        scale=softmax_scale,
        is_causal=causal,
        window=_window_of(window_size, causal),
        softcap=softcap or 0.0,
        sinks=learnable_sink,
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: (by_batch(out), lse),
        needs_lse=return_lse,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Any] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> KernelCall:
    _refuse(
        qv=qv,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        seqused_q=seqused_q,
    )
    placed = _placed(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table)
    is_packed = "lengths" in placed
    return KernelCall(
        **placed,
        scale=softmax_scale,
        is_causal=causal,
        window=_window_of(window_size, causal),
        softcap=softcap or 0.0,
        sinks=learnable_sink,
        output=lambda result: packed(first(result)) if is_packed else by_batch(first(result)),
        returned=lambda out, lse: _packed_two(out, lse) if is_packed else (by_batch(out), lse),
        needs_lse=return_lse,
    )


def _placed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of_queries: torch.Tensor | None,
    of_keys: torch.Tensor | None,
    keys_used: torch.Tensor | None,
    table: torch.Tensor | None,
) -> dict[str, Any]:
    """Query, key and value, and how they are packed, as fields of ``KernelCall``."""
    if table is not None:
        k, v = pages(k, table), pages(v, table)
    if of_queries is None and of_keys is None:
        most = k.shape[1] if keys_used is None else int(keys_used.max())
        q, k, v = by_batch(q), by_batch(k[:, :most]), by_batch(v[:, :most])
        return {"query": q, "key": k, "value": v, "kv_used": keys_used}
    # One of both sides may still be in batches, which are packed sequences of one length.
    if of_queries is None:
        of_queries, q = _even(q), q.flatten(0, 1)
    if of_keys is None or table is not None:
        if of_keys is not None and keys_used is None:
            keys_used = of_keys.diff()
        of_keys, k, v = _even(k), k.flatten(0, 1), v.flatten(0, 1)
    lengths, starts = packed_lengths(of_queries, of_keys, keys_used)
    tensors = dict(zip(("query", "key", "value"), map(packed, (q, k, v)), strict=True))
    return {**tensors, "lengths": lengths, "key_starts": starts}


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


def _refuse(**named: Any) -> None:
    refuse("flash-attn 4", **named)


def _packed_two(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    return unpacked(out), None if lse is None else lse.squeeze(0)
