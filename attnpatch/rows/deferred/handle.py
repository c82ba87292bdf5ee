"""Handle: what a deferred tensor stands for, a graph or the tensor computed from it, and which of them are alive."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.compat import temporarily_clear_interpreter_stack
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import checkpoints, edges, kept_values
from attnpatch.rows.deferred import sharing
from attnpatch.rows.deferred.history import has_history, is_inference
from attnpatch.rows.evaluate import untiled
from attnpatch.rows.graph.nodes import Node, tensors_of
from attnpatch.rows.thread_state import here

if TYPE_CHECKING:
    from attnpatch.rows.deferred.tensor import DeferredTensor


class Handle:
    """What a DeferredTensor stands for: a graph, or the tensor it was turned into.

    Attributes:
        node: The graph.
        call: The site call it came from.
        edge: The history it was given; another one means that somebody below Python's reach has made something of it.
        checkpoint: The one in which it was made, which saves its history.
        values: All of it, without history, once somebody needed it.
        written: The tensor that stands for it, history included, once it was written to in place.
        memory: What it shares with views of it, or with what it is a view of.
        path: Steps from the memory as a whole to this tensor.
        pending: The deferred tensors of the thread it was made in.
    """

    def __init__(
        self,
        node: Node,
        call: AttentionCall,
        memory: sharing.Memory | None = None,
        path: tuple[Node, ...] = (),
    ) -> None:
        self.node, self.call = node, call
        self.edge: Any = None
        self.checkpoint: weakref.ref[Any] | None = None
        self.values: torch.Tensor | None = None
        self.written: torch.Tensor | None = None
        # The tensor with the deferred one's history, that history, and the one it began with itself.
        self._bridged: tuple[torch.Tensor, Any, Any] | None = None
        self._adopted: Any = None  # the history of ``written`` that its own has gone on with
        self._has_adopted = False
        self._tensor: weakref.ref[DeferredTensor] | None = None
        self.memory = sharing.Memory(node) if memory is None else memory
        self.memory.members.add(self)
        self.path = path
        self.pending = here.pending
        self.pending.add(self)

    def belongs_to(self, tensor: DeferredTensor) -> None:
        """Say which Python object carries its history."""
        self._tensor = weakref.ref(tensor)

    @property
    def tensor(self) -> DeferredTensor | None:
        """That object, while it is alive."""
        return None if self._tensor is None else self._tensor()

    def forget(self) -> None:
        """What was computed is no longer what the graph says."""
        self.values = self._bridged = None
        if self.written is None:
            self.pending.add(self)

    @property
    def has_values(self) -> bool:
        return self.values is not None or self.written is not None

    @property
    def is_computed(self) -> bool:
        ask, tally = checkpoints.is_to_be_pending, self.call.tally
        if self.written is None and guard.attempted(ask, self, name="a checkpoint", tally=tally):
            self.forget()
        return self.has_values

    def materialise(self, operation: str) -> torch.Tensor:
        """The whole tensor, computed by rows; ``operation`` is what asked for it.

        With the history that the deferred tensor has, where gradients are recorded now.
        """
        if not self.is_computed and (self.node.children or self.node.stands_for_memory):
            self.call.tally.materialised(operation)
        return self.reduced()

    def reduced(self) -> torch.Tensor:
        """The tensor, where it has no keys any more: as small as an output, and not counted as a whole matrix."""
        here.real.add(self)
        if self.written is not None:
            tensor = self.tensor
            return (
                self.written if tensor is None or not is_foreign(tensor) else self._with_history(self.written)
            )
        if self.values is None:
            # What is read in inference mode only now may be written to, or need gradients, later.
            is_read = torch.is_inference_mode_enabled() and not is_inference(self.tensor)
            mode = torch.inference_mode(False) if is_read else contextlib.nullcontext()
            with torch.no_grad(), mode, _untransformed():
                self._compute()
        tensor = self.tensor
        if tensor is None or not torch.is_grad_enabled() or not has_history(tensor):
            return self.values
        return self._with_history(self.values)

    def _with_history(self, values: torch.Tensor) -> torch.Tensor:
        tensor = self.tensor
        if self._bridged is None or self._bridged[1] is not edges.history(tensor):
            with _untransformed():
                found = edges.bridged(tensor, values)
            self._bridged = found, edges.history(tensor), found.grad_fn
        return self._bridged[0]

    def _compute(self) -> None:
        try:
            sharing.compute(self)
        except Exception as error:
            if guard.passes(error):
                raise
            self.values = untiled.evaluated(self.node)
            self.call.failed("the computation of scores by rows", error)
            self.pending.discard(self)

    def stands_for(self, value: torch.Tensor) -> None:
        """From now on the computed tensor alone stands for it; its history goes on to the one that there is."""
        self.written, self._adopted = value, value.grad_fn
        self.pending.discard(self)
        here.real.add(self)

    def is_written(self, value: torch.Tensor) -> None:
        """The computed tensor was written to in place: it alone stands for the result, with its history."""
        has_another = value.grad_fn is not self._begun_with(value)
        self.stands_for(value)
        tensor = self.tensor
        if tensor is not None and has_another and value.requires_grad and torch.is_grad_enabled():
            edges.adopt(tensor, value)
            self.edge, self._has_adopted = edges.history(tensor), True
            with compat.DisableTorchFunctionSubclass():
                retains = tensor.retains_grad
            if retains:
                value.retain_grad()

    def _begun_with(self, value: torch.Tensor) -> Any:
        """The history that a tensor which stands for it had when it began to, or when this one's last went on with it."""
        if value is self.written:
            return self._adopted
        return self._bridged[2] if self._bridged is not None and value is self._bridged[0] else None

    def follow(self) -> None:
        """Go on with the history of the tensor that stands for it, if that has another one since: a view was written to."""
        tensor, value = self.tensor, self.values
        if tensor is None:
            return
        if self._bridged is not None and self._bridged[1] is edges.history(tensor):
            value = self._bridged[0]
        elif has_other_history(tensor):
            return
        elif self.written is not None:
            value = self.written
        if value is not None and torch.is_grad_enabled() and value.grad_fn is not self._begun_with(value):
            self.is_written(value)

    @property
    def passes_by(self) -> torch.Tensor | None:
        """What it was written to as, if gradients pass by that on their way to its history, and by no tensor of its own.

        One that was written to without gradients recorded leads to the history that there was.
        """
        return self.written if self._has_adopted else None

    def is_shared(self) -> bool:
        return bool(self.memory.others(self))

    def preserve(self, storage: int) -> None:
        """Keep the present values of what the graph reads from a storage that is about to be written to."""
        for leaf in tensors_of(self.node):
            if leaf.tensor is not None and kept_values.memory_of(leaf.tensor) == storage:
                leaf.preserve()


def _untransformed() -> contextlib.AbstractContextManager[Any]:
    """Outside of ``torch.func``'s transforms: what is read in one was made before it."""
    is_inside = compat.is_transformed()
    return temporarily_clear_interpreter_stack() if is_inside else contextlib.nullcontext()


def pending() -> bool:
    """Whether some deferred tensor of this thread is alive and not yet computed."""
    return bool(here.pending)


def after_write() -> None:
    """Let deferred tensors whose memory may have been written to as another tensor's have the history it has now."""
    for handle in list(here.real):
        handle.follow()


def secure_escaped() -> None:
    """Called when a site is left: what is still deferred now outlives it."""
    for handle in list(here.pending):
        for leaf in tensors_of(handle.node):
            leaf.secure()


def left() -> None:
    """Called when a watch ends: nothing notices later writes to what deferred tensors read."""
    if pending():
        secure_escaped()


def running_site(otherwise: AttentionCall) -> AttentionCall:
    """The site whose call goes on."""
    return otherwise if here.site is None else here.site


def is_foreign(tensor: DeferredTensor) -> bool:
    """Whether its history is not its graph's: it came out of a function of somebody's own, or is a leaf of a graph."""
    if not torch.is_grad_enabled() or not has_history(tensor):
        return False
    return has_other_history(tensor) or _is_of_outer_checkpoint(tensor.handle)


def has_other_history(tensor: DeferredTensor) -> bool:
    if not has_history(tensor):
        return False
    return tensor.handle.edge is None or edges.history(tensor) is not tensor.handle.edge


def _is_of_outer_checkpoint(handle: Handle) -> bool:
    """Whether it goes from one checkpoint into another: when they run again, what arrives has a history of torch's."""
    if handle.checkpoint is None:
        return False
    current = checkpoints.current()
    return current is not None and current is not handle.checkpoint()
