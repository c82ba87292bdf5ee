"""transformers' table of attention functions: which of them hand query, key and value to a kernel, and what they mean.

A function of this table gets the module, query, key and value ``[batch, heads, length, width]`` and a mask of the kind
that its implementation takes; it returns ``[batch, length, heads, width]`` and the weights or ``None``. While a patched
model is called, the functions that run a kernel are overridable (``rows/kernels/table.py``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.hosts.kernels.flex import is_block_mask, mask_rows_of
from attnpatch.hosts.kernels.reading import by_batch, first, lengths_of
from attnpatch.hosts.tables import Replaced
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead, Kernel, overridable

_MODULE = "transformers.modeling_utils"
# Functions made of torch functions, which the modes see; and those that call a kernel and are documented.
_OF_TORCH = frozenset(
    ["sdpa_attention_forward", "sdpa_attention_paged_forward", "eager_paged_attention_forward"]
)
_OF_KERNELS = frozenset(["flash_attention_forward", "flex_attention_forward"])


def _replacement(key: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    name = getattr(function, "__name__", key)
    is_hosts = (getattr(function, "__module__", None) or "").startswith("transformers.")
    if is_hosts and name in _OF_TORCH:
        return None
    known = is_hosts and name in _OF_KERNELS
    # A user's function may well compute attention with torch's functions; those are served as ever. One function of
    # transformers serves several keys.
    return overridable(Kernel(name if known else key, function, read, is_transparent=not known))


_table = Replaced(_replacement)


def seen() -> contextlib.AbstractContextManager[None]:
    """Inside the block, transformers' attention functions that run a kernel are overridable."""
    table = getattr(sys.modules.get(_MODULE), compat.ATTENTION_TABLE, None)
    return (
        contextlib.nullcontext()
        if table is None
        else _table.inside(table._global_mapping, table._local_mapping)
    )


def read(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> KernelCall:
    """The call of one attention function; ``attention_mask`` is None, a padding mask, a mask or a ``BlockMask``."""
    if cache is not None:
        raise CannotRead("its keys are in a cache of continuous batching, which is not read")
    if position_bias is not None:
        raise CannotRead("it is given a bias of positions, which is not read")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    mask: Any = attention_mask
    lengths = None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
        mask = _OfTokens(mask, query.shape[-2]).rows
    elif mask is not None:
        # Such a mask holds all that is closed, as in ``sdpa_attention_forward``.
        causal, sliding_window = False, None
        mask = mask_rows_of(mask, query, key) if is_block_mask(mask) else mask[..., : key.shape[-2]]
    else:
        lengths = _packed(query, **kwargs)
    window = (
        (None, None)
        if sliding_window is None
        else (sliding_window - 1, None if causal else sliding_window - 1)
    )
    return KernelCall(
        query,
        key,
        value,
        scale=scaling,
        is_causal=bool(causal),
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        mask=mask,
        lengths=lengths,
        dropout_p=dropout,
        output=lambda result: by_batch(first(result)),
        returned=lambda out, lse: (by_batch(out), None),
    )


class _OfTokens:
    """A padding mask ``[batch, tokens]``: padded keys are closed, and so are the rows of padded queries."""

    def __init__(self, mask: torch.Tensor, q_len: int) -> None:
        self.keys, self.queries = mask.bool(), mask.bool()[:, -q_len:]
        self.has_queries = self.queries.shape[1] == q_len

    def rows(self, low: int, high: int) -> torch.Tensor:
        keys = self.keys[:, None, None, :]
        return keys & self.queries[:, None, low:high, None] if self.has_queries else keys


def _packed(
    query: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The lengths of sequences that are packed into one, as ``_flash_attention_forward`` finds them."""
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        return lengths_of(cu_seq_lens_q), lengths_of(cu_seq_lens_k)
    if (
        position_ids is None
        or len(query) != 1
        or position_ids.dim() != 2
        or position_ids.shape != (1, query.shape[2])
    ):
        return None
    places = position_ids[0]
    starts = (places[1:] != places[:-1] + 1).nonzero().flatten().add(1).tolist()
    if not starts:
        return None
    ends = [*starts, len(places)]
    found = tuple(high - low for low, high in zip([0, *starts], ends, strict=True))
    return found, found
