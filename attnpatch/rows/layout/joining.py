"""Functions that join scores with other tensors, constants or themselves: ``cat``, ``pad``, ``repeat``, ``roll``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.rows.arguments import argument, first_deferred
from attnpatch.rows.creation.row_masks import ConstantNode
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, LEAD, ROW, Axis, Dim, Dims, Tile, flat_range, fresh, leaves, unify
from attnpatch.rows.graph.nodes import InputNode, Node, SliceNode, ViewNode
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout import relative_shift
from attnpatch.rows.layout.regions import asked, rest_of
from attnpatch.rows.op_table import op


class Joined(Node):
    """Tensors concatenated along a dimension that can be cut: rows, heads.

    Args:
        pieces: The tensors; each has its own axes in that dimension.
        position: The dimension.
        dims: The axes of the result.
        dtype: Its dtype.
    """

    renames_axes = lies_by_rows = True

    def __init__(self, pieces: Sequence[Node], position: int, dims: Dims, dtype: torch.dtype) -> None:
        self.children = tuple(pieces)
        self.position, self.dims = position, dims
        self.dtype, self.device = dtype, pieces[0].device

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        cut, span, others = _along(self, self.position, tile)
        parts: list[torch.Tensor] = []
        start = 0
        for piece in self.children:
            size = piece.shape[self.position]
            first, last = max(span[0] - start, 0), min(span[1] - start, size)
            start += size
            if first >= last:
                continue
            wanted = dict(others)
            offset, count = asked(piece.dims[self.position], first, last, wanted, run)
            parts.append(run.value(piece, wanted).narrow(self.position, offset, count).to(self.dtype))
        return rest_of(torch.cat(parts, self.position), self.dims, tile, cut)


class Flipped(Node):
    """A tensor with one dimension in reverse order; that dimension can be cut."""

    renames_axes = reads_a_run = True

    def __init__(self, child: Node, position: int) -> None:
        self.children = (child,)
        self.position, self.dtype, self.device = position, child.dtype, child.device
        self.native = (torch.flip, ([position],), {})
        new = fresh(child.shape[position : position + 1], child.dims[position][-1].kind)
        self.dims = (*child.dims[:position], *new, *child.dims[position + 1 :])

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        size, child = self.shape[self.position], self.children[0]
        cut, span, wanted = _along(self, self.position, tile)
        offset, count = asked(child.dims[self.position], size - span[1], size - span[0], wanted, run)
        value = run.value(child, wanted).narrow(self.position, offset, count).flip(self.position)
        return rest_of(value, self.dims, tile, cut)


def _along(node: Node, position: int, tile: Tile) -> tuple[Tile, tuple[int, int], Tile]:
    """The tile, widened until a dimension is one contiguous range; that range; the tile without that dimension."""
    own = leaves(node.dims[position])
    others = {axis: span for axis, span in tile.items() if axis not in own}
    span = flat_range(own, tile)
    return (others, (0, node.shape[position]), dict(others)) if span is None else (tile, span, others)


@op("cat", "concat", "concatenate")
def concatenate(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``cat``: if it joins along keys (a sink's column beside scores), the keys must be complete; rows and heads can
    still be cut.
    """
    pieces = argument(args, kwargs, 0, "tensors")
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
    if not isinstance(pieces, (tuple, list)) or not isinstance(dim, int) or len(args) > 2:
        return NotImplemented
    return joined(list(pieces), dim)


def joined(pieces: list[torch.Tensor], dim: int) -> Any:
    """The concatenation of tensors, some of them deferred."""
    first = first_deferred((pieces,), {})
    count = first.dim()
    if not -count <= dim < count or any(piece.dim() != count for piece in pieces):
        return NotImplemented
    position = dim % count
    if not all(piece.numel() for piece in pieces):
        return NotImplemented  # an empty tensor has no axis
    for piece in pieces:
        sizes = zip(piece.shape, first.shape, strict=True)
        if piece.device != first.device or any(a != b for i, (a, b) in enumerate(sizes) if i != position):
            return NotImplemented
    nodes = [piece.handle.node for piece in pieces if isinstance(piece, DeferredTensor)]
    dims = list(nodes[0].dims)
    for i, own in enumerate(dims):
        if i != position and not all(unify(own, other.dims[i]) for other in nodes[1:]):
            return NotImplemented
    kinds = [axis.kind for node in nodes for axis in leaves(node.dims[position])]
    has_rows = ROW in kinds
    kind = ROW if has_rows else KEY if KEY in kinds else LEAD
    dims[position] = fresh([sum(piece.shape[position] for piece in pieces)], kind)[0]
    whole: list[Axis] = [*dims[position]]
    parts: list[Node] = []
    for piece in pieces:
        if isinstance(piece, DeferredTensor):
            part = piece.handle.node
            whole += part.dims[position]
        else:
            own = () if kind == KEY else fresh(piece.shape[position : position + 1], kind)[0]
            part = InputNode(piece, tuple(own if i == position else dim for i, dim in enumerate(dims)))
        parts.append(part)
    dtype = functools.reduce(torch.promote_types, [piece.dtype for piece in pieces])
    if has_rows and all(part.dtype == dtype for part in parts):
        # Concatenation along rows may be the first step of a relative shift.
        return wrap(relative_shift.joined(parts, position), first.handle.call)
    if kind != KEY:
        return wrap(Joined(parts, position, tuple(dims), dtype), first.handle.call)
    call = OpNode(torch.cat, (parts, dim), {}, tuple(dims), dtype, first.device, tuple(whole))
    return wrap(call, first.handle.call)


@op("stack", "hstack", "vstack", "dstack", "row_stack", "column_stack")
def stack(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``stack``; ``hstack``, ``vstack`` and the like, for tensors that have the dimension already."""
    pieces = argument(args, kwargs, 0, "tensors")
    if not isinstance(pieces, (tuple, list)):
        return NotImplemented
    fixed = {"vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}.get(name)
    if fixed is not None:
        is_there = min(piece.dim() for piece in pieces) > fixed + 1
        return joined(list(pieces), fixed) if is_there else NotImplemented
    dim, shape = argument(args, kwargs, 1, "dim", 0), pieces[0].shape
    if not isinstance(dim, int) or any(piece.shape != shape for piece in pieces):
        return NotImplemented
    dim = dim % (len(shape) + 1)
    return joined([piece.unsqueeze(dim) for piece in pieces], dim)


@op("pad")
def pad(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``pad`` with a constant: keys, rows or heads are added at either end, or cut off by a negative amount."""
    source, amounts = args[0], argument(args, kwargs, 1, "pad")
    if not isinstance(source, DeferredTensor) or argument(args, kwargs, 2, "mode", "constant") != "constant":
        return NotImplemented
    value = argument(args, kwargs, 3, "value") or 0
    if not isinstance(amounts, (tuple, list)) or not isinstance(value, (bool, int, float)):
        return NotImplemented
    if not any(amounts):
        return source.clone()
    call = source.handle.call
    for i, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        if not before and not after:
            continue
        node = source.handle.node
        position = len(node.dims) - 1 - i
        if position < 0 or node.shape[position] + min(before, 0) + min(after, 0) < 1:
            return NotImplemented
        if min(before, after) < 0:
            node = relative_shift.cut(node, position, max(0, -before), node.shape[position] + min(after, 0))
        kind = next((axis.kind for axis in leaves(node.dims[position])), LEAD)
        pieces: list[Any] = []
        for count in (before, None, after):
            if count is None:
                pieces.append(wrap(node, call))
            elif count > 0:
                dims = (*node.dims[:position], *fresh([count], kind), *node.dims[position + 1 :])
                pieces.append(wrap(ConstantNode(value, dims, node.dtype, node.device), call))
        source = joined(pieces, position) if len(pieces) > 1 else pieces[0]
        if source is NotImplemented:
            return NotImplemented
    return source


@op("repeat", "tile")
def repeat(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``repeat`` and ``tile``: the whole tensor, several times."""
    source = args[0]
    given = args[1:] or (kwargs.get("repeats", kwargs.get("dims")),)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    if not isinstance(source, DeferredTensor) or not all(isinstance(n, int) and n > 0 for n in given):
        return NotImplemented
    node = source.handle.node
    missing = len(given) - len(node.dims)
    if missing < 0:
        if name == "repeat":
            return NotImplemented
        given = (*[1] * -missing, *given)
    old: Dims = (*[()] * max(0, missing), *node.dims)
    return wrap(_several(node, old, given, inside=False), source.handle.call)


@op("repeat_interleave")
def repeat_interleave(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``repeat_interleave``: every key, row or head repeated next to itself."""
    source, count, dim = args[0], argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if not isinstance(source, DeferredTensor) or not isinstance(count, int) or count < 1:
        return NotImplemented
    if not isinstance(dim, int) or len(args) > 3:
        return NotImplemented
    if kwargs.get("output_size") not in (None, count * source.shape[dim]):
        return NotImplemented
    node = source.handle.node
    counts = [1] * len(node.dims)
    counts[dim] = count
    return wrap(_several(node, node.dims, counts, inside=True), source.handle.call)


def _several(node: Node, old: Dims, counts: Sequence[int], inside: bool) -> Node:
    """``node``, viewed with dimensions ``old``, repeated; with ``inside`` each element is next to its copies."""
    apart: list[Dim] = []
    spread: list[Dim] = []
    merged: list[Dim] = []
    for own, count in zip(old, counts, strict=True):
        kind = next((axis.kind for axis in leaves(own)), LEAD)
        new = fresh([count], KEY if kind == KEY else LEAD)[0]
        apart += [own, ()] if inside else [(), own]
        spread += [own, new] if inside else [new, own]
        merged.append((*own, *new) if inside else (*new, *own))
    found = ViewNode(ViewNode(ViewNode(node, tuple(apart)), tuple(spread), expand=True), tuple(merged))
    found.lies_by_rows = True  # torch makes a contiguous copy
    return found


def roll_rows(source: DeferredTensor, shift: int, dim: int) -> Any:
    """``roll``, as the concatenation of the two parts that it swaps."""
    node = source.handle.node
    position = dim % len(node.dims)
    size = node.shape[position]
    place = size - shift % size
    if place == size:
        return source.clone()
    cuts = [SliceNode(node, position, low, high) for low, high in ((place, size), (0, place))]
    return joined([wrap(cut, source.handle.call) for cut in cuts], position)


def flip_rows(source: DeferredTensor, dims: Any) -> Any:
    """``flip``, one dimension after the other."""
    node = source.handle.node
    for dim in [dims] if isinstance(dims, int) else dims:
        if node.shape[dim] > 1:
            node = Flipped(node, dim % len(node.dims))
    return source.clone() if node is source.handle.node else wrap(node, source.handle.call)


@op("broadcast_tensors")
def broadcast_tensors(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in given))
    return tuple(tensor.expand(shape) for tensor in given)
