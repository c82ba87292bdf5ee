"""Uninitialized memory that a host allocates for scores (``torch.empty`` for ``baddbmm``): by rows it is not needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.policy import NativeNeed
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Tile, fresh, local_shape
from attnpatch.rows.graph.nodes import Node


class UninitializedNode(Node):
    """A tensor without values.

    Attributes:
        stands_for_memory: True if computing it is counted as a materialised score matrix.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.dims, self.dtype, self.device = fresh(shape), dtype, device

    @staticmethod
    def like(node: Node, dtype: torch.dtype) -> UninitializedNode:
        """``empty_like`` of a deferred tensor, with the same axes."""
        blank = UninitializedNode((), dtype, node.device)
        blank.dims, blank.stands_for_memory = node.dims, True
        return blank

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return torch.empty(local_shape(self.dims, tile), dtype=self.dtype, device=self.device)


def _blank(args: Any, kwargs: dict[str, Any]) -> UninitializedNode | None:
    """The node for a call of ``torch.empty``; ``None`` if its shape cannot be that of scores."""
    size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    if set(kwargs) - {"size", "dtype", "device", "requires_grad"} or kwargs.get("requires_grad"):
        return None
    if len(size) < 3 or not all(isinstance(n, int) for n in size) or min(size) < 1 or min(size[-2:]) < 2:
        return None
    like = torch.empty((), dtype=kwargs.get("dtype"), device=kwargs.get("device"))
    return UninitializedNode(tuple(size), like.dtype, like.device)


def empty(
    args: Any, kwargs: dict[str, Any], call: AttentionCall, native: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """``torch.empty``; deferred if the policy says so for its size, or if memory runs out."""
    node = _blank(args, kwargs)
    if node is None or not node.dtype.is_floating_point:
        return native()
    shape = node.shape
    size = math.prod(shape) * node.dtype.itemsize
    if not call.by_rows(shape[-2], NativeNeed(3 * size, size), node.device):
        try:
            return native()
        except RuntimeError as error:
            if not call.answers(error, node.device):
                raise
    return wrap(node, call)


def without(args: Any, kwargs: dict[str, Any]) -> Any:
    """The arguments of ``baddbmm(beta=0)`` with one expanded element as its uninitialized input, or ``None``."""
    added = args[0] if args else kwargs.get("input")
    if kwargs.get("beta", 1) != 0 or not isinstance(added, DeferredTensor) or added.handle.is_computed:
        return None
    node = added.handle.node
    if not isinstance(node, UninitializedNode):
        return None
    stand_in = torch.empty((), dtype=node.dtype, device=node.device).expand(node.shape)
    if args:
        return (stand_in, *args[1:]), kwargs
    return args, {**kwargs, "input": stand_in}
