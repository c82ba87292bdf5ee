"""A method of somebody else's class, replaced for a while and put back exactly.

Assigning to ``instance.__class__`` would do for one object, but hosts compare classes exactly (``type(m) is C``).
"""

from __future__ import annotations

import threading
from typing import Any

# Reentrant: the garbage collector may let the last user of a method go in the middle of a change.
changing = threading.RLock()


def owner_of(kind: type[Any], name: str) -> type[Any] | None:
    """The class in whose own namespace an instance of ``kind`` finds a method."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


class Replaced:
    """One method in the namespace of the class that defines it.

    Args:
        kind: A class that has ``name`` in its own namespace.
        name: What the method is called.

    Attributes:
        found: What stood there, as it stood there (it may be a ``staticmethod``).
        ours: What stands there instead, once it was put in.
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
        """Put back what was found; where somebody has replaced the method since, theirs stays."""
        if self.is_in_place:
            self._set(self.found)

    def _set(self, value: Any) -> None:
        # A metaclass may have a __setattr__ that does more than this.
        type.__setattr__(self.kind, self.name, value)
