"""The functions of SageAttention, see https://github.com/thu-ml/SageAttention (sageattention/core.py).

Query and key are rounded to 8 bits by blocks of tokens, and values to float16 or float8, as the package does it.
"""

import torch
from dense_attention import calls, lengths_of, of_batch, of_packed

quantises = {"on": True}


def _to_int8(tensor, block):
    """``[batch, length, heads, width]``, rounded to 8 bits with one factor for each block of tokens and head."""
    if not quantises["on"]:
        return tensor
    pieces = []
    for piece in tensor.float().split(block, 1):
        factor = piece.abs().amax((1, 3), keepdim=True).clamp(min=1e-9) / 127
        pieces.append((piece / factor).round() * factor)
    return torch.cat(pieces, 1).to(tensor.dtype)


def _smooth(k):
    return k - k.mean(1, keepdim=True) if quantises["on"] else k


def _narrow(v, dtype):
    return v.to(dtype).to(v.dtype) if quantises["on"] else v


def _attend(name, q, k, v, layout, causal, scale, return_lse, mask=None, values=torch.float16):
    if layout == "HND":
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    numbers = (causal, -1, -1, False, 0.0, scale)
    _, lse = of_batch(name, q, k, v, numbers, bias=mask)
    out, _ = of_batch(
        name, _to_int8(q, 128), _to_int8(_smooth(k), 64), _narrow(v, values), numbers, bias=mask
    )
    calls.pop()
    out = out.transpose(1, 2) if layout == "HND" else out
    return (out, lse) if return_lse else out


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    return sageattn_qk_int8_pv_fp16_cuda(
        q, k, v, tensor_layout, is_causal, sm_scale=sm_scale, return_lse=return_lse
    )


def sageattn_qk_int8_pv_fp16_triton(
    q,
    k,
    v,
    tensor_layout="HND",
    quantization_backend="triton",
    is_causal=False,
    attn_mask=None,
    sm_scale=None,
    smooth_k=True,
    return_lse=False,
    **kwargs,
):
    name = "sageattn_qk_int8_pv_fp16_triton"
    return _attend(name, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask)


def sageattn_qk_int8_pv_fp16_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
    **kwargs,
):
    name = "sageattn_qk_int8_pv_fp16_cuda"
    return _attend(name, q, k, v, tensor_layout, is_causal, sm_scale, return_lse)


def sageattn_qk_int8_pv_fp8_cuda(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp16",
    smooth_k=True,
    smooth_v=False,
    return_lse=False,
    **kwargs,
):
    name = "sageattn_qk_int8_pv_fp8_cuda"
    return _attend(name, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, values=torch.float8_e4m3fn)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q,
    k,
    v,
    tensor_layout="HND",
    is_causal=False,
    qk_quant_gran="per_thread",
    sm_scale=None,
    pv_accum_dtype="fp32+fp32",
    smooth_k=True,
    return_lse=False,
    **kwargs,
):
    name = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    return _attend(name, q, k, v, tensor_layout, is_causal, sm_scale, return_lse, values=torch.float8_e4m3fn)


def sageattn_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    is_causal=False,
    sm_scale=None,
    smooth_k=True,
    **kwargs,
):
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    q, k = _to_int8(q[None], 128)[0], _to_int8(_smooth(k[None]), 64)[0]
    numbers = (is_causal, -1, -1, False, 0.0, scale)
    return of_packed(
        "sageattn_varlen",
        q,
        k,
        _narrow(v, torch.float16),
        cu_seqlens_q,
        *lengths_of(cu_seqlens_k),
        numbers,
    )[0]
