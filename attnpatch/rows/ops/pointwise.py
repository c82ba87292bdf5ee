"""Handlers of pointwise functions, casts and dropout, with any broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument, first_deferred, tensors_in
from attnpatch.rows.deferred.tensor import (
    DeferredTensor,
    wrap,
)
from attnpatch.rows.graph.axes import (
    KEY,
    LEAD,
    ROW,
    Axis,
    Dim,
    Dims,
    all_leaves,
    leaves,
    size_of,
    unify,
)
from attnpatch.rows.graph.dropout import Dropout
from attnpatch.rows.graph.nodes import InputNode, Node, map_structure
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import CASTS, POINTWISE, op
from attnpatch.rows.ops import metadata


def node_for(value: torch.Tensor, dims: Dims) -> Node:
    """The node of an argument: its own graph, or an input node whose dimensions align with ``dims`` from the right."""
    if isinstance(value, DeferredTensor):
        return value.handle.node
    return InputNode.aligned(value, dims)


def probe(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The call's result on tensors of one element: shows the dtype that torch chooses, autocast included."""

    def shrink(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (not value.dim() and not isinstance(value, DeferredTensor)):
            return value
        return torch.ones([1] * value.dim(), dtype=value.dtype, device=value.device)

    with torch.no_grad():
        return func(*map_structure(args, shrink), **map_structure(kwargs, shrink))


def broadcast(nodes: list[Node], shapes: list[torch.Size]) -> Dims | None:
    """The axes of the broadcast result; ``None`` if the axes of two graphs cannot be unified."""
    shape = torch.broadcast_shapes(*shapes)
    dims: list[Dim] = []
    for back in range(len(shape), 0, -1):
        found: Dim = ()
        for node in nodes:
            own = node.dims[-back] if back <= len(node.dims) else ()
            if size_of(own) == 1:
                continue
            if not found:
                found = own
            elif not unify(found, own):
                return None
        if not found and shape[-back] != 1:
            # Values per row are broadcast against a real row vector, whose columns get a new axis.
            found = (Axis(shape[-back], KEY if back == 1 and has_no_keys(nodes) else LEAD),)
        dims.append(found)
    return tuple(dims)


@op(*POINTWISE)
def elementwise(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = tensors_in(args, kwargs)
    first = first_deferred(args, kwargs)
    if any(value.device != first.device and value.dim() for value in tensors):
        return NotImplemented
    nodes = [value.handle.node for value in tensors if isinstance(value, DeferredTensor)]
    if (figures := _beside_keys(tensors)) is not None:
        known = lambda value: computed_by_rows(value) if id(value) in figures else value
        return func(*map_structure(args, known), **map_structure(kwargs, known))
    dims = broadcast(nodes, [value.shape for value in tensors])
    if dims is None:
        return NotImplemented
    if has_no_keys(nodes) and (name == "sigmoid" or _is_beside_output(tensors, nodes)):
        return func(*map_structure(args, computed_by_rows), **map_structure(kwargs, computed_by_rows))
    tiny = probe(func, args, kwargs)
    if not isinstance(tiny, torch.Tensor):
        return NotImplemented  # Python's own result, as for ``scores == None``

    def place(value: Any) -> Any:
        return node_for(value, dims) if isinstance(value, torch.Tensor) else value

    node = OpNode(
        func, map_structure(args, place), map_structure(kwargs, place), dims, tiny.dtype, first.device
    )
    return wrap(node, first.handle.call)


def has_no_keys(nodes: list[Node]) -> bool:
    """True if these are one value per row (a logsumexp). They are small, and sigmoid rounds them by their memory
    layout.
    """
    return not any(leaf.kind == KEY for node in nodes for leaf in all_leaves(node.dims))


def _beside_keys(tensors: list[torch.Tensor]) -> set[int] | None:
    """The ids of values per row that are broadcast along the keys, or against each other (degrees of rows and columns).

    If they stayed deferred, rows and keys would be the same axis, and neither could be cut.
    """
    given = {id(value): value.handle.node for value in tensors if isinstance(value, DeferredTensor)}
    if len(given) < 2:
        return None
    places: dict[Axis, set[int]] = {}
    keys: set[int] = set()
    for node in given.values():
        for back, dim in enumerate(reversed(node.dims)):
            for axis in leaves(dim):
                places.setdefault(axis, set()).add(back)
                if axis.kind == KEY:
                    keys.add(back)
    found = {
        number
        for number, node in given.items()
        if has_no_keys([node])
        and any(
            axis.kind == ROW and (back in keys or back < max(places[axis]))
            for back, dim in enumerate(reversed(node.dims))
            for axis in leaves(dim)
        )
    }
    return found or None


def _is_beside_output(tensors: list[torch.Tensor], nodes: list[Node]) -> bool:
    """True if deferred tensors are broadcast against a larger real one: values per row that scale an output.

    If they stayed deferred, so would the output: it would leave the site and be computed whole in the next one.
    """
    most = max(node.shape.numel() for node in nodes)
    return any(tensor.numel() > most for tensor in tensors if not isinstance(tensor, DeferredTensor))


def computed_by_rows(value: Any) -> Any:
    """A deferred tensor computed by rows, without counting it as materialised; other values unchanged."""
    return value.handle.reduced() if isinstance(value, DeferredTensor) else value


@op(*CASTS)
def cast(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``, ``type_as``: another dtype on the same device."""
    source = args[0]
    if name == "type" and len(args) == 1 and not kwargs:
        return metadata.asked(name, func, args, kwargs)
    like = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not isinstance(source, DeferredTensor) and len(args) == 2 and len(like) == 1 and not kwargs:
        # Only the dtype and device of the deferred argument matter, not its values.
        return source.to(device=like[0].device, dtype=like[0].dtype)
    if not isinstance(source, DeferredTensor) or kwargs.get("memory_format") is not None:
        return NotImplemented
    tiny = probe(func, args, kwargs)
    if not isinstance(tiny, torch.Tensor) or tiny.device != source.device:
        return NotImplemented
    copy = kwargs.get("copy", False)
    if tiny.dtype == source.dtype and not copy and not like[1:]:
        return source
    old = source.handle.node
    return wrap(
        OpNode(torch.Tensor.to, (old, tiny.dtype), {}, old.dims, tiny.dtype, old.device), source.handle.call
    )


@op("dropout")
def dropout(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    p = argument(args, kwargs, 1, "p", 0.5)
    training = argument(args, kwargs, 2, "train" if "train" in kwargs else "training", True)
    if not isinstance(source, DeferredTensor) or not 0.0 <= p <= 1.0:
        return NotImplemented
    if not training or p == 0.0:
        return source
    return wrap(Dropout(source.handle.node, p), source.handle.call)
