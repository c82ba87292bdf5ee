"""Attention that each key receives from the latest query rows of a sequence, over the calls that have these rows.

A call does not know whether later calls will push its rows out of the window. So the latest rows are kept one by one,
with heads that share keys already summed: ``window`` numbers per key and head of keys.
"""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.recording.statistics import Statistics, TileRows


@dataclasses.dataclass
class LastRows(Statistics):
    """The latest rows of one site.

    Attributes:
        window: Number of rows that are kept of each sequence.
        num_heads: Number of heads of queries.
        places: Number of groups of heads that are summed; it divides ``num_heads``.
        tokens: Number of keys.
        rows: For each sequence, by position: float32 ``[places, tokens]`` on the CPU, ascending.
    """

    window: int
    num_heads: int
    places: int
    tokens: int
    rows: list[dict[int, torch.Tensor]]

    @classmethod
    def empty(cls, window: int, batch: int, num_heads: int, places: int, tokens: int) -> LastRows:
        return cls(window, num_heads, places, tokens, [{} for _ in range(batch)])

    def grown(self, tokens: int) -> LastRows:
        # Rows of earlier calls are not added to again, so copies can share them.
        rows = [dict(own) for own in self.rows]
        return dataclasses.replace(self, tokens=max(tokens, self.tokens), rows=rows)

    def of_rows(self, order: list[int]) -> LastRows:
        return dataclasses.replace(self, rows=[dict(self.rows[b]) for b in order])

    def add(
        self, b: int, heads: list[int], tile: torch.Tensor, factors: torch.Tensor, rows: TileRows
    ) -> None:
        kept = (rows.weights > 0).nonzero().flatten()
        if not len(kept):
            return
        at = kept.to(tile.device)
        values = tile[:, at].float() * factors[:, at].float().unsqueeze(-1)
        place = torch.tensor(heads) // (self.num_heads // self.places)
        summed = values.new_zeros(self.places, *values.shape[1:])
        summed = summed.index_add_(0, place.to(tile.device), values).cpu()
        own, keys = self.rows[b], slice(rows.first, rows.first + tile.shape[-1])
        for position, row in zip(rows.positions[kept].tolist(), summed.unbind(1), strict=True):
            if position not in own:
                own[position] = torch.zeros(self.places, self.tokens)
            own[position][:, keys] += row
        while len(own) > self.window:
            del own[min(own)]

    def received(self) -> torch.Tensor:
        """float64 ``[batch, places, tokens]``: the sum over the rows, and over the heads of a place."""
        total = torch.zeros(len(self.rows), self.places, self.tokens, dtype=torch.float64)
        for b, own in enumerate(self.rows):
            for row in own.values():
                total[b, :, : row.shape[-1]] += row
        return total
