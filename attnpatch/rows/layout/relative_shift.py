"""Views that cut across rows of scores: the relative shift, in every way it is written.

Scores by distance become scores by key when their elements, in row-major order, are read with another row length
(Transformer-XL, Music Transformer, VITS). The flat index of element ``[i, j]`` is an affine function of ``i`` and
``j``. So a few rows of the result are a range of flat indices, and these lie in a few rows of the source.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, LEAD, ROW, Axis, Dims, Tile, leaves, local_shape, regroup, size_of
from attnpatch.rows.graph.nodes import InputNode, Node, SliceNode, ViewNode, widened
from attnpatch.rows.graph.operations import OpNode


class Strided(Node):
    """A strided view of some tensors that are flattened and concatenated.

    ``result[..., i, j, ...] = laid[..., offset + i * strides[0] + j * strides[1], ...]``. In ``laid`` the middle
    dimensions of each source are flattened into one, and the sources are concatenated along it.

    Args:
        sources: Tensors that share their first and last dimensions with the result.
        before, after: The numbers of shared first and last dimensions.
        middle: The axes of the result's dimensions between them.
        strides: For each middle dimension, the step in ``laid`` from one element to the next.
        offset: The index in ``laid`` of the first element.
    """

    renames_axes = True

    def __init__(
        self,
        sources: Sequence[Node],
        before: int,
        after: int,
        middle: Dims,
        strides: Sequence[int],
        offset: int,
    ) -> None:
        self.children = tuple(sources)
        self.before, self.after = before, after
        self.strides, self.offset = tuple(strides), offset
        first = sources[0]
        self.dims = (*first.dims[:before], *middle, *first.dims[len(first.dims) - after :])
        self.dtype, self.device = first.dtype, first.device

    @property
    def middle(self) -> Dims:
        return self.dims[self.before : len(self.dims) - self.after]

    def middle_of(self, source: Node) -> list[Axis]:
        """The axes of a source's middle dimensions, which are flattened."""
        return leaves(
            axis for dim in source.dims[self.before : len(source.dims) - self.after] for axis in dim
        )

    @property
    def whole(self) -> tuple[Axis, ...]:  # type: ignore[override]
        # Only the source rows that a range touches are computed, but those rows are complete.
        return tuple(axis for source in self.children for axis in self.middle_of(source)[1:])

    def heads(self) -> list[Axis]:
        """The outermost flattened axis of each source, which is its row axis. The result has other axes for them."""
        return [axes[0] for axes in map(self.middle_of, self.children) if axes]

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        counts, strides, first, last = [], [], self.offset, self.offset
        for dim, stride in zip(self.middle, self.strides, strict=True):
            inside = stride * size_of(dim)
            for axis in leaves(dim):
                inside //= axis.size
                low, high = tile.get(axis, (0, axis.size))
                counts.append(high - low)
                strides.append(inside)
                first += low * inside
                last += (high - 1) * inside
        laid = self._laid(first, last + 1, tile, run)
        at, own = self.before, laid.stride()
        sizes = (*laid.shape[:at], *counts, *laid.shape[at + 1 :])
        steps = (*own[:at], *(stride * own[at] for stride in strides), *own[at + 1 :])
        return laid.as_strided(sizes, steps, laid.storage_offset()).reshape(local_shape(self.dims, tile))

    def _laid(self, first: int, last: int, tile: Tile, run: Evaluator) -> torch.Tensor:
        """``laid[first:last]``: that range of the flattened, concatenated sources."""
        pieces, start = [], 0
        for source in self.children:
            length = math.prod(source.shape[self.before : len(source.dims) - self.after])
            low, high = max(first - start, 0), min(last - start, length)
            if low < high:
                pieces.append(self._part(source, low, high, tile, run))
            start += length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.before)

    def _part(self, source: Node, low: int, high: int, tile: Tile, run: Evaluator) -> torch.Tensor:
        """The range ``low:high`` of one flattened source."""
        axes, count = self.middle_of(source), len(source.dims)
        outside = leaves(
            axis for dim in (*source.dims[: self.before], *source.dims[count - self.after :]) for axis in dim
        )
        own = {axis: tile[axis] for axis in outside if axis in tile}
        start = 0
        if axes and axes[0] not in run.whole:
            width = math.prod(axis.size for axis in axes[1:])
            rows = widened(low // width, -(-high // width), axes[0])
            if rows != (0, axes[0].size):
                own[axes[0]] = rows
            start = rows[0] * width
        value = run.value(source, own)
        value = value.flatten(self.before, value.dim() - self.after - 1)
        return value.narrow(self.before, low - start, high - low)


def cuts_across(dims: Dims, shape: Sequence[int]) -> bool:
    """True if a ``view`` cuts across axes, or merges a whole row axis with a part of a later axis.

    ``regroup`` could do the latter, but then no rows could be computed alone.
    """
    pool = [(axis, axis.size) for dim in dims for axis in leaves(dim)]
    for size in shape:
        found: list[tuple[Axis, int]] = []
        while size > 1:
            if not pool:
                return True
            axis, left = pool.pop(0)
            if size % left == 0:
                part = left
            elif left % size == 0:
                part = size
                pool.insert(0, (axis, left // size))
            else:
                return True
            size //= part
            found.append((axis, part))
        if any(axis.kind != LEAD for axis, _ in found[:-1]) and any(
            part != axis.size for axis, part in found[1:]
        ):
            return True
    return False


def bare(node: Node) -> Node:
    """``node`` without views that change nothing (they exist because two tensors share a graph)."""
    while (
        type(node) is ViewNode
        and not (node.expand or node.stops_gradient)
        and node.dims == node.children[0].dims
    ):
        node = node.children[0]
    return node


def viewed(node: Node, shape: Sequence[int]) -> Node | None:
    """The node for a ``view`` that ``cuts_across``; ``None`` if this view does not."""
    node = bare(node)
    if isinstance(node, Strided):
        restrided = _restrided(node, shape)
        if restrided is not None:
            return restrided
        if not cuts_across(node.dims, shape):
            return None
    groups = _groups(node.shape, shape)
    if groups is None:
        return None
    fits = [not cuts_across(node.dims[a:b], shape[c:d]) for a, b, c, d in groups]
    first = fits.index(False) if False in fits else 0
    last = len(fits) - fits[::-1].index(False) if False in fits else len(fits)
    inner = groups[first:last]
    begin, end = (inner[0][0], inner[0][2]), (inner[-1][1], inner[-1][3])
    prefix = regroup(node.dims[: begin[0]], shape[: begin[1]])
    suffix = regroup(node.dims[end[0] :], shape[end[1] :])
    if prefix is None or suffix is None:
        return None
    source = node
    if (prefix, suffix) != (node.dims[: begin[0]], node.dims[end[0] :]):
        source = ViewNode(node, (*prefix, *node.dims[begin[0] : end[0]], *suffix))
    sizes = list(shape[begin[1] : end[1]])
    middle = _fresh_middle([source], len(prefix), len(suffix), sizes)
    return Strided([source], len(prefix), len(suffix), middle, _contiguous(sizes), 0)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
    """Match the dimensions of two equally large shapes: ``(a, b, c, d)`` if ``old[a:b]`` and ``new[c:d]`` agree."""
    found, a, c = [], 0, 0
    while a < len(old) and c < len(new):
        b, d = a + 1, c + 1
        left, right = old[a], new[c]
        while left != right:
            if left < right:
                if b == len(old):
                    return None
                left, b = left * old[b], b + 1
            else:
                if d == len(new):
                    return None
                right, d = right * new[d], d + 1
        found.append((a, b, c, d))
        a, c = b, d
    if found and (a < len(old) or c < len(new)):
        # Only dimensions of size 1 are left over.
        found[-1] = (found[-1][0], len(old), found[-1][2], len(new))
    return found or None


def _fresh_middle(sources: Sequence[Node], before: int, after: int, sizes: Sequence[int]) -> Dims:
    """New axes for a shifted matrix: rows come first if they come first in the source, else keys."""
    middles = [leaves(axis for dim in s.dims[before : len(s.dims) - after] for axis in dim) for s in sources]
    first, others = (ROW, KEY) if any(axes and axes[0].kind != KEY for axes in middles) else (KEY, ROW)
    return tuple((Axis(size, others if i else first),) if size != 1 else () for i, size in enumerate(sizes))


def _contiguous(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def _restrided(node: Strided, shape: Sequence[int]) -> Strided | None:
    """The node for a ``view`` of a ``Strided`` node, if the result is strided, too; otherwise ``None``."""
    sizes, end = list(node.shape), len(shape) - node.after
    if (
        list(shape[: node.before]) != sizes[: node.before]
        or list(shape[end:]) != sizes[len(sizes) - node.after :]
    ):
        return None
    old, new = sizes[node.before : len(sizes) - node.after], list(shape[node.before : end])
    groups = _groups(old, new) if math.prod(old) == math.prod(new) else None
    if groups is None:
        return None
    strides: list[int] = []
    for a, b, c, d in groups:
        own = [(size, stride) for size, stride in zip(old[a:b], node.strides[a:b], strict=True) if size != 1]
        if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(own)):
            return None
        step = own[-1][1] if own else 1
        strides += [inside * step for inside in _contiguous(new[c:d])]
    middle = _fresh_middle(node.children, node.before, node.after, new)
    return Strided(node.children, node.before, node.after, middle, strides, node.offset)


def cut(node: Node, position: int, start: int, stop: int) -> Node:
    """``start:stop`` of one dimension."""
    node = bare(node)
    at = position - getattr(node, "before", 0)
    if isinstance(node, Strided) and 0 <= at < len(node.middle):
        old = node.middle[at]
        new = (Axis(stop - start, leaves(old)[0].kind),) if stop - start != 1 else ()
        middle = (*node.middle[:at], new, *node.middle[at + 1 :])
        offset = node.offset + start * node.strides[at]
        return Strided(node.children, node.before, node.after, middle, node.strides, offset)
    axes = leaves(node.dims[position])
    if len(axes) > 1 and axes[0].kind != LEAD:
        # A whole matrix flattened into one dimension: a part of it is not a range of rows.
        after = len(node.dims) - position - 1
        middle = _fresh_middle([node], position, after, [stop - start])
        return Strided([node], position, after, middle, [1], start)
    return SliceNode(node, position, start, stop)


def joined(pieces: Sequence[Node], position: int) -> Strided:
    """Tensors concatenated along a dimension with rows; they share the axes of their other dimensions."""
    after = len(pieces[0].dims) - position - 1
    length = sum(piece.shape[position] for piece in pieces)
    return Strided(pieces, position, after, ((Axis(length, ROW),),), [1], 0)


def as_strided(node: Node, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Strided | None:
    """``as_strided`` of a contiguous tensor; ``None`` if it is not contiguous or the view leaves its memory."""
    count = node.shape.numel()
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if not _is_contiguous(node) or min(sizes, default=0) < 1 or min(strides, default=0) < 0 or last >= count:
        return None
    own, before = list(node.shape), 0
    steps = _contiguous(own)
    inside = last
    # Leading dimensions (batch, heads) that the view leaves as they are.
    while before < min(len(own), len(sizes)) - 1 and (own[before], steps[before]) == (
        sizes[before],
        strides[before],
    ):
        inside -= (own[before] - 1) * steps[before]
        before += 1
    while before and inside >= steps[before - 1]:
        before -= 1
        inside += (own[before] - 1) * steps[before]
    middle = _fresh_middle([node], before, 0, sizes[before:])
    return Strided([node], before, 0, middle, strides[before:], offset)


def _is_contiguous(node: Node) -> bool:
    """True if the native tensor is known to be contiguous."""
    if isinstance(node, ViewNode):
        return not node.expand and _is_contiguous(node.children[0])
    if not isinstance(node, OpNode):
        return False
    name = getattr(node.func, "__name__", "")
    if name in ("matmul", "__matmul__", "bmm", "baddbmm", "mm", "cat", "pad", "linalg_matmul"):
        return True
    others = [child for child in node.children if not isinstance(child, InputNode)]
    return name in _AS_ITS_OPERAND and len(others) == 1 and _is_contiguous(others[0])


_AS_ITS_OPERAND = frozenset("mul div add sub __rmul__ masked_fill softmax tanh to float clone".split())
