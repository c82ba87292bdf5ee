"""Handlers of functions that only move or select elements: views, transposes, slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows import strided
from attnpatch.rows.arguments import argument
from attnpatch.rows.axes import Dim, Dims, fresh, regroup, size_of
from attnpatch.rows.deferred import DeferredRows, wrap
from attnpatch.rows.recipe import Call, Node, View


def _result(source: DeferredRows, node: Node) -> DeferredRows:
    """A deferred tensor that shares memory with ``source``, as torch's own views do."""
    return wrap(node, source.handle.call, source.handle.family)


def _sizes(args: Any, kwargs: dict[str, Any], name: str) -> list[int] | None:
    """Sizes given one by one or as one sequence."""
    given = args[1:] or (kwargs.get(name),)
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = tuple(given[0])
    return list(given) if all(isinstance(size, int) for size in given) else None


def _viewed(source: DeferredRows, shape: list[int]) -> Any:
    node = source.handle.node
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        shape = [node.shape.numel() // known if size == -1 and known else size for size in shape]
    if math.prod(shape) != node.shape.numel():
        return NotImplemented
    is_shift = isinstance(strided.bare(node), strided.Strided) or strided.cuts_across(node.dims, shape)
    shifted = strided.viewed(node, shape) if is_shift else None
    if shifted is not None:
        return _result(source, shifted)
    dims = regroup(node.dims, shape)
    return NotImplemented if dims is None else _result(source, View(node, dims))


def view(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    shape = _sizes(args, kwargs, "shape" if name == "reshape" else "size")
    return NotImplemented if shape is None else _viewed(args[0], shape)


def view_as(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return _viewed(args[0], list(args[1].shape)) if isinstance(args[0], DeferredRows) else NotImplemented


def flatten(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    start = args[1] if len(args) > 1 else kwargs.get("start_dim", 0)
    end = args[2] if len(args) > 2 else kwargs.get("end_dim", -1)
    shape = list(source.shape)
    start, end = start % len(shape), end % len(shape)
    return _viewed(source, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def unflatten(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    sizes = args[2] if len(args) > 2 else kwargs.get("sizes")
    if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
        return NotImplemented
    shape, sizes = list(source.shape), list(sizes)
    dim %= len(shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // -math.prod(sizes)
    return _viewed(source, [*shape[:dim], *sizes, *shape[dim + 1 :]])


def unsqueeze(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % (len(node.dims) + 1)
    return _result(args[0], View(node, (*node.dims[:dim], (), *node.dims[dim:])))


def squeeze(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node
    asked = args[1] if len(args) > 1 else kwargs.get("dim")
    if asked is None:
        asked = range(len(node.dims))
    elif isinstance(asked, int):
        asked = [asked]
    gone = {dim % len(node.dims) for dim in asked}
    dims = tuple(dim for i, dim in enumerate(node.dims) if i not in gone or size_of(dim) != 1)
    return _result(args[0], View(node, dims))


def _permuted(source: DeferredRows, order: list[int]) -> DeferredRows:
    node = source.handle.node
    dims = tuple(node.dims[i] for i in order)
    return _result(source, Call(torch.permute, (node, order), {}, dims, node.dtype, node.device))


def transpose(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    count = len(args[0].handle.node.dims)
    first = args[1] if len(args) > 1 else kwargs.get("dim0", kwargs.get("axis0"))
    second = args[2] if len(args) > 2 else kwargs.get("dim1", kwargs.get("axis1"))
    if not isinstance(first, int) or not isinstance(second, int):
        return NotImplemented
    order = list(range(count))
    order[first % count], order[second % count] = order[second % count], order[first % count]
    return _permuted(args[0], order)


def matrix_transpose(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    count = len(args[0].handle.node.dims)
    if (name in ("T", "t", "H") and count != 2) or (name in ("H", "mH", "adjoint") and args[0].is_complex()):
        return NotImplemented
    return transpose("transpose", func, (args[0], -2, -1), {})


def permute(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    order = _sizes(args, kwargs, "dims")
    count = len(args[0].handle.node.dims)
    if order is None or len(order) != count:
        return NotImplemented
    return _permuted(args[0], [dim % count for dim in order])


def movedim(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or not isinstance(args[1], int) or not isinstance(args[2], int):
        return NotImplemented
    count = len(args[0].handle.node.dims)
    order = [dim for dim in range(count) if dim != args[1] % count]
    order.insert(args[2] % count, args[1] % count)
    return _permuted(args[0], order)


def expand(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    if not isinstance(source, DeferredRows):
        return NotImplemented
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
    return _result(source, View(node, tuple(dims), expand=True))


def getitem(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Slices without a step, integers, ``None`` and ``...``: only the elements asked for will be computed."""
    source, index = args
    if not isinstance(source, DeferredRows):
        return NotImplemented
    node = source.handle.node
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, torch.Tensor) for item in index):
        return NotImplemented
    taken = sum(item is not None and item is not Ellipsis for item in index)
    if index.count(Ellipsis) > 1 or taken > len(node.dims):
        return NotImplemented
    if Ellipsis not in index:
        index.append(Ellipsis)
    place = index.index(Ellipsis)
    index[place : place + 1] = [slice(None)] * (len(node.dims) - taken)
    position, gone, new = 0, [], []
    for item in index:
        if item is None:
            new.append(None)
            continue
        size = node.shape[position]
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if step != 1 or stop <= start:
                return NotImplemented
        elif isinstance(item, int) and not isinstance(item, bool) and -size <= item < size:
            start, stop = item % size, item % size + 1
            gone.append(position)
        else:
            return NotImplemented
        if (start, stop) != (0, size):
            node = strided.cut(node, position, start, stop)
        new.append(position)
        position += 1
    dims = tuple(() if i is None else node.dims[i] for i in new if i not in gone)
    return _result(source, node if dims == node.dims else View(node, dims))


def narrow(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 4 or not all(isinstance(value, int) for value in args[1:]):
        return NotImplemented
    _, dim, start, length = args
    return _along(args[0], dim, slice(start, start + length))


def select(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or not all(isinstance(value, int) for value in args[1:]):
        return NotImplemented
    return _along(args[0], args[1], args[2])


def _along(source: DeferredRows, dim: int, item: Any) -> Any:
    index = [slice(None)] * len(source.handle.node.dims)
    index[dim] = item
    return getitem("__getitem__", torch.Tensor.__getitem__, (source, tuple(index)), {})


def split(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``split`` and ``chunk`` as slices."""
    source = args[0]
    count = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("chunks"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not isinstance(dim, int):
        return NotImplemented
    size = source.handle.node.shape[dim]
    if name == "chunk":
        count = -(-size // count)
    if isinstance(count, int):
        count = [min(count, size - start) for start in range(0, size, count)]
    pieces, start = [], 0
    for length in count:
        pieces.append(_along(source, dim, slice(start, start + length)))
        start += length
    return (
        NotImplemented if any(piece is NotImplemented for piece in pieces) or start != size else tuple(pieces)
    )


def as_strided(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = [argument(args, kwargs, 1, "size"), argument(args, kwargs, 2, "stride")]
    offset = argument(args, kwargs, 3, "storage_offset") or 0
    if not all(isinstance(value, (list, tuple)) for value in given):
        return NotImplemented
    node = strided.as_strided(args[0].handle.node, *given, offset)
    return NotImplemented if node is None else _result(args[0], node)


# What takes only the shape of its second argument, and what does the same when it is told the shape.
LIKE = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape"}

HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "reshape"), view),
    **dict.fromkeys(("view_as", "reshape_as"), view_as),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("mT", "T", "t", "H", "mH", "adjoint"), matrix_transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("split", "chunk"), split),
    "flatten": flatten,
    "unflatten": unflatten,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "permute": permute,
    "__getitem__": getitem,
    "as_strided": as_strided,
    "narrow": narrow,
    "select": select,
}
