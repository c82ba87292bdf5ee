"""The axes of a block map: their names, and parts and means along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from attnpatch.errors import CaptureError
from attnpatch.maps.fields import metadata_of_sequence, own_columns, position, shortened, texts_of

Map = TypeVar("Map", bound="Selecting")


class Selecting:
    """What ``BlockMap`` does with its axes."""

    mass: Tensor
    layers: Sequence[int | str]
    query_labels: Any
    key_labels: Any
    heads: Literal["mean"] | Sequence[int]
    normalization: str
    metadata: Mapping[str, Any]
    steps: Sequence[int | str]

    @property
    def dims(self) -> tuple[str, ...]:
        """The name of each dimension of ``mass``: of ``sequence``, ``step``, ``layer``, ``head``, ``query``, ``key``."""
        apart = [
            ("sequence", self.is_batch),
            ("step", self.steps),
            ("layer", True),
            ("head", self.heads != "mean"),
        ]
        return (*(name for name, is_there in apart if is_there), "query", "key")

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __iter__(self: Map) -> Iterator[Map]:
        """A map of each layer."""
        return (self.isel(layer=place) for place in range(len(self.layers)))

    @property
    def num_sequences(self) -> int:
        """Number of sequences in the map."""
        return self.mass.shape[0] if self.is_batch else 1

    @property
    def is_batch(self) -> bool:
        """Whether the fields have a batch dimension."""
        return self.mass.ndim == 4 + (self.heads != "mean") + bool(self.steps)

    def sel(self: Map, **labels: Any) -> Map:
        """A smaller map, chosen by label. No dimension is dropped: one label leaves a dimension of length 1.

        Args:
            **labels: For some of ``dims``, a label or a list of labels: an entry of ``layers``, ``heads`` or ``steps``,
                or the label of a query or key block (all blocks that bear it), and the number of a sequence.

        Raises:
            CaptureError: There is no such dimension or label; or the map is normalised over the blocks that would be
                cut away (normalise afterwards instead).
        """
        return self._chosen(labels, _by_label)

    def isel(self: Map, **positions: Any) -> Map:
        """As ``sel``, chosen by position: a number (negative ones count from the last), a list of numbers, or a slice.

        Raises:
            CaptureError: As ``sel``.
        """
        return self._chosen(positions, _by_position)

    def mean(self: Map, dim: str) -> Map:
        """The mean over ``"layer"``, ``"head"`` or ``"step"``.

        Raises:
            CaptureError: The map has no such dimension, or it is one of blocks or sequences.
        """
        if not isinstance(dim, str) or dim not in ("layer", "head", "step"):
            raise CaptureError(
                f"a map has no mean over {dim!r}; accepted are 'layer', 'head' and 'step' (for sequences, attnpatch merge)."
            )
        self._check_dims([dim])
        return self.select(**cast("dict[str, Any]", {dim: "mean"}))

    def _check_dims(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.dims:
                averaged = "; heads were averaged, capture with heads='all'" * (name == "head")
                raise CaptureError(
                    f"this map has no dimension {name!r}; it has {', '.join(self.dims)}{averaged}."
                )

    def _chosen(self: Map, wanted: Mapping[str, Any], find: Callable[[Any, Sequence, str], list[int]]) -> Map:
        self._check_dims([*wanted])

        def places(among: Sequence, what: str, name: str) -> list[int]:
            given = _plain(wanted[name])
            chosen = find(given, among, what)
            if not chosen or len(set(chosen)) < len(chosen):
                raise CaptureError(
                    f"{name}={given!r} chooses {'one twice' if chosen else 'nothing'}; there are {shortened(among)}."
                )
            return chosen

        found: Any = self
        if "sequence" in wanted:
            (place, *more) = places(range(self.num_sequences), "sequence", "sequence")
            if more:
                raise CaptureError("several sequences do not make one map; give one sequence.")
            found = found.select(sequence=place)
        for name in ("step", "layer", "head"):
            if name in wanted:
                among = getattr(found, f"{name}s")
                changes: dict[str, Any] = {each: getattr(found, each) for each in ("mass", "error", "spread")}
                _take(changes, places(among, name, name), found.dims.index(name), among, name)
                found = replace(found, **changes)
        for side in ("query", "key"):
            if side in wanted:
                if found.is_batch:
                    raise CaptureError(
                        f"sequences have {side} blocks of their own; choose a sequence first: sequence=0."
                    )
                found = _with_blocks(
                    found, side, places(getattr(found, f"{side}_labels"), f"{side} block", side)
                )
        return found

    def select(
        self: Map,
        layer: Any = None,
        head: int | str | None = None,
        sequence: int | None = None,
        step: Any = None,
    ) -> Map:
        """A smaller map: some layers, one head, one sequence, some steps. ``None`` selects all.

        Args:
            layer: An entry of ``layers``, a list of entries, ``"last"``, ``"all"``, or ``"mean"`` over layers. Negative
                numbers count from the last; if layers have names, numbers are positions.
            head: An entry of ``heads`` (negative numbers count from the last, which is ``"last"``), or ``"mean"`` over
                heads.
            sequence: Position in the batch.
            step: Like ``layer``, for ``steps``; ``"mean"`` of a map without steps is the map itself.

        Raises:
            CaptureError: There is no such layer, head, sequence or step.
        """
        layer, head, sequence, step = map(_plain, (layer, head, sequence, step))
        layer, step = (None if each == "all" else each for each in (layer, step))
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("mass", "error", "spread")}
        batch, split = int(self.is_batch), self.heads != "mean"
        of_layers = batch + bool(self.steps)
        if head == "mean" and split:
            # All heads share a sample of rows, so their errors do not cancel: the error of the mean is their mean.
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
                    f"no step {step!r} in this map, its steps were averaged or it has none; capture with steps='all'."
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
                changes["metadata"] = metadata_of_sequence(self.metadata, found)
        return replace(cast(Any, self), **changes)


def _plain(given: Any) -> Any:
    """A range, an array or a tensor as a list; an element of them as a number."""
    return list(given) if isinstance(given, range) else given.tolist() if hasattr(given, "tolist") else given


def _change(
    changes: dict[str, Any],
    change: Callable[[Tensor], Tensor],
    change_error: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Apply ``change`` to mass, spread and standard error; for the error, ``change_error`` takes its place if given.

    A mean of spreads is an upper bound of the spread of the mean.
    """
    for name, how in (("mass", change), ("spread", change), ("error", change_error or change)):
        if changes[name] is not None:
            changes[name] = how(changes[name])


def _choose(changes: dict[str, Any], wanted: Any, axis: int, among: Sequence, what: str) -> None:
    """Select one entry of an axis of the mass, several entries, or the mean of all."""
    if wanted == "mean" and "mean" not in among:
        # Each layer and step has a sample of rows of its own, so their errors are independent.
        _change(
            changes,
            lambda mass: mass.mean(axis, keepdim=True),
            lambda error: error.square().sum(axis, keepdim=True).sqrt() / error.shape[axis],
        )
        changes[what + "s"] = ("mean",)
        return
    listed = wanted if isinstance(wanted, list | tuple) else [wanted]
    if not listed:
        raise CaptureError(f"{what}={wanted!r} chooses nothing; there are {shortened(among)}.")
    _take(changes, [position(one, among, what) for one in listed], axis, among, what)


def _take(changes: dict[str, Any], places: list[int], axis: int, among: Sequence, what: str) -> None:
    index = torch.tensor(places, dtype=torch.int64)
    _change(changes, lambda values: values.index_select(axis, index))
    changes[what + "s"] = tuple(among[i] for i in places)


def _with_blocks(one: Any, side: str, places: list[int]) -> Any:
    """A map with some of its query or key blocks."""
    labels = getattr(one, f"{side}_labels")
    if one.normalization.endswith("row" if side == "key" else "column") and len(places) < len(labels):
        raise CaptureError(
            f"this map is normalised by {one.normalization}, and the other {side} blocks are part of that; select first and "
            "normalise then, or use normalize('none')."
        )
    index = torch.tensor(places, dtype=torch.int64)
    changes: dict[str, Any] = {each: getattr(one, each) for each in ("mass", "error", "spread")}
    _change(changes, lambda values: values.index_select(-2 if side == "query" else -1, index))
    metadata = dict(one.metadata)
    texts = {each: texts_of(metadata, each, len(getattr(one, f"{each}_labels"))) for each in ("query", "key")}
    metadata.pop("texts", None)
    for each, found in texts.items():
        if found is not None:
            metadata[f"{each}_texts"] = [found[i] for i in places] if each == side else found
    own = own_columns(one)
    if any(column is not None for column in own):
        metadata["own_keys"] = (
            [own[i] for i in places]
            if side == "query"
            else [places.index(column) if column in places else None for column in own]
        )
    changes |= {
        f"{side}_labels": tuple(labels[i] for i in places),
        f"{side}_sizes": getattr(one, f"{side}_sizes")[index],
        "metadata": metadata,
    }
    return replace(one, **changes)


def _by_label(wanted: Any, among: Sequence, what: str) -> list[int]:
    found: list[int] = []
    for one in wanted if isinstance(wanted, list | tuple) else [wanted]:
        places = [i for i, name in enumerate(among) if name == one and not isinstance(one, bool)]
        if not places:
            raise CaptureError(f"there is no {what} {one!r} in this map; there are {shortened(among)}.")
        found += places
    return found


def _by_position(wanted: Any, among: Sequence, what: str) -> list[int]:
    count = len(among)
    if isinstance(wanted, slice):
        return [*range(count)][wanted]
    found = []
    for one in wanted if isinstance(wanted, list | tuple) else [wanted]:
        place = count if type(one) is bool or not isinstance(one, Integral) else int(one)
        if not -count <= place < count:
            raise CaptureError(f"there is no {what} at {one!r}; there are {count}, from 0 on (or a slice).")
        found.append(place % count)
    return found
