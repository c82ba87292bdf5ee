"""The additive mask for a fused kernel, made tile by tile: all that a graph adds to its product before softmax."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.masked_tail import HIDDEN
from attnpatch.rows.evaluate.tile_plan import CPU_STEP_BYTES, DEVICE_STEP_BYTES, balanced
from attnpatch.rows.fusion.match import LOWEST, SdpaMatch
from attnpatch.rows.graph.axes import Axis, Dims, Tile, all_leaves, extent, leaves
from attnpatch.rows.graph.nodes import InputNode, Node, tensors_of, walk

# If no mask value of a row is above this, the row sees no key. Its keys are kept: the result is uniform, or NaN.
BLIND = HIDDEN / 2
# The first key of a window is a multiple of this, since kernels read masks from aligned addresses.
ALIGNED = 16
# Rows of a mask that are examined at a time.
_SCAN_ROWS = 256


class Added:
    """The steps between product and softmax, without the product itself.

    It holds no tensors, so a backward pass can keep it. The caller gives it the nodes of the masks, in the order of the
    steps. The mask it makes is ``[batch or 1, heads or 1, rows or 1, keys or 1]``.

    Attributes:
        leads: The axes of batch and heads that any mask has.
        is_interleaved: True if a mask's heads are adjacent in memory and its keys are not.
    """

    def __init__(self, formula: SdpaMatch) -> None:
        self.steps = [
            (step.kind, step.number, step.mask is not None, step.inverted) for step in formula.steps
        ]
        self.groups = [formula.leads[:-1], formula.leads[-1:], (formula.row,), (formula.keys,)]
        self.dtype = formula.dtype
        masks = [step.mask for step in formula.steps if step.mask is not None]
        own = [{axis for axis in all_leaves(mask.dims) if axis in formula.leads} for mask in masks]
        self._leads: set[Axis] = set().union(*own)
        # Masks that are the same for all heads tell which keys are visible, before those per head are computed.
        self._is_narrow = [len(axes) < len(self._leads) for axes in own]
        self._is_mild = all(
            is_narrow or _is_mild(mask) for mask, is_narrow in zip(masks, self._is_narrow, strict=True)
        )
        self._can_slice = all(_can_slice(mask, self.row, self.keys) for mask in masks)
        self.is_interleaved = any(_is_interleaved(mask, self.keys) for mask in masks)

    # If layers share a mask, their axes are unified, so look each axis up again when it is used.

    @property
    def row(self) -> Axis:
        return self.groups[2][0].leaves()[0]

    @property
    def keys(self) -> Axis:
        return self.groups[3][0].leaves()[0]

    @property
    def leads(self) -> set[Axis]:
        return set(leaves(self._leads))

    def __call__(
        self, masks: Sequence[Node], tile: Tile, run: Evaluator, only_narrow: bool = False
    ) -> torch.Tensor | None:
        """The mask in a tile; with ``only_narrow`` just the part that is the same for all heads."""
        mask: torch.Tensor | None = None
        numbered = iter(zip(masks, self._is_narrow, strict=True))
        for kind, number, has_mask, inverted in self.steps:
            if not has_mask:
                mask = None if mask is None else mask * number
                continue
            node, is_narrow = next(numbered)
            if only_narrow and not is_narrow:
                continue
            part = arranged(run.value(node, tile), node.dims, tile, self.groups).squeeze(-1)
            part = part.contiguous() if part.stride(-1) > 1 and part.shape[-1] > 1 else part
            if kind == "fill":
                wide = torch.promote_types(self.dtype, torch.float32)
                base = (
                    torch.zeros((), dtype=wide, device=part.device) if mask is None else _wide(mask).to(wide)
                )
                mask = torch.where(part.logical_not() if inverted else part, number, base)
                continue
            part = _wide(part) if part.dtype == torch.float16 else part
            part = part if part.is_floating_point() else part.to(self.dtype)
            part = part if number == 1 else part * number
            mask = part if mask is None else mask + part
        return mask

    def seen(self, masks: Sequence[Node], tile: Tile, run: Evaluator) -> tuple[torch.Tensor, int, int]:
        """The mask in a tile, cut to the keys ``low:high`` that any row sees; and ``low`` and ``high``."""
        everything = 0, self.keys.size
        is_split = any(self._is_narrow) and not all(self._is_narrow)
        part = self(masks, tile, run, is_split)
        assert part is not None
        if ledger_of(part) is not None:
            return (self(masks, tile, run) if is_split else part), *everything
        # Other masks may be added to this one, but beside LOWEST none of them makes a difference.
        low, high = self._window(part, LOWEST if is_split else HIDDEN)
        if not is_split:
            return (part if part.shape[-1] == 1 else part[..., low:high]), low, high
        mask = self(masks, {**tile, self.keys: (low, high)} if self._can_slice else tile, run)
        if not self._can_slice:
            mask = mask[..., low:high]
        if self._is_mild or (low, high) == everything or mask.amax(-1).amin() > BLIND:
            return mask, low, high
        return self(masks, tile, run), *everything

    def _window(self, mask: torch.Tensor, hidden: float) -> tuple[int, int]:
        """The range of keys that any row of a mask sees; all keys if some row sees none."""
        everything = 0, self.keys.size
        if mask.shape[-1] == 1 or not mask.amax(-1).amin() > BLIND:
            return everything
        places = (mask.amax((0, 1, 2)) > hidden).nonzero()
        return int(places[0]) // ALIGNED * ALIGNED, int(places[-1]) + 1

    def pattern(self, masks: Sequence[Node], node: Node, tileable: Sequence[Axis]) -> str | None:
        """``"none"`` or ``"causal"`` if all masks together amount to that, examined row by row; otherwise ``None``.

        Args:
            masks: The nodes of the masks.
            node: The node that they belong to.
            tileable: The axes of batch and heads that they have.
        """
        if not masks:
            return "none"
        # A mask that the host's function makes row by row never changes, and all layers share it.
        kept = _patterns.setdefault(masks[0], {}) if len(masks) == 1 and not any(tensors_of(masks[0])) else {}
        key = (tuple(self.steps), self.dtype, self.row.size, self.keys.size)
        if key not in kept:
            found = self._scanned(masks, node, tileable)
            if found == "unknown":
                return None
            kept[key] = found
        return kept[key]

    @torch.no_grad()
    def _scanned(self, masks: Sequence[Node], node: Node, tileable: Sequence[Axis]) -> str | None:
        """As ``pattern``; ``"unknown"`` in a dry run.

        Reading a result waits for the device, so on an accelerator it is done after the first rows and at the end.
        """
        on_cpu = node.device.type == "cpu"
        step = (CPU_STEP_BYTES if on_cpu else DEVICE_STEP_BYTES) // 4
        step //= self.keys.size * math.prod(axis.size for axis in tileable)
        spans = balanced(self.row.size, max(1, min(_SCAN_ROWS, step) if on_cpu else step), 1)
        names = ["none", "causal"] if self.row.size == self.keys.size else ["none"]
        run, open_ = Evaluator(node), torch.tensor(True)
        run.row = self.row if len(spans) > 1 else None
        for low, high in spans:
            mask = self(masks, {self.row: (low, high)} if run.row is not None else {}, run)
            assert mask is not None
            if ledger_of(mask) is not None:
                return "unknown"
            run.next_rows()
            found = torch.stack([_PATTERNS[name](mask, low, high) for name in names])
            open_ = found & open_.to(found.device) if low else found
            if (on_cpu or low == 0) and not open_.any():
                return None
        return min(
            (name for name, is_open in zip(names, open_.tolist(), strict=True) if is_open), default=None
        )


def _is_nothing(mask: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return mask.any().logical_not()


def _is_causal(mask: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """True if each of the rows ``low:high`` of a mask sees exactly the keys up to its own."""
    if mask.shape[-1] < high or mask.shape[-2] != high - low:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    after, among = mask[..., high:], mask[..., low:high]
    hidden = torch.ones(high - low, high - low, dtype=torch.bool, device=mask.device).triu_(1)
    return (
        (after <= HIDDEN).all()
        & torch.where(hidden, among <= HIDDEN, among == 0).all()
        & mask[..., :low].any().logical_not()
    )


# What masks amount to that no tensor holds, by their nodes.
_patterns: weakref.WeakKeyDictionary[Node, dict[tuple[Any, ...], str | None]] = weakref.WeakKeyDictionary()
_PATTERNS = {"none": _is_nothing, "causal": _is_causal}


def _is_mild(mask: Node) -> bool:
    """True if a mask is small enough to examine and hides no key (ALiBi: one number per head and key)."""
    if not isinstance(mask, InputNode) or mask.tensor is None or len(all_leaves(mask.dims)) > 2:
        return False
    return (
        ledger_of(mask.tensor) is None and mask.dtype.is_floating_point and bool(mask.tensor.amin() > BLIND)
    )


def _can_slice(mask: Node, row: Axis, keys: Axis) -> bool:
    """True if a mask can be computed for some keys only. This is false if a part without rows is kept for all rows."""
    for node in walk(mask):
        axes = all_leaves(node.dims)
        if keys in leaves(node.whole) or (
            not isinstance(node, InputNode) and keys in axes and row not in axes
        ):
            return False
    return True


def _is_interleaved(mask: Node, keys: Axis) -> bool:
    if not isinstance(mask, InputNode) or mask.tensor is None:
        return False
    strides = zip(mask.dims, mask.tensor.stride(), strict=True)
    return any(keys in leaves(dim) and stride > 1 for dim, stride in strides)


def _wide(mask: torch.Tensor) -> torch.Tensor:
    """A mask in float32 or wider, where a hiding value outweighs any product (float16's lowest value does not)."""
    if mask.dtype != torch.float16:
        return mask.to(torch.promote_types(mask.dtype, torch.float32))
    mask = mask.float()
    return mask.masked_fill_((mask <= HIDDEN) & (mask > -math.inf), LOWEST)


def fitting(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask in a dtype that the kernel takes: the query's; on CPU float32 is possible with a narrower query, too."""
    if query.device.type == "cpu" and mask.dtype == torch.float32 and query.dtype.itemsize < 4:
        return mask
    if torch.promote_types(mask.dtype, query.dtype) == query.dtype:
        return mask.to(query.dtype)
    lowest = torch.finfo(query.dtype).min
    return mask.clamp(min=lowest).to(query.dtype).masked_fill_(mask == -math.inf, -math.inf)


def arranged(value: torch.Tensor, dims: Dims, tile: Tile, groups: Sequence[Sequence[Axis]]) -> torch.Tensor:
    """A tile of a tensor, reshaped to one dimension per group of axes (of size 1 if it has none of them).

    All axes that are in no group are merged into a last dimension.
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
        shape.append(extent(tuple(group), tile))
        order += [names.index(leaf) for leaf in parts]
    rest = [place for place in range(len(names)) if place not in order]
    return value.permute(*order, *rest).reshape(*shape, math.prod(value.shape[place] for place in rest))
