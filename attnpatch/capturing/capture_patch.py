"""The patch through which a capture records (the user's, or one made for it), and the sites that it records."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from attnpatch.errors import AttnpatchWarning, PatchError
from attnpatch.patching.model_patches import put_in_place
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.policy import Policy
from attnpatch.recording.layers import is_inside
from attnpatch.recording.threads import Owner

# Reentrant: the garbage collector may end an abandoned capture while another capture begins or ends in the same thread.
_lock = threading.RLock()


def patch_for(part: nn.Module, undo: contextlib.ExitStack) -> Patch:
    """The patch of a model. If it was made for captures (each thread may have one), the last of them takes it out."""
    with _lock:
        known = patch_of(part)
        if known is not None and not known.captures and not known.is_leaving:
            return known  # the user's
        # Taken out by ``release``, not by this stack.
        patch = None
        while patch is None or patch_of(part) is not patch:
            (patch,) = put_in_place(part, Policy(mode="never"), contextlib.ExitStack())
            patch.captures += 1

    def release() -> None:
        with _lock:
            patch.captures -= 1
            if patch.captures == 0:
                _leave(patch, part)

    undo.callback(release)
    return patch


def _leave(patch: Patch, part: nn.Module) -> None:
    """Take a patch out at once; or, if observed checkpoints may still be recomputed, when the last of them is gone."""
    waiting = list(patch.watched)
    if not waiting:
        patch.take_out(part)
        return
    patch.is_leaving = True

    def gone(one: int) -> None:
        left.discard(one)
        if not left and patch.is_leaving:
            patch.take_out(part)

    left = set(range(len(waiting)))
    for number, frame in enumerate(waiting):
        weakref.finalize(frame, gone, number).atexit = False


def _change(patch: Patch, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Replace a patch's recorders, even if the garbage collector ends a capture meanwhile."""
    with _lock:
        while True:
            before = patch.recorders
            after = change(before)
            if patch.recorders is before:
                patch.recorders = after
                return


@contextlib.contextmanager
def recording(patch: Patch, recorder: Any) -> Iterator[None]:
    if any(not each.gives_way and each.is_mine() for each in patch.recorders):
        raise PatchError("this model is being captured already; end the outer capture first")
    with Owner() as owner:
        recorder.owner = owner
        _change(patch, lambda recorders: (*recorders, recorder))
        try:
            yield
        finally:
            _change(patch, lambda recorders: tuple(each for each in recorders if each is not recorder))


def warn_of(left_out: dict[str, str], deep: int = 0, result: str = "maps") -> None:
    """Warn once of sites that are in no map, or in no other result; ``result``: what the documentation calls it."""
    if left_out:
        name, reason = next(iter(left_out.items()))
        more = f"; and {len(left_out) - 1} more in {result}.left_out" if len(left_out) > 1 else ""
        where = "in no map" if result == "maps" else "has no scores"
        warnings.warn(
            f"attnpatch: {where}: {name or '(model)'}: {reason}{more}",
            AttnpatchWarning,
            stacklevel=4 + deep,
        )


def innermost(patch: Patch) -> list[str]:
    """Names of the attention sites that contain no other site."""
    names = [site.name for site in patch.sites if site.is_attention]
    # A candidate may turn out to be no attention, so it does not exclude the site around it.
    sure = [site.name for site in patch.sites if site.is_attention and not site.is_candidate]
    return [name for name in names if not any(is_inside(other, name) for other in sure)]


def owners(patch: Patch) -> list[str]:
    """Names of the sites that contain others: their own forward may compute the attention of the sites inside."""
    inner = set(innermost(patch))
    return [
        site.name
        for site in patch.sites
        if site.is_attention and not site.is_candidate and site.name not in inner
    ]
