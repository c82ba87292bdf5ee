"""``F.gumbel_softmax`` with noise that depends only on seed and position, like ``graph/dropout.py``'s masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import argument
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, ROW, Tile, leaves
from attnpatch.rows.graph.dropout import bits_of
from attnpatch.rows.graph.nodes import Context, Node
from attnpatch.rows.op_table import op

# Number of uniform levels: the midpoints (i + 0.5) / 2**23, exact in float32 and never 0 or 1.
_LEVELS = 2**23


class GumbelSoftmax(Node):
    """``F.gumbel_softmax(child, tau, hard, dim=dim)``; its seed is drawn from torch's default generator when recorded.

    The native noise is drawn in memory order for the whole matrix and cannot be drawn by rows. This one is another
    sample of the same distribution. A row gets the same noise however often, and in whatever tile, it is computed.
    """

    # The noise and its random bits, 4 bytes each.
    held_bytes = 8

    def __init__(self, child: Node, tau: float, hard: bool, position: int) -> None:
        self.children, self.dims, self.device = (child,), child.dims, child.device
        self.tau, self.hard, self.position = tau, hard, position
        self.whole = child.dims[position]
        self.seed = int(torch.randint(-(2**31), 2**31 - 1, ()))
        self.context = Context(child.device)
        with torch.no_grad():
            one = torch.ones([1] * len(child.dims), dtype=child.dtype, device=child.device)
            self.dtype = self._of(one, torch.zeros_like(one)).dtype

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        scores = run.value(self.children[0], tile)
        bits = bits_of(self, tile) >> 9  # from -2**22 on
        uniform = bits.to(torch.float32).add_(_LEVELS // 2 + 0.5).div_(_LEVELS)
        with self.context.enter():
            return self._of(scores, uniform.log_().neg_().log_().neg_().to(scores.dtype))

    def _of(self, scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        soft = ((scores + noise) / self.tau).softmax(self.position)
        if not self.hard:
            return soft
        index = soft.max(self.position, keepdim=True)[1]
        # One where a row is largest and zero elsewhere, with the gradient of the row's softmax ("straight through").
        hard = torch.zeros_like(scores).scatter_(self.position, index, 1.0)
        return hard - soft.detach() + soft


@op("gumbel_softmax")
def gumbel_softmax(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source, tau, hard = args[0], argument(args, kwargs, 1, "tau", 1), argument(args, kwargs, 2, "hard", False)
    dim = argument(args, kwargs, 4, "dim", -1)
    if not isinstance(source, DeferredTensor) or not isinstance(dim, int) or isinstance(tau, torch.Tensor):
        return NotImplemented
    node = source.handle.node
    position = dim % len(node.dims)
    for axis in (axis for each in node.dims for axis in leaves(each)):
        if axis in leaves(node.dims[position]):
            axis.kind = KEY
        elif axis.kind == KEY:
            axis.kind = ROW
    return wrap(GumbelSoftmax(node, tau, hard, position), source.handle.call)
