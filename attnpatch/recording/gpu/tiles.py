"""Cuts the tokens of a call into tiles for the kernel, each within one block."""

from __future__ import annotations

import collections
import dataclasses

import torch

_TILE_SIZES = (16, 32, 64, 128)
# If padding makes the work more than this many times larger, tokens are sorted by block first.
_WASTE = 1.5


@dataclasses.dataclass
class Cut:
    """Tokens of a batch cut into tiles.

    Attributes:
        table: int32 ``[batch, tiles, 2]``: start and number of tokens of each tile; 0 tokens: no more tiles.
        blocks: int64 ``[batch, tiles]``: the block of each tile; 0 if there is no tile.
        order: int32 ``[batch, tokens]``: the token at each position after sorting by block; ``None``: not sorted.
        size: The largest number of tokens in a tile.
        is_full_first: True if full tiles come before the others.
        is_even: True if, in addition, each full tile begins where the previous one ends.
    """

    table: torch.Tensor
    blocks: torch.Tensor
    order: torch.Tensor | None
    size: int
    is_full_first: bool
    is_even: bool


def cut(assignment: torch.Tensor, most: int) -> Cut:
    """Cut tokens into tiles of one block each.

    Args:
        assignment: int64 ``[batch, tokens]``, block of each token, -1 for none.
        most: The largest number of tokens in a tile.
    """
    runs = [_runs(row) for row in assignment]
    size, work = _size(runs, most)
    order = None
    if work > _WASTE * assignment.numel():
        by_block = assignment.sort(dim=1, stable=True)
        runs_by_block = [_runs(row) for row in by_block.values]
        size_by_block, work_by_block = _size(runs_by_block, most)
        if _WASTE * work_by_block < work:
            runs, size, order = runs_by_block, size_by_block, by_block.indices.int()
    pieces = [_pieces(*row, size) for row in runs]
    is_even = all(
        bool(((starts[1:] - starts[:-1] == size) & (counts[:-1] == size)).all())
        for starts, counts, _ in pieces
    )
    full = sum(int((counts == size).sum()) for _, counts, _ in pieces)
    is_full_first = is_even or 2 * full > sum(len(counts) for _, counts, _ in pieces)
    if is_full_first and not is_even:
        pieces = [
            tuple(each[(counts < size).long().argsort(stable=True)] for each in (starts, counts, blocks))
            for starts, counts, blocks in pieces
        ]
    count = max(1, *(len(blocks) for *_, blocks in pieces))
    table = torch.zeros(len(pieces), count, 2, dtype=torch.int32)
    blocks = torch.zeros(len(pieces), count, dtype=torch.int64)
    for b, (starts, counts, of_tile) in enumerate(pieces):
        table[b, : len(of_tile), 0], table[b, : len(of_tile), 1] = starts, counts
        blocks[b, : len(of_tile)] = of_tile
    return Cut(table, blocks, order, size, is_full_first, is_even)


# The latest results of ``tables``, with what they were made of: all layers cut the same tokens.
_latest: collections.deque[tuple[torch.Tensor, int, torch.device, Cut]] = collections.deque(maxlen=8)


def tables(assignment: torch.Tensor, most: int, device: torch.device) -> Cut:
    """As ``cut``, with what the kernel reads on ``device``; made once for layers that follow each other."""
    for given, size, place, found in list(_latest):
        if (size, place) == (most, device) and torch.equal(given, assignment):
            return found
    made = cut(assignment, most)
    order = None if made.order is None else made.order.to(device)
    made = dataclasses.replace(made, table=made.table.to(device), order=order)
    _latest.append((assignment.clone(), most, device, made))
    return made


def _runs(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, number of tokens and block of every run of adjacent tokens in one block."""
    blocks, counts = torch.unique_consecutive(row, return_counts=True)
    starts = counts.cumsum(0) - counts
    inside = blocks >= 0
    return starts[inside], counts[inside], blocks[inside]


def _size(runs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], most: int) -> tuple[int, float]:
    """The cheapest tile size, and its cost: tokens of all tiles with padding, plus an overhead for small tiles."""
    counts = torch.cat([counts for _, counts, _ in runs])
    costs = {}
    for size in _TILE_SIZES:
        if size <= most:
            costs[size] = (
                int((counts + size - 1).div(size, rounding_mode="floor").sum()) * size * (1 + 16 / size)
            )
    best = min(costs, key=lambda size: (costs[size], -size))
    return best, costs[best]


def _pieces(
    starts: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs cut into pieces of at most ``size`` tokens."""
    number = (counts + size - 1).div(size, rounding_mode="floor")
    of_run = torch.arange(len(counts)).repeat_interleave(number)
    within = (torch.arange(len(of_run)) - (number.cumsum(0) - number)[of_run]) * size
    return starts[of_run] + within, (counts[of_run] - within).clamp(max=size), blocks[of_run]
