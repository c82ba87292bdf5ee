"""Computes how much memory a step of a graph allocates and how many elements it reads."""

from __future__ import annotations

import math

from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.tile_plan import TilePlan
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Tile, all_leaves, extent, leaves
from attnpatch.rows.graph.nodes import InputNode, Node


def scores(run: Evaluator, row: Axis | None) -> frozenset[Node]:
    """Nodes that have query x key elements."""
    found = set()
    for node in run.nodes:
        kinds = {axis.kind for axis in all_leaves(node.dims)}
        if (
            not isinstance(node, InputNode)
            and KEY in kinds
            and (ROW in kinds or row in all_leaves(node.dims))
        ):
            found.add(node)
    return frozenset(found)


def held_inside(run: Evaluator, steps: TilePlan, result: Node) -> int:
    """Bytes of scores that a step holds although no node has them as its value (those inside SDPA); or those of the
    whole result, if it has keys.
    """
    tile: Tile = dict(steps.lead[0])
    if steps.row is not None:
        tile[steps.row] = (0, steps.largest()[0])
    found = result.shape.numel() * result.dtype.itemsize if result in run.scores else 0
    for node in run.tiled:
        if node.scores_held and not isinstance(node, InputNode):
            heads_and_rows = tuple(leaves(a for dim in node.dims[:-1] for a in dim))
            found = max(found, node.scores_held * extent(heads_and_rows, tile) * node.dtype.itemsize)
    return found


def reads(run: Evaluator, tileable: list[Axis]) -> int:
    """Elements per head that a step reads whatever its number of rows: keys, values, a bias without rows."""
    found = 0
    for node in run.nodes:
        axes = all_leaves(node.dims)
        if isinstance(node, InputNode) and not any(axis.kind == ROW for axis in axes):
            found += node.count // math.prod(axis.size for axis in axes if axis in tileable)
    return found
