"""The dimensions of the result of attention: its sequences, heads and rows are those of the query."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, fresh, size_of
from attnpatch.rows.provenance.origins import Origins
from attnpatch.rows.provenance.unseen_writes import Notes, place_of

_OPERANDS = ("query", "key", "value")


def of_sdpa(sources: Origins, notes: Notes, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims:
    """The dimensions of the result of ``scaled_dot_product_attention``.

    Args:
        sources: The sources of the module's call.
        notes: The dimensions of its tensors.
        args, kwargs: The arguments.
        result: The result.
    """
    operands = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(_OPERANDS)]
    known = [notes.get(one) for one in operands]
    found = [_of_any(known, result.shape[place], result.dim() - place) for place in range(result.dim() - 2)]
    rows = _of_any(known[:1], result.shape[-2], 2)
    if known[0] is None and operands[0] in notes:
        # Learned queries: their order is new.
        rows = (Axis(result.shape[-2]),)
        sources.new.add(rows[0])
    return (*found, rows, *fresh(result.shape[-1:]))


def of_grid_sample(
    _: Origins, notes: Notes, args: Any, kwargs: dict[str, Any], result: torch.Tensor
) -> Dims | None:
    """The dimensions of the result of ``grid_sample``: its places are those of the grid (deformable attention)."""
    grid = notes.get(args[1] if len(args) > 1 else kwargs["grid"])
    if grid is None or result.dim() != len(grid):
        return None
    return (grid[0], *fresh(result.shape[1:2]), *grid[1:-1])


def _of_any(known: list[Dims | None], size: int, back: int) -> Dim:
    """The axes of the first operand that has all of a dimension; ``back`` counts from the last dimension."""
    fitting = (own[-back] for own in known if own is not None and back <= len(own))
    return next((dim for dim in fitting if size_of(dim) == size), fresh([size])[0])


# What has the signature of ``of_sdpa``, by the name of the function.
OF = {"scaled_dot_product_attention": of_sdpa, "grid_sample": of_grid_sample}


def note_kernel(sources: Any, query: torch.Tensor, shown: torch.Tensor, result: Any) -> None:
    """Note the dimensions of what a kernel outside torch has returned.

    Args:
        sources: The sources of the module's call, or ``None``.
        query: The query ``[batch, heads, q_len, head_dim]``.
        shown: A view of the result: ``[batch, heads, q_len, value_dim]``.
        result: What the kernel has returned.
    """
    one = result[0] if isinstance(result, (tuple, list)) and result else result
    if sources is None or sources.is_bare is None or type(one) is not torch.Tensor:
        return
    sources.give_later(one, lambda own: _of_kernel(own.returned(query), shown, one))


def _of_kernel(query: Dims | None, shown: torch.Tensor, result: torch.Tensor) -> Dims | None:
    if query is None or place_of(shown) != place_of(result):
        return None
    own = (*query[:-1], *fresh(shown.shape[-1:]))
    strides = zip(shown.shape, shown.stride(), own, strict=True)
    by_stride = {(size, stride): dim for size, stride, dim in strides}
    sizes = list(zip(result.shape, result.stride(), strict=True))
    if any(each[0] > 1 and each not in by_stride for each in sizes):
        return None
    return tuple(by_stride[each] if each[0] > 1 else () for each in sizes)
