"""Indexing a deferred tensor: a slice is a view; an index tensor, a list or a mask along one dimension picks elements.

Only the elements that are picked will be computed. With several index tensors, or a mask over several dimensions, the
tensor is computed whole and indexed natively.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from attnpatch.rows.deferred import memory_layout, sharing, views
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Axis, Dim, Tile, leaves, take
from attnpatch.rows.graph.nodes import Node, SliceNode, ViewNode, within
from attnpatch.rows.layout import relative_shift

# If the indices form more ranges than this, everything between the lowest and the highest one is computed.
_MOST_RUNS = 32
# Ranges with a smaller gap between them are computed as one.
_NEAR = 8


class Taken(Node):
    """``index_select``: the elements of one dimension at given indices.

    Args:
        child: The tensor.
        position: The dimension.
        places: The indices, each >= 0 and below the dimension's size.
    """

    renames_axes = True

    def __init__(self, child: Node, position: int, places: list[int]) -> None:
        self.children = (child,)
        self.dtype, self.device = child.dtype, child.device
        self.position, self.places = position, places
        old = child.dims[position]
        self.axis = Axis(len(places), old[-1].kind if old else "lead")
        new: Dim = (self.axis,) if len(places) != 1 else ()
        self.dims = (*child.dims[:position], new, *child.dims[position + 1 :])

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        child = self.children[0]
        old, new = leaves(child.dims[self.position]), leaves((self.axis,))
        low, high = 0, self.axis.size
        if len(new) == 1 and new[0] in tile:
            low, high = tile[new[0]]
        places = self.places[low:high]
        if len(old) == 1 and old[0] not in run.whole and len(new) <= 1:
            parts, at = [], {}
            for first, last in _runs(places):
                start = sum(part.shape[self.position] for part in parts)
                at.update((place, start + place - first) for place in range(first, last))
                parts.append(within(run, child, self.position, old[0], (first, last), tile))
            value = parts[0] if len(parts) == 1 else torch.cat(parts, self.position)
            return value.index_select(self.position, self._index([at[place] for place in places]))
        value = run.value(child, tile).index_select(self.position, self._index(self.places))
        return take(
            value, tuple((self.axis,) if i == self.position else () for i in range(value.dim())), tile
        )

    def _index(self, places: list[int]) -> torch.Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self.device)


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Ranges that cover all indices: at most ``_MOST_RUNS``, and at least ``_NEAR`` elements apart."""
    ordered = sorted(set(places))
    runs = [[ordered[0], ordered[0] + 1]]
    for place in ordered[1:]:
        if place - runs[-1][1] < _NEAR:
            runs[-1][1] = place + 1
        else:
            runs.append([place, place + 1])
    if len(runs) > _MOST_RUNS:
        return [(ordered[0], ordered[-1] + 1)]
    return [(first, last) for first, last in runs]


def getitem(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``source[index]``, deferred if at most one dimension is indexed by anything but integers and slices."""
    source, index = args
    if not isinstance(source, DeferredTensor):
        return NotImplemented
    node = source.handle.node
    items = [_plain(item) for item in (index if isinstance(index, tuple) else (index,))]
    if any(item is NotImplemented for item in items):
        return NotImplemented
    shape, places = (
        _full(items, len(node.dims)),
        [i for i, item in enumerate(items) if isinstance(item, list)],
    )
    if shape is None or len(places) > 1:
        return NotImplemented
    if not places:
        return _view(source, shape)
    return _picked(source, shape)


def _plain(item: Any) -> Any:
    """An index item as an integer, a slice, a list of integers or bools, ``None`` or ``...``, or ``NotImplemented``."""
    if item is None or item is Ellipsis:
        return item
    if isinstance(item, slice):
        try:
            ends = (
                None if end is None else operator.index(end) for end in (item.start, item.stop, item.step)
            )
            return slice(*ends)
        except TypeError:
            return NotImplemented
    if isinstance(item, (bool, numpy.bool_, DeferredTensor)):
        return NotImplemented
    if isinstance(item, (list, range, tuple)):
        try:
            item = numpy.asarray(item) if len(item) else numpy.zeros(0, dtype=numpy.int64)
        except (TypeError, ValueError, RuntimeError):
            return NotImplemented
    if isinstance(item, torch.Tensor):
        if type(item) is not torch.Tensor or item.device.type == "meta" or item.dim() > 1:
            return NotImplemented
        if item.dtype not in (torch.bool, torch.int32, torch.int64) or (
            item.dim() == 0 and item.dtype is torch.bool
        ):
            return NotImplemented
        return item.tolist() if item.dim() else int(item)
    if isinstance(item, numpy.ndarray):
        return (
            item.tolist()
            if item.ndim == 1 and item.dtype in (bool, numpy.int32, numpy.int64)
            else NotImplemented
        )
    try:
        return operator.index(item)
    except TypeError:
        return NotImplemented


def _full(items: list[Any], count: int) -> list[Any] | None:
    """The items with ``...`` written out: one per dimension, beside those that are ``None``. ``None`` if too many."""
    taken = sum(item is not None and item is not Ellipsis for item in items)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or taken > count:
        return None
    place = dots[0] if dots else len(items)
    return [*items[:place], *[slice(None)] * (count - taken), *items[place + 1 :]]


def _view(source: DeferredTensor, items: list[Any]) -> Any:
    index, node = tuple(items), _sliced(source.handle.node, items)
    if node is not None:
        return views.view(source, node, (torch.Tensor.__getitem__, (index,), {}))
    # The result is empty, or the index is wrong and torch raises here, before anything is computed.
    result = memory_layout.applied(source.handle.node, torch.Tensor.__getitem__, (index,), {})
    return NotImplemented if result is None else _nothing(source, result.shape, result.stride())


def _nothing(source: DeferredTensor, shape: Sequence[int], strides: Sequence[int] | None = None) -> Any:
    """An empty result; ``NotImplemented`` if it is not empty or needs a gradient."""
    if math.prod(shape) or (source.requires_grad and torch.is_grad_enabled()):
        return NotImplemented
    if strides is None:
        return torch.empty(shape, dtype=source.dtype, device=source.device)
    return torch.empty_strided(shape, strides, dtype=source.dtype, device=source.device)


def _sliced(node: Node, items: list[Any]) -> Node | None:
    """The graph of an index without lists: slices first, then dimensions are removed and added; ``None`` if empty."""
    position, gone, order = 0, set(), []
    for item in items:
        if item is None:
            order.append(None)
            continue
        size = node.shape[position]
        start, stop, step = 0, size, 1
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
        elif isinstance(item, int):
            if not -size <= item < size:
                return None
            start, stop = item % size, item % size + 1
            gone.add(position)
        if step < 1 or stop <= start:
            return None
        if (start, stop, step) != (0, size, 1):
            is_run = step == 1
            node = (
                relative_shift.cut(node, position, start, stop)
                if is_run
                else SliceNode(node, position, start, stop, step)
            )
        order.append(position)
        position += 1
    dims = tuple(() if i is None else node.dims[i] for i in order if i not in gone)
    return node if dims == node.dims and not gone and None not in order else ViewNode(node, dims)


def _picked(source: DeferredTensor, items: list[Any]) -> Any:
    """An index with one list, which makes a copy: slices and integers first, then the list along its dimension."""
    at = next(i for i, item in enumerate(items) if isinstance(item, list))
    size = source.shape[sum(item is not None for item in items[:at])]
    places = items[at]
    if places and isinstance(places[0], bool):
        if len(places) != size:
            return NotImplemented
        places = [i for i, is_taken in enumerate(places) if is_taken]
    elif not all(-size <= place < size for place in places):
        return NotImplemented
    node = source.handle.node
    inner = _sliced(
        node,
        [slice(None) if isinstance(item, list) else item for item in items if item is not None],
    )
    if inner is None:
        return NotImplemented
    position = sum(isinstance(item, slice) for item in items[:at])
    if not places:
        kept = [0 if i == position else n for i, n in enumerate(inner.shape)]
        return NotImplemented if None in items else _nothing(source, kept)
    taken: Node | None = Taken(inner, position, [place % size for place in places])
    if None in items:
        taken = _sliced(
            taken, [None if item is None else slice(None) for item in items if not isinstance(item, int)]
        )
    assert taken is not None
    index = tuple(memory_layout.numbers(len(places)) if isinstance(item, list) else item for item in items)
    taken = sharing.of_function(taken, node, (torch.Tensor.__getitem__, (index,), {}))
    return wrap(taken, source.handle.call)
