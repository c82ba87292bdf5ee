"""What readers of several packages share."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead

# Numbers of queries and of keys of each packed sequence.
Lengths = tuple[tuple[int, ...], tuple[int, ...]]


def reads(parameters: str) -> Callable[[Callable[[Any], KernelCall]], Callable[..., KernelCall]]:
    """Make a function the reader of a kernel.

    Args:
        parameters: The parameters of the kernel, as its ``def`` has them. The function gets one namespace with all of
            them, by name.
    """
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def decorated(function: Callable[[Any], KernelCall]) -> Callable[..., KernelCall]:
        @functools.wraps(function)
        def read(*args: Any, **kwargs: Any) -> KernelCall:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(SimpleNamespace(**bound.arguments))

        read.__signature__ = signature  # type: ignore[attr-defined]
        return read

    return decorated


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


def only(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """What a kernel returns that is not asked for the logsumexp."""
    return out


def pair(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """What a kernel returns that is asked for the logsumexp."""
    return out, lse


def call_in_batches(tensors: Any, returned: Callable[..., Any], **fields: Any) -> KernelCall:
    """The call of a kernel whose tensors are ``[batch, length, heads, width]``.

    Args:
        tensors: Query, key, value.
        returned: What the kernel returns, given the result in its layout and the logsumexp ``[batch, heads, length]``.
        fields: Further fields of ``KernelCall``.
    """
    return KernelCall(
        *map(by_batch, tensors),
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: returned(by_batch(out), lse),
        **fields,
    )


def call_in_packs(tensors: Any, returned: Callable[..., Any], **fields: Any) -> KernelCall:
    """As ``call_in_batches``, of tensors ``[total, heads, width]`` and the logsumexp ``[heads, total]``."""
    return KernelCall(
        *map(packed, tensors),
        output=lambda result: packed(first(result)),
        returned=lambda out, lse: returned(unpacked(out), None if lse is None else lse.squeeze(0)),
        **fields,
    )


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


def paged(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> tuple[Any, Any, tuple[int, ...]]:
    """Keys and values that a table leads to, as packed sequences, and where the keys of each begin."""
    k, v = pages(k, table), pages(v, table)
    return k.flatten(0, 1), v.flatten(0, 1), tuple(i * k.shape[1] for i in range(len(k)))


def pages(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The keys of each sequence, read through its table: ``[batch, pages * page_size, heads, width]``.

    Args:
        cache: ``[number of pages, page_size, heads, width]``.
        table: int ``[batch, pages]``. Places that are not in use may hold any number.
    """
    return cache[table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def refuse(kernel: str, given: Any, names: str) -> None:
    """Refuse arguments that ``KernelCall`` cannot express.

    Args:
        kernel: What the kernel is called.
        given: All arguments, by name.
        names: Those that must be ``None``, ``False`` or 0.

    Raises:
        CannotRead: One of them is not.
    """
    others = [name for name in names.split() if not _is_off(getattr(given, name))]
    if others:
        raise CannotRead(f"{kernel} is given {' and '.join(others)}, whose meaning attnpatch does not know")


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and not value)
