"""Handlers of ``gather``, ``scatter`` and of tables that are looked up by deferred indices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument, deferred_in, first_deferred
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Dim, fresh, leaves, size_of, unify
from attnpatch.rows.graph.nodes import InputNode, Node, tensors_of
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout import indexing
from attnpatch.rows.op_table import op


@op("gather", "index_select")
def gather(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``gather`` and ``index_select``: the source is complete along ``dim``, the result is cut as the index is."""
    source, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    if (
        not isinstance(source, torch.Tensor)
        or not isinstance(dim, int)
        or not isinstance(index, torch.Tensor)
    ):
        return NotImplemented
    if len(args) > 3 or kwargs.get("sparse_grad") or source.device != index.device:
        return NotImplemented
    position = dim % source.dim()
    if name == "index_select":
        if not isinstance(source, DeferredTensor) or isinstance(index, DeferredTensor):
            return NotImplemented
        node: Node = source.handle.node
        dims = (*node.dims[:position], *fresh([index.numel()], KEY), *node.dims[position + 1 :])
        place: Node = InputNode(index, (dims[position],) if index.dim() else ())
    else:
        if index.dim() != source.dim() or any(
            index.shape[i] != size for i, size in enumerate(source.shape) if i != position
        ):
            return NotImplemented
        if isinstance(index, DeferredTensor):
            # The index gets axes of its own: DeBERTa reads the same distances along queries for one term, along keys
            # for the other.
            place = _renamed(index.handle.node)
            dims = place.dims
        else:
            own = source.handle.node.dims
            dims = (*own[:position], *fresh([index.shape[position]], KEY), *own[position + 1 :])
            place = InputNode(index, dims)
        if isinstance(source, DeferredTensor):
            node = source.handle.node
            for i, dim_of_source in enumerate(node.dims):
                if i != position and not unify(dim_of_source, dims[i]):
                    return NotImplemented
        else:
            node = InputNode(source, tuple(() if i == position else dim for i, dim in enumerate(dims)))
    call = OpNode(func, (node, dim, place), {}, dims, node.dtype, node.device, node.dims[position])
    return wrap(call, first_deferred(args, kwargs).handle.call)


@op("take_along_dim")
def along_dim(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``take_along_dim`` without broadcasting, which is ``gather``."""
    source, index, dim = args[0], argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "dim")
    if dim is None or not isinstance(index, torch.Tensor) or source.dim() != index.dim():
        return NotImplemented
    return gather("gather", torch.gather, (source, dim, index), {})


def _renamed(root: Node) -> Node:
    """A copy of a graph with new axes and the same tensors, so that it is cut independently."""
    return copy.deepcopy(root, {id(leaf.tensor): leaf.tensor for leaf in tensors_of(root)})


@op("embedding")
def embedding(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A row of a table for every deferred index (T5's bias for each bucket of distances); its width can be cut, too."""
    source, weight = args[0], argument(args, kwargs, 1, "weight")
    if (
        not isinstance(source, DeferredTensor)
        or isinstance(weight, DeferredTensor)
        or argument(args, kwargs, 3, "max_norm") is not None
        or argument(args, kwargs, 6, "sparse", False)
    ):
        return NotImplemented
    node = source.handle.node
    width = fresh(weight.shape[1:])
    dims = (*node.dims, *width)
    rest = {"padding_idx": argument(args, kwargs, 2, "padding_idx")}
    rest["scale_grad_by_freq"] = argument(args, kwargs, 5, "scale_grad_by_freq", False)
    call = OpNode(func, (node, InputNode(weight, ((), *width))), rest, dims, weight.dtype, node.device)
    return wrap(call, source.handle.call)


@op("__getitem__", is_view=True)
def getitem(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A part of a deferred tensor; or, with a deferred index, rows of a table as in ``embedding``."""
    table, index = args
    if isinstance(table, DeferredTensor) or not isinstance(index, DeferredTensor):
        return indexing.getitem(name, func, args, kwargs)
    node = index.handle.node
    if node.dtype not in (torch.int64, torch.int32) or table.device != node.device:
        return NotImplemented
    width = fresh(table.shape[1:])
    call = OpNode(
        func, (InputNode(table, ((), *width)), node), {}, (*node.dims, *width), table.dtype, node.device
    )
    return wrap(call, index.handle.call)


@op("scatter", "scatter_add")
def scatter(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``scatter`` and ``scatter_add``: dimension ``dim`` complete, the other dimensions cut alike in all operands."""
    target, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    value = argument(args, kwargs, 3, "src", kwargs.get("value"))
    tensors = [t for t in (target, index, value) if isinstance(t, torch.Tensor)]
    if len(tensors) < 2 or not isinstance(dim, int) or not isinstance(index, torch.Tensor):
        return NotImplemented
    position = dim % target.dim()
    for tensor in tensors:
        if tensor.device != target.device or tensor.dim() != target.dim():
            return NotImplemented
        if any(
            a != b for i, (a, b) in enumerate(zip(tensor.shape, target.shape, strict=True)) if i != position
        ):
            return NotImplemented
    if isinstance(value, torch.Tensor) and value.shape != index.shape:
        return NotImplemented
    dims: list[Dim] = [()] * target.dim()
    for tensor in deferred_in(tensors, {}):
        for i, own in enumerate(tensor.handle.node.dims):
            if i == position or size_of(own) == 1:
                continue
            if not dims[i]:
                dims[i] = own
            elif not unify(dims[i], own):
                return NotImplemented
    if any(not dim and target.shape[i] != 1 for i, dim in enumerate(dims) if i != position):
        return NotImplemented
    whole: list[Axis] = []

    def place(tensor: torch.Tensor) -> Node:
        if isinstance(tensor, DeferredTensor):
            whole.extend(tensor.handle.node.dims[position])
            return tensor.handle.node
        return InputNode(tensor, tuple(() if i == position else dim for i, dim in enumerate(dims)))

    node, places = place(target), place(index)
    dims[position] = node.dims[position] or fresh(target.shape[position : position + 1], KEY)[0]
    whole.extend(dims[position])
    if any(axis.kind == ROW for axis in leaves(whole)):
        return NotImplemented
    rest: dict[str, Any] = {"src": place(value)} if isinstance(value, torch.Tensor) else {"value": value}
    rest.update({key: kwargs[key] for key in kwargs if key not in ("dim", "index", "src", "value")})
    if len(args) > 4:
        return NotImplemented
    call = OpNode(func, (node, dim, places), rest, tuple(dims), target.dtype, target.device, tuple(whole))
    return wrap(call, first_deferred(args, kwargs).handle.call)
