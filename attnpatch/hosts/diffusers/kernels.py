"""diffusers' attention back ends: which of them run a kernel, and what their calls mean.

``dispatch_attention_fn`` looks a function up by the name of a back end. These functions take and return
``[batch, length, heads, width]``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.hosts.kernels.flex import is_block_mask, mask_rows_of
from attnpatch.hosts.kernels.reading import by_batch, call_in_batches, only, pair, window_of
from attnpatch.hosts.kernels.sageattention import TOLERANCE
from attnpatch.hosts.tables import Replaced
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead, Kernel, overridable

_MODULE = "diffusers.models.attention_dispatch"


def _replacement(key: Any, function: Callable[..., Any]) -> Callable[..., Any] | None:
    name = str(getattr(key, "value", key))
    if name.lstrip("_").startswith("native"):
        return None  # torch's own attention, which the modes see
    # ``flex`` without a compiler holds all scores.
    return overridable(
        Kernel(name, function, _reader(TOLERANCE if "sage" in name else None), holds_scores=name == "flex")
    )


_table = Replaced(_replacement)


def seen() -> contextlib.AbstractContextManager[None]:
    """Inside the block, the functions of diffusers' back ends that run a kernel are overridable."""
    registry = getattr(sys.modules.get(_MODULE), compat.BACKEND_REGISTRY, None)
    backends = getattr(registry, compat.BACKENDS, None)
    return contextlib.nullcontext() if backends is None else _table.inside(backends)


def _reader(tolerance: float | None) -> Callable[..., KernelCall]:
    def read(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window_size: Any = (-1, -1),
        return_lse: bool = False,
        _parallel_config: Any = None,
        **other: Any,
    ) -> KernelCall:
        if _parallel_config is not None:
            raise CannotRead("its sequence is divided among several devices")
        if other:
            raise CannotRead(f"it is given {', '.join(sorted(other))}, which attnpatch does not read")
        mask = attn_mask
        if is_block_mask(mask):
            mask = mask_rows_of(mask, by_batch(query), by_batch(key), is_compiled=False)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            mask = mask[:, None, None, :].bool()
        return call_in_batches(
            (query, key, value),
            pair if return_lse else only,
            scale=scale,
            is_causal=is_causal,
            window=window_of(window_size),
            mask=mask,
            dropout_p=dropout_p,
            needs_lse=return_lse,
            tolerance=tolerance,
        )

    return read
