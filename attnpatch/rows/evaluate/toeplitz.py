"""Computes nodes that depend only on the distance between positions once per distance instead of once per pair.

A bias or a mask that is a function of ``key position - query position`` (buckets of T5 and DeBERTa, a window) is
constant along every diagonal. The first and the last row of a tile contain every distance in it, so all others are
copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.graph.axes import Axis, Tile, all_leaves, extent, leaves
from attnpatch.rows.graph.nodes import InputNode, Node, ViewNode
from attnpatch.rows.graph.operations import OpNode

Pair = frozenset[Axis]

SUBTRACTIONS = "sub __sub__ __rsub__ rsub subtract"
COMPARISONS = "__lt__ __le__ __gt__ __ge__ __eq__ __ne__ lt le gt ge eq ne"
_OF_DISTANCE = frozenset(f"{SUBTRACTIONS} {COMPARISONS}".split())
_WHOLE = (torch.int32, torch.int64)
# With fewer rows, computing two rows and copying saves nothing.
_FEWEST = 4


def found_in(nodes: Sequence[Node]) -> dict[Node, Pair]:
    """Nodes that depend on two axes only through the difference of their positions, each with these two axes.

    Args:
        nodes: The nodes of a graph, children before parents.
    """
    found: dict[Node, Pair] = {}
    multiplied = _multiplied(nodes)
    for node in nodes:
        # Operands of products are left out, because their rounding depends on memory layout. So are expanded views,
        # which are no copies.
        if (
            node in multiplied
            or type(node) not in (OpNode, ViewNode)
            or getattr(node, "work", 0)
            or getattr(node, "expand", False)
        ):
            continue
        pairs = {found[child] for child in node.children if child in found}
        pair = next(iter(pairs)) if pairs else _difference(node)
        if pair is None or len(pairs) > 1 or pair & {*leaves(node.whole)}:
            continue
        others = [child for child in node.children if child not in found and not child.is_constant]
        if pairs and any(pair & {*all_leaves(child.dims)} for child in others):
            continue
        if pair <= {*_places(node)}:
            found[node] = pair
    return found


def _multiplied(nodes: Sequence[Node]) -> set[Node]:
    """Operands of products (a table's rows for all pairs), and the nodes that they are views of."""
    found = {child for node in nodes if getattr(node, "work", 0) for child in node.children}
    for node in reversed(nodes):
        is_view = isinstance(node, ViewNode) or (isinstance(node, OpNode) and node.func is torch.permute)
        if node in found and is_view:
            found.update(node.children)
    return found


def _places(node: Node) -> dict[Axis, int]:
    """For each axis that is a dimension by itself, the index of that dimension."""
    return {leaves(dim)[0]: at for at, dim in enumerate(node.dims) if len(leaves(dim)) == 1}


def _difference(node: Node) -> Pair | None:
    """The axes of two tensors of consecutive positions, if a node subtracts or compares them."""
    if not isinstance(node, OpNode) or len(node.children) != 2:
        return None
    axes = [axis for child in node.children for axis in all_leaves(child.dims)]
    if getattr(node.func, "__name__", "") not in _OF_DISTANCE or len(axes) != 2 or axes[0] is axes[1]:
        return None
    return frozenset(axes) if all(map(_follow_each_other, node.children)) else None


def _follow_each_other(node: Node) -> bool:
    tensor = node.tensor if isinstance(node, InputNode) else None
    if tensor is None or tensor.device.type != "cpu" or tensor.dtype not in _WHOLE:
        return False
    if ledger_of(tensor) is not None:
        return True  # a dry run has no values; usually positions are consecutive
    return type(tensor) is torch.Tensor and bool((tensor.flatten().diff() == 1).all())


def spread(
    node: Node, pair: Pair, tile: Tile, compute: Callable[[Tile], torch.Tensor]
) -> torch.Tensor | None:
    """A tile of a node of ``found_in``, made from two of its rows; ``None`` if that saves nothing.

    Args:
        node: The node.
        pair: Its two axes.
        tile: The tile.
        compute: Computes the node in another tile.
    """
    row, key = sorted(pair, key=lambda axis: extent((axis,), tile))
    rows, keys = extent((row,), tile), extent((key,), tile)
    if rows < _FEWEST:
        return None
    low, high = tile.get(row, (0, row.size))
    # It is cloned, since the second computation may overwrite the memory of the first one.
    first = compute({**tile, row: (low, low + 1)}).clone()
    last = compute({**tile, row: (high - 1, high)})
    row_at, key_at = (_places(node)[axis] for axis in (row, key))
    line = torch.cat([last.narrow(key_at, 0, rows - 1), first], key_at).squeeze(row_at)
    line_at = key_at - (row_at < key_at)
    # Each row begins one distance earlier than the row before. (``flip`` would make rows the innermost in memory.)
    order = torch.arange(rows - 1, -1, -1, device=line.device)
    return line.unfold(line_at, keys, 1).index_select(line_at, order).movedim((line_at, -1), (row_at, key_at))
