"""All the swaps of one model: its policy, its counters, and what is asked once per call of the model."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from attnpatch.errors import PatchError
from attnpatch.hosts.class_methods import changing
from attnpatch.hosts.transformers import masks
from attnpatch.memory import FreeMemoryCache
from attnpatch.patching.calls import calls_here
from attnpatch.patching.forward_swap import can_swap, put_in, sites_of, take_out
from attnpatch.patching.registry import is_attention, why
from attnpatch.patching.selection import CANDIDATE, RECOGNISED, Sites, choose
from attnpatch.patching.site import Site
from attnpatch.policy import Policy
from attnpatch.rows.autograd import checkpoints


class Patch:
    """The swapped forwards of one model.

    Args:
        model: What to patch.
        policy: The rule.
        automatic: Put in by the environment variable: nobody asked for this model, so it gives way to what somebody
            asks for, which is laid on top of it, and goes into a larger model with the automatic patch of that one.
        on_top: Lie on any patch that is there, for a while.
        first_call: Called with the patch and the model before the model's first call, and again for a copy of it.
        chosen: Which modules are its sites, as ``apply`` takes it.

    Attributes:
        left_alone: Paths of candidates whose first call was none of attention.
        is_watched: Whether what the model makes of positions before its attention goes by rows too.
        policy: The rule in force.
        sites: Every swapped module, in order; the model itself first.
        recorders: Who captures block maps, each of its own threads' calls; the latest has the word.
        captures: How many captures have put it in place, and take it out together.
        watched: Checkpoints in which a capture has looked on: they run again in the backward pass, the way they went.
        is_leaving: Whether the last capture has ended, and only such checkpoints keep the patch.
        was_called: Whether the model has been called.

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
        chosen: Sites = "auto",
    ) -> None:
        self.policy, self.automatic, self.chosen = policy, automatic, chosen
        self.left_alone: list[str] = []
        self.recorders: tuple[Any, ...] = ()
        self.captures, self.is_leaving = 0, False
        self.watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self.first_call, self.was_called = first_call, False
        self.model_kind = type(model).__name__
        self.sites: list[Site] = []
        reasons = choose(model, chosen)
        self.is_watched = not any(
            _asks_for_modes(module, name in reasons) for name, module in model.named_modules()
        )
        if automatic:
            # Nobody asked: nothing is tried out on a model of theirs.
            reasons = {name: reason for name, reason in reasons.items() if reason != CANDIDATE}
        taken = [name for name, module in model.named_modules() if not all(_gives_way(module))]
        if automatic and "" not in taken:
            self._absorb(model)
            reasons = {name: reason for name, reason in reasons.items() if name not in taken}
        elif taken and not on_top:
            raise PatchError(
                f"{taken[0] or type(model).__name__!r} is patched already, as a part of another model; "
                "call attnpatch.remove() on that model first, or patch only the outer one"
            )
        modules = dict(model.named_modules())
        scripted = [name for name in reasons if not can_swap(modules[name])]
        if scripted:
            raise PatchError(
                f"{scripted[0]!r} is a TorchScript module, which cannot be patched; patch the eager model"
            )
        parts = [name for name, module in modules.items() if masks.makes_masks(module) and can_swap(module)]
        if automatic:
            parts = [name for name in parts if name not in taken]
        self._put_in(
            model,
            {"": (model, reasons.pop("", None))}
            | {name: (modules[name], reasons.get(name)) for name in [*parts, *reasons] if name},
        )

    def _put_in(self, model: nn.Module, modules: dict[str, tuple[nn.Module, str | None]]) -> None:
        for name, (module, reason) in modules.items():
            site = self.site_class(self, name, module, module is model, reason)
            self.sites.append(site)
            put_in(module, site)

    def _absorb(self, model: nn.Module) -> None:
        """Take the automatic patches of a model's parts out: this one serves them all."""
        for module in model.modules():
            for site in list(sites_of(module)):
                if site.patch.automatic:
                    take_out(module, site)

    @property
    def was_used(self) -> bool:
        """Whether attention ran in the model or a part of it."""
        return any(site.is_used for site in self.sites)

    @property
    def recorder(self) -> Any:
        """Who captures the running thread's calls, or ``None``."""
        return next((each for each in reversed(self.recorders) if each.is_mine()), None)

    def complete(self, model: nn.Module) -> None:
        """Patch what was added to the model since."""
        new = {
            name: (module, why(module))
            for name, module in model.named_modules()
            if is_attention(module) and can_swap(module) and next(sites_of(module), None) is None
        }
        self._put_in(model, new)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not captured: nobody would look at it, and what a capture holds cannot be pickled."""
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
        """What is known of free memory; a part of a model that is called on its own asks anew."""
        if calls_here.patch is self and calls_here.room is not None:
            return calls_here.room
        return FreeMemoryCache()

    def judged(self, site: Site, module: nn.Module, is_attention: bool) -> None:
        """The first call of a candidate has ended; where threads make it at once, the first that ends decides."""
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
        """Leave what is no attention as if it had not been looked at."""
        with changing:
            site.waits_for = None
            site.is_attention, site.why = False, None
            failures = Counter(failed=site.counts["failed"])
            site.forget()
            site.counts += failures
            if not site.is_entry:
                self.sites = [other for other in self.sites if other is not site]
                take_out(module, site)

    def take_out(self, model: nn.Module) -> None:
        """Take every site of this patch out."""
        for module in model.modules():
            for site in list(sites_of(module)):
                if site.patch is self:
                    take_out(module, site)


def _asks_for_modes(module: nn.Module, is_site: bool) -> bool:
    """Whether a module of torch's own takes another way while a mode is there, and is no site, where none is."""
    if isinstance(module, nn.TransformerEncoder):
        return True
    return not is_site and isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


def _gives_way(module: nn.Module) -> list[bool]:
    return [site.patch.automatic for site in sites_of(module)]


def patch_of(model: nn.Module) -> Patch | None:
    """The patch put on ``model`` itself."""
    return next((site.patch for site in sites_of(model) if site.is_root), None)


def patches_in(model: nn.Module) -> list[Patch]:
    """Every patch that has a site in ``model``."""
    found = {id(site.patch): site.patch for module in model.modules() for site in sites_of(module)}
    return list(found.values())
