"""BlockMap: which block attends to which, labelled, and saved without pickle."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from attnpatch.errors import BlockMapFileError, CaptureError, MissingExtraError
from attnpatch.maps import io, meaning
from attnpatch.maps.fields import Labels, checked_fields, is_signed, over_rows, position
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_TENSORS = ("mass", "query_sizes", "key_sizes", "error", "spread")


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """Attention mass between blocks of tokens, for every captured layer.

    The batch comes first in every field when there is more than one sequence, and is left out when there is
    one. Sequences with fewer blocks than the longest have zeros, size 0 and no label for the missing ones
    (``select(sequence=...)`` cuts them off).

    Attributes:
        mass: ``[(batch,) (steps,) layers, (heads,) query_blocks, key_blocks]`` float32 on the CPU: the probability a
            query token of block I puts on all tokens of block J, averaged over the query tokens of I; weighted
            by gradients it has signs (``is_signed``). Always this number, whatever ``normalization`` says; ``values`` is
            the normalised one.
        layers: Number or name of each layer.
        query_labels: One per query block; one tuple of them per sequence when there are several.
        key_labels: One per key block, likewise.
        query_sizes: ``[(batch,) query_blocks]`` int64, tokens per block.
        key_sizes: ``[(batch,) key_blocks]`` int64, tokens per block.
        heads: ``"mean"``, or the numbers of the heads that were kept apart.
        normalization: What ``values`` holds: ``"none"``, ``"row"``, ``"density"``, ``"column"``, ``"absolute row"`` or
            ``"absolute column"``; see ``normalize``.
        metadata: Facts about the capture (model, sequence length, ...), anything JSON can hold.
        steps: Number or name of each step that was kept apart (of a sampler, of a generation); empty without.
        error: Standard error of ``mass``, shaped like it, where a sample of the query rows was looked at; NaN where one
            row of several was. ``None``: all rows were.
        spread: Standard deviation of ``mass`` over the maps that this one is the mean of, shaped like it; how much
            conversations differ, which more of them do not make smaller. NaN of one map. ``None``: it is no mean.

    Raises:
        CaptureError: The fields do not fit each other.
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
        """Sequences in the map."""
        return self.mass.shape[0] if self.is_batch else 1

    @property
    def is_batch(self) -> bool:
        """Whether the batch is an axis of the fields."""
        return self.mass.ndim == 4 + (self.heads != "mean") + bool(self.steps)

    @property
    def is_signed(self) -> bool:
        """Whether the numbers have signs, as those weighted by gradients have."""
        return is_signed(self.mass, self.metadata)

    @property
    def values(self) -> Tensor:
        """The mass under ``normalization``; shaped like ``mass``. What cannot be divided (0 / 0) is 0."""
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
    def missing_mass(self) -> Tensor:
        """``[(batch,) (steps,) layers, (heads,) query_blocks]``: 1 - row sum of ``mass``.

        What learned sinks and keys outside every block took; 0 for a query block without tokens.

        Raises:
            CaptureError: The map is weighted by gradients, whose rows sum to nothing in particular.
        """
        if self.is_signed:
            raise CaptureError("missing_mass is of probabilities, and this map is weighted by gradients")
        missing = (1 - self.mass.double().sum(-1)).float()
        return missing.masked_fill(over_rows(self.query_sizes == 0, missing), 0)

    def normalize(self, normalization: str) -> "BlockMap":
        """The same map under another normalisation; any can be reached from any.

        Args:
            normalization: ``"none"`` the mass itself; ``"row"`` every row sums to 1; ``"density"`` divided by
                the tokens of the key block, so that long blocks do not win by length; ``"column"`` every
                column sums to 1 (a column of zeros stays zero). ``"absolute row"`` and ``"absolute column"``: their
                absolute values sum to 1. Where numbers have signs, sums may be near 0 and of either sign: nothing
                is divided by them, and ``"row"`` and ``"column"`` become the absolute ones.

        Raises:
            CaptureError: The name is another.
        """
        return replace(self, normalization=normalization)

    def select(
        self,
        layer: Any = None,
        head: int | Literal["mean"] | None = None,
        sequence: int | None = None,
        step: Any = None,
    ) -> "BlockMap":
        """A smaller map: of some layers, one head, one sequence, some steps. What is left out stays whole.

        Args:
            layer: A layer as it is called in ``layers``, a list of them, or ``"mean"`` over layers. Negative
                numbers count from the last; where layers have names, numbers are positions.
            head: A head's number as in ``heads`` (negative from the last), or ``"mean"`` over heads.
            sequence: Position in the batch.
            step: As ``layer``, among ``steps``; ``"mean"`` of a map without steps is the map.

        Raises:
            CaptureError: There is no such layer, head, sequence or step.
        """
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("mass", "error", "spread")}
        batch, split = int(self.is_batch), self.heads != "mean"
        of_layers = batch + bool(self.steps)
        if head == "mean" and split:
            # The heads of a row were drawn together: no less uncertain than on average.
            _change(changes, lambda mass: mass.mean(of_layers + 1), lambda error: error.mean(of_layers + 1))
            changes["heads"] = "mean"
        elif head is not None and head != "mean":
            if not split:
                raise CaptureError(
                    f"no head {head!r} in this map, heads were averaged; capture with heads='all'."
                )
            found = position(head, self.heads, "head")
            _change(changes, lambda values: values.narrow(of_layers + 1, found, 1))
            changes["heads"] = (self.heads[found],)
        if layer is not None:
            _choose(changes, layer, of_layers, self.layers, "layer")
        if step is not None and (self.steps or step != "mean"):
            if not self.steps:
                raise CaptureError(
                    f"no step {step!r} in this map, steps were averaged or there are none; capture with steps='all'."
                )
            _choose(changes, step, batch, self.steps, "step")
        if sequence is not None:
            found = position(sequence, range(self.num_sequences), "sequence")
            if self.is_batch:
                per_sequence = ("query_labels", "key_labels", "query_sizes", "key_sizes")
                changes.update({name: getattr(self, name)[found] for name in per_sequence})
                queries, keys = len(changes["query_labels"]), len(changes["key_labels"])
                _change(changes, lambda values: values[found, ..., :queries, :keys])
                changes["query_sizes"] = changes["query_sizes"][:queries]
                changes["key_sizes"] = changes["key_sizes"][:keys]
        return replace(self, **changes)

    def to_numpy(self) -> np.ndarray:
        """``values``, float32: layers x [heads x] query blocks x key blocks, batch first if there is one."""
        return self.values.numpy().copy()

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell, in pandas' long form.

        Columns: ``sequence`` (only with several), ``step`` (only if kept apart), ``layer``, ``head`` (only if kept apart), ``query``,
        ``key`` (positions), ``query_label``, ``key_label``, ``mass``, and ``value`` if normalised.

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
            path: ``.png``, ``.svg`` or ``.pdf`` to write; when left out the figure is returned.
            layer, head, sequence, step: As in ``select``.
            title: Over the picture; model, layer and head when left out.
            scale: ``"sqrt"`` spreads small masses over more of the colours, so that one block that takes most
                (the first, often) does not hide the rest; ``"linear"`` does not.

        Returns:
            The path, or a matplotlib ``Figure`` without one.

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
        """What a notebook shows; None (then it shows the text) without matplotlib."""
        try:
            return map_figure.to_png(cast("Figure", self.plot()))
        except MissingExtraError:
            return None

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file with the labels as JSON in its header; no pickle.

        The file is written beside its place and moved there when it is complete: an existing file survives a
        save that fails.

        Raises:
            BlockMapFileError: The file cannot be written.
        """
        return io.write(Path(path), *self.content())

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save`` writes: tensors, and what JSON can hold."""
        found = {name: getattr(self, name) for name in _TENSORS}
        tensors = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
        return tensors, {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BlockMap":
        """Read what ``save`` wrote.

        Raises:
            BlockMapFileError: The file is missing, cut short, of another kind or version, or incomplete.
        """
        content = {
            "steps": (),
            "error": None,
            "spread": None,
            **io.read(Path(path)),
        }  # not in every file
        try:
            if content["spread"] is None and "spread" in content.get("metadata", ()):
                # Merged maps used to have it in the place of the standard error.
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


def _change(
    changes: dict[str, Any],
    change: Callable[[Tensor], Tensor],
    change_error: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Change mass, spread and standard error alike, the last one in a way of its own if it has one.

    A mean of spreads is the most that the spread of the mean can be.
    """
    for name, how in (("mass", change), ("spread", change), ("error", change_error or change)):
        if changes[name] is not None:
            changes[name] = how(changes[name])


def _choose(changes: dict[str, Any], wanted: Any, axis: int, among: Sequence, what: str) -> None:
    """Cut an axis of the mass to one entry, to several, or to their mean."""
    if wanted == "mean" and "mean" not in among:
        # Rows are drawn for each layer and step on its own.
        _change(
            changes,
            lambda mass: mass.mean(axis, keepdim=True),
            lambda error: error.square().sum(axis, keepdim=True).sqrt() / error.shape[axis],
        )
        changes[what + "s"] = ("mean",)
        return
    listed = wanted if isinstance(wanted, list | tuple) else [wanted]
    found = [position(one, among, what) for one in listed]
    index = torch.tensor(found, dtype=torch.int64)
    _change(changes, lambda values: values.index_select(axis, index))
    changes[what + "s"] = tuple(among[i] for i in found)
