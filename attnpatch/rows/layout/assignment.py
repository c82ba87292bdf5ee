"""``target[index] = value`` on a deferred tensor: by slices, by index tensors, under a mask.

The write becomes a node of the graph (``rows/layout/regions.py``). Neither the target nor the value is computed whole
for it.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.creation.row_masks import ConstantNode
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import KEY, Axis, Dim, all_leaves, size_of, unify
from attnpatch.rows.graph.nodes import InputNode, Node, ViewNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout import indexing
from attnpatch.rows.layout.regions import Indexed, Region, Written

# With more writes than this, the host itself loops over pieces of a result: the graph is not extended further.
MOST = 32


def written(target: DeferredTensor, index: Any, value: Any, accumulate: str | None = None) -> Any:
    """``target`` after ``target[index] = value``, deferred; ``NotImplemented`` if no node can express the write."""
    if sum(isinstance(node, (Written, Indexed)) for node in walk(target.handle.node)) >= MOST:
        return NotImplemented
    items = _items(target, index)
    if items is None:
        return NotImplemented
    basic = [item if isinstance(item, (int, slice)) else slice(None) for item in items]
    advanced = [None if isinstance(item, (int, slice)) else item for item in items]
    is_part = any(item != slice(None) for item in basic)
    if all(item is None for item in advanced):
        return _by_slices(target, basic, value) if not accumulate else NotImplemented
    if not is_part:
        return _by_indices(target, advanced, value, accumulate)
    # Slices and index tensors mixed: write to the slice, then put it back.
    steps = [item for item in basic if isinstance(item, slice) and item.step not in (None, 1)]
    if steps:
        return NotImplemented
    part = indexing.getitem("__getitem__", torch.Tensor.__getitem__, (target, tuple(basic)), {})
    if part is NotImplemented:
        return NotImplemented
    inner = [item for item, own in zip(advanced, basic, strict=True) if not isinstance(own, int)]
    part = wrap(part.handle.node, target.handle.call)
    part = _by_indices(part, inner, value, accumulate)
    return part if part is NotImplemented else _by_slices(target, basic, part)


def _items(target: DeferredTensor, index: Any) -> list[Any] | None:
    """One item per dimension: a slice, an integer, an index tensor, or a mask; ``...`` for a mask's further dimensions."""
    given = list(index) if isinstance(index, tuple) else [index]
    found: list[Any] = []
    taken = 0
    for item in given:
        if isinstance(item, (list, range)) or (type(item).__module__ == "numpy" and getattr(item, "ndim", 0)):
            item = torch.as_tensor(item, device=target.device)
        if item is None or isinstance(item, bool):
            return None
        is_number = isinstance(item, torch.Tensor) and not item.dim() and item.dtype is not torch.bool
        if is_number and not isinstance(item, DeferredTensor) and ledger_of(item) is None:
            item = operator.index(item)
        if isinstance(item, torch.Tensor):
            if item.dtype not in (torch.bool, torch.int64, torch.int32) or not item.dim():
                return None
            if isinstance(item, DeferredTensor) and item.dtype is not torch.bool:
                return None
            taken += item.dim() if item.dtype is torch.bool else 1
        elif not isinstance(item, slice) and item is not Ellipsis:
            with contextlib.suppress(TypeError):
                item = operator.index(item)
            if not isinstance(item, int):
                return None
            taken += 1
        else:
            taken += item is not Ellipsis
        found.append(item)
    dots = [i for i, item in enumerate(found) if item is Ellipsis]
    count = len(target.handle.node.dims)
    if len(dots) > 1 or taken > count:
        return None
    place = dots[0] if dots else len(found)
    found[place : place + 1] = [slice(None)] * (count - taken)
    return _checked(target, found)


def _checked(target: DeferredTensor, found: list[Any]) -> list[Any] | None:
    """The items, if all of them lie inside the tensor; each mask is followed by ``...`` for its further dimensions."""
    items: list[Any] = []
    shape = target.handle.node.shape
    for item in found:
        size = shape[len(items)]
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if step < 1:
                return None
            items.append(slice(None) if (start, stop, step) == (0, size, 1) else item)
        elif isinstance(item, int):
            if not -size <= item < size:
                return None
            items.append(item % size)
        elif item.dtype is torch.bool:
            if item.shape != shape[len(items) : len(items) + item.dim()]:
                return None
            items += [item, *[Ellipsis] * (item.dim() - 1)]
        else:
            items.append(item)
    return items


def _by_slices(target: DeferredTensor, items: list[Any], value: Any) -> Any:
    node = target.handle.node
    regions: list[Region | None] = []
    dims: list[Dim] = []
    for item, dim, size in zip(items, node.dims, node.shape, strict=True):
        if isinstance(item, int):
            regions.append(Region(item, 1, Axis(1)))
            continue
        start, stop, step = item.indices(size)
        count = len(range(start, stop, step))
        if not count:
            return _copy(target)
        if (start, count, step) == (0, size, 1):
            regions.append(None)
            dims.append(dim)
            continue
        axis = Axis(count, dim[-1].kind if dim else "lead")
        regions.append(Region(start, step, axis))
        dims.append((axis,) if count != 1 else ())
    shape = torch.Size(size_of(dim) for dim in dims)
    source = _source(target, value, tuple(dims), shape)
    if source is None:
        return NotImplemented
    if not any(regions) and source.shape == node.shape:
        return wrap(_cast(source, node.dtype), target.handle.call)
    # The source gets a dimension of size 1 for every integer index, so that it aligns with the tensor.
    aligned = _with_ones(source, [isinstance(item, int) for item in items])
    return wrap(Written(node, regions, aligned), target.handle.call)


def _copy(target: DeferredTensor) -> DeferredTensor:
    node = target.handle.node
    return wrap(
        OpNode(torch.Tensor.clone, (node,), {}, node.dims, node.dtype, node.device), target.handle.call
    )


def _with_ones(source: Node, missing: list[bool]) -> Node:
    """``source`` with a dimension of size 1 for each missing one; its own dimensions align with the others from the
    right.
    """
    if not any(missing):
        return source
    own = list(source.dims)
    dims: list[Dim] = []
    for is_missing in reversed(missing):
        if is_missing:
            dims.insert(0, ())
        elif own:
            dims.insert(0, own.pop())
        else:
            break
    return ViewNode(source, tuple(dims))


def _spread(value: Any, node: Node, shape: torch.Size) -> torch.Tensor | None:
    """The value of a write as a tensor that broadcasts to ``shape``; ``None`` if it does not."""
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value, device=node.device).to(node.dtype)
    if not isinstance(value, torch.Tensor) or (value.dim() and value.device != node.device):
        return None
    while value.dim() > len(shape) and value.shape[0] == 1:
        value = value[0]
    try:
        return value if torch.broadcast_shapes(value.shape, shape) == shape else None
    except RuntimeError:
        return None


def _source(target: DeferredTensor, value: Any, dims: tuple[Dim, ...], shape: torch.Size) -> Node | None:
    """The values of a write as a node, aligned from the right with ``dims``."""
    node = target.handle.node
    if isinstance(value, (bool, int, float)):
        # A constant node is used, because autograd would save a tensor, and a checkpoint that natively saves nothing
        # is never recomputed.
        return ConstantNode(value, (), node.dtype, node.device)
    value = _spread(value, node, shape)
    if value is None:
        return None
    if not isinstance(value, DeferredTensor):
        return InputNode.aligned(value, dims)
    own = value.handle.node
    for mine, theirs in zip(reversed(own.dims), reversed(dims), strict=False):
        if size_of(mine) != 1 and not unify(theirs, mine):
            return None
    return _cast(own, node.dtype)


def _cast(node: Node, dtype: torch.dtype) -> Node:
    if node.dtype == dtype:
        return node
    return OpNode(torch.Tensor.to, (node, dtype), {}, node.dims, dtype, node.device)


def _by_indices(target: DeferredTensor, items: list[Any], value: Any, accumulate: str | None) -> Any:
    """A write at index tensors and masks, over the full length of the other dimensions."""
    masks = [item for item in items if isinstance(item, torch.Tensor) and item.dtype is torch.bool]
    is_one = isinstance(value, (bool, int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    if len(masks) == len(tensors) == 1 and is_one and not accumulate:
        return _where(target, items, masks[0], value)
    node = target.handle.node
    positions = tuple(i for i, item in enumerate(items) if item is not None)
    if isinstance(value, DeferredTensor) and not any(
        axis.kind == KEY for axis in all_leaves(value.handle.node.dims)
    ):
        value = value.handle.reduced()
    if any(isinstance(item, DeferredTensor) for item in (value, *tensors)):
        return NotImplemented
    if positions != tuple(range(positions[0], positions[-1] + 1)):
        return NotImplemented
    indices: list[torch.Tensor] = []
    for item in tensors:
        if item.device != node.device or (item.dtype is torch.bool and ledger_of(item) is not None):
            return NotImplemented
        indices += list(item.nonzero(as_tuple=True)) if item.dtype is torch.bool else [item]
    return _scattered(target, positions, indices, value, accumulate)


def _where(target: DeferredTensor, items: list[Any], mask: torch.Tensor, value: Any) -> Any:
    """One value written where a mask is true."""
    node = target.handle.node
    if mask.device != node.device:
        return NotImplemented
    first = next(i for i, item in enumerate(items) if item is mask)
    mask = mask.reshape(*mask.shape, *[1] * (len(items) - first - mask.dim()))
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value, device=node.device)
    value = value.reshape(()).to(device=node.device, dtype=node.dtype)
    return torch.where(mask, value, target)


def _scattered(
    target: DeferredTensor,
    positions: tuple[int, ...],
    indices: list[torch.Tensor],
    value: Any,
    accumulate: str | None,
) -> Any:
    """A write at indices of adjacent dimensions, over the full length of the others."""
    node = target.handle.node
    try:
        shape = torch.broadcast_shapes(*(index.shape for index in indices))
    except RuntimeError:
        return NotImplemented
    flat: list[Node] = []
    for position, index in zip(positions, indices, strict=True):
        size = node.shape[position]
        index = index.expand(shape).reshape(-1).long()
        is_known = index.numel() and ledger_of(index) is None
        if is_known and not (-size <= int(index.min()) and int(index.max()) < size):
            return NotImplemented
        flat.append(InputNode(torch.where(index < 0, index + size, index), ((),)))
    before, after = node.dims[: positions[0]], node.dims[positions[-1] + 1 :]
    region = torch.Size([*map(size_of, before), *shape, *map(size_of, after)])
    value = _spread(value, node, region)
    if value is None or value.dtype != node.dtype:
        return NotImplemented
    spread = value.dim() > len(after) and any(
        size != 1
        for size in value.shape[max(0, value.dim() - len(after) - len(shape)) : value.dim() - len(after)]
    )
    if spread or value.dim() > len(after):
        # Merge the dimensions of the index into one.
        lead = value.dim() - len(after) - len(shape)
        value = value.reshape([1] * max(0, -lead) + list(value.shape))
        count = value.dim() - len(after) - len(shape)
        middle = value.shape[count : count + len(shape)]
        if spread:
            value = value.expand(*value.shape[:count], *shape, *value.shape[count + len(shape) :])
            middle = shape
        value = value.reshape(*value.shape[:count], middle.numel(), *value.shape[count + len(middle) :])
    source = InputNode.aligned(value.to(node.dtype), (*before, (), *after))
    return wrap(Indexed(node, positions, tuple(flat), source, accumulate, spread), target.handle.call)
