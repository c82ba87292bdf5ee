"""Replaces functions in a host's table while any thread calls a patched model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any


class Replaced:
    """The functions of tables, replaced while any thread is inside.

    Args:
        replacement: Given a function of the table, the one to put in its place, or ``None`` to keep it.
    """

    def __init__(self, replacement: Callable[[Any, Any], Any]) -> None:
        self._replacement = replacement
        self._lock = threading.Lock()
        self._users = 0
        self._replaced: list[tuple[MutableMapping[Any, Any], Any, Any, Any]] = []

    @contextlib.contextmanager
    def inside(self, *tables: MutableMapping[Any, Any]) -> Iterator[None]:
        """Inside the block, the functions in these tables are replaced."""
        try:
            self._enter(tables)
            yield
        finally:  # also if a replacement could not be made
            self._leave()

    def _enter(self, tables: Iterable[MutableMapping[Any, Any]]) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            for table in tables:
                for key, function in list(table.items()):
                    ours = self._replacement(key, function)
                    if ours is not None:
                        table[key] = ours
                        self._replaced.append((table, key, function, ours))

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            for table, key, function, ours in self._replaced:
                # Another function may have been registered meanwhile; it stays.
                if table.get(key) is ours:
                    table[key] = function
            self._replaced.clear()
