"""What readers of several packages share."""

from __future__ import annotations

from typing import Any

import torch


def by_batch(tensor: torch.Tensor) -> torch.Tensor:
    """``[batch, length, heads, width]`` as ``[batch, heads, length, width]``, and the other way round."""
    return tensor.transpose(1, 2)


def first(result: Any) -> torch.Tensor:
    """The first of several results, or the only one."""
    return result[0] if isinstance(result, (tuple, list)) else result


def window_of(sizes: Any) -> tuple[int | None, int | None]:
    """A window as flash-attn takes it (-1 or ``None``: open) as ``KernelCall`` has it."""
    left, right = (None if size is None or size < 0 else int(size) for size in sizes)
    return left, right


def lengths_of(cumulative: torch.Tensor) -> tuple[int, ...]:
    """The lengths of packed sequences, from int ``[sequences + 1]``: where each begins and the last one ends."""
    return tuple(cumulative.diff().tolist())
