"""``torch.nn.attention.varlen.varlen_attn``: packed sequences, as flash-attn 2 takes them."""

from __future__ import annotations

from typing import Any

from attnpatch.hosts.kernels.reading import (
    call_in_packs,
    lengths_of,
    numbers_of,
    only,
    packed_lengths,
    paged,
    pair,
    reads,
    window_of,
)
from attnpatch.rows.kernels.call import KernelCall


@reads(
    "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), "
    "enable_gqa=False, seqused_k=None, block_table=None, num_splits=None"
)
def varlen_attn(given: Any) -> KernelCall:
    key, value = given.key, given.value
    if given.block_table is not None:
        lengths = lengths_of(given.cu_seq_q), numbers_of(given.seqused_k)
        key, value, starts = paged(key, value, given.block_table)
    else:
        lengths, starts = packed_lengths(given.cu_seq_q, given.cu_seq_k, given.seqused_k)
    has_lse = given.return_aux is not None and given.return_aux.lse
    return call_in_packs(
        (given.query, key, value),
        pair if has_lse else only,
        scale=given.scale,
        window=window_of(given.window_size),
        lengths=lengths,
        key_starts=starts,
        needs_lse=has_lse,
    )
