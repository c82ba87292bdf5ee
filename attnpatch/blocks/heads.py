"""Which attention heads a map keeps separate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnpatch.errors import CaptureError

Heads = str | Sequence[int]


def chosen_heads(heads: Heads, num_heads: int) -> list[int]:
    """The numbers of the heads that are kept separate.

    Raises:
        CaptureError: A requested head does not exist.
    """
    if heads == "all":
        return list(range(num_heads))
    assert not isinstance(heads, str)
    outside = [head for head in heads if not -num_heads <= head < num_heads]
    if outside:
        raise CaptureError(
            f"heads={list(heads)!r}: there are {num_heads} heads; give numbers below {num_heads}"
        )
    return [head % num_heads for head in heads]


def checked_heads(heads: Any) -> Heads:
    """Check that ``heads`` is ``"mean"``, ``"all"`` or a list of numbers, and return it.

    Raises:
        CaptureError: It is something else.
    """
    if isinstance(heads, str) and heads in ("mean", "all"):
        return heads
    numbers = isinstance(heads, (list, tuple)) and heads and all(type(head) is int for head in heads)
    if not numbers:
        raise CaptureError(
            f"heads={heads!r} is not accepted; give 'mean', 'all' or a list of numbers such as [0, 3]"
        )
    return list(heads)
