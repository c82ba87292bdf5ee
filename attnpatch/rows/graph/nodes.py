"""Graphs: operations on a score matrix, recorded instead of computed; any tile of the result can be computed later."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import AttnpatchError
from attnpatch.rows.graph.axes import LEAST, Axis, Dim, Dims, Tile, leaves, local_shape, size_of, take

if TYPE_CHECKING:
    from attnpatch.rows.evaluate.evaluator import Evaluator


def map_structure(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to everything inside its lists, tuples, dicts and slices."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map_structure(item, change) for item in value)
    if isinstance(value, dict):
        items = {key: map_structure(item, change) for key, item in value.items()}
        if type(value) is dict or all(items[key] is value[key] for key in items):
            return items if type(value) is dict else value
        # A host's output class: a dict with attributes of its own, which a copy keeps.
        changed = copy.copy(value)
        for key, item in items.items():
            changed[key] = item
        return changed
    return change(value)


class Node:
    """One tensor of a graph.

    Attributes:
        dims: The axes of every dimension.
        dtype, device: Those of the tensor.
        whole: Axes that this step needs complete (softmax over keys, a mean over heads).
        children: The nodes it is computed from.
        stands_for_memory: True if deferring it saves memory although it has no children (rows of a mask).
        held_bytes: Bytes of temporaries per element while it is computed, beside its result.
        scores_held: Scores per row that are held while it is computed, if its own axes do not show them.
        is_constant: True if all elements are the same number.
        is_made_by_host: True if a function of the host computes it.
        is_exact: True if its rows are bit-identical to the native ones when steps have the right size.
        renames_axes: True if it computes a child under another tile than its own.
        reads_a_run: True if a range of its dimension ``position`` is a range of the child's dimension, which has
            another axis.
        stops_gradient: True if its result never has an autograd history: detached, or made under no_grad.
        needs_grad: Whether its deferred tensor has an autograd history; ``None`` if there is no deferred tensor.
        carrier: That deferred tensor.
        anchor: A tensor that keeps the deferred tensor's history; made if its own gradient was asked for.
        marks: What happened to the node (hooked, overwritten); shared with the twin.
        twin: A copy that holds no tensors, for backward passes to keep.
        reached: Input tensors that receive its gradients.
        saved: The tensors that its autograd edge, and the edges before it, have saved for the backward pass.
        native: The torch function that the host called and its arguments after the first, if ``compute`` differs.
        copies_layout: True if the native result is laid out in memory as a copy of the first child would be.
        laid_as: The node whose native strides it has, if they do not follow from its own operation (a write in place).
        lies_by_rows: True if the native result is contiguous, whatever it is made from.
        shadow: Cache of ``memory_layout.shadow``; ``None``: not computed yet.
        depth: Cache of ``depth_of``.
        backward_graph: Another graph from which gradients are computed, if there is one.
    """

    stands_for_memory = False
    held_bytes = scores_held = 0
    is_constant = is_made_by_host = False
    is_exact = True
    renames_axes = False
    reads_a_run = False
    stops_gradient = False
    needs_grad: bool | None = None
    carrier: weakref.ref[torch.Tensor] | None = None
    anchor: torch.Tensor | None = None
    marks: Any = None
    twin: Node | None = None
    reached: Sequence[InputNode] = ()
    saved: frozenset[InputNode] = frozenset()
    native: tuple[Callable[..., Any], Any, dict[str, Any]] | None = None
    copies_layout = False
    laid_as: Node | None = None
    lies_by_rows = False
    shadow: Any = None
    depth: int | None = None
    backward_graph: Node | None = None
    whole: tuple[Axis, ...] = ()
    children: tuple[Node, ...] = ()
    dims: Dims
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size(size_of(dim) for dim in self.dims)

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        """The part of this tensor inside ``tile``."""
        raise AssertionError("a subclass computes")

    def rebuilt(self, change: Callable[[Node], Node]) -> Node:
        """A copy whose children went through ``change``."""
        found = object.__new__(type(self))
        found.__dict__.update({key: value for key, value in vars(self).items() if key not in _OF_GRAPH})
        found.children = tuple(change(child) for child in self.children)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        found = memo[id(self)] = object.__new__(type(self))
        own = {key: value for key, value in vars(self).items() if key not in _OF_GRAPH}
        found.__dict__.update(copy.deepcopy(own, memo))
        return found


# Attributes that belong to autograd's graph. A copied node does not take them: it stands for another tensor.
_OF_GRAPH = frozenset(
    ["needs_grad", "carrier", "anchor", "marks", "twin", "reached", "saved", "backward_graph"]
)


class InputNode(Node):
    """A tensor that exists: query, key, mask, bias. It is read when the graph is computed."""

    def __init__(self, tensor: torch.Tensor, dims: Dims) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.dims = dims
        self.dtype, self.device, self.count = tensor.dtype, tensor.device, tensor.numel()
        self.version = None if tensor.is_inference() else tensor._version
        self.is_secured = False

    @classmethod
    def aligned(cls, tensor: torch.Tensor, dims: Dims) -> InputNode:
        """An input node for a tensor that broadcasts to ``dims``: aligned from the right, without axes for size 1."""
        own = dims[len(dims) - tensor.dim() :]
        return cls(tensor, tuple(dim if n != 1 else () for dim, n in zip(own, tensor.shape, strict=True)))

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return take(run.tensor(self), self.dims, tile)

    @property
    def is_overwritten(self) -> bool:
        """True if the tensor was overwritten after it was recorded and nothing kept its values."""
        return self.version is not None and self.tensor is not None and self.tensor._version != self.version

    def check(self) -> None:
        """Raise if the tensor was overwritten since it was recorded (rows mode prevents it inside a site)."""
        if self.is_overwritten:
            raise AttnpatchError(
                f"a tensor of shape {tuple(self.tensor.shape)} was overwritten in place while attention weights "
                "that are computed on demand still needed it; read the weights before (for example .clone() them), "
                "or run this model under attnpatch.patched(model, mode='never')"
            )

    def preserve(self) -> None:
        """Copy the tensor's present values, because it is about to be overwritten."""
        if self.tensor is not None and not self.is_overwritten:
            # The write may run under no_grad; the graph that reads the copy may need its gradients.
            with torch.set_grad_enabled(self.tensor.requires_grad):
                self.tensor = copied(self.tensor)
            self.version = None if self.tensor.is_inference() else self.tensor._version

    def secure(self) -> None:
        """Copy an inference tensor: it has no version counter, so a later write to it would go unnoticed."""
        if self.tensor is not None and self.tensor.is_inference() and not self.is_secured:
            self.preserve()
            self.is_secured = True


class Context:
    """The autocast and gradient mode a step was recorded under."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type) if self.autocast else None
        self.grad = torch.is_grad_enabled()

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        enabled = torch.is_autocast_enabled(self.device_type)
        if enabled != self.autocast or (
            enabled and torch.get_autocast_dtype(self.device_type) != self.autocast_dtype
        ):
            stack.enter_context(
                torch.autocast(
                    self.device_type, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False
                )
            )
        if torch.is_grad_enabled() and not self.grad:
            stack.enter_context(torch.no_grad())
        return stack

    def is_current(self) -> bool:
        return (
            torch.is_autocast_enabled(self.device_type) == self.autocast
            and (not self.autocast or torch.get_autocast_dtype(self.device_type) == self.autocast_dtype)
            and (self.grad or not torch.is_grad_enabled())
        )


class Child:
    """The place of a child in the arguments of a call."""

    def __init__(self, index: int) -> None:
        self.index = index


class ViewNode(Node):
    """The same elements in the same order, usually in another shape (view, squeeze, unsqueeze, expand, clone)."""

    is_detached = False  # ``detach`` or ``data``: a write to it does not become part of its operand's history
    forgets_versions = False  # ``data``: a write through it is not noticed by autograd

    def __init__(self, child: Node, dims: Dims, expand: bool = False) -> None:
        self.children = (child,)
        self.dims, self.dtype, self.device = dims, child.dtype, child.device
        self.expand = expand

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return self.of(run.value(self.children[0], tile), local_shape(self.dims, tile))

    def of(self, value: torch.Tensor, shape: list[int]) -> torch.Tensor:
        """This view of ``value``, with the given shape."""
        value = value.expand(shape) if self.expand else value.reshape(shape)
        if self.is_detached:
            # Detaching comes last, since torch does not treat a detached tensor as a view.
            value = value.data if self.forgets_versions else value.detach()
        return value


class SliceNode(Node):
    """``start:stop:step`` of one dimension; if that dimension can be tiled, only those elements are computed."""

    renames_axes = reads_a_run = True

    def __init__(self, child: Node, position: int, start: int, stop: int, step: int = 1) -> None:
        self.children = (child,)
        self.dtype, self.device = child.dtype, child.device
        self.position, self.start, self.step = position, start, step
        old = child.dims[position]
        kind = old[-1].kind if old else "lead"
        self.axis = Axis(-(-(stop - start) // step), kind)
        new: Dim = (self.axis,) if self.axis.size != 1 else ()
        self.dims = (*child.dims[:position], new, *child.dims[position + 1 :])

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        child = self.children[0]
        old = leaves(child.dims[self.position])
        new = leaves((self.axis,))
        low, high = 0, self.axis.size
        if len(new) == 1 and new[0] in tile:
            low, high = tile[new[0]]
        if len(old) == 1 and old[0] not in run.whole and len(new) <= 1:
            low, high = self.start + low * self.step, self.start + (high - 1) * self.step + 1
            return within(run, child, self.position, old[0], (low, high), tile, self.step)
        value = self.of(run.value(child, tile))
        return take(
            value, tuple((self.axis,) if i == self.position else () for i in range(value.dim())), tile
        )

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """This slice, taken from a whole tensor."""
        stop = self.start + (self.axis.size - 1) * self.step + 1
        return _every(value, self.position, self.start, stop, self.step)


def within(
    run: Evaluator, node: Node, position: int, axis: Axis, span: tuple[int, int], tile: Tile, step: int = 1
) -> torch.Tensor:
    """The value of ``node`` inside ``tile``, cut to the range ``span`` of ``axis``, which is dimension ``position``."""
    low, high = span
    first, last = widened(low, high, axis)
    value = run.value(node, {**tile, axis: (first, last)})
    return _every(value, position, low - first, high - first, step)


def _every(value: torch.Tensor, position: int, start: int, stop: int, step: int) -> torch.Tensor:
    if (start, stop, step) == (0, value.shape[position], 1):
        return value
    if step == 1:
        return value.narrow(position, start, stop - start)
    return value[(*[slice(None)] * position, slice(start, stop, step))]


def widened(low: int, high: int, axis: Axis) -> tuple[int, int]:
    """``low:high``, widened until a matrix product rounds the range as it rounds the whole axis (see ``LEAST``)."""
    least = LEAST.get(axis.kind, 1)
    count = -(-(high - low) // least) * least
    if low + count <= axis.size:
        return low, low + count
    first = max(0, axis.size - count)
    return first - first % least, axis.size


class OutputNode(Node):
    """One of several results of a call, such as the values of ``max(dim=-1)``."""

    def __init__(self, child: Node, index: int, dims: Dims, dtype: torch.dtype) -> None:
        self.children = (child,)
        self.index, self.dims, self.dtype, self.device = index, dims, dtype, child.device

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return run.value(self.children[0], tile)[self.index]


def walk(root: Node) -> Iterator[Node]:
    """Every node of a graph once, children before parents, in the order in which they are computed."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.children))


def tensors_of(root: Node) -> list[InputNode]:
    return [node for node in walk(root) if isinstance(node, InputNode)]


def twin(root: Node) -> Node:
    """A copy of a graph without its tensors, made once: a backward pass keeps the copy, autograd keeps the tensors."""
    for node in walk(root):
        if node.twin is None:
            node.twin = node.rebuilt(lambda child: child.twin)  # type: ignore[arg-type, return-value]
            node.twin.marks, node.twin.needs_grad = node.marks, node.needs_grad
            if isinstance(node.twin, InputNode):
                node.twin.tensor = None
    assert root.twin is not None
    return root.twin


def depth_of(node: Node) -> int:
    """The longest path from a node down to an input; computing each step of it takes a few frames of Python's stack."""
    if node.depth is None:
        node.depth = 1 + max((depth_of(child) for child in node.children), default=0)
    return node.depth


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that keeps expanded dimensions expanded, so it is as small as the memory of ``tensor``."""
    expanded = [slice(None, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    return tensor[tuple(expanded)].clone().expand(tensor.shape)
