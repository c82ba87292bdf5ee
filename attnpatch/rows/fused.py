"""Recipes that are scaled dot-product attention, handed to torch's fused kernel instead of being replayed.

``formula.py`` reads the recipe. What is added to the product before softmax is a mask to the kernel: none, a causal
one, or rows of it at a time, computed by the same recipe without its product. So a call holds some rows of its masks,
and no scores.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from attnpatch.ledger import ledger_of
from attnpatch.rows import flex, sdpa
from attnpatch.rows.axes import Axis, Tile, all_leaves, extent, leaves, local_shape
from attnpatch.rows.budget import CPU_STEP_BYTES, Grain, balanced
from attnpatch.rows.deferred import SiteCall
from attnpatch.rows.formula import HIDDEN, LOWEST, Formula, OtherRecipe, read
from attnpatch.rows.recipe import Call, Node, tensors_of
from attnpatch.rows.run import Run
from attnpatch.rows.showing import with_lse

# A row in which nothing weighs more than this sees nothing: its keys are kept, and it is uniform or not a number.
_BLIND = HIDDEN / 2
# Rows that look for a pattern in a mask at a time.
_SCAN_ROWS = 256


def attend(result: Call, probabilities: Node, keys: list[Axis], site: SiteCall) -> torch.Tensor | None:
    """The product of probabilities and values by the fused kernel; ``None``, and counted, where it cannot be had."""
    try:
        return _attend(result, probabilities, keys, site)
    except OtherRecipe as other:
        site.tally.not_fused(str(other))
        return None


def _attend(result: Call, probabilities: Node, keys: list[Axis], site: SiteCall) -> torch.Tensor:
    node = Fused(read(result, probabilities, keys), result)
    for leaf in tensors_of(node):
        leaf.check()
    # The tensors are of the dtype that the products would be computed in.
    with torch.autocast(node.device.type, enabled=False):
        whole = node.call()
        if sdpa.fused_choice(whole) == sdpa.MATH_KERNEL:
            raise OtherRecipe("no fused kernel for these tensors")
        if node.has_sink and (_needs_grad(node) or not sdpa.keeps_lse(whole)):
            raise OtherRecipe("cat (sinks)")
        if node.cap is not None and (node.has_sink or node.device.type not in flex.DEVICES):
            raise OtherRecipe("tanh (softcap)")
        pattern = node.pattern() if node.cap is None else None
        if pattern is not None:
            whole |= {"attn_mask": None, "is_causal": pattern == "causal"}
            if not node.has_sink:
                # Nothing is as wide as the scores, so there is nothing to cut.
                policy = dataclasses.replace(site.policy, mode="auto")
                return node.laid_out(sdpa.attend((), whole, dataclasses.replace(site, policy=policy)), {})
    if site.observer is not None:
        raise OtherRecipe("a mask or a sink, while block maps are captured")
    site.tally.count("fused")
    if pattern is not None:
        return node.laid_out(node.beside_sink(*with_lse(whole), {}, Run(node)), {})
    return site.replay(node)


def _needs_grad(node: Node) -> bool:
    return torch.is_grad_enabled() and any(
        leaf.tensor is not None and leaf.tensor.requires_grad for leaf in tensors_of(node)
    )


class Fused(Node):
    """Attention of some query rows by the fused kernel, with the rows of the masks that belong to them."""

    def __init__(self, formula: Formula, result: Call) -> None:
        masks = [step.mask for step in formula.steps if step.mask is not None]
        self.has_sink, self.mask_count = formula.sink is not None, len(masks)
        sinks = [] if formula.sink is None else [formula.sink]
        self.children = (formula.query, formula.key, formula.value, *masks, *sinks)
        # Nothing but the children may hold a tensor: a backward pass keeps this node (``unbound``).
        self.row, self.keys, self.leads, self.width = formula.row, formula.keys, formula.leads, formula.width
        self.steps = [
            (step.kind, step.number, step.mask is not None, step.inverted) for step in formula.steps
        ]
        (self.factor, self.cap), self.kernel_dtype = formula.factors, formula.dtype
        self.dims, self.dtype, self.device = result.dims, result.dtype, result.device
        own = {axis for mask in masks for axis in all_leaves(mask.dims)}
        # A kernel is parallel over heads: it is given all that have the same mask.
        shared = [axis for axis in formula.leads if axis not in own]
        self.whole = (formula.keys, *formula.width, *shared)
        self.grain = Grain(768, 256) if [*shared[-1:]] == [*formula.leads[-1:]] else Grain(32, 32)
        self.score_width = formula.keys.size

    def call(self) -> dict[str, object]:
        """The arguments of the whole call by name, with a mask that has no values."""
        with torch.autocast(self.device.type, enabled=False):
            query, key, value = self._operands({}, Run(self))
        mask = None
        if self.mask_count:
            mask = query.new_zeros(1).expand(*query.shape[:-1], key.shape[-2])
        return {**sdpa.arguments((query, key, value, mask), {}), "scale": self.factor}

    def compute(self, tile: Tile, run: Run) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            query, key, value = self._operands(tile, run)
            mask = self._mask(tile, run)
            blind = None
            if mask is not None:
                mask, blind, (low, high) = _seen(mask, key.shape[-2])
                key, value = key[..., low:high, :], value[..., low:high, :]
                mask = _fitting(mask, query).expand(*mask.shape[:2], query.shape[-2], high - low)
            call = {**sdpa.arguments((query, key, value, mask), {}), "scale": self.factor}
            if self.cap is not None:
                out = flex.attend(query, key, value, mask, self.factor, self.cap)
            elif self.has_sink:
                out, blind = self.beside_sink(*with_lse(call), tile, run), None
            else:
                out = F.scaled_dot_product_attention(**call)
            if blind is not None:
                # Softmax of nothing is not a number; a kernel says zero.
                out = out.masked_fill(blind, math.nan)
            return self.laid_out(out, tile)

    def beside_sink(self, out: torch.Tensor, lse: torch.Tensor, tile: Tile, run: Run) -> torch.Tensor:
        """The result with the share of a sink left out: it takes part in softmax and has no value."""
        child = self.children[-1]
        sink = arranged(run.value(child, tile), child.dims, tile, [*self._lead(), (self.row,)])
        share = torch.sigmoid(lse.unsqueeze(-1) - sink.to(lse.dtype))
        # Where nothing but the sink is seen, it takes everything.
        return torch.where(share > 0, out * share, 0.0).to(out.dtype)

    def _operands(self, tile: Tile, run: Run) -> list[torch.Tensor]:
        """Query, key and value, ``[batch, heads, length, width]``, of one dtype and one width."""
        lead = self._lead()
        sizes = [extent(group, tile) for group in lead]
        found = []
        for child, own in zip(self.children, ((self.row,), (self.keys,), self.width), strict=False):
            part = arranged(run.value(child, tile), child.dims, tile, [*lead, own])
            if child is self.children[2]:
                part = part.transpose(-2, -1)  # values are summed over the keys, the others over their width
            found.append(part.to(self.kernel_dtype).expand(*sizes, *part.shape[-2:]))
        width = max(part.shape[-1] for part in found)
        # Kernels take one width only; columns of zeros change no product.
        found = [
            F.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part for part in found
        ]
        return [part if part.stride(-1) == 1 else part.contiguous() for part in found]

    def _lead(self) -> list[tuple[Axis, ...]]:
        """Batch and heads: however many axes there are, the last one is called heads."""
        return [self.leads[:-1], self.leads[-1:]]

    def _mask(self, tile: Tile, run: Run) -> torch.Tensor | None:
        """What is added to the product, ``[batch or 1, heads or 1, rows or 1, keys or 1]``: the recipe without it."""
        groups = [*self._lead(), (self.row,), (self.keys,)]
        masks = iter(self.children[3:])
        mask: torch.Tensor | None = None
        for kind, number, has_mask, inverted in self.steps:
            if not has_mask:
                mask = None if mask is None else mask * number
                continue
            child = next(masks)
            part = arranged(run.value(child, tile), child.dims, tile, groups).squeeze(-1)
            if kind == "fill":
                part = part.logical_not() if inverted else part
                wide = torch.promote_types(self.kernel_dtype, torch.float32)
                base = (
                    torch.zeros((), dtype=wide, device=part.device) if mask is None else _wide(mask).to(wide)
                )
                mask = torch.where(part, number, base)
                continue
            part = _wide(part) if part.dtype == torch.float16 else part
            part = part if part.is_floating_point() else part.to(self.kernel_dtype)
            part = part if number == 1 else part * number
            mask = part if mask is None else mask + part
        return mask

    def laid_out(self, out: torch.Tensor, tile: Tile) -> torch.Tensor:
        """``[batch, heads, rows, width]`` as the host's own product would give it."""
        axes = leaves([*self.leads, self.row, *self.width])
        width = math.prod(extent((axis,), tile) for axis in self.width)
        out = out[..., :width].reshape([extent((axis,), tile) for axis in axes])
        out = out.permute([axes.index(axis) for axis in all_leaves(self.dims)])
        return out.reshape(local_shape(self.dims, tile)).to(self.dtype).contiguous()

    def pattern(self) -> str | None:
        """``"none"`` or ``"causal"`` where that is what the masks come to, looked at row by row."""
        if not self.mask_count:
            return "none"
        if any(leaf.tensor is not None and ledger_of(leaf.tensor) is not None for leaf in tensors_of(self)):
            return None
        row, keys = self.row, self.keys
        heads = math.prod(axis.size for axis in self.leads if axis not in self.whole)
        step = max(1, min(_SCAN_ROWS, CPU_STEP_BYTES // (4 * keys.size * heads)))
        run, open_ = Run(self), {"none", "causal"} if row.size == keys.size else {"none"}
        spans = balanced(row.size, step, 1)
        run.row = row if len(spans) > 1 else None
        with torch.no_grad():
            for low, high in spans:
                mask = self._mask({row: (low, high)} if run.row is not None else {}, run)
                assert mask is not None
                run.next_rows()
                open_ = {name for name in open_ if _PATTERNS[name](mask, low, high)}
                if not open_:
                    return None
        return min(open_)


def _is_nothing(mask: torch.Tensor, low: int, high: int) -> bool:
    return not mask.any()


def _is_causal(mask: torch.Tensor, low: int, high: int) -> bool:
    """Whether rows ``low:high`` of a mask see the keys up to their own, and those alone."""
    if mask.shape[-1] < high or mask.shape[-2] != high - low:
        return False
    after, among = mask[..., high:], mask[..., low:high]
    hidden = torch.ones(high - low, high - low, dtype=torch.bool, device=mask.device).triu_(1)
    return bool(
        (not after.numel() or after.amax() <= HIDDEN)
        and torch.where(hidden, among <= HIDDEN, among == 0).all()
        and not mask[..., :low].any()
    )


_PATTERNS = {"none": _is_nothing, "causal": _is_causal}


def _seen(mask: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
    """The part of a mask in which something is seen, rows that are not a number, and the keys of that part."""
    everything = 0, kv_len
    if ledger_of(mask) is not None:
        return mask, None, everything
    highest = mask.amax(-1, keepdim=True)
    if not highest.amin() > _BLIND:
        blind = highest == -math.inf
        return mask, blind if blind.any() else None, everything
    if mask.shape[-1] != kv_len:
        return mask, None, everything
    places = (mask.amax((0, 1, 2)) > HIDDEN).nonzero()
    low, high = int(places[0]), int(places[-1]) + 1
    return mask[..., low:high], None, (low, high)


def _wide(mask: torch.Tensor) -> torch.Tensor:
    """A mask in float32 or wider, in which what hides a key swallows any product (that of float16 does not)."""
    if mask.dtype != torch.float16:
        return mask.to(torch.promote_types(mask.dtype, torch.float32))
    mask = mask.float()
    return mask.masked_fill_((mask <= HIDDEN) & (mask > -math.inf), LOWEST)


def _fitting(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask in a dtype that the kernel takes: the query's, on CPU also float32 beside a narrower one."""
    if query.device.type == "cpu" and mask.dtype == torch.float32 and query.dtype.itemsize < 4:
        return mask
    if torch.promote_types(mask.dtype, query.dtype) == query.dtype:
        return mask.to(query.dtype)
    lowest = torch.finfo(query.dtype).min
    return mask.clamp(min=lowest).to(query.dtype).masked_fill_(mask == -math.inf, -math.inf)


def arranged(
    value: torch.Tensor, dims: tuple[tuple[Axis, ...], ...], tile: Tile, groups: list[tuple[Axis, ...]]
) -> torch.Tensor:
    """A tile of a tensor with one dimension for each group of axes, of size 1 where it has none of them.

    What is in no group comes last, as one dimension.
    """
    names: list[Axis | None] = []
    sizes: list[int] = []
    for dim, size in zip(dims, value.shape, strict=True):
        parts = leaves(dim)
        names += parts or [None]
        sizes += [extent((leaf,), tile) for leaf in parts] or [size]
    value = value.reshape(sizes)
    shape, order = [], []
    for group in groups:
        parts = leaves(group)
        if not any(leaf in names for leaf in parts):
            shape.append(1)
            continue
        for leaf in parts:
            if leaf not in names:
                value = value.unsqueeze(-1).expand(*value.shape, extent((leaf,), tile))
                names.append(leaf)
        shape.append(extent(group, tile))
        order += [names.index(leaf) for leaf in parts]
    rest = [place for place in range(len(names)) if place not in order]
    return value.permute(*order, *rest).reshape(*shape, math.prod(value.shape[place] for place in rest))
