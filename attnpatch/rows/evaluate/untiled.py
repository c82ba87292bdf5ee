"""Evaluates a graph node by node, each one whole: no tiles, no shared memory, nothing in place.

The fallback if the tiled evaluation has failed: slower, needs more memory, and has as little code as possible.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.graph.axes import Tile, take
from attnpatch.rows.graph.nodes import Child, InputNode, Node, ViewNode, map_structure
from attnpatch.rows.graph.operations import OpNode


class _Everything:
    """A set that contains everything: no axis may be cut."""

    def __contains__(self, _: object) -> bool:
        return True


class Plain:
    """Used in place of an ``Evaluator``.

    Args:
        bound: Tensors of input nodes that hold none, and known values of other nodes.
    """

    def __init__(self, bound: dict[Node, torch.Tensor] | None = None) -> None:
        self.values: dict[Node, Any] = dict(bound or {})
        self.whole: Any = _Everything()
        self.wanted: frozenset[Node] = frozenset()
        self.row, self.lines = None, frozenset()

    def tensor(self, leaf: InputNode) -> torch.Tensor:
        tensor = self.values.get(leaf, leaf.tensor)
        assert tensor is not None
        return tensor

    def value(self, node: Node, tile: Tile) -> Any:
        if node not in self.values:
            value = self._computed(node)
            stops = node.stops_gradient and torch.is_grad_enabled()
            self.values[node] = value.detach() if stops else value
        value = self.values[node]
        return take(value, node.dims, tile) if tile else value

    def _computed(self, node: Node) -> Any:
        if isinstance(node, InputNode):
            return self.tensor(node)
        if isinstance(node, ViewNode):
            value = self.value(node.children[0], {})
            return value.expand(node.shape) if node.expand else value.reshape(node.shape)
        if type(node) is not OpNode:
            return node.compute({}, self)  # type: ignore[arg-type]
        values = [self.value(child, {}) for child in node.children]

        def fill(value: Any) -> Any:
            return values[value.index] if isinstance(value, Child) else value

        args, kwargs = map_structure(node.args, fill), map_structure(node.kwargs, fill)
        with node.context.enter():
            return node.func(*args, **kwargs)

    def buffer(self, node: Node, shape: list[int]) -> None:
        return None

    def may_overwrite(self, node: Node) -> bool:
        return False

    def padded(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def next_rows(self) -> None:
        pass

    next_lead = next_tile = next_rows


def evaluated(root: Node) -> torch.Tensor:
    """The whole value of a graph."""
    return Plain().value(root, {})


def gradients(
    root: Node, grad: torch.Tensor, bound: dict[Node, torch.Tensor], wanted: list[Node]
) -> list[torch.Tensor | None]:
    """Gradients of nodes of a graph that holds no tensors itself, in one piece."""
    run, parts = Plain(bound), []
    for node in wanted:
        # This is not part of ``run``, which would keep intermediate values that have no history, so that gradients
        # would end there.
        part = Plain(bound).value(node, {}).detach().requires_grad_()
        parts.append(part)
    run.values.update(zip(wanted, parts, strict=True))
    with torch.enable_grad():
        value = run.value(root, {})
    found = torch.autograd.grad(value, parts, grad, allow_unused=True)
    return [torch.zeros_like(part) if each is None else each for each, part in zip(found, parts, strict=True)]
