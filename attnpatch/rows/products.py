"""Door 2: matrix products. One of query and key is deferred, one with a deferred operand over its keys is replayed."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.ledger import is_plain
from attnpatch.rows.axes import KEY, LEAD, ROW, Axis, Dim, Tile, extent, leaves, size_of
from attnpatch.rows.deferred import DeferredRows, Passing, SiteCall, settle, wrap
from attnpatch.rows.dropout import Dropout
from attnpatch.rows.recipe import Call, Leaf, Node, graph
from attnpatch.rows.replay import Look

NAMES = frozenset("matmul __matmul__ __rmatmul__ bmm baddbmm einsum".split())
# Steps between softmax and the product with the values that do not change what is attended to.
_AFTER_SOFTMAX = frozenset("to float half bfloat16 double type type_as clone".split())


@dataclasses.dataclass
class Product:
    """A call that contracts two tensors.

    Attributes:
        left, right: The operands.
        labels: A letter for every dimension of left, right and result; a letter that the result lacks is summed over.
        rebuild: Arguments of the call from replacements of the two operands.
        added: A tensor added to the result (``baddbmm``), or ``None``.
    """

    left: torch.Tensor
    right: torch.Tensor
    labels: tuple[str, str, str]
    rebuild: Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]
    added: torch.Tensor | None = None

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for tensor, labels in ((self.left, self.labels[0]), (self.right, self.labels[1])):
            for label, size in zip(labels, tensor.shape, strict=True):
                found[label] = max(size, found.get(label, 1))
        return found


def parse(name: str, args: Any, kwargs: dict[str, Any]) -> Product | None:
    """The product a call asks for; ``None`` where it is not of a kind that can be deferred."""
    if kwargs.get("out") is not None or kwargs.get("out_dtype") is not None:
        return None
    if name == "einsum":
        return _parse_einsum(args, kwargs)
    added = None
    if name == "linear":
        return _parse_linear(args, kwargs)
    if name == "baddbmm":
        added, left, right = (
            *args,
            *(kwargs.get(key) for key in ("input", "batch1", "batch2")[len(args) :]),
        )[:3]
        rest = {key: kwargs[key] for key in ("beta", "alpha") if key in kwargs}
        if not isinstance(added, torch.Tensor):
            return None
        rebuild = lambda a, b, c: ((c, a, b), rest)
    else:
        second = ("other", "mat2", "tensor2")
        left, right = (*args, *(kwargs[key] for key in second if key in kwargs))[:2]
        if name == "__rmatmul__":
            left, right = right, left
        rebuild = lambda a, b, c: ((a, b), {})
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return None
    depth = max(left.dim(), right.dim())
    if min(left.dim(), right.dim()) < 2 or depth > 20:
        return None
    lead = string.ascii_uppercase[: depth - 2]
    labels = (lead[depth - left.dim() :] + "ik", lead[depth - right.dim() :] + "kj", lead + "ij")
    return Product(left, right, labels, rebuild, added)


def _parse_linear(args: Any, kwargs: dict[str, Any]) -> Product | None:
    left, right, bias = (*args, *(kwargs.get(key) for key in ("input", "weight", "bias")[len(args) :]))
    if right.dim() != 2:
        return None
    lead = string.ascii_uppercase[: left.dim() - 1]
    return Product(left, right, (lead + "k", "jk", lead + "j"), lambda a, b, c: ((a, b, c), {}), bias)


def _parse_einsum(args: Any, kwargs: dict[str, Any]) -> Product | None:
    if not args or not isinstance(args[0], str) or kwargs:
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    equation = args[0].replace(" ", "")
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, result = equation.split("->")
    labels = [*inputs.split(","), result]
    if len(labels) != 3:
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [
        tensor.dim() - len(part.replace("...", "")) for tensor, part in zip(operands, labels, strict=False)
    ]
    dots = "".join(free[: max(counts)])
    for i, part in enumerate(labels):
        count = counts[i] if i < 2 else len(dots)
        labels[i] = part.replace("...", dots[len(dots) - count :] if count > 0 else "")
    shapes_fit = all(len(part) == tensor.dim() for part, tensor in zip(labels, operands, strict=False))
    if not shapes_fit or any(len(set(part)) != len(part) for part in labels):
        return None
    return Product(*operands, tuple(labels), lambda a, b, _: ((args[0], a, b), {}))  # type: ignore[arg-type]


def defer(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: SiteCall) -> Any:
    """A product of two real tensors: deferred if it looks like scores and the rule says by rows.

    Returns:
        The deferred scores, or ``NotImplemented``.
    """
    product = parse(name, args, kwargs)
    if product is None or not _looks_like_scores(product) or not _goes_by_rows(product, call):
        return NotImplemented
    return deferred(func, product, call)


def deferred(func: Callable[..., Any], product: Product, call: SiteCall) -> DeferredRows:
    """The scores that a product stands for, not computed."""
    sizes = product.sizes()
    left, right, result = product.labels
    axes: dict[str, Dim] = {}
    for label in result:
        kind = LEAD if label in left and label in right else ROW if label in left else KEY
        axes[label] = (Axis(sizes[label], kind),) if sizes[label] != 1 else ()
    dims = tuple(axes[label] for label in result)
    nodes = [
        Leaf(
            tensor,
            tuple(
                axes.get(label, ()) if size != 1 else ()
                for label, size in zip(part, tensor.shape, strict=True)
            ),
        )
        for tensor, part in ((product.left, left), (product.right, right))
    ]
    return wrap(_call(func, product, nodes[0], nodes[1], dims, ()), call)


def _looks_like_scores(product: Product) -> bool:
    left, _, result = product.labels
    operands = (product.left, product.right)
    # A subclass (a distributed or a quantised tensor) means more than its elements: it stays the native call.
    if not all(is_plain(t) and t.is_floating_point() for t in operands):
        return False
    # A layer written as a product: ``hidden @ weight.T``. Scores come from two tensors of the same rank.
    if any(isinstance(t, torch.nn.Parameter) or isinstance(t._base, torch.nn.Parameter) for t in operands):
        return False
    if product.left.dim() != product.right.dim() and 2 in (product.left.dim(), product.right.dim()):
        return False
    sizes = product.sizes()
    keys = [sizes[label] for label in result if label not in left]
    summed = [size for label, size in sizes.items() if label not in result]
    return bool(_rows(product) and keys and summed and max(summed) >= 2 and 0 not in sizes.values())


def _rows(product: Product) -> list[int]:
    sizes = product.sizes()
    return [sizes[label] for label in product.labels[2] if label not in product.labels[1]]


def _is_large(product: Product) -> bool:
    """Whether the scores are what takes the memory; a product with the values is smaller than what it is made of."""
    sizes = product.sizes()
    elements = math.prod(sizes[label] for label in product.labels[2])
    return max(_rows(product)) > 1 and elements > product.left.numel() + product.right.numel()


def native_size(product: Product) -> tuple[int, int]:
    """Query rows, and bytes that the native call would hold: scores, what softmax makes of them, a step between."""
    sizes = product.sizes()
    elements = math.prod(sizes[label] for label in product.labels[2])
    return max(_rows(product)), 3 * elements * product.left.element_size()


def _goes_by_rows(product: Product, call: SiteCall) -> bool:
    if call.observer is not None:
        return True
    if max(_rows(product)) < 2:
        return False
    if call.policy.mode == "always":
        return True
    q_len, temporaries = native_size(product)
    if q_len <= call.policy.min_tokens or not _is_large(product):
        return False
    return call.policy.fuse or call.by_rows(q_len, temporaries, product.left.device)


def native_scores(name: str, args: Any, kwargs: dict[str, Any]) -> Product | None:
    """The product of a native call, if what it makes are large scores."""
    product = parse(name, args, kwargs)
    if product is None or not _looks_like_scores(product) or not _is_large(product):
        return None
    return product


def _call(
    func: Callable[..., Any],
    product: Product,
    left: Node,
    right: Node,
    dims: tuple[Dim, ...],
    whole: tuple[Axis, ...],
) -> Call:
    added: Node | None = None
    if product.added is not None:
        aligned = dims[len(dims) - product.added.dim() :]
        shape = product.added.shape
        added = Leaf(
            product.added, tuple(d if size != 1 else () for d, size in zip(aligned, shape, strict=True))
        )
    args, kwargs = product.rebuild(left, right, added)
    tiny = product.rebuild(*(_one(t) for t in (product.left, product.right)), _one(product.added))
    with torch.no_grad():
        dtype = func(*tiny[0], **tiny[1]).dtype
    call = Call(func, args, kwargs, dims, dtype, product.left.device, whole)
    left_labels, right_labels, result = map(set, product.labels)
    leads = left_labels & right_labels & result
    call.work = math.prod(size for label, size in product.sizes().items() if label not in leads)
    return call


def _one(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return (
        None if tensor is None else torch.ones([1] * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
    )


def contract(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A product with a deferred operand: replayed if it sums over keys, otherwise one more step of the recipe."""
    product = parse(name, args, kwargs)
    if product is None or isinstance(product.added, DeferredRows):
        return NotImplemented
    if isinstance(product.left, DeferredRows) and isinstance(product.right, DeferredRows):
        a, k = product.rebuild(product.left, settle(product.right, name), product.added)
        return contract(name, func, a, k)
    first = isinstance(product.left, DeferredRows)
    deferred, other = (product.left, product.right) if first else (product.right, product.left)
    own_labels, other_labels = (
        (product.labels[0], product.labels[1]) if first else (product.labels[1], product.labels[0])
    )
    result = product.labels[2]
    node = deferred.handle.node
    axes: dict[str, Dim] = dict(zip(own_labels, node.dims, strict=True))
    sizes = product.sizes()
    added: list[Axis] = []
    for label in result:
        if size_of(axes.get(label, ())) == 1 and sizes[label] != 1:
            axes[label] = (Axis(sizes[label]),)
            if label not in own_labels:
                added += axes[label]
    summed = [
        axis for label, dim in zip(own_labels, node.dims, strict=True) if label not in result for axis in dim
    ]
    leaf = Leaf(
        other,
        tuple(
            axes.get(label, ()) if label in result and size != 1 else ()
            for label, size in zip(other_labels, other.shape, strict=True)
        ),
    )
    left, right = (node, leaf) if first else (leaf, node)
    # A width of one is in no axis: values of one channel.
    dims = tuple(axes.get(label, ()) for label in result)
    call = _call(func, product, left, right, dims, (*summed, *added))
    site = deferred.handle.call
    if not any(axis.kind == KEY for axis in leaves(summed)):
        if not any(axis.kind == ROW for axis in leaves(summed)):
            # Heads are mixed: one more step.
            return wrap(call, site)
        # With the keys in front only what normalises them tells keys from rows. Nothing did: no attention.
        if not set(leaves(summed)) <= {leaf for step in graph(node) for leaf in leaves(step.whole)}:
            return NotImplemented
    if site.policy.fuse and _has_scores(node):
        from attnpatch.rows import fused  # few need it

        found = fused.attend(call, node, leaves(summed), site)
        if found is not None:
            return found
    site.tally.count("by_rows")
    return site.replay(call, _watch(node, leaves(summed), site))


def _has_scores(node: Node) -> bool:
    """Whether a recipe goes back to a product: a mask that is multiplied outside attention (a mean over the past) does not."""
    return any(isinstance(step, Call) and step.work for step in graph(node))


def _watch(probabilities: Node, keys: list[Axis], site: SiteCall) -> tuple[Node, Look] | None:
    """What to show an observer: the probabilities before dropout and casts, if these are probabilities at all."""
    observer = site.observer
    if observer is None or observer.is_of_gradient:
        return None
    node = probabilities
    while isinstance(node, Dropout) or (
        isinstance(node, Call)
        and getattr(node.func, "__name__", "") in _AFTER_SOFTMAX
        and len(node.children) == 1
    ):
        node = node.children[0]
    normalised = {leaf for step in graph(node) for leaf in leaves(step.whole)}
    axes = [leaf for dim in node.dims for leaf in leaves(dim)]
    if not normalised or len(set(axes)) != len(axes):
        return None
    site.tally.count("captured")
    row = next((axis for axis in reversed(axes) if axis.kind == ROW and axis not in keys), None)
    leads = [axis for axis in axes if axis is not row and axis not in keys]
    count = math.prod(axis.size for axis in leads)
    q_len, kv_len = 1 if row is None else row.size, math.prod(axis.size for axis in keys)

    def look(value: torch.Tensor, tile: Tile) -> None:
        value = value.reshape([extent((axis,), tile) for axis in axes])
        order = [*leads, *([row] if row is not None else []), *[axis for axis in axes if axis in keys]]
        value = value.permute([axes.index(axis) for axis in order])
        span = (0, 1) if row is None else tile.get(row, (0, row.size))
        numbers = torch.zeros((), dtype=torch.int64)
        for axis in leads:
            low, high = tile.get(axis, (0, axis.size))
            numbers = (numbers * axis.size).unsqueeze(-1) + torch.arange(low, high)
        value = value.reshape(numbers.numel(), span[1] - span[0], kv_len)
        observer.observe(value, Passing(numbers.reshape(-1), span, count, q_len, kv_len))

    return node, look


HANDLERS: dict[str, Callable[..., Any]] = dict.fromkeys((*NAMES, "linear"), contract)
