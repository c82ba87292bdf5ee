"""No error of ours leaves a user's forward: the operation that failed is answered natively, on computed tensors.

Modules are never run again: a cache would be appended to twice. An operation is run natively only if it was not before: a
step in place would be done twice, and random numbers drawn twice. So whatever calls the host's own function for it says
so (``ran``).

What is raised on purpose passes: running out of memory, a checkpoint that has seen enough, a refusal in our own words. An
error of the host's own is raised by the native call, as without attnpatch.
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
    """Say that the host's own function has run for this operation, and given ``result``."""
    if here.results is not None:
        here.results.append(result)
    return result


def native(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The host's own call. What it raises is the host's, and not tried again."""
    try:
        if selective_checkpoints.is_hidden():
            with selective_checkpoints.shown():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
    except Exception as error:
        here.raised = id(error)
        raise
    return ran(result)


def passes(error: Exception) -> bool:
    """Whether an error is no failure of ours."""
    return isinstance(error, _PASSING) or is_out_of_memory(error)


def guarded(
    ours: Callable[..., Any],
    args: tuple[Any, ...],
    natively: Callable[[], Any],
    name: str,
    tally: Counters | None,
) -> Any:
    """``ours(*args)``; where that fails, what the host's own function has given already, or ``natively()``.

    Args:
        ours: Our way to do an operation.
        args: Its arguments.
        natively: The host's own, on computed tensors.
        name: Of the operation, for the warning.
        tally: Counts the failure.
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
        failed(name, error, tally)
        return result
    finally:
        here.results = outer
        if outer is None:
            here.raised = None


def failed(name: str, error: Exception, tally: Counters | None) -> None:
    """Warn of a failure of ours once, and count it."""
    warn_once(name, error)
    if tally is not None:
        try:
            tally.count("failed")
        except Exception as other:
            warn_once("counting", other)


def attempted(step: Callable[..., Any], *args: Any, name: str, tally: Counters | None = None) -> Any:
    """``step(*args)``, of which nothing but memory depends; ``None`` where it fails."""
    try:
        return step(*args)
    except Exception as error:
        if passes(error):
            raise
        failed(name, error, tally)
        return None
