"""Casts the arguments of an operator as autocast does for operators that it runs in its narrow dtype."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.graph.nodes import map_structure


def narrow_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes attention on a device; ``None`` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def cast(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``value`` with its tensors cast as autocast does: all but float64, integers and tensors on other devices."""

    def change(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or item.device.type != device.type or item.dtype == dtype:
            return item
        return item.to(dtype) if item.dtype.is_floating_point and item.dtype != torch.float64 else item

    return map_structure(value, change)
