"""Follows the tokens that a model picks between its attention modules: from which inputs and from which places they are.

Tokens that are picked at an index may be changed and written back where they were (some layers for some tokens), or
written over others. Features of another input (a picture) may be written over their placeholders in a text. So for every
tensor with tokens, the inputs that it was made from are noted, and for picked tokens also their places: the numbers of
the tokens of the tensor that they were picked from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.reordered.function_tables import (
    CUTTING,
    TURNING,
    is_elementwise,
    leaves_tokens,
)
from attnpatch.rows.provenance.tensors import ByTensor, is_wide, tensors_in

# Functions that pick tokens at indices given by a tensor.
_INDEXING = frozenset("gather take_along_dim index_select".split())
# Functions whose other operands only choose among the values of the first.
_OF_FIRST_ALONE = _INDEXING | {"__getitem__", "masked_select", "masked_fill", "index_fill", "topk", "sort"}
# Writes that add to what is there.
_ADDING = frozenset("index_add scatter_add scatter_reduce index_reduce".split())

# The leading sizes of the tensor that tokens were picked from, and a number for the place of each.
Places = tuple[tuple[int, ...], torch.Tensor]


class Picked:
    """The inputs and places of the tensors of one model call.

    Args:
        hidden: Tells which tensors may hide some of their tokens.
        why: For each dimension of a tensor that is out of order, returns the cause.
    """

    def __init__(self, hidden: HiddenTokens, why: Callable[[torch.Tensor], dict[int, str]]) -> None:
        self._hidden, self._why = hidden, why
        # Other tensors that are known to be out of order.
        self.out_of_order: Any = ()
        # For each tensor with tokens: the numbers of the model's inputs that it was made from.
        self._inputs = ByTensor()
        self._count = 0
        # For each tensor of picked tokens: their places; several if tokens of several places were added.
        self._places: Any = WeakIdKeyDictionary()

    def begin(self, tensor: torch.Tensor) -> None:
        """Note an input of the model."""
        self._inputs[tensor] = frozenset([self._count])
        self._count += 1

    def have_common_input(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """True if two tensors may hold tokens of the same input."""
        first, second = self._inputs.get(one), self._inputs.get(other)
        return first is None or second is None or bool(first & second)

    def pass_on(self, given: Sequence[torch.Tensor], result: torch.Tensor) -> None:
        """Note that a tensor was made from these tensors by a module."""
        if result not in self._inputs:
            self._inputs[result] = self._of_all(given)

    def lose_places(self, tensor: torch.Tensor) -> None:
        """Note that the places of a tensor's tokens are no longer known."""
        self._places.pop(tensor, None)

    def wrote(
        self, target: torch.Tensor, value: torch.Tensor | None, out: torch.Tensor, is_whole: bool
    ) -> None:
        """Called after a write.

        Args:
            target: The tensor that is written to.
            value: What is written; ``None``: no tokens.
            out: The result: the target itself, or a copy of it.
            is_whole: True if all of it was written.
        """
        given = [target] if value is None else [value] if is_whole else [target, value]
        self._inputs[out] = self._of_all(given)
        source = value if is_whole else target
        if source is not out:
            self._set(out, (self._places.get(source) if source is not None else None) or [])

    def follow(
        self,
        called: tuple[str, Callable[..., Any]],
        args: Any,
        kwargs: dict[str, Any],
        own: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        """Called after a torch function.

        Args:
            called: Its name, and the function.
            args, kwargs: Its arguments, without ``out``.
            own: The tensors among them that hold tokens.
            results: Its results.
        """
        name, func = called
        values = [one for one in (own[:1] if name in _OF_FIRST_ALONE else own) if one.dtype != torch.bool]
        inputs = self._of_all(values)
        for one in results:
            before = self._inputs.get(one, frozenset())
            self._inputs[one] = None if inputs is None or before is None else before | inputs
        first = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("input")
        is_view = name in CUTTING or name in TURNING or name in element_places.IN_ORDER
        is_pick = (
            (name in CUTTING or name in _INDEXING) and first is not None and any(first is t for t in own)
        )
        if not self._places and not is_pick:
            return
        if is_pick or (is_view and first in self._places):
            sources = self._places.get(first) or (
                [_whole(first)] if is_pick and self._is_ordered(first) else []
            )
            found = [_picked(name, func, (first, *args[1:]), kwargs, source) for source in sources]
            for i, one in enumerate(results):
                its = [each[i] for each in found if each and i < len(each) and each[i] is not None]
                self._set(one, [each for each in its if each[1].shape == one.shape[:-1]])
        elif leaves_tokens(name):
            self._changed(name, values, results)
        else:
            for one in results:
                self._places.pop(one, None)

    def are_in_their_places(
        self, name: str, args: Any, kwargs: dict[str, Any], out: torch.Tensor, value: torch.Tensor
    ) -> bool:
        """True if a write puts picked tokens back into the places that they were picked from."""
        return any(
            math.prod(of) == math.prod(sizes) and _is_same(name, args, kwargs, numbers, places)
            for of, places in self._places.get(value) or ()
            for sizes, numbers in self._places.get(out) or [_whole(out)]
        )

    def has_places(self, tensor: torch.Tensor) -> bool:
        """True if a tensor holds picked tokens whose places are known."""
        return bool(self._places.get(tensor))

    def joined_out_of_order(self, pieces: Sequence[torch.Tensor], dim: int) -> bool:
        """True if pieces that are concatenated along a dimension of tokens hold tokens of other places."""
        pieces = [one for one in pieces if one.numel()]
        noted = [one for one in pieces if self._places.get(one)]
        sizes = self._places[noted[0]][0][0] if noted else ()
        if not 0 <= dim < len(sizes) or any(one.dim() != len(sizes) + 1 for one in pieces):
            return False
        is_of_all, at, last = sizes[dim] == sum(one.shape[dim] for one in pieces), 0, None
        for one in pieces:
            found = self._places.get(one) or []
            if not found and one.shape[:-1] == sizes and self.have_common_input(one, noted[0]):
                found = [_whole(one)]
            if found and found[0][0] == sizes:
                numbers = found[0][1] // math.prod(sizes[dim + 1 :]) % sizes[dim]
                numbers = numbers.movedim(dim, 0).reshape(one.shape[dim], -1)
                steps = torch.arange(at, at + one.shape[dim], device=numbers.device)
                is_after = last is None or bool((numbers[0] > last).all())
                if not is_after or (is_of_all and not bool((numbers == steps[:, None]).all())):
                    return True
                last = numbers[-1]
            at += one.shape[dim]
        return False

    def _is_ordered(self, tensor: torch.Tensor) -> bool:
        if tensor.dim() < 2 or tensor in self.out_of_order:
            return False
        return not any(place < tensor.dim() - 1 for place in self._why(tensor))

    def _of_all(self, tensors: Sequence[torch.Tensor]) -> frozenset[int] | None:
        # Vectors that the model holds (frequencies of positions) are no tokens.
        found: frozenset[int] = frozenset()
        for one in tensors:
            own = self._inputs[one] if one in self._inputs else None if is_wide(one) else found
            if own is None:
                return None
            found = own if found <= own else found | own
        return found

    def _set(self, tensor: torch.Tensor, places: list[Places]) -> None:
        if places:
            self._places[tensor] = places
        else:
            self._places.pop(tensor, None)

    def _changed(self, name: str, values: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Places after a function that leaves tokens where they are. A sum has those of each summand."""
        for one in results:
            alike = [each for each in values if each.shape[:-1] == one.shape[:-1]]
            found = [self._places.get(each) or [] for each in alike]
            is_sum = element_places.is_of(name, element_places.ADDING)
            if is_sum and len(alike) > 1:
                found = [
                    [] if self._hidden.has(each) else its for each, its in zip(alike, found, strict=True)
                ]
            if not is_elementwise(name):
                found = found[:1]
            if is_sum or not found:
                places = [place for each in found for place in each]
            else:
                places = [place for place in found[0] if all(_has(each, place) for each in found[1:])]
            self._set(one, places)


def _whole(tensor: torch.Tensor) -> Places:
    sizes = tuple(tensor.shape[:-1])
    return sizes, torch.arange(math.prod(sizes), device=tensor.device).view(sizes)


def _has(places: list[Places], one: Places) -> bool:
    return any(sizes == one[0] and torch.equal(numbers, one[1]) for sizes, numbers in places)


def _picked(
    name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], source: Places
) -> list[Places | None] | None:
    """The places of a function's results, each from the same function on numbers; ``None``: not known."""
    sizes, numbers = source
    first, *rest = args
    if numbers.shape != first.shape[:-1]:
        return None
    width = first.shape[-1]
    is_index = name in _INDEXING or any(True for _ in tensors_in((rest, kwargs))) or _has_list(rest)
    try:
        if is_index:
            rest, kwargs = (_one_channel(name, each) for each in (rest, kwargs))
            given = numbers.unsqueeze(-1)
        else:
            given = numbers.unsqueeze(-1).expand(first.shape)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        result = func(given, *rest, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # it does more than to pick tokens
    found: list[Places | None] = []
    for one in result if isinstance(result, (tuple, list)) else (result,):
        is_same_width = one.dim() > 0 and one.shape[-1] == (1 if is_index else width)
        is_one = is_same_width and (is_index or one.stride(-1) == 0 or bool((one == one[..., :1]).all()))
        found.append((sizes, one[..., 0]) if is_one else None)
    return found


def _has_list(rest: Sequence[Any]) -> bool:
    return any(
        isinstance(one, list) for value in rest for one in (value if isinstance(value, tuple) else (value,))
    )


def _one_channel(name: str, given: Any) -> Any:
    """Arguments with indices that are alike for all channels reduced to one.

    Raises:
        ValueError: They are not alike.
    """
    if name not in ("gather", "take_along_dim", "scatter", "masked_scatter"):
        return given
    if isinstance(given, dict):
        return {key: _one_channel(name, value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [_one_channel(name, value) for value in given]
    if isinstance(given, torch.Tensor) and given.dim() > 1:
        if given.stride(-1) and not bool((given == given[..., :1]).all()):
            raise ValueError("indices differ between channels")
        return given[..., :1]
    return given


def _is_same(
    name: str, args: Any, kwargs: dict[str, Any], numbers: torch.Tensor, places: torch.Tensor
) -> bool:
    """True if the same write of places to the numbers of all places changes none of them."""
    plain = name.rstrip("_") if not name.startswith("__") else name
    whole = numbers.unsqueeze(-1)
    written, values = whole.clone(), places.unsqueeze(-1).to(whole.device)
    try:
        if plain == "__setitem__":
            written[args[1]] = values
        elif plain == "copy":
            written = values.expand_as(whole)
        elif plain in ("index_copy", "scatter", "masked_scatter", "index_put"):
            names = {"index_copy": ("dim", "index"), "scatter": ("dim", "index"), "masked_scatter": ("mask",)}
            keys = names.get(plain, ("indices",))
            given = [*args[1 : 1 + len(keys)], *(kwargs[key] for key in keys[len(args) - 1 :])]
            written = getattr(written, plain)(*_one_channel(plain, given), values)
        else:
            return False
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError):
        return False
    return torch.equal(written, whole)


def adds(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """True if a write adds to what is there."""
    accumulates = bool(args and args[-1] is True) or bool(kwargs.get("accumulate"))
    return element_places.is_of(name, _ADDING) or (name.rstrip("_") in ("index_put", "put") and accumulates)
