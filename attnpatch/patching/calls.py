"""The state of a thread while a patched model is called, and the contexts that are put around the host's forward."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.hosts.diffusers import kernels as of_diffusers
from attnpatch.hosts.transformers import kernels as of_transformers
from attnpatch.memory.free import FreeMemoryCache
from attnpatch.observing import NullObserver
from attnpatch.patching.recognition import Watch
from attnpatch.policy import Policy
from attnpatch.rows import torch_graphs
from attnpatch.rows.mode import RowsMode
from attnpatch.rows.sdpa.encoder_fast_paths import opened

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch
    from attnpatch.patching.site import Site


class _Calls(threading.local):
    """The state of this thread.

    Attributes:
        mode: The RowsMode that is active, if any.
        patch: The patch whose model is being called.
        room: Free memory, cached for that call.
        is_calm: True if the call has only short inputs and nothing in it has gone by rows.
        is_recorded: True if a capture has been told of the call.
        watch: The mode that watches the running candidate.
        served: Sites that are being served through an attribute of the instance; if the forward of their class is
            reached, it must not serve them again.
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
    """Counts what happens to the masks of a model's call: at the running site, or at the model if none is running."""

    def __init__(self, root: Site) -> None:
        self.root = root

    def left_native(self, reason: str, *numbers: int) -> None:
        """Does nothing: a mask that the host makes does not mean that attention stayed native."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made has no site yet
            raise AttributeError(name)
        site = self.root if calls_here.mode is None else calls_here.mode.call.counters
        return getattr(site, name)


def kernels_seen(forward: Callable[..., Any]) -> list[contextlib.AbstractContextManager[Any]]:
    """Contexts in which the hosts' calls of kernels are seen; none if a compiled graph makes them."""
    return [] if torch_graphs.is_compiled(forward) else [of_transformers.seen(), of_diffusers.seen()]


def opened_up(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of a torch module, changed so that a mode does not alter its path. Other forwards are unchanged."""
    # A function made by exec may have no ``__module__``.
    if not (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules."):
        return forward
    if isinstance(forward, types.MethodType):
        return types.MethodType(opened(forward.__func__), forward.__self__)
    return opened(forward) if isinstance(forward, types.FunctionType) else forward


class Around:
    """attnpatch's contexts around a forward of the host, which runs on even if one of them fails.

    Attributes:
        entered: The contexts whose ``__enter__`` has succeeded.
    """

    def __init__(self, site: Site, *contexts: contextlib.AbstractContextManager[Any]) -> None:
        self.site, self.contexts = site, contexts
        self.entered: list[contextlib.AbstractContextManager[Any]] = []

    def __enter__(self) -> Around:
        for context in self.contexts:
            try:
                context.__enter__()
            except Exception as error:
                self.site.failed("entering a mode", error)
            except BaseException:  # interrupted: leave the contexts that were entered
                self.__exit__(*sys.exc_info())
                raise
            else:
                self.entered.append(context)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for context in reversed(self.entered):
            try:
                context.__exit__(*exc_info)
            except Exception as error:
                if error is not exc_info[1]:
                    self.site.failed("leaving a mode", error)


def most_rows(args: Any, kwargs: dict[str, Any]) -> int:
    """An upper bound on the query rows of a call: the number of positions in its inputs, batch included.

    A tensor of four dimensions (images, split heads) counts only if it comes first: a later one is usually a mask, and
    a mask's width says nothing about the queries.
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
    """Why a call is not watched: a key of ``REASONS``, or its rows if they are too few; ``None``: it is watched.

    Decided before any mode is entered, so that short calls cost nothing.
    """
    if policy.mode == "never" and not policy.replace_kernels:
        return "never"
    if any(isinstance(value, torch.Tensor) and value.is_nested for value in args):
        return "nested"
    if compat.is_transformed():
        # Inside vmap or torch.func.grad a tensor's shape and values are not the real ones.
        return "transform"
    if policy.mode == "always" or policy.replace_kernels:
        return None
    rows = most_rows(args, kwargs)
    return None if rows > policy.min_tokens else rows
