"""Adds the probabilities of one attention call to block sums, tile by tile."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.blocks.heads import chosen_heads
from attnpatch.blocks.partition import Partition
from attnpatch.observing import Observer, TileInfo
from attnpatch.recording.block_sums import Runs, add_tile
from attnpatch.recording.call_facts import OFF, OFF_FUSED
from attnpatch.sdpa_call import SdpaCall

if TYPE_CHECKING:
    from attnpatch.recording.diffusion.recorder import ImageRecorder
    from attnpatch.recording.text.recorder import Recorder


@dataclasses.dataclass
class SiteSums:
    """Sums of one site over one sequence and its continuations.

    Attributes:
        query, key: The blocks of queries and of keys.
        sums: float64 ``[batch, heads or 1, query_blocks, key_blocks + 1]``; the last column is for keys in no block.
        counts: float64 ``[batch, query_blocks]``: number of query tokens that were summed.
        num_heads: Number of heads, summed into one or kept separate.
        variance: The variance of ``sums``, if only a sample of the rows was summed.
        measures: Further ``Statistics`` that were asked for.
        key_heads: Number of heads of keys, which heads of queries share in equal groups; ``None``: not known.
        notes: Remarks for the map's metadata, such as that weights are mixed after softmax.
        history: The latest rows, which can be taken back if the sequence's cache is cut.
    """

    query: Partition
    key: Partition
    sums: torch.Tensor
    counts: torch.Tensor
    num_heads: int
    variance: torch.Tensor | None = None
    measures: Any = None
    notes: tuple[str, ...] = ()
    history: Any = None
    key_heads: int | None = None

    def of_rows(self, order: list[int]) -> SiteSums:
        """The sums of the batch rows in ``order``, such as the beams that continue."""
        changes: dict[str, Any] = {
            name: value[order]
            for name in ("sums", "counts", "variance")
            if (value := getattr(self, name)) is not None
        }
        if self.measures is not None:
            changes["measures"] = self.measures.of_rows(order)
        return dataclasses.replace(
            self,
            query=self.query.of_rows(order),
            key=self.key.of_rows(order),
            history=self.history.of_rows(order),
            **changes,
        )


class SiteObserver(Observer):
    """Adds tiles of probabilities to sums.

    Args:
        recorder: The options of the capture.
        name: The site's name.

    Attributes:
        record: The sums; ``None`` if there are none yet.
        layout: The layout of the attention that is shown.
        past: Number of tokens before the first query.
        is_shown: True while an attention is shown.
        off: Tolerance for the sum of its rows.
        rows_apart: The sums of its rows, kept apart for the history.
    """

    def __init__(self, recorder: Recorder | ImageRecorder, name: str) -> None:
        self.recorder, self.name, self.is_of_gradient = recorder, name, recorder.is_of_gradient
        self.record: SiteSums | None = None
        self.layout: Any = None
        self.past = 0
        self.is_shown, self.off = False, OFF
        self.rows_apart: torch.Tensor | None = None
        # The latest leads, and what they are: most tiles of an attention have the same.
        self._leads: tuple[Any, ...] = (None, None, [])
        # A partition of queries, the number of its tokens that came before, and for each sequence the runs of the rest.
        self._runs: tuple[Any, int, dict[int, Runs]] = None, 0, {}

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        """Add ``[leads, rows, kv_len]`` probabilities."""
        if not self.is_shown:
            return
        # Sums are products with ones, which autocast would compute in half precision; modes must not see them.
        device = probabilities.device.type
        is_cast = torch.is_autocast_enabled(device)
        with (
            torch.autocast(device, enabled=False) if is_cast else contextlib.nullcontext(),
            compat.DisableTorchFunction(),
        ):
            if passing.q_len != self.layout.q_len:
                probabilities, passing = heads_as_leads(probabilities, passing)
            self.off = max(self.off, torch.finfo(probabilities.dtype).eps)
            for sequence in self.of_sequences(probabilities, passing, self.layout.heads):
                self.add_sequence(*sequence, passing)

    def add_sequence(
        self, b: int, numbers: list[int], tile: torch.Tensor, weights: torch.Tensor | None, passing: TileInfo
    ) -> None:
        """Add the part of a tile that belongs to sequence ``b``, as ``of_sequences`` yields it."""
        raise NotImplementedError

    def why_tiles(self) -> str | None:
        """Why the observer needs tiles, in a few words; ``None`` if sums of the whole call are enough."""
        return None

    def take(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None = None) -> str | None:
        """See ``Observer.take``: sums by the kernel of ``gpu/`` if it supports the call; otherwise nothing is added."""
        from attnpatch.recording.gpu import fused_sums

        record, layout = self.record, self.layout
        is_plain = call.query.shape[:3] == (layout.batch, layout.heads, layout.q_len)
        reason = fused_sums.why_not(call) or self.why_tiles()
        if reason is None and (not is_plain or layout.numbers is not None):
            reason = "another layout"
        if reason is not None:
            return reason
        assert record is not None
        query = record.query.assignment[:, self.past : self.past + call.q_len]
        num_blocks = record.sums.shape[-2], record.sums.shape[-1]
        heads = self.kept_heads(layout.heads)
        found = fused_sums.checked_sums(call, lse, query, self._columns, num_blocks, heads, workspace)
        if isinstance(found, str):
            return found
        record.sums += found[0]
        record.counts += found[1]
        self.rows_apart = None
        # The kernel has its own check, with bfloat16's accuracy.
        self.off = max(self.off, OFF_FUSED)
        return None

    def place(self, key: Partition, kv_len: int, first_key: int) -> None:
        """Set the bins that keys are summed into.

        Args:
            key: The blocks of keys.
            kv_len: Number of keys of the call; keys beyond the partition are in no block.
            first_key: Index in the partition of the first key.
        """
        assignment = key.assignment[:, first_key : first_key + kv_len]
        # The last bin takes the keys in no block, so that no key has to be left out of a sum.
        columns = torch.nn.functional.pad(assignment, (0, kv_len - assignment.shape[1]), value=-1)
        self._columns = torch.where(columns < 0, key.num_blocks, columns)

    def empty(self, query: Partition, key: Partition, num_heads: int) -> SiteSums:
        """Sums of zero."""
        batch, width = len(query.assignment), self.width(num_heads)
        sums = torch.zeros(batch, width, query.num_blocks, key.num_blocks + 1, dtype=torch.float64)
        counts = torch.zeros(batch, query.num_blocks, dtype=torch.float64)
        return SiteSums(query, key, sums, counts, num_heads)

    def kept_heads(self, num_heads: int) -> list[int] | None:
        """The heads that are kept separate; ``None`` if all are summed together.

        Raises:
            CaptureError: A head that was asked for does not exist.
        """
        heads = self.recorder.heads
        return None if heads == "mean" else chosen_heads(heads, num_heads)

    def width(self, num_heads: int) -> int:
        """Number of heads that are kept separate; 1 if all are summed together."""
        return len(self.kept_heads(num_heads) or [0])

    def of_sequences(
        self, probabilities: torch.Tensor, passing: TileInfo, num_heads: int
    ) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor | None]]:
        """For each sequence in a tile: its number, its heads (ascending), its part of the tile and of the weights."""
        if self._leads[0] is not passing.leads or self._leads[1] is not self.layout:
            leads = passing.leads if self.layout.numbers is None else self.layout.numbers[passing.leads]
            self._leads = passing.leads, self.layout, [*_sequences(leads, num_heads)]
        for b, numbers, order in self._leads[2]:
            tile, weights = probabilities, passing.weights
            if order is not None:
                at = order.to(probabilities.device)
                tile, weights = tile[at], None if weights is None else weights[at]
            yield b, numbers, tile, weights

    def places(self, numbers: list[int], num_heads: int) -> Iterator[tuple[slice, slice]]:
        """Pairs of slices: heads of the sums, and the heads of the tile that are added to them."""
        kept = self.kept_heads(num_heads)
        if kept is None:
            yield slice(0, 1), slice(None)
        elif self.recorder.heads == "all" and numbers[-1] - numbers[0] == len(numbers) - 1:
            yield slice(numbers[0], numbers[-1] + 1), slice(None)
        else:
            for place, head in enumerate(kept):
                if head in numbers:
                    i = numbers.index(head)
                    yield slice(place, place + 1), slice(i, i + 1)

    def add(
        self, b: int, place: slice, tile: torch.Tensor, weights: torch.Tensor | None, low: int, high: int
    ) -> None:
        """Add ``[heads, rows, kv_len]``, the query tokens ``low:high`` of sequence ``b``."""
        assert self.record is not None
        query, columns = self.record.query.assignment[b], self._columns[b, : tile.shape[-1]]
        if self._runs[:2] != (self.record.query, self.past):
            self._runs = self.record.query, self.past, {}
        own = self._runs[2]
        if b not in own:
            own[b] = Runs(query[self.past :], self.past)
        runs = own[b].within(low, high)
        add_tile(self.record.sums[b, place], tile, query[low:high], columns, weights, runs)

    def count(self, b: int, low: int, high: int) -> None:
        """Count the query tokens ``low:high`` of a sequence as summed."""
        assert self.record is not None
        block = self.record.query.assignment[b, low:high]
        self.record.counts[b].index_add_(0, block.clamp(min=0), (block >= 0).double())


def _sequences(leads: torch.Tensor, num_heads: int) -> Iterator[tuple[int, list[int], torch.Tensor | None]]:
    """For each sequence among leads: its number, its heads (ascending), and their places; ``None``: all, in order."""
    sequences, heads = leads // num_heads, leads % num_heads
    for b in sequences.unique().tolist():
        mine = sequences == b
        numbers = heads[mine].tolist()
        order = None
        if len(numbers) < len(mine) or numbers != sorted(numbers):
            order = mine.nonzero().flatten()
            order = order[heads[order].argsort()]
            numbers = heads[order].tolist()
        yield b, numbers, order


def heads_as_leads(probabilities: torch.Tensor, passing: TileInfo) -> tuple[torch.Tensor, TileInfo]:
    """Undo a trick of hosts for decoding: for one query token they pass the query heads of a group as query rows."""
    low, high = passing.rows
    leads = (passing.leads[:, None] * passing.q_len + torch.arange(low, high)).reshape(-1)
    count = passing.lead_count * passing.q_len
    weights = None if passing.weights is None else passing.weights.reshape(-1, 1)
    changed = dataclasses.replace(
        passing, leads=leads, rows=(0, 1), lead_count=count, q_len=1, weights=weights
    )  # type: ignore[type-var]
    return probabilities.reshape(len(leads), 1, -1), changed
