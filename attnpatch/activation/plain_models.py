"""Patches models that no host builds (a paper's code, a plain ``nn.Module``) at their first call.

Nothing tells when such a model is complete, so it is patched when it is first called. The outermost module that is
called is patched: the model, or a part of it that a script calls by itself (the image encoder of SAM, the denoiser
inside a ``LatentDiffusion``, whose own methods call it). Modules inside it are not looked at again; a module that is
added later or kept in a plain list counts as a separate model.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnpatch.errors import PatchError
from attnpatch.hosts.class_methods import changing

if TYPE_CHECKING:
    from torch import nn

    from attnpatch.activation.session import Session
    from attnpatch.patching.patch import Patch


class PlainModels:
    """Looks at each module that is called and that was not seen before.

    Args:
        session: Keeps the patches.

    Attributes:
        seen: How many modules were not patched, by class and reason.
        parts: Classes of torch's own modules without modules inside, which were called on their own.
        patches: Patches that were made here.
        was_called: True if any module was called.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seen: Counter[tuple[str, str]] = Counter()
        self.parts: Counter[str] = Counter()
        self.patches: weakref.WeakSet[Patch] = weakref.WeakSet()
        self.was_called = False

    def told(self, module: nn.Module) -> Callable[[], None] | None:
        """Patch a module that is about to be called, if it holds attention; never raises.

        Returns:
            ``None``, or a function that looks at the result of the first call.
        """
        # This imports torch, which the script has imported by now.
        from attnpatch.activation import first_calls

        try:
            # Another thread may be calling the same module.
            with changing:
                return None if first_calls.is_settled(module) else self._looked_at(module)
        except Exception as error:
            self.session.not_patched(module, error)
            first_calls.settle(module)
            return None

    def _looked_at(self, module: nn.Module) -> Callable[[], None] | None:
        from attnpatch.activation import first_calls

        kind = type(module)
        self.was_called = True
        if not module._modules and kind.__module__.startswith("torch.nn."):
            # All attention modules of torch have modules inside. Some code makes such modules in every call.
            self.parts[kind.__name__] += 1
            first_calls.settle_alone(module)
            return None
        from attnpatch.patching.calls import calls_here
        from attnpatch.patching.class_forward import is_recorded

        if is_recorded():
            return None
        running = calls_here.patch
        if running is not None and not running.automatic:
            return None  # inside a model that the script patched itself
        if not self.session.is_asked_for(kind):
            first_calls.settle_alone(module)
            return None
        if self._is_patched(module):
            return None
        first_calls.settle(module)
        why_not, reasons = self._sites(module)
        if why_not:
            self.seen[_name(module), why_not] += 1
        if not reasons:
            return None
        patch = self.session.patched(module, reasons)
        return functools.partial(self._after_the_first_call, patch, module)

    def _is_patched(self, module: nn.Module) -> bool:
        """True if some patch already serves a module; a patch that the script made itself may be removed later."""
        from attnpatch.activation import first_calls
        from attnpatch.patching.patch import patch_of, patches_in

        patch = patch_of(module)
        theirs = [each for each in patches_in(module) if not each.automatic]
        roots = {patch_of(each) for each in module.modules()}
        if (patch is not None and not patch.automatic) or any(each not in roots for each in theirs):
            for child in module.children():
                first_calls.settle(child)
            return True
        if patch is not None:
            first_calls.settle(module)
        return patch is not None

    def _sites(self, module: nn.Module) -> tuple[str, dict[str, str]]:
        """In words, why a module is not patched; and the attention in it that no patch serves, with reasons."""
        from attnpatch import compat
        from attnpatch.patching.patch import served_in
        from attnpatch.patching.recognition import scripted_attention
        from attnpatch.patching.selection import ASKED_FOR, choose

        if compat.COMPILED_MODULE in module._modules:
            return "compiled by torch.compile, which runs its own attention", {}
        if scripted := scripted_attention(module):
            inside = "" if scripted[0] == "" else f" in {', '.join(scripted[:3])}"
            why_not = f"its attention{inside} is TorchScript, which cannot be patched; use the eager model"
            self.session.lines.say(f"attnpatch: {_name(module)} is not patched: {why_not}")
            if scripted[0] == "":
                return why_not, {}
        try:
            reasons = choose(module, self.session.chosen(module))
        except PatchError as error:
            if self.session.is_named(type(module)):
                return "", {"": ASKED_FOR}
            if scripted:
                return why_not, {}
            given = self.session.settings.sites is not None
            return (
                str(error) if given else "no class name says attention, no code names a softmax and a product"
            ), {}
        served = {name for name, _ in served_in(module)}
        return "", {name: reason for name, reason in reasons.items() if name not in served}

    def _after_the_first_call(self, patch: Patch, module: nn.Module) -> None:
        """Take a patch out if none of its candidates was attention; never raises."""
        try:
            if not any(site.is_attention for site in patch.sites):
                patch.take_out(module)
                self.session.forget(patch)
                tried = ", ".join(patch.left_alone[:3]) + (", ..." if len(patch.left_alone) > 3 else "")
                self.seen[_name(module), f"tried in the first call, and no attention: {tried}"] += 1
            self.session.announce()
        except Exception as error:
            self.session.lines.warn(f"{type(module).__name__} is patched in part", error)


def _name(module: Any) -> str:
    from attnpatch.patching.recognition import class_name

    return class_name(module)
