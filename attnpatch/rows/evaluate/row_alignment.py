"""Gives a step's rows the same alignment in memory as in the whole tensor.

For narrow results (values of up to eight channels) the matrix library reads the long operand in whole vectors if it
begins at a multiple of 16 bytes, and in another order otherwise, which rounds differently. If a head has a number of
elements (``rows x keys``) that is no multiple of four, the next head begins elsewhere; in a step it may have another
alignment.
"""

from __future__ import annotations

import math

import torch

from attnpatch.rows.graph.axes import Dim, Dims, Tile, all_leaves, flat_range, leaves, size_of
from attnpatch.rows.graph.nodes import InputNode, Node

# Up to this many channels the result depends on the operands' alignment (measured: with 8 it does, with 12 not).
MOST_CHANNELS = 8
# Alignment repeats after this many elements: a cache line of float32.
_LINE = 16


def asks(product: Node, operand: Node) -> bool:
    """True if a product's rounding may depend on the alignment of an operand that is computed step by step."""
    if isinstance(operand, InputNode) or operand.dtype != torch.float32 or operand.device.type != "cpu":
        return False
    shape = operand.shape
    if len(shape) < 3 or shape[:-2].numel() == 1 or shape[-2:].numel() % 4 == 0:
        return False
    own = set(all_leaves(operand.dims))
    return math.prod(axis.size for axis in all_leaves(product.dims) if axis not in own) <= MOST_CHANNELS


def laid(value: torch.Tensor, operand: Node, tile: Tile) -> torch.Tensor:
    """A step's part of an operand, with each head aligned as in the whole tensor."""
    if value.dim() != len(operand.dims):
        return value
    leads, (rows, keys) = operand.dims[:-2], operand.dims[-2:]
    if value.stride(-2) == 1 < value.stride(-1):
        return _laid(value.mT, leads, keys, rows, tile).mT
    return _laid(value, leads, rows, keys, tile)


def _laid(value: torch.Tensor, leads: Dims, rows: Dim, keys: Dim, tile: Tile) -> torch.Tensor:
    heads, some = flat_range(all_leaves(leads), tile), flat_range(leaves(rows), tile)
    width = size_of(keys)
    if heads is None or some is None or value.shape[-1] != width:
        return value
    whole, own = size_of(rows) * width, value.shape[-2:].numel()
    apart = own + (whole - own) % _LINE
    begin = (heads[0] * whole + some[0] * width) % _LINE
    count = value.shape[:-2].numel()
    memory = value.new_empty(begin + count * apart)[begin:]
    result = memory.as_strided((count, *value.shape[-2:]), (apart, width, 1)).unflatten(0, value.shape[:-2])
    return result.copy_(value)
