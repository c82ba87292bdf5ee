"""Pointwise functions that read a table, or have a parameter for every head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import deferred_in
from attnpatch.rows.deferred.tensor import DeferredRows, wrap
from attnpatch.rows.graph.nodes import Call, Leaf, map_structure

# Which argument is pointwise, where it is not the first; every other tensor is a table, read whole.
_TABLES = {"bucketize": 0, "isin": 0, "searchsorted": 1}
# Every other tensor has an element for each place of dimension 1, or one for all.
_CHANNELS = ("prelu", "batch_norm")


def tabled(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    place = _TABLES[name]
    source = args[place] if len(args) > place else None
    tables = [*args[:place], *args[place + 1 :], *kwargs.values()]
    if not isinstance(source, DeferredRows) or deferred_in(tables, {}):
        return NotImplemented
    if name == "searchsorted" and (args[0].dim() != 1 or "sorter" in kwargs):
        return NotImplemented
    node = source.handle.node
    one = torch.ones([1] * len(node.dims), dtype=node.dtype, device=node.device)
    told = func(*args[:place], one, *args[place + 1 :], **kwargs)

    def read(value: Any) -> Any:
        return Leaf(value, ((),) * value.dim()) if isinstance(value, torch.Tensor) else value

    given = (*map(read, args[:place]), node, *map(read, args[place + 1 :]))
    call = Call(func, given, map_structure(kwargs, read), node.dims, told.dtype, node.device)
    return wrap(call, source.handle.call)


def of_channels(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    if not isinstance(source, DeferredRows) or deferred_in(args[1:], kwargs) or len(source.shape) < 2:
        return NotImplemented
    if name == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training", False)):
        return NotImplemented  # its statistics are of all rows
    node = source.handle.node
    count = node.shape[1]
    own = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
    if any(value.dim() > 1 or value.numel() not in (1, count) for value in own):
        return NotImplemented

    def part(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return Leaf(value, (node.dims[1] if value.numel() == count else (),) * value.dim())

    def first(value: Any) -> Any:
        return value.reshape(-1)[:1] if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        one = torch.ones([1] * len(node.dims), dtype=node.dtype, device=node.device)
        told = func(one, *map_structure(args[1:], first), **map_structure(kwargs, first))
    rest, kwargs = map_structure(args[1:], part), map_structure(kwargs, part)
    return wrap(Call(func, (node, *rest), kwargs, node.dims, told.dtype, node.device), source.handle.call)


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_TABLES, tabled),
    **dict.fromkeys(_CHANNELS, of_channels),
}
