"""What each thread is in the middle of, for all of ``rows/``: what one thread defers, watches or hides is nothing to another.

All of it is declared here, each field with the file whose functions read and write it. Two more stand elsewhere, because
``rows/`` must not know what they hold: ``patching/calls.py`` has the model's call that goes on and the sites that serve, and
each capture (``recording/``) has the calls that it sees, by thread, in an object of its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpatch.rows.attention_call import AttentionCall
    from attnpatch.rows.autograd.kept_values import Kept
    from attnpatch.rows.creation.positions import Before
    from attnpatch.rows.deferred.handle import Handle
    from attnpatch.rows.provenance.reordered import Moved


class ThreadState(threading.local):
    """The state of one thread.

    Attributes:
        site: The attention call in which functions of deferred tensors run (``interception.py``).
        pending: Deferred tensors that are not computed yet (``deferred/handle.py``).
        real: Those for which a real tensor stands, which may be written to as another one's (``deferred/handle.py``).
        kept: What backward passes still need, by the memory it lies in (``autograd/kept_values.py``).
        hidden: Selective checkpoints that do not see our own operators (``autograd/selective_checkpoints.py``).
        results: Of the host's own calls for the operation that goes on; ``None``: none does (``guard.py``).
        raised: The error that the host's own function has raised: by identity, since its frames hold tensors (``guard.py``).
        model_call: Whose masks are deferred, if anybody's (``creation/row_masks.py``).
        positions: Defers what a model makes of positions before its attention (``creation/positions.py``).
        order: Sees which tensors of a model's call hold its tokens in another order (``provenance/reordered.py``).
    """

    site: AttentionCall | None = None
    hidden: tuple[Any, ...] = ()
    results: list[Any] | None = None
    raised: int | None = None
    model_call: AttentionCall | None = None
    positions: Before | None = None
    order: Moved | None = None

    def __init__(self) -> None:
        self.pending: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.real: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.kept: dict[int, weakref.WeakSet[Kept]] = {}


here = ThreadState()
