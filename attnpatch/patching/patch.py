"""Patch: all swapped forwards of one model, with its policy, its sites and the captures that record it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from attnpatch.errors import PatchError
from attnpatch.hosts.class_methods import changing
from attnpatch.hosts.kernels import wrapping as kernels
from attnpatch.hosts.transformers import masks
from attnpatch.memory.free import FreeMemoryCache
from attnpatch.patching.calls import calls_here
from attnpatch.patching.forward_swap import can_swap, put_in, sites_of, take_out, take_out_all
from attnpatch.patching.recognition import class_name
from attnpatch.patching.registry import is_attention, why
from attnpatch.patching.selection import AUTO, CANDIDATE, RECOGNISED, Chosen, choose
from attnpatch.patching.site import Site
from attnpatch.policy import Policy
from attnpatch.recording.layers import outer_names
from attnpatch.rows.autograd import checkpoints


class Patch:
    """The swapped forwards of one model.

    Args:
        model: The model to patch.
        policy: The rule.
        automatic: True if the environment variable has caused it. Such a patch gives way: a patch that a user asks for
            is put on top of it, and the automatic patch of a larger model absorbs it.
        on_top: True to put this patch on top of any other, for a while.
        first_call: Called with the patch and the model before the model's first call, and again for a copy of it.
        chosen: Which modules are its sites, as in ``apply``.
        reasons: Its sites with their reasons, if they are known. Patches of parts of the model then stay in place.

    Attributes:
        left_alone: Paths of candidates whose first call was not attention.
        is_watched: True if the model's computations on positions before attention are deferred, too.
        policy: The rule in force.
        sites: Every swapped module, in order; the model itself first.
        recorders: The captures that record; each sees the calls of its own threads, the latest one first.
        captures: Number of captures for which this patch was put in place; the last one to end takes it out.
        watched: Checkpoints whose attention a capture has observed; the backward pass recomputes them in the same way.
        is_leaving: True if the last capture has ended and only such checkpoints keep the patch in place.
        was_called: True if the model has been called.

    Raises:
        PatchError: There is nothing to patch, or another patch is in the way.
    """

    site_class: type[Site] = Site

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        automatic: bool = False,
        on_top: bool = False,
        first_call: Callable[[Patch, nn.Module], None] | None = None,
        chosen: Chosen = AUTO,
        reasons: dict[str, str] | None = None,
    ) -> None:
        kernels.watch()
        kernels.find_compiled(model)
        self.policy, self.automatic, self.chosen = policy, automatic, chosen
        self.left_alone: list[str] = []
        self.recorders: tuple[Any, ...] = ()
        self.captures, self.is_leaving = 0, False
        self.watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self.first_call, self.was_called = first_call, False
        self.model_kind = type(model).__name__
        self.sites: list[Site] = []
        if reasons is None:
            reasons, taken = self._chosen(model, on_top)
        else:
            taken = {name for name, _ in served_in(model)}
        self._put_in(model, self._modules(model, reasons, taken if automatic else set()))

    def _chosen(self, model: nn.Module, on_top: bool) -> tuple[dict[str, str], set[str]]:
        """The sites of this patch with their reasons, and the modules that other patches keep."""
        reasons = choose(model, self.chosen)
        taken = {
            name
            for name, module in model.named_modules()
            if not all(site.patch.automatic for site in sites_of(module))
        }
        if self.automatic:
            # No user has asked for this patch of a host's model, so it does not try candidates.
            reasons = {name: reason for name, reason in reasons.items() if reason != CANDIDATE}
        if self.automatic and "" not in taken:
            # This patch serves the parts of the model, too.
            take_out_all(model, lambda patch: patch.automatic)
            reasons = {name: reason for name, reason in reasons.items() if name not in taken}
        elif taken and not on_top:
            first = next(name for name, _ in model.named_modules() if name in taken)
            name = first or type(model).__name__
            if any(patch.recorders for patch in patches_in(model)):
                raise PatchError(
                    f"{name!r} is being captured already, as a part of another model; "
                    "end that capture first, or capture only the outer model"
                )
            raise PatchError(
                f"{name!r} is patched already, as a part of another model; "
                "call attnpatch.remove() on that model first, or patch only the outer one"
            )
        return reasons, taken

    def _modules(
        self, model: nn.Module, reasons: dict[str, str], taken: set[str]
    ) -> dict[str, tuple[nn.Module, str | None]]:
        """The modules to patch, each with the reason that it is attention: the model, makers of masks, attention."""
        modules = dict(model.named_modules())
        self.is_watched = not any(
            _asks_for_modes(module, name in reasons or name in taken) for name, module in modules.items()
        )
        scripted = [name for name in reasons if not can_swap(modules[name])]
        if scripted:
            raise PatchError(
                f"{scripted[0] or class_name(model)!r} is a TorchScript module, which cannot be patched; patch the eager model"
            )
        parts = [name for name, module in modules.items() if masks.makes_masks(module) and can_swap(module)]
        names = [*(name for name in parts if name not in taken), *reasons]
        found = {name: (modules[name], reasons.get(name)) for name in names if name}
        return {"": (model, reasons.get(""))} | found

    def _put_in(self, model: nn.Module, modules: dict[str, tuple[nn.Module, str | None]]) -> None:
        self.around = outer_names(name for name, (_, reason) in modules.items() if reason is not None)
        try:
            for name, (module, reason) in modules.items():
                site = self.site_class(self, name, module, module is model, reason)
                self.sites.append(site)
                put_in(module, site)
        except BaseException:
            self.take_out(model)
            raise

    @property
    def was_used(self) -> bool:
        """True if anything was counted at any of its sites."""
        return any(site.is_used for site in self.sites)

    @property
    def recorder(self) -> Any:
        """The recorder of the capture that sees the running thread's calls, or ``None``."""
        recorders = self.recorders
        for each in reversed(recorders):
            if each.is_mine():
                return each
        for each in recorders:
            each.owner.missed = True
        return None

    def complete(self, model: nn.Module) -> None:
        """Patch attention modules that were added to the model since, unless its sites were chosen."""
        if self.chosen != AUTO:
            return
        new = {
            name: (module, why(module))
            for name, module in model.named_modules()
            if is_attention(module) and can_swap(module) and next(sites_of(module), None) is None
        }
        self._put_in(model, new)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not captured: the capture does not know it, and a capture's state cannot be pickled."""
        return {
            **vars(self),
            "recorders": (),
            "captures": 0,
            "is_leaving": False,
            "watched": None,
            "was_called": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.watched = weakref.WeakSet()

    def __repr__(self) -> str:
        count = sum(site.is_attention for site in self.sites)
        return f"Patch({self.model_kind}, {count} attention modules, {self.policy})"

    def room(self) -> FreeMemoryCache:
        """Free memory, cached for the running call of the model; a new cache if a part is called on its own."""
        if calls_here.patch is self and calls_here.room is not None:
            return calls_here.room
        return FreeMemoryCache()

    def judged(self, site: Site, module: nn.Module, is_attention: bool) -> None:
        """Called when the first call of a candidate has ended; if several threads make it, the first to end decides."""
        with changing:
            if not site.is_candidate:
                return
            if is_attention:
                site.why = RECOGNISED
                return
            self.left_alone.append(site.name or "(model)")
            frame = checkpoints.current()
            if frame is not None:
                site.waits_for = weakref.ref(frame)
            else:
                self.leave(site, module)

    def leave(self, site: Site, module: nn.Module) -> None:
        """Undo the swap of a candidate that is no attention; only its failures stay counted."""
        with changing:
            site.waits_for = None
            site.is_attention, site.why = False, None
            failures = Counter(failed=site.counts["failed"])
            site.forget()
            site.counts += failures
            if not site.is_entry:
                self.sites = [other for other in self.sites if other is not site]
                take_out(module, site)
            self.around = outer_names(other.name for other in self.sites if other.is_attention)

    def take_out(self, model: nn.Module) -> None:
        """Take out every site of this patch."""
        take_out_all(model, lambda patch: patch is self)


def _asks_for_modes(module: nn.Module, is_site: bool) -> bool:
    """True if this torch module gives up its C++ fast path while any TorchFunctionMode is active, and is not a site.

    At a site ``positions.unwatched`` takes the mode away first.
    """
    if isinstance(module, nn.TransformerEncoder):
        return True
    return not is_site and isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


def served_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that patches of parts of a model serve, and the modules inside these parts."""
    parts: list[str] = []
    for name, module in model.named_modules():
        sites = list(sites_of(module))
        if any(site.is_root for site in sites):
            parts.append(name)
        if sites or any(name.startswith(part + ".") for part in parts):
            yield name, module


def patch_of(model: nn.Module) -> Patch | None:
    """The patch put on ``model`` itself."""
    return next((site.patch for site in sites_of(model) if site.is_root), None)


def patches_in(model: nn.Module) -> list[Patch]:
    """Every patch that has a site in ``model``."""
    found = {id(site.patch): site.patch for module in model.modules() for site in sites_of(module)}
    return list(found.values())
