"""An active process: patches models as they are built, and reports on them at exit."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

from attnpatch.activation.settings import Settings
from attnpatch.hosts.building import is_imported, when_built

if TYPE_CHECKING:
    from attnpatch.activation.recording import AutomaticRecorder
    from attnpatch.patching.patch import Patch

_session: Session | None = None


def begin(settings: Settings) -> None:
    """Patch every model that this process builds from now on; a second call does nothing."""
    global _session
    if _session is None:
        _session = Session(settings)
        when_built(_session.built, functools.partial(_session.warn, "no model is patched"))
        atexit.register(_session.end)


def first_call(patch: Patch, model: Any) -> None:
    """Called by an automatic patch before its model's first call.

    A copied patch calls it too. A patch unpickled in a process that is not active is only completed.
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
        gone: Patches of freed models, added up by kind of model, each with the number of models.
        counts: Other events to report at exit: models without attention, not patched, calls not captured.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.patches: dict[int, Patch] = {}
        self.gone: dict[Any, tuple[Patch, int]] = {}
        self.counts: Counter[str] = Counter()
        self.never_called: Counter[str] = Counter()
        self._folder: Any = None
        self._waiting: list[AutomaticRecorder] = []
        self._said: set[str] = set()

    @property
    def written(self) -> int:
        """Number of sequences captured."""
        return 0 if self._folder is None else self._folder.written

    def built(self, model: Any) -> None:
        """Patch a model that was just built; its patch replaces those of models inside it."""
        try:
            from attnpatch.patching.patch import Patch, patch_of
            from attnpatch.patching.registry import is_attention

            if patch_of(model) is not None:
                return
            if not any(is_attention(module) for module in model.modules()):
                self.counts["without"] += 1
                return
            inner = _automatic_roots(model)
            kind = type(model)
            patch = Patch(model, self.settings.policy, automatic=True, first_call=first_call)
            for other in inner:
                if not other.was_used:
                    self.patches.pop(id(other), None)
            self._adopt(patch, model, kind)
        except Exception as error:
            self.counts["unpatched"] += 1
            self.warn(f"{type(model).__name__} is left as it is", error)
            _leave(model)

    def called(self, patch: Patch, model: Any) -> None:
        """An automatically patched model, or a copy of one, is about to be called for the first time."""
        try:
            patch.complete(model)
            if id(patch) not in self.patches:
                self._adopt(patch, model, type(model))
        except Exception as error:
            self.warn(f"{type(model).__name__} is patched in part", error)

    def _adopt(self, patch: Patch, model: Any, kind: type[Any]) -> None:
        self._finish(self._waiting)
        self.patches[id(patch)] = patch
        # Do not run at exit, where the report must come first.
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
        self.warn(f"a call of {kind} is not captured", error)

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
        key = (patch.model_kind, patch.policy, tuple(site.name for site in patch.sites))
        kept, number = self.gone.get(key, (None, 0))
        if kept is None:
            kept = patch
        else:
            for mine, other in zip(kept.sites, patch.sites, strict=True):
                mine.add(other)
        self.gone[key] = (kept, number + 1)

    def warn(self, what: str, error: Exception) -> None:
        """Print one line on stderr; the same line is printed only once."""
        line = " ".join(f"attnpatch: {what}: {type(error).__name__}: {error}".split())
        if line not in self._said and sys.stderr is not None:
            self._said.add(line)
            with contextlib.suppress(OSError, ValueError):
                print(line, file=sys.stderr)

    def _finish(self, recorders: list[AutomaticRecorder]) -> None:
        while recorders:
            recorders.pop().finish()

    def end(self) -> None:
        """The script has ended: finish the captures and print the report."""
        if not is_imported() or os.getpid() != self.pid:
            return
        try:
            self._finish(self._waiting)
            self._finish([each for patch in self.patches.values() for each in _automatic(patch)])
            if self.settings.report and sys.stderr is not None:
                from attnpatch.activation.closing import closing_lines

                print("\n".join(closing_lines(self)), file=sys.stderr)
        except Exception as error:
            self.warn("no report", error)


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
