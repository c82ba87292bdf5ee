"""Adds the probabilities of one attention call to block sums, tile by tile."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.blocks.partition import Partition
from attnpatch.observing import Observer, TileInfo
from attnpatch.recording.block_sums import accumulate_block_mass, add_rows, add_run
from attnpatch.recording.statistics import Measures
from attnpatch.sdpa_call import SdpaCall

if TYPE_CHECKING:
    from attnpatch.recording.diffusion.recorder import ImageRecorder
    from attnpatch.recording.text.recorder import Recorder

# A run is a range of adjacent rows in one block. If a tile's runs are shorter than this on average, one product sums
# all.
_SHORT_RUN = 8
# If they are shorter than this, there is little to sum over rows: keys are summed into blocks first.
_SINGLE_RUN = 4


@dataclasses.dataclass
class SiteSums:
    """Sums of one site over one sequence and its continuations.

    Attributes:
        query, key: The blocks of queries and of keys.
        sums: float64 ``[batch, heads or 1, query_blocks, key_blocks + 1]``; the last column is for keys in no block.
        counts: float64 ``[batch, query_blocks]``: number of query tokens that were summed.
        num_heads: Number of heads, summed into one or kept separate.
        variance: The variance of ``sums``, if only a sample of the rows was summed.
        measures: Further statistics that were asked for.
        notes: Remarks for the map's metadata, such as that weights are mixed after softmax.
        history: The latest rows, which can be taken back if the sequence's cache is cut.
    """

    query: Partition
    key: Partition
    sums: torch.Tensor
    counts: torch.Tensor
    num_heads: int
    variance: torch.Tensor | None = None
    measures: Measures | None = None
    notes: tuple[str, ...] = ()
    history: Any = None

    def of_rows(self, order: list[int]) -> SiteSums:
        """The sums with the batch rows ``order``: beams that went on, or some of them."""
        changes: dict[str, Any] = {
            name: value[order]
            for name in ("sums", "counts", "variance")
            if (value := getattr(self, name)) is not None
        }
        if self.measures is not None:
            own = self.measures
            parts = (getattr(own, name)[order] for name in ("received", "entropy", "sink", "rows"))
            changes["measures"] = Measures(*parts, apart=own.apart)
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
        past: Number of tokens before the first query.
    """

    def __init__(self, recorder: Recorder | ImageRecorder, name: str) -> None:
        self.recorder, self.name, self.is_of_gradient = recorder, name, recorder.is_of_gradient
        self.record: SiteSums | None = None
        self.past = 0

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        """Add ``[leads, rows, kv_len]`` probabilities."""
        # Sums are products with ones, which autocast would compute in half precision; modes must not see them.
        with torch.autocast(probabilities.device.type, enabled=False), compat.DisableTorchFunction():
            self._observe(probabilities, passing)

    def _observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        raise NotImplementedError

    def sums_of(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None, num_heads: int) -> str | None:
        """Add a whole attention call to the record at once, if the kernel of ``gpu/`` supports it.

        Args:
            call: The call.
            lse: ``[batch, heads, q_len]``, the logsumexp of its rows.
            workspace: Bytes that may be held on the device; ``None``: the default.
            num_heads: Number of heads.

        Returns:
            ``None`` if it was added; otherwise the reason in a few words, and nothing is added.
        """
        from attnpatch.recording.gpu import fused_sums

        record, q_len = self.record, call.q_len
        assert record is not None
        heads = None if self.recorder.heads == "mean" else self.recorder.head_numbers(num_heads)
        query = record.query.assignment[:, self.past : self.past + q_len]
        num_blocks = record.sums.shape[-2], record.sums.shape[-1]
        found = fused_sums.checked_sums(call, lse, query, self._columns, num_blocks, heads, workspace)
        if isinstance(found, str):
            return found
        record.sums += found[0]
        record.counts += found[1]
        return None

    def place(self, query: Partition, key: Partition, kv_len: int, first_key: int) -> None:
        """Set the bins that queries and keys are summed into.

        Args:
            query, key: The blocks of queries and of keys.
            kv_len: Number of keys of the call; keys beyond the partition are in no block.
            first_key: Index in the partition of the first key.
        """
        assignment = key.assignment[:, first_key : first_key + kv_len]
        # The last bin takes the keys in no block, so that no key has to be left out of a sum.
        columns = torch.nn.functional.pad(assignment, (0, kv_len - assignment.shape[1]), value=-1)
        self._columns = torch.where(columns < 0, key.num_blocks, columns)
        self._runs = [_runs_of(row) for row in query.assignment]

    def empty(self, query: Partition, key: Partition, num_heads: int) -> SiteSums:
        """Sums of zero."""
        batch, width = len(query.assignment), self.width(num_heads)
        sums = torch.zeros(batch, width, query.num_blocks, key.num_blocks + 1, dtype=torch.float64)
        counts = torch.zeros(batch, query.num_blocks, dtype=torch.float64)
        return SiteSums(query, key, sums, counts, num_heads)

    def width(self, num_heads: int) -> int:
        """Number of heads that are kept separate; 1 if all are summed together."""
        return 1 if self.recorder.heads == "mean" else len(self.recorder.head_numbers(num_heads))

    def of_sequences(
        self, probabilities: torch.Tensor, passing: TileInfo, num_heads: int
    ) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor | None]]:
        """For each sequence in a tile: its number, its heads (ascending), its part of the tile and of the weights."""
        sequences, heads = passing.leads // num_heads, passing.leads % num_heads
        for b in sequences.unique().tolist():
            mine = sequences == b
            numbers = heads[mine].tolist()
            tile, weights = probabilities, passing.weights
            if len(numbers) < len(mine) or numbers != sorted(numbers):
                order = mine.nonzero().flatten()
                order = order[heads[order].argsort()]
                numbers, order = heads[order].tolist(), order.to(probabilities.device)
                tile, weights = tile[order], None if weights is None else weights[order]
            yield b, numbers, tile, weights

    def places(self, numbers: list[int], num_heads: int) -> Iterator[tuple[slice, slice]]:
        """Pairs of slices: heads of the sums, and the heads of the tile that are added to them."""
        if self.recorder.heads == "mean":
            yield slice(0, 1), slice(None)
        elif self.recorder.heads == "all" and numbers[-1] - numbers[0] == len(numbers) - 1:
            yield slice(numbers[0], numbers[-1] + 1), slice(None)
        else:
            for place, head in enumerate(self.recorder.head_numbers(num_heads)):
                if head in numbers:
                    i = numbers.index(head)
                    yield slice(place, place + 1), slice(i, i + 1)

    def add(
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

    def count(self, b: int, low: int, high: int) -> None:
        """Count the query tokens ``low:high`` of a sequence as summed."""
        assert self.record is not None
        block = self.record.query.assignment[b, low:high]
        self.record.counts[b].index_add_(0, block.clamp(min=0), (block >= 0).double())


def _runs_of(assignment: torch.Tensor) -> list[tuple[int, int, int]]:
    """``(start, stop, block)`` of every run of adjacent tokens in one block."""
    changes = (assignment[1:] != assignment[:-1]).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(assignment)]
    blocks = assignment[bounds[:-1]].tolist() if len(assignment) else []
    runs = zip(bounds[:-1], bounds[1:], blocks, strict=False)
    return [(start, stop, block) for start, stop, block in runs if block >= 0]


def heads_as_leads(probabilities: torch.Tensor, passing: TileInfo) -> tuple[torch.Tensor, TileInfo]:
    """Undo a host's trick for decoding: for one query token it passes the query heads of a group as query rows."""
    low, high = passing.rows
    leads = (passing.leads[:, None] * passing.q_len + torch.arange(low, high)).reshape(-1)
    count = passing.lead_count * passing.q_len
    weights = None if passing.weights is None else passing.weights.reshape(-1, 1)
    changed = dataclasses.replace(
        passing, leads=leads, rows=(0, 1), lead_count=count, q_len=1, weights=weights
    )  # type: ignore[type-var]
    return probabilities.reshape(len(leads), 1, -1), changed
