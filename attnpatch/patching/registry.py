"""Which modules count as attention without being looked at: by their class's name, or by ``register``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnpatch.errors import PatchError

# Hosts name every attention class like this. A wrapper around an attention module matches, too; that costs one check.
_NAMES = re.compile(r"Attention|Attn")
# torch's encoder layer calls its attention through one C++ function unless something watches the layer itself.
_CARRIERS = (nn.TransformerEncoderLayer,)

_registered: list[type[nn.Module] | Callable[[nn.Module], Any]] = []


def register(kind: Any) -> Any:
    """Count a module class, or every module a predicate accepts, as attention; usable as a decorator.

    Args:
        kind: A subclass of ``nn.Module``, or a predicate that takes a module.

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
    """True if a module is accepted by anything that was registered."""
    return any(isinstance(module, kind) if isinstance(kind, type) else kind(module) for kind in _registered)


def why(module: nn.Module) -> str | None:
    """``"name"`` or ``"registered"`` if ``module`` counts as attention without being looked at; otherwise ``None``."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # cannot be patched, and its class has no forward to ask for
    # diffusers' processors for image prompts are modules without a forward: their owner's forward runs.
    if type(module).forward is nn.Module.forward:
        return None
    if _NAMES.search(type(module).__name__) or isinstance(module, _CARRIERS):
        return "name"
    return "registered" if is_registered(module) else None


def is_attention(module: nn.Module) -> bool:
    """True if ``module`` counts as attention by its name or by ``register``."""
    return why(module) is not None
