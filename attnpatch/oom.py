"""Running out of memory: how it is recognised, and what was tried before giving up."""

from __future__ import annotations

from typing import NoReturn

import torch

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
