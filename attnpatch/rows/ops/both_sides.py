"""Scores that are normalised along rows and columns (a dual softmax, a division by column sums, optimal transport).

A step has some rows of the result and everything that is summed over. If a softmax also runs along those rows, a step
would have to hold the whole matrix. So the maximum and the sum of each line (column) of that softmax are computed
first, by steps that are cut along the other side. With them each element can be computed alone. The scores are computed
once more for this, and the result equals the native one up to rounding.
"""

from __future__ import annotations

import torch

from attnpatch.rows.arguments import argument
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.graph.axes import LEAD, Axis, all_leaves, fresh, leaves
from attnpatch.rows.graph.lines import FigureNode, NormalisedNode
from attnpatch.rows.graph.nodes import InputNode, Node, OutputNode, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.op_table import PAIRS

# Reductions whose result is one of the line's own elements. A host compares elements with it (mutual nearest
# neighbours), but a step that is cut along the other side computes the same element with another last bit.
_CHOSEN = frozenset(
    "max min amax amin aminmax sort topk kthvalue median nanmedian mode quantile nanquantile cummax cummin".split()
)
# Functions whose result depends on the last bit of their operands.
_COMPARING = frozenset(
    "eq ne ge le gt lt greater greater_equal less less_equal not_equal isclose isin sign sgn heaviside floor ceil round trunc "
    "frac argmax argmin argsort searchsorted bucketize bool logical_not logical_and logical_or logical_xor nonzero fmod "
    "remainder floor_divide equal".split()
)  # fmt: skip


class Stuck(Exception):
    """A function needs all rows at once; the message is its name."""


def cut(root: Node, site: AttentionCall) -> Node:
    """An equivalent graph whose rows can be computed a few at a time; ``root`` itself if it is such a graph already.

    Raises:
        Stuck: There is no such graph.
    """
    whole = {leaf for node in walk(root) for leaf in leaves(node.whole)}
    below = _other_names(root)
    sides = [_names(axis, below) for axis in all_leaves(root.dims) if axis.kind != LEAD]
    if not sides or any(not names & whole for names in sides):
        return root
    found = _freed(root, max(sides, key=lambda names: max(axis.size for axis in names)), site)
    if (name := _compared(found)) is not None:
        raise Stuck(name)
    return found


def _other_names(root: Node) -> dict[Axis, Axis]:
    """For each axis that a slice has made, the axis of its child."""
    found = {}
    for node in walk(root):
        if node.reads_a_run:
            new, old = (leaves(each.dims[node.position]) for each in (node, node.children[0]))
            if len(new) == len(old) == 1:
                found[new[0]] = old[0]
    return found


def _names(axis: Axis, below: dict[Axis, Axis]) -> frozenset[Axis]:
    found = {axis}
    while axis in below and below[axis] not in found:
        axis = below[axis]
        found.add(axis)
    return frozenset(found)


class _Chosen(InputNode):
    """A reduced value of each line that is one of the line's elements."""


def _compared(root: Node) -> str | None:
    """The name of a function that compares a line with one of its own elements, or ``None``."""
    asking: set[Node] = set()
    for node in walk(root):
        if isinstance(node, _Chosen) or any(child in asking for child in node.children):
            asking.add(node)
            name = _name(node).strip("_")
            if name in _COMPARING or not (node.dtype.is_floating_point or isinstance(node, InputNode)):
                return name or type(node).__name__
    return None


def _name(node: Node) -> str:
    inner = node.children[0] if isinstance(node, OutputNode) else node
    return getattr(getattr(inner, "func", None), "__name__", "")


def _freed(root: Node, row: frozenset[Axis], site: AttentionCall) -> Node:
    """``root`` without steps that need an axis complete, under any of its names.

    In the forward graph such a step becomes a tensor that is computed beforehand. In the graph of the backward pass it
    stays a step on the scores it is computed from.
    """
    new: dict[Node, Node] = {}
    backward: dict[Node, Node] = {}
    for node in walk(root):
        own = _on(node, new)
        found = own if node is root else _without(own, row, site)
        new[node] = found
        if found is own:
            backward[node] = own if _are_same(node, new, backward) else _on(node, backward)
        elif isinstance(found, NormalisedNode):
            scores = backward[node.children[0]]
            is_same = scores is own.children[0]
            backward[node] = found if is_same else found.on(scores)
        else:
            backward[node] = _as_figure(node, found, backward)
    if backward[root] is not new[root]:
        new[root].backward_graph = backward[root]
    return new[root]


def _on(node: Node, children: dict[Node, Node]) -> Node:
    """The node with other children; itself if they are the same."""
    changed = any(children[child] is not child for child in node.children)
    return node.rebuilt(lambda child: children[child]) if changed else node


def _are_same(node: Node, one: dict[Node, Node], other: dict[Node, Node]) -> bool:
    return all(one[child] is other[child] for child in node.children)


def _as_figure(node: Node, figure: Node, backward: dict[Node, Node]) -> Node:
    """If the derivative of a reduction is known: the reduced values as a step on the scores that they were computed
    from. Otherwise the values, unchanged.
    """
    dims = argument(node.args, node.kwargs, 1, "dim") if isinstance(node, OpNode) else None
    if dims is None or node.stops_gradient or not figure.tensor.requires_grad or not FigureNode.can_be(node):
        return figure
    scores = backward[node.children[0]]
    positions = {dim % len(scores.dims) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return FigureNode(scores, figure, node, positions)


def _without(node: Node, row: frozenset[Axis], site: AttentionCall) -> Node:
    inner = node.children[0] if isinstance(node, OutputNode) else node
    name = _name(node)
    if row.isdisjoint(leaves(inner.whole)) or (name in PAIRS and inner is node):
        return node
    if row.isdisjoint(all_leaves(node.dims)):
        # A reduction: one value per line of the other side.
        kind = _Chosen if name in _CHOSEN else InputNode
        return kind(site.replay(cut(node, site)), node.dims)
    if name not in ("softmax", "log_softmax") or not isinstance(node, OpNode):
        raise Stuck(name or type(node).__name__)
    return _normalised(node, name == "log_softmax", site)


def _normalised(node: OpNode, is_log: bool, site: AttentionCall) -> Node:
    scores = node.children[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    line = dim % len(node.dims)
    dims = tuple(() if i == line else own for i, own in enumerate(node.dims))
    two = fresh([2])
    dtype = torch.promote_types(node.dtype, torch.float32)
    lines = OpNode(
        figures, (scores, line, dtype), {}, (*two, *dims), dtype, node.device, (*node.whole, *two[0])
    )
    lines.context = node.context
    highest, total = site.replay(cut(lines, site)).unbind(0)
    return NormalisedNode(scores, InputNode(highest, dims), InputNode(total, dims), is_log, node)


def figures(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """For each line the maximum, and the sum of exp(score - maximum); stacked in a first dimension of size 2."""
    scores = scores.to(dtype)
    highest = scores.detach().amax(dim, keepdim=True)
    return torch.stack([highest, (scores - highest).exp().sum(dim, keepdim=True)])
