"""Collects block sums while a model runs, and makes block maps of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Any, Protocol

import torch

from attnpatch.blocks.heads import chosen_heads
from attnpatch.blocks.partition import Partition
from attnpatch.errors import CaptureError
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.call_facts import AttentionCallInfo, Unknown
from attnpatch.recording.layers import chosen_sites, pattern_of
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.text.cache_history import cut
from attnpatch.recording.text.observer import NOT_SEEN, TextObserver
from attnpatch.recording.text.sequences import Calls, Marks, Sequence, reference
from attnpatch.recording.threads import Owner

_OTHERS_PLACES = (
    "rows of the batch took others' places between calls (beam search), and which of them is returned is not known; capture "
    "one call with the sequences that are returned"
)
_NOT_READ = "its cache cannot be read, and whether rows of the batch changed places there is not known; capture one sequence at a time"


class HostCall(Protocol):
    """What is known of a call of the model (``attnpatch.hosts`` reads it).

    Attributes:
        cache: The cache that it was handed, or ``None``.
        past: Tokens in it when the call began.
        problem: Why nothing of it can be mapped, if something is known to be wrong.
        is_single: Whether it is of one token of one sequence, and nothing else that has an order.
    """

    cache: Any
    past: int
    problem: str | None
    is_single: bool


class _State(threading.local):
    """What a thread is doing.

    Attributes:
        call: The call of the model, or of a part of it, that is going on.
        sequence: What it adds to.
        last: What the call before added to.
        times: How often each site was called in it.
        tokens: Which tokens each self-attention has found to be real.
    """

    def __init__(self) -> None:
        self.call: HostCall | None = None
        self.sequence: Sequence | None = None
        self.last: Sequence | None = None
        self.times: Counter[str] = Counter()
        self.tokens: dict[str, torch.Tensor] = {}
        self.is_part = False


@dataclasses.dataclass(frozen=True)
class HostReading:
    """How a host's calls are read (``attnpatch.hosts``).

    Attributes:
        read_call: Makes a ``HostCall`` of arguments, of the whole model or of a part of it.
        site_call: Says what is known of a call of a site.
        model_name: For the metadata.
        marks, tokens_in, rows_have_moved: What a cache holds of some tokens, how many it has, and whether its rows
            were put into another order where it cannot be read.
    """

    read_call: Callable[[Any, Any, type | None], HostCall]
    site_call: Callable[[HostCall, str, Any, Any], AttentionCallInfo]
    model_name: str
    marks: Marks = lambda *_: None
    tokens_in: Callable[[Any], int] = lambda _: 0
    rows_have_moved: Callable[[Any], bool | None] = lambda _: None


class Recorder:
    """Holds what a capture asked for and what it has seen.

    Args:
        options: What it asked for; layers by number are those that ``pattern_of`` gives.
        names: The attention sites, in order.
        owners: Sites that hold some of them; what is seen in their own forward is theirs.
        host: How calls of the model are read.

    Raises:
        CaptureError: There are no blocks, or no such layer or site.
    """

    # Whether a capture that somebody asks for takes its place.
    gives_way = False

    def __init__(
        self, options: CaptureOptions, names: Several[str], owners: Several[str], host: HostReading
    ) -> None:
        self.query_blocks, self.key_blocks = options.pair
        self.heads, self.measures, self.is_kept_apart = options.heads, options.measures, options.is_kept_apart
        self.sample_rows, self.seed = options.sample_rows, options.seed
        self.is_of_gradient = options.is_of_gradient
        self.places = pattern_of(names)
        self.wanted = chosen_sites(self.places, names, options.layers, options.sites)
        self.owners: set[str] = set()
        if owners:
            around = pattern_of(owners)
            with contextlib.suppress(CaptureError):  # none of them was asked for
                self.owners = chosen_sites(around, owners, options.layers, options.sites)
            self.places = {**around, **self.places}
        self.read_call, self.site_call, self.model_name = host.read_call, host.site_call, host.model_name
        self.marks, self.tokens_in, self.rows_have_moved = host.marks, host.tokens_in, host.rows_have_moved
        self.owner: Owner | None = None
        self.sequences: list[Sequence] = []
        # Why a site is in no map, by its name.
        self.left_out: dict[str, str] = {}
        self._state = _State()
        self._partitions: tuple[Any, ...] | None = None

    # -------------------------------------------------------------------------------------------- calls of the model

    def is_mine(self) -> bool:
        """Whether the running thread's calls are seen."""
        return self.owner is None or self.owner.is_mine()

    @property
    def follows_order(self) -> bool:
        """Whether it matters which of the model's tokens is which: a step of a generation has one."""
        return self.call is None or not self.call.is_single

    @property
    def call(self) -> HostCall | None:
        """The call of the model that is going on in this thread."""
        return self._state.call

    @property
    def is_partial(self) -> bool:
        """Whether the latest sequence has only been seen by a part of the model."""
        return self._state.last is not None and self._state.last.is_partial

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The model is about to run: what follows belongs to a new sequence unless it continues a cache."""
        self._begin(self.read_call(args, kwargs, None), is_part=False)

    def begin_part(self, kind: type, args: Any, kwargs: Any) -> None:
        """A part of the model is about to run on its own, as ``generate`` runs an encoder."""
        self._begin(self.read_call(args, kwargs, kind), is_part=True)

    def _begin(self, call: HostCall, is_part: bool) -> None:
        state = self._state
        if self.owner is not None:
            self.owner.begin()
        state.call, state.is_part = call, is_part
        state.times, state.tokens = Counter(), {}
        found = self.sequence_of(call)
        if self._is_evicted(call, found):
            call.problem = (
                f"its cache holds {call.past} tokens, and not those that were seen there: which tokens they are (evicted, "
                "compressed, written over) is not known; capture without that"
            )
        if found is None:
            joins = state.last is not None and state.last.is_partial
            found = state.last if joins else self._new()
            assert found is not None
            if call.cache is not None:
                found.cache = reference(call.cache)
        found.is_partial = is_part and (found.is_partial or not found.has_records())
        state.sequence = state.last = found
        if self.is_kept_apart and not is_part:
            for calls in found.calls:
                calls.apart.append({})

    def _is_evicted(self, call: HostCall, found: Sequence | None) -> bool:
        """Whether a cache that was seen holds another token in the last one's place than it did."""
        if call.cache is None or call.past == 0 or found is not None:
            return False
        own = (s for s in self.sequences if s.cache is not None and s.cache() is call.cache)
        return any(call.past - 1 in sequence.marks for sequence in own)

    def _new(self) -> Sequence:
        found = Sequence()
        self.sequences.append(found)
        return found

    def goes_on(self, call: HostCall) -> bool:
        """Whether a call of the model continues a sequence that was seen, with the same cache."""
        if call.cache is None or call.past == 0:
            return False
        found, _ = self._known(call.cache, call.past)
        return found is not None and found.cache is not None and found.cache() is call.cache

    def forget(self) -> None:
        """Forget all sequences."""
        self.sequences.clear()
        self.left_out.clear()
        self._state.last = self._state.sequence = None

    def sequence_of(self, call: HostCall) -> Sequence | None:
        """The sequence that a call goes on with, as its cache is now; ``None``: a new one."""
        if call.cache is None or call.past == 0:
            return None
        found, order = self._known(call.cache, call.past)
        if found is None:
            return None
        if found.cache is None or found.cache() is not call.cache:
            # A copy of what was computed once: what is there stays as it is.
            found = found.changed(lambda _, record: record)
            self.sequences.append(found)
            found.cache = reference(call.cache)
        self._follow(found, call.past, order)
        if order is None:
            self._check_rows(found, call.cache)
        return found

    def _known(self, cache: Any, past: int) -> tuple[Sequence | None, list[int] | None]:
        """The sequence that a cache holds the beginning of, and which of its rows the cache's are."""
        held = self.marks(cache, past - 1, past) if past else None
        now = None if held is None else held[:, 0]
        own = [s for s in self.sequences if s.cache is not None and s.cache() is cache]
        for sequence in reversed(own):
            order = sequence.order_of(now, past - 1)
            if order is not None or (now is None and 0 < past <= sequence.length):
                return sequence, order
        for sequence in reversed(self.sequences):
            order = sequence.order_of(now, past - 1) if sequence not in own else None
            if order is not None:
                return sequence, order
        return None, None

    def _check_rows(self, sequence: Sequence, cache: Any) -> None:
        """Of a cache that cannot be read."""
        if not sequence.is_batch():
            return
        moved = self.rows_have_moved(cache)
        if moved or moved is None:
            reason = _OTHERS_PLACES if moved else _NOT_READ
            self._leave_all_out(sequence, reason)

    def _follow(self, sequence: Sequence, past: int, order: list[int] | None) -> None:
        """Bring the records of a sequence to what its cache holds."""
        rows = len(next(iter(sequence.marks.values()), ()))
        moved = order is not None and order != list(range(rows))

        def followed(name: str, record: SiteSums) -> SiteSums | None:
            try:
                if record.history.follows_cache and past < record.history.total:
                    record = cut(record, past, self.partitions)
                return record.of_rows(order) if moved and len(record.sums) == rows else record
            except Unknown as reason:
                self.left_out.setdefault(name, str(reason))
                sequence.out.add(name)
                return None

        if moved and len(order or ()) == rows:
            # Which of the beams is returned is chosen after the last call.
            self._leave_all_out(sequence, _OTHERS_PLACES)
        if past < sequence.length or moved:
            sequence.calls = sequence.changed(followed).calls
            sequence.marks = {at: mark for at, mark in sequence.marks.items() if at < past}
            if moved:
                sequence.marks = {at: mark[order] for at, mark in sequence.marks.items()}
            sequence.length = past

    def end_call(self) -> None:
        """The call has ended."""
        state = self._state
        call, sequence = state.call, state.sequence
        if self.owner is not None:
            self.owner.end()
        # The backward pass may run parts of the call again (gradient checkpointing).
        if not self.is_of_gradient:
            state.call = None
        if call is None or sequence is None:
            return
        sequence.held = None
        cache = call.cache if call.cache is not None else sequence.cache and sequence.cache()
        if cache is not None:
            sequence.remember(cache, call.past, self.tokens_in(cache), self.marks)

    def _leave_all_out(self, sequence: Sequence, reason: str) -> None:
        """All that follows the sequence's cache; an encoder's attention does not."""
        records = (
            pair for calls in sequence.calls for each in (calls, *calls.apart) for pair in each.items()
        )
        names = {name for name, record in records if record.history.follows_cache}
        for name in sorted(names):
            self.left_out.setdefault(name, reason)
        sequence.out |= names
        sequence.calls = sequence.changed(lambda name, record: None if name in names else record).calls

    def finish(self) -> None:
        """The capture ends: a cache may have been cut, or its rows put into another order, after the last call."""
        for sequence in self.sequences:
            cache, sequence.held = sequence.held, None
            if cache is None:
                continue
            try:
                past = self.tokens_in(cache)
                held = self.marks(cache, past - 1, past) if past else None
                order = None if held is None else sequence.order_of(held[:, 0], past - 1)
                if order is not None:
                    self._follow(sequence, past, order)
                elif held is None and past:
                    self._check_rows(sequence, cache)
            except Exception as error:
                self._leave_all_out(sequence, f"what its cache holds at the end cannot be read: {error}")

    # --------------------------------------------------------------------------------------------- calls of its sites

    def wants(self, name: str) -> bool:
        """Whether a site was asked for."""
        return name in self.wanted or name in self.owners

    def saw(self, name: str) -> None:
        """Attention was seen in the forward of a site: what it holds need not show any."""
        for inner in [inner for inner in self.left_out if inner.startswith(name + ".")]:
            if self.left_out[inner] == NOT_SEEN:
                del self.left_out[inner]

    def observer(self, site: Any, args: Any, kwargs: Any) -> TextObserver:
        """Who looks at the call of a site that is about to be made."""
        state, name = self._state, site.name
        if state.call is None:
            # A module below the models that are told of: nothing is known but what it is called with.
            again = state.last is not None and state.last.is_partial and name not in state.last.calls[0]
            call = self.read_call(args, kwargs, None)
            state.sequence = state.last if again else self._new()
            assert state.sequence is not None
            state.sequence.is_partial, state.last, state.is_part = True, state.sequence, True
            state.times, state.tokens = Counter(), {}
        else:
            call = state.call
        facts = self.site_call(call, name, args, kwargs)
        self._adopt(call, facts)
        assert state.sequence is not None
        calls = self._calls(state, name, facts)
        records = calls.apart[-1] if calls.apart and not state.is_part else calls
        out = state.sequence.out
        return TextObserver(
            self,
            name,
            facts,
            records,
            calls.before,
            out.__contains__,
            getattr(site, "is_candidate", False) or name in self.owners,
        )

    def _adopt(self, call: HostCall, facts: AttentionCallInfo) -> None:
        """A cache that the model makes inside its call is its sequence's."""
        sequence = self._state.sequence
        assert sequence is not None
        if call.cache is None and facts.cache is not None and sequence.cache is None:
            sequence.cache = reference(facts.cache)

    def _calls(self, state: _State, name: str, facts: AttentionCallInfo) -> Calls:
        """Where a call of a site belongs: the second one inside a call of the model is another sequence's."""
        number, sequence = state.times[name], state.sequence
        state.times[name] += 1
        assert sequence is not None
        if number and facts.is_part:
            # Found out with the second piece: the first one is no sequence either.
            self.leave_out(
                name,
                f"it is called {number + 1} times in one call of the model, each time with a part of the sequence",
                {},
            )
        if not facts.has_cache and number == 0:
            earlier = sequence.calls[0].before(name)
            if earlier is not None and state.call is not None and state.call.cache is None:
                # The same part of the model once more, of something else.
                sequence = state.sequence = state.last = self._new()
                sequence.is_partial = state.is_part
            elif earlier is not None:
                for calls in sequence.calls:
                    self._forget(calls, name)
        while len(sequence.calls) <= number:
            calls = Calls()
            calls.apart = [{} for _ in sequence.calls[0].apart]
            sequence.calls.append(calls)
        if self.is_kept_apart and not state.is_part:
            for calls in sequence.calls:
                if not calls.apart:
                    calls.apart.append({})
        return sequence.calls[number]

    @staticmethod
    def _forget(calls: Calls, name: str) -> None:
        for records in (calls, *calls.apart):
            for known in [known for known in records if known.partition(":")[0] == name]:
                del records[known]

    def leave_out(self, name: str, reason: str, records: Any) -> None:
        """A site cannot be mapped: what was seen of it in this sequence goes too."""
        self.left_out.setdefault(name, reason)
        sequence = self._state.sequence or self._state.last
        if sequence is not None:
            sequence.out.add(name)
            for calls in sequence.calls:
                for each in (calls, *calls.apart):
                    each.pop(name, None)
        records.pop(name, None)

    def tells_tokens(self, name: str, known: torch.Tensor) -> None:
        """Which tokens the self-attention of a site has found to be real."""
        self._state.tokens[name] = known

    def known_tokens(self, name: str, batch: int, total: int) -> torch.Tensor | None:
        """Which query tokens are real, as the self-attention nearest to a site has found in this call."""
        near = [
            (_shared(name, other), known)
            for other, known in self._state.tokens.items()
            if known.shape == (batch, total)
        ]
        return max(near, key=lambda pair: pair[0])[1] if near else None

    def partitions(self, queries: torch.Tensor, keys: torch.Tensor | None) -> tuple[Partition, Partition]:
        """Blocks of a sequence's tokens, and of the keys': bool ``[batch, tokens]``, which are real."""
        if self.call is not None and self.call.problem is not None:
            raise CaptureError(self.call.problem)
        known = self._partitions
        if known is not None and torch.equal(known[0], queries) and _equal(known[1], keys):
            return known[2]
        query = self.query_blocks.resolve(queries)
        if keys is not None:
            found = query, self.key_blocks.resolve(keys)
        else:
            found = query, query if self.query_blocks == self.key_blocks else self.key_blocks.resolve(queries)
        self._partitions = queries, keys, found
        return found

    # ------------------------------------------------------------------------------------------------------- its maps

    def place_of(self, name: str) -> tuple[str, int]:
        """The kind of a site and its layer; of a second attention inside a module the kind has a number."""
        site, _, number = name.partition(":")
        kind, layer = self.places[site]
        return (f"{kind}:{number}" if number else kind), layer

    def captured(self) -> list[Calls]:
        """The records of every sequence, in order; those of modules that were called again each apart."""
        return [calls for sequence in self.sequences for calls in sequence.calls if calls or any(calls.apart)]

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        return chosen_heads(self.heads, num_heads)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _shared(one: str, other: str) -> int:
    """How many parts of two paths are the same from the front."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
