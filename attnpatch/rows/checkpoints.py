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
from torch.utils import checkpoint

_FRAME = getattr(checkpoint, "_CheckpointFrame", None)
_decisions: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()
_used: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, bool]] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_followed: weakref.WeakSet[Any] = weakref.WeakSet()


def current() -> Any:
    """The checkpoint whose saved tensors are recorded now; ``None`` outside of any, or where torch hides it."""
    return _found()[0]


def _found() -> tuple[Any, Any]:
    """That checkpoint, and what stands for its running again: ``None`` the first time."""
    if _FRAME is None or not torch.is_grad_enabled():
        return None, None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None, None
    # Recorded for the first time, the hook knows the checkpoint; when it runs again, a reference to it.
    hook = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    for cell in getattr(hook, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            value = cell.cell_contents
            if isinstance(value, _FRAME):
                return value, None
            if isinstance(value, weakref.ref) and isinstance(value(), _FRAME):
                return value(), hook
    return None, None


def is_to_be_pending(handle: Any) -> bool:
    """Whether a deferred tensor from outside was not computed when this checkpoint first used it, and is to be so again.

    It may have been computed since, and a tensor is saved where a recipe is not.
    """
    frame, again = _found()
    if frame is None:
        return False
    if again is None:
        used = _used.setdefault(frame, weakref.WeakKeyDictionary())
        used.setdefault(handle, not handle.has_values)
        return False
    if not _used.get(frame, {}).get(handle, False):
        return False
    seen = _seen.setdefault(again, weakref.WeakSet())
    if handle in seen:
        return False
    seen.add(handle)
    return True


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
