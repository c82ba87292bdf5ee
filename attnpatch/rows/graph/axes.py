"""Named axes of a graph, and the pieces of tensors that belong to a tile of them.

Every dimension of every tensor in a graph is a tuple of axes: usually one axis, several where a ``view`` has
merged dimensions, none where the dimension has size 1 or is never cut. Two dimensions that must be cut together
share their axes, whatever their positions, so a transposed or reshaped score matrix needs no special case. A
``view`` that cuts a dimension in two *splits* its axis, and everything recorded before follows, because it refers
to the axis and not to a position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from attnpatch.policy import LEAST_ROWS

ROW, KEY, LEAD = "row", "key", "lead"
# A tile has at least this many elements of an axis, and is cut at multiples of it. With fewer rows, or a single head,
# matrix libraries choose another kernel, which rounds differently. They have further kernels for the rows left over and
# for memory that begins at another alignment. Measured over layouts, sizes, dtypes and heads by `python -m benchmarks
# rounding`, on processors of two makers: products of up to 15 rows differed, products of 16 never did. A slice of the
# keys is cut at the same numbers, because it makes a narrower product.
LEAST = {ROW: LEAST_ROWS, LEAD: 2, KEY: 16}
# The number of rows if memory has no room for LEAST_ROWS: so few rows round differently, but only in some layouts.
FEWEST_ROWS = 4


class Axis:
    """One independent direction of a graph, of ``size`` elements.

    Attributes:
        size: Number of elements.
        kind: ``"row"`` (only the query has it), ``"key"`` (only the key has it, or softmax ran over it), ``"lead"``
            (both have it: batch, heads). It guides the choice of tiles and never what is computed.
        made_by: The torch function after which the origin of the axis's elements is unknown; ``None`` if there is no
            such function, or if nothing keeps track.
    """

    __slots__ = ("_alias", "_parts", "kind", "made_by", "part_of", "size")
    # Another object after every change to the leaves of any axis, so that others can keep what they found of leaves.
    latest: ClassVar[object] = object()

    def __init__(self, size: int, kind: str = LEAD) -> None:
        self.size = size
        self.kind = kind
        self.made_by: str | None = None
        self._alias: Axis | None = None
        self._parts: tuple[Axis, Axis] | None = None
        self.part_of: Axis | None = None

    def __repr__(self) -> str:
        return f"{self.kind}:{self.size}"

    def leaves(self) -> list[Axis]:
        """The axes this one stands for now, outermost first."""
        axis = self
        while axis._alias is not None:
            axis = axis._alias
        if axis._parts is None:
            return [axis]
        return axis._parts[0].leaves() + axis._parts[1].leaves()

    def split(self, outer: int) -> None:
        """Cut this leaf into ``outer`` x (size / outer)."""
        Axis.latest = object()
        self._parts = (Axis(outer, self.kind), Axis(self.size // outer, self.kind))
        for part in self._parts:
            part.made_by, part.part_of = self.made_by, self

    def wholes(self) -> Iterator[Axis]:
        """This axis, and those that it was split from, innermost first."""
        axis: Axis | None = self
        while axis is not None:
            yield axis
            axis = axis.part_of

    def unify_with(self, other: Axis) -> None:
        """Make this leaf another name of the leaf ``other``."""
        if other is not self:
            Axis.latest = object()
            self._alias = other


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]
Tile = dict[Axis, tuple[int, int]]


def leaves(axes: Iterable[Axis]) -> list[Axis]:
    found: list[Axis] = []
    for axis in axes:  # a loop, since this is called for every function that is followed
        if axis._alias is not None or axis._parts is not None:
            found += [leaf for leaf in axis.leaves() if leaf.size > 1]
        elif axis.size > 1:
            found.append(axis)
    return found


def all_leaves(dims: Dims) -> list[Axis]:
    return leaves(itertools.chain.from_iterable(dims))


def size_of(dim: Dim) -> int:
    return dim[0].size if len(dim) == 1 else math.prod(axis.size for axis in dim)


def fresh(shape: Iterable[int], kind: str = LEAD) -> Dims:
    """A new axis for every dimension of size above 1."""
    return tuple((Axis(size, kind),) if size != 1 else () for size in shape)


def unify(first: Dim, second: Dim) -> bool:
    """Make two dimensions of one size the same axes; ``False`` if their splits do not fit each other."""
    while True:
        left, right = leaves(first), leaves(second)
        for a, b in zip(left, right, strict=False):
            if a is b:
                continue
            if a.size == b.size:
                b.unify_with(a)
            elif a.size % b.size == 0:
                a.split(b.size)
            elif b.size % a.size == 0:
                b.split(a.size)
            else:
                return False
            break
        else:
            return len(left) == len(right)


def regroup(dims: Dims, shape: Iterable[int]) -> Dims | None:
    """The axes of ``shape`` after a ``view``, in row-major order; ``None`` if the view cuts across axes."""
    pool = all_leaves(dims)
    result: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        while size > 1:
            if not pool:
                return None
            axis = pool.pop(0)
            if size % axis.size == 0:
                dim.append(axis)
                size //= axis.size
            elif axis.size % size == 0:
                axis.split(size)
                outer, inner = axis.leaves()
                dim.append(outer)
                pool.insert(0, inner)
                size = 1
            else:
                return None
        result.append(tuple(dim))
    return tuple(result) if not pool else None


def extent(dim: Dim, tile: Tile) -> int:
    """Number of elements of a dimension inside a tile."""
    count = 1
    for leaf in leaves(dim):
        low, high = tile.get(leaf, (0, leaf.size))
        count *= high - low
    return count


def local_shape(dims: Dims, tile: Tile) -> list[int]:
    return [extent(dim, tile) for dim in dims]


def flat_range(parts: list[Axis], tile: Tile) -> tuple[int, int] | None:
    """``(start, stop)`` of a tile in a merged dimension; ``None`` if the tile is not one contiguous range of it."""
    low, count, inner_is_full = 0, 1, True
    stride = 1
    for leaf in reversed(parts):
        start, stop = tile.get(leaf, (0, leaf.size))
        if not inner_is_full and stop - start > 1:
            return None
        low += start * stride
        count *= stop - start
        inner_is_full = inner_is_full and stop - start == leaf.size
        stride *= leaf.size
    return low, low + count


def window(tensor: torch.Tensor, dims: Dims, tile: Tile) -> torch.Tensor:
    """The view of ``tensor`` inside ``tile``; a merged dimension stays unflattened if the tile is not one range."""
    for position in range(len(dims) - 1, -1, -1):
        parts = leaves(dims[position]) if dims[position] else []
        if not any(leaf in tile for leaf in parts):
            continue
        run = flat_range(parts, tile)
        if run is not None:
            tensor = tensor.narrow(position, run[0], run[1] - run[0])
            continue
        tensor = tensor.unflatten(position, [leaf.size for leaf in parts])
        for offset, leaf in enumerate(parts):
            if leaf in tile:
                low, high = tile[leaf]
                tensor = tensor.narrow(position + offset, low, high - low)
    return tensor


def take(tensor: torch.Tensor, dims: Dims, tile: Tile) -> torch.Tensor:
    """The part of ``tensor`` inside ``tile``, with as many dimensions as ``tensor``."""
    part = window(tensor, dims, tile)
    if part.dim() == len(dims):
        return part
    return part.reshape(
        [extent(dim, tile) if dim else size for dim, size in zip(dims, tensor.shape, strict=True)]
    )


def put(tensor: torch.Tensor, dims: Dims, tile: Tile, value: torch.Tensor) -> None:
    """Write ``value`` into the part of ``tensor`` inside ``tile``."""
    part = window(tensor, dims, tile)
    part.copy_(value if part.dim() == value.dim() else value.reshape(part.shape))


def add(tensor: torch.Tensor, dims: Dims, tile: Tile, value: torch.Tensor) -> None:
    """Add ``value`` to the part of ``tensor`` inside ``tile``."""
    part = window(tensor, dims, tile)
    part.add_(value if part.dim() == value.dim() else value.reshape(part.shape))
