"""Further statistics of attention rows: attention received per token, entropy, mass on the first token (sink)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attnpatch.errors import CaptureError

MEASURES = ("received", "entropy", "sink")


@dataclasses.dataclass(frozen=True)
class TileRows:
    """What the rows of a tile are.

    Attributes:
        weights: float64 ``[rows]``: how many rows each row stands for; 0 to ignore it (its values are never read).
        positions: int64 ``[rows]``: positions in the sequence of queries.
        first: Position of the first key (above 0 with a sliding cache).
        start: Position of the first real token of the keys' sequence.
    """

    weights: torch.Tensor
    positions: torch.Tensor
    first: int
    start: int


class Statistics:
    """Statistics of the rows of one site over one batch of sequences. An observer adds tiles to them."""

    def grown(self, tokens: int) -> Any:
        """A copy for a sequence that has grown to ``tokens`` tokens."""
        raise NotImplementedError

    def of_rows(self, order: list[int]) -> Any:
        """A copy for the batch rows in ``order``."""
        raise NotImplementedError

    def add(
        self, b: int, heads: list[int], tile: torch.Tensor, factors: torch.Tensor, rows: TileRows
    ) -> None:
        """Add rows of one sequence.

        Args:
            b: The number of the sequence.
            heads: The numbers of the heads.
            tile: ``[heads, rows, keys]``: unnormalised probabilities.
            factors: ``[heads, rows]``: factors that normalise them.
            rows: What the rows are.
        """
        raise NotImplementedError


@dataclasses.dataclass
class Measures(Statistics):
    """Sums over the query rows of one site; all float64.

    Attributes:
        names: Which of ``MEASURES``.
        received: ``[batch, 1 or kept heads, tokens]``: attention that each token receives, summed over rows, and over
            heads if none is kept separate.
        entropy: ``[batch, heads]``: entropy of the rows, in nats.
        sink: ``[batch, heads]``: mass on the first token of the sequence.
        rows: ``[batch]``: number of rows.
        apart: Numbers of the heads that are kept separate; ``None`` if none is.
    """

    names: tuple[str, ...]
    received: torch.Tensor
    entropy: torch.Tensor
    sink: torch.Tensor
    rows: torch.Tensor
    apart: tuple[int, ...] | None = None

    @classmethod
    def empty(
        cls, names: Sequence[str], batch: int, num_heads: int, tokens: int, apart: Sequence[int] | None = None
    ) -> Measures:
        """Zeros; ``apart``: the heads that are kept separate."""
        places = 1 if apart is None else len(apart)
        sizes = ((batch, places, tokens), (batch, num_heads), (batch, num_heads), (batch,))
        zeros = (torch.zeros(size, dtype=torch.float64) for size in sizes)
        return cls(tuple(names), *zeros, apart=None if apart is None else tuple(apart))

    def grown(self, tokens: int) -> Measures:
        more = max(0, tokens - self.received.shape[-1])
        received = torch.nn.functional.pad(self.received, (0, more))
        parts = (self.entropy.clone(), self.sink.clone(), self.rows.clone())
        return Measures(self.names, received, *parts, apart=self.apart)

    def of_rows(self, order: list[int]) -> Measures:
        parts = (getattr(self, name)[order] for name in ("received", "entropy", "sink", "rows"))
        return Measures(self.names, *parts, apart=self.apart)

    def plus(self, more: Measures) -> Measures:
        """The sum of both; ``more`` belongs to the same sequence and has at least as many tokens."""
        old = self.grown(more.received.shape[-1])
        pairs = [
            (getattr(old, name), getattr(more, name)) for name in ("received", "entropy", "sink", "rows")
        ]
        return Measures(self.names, *(a + b for a, b in pairs), apart=self.apart)

    def add(
        self, b: int, heads: list[int], tile: torch.Tensor, factors: torch.Tensor, rows: TileRows
    ) -> None:
        names, first, start = self.names, rows.first, rows.start
        kept = (rows.weights > 0).nonzero().flatten()
        if not len(kept):
            return
        at = kept.to(tile.device)
        tile, factors = tile[:, at].float(), factors[:, at].float()
        weight = rows.weights[kept].to(tile.device, torch.float32)
        place = torch.tensor(heads)
        if "received" in names:
            self._receive(b, heads, tile, factors * weight, first)
        if "sink" in names and first <= start < first + tile.shape[-1]:
            mass = (tile[..., start - first] * factors * weight).sum(-1)
            self.sink[b].index_add_(0, place, mass.cpu().double())
        if "entropy" in names:
            # -sum p log p of p = f t: with sum p = 1 it is -log f - f sum t log t.
            logs = torch.special.xlogy(tile, tile).sum(-1)
            mass = tile.sum(-1) * factors
            entropy = -(torch.special.xlogy(mass, factors) + factors * logs)
            self.entropy[b].index_add_(0, place, (entropy * weight).sum(-1).cpu().double())
        if 0 in heads:
            self.rows[b] += rows.weights[kept].sum()

    def _receive(
        self, b: int, heads: list[int], tile: torch.Tensor, factors: torch.Tensor, first: int
    ) -> None:
        """Add the attention that keys receive from rows; ``factors`` are per head and row."""
        keys = slice(first, first + tile.shape[-1])
        if self.apart is None:
            summed = factors.reshape(1, -1) @ tile.reshape(-1, tile.shape[-1])
            self.received[b, 0, keys] += summed[0].cpu().double()
            return
        summed = torch.bmm(factors.unsqueeze(1), tile)[:, 0].cpu().double()
        for place, head in enumerate(self.apart):
            if head in heads:
                self.received[b, place, keys] += summed[heads.index(head)]


def checked_measures(names: Any) -> tuple[str, ...]:
    """Names of measures, each once.

    Raises:
        CaptureError: There is no such measure.
    """
    listed = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    unknown = [name for name in listed if not isinstance(name, str) or name not in MEASURES]
    if unknown:
        raise CaptureError(
            f"measures={unknown!r} is not accepted; give some of {', '.join(map(repr, MEASURES))}"
        )
    return tuple(dict.fromkeys(listed))
