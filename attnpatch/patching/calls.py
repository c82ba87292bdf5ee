"""What is going on in a thread while a patched model is called, and what stands around a forward of the host."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.memory import FreeMemoryCache
from attnpatch.observing import NullObserver
from attnpatch.patching.recognition import Watch
from attnpatch.policy import Policy
from attnpatch.rows.attention_call import Counters
from attnpatch.rows.mode import RowsMode
from attnpatch.rows.sdpa.encoder_fast_paths import opened

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch
    from attnpatch.patching.site import Site


class _Calls(threading.local):
    """What is going on in this thread.

    Attributes:
        mode: The rows mode that is active, if any.
        patch: The patch whose model is being called.
        room: What is known of free memory during that call.
        is_calm: Whether nothing of that call is long, and nothing has gone by rows in it.
        is_recorded: Whether a capture knows of the call.
        watch: Who looks at the candidate that runs.
        served: Sites that a slot serves: their class's forward, if it is reached, has nothing to add.
    """

    mode: RowsMode | None = None
    patch: Patch | None = None
    room: FreeMemoryCache | None = None
    is_calm: bool = False
    is_recorded: bool = True
    watch: Watch | None = None
    served: tuple[Any, ...] = ()


calls_here = _Calls()
SEEN = NullObserver()


class CountersOfMasks:
    """Counts what happens to the masks of a model's call: at the site that runs, or else at the model."""

    def __init__(self, root: Site) -> None:
        self.root = root

    def count(self, what: str) -> None:
        self._site().count(what)

    def materialised(self, operation: str) -> None:
        self._site().materialised(operation)

    def not_fused(self, step: str) -> None:
        self._site().not_fused(step)

    def summed(self, by: str) -> None:
        self._site().summed(by)

    def left_native(self, reason: str, *numbers: int) -> None:
        """Masks that are made whole say nothing of attention."""

    def made(self, size: int) -> None:
        self._site().made(size)

    def _site(self) -> Counters:
        return self.root if calls_here.mode is None else calls_here.mode.call.tally


def opened_up(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of torch's own that runs under a mode as it would without; any other is itself."""
    # What exec makes may name no module.
    if not (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules."):
        return forward
    if isinstance(forward, types.MethodType):
        return types.MethodType(opened(forward.__func__), forward.__self__)
    return opened(forward) if isinstance(forward, types.FunctionType) else forward


class Around:
    """Contexts of ours around a forward of the host, which goes on if one of them fails to begin or to end.

    Attributes:
        entered: Those that have begun.
    """

    def __init__(self, site: Site, *contexts: contextlib.AbstractContextManager[Any]) -> None:
        self.site, self.contexts = site, contexts
        self.entered: list[contextlib.AbstractContextManager[Any]] = []

    def __enter__(self) -> Around:
        for context in self.contexts:
            try:
                context.__enter__()
            except Exception as error:
                self.site.failed("the beginning of a watch", error)
            else:
                self.entered.append(context)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for context in reversed(self.entered):
            try:
                context.__exit__(*exc_info)
            except Exception as error:
                if error is not exc_info[1]:
                    self.site.failed("the end of a watch", error)


def most_rows(args: Any, kwargs: dict[str, Any]) -> int:
    """An upper bound on the query rows of a call: positions of its inputs, the batch included.

    Only the first tensor counts with four dimensions (images, split heads): a later one is as a rule a mask, whose
    width says nothing about the queries.
    """
    most, seen = 0, False
    for value in (*args, *kwargs.values()):
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        if value.dim() < 4:
            most = max(most, value.numel() // max(1, value.shape[-1]))
        elif not seen:
            most = max(most, value.numel() // max(1, min(value.shape[-1], value.shape[1])))
        seen = True
    return most


def stays_native(policy: Policy, args: Any, kwargs: dict[str, Any]) -> str | int | None:
    """The rule that keeps a call from being watched, or its rows if they are too few; ``None``: it is watched.

    Decided before anything is watched, so that short calls cost nothing.
    """
    if policy.mode == "never":
        return "never"
    if any(isinstance(value, torch.Tensor) and value.is_nested for value in args):
        return "nested"
    if compat.is_transformed():
        # Inside vmap or torch.func.grad tensors are not what they seem; the native call is left alone.
        return "transform"
    if policy.mode == "always":
        return None
    rows = most_rows(args, kwargs)
    return None if rows > policy.min_tokens else rows
