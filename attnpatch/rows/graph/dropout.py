"""Dropout whose mask depends only on seed and position, so that a row gets the same mask each time it is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Tile, take
from attnpatch.rows.graph.nodes import Node

if TYPE_CHECKING:
    from attnpatch.rows.creation.gumbel import GumbelSoftmax


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int32 in place: the finaliser of MurmurHash3 (Appleby), whose arithmetic wraps as int32 does."""
    x = x.bitwise_xor_(_shifted(x, 16)).mul_(-2048144789)
    x = x.bitwise_xor_(_shifted(x, 13)).mul_(-1028477387)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: torch.Tensor, places: int) -> torch.Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (x >> places).bitwise_and_((1 << (32 - places)) - 1)


def bits_of(node: Dropout | GumbelSoftmax, tile: Tile) -> torch.Tensor:
    """Uniform int32 for every element of a node inside ``tile``, by its seed and the element's place."""
    bits = torch.full((), node.seed, dtype=torch.int32, device=node.device)
    for position, dim in enumerate(node.dims):
        size = node.shape[position]
        where = take(torch.arange(size, dtype=torch.int32, device=node.device), (dim,), tile)
        where = _mix(where.add_(position * 40503 + 1).mul_(-1640531527))
        bits = bits ^ where.reshape([-1] + [1] * (len(node.dims) - position - 1))
        # The bits are mixed after each dimension: otherwise the mask of one row would be a permutation of another
        # row's.
        bits = _mix(bits)
    return bits


class Dropout(Node):
    """``F.dropout(child, p, training=True)``; the seed comes from torch's default generator when it is recorded.

    The native mask is drawn in memory order for the whole matrix and cannot be drawn by rows. This one is another
    sample of the same distribution. A row gets the same mask however often, and in whatever tile, it is computed.
    """

    copies_layout = True

    def __init__(self, child: Node, p: float) -> None:
        self.children = (child,)
        self.dims, self.dtype, self.device = child.dims, child.dtype, child.device
        self.p = p
        self.seed = int(torch.randint(-(2**31), 2**31 - 1, ()))

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        value = run.value(self.children[0], tile)
        if self.p == 1.0:
            return value * 0.0
        bits = bits_of(self, tile)
        keep = bits >= int(self.p * 2**32) - 2**31
        return value * keep.to(value.dtype).div_(1.0 - self.p)
