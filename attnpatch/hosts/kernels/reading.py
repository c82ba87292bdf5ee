"""What readers of several packages share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.rows.kernels.table import CannotRead

# Numbers of queries and of keys of each packed sequence.
Lengths = tuple[tuple[int, ...], tuple[int, ...]]


def by_batch(tensor: torch.Tensor) -> torch.Tensor:
    """``[batch, length, heads, width]`` as ``[batch, heads, length, width]``, and the other way round."""
    return tensor.transpose(1, 2)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """``[total, heads, width]`` as ``[1, heads, total, width]``."""
    return tensor.transpose(0, 1).unsqueeze(0)


def unpacked(tensor: torch.Tensor) -> torch.Tensor:
    """``[1, heads, total, width]`` as ``[total, heads, width]``."""
    return tensor.squeeze(0).transpose(0, 1)


def first(result: Any) -> torch.Tensor:
    """The first of several results, or the only one."""
    return result[0] if isinstance(result, (tuple, list)) else result


def window_of(sizes: Any) -> tuple[int | None, int | None]:
    """A window as flash-attn takes it (-1 or ``None``: open) as ``KernelCall`` has it."""
    left, right = (None if size is None or size < 0 else int(size) for size in sizes)
    return left, right


def numbers_of(tensor: torch.Tensor | Sequence[int]) -> tuple[int, ...]:
    """The numbers of a one-dimensional tensor."""
    return tuple(int(number) for number in torch.as_tensor(tensor).tolist())


def lengths_of(cumulative: torch.Tensor) -> tuple[int, ...]:
    """The lengths of packed sequences, given where they begin and end: ``[0, end, end, ...]``."""
    return tuple(after - before for before, after in itertools.pairwise(numbers_of(cumulative)))


def packed_lengths(
    of_queries: torch.Tensor, of_keys: torch.Tensor, keys_used: torch.Tensor | None
) -> tuple[Lengths, tuple[int, ...] | None]:
    """The lengths of packed sequences, and where the keys of each begin if not all of them are in use.

    Args:
        of_queries, of_keys: The cumulative lengths.
        keys_used: int ``[sequences]``, how many keys of each are in use; ``None``: all.
    """
    q_lengths, kv_lengths = lengths_of(of_queries), lengths_of(of_keys)
    if keys_used is None:
        return (q_lengths, kv_lengths), None
    return (q_lengths, numbers_of(keys_used)), numbers_of(of_keys)[:-1]


def pages(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The keys of each sequence, read through its table: ``[batch, pages * page_size, heads, width]``.

    Args:
        cache: ``[number of pages, page_size, heads, width]``.
        table: int ``[batch, pages]``. Places that are not in use may hold any number.
    """
    return cache[table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def refuse(kernel: str, **named: Any) -> None:
    """Refuse arguments that ``KernelCall`` cannot express.

    Args:
        kernel: What the kernel is called.
        named: The arguments; each must be ``None``, ``False`` or 0.

    Raises:
        CannotRead: One of them is not.
    """
    given = [name for name, value in named.items() if value is not None and not _is_off(value)]
    if given:
        raise CannotRead(f"{kernel} is given {' and '.join(given)}, whose meaning attnpatch does not know")


def _is_off(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not value
