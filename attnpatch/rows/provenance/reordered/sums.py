"""Chooses the order of the tokens of a sum, or of tensors concatenated along channels, among those of its operands."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from attnpatch.rows.graph.axes import fresh, leaves
from attnpatch.rows.provenance import element_places, residuals
from attnpatch.rows.provenance.reordered.token_tensors import TokenTensors, has_tokens_of


def adds(
    tokens: TokenTensors,
    name: str,
    tensor: torch.Tensor,
    moved: torch.Tensor,
    result: torch.Tensor,
    kwargs: dict[str, Any],
) -> bool:
    """True if a function adds a tensor with all of the result's tokens in order (a residual) to a reordered one."""
    return (
        element_places.is_of(name, element_places.ADDING)
        and tokens.has_tokens(tensor)
        and has_tokens_of(tensor, result)
        # The last dimension is channels, whose order does not matter.
        and not any(place < tensor.dim() - 1 for place in tokens.why(tensor))
        and not tokens.hidden.has(tensor)
        and all(
            _shows(tokens, residuals.summand(tensor, name, moved, result, kwargs), moved, place)
            for place in range(result.dim() - 1)
        )
    )


def choose_axes(
    tokens: TokenTensors, name: str, own: list[torch.Tensor], result: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    """Choose the axes of an elementwise result among the operands that have all of its tokens.

    A sum takes the axes of an operand in order (a residual); any other function takes those of an operand out of order.
    """
    known = tokens.sources.of(result)
    whole = [tensor for tensor in own if has_tokens_of(tensor, result)]
    if not whole or known is None:
        return
    is_sum = element_places.is_of(name, element_places.ADDING)
    choices = [
        (tensor, tokens.sources.of(tensor) or fresh(result.shape), tokens.why(tensor)) for tensor in whole
    ]
    found = []
    for place in range(result.dim()):
        clean = [(tensor, dims[place]) for tensor, dims, why in choices if place not in why]
        other = [(tensor, dims[place]) for tensor, dims, why in choices if place in why]
        if other and is_sum:
            value = other[0][0]
            clean = [
                one
                for one in clean
                if not tokens.hidden.has(one[0])
                and _shows(tokens, residuals.summand(one[0], name, value, result, kwargs), value, place)
            ]
        found.append(next(iter(clean + other if is_sum else other + clean))[1])
    tokens.sources.give(result, tuple(found))


def beside(tokens: TokenTensors, own: list[torch.Tensor], result: torch.Tensor) -> None:
    """For tensors concatenated along channels, take the axes of one that is in order, as in a sum."""
    known = tokens.sources.of(result)
    if known is None or len(own) < 2 or any(one.shape[:-1] != result.shape[:-1] for one in own):
        return
    choices = [(one, dims, tokens.why(one)) for one in own if (dims := tokens.sources.of(one)) is not None]
    found = list(known)
    for place in range(result.dim() - 1):
        is_other = any(place in why for _, _, why in choices)
        clean = (
            dims[place]
            for one, dims, why in choices
            if place not in why
            and not (is_other and (tokens.hidden.has(one) or not _shows(tokens, one, None, place)))
        )
        found[place] = next(clean, found[place])
    tokens.sources.give(result, tuple(found))


def mixes(tokens: TokenTensors, name: str, own: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """True if a function chooses, element by element, between tokens and one token of the same input for several places
    (``where`` with a single token).
    """
    if not results or not element_places.is_of(name, element_places.CHOOSING):
        return False
    shape = results[0].shape
    whole = [one for one in own if has_tokens_of(one, results[0])]
    few = [
        one
        for one in own
        if one.is_floating_point() and one.shape != shape and one.dim() and one.shape[-1] == shape[-1] > 1
    ]
    return any(tokens.picked.have_common_input(one, other) for one in few for other in whole)


def joined(tokens: TokenTensors, name: str, given: tuple[Any, dict[str, Any]], result: torch.Tensor) -> None:
    """After pieces were concatenated: the order is lost if picked tokens are not in their own places."""
    args, kwargs = given
    pieces = args[0] if args else kwargs.get("tensors", ())
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if not isinstance(dim, int) or not isinstance(pieces, (tuple, list)) or not result.dim():
        return
    place = dim % result.dim()
    if place not in tokens.why(result) and tokens.picked.joined_out_of_order(pieces, place):
        tokens.lose(result, name)


def _shows(tokens: TokenTensors, tensor: torch.Tensor, beside: torch.Tensor | None, place: int) -> bool:
    """True if the tokens of a tensor are visible in a sum; see ``residuals.shows``. Padding that was added need not be."""
    parts = [(0, tensor.shape[place])]
    dims = tokens.sources.of(tensor)
    made = (
        tokens.sources.made.get(own[0]) if dims is not None and len(own := leaves(dims[place])) == 1 else None
    )
    if made is not None and any(dim is None for dim, _ in made.parts):
        starts = itertools.accumulate((size for _, size in made.parts), initial=0)
        parts = [(at, size) for at, (dim, size) in zip(starts, made.parts, strict=False) if dim is not None]
    return all(
        residuals.shows(
            tensor.narrow(place, at, size),
            None if beside is None else beside.narrow(place, at, size),
            place,
            tokens.of_tokens,
        )
        for at, size in parts
    )
