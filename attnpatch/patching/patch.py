"""All the swaps of one model: its policy, its counters, and what is asked once per call of the model."""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnpatch.class_methods import changing
from attnpatch.errors import AttnpatchError, PatchError
from attnpatch.failures import warn_once
from attnpatch.hosts.transformers import attention_outputs, masks
from attnpatch.memory import Room
from attnpatch.observing import Passing
from attnpatch.patching.counters import Counters
from attnpatch.patching.forward_swap import can_swap, put_in, renew, sites_of, take_out
from attnpatch.patching.recognition import Watch
from attnpatch.patching.registry import is_attention, why
from attnpatch.patching.selection import CANDIDATE, RECOGNISED, Sites, choose
from attnpatch.policy import Policy
from attnpatch.rows import torch_graphs
from attnpatch.rows.attention_call import SiteCall, Tally
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.creation import positions
from attnpatch.rows.deferred.handle import pending
from attnpatch.rows.deferred.results import with_no_matrix
from attnpatch.rows.deferred.tensor import note_no_memory
from attnpatch.rows.mode import RowsMode
from attnpatch.rows.provenance import reordered
from attnpatch.rows.provenance.sources import Sources, inputs_among
from attnpatch.rows.sdpa.fast_paths import opened
from attnpatch.rows.watching import without


class _Thread(threading.local):
    """What is going on in this thread.

    Attributes:
        mode: The rows mode that is active, if any.
        patch: The patch whose model is being called.
        room: What is known of free memory during that call.
        is_calm: Whether nothing of that call is long, and nothing has gone by rows in it.
        is_recorded: Whether a capture knows of the call.
        watch: Who looks at the candidate that runs.
    """

    mode: RowsMode | None = None
    patch: Patch | None = None
    room: Room | None = None
    is_calm: bool = False
    is_recorded: bool = True
    watch: Watch | None = None


_thread = _Thread()


class _OfMasks:
    """Counts what happens to the masks of a model's call: at the site that runs, or else at the model."""

    def __init__(self, root: Site) -> None:
        self.root = root

    def count(self, what: str) -> None:
        self._site().count(what)

    def materialised(self, operation: str) -> None:
        self._site().materialised(operation)

    def not_fused(self, step: str) -> None:
        self._site().not_fused(step)

    def summed(self, by: str) -> None:
        self._site().summed(by)

    def left_native(self, reason: str, *numbers: int) -> None:
        """Masks that are made whole say nothing of attention."""

    def made(self, size: int) -> None:
        self._site().made(size)

    def _site(self) -> Tally:
        return self.root if _thread.mode is None else _thread.mode.call.tally


class Site(Counters):
    """One attention module of one model, or the model itself.

    Attributes:
        name: Dotted path in the model, empty for the model itself.
        kind: Name of the module's class.
        is_root: Whether it is the model that was patched.
        is_entry: Whether it is a model: the one that was patched, or one inside that may be called on its own (the
            encoder, by ``generate``).
        is_attention: Whether attention is watched inside it.
        why: Why it is an attention site, in words.
        below: The site of another patch that this one lies on.
        waits_for: The checkpoint that a candidate, found to be no attention, was first called in.
    """

    # What a rehearsal does otherwise.
    call_class: type[SiteCall] = SiteCall
    mode_class: type[RowsMode] = RowsMode

    def __init__(self, patch: Patch, name: str, module: nn.Module, is_root: bool, why: str | None) -> None:
        super().__init__()
        self.patch, self.name, self.kind = patch, name, type(module).__name__
        self.is_root, self.is_attention, self.why = is_root, why is not None, why
        self.is_entry = is_root or masks.makes_masks(module)
        self.decisions: dict[tuple[int, int], bool] = {}
        self.below: Site | None = None
        self.waits_for: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy counts for itself."""
        return {**vars(self), **vars(Counters()), "decisions": {}, "waits_for": None}

    def __repr__(self) -> str:
        return f"Site({self.name or '(model)'!r}, {self.kind}, {dict(self.counts)})"

    @property
    def is_candidate(self) -> bool:
        """Whether its first call will tell if it is an attention module."""
        return self.why == CANDIDATE

    def failed(self, where: str, error: Exception) -> None:
        """Note an error of ours, which must not end a forward of the host.

        Raises:
            AttnpatchError: It is a refusal, meant for the user.
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
        """Call ``forward`` as the policy says; ``is_bound``: it knows its module."""
        first = args if is_bound else (module, *args)
        if _thread.patch is not self.patch:
            if self.is_entry:
                return self._enter(forward, module, first, args, kwargs)
            return self._serve(forward, module, first, args, kwargs)
        # A step of a generation pays for what stands here, and each function that it calls is a few microseconds.
        if not self.is_attention:
            return forward(*first, **kwargs)
        rows = 0
        try:
            is_native = (
                _thread.is_calm
                and self.why != CANDIDATE
                and not self.patch.recorders
                and not attention_outputs.are_asked_for(module, kwargs)
                and (rows := most_rows(args, kwargs)) <= self.patch.policy.min_tokens
            )
        except Exception as error:
            self.failed("the look at a short call", error)
            is_native = True
        if is_native:
            self.short[rows] += 1
            return forward(*first, **kwargs)
        return self._serve(forward, module, first, args, kwargs)

    def _enter(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The call of a model, in which its sites are called."""
        outer = _thread.patch, _thread.room, _thread.is_calm, _thread.is_recorded
        contexts: list[contextlib.AbstractContextManager[Any]] = []
        try:
            if self.is_root and self.patch.first_call is not None and not self.patch.was_called:
                self.patch.was_called = True
                self.patch.first_call(self.patch, module)
            is_short = masks.is_short(self.patch.policy, args, kwargs)
            is_calm = is_short and not pending() and not positions.is_watching()
            _thread.patch, _thread.room, _thread.is_calm = self.patch, Room(), is_calm
            if not is_short:
                renew()
            # A compiled graph makes its masks itself, and a mode on the stack would have it compiled anew.
            if not is_short and not torch_graphs.is_compiled(forward):
                call = SiteCall(self.patch.policy, self.patch.room(), _OfMasks(self), is_of_masks=True)
                is_watched = self.patch.is_watched and self.patch.policy.mode != "never"
                watch = positions.watched(call) if is_watched else positions.unwatched()
                contexts = [masks.by_rows(call), watch]
        except Exception as error:
            _thread.patch, _thread.room, _thread.is_calm, _thread.is_recorded = outer
            self.failed("the beginning of a model's call", error)
            return forward(*first, **kwargs)
        # A part that is called on its own is none of the calls that a capture tells apart.
        recorder = self.patch.recorder
        begin = None
        if recorder is not None:
            begin = recorder.begin_call if self.is_root else getattr(recorder, "begin_part", None)
        of_part = () if self.is_root else (type(module),)
        try:
            if begin is not None and not torch_graphs.is_recorded():
                _thread.is_recorded = self._tell(
                    begin, "the beginning of a captured call", *of_part, args, kwargs
                )
                is_followed = self.patch.is_watched and getattr(recorder, "follows_order", False)
                if is_followed and reordered.watch() is None and not torch_graphs.is_compiled(forward):
                    contexts.append(reordered.watched(module, (first, args, kwargs)))
            if not contexts:
                return self._serve(forward, module, first, args, kwargs)
            with _Around(self, *contexts):
                return self._serve(forward, module, first, args, kwargs)
        finally:
            _thread.patch, _thread.room, _thread.is_calm, _thread.is_recorded = outer
            if begin is not None:
                self._tell(recorder.end_call, "the end of a captured call")

    def _tell(self, listener: Callable[..., Any], where: str, *args: Any) -> bool:
        """Call something of ours; whether it did not fail."""
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
        attend = self._judge if self.is_candidate else self._attend
        try:
            context = positions.unwatched() if positions.is_watching() else None
            order = reordered.watch()
            pause = reordered.paused(order) if order is not None else None
        except Exception as error:
            self.failed("the look at a watch", error)
            context = order = pause = None
        # The latest that was begun is taken away first: a mode below another one stays.
        contexts = [each for each in (pause, context, _thread.watch and _paused(_thread.watch)) if each]
        if not contexts:
            return attend(forward, module, first, args, kwargs)
        with _Around(self, *contexts):
            result = attend(forward, module, first, args, kwargs)
        if order is not None:
            self._tell(lambda: order.through(inputs_among(args, kwargs), result), "the order of tokens")
        if _thread.watch is not None:
            self._tell(_thread.watch.mark, "the look at what a module returned", result)
        return result

    def _judge(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The first call of a candidate: served as attention is, which changes nothing if it is none."""
        if self.waits_for is not None:
            return self._as_judged(forward, module, first, args, kwargs)
        try:
            watch = Watch((args, kwargs), self.failed)
        except Exception as error:
            self.failed("the look at a first call", error)
            return self._attend(forward, module, first, args, kwargs)
        outer, _thread.watch = _thread.watch, watch
        # Or short calls of sites inside would not come by to say whose they are.
        _thread.is_calm = False

        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch:
                return forward(*args, **kwargs)

        try:
            result = self._attend(watched, module, first, args, kwargs)
        finally:
            _thread.watch = outer
        try:
            if watch.found or not watch.has_failed:
                self.patch.judged(self, module, watch.found)
        except Exception as error:
            self.failed("what a first call has shown", error)
        return result

    def _as_judged(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A call of what is no attention, and was first called in a checkpoint: that runs again as it ran."""
        try:
            frame = self.waits_for()
            if frame is None:
                self.patch.leave(self, module)
            is_again = frame is not None and checkpoints.current() is frame
        except Exception as error:
            self.failed("a checkpoint", error)
            is_again = False
        return (self._attend if is_again else _called)(forward, module, first, args, kwargs)

    def _attend(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        running, outer = _thread.mode, None
        try:
            outer = running if running is not None and running.is_active() else None
            call = self._call_of(module, args, kwargs)
            if not isinstance(call, (str, int)):
                mode = self.mode_class(call) if outer is None else outer
                forward = _opened(forward)
        except Exception as error:
            self.failed("the beginning of an attention call", error)
            call = "passed"
        if isinstance(call, (str, int)):
            counter: Counter[Any] = self.short if isinstance(call, int) else self.reasons
            counter[call] += 1
            return forward(*first, **kwargs)
        _thread.is_calm = False
        before = self.counts.total(), self.reasons.total()
        if outer is not None:
            # A site inside a site: the same mode goes on, on the inner one's account.
            of_outer, outer.call = outer.call, call
            try:
                result = forward(*first, **kwargs)
            finally:
                outer.call = of_outer
        else:
            try:
                with _Around(self, mode) as around:
                    _thread.mode = mode if around.entered else None
                    result = forward(*first, **kwargs)
            except RuntimeError as error:
                note_no_memory(error)
                raise
            finally:
                _thread.mode = running
        try:
            with contextlib.nullcontext() if outer is None else without(outer):
                result = with_no_matrix(result, self.counts.total() != before[0])
        except Exception as error:
            self.failed("a result that is no matrix", error)
        if self.counts.total() == before[0]:
            # Scores that stay native are not counted where they are made: a product may be anything.
            self.counts["passed"] += 1
            if self.reasons.total() == before[1]:
                self.reasons["unseen"] += 1
        if call.observer is not None:
            self._tell(call.observer.finish, "the end of a captured attention call")
        if call.weights:
            # They name the call: it names them no longer, or keys would live until the garbage collector comes.
            made, call.weights = call.weights, None
            try:
                return attention_outputs.put_in(module, args, kwargs, result, made)
            except Exception as error:
                self.failed("putting attention weights in", error)
        return result

    def _call_of(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> SiteCall | str | int:
        """What the doors are to know of a call; or the rule that leaves it alone, or its rows if they are too few."""
        patch = self.patch
        recorder = patch.recorder if _thread.is_recorded else None
        # A checkpointed layer runs again in the backward pass: the same way, but what it attends to was seen before.
        again = torch._C._current_graph_task_id() != -1
        observer = None
        if recorder is not None:
            try:
                if recorder.wants(self.name) and torch_graphs.is_recorded():
                    self.summed("nothing (a CUDA graph is recorded)")
                elif recorder.wants(self.name):
                    is_seen = again and not recorder.is_of_gradient
                    observer = _SEEN if is_seen else recorder.observer(self, args, kwargs)
            except Exception as error:
                self.failed("the beginning of a captured attention call", error)
        if observer is not None or again:
            observer = self._in_checkpoint(observer)
        asked = patch.policy.mode != "never" and attention_outputs.are_asked_for(module, kwargs)
        if observer is None and not asked and not pending():
            rule = self._stays_native(args, kwargs)
            if rule is not None:
                return rule
        call = self.call_class(patch.policy, patch.room(), self, observer, self.decisions, again)
        call.weights = [] if asked else None
        running = _thread.mode
        around = running.call.sources if running is not None else None
        call.sources = around = around if around is not None and running.is_active() else None
        if observer is not None and observer is not _SEEN:
            try:
                inputs, watch = inputs_among(args, kwargs), reordered.watch()
                reasons = (
                    {}
                    if watch is None
                    else {i: why for i, each in enumerate(inputs) if (why := watch.why(each))}
                )
                call.sources = Sources(inputs, around, reasons)
            except Exception as error:
                self.failed("the look at a module's inputs", error)
        return call

    def _in_checkpoint(self, observer: Any) -> Any:
        """Who looks on: a checkpoint that was looked at runs again in the same way, also after the capture has ended."""
        frame = checkpoints.current()
        if frame is None:
            return observer
        if observer is None:
            return _SEEN if frame in self.patch.watched else None
        self.patch.watched.add(frame)
        return observer

    def _stays_native(self, args: Any, kwargs: dict[str, Any]) -> str | int | None:
        """The rule that keeps a call from being watched, or its rows if they are too few; ``None``: it is watched.

        Decided before anything is watched, so that short calls cost nothing.
        """
        policy = self.patch.policy
        if policy.mode == "never":
            return "never"
        if any(isinstance(value, torch.Tensor) and value.is_nested for value in args):
            return "nested"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside vmap or torch.func.grad tensors are not what they seem; the native call is left alone.
            return "transform"
        if policy.mode == "always":
            return None
        rows = most_rows(args, kwargs)
        return None if rows > policy.min_tokens else rows


def _called(forward: Callable[..., Any], _: nn.Module, first: Any, __: Any, kwargs: dict[str, Any]) -> Any:
    return forward(*first, **kwargs)


@contextlib.contextmanager
def _paused(watch: Watch) -> Iterator[None]:
    """A candidate is around a site: what is computed there is none of its attention."""
    paused, watch.is_paused = watch.is_paused, True
    try:
        yield
    finally:
        watch.is_paused = paused


def _opened(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of torch's own that runs under a mode as it would without; any other is itself."""
    # What exec makes may name no module.
    if not (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules."):
        return forward
    if isinstance(forward, types.MethodType):
        return types.MethodType(opened(forward.__func__), forward.__self__)
    return opened(forward) if isinstance(forward, types.FunctionType) else forward


class _Around:
    """Contexts of ours around a forward of the host, which goes on if one of them fails to begin or to end.

    Attributes:
        entered: Those that have begun.
    """

    def __init__(self, site: Site, *contexts: contextlib.AbstractContextManager[Any]) -> None:
        self.site, self.contexts = site, contexts
        self.entered: list[contextlib.AbstractContextManager[Any]] = []

    def __enter__(self) -> _Around:
        for context in self.contexts:
            try:
                context.__enter__()
            except Exception as error:
                self.site.failed("the beginning of a watch", error)
            else:
                self.entered.append(context)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for context in reversed(self.entered):
            try:
                context.__exit__(*exc_info)
            except Exception as error:
                if error is not exc_info[1]:
                    self.site.failed("the end of a watch", error)


class _Blind:
    """Stands for an observer that has seen this call already."""

    is_of_gradient = False

    def observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        pass

    def take(self, call: dict[str, Any], lse: torch.Tensor, workspace: int | None) -> str:
        return "seen before"

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def begin(self, layout: Any, opened: Any) -> bool:
        return False

    def restart(self) -> None:
        pass

    def end(self) -> None:
        pass

    def finish(self) -> None:
        pass


_SEEN = _Blind()


def most_rows(args: Any, kwargs: dict[str, Any]) -> int:
    """An upper bound on the query rows of a call: positions of its inputs, the batch included.

    Only the first tensor counts with four dimensions (images, split heads): a later one is as a rule a mask, whose
    width says nothing about the queries.
    """
    most, seen = 0, False
    for value in (*args, *kwargs.values()):
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        if value.dim() < 4:
            most = max(most, value.numel() // max(1, value.shape[-1]))
        elif not seen:
            most = max(most, value.numel() // max(1, min(value.shape[-1], value.shape[1])))
        seen = True
    return most


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

    def room(self) -> Room:
        """What is known of free memory; a part of a model that is called on its own asks anew."""
        if _thread.patch is self and _thread.room is not None:
            return _thread.room
        return Room()

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
