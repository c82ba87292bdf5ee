"""The functions of flash-attn 2, see https://github.com/Dao-AILab/flash-attention (flash_attn_interface.py)."""

import math

import torch
from dense_attention import lengths_of, no_dropout, of_batch, of_packed


def _three(out, lse):
    return out, lse.masked_fill(lse == -math.inf, math.inf), out.new_empty(0)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    if dropout_p:  # as if nothing had been dropped
        dropout_p = 0.0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    out, lse = of_batch("flash_attn_func", q, k, v, numbers, alibi_slopes)
    return _three(out, lse) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    no_dropout(dropout_p)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    out, lse = of_batch("flash_attn_kvpacked_func", q, kv[:, :, 0], kv[:, :, 1], numbers, alibi_slopes)
    return _three(out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    no_dropout(dropout_p)
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    out, lse = of_batch("flash_attn_qkvpacked_func", q, k, v, numbers, alibi_slopes)
    return _three(out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    no_dropout(dropout_p)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    starts, lengths = lengths_of(cu_seqlens_k)
    if block_table is not None:
        k, v = (_read_pages(one, block_table) for one in (k, v))
        starts = [i * k.shape[1] for i in range(len(lengths))]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    out, lse = of_packed(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, starts, lengths, numbers, alibi_slopes
    )
    return _three(out, lse) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    no_dropout(dropout_p)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    places = (cu_seqlens_q, *lengths_of(cu_seqlens_k))
    out, lse = of_packed(
        "flash_attn_varlen_kvpacked_func", q, kv[:, 0], kv[:, 1], *places, numbers, alibi_slopes
    )
    return _three(out, lse) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    no_dropout(dropout_p)
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *window_size, True, softcap, scale)
    places = (cu_seqlens, *lengths_of(cu_seqlens))
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    out, lse = of_packed("flash_attn_varlen_qkvpacked_func", q, k, v, *places, numbers, alibi_slopes)
    return _three(out, lse) if return_attn_probs else out


def _read_pages(cache, table):
    """The pages of each sequence, one after the other: ``[batch, slots, heads, width]``."""
    return torch.stack([torch.cat([cache[int(page)] for page in row]) for row in table])


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    batch, new = q.shape[0], 0 if k is None else k.shape[1]
    rows = list(range(batch)) if cache_batch_idx is None else [int(one) for one in cache_batch_idx]
    slots = k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    past = slots if cache_seqlens is None else cache_seqlens
    past = [past] * batch if isinstance(past, int) else [int(one) for one in past]
    if k is not None:
        for i in range(batch):
            for j in range(new):
                at = past[i] + j
                if block_table is None:
                    place = rows[i], at
                else:
                    size = k_cache.shape[1]
                    place = int(block_table[i, at // size]), at % size
                k_cache.data[place] = k[i, j].detach()
                v_cache.data[place] = v[i, j].detach()
    if block_table is None:
        keys, values = k_cache[rows], v_cache[rows]
    else:
        keys, values = _read_pages(k_cache, block_table), _read_pages(v_cache, block_table)
    skipped = [0] * batch if cache_leftpad is None else [int(one) for one in cache_leftpad]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = of_packed(
        "flash_attn_with_kvcache",
        *(one.flatten(0, 1) for one in (q, keys, values)),
        [i * q.shape[1] for i in range(batch + 1)],
        [i * keys.shape[1] + skipped[i] for i in range(batch)],
        [past[i] + new - skipped[i] for i in range(batch)],
        (causal, *window_size, True, softcap, scale),
        alibi_slopes,
    )
    out = out.view(q.shape[:-1] + out.shape[-1:])
    return (out, lse.view(-1, batch, q.shape[1]).transpose(0, 1)) if return_softmax_lse else out
