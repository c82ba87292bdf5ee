"""Softmax and sums along the query rows, whose lines (columns of scores) run across tiles, and their gradients.

A softmax along the rows is computed from the maximum and the sum of each line. Both are found by an earlier sweep over
the tiles, and so is a plain sum. The gradient of an element then needs a sum over its line: for a softmax the sum of
gradient times probability, for a sum the gradients of everything that reads the sum. The backward pass finds these by
earlier sweeps and keeps them in float32 at least. So, as in torch's own kernels, the two summands of a gradient cancel
before they are rounded to a narrow dtype. Gradients of scores are summed where torch sums them natively.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.rows.graph.axes import Axis, Dims, Tile, all_leaves
from attnpatch.rows.graph.nodes import InputNode, Node, walk
from attnpatch.rows.graph.operations import OpNode

if TYPE_CHECKING:
    from attnpatch.rows.evaluate.evaluator import Evaluator


class LineSum(InputNode):
    """Memory in which a backward pass keeps a sum over each line; zeros until then."""

    def __init__(self, dims: Dims, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        super().__init__(torch.zeros((), dtype=dtype, device=device).expand(shape), dims)


class LineNode(OpNode):
    """A softmax or reduction along lines, if a tile holds only parts of each line.

    Attributes:
        given: Indices of the children that were computed by an earlier sweep. Gradients flow to the scores through this
            node, not through those children.
    """

    given: tuple[int, ...] = ()

    def on(self, scores: Node) -> Node:
        """The same step on another graph of the same scores."""
        return self.rebuilt(lambda child: scores if child is self.children[0] else child)

    @property
    def scores(self) -> Node:
        return self.children[0]

    @property
    def past(self) -> list[Node]:
        return [self.children[i] for i in self.given]

    @property
    def line_sum(self) -> Node:
        return self.children[self.given[-1] + 1]


class NormalisedNode(LineNode):
    """Softmax of scores whose lines have a known maximum and sum of exponentials.

    Args:
        scores: The graph of the scores.
        highest, total: Maximum and sum of exponentials of each line, in float32 at least.
        is_log: True for log_softmax.
        of: The softmax that this node replaces.
    """

    given = (1, 2)

    def __init__(self, scores: Node, highest: InputNode, total: InputNode, is_log: bool, of: OpNode) -> None:
        line_sum = LineSum(total.dims, total.shape, total.dtype, of.device)
        super().__init__(
            normalised, (scores, highest, total, line_sum, is_log, of.dtype), {}, of.dims, of.dtype, of.device
        )
        self.context = of.context

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        if self not in run.lines:
            return super().compute(tile, run)
        values = run.operands(self, tile)
        with self.context.enter():
            return _Normalised.apply(*values, *self.args[4:])


def normalised(
    scores: torch.Tensor,
    highest: torch.Tensor,
    total: torch.Tensor,
    line_sum: torch.Tensor,
    is_log: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Softmax of a tile of scores, given the maximum and the sum of exponentials of each whole line."""
    below = scores.to(total.dtype) - highest.detach()
    return (below - total.log() if is_log else below.exp() / total).to(dtype)


class _Normalised(torch.autograd.Function):
    """``normalised``; backward reads each line's sum from ``line_sum``, and gives ``line_sum`` this tile's part of that sum."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        highest: torch.Tensor,
        total: torch.Tensor,
        line_sum: torch.Tensor,
        is_log: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        value = normalised(scores, highest, total, line_sum, is_log, total.dtype)
        ctx.save_for_backward(value, line_sum)
        ctx.is_log, ctx.dtype = is_log, scores.dtype
        return value.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        value, line_sum = ctx.saved_tensors
        probabilities = value.exp() if ctx.is_log else value
        own = grad.to(value.dtype) if ctx.is_log else grad * value
        to_line_sum = own.sum_to_size(line_sum.shape) if ctx.needs_input_grad[3] else None
        to_scores = (own - probabilities * line_sum).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return to_scores, None, None, to_line_sum, None, None


# Gradients of a tile's scores. Arguments: the scores; the reduced value of each line and the gradient of that value,
# both with the scores' dimensions; the number of elements of a line. Exponentials are rounded as torch rounds them: a
# host that computes them from the same scores makes the same rounding errors, and they cancel.
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "sum": lambda scores, figures, grad, count: grad.expand_as(scores),
    "mean": lambda scores, figures, grad, count: (grad / count).expand_as(scores),
    "logsumexp": lambda scores, figures, grad, count: grad * (scores - figures).exp(),
}
_DERIVATIVES["special_logsumexp"] = _DERIVATIVES["logsumexp"]


class FigureNode(LineNode):
    """A reduction over each line (``sum``, ``mean``, ``logsumexp``) whose result an earlier sweep has computed.

    Args:
        scores: The graph of the scores that are reduced.
        figure: The result, one value for each line.
        of: The node of the reduction over all scores.
        positions: The dimensions that are reduced.
    """

    given = (1,)

    def __init__(self, scores: Node, figure: InputNode, of: OpNode, positions: set[int]) -> None:
        line_sum = LineSum(figure.dims, figure.shape, figure.dtype, of.device)
        super().__init__(known, (scores, figure, line_sum), {}, of.dims, of.dtype, of.device)
        self.context = of.context
        self.name, self.positions = of.func.__name__, tuple(sorted(positions))
        self.count = math.prod(scores.shape[i] for i in positions)

    @staticmethod
    def can_be(node: Node) -> bool:
        """Whether a node is a function of lines whose derivative is known."""
        return isinstance(node, OpNode) and getattr(node.func, "__name__", "") in _DERIVATIVES

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        if self not in run.lines:
            return run.value(self.children[1], tile)
        values = run.operands(self, tile)
        return _Figure.apply(*values, self.name, self.positions, self.count)


def known(scores: torch.Tensor, figure: torch.Tensor, line_sum: torch.Tensor) -> torch.Tensor:
    """The result of the reduction, which an earlier sweep has computed."""
    return figure


class _Figure(torch.autograd.Function):
    """The reduced values; backward reads a line's gradient from ``line_sum``, and gives ``line_sum`` this tile's part of it."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        figure: torch.Tensor,
        line_sum: torch.Tensor,
        name: str,
        positions: tuple[int, ...],
        count: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores, figure, line_sum)
        ctx.name, ctx.positions, ctx.count = name, positions, count
        return figure.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scores, figure, line_sum = ctx.saved_tensors
        to_line_sum = grad.to(line_sum.dtype) if ctx.needs_input_grad[2] else None
        to_scores = None
        if ctx.needs_input_grad[0]:
            figure, of_line = (_laid(value, ctx.positions, scores.dim()) for value in (figure, line_sum))
            to_scores = _DERIVATIVES[ctx.name](scores, figure, of_line, ctx.count).to(scores.dtype)
        return to_scores, None, to_line_sum, None, None, None


def _laid(figure: torch.Tensor, positions: tuple[int, ...], dims: int) -> torch.Tensor:
    """Reduced values, with the dimensions that were reduced put back with size 1."""
    if figure.dim() < dims:
        for position in positions:
            figure = figure.unsqueeze(position)
    return figure


def found_in(root: Node, axes: Callable[[], set[Axis]]) -> frozenset[Node]:
    """The line nodes of a graph whose gradients can be summed over each line.

    Each element of their scores has to be in exactly one tile, once.

    Args:
        root: The graph.
        axes: Returns the axes that are cut into tiles.
    """
    nodes = list(walk(root))
    if not any(isinstance(node, LineNode) for node in nodes):
        return frozenset()
    cut, found = axes(), set()
    # Nodes that a parent reads under another tile than its own.
    moved: set[Node] = set()
    for node in reversed(nodes):
        if isinstance(node, LineNode) and node not in moved and cut <= set(all_leaves(node.scores.dims)):
            found.add(node)
        if node in moved or node.renames_axes:
            moved.update(node.children)
    return frozenset(found)


def levels(root: Node, lines: frozenset[Node]) -> list[list[Node]]:
    """The ``LineSum``s of the line nodes, in the order in which they can be summed: first those that need no other."""
    level = {root: 0}
    for node in reversed(list(walk(root))):
        if node not in level or node.stops_gradient:
            level.pop(node, None)
            continue
        for child in node.children:
            level[child] = max(level.get(child, 0), level[node] + (node in lines))
    found: dict[int, list[Node]] = {}
    for node in lines & level.keys():
        found.setdefault(level[node], []).append(node.line_sum)
    return [found[number] for number in sorted(found)]
