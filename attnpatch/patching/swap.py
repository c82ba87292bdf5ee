"""One forward: put in, take out exactly.

The forward is swapped by giving the module a subclass of its own class with the same name. Measured against the
alternatives: a wrapper object or a closure in the instance breaks ``deepcopy``, ``pickle`` and full-graph compilation,
and a bound method in the instance stays bound to the old module in ``_replicate_for_data_parallel``. A subclass
survives all of these, and ``vars(module)`` gains one entry.

Where a tool has put a forward into the instance already (accelerate keeps the module's own in ``_old_forward``), that
slot is swapped too, because nothing says that its forward ever reaches the class's. A ``partial`` stands in it, as
accelerate puts one there itself: it is copied and pickled with its module. Whichever of the two is called first serves.

A module is swapped once. Further patches lay their site on top of the one that is there, and the top one serves.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

STATE = "_attnpatch"
_SLOTS = ("_old_forward", "forward")
# Weak in its values' owners: a class goes when its base goes.
_classes: weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakKeyDictionary()


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def _is_recorded() -> bool:
    """Whether the call makes a graph (compile, export, ``jit.trace``, ``make_fx``): it is to be the host's own."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._get_dispatch_mode(_PROXY) is not None


def swapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward goes through the site stored on the instance; one per class."""
    if "_attnpatch_base" in vars(base):
        # Built by type(module)(...) of a swapped one; a class on top of that would serve every call twice.
        return base
    found = _classes.get(base)
    if found is not None:
        return found
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _is_recorded():
            return original(self, *args, **kwargs)
        site = self.__dict__.get(STATE)
        if site is None or site in _served.sites:
            return original(self, *args, **kwargs)
        return site.serve(original, self, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        # A copy or a pickle names the importable class, and is made a swapped one again.
        if reduced[0] is copyreg.__newobj__:
            return (_make, (base, *reduced[1][1:]), *reduced[2:])
        return reduced

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            forward=forward,
            __reduce_ex__=__reduce_ex__,
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
            _attnpatch_base=base,
        )

    made = types.new_class(base.__name__, (base,), {}, fill)
    _classes[base] = made
    return made


def _make(base: type[nn.Module], *args: Any) -> nn.Module:
    return base.__new__(swapped_class(base), *args)


def _plain_class(kind: type[Any]) -> type[Any]:
    """``kind`` without a swapped class in it: its base, or the same class on top of that.

    FSDP2 gives a module a class of its own on top of the one it finds, as this module does.
    """
    base = vars(kind).get("_attnpatch_base")
    if base is not None:
        return _plain_class(base)
    bases = tuple(_plain_class(each) for each in kind.__bases__)
    if bases == kind.__bases__:
        return kind
    found = _plain_classes.get(kind)
    if found is None:
        own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        found = _plain_classes[kind] = type(kind)(kind.__name__, bases, own)
    return found


_plain_classes: weakref.WeakKeyDictionary[type[Any], type[Any]] = weakref.WeakKeyDictionary()


def _forward_of_slot(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands in an instance's slot; the slot's own value is kept by the site."""
    site = self.__dict__.get(STATE)
    if site is None:
        return type(self).forward(self, *args, **kwargs)
    if _is_recorded():
        return site.previous(*args, **kwargs)
    outer = _served.sites
    _served.sites = (*outer, site)
    try:
        return site.serve(site.previous, self, args, kwargs, is_bound=True)
    finally:
        _served.sites = outer


class _Served(threading.local):
    """Sites that a slot serves in this thread: their class's forward, if it is reached, has nothing to add."""

    sites: tuple[Any, ...] = ()


_served = _Served()


def can_swap(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def sites_of(module: nn.Module) -> Iterator[Any]:
    """The sites laid on a module, the one that serves first."""
    site = vars(module).get(STATE)
    while site is not None:
        yield site
        site = site.below


def put_in(module: nn.Module, site: Any) -> None:
    """Route the module's forward through ``site``."""
    values = vars(module)
    site.below = values.get(STATE)
    if site.below is not None:
        site.previous = site.below.previous
    else:
        module.__class__ = swapped_class(type(module))
        slot = next((name for name in _SLOTS if name in values), None)
        if slot is not None:
            site.previous = values[slot]
            # Hosts read the signature of a forward (generate does), which a partial has from what it wraps.
            ours = functools.partial(_forward_of_slot, module)
            values[slot] = functools.update_wrapper(ours, site.previous, updated=())
    values[STATE] = site


def take_out(module: nn.Module, site: Any) -> None:
    """Undo ``put_in``, also where another tool has stored or moved the swapped forward since."""
    values = vars(module)
    above = next((other for other in sites_of(module) if other.below is site), None)
    if above is not None:
        above.below = site.below
        return
    if site.below is not None:
        values[STATE] = site.below
        return
    del values[STATE]
    ours = type(module).forward
    module.__class__ = _plain_class(type(module))
    for slot in _SLOTS:
        if slot in values:
            values[slot] = _given_back(values[slot], module, site.previous, ours)


def _given_back(value: Any, module: nn.Module, previous: Any, ours: Any) -> Any:
    """A callable as it would be had the module not been patched, and what it says it wraps likewise."""
    if isinstance(value, functools.partial) and value.func is _forward_of_slot:
        # After a pickle it is the swapped class's: a bound method is pickled by its name.
        return _given_back(previous, module, None, ours)
    if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is ours:
        return types.MethodType(type(module).forward, module)
    if isinstance(value, functools.partial) and "__wrapped__" in vars(value):
        # accelerate's forward names the one below it, for its signature.
        value.__wrapped__ = _given_back(value.__wrapped__, module, previous, ours)
    return value
