"""The order into which a function that moves elements puts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# A dimension, and for each of its elements the former index; ``None``: not known.
Order = tuple[int, torch.Tensor] | None


def is_picked(index: Any) -> bool:
    """True if an index has a list or an index tensor."""
    return any(
        isinstance(one, (torch.Tensor, list)) for one in (index if isinstance(index, tuple) else (index,))
    )


def picks_all(ids: Any, table: Any) -> bool:
    """True if an embedding reorders all rows of a table that is not a parameter."""
    if isinstance(table, torch.nn.Parameter) or table.dim() != 2 or ids.dim() < 1 or ids.is_floating_point():
        return False
    count = len(table)
    return ids.shape[-1] == count > 1 and not bool((ids == torch.arange(count, device=ids.device)).all())


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def orders_of(
    name: str, args: Any, kwargs: dict[str, Any], first: torch.Tensor, result: torch.Tensor
) -> Iterator[Order]:
    """The dimensions along which a function has reordered all elements, each with the order."""
    if result.shape != first.shape:
        return
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        for dim, one in enumerate(index):
            if isinstance(one, list):
                one = torch.tensor(one)
            if isinstance(one, torch.Tensor) and one.dtype != torch.bool:
                yield (dim, one) if one.dim() == 1 and len(one) == first.shape[dim] else None
        return
    given = kwargs.get("dim", kwargs.get("dims"))
    if name in ("fliplr", "flipud"):
        dims = [1 if name == "fliplr" else 0]
    elif name == "index_select":
        dims = [args[1] if len(args) > 1 else given]
    else:
        rest = args[2:] if name == "roll" else args[1:]
        found = [*flat(rest)] or [*flat((given,))]
        dims = [dim for dim in found if isinstance(dim, int)]
    shifts = [*flat((args[1] if len(args) > 1 else kwargs.get("shifts"),))] if name == "roll" else []
    if not dims:
        yield None
    for i, dim in enumerate(dims):
        count = first.shape[dim]
        places = torch.arange(count, device=first.device)
        if name == "index_select":
            yield dim % first.dim(), args[2] if len(args) > 2 else kwargs["index"]
        elif name == "roll":
            yield dim % first.dim(), places.roll(int(shifts[i]))
        elif count > 1:
            yield dim % first.dim(), places.flip(0)
