"""Tells which tensors may no longer show some of their tokens, whatever was added to them since.

A residual may have been multiplied by 0, masked out or drowned by other numbers. It still has the shape of tokens in
order, and once positions are added it also looks like them. So functions that can hide tokens are examined when they
are called, and the answer is kept for all that is made from their results. An answer is a tensor, which is read only
where tokens in order are combined with reordered ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.op_table import CASTS
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.residuals import shows, summand
from attnpatch.rows.provenance.tensors import ByTensor, tensors_in

_DIVIDING = frozenset("div divide true_divide __truediv__".split())
_DROPOUT = frozenset("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split())
_FILLING = frozenset("zero fill".split())
# Functions that replace values beyond a bound by the bound, or by a number.
_BOUNDING = frozenset(
    "relu relu6 clamp clip clamp_min clamp_max hardtanh threshold hardshrink softshrink maximum minimum fmax fmin".split()
)
_OTHERS = frozenset("masked_fill index_fill setitem index_put where lerp addcmul pow".split())
# Functions that leave every token of an embedding visible.
_KEEPING = element_places.IN_ORDER | CASTS | frozenset("clone layer_norm rms_norm dropout".split())
# The parameters, in order, of functions that can hide tokens, if it matters which argument is which.
_PARAMETERS = {
    "masked_fill": ("input", "mask"),
    "where": ("condition", "input", "other"),
    "index_put": ("input", "indices", "values"),
    "lerp": ("input", "end", "weight"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "pow": ("input", "exponent"),
    **dict.fromkeys(("div", "divide", "true_divide"), ("input", "other")),
    **dict.fromkeys(_DROPOUT, ("input", "p", "training")),
}
_NOTHING = contextlib.nullcontext()
# Numbers below this may make tokens so small that positions drown them.
_LEAST = 1e-3


class HiddenTokens:
    """Keeps, for the tensors of one call, whether some of their tokens may be hidden.

    Args:
        masks: Integer tensors ``[batch, tokens]`` among the model's inputs; see ``residuals.shows``.
    """

    def __init__(self, masks: Sequence[torch.Tensor] = ()) -> None:
        self._masks = masks
        # For tensors whose tokens may be hidden: the answer, a bool tensor without dimensions.
        self._hidden = ByTensor()
        # Tensors made from embeddings: their tokens count as visible even if they are all equal, or zero (padding).
        self._embedded = ByTensor()

    def inside(self, inputs: Sequence[torch.Tensor], bare: Sequence[torch.Tensor] = ()) -> HiddenTokens:
        """What is known of the tensors that a module is called with, to be followed inside it.

        Args:
            inputs: The tensors.
            bare: Those of them that hold no tokens at all.
        """
        found = HiddenTokens(self._masks)
        for one in inputs:
            if one in self._hidden:
                found._hidden[one] = self._hidden[one]
            if one in self._embedded:
                found._embedded[one] = True
        for one in bare:
            found._hidden[one] = torch.tensor(True)
        return found

    def has(self, tensor: torch.Tensor) -> bool:
        """True if some token of a tensor may be hidden."""
        found = self._hidden.get(tensor)
        return found is not None and bool(found)

    def same(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """Note that the tokens of ``copy`` are those of ``tensor``."""
        if tensor in self._hidden and copy is not tensor:
            self._hidden[copy] = self._hidden[tensor]

    def adopt(self, inside: HiddenTokens, tensor: torch.Tensor) -> None:
        """Note what was found of a tensor inside a module."""
        if tensor in inside._hidden:
            self._hidden[tensor] = inside._hidden[tensor]

    def follow(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        own: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        """Called after a torch function.

        Args:
            name: Its name.
            args, kwargs: Its arguments, without ``out``.
            own: The tensors among them that hold tokens.
            results: Its results.
        """
        if not own or not results or results[0].is_meta or compat.is_transformed():
            return
        one = results[0]
        whole = [tensor for tensor in own if tensor.shape == one.shape] or list(own)
        may_hide = _may_hide(name) and one.dim() > 1 and one.is_floating_point()
        found = self._found(name, args, kwargs, whole, one, may_hide) if self._hidden or may_hide else None
        is_embedded = name == "embedding" or (
            len(whole) == 1 and whole[0] in self._embedded and self._keeps(name, args)
        )
        for result in results:
            if found is not None:
                self._hidden[result] = found
            elif self._hidden:
                self._hidden.pop(result)
            if is_embedded:
                self._embedded[result] = True
            elif self._embedded:
                self._embedded.pop(result)

    def _found(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        whole: list[torch.Tensor],
        result: torch.Tensor,
        may_hide: bool,
    ) -> torch.Tensor | None:
        """Whether some token of a result may be hidden: a bool tensor without dimensions; ``None``: none is."""
        answers = [self._hidden.get(tensor) for tensor in whole]
        known = [answer for answer in answers if answer is not None]
        if not known and not may_hide:
            return None
        has_all = _has_all(name, args, kwargs, result)
        found = None
        # The functions called here are attnpatch's own: no mode must see them.
        with compat.DisableTorchFunction(), torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            if known and (len(known) == len(answers) or not has_all):
                found = functools.reduce(torch.logical_and if has_all else torch.logical_or, known)
            if may_hide:
                for new in self._newly(name, args, kwargs, whole, result):
                    found = new if found is None else found | new.to(found.device)
        return found

    def spread(self, written: torch.Tensor, sharing: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        """Note a write for the tensors that share the memory; ``sharing`` returns them."""
        found = self._hidden.get(written)
        if found is not None:
            with compat.DisableTorchFunction(), torch.no_grad():
                for one in sharing(written):
                    before = self._hidden.get(one)
                    self._hidden[one] = found if before is None else before | found

    @staticmethod
    def _keeps(name: str, args: Any) -> bool:
        is_scaled = element_places.is_of(name, element_places.MULTIPLYING) and any(
            isinstance(one, (int, float)) and abs(one) > _LEAST for one in args
        )
        return is_scaled or name in _KEEPING or element_places.is_of(name, element_places.ADDING)

    def _newly(
        self, name: str, args: Any, kwargs: dict[str, Any], whole: list[torch.Tensor], result: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Whether the function itself hides tokens: bool tensors without dimensions, one for each way in which it may."""
        for dead in _dead(name, args, kwargs, whole, result):
            if isinstance(dead, bool):
                if dead:
                    yield torch.tensor(True)
            elif dead.dim() <= result.dim():
                yield self._some(dead, result)
            else:
                yield torch.tensor(True)
        if not element_places.is_of(name, element_places.OF_ALL):
            return
        others = [
            tensor for tensor in tensors_in((args, kwargs)) if all(tensor is not each for each in whole)
        ]
        beside = next((one for one in others if _varies(one, result)), None)
        if beside is None or any(tensor in self._embedded for tensor in whole):
            return
        is_sum = element_places.is_of(name, element_places.ADDING)
        other = beside.expand(result.shape) if is_sum else None
        for tensor in whole:
            before = tensor if other is None else summand(tensor, name, other, result, kwargs)
            if before.shape == result.shape and all(
                shows(before, other, place, self._masks) for place in range(result.dim() - 1)
            ):
                return
        yield torch.tensor(True)

    def _some(self, dead: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """True if some token has lost all of its channels; these are the last dimension, or the second one of an image."""
        dead = dead.reshape((1,) * (result.dim() - dead.dim()) + dead.shape)
        tokens = dead.all(-1)
        if result.dim() == 3:
            for mask in self._masks:
                if mask.shape == result.shape[:2]:
                    mask = mask.to(dead.device)
                    is_mask = (mask.min() >= 0) & (mask.max() <= 1)
                    tokens = tokens & ~(is_mask & (mask == 0))
        found = tokens.any()
        return found | dead.all(1).any() if result.dim() > 3 else found


@functools.cache
def _may_hide(name: str) -> bool:
    """True if a function of this name may hide tokens; see ``HiddenTokens._newly``."""
    plain = name.strip("_")
    return (
        plain in _BOUNDING | _DROPOUT | _OTHERS
        or element_places.is_of(name, _DIVIDING | _FILLING)
        or element_places.is_of(name, element_places.MULTIPLYING | element_places.OF_ALL)
    )


def _dead(
    name: str, args: Any, kwargs: dict[str, Any], whole: list[torch.Tensor], result: torch.Tensor
) -> Iterator[torch.Tensor | bool]:
    """Where a function erases what its operands hold: bool tensors that can be broadcast to the result, or one bool for
    all of it.
    """

    def is_own(one: Any) -> bool:
        return any(one is each for each in whole)

    plain = name.strip("_")
    first, second, third = (*_by_parameter(plain, args, kwargs), None, None, None)[:3]
    if element_places.is_of(name, element_places.MULTIPLYING):
        yield from (_is(one, 0) for one in (*args, *kwargs.values()) if not is_own(one))
    elif element_places.is_of(name, _DIVIDING) and not is_own(second):
        yield _is(second, float("inf"))
    elif element_places.is_of(name, _FILLING):
        yield True
    elif plain == "masked_fill":
        yield second
    elif plain == "index_fill":
        yield True
    elif plain in ("setitem", "index_put") and is_own(first) and not is_own(third):
        yield _is_set(second, result)
    elif plain == "where" and is_own(second) != is_own(third):
        yield ~first if is_own(second) else first
    elif plain == "lerp" and is_own(first) != is_own(second):
        yield _is(third, 0 if is_own(second) else 1)
    elif plain == "addcmul" and not is_own(first):
        yield from (_is(one, 0) for one in (second, third) if not is_own(one))
    elif plain in _DROPOUT and second != 0 and third in (True, None):
        yield result == 0
    elif plain == "pow" and not isinstance(second, torch.Tensor):
        yield second == 0
    elif plain in _BOUNDING:
        yield _is_bound(args, kwargs, whole[0], result)


def _by_parameter(name: str, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """A function's arguments in the order of its parameters; ``None`` for one that is not given."""
    is_method = name == "where" and bool(args) and args[0].dtype != torch.bool
    names = ("input", "condition", "other") if is_method else _PARAMETERS.get(name, ())
    found = [*args, *(kwargs.get(key) for key in names[len(args) :])]
    return [found[1], found[0], *found[2:]] if is_method else found


def _is(value: Any, number: float) -> torch.Tensor | bool:
    """Where ``value`` equals a number; False if it is neither a number nor a tensor."""
    return value == number if isinstance(value, (torch.Tensor, int, float)) else False


def _is_bound(
    args: Any, kwargs: dict[str, Any], before: torch.Tensor, result: torch.Tensor
) -> torch.Tensor | bool:
    """Where a function has replaced a value by a bound. If it works in place, this includes values that equalled the
    bound before.
    """
    if before is not result:
        return result != before if before.shape == result.shape else False
    given = (one for one in (*args, *kwargs.values()) if one is not before)
    bounds = [
        one for one in given if isinstance(one, (torch.Tensor, int, float)) and not isinstance(one, bool)
    ]
    return functools.reduce(torch.logical_or, (result == bound for bound in bounds), result == 0)


def _has_all(name: str, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> bool:
    """True if every token of the result is made from all operands' tokens at its position, so that one operand that
    shows them is enough.
    """
    if name in element_places.JOINING:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        return isinstance(dim, int) and dim % max(1, result.dim()) == result.dim() - 1
    return element_places.is_of(name, element_places.OF_ALL) and not element_places.is_of(
        name, element_places.CHOOSING
    )


def _is_set(index: Any, result: torch.Tensor) -> torch.Tensor | bool:
    """Where something that is no token is written at an index."""
    (index,) = index if isinstance(index, tuple) and len(index) == 1 else (index,)
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return index.reshape(*index.shape, *(1,) * (result.dim() - index.dim()))
    return True


def _varies(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """True if a tensor that is broadcast to a result differs between its tokens, not only between its channels."""
    sizes = (1,) * (result.dim() - tensor.dim()) + tuple(tensor.shape)
    if result.dim() < 4:
        return sizes[-2] > 1
    # In an image, channels are the second dimension or the last one.
    return sum(size > 1 for size in sizes[1:]) > 1
