"""The matmul path: a product of query and key is deferred; the product that sums over the keys is computed by rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.ledger import is_plain
from attnpatch.policy import NativeNeed
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import edges
from attnpatch.rows.deferred.handle import running_site
from attnpatch.rows.deferred.tensor import DeferredTensor, materialize, site_of, wrap
from attnpatch.rows.graph.axes import KEY, LEAD, ROW, Axis, Dim, leaves, size_of, unify
from attnpatch.rows.graph.nodes import InputNode, Node, walk
from attnpatch.rows.graph.operations import Letters, OpNode
from attnpatch.rows.matmul.spellings import NAMES, Product, parse
from attnpatch.rows.op_table import op
from attnpatch.rows.ops import both_sides
from attnpatch.rows.provenance import observed

# ``fuse(product with the values, probabilities, key axes, call)``: the result of a fused kernel, or ``None``.
Fuse = Callable[[OpNode, Node, list[Axis], AttentionCall], torch.Tensor | None]
_fused: list[Fuse] = []


def fuses(function: Fuse) -> Fuse:
    """Register the function that uses a fused kernel (``Policy.fuse``); its file imports this one, not the reverse."""
    _fused[:] = [function]
    return function


# A table of positions has one row per key, or one per distance. The number of distances is twice the number of keys,
# plus a number in this range.
_DISTANCES = (-2, 1)


def defer(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
    """A product of real tensors: deferred if it looks like scores and the policy says by rows.

    Returns:
        The deferred scores, or ``NotImplemented``.
    """
    product = parse(name, args, kwargs)
    if product is None or not _looks_like_scores(product):
        return NotImplemented
    if not _goes_by_rows(product, call):
        if _is_large(product):
            call.counters.made(native_size(product)[1].temporaries // 3)
        return NotImplemented
    return deferred(func, product, call)


def deferred(func: Callable[..., Any], product: Product, call: AttentionCall) -> DeferredTensor:
    """The scores of a product, deferred."""
    sizes = product.sizes()
    query, key = product.pair()
    rows, keys = product.only(query, key), product.only(key, query)
    if _is_of_table(product):
        # A table has no batch and no heads. That alone must not make these dimensions rows.
        rows, keys = (labels[-1:] for labels in (rows, keys))
    axes: dict[str, Dim] = {}
    for label in product.result:
        kind = ROW if label in rows else KEY if label in keys else LEAD
        axes[label] = (Axis(sizes[label], kind),) if sizes[label] != 1 else ()
    dims = tuple(axes[label] for label in product.result)
    nodes = [
        InputNode.aligned(tensor, tuple(axes.get(label, ()) for label in part))
        for tensor, part in zip(product.operands, product.labels, strict=True)
    ]
    if call.sources is not None:
        observed.scored(call.sources, product, axes)
    step = _call(func, product, nodes, dims, ())
    step.is_guess = _is_of_table(product)
    return wrap(step, call)


def _are_parameters(product: Product) -> list[bool]:
    pair = [product.operands[i] for i in product.pair()]
    return [isinstance(t, torch.nn.Parameter) or isinstance(t._base, torch.nn.Parameter) for t in pair]


def _is_of_table(product: Product) -> bool:
    """True if one operand is a parameter, or has neither batch nor heads: a layer's weight, or a table of positions."""
    ranks = [product.operands[i].dim() for i in product.pair()]
    return any(_are_parameters(product)) or (ranks[0] != ranks[1] and 2 in ranks)


def _looks_like_scores(product: Product) -> bool:
    # A subclass (a distributed or a quantised tensor) means more than its elements: such a call stays native.
    if not all(is_plain(t) and t.is_floating_point() for t in product.operands):
        return False
    device = product.operands[0].device
    if len({t.dtype for t in product.operands}) > 1 and not torch.is_autocast_enabled(device.type):
        return False  # torch raises an error
    sizes = product.sizes()
    keys = product.only(*reversed(product.pair()))
    summed = [size for label, size in sizes.items() if label not in product.result]
    if all(_are_parameters(product)):
        return False
    if not (_rows(product) and keys and summed and max(summed) >= 2 and 0 not in sizes.values()):
        return False
    # A linear layer is a product, too: ``hidden @ weight.T``. A table of positions has a row for each position.
    return not _is_of_table(product) or (_has_a_row_for_each_position(product) and _is_large(product))


def _has_a_row_for_each_position(product: Product) -> bool:
    sizes = product.sizes()
    query, key = product.pair()
    rows, keys = (sizes[product.only(*pair)[-1]] for pair in ((query, key), (key, query)))
    least, most = _DISTANCES
    return rows == keys or any(least <= a - 2 * b <= most for a, b in ((keys, rows), (rows, keys)))


def _rows(product: Product) -> list[int]:
    sizes = product.sizes()
    return [sizes[label] for label in product.only(*product.pair())]


def _keys(product: Product) -> list[int]:
    sizes = product.sizes()
    return [sizes[label] for label in product.only(*reversed(product.pair()))]


def _is_large(product: Product) -> bool:
    """True if the result is larger than its operands, as scores are; a product with the values is smaller."""
    return max(_rows(product)) > 1 and product.elements() > sum(t.numel() for t in product.operands)


def native_size(product: Product) -> tuple[int, NativeNeed]:
    """Query rows, and what the native call would take: three tensors of the size of the scores, or more."""
    scores, widest, itemsize = product.elements(), product.widest_step(), product.operands[0].element_size()
    need = NativeNeed(max(3 * scores, widest) * itemsize, max(scores, widest) * itemsize)
    return max(_rows(product)), need


def _goes_by_rows(product: Product, call: AttentionCall) -> bool:
    if call.observer is not None:
        # A single token that attends to itself is handled at its softmax (``observed.of_one``).
        return max(_rows(product) + _keys(product)) > 1
    if max(_rows(product)) < 2:
        return False
    if call.policy.mode == "always":
        return True
    q_len, need = native_size(product)
    if not _is_large(product):
        return False
    is_fused = call.policy.fuse and q_len > call.policy.min_tokens
    return is_fused or call.by_rows(q_len, need, product.operands[0].device)


def native_scores(name: str, args: Any, kwargs: dict[str, Any]) -> Product | None:
    """The product of a native call, if its result looks like scores and is large; otherwise ``None``."""
    product = parse(name, args, kwargs)
    if product is None or not _looks_like_scores(product) or not _is_large(product):
        return None
    return product


def _call(
    func: Callable[..., Any],
    product: Product,
    operands: list[Node],
    dims: tuple[Dim, ...],
    whole: tuple[Axis, ...],
) -> OpNode:
    added: Node | None = None
    if isinstance(product.added, DeferredTensor):
        added = product.added.handle.node
    elif product.added is not None:
        added = InputNode.aligned(product.added, dims)
    func = product.func or func
    args, kwargs = product.rebuild(operands, added)
    tiny = product.rebuild([_few(t) for t in product.operands], _few(product.added))
    with torch.no_grad():
        dtype = func(*tiny[0], **tiny[1]).dtype
    call = OpNode(func, args, kwargs, dims, dtype, product.operands[0].device, whole)
    sizes = product.sizes()
    if product.is_bilinear and added is None and len(operands) == len({*operands}) == 2:
        letters = dict(zip(operands, product.labels, strict=True))
        call.letters = Letters((letters[call.children[0]], letters[call.children[1]]), product.result)
    leads = set(product.result).intersection(*product.labels)
    call.work = math.prod(size for label, size in sizes.items() if label not in leads)
    if widest := product.widest_step():
        own = product.only(*product.pair()[::-1])
        call.held_bytes = widest * dtype.itemsize // product.elements()
        call.score_width = widest * math.prod(sizes[label] for label in own) // product.elements()
    return call


def _few(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Ones, at most two per dimension: with only one, torch may not call the operator that autocast casts for."""
    if tensor is None:
        return None
    return torch.ones([min(size, 2) for size in tensor.shape], dtype=tensor.dtype, device=tensor.device)


OF_WEIGHTS = (
    "its weights are multiplied with weights, or with a table of keys x keys that comes from no input as far as attnpatch "
    "can follow it, before they meet values, so its result is not made of the tokens with the weights of one softmax"
)


@op(*NAMES, "linear")
def contract(name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A product with a deferred operand: computed by rows if it sums over keys, otherwise another node of the graph."""
    product = parse(name, args, kwargs)
    if product is None:
        return NotImplemented
    deferred_at = [i for i, t in enumerate(product.operands) if isinstance(t, DeferredTensor)]
    if not deferred_at:
        return _onto_deferred(name, func, product)
    if isinstance(product.added, DeferredTensor):
        return NotImplemented
    main = deferred_at[0]
    for other in deferred_at[1:]:
        if not _share_rows(product, main, other):
            _tell_of_weights(product.operands[main], product.operands[other])
            materialized = list(product.operands)
            materialized[other] = materialize(materialized[other], name)
            a, k = product.rebuild(materialized, product.added)
            return contract(name, func, a, k)
    return _contracted(func, product, deferred_at)


def _tell_of_weights(*operands: Any) -> None:
    """Leave a site out if two deferred tensors that are multiplied are both probabilities, and were not shown before."""
    call, nodes = operands[0].handle.call, [observed.before_dropout(each.handle.node) for each in operands]
    shown = call.sources.shown if call.sources is not None else []
    is_shown = any(node is other for node in nodes for other in shown)
    if call.observer is not None and not is_shown and all(any(s.whole for s in walk(n)) for n in nodes):
        call.observer.cannot_show(OF_WEIGHTS)


def _is_table(product: Product, place: int, main: DeferredTensor, site: AttentionCall) -> bool:
    """True if weights are multiplied with a table of keys x keys that is made from no input: it moves weights from some
    keys to others, so they are not the ones that values get.
    """
    labels, operand, sizes = product.labels[place], product.operands[place], product.sizes()
    weights = next(own for own, each in zip(product.labels, product.operands, strict=True) if each is main)
    keys = [n for n in labels if n in weights and n not in product.result and sizes[n] > 1]
    others = [n for n in labels if n in product.result and n not in weights and sizes[n] > 1]
    if not keys or math.prod(sizes[n] for n in keys) != math.prod(sizes[n] for n in others):
        return False
    sources = site.sources
    return sources is not None and sources.of(operand) is None


def _onto_deferred(name: str, func: Callable[..., Any], product: Product) -> Any:
    """Scores that are added to a deferred tensor (``baddbmm`` with a mask as its input)."""
    if not isinstance(product.added, DeferredTensor):
        return NotImplemented
    site = running_site(product.added.handle.call)
    if not _looks_like_scores(product) or product.added.dim() != len(product.result):
        return NotImplemented
    scores = deferred(func, product, site)
    own = product.added.handle.node.dims
    fits = all(size_of(a) == 1 or unify(b, a) for a, b in zip(own, scores.handle.node.dims, strict=True))
    return scores if fits else NotImplemented


def _share_rows(product: Product, main: int, other: int) -> bool:
    """True if two deferred operands have the same row axis (probabilities, and a table looked up by distance)."""
    one, two = (
        dict(zip(product.labels[i], product.operands[i].handle.node.dims, strict=True)) for i in (main, other)
    )  # type: ignore[attr-defined]
    shared = [label for label in one if label in two]
    if not any(
        axis.kind == ROW for label in shared if label in product.result for axis in leaves(two[label])
    ):
        return False
    return all(
        1 in (size_of(one[label]), size_of(two[label])) or unify(one[label], two[label]) for label in shared
    )


def _contracted(func: Callable[..., Any], product: Product, deferred_at: list[int]) -> Any:
    own = [product.operands[i] for i in deferred_at]
    site = site_of(own)
    main: DeferredTensor = next(t for t in own if t.handle.call is site)  # type: ignore[attr-defined]
    sizes = product.sizes()
    axes: dict[str, Dim] = {}
    for i in deferred_at:
        dims = product.operands[i].handle.node.dims  # type: ignore[attr-defined]
        axes |= {label: dim for label, dim in zip(product.labels[i], dims, strict=True) if size_of(dim) != 1}
    summed = [axis for label, dim in axes.items() if label not in product.result for axis in dim]
    known = product.labels[next(i for i in deferred_at if product.operands[i] is main)]
    # Dimensions that only the values have are never cut: matrix libraries would round differently.
    added: list[Axis] = []
    for label in product.result:
        if label not in axes and sizes[label] != 1:
            axes[label] = (Axis(sizes[label]),)
        if label not in known:
            added += axes.get(label, ())
    operands = [
        tensor.handle.node
        if isinstance(tensor, DeferredTensor)
        else InputNode.aligned(tensor, tuple(axes.get(n, ()) if n in product.result else () for n in labels))
        for tensor, labels in zip(product.operands, product.labels, strict=True)
    ]
    # Values with a single channel have no axis for it.
    dims = tuple(axes.get(label, ()) for label in product.result)
    call = _call(func, product, operands, dims, (*summed, *added))
    node = main.handle.node
    keys = leaves(summed)
    if not any(axis.kind == KEY for axis in keys):
        if not any(axis.kind == ROW for axis in keys):
            # The product mixes heads, so it is one more node of the graph.
            return wrap(call, site)
        # If keys come first, only a normalisation along them tells keys from rows. Without one it is not attention.
        if not any(step.whole for step in walk(node)):
            return NotImplemented
    if _is_wrong_guess(node):
        return NotImplemented
    if site.policy.fuse and _has_scores(node):
        found = _fused[0](call, node, keys, site)
        if found is not None:
            return edges.fork(call, found, site.of_gradients)
    try:
        cut = both_sides.cut(call, site)
    except both_sides.Stuck as step:
        site.counters.materialised(str(step))
        cut = call
    else:
        site.counters.count("by_rows")
    if any(_is_table(product, i, main, site) for i in range(len(product.operands)) if i not in deferred_at):
        _tell_of_weights(main)
    watched = observed.watch(cut.children[call.children.index(node)], keys, site)
    result = site.replay(cut, watched)
    if watched is not None and site.observer is not None:
        guard.attempted(site.observer.end, name="finishing observed attention", counters=site.counters)
    return result if cut is call else edges.fork(call, result, site.of_gradients)


def _is_wrong_guess(node: Node) -> bool:
    """True if supposed scores (queries times a table) are summed without being normalised: it was a linear layer."""
    steps = list(walk(node))
    products = [step for step in steps if isinstance(step, OpNode) and step.work]
    return (
        bool(products) and all(step.is_guess for step in products) and not any(step.whole for step in steps)
    )


def _has_scores(node: Node) -> bool:
    """True if a graph begins with a product; a mask multiplied outside attention (a mean over the past) does not."""
    return any(isinstance(step, OpNode) and step.work for step in walk(node))
