"""The patch that a capture records through: put in place for it, or the user's; which of its sites, and who records."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnpatch.errors import AttnpatchWarning, PatchError
from attnpatch.patching.model_patches import put_in_place
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.policy import Policy
from attnpatch.recording.threads import Owner

_lock = threading.Lock()


def patch_for(part: nn.Module, undo: contextlib.ExitStack) -> Patch:
    """The patch of a model; one that captures have put in place goes with the last of them (each thread may have one)."""
    with _lock:
        known = patch_of(part)
        if known is not None and not known.captures and not known.is_leaving:
            return known  # the user's
        # Taken out below, with the last capture.
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
    """Take a patch out: at once, or with the last checkpoint that it looked at, which may run again in a backward pass."""
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


@contextlib.contextmanager
def recording(patch: Patch, recorder: Any) -> Iterator[None]:
    if any(not each.gives_way and each.is_mine() for each in patch.recorders):
        raise PatchError("this model is being captured already; end the outer capture first")
    with Owner() as owner:
        recorder.owner = owner
        with _lock:
            patch.recorders = (*patch.recorders, recorder)
        try:
            yield
        finally:
            with _lock:
                patch.recorders = tuple(each for each in patch.recorders if each is not recorder)


def warn_of(left_out: dict[str, str], deep: int = 0) -> None:
    """Once: what is in no map."""
    if left_out:
        name, reason = next(iter(left_out.items()))
        more = f"; and {len(left_out) - 1} more in maps.left_out" if len(left_out) > 1 else ""
        warnings.warn(f"attnpatch: in no map: {name}: {reason}{more}", AttnpatchWarning, stacklevel=4 + deep)


def innermost(patch: Patch) -> list[str]:
    """Names of the attention sites that hold no other."""
    names = [site.name for site in patch.sites if site.is_attention]
    # A candidate may turn out to be none, so it hides nobody.
    sure = [site.name for site in patch.sites if site.is_attention and not site.is_candidate]
    return [name for name in names if not any(other.startswith(name + ".") for other in sure)]


def owners(patch: Patch) -> list[str]:
    """Names of the sites that hold others: what those are named for may be computed in the forward around them."""
    inner = set(innermost(patch))
    return [
        site.name
        for site in patch.sites
        if site.is_attention and not site.is_candidate and site.name not in inner
    ]
