"""Takes query tokens out of a record again: a cache is cut when drafts are rejected or a turn is repeated."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.call_facts import Unknown

# At most this many rows of a call, and this many numbers of a site, are kept row by row.
MOST_ROWS = 256
_MOST_NUMBERS = 1 << 18


@dataclasses.dataclass
class Rows:
    """The sums of one call, for each query token apart.

    Attributes:
        start: Position of the first token.
        sums: float64 ``[batch, heads or 1, rows, key_blocks + 1]``.
        blocks: int64 ``[batch, rows]``, the block of each, -1 for none.
    """

    start: int
    sums: torch.Tensor
    blocks: torch.Tensor


@dataclasses.dataclass
class History:
    """The latest rows of a record.

    Attributes:
        total: Number of tokens of the sequence.
        known: Bool ``[batch, total]``: which tokens are real.
        keys: Number of keys, if they belong to another sequence; ``None`` if the keys are its own tokens.
        follows_cache: True if its queries are the tokens that a cache holds.
        pieces: The latest calls, in order, without gaps.
    """

    total: int
    known: torch.Tensor
    keys: int | None = None
    follows_cache: bool = False
    pieces: tuple[Rows, ...] = ()

    def with_call(
        self, rows: Rows | None, total: int, known: torch.Tensor, keys: int | None, follows_cache: bool
    ) -> History:
        """The history after one more call; ``rows`` is ``None`` if its rows were not kept separate."""
        pieces = (*self.pieces, rows) if rows is not None else ()
        if len({piece.sums.shape[:2] for piece in pieces}) > 1:
            pieces = pieces[-1:]
        held = sum(piece.sums.numel() for piece in pieces)
        while len(pieces) > 1 and held > _MOST_NUMBERS:
            held -= pieces[0].sums.numel()
            pieces = pieces[1:]
        return History(total, known, keys, follows_cache, pieces)

    def of_rows(self, order: list[int]) -> History:
        """The history of the batch rows in ``order``, such as the beams that continue."""
        pieces = tuple(
            dataclasses.replace(piece, sums=piece.sums[order], blocks=piece.blocks[order])
            for piece in self.pieces
        )
        return dataclasses.replace(self, known=self.known[order], pieces=pieces)


def cut(record: SiteSums, total: int, partitions: Any) -> SiteSums:
    """A copy of a record without the query tokens from ``total`` on.

    Args:
        record: The record; it is not changed.
        total: Number of tokens that are left.
        partitions: Returns the blocks of queries and keys, given which tokens are real (``Recorder.partitions``).

    Raises:
        Unknown: The tokens were summed together with others.
    """
    history: History = record.history
    if total >= history.total:
        return record
    if record.measures is not None or record.variance is not None:
        raise Unknown(
            "its cache was cut, and measures and samples of the removed rows cannot be subtracted; capture without them"
        )
    sums, counts = record.sums.clone(), record.counts.clone()
    start = min((piece.start for piece in history.pieces), default=history.total)
    assignment = record.query.assignment
    for b in range(len(sums)):
        # Rows that were not kept separate can be removed only with their whole block.
        gone = assignment[b, total : max(total, start)]
        gone = gone[gone >= 0].unique()
        for block in gone.tolist():
            first = int((assignment[b] == block).nonzero()[0])
            if first < total:
                raise Unknown(
                    f"its cache was cut at token {total}, inside a block and inside a call of more than {MOST_ROWS} "
                    "tokens; cut it at the edge of a block"
                )
            sums[b, :, block], counts[b, block] = 0, 0
        for piece in history.pieces:
            for row, block in enumerate(piece.blocks[b].tolist()):
                if block < 0 or piece.start + row < total or block in gone.tolist():
                    continue
                bins = piece.sums.shape[-1] - 1
                sums[b, :, block, :bins] -= piece.sums[b, :, row, :-1]
                counts[b, block] -= 1
    known = history.known[:, :total]
    query, key = partitions(known, None)
    if history.keys is not None:
        key = record.key
    query_blocks, key_blocks = query.num_blocks, key.num_blocks
    kept = torch.zeros(len(sums), sums.shape[1], query_blocks, key_blocks + 1, dtype=torch.float64)
    kept[..., :-1] = sums[:, :, :query_blocks, :key_blocks]
    pieces = tuple(
        dataclasses.replace(
            piece, sums=piece.sums[:, :, : total - piece.start], blocks=piece.blocks[:, : total - piece.start]
        )
        for piece in history.pieces
        if piece.start < total
    )
    return dataclasses.replace(
        record,
        query=query,
        key=key,
        sums=kept,
        counts=counts[:, :query_blocks],
        history=dataclasses.replace(history, total=total, known=known, pieces=pieces),
    )
