"""Swaps the forward of one module, and undoes that exactly.

The forward is replaced in the namespace of the class that defines it. The replacement looks into the instance's
``__dict__``: a patched instance has an entry there and is served; any other one runs the class's own forward, at the
cost of one look-up. The replacement is put in with the first patched instance of a class and taken out with the last,
even if that one is only garbage-collected. So ``type(module)`` stays the host's, ``vars(module)`` gains one entry, and
after undo neither the instance nor its class holds anything of attnpatch. If another tool (accelerate) has bound the
replacement meanwhile, that bound function is turned into a plain copy of the class's forward. Alternatives, and why
not:

* A subclass given to the instance breaks every host that compares classes exactly (``type(m) is C``, a table of
  classes): diffusers' ``from_pipe`` and its fusers.
* A bound method or a ``partial`` in the instance's ``forward`` stays bound to the old module in
  ``_replicate_for_data_parallel``. It also makes a reference cycle, so a model's memory waits for the garbage
  collector.
* A descriptor in the class (wrapt's, too) breaks full-graph compilation, even of an unpatched instance of a subclass.
  The replacement is a plain function with the globals of the original, which TorchScript and FX read.

The entry knows which class's replacement serves it, so that ``super().forward()`` is not served a second time. A copied
instance has a copied entry, which registers itself with the class. A pickled entry stores the name of the class, and
registers itself when it is loaded.

If a tool has put a forward into the instance already (accelerate keeps the module's own in ``_old_forward``), this
attribute is swapped, too, because the tool's forward may never call the class's. The attribute becomes a ``partial``,
as accelerate's own is: it is copied and pickled with its module. Whichever of the two is called first serves.

A module is swapped once. Further patches put their site on top of the present one, and the top one serves.
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
_ATTRIBUTES = (compat.ACCELERATE_FORWARD, "forward")


class Entry:
    """The attribute that a patched module holds until the patch is taken out.

    Attributes:
        site: The site that serves; ``None`` if the patch was taken out of this module, or of the one that this module
            is a shallow copy of.
        kind: The module's class when it was patched.
        forward: The swap of the class's forward; ``None`` if the class has no forward.
    """

    def __init__(self, site: Any, kind: type[Any] | None) -> None:
        self.site, self.kind = site, kind
        self.forward: ForwardOfClass | None = None
        self.serve()

    @property
    def is_reached(self) -> bool:
        """True if a call of the class's forward reaches this entry."""
        if self.site is None or self.kind is None or self.forward is None:
            return True  # nothing has to reach it
        return self.forward.is_in_place and owner_of(self.kind, "forward") is self.forward.kind

    def serve(self) -> None:
        """Make calls of the class's forward reach this entry."""
        with changing:
            before, self.forward = self.forward, None
            if self.site is not None and self.kind is not None:
                self.forward = self._joined(self.kind)
            if before is not None and before is not self.forward:
                before.remove(weakref.ref(self))

    def _joined(self, kind: type[Any]) -> ForwardOfClass | None:
        forward = forward_of(kind)
        if forward is not None:
            forward.add(self)
            if not forward.is_in_place:
                # The garbage collector has just freed the last patched instance, so the replacement was taken out.
                forward = forward_of(kind)
                forward.add(self)
        return forward

    def leave(self) -> None:
        self.site = None
        self.serve()

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        return Entry(copy.deepcopy(self.site, memo), self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class that defines the forward: the instance's own class may be made by a tool (FSDP2, parametrizations).
        kind = self.kind if self.forward is None else self.forward.kind
        if kind is None or kind.__reduce__ is object.__reduce__:
            return Entry, (self.site, kind)
        # Pickle the class by name. It may not be importable (a GraphModule's), in which case ``_arrived`` does not
        # serve.
        return _arrived, (self.site, getattr(kind, "__module__", None), kind.__qualname__)


def _arrived(site: Any, module: Any, name: str) -> Entry:
    """An unpickled entry; it does not serve if its class cannot be imported under that name."""
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except (AttributeError, ImportError, TypeError):
        found = None
    return Entry(site, found if isinstance(found, type) else None)


def _forward_of_slot(self: nn.Module, previous: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function in an instance's attribute; ``previous`` is the attribute's former content."""
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
    """The sites of a module from top to bottom; the first one serves."""
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
        attribute = next((name for name in _ATTRIBUTES if name in values), None)
        if attribute is not None:
            previous = values[attribute]
            if _is_of_slot(previous):
                previous = previous.args[1]  # left in a shallow copy of a module that was unpatched later
            # Hosts (generate) read the signature of a forward; a partial takes it from ``__wrapped__``.
            ours = functools.partial(_forward_of_slot, module, previous)
            values[attribute] = functools.update_wrapper(ours, previous, updated=())


def take_out(module: nn.Module, site: Any) -> None:
    """Undo ``put_in``, even if another tool has stored or moved the swapped forward; does nothing if it is undone."""
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
        # Without an entry, an attribute calls its former content.
        del values[STATE]
        entry.leave()
        for attribute in _ATTRIBUTES:
            if attribute in values:
                values[attribute] = _given_back(values[attribute], module)


def take_out_all(model: nn.Module, is_gone: Callable[[Any], bool]) -> None:
    """Undo ``put_in`` for the sites of every patch in a model for which ``is_gone`` is true."""
    for module in model.modules():
        for site in list(sites_of(module)):
            if is_gone(site.patch):
                take_out(module, site)


def _given_back(value: Any, module: nn.Module) -> Any:
    """The callable that would be there if the module had not been patched; also applied to its ``__wrapped__``."""
    if _is_of_slot(value):
        return _given_back(value.args[1], module)
    if isinstance(value, types.MethodType) and value.__self__ is module and is_gate(value.__func__):
        # The gate was bound while the class was swapped, or when a bound method was unpickled.
        of_gate(value.__func__, "_attnpatch_class").collect_garbage()
        return types.MethodType(behind_gate(value.__func__), module)
    if isinstance(value, functools.partial) and "__wrapped__" in vars(value):
        # accelerate's forward has the one below it as ``__wrapped__``, for its signature.
        value.__wrapped__ = _given_back(value.__wrapped__, module)
    return value
