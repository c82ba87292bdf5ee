"""Remembers the layouts of a module's calls. The key is what a call did, and its numbers, some of which grow."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attnpatch.observing import Layout

# At most this many different calls of one module are remembered (batch and cache may change).
_MOST_WAYS = 16


@dataclasses.dataclass
class _Way:
    """A call and its layout.

    Attributes:
        numbers: All numbers of the call (sizes, indices), in order.
        layout: The layout of its attention.
        grows: Which of the numbers grow from call to call; ``None`` until two calls were compared.
        grows_in: The index of the piece of the keys that grows with them.
    """

    numbers: tuple[int, ...]
    layout: Layout
    grows: tuple[bool, ...] | None = None
    grows_in: int = 0

    def answer(self, numbers: tuple[int, ...]) -> Layout | None:
        """The layout of a call with these numbers; ``None`` if it is not known."""
        if numbers == self.numbers:
            return self.layout
        if self.grows is None:
            return None
        amount = self._growth(numbers)
        return None if amount is None or amount[0] != self.grows else self._grown(self.grows_in, amount[1])

    def compare(self, numbers: tuple[int, ...], layout: Layout) -> bool:
        """Learn from a second call which numbers grow; False if nothing was learned."""
        amount = self._growth(numbers) if self.grows is None else None
        if amount is None:
            return False
        for place in range(max(1, len(self.layout.keys))):
            if _is_same(self._grown(place, amount[1]), layout):
                self.grows, self.grows_in = amount[0], place
                return True
        return False

    def _growth(self, numbers: tuple[int, ...]) -> tuple[tuple[bool, ...], int] | None:
        """Which numbers differ from this call's, and by how much; ``None`` unless all differ by the same amount."""
        if len(numbers) != len(self.numbers):
            return None
        changes = [new - old for new, old in zip(numbers, self.numbers, strict=True)]
        amounts = set(changes) - {0}
        return (tuple(map(bool, changes)), amounts.pop()) if len(amounts) == 1 else None

    def _grown(self, place: int, by: int) -> Layout:
        keys = tuple(
            dataclasses.replace(piece, length=piece.length + by) if i == place else piece
            for i, piece in enumerate(self.layout.keys)
        )
        return dataclasses.replace(self.layout, kv_len=self.layout.kv_len + by, keys=keys)


def _is_same(one: Layout, other: Layout) -> bool:
    first, second = one.numbers, other.numbers
    is_numbered_alike = first is second or (
        first is not None and second is not None and torch.equal(first, second)
    )
    return is_numbered_alike and dataclasses.replace(one, numbers=None) == dataclasses.replace(
        other, numbers=None
    )


class RememberedCalls:
    """The remembered calls of one module.

    Attributes:
        is_off: True if the module does something that cannot be recorded, or attends twice.
        results: By what a call did: for each of the module's results, the number of the input whose order it has.
    """

    def __init__(self) -> None:
        self.is_off = False
        self.results: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self._ways: dict[tuple[Any, ...], list[_Way]] = {}

    def __bool__(self) -> bool:
        return bool(self._ways)

    def find(self, done: tuple[Any, ...], numbers: tuple[int, ...]) -> Layout | None:
        """The layout of a call with this record and these numbers; ``None`` if it is not known."""
        return next(
            (found for way in self._ways.get(done, ()) if (found := way.answer(numbers)) is not None), None
        )

    def keep(self, done: tuple[Any, ...], numbers: tuple[int, ...], layout: Layout) -> None:
        """Remember the layout of a call."""
        ways = self._ways.setdefault(done, [])
        if not any(way.compare(numbers, layout) for way in ways):
            ways.append(_Way(numbers, layout))
        del ways[:-_MOST_WAYS]
        if len(self._ways) > _MOST_WAYS:
            del self._ways[next(iter(self._ways))]

    def keep_results(self, key: tuple[Any, ...], numbers: tuple[int | None, ...]) -> None:
        """Remember the order of a call's results."""
        self.results[key] = numbers
        if len(self.results) > _MOST_WAYS:
            del self.results[next(iter(self.results))]
