"""Tells if the tokens of one operand are visible in a sum: a residual in order beside tokens that were reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnpatch import compat

# Tokens are first looked for in this many of their channels.
_CHANNELS = 16


def shows(
    tensor: torch.Tensor, beside: torch.Tensor | None, place: int, masks: Sequence[torch.Tensor] = ()
) -> bool:
    """True if every token of a summand is visible in a sum, and the tokens are not all equal.

    A residual that was multiplied by 0, masked out or subtracted from itself has no tokens any more. This reads all of
    both tensors, so it is used only if tokens in order are added to reordered ones.

    Args:
        tensor: The summand, which has tokens in order along a dimension.
        beside: The other summand, of the same shape; ``None``: the tensors are concatenated along channels instead.
        place: The dimension.
        masks: Integer tensors ``[batch, tokens]`` among the model's inputs. If one has only the values 0 and 1, it is a
            padding mask: tokens where it is 0 need not be visible, because many models set padding to zero.
    """
    if tensor.is_meta or tensor.shape[place] < 2:
        return True
    if compat.is_transformed():
        return False
    within = [at for at in range(1, tensor.dim()) if at != place]
    with compat.DisableTorchFunction(), torch.no_grad():
        if beside is None or beside.shape == tensor.shape:
            # Nearly always a few channels of every token tell.
            some, beside_some = (_few(one, within) for one in (tensor, beside))
            if bool(_seen(some, beside_some, within).all()) and (
                place == 0 or bool((some != some.narrow(place, 0, 1)).any())
            ):
                return True
        is_there = _seen(tensor, beside, within)
        # Sequences of a batch may be equal.
        differs = place == 0 or bool((tensor != tensor.narrow(place, 0, 1)).any())
        if differs and beside is not None and not bool(is_there.all()):
            # Where both summands are zero (the embedding of a padding token), the sum has no token at all.
            is_empty = (tensor == 0) & (beside == 0)
            is_there = is_there | (is_empty.all(tuple(within)) if within else is_empty)
        if differs and not bool(is_there.all()):
            for mask in masks:
                if mask.shape == is_there.shape and int(mask.min()) >= 0 and int(mask.max()) <= 1:
                    is_there = is_there | (mask == 0).to(is_there.device)
        return differs and bool(is_there.all())


def _few(tensor: torch.Tensor | None, dims: Sequence[int]) -> Any:
    """A small part of a tensor along these dimensions."""
    for number, dim in enumerate(reversed(dims)):
        if tensor is not None:
            tensor = tensor.narrow(dim, 0, min(tensor.shape[dim], 1 if number else _CHANNELS))
    return tensor


def _seen(tensor: torch.Tensor, beside: torch.Tensor | None, within: Sequence[int]) -> torch.Tensor:
    """For each token, whether one of its values is visible."""
    if beside is None or not tensor.is_floating_point():
        seen = tensor != 0
    else:
        # A value below the last bit of the other summand is rounded away.
        seen = tensor.abs() > beside.to(tensor.dtype).abs() * (torch.finfo(tensor.dtype).eps / 2)
    return seen.any(tuple(within)) if within else seen


def shows_all(tensor: torch.Tensor, beside: torch.Tensor | None) -> bool:
    """As ``shows``, along all dimensions but the last, which is channels."""
    return all(shows(tensor, beside, place) for place in range(tensor.dim() - 1))


def summand(
    tensor: torch.Tensor, name: str, value: torch.Tensor, result: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor:
    """A summand as it was before the sum, also if the sum was computed in place.

    Args:
        tensor: The summand, as it is now.
        name: The name of the function.
        value: The other summand.
        result: The sum; the same tensor as the summand if it was computed in place.
        kwargs: The function's keyword arguments.
    """
    if tensor is not result or tensor.is_meta or compat.is_transformed():
        return tensor
    with compat.DisableTorchFunction(), torch.no_grad():
        added = value * kwargs.get("alpha", 1)
        return result + added if "sub" in name else result - added
