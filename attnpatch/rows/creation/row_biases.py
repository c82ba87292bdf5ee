"""Graphs that begin with combined masks, with a table of biases, or with an elementwise function of each query and each
key.

Each has one or more elements per query and key, and is made from smaller tensors: a mask for all heads and a padding
mask of keys; a table of biases and indices into it; queries and keys of a few channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.ledger import is_plain, ledger_of
from attnpatch.policy import NativeNeed
from attnpatch.rows.arguments import argument
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import wrap
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Dims, fresh
from attnpatch.rows.graph.nodes import InputNode
from attnpatch.rows.graph.operations import OpNode

# A tensor with fewer rows or keys than this is no bias: its dimensions are heads, channels, or the words of a prompt.
FEWEST = 32
# Positions x frequencies (rotary embeddings) have at most this many columns.
WIDEST_HEAD = 512
# A looked-up result must have at least this many times the elements of its table.
_GROWTH = 2
# At or below this value an additive mask hides a key; 0 shows it.
_HIDDEN = -1e3
# Before attention, a table with wider rows is an embedding of tokens, not a bias per head.
_MOST_HEADS = 64
_WHOLE = (torch.int64, torch.int32)


def of_two(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """An elementwise function of two tensors (masks combined, or each query with each key); deferred if its size goes
    by rows.

    Returns:
        The deferred tensor, or ``NotImplemented``.
    """
    if len(args) != 2 or kwargs or not all(isinstance(t, torch.Tensor) for t in args):
        return NotImplemented
    one, other = args
    if one.shape == other.shape or max(one.dim(), other.dim()) < 2 or one.device != other.device:
        return NotImplemented
    shape = _broadcast(one.shape, other.shape)
    if shape is None or math.prod(shape) <= one.numel() + other.numel() or not all(map(is_plain, args)):
        return NotImplemented
    if _are_masks(one, other, shape) or (not call.is_of_masks and _are_figures(one, other, shape)):
        ends = (*fresh(shape[-2:-1], ROW), *fresh(shape[-1:], KEY))
    elif not call.is_of_masks and len(shape) > 2 and _are_opposite(one, other, -3, -2) and shape[-1] > 1:
        ends = (*fresh(shape[-3:-2], ROW), *fresh(shape[-2:-1], KEY), *fresh(shape[-1:]))
    else:
        return NotImplemented
    rows, keys = shape[-len(ends)], shape[1 - len(ends)]
    dtype = func(*(torch.ones([1] * t.dim(), dtype=t.dtype) for t in args)).dtype
    size = math.prod(shape) * dtype.itemsize
    if min(rows, keys) < FEWEST or not call.by_rows(rows, NativeNeed(3 * size, size), one.device):
        return NotImplemented
    dims = (*fresh(shape[: -len(ends)]), *ends)
    return wrap(
        OpNode(func, tuple(InputNode.aligned(t, dims) for t in args), {}, dims, dtype, one.device), call
    )


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size | None:
    """The shape of both together, or ``None``; ``torch.broadcast_shapes`` takes ten times as long."""
    shape = []
    for a, b in itertools.zip_longest(reversed(one), reversed(other), fillvalue=1):
        if a != b and a != 1 and b != 1:
            return None
        shape.append(b if a == 1 else a)
    return torch.Size(reversed(shape))


def _are_opposite(one: torch.Tensor, other: torch.Tensor, row: int, key: int) -> bool:
    """True if one tensor varies along the rows only, and the other along the keys only."""
    sizes = [tuple(t.shape[at] if t.dim() >= -at else 1 for at in (row, key)) for t in (one, other)]
    (a, b), (c, d) = sizes
    return (min(a, d) > 1 and max(b, c) == 1) or (min(b, c) > 1 and max(a, d) == 1)


def _are_masks(one: torch.Tensor, other: torch.Tensor, shape: torch.Size) -> bool:
    """True if one or both are a padding mask of keys or of queries (one value for each)."""
    lines = [t for t in (one, other) if t.dim() < 2 or 1 in t.shape[-2:]]
    if not lines or any(t.requires_grad for t in (one, other)):
        return False
    if len(lines) == 2 and not _are_opposite(one, other, -2, -1):
        return False
    return min(shape[-2:]) >= FEWEST and all(_is_padding(t, min(shape[-2:])) for t in lines)


def _are_figures(one: torch.Tensor, other: torch.Tensor, shape: torch.Size) -> bool:
    """True if these are one value per query and one per key (graph attention), and not positions x frequencies."""
    return min(shape[-2:]) > WIDEST_HEAD and _are_opposite(one, other, -2, -1)


def _is_padding(line: torch.Tensor, narrowest: int) -> bool:
    """True if a tensor is a padding mask: bool, zeros and ones, or 0 where visible and large and negative elsewhere."""
    if line.dtype == torch.bool:
        return True
    if not line.is_floating_point():
        return False  # positions: ``positions.outer`` handles them
    if ledger_of(line) is not None:
        return narrowest > WIDEST_HEAD  # no values in a dry run; positions x frequencies are narrower
    return bool(((line == 0) | (line == 1) | (line <= _HIDDEN)).all())


def looked_up(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """A table looked up by an index tensor that has one or more elements per query and key; deferred if its size goes
    by rows.

    Returns:
        The deferred tensor, or ``NotImplemented``.
    """
    found = _table_and_numbers(func.__name__, args, kwargs)
    if found is None:
        return NotImplemented
    table, numbers, at = found
    if (
        not (is_plain(table) and is_plain(numbers))
        or numbers.dtype not in _WHOLE
        or not table.is_floating_point()
    ):
        return NotImplemented
    rows = math.isqrt(numbers.numel()) if numbers.dim() == 1 else numbers.shape[-2]
    keys = numbers.shape[-1] if numbers.dim() > 1 else rows
    width = table.numel() // max(1, table.shape[at])
    if call.is_of_masks and (rows != keys or width > _MOST_HEADS):
        return NotImplemented
    if min(rows, keys) < FEWEST or (numbers.dim() == 1 and rows * keys != numbers.numel()):
        return NotImplemented
    if call.is_of_masks and numbers.dim() == 1 and table.shape[at] < rows:
        return NotImplemented  # a table with fewer rows than distances: experts, looked up per token
    count = numbers.numel() * width
    if count < _GROWTH * table.numel() or table.device != numbers.device:
        return NotImplemented
    size = count * table.dtype.itemsize
    if not call.by_rows(rows, NativeNeed(3 * size, size), table.device):
        return NotImplemented
    places = (
        _flat(rows)
        if numbers.dim() == 1
        else (*fresh(numbers.shape[:-2]), *fresh([rows], ROW), *fresh([keys], KEY))
    )
    before, after = fresh(table.shape[:at]), fresh(table.shape[at + 1 :])
    own = InputNode(table, (*before, (), *after))
    where = InputNode(numbers, places)
    rest: dict[str, Any] = {}
    if func.__name__ == "embedding":
        parts: Any = (where, own)
        rest["padding_idx"] = argument(args, kwargs, 2, "padding_idx")
        rest["scale_grad_by_freq"] = argument(args, kwargs, 5, "scale_grad_by_freq", False)
    elif func.__name__ == "index_select":
        parts = (own, at, where)
    else:
        parts = (own, (*(slice(None),) * at, where) if at else where)
    return wrap(OpNode(func, parts, rest, (*before, *places, *after), table.dtype, table.device), call)


def _flat(rows: int) -> Dims:
    """One dimension of queries x keys, which the host's ``view`` will split."""
    axis = Axis(rows * rows, ROW)
    axis.split(rows)
    axis.leaves()[1].kind = KEY
    return ((axis,),)


def _table_and_numbers(
    name: str, args: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """The table, the indices, and the dimension of the table that they index; ``None`` if the call is another one."""
    if name == "embedding":
        numbers, table, at = args[0] if args else None, argument(args, kwargs, 1, "weight"), 0
        if argument(args, kwargs, 3, "max_norm") is not None or argument(args, kwargs, 6, "sparse", False):
            return None
    elif name == "index_select":
        table, at, numbers = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    else:
        (table, numbers), at = args, 0
        if isinstance(numbers, tuple):
            at = len(numbers) - 1
            if not all(isinstance(item, slice) and item == slice(None) for item in numbers[:-1]):
                return None
            numbers = numbers[-1] if numbers else None
    if (
        not isinstance(table, torch.Tensor)
        or not isinstance(numbers, torch.Tensor)
        or not isinstance(at, int)
    ):
        return None
    if numbers.dim() == 0 or not -table.dim() <= at < table.dim():
        return None
    return table, numbers, at % table.dim()
