"""Replaces functions in a host's table while any thread calls a patched model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any


class Replaced:
    """The functions of a table, replaced from the first ``enter`` to the last ``leave``.

    Args:
        replacement: Given a function of the table, the one to put in its place, or ``None`` to keep it.
    """

    def __init__(self, replacement: Callable[[Any, Any], Any]) -> None:
        self._replacement = replacement
        self._lock = threading.Lock()
        self._users = 0
        self._replaced: list[tuple[MutableMapping[Any, Any], Any, Any, Any]] = []

    def enter(self, tables: Iterable[MutableMapping[Any, Any]]) -> None:
        """Replace the functions in some tables, unless another call has done so."""
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

    def leave(self) -> None:
        """Put the host's functions back, if this was the last call that had them replaced."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            for table, key, function, ours in self._replaced:
                # Another function may have been registered meanwhile; it stays.
                if table.get(key) is ours:
                    table[key] = function
            self._replaced.clear()
