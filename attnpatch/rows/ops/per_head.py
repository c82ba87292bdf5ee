"""Handlers of pointwise functions that read a table, or have a parameter per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument, deferred_in, read_whole
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import fresh
from attnpatch.rows.graph.nodes import InputNode, map_structure
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import op
from attnpatch.rows.ops.pointwise import probe

# For each function the position of its pointwise argument; all its other tensors are tables, which are read whole.
_TABLES = {"bucketize": 0, "isin": 0, "searchsorted": 1}
# Functions whose other tensors have one element per index of dimension 1, or a single element.
_CHANNELS = ("prelu", "batch_norm")


@op(*_TABLES)
def tabled(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    place = _TABLES[name]
    source = args[place] if len(args) > place else None
    tables = [*args[:place], *args[place + 1 :], *kwargs.values()]
    if not isinstance(source, DeferredTensor) or deferred_in(tables, {}):
        return NotImplemented
    if name == "searchsorted" and (args[0].dim() != 1 or "sorter" in kwargs):
        return NotImplemented
    node = source.handle.node
    one = torch.ones([1] * len(node.dims), dtype=node.dtype, device=node.device)
    told = func(*args[:place], one, *args[place + 1 :], **kwargs)
    given = (*map(read_whole, args[:place]), node, *map(read_whole, args[place + 1 :]))
    call = OpNode(func, given, map_structure(kwargs, read_whole), node.dims, told.dtype, node.device)
    return wrap(call, source.handle.call)


@op(*_CHANNELS)
def of_channels(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    if not isinstance(source, DeferredTensor) or deferred_in(args[1:], kwargs) or len(source.shape) < 2:
        return NotImplemented
    if name == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training", False)):
        return NotImplemented  # its statistics need all rows
    node = source.handle.node
    count = node.shape[1]
    own = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
    if any(value.dim() > 1 or value.numel() not in (1, count) for value in own):
        return NotImplemented

    def part(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return InputNode(value, (node.dims[1] if value.numel() == count else (),) * value.dim())

    def first(value: Any) -> Any:
        return value.reshape(-1)[:1] if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        one = torch.ones([1] * len(node.dims), dtype=node.dtype, device=node.device)
        told = func(one, *map_structure(args[1:], first), **map_structure(kwargs, first))
    rest, kwargs = map_structure(args[1:], part), map_structure(kwargs, part)
    return wrap(OpNode(func, (node, *rest), kwargs, node.dims, told.dtype, node.device), source.handle.call)


@op("conv1d", "conv2d", "conv3d")
def pointwise_convolution(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A convolution with kernel size 1, which mixes only heads (channels): talking heads."""
    source = args[0]
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    if (
        not isinstance(source, DeferredTensor)
        or isinstance(weight, DeferredTensor)
        or isinstance(bias, DeferredTensor)
    ):
        return NotImplemented
    node = source.handle.node
    if weight.dim() != len(node.dims) or any(size != 1 for size in weight.shape[2:]):
        return NotImplemented
    stride, padding = argument(args, kwargs, 3, "stride", 1), argument(args, kwargs, 4, "padding", 0)
    if any(step != 1 for step in _each(stride)) or any(
        edge not in (0, "valid", "same") for edge in _each(padding)
    ):
        return NotImplemented
    mixed = fresh([weight.shape[0]])
    dims = (node.dims[0], *mixed, *node.dims[2:])
    dtype = probe(func, (source, weight), {}).dtype
    leaf = {"weight": read_whole(weight), "bias": read_whole(bias)}
    rest = {"stride": stride, "padding": padding, "dilation": argument(args, kwargs, 5, "dilation", 1)}
    rest["groups"] = argument(args, kwargs, 6, "groups", 1)
    call = OpNode(func, (node,), {**leaf, **rest}, dims, dtype, node.device, (*node.dims[1], *mixed[0]))
    return wrap(call, source.handle.call)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
