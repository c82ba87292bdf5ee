"""Whether a deferred tensor has an autograd history, found without computing the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnpatch import compat

if TYPE_CHECKING:
    from attnpatch.rows.deferred.tensor import DeferredTensor


def has_history(tensor: DeferredTensor) -> bool:
    """True if gradients flow to a deferred tensor."""
    with compat.DisableTorchFunctionSubclass():
        return tensor.requires_grad


def is_inference(tensor: DeferredTensor | None) -> bool:
    if tensor is None:
        return True
    with compat.DisableTorchFunctionSubclass():
        return tensor.is_inference()
