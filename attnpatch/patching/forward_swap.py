"""One forward: put in, take out exactly.

The forward is swapped in the namespace of the class that defines it, by a function that looks into the instance's
``__dict__``: an instance with an entry of ours is served, any other one goes on to the class's own forward for one
look-up. The function is put in with the first patched instance of a class and taken out with the last, also when that
one is only dropped. So ``type(module)`` stays the host's, ``vars(module)`` gains one entry, and after undo neither the
instance nor its class holds anything of ours. What another tool has bound meanwhile, of an unpatched instance too
(accelerate), is turned into a plain copy of the class's forward then. Measured against the alternatives:

* A subclass given to the instance breaks every host that compares classes exactly (``type(m) is C``, a table of
  classes): diffusers' ``from_pipe`` and its fusers.
* A bound method or a ``partial`` in the instance's ``forward`` stays bound to the old module in
  ``_replicate_for_data_parallel``, and makes a cycle, so that a model's memory waits for the garbage collector.
* A descriptor in the class (wrapt's, too) is nothing that full-graph compilation can follow, not even for an unpatched
  instance of a subclass. The function has the globals of the forward it stands for, so that TorchScript and FX see that.

The entry knows which class's function serves it, so that ``super().forward()`` is not served a second time. A copy of
the instance has a copy of the entry, which registers itself with the class; a pickle names the class, and the entry
does so where it arrives.

Where a tool has put a forward into the instance already (accelerate keeps the module's own in ``_old_forward``), that
slot is swapped too, because nothing says that its forward ever reaches the class's. A ``partial`` stands in it, as
accelerate puts one there itself: it is copied and pickled with its module. Whichever of the two is called first serves.

A module is swapped once. Further patches lay their site on top of the one that is there, and the top one serves.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.class_methods import Replaced, changing, owner_of

STATE = "_attnpatch"
_SLOTS = ("_old_forward", "forward")


def _is_recorded() -> bool:
    """Whether the call makes a graph (compile, export, ``jit.trace``, ``make_fx``): it is to be the host's own."""
    return torch.compiler.is_compiling() or compat.is_traced()


# ----------------------------------------------------------------------------------------------------- in the class


class ForwardOfClass(Replaced):
    """The forward of one class while instances of it, or of subclasses without a forward of their own, are patched.

    Attributes:
        entries: Those of the patched instances, by weak references.
        alive: How many of them there were at the last look whether any only waits for the garbage collector.
    """

    def __init__(self, kind: type[Any]) -> None:
        super().__init__(kind, "forward")
        self.entries: set[weakref.ref[Entry]] = set()
        self.alive = 0
        self.put_in(_gate(_as_function(self.found), self))
        _in_use.add(self)

    def add(self, entry: Entry) -> None:
        with changing:
            self.entries.add(weakref.ref(entry, self.remove))

    def remove(self, reference: weakref.ref[Entry]) -> None:
        """An instance is patched no more, or gone."""
        with changing:
            self.entries.discard(reference)
            if not self.entries:
                self.take_out()

    def take_out(self) -> None:
        super().take_out()
        _disarm(self.ours)

    def settle(self) -> None:
        """Take it out now if only models that are gone, and in cycles (accelerate's hooks), still count."""
        if self.is_in_place and len(self.entries) > self.alive:
            gc.collect()
            self.alive = len(self.entries)


# For renew(); nothing is kept alive by it.
_in_use: weakref.WeakSet[ForwardOfClass] = weakref.WeakSet()


class _Served(threading.local):
    """Sites that a slot serves in this thread: their class's forward, if it is reached, has nothing to add."""

    sites: tuple[Any, ...] = ()


_served = _Served()


# What stands in a class in the place of its own forward. All that it needs are defaults of its own, since it has the
# globals and the closure of the original: TorchScript and FX read those, and it can be turned into a copy of that.
_LINES_ABOVE = "\n" * sys._getframe().f_lineno  # so that tracebacks show the lines below
_GATE = """
def closure({free}):
    def forward(
        self, *args, _attnpatch_original, _attnpatch_class, _attnpatch_is_recorded, _attnpatch_served, **kwargs
    ):
        if 0:
            ({free})
        if "_attnpatch" in self.__dict__ and not _attnpatch_is_recorded():
            # Another thread may take it out meanwhile.
            entry = self.__dict__.get("_attnpatch")
            if entry is not None and entry.forward is _attnpatch_class:
                site = entry.site
                if site is not None and site not in _attnpatch_served.sites:
                    return site.serve(_attnpatch_original, self, args, kwargs)
        return _attnpatch_original(self, *args, **kwargs)
"""


@functools.cache
def _gate_code(free: tuple[str, ...]) -> types.CodeType:
    """Its code, with the free variables of an original: torch's compiler counts on them."""
    module = compile(_LINES_ABOVE + _GATE.format(free=", ".join(free)), __file__, "exec")
    (outer,) = (each for each in module.co_consts if isinstance(each, types.CodeType))
    return next(each for each in outer.co_consts if isinstance(each, types.CodeType))


def _gate(original: types.FunctionType, forward_of_class: ForwardOfClass) -> types.FunctionType:
    code = _gate_code(original.__code__.co_freevars)
    gate = types.FunctionType(code, original.__globals__, "forward", None, original.__closure__)
    functools.update_wrapper(gate, original)
    gate.__kwdefaults__ = {
        "_attnpatch_original": original,
        "_attnpatch_class": forward_of_class,
        "_attnpatch_is_recorded": _is_recorded,
        "_attnpatch_served": _served,
    }
    return gate


def _disarm(gate: types.FunctionType) -> None:
    """Make a copy of the class's forward of what stood in its place: another tool may have bound it meanwhile."""
    original, ours = behind_gate(gate), gate.__kwdefaults__
    if original is gate:
        return
    # In an order in which calls of other threads find all that they need.
    gate.__defaults__, gate.__kwdefaults__ = (
        original.__defaults__,
        {**(original.__kwdefaults__ or {}), **ours},
    )
    gate.__code__ = original.__code__
    gate.__kwdefaults__ = original.__kwdefaults__
    gate.__dict__.clear()
    gate.__dict__.update(original.__dict__)


def _of_gate(gate: types.FunctionType, name: str) -> Any:
    return gate.__kwdefaults__[name]


def is_gate(function: Any) -> bool:
    """Whether a function stands in the place of a class's own forward."""
    return isinstance(function, types.FunctionType) and "_attnpatch_class" in (function.__kwdefaults__ or ())


def behind_gate(function: Any) -> Any:
    """The class's own forward, given that or what stands in its place."""
    return _of_gate(function, "_attnpatch_original") if is_gate(function) else function


def _as_function(found: Any) -> types.FunctionType:
    """What stands in a class's namespace, as a function of the instance and the arguments."""
    if isinstance(found, types.FunctionType):
        return found

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = found.__get__(self, type(self)) if hasattr(type(found), "__get__") else found
        return bound(*args, **kwargs)

    functools.update_wrapper(forward, found, updated=())
    return forward


def _forward_of(kind: type[Any]) -> ForwardOfClass | None:
    """What serves instances of ``kind``; ``None``: they have no forward that could be called."""
    owner = owner_of(kind, "forward")
    if owner is None or owner is nn.Module:
        return None
    found = vars(owner)["forward"]
    return _of_gate(found, "_attnpatch_class") if is_gate(found) else ForwardOfClass(owner)


def renew() -> None:
    """Go on serving where a tool has given a class another forward since it was patched: through that one."""
    with changing:
        for forward in list(_in_use):
            for entry in [each() for each in list(forward.entries)]:
                if entry is not None and not entry.is_reached:
                    entry.serve()


# -------------------------------------------------------------------------------------------------- in the instance


class Entry:
    """What a patched module holds, until the patch is taken out or the module is gone.

    Attributes:
        site: The one that serves; ``None``: the patch was taken out of this module or of one that it is a shallow copy of.
        kind: The module's class when it was patched.
        forward: What stands in the class; ``None``: the class has no forward.
    """

    def __init__(self, site: Any, kind: type[Any] | None) -> None:
        self.site, self.kind = site, kind
        self.forward: ForwardOfClass | None = None
        self.serve()

    @property
    def is_reached(self) -> bool:
        """Whether a call of the class's forward comes here."""
        if self.site is None or self.kind is None or self.forward is None:
            return True  # there is nothing to reach
        return self.forward.is_in_place and owner_of(self.kind, "forward") is self.forward.kind

    def serve(self) -> None:
        """See that calls of the class's forward come here."""
        with changing:
            before, self.forward = self.forward, None
            if self.site is not None and self.kind is not None:
                self.forward = _forward_of(self.kind)
            if self.forward is not None:
                self.forward.add(self)
            if before is not None and before is not self.forward:
                before.remove(weakref.ref(self))

    def leave(self) -> None:
        self.site = None
        self.serve()

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return Entry(copy.deepcopy(self.site, memo), self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class that has the forward: that of the instance may have been made by a tool (FSDP2, parametrizations).
        kind = self.kind if self.forward is None else self.forward.kind
        if kind is None or kind.__reduce__ is object.__reduce__:
            return Entry, (self.site, kind)
        # It may have no name (a GraphModule's), and pickle itself otherwise.
        return _arrived, (self.site, getattr(kind, "__module__", None), kind.__qualname__)


def _arrived(site: Any, module: Any, name: str) -> Entry:
    """An entry of a class that is where it says, or not served."""
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except (AttributeError, ImportError, TypeError):
        found = None
    return Entry(site, found if isinstance(found, type) else None)


def _forward_of_slot(self: nn.Module, previous: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands in an instance's slot, with what stood there before."""
    entry = self.__dict__.get(STATE)
    site = None if entry is None else entry.site
    if site is None or _is_recorded():
        return previous(*args, **kwargs)
    outer = _served.sites
    _served.sites = (*outer, site)
    try:
        return site.serve(previous, self, args, kwargs, is_bound=True)
    finally:
        _served.sites = outer


def _is_of_slot(value: Any) -> bool:
    return isinstance(value, functools.partial) and value.func is _forward_of_slot


def can_swap(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def sites_of(module: nn.Module) -> Iterator[Any]:
    """The sites laid on a module, the one that serves first."""
    entry = vars(module).get(STATE)
    site = None if entry is None else entry.site
    while site is not None:
        yield site
        site = site.below


def put_in(module: nn.Module, site: Any) -> None:
    """Route the module's forward through ``site``."""
    values = vars(module)
    with changing:
        entry = values.get(STATE)
        if entry is not None and entry.site is not None:
            site.below, entry.site = entry.site, site
            return
        site.below = None
        values[STATE] = Entry(site, type(module))
        slot = next((name for name in _SLOTS if name in values), None)
        if slot is not None:
            previous = values[slot]
            if _is_of_slot(previous):
                previous = previous.args[
                    1
                ]  # a shallow copy of a module whose patch was taken out has it still
            # Hosts read the signature of a forward (generate does), which a partial has from what it wraps.
            ours = functools.partial(_forward_of_slot, module, previous)
            values[slot] = functools.update_wrapper(ours, previous, updated=())


def take_out(module: nn.Module, site: Any) -> None:
    """Undo ``put_in``, also where another tool has stored or moved the swapped forward since, and if it is undone."""
    values = vars(module)
    with changing:
        sites = list(sites_of(module))
        if site not in sites:
            return
        place = sites.index(site)
        if place:
            sites[place - 1].below = site.below
            return
        entry = values[STATE]
        if site.below is not None:
            entry.site = site.below
            return
        # A slot that finds no entry goes on to its own forward.
        del values[STATE]
        entry.leave()
        for slot in _SLOTS:
            if slot in values:
                values[slot] = _given_back(values[slot], module)


def _given_back(value: Any, module: nn.Module) -> Any:
    """A callable as it would be had the module not been patched, and what it says it wraps likewise."""
    if _is_of_slot(value):
        return _given_back(value.args[1], module)
    if isinstance(value, types.MethodType) and value.__self__ is module and is_gate(value.__func__):
        # Bound while the class was swapped, or by its name where it was unpickled.
        _of_gate(value.__func__, "_attnpatch_class").settle()
        return types.MethodType(behind_gate(value.__func__), module)
    if isinstance(value, functools.partial) and "__wrapped__" in vars(value):
        # accelerate's forward names the one below it, for its signature.
        value.__wrapped__ = _given_back(value.__wrapped__, module)
    return value
