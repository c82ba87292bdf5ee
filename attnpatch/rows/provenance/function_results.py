"""The dimensions of a torch function's result, from those of its operands, for functions inside a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, all_leaves, fresh, leaves, regroup, size_of
from attnpatch.rows.graph.strides import single, viewed
from attnpatch.rows.matmul.spellings import NAMES, parse
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.origins import Made, Origins
from attnpatch.rows.provenance.residuals import shows, shows_all, summand
from attnpatch.rows.provenance.returned import attention_results
from attnpatch.rows.provenance.tensors import ByTensor, share_memory
from attnpatch.rows.provenance.unseen_writes import Notes


class FunctionResults(Origins):
    """The dimensions of the tensors of one call.

    Args:
        inputs: The tensors that the module is called with, in order, each once.
        notes: The notes that hold the dimensions of tensors.
        hidden: Tells which tensors may hide some of their tokens; ``None``: this is not examined.

    Attributes:
        reads_values: Whether what is known depends on the values of tensors, and not only on what was done with them.
    """

    def __init__(
        self, inputs: Sequence[torch.Tensor], notes: Notes, hidden: HiddenTokens | None = None
    ) -> None:
        super().__init__(inputs)
        self._known, self.hidden = notes, hidden
        self.reads_values = False
        # For axes that a function has made by moving elements: its name.
        self.moved_by: dict[Axis, str] = {}
        # For views with a single element of a dimension: which element.
        self._singles = ByTensor()

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
        if name in attention_results.OF:
            return attention_results.OF[name](self, self._known, args, kwargs, result)
        if name in NAMES or name == "linear":
            return self._of_product(name, args, kwargs, result)
        if name in element_places.JOINING or name == "stack":
            return self._joined(name, args, kwargs, result)
        first, dims = known[0]
        if first is not operands[0]:
            # The first operand is not known: parameters, for example, that have the shape of an input.
            is_made_of_all = element_places.is_of(name, element_places.OF_ALL)
            return self._elementwise(known, result.shape, name) if is_made_of_all else None
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
            found = element_places.moved(name, dims, args, kwargs, result)
            self.moved_by.update(
                (leaf, name) for leaf in all_leaves(found or ()) if leaf not in all_leaves(dims)
            )
            return self._lost(found, dims)
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
            return self._mixed((dims[0], *fresh(result.shape[1:2]), *spatial), dims, dims[1])
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
            return self._elementwise(known, result.shape, name)
        if element_places.is_of(name, element_places.OF_FIRST):
            return self._elementwise(known[:1], result.shape)
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
        new = fresh([result.shape[at]])
        self.moved_by.update((leaf, "an index") for leaf in all_leaves(new))
        return self._lost((*own[:at], *new, *own[at + 1 :]), dims)

    def _elementwise(
        self, known: list[tuple[torch.Tensor, Dims]], shape: Sequence[int], name: str = ""
    ) -> Dims:
        """For each dimension the axes of an operand that has it; earlier inputs win (later ones are positions).

        Reordered tokens still belong to their input, and do not get the axes of other tokens.
        """
        is_sum = element_places.is_of(name, element_places.ADDING)
        whole = [tensor for tensor, _ in known if tensor.shape == shape]
        found = self._by_place(known, shape, whole, beside=True if is_sum else None)
        if not element_places.is_of(name, element_places.CHOOSING):
            return found
        spread = {place for tensor, dims in known for place in self._spread(tensor, dims, found, shape)}
        lost = tuple(fresh([shape[i]])[0] if i in spread else dim for i, dim in enumerate(found))
        return self._lost(lost, found) or lost

    def _spread(self, tensor: torch.Tensor, own: Dims, found: Dims, shape: Sequence[int]) -> Iterator[int]:
        """The dimensions along which one token of an operand may be in several places of a choice between its input's."""
        if tensor.is_floating_point() and own and tensor.shape[-1] == shape[-1] > 1:
            for place, size in enumerate(shape[:-1]):
                back = len(shape) - place
                is_one = back > len(own) or tensor.shape[-back] == 1
                if is_one and size > 1 and self._earliest(own)[0] == self._rank(found[place]):
                    yield place

    def _by_place(
        self,
        known: list[tuple[torch.Tensor, Dims]],
        shape: Sequence[int],
        whole: list[torch.Tensor],
        beside: bool | None,
    ) -> Dims:
        """The axes of a result that has each element from operands' elements at the same position.

        If an operand is reordered along a dimension, the result takes its axis from that operand. It takes it from
        another operand, which is in order, if the tokens of that one are visible (a residual).

        Args:
            known: The operands whose dimensions are known.
            shape: The result's shape.
            whole: Those of them that have all of the result's tokens.
            beside: True if operands are added, False if they are concatenated along channels, ``None`` otherwise; then
                no operand counts as visible beside a reordered one.
        """
        if len(known) > 1:
            known = sorted(known, key=lambda one: self._earliest(one[1]))
        found: list[Dim] = []
        for place, size in enumerate(shape):
            back = len(shape) - place
            here = []
            for tensor, own in known:
                if size != 1 and back <= len(own) and size_of(own[-back]) == size:
                    here.append((tensor, own[-back]))
            found.append(self._choice(here, whole, place, beside) if here else fresh([size])[0])
        # If a dimension is in no operand, all positions along it hold the same token.
        before = tuple(dim for _, own in known for dim in own)
        return self._lost(tuple(found), before) or tuple(found)

    def _choice(
        self,
        here: list[tuple[torch.Tensor, Dim]],
        whole: list[torch.Tensor],
        place: int,
        beside: bool | None,
    ) -> Dim:
        """The axes of one dimension, among those of the operands that have it; see ``_by_place``."""
        lost, clean = [], []
        there = [one for one in here if any(one[0] is tensor for tensor in whole)]
        others = [dim for tensor, dim in there if place < tensor.dim() - 1]
        for one in there:
            is_lost = self._has_losses(one[1]) or (beside is not None and self._is_moved(one[1]))
            (lost if is_lost or self._is_regrouped(one[1], others) else clean).append(one)
        if not lost:
            return here[0][1]
        value = lost[0][0] if beside else None
        shown = (one for one in clean if beside is not None and self._shows(one[0], value, place))
        return (next(shown, None) or lost[0])[1]

    def _is_moved(self, dim: Dim) -> bool:
        """True if a dimension of an input was reordered before the call."""
        return False

    def _shows(self, tensor: torch.Tensor, beside: torch.Tensor | None, place: int) -> bool:
        """True if the tokens of ``tensor``, which are in order, are visible in a sum along a dimension; for channels,
        along all dimensions.
        """
        self.reads_values = True
        if self.hidden is not None and self.hidden.has(tensor):
            return False
        if place == tensor.dim() - 1:
            return shows_all(tensor, beside)
        return shows(tensor, beside, place)

    def _shows_in_place(
        self, name: str, result: torch.Tensor, operands: list[torch.Tensor], kwargs: dict[str, Any]
    ) -> bool:
        """True if tokens are still visible after others were added to them in place."""
        if not element_places.is_of(name, element_places.OF_ALL):
            return True
        for one in operands:
            own = self._known.get(one) if one is not result and one.shape == result.shape else None
            pairs = zip((own or ())[:-1], self._known.get(result) or (), strict=False)
            if own is not None and (
                any(self._has_losses(dim) or self._is_moved(dim) for dim in own)
                or any(self._is_regrouped(dim, [its]) for dim, its in pairs)
            ):
                self.reads_values = True
                if self.hidden is not None and self.hidden.has(result):
                    return False
                before = summand(result, name, one, result, kwargs)
                is_sum = element_places.is_of(name, element_places.ADDING)
                return is_sum and shows_all(before, one)
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
        before = tuple(dim for dims in axes.values() for dim in dims)
        summed = [
            axis for label, dims in axes.items() if label not in product.result for d in dims for axis in d
        ]
        found = tuple(
            min(fitting, key=self._rank)
            if (fitting := [dim for dim in axes.get(label, []) if size_of(dim) == size])
            else fresh([size])[0]
            for label, size in sizes
        )
        return self._mixed(found, before, summed)

    def _mixed(self, found: Dims, before: Dims, summed: Sequence[Axis]) -> Dims:
        """The dimensions of a product; if tokens were summed over, its new axes hold them at unknown positions."""
        return self._lost(found, before) or found if self._has_tokens_along(leaves(summed)) else found

    def _has_tokens_along(self, axes: Sequence[Axis]) -> bool:
        """True if an axis is one of an input's dimensions before the last, which is channels."""
        for leaf in axes:
            origin, made = self.origin(leaf), self.made.get(leaf, Made())
            inside = [
                *(part for part, _ in made.parts if part),
                *([(made.of,)] if made.of is not None else []),
            ]
            if self._loss(leaf) is not None or (
                origin is not None and origin[1] < len(self.inputs[origin[0]]) - 1
            ):
                return True
            if any(self._has_tokens_along(leaves(dim)) for dim in inside):
                return True
        return False

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
        known = [(piece, own) for piece in pieces if (own := self._known.get(piece)) is not None]
        if not known:
            return None
        whole = [piece for piece, _ in known]
        if name == "stack":
            stacked = [(piece, (*own[:place], (), *own[place:])) for piece, own in known]
            return self._by_place(stacked, result.shape, whole, None)
        others = [(piece, (*own[:place], (), *own[place + 1 :])) for piece, own in known]
        shape = list(result.shape)
        shape[place] = 1
        dims = list(self._by_place(others, shape, whole, False if place == result.dim() - 1 else None))
        parts = [(self._along(piece, place), piece.shape[place]) for piece in pieces]
        dims[place] = self._one(parts)
        return tuple(dims)

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

    def _unknown(self, result: torch.Tensor, dims: Dims = ()) -> Dims:
        found = fresh(result.shape)
        self._lost(found, dims)
        return found
