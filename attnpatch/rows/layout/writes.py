"""Handlers of functions that write to a part of the scores, in place or to a copy (see ``assignment.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument
from attnpatch.rows.creation.row_masks import ConstantNode
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.layout.assignment import written
from attnpatch.rows.op_table import op, write


@write("__setitem__")
def setitem(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return written(*args) if len(args) == 3 and isinstance(args[0], DeferredTensor) else NotImplemented


@op("index_put")
def index_put(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    indices, values = argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "values")
    if not isinstance(args[0], DeferredTensor) or not isinstance(indices, (tuple, list)):
        return NotImplemented
    accumulate = argument(args, kwargs, 3, "accumulate", False)
    place = tuple(slice(None) if item is None else item for item in indices)
    return written(args[0], place, values, "index_put" if accumulate else None)


@op("index_fill", "index_copy", "index_add")
def index_along(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``index_fill``, ``index_copy`` and ``index_add``: indices of one dimension."""
    target, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    value = argument(args, kwargs, 3, "value" if "fill" in name else "source")
    if (
        not isinstance(target, DeferredTensor)
        or not isinstance(dim, int)
        or not isinstance(index, torch.Tensor)
    ):
        return NotImplemented
    if index.dim() > 1 or index.dtype not in (torch.int64, torch.int32) or kwargs.get("alpha", 1) != 1:
        return NotImplemented
    if isinstance(index, DeferredTensor) or (isinstance(value, torch.Tensor) and value.dtype != target.dtype):
        return NotImplemented
    if "fill" not in name and value.shape != (*_other(target, dim, index.numel()),):
        return NotImplemented
    place = [slice(None)] * len(target.handle.node.dims)
    place[dim] = index.reshape(-1)
    return written(target, tuple(place), value, accumulate="index_add" if name == "index_add" else None)


def _other(target: DeferredTensor, dim: int, count: int) -> list[int]:
    shape = list(target.handle.node.shape)
    shape[dim] = count
    return shape


@op("select_scatter", "slice_scatter")
def part_scatter(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``select_scatter`` and ``slice_scatter``: a copy in which one index or a slice of a dimension is replaced."""
    target, value = args[0], argument(args, kwargs, 1, "src")
    if not isinstance(target, DeferredTensor) or not isinstance(value, torch.Tensor):
        return NotImplemented
    if name == "select_scatter":
        dim, item = argument(args, kwargs, 2, "dim"), argument(args, kwargs, 3, "index")
    else:
        dim = argument(args, kwargs, 2, "dim", 0)
        item = slice(*(argument(args, kwargs, 3 + i, key) for i, key in enumerate(("start", "end", "step"))))
    place = [slice(None)] * len(target.handle.node.dims)
    place[dim] = item
    expected = torch.empty((), device="meta").expand(target.shape)[tuple(place)].shape
    return written(target, tuple(place), value) if value.shape == expected else NotImplemented


def diagonal_places(
    shape: torch.Size, offset: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row indices and the column indices of a diagonal of the last two dimensions, each ``[count]`` int64."""
    count = max(0, min(shape[-2] + min(offset, 0), shape[-1] - max(offset, 0)))
    places = torch.arange(count, device=device)
    return places - min(offset, 0), places + max(offset, 0)


@op("diagonal_scatter")
def diagonal_scatter(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    target, value = args[0], argument(args, kwargs, 1, "src")
    offset = argument(args, kwargs, 2, "offset", 0)
    first, second = argument(args, kwargs, 3, "dim1", 0), argument(args, kwargs, 4, "dim2", 1)
    if not isinstance(target, DeferredTensor) or not isinstance(value, torch.Tensor):
        return NotImplemented
    count = len(target.handle.node.dims)
    if (first % count, second % count) != (count - 2, count - 1):
        return NotImplemented
    places = diagonal_places(target.shape, offset, target.device)
    if value.shape != (*target.shape[:-2], len(places[0])):
        return NotImplemented
    return written(target, (..., *places), value)


@write("fill_", "zero_", "copy_")
def fill(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``fill_``, ``zero_`` and ``copy_``, which replace the whole tensor."""
    value = 0 if name == "zero_" else argument(args, kwargs, 1, "src" if name == "copy_" else "value")
    if not isinstance(args[0], DeferredTensor) or (name == "copy_" and not isinstance(value, torch.Tensor)):
        return NotImplemented
    if isinstance(value, (bool, int, float)):
        node = args[0].handle.node
        return wrap(ConstantNode(value, node.dims, node.dtype, node.device), args[0].handle.call)
    return written(args[0], ..., value)


@write("fill_diagonal_")
def fill_diagonal(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    target, value = args[0], argument(args, kwargs, 1, "fill_value")
    if len(target.shape) != 2 or argument(args, kwargs, 2, "wrap", False):
        return NotImplemented
    return written(target, diagonal_places(target.shape, 0, target.device), value)
