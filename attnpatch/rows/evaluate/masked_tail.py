"""Leaves out the keys after the last one that any row of a tile may see, as under a causal mask: up to half of the work.

Hidden keys have probability 0, so a row's sums stay what they are. Whether their last bit does, too, depends on how the
matrix library divides sums over keys, which differs between processors. So keys are left out in multiples that suit this
one (``key_units``), and on CPU each size of step is once computed both ways in this process, with the step's own values and
with probabilities that are nowhere 0: if a bit differs, it is computed whole from then on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from attnpatch.compat import FakeTensor
from attnpatch.rows.evaluate import key_units
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.key_units import numbers
from attnpatch.rows.graph.axes import KEY, Axis, Tile, leaves
from attnpatch.rows.graph.nodes import Child, InputNode, Node, ViewNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import CASTS, POINTWISE

# A mask value at or below this outweighs any product: beside a visible key, such a key gets no probability at all.
HIDDEN = -6e4
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
        self._axes = {axis: None for each in hidden for axis in _axes(each.node)}
        self._stops: dict[tuple[Any, ...], int] = {}
        self.places = [labels.index(summed) for labels in letters.operands]

    def cut(self, run: Evaluator, tile: Tile) -> Tile:
        """The tile without the keys that all of its rows hide."""
        # Heads that share the masks share the answer.
        own = tuple((axis, tile[axis]) for axis in self._axes if axis in tile)
        if own not in self._stops:
            with torch.no_grad():
                self._stops[own] = self._stop(run, dict(own))
        stop = self._stops[own]
        return tile if stop >= self.keys.size else {**tile, self.keys: (0, stop)}

    def _stop(self, run: Evaluator, tile: Tile) -> int:
        """One past the last key that any row of a tile sees, as a multiple of ``key_units.unit_of``; all if a row sees none."""
        values = [run.value(each.node, tile) for each in self.hidden]
        if any(
            isinstance(value, FakeTensor) or value.is_meta for value in values
        ):  # ``explain`` runs on shapes
            return self.keys.size
        is_open = functools.reduce(
            torch.logical_and, (each.opened(value) for each, value in zip(self.hidden, values, strict=True))
        )
        rows = is_open.reshape(-1, is_open.shape[-1])
        if rows.shape[-1] != self.keys.size:
            return self.keys.size
        # One transfer, since each waits for the device.
        places = torch.arange(1, self.keys.size + 1, device=rows.device)
        sees, last = torch.stack((rows.any(-1).all().long(), (rows.any(0) * places).amax())).tolist()
        # A row without any open key is the mean of values of hidden keys, or zero.
        unit = key_units.unit_of(self.root.device)
        stop = min(self.keys.size, -(-last // unit) * unit) if sees else self.keys.size
        if stop < self.keys.size:
            for each, value in zip(self.hidden, values, strict=True):
                if leaves(each.node.dims[-1]) == [self.keys]:
                    run.share(each.node, {**tile, self.keys: (0, stop)}, value[..., :stop])
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
            is_same = torch.equal(self._cut_value(run, own), whole)
            run.next_tile()
            _same[size] = is_same and self._is_same_for_others(run, tile, own)
            run.next_tile()
        return whole, tile

    def _cut_value(self, run: Evaluator, tile: Tile) -> torch.Tensor:
        """The root's value, computed from the first keys and values alone."""
        return self.root.called_with(self._cut_operands(run, tile), tile, run)

    def _cut_operands(self, run: Evaluator, tile: Tile) -> list[Any]:
        operands = run.operands(self.root, tile)
        for i in range(2):
            if operands[i].shape[self.places[i]] > tile[self.keys][1]:
                operands[i] = operands[i].narrow(self.places[i], *tile[self.keys])
        return operands

    def _is_same_for_others(self, run: Evaluator, tile: Tile, own: Tile) -> bool:
        """True if the product has the same bits, whatever keys the rows see before the cut.

        This step's rows may see few: where all others have probability 0, any order of summing gives the same bits.
        """
        stop = own[self.keys][1]
        cut = [(each.shape, each.stride()) for each in self._cut_operands(run, own)]
        run.next_tile()
        found = []
        for each, place, (shape, stride) in zip(run.operands(self.root, tile), self.places, cut, strict=True):
            whole = numbers(each)
            part = whole.narrow(place, 0, stop)
            if not found:  # the probabilities
                whole.narrow(place, stop, self.keys.size - stop).zero_()
                # Laid out as those that are computed for the first keys alone.
                part = torch.empty_strided(shape, stride, dtype=each.dtype, device=each.device).copy_(part)
            found.append((whole, part))
        run.next_tile()
        one = self.root.called_with([whole for whole, _ in found], tile, run).clone()
        run.next_tile()
        return torch.equal(one, self.root.called_with([part for _, part in found], own, run))

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
            *self._layouts(),
        )

    def _products(self) -> Iterator[Node]:
        for node in walk(self.root):
            if isinstance(node, OpNode) and node.work:
                yield node
                yield from node.children

    def _layouts(self) -> Iterator[tuple[int, ...]]:
        for node in self._products():
            if isinstance(node, InputNode) and node.tensor is not None:
                yield (*node.tensor.shape, *node.tensor.stride())


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """Keys that one node of a graph hides.

    Attributes:
        node: ``[..., rows, keys]``: bool, or added to the scores.
        is_open: True if a bool ``True`` means that a key is seen, and not that it is hidden.
    """

    node: Node
    is_open: bool = False

    def opened(self, value: torch.Tensor) -> torch.Tensor:
        """Which keys are not hidden, bool, from a value of the node."""
        if value.dtype == torch.bool:
            return value if self.is_open else value.logical_not()
        return value > HIDDEN


def found_in(root: Node) -> MaskedTail | None:
    """The masked tail of a graph, if its steps are those of attention with a mask, and keys can be left out in all."""
    if not isinstance(root, OpNode) or not root.work or len(root.children) != 2:
        return None
    if root.device.type == "cpu" and root.dtype not in (torch.float32, torch.float64):
        return None  # narrow results are rounded so much that a comparison of two proves nothing
    summed = [axis for axis in _axes(root.children[0]) if axis not in _axes(root) and axis.kind == KEY]
    if len(summed) != 1 or summed[0].size < 2 * key_units.LEAST or not _sums_one(root):
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
    hidden = _masks(softmax.children[0], keys)
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


def _masks(scores: Node, keys: Axis) -> list[Hidden]:
    """All masks between a product and its softmax; none if there may be others.

    They are needed together: a row may see some key in each of two masks, and none in both.
    """
    found: list[Hidden] = []
    node = _below(scores)
    while isinstance(node, OpNode) and not node.work:
        name = getattr(node.func, "__name__", "")
        products = [child for child in node.children if any(getattr(step, "work", 0) for step in walk(child))]
        others = [child for child in node.children if child not in products and keys in _axes(child)]
        if len(products) != 1 or len(others) > 1:
            return []
        if others:
            hidden = _hidden_by(node, name, products[0], others[0])
            if hidden is None:
                return []
            found.append(hidden)
        elif not _is_scaling(node, name):
            # Scores are bounded here, say; masks below would be, too.
            return found if _has_no_mask(products[0], keys) else []
        node = _below(products[0])
    return found if isinstance(node, OpNode) else []


def _has_no_mask(node: Node, keys: Axis) -> bool:
    """True if every step down to the product has one operand with keys."""
    node = _below(node)
    while isinstance(node, OpNode) and not node.work:
        own = [child for child in node.children if keys in _axes(child)]
        if len(own) != 1:
            return False
        node = _below(own[0])
    return isinstance(node, OpNode)


def _hidden_by(node: OpNode, name: str, product: Node, mask: Node) -> Hidden | None:
    """What a step with scores and one other operand with keys hides; ``None`` if that is not known."""
    if name in _ADDITIONS:
        is_mask = mask.dtype.is_floating_point and not node.kwargs and len(node.args) == 2
        return Hidden(mask) if is_mask else None
    if name in _FILLS:
        is_low = _is_low(node.args[2] if len(node.args) > 2 else None)
        return Hidden(mask) if is_low and _child(node, 0) is product else None
    if name == "where":
        cond, kept, other = (_child(node, i) for i in range(3))
        is_low = _is_low(_number(other, node, 2))
        return Hidden(mask, is_open=True) if cond is mask and kept is product and is_low else None
    return None


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


def _is_low(value: Any) -> bool:
    """True if a number hides the score in whose place it is."""
    return isinstance(value, (int, float)) and value <= HIDDEN
