"""Recorder: assigns the model's calls to sequences, and makes an observer for each call of a site."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence as Several
from typing import Any

import torch

from attnpatch.blocks.partition import Partition
from attnpatch.errors import CaptureError
from attnpatch.recording.call_facts import FAILED, AttentionCallInfo
from attnpatch.recording.layers import chosen_sites, is_inside, pattern_of
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.text.following import CacheFollower, HostCall, HostReading
from attnpatch.recording.text.observer import NOT_SEEN, TextObserver
from attnpatch.recording.text.sequences import Calls, Sequence, reference
from attnpatch.recording.text.state import State
from attnpatch.recording.threads import ELSEWHERE, Owner


class Recorder(CacheFollower):
    """Holds the options of a capture and what it has captured.

    Args:
        options: The options; layer numbers are those of ``pattern_of``.
        names: The attention sites, in order.
        owners: Sites that contain some of them; attention in their own forward is captured as theirs.
        host: Reads the model's calls.

    Raises:
        CaptureError: There are no blocks, or no such layer or site.
    """

    # True if another capture may replace it.
    gives_way = False

    def __init__(
        self, options: CaptureOptions, names: Several[str], owners: Several[str], host: HostReading
    ) -> None:
        super().__init__(host)
        self.query_blocks, self.key_blocks = options.pair
        self.heads, self.measures, self.is_per_step = options.heads, options.measures, options.is_per_step
        self.sample_rows, self.seed, self.window = options.sample_rows, options.seed, options.window
        self.statistics = options.statistics
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
        self.owner: Owner | None = None
        self._state = State()
        self._partitions: tuple[Any, ...] | None = None

    # -------------------------------------------------------------------------------------------- calls of the model

    def is_mine(self) -> bool:
        """True if the running thread's calls are captured."""
        return self.owner is None or self.owner.is_mine()

    @property
    def follows_order(self) -> bool:
        """True if the order of the model's tokens matters; a generation step has only one token."""
        return self.call is None or not self.call.is_single

    @property
    def call(self) -> HostCall | None:
        """The running call of the model in this thread."""
        return self._state.call

    @property
    def is_partial(self) -> bool:
        """True if only a part of the model has run on the latest sequence."""
        return self._state.last is not None and self._state.last.is_partial

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """Called when the model is about to run; the call begins a new sequence unless it continues a cache."""
        self._begin(args, kwargs, None)

    def begin_part(self, kind: type, args: Any, kwargs: Any) -> None:
        """Called when a part of the model is about to run on its own, as ``generate`` runs an encoder."""
        self._begin(args, kwargs, kind)

    def _begin(self, args: Any, kwargs: Any, kind: type | None) -> None:
        self._state.raised = sys.exc_info()[1]
        if self.owner is not None:
            self.owner.begin()
        try:
            self._assign(self.read_call(args, kwargs, kind), is_part=kind is not None)
        except Exception:
            self._state.sequence = self._state.last = found = self.new_sequence()
            self.leave_all_of(found, self.wanted, FAILED)
            raise

    def _assign(self, call: HostCall, is_part: bool) -> None:
        """Assign a call to the sequence that it continues, or to a new one."""
        state = self._state
        state.call, state.is_part = call, is_part
        state.times, state.tokens = Counter(), {}
        found = self.continued(call)
        state.joins = found is None and state.last is not None and state.last.is_partial
        if found is None:
            found = state.last if state.joins else self.new_sequence()
            assert found is not None
            state.cache_before = found.cache
            if call.cache is not None:
                found.cache = reference(call.cache)
        found.is_partial = is_part and (found.is_partial or not found.has_records())
        state.sequence = state.last = found
        if self.is_per_step and not is_part:
            for calls in found.calls:
                calls.apart.append({})

    def forget(self) -> None:
        """Forget all sequences."""
        self.sequences.clear()
        self.left_out.clear()
        self._state.last = self._state.sequence = None

    def finish(self) -> None:
        """Called when the capture ends."""
        super().finish()
        if self.is_elsewhere:
            self.left_out[""] = ELSEWHERE

    @property
    def is_elsewhere(self) -> bool:
        """True if the model was called, but only where this capture does not see it."""
        return not self.sequences and self.owner is not None and self.owner.missed

    def end_call(self) -> None:
        """Called when the model's call has ended."""
        state = self._state
        call, sequence = state.call, state.sequence
        # Frames in the traceback of the exception from before hold the model, so the exception is not kept.
        error, raised, state.raised = sys.exc_info()[1], state.raised, None
        if self.owner is not None:
            self.owner.end()
        # The backward pass may run parts of the call again (gradient checkpointing).
        if not self.is_of_gradient:
            state.call = None
        if call is None or sequence is None:
            return
        sequence.held = None
        if error is not None and error is not raised:
            self.call_failed(call, sequence, error, set() if state.is_part else self.wanted)
            return
        cache = call.cache if call.cache is not None else sequence.cache and sequence.cache()
        if cache is not None:
            sequence.remember(cache, call.past, self.tokens_in(cache), self.marks)
            sequence.version = self.version_of(cache)

    # --------------------------------------------------------------------------------------------- calls of its sites

    def wants(self, name: str) -> bool:
        """True if a site was asked for."""
        return name in self.wanted or name in self.owners

    def saw(self, name: str) -> None:
        """Attention was seen in a site's own forward: sites inside it are no longer left out as not seen."""
        for inner in [inner for inner in self.left_out if is_inside(inner, name)]:
            if self.left_out[inner] == NOT_SEEN:
                del self.left_out[inner]

    def observer(self, site: Any, args: Any, kwargs: Any) -> TextObserver:
        """The observer for a site's call that is about to begin."""
        state, name = self._state, site.name
        if state.call is None:
            call = self._direct_call(state, name, args, kwargs)
        else:
            call = state.call
        facts = self.site_call(call, name, args, kwargs)
        if state.call is None and facts.past is not None:
            facts.past, facts.is_alone = call.past, True
        assert state.sequence is not None
        calls = self._calls(state, name, facts)
        self._adopt(call, facts)
        records = calls.apart[-1] if calls.apart and not state.is_part else calls
        out = state.sequence.out
        return TextObserver(
            self,
            name,
            facts,
            records,
            calls.before,
            out.__contains__,
            lambda: name in self.owners or site.may_be_none,
        )

    def _direct_call(self, state: State, name: str, args: Any, kwargs: Any) -> HostCall:
        """The user calls a submodule directly, so only its own arguments are known."""
        call = self.read_call(args, kwargs, None)
        known, past = state.direct
        again = state.last is not None and self.lacks_only(state.last, name)
        again = again and (known() if known is not None else None) is call.cache
        if again:
            # The layers before have added the new tokens to the cache already.
            call.past = past
        else:
            state.direct = (None if call.cache is None else reference(call.cache)), call.past
        state.sequence = state.last = state.last if again else self.new_sequence()
        assert state.sequence is not None
        state.sequence.is_partial, state.is_part, state.joins = True, True, False
        state.times, state.tokens = Counter(), {}
        return call

    def _adopt(self, call: HostCall, facts: AttentionCallInfo) -> None:
        """Take a cache that the model has made inside its call as the sequence's cache."""
        sequence = self._state.sequence
        assert sequence is not None
        if call.cache is None and facts.cache is not None and sequence.cache is None:
            sequence.cache = reference(facts.cache)

    def _calls(self, state: State, name: str, facts: AttentionCallInfo) -> Calls:
        """The records that a site's call adds to. A second call within one call of the model has records of its own."""
        number, sequence = state.times[name], state.sequence
        state.times[name] += 1
        assert sequence is not None
        if number and facts.is_part:
            # Only a later call shows that each call has a part of the sequence. So the first one had only a part too,
            # and its sums are dropped.
            self.leave_out(
                name,
                f"it is called {number + 1} times in one call of the model, each time with a part of the sequence",
                {},
            )
        if state.joins and state.times.total() == 1 and not self.lacks_only(sequence, name):
            # It also ran on other inputs, and it is not known with which of them the running call goes on.
            sequence = self._split(state, name)
        if number == 0 and sequence.calls[0].before(name) is not None:
            is_without = not facts.has_cache and state.call is not None and state.call.cache is None
            if state.joins or is_without:
                # The same part of the model runs again, on another input.
                sequence = self._split(state, name)
            elif not facts.has_cache:
                for calls in sequence.calls:
                    self._forget(calls, name)
        while len(sequence.calls) <= number:
            calls = Calls()
            calls.apart = [{} for _ in sequence.calls[0].apart]
            sequence.calls.append(calls)
        if self.is_per_step and not state.is_part:
            for calls in sequence.calls:
                if not calls.apart:
                    calls.apart.append({})
        return sequence.calls[number]

    def _split(self, state: State, name: str) -> Sequence:
        """A new sequence for the running call, with what it has added before site ``name`` to that of an earlier call."""
        old, new = state.sequence, self.new_sequence()
        assert old is not None
        if state.joins:
            mine = set(state.times) - {name}
            if state.call is not None and state.call.cache is not None:
                old.cache, new.cache = state.cache_before, reference(state.call.cache)
            new.calls = [calls.take(mine) for calls in old.calls]
            new.out = {each for each in old.out if each.partition(":")[0] in mine}
        new.is_partial, state.joins = state.is_part, False
        state.sequence = state.last = new
        return new

    @staticmethod
    def _forget(calls: Calls, name: str) -> None:
        for records in (calls, *calls.apart):
            for known in [known for known in records if known.partition(":")[0] == name]:
                del records[known]

    def leave_out(self, name: str, reason: str, records: Any) -> None:
        """Leave a site out; its records in this sequence are dropped, too."""
        self.left_out.setdefault(name, reason)
        sequence = self._state.sequence or self._state.last
        if sequence is not None:
            sequence.out.add(name)
            for calls in sequence.calls:
                for each in (calls, *calls.apart):
                    each.pop(name, None)
        records.pop(name, None)

    def tells_tokens(self, name: str, known: torch.Tensor) -> None:
        """Note which tokens a site's self-attention has found to be real."""
        self._state.tokens[name] = known

    def known_tokens(self, name: str, batch: int, total: int) -> torch.Tensor | None:
        """Which query tokens are real, according to the self-attention nearest to a site in this call; or ``None``."""
        near = [
            (_shared(name, other), known)
            for other, known in self._state.tokens.items()
            if known.shape == (batch, total)
        ]
        return max(near, key=lambda pair: pair[0])[1] if near else None

    def partitions(self, queries: torch.Tensor, keys: torch.Tensor | None) -> tuple[Partition, Partition]:
        """The blocks of queries and keys, given which tokens are real: bool ``[batch, tokens]`` each."""
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
        """The kind of a site and its layer; for a second attention inside a module the kind ends in a number."""
        site, _, number = name.partition(":")
        kind, layer = self.places[site]
        return (f"{kind}:{number}" if number else kind), layer

    def captured(self) -> list[Calls]:
        """The records of every sequence, in order; repeated calls of a module within one model call are kept separate."""
        return [calls for sequence in self.sequences for calls in sequence.calls if calls or any(calls.apart)]


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _shared(one: str, other: str) -> int:
    """The number of leading path components that two names share."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
