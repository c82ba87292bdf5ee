"""Which modules of a model are its attention sites, and why each of them is."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from attnpatch.errors import PatchError
from attnpatch.patching.recognise import is_candidate
from attnpatch.patching.registry import is_registered, why

Sites = str | Sequence[str]
CANDIDATE = "candidate"
RECOGNISED = "recognised: softmax of a product"


def checked(sites: Any) -> Sites:
    """What ``sites=`` may be.

    Raises:
        PatchError: It is something else.
    """
    if isinstance(sites, str) and sites in ("auto", "registered"):
        return sites
    if isinstance(sites, (list, tuple)) and sites and all(isinstance(name, str) for name in sites):
        return tuple(sites)
    raise PatchError(
        f"sites={sites!r} is not accepted; give 'auto', 'registered' or a list of module paths such as ['encoder.mixer']"
    )


def choose(model: nn.Module, sites: Sites) -> dict[str, str]:
    """Paths of attention modules, and why each is one; ``CANDIDATE`` where its first call has to tell.

    Raises:
        PatchError: A path names no module, or there is nothing.
    """
    modules = dict(model.named_modules())
    if sites == "registered":
        found = {name: "registered" for name, module in modules.items() if is_registered(module)}
    elif sites == "auto":
        known = {name: reason for name, module in modules.items() if (reason := why(module))}
        found = {**known, **_candidates(modules, known)}
    else:
        found = {_path(name, model, modules): "asked for" for name in sites}
    if not found:
        raise PatchError(
            f"{type(model).__name__} has no attention module that attnpatch recognises; name its class with "
            "attnpatch.register(MyAttention), or the modules with attnpatch.apply(model, sites=[...])"
        )
    order = list(modules)
    return {name: found[name] for name in sorted(found, key=order.index)}


def _candidates(modules: dict[str, nn.Module], known: dict[str, str]) -> dict[str, str]:
    """Modules around and inside known sites are none: their attention is found already."""

    def is_apart(name: str) -> bool:
        return not any(_is_within(name, other) or _is_within(other, name) for other in known)

    return {name: CANDIDATE for name, module in modules.items() if is_candidate(module) and is_apart(name)}


def _is_within(name: str, outer: str) -> bool:
    return name == outer or not outer or name.startswith(outer + ".")


def _path(name: str, model: nn.Module, modules: dict[str, nn.Module]) -> str:
    if name in modules:
        return name
    near = difflib.get_close_matches(name, modules, n=3) or [n for n in modules if n][:3]
    raise PatchError(
        f"sites: {type(model).__name__} has no module {name!r}; near it: {', '.join(map(repr, near)) or 'none'} "
        "(model.named_modules() lists all)"
    )
