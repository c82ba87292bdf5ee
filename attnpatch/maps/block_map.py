"""BlockMap: which block attends to which, with labels; saved without pickle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from attnpatch.errors import BlockMapFileError, CaptureError, MissingExtraError
from attnpatch.maps import arithmetic, io, meaning
from attnpatch.maps.fields import Labels, checked_fields, is_signed, over_rows
from attnpatch.maps.selecting import Selecting
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnpatch.blocks.spec import Blocks
    from attnpatch.maps.ranking import Ranking

_TENSORS = ("mass", "query_sizes", "key_sizes", "error", "spread")


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap(Selecting):
    """Attention mass between blocks of tokens, for every captured layer.

    With more than one sequence, every field has the batch as its first dimension; with one sequence it has none. If a
    sequence has fewer blocks than the longest, its missing blocks have mass 0, size 0 and no label
    (``select(sequence=...)`` removes them).

    Attributes:
        mass: ``[(batch,) (steps,) layers, (heads,) query_blocks, key_blocks]`` float32 on the CPU: the probability that
            a query token of block I puts on all tokens of block J, averaged over the query tokens of I. Weighted by
            gradients, it has signs (``is_signed``). ``normalization`` does not change it; ``values`` is normalised.
        layers: Number or name of each layer.
        query_labels: One label per query block; with several sequences, one tuple of labels per sequence.
        key_labels: The same for key blocks.
        query_sizes: ``[(batch,) query_blocks]`` int64, tokens per block.
        key_sizes: ``[(batch,) key_blocks]`` int64, tokens per block.
        heads: ``"mean"``, or the numbers of the heads that the map keeps separate.
        normalization: What ``values`` holds: ``"none"``, ``"row"``, ``"density"``, ``"column"``, ``"absolute row"`` or
            ``"absolute column"``; see ``normalize``.
        metadata: Facts about the capture (model, sequence length, ...), anything JSON can hold.
        steps: Number or name of each step (of a sampler or a generation) that the map keeps separate; empty if none.
        error: Standard error of ``mass``, same shape, if only a sample of the query rows was measured. NaN where only a
            single row of a longer block was measured. ``None``: every row was measured.
        spread: Standard deviation of ``mass``, same shape, over the maps that this one is the mean of. It says how much
            conversations differ, and does not shrink with their number. NaN for a single map. ``None``: not a mean.

    Raises:
        CaptureError: The fields do not fit together.
    """

    mass: Tensor
    layers: Sequence[int | str]
    query_labels: Labels
    key_labels: Labels
    query_sizes: Tensor
    key_sizes: Tensor
    heads: Literal["mean"] | Sequence[int] = "mean"
    normalization: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int | str] = ()
    error: Tensor | None = None
    spread: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)

    @property
    def is_signed(self) -> bool:
        """Whether the numbers may be negative, as those weighted by gradients."""
        return is_signed(self.mass, self.metadata)

    @property
    def is_of_gradient(self) -> bool:
        """Whether probabilities were multiplied by their gradients."""
        return self.metadata.get("weighting") == "gradient"

    @property
    def values(self) -> Tensor:
        """The normalised mass, shaped like ``mass``. 0 / 0 gives 0."""
        if self.normalization == "none":
            return self.mass
        if self.normalization == "density":
            sizes = self.key_sizes.clamp(min=1)
            between = (1,) * (self.mass.ndim - 1 - self.is_batch)
            return self.mass / sizes.view(*sizes.shape[:-1], *between, -1)
        mass = self.mass.abs() if self.normalization.startswith("absolute") else self.mass
        total = mass.sum(-1 if self.normalization.endswith("row") else -2, keepdim=True, dtype=torch.float64)
        return torch.where(total == 0, 0.0, self.mass / total).float()

    @property
    def unassigned_mass(self) -> Tensor:
        """Attention on learned sinks and on keys in no block: 1 - row sum of ``mass``.

        Returns:
            ``[(batch,) (steps,) layers, (heads,) query_blocks]`` float32; 0 for a query block without tokens.

        Raises:
            CaptureError: The map is weighted by gradients, has negative weights or was computed from other maps: its
                rows have no fixed sum.
        """
        if self.is_signed or meaning.numbers_of(self) is not None:
            raise CaptureError(f"unassigned_mass needs probabilities, and {meaning.why_signed(self)}")
        rest = (1 - self.mass.double().sum(-1)).float()
        return rest.masked_fill(over_rows(self.query_sizes == 0, rest), 0)

    @property
    def missing_mass(self) -> Tensor:
        """The old name of ``unassigned_mass``; deprecated."""
        warnings.warn("BlockMap.missing_mass is now called unassigned_mass", DeprecationWarning, stacklevel=2)
        return self.unassigned_mass

    def normalize(self, normalization: str) -> BlockMap:
        """The same map with another normalisation. The mass is kept, so any normalisation can follow any other.

        Args:
            normalization: ``"none"``: the mass itself. ``"row"``: every row sums to 1. ``"density"``: the mass divided
                by the number of tokens in the key block, so that long blocks do not dominate. ``"column"``: every
                column sums to 1 (a column of zeros stays zero). ``"absolute row"`` and ``"absolute column"``: the
                absolute values sum to 1. For numbers with signs, ``"row"`` and ``"column"`` become the absolute ones,
                because their sums may be near 0.

        Raises:
            CaptureError: The name is unknown.
        """
        return replace(self, normalization=normalization)

    def top(self, n: int = 10, query: int | str = -1, own: bool = False) -> Ranking:
        """What a block attends to most: the cells with the largest numbers (``values``), as a table.

        A pair of blocks is listed once, with the layer (and head and step) where its number is largest in absolute value.

        Args:
            n: Number of rows.
            query: Number or label of the query block; -1: the last one with tokens, such as an answer (negative numbers
                count from it). ``"all"``: every query block.
            own: Whether a block's attention to itself is listed.

        Returns:
            ``Ranking``, a sequence of ``Cell``: layer, query, key, text of the key block, mass. ``to_dataframe()`` makes
            a pandas table of it.

        Raises:
            CaptureError: There is no such block, or ``n`` is less than 1.
        """
        from attnpatch.maps import ranking

        return ranking.top(self, n, query, own)

    def __add__(self, other: BlockMap) -> BlockMap:
        """The sum of ``values``; as ``-``."""
        return arithmetic.combined(self, other, 1) if isinstance(other, BlockMap) else NotImplemented

    def __sub__(self, other: BlockMap) -> BlockMap:
        """The difference of ``values``: a map without normalisation whose numbers have signs.

        Raises:
            CaptureError: The maps differ in layers, heads, steps, blocks or normalisation. ``attnpatch.compare`` compares
                what two maps share.
        """
        return arithmetic.combined(self, other, -1) if isinstance(other, BlockMap) else NotImplemented

    def __mul__(self, factor: float) -> BlockMap:
        """A multiple of ``values``; as ``-``."""
        return (
            arithmetic.multiplied(self, factor)
            if isinstance(factor, (int, float, np.number))
            else NotImplemented
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> BlockMap:
        return (
            arithmetic.divided(self, divisor)
            if isinstance(divisor, (int, float, np.number))
            else NotImplemented
        )

    def __neg__(self) -> BlockMap:
        return self * -1

    def to_numpy(self) -> np.ndarray:
        """``values``, float32: layers x [heads x] query blocks x key blocks, batch first if there is one."""
        return self.values.numpy().copy()

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per cell, in pandas' long form.

        Columns: ``sequence`` (if there are several), ``step`` (if kept separate), ``layer``, ``head`` (if kept
        separate), ``query`` and ``key`` (positions of the blocks), ``query_label``, ``key_label``, ``mass``, and
        ``value`` if the map is normalised.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from attnpatch.maps import dataframe

        return dataframe.long_form(self)

    def to_xarray(self) -> xarray.DataArray:
        """``values`` as a labelled array: ``dims`` as in the map, labels as coordinates, ``metadata`` as attributes.

        In a batch, whose sequences have labels of their own, ``query`` and ``key`` are numbered, and the coordinates
        ``query_label`` and ``key_label`` have the labels.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        from attnpatch.maps import dataframe

        return dataframe.labelled_array(self)

    def plot(
        self,
        path: str | os.PathLike | None = None,
        layer: Any = "mean",
        head: int | Literal["mean"] = "mean",
        title: str | None = None,
        sequence: int = 0,
        scale: Literal["sqrt", "linear", "log"] = "sqrt",
        step: Any = "mean",
        ax: Axes | None = None,
    ) -> Figure | Path:
        """Draw the map with its block labels and a colour bar.

        Args:
            path: File to write, ``.png``, ``.svg`` or ``.pdf``. ``None`` returns the figure.
            layer, head, sequence, step: As in ``select``.
            title: Title of the picture; by default model, layer and head.
            scale: Colour scale. ``"sqrt"`` gives small masses more of the colours, so that one dominant block (often
                the first) does not hide the others; ``"linear"`` is proportional; ``"log"`` shows four powers of ten.
            ax: Axes of a figure of yours to draw into. ``None``: a new figure.

        Returns:
            The path; without a path, the matplotlib ``Figure`` (with ``ax``, that of the axes).

        Raises:
            CaptureError: No such layer, head or sequence, or an unknown file suffix or scale.
            MissingExtraError: matplotlib is not installed.
        """
        chosen = {"layer": layer, "head": head, "sequence": sequence, "step": step}
        from attnpatch.maps import picture

        return picture.drawn(self, chosen, title, scale, path, ax)

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; without matplotlib None, and the notebook shows the text."""
        try:
            return map_figure.to_png(cast("Figure", self.plot()))
        except MissingExtraError:
            return None

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file, with the labels as JSON in its header; no pickle.

        The file is written atomically: if saving fails, an existing file is kept.

        Raises:
            BlockMapFileError: The file cannot be written.
        """
        return io.write(Path(path), *self.content())

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save`` writes: the tensors, and the other fields as JSON can hold them."""
        found = {name: getattr(self, name) for name in _TENSORS}
        tensors = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
        return tensors, {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}

    @classmethod
    def load(cls, path: str | os.PathLike) -> BlockMap:
        """Read a file that ``save`` wrote.

        Raises:
            BlockMapFileError: The file is missing, truncated, incomplete, or has another format or version.
        """
        content = {
            "steps": (),
            "error": None,
            "spread": None,
            **io.read(Path(path)),
        }  # not in every file
        try:
            if content["spread"] is None and "spread" in content.get("metadata", ()):
                # Older files of merged maps have the spread in the field of the standard error.
                content.update(spread=content["error"], error=None)
            return cls(**{f.name: content[f.name] for f in fields(cls)})
        except KeyError as error:
            raise BlockMapFileError(f"{path} lacks {error}; {io.AGAIN}") from error
        except (ValueError, TypeError, CaptureError) as error:
            raise BlockMapFileError(f"{path} is damaged ({error}); {io.AGAIN}") from error

    @classmethod
    def from_attentions(
        cls,
        attentions: Any,
        blocks: Blocks | tuple[Blocks, Blocks],
        *,
        attention_mask: Tensor | None = None,
        heads: Literal["mean", "all"] = "mean",
        layers: Sequence[int | str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> BlockMap:
        """The block map of attention weights that you have already.

        Args:
            attentions: ``outputs.attentions`` of a model, or of ``generate``: tensors ``[batch, heads, queries, keys]``,
                one per layer, or one such tuple for each call. Rows sum to 1 over keys. Queries are the last tokens of
                the keys, unless ``blocks`` is a pair. Weights of beam search are those of changing beams: do not use them.
            blocks: What a block is; a pair for queries and keys if they differ (cross-attention).
            attention_mask: ``[batch, keys]``, 0 for padding, which is in no block. ``None``: no padding.
            heads: ``"mean"`` over heads, or ``"all"`` of them.
            layers: Numbers or names of the layers; ``None``: 0, 1, 2, ...
            metadata: Facts to keep with the map, anything JSON can hold.

        Raises:
            CaptureError: The weights are ``None``, no probabilities, or of another shape; the keys are not the tokens so
                far (a sliding window, a static cache); or the mask does not fit.
            BlockError: The blocks do not fit the tokens.
        """
        from attnpatch.maps import from_weights

        return cls(**from_weights.fields_of(attentions, blocks, attention_mask, heads, layers, metadata))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMap):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        are_tensors = [isinstance(a, Tensor) and isinstance(b, Tensor) for a, b in pairs]
        return all(
            torch.equal(a, b) if both else a is b or (type(a) is type(b) and a == b)
            for (a, b), both in zip(pairs, are_tensors, strict=True)
        )

    def __repr__(self) -> str:
        return meaning.described(self)
