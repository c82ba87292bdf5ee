"""Adds the probabilities of one call of one site to its record, if all facts that the map depends on are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.blocks.partition import Partition
from attnpatch.observing import TileInfo
from attnpatch.recording.accumulator import SiteObserver, SiteSums
from attnpatch.recording.block_sums import key_sums
from attnpatch.recording.call_facts import (
    FAILED,
    NOT_SEEN,
    OFF,
    AttentionCallInfo,
    Layout,
    Opened,
    Unknown,
    check_sums,
    evicted,
    is_refusal,
    real_tokens,
    relation_of,
)
from attnpatch.recording.statistics import Measures, Statistics, TileRows
from attnpatch.recording.text.cache_history import MOST_ROWS, History, Rows
from attnpatch.recording.text.parts import Parts, part_of, real_tokens_of_part, relation_of_part

if TYPE_CHECKING:
    from attnpatch.recording.text.recorder import Recorder
    from attnpatch.recording.text.row_sampling import RowSample

# At most this many numbers of a call are kept row by row.
_MOST_NUMBERS = 1 << 16


class TextObserver(SiteObserver):
    """Observes one call of one site, in which there may be several attentions.

    Args:
        recorder: The recorder of the capture.
        name: The site's name.
        facts: The facts of the call.
        records: The records of the sequence, by site.
        before: Returns a site's record of earlier calls.
        is_out: Tells if a site is left out of this sequence.
        may_be_none: Tells, when the call ends, if the site may be no attention.
    """

    def __init__(
        self,
        recorder: Recorder,
        name: str,
        facts: AttentionCallInfo,
        records: dict[str, SiteSums],
        before: Callable[[str], SiteSums | None],
        is_out: Callable[[str], bool],
        may_be_none: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(recorder, name)
        self.recorder: Any = recorder
        self.site, self.facts, self.records, self.before = name, facts, records, before
        self.is_out, self.may_be_none = is_out, may_be_none
        self.seen = 0
        self.sample: RowSample | None = None
        # If it attends with one part of its sequence after the other: the parts of the latest attention.
        self.parts: Parts | None = None

    # ------------------------------------------------------------------------------------------ what is known

    def begin(self, layout: Layout, opened: Opened) -> bool:
        """True if an attention of the site is to be shown."""
        piece = part_of(layout)
        if self.parts is None or piece is None or not self.parts.takes(layout, piece):
            self._end_parts()
            self.name = self.site if not self.seen else f"{self.site}:{self.seen}"
            self.seen += 1
            self.parts = None if piece is None else Parts.begin(layout, piece)
        if self.parts is not None and piece is not None:
            self.parts.seen[piece.start] = piece.length
        self.is_shown, self.record, self.sample, self.rows_apart = False, None, None, None
        if self.is_out(self.name):
            return False
        try:
            with compat.DisableTorchFunction(), torch.no_grad():
                self._begin(layout, opened)
        except Exception as error:
            self._leave_out(str(error) if is_refusal(error) else FAILED)
            if not is_refusal(error):
                raise
            return False
        self.is_shown = True
        return True

    def _begin(self, layout: Layout, opened: Opened) -> None:
        why_not = layout.why_not or self.facts.problem
        if why_not:
            raise Unknown(why_not)
        old = self.before(self.name)
        self.layout, self.old = layout, old
        past = self.facts.past
        if old is not None and past is not None and old.history.follows_cache and old.history.total > past:
            raise Unknown(evicted(past, old.history.total))
        piece = part_of(layout)
        if piece is not None:
            self.relation = relation = relation_of_part(layout, piece)
            queries = keys = real_tokens_of_part(layout, piece, self.facts, opened)
        else:
            keys_before = old.history.keys if old is not None else None
            self.relation = relation = relation_of(layout, self.facts, keys_before)
            known = old.history.known if old is not None and not relation.is_cross else None
            queries, keys = real_tokens(relation, layout, self.facts, opened, known)
        self.past = relation.past
        if relation.is_cross:
            queries = self._queries_of_cross(queries)
        else:
            self.recorder.tells_tokens(self.site, queries)
        self.known = queries
        query, key = self.recorder.partitions(queries, keys if relation.is_cross else None)
        self.place(key, layout.kv_len, relation.first)
        self.key_blocks = key.assignment
        self.width_asked = self.width(layout.heads)
        if old is not None and old.sums.shape[:2] != (layout.batch, self.width_asked):
            raise Unknown(
                f"this call has {layout.batch} sequences of {self.width_asked} heads, and the call before had "
                f"{old.sums.shape[0]} of {old.sums.shape[1]}; capture calls of one batch size at a time"
            )
        self.real = queries, keys
        self._renew(query, key)

    def _queries_of_cross(self, said: torch.Tensor) -> torch.Tensor:
        found = self.recorder.known_tokens(self.site, *said.shape)
        return said if found is None else found

    def _renew(self, query: Partition, key: Partition) -> None:
        """Make sums for this attention alone, which are added to the record when it has ended."""
        layout, recorder = self.layout, self.recorder
        self.record = self.empty(query, key, layout.heads)
        # Number of rows that see no key, for the heads that are summed.
        self.closed = torch.zeros_like(self.record.sums[..., 0])
        self.off = OFF
        if recorder.sample_rows is not None or recorder.window is not None:
            self.record.variance = torch.zeros_like(self.record.sums)
            self.sample = self._drawn(query, key.num_blocks + 1)
        if recorder.measures or recorder.statistics is not None:
            self.record.measures = self._measures()
        size = (layout.batch, self.width_asked, layout.q_len, key.num_blocks + 1)
        is_small = layout.q_len <= MOST_ROWS and torch.Size(size).numel() <= _MOST_NUMBERS
        keeps = is_small and not self.is_of_gradient and self.sample is None and self.facts.has_cache
        self.rows_apart = torch.zeros(size, dtype=torch.float64) if keeps else None

    def _drawn(self, query: Partition, bins: int) -> RowSample:
        from attnpatch.recording.text.row_sampling import RowSample, draw, generator_for, last_rows

        parts = query.assignment[:, self.past : self.past + self.layout.q_len]
        most, window = self.recorder.sample_rows, self.recorder.window
        if window is not None:
            if self.parts is not None:
                raise Unknown("it attends with parts of its sequence, so they do not tell its last rows")
            drawn = [last_rows(part, self.past, window, query.num_blocks) for part in parts]
        else:
            numbers = generator_for(self.recorder.seed, self.site, self.past)
            drawn = [draw(part, self.past, most, query.num_blocks, numbers) for part in parts]
        return RowSample(drawn, self.width_asked, bins)

    def _measures(self) -> Statistics:
        tokens = max(self.real[1].shape[1], self.layout.kv_len)
        old = self.parts.sums if self.parts is not None else None
        old = old or self.records.get(self.name)
        if old is None or old.measures is None:
            batch, heads, own = self.layout.batch, self.layout.heads, self.recorder.statistics
            if own is not None:
                return own(batch, heads, tokens, self.facts.key_heads_of(heads))
            return Measures.empty(self.recorder.measures, batch, heads, tokens, self.kept_heads(heads))
        return old.measures.grown(tokens)

    def _leave_out(self, reason: str) -> None:
        self.is_shown, self.record, self.sample = False, None, None
        self.recorder.leave_out(self.name, reason, self.records)

    # ------------------------------------------------------------------------------------------ what is shown

    def cannot_show(self, reason: str) -> None:
        """One attention of the site cannot be shown: leave the whole site out."""
        self.name = self.site
        self._leave_out(reason)

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """The query rows that need to be shown, ascending; ``None``: all."""
        if self.sample is None or self.layout.q_len != q_len:
            return None
        return self.sample.positions() - self.past

    def why_tiles(self) -> str | None:
        """Why the observer needs tiles: measures need the keys of every row, and a sample needs only some rows."""
        has_measures = self.record is not None and self.record.measures is not None
        return "measures" if has_measures else "some rows" if self.sample is not None else None

    def add_sequence(
        self, b: int, numbers: list[int], tile: torch.Tensor, weights: torch.Tensor | None, passing: TileInfo
    ) -> None:
        """See ``SiteObserver.add_sequence``."""
        record, heads = self.record, self.layout.heads
        assert record is not None
        low, high = self.past + passing.rows[0], self.past + passing.rows[1]
        if record.measures is not None or self.sample is not None:
            shown = passing.positions
            rows = self.past + (torch.arange(*passing.rows) if shown is None else shown)
        if record.measures is not None:
            self._measure(b, numbers, tile, weights, rows)
        if 0 in numbers and self.sample is None:
            self.count(b, low, high)
        for place, chosen in self.places(numbers, heads):
            some = None if weights is None else weights[chosen]
            if some is not None and self.sample is None and bool((some == 0).any()):
                self._count_closed(b, place, some, low, high)
            if self.sample is None and self.rows_apart is None:
                self.add(b, place, tile[chosen], some, low, high)
                continue
            bins = key_sums(record.sums[b, place], tile[chosen], self._columns[b, : tile.shape[-1]], some)
            if self.sample is not None:
                self.sample.add(b, place, bins, rows)
            else:
                assert self.rows_apart is not None
                self.rows_apart[b, place, low - self.past : high - self.past] += bins

    def _count_closed(self, b: int, place: slice, weights: torch.Tensor, low: int, high: int) -> None:
        """Count rows that see no key: they have no probabilities, and add nothing to the result of attention."""
        assert self.record is not None
        block = self.record.query.assignment[b, low:high]
        closed = (weights == 0).double().cpu()
        closed = closed.sum(0, keepdim=True) if place.stop - place.start == 1 else closed
        self.closed[b, place].index_add_(1, block.clamp(min=0), closed * (block >= 0))

    def _measure(
        self, b: int, numbers: list[int], tile: torch.Tensor, weights: torch.Tensor | None, rows: torch.Tensor
    ) -> None:
        """Add the further statistics, for those of the rows that are real tokens."""
        assert self.record is not None and self.record.measures is not None
        counted = self.sample.weights(b, rows) if self.sample is not None else self.real[0][b, rows].double()
        factors = tile.new_ones(tile.shape[:2]) if weights is None else weights
        start = int(self.real[1][b].int().argmax())
        self.record.measures.add(
            b, numbers, tile, factors, TileRows(counted, rows, self.relation.first, start)
        )

    def restart(self) -> None:
        """Forget the tiles of this attention."""
        if self.record is not None:
            self._renew(self.record.query, self.record.key)

    def _end_parts(self) -> None:
        """Leave the latest attention out if it was of some parts of its sequence only."""
        if self.parts is not None and not self.parts.is_complete and not self.is_out(self.name):
            self._leave_out(self.parts.why_incomplete)

    def finish(self) -> None:
        """Called when the site's call has ended."""
        if self.is_shown:
            # Only some of its tiles were shown.
            self._leave_out(FAILED)
        self._end_parts()
        if not (self.seen or self.is_of_gradient or self.may_be_none()):
            self.name = self.site
            self._leave_out(NOT_SEEN)
        if self.seen:
            self.recorder.saw(self.site)

    # ------------------------------------------------------------------------------------------ what is kept

    def end(self) -> None:
        """All tiles of the attention were shown: add its sums to the record if they pass the checks."""
        if not self.is_shown or self.record is None:
            return
        self.is_shown, record = False, self.record
        try:
            self._end(record)
        except Exception as error:
            self._leave_out(str(error) if is_refusal(error) else FAILED)
            if not is_refusal(error):
                raise

    def _end(self, record: SiteSums) -> None:
        rows = None
        if self.sample is not None:
            self._from_sample(record)
        elif self.rows_apart is not None:
            rows = self._from_rows(record)
        if not self.is_of_gradient:
            self._check(record)
        keys = self.real[1].shape[1] if self.relation.is_cross else None
        history = self.old.history if self.old is not None else History(0, self.known)
        total = self.past + self.layout.q_len if self.parts is None else self.parts.of
        record.history = history.with_call(rows, total, self.known, keys, self.facts.has_cache)
        record.key_heads = self.facts.key_heads_of(self.layout.heads)
        if self.layout.is_mixed:
            record.notes = ("weights are mixed after softmax, so their rows need not sum to 1",)
        if self.parts is not None:
            record = self.parts.sums = _joined(self.parts.sums, record)
            if not self.parts.is_complete:
                return
        self.records[self.name] = _joined(self.records.get(self.name), record)

    def _from_sample(self, record: SiteSums) -> None:
        assert self.sample is not None and record.variance is not None
        for b in range(len(self.sample.drawn)):
            sums, variance, sizes = self.sample.estimate(b)
            record.sums[b] += sums
            record.counts[b] += sizes
            record.variance[b] += variance

    def _from_rows(self, record: SiteSums) -> Rows:
        assert self.rows_apart is not None
        blocks = record.query.assignment[:, self.past : self.past + self.layout.q_len]
        for b, own in enumerate(blocks):
            kept = (own >= 0).nonzero().flatten()
            record.sums[b].index_add_(1, own[kept], self.rows_apart[b][:, kept])
        return Rows(self.past, self.rows_apart, blocks)

    def _check(self, record: SiteSums) -> None:
        """Check that every row of the map sums to 1 and that no attention goes to tokens that count as padding."""
        if self.layout.is_mixed:
            return
        covers = (
            bool((self.key_blocks >= 0)[self.real[1]].all()) and self.relation.tokens == self.layout.kv_len
        )
        closed = record.sums[..., -1].sum() / record.sums.sum().clamp(min=1e-9)
        if covers and float(closed) > self.off:
            raise Unknown(f"a share of {float(closed):.4g} of its attention is on keys that its mask closes")
        share = self.layout.heads if self.recorder.heads == "mean" else 1
        expected = record.counts[:, None] * share - self.closed
        check_sums(record.sums, expected, self.off, self.layout.drops_keys)


def _joined(old: SiteSums | None, new: SiteSums) -> SiteSums:
    """The sum of two records of one sequence; ``new`` has all its tokens."""
    if old is None:
        return new
    blocks = min(old.sums.shape[2], new.sums.shape[2]), min(old.sums.shape[3], new.sums.shape[3]) - 1
    for name in ("sums", "variance"):
        before, sums = getattr(old, name), getattr(new, name)
        if before is not None and sums is not None:
            sums[:, :, : blocks[0], : blocks[1]] += before[:, :, : blocks[0], : blocks[1]]
    new.counts[:, : blocks[0]] += old.counts[:, : blocks[0]]
    new.notes = tuple(dict.fromkeys((*old.notes, *new.notes)))
    return new
