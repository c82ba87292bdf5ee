"""Whether gradients go to a deferred tensor, asked without asking what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from attnpatch.rows.deferred.tensor import DeferredRows


def has_history(tensor: DeferredRows) -> bool:
    """Whether gradients go to a deferred tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad


def is_inference(tensor: DeferredRows | None) -> bool:
    if tensor is None:
        return True
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_inference()
