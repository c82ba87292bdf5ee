"""The base of both modes: sees torch functions, answers some of them, and lets no error in attnpatch's own code escape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.deferred.tensor import natively


@contextlib.contextmanager
def without(mode: TorchFunctionMode) -> Iterator[None]:
    """Switch a mode off inside the block, if it is the innermost one; below a mode of the host's it stays active."""
    is_last = compat.function_mode() is mode
    with compat.without_function_mode() if is_last else contextlib.nullcontext():
        yield


class Watching(TorchFunctionMode):
    """A TorchFunctionMode that sees the torch functions of one call.

    Args:
        call: Policy and counters of that call.
    """

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call

    def is_active(self) -> bool:
        """True if the mode is on torch's stack; not so inside its own answers (``autograd.grad`` recomputes there)."""
        return any(mode is self for mode in compat.function_modes())

    def answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a torch function."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch.compile traces a part of the module: the trace must contain the host's own calls only.
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return guard.guarded(
            self.answer,
            (func, types, args, kwargs),
            lambda: natively(func, args, kwargs),
            getattr(func, "__name__", str(func)),
            self.call.counters,
        )
