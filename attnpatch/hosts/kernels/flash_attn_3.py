"""flash-attn 3 (the module ``flash_attn_interface``): what its functions' arguments mean.

As in version 2, but in another order, without dropout and ALiBi. Quantised tensors (with ``descale``) are refused.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels import flash_attn_cache
from attnpatch.hosts.kernels.reading import (
    by_batch,
    first,
    packed,
    packed_lengths,
    refuse,
    unpacked,
    window_of,
)
from attnpatch.rows.kernels.call import KernelCall

OPEN = (-1, -1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Any = OPEN,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> KernelCall:
    _refuse(
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
    )
    return KernelCall(
        *map(by_batch, (q, k, v)),
        scale=softmax_scale,
        is_causal=causal,
        window=window_of(window_size),
        softcap=softcap or 0.0,
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: (by_batch(out), lse) if return_attn_probs else by_batch(out),
        needs_lse=return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Any = OPEN,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> KernelCall:
    if qkv.dim() == 4:  # [batch, length, query heads, then key heads, then value heads, width]
        assert num_heads_q is not None
        others = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, others, others], 2)
    else:
        q, k, v = qkv.unbind(2)
    descales = (q_descale, k_descale, v_descale)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        *descales,
        window_size,
        attention_chunk,
        softcap,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Any = OPEN,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> KernelCall:
    _refuse(
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        seqused_q=seqused_q,
    )
    lengths, starts = packed_lengths(cu_seqlens_q, cu_seqlens_k, seqused_k)
    return KernelCall(
        *map(packed, (q, k, v)),
        scale=softmax_scale,
        is_causal=causal,
        window=window_of(window_size),
        softcap=softcap or 0.0,
        lengths=lengths,
        key_starts=starts,
        output=lambda result: packed(first(result)),
        returned=lambda out, lse: _packed_two(out, lse) if return_attn_probs else unpacked(out),
        needs_lse=return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = OPEN,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> KernelCall:
    _refuse(
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
    )
    return flash_attn_cache.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        return_softmax_lse=return_softmax_lse,
    )


def _refuse(**named: Any) -> None:
    refuse("flash-attn 3", **named)


def _packed_two(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    assert lse is not None
    return unpacked(out), lse.squeeze(0)
