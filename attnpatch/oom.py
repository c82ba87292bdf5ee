"""Running out of memory: how it is recognised, how a step becomes smaller until it fits, and what was tried before giving up.

A native call that fails is answered by rows (``rows/attention_call.py``, ``AttentionCall.answers``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

T = TypeVar("T")
# CUDA and XPU have a type for it; MPS, CPU and the libraries below them have only words.
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class Attempts:
    """What ran out of memory on the way to one result.

    Attributes:
        error: The first error.
        tried: What was tried, in words.
    """

    def __init__(self) -> None:
        self.error: RuntimeError | None = None
        self.tried: list[str] = []

    def failed(self, error: RuntimeError, what: str) -> None:
        """Note a failure, without the frames of its traceback: they hold the tensors that took the memory."""
        if self.error is None:
            self.error = error.with_traceback(None)
            error.__context__ = None
        self.tried.append(what)

    def give_up(self) -> NoReturn:
        """Raise the first error, with what was tried in its notes."""
        assert self.error is not None
        self.error.add_note(f"attnpatch tried, and had no memory for: {', then '.join(self.tried)}")
        raise self.error from None


def until_it_fits(
    work: Callable[[], T], smaller: Callable[[], bool], said: Callable[[], str], attempts: Attempts
) -> T:
    """``work()``, again with a smaller step as long as it runs out of memory.

    Args:
        work: Does all of it with the present step.
        smaller: Makes the step smaller, and forgets what was done; ``False``: it is as small as it gets.
        said: The present step in words.
        attempts: What was tried before.

    Raises:
        RuntimeError: There is no memory for the smallest step either; the first error.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            attempts.failed(error, said())
        # Out of the handler, where the error holds no tensors any more.
        if not smaller():
            attempts.give_up()
