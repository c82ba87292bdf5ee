"""Finds the tensors among arguments, and tells which of them share memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch


def is_plain(value: Any) -> bool:
    """True for a tensor that is not deferred."""
    return isinstance(value, torch.Tensor) and not hasattr(value, "handle")


def is_wide(tensor: torch.Tensor) -> bool:
    """True if a tensor has more than one dimension longer than 1."""
    count = 0
    for size in tensor.shape:
        count += size > 1
    return count > 1


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


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among arguments, also inside tuples, lists and dicts."""
    found: list[torch.Tensor] = []
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        _gather(value, 1, found)
    return found


def _gather(group: Any, depth: int, found: list[torch.Tensor]) -> None:
    for value in group.values() if isinstance(group, dict) else group:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif depth < 4 and isinstance(value, (tuple, list, dict)) and value:
            _gather(value, depth + 1, found)


class ByTensor:
    """A value for each tensor; the tensors are held weakly. Faster than torch's own weak dictionaries."""

    def __init__(self) -> None:
        # By id, since tensors do not compare as keys do: a reference to the tensor, and the value.
        self._values: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def __contains__(self, tensor: Any) -> bool:
        found = self._values.get(id(tensor))
        return found is not None and found[0]() is tensor

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        found = self._values[id(tensor)]
        if found[0]() is not tensor:
            raise KeyError(tensor)
        return found[1]

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> None:
        self._values[id(tensor)] = weakref.ref(tensor), value

    def get(self, tensor: Any, default: Any = None) -> Any:
        found = self._values.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else default

    def pop(self, tensor: torch.Tensor) -> None:
        self._values.pop(id(tensor), None)


def inputs_among(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors with two or more dimensions that a module is called with, each once."""
    found = (t for t in tensors_in((list(args), kwargs)) if t.is_floating_point() and t.dim() > 1)
    return list({id(tensor): tensor for tensor in found if is_plain(tensor)}.values())
