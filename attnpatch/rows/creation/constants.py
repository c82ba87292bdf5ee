"""Tensors of the size of scores that hold one value: a host starts with them when it builds a mask inside attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.ledger import is_plain
from attnpatch.policy import NativeNeed
from attnpatch.rows.arguments import argument, deferred_in
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation.row_masks import ConstantNode
from attnpatch.rows.creation.uninitialized import UninitializedNode
from attnpatch.rows.deferred import memory_layout
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.axes import KEY, ROW, Dims, fresh
from attnpatch.rows.graph.nodes import Node
from attnpatch.rows.layout.diagonals import Triangle
from attnpatch.rows.op_table import op
from attnpatch.rows.ops.metadata import are_defaults, asked

# A constant with fewer rows or keys is not a mask: it is a cache, or an output that is filled piece by piece.
WIDEST_HEAD = 512
# A square constant is a mask, unless it is no larger than this: channels x channels of one head.
WIDEST_SQUARE = 128
_OPTIONS = {"size", "fill_value", "dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format"}


def dims_of(shape: Any) -> Dims:
    """Fresh axes of ``[..., rows, keys]``."""
    return (*fresh(shape[:-2]), *fresh(shape[-2:-1], ROW), *fresh(shape[-1:], KEY))


def _may_be_scores(size: Any, is_zero: bool) -> bool:
    if not isinstance(size, (tuple, list)) or not 2 <= len(size) <= 6:
        return False
    if not all(isinstance(n, int) and n > 0 for n in size):
        return False
    rows, keys = size[-2:]
    if rows == keys:
        return rows > WIDEST_SQUARE
    # Zeros with fewer than four dimensions are usually an output.
    return min(rows, keys) > WIDEST_HEAD and (len(size) == 4 or not is_zero)


def filled(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """``zeros``, ``ones`` and ``full`` and their ``new_`` forms: deferred if their size goes by rows.

    Returns:
        The deferred tensor, or ``NotImplemented``.
    """
    name = func.__name__
    like = None
    if name.startswith("new_"):
        like, args = args[0], args[1:]
        if not isinstance(like, DeferredTensor) and not is_plain(like):
            return NotImplemented
    is_full = name.endswith("full")
    given = args[:1] if is_full else args
    size = kwargs.get("size", given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
    value = argument(args, kwargs, 1, "fill_value") if is_full else float(name.endswith("ones"))
    if not isinstance(value, (bool, int, float)) or not _may_be_scores(size, not value):
        return NotImplemented
    if set(kwargs) - _OPTIONS or (is_full and len(args) > 2):
        return NotImplemented
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if like is not None:
        dtype, device = dtype or like.dtype, device or like.device
    # A tensor of one element, from which torch's own choice of dtype and device is read.
    one = torch.full(
        (), value, dtype=dtype or (None if is_full else torch.get_default_dtype()), device=device
    )
    return _deferred(lambda dims: ConstantNode(value, dims, one.dtype, one.device), size, one, kwargs, call)


def _deferred(
    node: Callable[[Dims], Node], size: Any, one: torch.Tensor, kwargs: dict[str, Any], call: AttentionCall
) -> Any:
    if not are_defaults(kwargs, one.device):
        return NotImplemented
    held = math.prod(size) * one.element_size()
    if not call.by_rows(size[-2], NativeNeed(3 * held, held), one.device):
        return NotImplemented
    return wrap(node(dims_of(torch.Size(size))), call)


def identity(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """``torch.eye``: ones with both triangles beside the diagonal set to zero."""
    rows = argument(args, kwargs, 0, "n")
    keys = argument(args, kwargs, 1, "m", rows)
    if set(kwargs) - _OPTIONS - {"n", "m"} or len(args) > 2 or not _may_be_scores((rows, keys), False):
        return NotImplemented
    one = torch.ones((), dtype=kwargs.get("dtype"), device=kwargs.get("device"))

    def node(dims: Dims) -> Node:
        ones = ConstantNode(1, dims, one.dtype, one.device)
        return Triangle(Triangle(ones, torch.tril, 0), torch.triu, 0)

    options = {key: value for key, value in kwargs.items() if key not in ("n", "m")}
    return _deferred(node, (rows, keys), one, options, call)


# Functions that fill a tensor with one value, and the value; ``None``: an argument gives it, or there is none.
_VALUES = {"zeros": 0, "ones": 1, "full": None, "empty": None}


@op(*(name for kind in _VALUES for name in (f"new_{kind}", f"{kind}_like")))
def constant(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``zeros_like``, ``new_zeros`` and their kind: deferred if they have the shape of the scores."""
    source = args[0]
    if not isinstance(source, DeferredTensor) or deferred_in(args[1:], kwargs):
        return NotImplemented
    kind, node = name.removesuffix("_like").removeprefix("new_"), source.handle.node
    value = _VALUES[kind]
    if name.startswith("new_"):
        given = [size for size in args[1:] if isinstance(size, int)] if kind != "full" else []
        size = given or argument(args, kwargs, 1, "size")
        value = argument(args, kwargs, 2, "fill_value") if kind == "full" else value
        if not isinstance(size, (tuple, list)) or tuple(size) != tuple(node.shape):
            other = filled(func, args, kwargs, source.handle.call) if kind != "empty" else NotImplemented
            return asked(name, func, args, kwargs) if other is NotImplemented else other
    elif kind == "full":
        value = argument(args, kwargs, 1, "fill_value")
    is_known = kind == "empty" or isinstance(value, (bool, int, float))
    if not is_known or not are_defaults(kwargs, node.device):
        # The result is allocated, and takes as much memory as the scores would.
        source.handle.call.counters.materialised(name)
        return asked(name, func, args, kwargs)
    dtype = kwargs.get("dtype") or node.dtype
    made: Node = (
        ConstantNode(value, node.dims, dtype, node.device)
        if kind != "empty"
        else UninitializedNode.like(node, dtype)
    )
    if name.endswith("_like"):
        made.shadow = memory_layout.like(node, dtype)
    return wrap(made, source.handle.call)


BEGINNINGS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.zeros, torch.ones, torch.full), filled),
    **{getattr(torch.Tensor, f"new_{kind}"): filled for kind in ("zeros", "ones", "full")},
    torch.eye: identity,
}
