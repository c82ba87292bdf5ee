"""Finds the open keys of hand-written attention: its steps are run on scores of zero, and the result is its mask."""

from __future__ import annotations

import math

import numpy
import torch

from attnpatch.observing import Layout, Opened
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Axis, Tile, leaves
from attnpatch.rows.graph.nodes import InputNode, Node, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import SOFTMAX
from attnpatch.rows.provenance.open_keys import open_keys, open_of


def above(steps: list[Node], roots: set[int]) -> set[int]:
    """Ids of the steps that are computed from ``roots``; ``steps`` has children before parents."""
    found: set[int] = set()
    for step in steps:
        if any(id(child) in roots or id(child) in found for child in step.children):
            found.add(id(step))
    return found


def opened_by(node: Node, keys: list[Axis], leads: list[Axis], rows: list[Axis], layout: Layout) -> Opened:
    """A function that finds the keys that attention may see.

    These keys follow from what is added before softmax, and from what the weights are multiplied with after it. If
    softmax is written by hand, keys whose weight is 0 are hidden.

    Args:
        node: The probabilities.
        keys, leads, rows: Their axes, in order.
        layout: Which dimension each axis belongs to.
    """

    def opened(own: int | None) -> torch.Tensor | None:
        unknown = torch.zeros(0, dtype=torch.bool)
        softmax = _softmax_over(node, keys)
        before = node if softmax is None else softmax.children[0]
        products = _products(before)
        read = above(list(walk(before)), {id(product) for product in products})
        if _depends_on_scores(before, read) or (softmax is None and any(id(p) in read for p in products)):
            return unknown
        masks: list[tuple[_Steps, bool]] = []
        if _has_mask(before, products):
            values = dict.fromkeys(products, 0.0)
            masks.append((_Steps(before, values, keys, leads, rows, layout), softmax is None))
        if softmax is not None and _is_masked_after(node, softmax):
            masks.append((_Steps(node, {softmax: 1.0}, keys, leads, rows, layout), True))
        if not masks:
            return unknown if softmax is None else None

        def rows_of(sequence: int, low: int, high: int) -> torch.Tensor:
            parts = [
                part > 0 if is_weight else open_of(part)
                for steps, is_weight in masks
                for part in (steps.rows_of(sequence, low, high),)
            ]
            return parts[0] if len(parts) == 1 else parts[0] & parts[1]

        found = open_keys(rows_of, layout.batch, layout.q_len, layout.kv_len, own)
        # If all weights are 0 for scores of 0, this is not a softmax.
        return unknown if softmax is None and not bool(found.any()) else found

    return opened


def _products(node: Node) -> list[Node]:
    return [step for step in walk(node) if isinstance(step, OpNode) and step.work]


def _depends_on_scores(before: Node, read: set[int]) -> bool:
    """True if the scores themselves decide which keys are open (the largest ones)."""
    return any(id(step) in read and not step.dtype.is_floating_point for step in walk(before))


def _has_mask(node: Node, roots: list[Node]) -> bool:
    """True if a graph reads any tensor that ``roots`` are not computed from: a mask or a bias."""
    inside = {id(step) for root in roots for step in walk(root)}
    return any(isinstance(s, InputNode) or s.stands_for_memory for s in walk(node) if id(s) not in inside)


def _is_masked_after(node: Node, softmax: Node) -> bool:
    """True if the weights of this softmax are combined with a mask afterwards, by elementwise steps only."""
    steps = list(walk(node))
    read = above(steps, {id(softmax)})
    later = [step for step in steps if id(step) in read]
    is_plain = all((isinstance(s, OpNode) and not s.work) or not isinstance(s, OpNode) for s in later)
    return is_plain and not _depends_on_scores(node, read) and _has_mask(node, [softmax])


class _Steps:
    """The result of attention's own steps when all scores, or all weights, have one value; computed by rows of one
    head.
    """

    def __init__(
        self,
        before: Node,
        values: dict[Node, float],
        keys: list[Axis],
        leads: list[Axis],
        rows: list[Axis],
        layout: Layout,
    ) -> None:
        self.before, self.leads, self.rows, self.layout = before, leads, rows, layout
        self.run = Evaluator(before)
        for step, number in values.items():
            value = torch.full((), number, dtype=step.dtype, device=step.device)
            self.run.fix(step, value.expand(step.shape))
        self.axes = [leaf for dim in before.dims for leaf in leaves(dim)]
        # If a sink's column was added, softmax has other axes for these keys, and they come before the sink.
        self.keys = keys if all(key in self.axes for key in keys) else leaves(before.dims[-1])
        self.numbers = layout.numbers
        if self.numbers is None:
            self.numbers = torch.arange(math.prod(axis.size for axis in leads))

    def rows_of(self, sequence: int, low: int, high: int) -> torch.Tensor:
        """Rows ``low:high`` of a sequence's first head: ``[rows, kv_len]``.

        If heads are mixed after softmax, this is their largest value: a key is closed if it is closed in all of them.
        """
        tile = self._head(sequence)
        if len(self.rows) == 1:
            tile[self.rows[0]] = (low, high)
        value = self._value(tile)
        order = [axis for axis in (*self.leads, *self.rows, *self.keys) if axis in self.axes]
        mixed = [place for place, axis in enumerate(self.axes) if axis not in order]
        value = value.permute([*mixed, *(self.axes.index(axis) for axis in order)])
        value = value.flatten(0, len(mixed) - 1).amax(0) if mixed else value
        count = math.prod(value.shape[i] for i, axis in enumerate(order) if axis in self.rows)
        value = value.reshape(count, -1)[:, : self.layout.kv_len]
        return value[low:high] if len(self.rows) != 1 and count > 1 else value

    def _head(self, sequence: int) -> Tile:
        """The tile of a sequence's first head."""
        at = int((self.numbers == sequence * self.layout.heads).nonzero()[0])
        places = map(int, numpy.unravel_index(at, [axis.size for axis in self.leads]))
        return {axis: (place, place + 1) for axis, place in zip(self.leads, places, strict=True)}

    def _value(self, tile: Tile) -> torch.Tensor:
        """The bias inside a tile, with one dimension per axis."""
        whole = self.run.whole
        with torch.no_grad():
            value = self.run.value(
                self.before, {axis: span for axis, span in tile.items() if axis not in whole}
            )
        self.run.next_lead()
        spans = [tile.get(axis, (0, axis.size)) for axis in self.axes]
        value = value.reshape(
            [
                axis.size if axis in whole else high - low
                for axis, (low, high) in zip(self.axes, spans, strict=True)
            ]
        )
        for place, (axis, (low, high)) in enumerate(zip(self.axes, spans, strict=True)):
            if axis in whole:
                value = value.narrow(place, low, high - low)
        return value


def _softmax_over(node: Node, keys: list[Axis]) -> Node | None:
    """The softmax over the keys; or the only softmax there is; or ``None``."""
    softmaxes = [
        step
        for step in walk(node)
        if isinstance(step, OpNode) and getattr(step.func, "__name__", "") in SOFTMAX and step.children
    ]
    found = [step for step in softmaxes if set(leaves(step.whole)) & set(keys)]
    chosen = found or (softmaxes if len(softmaxes) == 1 else [])
    return chosen[0] if chosen else None
