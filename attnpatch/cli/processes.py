"""Several processes that share one task, as ``accelerate launch`` and ``torchrun`` start them."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any

from attnpatch.errors import AnalysisError, MissingExtraError

# Processes end at different times, and wait for the last one before they say how it went.
_PATIENCE = timedelta(days=7)


class Processes:
    """This process and the others.

    ``RANK`` and ``WORLD_SIZE`` say who takes what. With ``MASTER_ADDR`` they also wait for each other at the end: a
    launcher ends all of them as soon as one has left with an exit code that is not 0.

    Raises:
        AnalysisError: The variables are no numbers that fit.
        MissingExtraError: There are several processes, and accelerate is not installed.
    """

    def __init__(self) -> None:
        self.rank, self.count = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if self.rank >= self.count:
            raise AnalysisError(
                f"RANK={self.rank} and WORLD_SIZE={self.count} do not fit; leave them to the launcher"
            )
        self.local_rank = _number("LOCAL_RANK", 0)
        self._state = None
        if self.count > 1 and "MASTER_ADDR" in os.environ:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise MissingExtraError(
                    'several processes need accelerate: pip install "attnpatch[all]"'
                ) from error
            # They tell each other a few numbers: gloo does, also where there are GPUs, and takes none of their memory.
            self._state = PartialState(cpu=True, timeout=_PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that talks."""
        return self.rank == 0

    def gathered(self, own: Any) -> list[Any] | None:
        """What each of them has, when the last one has it; None if one of them has ended before."""
        if self._state is None:
            return [own]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, own)
        except RuntimeError:
            return None
        return found

    def leave(self) -> None:
        """Say goodbye to the others, if they are there."""
        if self._state is not None:
            with contextlib.suppress(RuntimeError, AssertionError):
                self._state.destroy_process_group()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise AnalysisError(f"{variable}={text!r} in the environment is no number; leave it to the launcher")
    return int(text)
