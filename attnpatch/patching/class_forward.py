"""Replaces the forward of a class while some of its instances are patched, and puts it back.

``forward_swap.py`` says why the class's forward is replaced and not the instance's.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.class_methods import Replaced, changing, owner_of
from attnpatch.patching.calls import calls_here

if TYPE_CHECKING:
    from attnpatch.patching.forward_swap import Entry


def is_recorded() -> bool:
    """True if the call is being traced (compile, export, ``jit.trace``, ``make_fx``): the host's own code must run."""
    return torch.compiler.is_compiling() or compat.is_traced()


class ForwardOfClass(Replaced):
    """The forward of one class while instances of it, or of subclasses without a forward of their own, are patched.

    Attributes:
        entries: Weak references to the entries of the patched instances.
        alive: Number of entries after the last garbage collection.
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
        """Called when an instance is no longer patched, or is gone."""
        if not changing:
            return  # the interpreter shuts down, and has emptied this module
        with changing:
            self.entries.discard(reference)
            if not self.entries:
                self.take_out()

    def take_out(self) -> None:
        super().take_out()
        _disarm(self.ours)

    def collect_garbage(self) -> None:
        """Collect garbage, so that unreachable patched models (in cycles with accelerate's hooks) no longer count."""
        if self.is_in_place and len(self.entries) > self.alive:
            gc.collect()
            self.alive = len(self.entries)


# Every ForwardOfClass that is alive, for renew().
_in_use: weakref.WeakSet[ForwardOfClass] = weakref.WeakSet()


# The function that replaces a class's forward ("gate"). It has the globals and the closure of the original, because
# TorchScript and FX read those, and because it can then be turned into a copy of the original. So everything it needs
# itself is in its keyword defaults.
_LINES_ABOVE = "\n" * sys._getframe().f_lineno  # so that tracebacks show the lines below
_GATE = """
def closure({free}):
    def forward(
        self, *args, _attnpatch_original, _attnpatch_class, _attnpatch_is_recorded, _attnpatch_calls, **kwargs
    ):
        if 0:
            ({free})
        if "_attnpatch" in self.__dict__ and not _attnpatch_is_recorded():
            # Another thread may remove the entry meanwhile.
            entry = self.__dict__.get("_attnpatch")
            if entry is not None and entry.forward is _attnpatch_class:
                site = entry.site
                if site is not None and site not in _attnpatch_calls.served:
                    return site.serve(_attnpatch_original, self, args, kwargs)
        return _attnpatch_original(self, *args, **kwargs)
"""


@functools.cache
def _gate_code(free: tuple[str, ...]) -> types.CodeType:
    """The gate's code, with the free variables of the original, because torch's compiler relies on them."""
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
        "_attnpatch_is_recorded": is_recorded,
        "_attnpatch_calls": calls_here,
    }
    return gate


def _disarm(gate: types.FunctionType) -> None:
    """Turn a gate that was taken out into a copy of the original forward: another tool may have bound the gate."""
    original, ours = behind_gate(gate), gate.__kwdefaults__
    if original is gate:
        return
    # In this order calls from other threads find all that they need at every moment.
    gate.__defaults__, gate.__kwdefaults__ = (
        original.__defaults__,
        {**(original.__kwdefaults__ or {}), **ours},
    )
    gate.__code__ = original.__code__
    gate.__kwdefaults__ = original.__kwdefaults__
    gate.__dict__.clear()
    gate.__dict__.update(original.__dict__)


def of_gate(gate: types.FunctionType, name: str) -> Any:
    return gate.__kwdefaults__[name]


def is_gate(function: Any) -> bool:
    """True if a function is a gate, which replaces a class's own forward."""
    return isinstance(function, types.FunctionType) and "_attnpatch_class" in (function.__kwdefaults__ or ())


def behind_gate(function: Any) -> Any:
    """The class's own forward, given it or its gate."""
    return of_gate(function, "_attnpatch_original") if is_gate(function) else function


def _as_function(found: Any) -> types.FunctionType:
    """The entry of a class's namespace as a plain function of the instance and the arguments."""
    # ``isinstance`` is not used: a function that wrapt decorates claims to be a plain one, but must be bound to know
    # its instance.
    if type(found) is types.FunctionType:
        return found

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = found.__get__(self, type(self)) if hasattr(type(found), "__get__") else found
        return bound(*args, **kwargs)

    functools.update_wrapper(forward, found, updated=())
    return forward


def forward_of(kind: type[Any]) -> ForwardOfClass | None:
    """The swap that serves instances of ``kind``, made if needed; ``None`` if they have no forward."""
    owner = owner_of(kind, "forward")
    if owner is None or owner is nn.Module:
        return None
    found = vars(owner)["forward"]
    return of_gate(found, "_attnpatch_class") if is_gate(found) else ForwardOfClass(owner)


def renew() -> None:
    """If a tool has given a class another forward since the class was patched, swap that forward, too."""
    with changing:
        for forward in list(_in_use):
            for entry in [each() for each in list(forward.entries)]:
                if entry is not None and not entry.is_reached:
                    entry.serve()
