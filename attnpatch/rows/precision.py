"""Computes float32 products in full float32 (no TF32), whatever precision the host has allowed for its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

# The setting is the process's, not a thread's: the first thread that needs it sets it, and the last one puts it back.
_lock = threading.Lock()
_depth: dict[str, int] = {}
_before: dict[str, str] = {}
# Names of full precision: before torch 2.9, since 2.9, and "not set".
_FULL = ("highest", "ieee", "none")


@contextlib.contextmanager
def in_full(tensor: torch.Tensor) -> Iterator[None]:
    """Inside the block, float32 products on the tensor's device keep all 24 bits of the mantissa.

    A host may have allowed 10 for its own (TF32, on CUDA) or 8 (bfloat16, on processors with tile registers), by
    ``torch.set_float32_matmul_precision`` or ``fp32_precision``. Sums of probabilities are computed as products with
    ones; if the probabilities were rounded first, they would not sum to 1.
    """
    kind = tensor.device.type
    if kind not in ("cuda", "cpu") or tensor.dtype == torch.float64:
        yield
        return
    with _lock:
        if not _depth.get(kind):
            _before[kind] = _get(kind)
            if _before[kind] not in _FULL:
                _set(kind, _FULL[0] if _products(kind) is None else _FULL[1])
        _depth[kind] = _depth.get(kind, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _depth[kind] -= 1
            before = _before[kind]
            if not _depth[kind] and before not in _FULL:
                if _products(kind) is not None:
                    _set(kind, "none")
                # "none" means that the setting for all devices applies; use it if that gives the former value.
                if _get(kind) != before:
                    _set(kind, before)


def _products(kind: str) -> Any:
    """The torch object that holds the matmul precision of a device type; ``None`` before 2.9, which has one for all."""
    backend = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    products = getattr(backend, "matmul", None)
    return products if hasattr(products, "fp32_precision") else None


def _get(kind: str) -> str:
    products = _products(kind)
    return torch.get_float32_matmul_precision() if products is None else products.fp32_precision


def _set(kind: str, value: str) -> None:
    products = _products(kind)
    if products is None:
        torch.set_float32_matmul_precision(value)
    else:
        products.fp32_precision = value
