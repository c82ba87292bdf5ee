"""torch's C++ fast paths of attention, written out as their single steps, so that their products can be deferred.

In evaluation ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` each call one fused operator. The functions
below do what aten/src/ATen/native/transformers (attention.cpp, transformer.cpp) does, with torch's own operators; on
CPU the results are bit-identical.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.policy import NativeNeed
from attnpatch.rows import autocast
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.nodes import InputNode
from attnpatch.rows.graph.operations import OpNode

SRC_MASK, KEY_PADDING, FULL_MASK = 0, 1, 2


class _Torch:
    """The module torch, except that ``has_torch_function`` always says no."""

    overrides = types.SimpleNamespace(has_torch_function=lambda _: False)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@functools.cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of one of torch's Python functions that runs under a mode as it would run without one.

    The original checks if a mode is active; if so, it passes itself to the mode as one call, or avoids its fast path.
    """
    changes = {"has_torch_function": lambda _: False, "torch": _Torch()}
    scope = {**function.__globals__, **{k: v for k, v in changes.items() if k in function.__globals__}}
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def goes_by_rows(query: torch.Tensor, num_heads: int, call: AttentionCall) -> bool:
    """True if a fast path is to be run as its single steps, so that its attention goes by rows."""
    if query.is_nested:
        return False
    if call.observer is not None:
        return True
    batch, q_len = query.shape[:2]
    size = batch * num_heads * q_len * q_len * query.element_size()
    if call.by_rows(q_len, NativeNeed(3 * size, size), query.device):
        return True
    call.counters.made(size)
    return False


def multihead(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed_dim: int, num_heads: int,
    qkv_weight: torch.Tensor, qkv_bias: torch.Tensor, proj_weight: torch.Tensor, proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None, need_weights: bool = True, average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``torch._native_multi_head_attention`` for self-attention; arguments and results are the operator's."""
    dtype = autocast.narrow_dtype(query.device)
    if dtype is not None:
        # Autocast casts the arguments of the fused operator, but does not see the operators inside it.
        tensors = (query, qkv_weight, qkv_bias, proj_weight, proj_bias, mask)
        query, qkv_weight, qkv_bias, proj_weight, proj_bias, mask = autocast.cast(
            tensors, query.device, dtype
        )
        with torch.autocast(query.device.type, enabled=False):
            return multihead(
                query, query, query, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
                need_weights, average_attn_weights, mask_type,
            )  # fmt: skip
    batch, length = query.shape[:2]
    packed = F.linear(query, qkv_weight)
    split = compat.transform_bias_rescale_qkv(packed, qkv_bias, num_heads)
    query, key, value = (part.reshape(batch * num_heads, length, -1) for part in split)
    scores = torch.bmm(query, key.transpose(2, 1)).view(batch, num_heads, length, length)
    weights = torch.softmax(scores, -1) if mask is None else masked_softmax(scores, mask, mask_type)
    context = torch.bmm(weights.view(batch * num_heads, length, length), value)
    context = context.view(batch, num_heads, length, -1).transpose(1, 2).reshape(batch * length, -1)
    out = torch.addmm(proj_bias, context, proj_weight.t()).view(batch, length, -1)
    if not need_weights:
        return out, None
    return out, weights.sum(1).div(num_heads) if average_attn_weights else weights


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor, mask_type: int | None) -> torch.Tensor:
    """``torch._masked_softmax`` over keys: a row without any key is zero, not NaN."""
    mask = mask.to(torch.bool)
    if mask.dim() == 2:
        mask = {SRC_MASK: mask[None, None], KEY_PADDING: mask[:, None, None]}.get(mask_type, mask)
    if not isinstance(scores, DeferredTensor) or scores.handle.is_computed:
        return _masked_softmax_rows(scores, mask)
    node = scores.handle.node
    place = InputNode.aligned(mask, node.dims)
    call = OpNode(_masked_softmax_rows, (node, place), {}, node.dims, node.dtype, node.device, node.dims[-1])
    # The operator's result is contiguous; it does not support meta tensors, so its layout is stated here.
    call.lies_by_rows = True
    return wrap(call, scores.handle.call)


def _masked_softmax_rows(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return compat.masked_softmax(scores, mask.expand(scores.shape).contiguous(), 3, FULL_MASK)


def encoder_layer(
    src: torch.Tensor, embed_dim: int, num_heads: int, qkv_weight: torch.Tensor, qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor, proj_bias: torch.Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: torch.Tensor, norm_bias_1: torch.Tensor, norm_weight_2: torch.Tensor, norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor, ffn_bias_1: torch.Tensor, ffn_weight_2: torch.Tensor, ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None, mask_type: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``; arguments and result are the operator's."""

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    x, _ = multihead(
        x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, False, mask_type
    )  # fmt: skip
    # This is done in place, since under autocast ``x`` has a narrower dtype than ``src`` and must keep it.
    x = x.add_(src)
    if not norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    hidden = norm(x, norm_weight_2, norm_bias_2) if norm_first else x
    hidden = compat.addmm_activation(
        ffn_bias_1, hidden.reshape(-1, embed_dim), ffn_weight_1.t(), use_gelu=use_gelu
    )
    x = torch.addmm(ffn_bias_2, hidden, ffn_weight_2.t()).view(src.shape).add_(x)
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)
