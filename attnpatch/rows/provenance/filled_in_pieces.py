"""Uninitialized memory that is filled piece by piece along a dimension, as ``cat`` would fill it."""

from __future__ import annotations

from attnpatch.rows.graph.axes import Dim, fresh


class Pieces:
    """The pieces that were written along one dimension of such memory."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[Dim, int]] = {}

    def at(self, start: int, count: int) -> Dim | None:
        """The source of exactly this piece; ``None`` if no such piece was written."""
        found = self._written.get(start)
        return found[0] if found is not None and found[1] == count else None

    def put(self, start: int, count: int, source: Dim) -> bool:
        """Note a piece; False if it overlaps one that was written before."""
        if any(at < start + count and start < at + size for at, (_, size) in self._written.items()):
            return False
        self._written[start] = source, count
        return True

    def all_of(self, size: int) -> list[tuple[Dim | None, int]]:
        """All pieces in order, each with its length; parts that are still blank get a new axis."""
        parts: list[tuple[Dim | None, int]] = []
        end = 0
        for at, (dim, count) in [*sorted(self._written.items()), (size, ((), 0))]:
            if at > end:
                parts.append((fresh([at - end])[0], at - end))
            if count:
                parts.append((dim, count))
            end = at + count
        return parts
