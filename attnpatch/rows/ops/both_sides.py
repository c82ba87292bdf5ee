"""Scores that are normalised along both sides (a dual softmax, a division by the sums of columns, optimal transport).

A step has some rows of the result and all of what is summed over. Where a softmax runs along those rows as well, a step
would have to hold everything. So what such a softmax needs, the maximum and the sum of each of its lines, is computed
first, by steps of its own that are cut along the other side; then each element is computed alone. The scores are computed
once more for that, and the result is the native one up to rounding.
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

# Several results, of which `Pick` takes one.
# Figures of a line that are one of its own elements: it is asked for again by comparing (mutual nearest neighbours), and the
# same element of a step that is cut along the other side differs in the last bit.
_CHOSEN = frozenset(
    "max min amax amin aminmax sort topk kthvalue median nanmedian mode quantile nanquantile cummax cummin".split()
)
# Steps in which a bit more or less is another result.
_COMPARING = frozenset(
    "eq ne ge le gt lt greater greater_equal less less_equal not_equal isclose isin sign sgn heaviside floor ceil round trunc "
    "frac argmax argmin argsort searchsorted bucketize bool logical_not logical_and logical_or logical_xor nonzero fmod "
    "remainder floor_divide equal".split()
)  # fmt: skip


class Stuck(Exception):
    """A step needs all rows at once; the message is its name."""


def cut(root: Node, site: AttentionCall) -> Node:
    """An equivalent of a graph of which some rows can be computed alone; ``root`` itself, where it is one.

    Raises:
        Stuck: There is none.
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
    """What an axis is called below a slice."""
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
    """A figure of a line that is one of its elements."""


def _compared(root: Node) -> str | None:
    """The step that compares a line's own element with that line, if there is one."""
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
    """``root`` without steps that need an axis complete, by any of its names.

    Tensors stand for what was computed before. In the graph of the backward pass they are steps on what they are made of.
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
    """A node on other children."""
    changed = any(children[child] is not child for child in node.children)
    return node.rebuilt(lambda child: children[child]) if changed else node


def _are_same(node: Node, one: dict[Node, Node], other: dict[Node, Node]) -> bool:
    return all(one[child] is other[child] for child in node.children)


def _as_figure(node: Node, figure: Node, backward: dict[Node, Node]) -> Node:
    """Figures of lines as a step on the scores that they were computed of, where its derivative is known."""
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
        # A figure of each line of the other side.
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
    """The maximum of each line, and the sum of the exponentials of what is below it, one after the other."""
    scores = scores.to(dtype)
    highest = scores.detach().amax(dim, keepdim=True)
    return torch.stack([highest, (scores - highest).exp().sum(dim, keepdim=True)])
