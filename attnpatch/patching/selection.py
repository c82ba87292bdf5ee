"""Chooses a model's attention modules, each with the reason."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from attnpatch.errors import CaptureError, PatchError
from attnpatch.patching.code_names import names_of_class
from attnpatch.patching.recognition import candidates, class_name, scripted_attention
from attnpatch.patching.registry import is_registered, why
from attnpatch.recording.layers import chosen_sites, layer_numbers, pattern_of

Sites = str | Sequence[str]
CANDIDATE = "candidate"
RECOGNISED = "recognised: softmax of a product"
ASKED_FOR = "asked for"
# How many paths or patterns an error message lists.
_LISTED = 8


class Chosen(NamedTuple):
    """Which modules are sites, as ``apply`` takes it.

    Attributes:
        sites: ``"auto"``, ``"registered"``, or paths and patterns.
        layers: Layer numbers, or ``None`` for all.
    """

    sites: str | tuple[str, ...] = "auto"
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        given = [f"sites={list(self.sites) if isinstance(self.sites, tuple) else self.sites!r}"]
        return ", ".join(given + ([] if self.layers is None else [f"layers={list(self.layers)}"]))


AUTO = Chosen()


def checked(sites: Any, layers: Any = None) -> Chosen | None:
    """The values of ``sites=`` and ``layers=``, checked; ``None`` if neither is given.

    Raises:
        PatchError: ``sites`` is neither a path or pattern, a list of those, ``"auto"`` nor ``"registered"``; or
            ``layers`` is not what ``layer_numbers`` accepts.
    """
    if sites is None and layers is None:
        return None
    if isinstance(sites, str) and sites and sites not in ("auto", "registered"):
        sites = (sites,)
    if isinstance(sites, (list, tuple)) and sites and all(isinstance(name, str) for name in sites):
        sites = tuple(sites)
    elif not (sites is None or (isinstance(sites, str) and sites in ("auto", "registered"))):
        raise PatchError(
            f"sites={sites!r} is not accepted; give 'auto', 'registered', a pattern such as 'model.layers.*.self_attn', or a "
            "list of module paths such as ['encoder.mixer']"
        )
    try:
        return Chosen(sites or "auto", layer_numbers(layers))
    except ValueError as error:
        raise PatchError(str(error)) from None


def choose(model: nn.Module, chosen: Chosen = AUTO) -> dict[str, str]:
    """Paths of attention modules, each with its reason; ``CANDIDATE`` if its first call has to tell.

    Raises:
        PatchError: A path or pattern matches no module, there is no such layer, or nothing was found.
    """
    modules = dict(model.named_modules())
    sites = chosen.sites
    if sites == "registered":
        found = {name: "registered" for name, module in modules.items() if is_registered(module)}
    elif sites == "auto":
        found = _automatic(model, modules)
    else:
        known = _automatic(model, modules) if any(map(_is_pattern, sites)) else {}
        found = {name: reason for site in sites for name, reason in _matching(site, model, modules, known)}
    if not found:
        if scripted := scripted_attention(model):
            where = f"in {', '.join(scripted[:3])} " if scripted[0] else ""
            raise PatchError(
                f"the attention of {class_name(model)} {where}is TorchScript, which cannot be patched; use the eager model"
            )
        raise PatchError(
            f"{class_name(model)} has no attention module that attnpatch recognises; name its class with "
            "attnpatch.register(MyAttention), or the modules with attnpatch.apply(model, sites=[...])"
        )
    if chosen.layers is not None:
        found = _of_layers(found, chosen.layers)
    order = {name: i for i, name in enumerate(modules)}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def matching(model: nn.Module, chosen: Chosen) -> Chosen:
    """The paths and patterns of ``chosen`` that match something in a model; all of them if none does."""

    def is_there(site: str) -> bool:
        try:
            return bool(choose(model, Chosen((site,))))
        except PatchError:
            return False

    if not isinstance(chosen.sites, tuple):
        return chosen
    return chosen._replace(sites=tuple(filter(is_there, chosen.sites)) or chosen.sites)


def _of_layers(found: dict[str, str], layers: tuple[int, ...]) -> dict[str, str]:
    try:
        kept = chosen_sites(pattern_of(list(found)), list(found), layers, None)
    except CaptureError as error:
        raise PatchError(str(error)) from None
    return {name: reason for name, reason in found.items() if name in kept}


def _is_pattern(site: str) -> bool:
    return any(sign in site for sign in "*?[")


def _matching(
    site: str, model: nn.Module, modules: dict[str, nn.Module], known: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """The modules that a path or pattern stands for, each with its reason.

    A pattern stands for the attention modules among those that match. If there are none, it stands for the modules that
    it matches part by part, so that ``blocks.*`` does not stand for everything inside the blocks.
    """
    if not _is_pattern(site):
        yield _path(site, model, modules), ASKED_FOR
        return
    found = {name: reason for name, reason in known.items() if fnmatch.fnmatchcase(name, site)}
    if not found:
        found = {name: ASKED_FOR for name in modules if name and _matches_by_parts(name, site)}
    if not found:
        there = sorted({group for group, _ in pattern_of(list(known)).values()})
        listed = ", ".join(name or "the model itself" for name in there[:_LISTED])
        listed += f", ... {len(there)} in all" if len(there) > _LISTED else ""
        raise PatchError(
            f"sites: no module of {type(model).__name__} matches {site!r}; its attention modules are: {listed or 'none'}"
        )
    yield from found.items()


def _matches_by_parts(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _automatic(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Modules known by name or ``register``, and candidates outside of them. A candidate with a known module inside
    must name that module's attribute in its code.
    """
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

    A parent whose forward uses that name may read the module's weights and compute the attention itself. Then the
    module's own forward is never called, and the parent must be a candidate in spite of it.
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
