"""Graphs that begin with query positions against key positions, or with constants.

A host makes them for a bias (distances in T5 and DeBERTa) or for a mask of its own, inside its attention or before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.ledger import is_plain
from attnpatch.policy import NativeNeed
from attnpatch.rows import dispatch, guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation import constants, row_biases
from attnpatch.rows.creation.constants import dims_of
from attnpatch.rows.deferred.handle import left
from attnpatch.rows.deferred.tensor import DeferredTensor, is_watching_writes, wrap
from attnpatch.rows.evaluate.toeplitz import COMPARISONS, SUBTRACTIONS
from attnpatch.rows.graph.nodes import InputNode, ViewNode
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.thread_state import here
from attnpatch.rows.watching import Watching, without

Begin = Callable[[Callable[..., Any], Any, dict[str, Any], AttentionCall], Any]

# Bytes per element: int64 positions. A host computes two more such tensors from them before they are a bias.
_ITEMSIZE = 8
# With fewer rows, a tensor made before attention is a padding mask made from lengths: its rows are the batch.
FEWEST = 32


def _goes_by_rows(shape: torch.Size, device: torch.device, call: AttentionCall) -> bool:
    if call.is_of_masks and shape[-2] < FEWEST:
        return False
    # A fused kernel is given the rows of a bias as it needs them, so the bias is always deferred.
    is_fused = call.policy.fuse and call.policy.mode == "auto" and shape[-2] > call.policy.min_tokens
    size = _ITEMSIZE * math.prod(shape)
    if is_fused or call.by_rows(shape[-2], NativeNeed(3 * size, size), device):
        return True
    call.counters.made(size)
    return False


def _are_positions(*values: Any) -> bool:
    """True if these are plain integer or bool tensors (bool: a padding mask), not a subclass of someone's."""
    return all(
        isinstance(t, torch.Tensor)
        and t.dim() > 0
        and not t.is_floating_point()
        and not t.is_complex()
        and is_plain(t)
        for t in values
    )


def outer(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """Query positions against key positions (``keys[None, :] - queries[:, None]``), deferred if its size goes by rows.

    Returns:
        The deferred integer or bool tensor, or ``NotImplemented``.
    """
    if len(args) != 2 or kwargs or not _are_positions(*args) or args[0].device != args[1].device:
        return NotImplemented
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in args))
    except RuntimeError:
        return NotImplemented
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return NotImplemented
    wide = [t for t in args if t.shape[-1] != 1]
    tall = [t for t in args if t.dim() > 1 and t.shape[-2] != 1]
    if len(wide) != 1 or len(tall) != 1 or wide[0] is tall[0]:
        return NotImplemented
    if not _goes_by_rows(shape, args[0].device, call):
        return NotImplemented
    dims = dims_of(shape)
    nodes = [InputNode.aligned(t, dims) for t in args]
    # This uses one element of each tensor: torch gives the dtype, or raises what it would raise (bool tensors cannot be
    # subtracted).
    dtype = func(*(torch.ones([1] * t.dim(), dtype=t.dtype) for t in args)).dtype
    return wrap(OpNode(func, tuple(nodes), {}, dims, dtype, args[0].device), call)


def repeated(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """Key positions written out for every query (``keys.repeat(queries, 1)``), deferred if its size goes by rows.

    Returns:
        The deferred tensor, or ``NotImplemented``.
    """
    counts = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if (
        kwargs
        or len(counts) < 2
        or not all(isinstance(n, int) for n in counts)
        or not _are_positions(args[0])
    ):
        return NotImplemented
    tensor, rows = args[0], counts[-2]
    if tensor.numel() != tensor.shape[-1] or min(tensor.shape[-1], rows) < 2 or tensor.dim() > len(counts):
        return NotImplemented
    if any(n != 1 for i, n in enumerate(counts) if i != len(counts) - 2):
        return NotImplemented
    shape = torch.Size([*counts[:-1], tensor.shape[-1]])
    if not _goes_by_rows(shape, tensor.device, call):
        return NotImplemented
    dims = dims_of(shape)
    keys = InputNode(tensor, (*((),) * (tensor.dim() - 1), dims[-1]))
    return wrap(ViewNode(keys, dims, expand=True), call)


def _functions(names: str) -> list[Any]:
    return [
        getattr(space, name)
        for space in (torch.Tensor, torch)
        for name in names.split()
        if hasattr(space, name)
    ]


def _first_of(*begins: Begin) -> Begin:
    def begin(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
        for one in begins:
            begun = one(func, args, kwargs, call)
            if begun is not NotImplemented:
                return begun
        return NotImplemented

    return begin


# A padding mask of queries combined with one of keys.
_BOTH = "mul __mul__ multiply __and__ bitwise_and logical_and"
# Functions that combine masks.
_MASKS = "add __add__ __radd__ __or__ bitwise_or logical_or"
# Functions that are deferred before attention as well as inside it.
OF_POSITIONS: dict[Any, Begin] = {
    **dict.fromkeys(_functions(COMPARISONS), outer),
    **dict.fromkeys(_functions(f"{SUBTRACTIONS} {_BOTH}"), _first_of(outer, row_biases.of_two)),
    **dict.fromkeys(_functions(_MASKS), row_biases.of_two),
    **dict.fromkeys(_functions("repeat tile"), repeated),
    **dict.fromkeys(
        [torch.Tensor.__getitem__, F.embedding, *_functions("index_select")], row_biases.looked_up
    ),
}
BEGINNINGS: dict[Any, Begin] = {**OF_POSITIONS, **constants.BEGINNINGS}
_OF_TWO = frozenset(_functions(f"{COMPARISONS} {SUBTRACTIONS} {_BOTH} {_MASKS}"))


def _makes_nothing_larger(func: Callable[..., Any], args: Any) -> bool:
    """True for calls of ``OF_POSITIONS`` that are known at once to be left alone: those whose result has the shape of one
    of two tensors, those of a tensor and a number, slices.
    """
    if func in _OF_TWO:
        if len(args) != 2:
            return True
        one, other = args
        are_tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return not are_tensors or _fits(other.shape, one.shape) or _fits(one.shape, other.shape)
    if func is not torch.Tensor.__getitem__:
        return False
    index = args[1]
    last = index[-1] if isinstance(index, tuple) and index else index
    return not isinstance(last, torch.Tensor)


def _fits(small: torch.Size, large: torch.Size) -> bool:
    """True if a tensor of the first shape is broadcast to the second one, and that one to no other."""
    if small == large:
        return True
    if len(small) > len(large):
        return False
    return all(a in (1, b) for a, b in zip(reversed(small), reversed(large), strict=False))


# --------------------------------------------------------------------------------------------- before any attention


class Before(Watching):
    """The mode that defers a model's computations on positions before attention.

    Args:
        call: Policy and counters of the model's call.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Switched off, but still below a mode of the host's; or a call that nothing is done with. Most are, so this
        # takes as little time as it can.
        if here.positions is not self or (
            DeferredTensor not in types
            and (func not in OF_POSITIONS or _makes_nothing_larger(func, args))
            and not is_watching_writes()
        ):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        begin = OF_POSITIONS.get(func)
        is_inside = compat.is_transformed()
        if begin is not None and not is_inside and DeferredTensor not in types:
            begun = begin(func, args, kwargs, self.call)
            if begun is not NotImplemented:
                return begun
        if DeferredTensor not in types and is_watching_writes():
            dispatch.protect(func, args, kwargs)
        return guard.native(func, args, kwargs)


@contextlib.contextmanager
def watched(call: AttentionCall) -> Iterator[None]:
    """Watch a model's call, except its attention, which has a mode of its own (``mode.RowsMode``)."""
    outer, here.positions = here.positions, Before(call)
    try:
        with here.positions:
            yield
    finally:
        here.positions = outer
        guard.attempted(left, name="the end of a model's call", counters=call.counters)


def is_watching() -> bool:
    """True if a ``Before`` mode is active in this thread."""
    return here.positions is not None


def unwatched() -> contextlib.AbstractContextManager[Any]:
    """Switch the mode off inside the block, so that attention runs as it would without attnpatch.

    ``nn.TransformerEncoderLayer``, for example, does not use its fused operators while any mode is active.
    """
    return _NOTHING if here.positions is None else _unwatched(here.positions)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _unwatched(watch: Before) -> Iterator[None]:
    here.positions = None
    try:
        with without(watch):  # if it stays on torch's stack, it passes every call on
            yield
    finally:
        here.positions = watch
