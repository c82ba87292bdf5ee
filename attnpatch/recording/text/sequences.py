"""Sequences of tokens, their records, and fingerprints of their caches, by which later calls are recognised.

A cache is the same object from call to call, but its contents may be cut (``crop``), reordered (beams) or copied to
another object. So a few features of its last layer's keys are kept for every token. They depend on all earlier tokens,
so they tell apart both batch rows and prefixes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch.recording.accumulator import SiteSums

# ``marks(cache, start, stop)``: float ``[batch, tokens, numbers]`` on the CPU; ``None``: not known.
Marks = Callable[[Any, int, int], torch.Tensor | None]


def reference(cache: Any) -> Callable[[], Any]:
    """A weak reference to a cache; a strong one if its type does not support weak references."""
    try:
        return weakref.ref(cache)
    except TypeError:
        return lambda: cache


class Calls(dict[str, SiteSums]):
    """The records of one sequence by site; if calls are kept separate, ``apart`` has those of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: list[dict[str, SiteSums]] = []

    def before(self, name: str) -> SiteSums | None:
        """The latest record of a site."""
        found = next((call[name] for call in reversed(self.apart) if name in call), None)
        return found if found is not None else self.get(name)

    def changed(self, change: Callable[[str, SiteSums], SiteSums | None]) -> Calls:
        """A copy with ``change`` applied to its records; those for which it returns ``None`` are dropped."""
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
    """What was captured of one sequence of tokens, or of one batch of sequences.

    Attributes:
        calls: The records. If a module is called several times within one call of the model (a second text, the next
            picture, one layer many times), there is one entry for each time.
        out: Sites that are left out of it.
        cache: A reference to its cache, or ``None``.
        held: The cache itself, kept until the next call or the end of the capture, if it may still change after the
            last call: batch rows are reordered, or rejected drafts are cut off.
        length: Tokens in its cache after the last call.
        marks: By position, the fingerprint of the token in each batch row.
        is_partial: True if only a part of the model has run on it, as ``generate`` runs an encoder first.
    """

    calls: list[Calls] = dataclasses.field(default_factory=lambda: [Calls()])
    out: set[str] = dataclasses.field(default_factory=set)
    cache: Callable[[], Any] | None = None
    held: Any = None
    length: int = 0
    marks: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    is_partial: bool = False

    def has_records(self) -> bool:
        """True if anything was captured of it."""
        return any(calls or any(calls.apart) for calls in self.calls)

    def is_batch(self) -> bool:
        """True if it is a batch of several sequences."""
        held = (each for calls in self.calls for each in (calls, *calls.apart))
        return any(len(record.sums) > 1 for each in held for record in each.values())

    def order_of(self, found: torch.Tensor | None, position: int) -> list[int] | None:
        """For each batch row of a cache, the row of this sequence that has the same token at a position; ``None`` if
        some row matches none.

        Args:
            found: ``[batch, numbers]``: the cache's fingerprints of one token; ``None``: not known.
            position: The token's position.
        """
        known = self.marks.get(position)
        if found is None or known is None or found.shape[1:] != known.shape[1:]:
            return None
        order: list[int] = []
        for row, own in enumerate(found):
            same = (known == own).all(-1)
            if not bool(same.any()):
                return None
            # Equal rows have equal histories; each keeps its own index if possible.
            is_there = row < len(same) and bool(same[row])
            order.append(row if is_there else int(same.int().argmax()))
        return order

    def remember(self, cache: Any, start: int, stop: int, marks: Marks) -> None:
        """Keep a cache's fingerprints of tokens ``start:stop``."""
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
        """A copy with ``change`` applied to its records."""
        return dataclasses.replace(
            self,
            calls=[calls.changed(change) for calls in self.calls],
            out=set(self.out),
            marks=dict(self.marks),
        )
