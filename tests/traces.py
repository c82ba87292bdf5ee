"""What a model consists of, told without identities, so that two models that were treated alike compare equal.

``vars()`` before and after tell whether a patch left a trace on its own. Where another tool leaves traces of its own,
the same steps of that tool without attnpatch say which.
"""

from __future__ import annotations

import functools
import pathlib
import types
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import attnpatch

PACKAGE = pathlib.Path(attnpatch.__file__).parent
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, range)


def described(model: nn.Module) -> list[tuple]:
    """Every module's class with its bases and all that hangs on it; objects met again are named by their number."""
    return _Description().modules(model)


def first_difference(left: Any, right: Any, path: str = "") -> str:
    """Where two descriptions part; empty where they are the same."""
    if type(left) is type(right) and isinstance(left, (list, tuple)) and len(left) == len(right):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(left, right, strict=True))]
    elif type(left) is type(right) is dict and list(left) == list(right):
        pairs = [(f"{path}.{key}", left[key], right[key]) for key in left]
    else:
        return (
            ""
            if left == right or (left != left and right != right)
            else f"{path}: {left!r:.300} | {right!r:.300}"
        )
    return next(filter(None, (first_difference(one, other, name) for name, one, other in pairs)), "")


class _Description:
    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # ids stay taken

    def modules(self, model: nn.Module) -> list[tuple]:
        return [
            (name, kind(type(module)), {key: self.of(value) for key, value in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)
        ]

    def of(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, type):
            return kind(value)
        if isinstance(value, types.FunctionType):
            assert not value.__module__.startswith("attnpatch"), value
            return "function", value.__module__, value.__qualname__
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if isinstance(value, types.MethodType):
            # By the package's folder: a checkout may have its name, and the environment may lie in that.
            assert PACKAGE not in pathlib.Path(value.__func__.__code__.co_filename).parents, value
            return "method", value.__func__.__qualname__, self.of(value.__self__)
        if isinstance(value, RemovableHandle):
            return "handle"  # numbered through the whole process, like the hooks themselves
        if id(value) in self.numbers:
            return "again", self.numbers[id(value)]
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)
        return self._first(value)

    def _first(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            facts = (tuple(value.shape), value.dtype, value.device, value.requires_grad)
            # Dynamo writes down on a parameter how it last met it; under a mode it looks at more.
            extra = {key: self.of(item) for key, item in vars(value).items() if not key.startswith("_dynamo")}
            return kind(type(value)), facts, None if value.is_meta else _numbers(value), extra
        if isinstance(value, dict):
            if value and all(type(key) is int for key in value):
                # Hooks: their numbers count on through the whole process.
                return kind(type(value)), [self.of(item) for item in value.values()]
            if all(type(key) is str for key in value):
                # FSDP2 numbers parameters through the whole process.
                return kind(type(value)), {k: self.of(v) for k, v in value.items() if not k.endswith("_uid")}
            return kind(type(value)), [(self.of(key), self.of(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return kind(type(value)), [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return kind(type(value)), sorted(map(repr, map(self.of, value)))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords, vars(value))
            return "partial", [self.of(part) for part in parts]
        return kind(type(value)), self.of(getattr(value, "__dict__", None))


def kind(cls: type) -> list[str]:
    """A class and its bases by name."""
    assert not any(name.startswith("_attnpatch") for each in cls.__mro__ for name in vars(each)), cls
    return [f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__]


def _numbers(tensor: torch.Tensor) -> Any:
    try:
        return tensor.detach().flatten().tolist()
    except (RuntimeError, NotImplementedError):
        return "no plain numbers"
