"""Selective checkpoints (``create_selective_checkpoint_contexts``): they count operators and give what they kept of each.

By rows there are other operators than natively, which overwrite each other's results and may be others when a checkpoint
runs again. So such a checkpoint sees the host's operators and none of ours: attention by rows is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from attnpatch import compat
from attnpatch.rows.thread_state import here


def is_active() -> bool:
    """Whether such a checkpoint sees the operators of this thread now."""
    return compat.has_dispatch_modes() and any(
        isinstance(mode, compat.SELECTIVE_MODES) for mode in compat.dispatch_modes()
    )


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """While our own operators run."""
    outer, popped = here.hidden, []
    while is_active():
        popped.append(compat.pop_dispatch_mode())
    others = [mode for mode in reversed(popped) if not isinstance(mode, compat.SELECTIVE_MODES)]
    for mode in others:
        compat.push_dispatch_mode(mode)
    here.hidden = tuple(mode for mode in reversed(popped) if isinstance(mode, compat.SELECTIVE_MODES))
    try:
        yield
    finally:
        here.hidden = outer
        for _ in others:
            compat.pop_dispatch_mode()
        for mode in reversed(popped):
            compat.push_dispatch_mode(mode)


def is_hidden() -> bool:
    """Whether our own operators run, hidden from such a checkpoint."""
    return bool(here.hidden)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """While the host's own operator runs."""
    outer, here.hidden = here.hidden, ()
    for mode in outer:
        compat.push_dispatch_mode(mode)
    try:
        yield
    finally:
        for _ in outer:
            compat.pop_dispatch_mode()
        here.hidden = outer
