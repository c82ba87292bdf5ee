"""Activation checkpointing (``torch.utils.checkpoint``, non-reentrant): recomputation must take the same path again.

Such a checkpoint counts the tensors that are saved in a forward pass, and expects as many when it recomputes. So
whether a call goes by rows is remembered with the checkpoint: free memory may differ between the two passes. A
checkpoint inside a module recomputes a part of it from the backward pass, without the module's forward, so the mode has
to be entered there, too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.graph.axes import all_leaves
from attnpatch.rows.thread_state import here

compat.note_saved_tensor_hooks(lambda: here.hooks)

_decisions: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()
# For each checkpoint and each deferred tensor from outside it: the kinds of the tensor's axes at its first use there;
# ``None`` if it was computed by then.
_used: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_followed: weakref.WeakSet[Any] = weakref.WeakSet()
# Runs of checkpoints in which a tensor from outside was written to.
_overwriting: weakref.WeakSet[Any] = weakref.WeakSet()


def current() -> Any:
    """The innermost active checkpoint; ``None`` if there is none, or if torch hides it."""
    return _found()[0]


def _found() -> tuple[Any, Any]:
    """The active checkpoint, and an object that identifies its recomputation: ``None`` in the first run."""
    if compat.CheckpointFrame is None or not torch.is_grad_enabled():
        return None, None
    hooks = compat.saved_tensor_hooks()
    if hooks is None:
        return None, None
    # In the first run the hook's closure holds the checkpoint; in a recomputation, a weak reference to it.
    hook = getattr(hooks[0], compat.COMPILED_FUNCTION, hooks[0])
    for value in compat.closed_over(hook).values():
        if isinstance(value, compat.CheckpointFrame):
            return value, None
        if isinstance(value, weakref.ref) and isinstance(value(), compat.CheckpointFrame):
            return value(), hook
    return None, None


def is_to_be_pending(handle: Any) -> bool:
    """True if a deferred tensor from outside was uncomputed when this checkpoint first used it, and so must be
    uncomputed again.

    It may have been computed since. Then the recomputation would save the tensor, although the first run has saved
    nothing of its graph. A softmax along its row axes may also have followed, and then these axes count as keys now.
    That would change what is deferred, so the former kinds of the axes are restored.
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
    """Note that a deferred tensor is about to be written to, if it comes from outside the active checkpoint."""
    frame, again = _found()
    if frame is not None and (handle.checkpoint is None or handle.checkpoint() is not frame):
        _overwriting.add(again or frame)


def saving() -> contextlib.AbstractContextManager[Any]:
    """A context in which an edge saves the tensors that it reads.

    A checkpoint whose argument was overwritten cannot be recomputed. A step that natively saves nothing (adding a bias)
    must not cause a recomputation, so in such a checkpoint its tensors are held directly.
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
    """The decisions of the active checkpoint, by site and size; ``otherwise`` if there is none."""
    frame = current()
    return otherwise if frame is None else _decisions.setdefault(frame, {})


def follow(frame: Any, watch: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    """Make a checkpoint recompute inside the context ``watch()``."""
    if frame in _followed or not callable(getattr(frame, "recompute_fn", None)):
        return
    _followed.add(frame)
    recompute = frame.recompute_fn

    def watched(*args: Any) -> Any:
        with watch():
            return recompute(*args)

    frame.recompute_fn = watched
