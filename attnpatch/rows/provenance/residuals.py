"""Tells if the tokens of one operand are visible in a sum: a residual in order beside tokens that were reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.graph.axes import Dims
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.origins import Origins
from attnpatch.rows.provenance.unseen_writes import Notes


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
        masks: Integer tensors ``[batch, tokens]`` among the model's inputs. One of only 0 and 1 is a padding mask; many
            models set padding tokens to zero, so these need not be visible.
    """
    if tensor.is_meta or tensor.shape[place] < 2:
        return True
    if compat.is_transformed():
        return False
    with compat.DisableTorchFunction(), torch.no_grad():
        seen = tensor != 0
        if beside is not None and tensor.is_floating_point():
            # A value below the last bit of the other summand is rounded away.
            seen = tensor.abs() > beside.abs() * (torch.finfo(tensor.dtype).eps / 2)
        within = [at for at in range(1, tensor.dim()) if at != place]
        is_there = seen.any(tuple(within)) if within else seen
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


class Residuals(Origins):
    """The origins of one call. It knows which operands determine the positions of a result's tokens.

    Args:
        inputs: The tensors that the module is called with, in order, each once.
        notes: The notes that hold the dimensions of tensors.

    Attributes:
        reads_values: Whether what is known depends on the values of tensors, and not only on what was done with them.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], notes: Notes) -> None:
        super().__init__(inputs)
        self._known = notes
        self.reads_values = False

    def _summands(
        self, name: str, known: list[tuple[torch.Tensor, Dims]], shape: Sequence[int]
    ) -> list[Dims]:
        """The operands that determine the positions of a result's tokens.

        All operands, unless one is reordered. Then it is that one, or, in a sum, the operands in order that are visible
        in the sum (a residual).
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

    def _seen_beside(self, pieces: Sequence[torch.Tensor]) -> list[Dims]:
        """For pieces concatenated along channels, those that determine the positions of tokens, as in a sum."""
        known = [(piece, own) for piece in pieces if (own := self._known.get(piece)) is not None]
        is_lost = [self._earliest(own)[1] for _, own in known]
        return [
            own
            for (piece, own), lost in zip(known, is_lost, strict=True)
            if lost or not any(is_lost) or self._shows_all(piece, None)
        ]

    def _shows_in_place(
        self, name: str, result: torch.Tensor, operands: list[torch.Tensor], kwargs: dict[str, Any]
    ) -> bool:
        """True if tokens are still visible after others were added to them in place."""
        if not element_places.is_of(name, element_places.OF_ALL):
            return True
        for one in operands:
            own = self._known.get(one) if one is not result and one.shape == result.shape else None
            if own is not None and self._earliest(own)[1]:
                before = summand(result, name, one, result, kwargs)
                is_sum = element_places.is_of(name, element_places.ADDING)
                return is_sum and self._shows_all(before, one)
        return True

    def _shows_all(self, tensor: torch.Tensor, beside: torch.Tensor | None) -> bool:
        self.reads_values = True
        return shows_all(tensor, beside)
