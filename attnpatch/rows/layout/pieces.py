"""Handlers of functions that cut a tensor into pieces: slices, splits, chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from attnpatch.rows.arguments import argument
from attnpatch.rows.deferred.tensor import DeferredTensor
from attnpatch.rows.layout import indexing
from attnpatch.rows.op_table import op


@op("narrow", is_layout=True, is_view=True)
def narrow(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    dim, start, length = (
        argument(args, kwargs, i + 1, key) for i, key in enumerate(("dim", "start", "length"))
    )
    if not all(isinstance(value, int) for value in (dim, start, length)):
        return NotImplemented
    size = args[0].shape[dim]
    start += size * (start < 0)
    if not 0 <= start <= start + length <= size:
        return NotImplemented
    return _along(args[0], dim, slice(start, start + length))


@op("select", is_layout=True, is_view=True)
def select(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    dim, at = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    if not isinstance(dim, int) or not isinstance(at, int):
        return NotImplemented
    return _along(args[0], dim, at)


def _along(source: DeferredTensor, dim: int, item: Any) -> Any:
    index = [slice(None)] * len(source.handle.node.dims)
    index[dim] = item
    return indexing.getitem("__getitem__", torch.Tensor.__getitem__, (source, tuple(index)), {})


@op("unbind", is_layout=True, is_view=True)
def unbind(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    dim = argument(args, kwargs, 1, "dim", 0)
    if not isinstance(dim, int):
        return NotImplemented
    return _pieces(_along(args[0], dim, i) for i in range(args[0].shape[dim]))


@op("__iter__", is_layout=True, is_view=True)
def iterate(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    found = unbind(name, func, args, kwargs)
    return found if found is NotImplemented else iter(found)


@op("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", is_layout=True, is_view=True)
def split(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``split`` and ``chunk`` as slices."""
    source = args[0]
    named = kwargs.get("split_size_or_sections", kwargs.get("chunks"))
    count = argument(args, kwargs, 1, "split_size", named)
    dim = argument(args, kwargs, 2, "dim", 0)
    if not isinstance(dim, int) or (name == "chunk" and not isinstance(count, int)):
        return NotImplemented
    size = source.shape[dim]
    if name == "chunk":
        count = -(-size // count) if count > 0 else 0
    if isinstance(count, int):
        if count < 1:
            return NotImplemented
        count = [min(count, size - start) for start in range(0, size, count)]
    if (
        not isinstance(count, (list, tuple))
        or not all(isinstance(n, int) for n in count)
        or sum(count) != size
    ):
        return NotImplemented
    ends = list(itertools.accumulate(count))
    return _pieces(_along(source, dim, slice(stop - n, stop)) for n, stop in zip(count, ends, strict=True))


@op("tensor_split", "hsplit", "vsplit", "dsplit", is_layout=True, is_view=True)
def tensor_split(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``tensor_split``, ``hsplit``, ``vsplit``, ``dsplit``: sections of nearly equal length, or cut at some indices."""
    source = args[0]
    given = argument(args, kwargs, 1, "indices_or_sections")
    given = kwargs.get("indices", kwargs.get("sections", kwargs.get("split_size_or_sections", given)))
    fixed = {"vsplit": 0, "hsplit": 1 if source.dim() > 1 else 0, "dsplit": 2}
    dim = fixed[name] if name in fixed else argument(args, kwargs, 2, "dim", 0)
    if not isinstance(dim, int) or not -source.dim() <= dim < source.dim():
        return NotImplemented
    size = source.shape[dim]
    if isinstance(given, int) and given > 0:
        if name in fixed and size % given:
            return NotImplemented
        places = [i * (size // given) + min(i, size % given) for i in range(1, given)]
    elif isinstance(given, (list, tuple)) and all(isinstance(place, int) for place in given):
        places = list(given)
    else:
        return NotImplemented
    return _pieces(_along(source, dim, slice(*pair)) for pair in itertools.pairwise([0, *places, size]))


def _pieces(pieces: Iterable[Any]) -> Any:
    found = []
    for piece in pieces:
        if piece is NotImplemented:
            return NotImplemented
        found.append(piece)
    return tuple(found)
