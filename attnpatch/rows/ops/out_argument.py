"""``out=``: writes the result of a call with deferred arguments to a tensor that the host gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import deferred_in, tensors_in
from attnpatch.rows.deferred.history import has_history
from attnpatch.rows.deferred.tensor import DeferredTensor, before_write, goes_on_as, is_pending
from attnpatch.rows.matmul import products
from attnpatch.rows.op_table import Handler, lookup


def written(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], apply: Handler) -> Any:
    """The call, written to its ``out``; ``NotImplemented`` if the native call on computed tensors must do it.

    If ``out`` is deferred (``torch.empty`` by rows), it becomes the deferred result. If ``out`` is real memory, a real
    result (computed by rows, without keys) is copied to it.

    Args:
        name, func, args, kwargs: The call.
        apply: Answers the call without its ``out``.
    """
    out = kwargs["out"]
    rest = {key: value for key, value in kwargs.items() if key != "out"}
    if not isinstance(out, torch.Tensor):
        return NotImplemented
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(args, kwargs)):
        return NotImplemented  # torch raises an error
    if is_pending(out) and (out.handle.is_shared() or has_history(out)):
        return NotImplemented  # under no_grad the values of ``out`` change and its history must not
    result = _result(name, func, args, rest, out, apply)
    if not isinstance(result, torch.Tensor) or result.shape != out.shape or result.dtype != out.dtype:
        return NotImplemented
    if is_pending(out):
        return _became(out, result)
    if isinstance(result, DeferredTensor):
        return NotImplemented
    before_write(out)
    return out.copy_(result)


def _result(
    name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: torch.Tensor, apply: Handler
) -> Any:
    if deferred_in(args, kwargs):
        return NotImplemented if lookup(name).handler is None else apply(name, func, args, kwargs)
    if name in products.NAMES and isinstance(out, DeferredTensor):
        return products.defer(name, func, args, kwargs, out.handle.call)
    return NotImplemented


def _became(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Let ``out``, a deferred tensor that shares memory with no other, stand for the result."""
    assert isinstance(out, DeferredTensor)
    if is_pending(result):
        assert isinstance(result, DeferredTensor)
        return goes_on_as(out, result)
    out.handle.is_written(result)
    return result
