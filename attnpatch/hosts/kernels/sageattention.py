"""SageAttention: what its functions' arguments mean.

It quantises query, key and value, so its results are checked with a larger tolerance. Its causal mask is for as many
queries as keys only.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import by_batch, first, lengths_of, packed, unpacked
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

# The largest error of a row as a share of its largest value. With 8 bits (query and key in int8, value in float8) up to
# 0.08 in the tests' stand-in, which does not round probabilities. With 4 bits it was not measured.
TOLERANCE, TOLERANCE_4_BITS = 0.15, 0.4


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> KernelCall:
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp16_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> KernelCall:
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask)


def sageattn_qk_int8_pv_fp16_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> KernelCall:
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp8_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> KernelCall:
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> KernelCall:
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> KernelCall:
    lengths = lengths_of(cu_seqlens_q), lengths_of(cu_seqlens_k)
    _check_causal(is_causal, lengths[0] == lengths[1])
    return KernelCall(
        *map(packed, (q, k, v)),
        scale=sm_scale,
        is_causal=is_causal,
        lengths=lengths,
        output=lambda result: packed(first(result)),
        returned=lambda out, lse: unpacked(out),
        tolerance=TOLERANCE,
    )


def sageattn3_blackwell(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    **kwargs: Any,
) -> KernelCall:
    # The package ignores attn_mask.
    _check_causal(is_causal, q.shape[-2] == k.shape[-2])
    return KernelCall(q, k, v, is_causal=is_causal, output=first, tolerance=TOLERANCE_4_BITS)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    is_causal: bool,
    scale: float | None,
    has_lse: bool,
    mask: torch.Tensor | None = None,
) -> KernelCall:
    if layout not in ("HND", "NHD"):
        raise CannotRead(f"sageattn is given tensor_layout={layout!r}, which is neither 'HND' nor 'NHD'")
    swap = by_batch if layout == "NHD" else lambda tensor: tensor
    q, k, v = swap(q), swap(k), swap(v)
    _check_causal(is_causal, q.shape[-2] == k.shape[-2])
    return KernelCall(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        mask=mask,
        output=lambda result: swap(first(result)),
        returned=lambda out, lse: (swap(out), lse) if has_lse else swap(out),
        needs_lse=has_lse,
        tolerance=TOLERANCE,
    )


def _check_causal(is_causal: bool, is_square: bool) -> None:
    if is_causal and not is_square:
        raise CannotRead("SageAttention's causal mask is defined for as many queries as keys only")
