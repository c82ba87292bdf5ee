"""Leaves out the keys after the last one that any row of a tile may see, as under a causal mask: up to half of the work.

Hidden keys have probability 0, so a row's sums stay what they are. Whether their last bit does, too, depends on how the
matrix library divides sums over keys. So only multiples of ``UNIT`` keys are left out, and on CPU each size of step is
once computed both ways in this process: if a bit differs, it is computed whole from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attnpatch.compat import FakeTensor
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import KEY, Axis, Tile, leaves
from attnpatch.rows.graph.nodes import Child, InputNode, Node, ViewNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import CASTS, POINTWISE

# Measured: with smaller multiples, rows with few keys differ by 3e-7 (float32, two makers' processors).
UNIT = 512
# A score below this hides a key: its probability is 0 beside any score that a model computes.
_HIDDEN, _HIDDEN_HALF = -1e9, -3e4
_ADDITIONS = frozenset("add add_ __add__ __iadd__ __radd__".split())
_FILLS = frozenset("masked_fill masked_fill_".split())
# For each size of step: whether the result without hidden keys has the same bits.
_same: dict[tuple[Any, ...], bool] = {}


class MaskedTail:
    """The keys of a graph that its tiles need.

    Args:
        root: The product of probabilities and values.
        keys: The axis of the keys.
        hidden: The masks that hide keys.
    """

    def __init__(self, root: OpNode, keys: Axis, hidden: list[Hidden]) -> None:
        self.root, self.keys, self.hidden = root, keys, hidden
        # In each operand of the product, the dimension that is summed over.
        letters = root.letters
        assert letters is not None
        (summed,) = set(letters.operands[0]) & set(letters.operands[1]) - set(letters.result)
        self._stops: dict[tuple[Any, ...], int] = {}
        self.places = [labels.index(summed) for labels in letters.operands]

    def cut(self, run: Evaluator, tile: Tile) -> Tile:
        """The tile without the keys that all of its rows hide."""
        stop = self._stop(run, tile)
        return tile if stop >= self.keys.size else {**tile, self.keys: (0, stop)}

    def _stop(self, run: Evaluator, tile: Tile) -> int:
        """One past the last key that is needed."""
        stop = self.keys.size
        for hidden in self.hidden:
            # Heads that share a mask share the answer.
            own = tuple((axis, tile[axis]) for axis in hidden.axes if axis in tile)
            if (hidden, own) not in self._stops:
                with torch.no_grad():
                    self._stops[hidden, own] = hidden.stop(run, dict(own))
            stop = min(stop, self._stops[hidden, own])
        return stop

    def value(self, run: Evaluator, tile: Tile) -> tuple[torch.Tensor, Tile]:
        """The root's value in a tile, and the tile for which it was computed."""
        own = self.cut(run, tile)
        if own is tile:
            return run.value(self.root, tile), tile
        if self.root.device.type != "cpu":
            return self._cut_value(run, own), own
        size = self._size(own)
        is_same = _same.get(size)
        if is_same:
            return self._cut_value(run, own), own
        whole = run.value(self.root, tile)
        if is_same is None:
            whole = whole.clone()
            run.next_tile()
            _same[size] = torch.equal(self._cut_value(run, own), whole)
            run.next_tile()
        return whole, tile

    def _cut_value(self, run: Evaluator, tile: Tile) -> torch.Tensor:
        """The root's value, computed from the first keys and values alone."""
        operands = run.operands(self.root, tile)
        for i in range(2):
            if operands[i].shape[self.places[i]] > tile[self.keys][1]:
                operands[i] = operands[i].narrow(self.places[i], *tile[self.keys])
        return self.root.called_with(operands, tile, run)

    def _size(self, tile: Tile) -> tuple[Any, ...]:
        """All that the library's choice of a kernel may depend on."""
        shapes = [
            tuple(
                high - low
                for low, high in (tile.get(axis, (0, axis.size)) for dim in node.dims for axis in leaves(dim))
            )
            for node in self._products()
        ]
        return (
            self.keys.size,
            *tile[self.keys],
            self.root.dtype,
            torch.get_num_threads(),
            *shapes,
            *self._strides(),
        )

    def _products(self) -> Iterator[Node]:
        for node in walk(self.root):
            if isinstance(node, OpNode) and node.work:
                yield node
                yield from node.children

    def _strides(self) -> Iterator[tuple[int, ...]]:
        for node in self._products():
            if isinstance(node, InputNode) and node.tensor is not None:
                yield node.tensor.stride()


class Hidden:
    """Keys that one node of a graph hides.

    Args:
        node: ``[..., rows, keys]``: bool, or added to the scores.
        keys: The axis of the keys.
        is_open: True if a bool ``True`` means that a key is seen, and not that it is hidden.
    """

    def __init__(self, node: Node, keys: Axis, is_open: bool = False) -> None:
        self.node, self.keys, self.axes, self.is_open = node, keys, _axes(node), is_open

    def stop(self, run: Evaluator, tile: Tile) -> int:
        """One past the last key that any row of a tile sees, as a multiple of ``UNIT``; all if a row sees none."""
        value = run.value(self.node, tile)
        if isinstance(value, FakeTensor) or value.is_meta:  # ``explain`` runs on shapes
            return self.keys.size
        if value.dtype.is_floating_point:
            is_open = value > (_HIDDEN_HALF if value.dtype == torch.float16 else _HIDDEN)
        elif value.dtype == torch.bool:
            is_open = value if self.is_open else value.logical_not()
        else:
            return self.keys.size
        rows = is_open.reshape(-1, is_open.shape[-1])
        # A row without any open key is the mean of all values, or zero.
        if rows.shape[-1] != self.keys.size or not bool(rows.any(-1).all()):
            return self.keys.size
        stop = min(self.keys.size, -(-(int(rows.any(0).nonzero()[-1]) + 1) // UNIT) * UNIT)
        if stop < self.keys.size and self.node.dims and leaves(self.node.dims[-1]) == [self.keys]:
            run.share(self.node, {**tile, self.keys: (0, stop)}, value[..., :stop])
        return stop


def found_in(root: Node) -> MaskedTail | None:
    """The masked tail of a graph, if its steps are those of attention with a mask, and keys can be left out in all."""
    if not isinstance(root, OpNode) or not root.work or len(root.children) != 2:
        return None
    if root.device.type == "cpu" and root.dtype not in (torch.float32, torch.float64):
        return None  # narrow results are rounded so much that a comparison of two proves nothing
    summed = [axis for axis in _axes(root.children[0]) if axis not in _axes(root) and axis.kind == KEY]
    if len(summed) != 1 or summed[0].size < 2 * UNIT or not _sums_one(root):
        return None
    keys = summed[0]
    if not all(
        _can_be_cut(node, keys, node is root) for node in walk(root) if keys in _axes(node) or node is root
    ):
        return None
    softmax = _below(root.children[0])
    if not isinstance(softmax, OpNode) or getattr(softmax.func, "__name__", "") not in (
        "softmax",
        "special_softmax",
    ):
        return None
    hidden = list(_masks(softmax.children[0], keys))
    return MaskedTail(root, keys, hidden) if hidden else None


def _sums_one(product: OpNode) -> bool:
    """True if a product sums over one dimension, which both operands have once."""
    if product.letters is None:
        return False
    first, second = product.letters.operands
    return len(set(first) & set(second) - set(product.letters.result)) == 1 and len(first) == len(set(first))


def _axes(node: Node) -> list[Axis]:
    return [leaf for dim in node.dims for leaf in leaves(dim)]


def _below(node: Node) -> Node:
    """The node below casts, copies and views of the same dimensions."""
    while len(node.children) == 1 and (
        (isinstance(node, ViewNode) and node.dims == node.children[0].dims)
        or (
            isinstance(node, OpNode) and getattr(node.func, "__name__", "") in CASTS | {"clone", "contiguous"}
        )
    ):
        node = node.children[0]
    return node


def _can_be_cut(node: Node, keys: Axis, is_root: bool) -> bool:
    """True if a node can be computed for the first keys alone."""
    # Keys must be a dimension of their own.
    if not is_root and not any(leaves(dim) == [keys] for dim in node.dims):
        return False
    if not node.children:
        return True
    if isinstance(node, ViewNode):
        return any(leaves(dim) == [keys] for dim in node.children[0].dims)
    if not isinstance(node, OpNode):
        return False
    name = getattr(node.func, "__name__", "")
    if node.work:
        return is_root or all(keys not in _axes(child) for child in node.children[:1]) != all(
            keys not in _axes(child) for child in node.children[1:]
        )
    if name in ("softmax", "special_softmax"):
        return leaves(node.whole) == [keys]
    return (
        name.rstrip("_") in POINTWISE
        or name in POINTWISE
        or name in CASTS
        or name in _ADDITIONS
        or name == "clone"
    )


def _masks(scores: Node, keys: Axis) -> Iterator[Hidden]:
    """The masks between a product and its softmax, the last one first."""
    node = _below(scores)
    while isinstance(node, OpNode) and not node.work:
        name = getattr(node.func, "__name__", "")
        products = [child for child in node.children if any(getattr(step, "work", 0) for step in walk(child))]
        if len(products) != 1:
            return
        others = [child for child in node.children if child is not products[0] and keys in _axes(child)]
        if name in _ADDITIONS and len(others) == 1 and not node.kwargs:
            yield Hidden(others[0], keys)
        elif name in _FILLS and len(others) == 1:
            if not _is_low(node.args[2] if len(node.args) > 2 else None, node):
                return
            yield Hidden(others[0], keys)
        elif name == "where":
            cond, kept, other = (_child(node, i) for i in range(3))
            if cond is None or kept is not products[0] or not _is_low(_number(other, node, 2), node):
                return
            yield Hidden(cond, keys, is_open=True)
        elif others or not _is_scaling(node, name):
            return
        node = _below(products[0])


def _child(node: OpNode, position: int) -> Node | None:
    """The node in an argument's place; ``None`` if there is none."""
    given = node.args[position] if len(node.args) > position else None
    return node.children[given.index] if isinstance(given, Child) else None


def _number(node: Node | None, of: OpNode, position: int) -> Any:
    """The number in an argument's place: as it is, or the only element of a tensor."""
    if node is None:
        return of.args[position] if len(of.args) > position else None
    if node.is_constant:
        return getattr(node, "value", None)
    if isinstance(node, InputNode) and node.tensor is not None and node.count == 1:
        return float(node.tensor)
    return None


def _is_scaling(node: OpNode, name: str) -> bool:
    """True for a product with, or a division by, a number of common size."""
    factor = next((value for value in node.args if isinstance(value, (int, float))), None)
    return name.strip("_") in ("mul", "imul", "rmul", "div", "truediv", "itruediv") and (
        factor is not None and 1e-3 < factor < 1e3
    )


def _is_low(value: Any, node: OpNode) -> bool:
    """True if a number hides the score in whose place it is."""
    limit = _HIDDEN_HALF if node.dtype == torch.float16 else _HIDDEN
    return isinstance(value, (int, float)) and not math.isnan(value) and value <= limit
