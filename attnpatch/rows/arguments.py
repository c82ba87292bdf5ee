"""Finds tensors, deferred tensors and named values among the arguments of a torch call."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.deferred.tensor import DeferredTensor, site_of
from attnpatch.rows.graph.nodes import map_structure


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
