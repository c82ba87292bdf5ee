"""Shows an observer the probabilities of attention by rows, and the layout of its dimensions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import torch

from attnpatch.observing import Layout, TileInfo
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.evaluate.tiled import Look
from attnpatch.rows.fusion.bias import SOFTMAX, above, opened_by
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Dim, Tile, all_leaves, extent, leaves, regroup
from attnpatch.rows.graph.dropout import Dropout
from attnpatch.rows.graph.nodes import Node, SliceNode, ViewNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout.joining import Joined
from attnpatch.rows.matmul.spellings import Product
from attnpatch.rows.op_table import CASTS
from attnpatch.rows.precision import in_full
from attnpatch.rows.provenance.dimensions import layout_of
from attnpatch.rows.provenance.sources import Sources, paired
from attnpatch.sdpa_call import SdpaCall

# Functions between softmax and the product with the values that do not change the probabilities.
_AFTER_SOFTMAX = CASTS | {"clone"}

NO_GRADIENT = (
    "its softmax is written by hand, and gradients are captured of scaled_dot_product_attention alone; use "
    "attn_implementation='sdpa', if the model has it"
)


@dataclasses.dataclass
class Scored:
    """A product of queries and keys.

    Attributes:
        axes: Each axis of the graph, with the tracked dimension it comes from.
        contracted: The axes that were summed over.
    """

    axes: list[tuple[Axis, Dim | None]]
    contracted: list[Axis]


def scored(sources: Sources, product: Product, axes: dict[str, Dim]) -> None:
    """Note where the dimensions of scores come from.

    Args:
        sources: The sources of the site's call.
        product: The product of query and key.
        axes: By label of the product's result, the graph's axes.
    """
    query, key = product.pair()
    known: list[dict[str, Dim] | None] = []
    for i in (query, key):
        dims = sources.of(product.operands[i])
        known.append(None if dims is None else dict(zip(product.labels[i], dims, strict=True)))
    first, second = (side or {} for side in known)
    summed = [leaf for label, dim in first.items() if label not in product.result for leaf in leaves(dim)]
    found: list[tuple[Axis, Dim | None]] = []
    for label, own in axes.items():
        sides = (side[label] for side in (first, second) if label in side)
        dim = next((side for side in sides if _is_whole(side, own)), None)
        if dim is not None and label in first and label in second:
            dim = paired(sources, dim, second[label], summed)
        found += [(axis, dim) for axis in own]
    sources.scores.append(Scored(found, summed))


def _is_whole(dim: Dim, axes: Dim) -> bool:
    return math.prod(axis.size for axis in dim) == math.prod(axis.size for axis in axes)


def source_of(sources: Sources, leaf: Axis) -> tuple[Dim | None, list[Axis]]:
    """The tracked dimension that an axis of a graph comes from, and the axes over which its scores were summed."""
    found: tuple[Dim | None, list[Axis]] = None, []
    for score in sources.scores:
        for axis, dim in score.axes:
            parts = axis.leaves()
            if leaf not in parts or dim is None:
                continue
            own = regroup((dim,), [part.size for part in parts])
            if own is not None and (found[0] is None or not sources.is_known(found[0])):
                found = own[parts.index(leaf)], score.contracted
    return found


def before_dropout(node: Node) -> Node:
    """The probabilities before dropout and casts."""
    while (
        isinstance(node, Dropout)
        or (isinstance(node, ViewNode) and node.dims == node.children[0].dims)
        or (
            isinstance(node, OpNode)
            and getattr(node.func, "__name__", "") in _AFTER_SOFTMAX
            and len(node.children) == 1
        )
    ):
        node = node.children[0]
    return node


def watch(probabilities: Node, keys: list[Axis], site: AttentionCall) -> tuple[Node, Look] | None:
    """The node to show an observer (the probabilities before dropout and casts) and the function that shows it.

    ``None`` if there is no observer, or if the node is not normalised.

    Args:
        probabilities: The operand with which the values are multiplied.
        keys: The axes that are summed over.
        site: The attention call.
    """
    observer = site.observer
    if observer is None:
        return None
    node = before_dropout(probabilities)
    normalised = {leaf for step in walk(node) for leaf in leaves(step.whole)}
    axes = [leaf for dim in node.dims for leaf in leaves(dim)]
    if not normalised or len(set(axes)) != len(axes):
        return None
    if observer.is_of_gradient:
        observer.cannot_show(NO_GRADIENT)
        return None
    if site.sources is not None:
        if any(node is other for other in site.sources.shown):
            return None  # shown already: the same probabilities with other values
        site.sources.shown.append(node)
    return guard.attempted(
        functools.partial(_watched, node, axes, keys, site),
        name="preparing to observe attention",
        counters=site.counters,
    )


def _watched(node: Node, axes: list[Axis], keys: list[Axis], site: AttentionCall) -> tuple[Node, Look] | None:
    observer, sources = site.observer, site.sources
    assert observer is not None
    # In attention of both sides, the keys of one side are the rows of the other.
    row_kind = next((kind for kind in (ROW, KEY) if any(a.kind == kind for a in axes if a not in keys)), None)
    rows = [axis for axis in axes if axis not in keys and axis.kind == row_kind]
    leads = [axis for axis in axes if axis not in rows and axis not in keys]
    key_axes = [axis for axis in axes if axis in keys]
    is_mixed = _is_mixed(node, set(keys))
    layout = _layout(node, leads, rows, key_axes, sources, is_mixed)
    heads = [rows[i] for i in layout.head_rows]
    rows = [axis for axis in rows if axis not in heads]
    order = [*leads, *heads]
    layout = dataclasses.replace(layout, is_mixed=is_mixed)
    site.counters.count("captured")
    if not observer.begin(layout, opened_by(node, key_axes, order, rows, layout)):
        return None
    count, kv_len = math.prod(axis.size for axis in order), layout.kv_len
    q_len = math.prod(axis.size for axis in rows)

    def look(value: torch.Tensor, tile: Tile) -> None:
        value = value.reshape([extent((axis,), tile) for axis in axes])
        value = value.permute([axes.index(axis) for axis in (*order, *rows, *key_axes)])
        numbers = torch.zeros((), dtype=torch.int64)
        for axis in order:
            low, high = tile.get(axis, (0, axis.size))
            numbers = (numbers * axis.size).unsqueeze(-1) + torch.arange(low, high)
        numbers = numbers.reshape(-1)
        # The last keys may be missing, if no row of the tile sees them.
        value = value.reshape(len(numbers), -1, math.prod(extent((axis,), tile) for axis in key_axes))
        done = 0
        for low, high in _runs(rows, tile):
            part = value[:, done : done + high - low]
            with in_full(part):
                observer.observe(part, TileInfo(numbers, (low, high), count, q_len, kv_len))
            done += high - low

    return node, look


def _runs(rows: Sequence[Axis], tile: Tile) -> Iterator[tuple[int, int]]:
    """The contiguous ranges of query tokens in a tile, whose rows may have several axes."""
    spans = [(*tile.get(axis, (0, axis.size)), axis.size) for axis in rows]
    starts = [0]
    while len(spans) > 1 and spans[-1][:2] == (0, spans[-1][2]):
        _, _, size = spans.pop()
        low, high, outer = spans.pop()
        spans.append((low * size, high * size, outer * size))
    for low, high, size in spans[:-1]:
        starts = [start * size + i for start in starts for i in range(low, high)]
    low, high, size = spans[-1] if spans else (0, 1, 1)
    for start in starts:
        yield start * size + low, start * size + high


def _layout(
    node: Node,
    leads: list[Axis],
    rows: list[Axis],
    keys: list[Axis],
    sources: Sources | None,
    is_mixed: bool,
) -> Layout:
    if sources is None:
        sizes = (math.prod(axis.size for axis in side) for side in (leads, rows, keys))
        return Layout(1, *sizes, why_not="attnpatch did not follow its inputs")
    names = {axis: renamed(node, axis) for axis in (*leads, *rows, *keys)}
    found = {axis: source_of(sources, name) for axis, name in names.items()}
    if is_mixed:
        # Heads that a product has mixed from others.
        found.update({axis: ((Axis(axis.size),), []) for axis in leads if found[axis][0] is None})
    contracted = next((found[axis][1] for axis in rows or leads if found[axis][0] is not None), [])
    contracted = contracted or next((own for _, own in found.values() if own), [])
    entries = [[(axis.size, found[axis][0]) for axis in side] for side in (leads, rows, keys)]
    drops_keys = any(names[axis] is not axis and not _is_whole_cut(node, axis) for axis in keys)
    return dataclasses.replace(layout_of(sources, *entries, contracted), drops_keys=drops_keys)


def renamed(node: Node, axis: Axis) -> Axis:
    """The axis from which a slice has made this one, if the slice keeps all of it, or drops only a sink's column."""
    for step in walk(node):
        if isinstance(step, Joined) and len(step.children) == 1 and axis in leaves(step.dims[step.position]):
            whole = leaves(step.children[0].dims[step.position])
            if len(whole) == 1:
                return renamed(step.children[0], whole[0])
        if not isinstance(step, SliceNode) or step.start or step.step != 1 or axis not in step.axis.leaves():
            continue
        whole = leaves(step.children[0].dims[step.position])
        if len(whole) == 1 and whole[0].size == axis.size:
            return renamed(step.children[0], whole[0])
        for joined in walk(step):
            if (
                isinstance(joined, OpNode)
                and getattr(joined.func, "__name__", "") in ("cat", "concat", "concatenate")
                and whole == leaves(joined.dims[step.position])
            ):
                first = leaves(joined.children[0].dims[step.position])
                if any(_has_product(other) for other in joined.children[1:]):
                    return axis  # the other part is keys as well; their values are multiplied elsewhere
                if len(first) == 1 and first[0].size == axis.size:
                    return first[0]
    return axis


def _is_whole_cut(node: Node, axis: Axis) -> bool:
    """True if every slice that has made this axis took all elements."""
    return all(
        step.axis.size == step.children[0].shape[step.position]
        for step in walk(node)
        if isinstance(step, SliceNode) and axis in step.axis.leaves()
    )


def _has_product(node: Node) -> bool:
    return any(isinstance(step, OpNode) and bool(step.work) for step in walk(node))


def _is_mixed(node: Node, keys: set[Axis]) -> bool:
    """True if the weights combine several softmaxes, or one with itself, so that a row of them is no longer a row of
    one softmax.

    An operand with one value per row (such as their sum) does not count.
    """
    steps = list(walk(node))
    softmaxes = {id(s) for s in steps if isinstance(s, OpNode) and getattr(s.func, "__name__", "") in SOFTMAX}
    read = above(steps, softmaxes)
    mixes = [
        step
        for step in steps
        if id(step) in read
        and (
            (isinstance(step, OpNode) and bool(step.work))
            or sum(
                (id(child) in read or id(child) in softmaxes) and bool(keys & set(all_leaves(child.dims)))
                for child in step.children
            )
            > 1
        )
    ]
    return bool(mixes)


def name_operands(
    call: SdpaCall, leads: Sequence[Sequence[Axis]], row: Axis, keys: Axis, sources: Sources
) -> None:
    """Note where the operands of an SDPA call come from, if the call was made from a graph.

    Args:
        call: The call.
        leads: The graph's axes of each leading dimension.
        row, keys: The graph's axes of queries and of keys.
        sources: The sources of the site's call.
    """

    def dim_of(axes: Sequence[Axis]) -> Dim | None:
        found = [source_of(sources, leaf)[0] for leaf in leaves(axes)]
        return None if any(dim is None for dim in found) else tuple(a for dim in found if dim for a in dim)

    outer = [dim_of(group) for group in leads]
    for operand, axis in ((call.query, row), (call.key, keys)):
        inner = dim_of([axis])
        if inner is not None and all(dim is not None for dim in outer):
            width = (Axis(operand.shape[-1]),)
            sources.give(operand, (*(dim or () for dim in outer), inner, width))


def of_one(probabilities: torch.Tensor, site: AttentionCall) -> None:
    """Show an observer the softmax ``[..., 1, 1]`` of a single token that attends to itself, which is not deferred."""
    observer, sources = site.observer, site.sources
    dims = sources.of(probabilities) if sources is not None else None
    if observer is None or observer.is_of_gradient or sources is None or dims is None:
        return
    leads = list(zip(probabilities.shape[:-2], dims[:-2], strict=True))
    layout = layout_of(sources, leads, [(1, ())], [(1, ())], [])
    site.counters.count("captured")
    if observer.begin(layout, lambda _: None):
        count = math.prod(probabilities.shape)
        with torch.no_grad():
            tile = probabilities.detach().reshape(count, 1, 1)
        observer.observe(tile, TileInfo(torch.arange(count), (0, 1), count, 1, 1))
        observer.end()


def of_call(call: SdpaCall, sources: Sources | None) -> Layout:
    """The layout of an SDPA call."""
    query, key, q_len, kv_len = call.query, call.key, call.q_len, call.kv_len
    lead = query.shape[:-2]
    if sources is None:
        return Layout(1, math.prod(lead), q_len, kv_len, why_not="attnpatch did not follow its inputs")
    known = sources.recall(query, key)
    if known is not None:
        return known
    own, other = sources.of(query), sources.of(key)
    if query.dim() == 2:
        own, other, lead = own and ((), *own), other and ((), *other), (1,)
    contracted = leaves(own[-1]) if own is not None else []
    leads: list[tuple[int, Dim | None]] = [
        (
            size,
            None if own is None else paired(sources, own[i], None if other is None else other[i], contracted),
        )
        for i, size in enumerate(lead)
    ]
    row = (q_len, None if own is None else own[-2])
    keys = (kv_len, None if other is None else other[-2])
    layout = layout_of(sources, leads, [row], [keys], contracted)
    sources.remember(layout)
    return layout
