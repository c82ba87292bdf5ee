"""What the analysis of one conversation found: the block map, what else was measured, and what it took."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnpatch.conversations import drawing
from attnpatch.errors import AnalysisError, BlockMapFileError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURED = ("received", "entropy", "sink")


@dataclass(frozen=True, eq=False)
class Analysis:
    """One conversation.

    Attributes:
        block_map: Which message (or other block) attends to which, in every layer; its ``metadata`` holds ``texts`` (what
            each block says), ``method``, ``template`` and the like.
        received: float32 ``[layers, (heads,) tokens]``, attention each token receives (summed over query tokens, mean
            over heads unless they are kept apart), or ``None``.
        entropy: float32 ``[layers, heads]``, of attention rows in nats, mean over query tokens, or ``None``.
        sink: float32 ``[layers, heads]``, mean mass on the first token, or ``None``.
        seconds: The model's passes took.
        peak_bytes: Memory they took beyond what was held before.
        memory: Seconds and bytes over the run.
        notes: One line for each thing that is not as one would expect.
    """

    block_map: BlockMap
    received: Tensor | None = None
    entropy: Tensor | None = None
    sink: Tensor | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    memory: Sequence[tuple[float, int]] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def normalize(self, normalization: str) -> Analysis:
        """The same under another normalisation of the map; see ``BlockMap.normalize``."""
        return replace(self, block_map=self.block_map.normalize(normalization))

    @property
    def texts(self) -> list[str]:
        """What each block says."""
        return list(self.block_map.metadata.get("texts", ()))

    def lookback(self) -> Tensor:
        """How much of each block's attention goes to what came before it, and not to itself.

        Returns:
            float32 ``[layers, (heads,) blocks]``: mass on earlier blocks / (that + mass on the block itself), the lookback
            ratio of Chuang et al. 2024 for blocks. NaN where there is neither.

        Raises:
            AnalysisError: Query and key blocks differ, or the map is of gradients.
        """
        mass = self._square("lookback").double()
        own = mass.diagonal(dim1=-2, dim2=-1)
        before = mass.tril(-1).sum(-1)
        return (before / (before + own)).float()

    def rollout(self, residual: float = 0.5) -> Tensor:
        """Attention rollout (Abnar and Zuidema 2020) over blocks: APPROXIMATE, since blocks are averaged before layers
        are multiplied, and only as good as the captured layers are all of them.

        Args:
            residual: Share of a layer's output that passes attention by.

        Returns:
            float32 ``[blocks, blocks]``: how much of block I in the last layer comes from block J of the input; rows sum
            to 1.

        Raises:
            AnalysisError: Query and key blocks differ, or the map is of gradients.
        """
        mass = self._square("rollout").double()
        if self.block_map.heads != "mean":
            mass = mass.mean(-3)
        rolled = torch.eye(mass.shape[-1], dtype=torch.float64)
        for layer in mass:
            total = layer.sum(-1, keepdim=True)
            shares = torch.where(total > 0, layer / total, torch.eye(len(layer), dtype=torch.float64))
            rolled = (
                residual * torch.eye(len(layer), dtype=torch.float64) + (1 - residual) * shares
            ) @ rolled
        return rolled.float()

    def plot(self, path: str | os.PathLike | None = None, **options: Any) -> Figure | Path:
        """The block map as a picture; see ``BlockMap.plot``."""
        return self.block_map.plot(path, **options)

    def plot_layers(self, path: str | os.PathLike | None = None, most: int = 16) -> Figure | Path:
        """Small maps of the layers side by side, on one scale.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf``; when left out the figure is returned.
            most: Layers that are drawn, evenly spread, the first and the last among them.
        """
        return map_figure.write(drawing.layers(self.block_map, most), path)

    def plot_row(self, row: int | str, path: str | os.PathLike | None = None) -> Figure | Path:
        """Where one block looks, in every layer.

        Args:
            row: Number or label of the query block.
            path: As above.

        Raises:
            AnalysisError: There is no such block.
        """
        return map_figure.write(drawing.row(self.block_map, self._row(row)), path)

    def plot_memory(self, path: str | os.PathLike | None = None) -> Figure | Path:
        """Memory over the time of the run.

        Raises:
            AnalysisError: The run was too short to be measured.
        """
        if len(self.memory) < 2:
            raise AnalysisError("the run was too short for a curve of its memory")
        return map_figure.write(drawing.memory(self.memory), path)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file, which ``BlockMap.load`` reads too; whole or not at all.

        Raises:
            BlockMapFileError: The file cannot be written.
        """
        tensors, content = self.block_map.content()
        measured = {name: getattr(self, name) for name in _MEASURED}
        tensors |= {name: each.contiguous() for name, each in measured.items() if each is not None}
        more = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "memory": list(self.memory)}
        return io.write(Path(path), tensors, {**content, "analysis": {**more, "notes": list(self.notes)}})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Analysis:
        """Read what ``save`` wrote.

        Raises:
            BlockMapFileError: The file is missing, damaged, or a block map without an analysis.
        """
        content = io.read(Path(path))
        if "analysis" not in content:
            raise BlockMapFileError(f"{path} is a block map only; read it with BlockMap.load.")
        more = content["analysis"]
        known = {f.name for f in fields(cls)}
        facts = {name: value for name, value in more.items() if name in known}
        facts["memory"] = [(float(at), int(held)) for at, held in facts.get("memory", ())]
        return cls(BlockMap.load(path), **{name: content.get(name) for name in _MEASURED}, **facts)

    def _square(self, what: str) -> Tensor:
        if self.block_map.is_signed:
            raise AnalysisError(f"{what} is of probabilities, and this map is weighted by gradients")
        one = self.block_map.select(step="mean")
        mass = one.mass if not one.steps else one.mass[0]
        if one.query_labels != one.key_labels:
            raise AnalysisError("this is of maps whose query and key blocks are the same")
        return mass

    def _row(self, row: int | str) -> int:
        labels = self.block_map.query_labels
        if isinstance(row, str):
            found = [i for i, label in enumerate(labels) if label == row]
            if found:
                return found[0]
        elif -len(labels) <= row < len(labels):
            return row % len(labels)
        raise AnalysisError(
            f"there is no block {row!r}; there are 0 to {len(labels) - 1}: {', '.join(labels[:8])}"
        )
