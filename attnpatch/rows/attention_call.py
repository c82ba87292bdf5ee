"""AttentionCall: what is known of one call of an attention site while it runs, and who counts what happens."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from attnpatch.memory import FreeMemoryCache
from attnpatch.observing import Observer
from attnpatch.oom import Attempts, is_out_of_memory
from attnpatch.policy import Policy
from attnpatch.rows import guard
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.evaluate.tiled import Listeners, Look, TiledEvaluation
from attnpatch.rows.graph.nodes import Node
from attnpatch.rows.provenance.sources import Sources


class Counters(Protocol):
    """Who counts what happened at a site."""

    def count(self, what: str) -> None: ...

    def materialised(self, operation: str) -> None: ...

    def not_fused(self, step: str) -> None:
        """A graph was kept from the fused kernel by a step (``Policy.fuse``)."""

    def summed(self, by: str) -> None:
        """Probabilities of a fused call were summed for a capture, and by what."""

    def left_native(self, reason: str, *numbers: int) -> None:
        """A rule left something native: its name (``patching.counters.REASONS``) and the numbers it went by."""

    def made(self, size: int) -> None:
        """A tensor of query x key elements was made, or a step's rows of one: its bytes."""


@dataclasses.dataclass
class AttentionCall:
    """What the SDPA path and the matmul path know of the call they serve.

    Attributes:
        policy: The rule.
        room: What is known of free memory.
        tally: Counts.
        observer: Looks at probabilities, or ``None``.
        decisions: What was decided for calls of a size. Kept by the site between calls.
        again: Whether this is a checkpointed forward pass running again: it must take the way it took before, or
            autograd finds other tensors saved.
        attempts: What ran out of memory on the way to the result that is being computed.
        is_of_masks: Whether it stands for the call of a model, whose masks it defers.
        weights: Where the probabilities of its attention are left, deferred, if somebody asked for them.
        sources: Where its tensors come from, if somebody looks.
    """

    policy: Policy
    room: FreeMemoryCache
    tally: Counters
    observer: Observer | None = None
    decisions: dict[tuple[int, int], bool] = dataclasses.field(default_factory=dict)
    again: bool = False
    attempts: Attempts = dataclasses.field(default_factory=Attempts)
    is_of_masks: bool = False
    weights: list[torch.Tensor] | None = None
    sources: Sources | None = None

    def by_rows(self, q_len: int, temporaries: int, device: torch.device) -> bool:
        """Whether a native call with so many query rows and so many bytes of temporaries goes by rows."""
        if self.policy.mode != "auto":
            return self.policy.mode == "always"
        if q_len <= self.policy.min_tokens:
            self.tally.left_native("short", self.policy.min_tokens, q_len)
            return False
        known, size = self._known(q_len, temporaries)
        if not (self.again and size in known):
            short = self.room.is_short(device)
            known[size] = short or self.policy.by_rows(q_len, temporaries, self.room.free(device))
        if not known[size]:
            self.tally.left_native("memory", self.room.free(device), temporaries)
        return known[size]

    def _known(self, q_len: int, temporaries: int) -> tuple[dict[Any, bool], Any]:
        """Where decisions are kept, and under which name those for calls of this size."""
        known = checkpoints.decisions(self.decisions)
        size = (q_len, temporaries)
        return known, size if known is self.decisions else (id(self.decisions), size)

    def went_by_rows(self, q_len: int, temporaries: int) -> bool:
        """Whether this is a second run of a call that ran out of memory the first time."""
        known, size = self._known(q_len, temporaries)
        return self.again and known.get(size, False)

    @property
    def answers_shortage(self) -> bool:
        """Whether a native call that runs out of memory is answered by rows."""
        return self.policy.retry_on_oom and self.policy.mode == "auto"

    def is_answered(self, error: RuntimeError) -> bool:
        """Whether an error of a native call is answered by rows instead of being raised."""
        return self.answers_shortage and is_out_of_memory(error)

    def answers(self, error: RuntimeError, device: torch.device) -> bool:
        """The same; what is answered is noted: the layers after it go by rows at once."""
        if not self.is_answered(error):
            return False
        self.attempts.failed(error, "the native call")
        self.room.ran_out(device)
        self.retried()
        return True

    def remember(self, q_len: int, temporaries: int, by_rows: bool = True) -> None:
        """Keep how a call of this size went, for a checkpointed forward pass that runs again."""
        known, size = self._known(q_len, temporaries)
        known[size] = by_rows

    def replay(self, node: Node, watched: tuple[Node, Look] | None = None) -> torch.Tensor:
        """Compute a graph by rows, under the policy of the site."""
        # On CPU a step is a few MiB, whatever is free.
        free = None if node.device.type == "cpu" else self.room.free(node.device)
        told = self._told
        if watched and self.observer is not None:
            told = dataclasses.replace(told, restarted=self.observer.restart)
        attempts, self.attempts = self.attempts, Attempts()
        return TiledEvaluation(node, self.policy, watched, told, free, attempts)()

    def of_gradients(self, twin: Node) -> TiledEvaluation:
        """What computes the gradients of a deferred tensor."""
        return TiledEvaluation(twin, self.policy, told=self._told)

    @property
    def _told(self) -> Listeners:
        return Listeners(self.retried, made=self.tally.made, failed=self.failed)

    def failed(self, what: str, error: Exception) -> None:
        """Our own code failed, and the host's was used."""
        guard.failed(what, error, self.tally)

    def retried(self) -> None:
        self.tally.count("retried")
