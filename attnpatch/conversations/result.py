"""The result of one conversation's analysis: the block map, further measures, time and memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnpatch.conversations import drawing
from attnpatch.errors import AnalysisError, BlockMapFileError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import own_columns, shortened
from attnpatch.maps.meaning import meaning, numbers_of, why_signed
from attnpatch.maps.ranking import Ranking
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURED = ("received", "entropy", "sink")


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """The result of one conversation's analysis.

    Attributes:
        block_map: Which message (or other block) attends to which, in every layer. Its ``metadata`` has ``texts`` (the
            text of each block), ``method``, ``template`` and others.
        received: float32 ``[layers, (heads,) tokens]``, the attention that each token receives, summed over query
            tokens and averaged over heads unless they are kept separate; or ``None``.
        entropy: float32 ``[layers, heads]``, entropy of attention rows in nats, mean over query tokens; or ``None``.
        sink: float32 ``[layers, heads]``, mean mass on the first token; or ``None``.
        seconds: Time of the model's passes.
        peak_bytes: Memory of the passes, beyond what was held before.
        memory: Samples over the run: seconds and bytes.
        notes: One line for each thing that a reader may not expect.
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
        """The same result with another normalisation of the map; see ``BlockMap.normalize``."""
        return replace(self, block_map=self.block_map.normalize(normalization))

    @property
    def texts(self) -> list[str]:
        """The text of each block."""
        return list(self.block_map.metadata.get("texts", ()))

    def top(self, n: int = 10, query: int | str = -1, own: bool = False) -> Ranking:
        """What a block attends to most, as a table; see ``BlockMap.top``."""
        return self.block_map.top(n, query, own)

    def __str__(self) -> str:
        """What the last block attends to, and what a reader may not expect."""
        facts, one = self.block_map.metadata, self.block_map
        how = f"{facts.get('model', 'a model')}, {facts.get('method', 'one pass')}: {len(one.query_labels)} blocks"
        lines = [f"{how}, {len(one)} layers, {self.seconds:.1f} s", meaning(one), str(self.top(5))]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def lookback(self) -> Tensor:
        """The lookback ratio (Chuang et al. 2024) of blocks: the share of attention on earlier blocks.

        Returns:
            float32 ``[layers, (heads,) blocks]``: mass on earlier blocks / (mass on earlier blocks + mass on the block
            itself). NaN where both are 0.

        Raises:
            AnalysisError: Query and key blocks differ, or the map is of gradients.
        """
        mass = self._square("lookback").double()
        own = mass.diagonal(dim1=-2, dim2=-1)
        before = mass.tril(-1).sum(-1)
        return (before / (before + own)).float()

    def rollout(self, residual: float = 0.5) -> Tensor:
        """Attention rollout (Abnar and Zuidema 2020) over blocks.

        It is approximate, because blocks are averaged before layers are multiplied. It multiplies all layers of the model,
        so the map must have all of them.

        Args:
            residual: Share of a layer's output that comes from the residual connection, from 0 to 1.

        Returns:
            float32 ``[blocks, blocks]``: how much of block I in the last layer comes from block J of the input. Rows
            sum to 1.

        Raises:
            AnalysisError: Query and key blocks differ, the map is of gradients, it lacks layers of the model or rows of its
                blocks, or ``residual`` is not from 0 to 1.
        """
        if isinstance(residual, bool) or not isinstance(residual, Real) or not 0 <= residual <= 1:
            raise AnalysisError(f"residual={residual!r} is not accepted; give a share from 0 to 1")
        mass = self._square("rollout").double()
        self._check_all_layers()
        if self.block_map.heads != "mean":
            mass = mass.mean(-3)
        own = torch.eye(mass.shape[-1], dtype=torch.float64)
        has_tokens = self.block_map.query_sizes > 0
        if bool((mass.sum(-1)[:, has_tokens] == 0).any()):
            raise AnalysisError(
                "rollout needs the rows of all blocks, and this map has some of the steps only; capture with steps='mean'"
            )
        rolled = own
        for layer in mass:
            total = layer.sum(-1, keepdim=True)
            shares = torch.where(total > 0, layer / total, own)
            rolled = (residual * own + (1 - residual) * shares) @ rolled
        return rolled.float()

    def _check_all_layers(self) -> None:
        """Check that the map has every layer of the model, in order.

        Raises:
            AnalysisError: It has not.
        """
        layers = self.block_map.layers
        known = self.block_map.metadata.get("num_layers")
        if known is None:
            raise AnalysisError(
                "rollout multiplies all layers of a model, and this map does not say how many there are (a mean of several "
                "conversations, or weights with layers=); take a map of one conversation with layers='all'"
            )
        if layers != tuple(range(known)):
            raise AnalysisError(
                f"rollout multiplies all layers of a model, and this map has {shortened(layers)} of {known} layers; capture "
                "with layers='all', and a model in which every layer has attention"
            )

    def plot(self, path: str | os.PathLike | None = None, **options: Any) -> Figure | Path:
        """The block map as a picture; see ``BlockMap.plot``."""
        return self.block_map.plot(path, **options)

    def plot_layers(self, path: str | os.PathLike | None = None, most: int = 16) -> Figure | Path:
        """Small maps of the layers side by side, on one scale.

        Args:
            path: File to write, ``.png``, ``.svg`` or ``.pdf``. ``None`` returns the figure.
            most: The largest number of layers to draw; they are evenly spaced and include the first and the last.
        """
        return map_figure.write(drawing.layers(self.block_map, most), path)

    def plot_row(self, row: int | str, path: str | os.PathLike | None = None) -> Figure | Path:
        """What one block attends to, in every layer.

        Args:
            row: Number or label of the query block.
            path: As in ``plot_layers``.

        Raises:
            AnalysisError: There is no such block.
        """
        return map_figure.write(drawing.row(self.block_map, self._row(row)), path)

    def plot_memory(self, path: str | os.PathLike | None = None) -> Figure | Path:
        """Memory over the time of the run.

        Args:
            path: As in ``plot_layers``.

        Raises:
            AnalysisError: The run was too short to be measured.
        """
        if len(self.memory) < 2:
            raise AnalysisError("the run was too short for a curve of its memory")
        return map_figure.write(drawing.memory(self.memory), path)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file atomically; ``BlockMap.load`` can read it too.

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
        """Read a file that ``save`` wrote.

        Raises:
            BlockMapFileError: The file is missing or damaged, or is a block map without an analysis.
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
        if self.block_map.is_signed or numbers_of(self.block_map) is not None:
            raise AnalysisError(f"{what} needs probabilities, and {why_signed(self.block_map)}")
        one = self.block_map.select(step="mean")
        mass = one.mass if not one.steps else one.mass[0]
        if own_columns(one) != [*range(len(one.key_labels))]:
            raise AnalysisError(f"{what} needs a map whose query and key blocks are the same")
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
