"""An active process: patches models as they are built, and reports on them at exit."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

from attnpatch.activation.kinds import added_up
from attnpatch.activation.plain_models import PlainModels
from attnpatch.activation.settings import Settings
from attnpatch.activation.stderr import NOTHING_SEEN, Lines, is_first_process, is_users_script
from attnpatch.errors import PatchError
from attnpatch.hosts.building import when_built, when_imported
from attnpatch.hosts.off import missing

if TYPE_CHECKING:
    from attnpatch.activation.recording import AutomaticRecorder
    from attnpatch.patching.patch import Patch

_session: Session | None = None


def begin(settings: Settings) -> None:
    """Patch every model that this process builds from now on; a second call does nothing."""
    global _session
    if _session is None:
        _session = Session(settings)
        if settings.policy.replace_kernels:
            from attnpatch.standins.finder import install

            install(settings.policy, _session.lines.say)
        when_built(_session.built, functools.partial(_session.lines.warn, "no model is patched"))
        when_imported("torch", _session.tell_of_first_calls)
        atexit.register(_session.end)


def first_call(patch: Patch, model: Any) -> None:
    """Called by an automatic patch before its model's first call.

    A copied patch calls it too. A patch unpickled in a process that is not active is only
    completed.
    """
    if _session is None:
        patch.complete(model)
    else:
        _session.called(patch, model)


class Session:
    """All patches of a process, for the report at exit.

    A patch does not reference its model, so the session keeps no model alive.

    Attributes:
        settings: What the environment asks for.
        patches: Patches of models that still exist, by id.
        gone: The patches of freed models, added up by kind of model, each with the number of these models.
        counts: Other events to report at exit: models without attention, not patched, calls not captured.
        plain: Looks at modules that no host builds.
        lines: Prints.
        is_of_script: Whether the process runs a file of the user's.
        is_off: Whether torch lacks a name that attnpatch needs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.patches: dict[int, Patch] = {}
        self.gone: dict[Any, tuple[Patch, int]] = {}
        self.counts: Counter[str] = Counter()
        self.never_called: Counter[str] = Counter()
        self.plain, self.lines = PlainModels(self), Lines(settings.quiet)
        self.is_of_script = self.is_off = False
        self._folder: Any = None
        self._waiting: list[AutomaticRecorder] = []

    @property
    def written(self) -> int:
        """Number of sequences captured."""
        return 0 if self._folder is None else self._folder.written

    def tell_of_first_calls(self, _: Any) -> None:
        """Look at every module at its first call; this is called when torch has been imported."""
        # Python forgets the name of the script's file before it runs the code that ends a session.
        self.is_of_script = is_users_script()
        error = missing()
        self.is_off = error is not None
        if error is not None:
            self.lines.warn("models run as they are", error)
            return
        try:
            from attnpatch.activation.first_calls import install

            if not install(self.plain.told):
                self.lines.say(
                    "attnpatch: this torch tells of no first call: only models of hosts are patched"
                )
        except Exception as error:
            self.lines.warn("only models of hosts are patched", error)

    def is_asked_for(self, kind: type[Any]) -> bool:
        """True if models of a class are patched: models of any class, unless ATTNPATCH_MODULES names some classes."""
        return not self.settings.modules or self.is_named(kind)

    def is_named(self, kind: type[Any]) -> bool:
        """True if ATTNPATCH_MODULES names a class or one of its bases."""
        return any(f"{base.__module__}:{base.__qualname__}" in self.settings.modules for base in kind.__mro__)

    def chosen(self, model: Any) -> Any:
        """Which modules of a model are sites; if several patterns are given, only those that match something in this
        model.
        """
        from attnpatch.patching.selection import AUTO, checked, matching

        chosen = checked(self.settings.sites)
        return AUTO if chosen is None else matching(model, chosen)

    def built(self, model: Any) -> None:
        """Patch a model that a host has just built; its patch replaces those of models inside it."""
        if self.is_off:
            return
        try:
            from attnpatch.activation.first_calls import settle
            from attnpatch.patching.patch import Patch, patch_of
            from attnpatch.patching.registry import is_attention

            if patch_of(model) is not None or not self.is_asked_for(type(model)):
                return
            # Others are looked at in their first call.
            if self.settings.sites is None and not any(is_attention(module) for module in model.modules()):
                self.counts["without"] += 1
                return
            inner = _automatic_roots(model)
            kind = type(model)
            policy, chosen = self.settings.policy, self.chosen(model)
            try:
                patch = Patch(model, policy, automatic=True, first_call=first_call, chosen=chosen)
            except PatchError:
                if self.settings.sites is None:
                    raise
                return  # a part of the model that the pattern names, or another model
            for other in inner:
                if not other.was_used:
                    self.patches.pop(id(other), None)
            self._adopt(patch, model, kind)
            settle(model)
        except Exception as error:
            self.not_patched(model, error)
            _leave(model)

    def not_patched(self, model: Any, error: Exception) -> None:
        """A model could not be patched."""
        self.counts["unpatched"] += 1
        self.lines.warn(f"{type(model).__name__} is left as it is", error)

    def patched(self, module: Any, reasons: dict[str, str]) -> Patch:
        """Patch a module that is about to be called for the first time; parts of it that are patched already stay
        patched.
        """
        from attnpatch.patching.patch import Patch

        patch = Patch(
            module,
            self.settings.policy,
            automatic=True,
            first_call=first_call,
            chosen=self.chosen(module),
            reasons=reasons,
        )
        self._adopt(patch, module, type(module))
        self.plain.patches.add(patch)
        return patch

    def forget(self, patch: Patch) -> None:
        """A patch was taken out: nothing in its model was attention."""
        self.patches.pop(id(patch), None)
        self._waiting += _automatic(patch)
        patch.recorders = ()

    def called(self, patch: Patch, model: Any) -> None:
        """An automatically patched model, or a copy of one, is about to be called for the first time."""
        try:
            patch.complete(model)
            if id(patch) not in self.patches:
                self._adopt(patch, model, type(model))
            self.announce()
        except Exception as error:
            self.lines.warn(f"{type(model).__name__} is patched in part", error)

    def announce(self) -> None:
        """Name the models that are patched, unless they were named before."""
        self.lines.announce(list(self.patches.values()))

    def _adopt(self, patch: Patch, model: Any, kind: type[Any]) -> None:
        self._finish(self._waiting)
        self.patches[id(patch)] = patch
        # This must not run at exit, where the report must come first.
        weakref.finalize(model, self._fold, patch).atexit = False
        if self.settings.capture is not None and not patch.recorders:
            from attnpatch.activation.files import Folder
            from attnpatch.activation.recording import AutomaticRecorder, ThreadRecorder

            self._folder = self._folder or Folder(self.settings.capture)
            failed = functools.partial(self._not_captured, patch.model_kind)
            blocks = self.settings.blocks
            new = functools.partial(ThreadRecorder, patch, kind, self._folder, blocks, failed)
            patch.recorders = (AutomaticRecorder(new),)

    def _not_captured(self, kind: str, error: Exception) -> None:
        self.counts["not captured"] += 1
        self.lines.warn(f"a call of {kind} is not captured", error)

    def _fold(self, patch: Patch) -> None:
        """A model was freed: add its counts to those of other freed models of its kind."""
        if self.patches.pop(id(patch), None) is None:
            return
        # The garbage collector may run this at any point, so files are written later.
        self._waiting += _automatic(patch)
        patch.recorders = ()
        if not patch.was_used:
            self.never_called[patch.model_kind] += 1
            return
        added_up(self.gone, patch)

    def _finish(self, recorders: list[AutomaticRecorder]) -> None:
        while recorders:
            recorders.pop().finish()

    def end(self) -> None:
        """The script has ended: finish the captures and print the report."""
        if "torch" not in sys.modules or os.getpid() != self.pid or self.is_off:
            return
        try:
            self._finish(self._waiting)
            self._finish([each for patch in self.patches.values() for each in _automatic(patch)])
            self.announce()
            if self.settings.report and sys.stderr is not None:
                from attnpatch.activation.closing import closing_lines

                print("\n".join(closing_lines(self)), file=sys.stderr)
            elif self.has_seen_nothing and is_first_process():
                self.lines.say(self.nothing_seen)
        except Exception as error:
            self.lines.warn("no report", error)

    @property
    def has_patched(self) -> bool:
        """True if any model was patched."""
        return bool(self.patches or self.gone or self.never_called)

    @property
    def has_seen_nothing(self) -> bool:
        """True if there was something to see, and it was not attention."""
        stand_ins = sys.modules.get("attnpatch.standins.modules")
        has_attended = self.has_patched or (stand_ins is not None and bool(stand_ins.used()))
        return (self.plain.was_called or self.is_of_script) and not has_attended

    @property
    def nothing_seen(self) -> str:
        """The line for a process that patched nothing, with the variables that may be why."""
        settings = self.settings
        sites = (settings.sites,) if isinstance(settings.sites, str) else settings.sites
        given = {"ATTNPATCH_MODULES": settings.modules, "ATTNPATCH_SITES": sites}
        of = " and ".join(f"{name}={','.join(value)}" for name, value in given.items() if value)
        return NOTHING_SEEN + (f" that {of} asks for" if of else "; ATTNPATCH_REPORT=1 says why not")


def _automatic_roots(model: Any) -> list[Patch]:
    from attnpatch.patching.forward_swap import sites_of

    sites = [site for module in model.modules() for site in sites_of(module)]
    return [site.patch for site in sites if site.is_root and site.patch.automatic]


def _leave(model: Any) -> None:
    """Remove automatic patches from a model that could not be patched as a whole."""
    try:
        from attnpatch.patching.forward_swap import take_out_all

        take_out_all(model, lambda patch: patch.automatic)
    except Exception:
        # Nothing more can be done, and the error must not reach the script.
        return


def _automatic(patch: Patch) -> list[AutomaticRecorder]:
    return [each for each in patch.recorders if each.gives_way]
