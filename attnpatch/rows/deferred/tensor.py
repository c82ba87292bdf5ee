"""DeferredTensor: a score matrix that the host has asked for and that is not computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from attnpatch import compat
from attnpatch.releases.python import add_note
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall, Counters
from attnpatch.rows.autograd import checkpoints, edges, kept_values
from attnpatch.rows.deferred import sharing
from attnpatch.rows.deferred.handle import Handle, is_foreign
from attnpatch.rows.deferred.history import has_history
from attnpatch.rows.graph.nodes import Node, ViewNode
from attnpatch.rows.thread_state import here


def is_watching_writes() -> bool:
    """True if a deferred tensor or a backward pass of this thread depends on tensors that may be overwritten."""
    # The sets' length would take longer; every function that is watched comes here.
    return bool(here.pending.data or here.real.data or here.kept)


def before_write(tensor: torch.Tensor) -> None:
    """Let graphs keep the present values of a tensor that is about to be overwritten.

    What is copied is a query, a key or a mask: small beside the scores, which would have to be computed otherwise.
    """
    if is_watching_writes() and not isinstance(tensor, DeferredTensor):
        storage = kept_values.memory_of(tensor)
        kept_values.before_write(storage)
        for handle in list(here.pending):
            handle.preserve(storage)


# torch's error messages for code that asks a tensor without storage for its address.
_NO_MEMORY = ("Cannot access data pointer", "its data is not allocated")


def note_no_memory(error: Exception) -> None:
    """Add a note to an error that may come from handing deferred scores to code outside torch."""
    if any(words in str(error) for words in _NO_MEMORY):
        add_note(
            error,
            "attnpatch: attention scores by rows have no memory. If code outside torch (a C++ extension, DLPack) reads "
            "them, leave this module out (name the others in sites=[...] of apply), or use mode='never'.",
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
        # Code that takes its address (a C++ extension, DLPack) gets an error instead of an invalid pointer.
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
            counters_of(args, kwargs),
        )

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The safety net below everything that Python can intercept."""
        kwargs = kwargs or {}
        # Modes are still active here (inside __torch_function__ they are not) and would defer the computation again, so
        # they are switched off. Autograd has recorded the operation above this level already.
        with compat.DisableTorchFunction(), torch.no_grad():
            return guard.guarded(
                cls.answer_below,
                (func, args, kwargs),
                lambda: natively(func, args, kwargs),
                str(func),
                counters_of(args, kwargs),
            )

    def as_subclass(self, cls: type[torch.Tensor]) -> torch.Tensor:  # torch does not ask __torch_function__
        with compat.DisableTorchFunction():
            real = self.handle.materialize("as_subclass")
        return real.as_subclass(cls)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        handle = self.handle
        if handle.is_computed:
            return repr(handle.reduced())
        return f"DeferredTensor(shape={tuple(handle.node.shape)}, dtype={handle.node.dtype}, computed by rows when used)"


def counters_of(args: Any, kwargs: dict[str, Any]) -> Counters | None:
    """The counters of the site to which the first deferred tensor among some arguments belongs."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, DeferredTensor):
            return value.handle.call.counters
        if isinstance(value, (list, tuple)) and (found := counters_of(value, {})) is not None:
            return found
    return None


def natively(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The host's own call on computed tensors, after attnpatch's own code has failed; as little of attnpatch as
    possible runs.
    """
    name = getattr(func, "__name__", str(func))
    target = args[0] if args and isinstance(args[0], DeferredTensor) else None
    # A write under no_grad leaves the history as it is.
    with torch.set_grad_enabled(torch.is_grad_enabled() or (target is not None and has_history(target))):
        real = materialize(target, name)
    args = (
        (real, *materialize(tuple(args[1:]), name)) if target is not None else materialize(tuple(args), name)
    )
    result = func(*args, **materialize(kwargs, name))
    if target is None or not (result is real or name in ("__setitem__", "__set__")):
        return result
    target.handle.written = real
    guard.attempted(target.handle.is_written, real, name=name, counters=target.handle.call.counters)
    return None if result is None else target


def materialize(value: Any, operation: str) -> Any:
    """``value`` with every deferred tensor in it computed."""
    if isinstance(value, DeferredTensor):
        return value.handle.materialize(operation)
    if isinstance(value, (list, tuple)):
        items = [materialize(item, operation) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: materialize(item, operation) for key, item in value.items()}
    return value


def site_of(tensors: Sequence[torch.Tensor]) -> AttentionCall:
    """The attention call to which an operation on some deferred tensors belongs.

    It is the running one if one of the tensors is its own. Otherwise it is the first call that made any of them. A
    model's call for masks comes last, because a mask serves many sites, and a layer may hand its bias on to the next
    (WavLM).
    """
    calls = [tensor.handle.call for tensor in tensors if isinstance(tensor, DeferredTensor)]
    own = [call for call in calls if call is here.site] or [call for call in calls if not call.is_of_masks]
    return (own or calls)[0]


def is_pending(value: Any) -> bool:
    return isinstance(value, DeferredTensor) and not value.handle.is_computed


def computed(value: Any, operation: str = "a function with a backward pass of its own") -> Any:
    """``value``, or the real tensor if it is a deferred tensor that is computed already.

    A deferred tensor whose autograd history does not come from its graph is computed, so that gradients flow to that
    history.
    """
    if isinstance(value, DeferredTensor):
        if value.handle.is_computed:
            return value.handle.reduced()
        if is_foreign(value):
            return value.handle.materialize(operation)
    return value


def wrap(
    node: Node, call: AttentionCall, memory: sharing.Memory | None = None, path: tuple[Node, ...] = ()
) -> DeferredTensor:
    """A deferred tensor for a graph, with the autograd history that the real tensor would have.

    Args:
        node: The graph.
        call: The attention call that it belongs to.
        memory: The memory it shares, if it is a view.
        path: The views that lead from that memory to the graph.
    """
    if node.needs_grad is not None:
        node = ViewNode(node, node.dims)  # this node belongs to another deferred tensor already
    tensor = DeferredTensor(Handle(node, call, memory, path))
    tensor.handle.edge = edges.connect(tensor, node, call.of_gradients)
    frame = checkpoints.current()
    tensor.handle.checkpoint = None if frame is None else weakref.ref(frame)
    return tensor


def detached(tensor: DeferredTensor) -> None:
    """Remove the autograd history of a deferred tensor."""
    with compat.DisableTorchFunctionSubclass():
        tensor.detach_()
    tensor.handle.edge = None


def goes_on_as(target: DeferredTensor, result: DeferredTensor) -> DeferredTensor:
    """An in-place function: let the Python object ``target`` stand for ``result``."""
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
