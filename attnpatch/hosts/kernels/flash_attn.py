"""flash-attn (versions 2, 3 and 4): what its functions' arguments mean.

Tensors are ``[batch, length, heads, width]``; packed ones ``[total, heads, width]`` with cumulative lengths. With
``causal`` and windows, the last query is at the place of the last key (flash-attn since 2.1).
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import by_batch, first, window_of
from attnpatch.rows.kernels.call import KernelCall


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
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
        softcap=softcap or 0.0,
        slopes=alibi_slopes,
        dropout_p=dropout_p,
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: (by_batch(out), lse, None) if return_attn_probs else by_batch(out),
        needs_lse=return_attn_probs,
    )
