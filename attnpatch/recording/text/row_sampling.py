"""Samples query rows of each block. The estimate is cheaper than a map, unbiased, and has a standard error.

Of the ``n`` rows of a block in a call, ``m`` are drawn. The block is cut into ``m`` equal parts, and one row is drawn
uniformly from each. So all rows are equally likely, and every part of the block is covered (stratified sampling;
Cochran, Sampling Techniques, chapter 5). The mean over the drawn rows is an unbiased estimate of the block's mean. The
standard error that is reported is that of a simple random sample; if rows within a part are alike, the real one is
smaller.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The rows of one sequence that were drawn in one call.

    Attributes:
        positions: int64 ``[rows]``: positions in the sequence, ascending.
        times: float64 ``[rows]``: how often each row was drawn.
        blocks: int64 ``[rows]``: the block of each row.
        taken: float64 ``[blocks]``: number of rows drawn from each block; a row drawn twice counts twice.
        sizes: float64 ``[blocks]``: number of rows of each block in this call.
    """

    positions: torch.Tensor
    times: torch.Tensor
    blocks: torch.Tensor
    taken: torch.Tensor
    sizes: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """float64 ``[rows]``: how many rows of the sequence each drawn row stands for."""
        return self.times * (self.sizes / self.taken.clamp(min=1))[self.blocks]


def draw(assignment: torch.Tensor, low: int, most: int, num_blocks: int, generator: torch.Generator) -> Drawn:
    """Draw up to ``most`` rows of each block.

    Args:
        assignment: int64 ``[rows]``, the block of each row of a call, -1 for none.
        low: Position of the first row in the sequence.
        most: Rows to draw per block; a block that has no more is taken whole.
        num_blocks: Number of blocks.
        generator: The random number generator.
    """
    inside = (assignment >= 0).nonzero().flatten()
    order = inside[assignment[inside].argsort(stable=True)]
    sizes = torch.bincount(assignment[inside], minlength=num_blocks)
    starts = sizes.cumsum(0) - sizes
    # No block has more rows than this, so no more random numbers are drawn.
    most = min(most, max(1, int(sizes.max())))
    parts = (
        torch.arange(most) + torch.rand(num_blocks, most, generator=generator, dtype=torch.float64)
    ) / most
    picked = (parts * sizes[:, None]).long().clamp(max=(sizes[:, None] - 1).clamp(min=0))
    places = []
    for block in sizes.nonzero().flatten().tolist():
        size = int(sizes[block])
        places.append(starts[block] + (torch.arange(size) if size <= most else picked[block]))
    rows = order[torch.cat(places)] if places else order[:0]
    rows, times = rows.unique(return_counts=True)
    blocks = assignment[rows]
    taken = torch.zeros(num_blocks, dtype=torch.float64).index_add_(0, blocks, times.double())
    return Drawn(rows + low, times.double(), blocks, taken, sizes.double())


def last_rows(assignment: torch.Tensor, low: int, most: int, num_blocks: int) -> Drawn:
    """The last rows of a call that are in a block, each once; arguments as for ``draw``, but for ``most`` in all."""
    inside = (assignment >= 0).nonzero().flatten()[-most:]
    blocks = assignment[inside]
    sizes = torch.bincount(blocks, minlength=num_blocks).double()
    return Drawn(inside + low, torch.ones(len(inside), dtype=torch.float64), blocks, sizes, sizes)


def generator_for(seed: int, *what: Any) -> torch.Generator:
    """A generator seeded by ``seed`` and ``what``, so that each site and call has its own reproducible numbers."""
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *what)).encode()))


class RowSample:
    """The sums of the rows that were drawn in one call of one site.

    Args:
        drawn: The drawn rows of each sequence.
        heads: Number of heads that are kept separate; 1 if all are summed together.
        bins: Number of key blocks, plus one for keys in no block.
    """

    def __init__(self, drawn: list[Drawn], heads: int, bins: int) -> None:
        self.drawn = drawn
        self.rows = [torch.zeros(heads, len(one.positions), bins, dtype=torch.float64) for one in drawn]

    def positions(self) -> torch.Tensor:
        """int64: positions that were drawn in any sequence, ascending."""
        return torch.cat([one.positions for one in self.drawn]).unique()

    def weights(self, b: int, positions: torch.Tensor) -> torch.Tensor:
        """float64: how many rows of sequence ``b`` each position stands for; 0 if it was not drawn."""
        found, is_there = self._find(b, positions)
        return torch.where(is_there, self.drawn[b].weights[found], 0.0) if len(found) else found.double()

    def add(self, b: int, place: slice, bins: torch.Tensor, positions: torch.Tensor) -> None:
        """Add rows ``[heads, rows, bins]``, whose keys are summed into bins; rows that were not drawn are ignored."""
        found, is_there = self._find(b, positions)
        if bool(is_there.any()):
            kept = is_there.nonzero().flatten()
            self.rows[b][place].index_add_(1, found[kept], bins[:, kept])

    def estimate(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Estimates for sequence ``b``: the sum over all rows of each block, its variance, and the block's size.

        Returns:
            The sum and its variance, each float64 ``[heads, blocks, bins]``, and the size, float64 ``[blocks]``. The
            variance is NaN if only one of several rows was drawn.
        """
        one, rows = self.drawn[b], self.rows[b]
        taken, sizes = one.taken[:, None], one.sizes[:, None]
        empty = torch.zeros(rows.shape[0], len(one.sizes), rows.shape[2], dtype=torch.float64)
        mean = empty.index_add(1, one.blocks, rows * one.times[:, None]) / taken.clamp(min=1)
        apart = (rows - mean[:, one.blocks]).square() * one.times[:, None]
        spread = empty.index_add(1, one.blocks, apart) / (taken - 1).clamp(min=1)
        variance = torch.where(taken > 1, sizes.square() * spread / taken.clamp(min=1), torch.nan)
        return mean * sizes, torch.where(taken >= sizes, 0.0, variance), one.sizes

    def _find(self, b: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = self.drawn[b].positions
        if not len(known):
            return positions[:0], positions[:0].bool()
        found = torch.searchsorted(known, positions).clamp(max=len(known) - 1)
        return found, known[found] == positions
