"""Deferred tensors that share memory: views of each other, any of which may be written to.

A *memory* has the graph of all that it holds, and each of its tensors has the views that lead from there to itself. A
write to one of them becomes a node in the memory's graph, and the graphs of the others are rebuilt on top of it. If no
node can express a write, it is done on real tensors: the memory is computed, and its tensors become views of the
result.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.rows.deferred import history, memory_layout
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Axis, Dims, Tile, unify
from attnpatch.rows.graph.nodes import Node, SliceNode, ViewNode
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout.regions import Region, Written

if TYPE_CHECKING:
    from attnpatch.rows.deferred.handle import Handle


Native = tuple[Any, Any, dict[str, Any]]


class Memory:
    """The memory that some deferred tensors share.

    Attributes:
        graph: The graph of the whole memory.
        whole: The whole memory, computed, without autograd history; ``None`` until then.
        members: The handles of its deferred tensors that are alive.
    """

    def __init__(self, graph: Node) -> None:
        self.graph = graph
        self.whole: torch.Tensor | None = None
        self.members: weakref.WeakSet[Handle] = weakref.WeakSet()

    def others(self, handle: Handle) -> list[Handle]:
        return [member for member in self.members if member is not handle]


class Solid(Node):
    """A view for which there is no other node: torch's function is called on the whole source."""

    def __init__(self, child: Node, dims: Dims, native: Native) -> None:
        self.children = (child,)
        self.dims, self.dtype, self.device, self.native = dims, child.dtype, child.device, native

    @property
    def whole(self) -> tuple[Axis, ...]:  # type: ignore[override]
        return tuple(axis for dims in (self.dims, self.children[0].dims) for dim in dims for axis in dim)

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return _by_function(self, run.value(self.children[0], {}))


def _by_function(step: Node, value: torch.Tensor) -> torch.Tensor:
    assert step.native is not None
    func, args, kwargs = step.native
    return func(value, *args, **kwargs)


def steps_between(node: Node, own: Node) -> list[Node] | None:
    """The views that lead from the graph ``own`` up to ``node``; ``None`` if one of the steps is not a known view."""
    steps: list[Node] = []
    while node is not own:
        is_known = isinstance(node, (ViewNode, SliceNode)) or (
            isinstance(node, OpNode) and node.func is torch.permute
        )
        if not node.children or not (is_known or (node.native is not None and node.children == (own,))):
            return None
        steps.append(node)
        node = node.children[0]
    return steps[::-1]


def of_function(node: Node, source: Node, native: Native) -> Node:
    """``node``, marked as the result of a torch function on ``source``; it is a new node even if the function does
    nothing.
    """
    if node is source:
        node = ViewNode(node, node.dims)
    if node.children and node.children[0] is source:
        node.native = native
    else:
        # The layout is that of the whole function, not of the single nodes it is made of.
        node.laid_as = ViewNode(source, source.dims)
        node.laid_as.native = native
    return node


def followed(path: Sequence[Node], graph: Node) -> list[Node]:
    """The graph of a memory, then the graphs after each of the views in ``path``, in order."""
    nodes = [graph]
    for step in path:
        nodes.append(renewed(step, nodes[-1]))
    return nodes


def renewed(step: Node, below: Node) -> Node:
    """A copy of a node with another child; the copy has no deferred tensor yet."""
    copy = step.rebuilt(lambda _: below)
    for name in ("needs_grad", "carrier", "marks", "twin", "reached", "saved"):
        copy.__dict__.pop(name, None)
    # A view that was made under no_grad takes up the history of its new child; ``detach`` never does.
    copy.stops_gradient = getattr(step, "is_detached", False)
    return copy


def is_repeated(handle: Handle) -> bool:
    """True if several elements share a place in memory (``expand``), so that torch refuses to write to the tensor."""
    steps = (handle.memory.graph, *handle.path)
    return any(isinstance(step, ViewNode) and step.expand for step in steps) and memory_layout.overlaps(
        handle.node
    )


def written(handle: Handle, node: Node) -> dict[Handle, Node] | None:
    """Graphs of all tensors of a memory after one of them was written to; ``None`` if no node can express the write.

    Args:
        handle: The tensor that was written to.
        node: The graph of its new contents, which no other tensor uses.
    """
    memory, old = handle.memory, handle.node
    if is_repeated(handle) or not all(map(unify, old.dims, node.dims)):
        return None
    graph = node
    nodes = followed(handle.path, memory.graph) if memory.others(handle) else []
    for step, parent in zip(reversed(handle.path), reversed(nodes[:-1]), strict=bool(nodes)):
        before = put_back(step, parent, graph)
        if before is None:
            return None
        graph = before
    node.laid_as = old.laid_as or old
    if not nodes:
        memory.graph, memory.whole, handle.path = node, None, ()
        return {handle: node}
    graph.laid_as = memory.graph.laid_as or memory.graph
    memory.graph, memory.whole = graph, None
    found = {other: followed(other.path, graph)[-1] for other in memory.others(handle)}
    return {**found, handle: followed(handle.path, graph)[-1]}


def put_back(step: Node, parent: Node, value: Node) -> Node | None:
    """The graph of a tensor after a view of it was written to; ``None`` if no node can express it.

    Args:
        step: The view of ``parent``.
        parent: The tensor before the write.
        value: The view after the write.
    """
    if getattr(step, "is_detached", False):
        return None
    if isinstance(step, SliceNode):
        regions: list[Region | None] = [None] * len(parent.dims)
        regions[step.position] = Region(step.start, step.step, step.axis)
        return Written(parent, regions, value)
    if isinstance(step, ViewNode):
        return None if step.expand else ViewNode(value, parent.dims)
    if isinstance(step, OpNode) and step.func is torch.permute:
        order = step.args[1]
        back = sorted(range(len(order)), key=order.__getitem__)
        return OpNode(torch.permute, (value, back), {}, parent.dims, parent.dtype, parent.device)
    return None


def compute(handle: Handle) -> None:
    """Compute a tensor: a slice by itself, anything else with the whole memory and all its tensors.

    A tensor that is not a slice is as large as the memory, or repeats it without a copy (``expand``).
    """
    memory, path = handle.memory, handle.path
    cuts = [i for i, step in enumerate(path) if step.shape.numel() < step.children[0].shape.numel()]
    if not cuts and not memory_layout.has_gaps(memory.graph):
        compute_all(handle)
        return
    last = cuts[-1] + 1 if cuts else 0
    head = followed(path[:last], memory.graph)[-1]
    handle.values = part_of(path[last:], memory_layout.laid(handle.call.replay(head), head))


def compute_all(handle: Handle) -> None:
    memory = handle.memory
    if memory.whole is None:
        if not memory.others(handle):
            memory.graph, handle.path = handle.node, ()
        found = memory_layout.laid(handle.call.replay(memory.graph), memory.graph, gaps=True)
        memory.whole = found.detach()  # not a view: torch refuses ``detach_`` and the like on views
    for member in memory.members:
        member.values = part_of(member.path, memory.whole)
        member.pending.discard(member)


def part_of(path: Sequence[Node], whole: torch.Tensor) -> torch.Tensor:
    """The part of a computed memory that a path leads to, as a view of it."""
    value = whole
    for step in path:
        if isinstance(step, SliceNode):
            value = step.of(value)
        elif isinstance(step, OpNode):
            value = step.func(value, *step.args[1:])
        elif isinstance(step, ViewNode):
            value = step.of(value, list(step.shape))
        else:
            value = _by_function(step, value)
    return value


def has_history(handle: Handle) -> bool:
    """True if gradients flow to any tensor of the memory."""
    tensors = (member.tensor for member in handle.memory.members)
    return any(tensor is not None and history.has_history(tensor) for tensor in tensors)


def is_whole(handle: Handle) -> bool:
    """True if a native view of the computed tensor is right: the memory is real, and no history would be lost."""
    if handle.written is not None:
        return True
    return handle.memory.whole is not None and not (handle.memory.others(handle) and has_history(handle))


def is_part(handle: Handle) -> bool:
    """True if a tensor shares its memory with others, or is a slice of a larger one."""
    if handle.written is not None:
        return False
    return bool(handle.memory.others(handle) or handle.path) or memory_layout.has_gaps(handle.node)


def is_view_of_part(result: Any, source: Any) -> bool:
    """True if a function has returned a native view of a slice that was computed alone, apart from its memory."""
    handle = getattr(source, "handle", None)
    if handle is None or handle.values is None or handle.memory.whole is not None or not is_part(handle):
        return False
    own = handle.values.untyped_storage()._cdata
    return type(result) is torch.Tensor and result.untyped_storage()._cdata == own


@contextlib.contextmanager
def as_recipe(handle: Handle) -> Iterator[list[Any]]:
    """Inside the block a slice that was computed alone counts as uncomputed, so its views become deferred tensors.

    Yields:
        A list to which the caller adds those views. Afterwards they get their part of the computed values.
    """
    kept, handle.values, views = handle.values, None, []
    try:
        yield views
    finally:
        if handle.written is None:
            handle.values = kept
            for found in views:
                if found.handle.memory is handle.memory and found.handle.values is None:
                    found.handle.values = part_of(found.handle.path[len(handle.path) :], kept)


def geometry(handle: Handle, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The native answer of a function that asks for sizes or strides; ``None``: the deferred tensor's own is right."""
    if handle.written is not None:
        return func(handle.written, *args, **kwargs)
    if name not in ("stride", "is_contiguous", "storage_offset"):
        return None
    found = memory_layout.applied(handle.node, func, args, kwargs)
    return func(handle.materialize(name), *args, **kwargs) if found is None else found
