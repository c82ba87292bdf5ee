"""The state of each thread while a capture records: the running call of the model, and its sequence."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.recording.text.following import HostCall
from attnpatch.recording.text.sequences import Sequence


class State(threading.local):
    """The state of one thread.

    Attributes:
        call: The running call of the model, or of a part of it.
        sequence: The sequence to which it adds.
        last: The sequence to which the previous call added.
        times: How often each site was called in the running call.
        tokens: For each site with self-attention, which tokens it has found to be real.
        is_part: True if only a part of the model is called.
        joins: True if the call adds to the sequence of a part that has run alone; ``cache_before``: the cache of that
            sequence.
        raised: The exception that was being handled when the running call began.
        direct: If submodules are called directly, one after the other: their cache, and the tokens in it before the
            first of these calls.
    """

    def __init__(self) -> None:
        self.call: HostCall | None = None
        self.sequence: Sequence | None = None
        self.last: Sequence | None = None
        self.times: Counter[str] = Counter()
        self.tokens: dict[str, torch.Tensor] = {}
        self.is_part = self.joins = False
        self.cache_before: Any = None
        self.raised: BaseException | None = None
        self.direct: tuple[Callable[[], Any] | None, int] = None, 0
