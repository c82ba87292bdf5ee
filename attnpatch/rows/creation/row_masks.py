"""Masks that are never held whole: their rows are made when they are needed.

Natively a host makes a mask before any attention runs: a bool mask of 32k x 32k takes 1 GB. Here a mask is a graph,
like a score matrix. It begins with a function that returns any range of its rows (``RowFunctionNode``: the host's own
mask function, called for fewer rows), with positions against positions (``rows/creation/positions.py``), or with a
single value (``ConstantNode``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.failures import warn_once
from attnpatch.ledger import is_plain
from attnpatch.policy import NativeNeed
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, ROW, Dims, Tile, flat_range, fresh, leaves, local_shape, take
from attnpatch.rows.graph.nodes import Node
from attnpatch.rows.thread_state import here

# Bytes per element that a function holds while it makes rows: positions are int64, and a distance and its absolute
# value are alive at the same time (measured by tests/test_workspace.py).
GENERATED_BYTES = 16


class RowFunctionNode(Node):
    """A tensor ``[..., rows, keys]`` whose rows come from a function.

    Args:
        function: ``function(low, high)`` returns rows ``low:high``, as ``[..., high - low, keys]``.
        shape: The shape of the whole tensor.
        dtype, device: Those of its elements.
    """

    stands_for_memory = is_made_by_host = True
    held_bytes = GENERATED_BYTES

    def __init__(
        self,
        function: Callable[[int, int], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.function, self.dtype, self.device = function, dtype, device
        self.dims = (*fresh(shape[:-2]), *fresh(shape[-2:-1], ROW), *fresh(shape[-1:], KEY))

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        count = self.shape[-2]
        span = flat_range(leaves(self.dims[-2]), tile)
        low, high = (0, count) if span is None else span
        value = self.function(low, high)
        dims: Dims = self.dims if span is None else (*self.dims[:-2], (), self.dims[-1])
        return take(value, dims, tile)


class ConstantNode(Node):
    """A tensor whose elements are all the same value."""

    stands_for_memory = is_constant = True

    def __init__(self, value: float, dims: Dims, dtype: torch.dtype, device: torch.device) -> None:
        self.value, self.dims, self.dtype, self.device = value, dims, dtype, device

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return torch.full(local_shape(self.dims, tile), self.value, dtype=self.dtype, device=self.device)


# ------------------------------------------------------------------------------------------ masks of a model's call


@contextlib.contextmanager
def of_call(call: AttentionCall | None) -> Iterator[None]:
    """Defer masks that the host asks for inside the block, under the policy of ``call``; ``None``: defer none."""
    outer, here.model_call = here.model_call, call
    try:
        yield
    finally:
        here.model_call = outer


def may_defer(q_len: int) -> bool:
    """True if a mask of ``q_len`` rows could be deferred now."""
    call = here.model_call
    if call is None or q_len < 2 or (call.policy.mode == "auto" and q_len <= call.policy.min_tokens):
        return False
    return not compat.is_transformed()


def deferred(
    function: Callable[[int, int], torch.Tensor], q_len: int, kv_len: int, need: Callable[[int], NativeNeed]
) -> DeferredTensor | None:
    """A deferred mask; ``None`` if the policy lets the host make it. Call it only if ``may_defer``.

    Args:
        function: ``function(low, high)`` returns rows ``low:high``, as ``[..., high - low, kv_len]``.
        q_len, kv_len: Numbers of rows and keys.
        need: Maps the mask's number of elements to what the host takes while it makes the mask.
    """
    call = here.model_call
    assert call is not None
    # Four rows show the dtype, device and leading dimensions.
    few = function(0, min(q_len, 4))
    if few.dim() < 2 or few.shape[-2:] != (min(q_len, 4), kv_len) or not is_plain(few):
        return None
    count = math.prod(few.shape[:-2]) * q_len * kv_len
    if not call.by_rows(q_len, need(count), few.device):
        call.counters.made(count * few.element_size())
        return None
    return wrap(
        RowFunctionNode(function, (*few.shape[:-2], q_len, kv_len), few.dtype, few.device),
        call,
    )


def answers(error: RuntimeError, device: torch.device) -> bool:
    """True if a mask is deferred after all, because the host ran out of memory while making it; counted."""
    return here.model_call is not None and here.model_call.answers(error, device)


def failed(where: str, error: Exception) -> None:
    """Count and warn about an error in attnpatch's own code. The host has made its own mask instead."""
    if here.model_call is not None:
        here.model_call.counters.count("failed")
    warn_once(where, error)


def left_whole(what: str, q_len: int, need: NativeNeed, mask: torch.Tensor) -> None:
    """Count a mask that the policy would defer and that cannot be deferred."""
    call = here.model_call
    if call is not None:
        call.counters.made(mask.numel() * mask.element_size())
        if call.by_rows(q_len, need, mask.device):
            call.counters.materialised(what)


class Unknown(Exception):
    """A function refers to an object that cannot be copied."""


_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    type(None),
    type,
    types.BuiltinFunctionType,
)


def keeping(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """A copy of a function together with the tensors that it refers to, so that later writes do not change its results.

    A mask that is made later must be the same as one made now. The tensors are padding masks and positions, small
    beside the mask.

    Raises:
        Unknown: The function refers to something that cannot be copied: anything but numbers, tensors, containers and
            functions.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (*_PLAIN, types.ModuleType)):
        return value
    if isinstance(value, torch.Tensor):
        if not is_plain(value):
            raise Unknown(type(value).__name__)
        copy: Any = value.detach().clone()
    elif isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        copy = type(value)(keeping(item, seen) for item in value)
    elif type(value) is dict:
        copy = {key: keeping(item, seen) for key, item in value.items()}
    elif isinstance(value, functools.partial):
        copy = functools.partial(
            keeping(value.func, seen), *keeping(value.args, seen), **keeping(value.keywords, seen)
        )
    elif isinstance(value, types.FunctionType):
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        seen[id(value)] = copy
        copy.__defaults__ = keeping(value.__defaults__, seen)
        copy.__kwdefaults__ = keeping(value.__kwdefaults__, seen)
        for mine, theirs in zip(cells, value.__closure__ or (), strict=True):
            mine.cell_contents = keeping(theirs.cell_contents, seen)
    else:
        raise Unknown(type(value).__name__)
    seen[id(value)] = copy
    return copy
