"""Tracks where the dimensions of tensors come from, from a module's inputs through its functions.

A map of attention says which token attends to which. Its rows are tokens of a module's input only if nothing between
that input and the query has cut, sorted, pooled or mixed them. So every dimension of every tensor that a module makes
is followed: views by their strides, products by their labels, other functions by name and shape. If a function cannot
be followed, its result is noted as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.observing import Layout
from attnpatch.rows.graph.axes import Axis, Dim, Dims, fresh, leaves, regroup, size_of
from attnpatch.rows.graph.strides import single, viewed
from attnpatch.rows.matmul.spellings import NAMES, parse
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.origins import Made, Origins, lost
from attnpatch.rows.provenance.tensors import is_plain, share_memory, tensors_in
from attnpatch.rows.provenance.unseen_writes import EXPOSING, UNSEEN, Notes, written_by


class Sources(Origins):
    """The dimensions of the tensors of one call of a module.

    Args:
        inputs: The tensors that it is called with, in order, each once.
        outer: The sources of a call around this one.
        moved: By number of an input and by dimension: the function that has reordered its elements before the call.
        notes: The notes that hold the dimensions; ``None``: new notes, which watch for unseen writes.

    Attributes:
        reads_values: Whether what is known depends on the values of tensors, and not only on what was done with them.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        outer: Sources | None = None,
        moved: dict[int, dict[int, str]] | None = None,
        notes: Notes | None = None,
    ) -> None:
        super().__init__(inputs)
        self.outer, self.moved = outer, moved or {}
        self.reads_values = False
        self._known = Notes(_strayed) if notes is None else notes
        # For views with a single element of a dimension: which element.
        self._singles: Any = WeakIdKeyDictionary()
        # Products of queries and keys (``observed.Scored``).
        self.scores: list[Any] = []
        # Nodes whose probabilities were shown.
        self.shown: list[Any] = []
        for tensor, dims in zip(inputs, self.inputs, strict=True):
            self._known[tensor] = dims

    def of(self, tensor: torch.Tensor) -> Dims | None:
        """The axes of each dimension of a tensor; ``None`` if they are not known."""
        return self._known.get(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was seen."""
        return tensor in self._known

    def has_seen_writes(self, tensor: torch.Tensor) -> bool:
        """True if all writes to a tensor were seen, or if the tensor is not known at all."""
        return tensor not in self._known or self._known.knows_writes(tensor)

    def recall(self, query: torch.Tensor, key: torch.Tensor) -> Layout | None:
        """The remembered layout of attention of these; ``None``: it has to be determined."""
        return None

    def remember(self, layout: Layout) -> None:
        """Remember the layout of the attention that was asked for with ``recall``."""

    def give(self, tensor: torch.Tensor, dims: Dims) -> None:
        """Set the dimensions of a tensor that no followed function has made."""
        self._known[tensor] = dims

    def same(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """Note that ``copy`` has the elements of ``tensor`` at the same positions."""
        if copy is not tensor and tensor in self._known:
            self._known[copy] = self._known[tensor]

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Called after each torch function."""
        if self.outer is not None:
            self.outer.follow(func, args, kwargs, result)
        name = element_places.name_of(func)
        results = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if is_plain(t)]
        if name.startswith("torch._ops."):
            for one in written_by(func, args, kwargs):
                self._known.lose(one)
        is_write = name in element_places.WRITES or name in element_places.SCATTERING
        if not results and not is_write:
            if name in EXPOSING and args and is_plain(args[0]):
                self._known.expose(args[0])
            return  # a shape, a dtype
        # ``out=`` does not contribute to the values of the result.
        given = {key: value for key, value in kwargs.items() if key != "out"}
        operands = [t for t in tensors_in((args, given)) if is_plain(t)]
        own = {id(t) for t in operands}
        for one in operands[:1] if is_write else [t for t in results if id(t) in own]:
            self._known.wrote(one)
        if operands and is_write:
            self._written(name, operands, args)
        for one in results:
            if id(one) not in own:
                found = self._found(name, args, given, operands, one)
                if len(given) < len(kwargs):
                    self._forget(one)
                self._known[one] = found
            elif (
                self._known.get(one) is not None
                and name not in element_places.WRITES
                and not (element_places.keeps(name) and self._shows_in_place(name, one, operands, given))
            ):
                self._forget(one)  # in place

    def _found(
        self, name: str, args: Any, kwargs: dict[str, Any], operands: list[torch.Tensor], result: torch.Tensor
    ) -> Dims | None:
        known = [(t, dims) for t in operands if (dims := self._known.get(t)) is not None]
        if name in element_places.BLANK or (known and name in element_places.BLANK_LIKE):
            blank = fresh(result.shape)
            self._blank.update(leaf for dim in blank for leaf in dim)
            return blank
        if not known:
            return None
        if name in NAMES or name == "linear":
            return self._of_product(name, args, kwargs, result)
        if name in element_places.JOINING or name == "stack":
            return self._joined(name, args, kwargs, result)
        first, dims = known[0]
        if first is not operands[0]:
            # The first operand is not known: parameters, for example, that have the shape of an input.
            is_made_of_all = element_places.is_of(name, element_places.OF_ALL)
            return (
                self._elementwise(self._summands(name, known, result.shape), result.shape, name)
                if is_made_of_all
                else None
            )
        if first.dtype == result.dtype and share_memory(first, result):
            return self._viewed(dims, first, result)
        return self._of_first(name, args, kwargs, known, result)

    def _of_first(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        known: list[tuple[torch.Tensor, Dims]],
        result: torch.Tensor,
    ) -> Dims | None:
        first, dims = known[0]
        if name in element_places.IN_ORDER and result.numel() == first.numel():
            return regroup(dims, result.shape) or self._unknown(result, dims)
        if name in element_places.MOVING:
            return self._lost(element_places.moved(name, dims, args, kwargs, result), dims)
        if element_places.keeps_rows(name) and result.shape[:-1] == first.shape[:-1]:
            return (*dims[:-1], *fresh(result.shape[-1:]))
        if name == "pad":
            return self._lost(element_places.padded(dims, args, kwargs, result), dims)
        if name == "__getitem__":
            return self._picked(first, dims, args[1], result)
        if name in element_places.CONVOLUTIONS and result.dim() == len(dims):
            spatial = [
                (dim if size_of(dim) == size else fresh([size])[0])
                for dim, size in zip(dims[2:], result.shape[2:], strict=True)
            ]
            return (dims[0], *fresh(result.shape[1:2]), *spatial)
        if name == "_transform_bias_rescale_qkv":
            return (dims[0], *fresh(result.shape[1:2]), dims[1], *fresh(result.shape[3:4]))
        if name == "embedding":
            return (*dims, *fresh(result.shape[-1:]))
        if name == "view_as_real":
            return (*dims, *fresh(result.shape[-1:]))
        if name == "view_as_complex":
            return dims[:-1]
        if result.dim() < len(dims):
            return self._reduced(dims, args, kwargs, result, name)
        if element_places.is_of(name, element_places.OF_ALL):
            return self._elementwise(self._summands(name, known, result.shape), result.shape, name)
        if element_places.is_of(name, element_places.OF_FIRST):
            return self._elementwise([dims], result.shape)
        return self._unknown(result, dims)

    def _picked(self, source: torch.Tensor, dims: Dims, index: Any, result: torch.Tensor) -> Dims:
        """Dimensions after an index that picks elements along one dimension and slices the others."""
        given = index if isinstance(index, tuple) else (index,)
        found = element_places.picked_at(given, source.dim())
        if found is None:
            return self._unknown(result, dims)
        pick, at = found
        view = source[(*given[:pick], slice(None), *given[pick + 1 :])]
        own = self._viewed(dims, source, view)
        return self._lost((*own[:at], *fresh([result.shape[at]]), *own[at + 1 :]), dims)

    def _elementwise(self, known: list[Dims], shape: Sequence[int], name: str = "") -> Dims:
        """For each dimension the axes of an operand that has it; earlier inputs win (later ones are positions).

        Reordered tokens still belong to their input, and do not get the axes of other tokens.
        """
        if len(known) > 1:
            known = sorted(known, key=self._earliest)
        dims: list[Dim] = []
        for back, size in zip(range(len(shape), 0, -1), shape, strict=True):
            found = [own[-back] for own in known if back <= len(own) and size_of(own[-back]) == size != 1]
            if element_places.is_of(name, element_places.CHOOSING):
                found.sort(key=lambda dim: not self._losses.keys().isdisjoint(leaves(dim)), reverse=True)
            dims.append(found[0] if found else fresh([size])[0])
        return tuple(dims)

    def _summands(
        self, name: str, known: list[tuple[torch.Tensor, Dims]], shape: Sequence[int]
    ) -> list[Dims]:
        """The operands that determine the positions of a result's tokens.

        If an operand is reordered: for a sum, operands in order that are visible in it (a residual); otherwise that
            one.
        """
        lost = [tensor for tensor, own in known if tensor.shape == shape and self._earliest(own)[1]]
        if not lost:
            return [own for _, own in known]
        is_sum = element_places.is_of(name, element_places.ADDING)
        return [
            own
            for tensor, own in known
            if tensor.shape != shape
            or any(tensor is one for one in lost)
            or (is_sum and self._shows_all(tensor, lost[0]))
        ]

    def _shows_all(self, tensor: torch.Tensor, beside: torch.Tensor | None) -> bool:
        self.reads_values = True
        return element_places.shows_all(tensor, beside)

    def _shows_in_place(
        self, name: str, result: torch.Tensor, operands: list[torch.Tensor], kwargs: dict[str, Any]
    ) -> bool:
        """True if tokens are still visible after others were added to them in place."""
        if not element_places.is_of(name, element_places.OF_ALL):
            return True
        for one in operands:
            own = self._known.get(one) if one is not result and one.shape == result.shape else None
            if own is not None and self._earliest(own)[1]:
                before = element_places.summand(result, name, one, result, kwargs)
                is_sum = element_places.is_of(name, element_places.ADDING)
                return is_sum and self._shows_all(before, one)
        return True

    def _of_product(self, name: str, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
        product = parse(name, args, kwargs)
        if product is None and name == "addmm" and len(args) > 2:
            product = parse("mm", args[1:3], {})
        if product is None or len(product.result) != result.dim():
            return self._unknown(result)
        axes: dict[str, list[Dim]] = {}
        for tensor, labels in zip(product.operands, product.labels, strict=True):
            for label, dim in zip(labels, self._known.get(tensor) or (), strict=False):
                if size_of(dim) > 1:
                    axes.setdefault(label, []).append(dim)
        sizes = zip(product.result, result.shape, strict=True)
        return tuple(
            min(found, key=self._rank)
            if (found := [dim for dim in axes.get(label, []) if size_of(dim) == size])
            else fresh([size])[0]
            for label, size in sizes
        )

    def _viewed(self, dims: Dims, source: torch.Tensor, result: torch.Tensor) -> Dims:
        found = viewed(dims, source, result)
        ones = {p: part for p in range(result.dim()) if (part := single(dims, source, result, p)) is not None}
        if ones:
            self._singles[result] = ones
        changed = []
        for axes in found:
            dim: list[Axis] = []
            for axis in axes:
                if isinstance(axis, Axis):
                    dim.append(axis)
                else:
                    new = Axis(axis.count)
                    self.made[new] = Made(of=axis.of, part=axis)
                    dim.append(new)
            changed.append(tuple(dim))
        return tuple(changed)

    def _joined(self, name: str, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
        pieces = args[0] if args else kwargs.get("tensors", ())
        at = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if not isinstance(at, int) or not isinstance(pieces, (tuple, list)):
            return self._unknown(result)
        place = at % result.dim()
        # Skip empty caches, which are tensors of one dimension.
        pieces = [
            piece for piece in pieces if piece.numel() and piece.dim() == result.dim() - (name == "stack")
        ]
        known = [own for piece in pieces if (own := self._known.get(piece)) is not None]
        if not known:
            return None
        if name == "stack":
            return self._elementwise([(*own[:place], (), *own[place:]) for own in known], result.shape)
        if place == result.dim() - 1:
            known = self._seen_beside(pieces)
        shape = list(result.shape)
        shape[place] = 1
        dims = list(self._elementwise([(*own[:place], (), *own[place + 1 :]) for own in known], shape))
        parts = [(self._along(piece, place), piece.shape[place]) for piece in pieces]
        dims[place] = self._one(parts)
        return tuple(dims)

    def _seen_beside(self, pieces: Sequence[torch.Tensor]) -> list[Dims]:
        """For pieces concatenated along channels, those that determine the positions of tokens, as in a sum."""
        known = [(piece, own) for piece in pieces if (own := self._known.get(piece)) is not None]
        is_lost = [self._earliest(own)[1] for _, own in known]
        return [
            own
            for (piece, own), lost in zip(known, is_lost, strict=True)
            if lost or not any(is_lost) or self._shows_all(piece, None)
        ]

    def _along(self, piece: torch.Tensor, place: int) -> Dim | None:
        own = self._known.get(piece)
        part = self._singles.get(piece, {}).get(place)
        if own is None or part is None:
            return None if own is None else own[place]
        axis = Axis(1)
        self.made[axis] = Made(of=part.of, part=part)
        return (axis,)

    def _reduced(
        self, dims: Dims, args: Any, kwargs: dict[str, Any], result: torch.Tensor, name: str
    ) -> Dims | None:
        at = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name not in element_places.REDUCING or not isinstance(at, int) or result.dim() != len(dims) - 1:
            return self._unknown(result)
        gone = at % len(dims)
        return (*dims[:gone], *dims[gone + 1 :])

    def _written(self, name: str, operands: list[torch.Tensor], args: Any) -> None:
        """Follow a write into an existing tensor."""
        target, value = operands[0], operands[-1]
        own, dims = self._known.get(target), self._known.get(value)
        if own is None:
            self._forget(target)  # other tensors in its memory may be known
            if dims is not None and value is not target and value.dim() == target.dim():
                self._into_unknown(target, value, dims, args)
            return
        if name == "__setitem__":
            place = args[1]
            if any(
                isinstance(one, (torch.Tensor, list))
                for one in (place if isinstance(place, tuple) else (place,))
            ):
                self._forget(target)
                return
            view = target[place]
            if not share_memory(target, view):
                self._forget(target)
                return
            own = self._viewed(own, target, view)
        elif name in element_places.SCATTERING:
            self._forget(target)
            return
        if value is target:
            return
        # An unknown vector is a token of the module's own; a larger unknown tensor may hold tokens in any order.
        is_told = self._take_places(own, dims) if dims is not None else sum(n > 1 for n in value.shape) < 2
        if not is_told:
            self._forget(target)

    def _forget(self, target: torch.Tensor) -> None:
        """Note that a tensor, and all tensors in its memory, hold other elements than before."""
        for one, dims in self._known.items():
            if dims is not None and share_memory(one, target):
                self._known[one] = fresh(one.shape)

    def _into_unknown(self, target: torch.Tensor, value: torch.Tensor, dims: Dims, args: Any) -> None:
        """Note tokens written into unknown memory of fixed size (a cache), along the dimension where it is longer."""
        place = [i for i, (a, b) in enumerate(zip(target.shape, value.shape, strict=True)) if a != b]
        if len(place) > 1:
            return
        if not place and len(args) == 2 and value is args[1]:
            self._known[target] = dims
            return
        at = args[1] if len(args) > 2 and isinstance(args[1], int) else target.dim() - 2
        at = place[0] if place else at % target.dim()
        axis = Axis(target.shape[at])
        self.made[axis] = Made(has=dims[at])
        self._known[target] = (*dims[:at], (axis,), *dims[at + 1 :])

    def _unknown(self, result: torch.Tensor, dims: Dims = ()) -> Dims:
        found = fresh(result.shape)
        self._lost(found, dims)
        return found


def _strayed(tensor: torch.Tensor) -> Dims:
    """Dimensions for a tensor that unseen code has written to."""
    return lost(tensor.shape, UNSEEN)
