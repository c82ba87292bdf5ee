"""The strides that the result of a graph would have natively, found without allocating it.

Whether ``reshape`` or ``contiguous`` returns a view or a copy depends on strides. torch itself computes them: the
graph's own calls run on tensors of device ``meta``, which have sizes, strides and a storage of their own, and no data.
This is done only when a function needs it, since most graphs are computed without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.compat import without_dispatch_modes
from attnpatch.rows.graph.nodes import Child, InputNode, Node, OutputNode, SliceNode, ViewNode, map_structure
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.layout.relative_shift import Strided

# Functions for which the layout of the result depends on the library that computes it, unless the input is contiguous.
_UNSURE = frozenset("conv1d conv2d conv3d roll".split())


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Inside the block no mode (attnpatch's, a profiler's, anyone's) sees torch functions, and autograd is off."""
    compat.prepare_meta()
    with compat.DisableTorchFunction(), without_dispatch_modes(), torch.no_grad():
        yield


def shadow(node: Node) -> torch.Tensor | None:
    """A ``meta`` tensor with the native result's sizes and strides; ``None`` if they are not known."""
    if node.shadow is None:
        with _unwatched():
            found = _shadow(node)
        return found if isinstance(found, torch.Tensor) else None
    return node.shadow if isinstance(node.shadow, torch.Tensor) else None


def applied(node: Node, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of a function on the shadow of a graph, or ``None`` if there is no shadow.

    Raises:
        Exception: Whatever the native call would raise.
    """
    own = shadow(node)
    if own is None:
        return None
    with _unwatched():
        return func(own, *args, **kwargs)


def numbers(count: int) -> torch.Tensor:
    """A ``meta`` index tensor ``[count]``, for ``applied``."""
    with _unwatched():
        return torch.empty(count, dtype=torch.int64, device="meta")


def is_view(result: torch.Tensor, node: Node) -> bool:
    """True if ``result``, which ``applied`` has returned, shares memory with the graph's shadow."""
    own = shadow(node)
    return own is not None and result.untyped_storage()._cdata == own.untyped_storage()._cdata


def overlaps(node: Node) -> bool:
    """True if several elements share a place in memory (``expand``), so that torch refuses to write to the tensor."""
    own = shadow(node)
    return own is None or compat.overlaps_itself(own)


def laid(value: torch.Tensor, node: Node, gaps: bool = False) -> torch.Tensor:
    """``value`` with the strides of the native result: ``value`` itself, or a copy.

    Args:
        value: The result.
        node: Its graph.
        gaps: True to keep the gaps that a slice of a larger memory has between elements; False to keep only the order.
    """
    own = shadow(node)
    if own is None or compat.overlaps_itself(own):
        return value
    strides = own.stride() if gaps or not has_gaps(node) else _without_gaps(own)
    if value.stride() == strides:
        return value
    sizes = zip(value.shape, value.stride(), strides, strict=True)
    if all(size == 1 or mine == theirs for size, mine, theirs in sizes):
        return value.as_strided(value.shape, strides)
    return value.new_empty_strided(value.shape, strides).copy_(value)


def has_gaps(node: Node) -> bool:
    """True if the native result is a slice of a larger memory."""
    own = shadow(node)
    return own is not None and own.untyped_storage().nbytes() > own.numel() * own.element_size()


def _without_gaps(own: torch.Tensor) -> tuple[int, ...]:
    strides, step = list(own.stride()), 1
    for dim in sorted(range(own.dim()), key=own.stride):
        if own.shape[dim] != 1:
            strides[dim] = step
            step *= own.shape[dim]
    return tuple(strides)


def _shadow(node: Node) -> Any:
    if node.shadow is None:
        try:
            found = _made(node)
        except Exception:  # an operator that does not support meta tensors
            found = None
        node.shadow = False if found is None else found
    return node.shadow


def _made(node: Node) -> Any:
    if node.laid_as is not None:
        return _shadow(node.laid_as)
    if node.lies_by_rows:
        return torch.empty(node.shape, dtype=node.dtype, device="meta")
    if isinstance(node, InputNode):
        tensor = node.tensor
        if tensor is None:
            return None
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=node.dtype, device="meta")
    below = [_shadow(child) for child in node.children]
    if any(found is False for found in below):
        return None
    if node.native is not None:
        func, args, kwargs = node.native
        return func(below[0], *args, **kwargs)
    if isinstance(node, ViewNode):
        return below[0].expand(node.shape) if node.expand else below[0].view(node.shape)
    if isinstance(node, SliceNode):
        stop = node.start + (node.axis.size - 1) * node.step + 1
        return below[0][(*[slice(None)] * node.position, slice(node.start, stop, node.step))]
    if isinstance(node, OutputNode):
        return below[0][node.index]
    if isinstance(node, OpNode):
        return _called(node, below)
    if not below or isinstance(node, Strided):
        # Padded or joined tensors, and nodes without children: torch makes these contiguous.
        return torch.empty(node.shape, dtype=node.dtype, device="meta")
    return below[0] * 1 if node.copies_layout else None


def _called(node: OpNode, below: list[Any]) -> Any:
    name = getattr(node.func, "__name__", "")
    if name in _UNSURE and not below[0].is_contiguous():
        return None

    def fill(value: Any) -> Any:
        return below[value.index] if isinstance(value, Child) else value

    try:
        return node.func(*map_structure(node.args, fill), **map_structure(node.kwargs, fill))
    except RuntimeError:
        # Under autocast a product may get operands of different dtypes.
        below = [part.to(node.dtype) if part.is_floating_point() else part for part in below]
        return node.func(*map_structure(node.args, fill), **map_structure(node.kwargs, fill))


def like(node: Node, dtype: torch.dtype) -> Any:
    """``Node.shadow`` for a new tensor with the layout that ``empty_like(dtype=...)`` would give it."""
    found = applied(node, torch.empty_like, (), {"dtype": dtype})
    return False if found is None else found
