"""Handlers of functions that only move or select elements: views, transposes, slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument, positions_of
from attnpatch.rows.deferred import memory_layout, sharing, views
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import Dim, Dims, fresh, regroup, size_of
from attnpatch.rows.graph.nodes import Node, ViewNode
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout import relative_shift
from attnpatch.rows.op_table import op

# Functions that use only the shape of their second argument, each with the function that takes that shape.
LIKE = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape"}

Native = tuple[Callable[..., Any], Any, dict[str, Any]]


def _or_copy(source: DeferredTensor, node: Node | None, native: Native) -> Any:
    """The result of a function that returns its operand, a view or a copy of it, depending on the strides."""
    func, args, kwargs = native
    own = source.handle.node
    result = memory_layout.applied(own, func, args, kwargs)
    if node is None or result is None:
        return NotImplemented
    if result is memory_layout.shadow(own):
        return source
    if memory_layout.is_view(result, own):
        return views.view(source, node, native)
    return wrap(sharing.of_function(node, own, native), source.handle.call)


def _sizes(args: Any, kwargs: dict[str, Any], name: str) -> list[int] | None:
    """Sizes that are given as separate arguments or as one sequence; ``None`` if they are not integers."""
    given = args[1:] or (kwargs.get(name),)
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = tuple(given[0])
    return list(given) if all(isinstance(size, int) for size in given) else None


def _viewed(source: DeferredTensor, shape: list[int], native: Native) -> Any:
    node = source.handle.node
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        shape = [node.shape.numel() // known if size == -1 and known else size for size in shape]
    if math.prod(shape) != node.shape.numel():
        return NotImplemented
    is_shift = isinstance(relative_shift.bare(node), relative_shift.Strided) or relative_shift.cuts_across(
        node.dims, shape
    )
    shifted = relative_shift.viewed(node, shape) if is_shift else None
    if shifted is not None:
        return _or_copy(source, shifted, native)
    dims = regroup(node.dims, shape)
    return _or_copy(source, None if dims is None else ViewNode(node, dims), native)


@op("view", "reshape", is_layout=True, is_view=True)
def view(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    shape = _sizes(args, kwargs, "shape" if name == "reshape" else "size")
    return NotImplemented if shape is None else _viewed(args[0], shape, (func, args[1:], kwargs))


def _like(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """``view_as`` and the like, of a real tensor with the shape of a deferred one."""
    return (
        getattr(torch.Tensor, LIKE[name])(args[0], args[1].shape)
        if len(args) == 2 and not kwargs
        else NotImplemented
    )


@op("view_as", "reshape_as", is_view=True)
def view_as(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], DeferredTensor):
        return _like(name, args, kwargs)
    shape = list(args[1].shape)
    return _viewed(args[0], shape, (getattr(torch.Tensor, LIKE[name]), (shape,), {}))


@op("flatten", is_layout=True, is_view=True)
def flatten(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    start, end = argument(args, kwargs, 1, "start_dim", 0), argument(args, kwargs, 2, "end_dim", -1)
    shape = list(source.shape)
    start, end = start % len(shape), end % len(shape)
    flat = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    return _viewed(source, flat, (func, args[1:], kwargs))


@op("ravel", is_layout=True, is_view=True)
def ravel(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return _viewed(args[0], [args[0].handle.node.shape.numel()], (func, args[1:], kwargs))


@op("unflatten", is_layout=True, is_view=True)
def unflatten(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    dim, sizes = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "sizes")
    if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
        return NotImplemented
    shape, sizes = list(source.shape), list(sizes)
    dim %= len(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // -math.prod(sizes)
    return _viewed(source, [*shape[:dim], *sizes, *shape[dim + 1 :]], (func, args[1:], kwargs))


@op("unsqueeze", is_layout=True, is_view=True)
def unsqueeze(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node
    dim = argument(args, kwargs, 1, "dim") % (len(node.dims) + 1)
    dims = (*node.dims[:dim], (), *node.dims[dim:])
    return views.view(args[0], ViewNode(node, dims), (func, args[1:], kwargs))


@op("squeeze", is_layout=True, is_view=True)
def squeeze(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node
    asked = argument(args, kwargs, 1, "dim")
    if asked is None:
        asked = range(len(node.dims))
    elif isinstance(asked, int):
        asked = [asked]
    gone = {dim % len(node.dims) for dim in asked}
    dims = tuple(dim for i, dim in enumerate(node.dims) if i not in gone or size_of(dim) != 1)
    return views.view(args[0], ViewNode(node, dims), (func, args[1:], kwargs))


def _permuted(source: DeferredTensor, order: list[int]) -> DeferredTensor:
    node = source.handle.node
    dims = tuple(node.dims[i] for i in order)
    call = OpNode(torch.permute, (node, order), {}, dims, node.dtype, node.device)
    return views.view(source, call, (torch.permute, (order,), {}))


@op("transpose", "swapaxes", "swapdims", is_layout=True, is_view=True)
def transpose(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    count = len(args[0].handle.node.dims)
    first = argument(args, kwargs, 1, "dim0", kwargs.get("axis0"))
    second = argument(args, kwargs, 2, "dim1", kwargs.get("axis1"))
    if not isinstance(first, int) or not isinstance(second, int):
        return NotImplemented
    order = list(range(count))
    order[first % count], order[second % count] = order[second % count], order[first % count]
    return _permuted(args[0], order)


@op("mT", "T", "t", "H", "mH", "adjoint", is_layout=True, is_view=True)
def matrix_transpose(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    count = len(args[0].handle.node.dims)
    if (name in ("T", "t", "H") and count != 2) or (name in ("H", "mH", "adjoint") and args[0].is_complex()):
        return NotImplemented
    return transpose("transpose", func, (args[0], -2, -1), {})


@op("permute", is_layout=True, is_view=True)
def permute(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    order = _sizes(args, kwargs, "dims")
    count = len(args[0].handle.node.dims)
    if order is None or len(order) != count:
        return NotImplemented
    return _permuted(args[0], [dim % count for dim in order])


@op("movedim", "moveaxis", is_layout=True, is_view=True)
def movedim(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    count = len(args[0].handle.node.dims)
    moved, places = (
        positions_of(argument(args, kwargs, i, key), count) for i, key in ((1, "source"), (2, "destination"))
    )
    if moved is None or places is None or len(moved) != len(places):
        return NotImplemented
    order = [dim for dim in range(count) if dim not in moved]
    for place, dim in sorted(zip(places, moved, strict=True)):
        order.insert(place, dim)
    return _permuted(args[0], order) if sorted(order) == list(range(count)) else NotImplemented


@op("expand", "expand_as", is_view=True)
def expand(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    if not isinstance(source, DeferredTensor):
        return _like(name, args, kwargs) if name in LIKE else NotImplemented
    if name == "expand_as":
        shape: list[int] | None = list(args[1].shape)
    else:
        shape = _sizes(args, kwargs, "size")
    if shape is None:
        return NotImplemented
    node = source.handle.node
    old: Dims = ((),) * (len(shape) - len(node.dims)) + node.dims
    grown = fresh([0 if size == -1 else size for size in shape])
    dims: list[Dim] = []
    for own, new, size in zip(old, grown, shape, strict=True):
        if size_of(own) != 1 and size not in (-1, size_of(own)):
            return NotImplemented
        dims.append(own if size_of(own) != 1 or size == -1 else new)
    return views.view(source, ViewNode(node, tuple(dims), expand=True), (torch.Tensor.expand, (shape,), {}))


@op("clone", is_layout=True)
@op("contiguous", "alias", "positive", "real", "data", "detach", is_layout=True, is_view=True)
def same(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Functions that return the operand, or a view of all of it."""
    source = args[0]
    node = source.handle.node
    if name == "real" and node.dtype.is_complex:
        return NotImplemented
    found = ViewNode(node, node.dims)
    found.is_detached = found.stops_gradient = name in ("detach", "data")
    found.forgets_versions = name == "data"
    return _or_copy(source, found, (func, args[1:], kwargs))


@op("cpu", is_layout=True, is_view=True)
def cpu(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``cpu()``: computes the tensor. On CPU the operand itself is returned if other tensors share its memory."""
    source = args[0]
    if source.device.type != "cpu" or not source.handle.is_shared():
        return NotImplemented
    source.handle.materialize(name)
    return source


@op("atleast_1d", "atleast_2d", "atleast_3d", is_layout=True, is_view=True)
def at_least(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``atleast_1d``, ``atleast_2d`` and ``atleast_3d``, for one tensor that has enough dimensions."""
    if len(args) != 1 or not isinstance(args[0], DeferredTensor) or args[0].dim() < int(name[-2]):
        return NotImplemented
    return same(name, func, args, kwargs)


@op("as_strided", is_layout=True, is_view=True)
def as_strided(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = [argument(args, kwargs, 1, "size"), argument(args, kwargs, 2, "stride")]
    offset = argument(args, kwargs, 3, "storage_offset") or 0
    if not all(isinstance(value, (list, tuple)) for value in given):
        return NotImplemented
    node = relative_shift.as_strided(args[0].handle.node, *given, offset)
    # Strides refer to memory, the graph's indices to row-major order: they agree only in a contiguous tensor.
    own = memory_layout.shadow(args[0].handle.node)
    if node is None or own is None or not own.is_contiguous() or own.storage_offset():
        return NotImplemented
    return views.view(args[0], node, (func, args[1:], kwargs))
