"""Follows the functions that a model calls between its attention modules, to know the order of its tokens.

Models transpose the rows and columns of an image, cut it into windows, or swap halves: dimensions are split, permuted
and merged again. They are followed as inside a module (``sources.py``), beginning with the tensor that is split or
transposed first, whose order is taken for the model's. A function that is not known to leave tokens in place makes new
axes that bear its name (``Axis.made_by``): a product along tokens, stacked pieces, a write at an index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.observing import MAKING
from attnpatch.rows.graph.axes import Axis, Dims, fresh, leaves, regroup
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.origins import Made
from attnpatch.rows.provenance.reordered import sums, writes
from attnpatch.rows.provenance.reordered.function_tables import (
    CUTTING,
    ENTERING_TORCH,
    EXPANDING,
    IN_WORDS,
    LEAVING_TORCH,
    LIKE,
    MIXING,
    ORDERED,
    SPATIAL,
    TURNING,
    begins,
    is_elementwise,
    is_nothing,
    is_setting,
    leaves_tokens,
)
from attnpatch.rows.provenance.reordered.token_tensors import TokenTensors, base, is_learned, listed
from attnpatch.rows.provenance.returned import module_results
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.tensors import is_wide, tensors_in
from attnpatch.rows.provenance.unseen_writes import EXPOSING, UNSEEN, may_write_to, written_by


class Turned(TokenTensors):
    """Follows the tokens of a model's call; see ``TokenTensors`` for the arguments."""

    def __init__(self, module: torch.nn.Module, given: Any) -> None:
        super().__init__(module, given)
        self._has_left_torch = False
        # For slices with steps: the source tensor, and start and step by dimension.
        self._slices: Any = WeakIdKeyDictionary()

    def before(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
        """Called before each torch function, if tensors have no version."""
        for one in may_write_to(func, args, kwargs):
            self.is_bare.before_write(one)

    def follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Called after each torch function."""
        given = result if isinstance(result, (tuple, list)) else (result,)
        results = [one for one in given if type(one) is torch.Tensor]
        if not results and name in EXPOSING and args and self.is_plain(args[0]):
            self.is_bare.expose(args[0])
        is_set, is_foreign = is_setting(name), name.startswith("torch._ops.")
        if not results and name not in LEAVING_TORCH and not is_set and not is_foreign:
            return  # a shape, a dtype
        # ``out=`` does not contribute to the values of the result.
        given_out = []
        if "out" in kwargs:
            given_out = tensors_in(kwargs["out"])
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if self.is_plain(tensor)]
        written = [tensor for tensor in tensors if any(tensor is one for one in results)] + given_out
        if is_set and (name == "__setitem__" or name.endswith("_")) and args and self.is_plain(args[0]):
            written = [args[0]]
        for one in written:
            self.is_bare.wrote(one)
        if is_foreign:
            for one in written_by(func, args, kwargs):
                self.is_bare.lose(one)
        before = [self.why(one) or self.why(base(one)) for one in written]
        own = [one for one in (tensors[:1] if name in LIKE else tensors) if self.has_tokens(one)]
        for one in results:
            if one not in self.is_bare or any(one is other for other in given_out):
                self.is_bare[one] = False
        if own and not is_set:
            self.picked.follow((name, func), args, kwargs, own, results)
        if name in LEAVING_TORCH:
            self._has_left_torch |= any(tensor.is_floating_point() and is_wide(tensor) for tensor in own)
        elif not own or name.startswith(MAKING) or is_nothing(name, args, kwargs):
            self._without_tokens(name, results)
        elif is_set:
            writes.follow_write(self, name, args, kwargs, tensors, results)
        elif sums.mixes(self, name, own, results) or (name in MIXING and self.hidden.has(own[0])):
            # Where tokens are hidden, a running sum holds others alone.
            self.lose(results[0], name)
        elif any(map(is_wide, results)):
            self._follow(name, func, (args, kwargs), own, results, result)
        if own and not all(map(self.is_bare.get, results or written)):
            self.hidden.follow(name, args, kwargs, own, results or written)
        for one, reasons in zip(written, before, strict=True):
            self.hidden.spread(one, self.sharing)
            writes.spread(self, one, reasons)

    def through(self, given: Sequence[torch.Tensor], result: Any, inside: Sources | None) -> None:
        """Note after attention has run which order its result has.

        Args:
            given: The tensors that it was called with.
            result: Its result.
            inside: The sources that have followed its functions, or ``None``.
        """
        new = [one for one in tensors_in(result) if one not in self.is_bare]
        order = None if inside is None else inside.recall_results(new)
        for number, one in enumerate(given):
            if inside is None or inside.has_seen_writes(one):
                self.is_bare.agree(one)
            if inside is not None and order is None and module_results.is_moved(inside, number, one):
                before = self.why(one)
                self.lose(one, "__setitem__")
                writes.spread(self, one, before)
        own = [each for each in given if not (self.is_bare.get(each) or is_learned(each))]
        for place, one in enumerate(new):
            self.is_bare[one] = False
            self.picked.pass_on(own, one)
            for source in given[:1]:
                self.hidden.same(source, one)
            if order is not None:
                self._take_over(given, order[place], one)
                continue
            if inside is not None and inside.hidden is not None:
                self.hidden.adopt(inside.hidden, one)
            if type(one) is torch.Tensor and self.sources.of(one) is None:
                self.adopt(inside, given, one, is_alone=len(new) == 1)
        if inside is not None and order is None:
            inside.remember_results(new, lambda: module_results.orders(inside, given, new))

    def _take_over(self, given: Sequence[torch.Tensor], number: int | None, one: torch.Tensor) -> None:
        """Note that a tensor has the order of an input of the module that has made it."""
        dims = None if number is None else self.sources.of(given[number])
        if dims is not None:
            self.sources.give(one, (*dims[:-1], *fresh(one.shape[-1:])))

    def adopt(
        self,
        inside: Sources | None,
        given: Sequence[torch.Tensor],
        one: torch.Tensor,
        is_alone: bool = False,
    ) -> None:
        """Give a tensor that a module has made the axes by which the model's tokens are followed.

        Args:
            inside: The sources that have followed the module's functions, or ``None``.
            given: The tensors that it was called with.
            one: The tensor.
            is_alone: True if it has made no other one.
        """
        dims = None if inside is None else inside.returned(one)
        if inside is not None and dims is not None:
            found = module_results.Translation(self, inside, given, is_alone).dims(dims)
            if found:
                self.sources.give(one, found)
        elif (inside is None or not inside.knows(one)) and one.is_floating_point() and is_wide(one):
            self.lose(one, UNSEEN)

    def _without_tokens(self, name: str, results: list[torch.Tensor]) -> None:
        for one in results:
            if name in ENTERING_TORCH and self._has_left_torch and one.is_floating_point() and is_wide(one):
                self.lose(one, name)
            else:
                self.is_bare[one] = True

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        given: tuple[Any, dict[str, Any]],
        own: list[torch.Tensor],
        results: list[torch.Tensor],
        result: Any,
    ) -> None:
        first = own[0]
        if leaves_tokens(name) and not (name == "embedding" and len(own) > 1):
            if all(self.sources.of(tensor) is None for tensor in own):
                return
        elif not self._begin(name, own, results[0]):
            return
        before = [dims for tensor in own if (dims := self.sources.of(tensor)) is not None]
        dims = self.sources.of(first)
        if name in ORDERED and dims is not None and results[0].shape == first.shape:
            for one in results:
                self.sources.give(one, dims)
            return
        if name == "__getitem__" and dims is not None and results[0].numel() == first.numel():
            # A mask that is true everywhere, over one or several dimensions.
            count = first.dim() - results[0].dim() + 1
            if is_mask(given[0][1], count):
                joined = tuple(axis for dim in dims[:count] for axis in dim)
                self.sources.give(results[0], (joined, *dims[count:]))
                return
        if name in MIXING and dims is not None and results[0].dim() == len(dims):
            self.sources.give(results[0], (*dims[:-1], *fresh(results[0].shape[-1:])))
            return
        if name in element_places.IN_ORDER and dims is not None and results[0].numel() == first.numel():
            # Elements stay in row-major order, whatever the memory layout, so adjacent dimensions can be merged into
            # one.
            grouped = regroup(dims, results[0].shape)
            if grouped is not None:
                self.sources.give(results[0], grouped)
                return
        self.sources.follow(func, *given, result)
        if name in SPATIAL and name not in element_places.CONVOLUTIONS and dims is not None:
            self._pooled(dims, first, results)
        if name == "pad" and dims is not None:
            self._padded(dims, first, results[0], *given)
        self._mark(name, before, own, results)
        self._merge(name, given, first, results[0])
        if is_elementwise(name):
            sums.choose_axes(self, name, own, results[0], given[1])
        elif name in element_places.JOINING:
            sums.beside(self, own, results[0])
            sums.joined(self, name, given, results[0])

    def _begin(self, name: str, own: list[torch.Tensor], result: torch.Tensor) -> bool:
        """Begin to follow a function's operands, if needed; False if there is nothing to follow."""
        if name in element_places.JOINING:
            for tensor in own:
                self.order(tensor)
        elif begins(name, own[0], result):
            self.order(own[0])
        elif name in CUTTING or name in element_places.IN_ORDER or name in TURNING:
            return any(self.sources.of(tensor) is not None for tensor in own)
        else:
            for tensor in own:
                if self.sources.of(tensor) is None:
                    self.sources.give(tensor, fresh(tensor.shape))
        return True

    def order(self, tensor: torch.Tensor) -> None:
        """Take the present order of a tensor as the right one for those of its axes that were not seen before."""
        dims = self.sources.of(tensor)
        if dims is None:
            dims = fresh(tensor.shape)
            self.sources.give(tensor, dims)
        made, origin = self.sources.made, self.sources.origin
        new = tuple(
            tuple(leaf for leaf in leaves(dim) if leaf not in made and origin(leaf) is None) for dim in dims
        )
        if any(new):
            self.sources.inputs.append(new)

    def _mark(
        self, name: str, before: list[Dims], own: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        """Mark new axes with the function that made them, unless it is known to keep tokens in place."""
        kept = {leaf for dims in before for dim in dims for leaf in leaves(dim)}
        is_product = is_elementwise(name) and not element_places.is_of(name, element_places.ADDING)
        by_place = is_elementwise(name) or element_places.is_of(name, element_places.OF_FIRST)
        for one in results:
            dims = self.sources.of(one)
            if dims is None:
                if not leaves_tokens(name) and all(one is not tensor for tensor in own):
                    self.lose(one, name)
                continue
            for place, dim in enumerate(dims):
                is_spread = is_product and _is_spread(own, one, place)
                if (name in SPATIAL and place > 1) or (by_place and name not in EXPANDING and not is_spread):
                    continue
                for leaf in leaves(dim):
                    is_new = leaf not in kept and leaf not in self.sources.made
                    if is_new and self.sources.origin(leaf) is None:
                        leaf.made_by = leaf.made_by or IN_WORDS.get(name, name)

    def _merge(
        self, name: str, given: tuple[Any, dict[str, Any]], first: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Recognise strided slices concatenated along channels: the same image, coarser (Swin's patch merging)."""
        if name == "__getitem__":
            index = listed(given[0][1])
            steps = [(one.start or 0, one.step or 1) for one in index if isinstance(one, slice)]
            if len(steps) == len(index) and any(step > 1 for _, step in steps):
                self._slices[result] = id(first), self.why(first), steps
        elif name in element_places.JOINING and first in self._slices:
            found = [self._slices.get(piece) for piece in tensors_in(given[0][:1])]
            source, why, steps = self._slices[first]
            wanted = {*itertools.product(*(range(step) for _, step in steps))}
            its = {tuple(start for start, _ in each[2]) for each in found if each and each[0] == source}
            if its == wanted and len(found) == len(wanted) and result.shape[:-1] == first.shape[:-1]:
                dims = fresh(result.shape)
                for place, reason in why.items():
                    for leaf in leaves(dims[place]):
                        leaf.made_by = reason
                self.sources.give(result, dims)

    def _padded(
        self, dims: Dims, first: torch.Tensor, result: torch.Tensor, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Treat constant padding like tokens that were concatenated."""
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        amounts = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
        if mode != "constant" or len(amounts) > 2 * len(dims):
            return
        found = list(self.sources.of(result) or ())
        for back, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
            place = len(dims) - 1 - back
            if (low or high) and min(low, high) >= 0:
                axis = Axis(result.shape[place])
                parts = ((None, low), (dims[place], first.shape[place]), (None, high))
                self.sources.made[axis] = Made(tuple(part for part in parts if part[1]))
                found[place] = (axis,)
        self.sources.give(result, tuple(found))

    def _pooled(self, dims: Dims, first: torch.Tensor, results: list[torch.Tensor]) -> None:
        """After pooling, dimensions that keep their length (sequences, channels) keep their axes."""
        for one in results:
            if one.dim() == len(dims) > 2:
                pairs = zip(dims, first.shape, one.shape, strict=True)
                kept = (dim if size == own else fresh([own])[0] for dim, size, own in pairs)
                self.sources.give(one, tuple(kept))


def _is_spread(own: list[torch.Tensor], result: torch.Tensor, place: int) -> bool:
    """True if there is one token along a dimension, which numbers of all places (a mask) have been multiplied with."""
    back = result.dim() - place
    wide = [one for one in own if one.dim() and one.shape[-1] == result.shape[-1] > 1]
    return result.shape[place] > 1 and all(one.dim() < back or one.shape[-back] == 1 for one in wide)


def is_mask(index: Any, dims: int) -> bool:
    (one,) = index if isinstance(index, tuple) and len(index) == 1 else (index,)
    return isinstance(one, torch.Tensor) and one.dtype == torch.bool and one.dim() == dims
