"""The result of a site: deferred tensors in it that are no longer rows x keys are computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.deferred.tensor import DeferredTensor, is_pending
from attnpatch.rows.graph.axes import KEY, ROW, Dims, all_leaves
from attnpatch.rows.graph.nodes import walk

_MATRIX = {ROW, KEY}


def with_no_matrix(result: Any, is_counted: bool) -> Any:
    """A site's result, in which deferred tensors that are no longer rows x keys are computed.

    Such tensors are attention written as an elementwise product and a sum (a soft argmax: ``(weights *
    places).sum(-1)``), or an output multiplied by a value per row (rounds of hashes, weighted by their logsumexp). They
    are as small as any output. If they stayed deferred, the rest of the model would be deferred, too. Views of a score
    matrix stay deferred.

    Args:
        result: Tensors in any structure, the host's named tuples and dataclasses included.
        is_counted: True if the call is counted already; otherwise each tensor computed here is counted as ``by_rows``.
    """
    return _changed(result, lambda value: _computed(value, is_counted), 8)


def _changed(value: Any, change: Callable[[DeferredTensor], Any], depth: int) -> Any:
    """``value`` with deferred tensors changed; a container in which nothing changes stays the host's own object."""
    if isinstance(value, DeferredTensor):
        return change(value)
    if depth == 0 or isinstance(value, torch.Tensor):
        return value
    parts = _parts(value)
    items = {key: _changed(item, change, depth - 1) for key, item in parts.items()}
    changed = {key: item for key, item in items.items() if item is not parts[key]}
    if not changed:
        return value
    if type(value) in (list, tuple):
        return type(value)(items.values())
    if isinstance(value, tuple):
        return value._replace(**changed)
    value = copy.copy(value)
    for key, item in changed.items():
        if isinstance(value, dict):
            value[key] = item
        else:
            object.__setattr__(value, key, item)  # works on a frozen dataclass, too
    return value


def _parts(value: Any) -> dict[Any, Any]:
    if type(value) in (list, tuple):
        return dict(enumerate(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._asdict()
    if isinstance(value, dict):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {}


def _computed(value: DeferredTensor, is_counted: bool) -> Any:
    if not is_pending(value):
        return value
    node, memory = value.handle.node, value.handle.memory.graph
    steps = list(walk(node))
    is_normalised = any(KEY in _kinds((step.whole,)) for step in steps)
    # A view of scores (their diagonal) shares their memory, so it is not small. A result with keys and no rows is as
    # small as an output (values per row, scattered by the host's index). But a sum over the rows of a matrix needs the
    # whole matrix, and possibly nothing reads the sum, so it stays deferred.
    is_small = not _kinds((*memory.dims, *node.dims)) >= _MATRIX
    holds_all = any(
        ROW in _kinds((step.whole,)) and any(_kinds(child.dims) >= _MATRIX for child in step.children)
        for step in steps
    )
    if not is_normalised or not is_small or holds_all:
        return value
    if not is_counted:
        value.handle.call.counters.count("by_rows")
    return value.handle.reduced()


def _kinds(dims: Dims) -> set[str]:
    return {axis.kind for axis in all_leaves(dims)}
