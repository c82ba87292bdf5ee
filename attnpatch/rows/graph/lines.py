"""Steps whose lines run across tiles, and what their gradients need of a whole line.

A softmax along the rows of a step is computed from the maximum and the sum of each line, which are found before; a sum
along them is found before, too. The gradient of an element then needs a sum over its line: of gradient times probability
for a softmax, of the gradients of all that reads it for a sum. In the backward pass these are found by sweeps before the
last one, and kept in float32 at least: what the two summands of a gradient have in common goes before they are rounded to
a narrow dtype, as in torch's own kernels, and gradients to scores are summed where they natively are.
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


class Slot(InputNode):
    """Where a backward pass keeps a sum over each line; zeros before."""

    def __init__(self, dims: Dims, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        super().__init__(torch.zeros((), dtype=dtype, device=device).expand(shape), dims)


class LineNode(OpNode):
    """A step of which a tile has parts of lines.

    Attributes:
        given: Its children that were computed before: gradients reach what these are made of by this node, and not by them.
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
    def slot(self) -> Node:
        return self.children[self.given[-1] + 1]


class NormalisedNode(LineNode):
    """Softmax of scores whose lines have a known maximum and sum of exponentials.

    Args:
        scores: The graph of the scores.
        highest, total: Of each line, in float32 at least.
        is_log: Whether it is the logarithm of that.
        of: The softmax it stands for.
    """

    given = (1, 2)

    def __init__(self, scores: Node, highest: InputNode, total: InputNode, is_log: bool, of: OpNode) -> None:
        slot = Slot(total.dims, total.shape, total.dtype, of.device)
        super().__init__(
            normalised, (scores, highest, total, slot, is_log, of.dtype), {}, of.dims, of.dtype, of.device
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
    slot: torch.Tensor,
    is_log: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Softmax of scores whose lines are not all there."""
    below = scores.to(total.dtype) - highest.detach()
    return (below - total.log() if is_log else below.exp() / total).to(dtype)


class _Normalised(torch.autograd.Function):
    """``normalised``, whose gradient takes the line's sum from the slot; the slot's own is the tile's part of it."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        highest: torch.Tensor,
        total: torch.Tensor,
        slot: torch.Tensor,
        is_log: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        value = normalised(scores, highest, total, slot, is_log, total.dtype)
        ctx.save_for_backward(value, slot)
        ctx.is_log, ctx.dtype = is_log, scores.dtype
        return value.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        value, slot = ctx.saved_tensors
        probabilities = value.exp() if ctx.is_log else value
        own = grad.to(value.dtype) if ctx.is_log else grad * value
        to_slot = own.sum_to_size(slot.shape) if ctx.needs_input_grad[3] else None
        to_scores = (own - probabilities * slot).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return to_scores, None, None, to_slot, None, None


# From a tile's scores, the figures of their lines, and the gradients of these, both with the scores' dimensions, and the
# number of elements of a line, to the gradients of the scores. Exponentials are rounded as torch rounds them: what a host
# makes of the same scores has the same errors, which cancel each other.
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "sum": lambda scores, figures, grad, count: grad.expand_as(scores),
    "mean": lambda scores, figures, grad, count: (grad / count).expand_as(scores),
    "logsumexp": lambda scores, figures, grad, count: grad * (scores - figures).exp(),
}
_DERIVATIVES["special_logsumexp"] = _DERIVATIVES["logsumexp"]


class FigureNode(LineNode):
    """A figure of each line that was computed before, and what it is a figure of.

    Args:
        scores: The graph of what it is a figure of.
        figure: The figures.
        of: The function that makes them of all scores.
        positions: The dimensions it sums over.
    """

    given = (1,)

    def __init__(self, scores: Node, figure: InputNode, of: OpNode, positions: set[int]) -> None:
        slot = Slot(figure.dims, figure.shape, figure.dtype, of.device)
        super().__init__(known, (scores, figure, slot), {}, of.dims, of.dtype, of.device)
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


def known(scores: torch.Tensor, figure: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """A figure of scores that was computed before."""
    return figure


class _Figure(torch.autograd.Function):
    """The figures; the scores' gradient takes that of the whole line from the slot, whose own is the tile's part of it."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        figure: torch.Tensor,
        slot: torch.Tensor,
        name: str,
        positions: tuple[int, ...],
        count: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores, figure, slot)
        ctx.name, ctx.positions, ctx.count = name, positions, count
        return figure.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scores, figure, slot = ctx.saved_tensors
        to_slot = grad.to(slot.dtype) if ctx.needs_input_grad[2] else None
        to_scores = None
        if ctx.needs_input_grad[0]:
            figure, of_line = (_laid(value, ctx.positions, scores.dim()) for value in (figure, slot))
            to_scores = _DERIVATIVES[ctx.name](scores, figure, of_line, ctx.count).to(scores.dtype)
        return to_scores, None, to_slot, None, None, None


def _laid(figure: torch.Tensor, positions: tuple[int, ...], dims: int) -> torch.Tensor:
    """Figures with the dimensions that they are sums over."""
    if figure.dim() < dims:
        for position in positions:
            figure = figure.unsqueeze(position)
    return figure


def found_in(root: Node, axes: Callable[[], set[Axis]]) -> frozenset[Node]:
    """The steps of a graph whose gradients can come by their slots.

    Each element of their scores has to be in one tile, and in that once.

    Args:
        root: The graph.
        axes: Gives the axes of which a tile has parts.
    """
    nodes = list(walk(root))
    if not any(isinstance(node, LineNode) for node in nodes):
        return frozenset()
    cut, found = axes(), set()
    # What is read in another tile than its own above them.
    moved: set[Node] = set()
    for node in reversed(nodes):
        if isinstance(node, LineNode) and node not in moved and cut <= set(all_leaves(node.scores.dims)):
            found.add(node)
        if node in moved or node.renames_axes:
            moved.update(node.children)
    return frozenset(found)


def levels(root: Node, lines: frozenset[Node]) -> list[list[Node]]:
    """Slots of some steps of a graph, those first whose sums need no other's."""
    level = {root: 0}
    for node in reversed(list(walk(root))):
        if node not in level or node.stops_gradient:
            level.pop(node, None)
            continue
        for child in node.children:
            level[child] = max(level.get(child, 0), level[node] + (node in lines))
    found: dict[int, list[Node]] = {}
    for node in lines & level.keys():
        found.setdefault(level[node], []).append(node.slot)
    return [found[number] for number in sorted(found)]
