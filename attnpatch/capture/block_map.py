"""BlockMap: which block attends to which, labelled, and saved without pickle."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnpatch.capture import picture, storage
from attnpatch.errors import BlockMapFileError, CaptureError, MissingExtraError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

NORMALIZATIONS = ("none", "row", "density", "column")
_TENSORS = ("mass", "query_sizes", "key_sizes")
_MEANING = {
    "none": "attention mass, mean over the query tokens",
    "row": "share of the query block's attention mass",
    "density": "attention mass per key token",
    "column": "share of the mass the key block receives",
}

Labels = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """Attention mass between blocks of tokens, for every captured layer.

    The batch comes first in every field when there is more than one sequence, and is left out when there is
    one. Sequences with fewer blocks than the longest have zeros, size 0 and no label for the missing ones
    (``select(sequence=...)`` cuts them off).

    Attributes:
        mass: ``[(batch,) layers, (heads,) query_blocks, key_blocks]`` float32 on the CPU: the probability a
            query token of block I puts on all tokens of block J, averaged over the query tokens of I. Always
            this number, whatever ``normalization`` says; ``values`` is the normalised one.
        layers: Number or name of each layer.
        query_labels: One per query block; one tuple of them per sequence when there are several.
        key_labels: One per key block, likewise.
        query_sizes: ``[(batch,) query_blocks]`` int64, tokens per block.
        key_sizes: ``[(batch,) key_blocks]`` int64, tokens per block.
        heads: ``"mean"``, or the numbers of the heads that were kept apart.
        normalization: What ``values`` holds: ``"none"``, ``"row"``, ``"density"`` or ``"column"``.
        metadata: Facts about the capture (model, sequence length, ...), anything JSON can hold.

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

    def __post_init__(self) -> None:
        for name, value in _checked_fields(self).items():
            object.__setattr__(self, name, value)

    @property
    def num_sequences(self) -> int:
        """Sequences in the map."""
        return self.mass.shape[0] if self._batched else 1

    @property
    def values(self) -> Tensor:
        """The mass under ``normalization``; shaped like ``mass``. What cannot be divided (0 / 0) is 0."""
        if self.normalization == "none":
            return self.mass
        if self.normalization == "density":
            sizes = self.key_sizes.clamp(min=1)
            between = (1,) * (self.mass.ndim - 1 - self._batched)
            return self.mass / sizes.view(*sizes.shape[:-1], *between, -1)
        total = self.mass.sum(-1 if self.normalization == "row" else -2, keepdim=True, dtype=torch.float64)
        return torch.where(total == 0, 0.0, self.mass / total).float()

    @property
    def missing_mass(self) -> Tensor:
        """``[(batch,) layers, (heads,) query_blocks]``: 1 - row sum of ``mass``.

        What learned sinks and keys outside every block took; 0 for a query block without tokens.
        """
        missing = (1 - self.mass.double().sum(-1)).float()
        return missing.masked_fill(_over_rows(self.query_sizes == 0, missing), 0)

    def normalize(self, normalization: str) -> "BlockMap":
        """The same map under another normalisation; any can be reached from any.

        Args:
            normalization: ``"none"`` the mass itself; ``"row"`` every row sums to 1; ``"density"`` divided by
                the tokens of the key block, so that long blocks do not win by length; ``"column"`` every
                column sums to 1 (a column of zeros stays zero).

        Raises:
            CaptureError: The name is another.
        """
        return replace(self, normalization=normalization)

    def select(
        self, layer: Any = None, head: int | Literal["mean"] | None = None, sequence: int | None = None
    ) -> "BlockMap":
        """A smaller map: of some layers, one head, one sequence. What is left out stays whole.

        Args:
            layer: A layer as it is called in ``layers``, a list of them, or ``"mean"`` over layers. Negative
                numbers count from the last; where layers have names, numbers are positions.
            head: A head's number as in ``heads`` (negative from the last), or ``"mean"`` over heads.
            sequence: Position in the batch.

        Raises:
            CaptureError: There is no such layer, head or sequence.
        """
        changes: dict[str, Any] = {"mass": self.mass}
        batch, split = int(self._batched), self.heads != "mean"
        if head == "mean" and split:
            changes.update(mass=changes["mass"].mean(batch + 1), heads="mean")
        elif head is not None and head != "mean":
            if not split:
                raise CaptureError(
                    f"no head {head!r} in this map, heads were averaged; capture with heads='all'."
                )
            found = _position(head, self.heads, "head")
            changes.update(mass=changes["mass"].narrow(batch + 1, found, 1), heads=(self.heads[found],))
        if layer == "mean" and "mean" not in self.layers:
            changes.update(mass=changes["mass"].mean(batch, keepdim=True), layers=("mean",))
        elif layer is not None:
            wanted = layer if isinstance(layer, list | tuple) else [layer]
            found = [_position(one, self.layers, "layer") for one in wanted]
            index = torch.tensor(found, dtype=torch.int64)
            changes.update(
                mass=changes["mass"].index_select(batch, index), layers=tuple(self.layers[i] for i in found)
            )
        if sequence is not None:
            found = _position(sequence, range(self.num_sequences), "sequence")
            if self._batched:
                per_sequence = ("query_labels", "key_labels", "query_sizes", "key_sizes")
                changes.update({name: getattr(self, name)[found] for name in per_sequence})
                queries, keys = len(changes["query_labels"]), len(changes["key_labels"])
                changes["mass"] = changes["mass"][found, ..., :queries, :keys]
                changes["query_sizes"] = changes["query_sizes"][:queries]
                changes["key_sizes"] = changes["key_sizes"][:keys]
        return replace(self, **changes)

    def to_numpy(self) -> np.ndarray:
        """``values``, float32: layers x [heads x] query blocks x key blocks, batch first if there is one."""
        return self.values.numpy().copy()

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell, in pandas' long form.

        Columns: ``sequence`` (only with several), ``layer``, ``head`` (only if kept apart), ``query``,
        ``key`` (positions), ``query_label``, ``key_label``, ``mass``, and ``value`` if normalised.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError('to_dataframe needs pandas; pip install "attnpatch[plot]".') from error
        frames = []
        for sequence in range(self.num_sequences):
            one = self.select(sequence=sequence)
            queries, keys = one.mass.shape[-2:]
            axes = {"sequence": [sequence]} if self._batched else {}
            axes["layer"] = list(one.layers)
            if one.heads != "mean":
                axes["head"] = list(one.heads)
            axes |= {"query": range(queries), "key": range(keys)}
            frame = pandas.MultiIndex.from_product(axes.values(), names=axes.keys()).to_frame(index=False)
            frame["query_label"] = np.array(one.query_labels, dtype=object)[frame["query"]]
            frame["key_label"] = np.array(one.key_labels, dtype=object)[frame["key"]]
            frame["mass"] = one.mass.reshape(-1).numpy()
            if self.normalization != "none":
                frame["value"] = one.values.reshape(-1).numpy()
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def plot(
        self,
        path: str | os.PathLike | None = None,
        layer: Any = "mean",
        head: int | Literal["mean"] = "mean",
        title: str | None = None,
        sequence: int = 0,
        scale: Literal["sqrt", "linear"] = "sqrt",
    ) -> "Figure | Path":
        """Draw the map with its block labels and a colour bar.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf`` to write; when left out the figure is returned.
            layer, head, sequence: As in ``select``.
            title: Over the picture; model, layer and head when left out.
            scale: ``"sqrt"`` spreads small masses over more of the colours, so that one block that takes most
                (the first, often) does not hide the rest; ``"linear"`` does not.

        Returns:
            The path, or a matplotlib ``Figure`` without one.

        Raises:
            CaptureError: No such layer, head or sequence, or an unknown file suffix or scale.
            MissingExtraError: matplotlib is not installed.
        """
        one = self.select(layer=layer, head=head, sequence=sequence)
        if len(one.layers) != 1:
            raise CaptureError(f"{len(one.layers)} layers in one picture; give one layer or 'mean'.")
        if title is None:
            layers = f"mean of {len(self.layers)} layers" if layer == "mean" else f"layer {one.layers[0]}"
            heads = "mean over heads" if one.heads == "mean" else f"head {one.heads[0]}"
            parts = [self.metadata.get("model"), layers, heads, f"sequence {sequence}" * self._batched]
            title = ", ".join(str(part) for part in parts if part)
        values = one.to_numpy().reshape(one.mass.shape[-2:])
        figure = picture.draw(
            values,
            query_labels=one.query_labels,
            key_labels=one.key_labels,
            title=title,
            colour_label=_MEANING[self.normalization],
            scale=scale,
        )
        return figure if path is None else picture.write(figure, path)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; None (then it shows the text) without matplotlib."""
        try:
            return picture.to_png(self.plot())
        except MissingExtraError:
            return None

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file with the labels as JSON in its header; no pickle.

        The file is written beside its place and moved there when it is complete: an existing file survives a
        save that fails.

        Raises:
            BlockMapFileError: The file cannot be written.
        """
        names = [f.name for f in fields(self) if f.name not in _TENSORS]
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        return storage.write(Path(path), tensors, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BlockMap":
        """Read what ``save`` wrote.

        Raises:
            BlockMapFileError: The file is missing, cut short, of another kind or version, or incomplete.
        """
        content = storage.read(Path(path))
        try:
            return cls(**{f.name: content[f.name] for f in fields(cls)})
        except KeyError as error:
            raise BlockMapFileError(f"{path} lacks {error}; {storage.AGAIN}") from error
        except (ValueError, TypeError, CaptureError) as error:
            raise BlockMapFileError(f"{path} is damaged ({error}); {storage.AGAIN}") from error

    @property
    def _batched(self) -> bool:
        return self.mass.ndim == 4 + (self.heads != "mean")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMap):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None

    def __repr__(self) -> str:
        queries, keys = self.mass.shape[-2:]
        size = [f"{len(self.layers)} layers", f"{queries} query x {keys} key blocks"]
        if self.heads != "mean":
            size.insert(1, f"{len(self.heads)} heads")
        if self._batched:
            size.insert(0, f"{self.num_sequences} sequences")
        labels = self.query_labels[0] if self._batched else self.query_labels
        tokens = self.query_sizes.sum(-1).tolist()
        sums = self.mass.sum(-1)[_over_rows(self.query_sizes > 0, self.mass[..., 0])]
        rows = f"rows sum to {sums.min():.4g} to {sums.max():.4g}" if sums.numel() else "no rows"
        lines = [
            f"BlockMap: {', '.join(size)}",
            f"  layers    {_shortened(self.layers)}",
            f"  heads     {self.heads if self.heads == 'mean' else _shortened(self.heads)}",
            f"  queries   {_shortened(labels)} ({tokens} tokens)",
            f"  mass      {rows}; normalization {self.normalization!r}",
        ]
        lines += [f"  {name}: {value}" for name, value in self.metadata.items()]
        return "\n".join(lines)


def _over_rows(per_block: Tensor, like: Tensor) -> Tensor:
    """``[(batch,) query_blocks]`` spread over the layers and heads of ``like``."""
    between = (1,) * (like.ndim - per_block.ndim)
    return per_block.view(*per_block.shape[:-1], *between, per_block.shape[-1]).expand(like.shape)


def _shortened(items: Sequence) -> str:
    shown = [repr(picture.shorten(item)) if isinstance(item, str) else repr(item) for item in items]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:5], "...", *shown[-2:]])


def _position(wanted: Any, among: Sequence, what: str) -> int:
    """Where ``wanted`` is in ``among``: by its name, or counted where names are strings or it is negative."""
    if wanted in among and not isinstance(wanted, bool):
        return among.index(wanted)
    counted = isinstance(wanted, Integral) and not isinstance(wanted, bool)
    counted = counted and (wanted < 0 or all(isinstance(name, str) for name in among))
    if counted and -len(among) <= wanted < len(among):
        return int(wanted) % len(among)
    raise CaptureError(f"there is no {what} {wanted!r} in this map; there are {_shortened(among)}.")


def _checked_fields(given: BlockMap) -> dict[str, Any]:
    """The fields of ``given`` in their canonical form: float32, tuples, one layout for one sequence."""
    if given.normalization not in NORMALIZATIONS:
        accepted = ", ".join(repr(name) for name in NORMALIZATIONS)
        raise CaptureError(f"normalization is {given.normalization!r}; accepted are {accepted}.")
    try:
        heads = given.heads if given.heads == "mean" else tuple(int(head) for head in given.heads)
        layers = tuple(layer if isinstance(layer, str) else int(layer) for layer in given.layers)
    except (TypeError, ValueError):
        raise CaptureError(
            f"heads {given.heads!r} or layers {given.layers!r} cannot be used; accepted are 'mean' or a list "
            "of head numbers, and a list of layer numbers or names."
        ) from None
    mass = given.mass.detach().to("cpu", torch.float32)
    dims = 3 + (heads != "mean")
    if mass.ndim == dims + 1 and mass.shape[0] == 1:
        mass = mass[0]
    batch = mass.shape[:1] if mass.ndim == dims + 1 else ()
    expected = (*batch, len(layers), *(() if heads == "mean" else (len(heads),)), *mass.shape[-2:])
    if mass.ndim not in (dims, dims + 1) or tuple(mass.shape) != expected:
        raise CaptureError(
            f"mass is {list(mass.shape)}, with {len(layers)} layers and heads {heads!r}; accepted is "
            "[(batch,) layers, (heads,) query_blocks, key_blocks]."
        )
    checked: dict[str, Any] = {"heads": heads, "layers": layers}
    for side, count in (("query", mass.shape[-2]), ("key", mass.shape[-1])):
        sizes = torch.as_tensor(getattr(given, f"{side}_sizes")).detach().to("cpu", torch.int64)
        labels = getattr(given, f"{side}_labels")
        checked[f"{side}_sizes"], checked[f"{side}_labels"] = _checked_side(side, sizes, labels, count, batch)
    empty = _over_rows(checked["query_sizes"] == 0, mass[..., 0])
    checked["mass"] = mass.masked_fill(empty[..., None], 0)
    try:
        checked["metadata"] = json.loads(json.dumps(dict(given.metadata)))
    except (TypeError, ValueError) as error:
        raise CaptureError(f"metadata does not fit JSON ({error}); give strings and numbers.") from error
    return checked


def _checked_side(
    side: str, sizes: Tensor, labels: Labels, count: int, batch: tuple[int, ...]
) -> tuple[Tensor, tuple]:
    """Sizes and labels of the query or key blocks; shared ones are repeated for each sequence."""
    nested = len(labels) > 0 and not isinstance(labels[0], str)
    per_sequence = [tuple(str(label) for label in one) for one in (labels if nested else [labels])]
    num_sequences = batch[0] if batch else 1
    if len(per_sequence) == 1:
        per_sequence = per_sequence * num_sequences
    if sizes.shape in ((count,), (1, count)):
        sizes = sizes.reshape(count).expand(num_sequences, count)
    if sizes.shape != (num_sequences, count) or len(per_sequence) != num_sequences:
        raise CaptureError(
            f"{side} sizes are {list(sizes.shape)} and labels for {len(per_sequence)} sequences, the map has "
            f"{num_sequences} sequences of {count} {side} blocks; give one size and label per block."
        )
    for row, names in enumerate(per_sequence):
        if len(names) > count or bool((sizes[row, len(names) :] > 0).any()):
            raise CaptureError(f"{len(names)} {side} labels for {count} {side} blocks; give one per block.")
    if not batch:
        return sizes[0].clone(), per_sequence[0]
    return sizes.clone(), tuple(per_sequence)
