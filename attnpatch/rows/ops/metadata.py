"""Handlers of functions that read a deferred tensor's shape, dtype or device, and never its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.rows.arguments import deferred_in
from attnpatch.rows.deferred.tensor import DeferredTensor
from attnpatch.rows.graph.nodes import map_structure
from attnpatch.rows.op_table import op

# Their result is small, or has a size that the caller gives.
_ASKING = (
    "new_tensor new_empty_strided new result_type is_pinned is_shared is_conj is_neg is_coalesced is_distributed "
    "is_same_size has_names dim_order can_cast _is_zerotensor is_set_to"
)
_RANDOM = "rand_like randn_like randint_like"
# Default values of options: given these, an option changes nothing.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "layout": (None, torch.strided),
    "requires_grad": (False, None),
    "pin_memory": (False, None),
    "memory_format": (
        None,
        torch.preserve_format,
        torch.contiguous_format,
        torch.legacy_contiguous_format,
    ),
}


def _stand_in(value: Any) -> Any:
    """A tensor with a deferred tensor's shape, dtype and device, and memory for one element; other values unchanged."""
    if not isinstance(value, DeferredTensor):
        return value
    node = value.handle.node
    return torch.empty((), dtype=node.dtype, device=node.device).expand(node.shape)


@op(*_ASKING.split())
def asked(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The call on stand-ins: it reads no values."""
    if len(deferred_in(args[1:], kwargs)) and name in ("new_tensor", "new"):
        return NotImplemented  # the new tensor gets values of a deferred one, so they are needed
    return func(*map_structure(args, _stand_in), **map_structure(kwargs, _stand_in))


def are_defaults(kwargs: dict[str, Any], device: torch.device) -> bool:
    """True if the options of a tensor factory ask for a plain tensor on ``device``."""
    for key, value in kwargs.items():
        if key in ("dtype", "size", "fill_value"):
            continue
        if key == "device":
            if value is not None and torch.empty((), device=value).device != device:
                return False
        elif value not in _DEFAULTS.get(key, ()):
            return False
    return True


@op(*_RANDOM.split())
def random(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Random numbers with the shape of the scores: drawn for the whole matrix, without computing the scores.

    They are drawn in memory order, so this serves only calls that name a contiguous ``memory_format``.
    """
    source = args[0]
    if not isinstance(source, DeferredTensor) or kwargs.get("memory_format") not in (
        torch.contiguous_format,
        torch.legacy_contiguous_format,
    ):
        return NotImplemented
    source.handle.call.counters.materialised(name)
    return asked(name, func, args, kwargs)
