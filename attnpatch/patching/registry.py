"""What counts as an attention module."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from attnpatch.errors import PatchError

# Hosts name them so without exception; a wrapper around an attention module also matches, which costs one check.
_NAMES = re.compile(r"Attention|Attn")
# torch's encoder layer calls its attention through one C++ function unless something watches the layer itself.
_CARRIERS = (nn.TransformerEncoderLayer,)

_registered: list[type[nn.Module] | Callable[[nn.Module], Any]] = []


def register(kind: Any) -> Any:
    """Count a module class, or every module a predicate accepts, as attention; usable as a decorator.

    Args:
        kind: A subclass of ``nn.Module``, or a function from a module to a truth value.

    Returns:
        ``kind``, unchanged.

    Raises:
        PatchError: It is neither.
    """
    if isinstance(kind, nn.Module) or not callable(kind):
        raise PatchError(f"register() takes a module class or a predicate, not {kind!r}; give type(module)")
    if isinstance(kind, type) and not issubclass(kind, nn.Module):
        raise PatchError(f"register() takes a subclass of torch.nn.Module, not {kind.__name__}")
    if kind not in _registered:
        _registered.append(kind)
    return kind


def is_registered(module: nn.Module) -> bool:
    """Whether ``register`` was told of the module."""
    return any(isinstance(module, kind) if isinstance(kind, type) else kind(module) for kind in _registered)


def why(module: nn.Module) -> str | None:
    """Why ``module`` is swapped without having been looked at; ``None``: nothing says so."""
    # The processors of diffusers' image prompts are modules that are called without a forward: their owner's runs.
    if type(module).forward is nn.Module.forward:
        return None
    if _NAMES.search(type(module).__name__) or isinstance(module, _CARRIERS):
        return "name"
    return "registered" if is_registered(module) else None


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is swapped without having been looked at."""
    return why(module) is not None
