"""``torch.nn.attention.varlen.varlen_attn``: packed sequences, as flash-attn 2 takes them."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import (
    first,
    lengths_of,
    numbers_of,
    packed,
    packed_lengths,
    pages,
    unpacked,
    window_of,
)
from attnpatch.rows.kernels.call import KernelCall


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> KernelCall:
    if block_table is not None:
        assert seqused_k is not None
        key, value = pages(key, block_table), pages(value, block_table)
        lengths = lengths_of(cu_seq_q), numbers_of(seqused_k)
        starts: tuple[int, ...] | None = tuple(i * key.shape[1] for i in range(len(key)))
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    else:
        assert cu_seq_k is not None
        lengths, starts = packed_lengths(cu_seq_q, cu_seq_k, seqused_k)
    has_lse = return_aux is not None and return_aux.lse
    return KernelCall(
        *map(packed, (query, key, value)),
        scale=scale,
        window=window_of(window_size),
        lengths=lengths,
        key_starts=starts,
        output=lambda result: packed(first(result)),
        returned=lambda out, lse: (unpacked(out), lse.squeeze(0)) if has_lse else unpacked(out),
        needs_lse=has_lse,
    )
