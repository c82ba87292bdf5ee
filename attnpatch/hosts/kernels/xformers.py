"""xFormers: what the arguments of ``memory_efficient_attention`` mean.

Tensors are ``[batch, length, heads, width]``, ``[batch, length, width]`` (one head), or ``[batch, length, groups, heads
per group, width]``, where keys are usually expanded over the heads of a group.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import by_batch, first
from attnpatch.hosts.kernels.xformers_biases import read_bias
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> KernelCall:
    return _call(query, key, value, attn_bias, p, scale, output_dtype, False)


def memory_efficient_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> KernelCall:
    return _call(query, key, value, attn_bias, p, scale, output_dtype, False)


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> KernelCall:
    return _call(query, key, value, attn_bias, p, scale, output_dtype, True)


def memory_efficient_attention_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> KernelCall:
    raise CannotRead("it attends to some of the keys only; the model merges several such results")


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Any,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
    has_lse: bool,
) -> KernelCall:
    layout = _Layout(query, key, value)
    fields = read_bias(bias, *layout.tensors, layout.bias)
    dtype = output_dtype or query.dtype

    def returned(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
        result = layout.given(out).to(dtype)
        return (result, lse if lse is None else layout.given_lse(lse)) if has_lse else result

    return KernelCall(
        **fields,
        scale=scale,
        dropout_p=p,
        output=lambda result: layout.by_heads(first(result)),
        returned=returned,
        needs_lse=has_lse,
    )


class _Layout:
    """The layout of a call's tensors, and the same tensors as ``[batch, heads, length, width]``."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.dim = query.dim()
        if self.dim not in (3, 4, 5):
            raise CannotRead(f"memory_efficient_attention is given a query of shape {list(query.shape)}")
        self.groups = query.shape[2:-1]
        if self.dim == 5 and _is_shared(key) and _is_shared(value):
            key, value = key[:, :, :, 0], value[:, :, :, 0]
        self.tensors = self.by_heads(query), _by_heads(key), _by_heads(value)

    def by_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return _by_heads(tensor)

    def given(self, out: torch.Tensor) -> torch.Tensor:
        """A result in the layout of the query."""
        return (
            by_batch(out).unflatten(2, self.groups)
            if self.dim == 5
            else _without_head(by_batch(out), self.dim)
        )

    def given_lse(self, lse: torch.Tensor) -> torch.Tensor:
        return lse.unflatten(1, self.groups) if self.dim == 5 else lse

    def bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A bias as ``[batch or 1, heads or 1, queries or 1, keys]``."""
        if tensor.dim() == 5:
            return tensor.expand(-1, *self.groups, -1, -1).flatten(1, 2)
        return tensor.unsqueeze(1) if self.dim == 3 and tensor.dim() == 3 else tensor


def _by_heads(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return by_batch(tensor.flatten(2, 3) if tensor.dim() == 5 else tensor)


def _without_head(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.squeeze(2) if dim == 3 else tensor


def _is_shared(keys: torch.Tensor) -> bool:
    """True if all heads of a group have the same keys."""
    return keys.shape[3] == 1 or keys.stride(3) == 0
