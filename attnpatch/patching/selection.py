"""Chooses which modules of a model are its attention sites, each with the reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from attnpatch.errors import PatchError
from attnpatch.patching.code_names import names_of_class
from attnpatch.patching.recognition import candidates
from attnpatch.patching.registry import is_registered, why

Sites = str | Sequence[str]
CANDIDATE = "candidate"
RECOGNISED = "recognised: softmax of a product"


def checked(sites: Any) -> Sites:
    """The value of ``sites=``, checked.

    Raises:
        PatchError: It is neither ``"auto"``, ``"registered"`` nor a list of paths.
    """
    if isinstance(sites, str) and sites in ("auto", "registered"):
        return sites
    if isinstance(sites, (list, tuple)) and sites and all(isinstance(name, str) for name in sites):
        return tuple(sites)
    raise PatchError(
        f"sites={sites!r} is not accepted; give 'auto', 'registered' or a list of module paths such as ['encoder.mixer']"
    )


def choose(model: nn.Module, sites: Sites) -> dict[str, str]:
    """Paths of attention modules, each with its reason; ``CANDIDATE`` if its first call has to tell.

    Raises:
        PatchError: A path names no module, or nothing was found.
    """
    modules = dict(model.named_modules())
    if sites == "registered":
        found = {name: "registered" for name, module in modules.items() if is_registered(module)}
    elif sites == "auto":
        found = _automatic(model, modules)
    else:
        found = {_path(name, model, modules): "asked for" for name in sites}
    if not found:
        raise PatchError(
            f"{type(model).__name__} has no attention module that attnpatch recognises; name its class with "
            "attnpatch.register(MyAttention), or the modules with attnpatch.apply(model, sites=[...])"
        )
    order = list(modules)
    return {name: found[name] for name in sorted(found, key=order.index)}


def _automatic(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Modules known by name or ``register``, and candidates that are not inside one of those (it would serve them)."""
    found = {name: reason for name, module in modules.items() if (reason := why(module))}
    known = frozenset(found)
    guesses = candidates(model)
    for name, module in modules.items():
        if module in guesses and known.isdisjoint(_around(name)):
            inside = [other for other in known if name in _around(other)]
            if not inside or any(
                _held_as(other, modules) in names_of_class(type(module)) for other in inside
            ):
                found[name] = CANDIDATE
    return found


def _held_as(name: str, modules: dict[str, nn.Module]) -> str:
    """The name of the attribute that holds a module, directly or in a container.

    A parent whose forward uses that name may read the module's weights and compute the attention itself. The module's
    own forward is then never called, so it must not keep the parent from being a candidate.
    """
    parent, _, last = name.rpartition(".")
    while parent and isinstance(modules.get(parent), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        parent, _, last = parent.rpartition(".")
    return last


def _around(name: str) -> Iterator[str]:
    """A module's path, and the paths of the modules that contain it."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _path(name: str, model: nn.Module, modules: dict[str, nn.Module]) -> str:
    if name in modules:
        return name
    near = difflib.get_close_matches(name, modules, n=3) or [n for n in modules if n][:3]
    raise PatchError(
        f"sites: {type(model).__name__} has no module {name!r}; near it: {', '.join(map(repr, near)) or 'none'} "
        "(model.named_modules() lists all)"
    )
