"""What each head attends to in a sequence whose tokens are known: the sums behind ``attnpatch.heads``."""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.recording.statistics import Statistics, TileRows

SCORES = ("retrieval", "induction", "previous", "sink", "local")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which keys count for which rows of one sequence.

    Attributes:
        ids: int64 ``[tokens]``.
        induction: int64 ``[tokens]``: for each row the key that an induction head attends to; -1 for none.
        needle: First token of the fact, and one past its last.
        answers: Bool ``[tokens]``: rows whose next token is a token of the answer.
        local: Number of keys, the row's own included, that are near.
    """

    ids: torch.Tensor
    induction: torch.Tensor
    needle: tuple[int, int]
    answers: torch.Tensor
    local: int


@dataclasses.dataclass
class HeadSums(Statistics):
    """Sums over the rows of one sequence, for each score and head.

    Attributes:
        wanted: Which keys count.
        sums: float64 ``[scores, heads]``, in the order of ``SCORES``.
        counts: float64 ``[scores, heads]``: number of rows.
        later: float64 ``[heads]``: attention to tokens after the row's own.
    """

    wanted: Wanted
    sums: torch.Tensor
    counts: torch.Tensor
    later: torch.Tensor

    @classmethod
    def empty(cls, wanted: Wanted, num_heads: int) -> HeadSums:
        zeros = torch.zeros(len(SCORES), num_heads, dtype=torch.float64)
        return cls(wanted, zeros, zeros.clone(), zeros[0].clone())

    def grown(self, tokens: int) -> HeadSums:
        return dataclasses.replace(
            self, sums=self.sums.clone(), counts=self.counts.clone(), later=self.later.clone()
        )

    def of_rows(self, order: list[int]) -> HeadSums:
        return self

    def add(
        self, b: int, heads: list[int], tile: torch.Tensor, factors: torch.Tensor, rows: TileRows
    ) -> None:
        at, keys, wanted = rows.positions, torch.arange(tile.shape[-1]), self.wanted
        place = torch.tensor(heads)

        def total(chosen: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
            """``[heads]``: the mass of some rows on one key of each list; keys that the tile lacks have none."""
            found = torch.zeros(len(heads), dtype=torch.float64)
            for target in targets:
                has_one = chosen & (target >= 0) & (target < len(keys))
                row = has_one.nonzero().flatten()
                mass = tile[:, row.to(tile.device), target[row].to(tile.device)].float()
                found += (mass * factors[:, row.to(tile.device)].float()).sum(-1).cpu().double()
            return found

        def add(name: str, chosen: torch.Tensor, values: torch.Tensor) -> None:
            number = SCORES.index(name)
            self.sums[number].index_add_(0, place, values)
            self.counts[number].index_add_(0, place, chosen.sum().double().expand(len(heads)))

        later = tile.masked_fill((keys <= at[:, None]).to(tile.device), 0.0).float()
        self.later.index_add_(0, place, (later.sum(-1) * factors.float()).sum(-1).cpu().double())
        add("previous", at >= 1, total(at >= 1, [at - 1]))
        add("sink", at >= 1, total(at >= 1, [torch.full_like(at, rows.start)]))
        is_far = at >= wanted.local
        add("local", is_far, total(is_far, [at - back for back in range(wanted.local)]))
        induced = wanted.induction[at]
        add("induction", induced >= 0, total(induced >= 0, [induced]))
        answers = wanted.answers[at]
        add("retrieval", answers, self._copied(tile, at, answers))

    def _copied(self, tile: torch.Tensor, at: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """float64 ``[heads]``: rows whose strongest key is, inside the fact, the token that comes next."""
        row = answers.nonzero().flatten()
        strongest = tile[:, row.to(tile.device)].argmax(-1).cpu()
        start, stop = self.wanted.needle
        inside = (strongest >= start) & (strongest < stop)
        is_next = self.wanted.ids[strongest] == self.wanted.ids[at[row] + 1]
        return (inside & is_next).sum(-1).double()
