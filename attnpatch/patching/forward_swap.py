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
import importlib
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.class_methods import changing, owner_of
from attnpatch.patching.calls import calls_here
from attnpatch.patching.class_forward import (
    ForwardOfClass,
    behind_gate,
    forward_of,
    is_gate,
    is_recorded,
    of_gate,
)

STATE = "_attnpatch"
_SLOTS = (compat.ACCELERATE_FORWARD, "forward")


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
                self.forward = forward_of(self.kind)
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
    if site is None or is_recorded():
        return previous(*args, **kwargs)
    outer = calls_here.served
    calls_here.served = (*outer, site)
    try:
        return site.serve(previous, self, args, kwargs, is_bound=True)
    finally:
        calls_here.served = outer


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
        of_gate(value.__func__, "_attnpatch_class").settle()
        return types.MethodType(behind_gate(value.__func__), module)
    if isinstance(value, functools.partial) and "__wrapped__" in vars(value):
        # accelerate's forward names the one below it, for its signature.
        value.__wrapped__ = _given_back(value.__wrapped__, module)
    return value
