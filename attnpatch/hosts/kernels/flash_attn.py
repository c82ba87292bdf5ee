"""flash-attn 2: what its functions' arguments mean.

Tensors are ``[batch, length, heads, width]``; packed ones ``[total, heads, width]`` with cumulative lengths. With
``causal`` and windows, the last query is at the place of the last key (flash-attn since 2.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnpatch.hosts.kernels.reading import (
    call_in_batches,
    call_in_packs,
    lengths_of,
    only,
    paged,
    reads,
    window_of,
)
from attnpatch.rows.kernels.call import KernelCall

_OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"


@reads(f"q, k, v, {_OPTIONS}")
def flash_attn_func(given: Any) -> KernelCall:
    return call_in_batches((given.q, given.k, given.v), **_fields(given))


@reads(f"q, kv, {_OPTIONS}")
def flash_attn_kvpacked_func(given: Any) -> KernelCall:
    return call_in_batches((given.q, *given.kv.unbind(2)), **_fields(given))


@reads(f"qkv, {_OPTIONS}")
def flash_attn_qkvpacked_func(given: Any) -> KernelCall:
    return call_in_batches(given.qkv.unbind(2), **_fields(given))


@reads(f"q, k, v, {_LENGTHS}, {_OPTIONS}, block_table=None")
def flash_attn_varlen_func(given: Any) -> KernelCall:
    k, v, starts = given.k, given.v, None
    if given.block_table is not None:
        k, v, starts = paged(k, v, given.block_table)
    return _packed((given.q, k, v), given, given.cu_seqlens_q, given.cu_seqlens_k, starts)


@reads(f"q, kv, {_LENGTHS}, {_OPTIONS}")
def flash_attn_varlen_kvpacked_func(given: Any) -> KernelCall:
    return _packed((given.q, *given.kv.unbind(1)), given, given.cu_seqlens_q, given.cu_seqlens_k)


@reads(f"qkv, cu_seqlens, max_seqlen, {_OPTIONS}")
def flash_attn_varlen_qkvpacked_func(given: Any) -> KernelCall:
    return _packed(given.qkv.unbind(1), given, given.cu_seqlens, given.cu_seqlens)


def _packed(tensors: Any, given: Any, of_queries: Any, of_keys: Any, key_starts: Any = None) -> KernelCall:
    lengths = lengths_of(of_queries), lengths_of(of_keys)
    return call_in_packs(tensors, lengths=lengths, key_starts=key_starts, **_fields(given))


def _fields(given: Any) -> dict[str, Any]:
    return {
        "scale": given.softmax_scale,
        "is_causal": given.causal,
        "window": window_of(given.window_size),
        "softcap": max(given.softcap or 0.0, 0.0),
        "slopes": given.alibi_slopes,
        "dropout_p": given.dropout_p,
        "returned": _three if given.return_attn_probs else only,
        "needs_lse": given.return_attn_probs,
    }


def _three(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """The result, the logsumexp (infinite in a row that sees no key), and the dropped weights, of which there are none."""
    assert lse is not None
    return out, lse.masked_fill(lse == -math.inf, math.inf), out.new_empty(0)
