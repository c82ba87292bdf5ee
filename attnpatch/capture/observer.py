"""Adds the probabilities of one attention call to block sums, tile by tile."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from attnpatch.capture import fused_mass
from attnpatch.capture.blocks import Blocks
from attnpatch.capture.mass import accumulate_block_mass, add_rows, add_run, key_sums
from attnpatch.capture.measures import Measures
from attnpatch.capture.partition import Partition
from attnpatch.capture.row_sample import RowSample, draw, generator_for
from attnpatch.errors import CaptureError

# Blocks of fewer rows than this in a tile are summed together by one product.
_SHORT_RUN = 8
# Of fewer than this there is so little to sum that columns are taken together first.
_SINGLE_RUN = 4


class Passing(Protocol):
    """Where a tile of probabilities belongs (``attnpatch.rows`` makes them)."""

    leads: torch.Tensor
    rows: tuple[int, int]
    lead_count: int
    q_len: int
    kv_len: int
    weights: torch.Tensor | None
    positions: torch.Tensor | None


class HostCall(Protocol):
    """What is known of a call of the model (``attnpatch.hosts`` reads it)."""

    batch: int
    past: int

    def continues(self, before: Any) -> bool:
        """Whether it goes on with the sequence of the call before."""

    def go_on(self, before: Any) -> None:
        """Take over what the call before knew of the tokens in the cache."""


class Collecting(Protocol):
    """Who holds the sums (``Recorder``)."""

    heads: Any
    query_blocks: Blocks
    key_blocks: Blocks
    sample_rows: int | None
    seed: int
    measures: tuple[str, ...]
    is_of_gradient: bool

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart."""


@dataclasses.dataclass
class SiteFacts:
    """What is known of a call of one site.

    Attributes:
        query_mask, key_mask: Bool ``[batch, tokens]``, real tokens on either side; ``None``: all.
        cross: Whether it looks at another sequence.
        sequences, tokens: What it is called with: so many sequences of so many query tokens; ``None``: not known.
        others: Lengths of the other sequences it is called with.
        past: Tokens that were in the cache it is handed; ``None``: it is handed none that the model was.
    """

    query_mask: torch.Tensor | None
    key_mask: torch.Tensor | None
    cross: bool
    sequences: int | None
    tokens: int | None
    others: frozenset[int] = frozenset()
    past: int | None = None


@dataclasses.dataclass
class Record:
    """Sums of one site over one sequence and its continuations.

    Attributes:
        query, key: Blocks on either side.
        sums: float64 ``[batch, heads or 1, query_blocks, key_blocks + 1]``; the last column is of keys in no block.
        counts: float64 ``[batch, query_blocks]``, query tokens summed.
        num_heads: Heads that were summed into one, or kept apart.
        variance: Of ``sums``, where only a sample of the rows was looked at.
        measures: What else was asked for.
    """

    query: Partition
    key: Partition
    sums: torch.Tensor
    counts: torch.Tensor
    num_heads: int
    variance: torch.Tensor | None = None
    measures: Measures | None = None


class SiteObserver:
    """Adds the tiles of one call of one site to its record."""

    def __init__(
        self, recorder: Collecting, name: str, call: HostCall, facts: SiteFacts, records: dict[str, Any]
    ) -> None:
        self.recorder, self.name, self.call, self.facts = recorder, name, call, facts
        self.records = records
        self.record: Record | None = None
        self.before: Record | None = None
        self.sample: RowSample | None = None
        # Tokens before the first query of this site, known once it is known how many keys it has.
        self.past = call.past

    @property
    def is_of_gradient(self) -> bool:
        """Whether it is shown probabilities times their gradients."""
        return self.recorder.is_of_gradient

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """Which query rows of a call need to be shown, ascending; ``None``: all."""
        if self.recorder.sample_rows is None or self.facts.tokens == 1 or lead_count % self.call.batch:
            return None
        if self.record is None:
            self.record = self._open(q_len, kv_len, lead_count // self.call.batch)
        assert self.sample is not None
        return self.sample.positions() - self.past

    def take(self, call: dict[str, Any], lse: torch.Tensor, workspace: int | None = None) -> str | None:
        """Add a whole attention call at once, where the kernel of ``fused_mass`` can.

        Args:
            call: Arguments of an SDPA call by name.
            lse: ``[batch, heads, q_len]``, the logsumexp of its rows.
            workspace: Bytes that may be held on the device; ``None``: as ``fused_mass`` likes.

        Returns:
            ``None`` if it did; otherwise why not, in a few words, and nothing is added.
        """
        reason = fused_mass.why_not(call) or ("measures" if self.recorder.measures else None)
        if reason is not None:
            return reason
        (batch, num_heads, q_len, _), kv_len = call["query"].shape, call["key"].shape[-2]
        if batch != self.call.batch or self._is_cut(q_len) or (self.facts.tokens == 1 and q_len > 1):
            return "another layout"
        if self.rows(batch * num_heads, q_len, kv_len) is not None:
            return "some rows"
        if self.record is None:
            self.record = self._open(q_len, kv_len, num_heads)
        record = self.record
        heads = None if self.recorder.heads == "mean" else self.recorder.head_numbers(num_heads)
        query = record.query.assignment[:, self.past : self.past + q_len]
        num_blocks = record.sums.shape[-2], record.sums.shape[-1]
        found = fused_mass.checked_sums(call, lse, query, self._columns, num_blocks, heads, workspace)
        if isinstance(found, str):
            return found
        record.sums += found[0]
        record.counts += found[1]
        return None

    def finish(self) -> None:
        """The call of the site has ended."""
        if self.record is None or self.sample is None:
            return
        for b in range(len(self.sample.drawn)):
            sums, variance, sizes = self.sample.estimate(b)
            self.record.sums[b] += sums
            self.record.counts[b] += sizes
            assert self.record.variance is not None
            self.record.variance[b] += variance
        self.sample = None

    def observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        """Add ``[leads, rows, kv_len]`` probabilities."""
        # Sums are products with ones, which autocast would take in half precision.
        with torch.autocast(probabilities.device.type, enabled=False):
            self._observe(probabilities, passing)

    def _observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        if self.facts.tokens == 1 and passing.q_len > 1:
            probabilities, passing = _heads_as_leads(probabilities, passing)
        batch = self.call.batch
        if self._is_cut(passing.q_len) or passing.lead_count % batch:
            self._refuse(
                f"attends in {passing.lead_count} pieces, which is no multiple of the batch of {batch}: its sequence "
                "is cut into windows, which block maps over the sequence cannot show"
            )
            return
        num_heads = passing.lead_count // batch
        if self.record is None:
            self.record = self._open(passing.q_len, passing.kv_len, num_heads)
        rows = torch.arange(*passing.rows) if passing.positions is None else passing.positions
        rows = rows + self.past
        low, high = self.past + passing.rows[0], self.past + passing.rows[1]
        sequences, heads = passing.leads // num_heads, passing.leads % num_heads
        for b in sequences.unique().tolist():
            mine = sequences == b
            numbers = heads[mine].tolist()
            tile, weights = probabilities, passing.weights
            if len(numbers) < len(mine):
                mine = mine.to(probabilities.device)
                tile, weights = tile[mine], None if weights is None else weights[mine]
            if self.record.measures is not None:
                self._measure(b, numbers, tile, weights, rows)
            if 0 in numbers and self.sample is None:
                block = self.record.query.assignment[b, low:high]
                self.record.counts[b].index_add_(0, block.clamp(min=0), (block >= 0).double())
            for place, chosen in self._places(numbers, num_heads):
                some = None if weights is None else weights[chosen]
                if self.sample is None:
                    self._add(b, place, tile[chosen], some, low, high)
                else:
                    columns = self._columns[b, : tile.shape[-1]]
                    bins = key_sums(self.record.sums[b, place], tile[chosen], columns, some)
                    self.sample.add(b, place, bins, rows)

    def _is_cut(self, q_len: int) -> bool:
        """Whether the sequence is cut into windows."""
        # A host that puts tokens first calls it with other numbers, which say nothing of windows.
        return self.facts.tokens == q_len and self.facts.sequences != self.call.batch

    def _measure(
        self, b: int, numbers: list[int], tile: torch.Tensor, weights: torch.Tensor | None, rows: torch.Tensor
    ) -> None:
        """Whatever else was asked for, of the real tokens among some rows."""
        assert self.record is not None and self.record.measures is not None
        if self.sample is not None:
            counted = self.sample.weights(b, rows)
        else:
            counted = self._real[0][b, rows].double()
        factors = tile.new_ones(tile.shape[:2]) if weights is None else weights
        start = int(self._real[1][b].int().argmax())
        self.record.measures.add(
            self.recorder.measures, b, numbers, tile, factors, counted, self._first_key, start
        )

    def _refuse(self, reason: str) -> None:
        raise CaptureError(f"{self.name} {reason}")

    def _places(self, numbers: list[int], num_heads: int) -> Iterator[tuple[slice, slice]]:
        """Where which heads of a tile are summed: all into one, each into its own, or only those asked for."""
        if self.recorder.heads == "mean":
            yield slice(0, 1), slice(None)
        elif self.recorder.heads == "all":
            yield slice(numbers[0], numbers[-1] + 1), slice(None)
        else:
            for place, head in enumerate(self.recorder.head_numbers(num_heads)):
                if head in numbers:
                    i = numbers.index(head)
                    yield slice(place, place + 1), slice(i, i + 1)

    def _add(
        self, b: int, place: slice, tile: torch.Tensor, weights: torch.Tensor | None, low: int, high: int
    ) -> None:
        """Add ``[heads, rows, kv_len]``, the query tokens ``low:high`` of sequence ``b``."""
        assert self.record is not None
        sums, columns = self.record.sums[b, place], self._columns[b, : tile.shape[-1]]
        runs = self._runs[b]
        first = bisect.bisect_right(runs, low, key=lambda run: run[1])
        last = bisect.bisect_left(runs, high, key=lambda run: run[0])
        if (last - first) * _SHORT_RUN <= high - low:
            for start, stop, block in runs[first:last]:
                rows = slice(max(start, low) - low, min(stop, high) - low)
                add_run(sums[:, block], tile[:, rows], columns, None if weights is None else weights[:, rows])
            return
        query = self.record.query.assignment[b : b + 1, low:high]
        if (last - first) * _SINGLE_RUN > high - low:
            add_rows(sums, tile, query[0], columns, weights)
            return
        if weights is not None:
            tile = tile * weights.unsqueeze(-1)
        accumulate_block_mass(sums[None], tile[None], query, columns[None])

    def _open(self, q_len: int, kv_len: int, num_heads: int) -> Record:
        """The record of this site, grown to the length the sequence has now."""
        recorder, batch = self.recorder, self.call.batch
        self.past = self._past(q_len, kv_len)
        query, key = self._partitions(q_len, kv_len)
        # A sliding cache has forgotten the first tokens, a static one has room for tokens that are not there yet.
        self._first_key = max(0, key.assignment.shape[1] - kv_len)
        assignment = key.assignment[:, self._first_key :]
        room = kv_len - assignment.shape[1]
        # The last bin takes the keys of no block, so that none has to be left out of a sum.
        columns = torch.nn.functional.pad(assignment, (0, room), value=-1)
        self._columns = torch.where(columns < 0, key.num_blocks, columns)
        self._runs = [_runs_of(row) for row in query.assignment]
        width = 1 if recorder.heads == "mean" else len(recorder.head_numbers(num_heads))
        sums = torch.zeros(batch, width, query.num_blocks, key.num_blocks + 1, dtype=torch.float64)
        counts = torch.zeros(batch, query.num_blocks, dtype=torch.float64)
        self.before = old = self.records.get(self.name)
        if old is not None:
            if old.sums.shape[:2] != sums.shape[:2]:
                raise CaptureError(
                    f"{self.name} went on with {batch} sequences of {width} heads after {old.sums.shape[0]} of "
                    f"{old.sums.shape[1]}; capture calls of one batch size at a time"
                )
            sums[:, :, : old.sums.shape[2], : old.sums.shape[3] - 1] = old.sums[..., :-1]
            counts[:, : old.counts.shape[1]] = old.counts
        variance = None
        if recorder.sample_rows is not None:
            variance = torch.zeros_like(sums)
            if old is not None:
                variance[:, :, : old.sums.shape[2], : old.sums.shape[3] - 1] = old.variance[..., :-1]
            self.sample = self._drawn(query, q_len, key.num_blocks + 1, width)
        measures = self._measures(old, q_len, kv_len, num_heads) if recorder.measures else None
        self.records[self.name] = Record(query, key, sums, counts, num_heads, variance, measures)
        return self.records[self.name]

    def _past(self, q_len: int, kv_len: int) -> int:
        """Tokens before the first query: none at a site that looks at its own and has no part in the model's cache.

        Such a one encodes another image or sound while the text goes on.
        """
        if self.facts.past is not None:
            return self.facts.past
        return 0 if q_len == kv_len and not self.facts.cross else self.call.past

    def _drawn(self, query: Partition, q_len: int, bins: int, width: int) -> RowSample:
        past, most = self.past, self.recorder.sample_rows
        numbers = generator_for(self.recorder.seed, self.name, past)
        parts = query.assignment[:, past : past + q_len]
        return RowSample([draw(part, past, most, query.num_blocks, numbers) for part in parts], width, bins)

    def _measures(self, old: Record | None, q_len: int, kv_len: int, num_heads: int) -> Measures:
        total = self.past + q_len
        queries = self._valid(self.facts.query_mask, total)
        keys = self._valid(self.facts.key_mask, kv_len) if self.facts.cross else queries
        self._real = queries, keys
        tokens = max(keys.shape[1], kv_len)
        if old is None or old.measures is None:
            apart = None if self.recorder.heads == "mean" else self.recorder.head_numbers(num_heads)
            return Measures.empty(self.call.batch, num_heads, tokens, apart)
        return old.measures.grown(tokens)

    def restart(self) -> None:
        """Forget the tiles of this call."""
        if self.record is None:
            return
        if self.before is None:
            del self.records[self.name]
        else:
            self.records[self.name] = self.before
        self.record = self.sample = None

    def _partitions(self, q_len: int, kv_len: int) -> tuple[Partition, Partition]:
        """Blocks of the queries and of the keys, of all tokens that the sequence has now."""
        recorder = self.recorder
        total = self.past + q_len
        query_valid = self._valid(self.facts.query_mask, total)
        query = recorder.query_blocks.resolve(query_valid)
        # Whatever a host calls it: with nothing cached, keys that are as many as another of its inputs are that one.
        is_context = self.past == 0 and kv_len != q_len and kv_len in self.facts.others
        if self.facts.cross or is_context:
            return query, recorder.key_blocks.resolve(self._valid(self.facts.key_mask, kv_len))
        if recorder.query_blocks == recorder.key_blocks:
            return query, query
        return query, recorder.key_blocks.resolve(query_valid)

    def _valid(self, mask: torch.Tensor | None, total: int) -> torch.Tensor:
        """Which of ``total`` positions are real tokens; all, unless a mask of that length says otherwise."""
        if mask is not None and mask.shape == (self.call.batch, total):
            return mask
        return torch.ones(self.call.batch, total, dtype=torch.bool)


def _runs_of(assignment: torch.Tensor) -> list[tuple[int, int, int]]:
    """First token, one past the last, and block of every run of neighbours in one block."""
    changes = (assignment[1:] != assignment[:-1]).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(assignment)]
    blocks = assignment[bounds[:-1]].tolist() if len(assignment) else []
    runs = zip(bounds[:-1], bounds[1:], blocks, strict=False)
    return [(start, stop, block) for start, stop, block in runs if block >= 0]


def _heads_as_leads(probabilities: torch.Tensor, passing: Passing) -> tuple[torch.Tensor, Passing]:
    """Undo a host's trick for decoding: with one query token it gives the query heads of a group as its rows."""
    low, high = passing.rows
    leads = (passing.leads[:, None] * passing.q_len + torch.arange(low, high)).reshape(-1)
    count = passing.lead_count * passing.q_len
    weights = None if passing.weights is None else passing.weights.reshape(-1, 1)
    changed = dataclasses.replace(
        passing, leads=leads, rows=(0, 1), lead_count=count, q_len=1, weights=weights
    )  # type: ignore[type-var]
    return probabilities.reshape(len(leads), 1, -1), changed
