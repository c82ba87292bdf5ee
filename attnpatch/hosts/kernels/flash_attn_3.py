"""flash-attn 3 (the module ``flash_attn_interface``): what its functions' arguments mean.

As in version 2, but in another order, without dropout and ALiBi. Quantised tensors (with ``descale``) are refused.
"""

from __future__ import annotations

from typing import Any

from attnpatch.hosts.kernels import flash_attn_cache
from attnpatch.hosts.kernels.reading import (
    call_in_batches,
    call_in_packs,
    only,
    packed_lengths,
    pair,
    reads,
    refuse,
    window_of,
)
from attnpatch.rows.kernels.call import KernelCall

_DESCALES = "q_descale=None, k_descale=None, v_descale=None"
_WINDOW = "window_size=(-1, -1), attention_chunk=0, softcap=0.0"
_OPTIONS = (
    f"softmax_scale=None, causal=False, qv=None, {_DESCALES}, {_WINDOW}, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False"
)
_QUANTISED = "q_descale k_descale v_descale attention_chunk"


@reads(f"q, k, v, {_OPTIONS}")
def flash_attn_func(given: Any) -> KernelCall:
    return call_in_batches((given.q, given.k, given.v), **_fields(given, f"qv {_QUANTISED}"))


@reads(
    f"qkv, softmax_scale=None, causal=False, {_DESCALES}, {_WINDOW}, deterministic=False, num_heads_q=None, "
    "sm_margin=0, return_attn_probs=False"
)
def flash_attn_qkvpacked_func(given: Any) -> KernelCall:
    qkv, heads = given.qkv, given.num_heads_q
    if qkv.dim() == 4:  # [batch, length, query heads, then key heads, then value heads, width]
        assert heads is not None
        others = (qkv.shape[2] - heads) // 2
        tensors = qkv.split([heads, others, others], 2)
    else:
        tensors = qkv.unbind(2)
    return call_in_batches(tensors, **_fields(given, _QUANTISED))


@reads(
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
    + _OPTIONS
)
def flash_attn_varlen_func(given: Any) -> KernelCall:
    fields = _fields(given, f"qv {_QUANTISED} seqused_q")
    lengths, starts = packed_lengths(given.cu_seqlens_q, given.cu_seqlens_k, given.seqused_k)
    return call_in_packs((given.q, given.k, given.v), lengths=lengths, key_starts=starts, **fields)


@reads(
    "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    f"max_seqlen_q=None, rotary_seqlens=None, {_DESCALES}, softmax_scale=None, causal=False, {_WINDOW}, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
    "return_softmax_lse=False"
)
def flash_attn_with_kvcache(given: Any) -> KernelCall:
    refuse("flash-attn 3", given, f"qv {_QUANTISED} cu_seqlens_q cu_seqlens_k_new rotary_seqlens")
    return flash_attn_cache.call_of(given, given.page_table, None)


def _fields(given: Any, refused: str) -> dict[str, Any]:
    refuse("flash-attn 3", given, refused)
    return {
        "scale": given.softmax_scale,
        "is_causal": given.causal,
        "window": window_of(given.window_size),
        "softcap": given.softcap or 0.0,
        "returned": pair if given.return_attn_probs else only,
        "needs_lse": given.return_attn_probs,
    }
