"""Selects parts of a block map: layers, heads, steps, sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from attnpatch.errors import CaptureError
from attnpatch.maps.fields import position

Map = TypeVar("Map", bound="Selecting")


class Selecting:
    """What ``BlockMap`` does with its axes."""

    mass: Tensor
    layers: Sequence[int | str]
    heads: Literal["mean"] | Sequence[int]
    steps: Sequence[int | str]
    is_batch: bool
    num_sequences: int

    def select(
        self: Map,
        layer: Any = None,
        head: int | Literal["mean"] | None = None,
        sequence: int | None = None,
        step: Any = None,
    ) -> Map:
        """A smaller map: some layers, one head, one sequence, some steps. An argument that is ``None`` selects all.

        Args:
            layer: An entry of ``layers``, a list of entries, or ``"mean"`` over layers. Negative numbers count from the
                last; if layers have names, numbers are positions.
            head: An entry of ``heads`` (negative numbers count from the last), or ``"mean"`` over heads.
            sequence: Position in the batch.
            step: Like ``layer``, for ``steps``; ``"mean"`` of a map without steps is the map itself.

        Raises:
            CaptureError: There is no such layer, head, sequence or step.
        """
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
        return replace(cast(Any, self), **changes)


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
    found = [position(one, among, what) for one in listed]
    index = torch.tensor(found, dtype=torch.int64)
    _change(changes, lambda values: values.index_select(axis, index))
    changes[what + "s"] = tuple(among[i] for i in found)
