"""Finds tensors, deferred tensors and named values among the arguments of a torch call."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.deferred.tensor import DeferredTensor, site_of
from attnpatch.rows.graph.nodes import InputNode, map_structure


def first_deferred(args: Any, kwargs: dict[str, Any]) -> DeferredTensor:
    """The first deferred argument that belongs to the operation's own attention call (see ``site_of``)."""
    found = deferred_in(args, kwargs)
    site = site_of(found)
    return next(value for value in found if value.handle.call is site)


def deferred_in(args: Any, kwargs: dict[str, Any]) -> list[DeferredTensor]:
    return [value for value in tensors_in(args, kwargs) if isinstance(value, DeferredTensor)]


def tensors_in(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_structure(
        (args, kwargs), lambda value: found.append(value) if isinstance(value, torch.Tensor) else None
    )
    return found


def argument(args: Any, kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def positions_of(dims: Any, count: int) -> list[int] | None:
    """Dimensions as a list of numbers >= 0; ``None`` if they are not valid integers."""
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    if not all(isinstance(d, int) and not isinstance(d, bool) and -count <= d < count for d in dims):
        return None
    return [d % count for d in dims]


def read_whole(value: Any) -> Any:
    """A tensor as a node that every step reads whole; anything else as it is."""
    return InputNode(value, ((),) * value.dim()) if isinstance(value, torch.Tensor) else value
