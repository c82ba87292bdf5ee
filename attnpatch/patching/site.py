"""Site: one patched attention module; it decides how each call is served, counts it, and tells captures."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from attnpatch import compat
from attnpatch.errors import AttnpatchError
from attnpatch.failures import warn_once
from attnpatch.hosts.transformers import attention_outputs, masks
from attnpatch.memory.free import FreeMemoryCache
from attnpatch.patching.calls import (
    SEEN,
    Around,
    CountersOfMasks,
    calls_here,
    kernels_seen,
    most_rows,
    opened_up,
    stays_native,
)
from attnpatch.patching.candidates import judge, paused
from attnpatch.patching.class_forward import renew
from attnpatch.patching.counters import SiteCounters
from attnpatch.patching.known_calls import KnownCalls
from attnpatch.patching.selection import CANDIDATE
from attnpatch.rows import torch_graphs
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.creation import positions
from attnpatch.rows.deferred.handle import pending
from attnpatch.rows.deferred.results import with_no_matrix
from attnpatch.rows.deferred.tensor import note_no_memory
from attnpatch.rows.mode import RowsMode
from attnpatch.rows.provenance.remembered_calls import RememberedCalls
from attnpatch.rows.provenance.reordered import mode as reordered
from attnpatch.rows.provenance.tensors import inputs_among
from attnpatch.rows.watching import without

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch


class Site(SiteCounters):
    """One attention module of one model, or the model itself.

    Attributes:
        name: Dotted path in the model, empty for the model itself.
        kind: Name of the module's class.
        is_root: True for the model that was patched.
        is_entry: True for a model: the patched one, or one inside it that may be called on its own (the encoder, by
            ``generate``).
        is_attention: True if attention is watched inside it.
        why: Why it is an attention site, in words.
        below: The site of another patch, on top of which this one lies.
        waits_for: For a candidate that turned out to be no attention: the checkpoint of its first call.
    """

    # A dry run replaces these two.
    call_class, mode_class = AttentionCall, RowsMode

    def __init__(self, patch: Patch, name: str, module: nn.Module, is_root: bool, why: str | None) -> None:
        super().__init__()
        self.patch, self.name, self.kind = patch, name, type(module).__name__
        self.is_root, self.is_attention, self.why = is_root, why is not None, why
        self.is_entry = is_root or masks.makes_masks(module)
        self.decisions: dict[tuple[int, ...], bool] = {}
        self.repeats, self.known = RememberedCalls(), KnownCalls()
        self.below: Site | None = None
        self.waits_for: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with counts of its own."""
        return {
            **vars(self),
            **vars(SiteCounters()),
            "decisions": {},
            "repeats": RememberedCalls(),
            "known": KnownCalls(),
            "waits_for": None,
        }

    def __repr__(self) -> str:
        return f"Site({self.name or '(model)'!r}, {self.kind}, {dict(self.counts)})"

    @property
    def is_candidate(self) -> bool:
        """True if its first call has yet to tell whether it is attention."""
        return self.why == CANDIDATE

    @property
    def may_be_none(self) -> bool:
        """True if its first call, as far as it has run, does not tell that it is attention."""
        return self.why == CANDIDATE and not (calls_here.watch is not None and calls_here.watch.found)

    def failed(self, where: str, error: Exception) -> None:
        """Count and warn about an error in attnpatch's own code, which must not end a forward of the host.

        Raises:
            AttnpatchError: The error is a refusal, meant for the user.
        """
        if isinstance(error, AttnpatchError):
            raise error
        self.counts["failed"] += 1
        warn_once(where, error)

    def serve(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        is_bound: bool = False,
    ) -> Any:
        """Call ``forward`` as the policy says; ``is_bound``: it is bound to its module."""
        first = args if is_bound else (module, *args)
        if calls_here.patch is not self.patch:
            if self.is_entry:
                return self._enter(forward, module, first, args, kwargs)
            return self._serve(forward, module, first, args, kwargs)
        # Every step of a generation runs this path, and each function call in it costs microseconds.
        if not self.is_attention:
            return forward(*first, **kwargs)
        rows = 0
        try:
            is_native = (
                calls_here.is_calm
                and self.why != CANDIDATE
                and not (self.patch.recorders or self.patch.policy.replace_kernels)
                and not attention_outputs.are_asked_for(module, kwargs)
                and (rows := most_rows(args, kwargs)) <= self.patch.policy.min_tokens
            )
        except Exception as error:
            self.failed("checking the length of a call", error)
            is_native = True
        if is_native:
            self.short[rows] += 1
            return forward(*first, **kwargs)
        return self._serve(forward, module, first, args, kwargs)

    def _enter(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Serve the call of a model; its sites are called inside."""
        outer = calls_here.patch, calls_here.room, calls_here.is_calm, calls_here.is_recorded
        contexts: list[contextlib.AbstractContextManager[Any]] = []
        try:
            if self.is_root and self.patch.first_call is not None and not self.patch.was_called:
                self.patch.was_called = True
                self.patch.first_call(self.patch, module)
            is_short = masks.is_short(self.patch.policy, args, kwargs)
            is_calm = is_short and not pending() and not positions.is_watching()
            calls_here.patch, calls_here.room, calls_here.is_calm = self.patch, FreeMemoryCache(), is_calm
            key = None
            if not is_short:
                renew()
                # A compiled graph makes its masks itself, and an active mode would make torch compile it again.
                if not torch_graphs.is_compiled(forward):
                    key = self.known.of_model(self, module, args, kwargs)
            if key is not None:
                call = AttentionCall(
                    self.patch.policy, self.patch.room(), CountersOfMasks(self), is_of_masks=True
                )
                is_watched = self.patch.is_watched and self.patch.policy.mode != "never"
                watch = positions.watched(call) if is_watched else positions.unwatched()
                contexts = [masks.by_rows(call), watch, self.known.noted(key, call, args, kwargs)]
            contexts += kernels_seen(forward)
        except Exception as error:
            calls_here.patch, calls_here.room, calls_here.is_calm, calls_here.is_recorded = outer
            self.failed("the beginning of a model's call", error)
            return forward(*first, **kwargs)
        # A capture distinguishes calls of the whole model (``begin_call``) from calls of a part on its own
        # (``begin_part``).
        recorder = self.patch.recorder
        begin = None
        if recorder is not None:
            begin = recorder.begin_call if self.is_root else getattr(recorder, "begin_part", None)
        of_part = () if self.is_root else (type(module),)
        try:
            if begin is not None and not torch_graphs.is_recorded():
                calls_here.is_recorded = self._tell(
                    begin, "the beginning of a captured call", *of_part, args, kwargs
                )
                is_followed = self.patch.is_watched and getattr(recorder, "follows_order", False)
                if is_followed and reordered.watch() is None and not torch_graphs.is_compiled(forward):
                    contexts.append(reordered.watched(module, (first, args, kwargs)))
            if not contexts:
                return self._serve(forward, module, first, args, kwargs)
            with Around(self, *contexts):
                return self._serve(forward, module, first, args, kwargs)
        finally:
            calls_here.patch, calls_here.room, calls_here.is_calm, calls_here.is_recorded = outer
            if begin is not None:
                self._tell(recorder.end_call, "the end of a captured call")

    def _tell(self, listener: Callable[..., Any], where: str, *args: Any) -> bool:
        """Call a function of attnpatch; False if it failed."""
        try:
            listener(*args)
        except Exception as error:
            self.failed(where, error)
            return False
        return True

    def _serve(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if not self.is_attention:
            return forward(*first, **kwargs)
        attend = functools.partial(judge if self.is_candidate else self.known.attend, self)
        try:
            context = positions.unwatched() if positions.is_watching() else None
            order = reordered.watch()
            # What a site does between attention sites inside it counts as done between sites.
            order = None if order is None or self.name in self.patch.around else order
            pause = reordered.paused(order) if order is not None else None
        except Exception as error:
            self.failed("switching modes off for attention", error)
            context = order = pause = None
        # Modes are switched off from the innermost one outwards, since a mode below another one cannot be switched off.
        contexts = [each for each in (pause, context, calls_here.watch and paused(calls_here.watch)) if each]
        if not contexts:
            return attend(forward, module, first, args, kwargs)
        with Around(self, *contexts):
            result = attend(forward, module, first, args, kwargs)
        if order is not None:
            self._tell(lambda: order.through(inputs_among(args, kwargs), result), "the order of tokens")
        if calls_here.watch is not None:
            self._tell(calls_here.watch.mark, "tracking a module's result", result)
        return result

    def attend(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        running, outer = calls_here.mode, None
        try:
            outer = running if running is not None and running.is_active() else None
            call = self._call_of(module, args, kwargs)
            if not isinstance(call, (str, int)):
                mode = self.mode_class(call) if outer is None else outer
                forward = opened_up(forward)
        except Exception as error:
            self.failed("the beginning of an attention call", error)
            call = "passed"
        if isinstance(call, (str, int)):
            counter: Counter[Any] = self.short if isinstance(call, int) else self.reasons
            counter[call] += 1
            return forward(*first, **kwargs)
        calls_here.is_calm = False
        before = self.counts.total(), self.reasons.total()
        if outer is not None:  # a site inside a site: the same mode stays active, with the inner site's call
            of_outer, outer.call = outer.call, call
            try:
                result = forward(*first, **kwargs)
            finally:
                outer.call = of_outer
        else:
            try:
                with Around(self, mode) as around:
                    calls_here.mode = mode if around.entered else None
                    result = forward(*first, **kwargs)
            except RuntimeError as error:
                note_no_memory(error)
                raise
            finally:
                calls_here.mode = running
        try:
            with contextlib.nullcontext() if outer is None else without(outer):
                result = with_no_matrix(result, self.counts.total() != before[0])
        except Exception as error:
            self.failed("computing a small result", error)
        if self.counts.total() == before[0]:
            # Native scores are not counted when they are made (any product may be scores), so count the call here.
            self.counts["passed"] += 1
            if self.reasons.total() == before[1]:
                self.reasons["unseen"] += 1
        if call.observer is not None:
            self._tell(call.observer.finish, "the end of a captured attention call")
        if call.weights:
            # The weights and the call refer to each other: break the cycle, or keys would live until garbage collection.
            made, call.weights = call.weights, None
            try:
                return attention_outputs.put_in(module, args, kwargs, result, made)
            except Exception as error:
                self.failed("putting attention weights in", error)
        return result

    def _call_of(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> AttentionCall | str | int:
        """The AttentionCall for a watched call; otherwise the reason why it is not watched, see ``stays_native``."""
        patch = self.patch
        recorder = patch.recorder if calls_here.is_recorded else None
        # A checkpointed layer is recomputed in the backward pass on the same path, and its attention was observed
        # already.
        again = compat.is_in_backward()
        observer = None
        if recorder is not None:
            try:
                if recorder.wants(self.name) and torch_graphs.is_recorded():
                    self.summed("nothing (a CUDA graph is recorded)")
                elif recorder.wants(self.name):
                    is_seen = again and not recorder.is_of_gradient
                    observer = SEEN if is_seen else recorder.observer(self, args, kwargs)
            except Exception as error:
                self.failed("the beginning of a captured attention call", error)
        if observer is not None or again:
            observer = self._in_checkpoint(observer)
        asked = patch.policy.mode != "never" and attention_outputs.are_asked_for(module, kwargs)
        # A site that is in no map may still put tokens into another order for those after it.
        is_followed = observer is None and not again and reordered.is_asked()
        if observer is None and not asked and not pending():
            rule = self._stays_native(args, kwargs)
            if rule is not None and not (is_followed and rule not in ("nested", "transform")):
                return rule
        call = self.call_class(patch.policy, patch.room(), self, observer, self.decisions, again)
        call.weights = [] if asked else None
        running = calls_here.mode
        around = running.call.sources if running is not None else None
        call.sources = around = around if around is not None and running.is_active() else None
        if is_followed or (observer is not None and observer is not SEEN):
            try:
                repeats = None if observer is not None and observer.is_of_gradient else self.repeats
                # These functions are attnpatch's own: the mode must not see them.
                with compat.DisableTorchFunction():
                    call.sources = reordered.sources_inside(inputs_among(args, kwargs), around, repeats)
            except Exception as error:
                self.failed("tracking a module's inputs", error)
        return call

    def _in_checkpoint(self, observer: Any) -> Any:
        """The observer to use inside a checkpoint. A checkpoint that was observed once is recomputed as an observed
        one, even after the capture has ended.
        """
        frame = checkpoints.current()
        if frame is None:
            return observer
        if observer is None:
            return SEEN if frame in self.patch.watched else None
        self.patch.watched.add(frame)
        return observer

    def _stays_native(self, args: Any, kwargs: dict[str, Any]) -> str | int | None:
        # A dry run replaces it.
        return stays_native(self.patch.policy, args, kwargs)
