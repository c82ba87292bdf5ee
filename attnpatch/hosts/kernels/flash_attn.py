"""flash-attn 2: what its functions' arguments mean.

Tensors are ``[batch, length, heads, width]``; packed ones ``[total, heads, width]`` with cumulative lengths. With
``causal`` and windows, the last query is at the place of the last key (flash-attn since 2.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnpatch.hosts.kernels.reading import by_batch, first, lengths_of, packed, pages, unpacked, window_of
from attnpatch.rows.kernels.call import KernelCall

OPEN = (-1, -1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> KernelCall:
    return KernelCall(
        *map(by_batch, (q, k, v)),
        scale=softmax_scale,
        is_causal=causal,
        window=window_of(window_size),
        softcap=max(softcap or 0.0, 0.0),
        slopes=alibi_slopes,
        dropout_p=dropout_p,
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: _three(by_batch(out), lse) if return_attn_probs else by_batch(out),
        needs_lse=return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> KernelCall:
    others = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], dropout_p, softmax_scale, causal, *others)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> KernelCall:
    others = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(*qkv.unbind(2), dropout_p, softmax_scale, causal, *others)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> KernelCall:
    lengths = lengths_of(cu_seqlens_q), lengths_of(cu_seqlens_k)
    starts = None
    if block_table is not None:
        k, v = pages(k, block_table), pages(v, block_table)
        starts = tuple(i * k.shape[1] for i in range(len(k)))
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return KernelCall(
        *map(packed, (q, k, v)),
        scale=softmax_scale,
        is_causal=causal,
        window=window_of(window_size),
        softcap=max(softcap or 0.0, 0.0),
        slopes=alibi_slopes,
        lengths=lengths,
        key_starts=starts,
        dropout_p=dropout_p,
        output=lambda result: packed(first(result)),
        returned=lambda out, lse: _packed_three(out, lse) if return_attn_probs else unpacked(out),
        needs_lse=return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> KernelCall:
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    others = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, *kv.unbind(1), *places, dropout_p, softmax_scale, causal, *others)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> KernelCall:
    places = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    others = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(*qkv.unbind(1), *places, dropout_p, softmax_scale, causal, *others)


def _three(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """The result, the logsumexp (infinite in a row that sees no key), and the dropped weights, of which there are none."""
    assert lse is not None
    return out, lse.masked_fill(lse == -math.inf, math.inf), out.new_empty(0)


def _packed_three(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    assert lse is not None
    return _three(unpacked(out), lse.squeeze(0))
