"""Which sequence a call of a model goes on with: told by its cache, and by what the cache holds.

A cache is the same object from call to call; what it holds may be cut (``crop``), put into another order (beams), or copied
into another object meanwhile. So a few numbers of its last layer's keys are kept for every token: they depend on all the
tokens before, and tell rows of a batch apart as well as prefixes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch.recording.accumulator import SiteSums

# From a cache, a first and one past a last token to float ``[batch, tokens, numbers]`` on the CPU; ``None``: not known.
Marks = Callable[[Any, int, int], torch.Tensor | None]


def reference(cache: Any) -> Callable[[], Any]:
    """A weak reference to a cache; a strong one where its type has no room for a weak one."""
    try:
        return weakref.ref(cache)
    except TypeError:
        return lambda: cache


class Calls(dict[str, SiteSums]):
    """The records of one sequence by site; where calls are kept apart, those of each call beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: list[dict[str, SiteSums]] = []

    def before(self, name: str) -> SiteSums | None:
        """The latest record of a site."""
        found = next((call[name] for call in reversed(self.apart) if name in call), None)
        return found if found is not None else self.get(name)

    def changed(self, change: Callable[[str, SiteSums], SiteSums | None]) -> Calls:
        """A copy whose records went through ``change``, which drops those that it gives ``None`` for."""
        found = Calls()

        def all_of(records: dict[str, SiteSums]) -> Iterator[tuple[str, SiteSums]]:
            for name, record in records.items():
                new = change(name, record)
                if new is not None:
                    yield name, new

        found.update(all_of(self))
        found.apart = [dict(all_of(call)) for call in self.apart]
        return found


@dataclasses.dataclass
class Sequence:
    """What was captured of one sequence of tokens, or of one batch of them.

    Attributes:
        calls: Records: the first of them, and where a module is called again inside a call of the model (a second text, the
            next picture, one layer many times) one more for each time.
        out: Sites that are left out of it.
        cache: Reference to its cache, or ``None``.
        held: The cache, where it may be changed after the last call: rows of a batch are put into another order, drafts
            that are rejected are cut off. Until the next call or the end of the capture.
        length: Tokens in its cache after the last call.
        marks: Of each token what its cache held, by row; ``None``: not known.
        is_partial: Whether it has only been seen by a part of the model, as ``generate`` runs an encoder first.
    """

    calls: list[Calls] = dataclasses.field(default_factory=lambda: [Calls()])
    out: set[str] = dataclasses.field(default_factory=set)
    cache: Callable[[], Any] | None = None
    held: Any = None
    length: int = 0
    marks: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    is_partial: bool = False

    def has_records(self) -> bool:
        """Whether anything was captured of it."""
        return any(calls or any(calls.apart) for calls in self.calls)

    def is_batch(self) -> bool:
        """Whether it is several sequences side by side."""
        held = (each for calls in self.calls for each in (calls, *calls.apart))
        return any(len(record.sums) > 1 for each in held for record in each.values())

    def order_of(self, found: torch.Tensor | None, position: int) -> list[int] | None:
        """Which of its rows those of a cache are; ``None``: they are not all its own.

        Args:
            found: ``[batch, numbers]``, what the cache holds of the token; ``None``: not known.
            position: Of the token.
        """
        known = self.marks.get(position)
        if found is None or known is None or found.shape[1:] != known.shape[1:]:
            return None
        order: list[int] = []
        for row, own in enumerate(found):
            same = (known == own).all(-1)
            if not bool(same.any()):
                return None
            # Rows that hold the same went the same way; each keeps its own place where it can.
            is_there = row < len(same) and bool(same[row])
            order.append(row if is_there else int(same.int().argmax()))
        return order

    def remember(self, cache: Any, start: int, stop: int, marks: Marks) -> None:
        """Keep what a cache holds of some tokens."""
        self.length = stop
        found = marks(cache, start, stop) if stop > start else None
        if found is None:
            self.held = cache
            return
        for i in range(found.shape[1]):
            self.marks[start + i] = found[:, i]
        if len(found) > 1 or (start and stop - start > 1):
            self.held = cache

    def changed(self, change: Callable[[str, SiteSums], SiteSums | None]) -> Sequence:
        """A copy whose records went through ``change``."""
        return dataclasses.replace(
            self,
            calls=[calls.changed(change) for calls in self.calls],
            out=set(self.out),
            marks=dict(self.marks),
        )
