"""Whether gradients go to a deferred tensor, asked without asking what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from attnpatch.rows.deferred.tensor import DeferredTensor


def has_history(tensor: DeferredTensor) -> bool:
    """Whether gradients go to a deferred tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad


def is_inference(tensor: DeferredTensor | None) -> bool:
    if tensor is None:
        return True
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_inference()
