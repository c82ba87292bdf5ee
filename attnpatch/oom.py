"""Running out of memory: recognises it, makes a step smaller until it fits, and records what was tried.

A native call that runs out of memory is answered by rows in ``rows/attention_call.py`` (``AttentionCall.answers``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from attnpatch.releases.python import add_note

T = TypeVar("T")
# CUDA and XPU raise a type of their own; MPS, CPU and the libraries below them can be told only by their messages. The
# last two mean that one tensor is larger than the device takes (MPS, and Intel's own package for Arc).
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "Invalid buffer size",
    "can NOT allocate memory block",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class Attempts:
    """The attempts at one result that ran out of memory.

    Attributes:
        error: The error of the first attempt.
        tried: Each attempt, in words.
    """

    def __init__(self) -> None:
        self.error: RuntimeError | None = None
        self.tried: list[str] = []

    def failed(self, error: RuntimeError, what: str) -> None:
        """Record a failed attempt, without its traceback: those frames keep alive the tensors that took the memory."""
        if self.error is None:
            self.error = error.with_traceback(None)
            error.__context__ = None
        self.tried.append(what)

    def give_up(self) -> NoReturn:
        """Raise the first error, with what was tried in its notes."""
        assert self.error is not None
        add_note(self.error, f"attnpatch tried, and had no memory for: {', then '.join(self.tried)}")
        raise self.error from None


def until_it_fits(
    work: Callable[[], T], smaller: Callable[[], bool], said: Callable[[], str], attempts: Attempts
) -> T:
    """Call ``work()``; while it runs out of memory, call it again with a smaller step.

    Args:
        work: Computes the whole result with the current step.
        smaller: Makes the step smaller and discards partial results; returns ``False`` if the step is the smallest.
        said: Returns the current step in words.
        attempts: Earlier attempts; failures are added.

    Returns:
        The result of ``work()``.

    Raises:
        RuntimeError: There is no memory for the smallest step either. It is the first error.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            attempts.failed(error, said())
        # This comes after the except block, where the error no longer keeps tensors alive.
        if not smaller():
            attempts.give_up()
