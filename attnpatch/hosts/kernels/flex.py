"""torch's FlexAttention: its score functions and its block masks (Dong et al. 2024, arXiv:2412.05496)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.kernels.call import KernelCall, MaskRows
from attnpatch.rows.kernels.changed_scores import of_places
from attnpatch.rows.kernels.table import CannotRead

_MODULE = "torch.nn.attention.flex_attention"


def is_block_mask(value: Any) -> bool:
    """True for a ``BlockMask``."""
    kind = getattr(sys.modules.get(_MODULE), "BlockMask", None)
    return kind is not None and isinstance(value, kind)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> KernelCall:
    """The call of ``flex_attention``, uncompiled; tensors ``[batch, heads, length, width]``.

    Uncompiled, only the function of a block mask counts, and not its lists of blocks.
    """
    asks = bool(return_lse or getattr(return_aux, "lse", False))
    if getattr(return_aux, "max_scores", False):
        raise CannotRead("it is asked for the largest scores, which attnpatch does not compute")
    if len(query) != len(key):
        raise CannotRead("queries and keys have other batch sizes")

    def returned(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
        if return_aux is not None:
            return out, type(sys.modules[_MODULE].AuxOutput())(lse=lse)
        return (out, lse) if return_lse else out

    return KernelCall(
        query,
        key,
        value,
        scale=scale,
        mask=None if block_mask is None else mask_rows_of(block_mask, query, key, is_compiled=False),
        change=score_mod,
        output=lambda result: result[0] if isinstance(result, tuple) else result,
        returned=returned,
        needs_lse=asks,
    )


def compiled(*args: Any, **kwargs: Any) -> KernelCall:
    """The call of ``torch.compile(flex_attention)``."""
    call = flex_attention(*args, **kwargs)
    mask = kwargs.get("block_mask", args[4] if len(args) > 4 else None)
    return call if mask is None else dataclasses.replace(call, mask=mask_rows_of(mask, call.query, call.key))


def mask_rows_of(
    mask: Any, query: torch.Tensor, key: torch.Tensor, is_compiled: bool = True
) -> MaskRows | None:
    """A function that returns rows of a ``BlockMask``, bool; ``None`` if it closes nothing.

    Blocks that the mask does not list are closed, blocks that it lists as full are open, and in the others the mask's
    function decides.
    """
    q_size, kv_size = mask.BLOCK_SIZE
    q_len, kv_len = query.shape[-2], key.shape[-2]
    if q_size >= q_len and kv_size >= kv_len and mask.shape[-2:] != (q_len, kv_len):
        return None  # the mask that stands for none
    if tuple(mask.shape[-2:]) != (q_len, kv_len):
        raise CannotRead(
            f"its block mask is for {tuple(mask.shape[-2:])} queries and keys, not for {(q_len, kv_len)}"
        )
    function, batch, heads = mask.mask_mod, len(query), query.shape[1]
    if not is_compiled:
        return lambda low, high: _cells(function, (batch, heads, low, high, kv_len), query.device)
    with compat.DisableTorchFunction():  # attnpatch's modes would take these comparisons for a mask
        partial = _blocks(mask.kv_num_blocks, mask.kv_indices)
        full = None
        if mask.full_kv_num_blocks is not None:
            full = _blocks(mask.full_kv_num_blocks, mask.full_kv_indices)

    def rows(low: int, high: int) -> torch.Tensor:
        blocks = torch.arange(low, high, device=partial.device) // q_size
        shape = (batch, heads, high - low, kv_len)

        def cells(of: torch.Tensor) -> torch.Tensor:
            return of[:, :, blocks].repeat_interleave(kv_size, -1)[..., :kv_len].expand(shape)

        is_open = cells(partial) & _cells(function, (batch, heads, low, high, kv_len), partial.device)
        return is_open if full is None else is_open | cells(full)

    return rows


def _cells(
    function: Callable[..., torch.Tensor], sizes: tuple[int, int, int, int, int], device: torch.device
) -> torch.Tensor:
    """Where the function of a mask is true: bool ``[batch, heads, high - low, keys]``; ``sizes``: batch, heads, low, high,
    keys.
    """
    batch, heads, low, high, keys = sizes
    places = [torch.arange(batch), torch.arange(heads), torch.arange(low, high), torch.arange(keys)]
    nothing = torch.zeros((batch, heads, high - low, keys), dtype=torch.bool, device=device)
    return of_places(lambda _, *place: function(*place), nothing, places)


def _blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Which blocks of keys a list has for each block of queries: bool ``[batch, heads, q_blocks, kv_blocks]``.

    Args:
        counts: int ``[batch, heads, q_blocks]``, how many.
        indices: int ``[batch, heads, q_blocks, kv_blocks]``; the first ones count.
    """
    is_listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    found = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return found.scatter_add_(-1, indices.long(), is_listed.int()).bool()
