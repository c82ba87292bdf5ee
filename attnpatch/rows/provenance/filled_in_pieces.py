"""Memory that is made blank and then filled piece by piece, as ``cat`` would fill it."""

from __future__ import annotations

from attnpatch.rows.graph.axes import Dim, fresh


class Pieces:
    """What was written along a dimension of such a memory."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[Dim, int]] = {}

    def at(self, start: int, count: int) -> Dim | None:
        """What lies in exactly this piece."""
        found = self._written.get(start)
        return found[0] if found is not None and found[1] == count else None

    def put(self, start: int, count: int, source: Dim) -> bool:
        """Write into a piece; whether nothing was there."""
        if any(at < start + count and start < at + size for at, (_, size) in self._written.items()):
            return False
        self._written[start] = source, count
        return True

    def all_of(self, size: int) -> list[tuple[Dim | None, int]]:
        """All that lies there, in order, and how many places each takes; what is still blank comes from nowhere."""
        parts: list[tuple[Dim | None, int]] = []
        end = 0
        for at, (dim, count) in [*sorted(self._written.items()), (size, ((), 0))]:
            if at > end:
                parts.append((fresh([at - end])[0], at - end))
            if count:
                parts.append((dim, count))
            end = at + count
        return parts
