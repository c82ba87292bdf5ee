"""Reads a graph as ``softmax(factor * query @ key.T + masks) @ value``, or names the step that does not fit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.evaluate.masked_tail import HIDDEN
from attnpatch.rows.graph.axes import ROW, Axis, all_leaves, leaves
from attnpatch.rows.graph.dropout import Dropout
from attnpatch.rows.graph.nodes import Child, InputNode, Node, SliceNode, ViewNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import CASTS

# Mask value for a key whose score the host overwrites with a finite number. It outweighs any product, so a row that
# sees no key stays uniform, as when its scores are overwritten.
LOWEST = -1e30
_LAYOUT = frozenset(["permute", "contiguous", "clone", "positive"])
_TIMES = frozenset("mul multiply __rmul__".split())
_DIVIDED = frozenset("div divide true_divide".split())
_PLUS = frozenset("add __radd__".split())
_MINUS = frozenset("sub subtract".split())
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ bmm mm linalg_matmul einsum tensordot inner".split())
_ONTO = frozenset("baddbmm addmm".split())
_KNOWN_AS = {"tanh": "tanh (softcap)", "cat": "cat (sinks)"}


class NoMatch(Exception):
    """The graph is not scaled dot-product attention; the message names the step that does not fit."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the scores.

    Attributes:
        kind: ``"times"`` a number; ``"plus"`` a mask, times a number; ``"fill"`` with a number where a mask is true;
            ``"tanh"``.
        number: The number.
        mask: A node that does not depend on the product, for ``"plus"`` and ``"fill"``.
        inverted: True to fill where the mask is false.
    """

    kind: str
    number: float
    mask: Node | None = None
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class SdpaMatch:
    """A graph that is scaled dot-product attention.

    Attributes:
        query, key, value: The operands.
        row, keys: The axes of query rows and of keys.
        leads: The other axes of the scores (batch and heads), in the order of the product.
        width: The axes of the result that only the values have.
        steps: The operations on the product before softmax, in order.
        sink: The learned sink: a score beside those of the keys that has no value; ``None`` if there is none.
        dtype: The wider dtype of the two products.
    """

    query: InputNode
    key: InputNode
    value: InputNode
    row: Axis
    keys: Axis
    leads: tuple[Axis, ...]
    width: tuple[Axis, ...]
    steps: tuple[Step, ...]
    dtype: torch.dtype
    sink: Node | None = None

    @property
    def factors(self) -> tuple[float, float | None]:
        """The factor of the product, and the factor of its ``tanh``; the latter is ``None`` if there is no ``tanh``."""
        kinds = [step.kind for step in self.steps]
        place = kinds.index("tanh") if "tanh" in kinds else len(kinds)
        before, after = (
            math.prod(step.number for step in steps if step.kind == "times")
            for steps in (self.steps[:place], self.steps[place:])
        )
        return before, after if "tanh" in kinds else None


def read(result: OpNode, probabilities: Node, keys: list[Axis]) -> SdpaMatch:
    """Read a graph as scaled dot-product attention.

    Args:
        result: The product of probabilities and values.
        probabilities: Its deferred operand.
        keys: The axes that it sums over.

    Raises:
        NoMatch: The graph is something else.
    """
    if _name(result) not in _PRODUCTS or len(result.children) != 2:
        raise NoMatch(f"{_name(result)} (of the values)")
    value = next(child for child in result.children if child is not probabilities)
    if not isinstance(value, InputNode) or len(keys) != 1:
        raise NoMatch("keys in several dimensions")
    softmax, cut = _softmax_of(probabilities)
    scores, axes, sink = softmax.children[0], leaves(softmax.whole), None
    if cut is not None:
        scores, sink = _beside_sink(scores, axes, cut)
        axes = leaves(scores.dims[-1])
    elif axes != keys:
        raise NoMatch("softmax (not over the keys)")
    if len(axes) != 1:
        raise NoMatch("softmax (not over the keys)")
    product = _product_of(scores, axes[0])
    steps = _steps(scores, product, axes[0])
    query, key, row = _operands(product, axes[0])
    leads = tuple(axis for axis in all_leaves(product.dims) if axis not in (row, axes[0]))
    own = all_leaves(result.dims)
    width = tuple(axis for axis in all_leaves(value.dims) if axis not in leads)
    if set(own) != {*leads, row, *width} or len(set(own)) != len(own):
        raise NoMatch(f"{_name(result)} (heads are mixed)")
    masks = [step.mask for step in steps if step.mask is not None] + ([] if sink is None else [sink])
    _check_gradients(result, masks)
    whole = {axis for mask in masks for node in walk(mask) for axis in leaves(node.whole)}
    if whole & {row, *leads}:
        raise NoMatch("a bias that mixes rows or heads")
    dtype = torch.promote_types(product.dtype, result.dtype)
    return SdpaMatch(query, key, value, row, axes[0], leads, width, tuple(steps), dtype, sink)


def _name(node: Node) -> str:
    return getattr(node.func, "__name__", "").partition(".")[0] if isinstance(node, OpNode) else ""


def _other(node: Node) -> NoReturn:
    if isinstance(node, Dropout):
        raise NoMatch("dropout")
    name = _name(node) or {ViewNode: "expand", SliceNode: "slice"}.get(type(node), type(node).__name__)
    raise NoMatch(_KNOWN_AS.get(name, name))


def _is_layout(node: Node) -> bool:
    """True if a step keeps the values, up to rounding; dimensions may be reordered, since axes have names."""
    if isinstance(node, ViewNode):
        return not node.expand
    return len(node.children) == 1 and (
        _name(node) in _LAYOUT or (_name(node) in CASTS and node.dtype.is_floating_point)
    )


def _softmax_of(node: Node) -> tuple[OpNode, SliceNode | None]:
    """The softmax at the end of a graph, and the slice of its result, if there is one."""
    cut = None
    while _name(node) != "softmax":
        if isinstance(node, SliceNode) and cut is None:
            cut = node
        elif not _is_layout(node):
            _other(node)
        node = node.children[0]
    assert isinstance(node, OpNode)
    return node, cut


def _beside_sink(node: Node, joined: list[Axis], cut: SliceNode) -> tuple[Node, Node]:
    """The scores and the sink that were concatenated along ``joined``; the slice ``cut`` drops the sink again."""
    while _name(node) != "cat":
        if not (_is_layout(node) or _is_shift(node, joined)):
            _other(cut)
        node = node.children[0]
    scores, *sinks = node.children
    last = len(node.dims) - 1
    if (
        len(sinks) != 1
        or sinks[0].shape[last] != 1
        or leaves(node.dims[last]) != joined
        or (cut.position, cut.start, cut.axis.size) != (last, 0, scores.shape[last])
    ):
        raise NoMatch(_KNOWN_AS["cat"])
    return scores, sinks[0]


def _is_shift(node: Node, keys: list[Axis]) -> bool:
    """True if a step subtracts one value from each row (usually its maximum), which does not change the softmax."""
    if _name(node) not in _MINUS or len(node.children) != 2:
        return False
    return not any(axis in keys for axis in all_leaves(node.children[1].dims))


def _product_of(scores: Node, keys: Axis) -> OpNode:
    """The product that has both the key axis and a row axis; all else that is added to it counts as a mask."""
    for node in walk(scores):
        if (
            isinstance(node, OpNode)
            and node.work
            and all(isinstance(child, InputNode) for child in node.children)
        ):
            axes = all_leaves(node.dims)
            if keys in axes and any(axis.kind == ROW for axis in axes):
                return node
    raise NoMatch("no product of queries and keys")


def _operands(product: OpNode, keys: Axis) -> tuple[InputNode, InputNode, Axis]:
    """Query, key, and the axis of query rows."""
    operands = product.children[-2:]
    for key, query in (operands, operands[::-1]):
        assert isinstance(key, InputNode) and isinstance(query, InputNode)
        own, other = all_leaves(key.dims), all_leaves(query.dims)
        rows = [axis for axis in other if axis.kind == ROW and axis not in own]
        if keys in own and keys not in other and len(rows) == 1:
            if any(_inner_count(leaf) != 1 for leaf in (key, query)):
                break
            return query, key, rows[0]
    raise NoMatch(f"{_name(product)} (over several dimensions)")


def _inner_count(leaf: InputNode) -> int:
    """Number of dimensions that are summed over: those without an axis and longer than one."""
    assert leaf.tensor is not None
    return sum(not dim and size > 1 for dim, size in zip(leaf.dims, leaf.tensor.shape, strict=True))


def _steps(scores: Node, product: OpNode, keys: Axis) -> list[Step]:
    """The operations on the product, in order."""
    above = {product}
    for node in walk(scores):
        if any(child in above for child in node.children):
            above.add(node)
    found: list[Step] = []
    node = scores
    while node is not product:
        if _is_layout(node):
            node = node.children[0]
            continue
        if not isinstance(node, OpNode):
            _other(node)
        made = [child for child in node.children if child in above and keys in all_leaves(child.dims)]
        if len(made) != 1:
            _other(node)
        found.extend(_step(node, made[0], above))
        node = made[0]
    found.reverse()
    found = [*_own_steps(product), *found]
    kinds = [step.kind for step in found]
    # A soft cap applies to the product only, and once.
    if "tanh" in kinds and (kinds.count("tanh") > 1 or {*kinds[: kinds.index("tanh")]} - {"times"}):
        raise NoMatch(_KNOWN_AS["tanh"])
    return found


def _own_steps(product: OpNode) -> list[Step]:
    """The operations that ``baddbmm`` itself applies to its product."""
    if _name(product) not in _ONTO:
        if len(product.children) != 2 or _name(product) not in _PRODUCTS:
            _other(product)
        return []
    alpha, beta = (_number(product.kwargs.get(key, 1), product) for key in ("alpha", "beta"))
    steps = [] if alpha == 1 else [Step("times", alpha)]
    return steps if beta == 0 else [*steps, Step("plus", beta, product.children[0])]


def _step(node: OpNode, scores: Node, above: set[Node]) -> list[Step]:
    """The operations that one node applies to ``scores``, its operand from the product; the last one first."""
    name = _name(node)
    place = node.children.index(scores)
    first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
    is_first = isinstance(first, Child) and first.index == place
    if name in _TIMES or (name in _DIVIDED and is_first and node.kwargs.get("rounding_mode") is None):
        number = _number(second if is_first else first, node)
        return [Step("times", 1 / number if name in _DIVIDED else number)]
    if name in _PLUS or (name in _MINUS and is_first):
        alpha = _number(_argument(node, 2, "alpha", 1), node)
        sign = -alpha if name in _MINUS else alpha
        other = second if is_first else first
        if not is_first and alpha != 1:
            _other(node)
        if isinstance(other, Child):
            mask = node.children[other.index]
            # A term that depends on the product and has no keys is constant per row: it does not change the softmax.
            return [] if mask in above else [Step("plus", sign, mask)]
        return [] if math.isfinite(_number(other, node)) else _other(node)
    if name == "tanh":
        return [Step("tanh", 1.0)]
    if name == "masked_fill" and is_first:
        return [_fill(node, _argument(node, 1, "mask"), _argument(node, 2, "value"), False)]
    if name == "where":
        condition, kept, other = first, second, _argument(node, 2, "other")
        if "condition" in node.kwargs:
            condition, kept = node.kwargs["condition"], _argument(node, 0, "input")
        elif is_first:
            condition, kept = second, first  # scores.where(condition, other)
        is_kept = isinstance(kept, Child) and kept.index == place
        return [_fill(node, condition, other if is_kept else kept, is_kept)]
    _other(node)


def _fill(node: OpNode, mask: Any, value: Any, inverted: bool) -> Step:
    number = _number(value, node)
    if not isinstance(mask, Child) or not number <= HIDDEN:
        raise NoMatch(f"{_name(node)} with {number:g}")
    return Step("fill", min(number, LOWEST), node.children[mask.index], inverted)


def _argument(node: OpNode, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _number(value: Any, node: OpNode) -> float:
    """A number, or the value of a one-element tensor that needs no gradient."""
    if isinstance(value, (int, float)):
        return float(value)
    leaf = node.children[value.index] if isinstance(value, Child) else None
    if not isinstance(leaf, InputNode) or leaf.count != 1 or leaf.tensor is None:
        _other(node)
    if ledger_of(leaf.tensor) is not None:
        return 1.0  # a dry run has no values
    if torch.is_grad_enabled() and leaf.tensor.requires_grad:
        raise NoMatch(f"{_name(node)} (needs a gradient)")
    return float(leaf.tensor)


def _check_gradients(result: OpNode, masks: list[Node]) -> None:
    """Check that the fused kernel gives all gradients that are needed, and that none is stopped inside the graph.

    Raises:
        NoMatch: A step runs under no_grad, or a mask needs a gradient.
    """
    if not torch.is_grad_enabled():
        return
    for node in walk(result):
        if isinstance(node, OpNode) and not node.context.grad:
            raise NoMatch(f"{_name(node)} (under no_grad)")
    for mask in masks:
        for node in walk(mask):
            if isinstance(node, InputNode) and node.tensor is not None and node.tensor.requires_grad:
                raise NoMatch("a bias that needs a gradient")
