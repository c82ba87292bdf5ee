"""Decides which nodes write over their operands, and which have memory that all row steps share."""

from __future__ import annotations

import math

import torch

from attnpatch.rows.graph.axes import KEY, Axis, leaves
from attnpatch.rows.graph.nodes import Child, InputNode, Node, OutputNode, SliceNode, ViewNode
from attnpatch.rows.graph.operations import INTO, OpNode
from attnpatch.rows.op_table import CASTS

# Functions that can write over their first operand. A tile then moves half as much memory, which saves a third of its
# time on CPU.
_IN_PLACE = frozenset(["add", "sub", "mul", "div", "masked_fill", "tanh", "exp", "neg", "clamp"])
# From this many keys on, a product is slower if its rows do not begin at multiples of 64 bytes, and in one thread also
# if they lie a power of two apart (`python -m benchmarks sweep`).
_LONG_ROWS, _ALIGNED, _APART = 8192, 16, 256
# Functions whose result may share their operand's memory.
_ALIASES = frozenset("permute to detach positive bool int long float half bfloat16 double".split())


class StepMemory:
    """The base class of ``Evaluator`` that manages memory; the attributes are the evaluator's."""

    nodes: list[Node]
    row: Axis | None
    hoist: bool
    wanted: frozenset[Node]
    shared: frozenset[Node]
    _axes: dict[Node, list[Axis]]
    _uses: dict[Node, int]
    _fixed: dict[Node, torch.Tensor]
    _is_watched: bool

    def __init__(self) -> None:
        self._overwrites: dict[Node, bool] = {}
        self._buffers: dict[Node, torch.Tensor] = {}
        self._padded: dict[Node, bool] = {}

    def buffer(self, node: OpNode, shape: list[int]) -> torch.Tensor | None:
        """Memory for a result as wide as the scores, shared by row steps, on CPU; ``None`` if it may outlive its tile.

        glibc returns large tensors to the system at once, and new pages in every step take up to half of its time.
        """
        if not self.is_buffered(node, self.row):
            return None
        width = _row_length(shape[-1]) if self._may_pad(node) else shape[-1]
        count = math.prod(shape[:-1]) * width
        if node not in self._buffers or self._buffers[node].numel() < count:
            self._buffers.pop(node, None)
            self._buffers[node] = torch.empty(count, dtype=node.dtype)
        return self._buffers[node][:count].view(*shape[:-1], width)[..., : shape[-1]]

    def padded(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` including the padding between its rows, if ``buffer`` has padded them; otherwise unchanged."""
        if value.is_contiguous() or not self._buffers:
            return value
        # Compared by identity, since in a dry run nothing has an address.
        storage = value.untyped_storage()._cdata
        if not any(
            self._padded.get(node) and buffer.untyped_storage()._cdata == storage
            for node, buffer in self._buffers.items()
        ):
            return value
        return value.as_strided((*value.shape[:-1], _row_length(value.shape[-1])), value.stride())

    def _may_pad(self, node: OpNode) -> bool:
        """True if a product's rows may be padded: all steps up to softmax work in place."""
        if node not in self._padded:
            self._padded[node] = self._ends_in_softmax(node)
        return self._padded[node]

    def _ends_in_softmax(self, product: OpNode) -> bool:
        node: Node = product
        if node.dtype != torch.float32 or not product.work:
            return False
        keys = leaves(node.dims[-1])
        while self._uses.get(node, 0) == 1:
            node = next(reader for reader in self.nodes if node in reader.children)
            if leaves(node.dims[-1]) != keys or (isinstance(node, ViewNode) and node.expand):
                return False
            if is_alias(node):
                continue
            if not isinstance(node, OpNode) or not self.may_overwrite(node):
                return False
            if getattr(node.func, "__name__", "") == "softmax":
                return True
        return False

    def is_buffered(self, node: OpNode, row: Axis | None) -> bool:
        # There is no buffer if an observer sees the tiles, nor below a slice, where one tile may need two parts of a
        # product.
        if self._is_watched or not self.hoist or row not in self._axes[node] or node.device.type != "cpu":
            return False
        return self._fills(node) and not torch.is_grad_enabled() and not node.context.autocast

    def _fills(self, node: OpNode) -> bool:
        """True if a node is a product, a cast or a softmax in another dtype, as wide as the scores."""
        if not any(axis.kind == KEY for axis in self._axes[node]):
            return False
        if node.work:
            return node.func in INTO and not node.kwargs
        if len(node.children) != 1 or node.children[0].dtype == node.dtype:
            return False
        if getattr(node.func, "__name__", "") == "softmax":
            return _is_over_last(node)
        return getattr(node.func, "__name__", "") in CASTS

    def may_overwrite(self, node: OpNode) -> bool:
        """True if a node may write over its first operand: a tensor made for this tile that nothing else reads."""
        if node not in self._overwrites:
            self._overwrites[node] = self._is_in_place(node)
        return self._overwrites[node]

    def _is_in_place(self, node: OpNode) -> bool:
        name = getattr(node.func, "__name__", "")
        first = node.args[0] if isinstance(node.args, tuple) and node.args else None
        if self.wanted or torch.is_grad_enabled() or not isinstance(first, Child):
            return False
        operand = node.children[first.index]
        if operand.dtype != node.dtype or len(operand.dims) != len(node.dims) or not self._owns(operand):
            return False
        if name == "softmax":
            return _is_over_last(node) and node.device.type == "cpu"
        return name in _IN_PLACE

    def _owns(self, node: Node) -> bool:
        """True if a node's value is made for each tile and read only once."""
        moves = self.row is None or not self.hoist or self.row in self._axes[node]
        if (
            isinstance(node, InputNode)
            or node in self._fixed
            or node in self.shared
            or self._uses.get(node, 0) != 1
            or not moves
        ):
            return False
        if isinstance(node, ViewNode):
            return not node.expand and self._owns(node.children[0])
        if not isinstance(node, OpNode):
            return False
        return getattr(node.func, "__name__", "") not in _ALIASES or self._owns(node.children[0])


def _row_length(count: int) -> int:
    """The distance in elements from one row of a product to the next, for rows of ``count`` elements."""
    if count < _LONG_ROWS:
        return count
    length = -(-count // _ALIGNED) * _ALIGNED
    return length + _ALIGNED if length % _APART == 0 and torch.get_num_threads() == 1 else length


def is_alias(node: Node) -> bool:
    """True if a node's result shares its operand's memory."""
    if isinstance(node, (ViewNode, SliceNode, OutputNode)) or hasattr(node, "heads"):
        return True
    if not isinstance(node, OpNode) or getattr(node.func, "__name__", "") not in _ALIASES:
        return False
    return node.children[0].dtype == node.dtype


def _is_over_last(softmax: OpNode) -> bool:
    # torch.softmax(x, dim, dtype), F.softmax(x, dim, _stacklevel, dtype)
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return dim in (-1, len(softmax.dims) - 1)
