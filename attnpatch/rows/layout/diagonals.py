"""Triangles and diagonals: functions that depend on an element's row index minus its key index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument
from attnpatch.rows.deferred import views
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, Axis, Tile, flat_range, fresh, leaves, local_shape
from attnpatch.rows.graph.nodes import Node, widened
from attnpatch.rows.layout.regions import rest_of
from attnpatch.rows.op_table import op


def _spans(node: Node, positions: tuple[int, ...], tile: Tile) -> tuple[Tile, list[tuple[int, int]]]:
    """The tile, widened until each of these dimensions is one contiguous range, and those ranges."""
    cut, spans = dict(tile), []
    for position in positions:
        parts = leaves(node.dims[position])
        span = flat_range(parts, tile)
        if span is None:
            span = (0, node.shape[position])
            for leaf in parts:
                cut.pop(leaf, None)
        spans.append(span)
    return cut, spans


class Triangle(Node):
    """``tril`` or ``triu`` of the last two dimensions.

    Args:
        child: The tensor.
        func: ``torch.tril`` or ``torch.triu``.
        diagonal: The last diagonal that is kept.
    """

    def __init__(self, child: Node, func: Callable[..., torch.Tensor], diagonal: int) -> None:
        self.children = (child,)
        self.dims, self.dtype, self.device = child.dims, child.dtype, child.device
        self.func, self.diagonal = func, diagonal

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        last = len(self.dims) - 1
        cut, (rows, keys) = _spans(self, (last - 1, last), tile)
        value = self.func(run.value(self.children[0], cut), self.diagonal + rows[0] - keys[0])
        return rest_of(value, self.dims, tile, cut)


class Diagonal(Node):
    """The diagonal of two dimensions, as the last dimension of the result.

    Args:
        child: The tensor.
        offset, first, second: Arguments of ``torch.diagonal``; both dimensions >= 0.
    """

    renames_axes = True

    def __init__(self, child: Node, offset: int, first: int, second: int) -> None:
        self.children = (child,)
        self.dtype, self.device = child.dtype, child.device
        self.start = (max(0, -offset), max(0, offset))
        self.places = (first, second)
        shape = child.shape
        count = max(0, min(shape[first] - self.start[0], shape[second] - self.start[1]))
        kind = next((axis.kind for axis in leaves(child.dims[first])), "lead")
        kept = tuple(dim for i, dim in enumerate(child.dims) if i not in self.places)
        self.axis = Axis(count, kind)
        self.dims = (*kept, (self.axis,) if count != 1 else ())
        # A range of the diagonal is a range of the first dimension; the second is read whole.
        self.whole = child.dims[second]

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        child = self.children[0]
        new, old = leaves((self.axis,)), leaves(child.dims[self.places[0]])
        low, high = 0, self.axis.size
        wanted = {axis: span for axis, span in tile.items() if axis not in new}
        first = 0
        if len(new) == len(old) == 1 and new[0] in tile and old[0] not in run.whole:
            low, high = tile[new[0]]
            first, last = widened(low + self.start[0], high + self.start[0], old[0])
            wanted[old[0]] = (first, last)
        value = run.value(child, wanted)
        value = value.narrow(self.places[0], low + self.start[0] - first, high - low)
        value = value.narrow(self.places[1], low + self.start[1], high - low)
        value = value.diagonal(0, *self.places)
        left = {axis: span for axis, span in tile.items() if axis in new}
        if (low, high) != (0, self.axis.size) or not left:
            return value
        return rest_of(
            value, self.dims, tile, {axis: span for axis, span in tile.items() if axis not in left}
        )


class DiagonalMatrix(Node):
    """``diag_embed``: the last dimension becomes the diagonal of a matrix, whose columns get a new axis."""

    def __init__(self, child: Node) -> None:
        self.children = (child,)
        self.dtype, self.device = child.dtype, child.device
        self.dims = (*child.dims, *fresh(child.shape[-1:], KEY))

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        last = len(self.dims) - 1
        cut, (rows, keys) = _spans(self, (last - 1, last), tile)
        part = run.value(self.children[0], {a: s for a, s in cut.items() if a not in leaves(self.dims[last])})
        value = torch.zeros(local_shape(self.dims, cut), dtype=self.dtype, device=self.device)
        low, high = max(rows[0], keys[0]), min(rows[1], keys[1])
        if low < high:
            count = high - low
            square = value.narrow(-2, low - rows[0], count).narrow(-1, low - keys[0], count)
            square.diagonal(0, -2, -1).copy_(part.narrow(-1, low - rows[0], count))
        return rest_of(value, self.dims, tile, cut)


@op("tril", "triu")
def triangle(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    diagonal = argument(args, kwargs, 1, "diagonal", 0)
    if not isinstance(args[0], DeferredTensor) or not isinstance(diagonal, int):
        return NotImplemented
    node = args[0].handle.node
    # Both dimensions may be the same axis (a matrix added to its own transpose).
    found = Triangle(node, getattr(torch, name), diagonal)
    found.native = (found.func, (diagonal,), {})
    return wrap(found, args[0].handle.call)


@op("diagonal", "linalg_diagonal")
def diagonal(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    first, second = (-2, -1) if name == "linalg_diagonal" else (0, 1)
    offset = argument(args, kwargs, 1, "offset", 0)
    first, second = argument(args, kwargs, 2, "dim1", first), argument(args, kwargs, 3, "dim2", second)
    if not isinstance(args[0], DeferredTensor) or not all(
        isinstance(n, int) for n in (offset, first, second)
    ):
        return NotImplemented
    node = args[0].handle.node
    count = len(node.dims)
    if not (-count <= first < count and -count <= second < count) or first % count == second % count:
        return NotImplemented
    first, second = first % count, second % count
    if all(axis.kind == KEY for axis in leaves(node.dims[first])):
        first, second, offset = second, first, -offset
    found = Diagonal(node, offset, first, second)
    return views.view(args[0], found, (func, args[1:], kwargs)) if found.axis.size else NotImplemented


@op("diag_embed")
def diag_embed(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    first, second = argument(args, kwargs, 2, "dim1", -2), argument(args, kwargs, 3, "dim2", -1)
    count = len(args[0].shape) + 1 if isinstance(args[0], DeferredTensor) else 0
    if not count or argument(args, kwargs, 1, "offset", 0) != 0:
        return NotImplemented
    if {first % count, second % count} != {count - 2, count - 1}:
        return NotImplemented
    return wrap(DiagonalMatrix(args[0].handle.node), args[0].handle.call)
