"""Patches of a model, of the components of a pipeline, or of a free function (``by_rows``)."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnpatch.errors import AttnpatchWarning, PatchError
from attnpatch.hosts import features
from attnpatch.hosts.diffusers.components import parts_of
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.patching.recognition import class_name, scripted_attention
from attnpatch.patching.registry import is_attention
from attnpatch.patching.selection import ASKED_FOR, AUTO, Chosen, choose
from attnpatch.policy import Policy
from attnpatch.releases.tested import warn_of_old_ones


def put_in_place(
    model: Any,
    rule: Policy,
    undo: contextlib.ExitStack,
    chosen: Chosen | None = None,
    replaces: bool = False,
) -> list[Patch]:
    """The patches of a model or of a pipeline's components, made where there are none; ``undo`` takes out the new ones.

    If a patch has other sites than are asked for, it is replaced (``replaces``) or a PatchError is raised.
    """
    warn_of_old_ones()
    features.warn_of_missing_names()
    parts = parts_in(model)
    if "" not in parts:
        if chosen is not None and (isinstance(chosen.sites, tuple) or chosen.layers is not None):
            raise PatchError(f"{chosen} names modules of one model; give a component, such as pipe.unet")
        attending = {
            name: part
            for name, part in parts.items()
            if any(is_attention(module) for module in part.modules())
        }
        if not attending:
            raise PatchError(
                f"no component of this {type(model).__name__} has an attention module that attnpatch recognises "
                f"({', '.join(parts)}); name its class with attnpatch.register(MyAttention)"
            )
        parts = attending
    patches = []
    for name, part in parts.items():
        patch = left = patch_of(part)
        if patch is not None and patch.is_leaving:
            patch.take_out(part)
            patch = None
        if patch is not None and chosen not in (None, patch.chosen):
            if not replaces:
                raise PatchError(
                    f"this model is patched with {patch.chosen}; leave sites and layers out, or attnpatch.remove() it first"
                )
            choose(part, chosen)  # before the old patch goes
            patch.take_out(part)
            patch = None
        if patch is None:
            try:
                patch = Patch(part, rule, chosen=chosen or AUTO)
            except PatchError as error:
                raise PatchError(f"{name}: {error}" if name else str(error)) from error
            if left is not None:
                patch.watched |= left.watched
            undo.callback(patch.take_out, part)
            _warn_of_scripted(part)
        patches.append(patch)
    return patches


def _warn_of_scripted(model: nn.Module) -> None:
    """Say which attention of a model that is patched stays as it is."""
    scripted = scripted_attention(model)
    if scripted:
        more = f", ... {len(scripted)} in all" if len(scripted) > 3 else ""
        warnings.warn(
            f"the attention of {type(model).__name__} in {', '.join(scripted[:3])}{more} is TorchScript, which cannot be "
            "patched; use the eager model",
            AttnpatchWarning,
            stacklevel=4,
        )


def parts_in(model: Any) -> dict[str, nn.Module]:
    """The components of a pipeline by name; for a model, itself under the name ``""``."""
    if isinstance(model, nn.Module):
        return {"": model}
    parts = parts_of(model)
    if parts is None:
        raise PatchError(
            f"expected a torch.nn.Module or a pipeline whose components are modules, not {type(model).__name__}"
        )
    return parts


def not_patched(model: Any) -> PatchError:
    return PatchError(f"this {type(model).__name__} is not patched; call attnpatch.apply() on it first")


# ------------------------------------------------------------------------------------------------------- functions


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
