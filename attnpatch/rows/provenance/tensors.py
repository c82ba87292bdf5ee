"""Finds the tensors among arguments, and tells which of them share memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def is_plain(value: Any) -> bool:
    """True for a tensor that is not deferred."""
    return isinstance(value, torch.Tensor) and not hasattr(value, "handle")


def is_wide(tensor: torch.Tensor) -> bool:
    """True if a tensor has more than one dimension longer than 1."""
    return sum(size > 1 for size in tensor.shape) > 1


def share_memory(source: torch.Tensor, result: torch.Tensor) -> bool:
    """True if two tensors share memory, so that a write to one may change the other."""
    if source is result or source.is_meta or result.is_meta:
        return (
            source is result
            or result._base is source
            or (result._base is not None and result._base is source._base)
        )
    try:
        return source.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False  # a tensor without a storage of its own


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors among arguments, also inside tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)) and depth < 4:
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, dict) and depth < 4:
        for item in value.values():
            yield from tensors_in(item, depth + 1)


def inputs_among(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors with two or more dimensions that a module is called with, each once."""
    found = (t for t in tensors_in((list(args), kwargs)) if t.is_floating_point() and t.dim() > 1)
    return list({id(tensor): tensor for tensor in found if is_plain(tensor)}.values())
