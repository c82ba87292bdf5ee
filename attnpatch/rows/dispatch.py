"""The table of torch functions that extend a recipe instead of computing it.

A handler gets the call as torch was given it and returns deferred tensors, or ``NotImplemented``: then everything
deferred among the arguments is computed and the call runs as it is. Handlers must give the result that torch would,
so whatever they do not understand to the letter (an unusual keyword, an ``out=``) they leave alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch.rows.arguments import argument, deferred_in, first_deferred, tensors_in
from attnpatch.rows.autograd import checkpoints, edges
from attnpatch.rows.creation import constants, gumbel
from attnpatch.rows.deferred import sharing
from attnpatch.rows.deferred.tensor import (
    DeferredRows,
    after_write,
    before_write,
    computed,
    detached,
    goes_on_as,
    has_history,
    is_pending,
    settle,
    wrap,
)
from attnpatch.rows.graph.axes import (
    KEY,
    LEAD,
    ROW,
    Axis,
    Dim,
    Dims,
    all_leaves,
    fresh,
    leaves,
    same,
    size_of,
)
from attnpatch.rows.graph.dropout import Dropout
from attnpatch.rows.graph.nodes import Call, Leaf, Node, Pick, graph, map_structure
from attnpatch.rows.guard import native
from attnpatch.rows.layout import diagonals, joining, shaping
from attnpatch.rows.layout import writes as writing
from attnpatch.rows.matmul import products
from attnpatch.rows.op_table import ALONG, CASTS, ELEMENTWISE, PAIRS, REDUCING, TO_WHOLE, called
from attnpatch.rows.ops import lookups, metadata, out_argument, per_head, reductions

Handler = Callable[[str, Callable[..., Any], Any, dict[str, Any]], Any]


# Operators that write to their first operand and do not end in one ``_``, and what they do.
_PLAIN = {f"__i{name}__": f"__{name}__" for name in "and or xor lshift rshift floordiv mod".split()}

# Where functions are told to write to their first argument.
FLAGS = {
    **dict.fromkeys("relu relu6 selu silu mish hardsigmoid hardswish".split(), 1),
    **dict.fromkeys("leaky_relu elu celu".split(), 2),
    **dict.fromkeys("hardtanh threshold _threshold dropout alpha_dropout".split(), 3),
    "rrelu": 4,
}


def apply(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Extend the recipe if the function is in the table, otherwise compute what is deferred and call it."""
    given, flag = args, _flag(name, args, kwargs)
    is_write = writes(name) or flag is not None
    if args and isinstance(args[0], DeferredRows) and args[0].handle.values is not None:
        if is_write:
            sharing.begins_anew(args[0].handle)
        elif name in shaping.VIEWS and not sharing.is_whole(args[0].handle):
            return _viewed(name, func, args, kwargs)
    out = kwargs.get("out")
    if isinstance(out, DeferredRows) and sharing.is_part(out.handle):
        out.handle.settle_family(name)
    args, kwargs = map_structure(args, computed), map_structure(kwargs, computed)
    if not any(is_pending(value) for value in tensors_in(args, kwargs)):
        if is_write and given and isinstance(given[0], DeferredRows):
            return _write(name, func, given, kwargs)
        return native(func, args, kwargs)
    if not args and "input" in kwargs and name != "where":
        args, kwargs = (kwargs["input"],), {key: kwargs[key] for key in kwargs if key != "input"}
    if kwargs.get("out") is None:
        if is_write and args and is_pending(args[0]):
            return _in_place(name, func, args, kwargs, flag)
        handler = HANDLERS.get(name)
        if name in shaping.LIKE and not is_pending(args[0]) and len(args) == 2 and not kwargs:
            return getattr(torch.Tensor, shaping.LIKE[name])(args[0], args[1].shape)
        if handler is not None and (handler is not shaping.HANDLERS.get(name) or is_pending(args[0])):
            result = handler(name, func, args, kwargs)
            if result is not NotImplemented:
                return _counted(name, result)
    elif (written := out_argument.written(name, func, args, kwargs)) is not NotImplemented:
        return written
    if is_write and args and isinstance(args[0], torch.Tensor):
        return _write(name, func, args, kwargs)
    if name in sharing.ALIASES and is_pending(args[0]) and sharing.is_part(args[0].handle):
        args[0].handle.settle_family(name)
    result = native(func, settle(args, name), settle(kwargs, name))
    if name in shaping.VIEWS and sharing.is_view_of_part(result, args[0]):
        # What was computed alone is forgotten with the next write, and its native view would not see that.
        args[0].handle.settle_family(name)
        return native(func, settle(args, name), settle(kwargs, name))
    return result


# Another tensor of the same memory.
_SAME = frozenset(["detach", "alias", "view_as", "lift_fresh"])
# Autograd begins and sums gradients with these.
_MADE = {"ones_like": torch.ones, "zeros_like": torch.zeros}


def below(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator that reached a deferred tensor under everything Python can intercept: a scripted function's.

    Its history was recorded above, so no gradients are enabled here.
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


def _counted(name: str, result: Any) -> Any:
    """``result``, computed if it was made a whole number: who asks for counts or indices wants them, not scores.

    They go to functions that cannot be handed what is pending (the block masks of a compiled FlexAttention).
    """
    if name not in TO_WHOLE or not isinstance(result, DeferredRows):
        return result
    node = result.handle.node
    if node.dtype is torch.bool or node.dtype.is_floating_point or node.dtype.is_complex:
        return result
    if not any(isinstance(step, Call) and step.work for step in graph(node)):
        return result  # distances of positions are whole numbers before they are a bias
    return settle(result, name)


def writes(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name in _PLAIN or name in writing.IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def protect(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """Before something is overwritten, let recipes keep what they still read from it; whether it is."""
    name = called(func)
    found = _written(name, func, args, kwargs)
    for tensor in tensors_in(found, {}):
        before_write(computed(tensor))
    return bool(found) and name not in _EXPOSING


# What hands out memory that is written to past torch.
_EXPOSING = frozenset("numpy __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage".split())


def _written(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Those arguments that a function may write to."""
    found = [] if kwargs.get("out") is None else [kwargs["out"]]
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return [*found, args, kwargs] if _is_mutable(func) else found
    if writes(name) or name in _EXPOSING or _flag(name, args, kwargs) is not None:
        found.append(args[0] if args else kwargs)
    return found


def _is_mutable(func: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> bool:
    """Whether an operator writes to one of its arguments, ``out=`` left out."""
    each = [func] if isinstance(func, torch._ops.OpOverload) else [getattr(func, o) for o in func.overloads()]
    return any(
        value.alias_info is not None and value.alias_info.is_write and not value.is_out
        for overload in each
        for value in overload._schema.arguments
    )


def _write(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A write that no recipe can express: to a real tensor, after whatever reads it has kept its values."""
    target = args[0]
    if isinstance(target, DeferredRows) and sharing.is_part(target.handle):
        target.handle.settle_family(name)
    real = target
    if isinstance(target, DeferredRows):
        # A write under no_grad leaves the history as it is.
        with torch.set_grad_enabled(torch.is_grad_enabled() or has_history(target)):
            real = settle(target, name)
    rest, kwargs = settle(args[1:], name), settle(kwargs, name)
    before_write(real)
    before = _state(real)
    result = native(func, (real, *rest), kwargs)
    if isinstance(target, DeferredRows) and (before is None or before != _state(real)):
        target.handle.is_written(real)
        if name == "detach_":
            detached(target)
    after_write()
    return target if result is real else result


def _state(tensor: Any) -> Any:
    """What any write changes, so that one that has done nothing (dropout of nothing) is none; ``None``: not to be told."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_inference():
        return None
    where = edges.memory_of(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()
    return tensor._version, id(tensor.grad_fn), tensor.requires_grad, where


def _viewed(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A view of something that was computed while what it is a part of was not."""
    with sharing.as_recipe(args[0].handle) as views:
        result = apply(name, func, args, kwargs)
        views += deferred_in([result], {})
    return result


Plain = tuple[Any, dict[str, Any]]


def _flag(name: str, args: Any, kwargs: dict[str, Any]) -> Plain | None:
    """The arguments without ``inplace=True``, if a function has it."""
    place = FLAGS.get(name)
    if place is None or not argument(args, kwargs, place, "inplace", False):
        return None
    return args[:place], {key: kwargs[key] for key in kwargs if key != "inplace"}


def _in_place(
    name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], flag: Plain | None = None
) -> Any:
    """``scores += bias``: the recipe goes on, and the same Python object stands for the result.

    Args:
        name: Of the function, with a ``_`` at its end if it has no flag.
        func, args, kwargs: The call.
        flag: The arguments without ``inplace=True``.
    """
    target: DeferredRows = args[0]
    checkpoints.overwrites(target.handle)
    plain, given = _PLAIN.get(name, name[:-1]), (args, kwargs)
    handler, base = writing.IN_PLACE.get(name), func
    if flag is not None:
        plain, handler, given = name, HANDLERS.get(name), flag
    elif handler is None:
        handler, base = HANDLERS.get(plain), getattr(torch.Tensor, plain, None) or getattr(F, plain, None)
    # Under no_grad a step in place changes the values and leaves the history as it is.
    is_silent = not torch.is_grad_enabled() and sharing.has_history(target.handle)
    if base is None or handler is None or is_silent or plain in shaping.HANDLERS:
        return _write(name, func, args, kwargs)
    result = handler(name if base is func else plain, base, *given)
    old = target.handle.node
    if (
        result is NotImplemented
        or not isinstance(result, DeferredRows)
        or result.handle.node.shape != old.shape
    ):
        return _write(name, func, args, kwargs)
    node = result.handle.node
    if node.dtype != old.dtype:
        node = Call(torch.Tensor.to, (node, old.dtype), {}, node.dims, old.dtype, node.device)
        result = wrap(node, target.handle.call)
    return target if _carried(target, result) else _write(name, func, args, kwargs)


def _carried(target: DeferredRows, result: DeferredRows) -> bool:
    """Let a result stand for what was written to, and for its part of all that shares memory with it, if nodes can say it."""
    if result is target:
        return True
    if has_history(target) and not has_history(result):
        return False  # what is filled keeps its history natively, and hands no gradient on
    node = result.handle.node
    found = sharing.written(target.handle, node)
    if found is None:
        return False
    for handle in sorted(found, key=lambda handle: len(handle.path)):
        handle.forget()
        tensor, now = handle.tensor, result if found[handle] is node else wrap(found[handle], handle.call)
        if tensor is None:
            handle.node = now.handle.node
        else:
            goes_on_as(tensor, now)
    return True


def node_for(value: torch.Tensor, dims: Dims) -> Node:
    """The recipe node of an argument: its own, or a leaf whose dimensions line up with ``dims`` from the right."""
    if isinstance(value, DeferredRows):
        return value.handle.node
    aligned = dims[len(dims) - value.dim() :]
    return Leaf(
        value, tuple(dim if size != 1 else () for dim, size in zip(aligned, value.shape, strict=True))
    )


def probe(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What the call returns for tensors of one element: torch itself says the dtype, autocast included."""

    def shrink(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (not value.dim() and not isinstance(value, DeferredRows)):
            return value
        return torch.ones([1] * value.dim(), dtype=value.dtype, device=value.device)

    with torch.no_grad():
        return func(*map_structure(args, shrink), **map_structure(kwargs, shrink))


def broadcast(nodes: list[Node], shapes: list[torch.Size]) -> Dims | None:
    """The axes of the broadcast result; ``None`` where two recipes are cut in ways that do not fit."""
    shape = torch.broadcast_shapes(*shapes)
    dims: list[Dim] = []
    for back in range(len(shape), 0, -1):
        found: Dim = ()
        for node in nodes:
            own = node.dims[-back] if back <= len(node.dims) else ()
            if size_of(own) == 1:
                continue
            if not found:
                found = own
            elif not same(found, own):
                return None
        if not found and shape[-back] != 1:
            # Figures of rows against a real row of figures: the columns of a matrix.
            found = (Axis(shape[-back], KEY if back == 1 and _has_no_keys(nodes) else LEAD),)
        dims.append(found)
    return tuple(dims)


def elementwise(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = tensors_in(args, kwargs)
    first = first_deferred(args, kwargs)
    if any(value.device != first.device and value.dim() for value in tensors):
        return NotImplemented
    nodes = [value.handle.node for value in tensors if isinstance(value, DeferredRows)]
    if (figures := _beside_keys(tensors)) is not None:
        known = lambda value: _of_rows(value) if id(value) in figures else value
        return func(*map_structure(args, known), **map_structure(kwargs, known))
    dims = broadcast(nodes, [value.shape for value in tensors])
    if dims is None:
        return NotImplemented
    if _has_no_keys(nodes) and (name == "sigmoid" or _is_beside_output(tensors, nodes)):
        return func(*map_structure(args, _of_rows), **map_structure(kwargs, _of_rows))
    tiny = probe(func, args, kwargs)
    if not isinstance(tiny, torch.Tensor):
        return NotImplemented  # Python's answer to ``scores == None``

    def place(value: Any) -> Any:
        return node_for(value, dims) if isinstance(value, torch.Tensor) else value

    node = Call(
        func, map_structure(args, place), map_structure(kwargs, place), dims, tiny.dtype, first.device
    )
    return wrap(node, first.handle.call)


def _has_no_keys(nodes: list[Node]) -> bool:
    """Whether these are figures of one per row (a logsumexp): small, and sigmoid rounds them by where they lie."""
    return not any(leaf.kind == KEY for node in nodes for leaf in all_leaves(node.dims))


def _beside_keys(tensors: list[torch.Tensor]) -> set[int] | None:
    """Figures of one per row that meet the keys, or each other across: degrees of rows and of columns.

    Put off, rows and keys would be one axis, of which nothing can be cut.
    """
    given = {id(value): value.handle.node for value in tensors if isinstance(value, DeferredRows)}
    if len(given) < 2:
        return None
    places: dict[Axis, set[int]] = {}
    keys: set[int] = set()
    for node in given.values():
        for back, dim in enumerate(reversed(node.dims)):
            for axis in leaves(dim):
                places.setdefault(axis, set()).add(back)
                if axis.kind == KEY:
                    keys.add(back)
    found = {
        number
        for number, node in given.items()
        if _has_no_keys([node])
        and any(
            axis.kind == ROW and (back in keys or back < max(places[axis]))
            for back, dim in enumerate(reversed(node.dims))
            for axis in leaves(dim)
        )
    }
    return found or None


def _is_beside_output(tensors: list[torch.Tensor], nodes: list[Node]) -> bool:
    """Whether deferred tensors meet one that is larger: figures of one per row, and an output that they scale.

    Put off, they would turn the output into scores, which leave the site and are computed whole in the next one.
    """
    most = max(node.shape.numel() for node in nodes)
    return any(tensor.numel() > most for tensor in tensors if not isinstance(tensor, DeferredRows))


def _of_rows(value: Any) -> Any:
    """What is deferred, computed by rows: nothing whole that a report would have to count."""
    return value.handle.reduced() if isinstance(value, DeferredRows) else value


def cast(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``, ``type_as``: another dtype on the same device."""
    source = args[0]
    if name == "type" and len(args) == 1 and not kwargs:
        return metadata.asked(name, func, args, kwargs)
    like = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not isinstance(source, DeferredRows) and len(args) == 2 and len(like) == 1 and not kwargs:
        # Only what the other is matters, not what it holds.
        return source.to(device=like[0].device, dtype=like[0].dtype)
    if not isinstance(source, DeferredRows) or kwargs.get("memory_format") is not None:
        return NotImplemented
    tiny = probe(func, args, kwargs)
    if not isinstance(tiny, torch.Tensor) or tiny.device != source.device:
        return NotImplemented
    copy = kwargs.get("copy", False)
    if tiny.dtype == source.dtype and not copy and not like[1:]:
        return source
    old = source.handle.node
    return wrap(
        Call(torch.Tensor.to, (old, tiny.dtype), {}, old.dims, tiny.dtype, old.device), source.handle.call
    )


def _dims_of(node: Node, dim: Any) -> list[int] | None:
    """Positions named by a ``dim`` argument, or ``None`` if it names none."""
    if isinstance(dim, int) and not isinstance(dim, bool):
        dim = [dim]
    if not isinstance(dim, (list, tuple)) or not dim or not all(isinstance(d, int) for d in dim):
        return None
    return [d % len(node.dims) for d in dim]


def _mark_keys(node: Node, axes: list[Axis]) -> None:
    """Softmax says which axis holds the keys; what was taken for one before is a row axis."""
    for dim in node.dims:
        for leaf in leaves(dim):
            if leaf in axes:
                leaf.kind = KEY
            elif leaf.kind == KEY:
                leaf.kind = "row"


def along(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node if isinstance(args[0], DeferredRows) else None
    positions = _dims_of(node, argument(args, kwargs, 1, "dim")) if node is not None else None
    if node is None or positions is None:
        return NotImplemented
    if mixes_figures(node, positions):
        return func(_of_rows(args[0]), *args[1:], **kwargs)
    axes = leaves(node.dims[positions[0]])
    if "softm" in name or name == "log_softmax":
        _mark_keys(node, axes)
    dtype = probe(func, args, kwargs).dtype
    call = Call(func, (node, *args[1:]), kwargs, node.dims, dtype, node.device, node.dims[positions[0]])
    return wrap(call, args[0].handle.call)


_EXTREMES = frozenset("max min amax amin any all".split())


def mixes_figures(node: Node, positions: list[int]) -> bool:
    """Whether a step needs all rows of what has one figure for each: small, so it is computed first."""
    return _has_no_keys([node]) and any(axis.kind == ROW for i in positions for axis in leaves(node.dims[i]))


def reducing(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    node = args[0].handle.node if isinstance(args[0], DeferredRows) else None
    positions = _dims_of(node, argument(args, kwargs, 1, "dim")) if node is not None else None
    if node is not None and len(args) == 1 and not kwargs and name in _EXTREMES:
        return reductions.extreme(name, func, args[0])
    if node is None or positions is None:
        return NotImplemented
    if mixes_figures(node, positions):
        return func(_of_rows(args[0]), *args[1:], **kwargs)
    tiny = probe(func, args, kwargs)
    kept = tiny.dim() == len(node.dims)
    dims = tuple(
        () if i in positions else dim for i, dim in enumerate(node.dims) if kept or i not in positions
    )
    whole = tuple(axis for position in positions for axis in node.dims[position])
    call = Call(func, (node, *args[1:]), kwargs, dims, tiny.dtype, node.device, whole)
    return wrap(call, args[0].handle.call)


def pairs(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Functions that return values and indices along one dimension."""
    if name in ("max", "min") and (
        (len(args) > 1 and isinstance(args[1], torch.Tensor)) or "other" in kwargs
    ):
        return elementwise(name, func, args, kwargs)
    if not isinstance(args[0], DeferredRows) or "stable" in kwargs:
        return NotImplemented
    if len(args) == 1 and not kwargs and name in _EXTREMES:
        return reductions.extreme(name, func, args[0])
    node = args[0].handle.node
    dim = argument(args, kwargs, 2 if name == "topk" else 1, "dim", None if name in ("max", "min") else -1)
    positions = _dims_of(node, dim)
    if positions is None:
        return NotImplemented
    position = positions[0]
    replaced: list[Dim] = [node.dims[position]]
    if name == "topk":
        replaced = [(Axis(argument(args, kwargs, 1, "k"), KEY),)]
    elif name != "sort":
        replaced = [()] if argument(args, kwargs, 2, "keepdim", False) else []
    dims = (*node.dims[:position], *replaced, *node.dims[position + 1 :])
    whole = node.dims[position] + tuple(axis for dim in replaced for axis in dim)
    call = Call(func, (node, *args[1:]), kwargs, dims, node.dtype, node.device, whole)
    results = tuple(
        wrap(Pick(call, i, dims, dtype), args[0].handle.call)
        for i, dtype in enumerate((node.dtype, torch.int64))
    )
    return getattr(torch.return_types, name)(results)


def dropout(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    p = argument(args, kwargs, 1, "p", 0.5)
    training = argument(args, kwargs, 2, "train" if "train" in kwargs else "training", True)
    if not isinstance(source, DeferredRows) or not 0.0 <= p <= 1.0:
        return NotImplemented
    if not training or p == 0.0:
        return source
    return wrap(Dropout(source.handle.node, p), source.handle.call)


def pointwise_convolution(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A convolution of width 1, which mixes heads (channels) and nothing else: talking heads."""
    source = args[0]
    weight, bias = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 2, "bias")
    if (
        not isinstance(source, DeferredRows)
        or isinstance(weight, DeferredRows)
        or isinstance(bias, DeferredRows)
    ):
        return NotImplemented
    node = source.handle.node
    if weight.dim() != len(node.dims) or any(size != 1 for size in weight.shape[2:]):
        return NotImplemented
    stride, padding = argument(args, kwargs, 3, "stride", 1), argument(args, kwargs, 4, "padding", 0)
    if any(step != 1 for step in _each(stride)) or any(
        edge not in (0, "valid", "same") for edge in _each(padding)
    ):
        return NotImplemented
    mixed = fresh([weight.shape[0]])
    dims = (node.dims[0], *mixed, *node.dims[2:])
    dtype = probe(func, (source, weight), {}).dtype
    places = {"weight": weight, "bias": bias}
    leaf = {key: None if t is None else Leaf(t, ((),) * t.dim()) for key, t in places.items()}
    rest = {"stride": stride, "padding": padding, "dilation": argument(args, kwargs, 5, "dilation", 1)}
    rest["groups"] = argument(args, kwargs, 6, "groups", 1)
    call = Call(func, (node,), {**leaf, **rest}, dims, dtype, node.device, (*node.dims[1], *mixed[0]))
    return wrap(call, source.handle.call)


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(ALONG, along),
    **dict.fromkeys(REDUCING, reducing),
    **dict.fromkeys(PAIRS, pairs),
    **dict.fromkeys(CASTS, cast),
    "dropout": dropout,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), pointwise_convolution),
    **gumbel.HANDLERS,
    **shaping.HANDLERS,
    **lookups.HANDLERS,
    **metadata.HANDLERS,
    **reductions.HANDLERS,
    **writing.HANDLERS,
    **diagonals.HANDLERS,
    **joining.HANDLERS,
    **per_head.HANDLERS,
    **constants.HANDLERS,
    **products.HANDLERS,
}
