"""Evaluator: computes the nodes of a graph for one tile after another, and keeps values that tiles share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch.rows.evaluate import row_alignment, toeplitz, wide_sums
from attnpatch.rows.evaluate.step_memory import StepMemory, is_alias
from attnpatch.rows.graph.axes import ROW, Axis, Tile, all_leaves, leaves, take
from attnpatch.rows.graph.nodes import InputNode, Node, walk
from attnpatch.rows.graph.operations import OpNode


class Evaluator(StepMemory):
    """One evaluation of a graph.

    Args:
        root: The node to compute.
        bound: Tensors of input nodes that hold none (a graph that was kept for a backward pass).
        wanted: Nodes that need gradients: their tiles are detached from autograd's graph and recorded in ``parts``.
        lines: Nodes whose lines run across tiles and whose gradients are summed first (``LineSum``).
    """

    def __init__(
        self,
        root: Node,
        bound: dict[Node, torch.Tensor] | None = None,
        wanted: frozenset[Node] = frozenset(),
        lines: frozenset[Node] = frozenset(),
    ) -> None:
        super().__init__()
        self.nodes = list(walk(root))
        self.lines = lines
        # Runs a function in the thread that has called the model, if this is another one.
        self.in_calling_thread: Callable[[Callable[[], Any]], Any] | None = None
        self._axes = {node: all_leaves(node.dims) for node in self.nodes}
        self.whole = {leaf for node in self.nodes for leaf in leaves(node.whole)}
        for axes in self._axes.values():
            # An axis in two dimensions (a matrix added to its transpose) cannot be cut: tiles would cover only the
            # diagonal.
            self.whole.update(axis for axis in axes if axes.count(axis) > 1)
        if lines:
            self._follow_lines()
        self.bound = bound or {}
        self.wanted = wanted
        self.parts: list[tuple[Node, Tile, torch.Tensor]] = []
        self.row: Axis | None = None
        # Nodes with query x key elements, and the bytes of the largest part of one that a step has made.
        self.scores: frozenset[Node] = frozenset()
        self.largest = 0
        # Values may be kept for all row steps, except under autograd (a tile's backward pass frees its graph) and if
        # slices give the row axis another name.
        self.renamed = {axis for axis in self._renamed() if axis not in self.whole}
        self.hoist = not wanted and not any(node.renames_axes for node in self.nodes)
        self._uses: dict[Node, int] = {}
        for node in self.nodes:
            for child in node.children:
                self._uses[child] = self._uses.get(child, 0) + 1
        # Nodes that are the same for all heads: if heads are the inner loop, they are computed once for all heads.
        self.shared: frozenset[Node] = frozenset()
        self._fixed: dict[Node, torch.Tensor] = {}
        self._aligned: dict[Node, list[int]] = {}
        self._is_watched = False
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._moving: list[tuple[Any, ...]] = []
        self._of_rows: dict[Node, tuple[Any, ...]] = {}

    def _follow_lines(self) -> None:
        """Let nodes above line nodes depend on the axes of the tile's scores, so they are computed for each tile."""
        added: dict[Node, set[Axis]] = {}
        for node in self.nodes:
            found = set(all_leaves(node.children[0].dims)) if node in self.lines else set()
            found = found.union(*(added[child] for child in node.children)) - set(self._axes[node])
            self._axes[node] += found
            added[node] = found

    def _renamed(self) -> Iterator[Axis]:
        """Row axes below a slice or a shift, which has other axes in their place; a step still has only a range of
        them.
        """
        for node in self.nodes:
            heads = getattr(node, "heads", None)
            if heads is not None:
                yield from heads()
            elif node.reads_a_run:
                old = leaves(node.children[0].dims[node.position])  # type: ignore[attr-defined]
                yield from old if len(old) == 1 and old[0].kind == ROW else ()

    def has_rows(self, node: Node, row: Axis | None) -> bool:
        """True if a row step has only a part of ``node``; False if it has all (a bias per key, kept throughout)."""
        return row is None or any(axis is row or axis in self.renamed for axis in self._axes[node])

    def works(self, row: Axis | None) -> list[int]:
        """Multiplications per head of each product that has fewer rows in a step; products whose rows act as further
        heads are left out.
        """
        return [
            node.work
            for node in self.nodes
            if isinstance(node, OpNode) and not all(row in self._axes[child] for child in node.children)
        ]

    @functools.cached_property
    def _distances(self) -> dict[Node, toeplitz.Pair]:
        # This is not used under autograd, where the gradients of copied rows would have to be summed.
        return {} if self.wanted or torch.is_grad_enabled() else toeplitz.found_in(self.nodes)

    @functools.cached_property
    def tiled(self) -> list[Node]:
        """Nodes of which a step computes all its rows; nodes that ``toeplitz`` computes for two rows and copies are
        left out.
        """
        read = {child for node in self.nodes if node not in self._distances for child in node.children}
        return [node for node in self.nodes if node is self.nodes[-1] or node in read]

    def same_for(self, row: Axis, heads: set[Axis]) -> frozenset[Node]:
        """Nodes with rows that do not depend on ``heads`` (a mask) and are read by a node that does.

        Empty if a value may not outlive its tile. Input nodes are left out, since they need no computation.
        """
        if not self.hoist:
            return frozenset()
        return frozenset(
            child
            for node in self.nodes
            for child in node.children
            if row in self._axes[child]
            and not isinstance(child, InputNode)
            and (heads & set(self._axes[node])) - set(self._axes[child])
        )

    def held_bytes(self, row: Axis | None, cut: set[Axis]) -> int:
        """The most bytes that a step holds at any time for one row of one head, simulated in the order of computation.

        Args:
            row: The axis of rows; nodes without it are kept for all steps.
            cut: Axes of which a step has one element.
        """
        cut = cut | self.renamed
        sizes = {
            node: node.dtype.itemsize * math.prod(axis.size for axis in self._axes[node] if axis not in cut)
            for node in self.tiled
            if not isinstance(node, InputNode) and self.has_rows(node, row)
        }
        # Memory that steps share is held all the time.
        shared = {node for node in sizes if isinstance(node, OpNode) and self.is_buffered(node, row)}
        live = most = sum(sizes[node] for node in shared)
        own = {node: 0 if node in shared or is_alias(node) else size for node, size in sizes.items()}
        # Bytes that are freed when a node's reader is done; children come before parents.
        ends: dict[Node, int] = {}
        for node, size in sizes.items():
            read = sum(ends.get(child, 0) for child in node.children)
            live += own[node]
            most = max(most, live + size // node.dtype.itemsize * node.held_bytes)
            is_kept = self._uses.get(node, 0) > 1
            if is_alias(node):
                ends[node] = 0 if is_kept else read
            else:
                live -= read
                ends[node] = 0 if is_kept else own[node]
        return most

    def keep(self, node: Node) -> None:
        """Keep the value of ``node`` until the next tile, for an observer."""
        self._uses[node] = self._uses.get(node, 0) + 2
        self._is_watched = True

    def fix(self, node: Node, value: torch.Tensor) -> None:
        """Use ``value`` for the whole of ``node`` instead of computing it."""
        self._fixed[node] = value

    def tensor(self, leaf: InputNode) -> torch.Tensor:
        tensor = self.bound.get(leaf, leaf.tensor)
        assert tensor is not None
        return tensor

    def value(self, node: Node, tile: Tile) -> Any:
        """The value of ``node`` inside ``tile``; nodes without the row axis are computed once for all row steps."""
        if node in self._fixed:
            return take(self._fixed[node], node.dims, tile)
        own = {leaf: tile[leaf] for leaf in self._axes[node] if leaf in tile}
        if isinstance(node, InputNode) and node not in self.wanted:
            return node.compute(own, self)
        fixed = self.hoist and self.row is not None and self.row not in own
        shared = node in self.shared
        if not fixed and not shared and self._uses.get(node, 0) < 2 and node not in self.wanted:
            return self._computed(node, own)
        # The key includes grad mode: a value made under no_grad has no history, and may be needed with one.
        key = (node, tuple(own.items()), torch.is_grad_enabled())
        if key in self._kept:
            return self._kept[key]
        if shared:
            # If sequences are cut, keep it for one sequence at a time.
            self._kept.pop(self._of_rows.get(node, key), None)
            self._of_rows[node] = key
        value = self._computed(node, own)
        if node in self.wanted:
            value = value.detach().requires_grad_()
            self.parts.append((node, own, value))
        if not fixed and not shared:
            self._moving.append(key)
        self._kept[key] = value
        return value

    def share(self, node: Node, tile: Tile, value: torch.Tensor) -> None:
        """Use ``value``, if values of ``node`` are kept, for ``node`` in this tile."""
        own = {leaf: tile[leaf] for leaf in self._axes[node] if leaf in tile}
        key = (node, tuple(own.items()), torch.is_grad_enabled())
        if node in self.shared:
            self._kept.pop(self._of_rows.get(node, key), None)
            self._of_rows[node] = key
            self._kept[key] = value

    def _computed(self, node: Node, tile: Tile) -> torch.Tensor:
        value = self._made(node, tile)
        if node in self.scores and isinstance(value, torch.Tensor):
            # A view counts by its own size (a slice) or by the size of its storage (an expanded tensor), whichever is
            # smaller.
            size = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            self.largest = max(self.largest, size)
        return value

    def _made(self, node: Node, tile: Tile) -> torch.Tensor:
        if node in self._distances:
            pair = self._distances[node]
            found = toeplitz.spread(node, pair, tile, lambda part: node.compute(part, self))
            if found is not None:
                return found
        if node.is_made_by_host and self.in_calling_thread is not None:
            value = self.in_calling_thread(lambda: node.compute(tile, self))
        else:
            value = node.compute(tile, self)
        # If a node was made under no_grad, or is detached, no gradient passes, not even through views. Its operands are
        # computed with their history, since other nodes may share them.
        return value.detach() if node.stops_gradient and torch.is_grad_enabled() else value

    def operands(self, node: OpNode, tile: Tile) -> list[Any]:
        """The values of the children of ``node`` in a tile, aligned in memory if its rounding depends on that."""
        values = [self.value(child, tile) for child in node.children]
        if node.work and not self.wanted:
            if node not in self._aligned:
                self._aligned[node] = [
                    i for i, child in enumerate(node.children) if row_alignment.asks(node, child)
                ]
            for i in self._aligned[node]:
                values[i] = row_alignment.laid(values[i], node.children[i], tile)
        return values

    def shared_operands(self, node: OpNode, tile: Tile) -> list[int]:
        """Indices of a product's narrow operands whose gradient is a sum over several tiles."""
        if not self.wanted or node.letters is None or node.context.autocast:
            return []
        return [
            i
            for i, child in enumerate(node.children)
            if child in self.wanted
            and child.dtype.itemsize < 4
            and node.letters.has_gradient(i)
            and any(axis not in self._axes[child] for axis in tile)
        ]

    def with_wide_gradients(
        self, node: OpNode, shared: list[int], values: list[torch.Tensor], tile: Tile, result: torch.Tensor
    ) -> torch.Tensor:
        """``result``, which is a product of ``values``; operands in ``shared`` get this tile's part of their gradient
        in float32.
        """
        assert node.letters is not None
        for i in shared:
            leaf = wide_sums.stand_in(values[i])
            own = {axis: tile[axis] for axis in self._axes[node.children[i]] if axis in tile}
            self.parts.append((node.children[i], own, leaf))
            result = wide_sums.with_gradient(result, leaf, values[1 - i], node.letters, i)
        return result

    def next_tile(self) -> None:
        """Drop values of the tile just done."""
        for key in self._moving:
            self._kept.pop(key, None)
        self._moving.clear()

    def next_rows(self) -> None:
        """Drop values of the rows just done: other rows follow, for all heads."""
        for key in self._of_rows.values():
            self._kept.pop(key, None)
        self._of_rows.clear()

    def next_lead(self) -> None:
        """Drop all values: other heads follow."""
        self._kept.clear()
        self._moving.clear()
