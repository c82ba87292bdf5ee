"""The functions of xFormers, see https://github.com/facebookresearch/xformers (ops/fmha/__init__.py)."""

import torch
from dense_attention import no_dropout, of_batch

from . import attn_bias
from .attn_bias import BlockDiagonalMask, LowerTriangularMask

__all__ = ["BlockDiagonalMask", "LowerTriangularMask", "attn_bias", "memory_efficient_attention"]


def _attend(query, key, value, bias, p, scale, output_dtype):
    no_dropout(p)
    q, k, v = query, key, value
    if q.dim() == 3:
        q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
    elif q.dim() == 5:
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    if bias is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if not isinstance(bias, torch.Tensor):
            bias = bias.materialize(shape)
        elif query.dim() == 3:
            bias = bias[:, None]
        elif bias.dim() == 5:
            bias = bias.flatten(1, 2)
        bias = bias.expand(shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    numbers = (False, -1, -1, False, 0.0, scale)
    out, lse = of_batch("memory_efficient_attention", q, k, v, numbers, bias=bias)
    out = out.reshape(*query.shape[:-1], -1)
    return out if output_dtype is None else out.to(output_dtype), lse


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    out, lse = _attend(query, key, value, attn_bias, p, scale, output_dtype)
    return out, lse.unflatten(1, query.shape[2:4]) if query.dim() == 5 else lse


def memory_efficient_attention_partial(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)
