"""DeferredTensor: a score matrix that was asked for and not computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall, Counters
from attnpatch.rows.autograd import checkpoints, edges, kept_values
from attnpatch.rows.deferred import sharing
from attnpatch.rows.deferred.handle import Handle, is_foreign
from attnpatch.rows.deferred.history import has_history
from attnpatch.rows.graph.nodes import Node, ViewNode
from attnpatch.rows.thread_state import here


def is_watching_writes() -> bool:
    """Whether something of this thread still reads tensors that may be overwritten, or stands for one."""
    return bool(here.pending) or bool(here.real) or kept_values.are_kept()


def before_write(tensor: torch.Tensor) -> None:
    """Let graphs keep the present values of a tensor that is about to be overwritten.

    The copy is of a query, a key or a mask: small beside the scores that need not be computed for it.
    """
    if is_watching_writes() and not isinstance(tensor, DeferredTensor):
        storage = kept_values.memory_of(tensor)
        kept_values.before_write(storage)
        for handle in list(here.pending):
            handle.preserve(storage)


# What torch says to code outside of it that asks a deferred tensor for its address.
_NO_MEMORY = ("Cannot access data pointer", "its data is not allocated")


def note_no_memory(error: Exception) -> None:
    """Say in the notes of an error that it may be of scores that were handed to code outside torch."""
    if any(words in str(error) for words in _NO_MEMORY):
        error.add_note(
            "attnpatch: scores by rows have no memory. If code outside torch (an extension in C++, DLPack) was handed "
            "them, leave this module out (sites=[...] of apply names the others), or use mode='never'."
        )


class DeferredTensor(torch.Tensor):
    """A tensor with shape, dtype and device but no storage, and a graph that can compute any of its rows.

    Row-wise operations on it extend the graph, a product over its keys replays it some rows at a time, and any
    other operation computes all of it first: slower and larger, never wrong.
    """

    handle: Handle
    # Set by ``interception``, which needs the handlers, which need this class.
    answer: ClassVar[Callable[[Callable[..., Any], Any, dict[str, Any]], Any]]
    answer_below: ClassVar[Callable[[Callable[..., Any], Any, dict[str, Any]], Any]]

    @staticmethod
    def __new__(cls, handle: Handle) -> DeferredTensor:
        node = handle.node
        self = torch.Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=node.device)
        # Who takes its address (an extension in C++, a DLPack capsule) gets an error, and no memory that is not there.
        compat.throw_on_data_ptr(self)
        self.handle = handle
        handle.belongs_to(self)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        return guard.guarded(
            cls.answer,
            (func, args, kwargs),
            lambda: natively(func, args, kwargs),
            name,
            tally_of(args, kwargs),
        )

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The safety net below everything that Python can intercept."""
        kwargs = kwargs or {}
        # No mode is switched off here as it is inside __torch_function__: a replay would be deferred again.
        # Autograd has done its part above already: what comes of this gets its history from there.
        with compat.DisableTorchFunction(), torch.no_grad():
            return guard.guarded(
                cls.answer_below,
                (func, args, kwargs),
                lambda: natively(func, args, kwargs),
                str(func),
                tally_of(args, kwargs),
            )

    def as_subclass(self, cls: type[torch.Tensor]) -> torch.Tensor:  # torch does not ask __torch_function__
        with compat.DisableTorchFunction():
            real = self.handle.materialise("as_subclass")
        return real.as_subclass(cls)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        handle = self.handle
        if handle.is_computed:
            return repr(handle.reduced())
        return f"DeferredTensor(shape={tuple(handle.node.shape)}, dtype={handle.node.dtype}, computed by rows when used)"


def tally_of(args: Any, kwargs: dict[str, Any]) -> Counters | None:
    """Who counts what happens to the first deferred tensor among some arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, DeferredTensor):
            return value.handle.call.tally
        if isinstance(value, (list, tuple)) and (found := tally_of(value, {})) is not None:
            return found
    return None


def natively(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The host's own call on computed tensors, where ours has failed: with as little of ours as there can be."""
    name = getattr(func, "__name__", str(func))
    target = args[0] if args and isinstance(args[0], DeferredTensor) else None
    # A write under no_grad leaves the history as it is.
    with torch.set_grad_enabled(torch.is_grad_enabled() or (target is not None and has_history(target))):
        real = settle(target, name)
    args = (real, *settle(tuple(args[1:]), name)) if target is not None else settle(tuple(args), name)
    result = func(*args, **settle(kwargs, name))
    if target is None or not (result is real or name in ("__setitem__", "__set__")):
        return result
    target.handle.written = real
    guard.attempted(target.handle.is_written, real, name=name, tally=target.handle.call.tally)
    return None if result is None else target


def settle(value: Any, operation: str) -> Any:
    """``value`` with every deferred tensor in it computed."""
    if isinstance(value, DeferredTensor):
        return value.handle.materialise(operation)
    if isinstance(value, (list, tuple)):
        items = [settle(item, operation) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: settle(item, operation) for key, item in value.items()}
    return value


def site_of(tensors: Sequence[torch.Tensor]) -> AttentionCall:
    """Whose a step of some deferred tensors is: the site's that runs if one of them is its own, else one's that has them.

    A mask is many sites'; a bias may be a layer's that has handed it on to the next (WavLM).
    """
    calls = [tensor.handle.call for tensor in tensors if isinstance(tensor, DeferredTensor)]
    own = [call for call in calls if call is here.site] or [call for call in calls if not call.is_of_masks]
    return (own or calls)[0]


def is_pending(value: Any) -> bool:
    return isinstance(value, DeferredTensor) and not value.handle.is_computed


def computed(value: Any, operation: str = "a function with a backward pass of its own") -> Any:
    """``value``, or the tensor behind it if it is a deferred one that was computed already.

    So is one whose history is not its graph's: gradients of what is made of it go to that history.
    """
    if isinstance(value, DeferredTensor):
        if value.handle.is_computed:
            return value.handle.reduced()
        if is_foreign(value):
            return value.handle.materialise(operation)
    return value


def wrap(
    node: Node, call: AttentionCall, memory: sharing.Memory | None = None, path: tuple[Node, ...] = ()
) -> DeferredTensor:
    """A deferred tensor for a graph, with the history that the tensor would have.

    Args:
        node: The graph.
        call: Where it belongs.
        memory: What it shares memory with, if it is a view.
        path: The steps from there to the graph.
    """
    if node.needs_grad is not None:
        node = ViewNode(node, node.dims)  # another tensor's graph
    tensor = DeferredTensor(Handle(node, call, memory, path))
    tensor.handle.edge = edges.connect(tensor, node, call.of_gradients)
    frame = checkpoints.current()
    tensor.handle.checkpoint = None if frame is None else weakref.ref(frame)
    return tensor


def detached(tensor: DeferredTensor) -> None:
    """Take its history from a deferred tensor."""
    with compat.DisableTorchFunctionSubclass():
        tensor.detach_()
    tensor.handle.edge = None


def goes_on_as(target: DeferredTensor, result: DeferredTensor) -> DeferredTensor:
    """A step in place: the same Python object stands for the result."""
    handle = target.handle
    if result.handle.node.stops_gradient and has_history(target):
        detached(target)
    elif has_history(result) or (has_history(target) and torch.is_grad_enabled()):
        edges.adopt(target, result)
    handle.node = result.handle.node
    if not handle.path:
        handle.memory.graph, handle.memory.whole = handle.node, None
    handle.node.carrier = weakref.ref(target)
    handle.edge = edges.history(target)
    return target
