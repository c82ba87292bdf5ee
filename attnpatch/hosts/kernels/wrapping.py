"""Puts overridable functions in the places of kernels' functions, now or when their package is imported."""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import wrapt
from torch import nn

from attnpatch import compat
from attnpatch.failures import warn_once
from attnpatch.hosts.kernels import (
    flash_attn,
    flash_attn_3,
    flash_attn_4,
    flash_attn_cache,
    flex,
    sageattention,
    torch_varlen,
    xformers,
)
from attnpatch.rows.kernels.table import Kernel, kernel_of, overridable


def _readers(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(module).items() if hasattr(value, "__signature__")}


_SAGE = _readers(sageattention)
# By module: its functions, with their readers. xFormers keeps its kernels in mslk since 2026.
READERS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch.nn.attention.flex_attention": {"flex_attention": flex.flex_attention},
    "flash_attn.flash_attn_interface": {**_readers(flash_attn), **_readers(flash_attn_cache)},
    "flash_attn_interface": _readers(flash_attn_3),
    "flash_attn_3.flash_attn_interface": _readers(flash_attn_3),
    "flash_attn.cute.interface": _readers(flash_attn_4),
    "xformers.ops.fmha": _readers(xformers),
    "mslk.attention.fmha": _readers(xformers),
    "sageattention.core": {
        name: read for name, read in _SAGE.items() if name.partition("_")[0] != "sageattn3"
    },
    "sageattn3.api": {"sageattn3_blackwell": _SAGE["sageattn3_blackwell"]},
    "torch.nn.attention.varlen": _readers(torch_varlen),
}
# Functions that hold all scores at once.
HOLD_SCORES = frozenset(["flex_attention"])
_Names = Iterable[tuple[str, Any]]
_lock = threading.Lock()
_is_watching = False


def watch() -> None:
    """Wrap the kernels of packages that are imported, and of others when they are imported."""
    global _is_watching
    with _lock:
        is_first, _is_watching = not _is_watching, True
    for name in READERS:
        if is_first:
            # Runs at once if the module is imported already.
            wrapt.register_post_import_hook(_wrap_module, name)
        elif (module := sys.modules.get(name)) is not None:
            _wrap_module(module)  # if it was imported or executed again since


def _wrap_module(module: types.ModuleType) -> None:
    try:
        found = [
            Kernel(name, function, read, holds_scores=name in HOLD_SCORES)
            for name, read in READERS[module.__name__].items()
            if callable(function := getattr(module, name, None)) and kernel_of(function) is None
        ]
        if found:
            put_in_place(*found)
    except Exception as error:
        warn_once(f"wrapping the kernels of {module.__name__}", error)


def put_in_place(*kernels: Kernel) -> list[Callable[..., Any]]:
    """Replace kernels' functions in every module that has them among its names.

    Returns:
        The overridable functions.
    """
    ours = {id(kernel.native): overridable(kernel) for kernel in kernels}
    _replace(
        _modules(), lambda names: [(name, ours[id(value)]) for name, value in names if id(value) in ours]
    )
    return list(ours.values())


def find_compiled(model: nn.Module) -> None:
    """Make compiled kernels (``torch.compile(flex_attention)``) overridable in loaded modules and in a model's parts."""
    if "torch._dynamo" not in sys.modules:
        return  # nothing was compiled
    owners = {id(owner): owner for part in model.modules() for owner in (part, *type(part).__mro__)}
    # A class made by ``exec`` may have no ``__module__``.
    own = {getattr(owner, "__module__", None) for owner in owners.values() if isinstance(owner, type)}
    beside = [sys.modules[name] for name in {"__main__", *own} if name in sys.modules]
    known = _sizes.get
    changed = [one for one in _modules() if known(id(one)) != len(getattr(one, "__dict__", ()))]
    _replace([*changed, *beside, *owners.values()], _compiled)
    _sizes.update((id(one), len(getattr(one, "__dict__", ()))) for one in changed)


# The number of names that each module had when it was last searched: searching all of them takes 50 ms. The script's own
# names, and those beside the model's classes, are searched every time.
_sizes: dict[int, int] = {}


def _compiled(names: _Names) -> list[tuple[str, Any]]:
    functions = [(name, value) for name, value in names if type(value) is types.FunctionType]
    return [(name, ours) for name, value in functions if (ours := _of_compiled(value)) is not None]


def _of_compiled(value: types.FunctionType) -> Callable[..., Any] | None:
    original = vars(value).get(compat.COMPILED_FUNCTION)
    kernel = None if original is None else kernel_of(original) or kernel_of(original, is_native=True)
    if kernel is None or kernel_of(value) is not None:
        return None
    read = flex.compiled if kernel.read is flex.flex_attention else kernel.read
    return overridable(dataclasses.replace(kernel, native=value, read=read, holds_scores=False))


def _modules() -> list[Any]:
    return list(sys.modules.values())


def _replace(owners: Iterable[Any], found: Callable[[_Names], list[tuple[str, Any]]]) -> None:
    """Replace what is found among the names of modules, classes and objects."""
    for owner in owners:
        try:
            for name, new in found(vars(owner).items()):
                setattr(owner, name, new)
        except (TypeError, AttributeError, RuntimeError):
            continue  # it has no names, they cannot be set, or another thread is changing them
