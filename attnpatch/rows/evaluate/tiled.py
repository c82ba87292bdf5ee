"""Computes a graph tile by tile, and its gradients, and shows probabilities to an observer on the way."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from attnpatch.oom import Attempts, until_it_fits
from attnpatch.policy import Policy
from attnpatch.rows.autograd import edges
from attnpatch.rows.evaluate import bytes_of_steps, masked_tail, parallel
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.row_granularity import to_rounding
from attnpatch.rows.evaluate.tile_plan import (
    StepWork,
    TilePlan,
    choose,
    one_row,
    products_grain,
    row_and_lead,
)
from attnpatch.rows.graph import lines
from attnpatch.rows.graph.axes import KEY, ROW, Axis, Tile, add, all_leaves, put, take
from attnpatch.rows.graph.nodes import InputNode, Node, tensors_of, walk
from attnpatch.rows.graph.random_state import RandomState, random_state, set_random_state

# ``look(values, tile)`` is called with the observed node's values in each tile.
Look = Callable[[torch.Tensor, Tile], None]
T = TypeVar("T")


class Exactness(enum.IntEnum):
    """How small a step may get: bit-identical results, results up to rounding, or a single row."""

    EXACT = 0
    ROUNDING = 1
    ONE_ROW = 2


@dataclasses.dataclass(frozen=True)
class Listeners:
    """Callbacks for what happens while a graph is computed by tiles.

    Attributes:
        retried: A step ran out of memory; it is tried again with smaller steps.
        restarted: The same, for the observer: all tiles are shown again.
        made: Gets the bytes of the largest query x key tensor in a step.
        failed: attnpatch's own code failed in a backward pass, which was then done in one piece.
    """

    retried: Callable[[], None] = lambda: None
    restarted: Callable[[], None] = lambda: None
    made: Callable[[int], None] = lambda _: None
    failed: Callable[[str, Exception], None] = lambda what, error: None


class TiledEvaluation:
    """Computes ``node`` by tiles.

    Args:
        node: The node to compute.
        policy: Tile sizes and the workspace.
        watched: A node of the graph and a function to which its values are shown, or ``None``.
        told: Callbacks.
        free: Free bytes on the device; ``None``: no limit.
        attempts: Earlier attempts that ran out of memory.
    """

    def __init__(
        self,
        node: Node,
        policy: Policy,
        watched: tuple[Node, Look] | None = None,
        told: Listeners = Listeners(),
        free: int | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self.node, self.policy, self.watched, self.free = node, policy, watched, free
        self.told, self.on_size, self.on_failure = told, told.made, told.failed
        self.attempts = attempts or Attempts()
        # Both change after running out of memory: a divisor of the step, and how small it may get.
        self.shrink, self.limit = 1, Exactness.EXACT
        self.random: RandomState | None = None
        self.again: TiledEvaluation | None = None

    def __call__(self) -> torch.Tensor:
        """The tensor. Under autograd it gets one edge, which recomputes the graph in its backward pass."""
        for leaf in tensors_of(self.node):
            leaf.check()
        node = self.node.backward_graph or self.node
        result = edges.record(node, self._kept, self._again) if torch.is_grad_enabled() else None
        return self.forward() if result is None else result

    def _again(self, twin: Node) -> TiledEvaluation:
        told = dataclasses.replace(self.told, restarted=Listeners.restarted)
        self.again = TiledEvaluation(twin, self.policy, told=told, free=self.free)
        return self.again

    def _kept(self) -> torch.Tensor:
        """The tensor for an edge; the step sizes and the random state are kept for its backward pass."""
        result = self.forward()
        assert self.again is not None
        self.again.shrink, self.again.limit, self.again.random = self.shrink, self.limit, self.random
        # A view made under no_grad could not be written to in place.
        return result.detach()

    def _tileable(self, run: Evaluator) -> list[Axis]:
        """Axes that may be cut."""
        if not run.whole:
            # Nothing was normalised, so this is not attention: compute it in one piece, as the host would.
            return []
        tileable = [axis for axis in all_leaves(self.node.dims) if axis not in run.whole]
        if any(axis.kind == ROW for axis in tileable):
            tileable = [axis for axis in tileable if axis.kind != KEY]
        return tileable

    def _steps(self, run: Evaluator) -> TilePlan:
        tileable = self._tileable(run)
        width, itemsize, narrow = 1, 1, False
        cut = set(tileable) | run.renamed
        row, _ = row_and_lead(tileable)
        for node in run.tiled:
            # Nodes without rows (a bias per key, kept for all row steps) do not grow with the rows of a step.
            if not isinstance(node, InputNode) and run.has_rows(node, row):
                count = math.prod(axis.size for axis in all_leaves(node.dims) if axis not in cut)
                width = max(width, count, getattr(node, "score_width", 1))
                itemsize = max(itemsize, node.dtype.itemsize)
                narrow |= node.dtype.is_floating_point and node.dtype.itemsize < 4
        if self.limit is Exactness.ONE_ROW:
            return one_row(tileable)
        grain = getattr(self.node, "grain", None) or products_grain(
            run.works(row), tileable, self.node.device, narrow
        )
        asked = self.policy.rows is not None or self.policy.workspace is not None
        if self.limit is not Exactness.EXACT or (asked and not self.node.is_exact):
            grain = to_rounding()
        work = StepWork(
            tileable, width, itemsize, grain, bytes_of_steps.reads(run, tileable), run.held_bytes(row, cut)
        )
        return choose(work, self.policy, self.node.device, self.shrink, self.free)

    def _tiles(self, run: Evaluator) -> Iterator[Tile]:
        for tile in self._cut(run, self._begun(run)):
            yield tile
            self.on_size(run.largest)

    def _begun(self, run: Evaluator) -> TilePlan:
        """The tiles of an evaluation, which is prepared for them."""
        steps = self._steps(run)
        run.scores = bytes_of_steps.scores(run, steps.row)
        self.on_size(bytes_of_steps.held_inside(run, steps, self.node))
        run.row = steps.row if len(steps.rows) > 1 else None
        if run.row is not None and len(steps.lead) > 1:
            run.shared = run.same_for(run.row, {axis for lead in steps.lead for axis in lead})
        return steps

    def _cut(self, run: Evaluator, steps: TilePlan) -> Iterator[Tile]:
        if run.shared:
            # Rows are the outer loop: a mask's rows are made once for all heads. Values without rows are kept
            # throughout.
            for span in steps.rows:
                for lead in steps.lead:
                    yield {**lead, run.row: span}
                    run.next_tile()
                run.next_rows()
            return
        for lead in steps.lead:
            for span in steps.rows or [None]:
                tile = dict(lead)
                if steps.row is not None and span is not None and span != (0, steps.row.size):
                    tile[steps.row] = span
                yield tile
                run.next_tile()
            run.next_lead()

    def forward(self) -> torch.Tensor:
        """The tensor by tiles, with the step halved as long as it does not fit into memory."""
        self.random = _kernel_random_state(self.node)
        return self._fitted(self._forward)

    def _fitted(self, work: Callable[[], T]) -> T:
        """Run ``work`` again with smaller steps as long as it runs out of memory."""
        if not self.policy.retry_on_oom:
            return work()
        result = until_it_fits(work, self._begin_smaller, self._said, self.attempts)
        self.attempts = Attempts()
        return result

    def _begin_smaller(self) -> bool:
        """Prepare another attempt with a smaller step; ``False`` if it cannot be smaller."""
        if not self._halve():
            return False
        self.told.retried()
        self.told.restarted()
        set_random_state(self.random)
        return True

    def _said(self) -> str:
        """The step size in words, for messages."""
        steps = self._steps(Evaluator(self.node))
        if steps.row is None:
            return "the whole call, which cannot be cut"
        rows, heads = steps.largest()
        return f"steps of {rows} row{'s' * (rows > 1)} x {heads} head{'s' * (heads > 1)}"

    def _halve(self) -> bool:
        """Make the step smaller; ``False`` if it cannot be smaller.

        The step shrinks first within the limits that keep results bit-identical, then down to a single row: a result
        that differs by rounding is better than none.
        """
        run = Evaluator(self.node)
        now = math.prod(self._steps(run).largest())
        for limit in Exactness:
            if limit < self.limit:
                continue
            if limit > self.limit:
                self.limit, self.shrink = limit, 1
            for _ in range(32):
                self.shrink *= 2
                if math.prod(self._steps(run).largest()) < now:
                    return True
        return False

    def _forward(self) -> torch.Tensor:
        run = Evaluator(self.node)
        if self.watched is not None:
            run.keep(self.watched[0])
        result: torch.Tensor | None = None
        tail = masked_tail.found_in(self.node) if self.limit is Exactness.EXACT else None
        steps = self._begun(run)
        if self.watched is None and self.shrink == 1 and self.policy.workspace is None:
            threads = parallel.threads_for(run, steps)
            if threads > 1:
                result, largest = parallel.compute(run, steps, tail, threads)
                self.on_size(largest)
                return result
        for tile in self._cut(run, steps):
            value, seen = (run.value(self.node, tile), tile) if tail is None else tail.value(run, tile)
            if self.watched is not None:
                own = {axis: seen[axis] for axis in all_leaves(self.watched[0].dims) if axis in seen}
                self.watched[1](run.value(self.watched[0], seen).detach(), own)
            self.on_size(run.largest)
            if not tile:
                return value
            if result is None:
                result = parallel.empty(self.node, value)
            put(result, self.node.dims, tile, value)
            del value
        assert result is not None
        return result

    def gradients(
        self, grad: torch.Tensor, bound: dict[Node, torch.Tensor], wanted: list[Node]
    ) -> list[torch.Tensor | None]:
        """Gradients of input nodes, and of nodes whose own gradient is asked for; computed tile by tile.

        Args:
            grad: The gradient of the result.
            bound: The tensors of the input nodes.
            wanted: The nodes that need gradients.
        """
        return self._fitted(lambda: self._gradients(grad, bound, wanted))

    def _gradients(
        self, grad: torch.Tensor, bound: dict[Node, torch.Tensor], wanted: list[Node]
    ) -> list[torch.Tensor | None]:
        steps = lines.found_in(self.node, lambda: set(self._tileable(Evaluator(self.node, bound))))
        # Values that an earlier sweep has computed from the scores get no gradient of their own: the ``LineSum`` passes
        # it to the scores.
        past = {node for step in steps for node in step.past}
        for sums in lines.levels(self.node, steps):
            bound = {**bound, **self._sweep(grad, bound, sums, steps)}
        found = self._sweep(grad, bound, [node for node in wanted if node not in past], steps)
        return [found[node].to(node.dtype) if node in found else None for node in wanted]

    def _sweep(
        self,
        grad: torch.Tensor,
        bound: dict[Node, torch.Tensor],
        wanted: list[Node],
        steps: frozenset[lines.LineNode],
    ) -> dict[Node, torch.Tensor]:
        """Gradients of some nodes, summed over all tiles."""
        set_random_state(self.random)
        run = Evaluator(self.node, bound, frozenset(wanted), steps)
        sums = {node: _zeros(node, bound.get(node)) for node in wanted}
        for tile in self._tiles(run):
            run.parts.clear()
            with torch.enable_grad():
                value = run.value(self.node, tile)
            if not value.requires_grad:
                continue  # no gradient passes through this tile
            parts = [part for _, _, part in run.parts]
            part_grads = torch.autograd.grad(
                value, parts, take(grad, self.node.dims, tile).reshape(value.shape), allow_unused=True
            )
            for (node, where, _), part_grad in zip(run.parts, part_grads, strict=True):
                if part_grad is not None:
                    add(sums[node], node.dims, where, part_grad)
        return sums

    def differentiable_gradients(
        self, grad: torch.Tensor, bound: dict[Node, torch.Tensor], wanted: list[Node]
    ) -> list[torch.Tensor | None]:
        """Gradients that can be differentiated again; they are computed in one piece, and take as much memory as
        natively.
        """
        run = Evaluator(self.node, bound)
        asked = []
        for node in wanted:
            part = bound[node] if isinstance(node, InputNode) else Evaluator(node, bound).value(node, {})
            # Differentiate by a view of each value. A value may itself be computed from others in ``bound``, and their
            # gradients must still flow through it.
            asked.append(part.view_as(part))
            run.fix(node, asked[-1])
        value = run.value(self.node, {})
        return list(torch.autograd.grad(value, asked, grad, create_graph=True, allow_unused=True))


def _zeros(node: Node, like: torch.Tensor | None) -> torch.Tensor:
    """Zeros to sum gradients of tiles in, in float32 at least; otherwise every step would round the sum."""
    dtype = torch.float32 if node.dtype.itemsize < 4 else node.dtype
    if like is not None:
        return torch.zeros_like(like, dtype=dtype)
    return torch.zeros(node.shape, dtype=dtype, device=node.device)


def _kernel_random_state(node: Node) -> RandomState | None:
    """The generator's state, if any node draws from it (dropout inside a kernel)."""
    if not any(getattr(step, "random", False) for step in walk(node)):
        return None
    return random_state(node.device)
