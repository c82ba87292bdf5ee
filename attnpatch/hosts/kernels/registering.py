"""``register_kernel``: an attention kernel of the user's, seen as those of known packages are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.errors import AttnpatchError, PatchError, in_one_line
from attnpatch.hosts.kernels.wrapping import put_in_place
from attnpatch.oom import is_out_of_memory
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import (
    CannotRead,
    Kernel,
    kernel_of,
    read_otherwise,
    registered,
    watch_operator,
)

_OPERATORS = (compat.OpOverload, compat.OpOverloadPacket)


def register_kernel(function: Any = None, /, *, read: Any = None) -> Any:
    """Make an attention kernel known, so that its calls are in block maps and can be replaced; usable as a decorator.

    The kernel still computes what it does. ``read`` says what a call means. Before a map shows a call, a few rows of the
    kernel's result are compared with that; a call that does not agree is left out of the map, with the reason. With
    ``apply(model, replace_kernels=True)``, torch's functions compute the calls instead, by rows when memory is short.

    Args:
        function: A Python function, a function of a C++ extension, a class derived from ``torch.autograd.Function`` or
            its ``apply``, or an operator (``torch.library.custom_op``, ``torch.ops.mine.attention``). Without it a
            decorator is returned.
        read: Takes the arguments of the function and returns a ``KernelCall``. It raises ``NotImplementedError`` with the
            reason for a call that ``KernelCall`` cannot express; the kernel then computes it, and no map shows it.

    Returns:
        What is to be called from now on. A function is replaced wherever a module has it among its names. Elsewhere (in a
        closure, a list, an attribute of an object) the old function stays, and its calls are not seen: put the returned
        one there. Operators and classes are returned as they are, and all their calls are seen.

        It holds until the process ends; registering a kernel again replaces its reader. Register it before ``apply`` and
        ``capture``: modules that are not attention by their name are recognised by calling it.

    Raises:
        PatchError: ``function`` or ``read`` cannot be called; later, inside a model's call: ``read`` fails, or returns
            something else than a ``KernelCall``.
    """
    if not callable(read):
        raise PatchError(
            "register_kernel() needs read=, a function that takes the kernel's arguments and returns an "
            f"attnpatch.KernelCall, not {read!r:.80}"
        )
    if function is None:
        return functools.partial(register_kernel, read=read)
    if isinstance(function, nn.Module) or not callable(function):
        raise PatchError(
            f"register_kernel() takes a function, not {function!r:.80}; attnpatch.register() takes classes of modules"
        )
    owner = function if isinstance(function, type) else getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        _register_class(owner, read)
        return owner if function is owner else owner.apply
    if isinstance(function, type):
        raise PatchError(
            f"register_kernel() takes a function or a torch.autograd.Function, not the class {function.__name__}; "
            "attnpatch.register() takes classes of modules"
        )
    operator = (
        function if isinstance(function, _OPERATORS) else getattr(function, compat.CUSTOM_OPERATOR, None)
    )
    name = getattr(function if operator is None else operator, "__name__", type(function).__name__)
    name = str(name).partition(".")[0]  # of "attention.default"
    registered.add(name)
    reader = _checked(name, read)
    if kernel_of(function) is not None:
        read_otherwise(function, reader)
        return function
    kernel = Kernel(name, function, reader)
    if not isinstance(operator, _OPERATORS):
        return put_in_place(kernel)[0]
    packet = getattr(operator, "overloadpacket", operator)
    watch_operator(kernel, packet, *(getattr(packet, one) for one in packet.overloads()))
    return function


def _register_class(kind: type[Any], read: Callable[..., Any]) -> None:
    """Replace ``apply`` of a ``torch.autograd.Function``."""
    name = kind.__name__
    registered.add(name)
    reader = _checked(name, read)
    if kernel_of(kind.apply) is not None:
        read_otherwise(kind.apply, reader)
    else:
        (ours,) = put_in_place(Kernel(name, kind.apply, reader))
        kind.apply = staticmethod(ours)


def _checked(name: str, read: Callable[..., Any]) -> Callable[..., KernelCall]:
    """A reader whose errors say that they are the reader's."""

    @functools.wraps(read)
    def checked(*args: Any, **kwargs: Any) -> KernelCall:
        try:
            call = read(*args, **kwargs)
        except NotImplementedError as reason:
            raise CannotRead(in_one_line(reason) or "its reader cannot express this call") from reason
        except AttnpatchError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise PatchError(
                f"the reader of {name} failed with {type(error).__name__}: {in_one_line(error, 200)}; read= of "
                "register_kernel() takes the arguments of the kernel"
            ) from error
        if not isinstance(call, KernelCall):
            raise PatchError(
                f"the reader of {name} returned {type(call).__name__}; read= of register_kernel() returns an "
                "attnpatch.KernelCall"
            )
        _check_shapes(name, call)
        return call

    return checked


def _check_shapes(name: str, call: KernelCall) -> None:
    shapes = [list(tensor.shape) for tensor in (call.query, call.key, call.value)]
    query, key, value = shapes
    if all(len(shape) == 4 for shape in shapes):
        is_grouped = key[1] > 0 and query[1] % key[1] == 0
        if is_grouped and query[0] == key[0] and query[3] == key[3] and key[:3] == value[:3]:
            return
    raise PatchError(
        f"the reader of {name} returned query {query}, key {key} and value {value}; KernelCall takes [batch, heads, "
        "length, width], the same batch for all three, and heads of the query that are a multiple of those of the keys"
    )
