"""Tells which elements of a tensor a view has. They are read from the strides, so this holds for any function that
makes views.
"""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.rows.graph.axes import Axis, Dims, fresh, leaves


@dataclasses.dataclass(frozen=True)
class Part:
    """``start:start + count * step:step`` of an axis."""

    of: Axis
    start: int
    count: int
    step: int


def viewed(dims: Dims, source: torch.Tensor, result: torch.Tensor) -> list[tuple[Axis | Part, ...]]:
    """For each dimension of a view: the axes of the source that it runs along, or parts of them.

    Args:
        dims: The axes of ``source``.
        source: The tensor that is viewed.
        result: The view, in the same storage and of the same dtype.
    """
    sizes = list(zip(result.shape, result.stride(), strict=True))
    delta = result.storage_offset() - source.storage_offset()
    if not delta and sizes == list(zip(source.shape, source.stride(), strict=True)):
        return list(dims)
    strided = _strided(dims, source)
    return [tuple(_dim(dims, source, sizes, place, delta, strided)) for place in range(len(sizes))]


def _strided(dims: Dims, source: torch.Tensor) -> list[tuple[Axis, int]]:
    """Every leaf and its stride, the widest stride first."""
    found: list[tuple[Axis, int]] = []
    for dim, stride in zip(dims, source.stride(), strict=True):
        if stride == 0:
            continue  # expanded: all its elements are the same one
        for leaf in reversed(leaves(dim)):
            found.append((leaf, stride))
            stride *= leaf.size
    return sorted(found, key=lambda pair: -pair[1])


def _dim(
    dims: Dims,
    source: torch.Tensor,
    sizes: list[tuple[int, int]],
    place: int,
    delta: int,
    strided: list[tuple[Axis, int]],
) -> list[Axis | Part]:
    count, stride = sizes[place]
    if count == 1:
        return []
    if stride == 0:
        expanded = [
            dim
            for dim, size, own in zip(dims, source.shape, source.stride(), strict=True)
            if own == 0 and size == count
        ]
        return list(leaves(expanded[0])) if len(expanded) == 1 else [*fresh([count])[0]]
    others = [own for i, own in enumerate(sizes) if i != place and own[0] > 1]
    found: list[Axis | Part] = []
    while count > 1:
        at = next(
            (
                pair
                for pair in strided
                if 0 < pair[1] <= stride < pair[1] * pair[0].size and stride % pair[1] == 0
            ),
            None,
        )
        if at is None:
            return [*fresh([sizes[place][0]])[0]]  # a dimension that was expanded
        leaf, own = at
        step = stride // own
        if step == 1 and count >= leaf.size:
            if count % leaf.size or _digit(strided, leaf, delta):
                return [*fresh([sizes[place][0]])[0]]
            found.insert(0, leaf)
            count, stride = count // leaf.size, stride * leaf.size
            continue
        if step > 1 and leaf.size % step == 0 and any(n == step and s == own for n, s in others):
            leaf.split(leaf.size // step)
            strided[:] = _strided(dims, source)
            continue
        if step == 1 and leaf.size % count == 0 and any(s == own * count for _, s in others):
            leaf.split(leaf.size // count)
            strided[:] = _strided(dims, source)
            continue
        start = _digit(strided, leaf, delta)
        if found or start + (count - 1) * step >= leaf.size:
            return [*fresh([sizes[place][0]])[0]]
        return [Part(leaf, start, count, step)]
    return found


def single(dims: Dims, source: torch.Tensor, result: torch.Tensor, place: int) -> Part | None:
    """Which element of dimension ``place`` a view of size 1 there shows; ``None`` if it is not known."""
    if result.dim() != source.dim() or result.shape[place] != 1 or source.shape[place] == 1:
        return None
    if result.stride(place) != source.stride(place):
        return None  # a transposed view: another dimension has become this one
    parts = leaves(dims[place])
    if len(parts) != 1:
        return None
    delta = result.storage_offset() - source.storage_offset()
    return Part(parts[0], _digit(_strided(dims, source), parts[0], delta), 1, 1)


def _digit(strided: list[tuple[Axis, int]], leaf: Axis, delta: int) -> int:
    """The index along ``leaf`` of the element at ``delta`` in the storage."""
    for axis, stride in strided:
        if stride <= 0:
            continue
        digit = delta // stride
        if axis is leaf:
            return digit
        delta -= digit * stride
    return 0
