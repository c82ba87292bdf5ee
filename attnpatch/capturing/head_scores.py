"""``HeadScores``: a number for each head and score."""

from __future__ import annotations

import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from attnpatch.errors import CaptureError, MissingExtraError
from attnpatch.maps.dataframe import load_pandas
from attnpatch.plotting import map_figure
from attnpatch.plotting.text_table import aligned
from attnpatch.recording.text.head_sums import SCORES

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# How a score that was not measured can be.
_WAYS = {
    "retrieval": "Probes.needles or Probes.conversations",
    "induction": "Probes.repeated",
    "local": "sequences with more than `local` tokens",
}


class Head(NamedTuple):
    """One head: its layer, its number in the layer, and its score."""

    layer: int
    head: int
    score: float


class HeadScores:
    """Scores of heads, a mapping from the names of scores to tensors.

    ``scores["retrieval"]`` is float32 ``[layers, heads]``, NaN where a layer has fewer heads than others. Scores that no
    sequence measures are missing.

    Args:
        scores: The tensors.
        layers: The number of each layer, the model's own.
        left_out: Attention modules without scores, each with the fact that is not known.
    """

    def __init__(self, scores: dict[str, torch.Tensor], layers: list[int], left_out: dict[str, str]) -> None:
        self._scores, self.layers, self.left_out = scores, layers, left_out

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._scores:
            return self._scores[name]
        if name in SCORES:
            raise CaptureError(f"no sequence measures {name!r}; add {_WAYS.get(name, 'longer sequences')}")
        raise CaptureError(f"there is no score {name!r}; there are {', '.join(map(repr, SCORES))}")

    def __len__(self) -> int:
        return len(self._scores)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def keys(self) -> list[str]:
        """The names of the scores that were measured."""
        return list(self._scores)

    def top(self, name: str, k: int = 5) -> list[Head]:
        """The ``k`` heads with the highest score, or all if there are fewer.

        Raises:
            CaptureError: The score was not measured, or ``k`` is no whole number of at least 1.
        """
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise CaptureError(f"k={k!r} is not accepted; give a number of heads, 1 or more")
        values = self[name].nan_to_num(nan=-1.0)
        order = values.flatten().argsort(descending=True, stable=True)[: int((values >= 0).sum())]
        width = values.shape[1]
        return [
            Head(self.layers[place // width], place % width, float(values.flatten()[place]))
            for place in order[:k].tolist()
        ]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per head, with a column per score.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        first = next(iter(self._scores.values()))
        places = [(i, head) for i in range(len(first)) for head in range(first.shape[1])]
        places = [
            (i, head) for i, head in places if not all(s[i, head].isnan() for s in self._scores.values())
        ]
        columns: dict[str, list] = {
            "layer": [self.layers[i] for i, _ in places],
            "head": [head for _, head in places],
        }
        columns |= {name: [float(s[place]) for place in places] for name, s in self._scores.items()}
        return load_pandas().DataFrame(columns)

    def plot(self, path: str | os.PathLike | None = None) -> Figure | Path:
        """Draw a heat map of heads for each score: a row per layer, a column per head.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf`` to write; when left out the figure is returned.

        Raises:
            MissingExtraError: matplotlib is not installed.
            CaptureError: The suffix is another one.
        """
        from attnpatch.plotting import head_grid

        values = {name: score.numpy() for name, score in self._scores.items()}
        return map_figure.write(head_grid.draw(values, self.layers), path)

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; without matplotlib None, and the notebook shows the text."""
        try:
            return map_figure.to_png(cast("Figure", self.plot()))
        except MissingExtraError:
            return None

    def __repr__(self) -> str:
        heads = sum(int((~score.isnan()).sum()) for score in list(self._scores.values())[:1])
        lines = [f"HeadScores({len(self.layers)} layers, {heads} heads; strongest as layer.head)"]
        rows = [
            [name, *(f"{one.layer}.{one.head} {one.score:.2f}" for one in self.top(name))] for name in self
        ]
        width = max(map(len, rows))
        lines += [f"  {line}" for line in aligned([row + [""] * (width - len(row)) for row in rows], ())]
        return "\n".join([*lines, *(f"  left out: {name}: {why}" for name, why in self.left_out.items())])
