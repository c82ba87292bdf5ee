"""Computes a graph that is scaled dot-product attention by torch's fused kernel.

``match.py`` reads the graph. What the graph adds to the product before softmax becomes the kernel's mask
(``additive.py``). The kernel may need no mask, or a causal one. Otherwise the same graph without its product computes
a few rows of the mask at a time. So a call holds some rows of its masks and no scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F

from attnpatch.ledger import ledger_of
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.row_granularity import RowGranularity
from attnpatch.rows.fusion import flex
from attnpatch.rows.fusion.additive import Added, arranged, fitting
from attnpatch.rows.fusion.match import NoMatch, SdpaMatch, read
from attnpatch.rows.graph.axes import Axis, Tile, all_leaves, extent, leaves, local_shape
from attnpatch.rows.graph.nodes import Node, tensors_of
from attnpatch.rows.graph.operations import OpNode
from attnpatch.rows.provenance import observed
from attnpatch.rows.sdpa import kernel_choice, serve
from attnpatch.sdpa_call import SdpaCall


def attend(result: OpNode, probabilities: Node, keys: list[Axis], site: AttentionCall) -> torch.Tensor | None:
    """The product of probabilities and values by the fused kernel; if that is not possible, ``None``, and counted."""
    try:
        return _attend(result, probabilities, keys, site)
    except NoMatch as other:
        site.counters.not_fused(str(other))
        return None


def _attend(result: OpNode, probabilities: Node, keys: list[Axis], site: AttentionCall) -> torch.Tensor:
    node = Fused(read(result, probabilities, keys), result)
    for leaf in tensors_of(node):
        leaf.check()
    # Autocast is off: the tensors already have the dtype in which the products would be computed.
    with torch.autocast(node.device.type, enabled=False):
        whole = node.call()
        if kernel_choice.fused_choice(whole) == kernel_choice.MATH_KERNEL:
            raise NoMatch("no fused kernel for these tensors")
        if node.has_sink and (_needs_grad(node) or not kernel_choice.keeps_lse(whole)):
            raise NoMatch("cat (sinks)")
        if node.cap is not None and (node.has_sink or node.device.type not in flex.DEVICES):
            raise NoMatch("tanh (softcap)")
        pattern = node.added.pattern(node.masks, node, node.lead_of_masks) if node.cap is None else None
        if pattern is not None:
            whole = dataclasses.replace(whole, attn_mask=None, is_causal=pattern == "causal")
            if not node.has_sink:
                # No tensor is as wide as the scores, so the call need not be cut.
                if site.sources is not None:
                    lead = (node.leads[:-1], node.leads[-1:])
                    observed.name_operands(whole, lead, node.row, node.keys, site.sources)
                policy = dataclasses.replace(site.policy, mode="auto")
                return node.laid_out(
                    serve.attend((), whole.arguments(), dataclasses.replace(site, policy=policy)), {}
                )
    if site.observer is not None:
        raise NoMatch("a mask or a sink, while block maps are captured")
    if pattern is not None:
        result = node.laid_out(node.beside_sink(*_with_lse(whole), {}, Evaluator(node)), {})
    else:
        result = site.replay(node)
    site.counters.count("fused")
    return result


def _with_lse(call: SdpaCall) -> tuple[torch.Tensor, torch.Tensor]:
    found = kernel_choice.checked_lse(call)
    if found is None:
        raise NoMatch("cat (sinks): a wrong logsumexp")
    return found


def _needs_grad(node: Node) -> bool:
    return torch.is_grad_enabled() and any(
        leaf.tensor is not None and leaf.tensor.requires_grad for leaf in tensors_of(node)
    )


class Fused(Node):
    """Attention of some query rows by the fused kernel, with their rows of the masks."""

    is_exact = False

    def __init__(self, formula: SdpaMatch, result: OpNode) -> None:
        masks = [step.mask for step in formula.steps if step.mask is not None]
        self.has_sink, self.mask_count = formula.sink is not None, len(masks)
        sinks = [] if formula.sink is None else [formula.sink]
        self.children = (formula.query, formula.key, formula.value, *masks, *sinks)
        # Only children may hold tensors, since a backward pass keeps this node (``twin``).
        self.row, self.keys, self.leads, self.width = formula.row, formula.keys, formula.leads, formula.width
        self.added = Added(formula)
        (self.factor, self.cap), self.kernel_dtype = formula.factors, formula.dtype
        self.dims, self.dtype, self.device = result.dims, result.dtype, result.device
        # The kernel is parallel over heads, so a step has all heads that share a mask, or all heads of a mask whose
        # heads are adjacent in memory.
        own, self.score_width = self.added.leads, formula.keys.size
        self.grain = RowGranularity(32, 32) if {*formula.leads[-1:]} & own else RowGranularity(768, 256)
        if self.added.is_interleaved:
            self.grain, self.score_width = (
                RowGranularity(192, 64),
                self.score_width * math.prod(a.size for a in own),
            )
            own = set()
        self.whole = (formula.keys, *formula.width, *(axis for axis in formula.leads if axis not in own))

    @property
    def masks(self) -> tuple[Node, ...]:
        return self.children[3 : 3 + self.mask_count]

    @property
    def lead_of_masks(self) -> list[Axis]:
        return [axis for axis in leaves(self.leads) if axis in self.added.leads]

    def call(self) -> SdpaCall:
        """The whole call, with an expanded placeholder as its mask."""
        query, key, value = self._operands({}, Evaluator(self))
        mask = None
        if self.mask_count:
            mask = query.new_zeros(1).expand(*query.shape[:-1], key.shape[-2])
        return SdpaCall(query, key, value, mask, given_scale=self.factor)

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False), contextlib.ExitStack() as stack:
            query, key, value = self._operands(tile, run)
            mask = None
            if self.mask_count:
                mask, low, high = self.added.seen(self.masks, tile, run)
                key, value = key[..., low:high, :], value[..., low:high, :]
                mask = fitting(mask, query).expand(*mask.shape[:2], query.shape[-2], high - low)
                if self.device.type == "cuda":
                    # A step has as many keys as its rows see, and cuDNN would build a plan for each number.
                    stack.enter_context(kernel_choice.without_cudnn())
            call = SdpaCall(query, key, value, mask, given_scale=self.factor)
            if self.has_sink:
                out = self.beside_sink(*_with_lse(call), tile, run)
            elif self.cap is not None:
                out = flex.attend(query, key, value, mask, self.factor, self.cap)
            else:
                out = F.scaled_dot_product_attention(**call.arguments())
            return self.laid_out(out if mask is None or self.has_sink else _without_nothing(out, mask), tile)

    def beside_sink(self, out: torch.Tensor, lse: torch.Tensor, tile: Tile, run: Evaluator) -> torch.Tensor:
        """The result, reduced by the sink's share of the softmax, which has no value."""
        child = self.children[-1]
        sink = arranged(run.value(child, tile), child.dims, tile, [*self._lead(), (self.row,)])
        share = torch.sigmoid(lse.unsqueeze(-1) - sink.to(lse.dtype))
        # If a row sees only the sink, its result is zero.
        return torch.where(share > 0, out * share, 0.0).to(out.dtype)

    def _operands(self, tile: Tile, run: Evaluator) -> list[torch.Tensor]:
        """Query, key and value ``[batch, heads, length, width]``, all of the same dtype and width."""
        lead = self._lead()
        sizes = [extent(group, tile) for group in lead]
        found = []
        for child, own in zip(self.children, ((self.row,), (self.keys,), self.width), strict=False):
            part = arranged(run.value(child, tile), child.dims, tile, [*lead, own])
            if child is self.children[2]:
                part = part.transpose(-2, -1)  # values are summed over the keys, the others over their width
            found.append(part.to(self.kernel_dtype).expand(*sizes, *part.shape[-2:]))
        width = max(part.shape[-1] for part in found)
        # Kernels need the same width for all three; columns of zeros do not change the products.
        found = [
            F.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part for part in found
        ]
        return [part if part.stride(-1) == 1 else part.contiguous() for part in found]

    def _lead(self) -> list[tuple[Axis, ...]]:
        """The axes of batch and heads: the last leading axis is heads, all others are batch."""
        return [self.leads[:-1], self.leads[-1:]]

    def laid_out(self, out: torch.Tensor, tile: Tile) -> torch.Tensor:
        """``[batch, heads, rows, width]`` rearranged to the dimensions of the host's own product."""
        axes = leaves([*self.leads, self.row, *self.width])
        width = math.prod(extent((axis,), tile) for axis in self.width)
        out = out[..., :width].reshape([extent((axis,), tile) for axis in axes])
        out = out.permute([axes.index(axis) for axis in all_leaves(self.dims)])
        return out.reshape(local_shape(self.dims, tile)).to(self.dtype).contiguous()


def _without_nothing(out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``out`` with NaN in rows that see no key: the host's softmax gives NaN there, and the kernel gives zero."""
    if ledger_of(out) is not None or not (nothing := (out == 0).all(-1, keepdim=True)).any():
        return out
    return out.masked_fill(nothing & (mask.amax(-1, keepdim=True) == -math.inf), math.nan)
