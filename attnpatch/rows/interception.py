"""Answers torch functions that get a deferred tensor: attributes, hooks, autograd's functions, then the op table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows import handlers as _handlers  # noqa: F401  registers them
from attnpatch.rows.arguments import deferred_in
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import edges
from attnpatch.rows.deferred import sharing
from attnpatch.rows.deferred.handle import has_other_history
from attnpatch.rows.deferred.history import has_history
from attnpatch.rows.deferred.tensor import DeferredTensor, counters_of, is_pending, materialize
from attnpatch.rows.dispatch import apply
from attnpatch.rows.graph.nodes import depth_of, map_structure
from attnpatch.rows.layout import shaping
from attnpatch.rows.op_table import ELEMENTWISE, called
from attnpatch.rows.ops.pointwise import elementwise
from attnpatch.rows.thread_state import here

# Attributes that the wrapper tensor itself answers, without computing anything.
_ATTRIBUTES = frozenset(
    "shape dtype device layout requires_grad ndim is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_quantized "
    "is_nested is_leaf names itemsize nbytes is_mkldnn is_vulkan is_ipu is_maia is_mtia is_xla is_sparse_csr "
    "_backward_hooks _post_accumulate_grad_hooks retains_grad name grad output_nr _version".split()
)
# Attributes that, after an in-place write, belong to the real tensor that replaces the deferred one.
_OF_HISTORY = frozenset(["grad", "retains_grad"])
# The depth at which a graph is computed: an iteration (Sinkhorn's) may be long, and Python's stack is limited.
DEEPEST = 100
# Methods that ask for the gradient of the deferred tensor itself.
_OBSERVING = frozenset(["register_hook", "retain_grad", "register_post_accumulate_grad_hook"])
_METHODS = frozenset(
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed get_device stride "
    "is_contiguous __len__ is_inference storage_offset is_same_size __hash__ requires_grad_".split()
)


# Attributes and methods about sizes and strides. In-place functions (``unsqueeze_``) change them; the wrapper does not
# know.
_GEOMETRY = frozenset(
    "shape size dim ndim ndimension numel nelement stride is_contiguous storage_offset __len__".split()
)


def dispatch_in(site: AttentionCall, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``dispatch`` inside the call of a site."""
    outer, here.site = here.site, site
    try:
        return dispatch(func, args, kwargs)
    finally:
        here.site = outer


def dispatch(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A torch function with a DeferredTensor among its arguments."""
    name = called(func)
    is_attribute = getattr(func, "__name__", "") in ("__get__", "__set__")
    if name in _GEOMETRY and isinstance(args[0], DeferredTensor):
        found = sharing.geometry(args[0].handle, name, func, args[1:], kwargs)
        if found is not None:
            return found
    if is_attribute:
        if name in _OF_HISTORY and (passed := _passed_by(args[0])) is not args[0]:
            return guard.native(func, (passed, *args[1:]), kwargs)
        if name == "grad_fn":
            return _edge_of(args[0])
        if name in _ATTRIBUTES:
            with compat.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
    elif name in _METHODS:
        with compat.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    elif name in _OBSERVING and isinstance(args[0], DeferredTensor):
        return _observed(func, args, kwargs)
    elif func in _INPUTS:
        return _differentiated(func, args, kwargs)
    elif name == "__repr__" and isinstance(args[0], DeferredTensor):
        return DeferredTensor.__repr__(args[0])
    result = apply(name, func, args, kwargs)
    # This is guarded separately: the operation is done, so an error here must not run it again.
    guard.attempted(_bound, result, name, name="the depth of a graph", counters=counters_of((result,), {}))
    return result


def _bound(result: Any, operation: str) -> None:
    if is_pending(result) and depth_of(result.handle.node) > DEEPEST:
        result.handle.materialize(f"{operation} after {DEEPEST} steps")


def _observed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook on a deferred tensor, or ``retain_grad``: its own gradient is asked for."""
    target = args[0]
    passed = _passed_by(target)
    if passed is not target:
        return guard.native(func, (passed, *args[1:]), kwargs)
    _observe(target)
    with compat.DisableTorchFunctionSubclass():
        return guard.native(func, args, kwargs)


def _edge_of(tensor: Any) -> Any:
    """``grad_fn``: its reader may hook it or ask for its gradient, so the node is marked as observed."""
    passed = _passed_by(tensor)
    if passed is tensor:
        _observe(tensor)
    return edges.history(passed)


def _passed_by(tensor: Any) -> Any:
    """The tensor that receives a deferred tensor's gradient: itself, or the real one that an in-place write made."""
    if not isinstance(tensor, DeferredTensor) or has_other_history(tensor):
        return tensor
    passed = tensor.handle.passes_by
    return tensor if passed is None else passed


def _observe(tensor: DeferredTensor) -> None:
    node = tensor.handle.node
    if node.marks is None:
        return
    node.marks.is_observed = True
    if node.anchor is None and tensor.handle.edge is edges.history(tensor):
        with torch.enable_grad():
            node.anchor = edges.bridged(tensor, _nothing_like(tensor))


def _nothing_like(tensor: DeferredTensor) -> torch.Tensor:
    """A tensor with the shape of a deferred one and memory for one element."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


# For each of autograd's functions, the position of the argument that names the tensors to differentiate by.
_INPUTS = {torch.autograd.grad: 1, torch.autograd.backward: 5, torch.Tensor.backward: 4}


def _differentiated(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``backward`` and ``grad``, which need the histories of deferred tensors and not their values.

    So deferred tensors are replaced by stand-ins with the same history. The call itself is then a native one, and
    checkpointed layers that it recomputes can defer as they did before.
    """

    def source(value: Any) -> Any:
        if not is_pending(value) or not has_history(value):
            return materialize(value, func.__name__)
        return edges.bridged(value, _nothing_like(value))

    def target(value: Any) -> Any:
        if not isinstance(value, DeferredTensor):
            return value
        passed = _passed_by(value)
        if passed is not value:
            return passed
        _observe(value)
        with compat.DisableTorchFunctionSubclass():
            return torch.autograd.graph.get_gradient_edge(value)

    place = _INPUTS[func]
    with torch.enable_grad():
        args = tuple(
            map_structure(
                value, source if i == 0 else target if i == place else lambda v: materialize(v, "grad")
            )
            for i, value in enumerate(args)
        )
        ways = {"outputs": source, "tensors": source, "inputs": target}
        kwargs = {
            key: map_structure(value, ways.get(key, lambda v: materialize(v, "grad")))
            for key, value in kwargs.items()
        }
    return guard.native(func, args, kwargs)


# Operators that return another tensor on the same memory.
_SAME = frozenset(["detach", "alias", "view_as", "lift_fresh"])
# Operators with which autograd starts gradients.
_MADE = {"ones_like": torch.ones, "zeros_like": torch.zeros}


def _extended(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator that reached ``__torch_dispatch__``, below Python's functions: it was called by a scripted function.

    Autograd has recorded it above this level already, so it runs without gradients here.
    """
    library, _, name = func._schema.name.partition("::")
    if (
        library != "aten"
        or kwargs.get("out") is not None
        or not all(map(is_pending, deferred_in(args, kwargs)))
    ):
        return NotImplemented
    if name in _SAME:
        return shaping.same(name, torch.Tensor.detach, args[:1], {})
    if name in _MADE:
        return _MADE[name](args[0].shape, dtype=args[0].dtype, device=args[0].device)
    if name == "view":
        return shaping.view(name, func, args, kwargs)
    return elementwise(name, func, args, kwargs) if name in ELEMENTWISE else NotImplemented


def _below(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    result = _extended(func, args, kwargs)
    if result is not NotImplemented:
        return result
    return guard.native(func, materialize(args, str(func)), materialize(kwargs, str(func)))


DeferredTensor.answer, DeferredTensor.answer_below = staticmethod(dispatch), staticmethod(_below)
