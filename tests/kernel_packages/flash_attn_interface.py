"""A stand-in for flash-attn 3: the same functions, signatures, layouts and results, computed densely in float64."""

from dense_attention import lengths_of, of_batch, of_packed
from flash_attn.flash_attn_interface import flash_attn_with_kvcache as _with_kvcache


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = of_batch("flash_attn_func", q, k, v, (causal, *window_size, True, softcap, scale))
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    if qkv.dim() == 5:
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    else:
        others = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:-others], qkv[:, :, -others:]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = of_batch("flash_attn_qkvpacked_func", q, k, v, (causal, *window_size, True, softcap, scale))
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    starts, lengths = lengths_of(cu_seqlens_k)
    lengths = lengths if seqused_k is None else seqused_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    out, lse = of_packed("flash_attn_varlen_func", q, k, v, cu_seqlens_q, starts, lengths, numbers)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    native = getattr(_with_kvcache, "__wrapped__", _with_kvcache)
    return native(
        q,
        k_cache,
        v_cache,
        k,
        v,
        None,
        None,
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
