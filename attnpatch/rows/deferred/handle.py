"""Handle: the graph or the computed tensor behind a deferred tensor, and the lists of handles that are alive."""

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
    """The state of a DeferredTensor: a graph, or the tensor that was computed from it.

    Attributes:
        node: The graph.
        call: The attention call in which it was made.
        edge: The autograd history that attnpatch gave the tensor. If the tensor has another one now, code below Python
            (C++ autograd) has changed it.
        checkpoint: The checkpoint in which it was made, which saves its history.
        values: The computed tensor, without autograd history; ``None`` until it is needed.
        written: The real tensor, with autograd history, that replaces it once it was written to in place.
        memory: The memory that it shares with its views, or with the tensor that it is a view of.
        path: The views that lead from the whole memory to this tensor.
        pending: The uncomputed deferred tensors of the thread in which it was made.
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
        # Three things: the computed tensor, attached to the deferred tensor's history; that history; and the
        # ``grad_fn`` that the computed tensor had at first.
        self._bridged: tuple[torch.Tensor, Any, Any] | None = None
        # The ``grad_fn`` of ``written`` that the deferred tensor has taken over last.
        self._adopted: Any = None
        self._has_adopted = False
        self._tensor: weakref.ref[DeferredTensor] | None = None
        self.memory = sharing.Memory(node) if memory is None else memory
        self.memory.members.add(self)
        self.path = path
        self.pending = here.pending
        self.pending.add(self)

    def belongs_to(self, tensor: DeferredTensor) -> None:
        """Set the Python object that carries its autograd history."""
        self._tensor = weakref.ref(tensor)

    @property
    def tensor(self) -> DeferredTensor | None:
        """The Python object that carries its history; ``None`` once it is gone."""
        return None if self._tensor is None else self._tensor()

    def forget(self) -> None:
        """Drop the computed values: the graph has changed since."""
        self.values = self._bridged = None
        if self.written is None:
            self.pending.add(self)

    @property
    def values(self) -> torch.Tensor | None:
        return self._values

    @values.setter
    def values(self, computed: torch.Tensor | None) -> None:
        self._values = computed
        # How often it was written to; inference tensors do not count that, and have no history to follow.
        self._version = None if computed is None or computed.is_inference() else computed._version

    @property
    def has_values(self) -> bool:
        return self.values is not None or self.written is not None

    @property
    def is_computed(self) -> bool:
        ask, counters = checkpoints.is_to_be_pending, self.call.counters
        if self.written is None and guard.attempted(ask, self, name="a checkpoint", counters=counters):
            self.forget()
        return self.has_values

    def materialize(self, operation: str) -> torch.Tensor:
        """The whole tensor, computed by rows and counted; with its autograd history if gradients are being recorded.

        Args:
            operation: The function that needs all of it, for the report.
        """
        if not self.is_computed and (self.node.children or self.node.stands_for_memory):
            self.call.counters.materialised(operation)
        return self.reduced()

    def reduced(self) -> torch.Tensor:
        """The whole tensor, computed by rows but not counted as materialised: used for results without a key axis."""
        here.real.add(self)
        if self.written is not None:
            tensor = self.tensor
            return (
                self.written if tensor is None or not is_foreign(tensor) else self._with_history(self.written)
            )
        if self.values is None:
            # Scores made outside inference mode must not become inference tensors: they may be written to later, or
            # need gradients.
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
        """Let the real tensor ``value`` replace the graph from now on; its history is the deferred tensor's."""
        self.written, self._adopted = value, value.grad_fn
        self.pending.discard(self)
        here.real.add(self)

    def is_written(self, value: torch.Tensor) -> None:
        """The computed tensor was written to in place: let it replace the graph, and take over its history."""
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
        """The ``grad_fn`` that a computed tensor had when the deferred tensor last took its history over."""
        if value is self.written:
            return self._adopted
        return self._bridged[2] if self._bridged is not None and value is self._bridged[0] else None

    def follow(self) -> None:
        """Take over the computed tensor's history if it has changed, because a view of that tensor was written to."""
        tensor, value = self.tensor, self.values
        if tensor is None or not torch.is_grad_enabled():
            return
        if self._bridged is not None and self._bridged[1] is edges.history(tensor):
            value = self._bridged[0]
        elif has_other_history(tensor):
            return
        elif self.written is not None:
            value = self.written
        if value is self._values and self._version is not None and self._values._version == self._version:
            return  # not written to: its new history comes from a custom function that has returned it
        if value is not None and value.grad_fn is not self._begun_with(value):
            self.is_written(value)

    @property
    def passes_by(self) -> torch.Tensor | None:
        """The real tensor that replaces this one after an in-place write, if that write has added to the autograd
        history.

        Its gradient is the deferred tensor's own. ``None`` if there was no such write; one under no_grad does not count.
        """
        return self.written if self._has_adopted else None

    def is_shared(self) -> bool:
        return bool(self.memory.others(self))

    def preserve(self, storage: int) -> None:
        """Copy the inputs of the graph that lie in a storage which is about to be written to."""
        for leaf in tensors_of(self.node):
            if leaf.tensor is not None and kept_values.memory_of(leaf.tensor) == storage:
                leaf.preserve()


def _untransformed() -> contextlib.AbstractContextManager[Any]:
    """Leave ``torch.func``'s transforms: a deferred tensor that is read inside a transform was made before it."""
    is_inside = compat.is_transformed()
    return temporarily_clear_interpreter_stack() if is_inside else contextlib.nullcontext()


def pending() -> bool:
    """True if any deferred tensor of this thread is alive and not yet computed."""
    return bool(here.pending)


def after_write() -> None:
    """Update the history of deferred tensors whose computed memory may have been written to through another tensor."""
    for handle in list(here.real):
        handle.follow()


def secure_escaped() -> None:
    """Secure the inputs of deferred tensors that outlive their site, because they are not computed when it returns."""
    for handle in list(here.pending):
        for leaf in tensors_of(handle.node):
            leaf.secure()


def left() -> None:
    """Called when a mode ends: from then on nothing notices writes to tensors that deferred ones read."""
    if pending():
        secure_escaped()


def running_site(otherwise: AttentionCall) -> AttentionCall:
    """The attention call that is running now, or ``otherwise`` if there is none."""
    return otherwise if here.site is None else here.site


def is_foreign(tensor: DeferredTensor) -> bool:
    """True if its autograd history does not come from its graph: a custom function made it, or it is a leaf."""
    if not torch.is_grad_enabled() or not has_history(tensor):
        return False
    return has_other_history(tensor) or _is_of_outer_checkpoint(tensor.handle)


def has_other_history(tensor: DeferredTensor) -> bool:
    if not has_history(tensor):
        return False
    return tensor.handle.edge is None or edges.history(tensor) is not tensor.handle.edge


def _is_of_outer_checkpoint(handle: Handle) -> bool:
    """True if a tensor was made in another checkpoint than the running one; recomputation gives such a tensor torch's
    own history.
    """
    if handle.checkpoint is None:
        return False
    current = checkpoints.current()
    return current is not None and current is not handle.checkpoint()
