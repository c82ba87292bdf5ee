"""The names that a module's code uses: in its forward, in functions that it calls, and in submodules that it calls.

Byte code is read, because it exists where source does not (notebooks, ``exec``). Names prove little: a module found by
them is only a candidate. So it is safe to look wherever a softmax may be kept (a list, a partial, a processor object,
another project).
"""

from __future__ import annotations

import dis
import functools
import itertools
import re
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Depth of calls that are followed; number of items of a list or dict that are read; depth of nested containers.
_DEPTH, _ITEMS, _NESTED = 3, 32, 3
# The operation and argument that ``@`` and ``@=`` have in byte code. Since Python 3.11 all operators share one
# operation; before, each had its own.
_MATMULS = frozenset(
    (step.opcode, step.arg or 0)
    for step in dis.get_instructions(compile("a @ b; a @= b", "", "exec"))
    if step.opname == "BINARY_OP" or "MATRIX_MULTIPLY" in step.opname
)
_OPERATOR = re.compile(r"aten::(\w+)")
_WRAPPERS = (
    staticmethod,
    classmethod,
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
    property,
)

# Projects without attention, which are not followed, to save time.
_SKIPPED = frozenset(
    "attnpatch builtins collections contextlib copy dataclasses enum functools inspect itertools logging math operator "
    "os random re types typing warnings".split()
)
_INTERNAL = frozenset(vars(nn.Module()))
# What holds no code.
_PLAIN = frozenset(
    [int, float, bool, str, set, type(None), torch.Tensor, torch.dtype, torch.device, torch.Size]
)

_classes: weakref.WeakKeyDictionary[type[nn.Module], dict[int, frozenset[str]]] = weakref.WeakKeyDictionary()
_held: weakref.WeakKeyDictionary[type[nn.Module], weakref.WeakKeyDictionary[type[Any], frozenset[str]]] = (
    weakref.WeakKeyDictionary()
)
_methods: weakref.WeakKeyDictionary[type[nn.Module], dict[str, frozenset[str]]] = weakref.WeakKeyDictionary()


def names_of_class(kind: type[nn.Module], depth: int = _DEPTH) -> frozenset[str]:
    """Names used by the forward of a class and by the functions that it calls; read once per class."""
    if issubclass(kind, torch.jit.ScriptModule):
        return frozenset()  # its forward is in no class; see ``names_of_instance``
    found = _classes.setdefault(kind, {})
    if depth not in found:
        found[depth] = frozenset([*_torch_bases(kind), *_Reader(kind).names(kind.forward, depth)])
    return found[depth]


def names_of_instance(module: nn.Module) -> set[str]:
    """Names in the code that a module holds beside its submodules: functions, processors, and containers of these."""
    if isinstance(module, torch.jit.ScriptModule):
        return set(_operators(module, "inlined_graph"))
    kind = type(module)
    reader = _Reader(kind, names_of_class(kind))
    found: set[str] = set()
    for name, value in vars(module).items():
        if name in _INTERNAL or type(value) in _PLAIN:
            continue
        if callable(value) or isinstance(value, (list, tuple, dict, types.ModuleType, *_WRAPPERS)):
            found.update(reader.names(value, _DEPTH))
        else:
            found |= _names_of_held(kind, type(value))
    return found


def _names_of_held(kind: type[nn.Module], held: type[Any]) -> frozenset[str]:
    """Names in the methods that modules of a class may call on a held object (a config); read once per pair of classes."""
    known = _held.setdefault(kind, weakref.WeakKeyDictionary())
    if held not in known:
        reader = _Reader(kind, names_of_class(kind))
        known[held] = frozenset(() if is_torch(held) else reader.of_type(held, _DEPTH))
    return known[held]


def names_of_methods(module: nn.Module, owner: type[nn.Module]) -> set[str]:
    """The names in the code of those methods of ``module`` that its owner calls (instead of its forward)."""
    kind, called = type(module), names_of_class(owner, 1)
    if kind not in _methods:
        own = {name for base in kind.__mro__ if not is_torch(base) for name in vars(base)}
        _methods[kind] = dict.fromkeys(own - {"forward", "__call__", "__init__"})
    found: set[str] = set()
    for name in called & _methods[kind].keys():
        words = _methods[kind][name]
        if words is None:
            reader = _Reader(kind)
            words = frozenset(n for value in reader.methods(name) for n in reader.names(value, _DEPTH))
            _methods[kind][name] = words
        found |= words
    return found


def _torch_bases(kind: type[Any]) -> Iterator[str]:
    """Names of torch's classes among a class and its bases, such as ``Softmax``."""
    return (base.__name__ for base in kind.__mro__ if is_torch(base))


def is_torch(value: Any) -> bool:
    """True if a function or a class is torch's own."""
    return _project(getattr(value, "__module__", None)) == "torch"


def _project(name: Any) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""


class _Reader:
    """Follows code from one class on.

    Args:
        kind: The class in which methods are looked up.
        called: Names of methods that may be called on an object.
        seen: What was read already, and how many calls deep it was followed.
    """

    def __init__(
        self, kind: type[Any], called: Iterable[str] = (), seen: dict[Any, int] | None = None
    ) -> None:
        self.kind, self.called = kind, frozenset(called)
        self.seen: dict[Any, int] = {} if seen is None else seen

    def names(self, value: Any, depth: int) -> Iterator[str]:
        """Names in the code of a callable, or of the callables that an object holds."""
        if depth < 0:
            return
        if isinstance(value, _WRAPPERS):
            for item in _wrapped(value):
                yield from self.names(item, depth)
        elif isinstance(value, (list, tuple, dict)):
            for item in _items(value, _NESTED):
                # A class in a container does not count as called: transformers lists classes whose outputs it collects.
                if not isinstance(item, type):
                    yield from self.names(item, depth)
        elif isinstance(value, types.MethodType):
            yield from _Reader(type(value.__self__), (), self.seen).names(value.__func__, depth)
        elif isinstance(value, torch.jit.ScriptFunction):
            yield from _operators(value, "graph")
        elif isinstance(value, types.FunctionType):
            yield value.__name__
            yield from self._in_function(value, depth)
        elif isinstance(value, (type, types.BuiltinFunctionType, types.MethodDescriptorType)):
            yield value.__name__
            if isinstance(value, type):
                yield from self.of_type(value, depth)
        elif isinstance(value, nn.Module):
            # The module is in a plain list, or in the globals of a file.
            for part in itertools.islice(value.modules(), _ITEMS):
                yield from self.of_type(type(part), depth)
        elif is_torch(type(value)):
            yield str(getattr(value, "__name__", ""))  # an operator of ``torch.ops``
        elif not isinstance(value, types.ModuleType):
            yield from self.of_type(type(value), depth)
            yield from self._held_by(value, depth)

    def _held_by(self, value: Any, depth: int) -> Iterator[str]:
        """Names in what a processor holds: functions, tables of them, a softmax module; not the module it serves."""
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict) or not callable(value) or self._is_read(id(value), depth):
            return
        for item in _items(held, _NESTED):
            if isinstance(item, nn.Module):
                is_helper = is_torch(type(item)) and next(item.parameters(), None) is None
            else:
                is_helper = callable(item)
            if is_helper and not isinstance(item, type):
                yield from self.names(item, depth - 1)

    def _is_read(self, what: Any, depth: int) -> bool:
        """True if something was already followed this deep; otherwise record that it was."""
        if self.seen.get(what, -1) >= depth:
            return True
        self.seen[what] = depth
        return False

    def of_type(self, kind: type[Any], depth: int) -> Iterator[str]:
        """Names in methods that a call runs: a processor's ``__call__``, the forward of an ``autograd.Function``."""
        yield from _torch_bases(kind)
        if (
            is_torch(kind)
            or _project(kind.__module__) in _SKIPPED
            or self._is_read((kind, self.called), depth)
        ):
            return
        reader = _Reader(kind, (), self.seen)
        entry = "forward" if issubclass(kind, (nn.Module, torch.autograd.Function)) else "__call__"
        for name in sorted({entry, *self.called}):
            for value in reader.methods(name):
                yield from reader.names(value, depth)

    def _in_function(self, func: types.FunctionType, depth: int) -> Iterator[str]:
        # First the decorated function, then the decorator's own code.
        yield from self.names(getattr(func, "__wrapped__", None), depth)
        if is_torch(func) or _project(func.__module__) in _SKIPPED or self._is_read(func.__code__, depth):
            return
        names = frozenset(_names(func.__code__))
        yield from names
        reader = _Reader(self.kind, names, self.seen)
        for value in reader.called_by(func):
            yield from reader.names(value, depth - 1)

    def called_by(self, func: types.FunctionType) -> Iterator[Any]:
        """Values that the names in a function's code may stand for."""
        cells = zip(func.__code__.co_freevars, func.__closure__ or (), strict=False)
        captured = {name: _content(cell) for name, cell in cells}
        spaces = [captured, func.__globals__, *map(vars, _modules(func, self.called))]
        yield from (*(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values())
        for name in sorted(self.called):
            yield from self.methods(name, everywhere="super" in self.called)
            yield from (space[name] for space in spaces if name in space)

    def methods(self, name: str, everywhere: bool = False) -> list[Any]:
        """A class's methods of one name; with ``everywhere`` those of its bases, too, which ``super`` reaches."""
        found = [vars(base)[name] for base in self.kind.__mro__ if name in vars(base) and not is_torch(base)]
        return found if everywhere else found[:1]


def _items(value: Any, nested: int) -> Iterator[Any]:
    """The items of nested lists and dicts."""
    if not isinstance(value, (list, tuple, dict)):
        yield value
    elif nested:
        for item in itertools.islice(value.values() if isinstance(value, dict) else value, _ITEMS):
            yield from _items(item, nested - 1)


def _wrapped(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, property):
        return [value.fget]
    return [value.__func__ if isinstance(value, (staticmethod, classmethod)) else value.func]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    if not _MATMULS.isdisjoint(zip(code.co_code[::2], code.co_code[1::2], strict=True)):
        yield "__matmul__"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _modules(func: types.FunctionType, names: Iterable[str]) -> list[types.ModuleType]:
    """The Python modules that a function's code names, except those of torch.

    A module that is imported inside the function is found, too, once it has been imported somewhere.
    """
    package = func.__globals__.get("__package__") or ""
    named = [func.__globals__.get(name) for name in names]
    named += [sys.modules.get(full) for name in names for full in (name, f"{package}.{name}")]
    found = {id(module): module for module in named if _is_foreign(module)}
    waiting = list(found.values())
    while waiting:  # ``project.ops.attention.attend``
        space = vars(waiting.pop())
        for name in names:
            module = space.get(name)
            if _is_foreign(module) and id(module) not in found:
                found[id(module)] = module
                waiting.append(module)
    return list(found.values())


def _is_foreign(value: Any) -> bool:
    project = _project(getattr(value, "__name__", None)) if isinstance(value, types.ModuleType) else ""
    return project not in ("", "torch", *_SKIPPED)


def _operators(scripted: Any, graph: str) -> Iterator[str]:
    """The operators of a scripted function or module, and the function's name."""
    yield getattr(scripted, "name", "")
    try:
        yield from _OPERATOR.findall(str(getattr(scripted, graph)))
    except (AttributeError, RuntimeError):
        return  # a scripted module without a forward


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # an empty cell: the name is not bound yet
