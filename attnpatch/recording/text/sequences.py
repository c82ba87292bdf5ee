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
from attnpatch.recording.call_facts import Unknown

# Returns the fingerprints of all tokens of a cache, float ``[batch, tokens, numbers]``; ``None``: not known.
Whole = Callable[[], torch.Tensor | None]
# The reason if a cache fits several sequences, or several rows of one.
TOO_ALIKE = (
    "its cache fits several of the captured sequences, which differ only in tokens that have left its sliding window, so it "
    "is not known which of them it continues; capture one of them at a time"
)

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

    def take(self, names: set[str]) -> Calls:
        """Take the records of some sites out; of steps, only the latest is looked at."""
        found = Calls()
        found.apart = [{}] if self.apart else []
        for old, new in [(self, found), *zip(self.apart[-1:], found.apart, strict=True)]:
            for name in [each for each in old if each.partition(":")[0] in names]:
                new[name] = old.pop(name)
        return found

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


@dataclasses.dataclass(eq=False)
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
        version: The version of that cache after the last call (``HostReading.version_of``).
        marks: By position, the fingerprint of the token in each batch row.
        alike: Bool ``[rows, rows]``: True where no token of two rows is known to be different; ``None``: not computed yet.
        is_partial: True if only a part of the model has run on it, as ``generate`` runs an encoder first.
    """

    calls: list[Calls] = dataclasses.field(default_factory=lambda: [Calls()])
    out: set[str] = dataclasses.field(default_factory=set)
    cache: Callable[[], Any] | None = None
    held: Any = None
    length: int = 0
    version: tuple[Any, int, int] | None = None
    marks: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    alike: torch.Tensor | None = None
    is_partial: bool = False

    def has_records(self) -> bool:
        """True if anything was captured of it."""
        return any(calls or any(calls.apart) for calls in self.calls)

    def has(self, name: str) -> bool:
        """True if a site has run on it."""
        held = (each for calls in self.calls for each in (calls, *calls.apart))
        return name in self.out or any(known.partition(":")[0] == name for each in held for known in each)

    def is_batch(self) -> bool:
        """True if it is a batch of several sequences."""
        held = (each for calls in self.calls for each in (calls, *calls.apart))
        return any(len(record.sums) > 1 for each in held for record in each.values())

    def is_unaltered(self, version: tuple[Any, int, int] | None, past: int) -> bool:
        """True if a version of its cache is that after the last call: nobody has written to it or replaced its keys.

        Keys that were taken out of one layer do not count: the number of its keys tells that at its site.
        """
        old = self.version
        if old is None or version is None:
            return False
        is_thinned = past == self.length and version[1] != old[1]
        return is_thinned or (old[0]() is version[0]() and old[1:] == version[1:])

    def order_of(
        self, found: torch.Tensor | None, position: int, whole: Whole, is_unaltered: bool
    ) -> list[int] | None:
        """For each batch row of a cache, the row of this sequence that has the same tokens up to a position; ``None`` if
        some row matches none.

        Args:
            found: ``[batch, numbers]``: the cache's fingerprints of the token at the position; ``None``: not known.
            position: The token's position.
            whole: Returns the cache's fingerprints of all tokens up to there.
            is_unaltered: True if the cache is this sequence's own, and has not changed since its last call. Then earlier
                tokens are compared only if the last one fits rows with different histories. (With one layer, or short
                windows, a fingerprint does not depend on all earlier tokens.)

        Raises:
            Unknown: A row fits several rows that differ in tokens which the cache no longer holds.
        """
        known = self.marks.get(position)
        if found is None or known is None or found.shape[1:] != known.shape[1:]:
            return None
        same = (found[:, None] == known[None]).all(-1)
        if bool(same.any(1).all()) and not (is_unaltered and self._is_one(same)):
            same = same & self._same_history(whole(), position)
        if not bool(same.any(1).all()):
            return None
        if not self._is_one(same):
            raise Unknown(TOO_ALIKE)
        # Equal rows have equal histories; each keeps its own index if possible.
        return [
            row if row < len(fits) and bool(fits[row]) else int(fits.int().argmax())
            for row, fits in enumerate(same)
        ]

    def _is_one(self, same: torch.Tensor) -> bool:
        """True if the rows that fit one row of a cache have one history; ``same``: ``[rows of the cache, own rows]``."""
        if not bool((same.sum(1) > 1).any()):
            return True
        if self.alike is None:
            self.alike = torch.ones(same.shape[1], same.shape[1], dtype=torch.bool)
            for mark in self.marks.values():
                self.alike &= _alike(mark)
        return not bool((same[:, :, None] & same[:, None] & ~self.alike).any())

    def history(self, position: int) -> tuple[list[int], torch.Tensor]:
        """The positions up to ``position`` that are known, and their fingerprints ``[rows, positions, numbers]``."""
        places = sorted(at for at in self.marks if at <= position)
        return places, torch.stack([self.marks[at] for at in places], 1)

    def _same_history(self, whole: torch.Tensor | None, position: int) -> torch.Tensor:
        """``[rows of the cache, own rows]``: False where some token up to a position is known to be another one."""
        places, known = self.history(position)
        if whole is None:
            return torch.zeros(1, len(known), dtype=torch.bool)
        same = [(_equal(row[places][None], known)).flatten(1).all(1) for row in whole]
        return torch.stack(same)

    def has_history_of(self, other: Sequence, position: int, rows: list[int], its_rows: list[int]) -> bool:
        """True if rows of this sequence are known to have the same tokens as rows of another, up to a position."""
        if rows == its_rows and all(
            mark is other.marks.get(at) for at, mark in self.marks.items() if at <= position
        ):
            return True
        (places, mine), (its_places, its) = self.history(position), other.history(position)
        return places == its_places and torch.equal(mine[rows], its[its_rows])

    def remember(self, cache: Any, start: int, stop: int, marks: Marks) -> None:
        """Keep a cache's fingerprints of tokens ``start:stop``."""
        self.length = stop
        found = marks(cache, start, stop) if stop > start else None
        if found is None:
            self.held = cache
            return
        for i in range(found.shape[1]):
            self.marks[start + i] = found[:, i]
            if self.alike is not None:
                self.alike = self.alike & _alike(found[:, i])
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


def _equal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two fingerprints may be equal; nothing is known of a token that has left a sliding window (NaN)."""
    return (one == other) | one.isnan() | other.isnan()


def _alike(mark: torch.Tensor) -> torch.Tensor:
    """Which rows have the same token, bool ``[rows, rows]``; ``mark``: ``[rows, numbers]``."""
    return _equal(mark[:, None], mark[None]).all(-1)
