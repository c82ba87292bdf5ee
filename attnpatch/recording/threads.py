"""The threads whose calls a capture sees: the one that began it, and threads that it starts between its own calls.

``Thread(target=model.generate, ...)`` with a streamer is one request in two threads. A thread that is started while the
captured thread is inside a call of the model serves another request, and so does every thread that was there before.

A pool's thread serves one request after the other. So what is handed to a pool belongs to who hands it over: a context
variable goes with it (asyncio and anyio copy the context, and here ``ThreadPoolExecutor.submit`` is watched). Tasks of
one event loop share its thread, so another task's calls are told apart by that variable, too.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import sys
import threading
import weakref
from typing import Any

from attnpatch import compat

# The reason if there is nothing to map because only other threads have called the model.
ELSEWHERE = (
    "it was called only in threads or tasks that this capture does not see, such as a pool's worker that was there before the "
    "with block; begin the capture where the model is called"
)

# Reentrant: while one capture begins or ends, the garbage collector may end another that was dropped.
_lock = threading.RLock()
_owners: list[Owner] = []
# The functions that are replaced while there is a capture, by class.
_original: dict[type, Any] = {}
# The captures in whose with block the running code was started.
_here: contextvars.ContextVar[tuple[Owner, ...]] = contextvars.ContextVar("attnpatch_captures", default=())
# Modules of pools whose threads serve anyone's requests, if these can be told apart by the context variable.
_POOLS = ("concurrent.futures.", "anyio.")


class Owner:
    """The threads whose calls a capture sees.

    Attributes:
        missed: True if the model was called where this capture does not see it.
    """

    def __init__(self) -> None:
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet([threading.current_thread()])
        self._inside = threading.local()
        task = _running_task()
        self._task = None if task is None else weakref.ref(task)
        self.missed = False

    def is_mine(self) -> bool:
        """True if the running thread's calls are captured."""
        if self in _here.get():
            return True
        return threading.current_thread() in self._threads and not self._is_other_task()

    def _is_other_task(self) -> bool:
        """True if a task runs beside the one that began the capture, in the same thread."""
        mine = None if self._task is None else self._task()
        if mine is None or mine.done():
            return False
        running = _running_task()
        return running is not None and running is not mine

    def begin(self) -> None:
        """Called when the running thread is about to call the model."""
        self._inside.depth = getattr(self._inside, "depth", 0) + 1

    def end(self) -> None:
        """Called when that call has ended."""
        self._inside.depth = max(0, getattr(self._inside, "depth", 0) - 1)

    def goes_along(self) -> bool:
        """True if what the running thread starts now belongs to the capture."""
        return self.is_mine() and not getattr(self._inside, "depth", 0)

    def started(self, thread: threading.Thread) -> None:
        """Called when the running thread starts another one."""
        if self.goes_along() and not _is_of_pool(thread):
            self._threads.add(thread)

    def __enter__(self) -> Owner:
        with _lock:
            _owners.append(self)
            if not _original:
                for kind, name, watched in _WATCHED:
                    _original[kind] = before = getattr(kind, name)
                    setattr(kind, name, watched(before))
        _here.set((*_here.get(), self))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        _here.set(tuple(each for each in _here.get() if each is not self))
        with _lock:
            _owners.remove(self)
            if _owners:
                return
            for kind, name, _ in _WATCHED:
                before = _original.pop(kind)
                # If someone else has replaced it meanwhile, theirs stays.
                if getattr(getattr(kind, name), "attnpatch_original", None) is before:
                    setattr(kind, name, before)


def _running_task() -> Any:
    """The asyncio task that runs in this thread, or ``None``."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop is running
        return None


def _is_of_pool(thread: threading.Thread) -> bool:
    run = getattr(thread, compat.TARGET_OF_THREAD, None) or type(thread)
    return (getattr(run, "__module__", None) or "").startswith(_POOLS)


def _starting(start: Any) -> Any:
    @functools.wraps(start)
    def watched(self: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        for owner in list(_owners):
            owner.started(self)
        return start(self, *args, **kwargs)

    watched.attnpatch_original = start  # type: ignore[attr-defined]
    return watched


def _submitting(submit: Any) -> Any:
    @functools.wraps(submit)
    def watched(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        along = tuple(owner for owner in list(_owners) if owner.goes_along())
        return submit(self, functools.partial(_run, along, fn) if along else fn, *args, **kwargs)

    watched.attnpatch_original = submit  # type: ignore[attr-defined]
    return watched


def _run(along: tuple[Owner, ...], fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Run what a pool was given, as a part of the captures ``along``."""
    before = _here.set((*_here.get(), *along))
    try:
        return fn(*args, **kwargs)
    finally:
        _here.reset(before)


_WATCHED: tuple[tuple[type, str, Any], ...] = (
    (threading.Thread, "start", _starting),
    (concurrent.futures.ThreadPoolExecutor, "submit", _submitting),
)
