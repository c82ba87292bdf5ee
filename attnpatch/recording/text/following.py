"""Finds the sequence that a call of the model continues, from what its cache holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attnpatch.blocks.partition import Partition
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.call_facts import AttentionCallInfo, Unknown
from attnpatch.recording.text.cache_history import cut
from attnpatch.recording.text.sequences import TOO_ALIKE, Marks, Sequence, reference

_OTHERS_PLACES = (
    "rows of the batch changed places between calls (beam search, contrastive search), so it is not known which of them is "
    "returned; capture one call with the sequences that are returned"
)
_NOT_READ = "its cache cannot be read, so it is not known whether rows of the batch changed places; capture one sequence at a time"


class HostCall(Protocol):
    """The facts of a model's call (``attnpatch.hosts`` reads them).

    Attributes:
        cache: The cache that was passed, or ``None``.
        past: Tokens in it when the call began.
        problem: Why the call cannot be mapped, or ``None``.
        is_single: True if the call has one token of one sequence, and no other input whose order matters.
    """

    cache: Any
    past: int
    problem: str | None
    is_single: bool


@dataclasses.dataclass(frozen=True)
class HostReading:
    """Functions that read a host's calls (from ``attnpatch.hosts``).

    Attributes:
        read_call: Makes a ``HostCall`` from the arguments of the whole model or of a part of it.
        site_call: Returns the facts of a site's call.
        model_name: The model's name for the metadata.
        marks: Returns fingerprints of some tokens of a cache.
        version_of: Returns a weak reference to the keys that ``marks`` reads, their number, and a count of writes.
        tokens_in: Returns the number of tokens in a cache.
        rows_have_moved: Tells if the batch rows of an unreadable cache were reordered.
    """

    read_call: Callable[[Any, Any, type | None], HostCall]
    site_call: Callable[[HostCall, str, Any, Any], AttentionCallInfo]
    model_name: str
    marks: Marks = lambda *_: None
    version_of: Callable[[Any], tuple[Any, int, int] | None] = lambda _: None
    tokens_in: Callable[[Any], int] = lambda _: 0
    rows_have_moved: Callable[[Any], bool | None] = lambda _: None


class CacheFollower:
    """Keeps the captured sequences, and finds the one that a cache holds.

    Args:
        host: Reads the model's calls and caches.

    Attributes:
        left_out: For each site that is in no map, the reason.
    """

    def __init__(self, host: HostReading) -> None:
        self.marks, self.tokens_in, self.rows_have_moved = host.marks, host.tokens_in, host.rows_have_moved
        self.version_of = host.version_of
        self.sequences: list[Sequence] = []
        self.left_out: dict[str, str] = {}
        # Caches of calls that have raised an exception.
        self._torn: list[Callable[[], Any]] = []

    def partitions(self, queries: torch.Tensor, keys: torch.Tensor | None) -> tuple[Partition, Partition]:
        """The blocks of queries and keys, given which tokens are real: bool ``[batch, tokens]`` each."""
        raise NotImplementedError

    def continued(self, call: HostCall) -> Sequence | None:
        """The sequence that a call continues; ``None``: it begins a new one. If it cannot be known which it continues,
        the call gets a ``problem``.
        """
        try:
            found = self.sequence_of(call)
        except Unknown as reason:
            call.problem = str(reason)
            return None
        if self._is_evicted(call, found):
            call.problem = (
                f"its cache holds {call.past} tokens, but not the ones that were seen there, so it is not known which tokens "
                "were evicted, compressed or overwritten; capture with a cache that keeps all tokens"
            )
        elif found is None and call.past and any(torn() is call.cache for torn in self._torn):
            call.problem = (
                "an earlier call with this cache ended with an exception, so its layers may hold different tokens; take the "
                "tokens of that call out of it, or begin with a new cache"
            )
        return found

    def call_failed(self, call: HostCall, sequence: Sequence, error: BaseException, wanted: set[str]) -> None:
        """A call of the model has raised an exception. If it continued a sequence, its rows are taken out again, since
        only some layers have them. If it began one, the layers that have run keep their rows.

        Args:
            call: The call.
            sequence: Its sequence.
            error: The exception.
            wanted: The sites that the call would have run.
        """
        name = type(error).__name__
        if call.cache is not None:
            self._torn.append(reference(call.cache))
        if call.past:
            reason = f"a call that continued this sequence ended with {name}, and what it added cannot be subtracted"
            self._follow(sequence, call.past, None, f"{reason}; capture without that call")
            return
        seen = {
            each.partition(":")[0]
            for calls in sequence.calls
            for one in (calls, *calls.apart)
            for each in one
        }
        reason = (
            f"a call of the model ended with {name} before attention of this module; call the model again"
        )
        self.leave_all_of(sequence, wanted - seen, reason)

    def _is_evicted(self, call: HostCall, found: Sequence | None) -> bool:
        """True if a known cache now holds another token at its last position than before."""
        if call.cache is None or call.past == 0 or found is not None:
            return False
        own = (s for s in self.sequences if s.cache is not None and s.cache() is call.cache)
        return any(call.past - 1 in sequence.marks for sequence in own)

    def new_sequence(self) -> Sequence:
        found = Sequence()
        self.sequences.append(found)
        return found

    def lacks_only(self, sequence: Sequence, name: str) -> bool:
        """True if a site has not run on a sequence, but on all others on which only a part of the model has run. So its call
        goes on with that sequence.
        """
        parts = [other for other in self.sequences if other.is_partial and other is not sequence]
        return not sequence.has(name) and all(other.has(name) for other in parts)

    def goes_on(self, call: HostCall) -> bool:
        """True if a call of the model continues a captured sequence with the same cache."""
        if call.cache is None or call.past == 0:
            return False
        with contextlib.suppress(Unknown):
            found, _ = self._known(call.cache, call.past)
            return found is not None and found.cache is not None and found.cache() is call.cache
        return False

    def sequence_of(self, call: HostCall) -> Sequence | None:
        """The sequence that a call continues, cut to what its cache holds now; ``None``: the call begins a new one."""
        if call.cache is None or call.past == 0:
            return None
        found, order = self._known(call.cache, call.past)
        if found is None:
            return None
        if found.cache is None or found.cache() is not call.cache:
            # The cache is a copy (a shared prefix): continue a copy of the sequence, and leave the original as it is.
            found = found.changed(lambda _, record: record)
            self.sequences.append(found)
            found.cache = reference(call.cache)
        self._follow(found, call.past, order)
        if order is None:
            self._check_rows(found, call.cache)
        return found

    def _known(self, cache: Any, past: int) -> tuple[Sequence | None, list[int] | None]:
        """The sequence that a cache continues, and for each batch row of the cache the row of that sequence.

        Raises:
            Unknown: It fits several.
        """
        held = self.marks(cache, past - 1, past) if past else None
        now = None if held is None else held[:, 0]
        whole = functools.cache(lambda: self.marks(cache, 0, past))
        own = [s for s in self.sequences if s.cache is not None and s.cache() is cache]
        version = self.version_of(cache) if own else None
        for sequence in reversed(own):
            order = sequence.order_of(now, past - 1, whole, sequence.is_unaltered(version, past))
            if order is not None or (now is None and 0 < past <= sequence.length):
                return sequence, order
        fits: list[tuple[Sequence, list[int]]] = []
        for sequence in reversed(self.sequences):
            order = None if sequence in own else sequence.order_of(now, past - 1, whole, False)
            if order is not None:
                fits.append((sequence, order))
        if not fits:
            return None, None
        first, rows = fits[0]
        if not all(first.has_history_of(other, past - 1, rows, its_rows) for other, its_rows in fits[1:]):
            raise Unknown(TOO_ALIKE)
        return first, rows

    def _check_rows(self, sequence: Sequence, cache: Any) -> None:
        """Leave the batch of an unreadable cache out if its rows were reordered, or may have been."""
        if not sequence.is_batch():
            return
        moved = self.rows_have_moved(cache)
        if moved or moved is None:
            reason = _OTHERS_PLACES if moved else _NOT_READ
            self._leave_all_out(sequence, reason)

    def _follow(
        self, sequence: Sequence, past: int, order: list[int] | None, why_failed: str | None = None
    ) -> None:
        """Bring the records of a sequence to what its cache holds, or to what it held before a failed call (for which
        ``why_failed`` is the reason if that is impossible).
        """
        rows = len(next(iter(sequence.marks.values()), ()))
        moved = order is not None and order != list(range(rows))

        def followed(name: str, record: SiteSums) -> SiteSums | None:
            try:
                if record.history.follows_cache and past < record.history.total:
                    record = cut(record, past, self.partitions)
                return record.of_rows(order) if moved and len(record.sums) == rows else record
            except Unknown as reason:
                self.left_out.setdefault(name, why_failed or str(reason))
                sequence.out.add(name)
                return None

        if moved and len(order or ()) == rows:
            # The beam that is returned is chosen only after the last call.
            self._leave_all_out(sequence, _OTHERS_PLACES)
        if past < sequence.length or moved or why_failed:
            gone = _steps_from(sequence, past)
            sequence.calls = sequence.changed(followed).calls
            for calls in sequence.calls:
                calls.apart = [call for i, call in enumerate(calls.apart) if i not in gone]
            sequence.marks = {at: mark for at, mark in sequence.marks.items() if at < past}
            if moved:
                sequence.marks = {at: mark[order] for at, mark in sequence.marks.items()}
            sequence.alike, sequence.length = None, past

    def _leave_all_out(self, sequence: Sequence, reason: str) -> None:
        """Leave out all sites whose queries are the cache's tokens; an encoder's are not."""
        records = (
            pair for calls in sequence.calls for each in (calls, *calls.apart) for pair in each.items()
        )
        names = {name for name, record in records if record.history.follows_cache}
        self.leave_all_of(sequence, names, reason)
        sequence.calls = sequence.changed(lambda name, record: None if name in names else record).calls

    def leave_all_of(self, sequence: Sequence, names: set[str], reason: str) -> None:
        """Leave sites out of a sequence in which they have no records."""
        for name in sorted(names):
            self.left_out.setdefault(name, reason)
        sequence.out |= names

    def finish(self) -> None:
        """Called when the capture ends: a cache may have been cut, or its rows reordered, after the last call."""
        for sequence in self.sequences:
            cache, sequence.held = sequence.held, None
            if cache is None:
                continue
            try:
                past = self.tokens_in(cache)
                held = self.marks(cache, past - 1, past) if past else None
                whole = functools.cache(functools.partial(self.marks, cache, 0, past))
                is_unaltered = sequence.is_unaltered(self.version_of(cache), past)
                order = None if held is None else sequence.order_of(held[:, 0], past - 1, whole, is_unaltered)
                if order is not None:
                    self._follow(sequence, past, order)
                elif held is None and past:
                    self._check_rows(sequence, cache)
            except Exception as error:
                unread = f"its cache cannot be read at the end: {error}"
                self._leave_all_out(sequence, str(error) if isinstance(error, Unknown) else unread)


def _steps_from(sequence: Sequence, past: int) -> set[int]:
    """The steps that have only tokens from position ``past`` on, if calls are kept separate: rejected drafts."""
    gone: set[int] = set()
    before = 0
    for i in range(len(sequence.calls[0].apart)):
        records = [record for calls in sequence.calls for record in calls.apart[i].values()]
        totals = [record.history.total for record in records if record.history.follows_cache]
        if totals and before >= past:
            gone.add(i)
        before = max([before, *totals])
    return gone
