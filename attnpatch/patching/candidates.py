"""Candidates: modules whose first call tells whether they are attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from attnpatch.patching.calls import calls_here
from attnpatch.patching.recognition import Watch
from attnpatch.rows.autograd import checkpoints

if TYPE_CHECKING:
    from attnpatch.patching.site import Site


def judge(
    site: Site, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The first call of a candidate. It is served as attention; if the candidate turns out to be none, that changes
    nothing.
    """
    if site.waits_for is not None:
        return _as_judged(site, forward, module, first, args, kwargs)
    try:
        watch = Watch((args, kwargs), site.failed)
    except Exception as error:
        site.failed("watching a candidate's first call", error)
        return site.attend(forward, module, first, args, kwargs)
    outer, calls_here.watch = calls_here.watch, watch
    # Otherwise short calls of sites inside the candidate would skip ``_serve``, which pauses the watch for them.
    calls_here.is_calm = False

    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return forward(*args, **kwargs)

    try:
        result = site.attend(watched, module, first, args, kwargs)
    finally:
        calls_here.watch = outer
    try:
        if watch.found or not watch.has_failed:
            site.patch.judged(site, module, watch.found)
    except Exception as error:
        site.failed("judging a candidate's first call", error)
    return result


def _as_judged(
    site: Site, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Call a module that turned out to be no attention; if its first call is being recomputed, serve it as before."""
    try:
        frame = site.waits_for()
        if frame is None:
            site.patch.leave(site, module)
        is_again = frame is not None and checkpoints.current() is frame
    except Exception as error:
        site.failed("a checkpoint", error)
        is_again = False
    return (site.attend if is_again else _called_with)(forward, module, first, args, kwargs)


def _called_with(
    forward: Callable[..., Any], _: nn.Module, first: Any, __: Any, kwargs: dict[str, Any]
) -> Any:
    return forward(*first, **kwargs)


@contextlib.contextmanager
def paused(watch: Watch) -> Iterator[None]:
    """Pause the watch of a candidate while a site inside it runs, because that attention is not the candidate's own."""
    paused, watch.is_paused = watch.is_paused, True
    try:
        yield
    finally:
        watch.is_paused = paused
