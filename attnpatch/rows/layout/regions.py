"""Nodes that replace a region of a tensor.

To compute a tile, they copy the tile of the old tensor and write those new values that lie inside it.
"""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Axis, Dim, Tile, flat_range, leaves, take
from attnpatch.rows.graph.nodes import Node, widened


@dataclasses.dataclass(frozen=True)
class Region:
    """A slice of one dimension: every ``step``-th index from ``start`` on, ``axis.size`` of them."""

    start: int
    step: int
    axis: Axis

    def inside(self, low: int, high: int) -> tuple[int, int]:
        """The range of the region's own indices (0 to ``axis.size``) whose elements lie in ``low:high``."""
        first = max(0, -(-(low - self.start) // self.step))
        last = min(self.axis.size, -(-(high - self.start) // self.step))
        return first, max(first, last)


class Written(Node):
    """A tensor in which a part, given by slices, is replaced.

    Args:
        child: The tensor.
        regions: The slice of each dimension that is replaced; ``None``: all of the dimension.
        source: The new values, aligned from the right with ``child``. Where ``regions`` has a slice, the source's
            dimension has that slice's axis.
    """

    renames_axes = copies_layout = True

    def __init__(self, child: Node, regions: list[Region | None], source: Node) -> None:
        self.children = (child, source)
        self.dims, self.dtype, self.device = child.dims, child.dtype, child.device
        self.regions = regions
        # A slice is followed along one axis only; a dimension of several merged axes must be complete.
        self.whole = tuple(
            axis
            for region, dim in zip(regions, child.dims, strict=True)
            if region is not None and len(leaves(dim)) > 1
            for axis in dim
        )

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        child, source = self.children
        cut = dict(tile)
        for region, dim in zip(self.regions, self.dims, strict=True):
            if region is not None and flat_range(leaves(dim), tile) is None:
                for leaf in leaves(dim):
                    cut.pop(leaf, None)
        value = run.value(child, cut).clone()
        place: list[slice] = []
        wanted = dict(cut)
        narrowed: list[tuple[int, int, int]] = []
        for position, (region, dim) in enumerate(zip(self.regions, self.dims, strict=True)):
            if region is None:
                place.append(slice(None))
                continue
            span = flat_range(leaves(dim), cut)
            assert span is not None
            first, last = region.inside(*span)
            if first == last:
                return rest_of(value, self.dims, tile, cut)
            start = region.start + first * region.step - span[0]
            place.append(slice(start, start + (last - first - 1) * region.step + 1, region.step))
            narrowed.append((position - len(self.dims), *asked((region.axis,), first, last, wanted, run)))
        part = run.value(source, wanted)
        for back, offset, count in narrowed:
            # A source of size 1 is broadcast over the region, so it is not narrowed.
            if -back <= part.dim() and (offset or part.shape[back] > count) and part.shape[back] > 1:
                part = part.narrow(back, offset, count)
        value[tuple(place)] = part
        return rest_of(value, self.dims, tile, cut)


def asked(dim: Dim, first: int, last: int, wanted: Tile, run: Evaluator) -> tuple[int, int]:
    """Add the range ``first:last`` of a dimension to the tile ``wanted``.

    Returns:
        Where the range begins in the computed part, and its length. The part may be larger than the range: widened for
        equal rounding, or the whole dimension if it cannot be cut.
    """
    parts = leaves(dim)
    if len(parts) != 1 or parts[0] in run.whole:
        return first, last - first
    low, high = widened(first, last, parts[0])
    wanted[parts[0]] = (low, high)
    return first - low, last - first


def rest_of(value: torch.Tensor, dims: tuple[Dim, ...], tile: Tile, cut: Tile) -> torch.Tensor:
    """The part for ``tile`` of a value that was computed for the larger tile ``cut``."""
    if len(cut) == len(tile):
        return value
    left = {axis: span for axis, span in tile.items() if axis not in cut}
    open_dims = tuple(dim if any(leaf in left for leaf in leaves(dim)) else () for dim in dims)
    return take(value, open_dims, left)


class Indexed(Node):
    """A tensor in which the elements at some indices are replaced, or added to.

    Args:
        child: The tensor.
        positions: The dimensions that are indexed, ascending and adjacent.
        indices: For each of them an integer tensor ``[count]`` without negative numbers.
        source: The values: broadcast to the tensor's other dimensions, with one dimension of ``count`` in place of the
            indexed ones.
        accumulate: ``"index_put"`` or ``"index_add"`` to add with that function (they round differently); ``None`` to
            replace.
        spread: True if that dimension of the source has ``count`` elements; False if it has one for all.
    """

    copies_layout = True

    def __init__(
        self,
        child: Node,
        positions: tuple[int, ...],
        indices: tuple[Node, ...],
        source: Node,
        accumulate: str | None,
        spread: bool,
    ) -> None:
        self.children = (child, source, *indices)
        self.dims, self.dtype, self.device = child.dims, child.dtype, child.device
        self.positions, self.accumulate, self.spread = positions, accumulate, spread

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        child, source, *indices = self.children
        cut = dict(tile)
        spans: list[tuple[int, int]] = []
        for position in self.positions:
            parts = leaves(self.dims[position])
            if flat_range(parts, tile) is None:
                for leaf in parts:
                    cut.pop(leaf, None)
            span = flat_range(parts, cut)
            assert span is not None
            spans.append(span)
        value = run.value(child, cut).clone()
        found = [run.value(index, {}) for index in indices]
        if ledger_of(found[0]) is not None:
            return rest_of(value, self.dims, tile, cut)  # a dry run: only shapes matter
        part = run.value(source, cut)
        is_inside: torch.Tensor | None = None
        for position, span, index in zip(self.positions, spans, found, strict=True):
            if span != (0, self.shape[position]):
                here = (index >= span[0]) & (index < span[1])
                is_inside = here if is_inside is None else is_inside & here
        back = len(self.dims) - self.positions[-1]
        if is_inside is not None:
            kept = is_inside.nonzero().flatten()
            found = [index.index_select(0, kept) for index in found]
            if self.spread:
                part = part.index_select(part.dim() - back, kept)
        found = [index - span[0] if span[0] else index for index, span in zip(found, spans, strict=True)]
        place: list[slice | torch.Tensor] = [slice(None)] * len(self.dims)
        for position, index in zip(self.positions, found, strict=True):
            place[position] = index
        if self.accumulate:
            first, count = self.positions[0], len(found[0])
            shape = (*value.shape[:first], count, *value.shape[self.positions[-1] + 1 :])
            part = part.expand(shape)
            if self.accumulate == "index_add":
                value.index_add_(first, found[0], part)
                return rest_of(value, self.dims, tile, cut)
            front = value.movedim(self.positions, tuple(range(len(found))))
            front.index_put_(tuple(found), part.movedim(first, 0), accumulate=True)
        else:
            value[tuple(place)] = part
        return rest_of(value, self.dims, tile, cut)
