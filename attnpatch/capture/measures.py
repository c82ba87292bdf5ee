"""What else the rows of attention show while they pass: attention received per token, entropy, sink mass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.errors import CaptureError

MEASURES = ("received", "entropy", "sink")


@dataclasses.dataclass
class Measures:
    """Sums over the query rows of one site; all float64.

    Attributes:
        received: ``[batch, tokens]``, attention that each token receives, over heads and rows.
        entropy: ``[batch, heads]``, of the rows, in nats.
        sink: ``[batch, heads]``, mass on the first token of the sequence.
        rows: ``[batch]``, how many.
    """

    received: torch.Tensor
    entropy: torch.Tensor
    sink: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def empty(cls, batch: int, num_heads: int, tokens: int) -> Measures:
        sizes = ((batch, tokens), (batch, num_heads), (batch, num_heads), (batch,))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def grown(self, tokens: int) -> Measures:
        """A copy for a sequence that has so many tokens by now."""
        more = max(0, tokens - self.received.shape[1])
        received = torch.nn.functional.pad(self.received, (0, more))
        return Measures(received, self.entropy.clone(), self.sink.clone(), self.rows.clone())

    def add(
        self,
        names: Sequence[str],
        b: int,
        heads: list[int],
        tile: torch.Tensor,
        factors: torch.Tensor,
        rows: torch.Tensor,
        first: int,
        start: int,
    ) -> None:
        """Add rows of one sequence.

        Args:
            names: Which of ``MEASURES``.
            b: The sequence.
            heads: Their numbers.
            tile: ``[heads, rows, keys]``, probabilities but for ``factors``.
            factors: ``[heads, rows]``.
            rows: float64 ``[rows]``, how many rows each stands for; 0: none (its values are never looked at).
            first: Place of the first key in the sequence, which a sliding cache moves on.
            start: Place of the sequence's first token.
        """
        kept = (rows > 0).nonzero().flatten()
        if not len(kept):
            return
        at = kept.to(tile.device)
        tile, factors = tile[:, at].float(), factors[:, at].float()
        weight = rows[kept].to(tile.device, torch.float32)
        place = torch.tensor(heads)
        if "received" in names:
            summed = (factors * weight).reshape(1, -1) @ tile.reshape(-1, tile.shape[-1])
            self.received[b, first : first + tile.shape[-1]] += summed[0].cpu().double()
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
            self.rows[b] += rows[kept].sum()


def checked_measures(names: Any) -> tuple[str, ...]:
    """Names of measures, each once.

    Raises:
        CaptureError: There is no such measure.
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in listed if name not in MEASURES]
    if unknown:
        raise CaptureError(
            f"measures={unknown!r} is not accepted; give some of {', '.join(map(repr, MEASURES))}"
        )
    return tuple(dict.fromkeys(listed))
