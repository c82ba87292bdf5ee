"""Replaces a method of another library's class for a while, and puts it back exactly.

Assigning to ``instance.__class__`` would work for one object, but hosts compare classes exactly (``type(m) is C``).
"""

from __future__ import annotations

import threading
from typing import Any

# Reentrant: the garbage collector may free the last user of a method during a change, and so start another change.
changing = threading.RLock()


def owner_of(kind: type[Any], name: str) -> type[Any] | None:
    """The class, among ``kind`` and its bases, that defines the method ``name``; ``None`` if none does."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


class Replaced:
    """One method in the namespace of the class that defines it.

    Args:
        kind: A class that has ``name`` in its own namespace.
        name: The method's name.

    Attributes:
        found: The original entry of the namespace (it may be a ``staticmethod``).
        ours: The replacement, once it was put in.
    """

    def __init__(self, kind: type[Any], name: str) -> None:
        self.kind, self.name = kind, name
        self.found = vars(kind)[name]
        self.ours: Any = None

    @property
    def is_in_place(self) -> bool:
        return self.ours is not None and vars(self.kind).get(self.name) is self.ours

    def put_in(self, ours: Any) -> None:
        self.ours = ours
        self._set(ours)

    def take_out(self) -> None:
        """Put the original back; if someone else has replaced the method since, theirs stays."""
        if self.is_in_place:
            self._set(self.found)

    def _set(self, value: Any) -> None:
        # Bypasses the metaclass's __setattr__, which may have side effects.
        type.__setattr__(self.kind, self.name, value)
