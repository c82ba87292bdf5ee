"""``by_rows``: a free function that computes attention, run by rows as a module would be."""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnpatch.errors import PatchError
from attnpatch.patching.patch import Patch
from attnpatch.patching.recognition import class_name
from attnpatch.patching.selection import ASKED_FOR
from attnpatch.policy import Policy


class FunctionModule(nn.Module):
    """A function as a module, so that a patch can serve its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class ByRows:
    """A function whose attention runs by rows when memory is short; called, bound and pickled as the function is.

    Args:
        function: The function.
        policy: Fields of ``Policy``.

    Attributes:
        module: The patched module that stands for the function; ``attnpatch.report`` takes it.
    """

    def __init__(self, function: Callable[..., Any], policy: dict[str, Any]) -> None:
        self._policy = policy
        self.module = FunctionModule(function)
        Patch(self.module, Policy.of(policy), reasons={"": ASKED_FOR}).model_kind = getattr(
            function, "__qualname__", type(function).__name__
        )
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> Any:
        """Pickle it by name if the function's name leads here, as the name of a decorated function does."""
        function = self.module.function
        name = getattr(function, "__qualname__", "")
        try:
            found = operator.attrgetter(name)(sys.modules[function.__module__])
        except (AttributeError, KeyError):
            found = None
        return name if found is self else (ByRows, (function, self._policy))

    def __repr__(self) -> str:
        return f"by_rows({self.module.function!r})"


def by_rows(function: Any = None, /, **policy: Any) -> Any:
    """Run a function that computes attention by rows when memory is short; usable as a decorator.

    For attention that is in no module of its own, such as ``def attention(q, k, v)`` in a file of helpers. The function's
    own code runs on fewer query rows at a time, and its result is the same.

    Args:
        function: The function. Without it a decorator is returned: ``@attnpatch.by_rows(min_free="8GB")``.
        **policy: Fields of ``Policy``, as ``apply`` takes them.

    Returns:
        The wrapped function. ``attnpatch.report`` takes it.

    Raises:
        PolicyError: A field is unknown or its value is invalid.
        PatchError: ``function`` is a module (``apply`` patches those) or cannot be called.
    """
    Policy.of(policy)
    if function is None:
        return functools.partial(by_rows, **policy)
    if isinstance(function, (nn.Module, type)) or not callable(function):
        given = f"a {class_name(function)}" if isinstance(function, nn.Module) else f"{function!r:.80}"
        raise PatchError(f"by_rows() takes a function, not {given}; attnpatch.apply() patches a module")
    if isinstance(function, torch.jit.ScriptFunction):
        raise PatchError(f"{function.name!r} is TorchScript, which runs as it is; give the eager function")
    return ByRows(function, policy)
