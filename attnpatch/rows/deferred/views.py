"""Deferred tensors that are views of others, and shared memory that is computed for all its views at once."""

from __future__ import annotations

import torch

from attnpatch.rows.deferred.handle import Handle
from attnpatch.rows.deferred.sharing import (
    Native,
    Solid,
    compute_all,
    has_history,
    of_function,
    part_of,
    steps_between,
)
from attnpatch.rows.deferred.tensor import DeferredTensor, wrap
from attnpatch.rows.graph.nodes import Node


def view(source: DeferredTensor, node: Node, native: Native) -> DeferredTensor:
    """A deferred tensor that shares memory with ``source``.

    Args:
        source: The tensor that is viewed.
        node: The view's graph: the source's own, or nodes of one child each on top of it.
        native: The torch function and its arguments after the first.
    """
    own = source.handle.node
    node = of_function(node, own, native)
    path = (*source.handle.path, *(steps_between(node, own) or [Solid(own, node.dims, native)]))
    return wrap(node, source.handle.call, source.handle.memory, path)


def into_native_views(handle: Handle) -> None:
    """Turn the tensors of a memory into views of one real tensor, with the autograd history that they have."""
    memory = handle.memory
    # A write under no_grad leaves the history as it is.
    with torch.set_grad_enabled(torch.is_grad_enabled() or has_history(handle)):
        with torch.no_grad():
            compute_all(handle)
        root = next(
            (member for member in memory.members if not member.path and member.tensor is not None), None
        )
        if root is not None:
            # The whole tensor keeps its history, because gradients of earlier results flow there, too.
            real = root.reduced()
            root.stands_for(real)
        else:
            whole = wrap(memory.graph, handle.call)
            whole.handle.values = memory.whole
            whole.handle.pending.discard(whole.handle)
            real = whole.handle.reduced()
        for member in list(memory.members):
            if member is not root:
                member.is_written(part_of(member.path, real))


def materialize_memory(handle: Handle, operation: str) -> None:
    """Turn all views of one matrix into views of one tensor, so that a write to one is seen by all."""
    if handle.memory.whole is None:
        handle.call.counters.materialised(operation)
    into_native_views(handle)


def begins_anew(handle: Handle) -> None:
    """Prepare a computed tensor for a write that all tensors of its memory must see.

    A slice that was computed alone drops its values and is a graph again. If the whole memory was computed and
    gradients flow to it, all its tensors become native views with a history.
    """
    if handle.values is None or handle.written is not None:
        return
    if handle.memory.whole is None:
        handle.forget()
    elif handle.memory.others(handle) and has_history(handle):
        into_native_views(handle)
