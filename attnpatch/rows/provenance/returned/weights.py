"""The dimensions of attention weights that are not computed as a whole, where they are multiplied with values."""

from __future__ import annotations

from typing import Any

from attnpatch.rows.arguments import deferred_in
from attnpatch.rows.graph.axes import Axis, Dim, fresh, leaves, size_of
from attnpatch.rows.graph.nodes import Node
from attnpatch.rows.provenance import observed
from attnpatch.rows.provenance.sources import Sources


def name_weights(args: Any, kwargs: dict[str, Any], sources: Sources) -> None:
    """Note the dimensions of the deferred weights among the arguments of a product."""
    if sources.is_bare is None:
        return
    for weights in deferred_in(args, kwargs):
        node = weights.handle.node
        sources.give(weights, tuple(_dim(node, dim, sources) for dim in node.dims))


def _dim(node: Node, dim: Dim, sources: Sources) -> Dim:
    found: list[Axis] = []
    for leaf in leaves(dim):
        own = observed.source_of(sources, observed.renamed(node, leaf))[0]
        if own is None:
            return fresh([size_of(dim)])[0]
        found += own
    return tuple(found)
