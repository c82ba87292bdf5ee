"""Keeps attnpatch's own errors out of a user's forward: an operation that fails is run natively, on computed tensors.

A module is never run again, since a cache would be appended to twice. An operation is run natively only if the host's
function has not run for it yet: otherwise an in-place function would write twice, and random numbers would be drawn
twice. So all code that calls the host's function reports it (``ran``).

Errors on purpose pass: out of memory, the end of a checkpoint's recomputation, a refusal (AttnpatchError). An error of
the host's own is raised by the native call, as without attnpatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnpatch import compat
from attnpatch.errors import AttnpatchError
from attnpatch.failures import warn_once
from attnpatch.oom import is_out_of_memory
from attnpatch.rows.autograd import selective_checkpoints
from attnpatch.rows.thread_state import here

if TYPE_CHECKING:
    from attnpatch.rows.attention_call import Counters

_PASSING = (AttnpatchError, compat.StopRecomputation or AttnpatchError)


def ran(result: Any) -> Any:
    """Report that the host's own function has run for this operation and returned ``result``."""
    if here.results is not None:
        here.results.append(result)
    return result


def native(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The host's own call. An error that it raises is the host's, so the call is not tried again."""
    try:
        if here.hidden:
            with selective_checkpoints.shown():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
    except Exception as error:
        here.raised = id(error)
        raise
    if here.results is not None:  # as ``ran`` does
        here.results.append(result)
    return result


def passes(error: Exception) -> bool:
    """True if an error is not a failure of attnpatch's own code."""
    return isinstance(error, _PASSING) or is_out_of_memory(error)


def guarded(
    ours: Callable[..., Any],
    args: tuple[Any, ...],
    natively: Callable[[], Any],
    name: str,
    counters: Counters | None,
) -> Any:
    """``ours(*args)``. If it fails: the result that the host's own function has returned already, or ``natively()``.

    Args:
        ours: attnpatch's implementation of an operation.
        args: Its arguments.
        natively: The host's own implementation, on computed tensors.
        name: The operation's name, for the warning.
        counters: Counts the failure.
    """
    outer, here.results = here.results, []
    try:
        if selective_checkpoints.is_active():
            with selective_checkpoints.hidden():
                return ours(*args)
        return ours(*args)
    except Exception as error:
        if passes(error) or here.raised == id(error):
            raise
        result = here.results[0] if here.results else natively()
        failed(name, error, counters)
        return result
    finally:
        here.results = outer
        if outer is None:
            here.raised = None


def failed(name: str, error: Exception, counters: Counters | None) -> None:
    """Warn once about a failure of attnpatch's own code, and count it."""
    warn_once(name, error)
    if counters is not None:
        try:
            counters.count("failed")
        except Exception as other:
            warn_once("counting", other)


def attempted(step: Callable[..., Any], *args: Any, name: str, counters: Counters | None = None) -> Any:
    """``step(*args)``, or ``None`` if it fails. For steps on which no result depends."""
    try:
        return step(*args)
    except Exception as error:
        if passes(error):
            raise
        failed(name, error, counters)
        return None
