"""The thread-local state of ``rows/``: what one thread defers, watches or hides does not affect another thread.

Every field is declared here, with the file that reads and writes it. Two other thread-local states are kept elsewhere,
because ``rows/`` must not know what they hold. ``patching/calls.py`` has the running model call and the sites that are
serving. Each capture (``recording/``) has an object of its own with the calls that it sees, by thread.
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
    from attnpatch.rows.provenance.reordered.mode import Moved


class ThreadState(threading.local):
    """The state of one thread.

    Attributes:
        site: The attention call that is running (``interception.py``).
        pending: Deferred tensors that are not computed yet (``deferred/handle.py``).
        real: Deferred tensors that are computed; a write through a view of another tensor may change them
            (``deferred/handle.py``).
        kept: Values that backward passes still need, by the storage they lie in (``autograd/kept_values.py``).
        most_kept: The size of ``kept`` above which storages without values are removed (``autograd/kept_values.py``).
        hidden: Selective checkpoints from which attnpatch's own operators are hidden
            (``autograd/selective_checkpoints.py``).
        results: Results of the host's own function for the running operation; ``None`` if no operation is running
            (``guard.py``).
        raised: The ``id`` of the error that the host's own function has raised; an ``id``, since the error's frames
            hold tensors (``guard.py``).
        model_call: The model's call whose masks are deferred, if any (``creation/row_masks.py``).
        positions: The mode that defers a model's computations on positions before attention
            (``creation/positions.py``).
        hooks: The active hooks for saved tensors, where torch does not tell them (``autograd/checkpoints.py``).
        order: Tracks which tensors of a model's call hold its tokens in another order (``provenance/reordered/mode.py``).
    """

    site: AttentionCall | None = None
    hidden: tuple[Any, ...] = ()
    results: list[Any] | None = None
    raised: int | None = None
    model_call: AttentionCall | None = None
    positions: Before | None = None
    order: Moved | None = None
    most_kept: int = 256

    def __init__(self) -> None:
        self.pending: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.real: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.hooks: list[Any] = []
        self.kept: dict[int, weakref.WeakSet[Kept]] = {}


here = ThreadState()
