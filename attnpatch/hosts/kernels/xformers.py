"""xFormers: what the arguments of ``memory_efficient_attention`` mean.

Tensors are ``[batch, length, heads, width]``, ``[batch, length, width]`` (one head), or ``[batch, length, groups, heads
per group, width]``, where keys are usually expanded over the heads of a group.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import by_batch, first, reads
from attnpatch.hosts.kernels.xformers_biases import read_bias
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

_PARAMETERS = "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"


@reads(_PARAMETERS)
def memory_efficient_attention(given: Any) -> KernelCall:
    return _call(given, has_lse=False)


@reads(_PARAMETERS)
def memory_efficient_attention_forward(given: Any) -> KernelCall:
    return _call(given, has_lse=False)


@reads(_PARAMETERS)
def memory_efficient_attention_forward_requires_grad(given: Any) -> KernelCall:
    return _call(given, has_lse=True)


@reads(_PARAMETERS)
def memory_efficient_attention_partial(given: Any) -> KernelCall:
    raise CannotRead("it attends to some of the keys only; the model merges several such results")


def _call(given: Any, has_lse: bool) -> KernelCall:
    layout = _Layout(given.query, given.key, given.value)
    fields = read_bias(given.attn_bias, *layout.tensors, layout.bias)
    dtype = given.output_dtype or given.query.dtype

    def returned(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
        result = layout.given(out).to(dtype)
        return (result, lse if lse is None else layout.given_lse(lse)) if has_lse else result

    return KernelCall(
        **fields,
        scale=given.scale,
        dropout_p=given.p,
        output=lambda result: _by_heads(first(result)),
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
        self.tensors = _by_heads(query), _by_heads(key), _by_heads(value)

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
