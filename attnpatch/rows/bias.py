"""The mask and the bias of hand-written attention: what its own steps before softmax make of scores that are all zero."""

from __future__ import annotations

import math

import torch

from attnpatch.rows.axes import Axis, Tile, leaves
from attnpatch.rows.deferred import Opened
from attnpatch.rows.layout import Layout
from attnpatch.rows.opened import open_keys
from attnpatch.rows.recipe import Call, Leaf, Node, graph
from attnpatch.rows.run import Run

SOFTMAX = frozenset("softmax special_softmax _safe_softmax masked_softmax _masked_softmax_rows".split())


def above(steps: list[Node], roots: set[int]) -> set[int]:
    """What is computed from some steps; ``steps``: children before those that read them."""
    found: set[int] = set()
    for step in steps:
        if any(id(child) in roots or id(child) in found for child in step.children):
            found.add(id(step))
    return found


def opened_by(node: Node, keys: list[Axis], leads: list[Axis], rows: list[Axis], layout: Layout) -> Opened:
    """The keys that attention is open to.

    Args:
        node: Its probabilities.
        keys, leads, rows: Their axes, in order.
        layout: What they are.
    """

    def opened(own: int | None) -> torch.Tensor | None:
        before = _before_softmax(node, keys)
        if before is None or _depends_on_scores(before):
            return torch.zeros(0, dtype=torch.bool)  # not known
        if not _has_mask(before):
            return None
        bias = _Bias(before, keys, leads, rows, layout)
        return open_keys(bias.rows_of, layout.batch, layout.q_len, layout.kv_len, own)

    return opened


def _products(node: Node) -> list[Node]:
    return [step for step in graph(node) if isinstance(step, Call) and step.work]


def _depends_on_scores(before: Node) -> bool:
    """Whether which keys are open is chosen by the scores themselves (the largest of them)."""
    steps = list(graph(before))
    read = above(steps, {id(product) for product in _products(before)})
    return any(id(step) in read and not step.dtype.is_floating_point for step in steps)


def _has_mask(before: Node) -> bool:
    """Whether anything is read beside queries and keys."""
    inside = {id(step) for product in _products(before) for step in graph(product)}
    return any(isinstance(s, Leaf) or s.stands_for_memory for s in graph(before) if id(s) not in inside)


class _Bias:
    """What is added to the scores of one head, by rows."""

    def __init__(
        self, before: Node, keys: list[Axis], leads: list[Axis], rows: list[Axis], layout: Layout
    ) -> None:
        self.before, self.leads, self.rows, self.layout = before, leads, rows, layout
        self.run = Run(before)
        for product in _products(before):
            zero = torch.zeros((), dtype=product.dtype, device=product.device)
            self.run.fix(product, zero.expand(product.shape))
        self.axes = [leaf for dim in before.dims for leaf in leaves(dim)]
        # Beside a sink's column softmax has these keys under another name; they come first.
        self.keys = keys if all(key in self.axes for key in keys) else leaves(before.dims[-1])
        self.numbers = layout.numbers
        if self.numbers is None:
            self.numbers = torch.arange(math.prod(axis.size for axis in leads))

    def rows_of(self, sequence: int, low: int, high: int) -> torch.Tensor:
        """``[rows, kv_len]``: rows of the first head of a sequence."""
        tile = self._head(sequence)
        if len(self.rows) == 1:
            tile[self.rows[0]] = (low, high)
        value = self._value(tile)
        order = [axis for axis in (*self.leads, *self.rows, *self.keys) if axis in self.axes]
        value = value.permute([self.axes.index(axis) for axis in order])
        count = math.prod(value.shape[i] for i, axis in enumerate(order) if axis in self.rows)
        value = value.reshape(count, -1)[:, : self.layout.kv_len]
        return value[low:high] if len(self.rows) != 1 and count > 1 else value

    def _head(self, sequence: int) -> Tile:
        """The first head of a sequence, among the leading axes."""
        at = int((self.numbers == sequence * self.layout.heads).nonzero()[0])
        tile: Tile = {}
        for axis in reversed(self.leads):
            tile[axis] = (at % axis.size, at % axis.size + 1)
            at //= axis.size
        return tile

    def _value(self, tile: Tile) -> torch.Tensor:
        """The bias inside a tile, a dimension for each axis."""
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


def _before_softmax(node: Node, keys: list[Axis]) -> Node | None:
    """What the softmax over the keys is given: the only one there is, or the one over them."""
    softmaxes = [
        step
        for step in graph(node)
        if isinstance(step, Call) and getattr(step.func, "__name__", "") in SOFTMAX and step.children
    ]
    found = [step for step in softmaxes if set(leaves(step.whole)) & set(keys)]
    chosen = found or (softmaxes if len(softmaxes) == 1 else [])
    return chosen[0].children[0] if chosen else None
