"""Activation checkpointing (``torch.utils.checkpoint``, not reentrant): what runs again must go the way it went before.

Such a checkpoint counts the tensors that are saved in a forward pass, and expects as many when it runs again. Whether a
call goes by rows is therefore remembered with the checkpoint: two passes of one size may have found different memory.
A checkpoint inside a module runs a part of it again from the backward pass, past the module's forward, so the watch on
attention has to be there too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.graph.axes import all_leaves

_decisions: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()
# Of deferred tensors that came from outside and were pending when first used: what their axes were taken for.
_used: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_followed: weakref.WeakSet[Any] = weakref.WeakSet()
# Runs of checkpoints in which something from outside was written to.
_overwriting: weakref.WeakSet[Any] = weakref.WeakSet()


def current() -> Any:
    """The checkpoint whose saved tensors are recorded now; ``None`` outside of any, or where torch hides it."""
    return _found()[0]


def _found() -> tuple[Any, Any]:
    """That checkpoint, and what stands for its running again: ``None`` the first time."""
    if compat.CheckpointFrame is None or not torch.is_grad_enabled():
        return None, None
    hooks = compat.saved_tensor_hooks()
    if hooks is None:
        return None, None
    # Recorded for the first time, the hook knows the checkpoint; when it runs again, a reference to it.
    hook = getattr(hooks[0], compat.COMPILED_FUNCTION, hooks[0])
    for value in compat.closed_over(hook).values():
        if isinstance(value, compat.CheckpointFrame):
            return value, None
        if isinstance(value, weakref.ref) and isinstance(value(), compat.CheckpointFrame):
            return value(), hook
    return None, None


def is_to_be_pending(handle: Any) -> bool:
    """Whether a deferred tensor from outside was not computed when this checkpoint first used it, and is to be so again.

    It may have been computed since, and a tensor is saved where a graph is not. Its rows may be keys since (a softmax along
    them has followed), and figures of rows are computed where figures of keys are put off: they are rows again.
    """
    frame, again = _found()
    if frame is None:
        return False
    if again is None:
        used = _used.setdefault(frame, weakref.WeakKeyDictionary())
        if handle not in used:
            axes = all_leaves(handle.node.dims)
            used[handle] = None if handle.has_values else [(axis, axis.kind) for axis in axes]
        return False
    kinds = _used.get(frame, {}).get(handle)
    if kinds is None:
        return False
    seen = _seen.setdefault(again, weakref.WeakSet())
    if handle in seen:
        return False
    seen.add(handle)
    for axis, kind in kinds:
        for leaf in axis.leaves():
            leaf.kind = kind
    return True


def overwrites(handle: Any) -> None:
    """A deferred tensor is about to be written to, maybe one from outside of the present checkpoint."""
    frame, again = _found()
    if frame is not None and (handle.checkpoint is None or handle.checkpoint() is not frame):
        _overwriting.add(again or frame)


def saving() -> contextlib.AbstractContextManager[Any]:
    """While an edge saves what it reads.

    A checkpoint whose argument was overwritten cannot run again, so what natively saves nothing (a bias that is added) must
    not ask for that: it is held.
    """
    if not _overwriting:
        return contextlib.nullcontext()
    frame, again = _found()
    if frame is None or (again or frame) not in _overwriting:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor._version), _unchanged)


def _unchanged(held: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = held
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation"
        )
    return tensor


def decisions(otherwise: dict[Any, bool]) -> dict[Any, bool]:
    """What was decided in this checkpoint, by site and size; outside of any, ``otherwise``."""
    frame = current()
    return otherwise if frame is None else _decisions.setdefault(frame, {})


def follow(frame: Any, watch: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    """Run a checkpoint again under ``watch``."""
    if frame in _followed or not callable(getattr(frame, "recompute_fn", None)):
        return
    _followed.add(frame)
    recompute = frame.recompute_fn

    def watched(*args: Any) -> Any:
        with watch():
            return recompute(*args)

    frame.recompute_fn = watched
