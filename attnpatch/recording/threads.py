"""The threads whose calls a capture sees: the one that began it, and threads that it starts between its own calls.

``Thread(target=model.generate, ...)`` with a streamer is one request in two threads. A thread that is started while the
captured thread is inside a call of the model serves another request, and so does every thread that was there before.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

# Reentrant: while one capture begins or ends, the garbage collector may end another that was dropped.
_lock = threading.RLock()
_owners: list[Owner] = []
_original: list[Any] = []


class Owner:
    """The threads whose calls a capture sees."""

    def __init__(self) -> None:
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet([threading.current_thread()])
        self._inside = threading.local()

    def is_mine(self) -> bool:
        """True if the running thread's calls are captured."""
        return threading.current_thread() in self._threads

    def begin(self) -> None:
        """Called when the running thread is about to call the model."""
        self._inside.depth = getattr(self._inside, "depth", 0) + 1

    def end(self) -> None:
        """Called when that call has ended."""
        self._inside.depth = max(0, getattr(self._inside, "depth", 0) - 1)

    def started(self, thread: threading.Thread) -> None:
        """Called when the running thread starts another one."""
        if self.is_mine() and not getattr(self._inside, "depth", 0):
            self._threads.add(thread)

    def __enter__(self) -> Owner:
        with _lock:
            _owners.append(self)
            if not _original:
                _original.append(threading.Thread.start)
                threading.Thread.start = _watched(threading.Thread.start)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        with _lock:
            _owners.remove(self)
            if not _owners and _original:
                ours, before = threading.Thread.start, _original.pop()
                # If someone else has replaced it meanwhile, theirs stays.
                if getattr(ours, "attnpatch_original", None) is before:
                    threading.Thread.start = before  # type: ignore[method-assign]


def _watched(start: Any) -> Any:
    @functools.wraps(start)
    def watched(self: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        for owner in list(_owners):
            owner.started(self)
        return start(self, *args, **kwargs)

    watched.attnpatch_original = start  # type: ignore[attr-defined]
    return watched
