"""Deferred tensors in autograd's graph: each has an edge (``grad_fn``) of its own, so gradients flow as natively.

The ``grad_fn`` of a deferred tensor is a ``_TiledFunction``; its inputs are the deferred and real tensors that the
tensor is computed from. In the backward pass the product with the values computes the gradients of query, key and value
at once, tile by tile, and passes nothing to the edges in between. The gradient of scores or probabilities themselves is
computed only if it is asked for (a hook, ``retain_grad``, ``torch.autograd.grad``), and then whole, as natively.

The tensors that a graph reads are saved once, by the first edge that reads them, through autograd. So checkpointing and
offloading of saved tensors work as for any operation. An edge reaches the tensors that earlier edges have saved through
its ``next_functions``; those live as long as the edge itself.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.autograd.kept_values import Kept, Packed
from attnpatch.rows.evaluate import untiled
from attnpatch.rows.graph.nodes import InputNode, Node, tensors_of, twin, walk
from attnpatch.rows.graph.random_state import restored

if TYPE_CHECKING:
    from attnpatch.rows.evaluate.tiled import TiledEvaluation


@dataclasses.dataclass
class Plan:
    """The data of one edge.

    Attributes:
        result: Returns the tensor that gets the edge.
        again: Computes its gradients.
        parents: Nodes of the deferred tensors that its step reads directly (twins, without tensors); they come first
            among the edge's inputs.
        leaves: Input nodes that receive gradients, all in one pass.
        direct: Those input nodes that are not below a parent.
        own: Input nodes whose tensors this edge saves.
        saved: The tensors of ``own``.
    """

    result: Callable[[], torch.Tensor]
    again: TiledEvaluation
    parents: list[Node]
    leaves: list[InputNode]
    direct: list[InputNode]
    own: list[InputNode]
    saved: list[torch.Tensor]


class _TiledFunction(torch.autograd.Function):
    """Forward: returns the result, which is computed by tiles or stays deferred. Backward: recomputes tiles, with a
    small graph for each.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: torch.Tensor) -> torch.Tensor:
        _keep(ctx, plan)
        return plan.result()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = dict.fromkeys((*ctx.parents, *ctx.leaves))
        if grad is not None:
            found |= _gradients(ctx, grad, ctx.needs_input_grad[1:])
        _forget(ctx)
        return (None, *found.values())


def _keep(ctx: Any, plan: Plan) -> None:
    """Store in ``ctx`` what the backward pass needs; the stored graphs hold no tensors."""
    ctx.set_materialize_grads(False)
    ctx.again, ctx.parents, ctx.leaves, ctx.direct, ctx.own = (
        plan.again, plan.parents, plan.leaves, plan.direct, plan.own,
    )  # fmt: skip
    ctx.save_for_backward(*plan.saved)
    # Index of the first parent among ``next_functions``.
    ctx.first, ctx.unpacked = 0, None
    # With hooks, saved tensors are whatever the hooks return for them.
    ctx.has_hooks = compat.saved_tensor_hooks() is not None
    ctx.kept = (Packed if ctx.has_hooks else Kept)(plan.saved)


def _forget(ctx: Any) -> None:
    """Called after the backward pass: drop what was kept, unless autograd keeps the graph for another one."""
    ctx.unpacked = None
    if not compat.keeps_graph():
        ctx.kept.forget()


def _gradients(ctx: Any, grad: torch.Tensor, needed: tuple[bool, ...]) -> dict[Node, torch.Tensor | None]:
    count = len(ctx.parents)
    wanted: list[Any] = [leaf for leaf, want in zip(ctx.leaves, needed[count:], strict=True) if want]
    # ``backward(inputs=[probabilities])`` needs a parent's gradient and nothing below that parent.
    if any(needed[:count]) and (not wanted or _is_observed(ctx.parents)):
        wanted = [node for node, want in zip(ctx.parents, needed, strict=False) if want] + [
            leaf for leaf in wanted if leaf in ctx.direct
        ]
    bound = _bound(ctx)
    again = ctx.again
    if compat.is_batched_gradient(grad) and not torch.is_grad_enabled():
        # Batched gradients (``is_grads_batched``) run under ``vmap``, which cannot sum in place.
        with restored(again.random):
            return dict(zip(wanted, untiled.gradients(again.node, grad, bound, wanted), strict=True))
    method = again.differentiable_gradients if torch.is_grad_enabled() else again.gradients
    try:
        with restored(again.random):
            found = method(grad, bound, wanted)
    except Exception as error:
        if guard.passes(error) or torch.is_grad_enabled():
            raise
        # If this raises as well, the error is the host's: a function without a gradient.
        found = untiled.gradients(again.node, grad, bound, wanted)
        again.on_failure("the backward pass of attention by rows", error)
    return dict(zip(wanted, found, strict=True))


def _is_observed(roots: list[Node]) -> bool:
    return any(node.marks is not None and node.marks.is_observed for root in roots for node in walk(root))


def _bound(ctx: Any) -> dict[Node, torch.Tensor]:
    """The tensors that this edge and those below it have saved, by node."""
    found: dict[Node, torch.Tensor] = {}
    stack, seen = [ctx], set()
    while stack:
        edge = stack.pop()
        if id(edge) in seen:
            continue
        seen.add(id(edge))
        # Autograd derives the classes of its nodes from these functions, so recognise them by attributes.
        if hasattr(edge, "own"):
            saved = edge.kept.instead_of(functools.partial(_unpacked, edge))
            found.update(zip(edge.own, saved, strict=True))
            stack += [
                function for function, _ in edge.next_functions[edge.first : edge.first + len(edge.parents)]
            ]
        elif hasattr(edge, "leads_on"):
            stack += [function for function, _ in edge.next_functions]
    return found


def _unpacked(edge: Any) -> tuple[torch.Tensor, ...]:
    """The saved tensors of an edge, kept after the first read: a checkpoint returns them only once."""
    if not edge.has_hooks:
        return edge.saved_tensors
    if edge.unpacked is None:
        edge.unpacked = edge.saved_tensors
    return edge.unpacked


class _Fork(torch.autograd.Function):
    """A result that was not computed by its graph but in another way (a fused kernel), with the autograd history of
    that other way.

    Its gradient takes that other way, too. It goes through the graph only if the gradient of scores or probabilities is
    asked for, because only the graph has them.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        _keep(ctx, plan)
        ctx.first = 1
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = dict.fromkeys((*ctx.parents, *ctx.leaves))
        if grad is not None and _is_observed(ctx.parents):
            found |= _gradients(ctx, grad, ctx.needs_input_grad[2:])
            grad = None
        _forget(ctx)
        return (None, grad, *found.values())


class _Bridge(torch.autograd.Function):
    """The computed values of a deferred tensor; their gradient flows to the deferred tensor's edge."""

    @staticmethod
    def forward(ctx: Any, deferred: torch.Tensor, computed: list[torch.Tensor]) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.leads_on = True
        return computed[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return grad, None


class _Adopt(torch.autograd.Function):
    """An in-place function: from now on the Python object ``target`` has the history of ``source``."""

    @staticmethod
    def forward(ctx: Any, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.leads_on = True
        ctx.mark_dirty(target)
        return target

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[None, torch.Tensor | None]:
        return None, grad


def bridged(deferred: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """The computed values of a deferred tensor, with its history."""
    return _Bridge.apply(deferred, [computed])


def adopt(target: torch.Tensor, source: torch.Tensor) -> None:
    """Give ``target`` the history of ``source``, as an in-place function does."""
    _Adopt.apply(target, source)


class Marks:
    """The state of a deferred tensor that its node shares with the twin that a backward pass keeps.

    Attributes:
        is_observed: True if its own gradient was asked for.
    """

    def __init__(self) -> None:
        self.is_observed = False


def history(tensor: torch.Tensor) -> Any:
    """The real ``grad_fn`` of a deferred tensor; reading it here does not count as asking for its gradient."""
    with compat.DisableTorchFunctionSubclass():
        return tensor.grad_fn


def connect(tensor: torch.Tensor, node: Node, again: Callable[[Node], TiledEvaluation]) -> Any:
    """Give a deferred tensor its edge, if gradients flow to it; returns the edge or ``None``.

    Args:
        tensor: A deferred tensor without history.
        node: Its graph.
        again: Given a graph without tensors, returns the evaluation that computes its gradients.
    """
    node.carrier, node.needs_grad = weakref.ref(tensor), False
    if not torch.is_grad_enabled():
        node.stops_gradient = True
    if node.stops_gradient:
        return None
    if not (node.dtype.is_floating_point or node.dtype.is_complex):
        return None
    # Set before recording, so that the twin for the backward pass has it, too.
    node.needs_grad = True
    if record(node, lambda: tensor, again) is None:
        node.needs_grad = False
        return None
    return history(tensor)


def record(
    node: Node, result: Callable[[], torch.Tensor], again: Callable[[Node], TiledEvaluation]
) -> torch.Tensor | None:
    """``result()``, with an edge to the tensors that ``node`` is computed from; ``None`` if nothing below it needs a
    gradient.
    """
    found = _planned(node, result, again)
    if found is None:
        return None
    with checkpoints.saving():
        return _TiledFunction.apply(*found)


def fork(node: Node, out: torch.Tensor, again: Callable[[Node], TiledEvaluation]) -> torch.Tensor:
    """``out``, with an additional edge to the scores of ``node``; ``out`` is the result of ``node``, computed in
    another way.
    """
    if not out.requires_grad or not any(parent.needs_grad for parent in _below(node)[0]):
        return out
    found = _planned(node, lambda: out, again)
    return out if found is None else _Fork.apply(found[0], out, *found[1:])


def _planned(
    node: Node, result: Callable[[], torch.Tensor], again: Callable[[Node], TiledEvaluation]
) -> list[Any] | None:
    """The plan of an edge and the tensors it leads to; ``None`` if nothing needs a gradient."""
    if node.stops_gradient:
        return None
    parents, direct = _below(node)
    if not parents and not any(_requires_grad(leaf) for leaf in direct):
        return None
    node.marks = Marks()
    leaves = list(dict.fromkeys([*filter(_requires_grad, direct), *(x for p in parents for x in p.reached)]))
    known = {leaf for parent in parents for leaf in parent.saved}
    own = [leaf for leaf in tensors_of(node) if leaf not in known]
    node.reached, node.saved = leaves, known.union(own)
    copy = twin(node)
    plan = Plan(
        result,
        again(copy),
        [parent.twin for parent in parents],
        [leaf.twin for leaf in leaves],
        [leaf.twin for leaf in direct],
        [leaf.twin for leaf in own],
        [leaf.tensor for leaf in own],
    )
    carriers = [parent.carrier() if is_carried(parent) else parent.anchor for parent in parents]
    return [plan, *carriers, *(leaf.tensor for leaf in leaves)]


def _below(root: Node) -> tuple[list[Node], list[InputNode]]:
    """The nearest deferred tensors with gradients below a node, and the input nodes reached without passing any."""
    parents: list[Node] = []
    direct: list[InputNode] = []
    seen: set[Node] = set()
    stack = list(root.children)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, InputNode):
            direct.append(node)
        elif node.needs_grad is False or node.stops_gradient:
            continue
        elif node.needs_grad and (is_carried(node) or node.anchor is not None):
            parents.append(node)
        else:
            stack.extend(node.children)
    return parents, direct


def is_carried(node: Node) -> bool:
    """True if a node's deferred tensor is alive, still stands for the node, and has the history it was given."""
    tensor = None if node.carrier is None else node.carrier()
    return tensor is not None and tensor.handle.node is node and tensor.handle.edge is history(tensor)


def _requires_grad(leaf: InputNode) -> bool:
    return leaf.tensor is not None and leaf.tensor.requires_grad
