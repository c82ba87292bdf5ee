"""BlockMap: which block attends to which, with labels; saved without pickle."""

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
from attnpatch.maps import io, meaning
from attnpatch.maps.fields import Labels, checked_fields, is_signed, over_rows
from attnpatch.maps.selecting import Selecting
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

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
    def num_sequences(self) -> int:
        """Number of sequences in the map."""
        return self.mass.shape[0] if self.is_batch else 1

    @property
    def is_batch(self) -> bool:
        """Whether the fields have a batch dimension."""
        return self.mass.ndim == 4 + (self.heads != "mean") + bool(self.steps)

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
            CaptureError: The map is weighted by gradients or has negative weights: its rows have no fixed sum.
        """
        if self.is_signed:
            raise CaptureError(f"unassigned_mass needs probabilities, and {meaning.why_signed(self)}")
        rest = (1 - self.mass.double().sum(-1)).float()
        return rest.masked_fill(over_rows(self.query_sizes == 0, rest), 0)

    @property
    def missing_mass(self) -> Tensor:
        """The old name of ``unassigned_mass``; deprecated."""
        warnings.warn("BlockMap.missing_mass is now called unassigned_mass", DeprecationWarning, stacklevel=2)
        return self.unassigned_mass

    def normalize(self, normalization: str) -> "BlockMap":
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

    def to_numpy(self) -> np.ndarray:
        """``values``, float32: layers x [heads x] query blocks x key blocks, batch first if there is one."""
        return self.values.numpy().copy()

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell, in pandas' long form.

        Columns: ``sequence`` (if there are several), ``step`` (if kept separate), ``layer``, ``head`` (if kept
        separate), ``query`` and ``key`` (positions of the blocks), ``query_label``, ``key_label``, ``mass``, and
        ``value`` if the map is normalised.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from attnpatch.maps import dataframe

        return dataframe.long_form(self)

    def plot(
        self,
        path: str | os.PathLike | None = None,
        layer: Any = "mean",
        head: int | Literal["mean"] = "mean",
        title: str | None = None,
        sequence: int = 0,
        scale: Literal["sqrt", "linear"] = "sqrt",
        step: Any = "mean",
    ) -> "Figure | Path":
        """Draw the map with its block labels and a colour bar.

        Args:
            path: File to write, ``.png``, ``.svg`` or ``.pdf``. ``None`` returns the figure.
            layer, head, sequence, step: As in ``select``.
            title: Title of the picture; by default model, layer and head.
            scale: Colour scale. ``"sqrt"`` gives small masses more of the colours, so that one dominant block (often
                the first) does not hide the others; ``"linear"`` is proportional.

        Returns:
            The path; without a path, a matplotlib ``Figure``.

        Raises:
            CaptureError: No such layer, head or sequence, or an unknown file suffix or scale.
            MissingExtraError: matplotlib is not installed.
        """
        one = self.select(layer=layer, head=head, sequence=sequence, step=step)
        for what, found in (("layer", one.layers), ("step", one.steps or (0,))):
            if len(found) != 1:
                raise CaptureError(f"{len(found)} {what}s in one picture; give one {what} or 'mean'.")
        if title is None:
            title = meaning.title(self, one, layer, sequence)
        values = one.to_numpy().reshape(one.mass.shape[-2:])
        errors = None if self.normalization != "none" else one.error if one.spread is None else one.spread
        figure = map_figure.draw(
            values,
            query_labels=cast("Sequence[str]", one.query_labels),  # of one sequence
            key_labels=cast("Sequence[str]", one.key_labels),
            title=title,
            colour_label=meaning.meaning(self),
            scale=scale,
            errors=None if errors is None else errors.reshape(values.shape).numpy(),
            errors_are="standard error" if one.spread is None else "spread",
            is_signed=self.is_signed,
        )
        return map_figure.write(figure, path)

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
    def load(cls, path: str | os.PathLike) -> "BlockMap":
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
