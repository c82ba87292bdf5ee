"""What a site returns."""

from __future__ import annotations

from typing import Any

from attnpatch.rows.axes import KEY, all_leaves
from attnpatch.rows.deferred import DeferredRows, is_pending
from attnpatch.rows.recipe import graph, map_structure


def with_no_keys(result: Any) -> Any:
    """A site's result, with deferred tensors computed that have no keys any more, and are no views of what has.

    They are attention written as a product of elements and a sum (a soft argmax: ``(weights * places).sum(-1)``), as
    small as any output, and counted as by rows.
    """
    return map_structure(result, _computed)


def _computed(value: Any) -> Any:
    if not isinstance(value, DeferredRows) or not is_pending(value):
        return value
    node = value.handle.node
    is_normalised = any(axis.kind == KEY for step in graph(node) for axis in all_leaves((step.whole,)))
    # A view of scores (their diagonal) shares memory with them, and lies as that does.
    memory = value.handle.memory.recipe
    has_keys = any(axis.kind == KEY for axis in all_leaves((*memory.dims, *node.dims)))
    if has_keys or not is_normalised:
        return value
    value.handle.call.tally.count("by_rows")
    return value.handle.reduced()
