"""Decides how a torch function with a deferred argument is answered: by its handler, as a write, or natively.

Handlers are in the op table. A function that is not in it is called on computed tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.rows.arguments import argument, deferred_in, tensors_in
from attnpatch.rows.autograd import checkpoints, kept_values
from attnpatch.rows.deferred import sharing, views
from attnpatch.rows.deferred.handle import after_write
from attnpatch.rows.deferred.history import has_history
from attnpatch.rows.deferred.tensor import (
    DeferredTensor,
    before_write,
    computed,
    detached,
    goes_on_as,
    is_pending,
    materialize,
    wrap,
)
from attnpatch.rows.graph.nodes import map_structure, walk
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.guard import native
from attnpatch.rows.op_table import ALIASES, TO_WHOLE, called, first_in_place, lookup
from attnpatch.rows.ops import out_argument

# Operators that write to their first operand although their name does not end in a single ``_``, each with its plain
# operator.
_PLAIN = {f"__i{name}__": f"__{name}__" for name in "and or xor lshift rshift floordiv mod".split()}


def apply(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Extend the graph if the function is in the op table; otherwise compute the deferred arguments and call it."""
    given, flag = args, _flag(name, args, kwargs)
    is_write = writes(name) or flag is not None
    if args and isinstance(args[0], DeferredTensor) and args[0].handle.values is not None:
        if is_write:
            views.begins_anew(args[0].handle)
        elif lookup(name).is_view and not sharing.is_whole(args[0].handle):
            return _viewed(name, func, args, kwargs)
    out = kwargs.get("out")
    if isinstance(out, DeferredTensor) and sharing.is_part(out.handle):
        views.materialize_memory(out.handle, name)
    args, kwargs = map_structure(args, computed), map_structure(kwargs, computed)
    if not any(is_pending(value) for value in tensors_in(args, kwargs)):
        if is_write and given and isinstance(given[0], DeferredTensor):
            return _write(name, func, given, kwargs)
        return native(func, args, kwargs)
    args, kwargs = first_in_place(name, args, kwargs)
    if kwargs.get("out") is None:
        if is_write and args and is_pending(args[0]):
            return _in_place(name, func, args, kwargs, flag)
        known = lookup(name)
        if known.handler is not None and (not known.is_layout or is_pending(args[0])):
            result = known.handler(name, func, args, kwargs)
            if result is not NotImplemented:
                return _counted(name, result)
    elif (written := out_argument.written(name, func, args, kwargs, apply)) is not NotImplemented:
        return written
    if is_write and args and isinstance(args[0], torch.Tensor):
        return _write(name, func, args, kwargs)
    if name in ALIASES and is_pending(args[0]) and sharing.is_part(args[0].handle):
        views.materialize_memory(args[0].handle, name)
    result = native(func, materialize(args, name), materialize(kwargs, name))
    if lookup(name).is_view and sharing.is_view_of_part(result, args[0]):
        # A slice that was computed alone drops its values at the next write; a native view of them would miss that
        # write.
        views.materialize_memory(args[0].handle, name)
        return native(func, materialize(args, name), materialize(kwargs, name))
    return result


def _counted(name: str, result: Any) -> Any:
    """``result``, computed if a cast has made integers of scores: these are counts or indices, not scores.

    Such results go to functions that cannot take deferred tensors (block masks for a compiled FlexAttention).
    """
    if name not in TO_WHOLE or not isinstance(result, DeferredTensor):
        return result
    node = result.handle.node
    if node.dtype is torch.bool or node.dtype.is_floating_point or node.dtype.is_complex:
        return result
    if not any(isinstance(step, OpNode) and step.work for step in walk(node)):
        return result  # distances between positions are integers before they become a bias
    return materialize(result, name)


def writes(name: str) -> bool:
    """True if a function of this name changes its first argument."""
    return (
        name in _PLAIN or lookup(name).write is not None or (name.endswith("_") and not name.endswith("__"))
    )


def protect(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """Let graphs copy tensors that a function is about to overwrite; True if the function itself writes to a tensor."""
    name = called(func)
    found = _written(name, func, args, kwargs)
    for tensor in tensors_in(found, {}):
        before_write(computed(tensor))
    return bool(found) and name not in _EXPOSING


# Functions that hand out memory, to which code outside torch may then write.
_EXPOSING = frozenset("numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage".split())


def _written(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a function may write to."""
    found = [] if kwargs.get("out") is None else [kwargs["out"]]
    if isinstance(func, (compat.OpOverload, compat.OpOverloadPacket)):
        return [*found, args, kwargs] if _is_mutable(func) else found
    if writes(name) or name in _EXPOSING or _flag(name, args, kwargs) is not None:
        found.append(args[0] if args else kwargs)
    return found


def _is_mutable(func: compat.OpOverload | compat.OpOverloadPacket) -> bool:
    """True if an operator writes to one of its arguments other than ``out``."""
    each = [func] if isinstance(func, compat.OpOverload) else [getattr(func, o) for o in func.overloads()]
    return any(
        value.alias_info is not None and value.alias_info.is_write and not value.is_out
        for overload in each
        for value in overload._schema.arguments
    )


def _write(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A write that no graph can express: done on the real tensor, after all graphs that read it have copied it."""
    target = args[0]
    if isinstance(target, DeferredTensor) and sharing.is_part(target.handle):
        views.materialize_memory(target.handle, name)
    real = target
    if isinstance(target, DeferredTensor):
        # A write under no_grad leaves the history as it is.
        with torch.set_grad_enabled(torch.is_grad_enabled() or has_history(target)):
            real = materialize(target, name)
    rest, kwargs = materialize(args[1:], name), materialize(kwargs, name)
    before_write(real)
    before = _state(real)
    result = native(func, (real, *rest), kwargs)
    if isinstance(target, DeferredTensor) and (before is None or before != _state(real)):
        target.handle.is_written(real)
        if name == "detach_":
            detached(target)
    after_write()
    return target if result is real else result


def _state(tensor: Any) -> Any:
    """A value that changes with every write to a tensor, so that a call that wrote nothing is recognised; ``None``: not
    known.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.is_inference():
        return None
    where = kept_values.memory_of(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()
    return tensor._version, id(tensor.grad_fn), tensor.requires_grad, where


def _viewed(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A view of a slice that was computed alone, apart from its memory."""
    with sharing.as_recipe(args[0].handle) as views:
        result = apply(name, func, args, kwargs)
        views += deferred_in([result], {})
    return result


Plain = tuple[Any, dict[str, Any]]


def _flag(name: str, args: Any, kwargs: dict[str, Any]) -> Plain | None:
    """The arguments without ``inplace=True``; ``None`` if the call does not have it."""
    place = lookup(name).inplace_at
    if place is None or not argument(args, kwargs, place, "inplace", False):
        return None
    return args[:place], {key: kwargs[key] for key in kwargs if key != "inplace"}


def _in_place(
    name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], flag: Plain | None = None
) -> Any:
    """An in-place call such as ``scores += bias``: the graph is extended, and the same Python object is the result.

    Args:
        name: The name of the function; it ends in ``_`` if there is no flag.
        func, args, kwargs: The call.
        flag: The arguments without ``inplace=True``.
    """
    target: DeferredTensor = args[0]
    checkpoints.overwrites(target.handle)
    plain, given = _PLAIN.get(name, name[:-1]), (args, kwargs)
    handler, base = lookup(name).write, func
    if flag is not None:
        plain, handler, given = name, lookup(name).handler, flag
    elif handler is None:
        handler, base = lookup(plain).handler, getattr(torch.Tensor, plain, None) or getattr(F, plain, None)
    # Under no_grad an in-place function changes the values and leaves the autograd history as it is.
    is_silent = not torch.is_grad_enabled() and sharing.has_history(target.handle)
    if base is None or handler is None or is_silent or lookup(plain).is_layout:
        return _write(name, func, args, kwargs)
    result = handler(name if base is func else plain, base, *given)
    old = target.handle.node
    if (
        result is NotImplemented
        or not isinstance(result, DeferredTensor)
        or result.handle.node.shape != old.shape
    ):
        return _write(name, func, args, kwargs)
    node = result.handle.node
    if node.dtype != old.dtype:
        node = OpNode(torch.Tensor.to, (node, old.dtype), {}, node.dims, old.dtype, node.device)
        result = wrap(node, target.handle.call)
    return target if _carried(target, result) else _write(name, func, args, kwargs)


def _carried(target: DeferredTensor, result: DeferredTensor) -> bool:
    """Let a result replace the tensor that was written to, and the same part of tensors that share its memory; False if
    that is impossible.
    """
    if result is target:
        return True
    if has_history(target) and not has_history(result):
        return False  # e.g. ``fill_``: natively the tensor keeps its history, and no gradient passes
    node = result.handle.node
    found = sharing.written(target.handle, node)
    if found is None:
        return False
    for handle in sorted(found, key=lambda handle: len(handle.path)):
        handle.forget()
        tensor, now = handle.tensor, result if found[handle] is node else wrap(found[handle], handle.call)
        if tensor is None:
            handle.node = now.handle.node
        else:
            goes_on_as(tensor, now)
    return True
