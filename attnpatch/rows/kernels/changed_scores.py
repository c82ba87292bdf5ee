"""Scores that a function of a score and its place has changed (``score_mod`` of FlexAttention), a tile at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attnpatch import compat
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Dim, Tile, leaves, size_of
from attnpatch.rows.graph.nodes import Context, Node

# ``change(score, batch, head, query, key)``: scalars.
Change = Callable[..., torch.Tensor]


def of_places(change: Change, scores: torch.Tensor, places: Sequence[torch.Tensor]) -> torch.Tensor:
    """``change`` of each score.

    Args:
        change: The function, written for scalars; ``vmap`` runs it on all of them.
        scores: ``[batch, heads, rows, keys]``.
        places: int64, the numbers of these batches, heads, rows and keys.
    """
    mapped = change
    for dim in (4, 3, 2, 1):
        mapped = torch.vmap(mapped, in_dims=tuple(0 if i in (0, dim) else None for i in range(5)))
    return mapped(scores, *(place.to(scores.device) for place in places))


class ChangedScores(Node):
    """Scores ``[batch, heads, rows, keys]`` after a function of each score and its place."""

    def __init__(self, scores: Node, change: Change) -> None:
        self.children, self.change = (scores,), change
        self.dims, self.dtype, self.device = scores.dims, scores.dtype, scores.device
        self.context = Context(self.device)

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        scores = run.value(self.children[0], tile)
        with self.context.enter(), compat.DisableTorchFunction():
            return of_places(self.change, scores, [_places(dim, tile) for dim in self.dims])


def _places(dim: Dim, tile: Tile) -> torch.Tensor:
    """The numbers of the elements of a dimension that lie in a tile."""
    parts = leaves(dim)
    numbers = torch.arange(size_of(dim)).reshape([part.size for part in parts])
    for position, part in enumerate(parts):
        low, high = tile.get(part, (0, part.size))
        numbers = numbers.narrow(position, low, high - low)
    return numbers.reshape(-1)


def changed(scores: torch.Tensor, change: Change, site: AttentionCall | None) -> torch.Tensor:
    """Scores after ``change``; deferred if the scores are, and if ``change`` reads nothing that needs a gradient.

    Gradients of tiles reach the inputs of a graph, and what a function reads elsewhere is none of them.
    """
    if isinstance(scores, DeferredTensor) and not scores.handle.is_computed and site is not None:
        one = [torch.zeros(1, dtype=torch.int64)] * 4
        probe = of_places(change, scores.new_zeros((1, 1, 1, 1)).detach(), one)
        if probe.requires_grad:
            scores = scores.handle.materialize("a score function that reads a tensor which needs a gradient")
        else:
            return wrap(ChangedScores(scores.handle.node, change), site)
    return of_places(change, scores, [torch.arange(size) for size in scores.shape])
