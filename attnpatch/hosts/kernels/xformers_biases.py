"""The bias classes of ``xformers.ops.fmha.attn_bias``, read by the names of their classes and attributes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.hosts.kernels.reading import numbers_of
from attnpatch.rows.kernels.table import CannotRead

# Masks of whole sequences: is there a causal mask, and is the last query at the place of the last key?
_WHOLE = {
    "LowerTriangularMask": (True, False),
    "LowerTriangularMaskWithTensorBias": (True, False),
    "LowerTriangularFromBottomRightMask": (True, True),
    "LowerTriangularFromBottomRightLocalAttentionMask": (True, True),
    "LocalAttentionFromBottomRightMask": (False, True),
}
# Packed sequences; the same two.
_PACKED = {
    "BlockDiagonalMask": (False, True),
    "BlockDiagonalCausalMask": (True, False),
    "BlockDiagonalCausalFromBottomRightMask": (True, True),
    "BlockDiagonalCausalLocalAttentionMask": (True, False),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (True, True),
    "BlockDiagonalPaddedKeysMask": (False, True),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (True, True),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (False, True),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (True, True),
    "BlockDiagonalGappyKeysMask": (False, True),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (True, True),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": (False, True),
    "PagedBlockDiagonalPaddedKeysMask": (False, True),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": (True, True),
    "PagedBlockDiagonalCausalLocalPaddedKeysMask": (True, True),
    "PagedBlockDiagonalGappyKeysMask": (False, True),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": (True, True),
}


def read_bias(
    bias: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    by_heads: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Query, key, value and what a bias means, as fields of ``KernelCall``.

    Args:
        bias: The bias, or ``None``.
        query, key, value: ``[batch, heads, length, width]``.
        by_heads: Brings a tensor bias into the shape ``[batch or 1, heads or 1, queries, keys]``.

    Raises:
        CannotRead: The class is not known.
    """
    name = type(bias).__name__
    tensors = {"query": query, "key": key, "value": value}
    if bias is None:
        return tensors
    if name in _WHOLE:
        own = _tensor_of(bias) if name.endswith("TensorBias") else None
        mask = None if own is None else by_heads(own)
        return {**tensors, **_places(bias, *_WHOLE[name]), "mask": mask}
    if name in _PACKED:
        return {**_packed(bias, **tensors), **_places(bias, *_PACKED[name])}
    if isinstance(bias, torch.Tensor):
        return {**tensors, "mask": by_heads(bias)}
    raise CannotRead(
        f"memory_efficient_attention is given a bias of class {name}, which attnpatch does not know"
    )


def _tensor_of(bias: Any) -> torch.Tensor:
    # Until xFormers 0.0.30 the class was a tensor itself, and kept the bias under another name.
    names = (compat.XFORMERS_BIAS, compat.XFORMERS_OLD_BIAS)
    return next(found for name in names if (found := getattr(bias, name, None)) is not None)


def _places(bias: Any, is_causal: bool, aligns_ends: bool) -> dict[str, Any]:
    if getattr(bias, "causal_diagonal", None) is not None:
        raise CannotRead(
            f"{type(bias).__name__} is given causal_diagonal, which newer releases of xFormers ignore"
        )
    window: tuple[int | None, int | None] = (None, None)
    size = getattr(bias, compat.XFORMERS_WINDOW, None)
    if size is not None:
        window = (size - 1, None)
    elif hasattr(bias, "window_left"):
        window = (bias.window_left, bias.window_right)
    return {"is_causal": is_causal, "aligns_ends": aligns_ends, "window": window}


def _packed(bias: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """How sequences are packed: lengths, and where the keys of each begin."""
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    q_lengths = tuple(after - before for before, after in itertools.pairwise(queries.seqstart_py))
    starts = tuple(int(start) for start in keys.seqstart_py[: len(q_lengths)])
    table = getattr(bias, "block_tables", None)
    if table is None:
        if hasattr(keys, "seqlen_py"):
            kv_lengths = tuple(int(length) for length in keys.seqlen_py)
        else:
            kv_lengths = tuple(after - before for before, after in itertools.pairwise(keys.seqstart_py))
    else:
        # Starts and ends are places in a sequence's own pages.
        is_padded = hasattr(keys, "padding")
        first = (0,) * len(q_lengths) if is_padded else starts
        kv_lengths = tuple(int(end) - start for end, start in zip(keys.seqlen_py, first, strict=True))
        key, value = (_through(table, bias.page_size, one) for one in (key, value))
        width = table.shape[1] * bias.page_size
        starts = tuple(row * width + start for row, start in enumerate(first))
    return {
        "query": query,
        "key": key,
        "value": value,
        "lengths": (q_lengths, kv_lengths),
        "key_starts": starts,
    }


def _through(table: torch.Tensor, page_size: int, keys: torch.Tensor) -> torch.Tensor:
    """Keys ``[1, heads, slots, width]`` in the order of the sequences' pages."""
    count = keys.shape[2] // page_size
    pages = torch.tensor(numbers_of(table.flatten()), device=keys.device).clamp(0, count - 1)
    places = pages[:, None] * page_size + torch.arange(page_size, device=keys.device)
    return keys[:, :, places.flatten()]
