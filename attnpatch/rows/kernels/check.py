"""Compares a few rows of a kernel's result with what its arguments mean, before its probabilities are shown."""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.compute import attention
from attnpatch.rows.precision import in_full

# How many rows are compared.
ROWS = 4
# The largest error of a kernel, as a share of the largest result. In float32, matrices may be multiplied in TF32.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@torch.no_grad()
def why_wrong(call: KernelCall, result: torch.Tensor, rows: int = ROWS) -> str | None:
    """Why a kernel's result is not the attention that its arguments mean; ``None`` if it is.

    Args:
        call: The call, not packed.
        result: ``[batch, heads, q_len, value_dim]``, what the kernel has returned.
        rows: How many rows are compared.
    """
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    if result.shape != shape:
        return f"it returned {list(result.shape)} where {list(shape)} was expected"
    tolerance = call.tolerance if call.tolerance is not None else _TOLERANCE.get(result.dtype, 0.1)
    last = call.q_len - 1
    for row in sorted({last - i * last // max(1, rows - 1) for i in range(rows)}):
        expected = _row(call, row)
        found = result[:, :, row : row + 1].to(expected.dtype)
        off = (found - expected).abs().amax()
        most = expected.abs().amax()
        # ``not <=`` is true of NaN, too.
        if not bool(off <= tolerance * most + 1e-6):
            return (
                f"row {row} of its result differs by {float(off):.2g} (largest value {float(most):.2g}) from softmax of "
                "query and key as its arguments describe them"
            )
    return None


def _row(call: KernelCall, row: int) -> torch.Tensor:
    """One row of the result, float32 or better: ``[batch, heads, 1, value_dim]``."""
    dtype = call.dtype
    change = call.change
    alone = dataclasses.replace(
        call,
        query=call.query[:, :, row : row + 1].to(dtype),
        key=call.key.to(dtype),
        value=call.value.to(dtype),
        is_causal=False,
        window=(None, None),
        slopes=None,
        kv_used=None,
        dropout_p=0.0,
        needs_lse=False,
        # The row's own mask holds all of these.
        mask=call.mask_rows(row, row + 1),
        change=None if change is None else lambda s, b, h, q, k: change(s, b, h, q + row, k),
    )
    with torch.autocast(call.query.device.type, enabled=False), in_full(alone.query):
        return attention(alone, None)[0]
