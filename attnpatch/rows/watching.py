"""What both watches are: modes that see torch's functions, answer some of them, and let no error of ours out."""

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
    """Take a mode away for a while; below a mode of the host's it stays."""
    is_last = compat.function_mode() is mode
    with compat.without_function_mode() if is_last else contextlib.nullcontext():
        yield


class Watching(TorchFunctionMode):
    """Sees the calls of torch's functions while it is active.

    Args:
        call: Policy and counters of the call that is watched.
    """

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call

    def is_active(self) -> bool:
        """Whether calls come here: none does from inside an answer (a checkpoint runs again in ``autograd.grad``)."""
        return any(mode is self for mode in compat.function_modes())

    def answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call of torch's function gives."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A part that is compiled on its own is traced through the mode.
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return guard.guarded(
            self.answer,
            (func, types, args, kwargs),
            lambda: natively(func, args, kwargs),
            getattr(func, "__name__", str(func)),
            self.call.tally,
        )
