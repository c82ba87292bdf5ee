"""Which tensors of a model's call hold its tokens in another order because of views and pieces.

Rows and columns of an image that change places, windows one after the other, halves that are swapped: dimensions are cut,
put into another order and joined again. They are followed as those of a module are (``sources``), from the tensor that is
cut or turned first: as it lies there is the order of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows import places
from attnpatch.rows.axes import Axis, Dims, fresh, leaves
from attnpatch.rows.sources import Sources, tensors_in
from attnpatch.rows.strides import Part

# Functions that change the order of dimensions, and those that take a piece of a tensor.
_TURNING = frozenset("transpose permute movedim moveaxis swapaxes swapdims T mT H mH t adjoint".split())
_CUTTING = frozenset("__getitem__ narrow split split_with_sizes chunk tensor_split unsafe_chunk".split())


class Turned:
    """Follows the views of a model's call."""

    def __init__(self) -> None:
        self._sources = Sources([])

    def follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """A function of torch's has run."""
        is_begun = bool(self._sources.inputs)
        if not is_begun and name not in _TURNING and name not in _CUTTING and name not in places.IN_ORDER:
            return
        tensors = [*tensors_in((args, kwargs))]
        if not tensors:
            return
        if _begins(name, tensors[0], result):
            self._begin(tensors[0])
        if any(self._sources.of(tensor) is not None for tensor in tensors):
            self._sources.follow(func, args, kwargs, result)
            if isinstance(result, torch.Tensor) and self.is_turned(result):
                self._add(tensors, result)

    def through(self, given: torch.Tensor, result: Any) -> None:
        """Attention has run: what it gives for tokens lies as they do."""
        dims = self._sources.of(given)
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if dims is not None and type(one) is torch.Tensor and one.shape[:-1] == given.shape[:-1]:
                self._sources.give(one, (*dims[:-1], *fresh(one.shape[-1:])))

    def is_turned(self, tensor: torch.Tensor) -> bool:
        """Whether a dimension of a tensor has elements in another order than they had."""
        dims = self._sources.of(tensor)
        return dims is not None and any(self._is_out_of_order(leaves(dim)) for dim in dims)

    def _add(self, tensors: list[torch.Tensor], result: torch.Tensor) -> None:
        """A sum with tokens that lie in order (a residual) has their order."""
        for tensor in tensors:
            if has_tokens_of(tensor, result) and tensor is not result and not self.is_turned(tensor):
                self._sources.give(result, self._sources.of(tensor) or fresh(result.shape))

    def _begin(self, tensor: torch.Tensor) -> None:
        """As a tensor lies now is the order of those of its axes that were not seen before."""
        dims = self._sources.of(tensor)
        if dims is None:
            dims = fresh(tensor.shape)
            self._sources.give(tensor, dims)
        elif not self._has_new(dims):
            return
        self._sources.inputs.append(dims)

    def _has_new(self, dims: Dims) -> bool:
        made = self._sources.made
        return any(
            self._sources.origin(leaf) is None and leaf not in made for dim in dims for leaf in leaves(dim)
        )

    def _is_out_of_order(self, dim: list[Axis]) -> bool:
        pieces = [piece for leaf in dim for piece in self._pieces(leaf)]
        for axis in {piece.of for piece in pieces}:
            own = [piece for piece in pieces if piece.of is axis]
            if len(own) > 1 and (
                any(piece.step != 1 for piece in own) or own != sorted(own, key=lambda p: p.start)
            ):
                return True
        origins = [found for leaf in dim if (found := self._sources.origin(leaf)) is not None]
        if len(origins) < 2:
            return False
        numbers = {number for number, _, _ in origins}
        by_number = ([found for found in self._in_order(origins) if found[0] == number] for number in numbers)
        return any(own != sorted(own) for own in by_number)

    def _in_order(self, origins: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Those that have an order.

        Pieces of channels may stand between rows and columns (an image of more of them): what is no dimension's first
        piece, or one of the last dimension beside all of another.
        """
        inputs, counts = self._sources.inputs, Counter(found[:2] for found in origins)
        whole = {(n, place) for n, place in counts if counts[n, place] == len(leaves(inputs[n][place]))}
        numbers_of_whole = {number for number, _ in whole}
        found = []
        for number, place, part in origins:
            is_channels = place == len(inputs[number]) - 1 and number in numbers_of_whole
            if (number, place) in whole or (not is_channels and (number, place, 0) in origins):
                found.append((number, place, part))
        return found

    def _pieces(self, axis: Axis) -> list[Part]:
        """What an axis consists of, in order: pieces of axes that were not joined."""
        made = self._sources.made.get(axis)
        if made is not None and made.of is not None and made.part is not None:
            return _piece(self._pieces(made.of), made.part)
        if made is None or not made.parts:
            return [Part(axis, 0, axis.size, 1)]
        found: list[Part] = []
        for dim, size in made.parts:
            own = leaves(dim) if dim is not None else []
            found += self._pieces(own[0]) if len(own) == 1 else [Part(Axis(size), 0, size, 1)]
        return found


def _piece(parts: list[Part], piece: Part) -> list[Part]:
    """A piece of what consists of some parts."""
    if piece.step != 1:
        return [piece]
    found, place = [], 0
    for part in parts:
        low, high = max(piece.start, place), min(piece.start + piece.count, place + part.count)
        if low < high:
            found.append(Part(part.of, part.start + (low - place) * part.step, high - low, part.step))
        place += part.count
    return _joined(found)


def _joined(parts: list[Part]) -> list[Part]:
    """Parts, those that go on where the one before ends as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else Part(Axis(0), 0, 0, 1)
        goes_on = last.of is part.of and last.step == part.step == 1 and last.start + last.count == part.start
        if goes_on:
            found[-1] = Part(last.of, last.start, last.count + part.count, 1)
        else:
            found.append(part)
    return found


def _begins(name: str, first: torch.Tensor, result: Any) -> bool:
    """Whether a function cuts or turns a tensor of numbers that were not learned, along more than its channels."""
    one = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(one, torch.Tensor) or first.dim() < 2 or is_learned(first):
        return False
    if name in _TURNING:
        return True
    if name in _CUTTING:
        return one.dim() == first.dim() and one.shape[:-1] != first.shape[:-1]
    return name in places.IN_ORDER and one.dim() > first.dim() and one.numel() == first.numel()


def is_learned(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one: it has no tokens."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def has_tokens_of(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a tensor has all of the result's tokens: numbers that were learned have none."""
    return (
        tensor.shape == result.shape
        and not is_learned(tensor)
        and tensor.is_floating_point() == result.is_floating_point()
    )
