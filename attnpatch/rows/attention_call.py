"""AttentionCall: the state of one running call of an attention site: policy, free memory, counters, decisions."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from attnpatch.memory.free import FreeMemoryCache
from attnpatch.observing import Observer
from attnpatch.oom import Attempts, is_out_of_memory
from attnpatch.policy import NativeNeed, Policy
from attnpatch.rows import guard
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.evaluate.tiled import Listeners, Look, TiledEvaluation
from attnpatch.rows.graph.nodes import Node
from attnpatch.rows.provenance.sources import Sources


class Counters(Protocol):
    """Counts what happens at a site."""

    def count(self, what: str) -> None: ...

    def materialised(self, operation: str) -> None: ...

    def not_fused(self, step: str) -> None:
        """A graph could not use the fused kernel (``Policy.fuse``) because of ``step``."""

    def summed(self, by: str) -> None:
        """The probabilities of a fused call were summed for a capture; ``by`` names the method."""

    def kernel(self, name: str, is_replaced: bool = False) -> None:
        """A kernel outside torch has computed a call, or torch's functions have in its place."""

    def left_native(self, reason: str, *numbers: int) -> None:
        """A rule left a call native: the rule's name (``patching.counters.REASONS``) and the numbers it compared."""

    def made(self, size: int) -> None:
        """A query x key tensor of ``size`` bytes was allocated, or the rows of one for a single step."""


@dataclasses.dataclass
class AttentionCall:
    """The attention call that the SDPA path and the matmul path serve.

    Attributes:
        policy: The rule.
        room: Free memory, cached.
        counters: Counters of the site.
        observer: Is shown the probabilities, or ``None``.
        decisions: For each size of call, whether it goes by rows. The site keeps this dict between calls.
        again: True if a checkpointed forward pass is recomputed. It must take the same path as before, or autograd
            finds other saved tensors than it expects.
        attempts: The attempts at the present result that ran out of memory.
        is_of_masks: True if it stands for a model's call, whose masks it defers, instead of a site's.
        weights: A list to which the deferred probabilities are added, if the host asked for them.
        sources: Records which input each tensor's dimensions come from, if an observer needs it.
    """

    policy: Policy
    room: FreeMemoryCache
    counters: Counters
    observer: Observer | None = None
    decisions: dict[tuple[int, ...], bool] = dataclasses.field(default_factory=dict)
    again: bool = False
    attempts: Attempts = dataclasses.field(default_factory=Attempts)
    is_of_masks: bool = False
    weights: list[torch.Tensor] | None = None
    sources: Sources | None = None

    def by_rows(self, q_len: int, need: NativeNeed, device: torch.device) -> bool:
        """True if a call with ``q_len`` query rows that natively takes ``need`` is to be computed by rows."""
        if self.policy.mode != "auto":
            return self.policy.mode == "always"
        if q_len <= self.policy.min_tokens:
            self.counters.left_native("short", self.policy.min_tokens, q_len)
            return False
        known, size = self._known(q_len, need)
        if not (self.again and size in known):
            room = self.room
            known[size] = room.is_short(device) or self.policy.by_rows(
                q_len, need, room.free(device, need.temporaries), room.limit(device)
            )
        if not known[size]:
            self.counters.left_native("memory", self.room.free(device), need.temporaries)
        return known[size]

    def _known(self, q_len: int, need: NativeNeed) -> tuple[dict[Any, bool], Any]:
        """The dict in which decisions are kept, and the key for calls of this size."""
        known = checkpoints.decisions(self.decisions)
        size = (q_len, *need)
        return known, size if known is self.decisions else (id(self.decisions), size)

    def went_by_rows(self, q_len: int, need: NativeNeed) -> bool:
        """True if this call is recomputed (checkpointing) and went by rows the first time."""
        known, size = self._known(q_len, need)
        return self.again and known.get(size, False)

    @property
    def answers_shortage(self) -> bool:
        """True if a native call that runs out of memory is computed by rows instead."""
        return self.policy.retry_on_oom and self.policy.mode == "auto"

    def is_answered(self, error: RuntimeError) -> bool:
        """True if the call is computed by rows instead of raising this error of the native call."""
        return self.answers_shortage and is_out_of_memory(error)

    def answers(self, error: RuntimeError, device: torch.device) -> bool:
        """As ``is_answered``; if true, also notes the shortage, so that later layers go by rows at once."""
        if not self.is_answered(error):
            return False
        self.attempts.failed(error, "the native call")
        self.room.ran_out(device)
        self.retried()
        return True

    def remember(self, q_len: int, need: NativeNeed, by_rows: bool = True) -> None:
        """Keep whether a call of this size went by rows, in case a checkpointed forward pass is recomputed."""
        known, size = self._known(q_len, need)
        known[size] = by_rows

    def replay(self, node: Node, watched: tuple[Node, Look] | None = None) -> torch.Tensor:
        """Compute a graph by rows, under the policy of the site."""
        # On CPU the size of a step does not depend on free memory.
        free = None if node.device.type == "cpu" else self.room.free(node.device)
        told = self._told
        if watched and self.observer is not None:
            told = dataclasses.replace(told, restarted=self.observer.restart)
        attempts, self.attempts = self.attempts, Attempts()
        return TiledEvaluation(node, self.policy, watched, told, free, attempts)()

    def of_gradients(self, twin: Node) -> TiledEvaluation:
        """The evaluation that computes the gradients of a deferred tensor."""
        return TiledEvaluation(twin, self.policy, told=self._told)

    @property
    def _told(self) -> Listeners:
        return Listeners(self.retried, made=self.counters.made, failed=self.failed)

    def failed(self, what: str, error: Exception) -> None:
        """attnpatch's own code has failed, and the host's was used: warn once and count it."""
        guard.failed(what, error, self.counters)

    def retried(self) -> None:
        self.counters.count("retried")
