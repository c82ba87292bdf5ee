"""Gradients in float32 of narrow operands that several tiles share, so that rounding is done once, after their sum.

A tile's backward pass gives the gradient of the values in their own dtype. In bfloat16 or float16 that rounds every
tile's share; the error of the sum of two rounded shares is up to 1.4 times that of one rounded product. So a product
computes its share in float32, beside autograd, and hands it to a leaf of that dtype that stands for the operand.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows import precision
from attnpatch.rows.graph.operations import Letters


def stand_in(operand: torch.Tensor) -> torch.Tensor:
    """A leaf in float32 with the shape of ``operand``, in the memory of one number; it receives a gradient."""
    return torch.zeros((), dtype=torch.float32, device=operand.device).expand(operand.shape).requires_grad_()


def with_gradient(
    result: torch.Tensor, leaf: torch.Tensor, other: torch.Tensor, letters: Letters, operand: int
) -> torch.Tensor:
    """``result`` of a product, whose backward pass also gives ``leaf`` the float32 gradient of one operand.

    Args:
        result: The product of ``other`` and the operand without its history.
        leaf: The operand's ``stand_in``.
        other: The other operand.
        letters: Those of the product.
        operand: Which operand it is: 0 or 1.
    """
    return _WithGradient.apply(result, leaf, other.detach(), letters, operand)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        leaf: torch.Tensor,
        other: torch.Tensor,
        letters: Letters,
        operand: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(other)
        ctx.letters, ctx.operand, ctx.shape = letters, operand, leaf.shape
        # Marked as written to, so that autograd takes it for a result and not for a view.
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (other,) = ctx.saved_tensors
        own = ctx.letters.operands[ctx.operand]
        share = _product(
            other, ctx.letters.operands[1 - ctx.operand], grad, ctx.letters.result, own
        ).sum_to_size(ctx.shape)
        return grad, share, None, None, None


def _product(one: torch.Tensor, ones: str, two: torch.Tensor, twos: str, result: str) -> torch.Tensor:
    """``einsum(f"{ones},{twos}->{result}")`` of narrow tensors in float32; broadcasting dimensions are expanded."""
    sizes: dict[str, int] = {}
    for letters, tensor in ((ones, one), (twos, two)):
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    leads = [letter for letter in result if letter in ones and letter in twos]
    summed = [letter for letter in ones if letter in twos and letter not in result]
    rows = [letter for letter in ones if letter not in twos]
    columns = [letter for letter in twos if letter not in ones]

    def matrices(tensor: torch.Tensor, letters: str, *groups: list[str]) -> torch.Tensor:
        order = [letter for group in groups for letter in group]
        tensor = tensor.expand([sizes[letter] for letter in letters]).permute(
            [letters.index(letter) for letter in order]
        )
        return tensor.reshape([math.prod(sizes[letter] for letter in group) for group in groups])

    left = matrices(one, ones, leads, rows, summed)
    right = matrices(two, twos, leads, summed, columns)
    found = [*leads, *rows, *columns]
    product = _in_float32(left, right).view([sizes[letter] for letter in found])
    return product.permute([found.index(letter) for letter in result])


def _in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The batched product of narrow matrices, summed and returned in float32."""
    if left.is_cuda and compat.BMM_HAS_OUT_DTYPE:
        return torch.bmm(left, right, out_dtype=torch.float32)
    result = left.new_empty((*left.shape[:2], right.shape[2]), dtype=torch.float32)
    with precision.in_full(left):
        for one, two, out in zip(left, right, result, strict=True):
            # One matrix at a time: float32 takes twice the memory.
            torch.mm(one.float(), two.float(), out=out)
    return result
