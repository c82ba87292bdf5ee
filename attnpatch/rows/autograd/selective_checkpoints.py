"""Selective checkpoints (``create_selective_checkpoint_contexts``), which count operators and keep results of some.

Attention by rows runs other operators than native attention. They overwrite each other's results, and a recomputation
may run different ones. So such a checkpoint sees the host's operators but not attnpatch's: attention by rows is
recomputed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from attnpatch import compat
from attnpatch.rows.thread_state import here


def is_active() -> bool:
    """True if such a checkpoint sees the operators of this thread now."""
    return compat.has_dispatch_modes() and any(
        isinstance(mode, compat.SELECTIVE_MODES) for mode in compat.dispatch_modes()
    )


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide attnpatch's own operators, which run inside the block."""
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


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the host's own operator, which runs inside the block."""
    outer, here.hidden = here.hidden, ()
    for mode in outer:
        compat.push_dispatch_mode(mode)
    try:
        yield
    finally:
        for _ in outer:
            compat.pop_dispatch_mode()
        here.hidden = outer
