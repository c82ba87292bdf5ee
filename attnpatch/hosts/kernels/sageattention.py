"""SageAttention: what its functions' arguments mean.

It quantises query, key and value, so its results are checked with a larger tolerance. Its causal mask is for as many
queries as keys only.
"""

from __future__ import annotations

from typing import Any

from attnpatch.hosts.kernels.reading import (
    call_in_batches,
    call_in_packs,
    first,
    lengths_of,
    only,
    pair,
    reads,
)
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

# The largest error of a row as a share of its largest value. With 8 bits (query and key in int8, value in float8) up to
# 0.08 in the tests' stand-in, which does not round probabilities. With 4 bits it was not measured.
TOLERANCE, TOLERANCE_4_BITS = 0.15, 0.4

_CUDA = 'q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None'


@reads('q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs')
def sageattn(given: Any) -> KernelCall:
    return _call(given)


@reads(
    'q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False, attn_mask=None, sm_scale=None, '
    "smooth_k=True, return_lse=False, **kwargs"
)
def sageattn_qk_int8_pv_fp16_triton(given: Any) -> KernelCall:
    return _call(given, mask=given.attn_mask)


@reads(f'{_CUDA}, pv_accum_dtype="fp32", smooth_k=True, smooth_v=False, return_lse=False, **kwargs')
def sageattn_qk_int8_pv_fp16_cuda(given: Any) -> KernelCall:
    return _call(given)


@reads(f'{_CUDA}, pv_accum_dtype="fp32+fp16", smooth_k=True, smooth_v=False, return_lse=False, **kwargs')
def sageattn_qk_int8_pv_fp8_cuda(given: Any) -> KernelCall:
    return _call(given)


@reads(f'{_CUDA}, pv_accum_dtype="fp32+fp32", smooth_k=True, return_lse=False, **kwargs')
def sageattn_qk_int8_pv_fp8_cuda_sm90(given: Any) -> KernelCall:
    return _call(given)


@reads(
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True, "
    "**kwargs"
)
def sageattn_varlen(given: Any) -> KernelCall:
    lengths = lengths_of(given.cu_seqlens_q), lengths_of(given.cu_seqlens_k)
    _check_causal(given.is_causal, lengths[0] == lengths[1])
    fields = {"scale": given.sm_scale, "is_causal": given.is_causal, "lengths": lengths}
    return call_in_packs((given.q, given.k, given.v), only, tolerance=TOLERANCE, **fields)


@reads("q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs")
def sageattn3_blackwell(given: Any) -> KernelCall:
    # The package ignores attn_mask.
    q, k = given.q, given.k
    _check_causal(given.is_causal, q.shape[-2] == k.shape[-2])
    return KernelCall(q, k, given.v, is_causal=given.is_causal, output=first, tolerance=TOLERANCE_4_BITS)


def _call(given: Any, mask: Any = None) -> KernelCall:
    layout, tensors = given.tensor_layout, (given.q, given.k, given.v)
    if layout not in ("HND", "NHD"):
        raise CannotRead(f"sageattn is given tensor_layout={layout!r}, which is neither 'HND' nor 'NHD'")
    length = 1 if layout == "NHD" else 2
    _check_causal(given.is_causal, given.q.shape[length] == given.k.shape[length])
    returned = pair if given.return_lse else only
    fields = {
        "scale": given.sm_scale,
        "is_causal": given.is_causal,
        "mask": mask,
        "needs_lse": given.return_lse,
        "tolerance": TOLERANCE,
    }
    if layout == "NHD":
        return call_in_batches(tensors, returned, **fields)
    return KernelCall(*tensors, output=first, returned=returned, **fields)


def _check_causal(is_causal: bool, is_square: bool) -> None:
    if is_causal and not is_square:
        raise CannotRead("SageAttention's causal mask is defined for as many queries as keys only")
