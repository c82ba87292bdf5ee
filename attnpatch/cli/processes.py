"""Several processes that share one task, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from attnpatch.errors import AnalysisError

# Processes finish at different times; each waits for the last one before the summary is printed.
_PATIENCE = timedelta(days=7)


class Processes:
    """This process's rank among the processes that share a task, and the exchange of their results.

    ``RANK`` and ``WORLD_SIZE`` divide the work. If ``MASTER_ADDR`` is set, the processes also wait for each other at
    the end, because a launcher kills all of them as soon as one exits with a code other than 0.

    Raises:
        AnalysisError: ``RANK`` or ``WORLD_SIZE`` is not a number, or the two do not fit together.
    """

    def __init__(self) -> None:
        self.rank, self.count = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if self.rank >= self.count:
            raise AnalysisError(
                f"RANK={self.rank} and WORLD_SIZE={self.count} do not fit; leave them to the launcher"
            )
        self.local_rank = _number("LOCAL_RANK", 0)
        self._are_joined = self.count > 1 and "MASTER_ADDR" in os.environ
        if self._are_joined:
            # Only a few numbers are exchanged. gloo is enough for that, and takes no GPU memory.
            dist.init_process_group("gloo", timeout=_PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this process prints the progress and the summary."""
        return self.rank == 0

    def gathered(self, own: Any) -> list[Any] | None:
        """Every process's ``own``, after waiting for the last process; None if a process ended before that."""
        if not self._are_joined:
            return [own]
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, own)
        except RuntimeError:
            return None
        return found

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if self._are_joined:
            with contextlib.suppress(RuntimeError, AssertionError):
                dist.destroy_process_group()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise AnalysisError(
            f"{variable}={text!r} in the environment is not a number; leave it to the launcher"
        )
    return int(text)
