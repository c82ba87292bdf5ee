"""Handlers of functions that need some dimensions of the scores complete, and can be cut along all others.

A table has for each function which dimensions it needs. How their lengths change (kept, removed, 1 or another length)
is found by calling torch on a tensor that has only these dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.rows.arguments import argument, deferred_in, positions_of, read_whole
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Dim, fresh, leaves
from attnpatch.rows.graph.nodes import Node, OutputNode, map_structure
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout.joining import flip_rows, roll_rows
from attnpatch.rows.op_table import ALONG, PAIRS, REDUCING, op
from attnpatch.rows.ops.pointwise import computed_by_rows, elementwise, has_no_keys, probe

# ``which(args, kwargs, number of dimensions)``: the dimensions that must be complete; ``None``: not understood.
Which = Callable[[Any, dict[str, Any], int], Any]
# The largest tensor on which torch is called to find the result's shape: rows of a few heads, not a score matrix.
_MOST_ASKED = 2**22


def _named(position: int, default: Any = None, keyword: str = "dim") -> Which:
    """The dimensions that an argument names, one or several."""
    return lambda args, kwargs, count: argument(args, kwargs, position, keyword, default)


def _normalized(args: Any, kwargs: dict[str, Any], count: int) -> Any:
    """The last dimensions, as many as ``normalized_shape`` has sizes."""
    sizes = argument(args, kwargs, 1, "normalized_shape")
    length = 1 if isinstance(sizes, int) else len(sizes)
    return list(range(count - length, count))


def _always(*dims: int) -> Which:
    return lambda args, kwargs, count: list(dims)


def _flipped(args: Any, kwargs: dict[str, Any], count: int) -> Any:
    dims = args[1:] or kwargs.get("dims")
    return dims[0] if len(args) == 2 and isinstance(dims[0], (list, tuple)) else dims


# Tensors beside the scores (a norm's weight and bias) are read whole, so they must belong to complete dimensions.
WITHIN: dict[str, Which] = {
    name: which
    for which, names in (
        (_named(1), "cumprod logcumsumexp cummax cummin std var std_mean var_mean aminmax median nanmedian"),
        (_named(1), "nanmean count_nonzero"),
        (_named(1, -1), "argsort mode glu"),
        (_named(2), "norm linalg_norm linalg_vector_norm quantile nanquantile"),
        (_named(2, -1), "kthvalue diff"),
        (_named(2, keyword="dims"), "roll"),
        (_normalized, "layer_norm rms_norm"),
        (_flipped, "flip"),
        (_always(0), "flipud msort"),
        (_always(1), "fliplr"),
        (_always(-1), "avg_pool1d max_pool1d lp_pool1d"),
    )
    for name in names.split()
}


@op(*WITHIN)
def within(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], DeferredTensor):
        return NotImplemented
    return complete_along(name, func, args, kwargs, WITHIN[name](args, kwargs, len(args[0].handle.node.dims)))


@op("normalize")
def normalize(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return complete_along(name, func, args, kwargs, argument(args, kwargs, 2, "dim", 1))


def complete_along(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], dims: Any) -> Any:
    """A function of one deferred tensor that needs some dimensions complete.

    Args:
        name, func, args, kwargs: The call.
        dims: Those dimensions, one or several integers.
    """
    source = args[0]
    if not isinstance(source, DeferredTensor) or deferred_in(args[1:], kwargs):
        return NotImplemented
    node = source.handle.node
    positions = positions_of(dims, len(node.dims))
    if positions is None:
        return NotImplemented
    if any(axis.kind == ROW for i in positions for axis in leaves(node.dims[i])):
        return _of_rows(name, source, args, kwargs, dims)
    return _with(source, func, args[1:], kwargs, positions)


def _with(
    source: DeferredTensor, func: Callable[..., Any], rest: Any, kwargs: dict[str, Any], positions: list[int]
) -> Any:
    """The result of a function that needs some dimensions complete, whatever axes they have."""
    node = source.handle.node
    shape = [size if i in positions else 1 for i, size in enumerate(node.shape)]
    if math.prod(shape) > _MOST_ASKED:
        return NotImplemented
    with torch.no_grad():
        told = func(torch.ones(shape, dtype=node.dtype, device=node.device), *rest, **kwargs)
    return becoming(source, func, rest, kwargs, positions, told)


def _of_rows(name: str, source: DeferredTensor, args: Any, kwargs: dict[str, Any], dims: Any) -> Any:
    """A function along the row axis that does not need all rows (``flip``, ``roll``); otherwise ``NotImplemented``."""
    if name == "flip":
        return flip_rows(source, dims)
    if name != "roll":
        return NotImplemented
    shifts = argument(args, kwargs, 1, "shifts")
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    if len(shifts) != len(dims):
        return NotImplemented
    for shift, dim in zip(shifts, dims, strict=True):
        has_rows = any(axis.kind == ROW for axis in leaves(source.handle.node.dims[dim]))
        source = roll_rows(source, shift, dim) if has_rows else torch.roll(source, shift, dim)
    return source


def becoming(
    source: DeferredTensor,
    func: Callable[..., Any],
    rest: Any,
    kwargs: dict[str, Any],
    positions: Sequence[int],
    told: Any,
) -> Any:
    """The deferred result or results of a function that needs some dimensions complete.

    Args:
        source: The deferred argument.
        func, rest, kwargs: The function and its other arguments.
        positions: The dimensions that must be complete.
        told: The function's result on a tensor whose other dimensions all have length 1.
    """
    node = source.handle.node
    results = told if isinstance(told, tuple) else (told,)
    found = [
        _dims(node, positions, result) if isinstance(result, torch.Tensor) else None for result in results
    ]
    if any(dims is None for dims in found):
        return NotImplemented
    new = [axis for dims in found if dims for dim in dims for axis in dim]
    whole: list[Axis] = [axis for i in positions for axis in node.dims[i]]
    whole += [axis for axis in new if axis not in {axis for dim in node.dims for axis in dim}]
    rest, kwargs = map_structure(rest, read_whole), map_structure(kwargs, read_whole)
    first = found[0] or ()
    call = OpNode(func, (node, *rest), kwargs, first, results[0].dtype, node.device, tuple(whole))
    if not isinstance(told, tuple):
        return wrap(call, source.handle.call)
    picked = tuple(
        wrap(OutputNode(call, i, dims or (), result.dtype), source.handle.call)
        for i, (dims, result) in enumerate(zip(found, results, strict=True))
    )
    return picked if type(told) is tuple else type(told)(picked)


def _dims(node: Node, positions: Sequence[int], result: torch.Tensor) -> tuple[Dim, ...] | None:
    """The axes of a result, read from the lengths of its complete dimensions; ``None`` if they are not understood."""
    if result.dim() == len(node.dims) - len(set(positions)):
        return tuple(dim for i, dim in enumerate(node.dims) if i not in positions)
    if result.dim() != len(node.dims):
        return None
    dims: list[Dim] = []
    for i, (own, size) in enumerate(zip(node.dims, result.shape, strict=True)):
        if i not in positions or size == node.shape[i]:
            dims.append(own)
        else:
            dims.append(fresh([size], KEY)[0])
    return tuple(dims)


def extreme(name: str, func: Callable[..., Any], source: DeferredTensor) -> Any:
    """``max()``, ``any()`` and the like over all elements: first over the keys, then over the resulting value per row.

    This is not used under autograd, where equal elements share the gradient.
    """
    node = source.handle.node
    keys = [i for i, dim in enumerate(node.dims) if any(axis.kind == KEY for axis in leaves(dim))]
    if not keys or source.requires_grad:
        return NotImplemented
    step = {"max": torch.amax, "min": torch.amin}.get(name, getattr(torch, name))
    figures = step(source, tuple(keys))
    return func(figures.handle.reduced()) if isinstance(figures, DeferredTensor) else func(figures)


def _mark_keys(node: Node, axes: list[Axis]) -> None:
    """Mark the axes along which a softmax runs as keys, and all others that were taken for keys as rows."""
    for dim in node.dims:
        for leaf in leaves(dim):
            if leaf in axes:
                leaf.kind = KEY
            elif leaf.kind == KEY:
                leaf.kind = "row"


@op(*ALONG)
def along(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node if isinstance(args[0], DeferredTensor) else None
    positions = positions_of(argument(args, kwargs, 1, "dim"), len(node.dims)) if node is not None else None
    if node is None or positions is None:
        return NotImplemented
    if mixes_figures(node, positions):
        return func(computed_by_rows(args[0]), *args[1:], **kwargs)
    axes = leaves(node.dims[positions[0]])
    if "softm" in name or name == "log_softmax":
        _mark_keys(node, axes)
    dtype = probe(func, args, kwargs).dtype
    call = OpNode(func, (node, *args[1:]), kwargs, node.dims, dtype, node.device, node.dims[positions[0]])
    return wrap(call, args[0].handle.call)


_EXTREMES = frozenset("max min amax amin any all".split())


def mixes_figures(node: Node, positions: list[int]) -> bool:
    """True if a function needs all rows of a tensor with one value per row; such a tensor is small, so it is computed
    first.
    """
    return has_no_keys([node]) and any(axis.kind == ROW for i in positions for axis in leaves(node.dims[i]))


@op(*REDUCING)
def reducing(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node if isinstance(args[0], DeferredTensor) else None
    positions = positions_of(argument(args, kwargs, 1, "dim"), len(node.dims)) if node is not None else None
    if node is not None and len(args) == 1 and not kwargs and name in _EXTREMES:
        return extreme(name, func, args[0])
    if node is None or positions is None:
        return NotImplemented
    if mixes_figures(node, positions):
        return func(computed_by_rows(args[0]), *args[1:], **kwargs)
    tiny = probe(func, args, kwargs)
    kept = tiny.dim() == len(node.dims)
    dims = tuple(
        () if i in positions else dim for i, dim in enumerate(node.dims) if kept or i not in positions
    )
    whole = tuple(axis for position in positions for axis in node.dims[position])
    call = OpNode(func, (node, *args[1:]), kwargs, dims, tiny.dtype, node.device, whole)
    return wrap(call, args[0].handle.call)


@op(*PAIRS)
def pairs(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Functions that return values and indices along one dimension."""
    if name in ("max", "min") and (
        (len(args) > 1 and isinstance(args[1], torch.Tensor)) or "other" in kwargs
    ):
        return elementwise(name, func, args, kwargs)
    if not isinstance(args[0], DeferredTensor) or "stable" in kwargs:
        return NotImplemented
    if len(args) == 1 and not kwargs and name in _EXTREMES:
        return extreme(name, func, args[0])
    node = args[0].handle.node
    dim = argument(args, kwargs, 2 if name == "topk" else 1, "dim", None if name in ("max", "min") else -1)
    positions = positions_of(dim, len(node.dims))
    return NotImplemented if positions is None else _with(args[0], func, args[1:], kwargs, positions)
