"""Finds attention that nobody named or registered: a module that computes softmax of a product of its inputs.

Two steps, because neither will do alone. Code that names a softmax and a product can be anything (a router of experts
and the product that gathers what they say), so it only makes a candidate. What a candidate computes is seen in its
first call, which cannot be waited for when ``apply`` is to say at once that a model has nothing to patch.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_COMPLETE = frozenset(["scaled_dot_product_attention", "multi_head_attention_forward"])
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ bmm baddbmm einsum".split())
_SOFTMAXES = frozenset(["softmax", "special_softmax"])
_DIVISIONS = frozenset("div true_divide divide __truediv__ div_".split())
# Sums over what they are given, so that what comes out are scores no more unless only heads were mixed.
_LAYERS = frozenset("linear conv1d conv2d conv3d mm addmm mv dot addbmm tensordot inner bilinear".split())
_DEPTH = 3

# What a tensor is to the module that is watched.
INPUT, SCORES, PROBABILITIES = 1, 2, 3

_classes: weakref.WeakKeyDictionary[type[nn.Module], frozenset[str]] = weakref.WeakKeyDictionary()


def is_candidate(module: nn.Module) -> bool:
    """Whether the code of a module's forward, and of what it calls beside its submodules, names what attention takes."""
    kind = type(module)
    # A class that exec makes may name no module.
    if _is_torch(getattr(kind, "__module__", None)) or isinstance(module, torch.jit.ScriptModule):
        return False
    if kind not in _classes:
        _classes[kind] = frozenset(_words(kind.forward, kind, _DEPTH, set()))
    found = _classes[kind]
    if found & _COMPLETE:
        return True
    normalises = found & _SOFTMAXES or {"exp", "sum"} <= found or _holds_softmax(module)
    return bool(normalises and found & _PRODUCTS)


def _holds_softmax(module: nn.Module) -> bool:
    if any(isinstance(child, nn.Softmax) for child in module.children()):
        return True
    values = [
        value.func if isinstance(value, functools.partial) else value for value in vars(module).values()
    ]
    return any(callable(value) and getattr(value, "__name__", "") in _SOFTMAXES for value in values)


def _words(func: Any, kind: type[nn.Module], depth: int, seen: set[Any]) -> Iterator[str]:
    """Every name in a function's code, and in that of the methods and functions it names."""
    func = inspect.unwrap(func)
    code = getattr(func, "__code__", None)
    if code is None or code in seen:
        return
    seen.add(code)
    names = set(_names(code))
    yield from names
    if depth:
        for called in _called(func, names, kind):
            yield from _words(called, kind, depth - 1, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for step in dis.get_instructions(code):
        if step.opname == "BINARY_OP" and step.argrepr in ("@", "@="):
            yield "__matmul__"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _called(func: Any, names: set[str], kind: type[nn.Module]) -> Iterator[Callable[..., Any]]:
    cells = zip(func.__code__.co_freevars, func.__closure__ or (), strict=False)
    captured = {name: value for name, cell in cells if (value := _content(cell)) is not None}
    modules = [func.__globals__[name] for name in names if name in func.__globals__]
    modules = [value for value in modules if inspect.ismodule(value) and not _is_torch(value.__name__)]
    for name in sorted(names):
        own = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        spaces = (captured, func.__globals__, *map(vars, modules))
        for value in (own, *(space.get(name) for space in spaces)):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if inspect.isfunction(value) and not _is_torch(value.__module__):
                yield value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # a name that is bound later


def _is_torch(name: str | None) -> bool:
    return (name or "").partition(".")[0] == "torch"


class Watch(TorchFunctionMode):
    """Follows the inputs of one call of a candidate: to a product of two of them, its softmax, a product with that.

    Args:
        inputs: What the candidate is called with.
        failed: Called with an error of ours, which does not end the call.

    Attributes:
        found: Whether all three were seen.
        has_failed: Whether something may have been missed.
        is_paused: While an attention module inside the candidate runs: what it computes is its own.
    """

    def __init__(self, inputs: Any, failed: Callable[[str, Exception], None]) -> None:
        super().__init__()
        self.failed, self.has_failed = failed, False
        self.found = self.is_paused = False
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.mark(inputs)

    def mark(self, value: Any, as_what: int = INPUT) -> None:
        for tensor in _tensors(value):
            self.marks[tensor] = as_what

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        try:
            # Before the call: one in place changes what a tensor is.
            given = [(tensor, self.marks.get(tensor, 0)) for tensor in _tensors((args, kwargs))]
        except Exception as error:
            self._failed(error)
            given = []
        result = func(*args, **kwargs)
        try:
            self._note(getattr(func, "__name__", ""), given, args, result)
        except Exception as error:
            self._failed(error)
        return result

    def _failed(self, error: Exception) -> None:
        self.has_failed = True
        self.failed("the look at an operation of a first call", error)

    def _note(self, name: str, given: list[tuple[torch.Tensor, int]], args: Any, result: Any) -> None:
        most = max((mark for _, mark in given), default=0)
        if most:
            what = INPUT if self.is_paused else self._became(name, given, result, most)
            self.mark(result, what)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                self.mark(args[:1], what)

    def _became(self, name: str, given: list[tuple[torch.Tensor, int]], result: Any, most: int) -> int:
        known = [mark for _, mark in given if mark]
        if name in _COMPLETE:
            self.found = True
            return INPUT
        if name in _PRODUCTS and len(known) > 1:
            self.found = self.found or PROBABILITIES in known
            return SCORES if most == INPUT else INPUT
        if name in _PRODUCTS or name in _LAYERS:
            source = next(tensor for tensor, mark in given if mark == most)
            is_mixed = isinstance(result, torch.Tensor) and result.numel() == source.numel()
            return most if is_mixed else INPUT
        if most == SCORES and (name in _SOFTMAXES or (name in _DIVISIONS and known == [SCORES, SCORES])):
            return PROBABILITIES
        return most


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
