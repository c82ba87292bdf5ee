"""An SDPA call as a graph that can be computed some query rows at a time."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.rows.deferred.tensor import DeferredTensor
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.row_granularity import RowGranularity, of_fused
from attnpatch.rows.graph.axes import ROW, Axis, Dim, Dims, Tile, fresh, unify
from attnpatch.rows.graph.nodes import Context, InputNode, Node
from attnpatch.rows.sdpa.dense import Dense, is_simple
from attnpatch.rows.sdpa.kernel_choice import MATH_KERNEL, fused_choice, keeps_lse, with_lse, without_cudnn
from attnpatch.sdpa_call import SdpaCall


def graph(call: SdpaCall) -> Node:
    """An SDPA call as a graph of one step."""
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    lead, count = fresh(call.lead), call.group
    if call.enable_gqa:
        # Query heads are key heads x group: cut between groups, never inside one.
        groups = fresh(key.shape[-3:-2])[0]
        lead = (*lead[:-1], (*groups, *((Axis(count),) if count > 1 else ())))
    row: Dim = (Axis(call.q_len, ROW),) if call.q_len > 1 else ()
    width = fresh(value.shape[-1:])[0]
    dims = (*lead, row, width)
    leaves: list[Node] = [
        InputNode.aligned(query, (*lead, row, ())),
        InputNode.aligned(key, (*lead, (), ())),
        InputNode.aligned(value, (*lead, (), width)),
    ]
    if call.enable_gqa:
        outer = lead[:-1]
        leaves[1] = InputNode.aligned(key, (*outer, groups, (), ()))
        leaves[2] = InputNode.aligned(value, (*outer, groups, (), width))
    beside: tuple[Axis, ...] = ()
    if mask is not None:
        node = _mask_node(mask, (*lead, row, ()))
        beside = node.dims[-1] if node.dims else ()
        leaves.append(node)
    inner = lead[-1][-1:] if count > 1 else ()
    fused = fused_choice(call) != MATH_KERNEL
    # A fused kernel is parallel over heads and holds no scores, so a step has all heads.
    whole = (*width, *inner, *beside, *([axis for dim in lead for axis in dim] if fused else []))
    if not fused and is_simple(call):
        return Dense(leaves, dims, row, whole, call)
    return Attend(leaves, dims, row, whole, call, fused)


def _mask_node(mask: torch.Tensor, dims: Dims) -> Node:
    """The node of a mask: an input, or a deferred mask's graph with its rows and heads unified with the call's."""
    if isinstance(mask, DeferredTensor):
        node = mask.handle.node
        pairs = zip(node.dims[::-1], dims[::-1], strict=False)
        if all(unify(own, other) for own, other in list(pairs)[1:] if own):
            return node
        mask = mask.handle.materialize("scaled_dot_product_attention")
    return InputNode.aligned(mask, dims)


class Attend(Node):
    """SDPA on some query rows: with their rows of the mask or, for a causal call, with the keys that they see."""

    def __init__(
        self,
        leaves: list[Node],
        dims: Dims,
        row: Dim,
        whole: tuple[Axis, ...],
        call: SdpaCall,
        fused: bool,
    ) -> None:
        self.children = tuple(leaves)
        self.dims, self.row, self.whole = dims, row, whole
        self.dtype, self.device = call.dtype, call.device
        self.rest = {"dropout_p": call.dropout_p, "scale": call.given_scale, "enable_gqa": call.enable_gqa}
        self.is_causal = call.is_causal
        # The fused kernel must serve every step of a call that it serves as a whole, even if rows of the mask are not
        # contiguous.
        self.packs_mask = fused and self.device.type == "cpu" and not compat.takes_any_mask()
        self.is_learned = call.attn_mask is not None and call.attn_mask.requires_grad
        # On CPU a mask costs a third more than merging two parts; on other devices this was not measured.
        self.merges = self.is_causal and self.device.type == "cpu" and keeps_lse(call)
        self.random = call.dropout_p > 0
        self.kv_len = call.kv_len
        self.group = 1 if fused else call.group
        self.context = Context(self.device)
        if self.context.autocast:
            self.dtype = self.context.autocast_dtype
        self.grain = of_fused(call, self.dtype) if fused else RowGranularity()
        self.scores_held = 0 if fused else self.kv_len

    @property
    def score_width(self) -> int:
        """The number of scores in a row, over all heads that are always computed together; no other node shows these
        scores.
        """
        return self.kv_len * self.group

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        query, key, value, *mask = (run.value(child, tile) for child in self.children)
        low, high = next(((tile[axis]) for axis in self.row if axis in tile), (0, query.shape[-2]))
        with self.context.enter(), contextlib.ExitStack() as stack:
            if not self.is_causal or (low == 0 and high == self.row_count()):
                attn_mask = mask[0] if mask else None
                if self.packs_mask and attn_mask is not None and attn_mask.stride(-1) not in (0, 1):
                    attn_mask = attn_mask.contiguous()
                if self.is_learned and not attn_mask.requires_grad:
                    # No fused kernel takes a mask that needs a gradient. The computed rows must need one, too, so that
                    # torch makes the same choice.
                    attn_mask = attn_mask.detach().requires_grad_()
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=attn_mask, is_causal=self.is_causal, **self.rest
                )
            stop = min(high, self.kv_len)
            if self.device.type == "cuda":
                # Every step has another number of keys, and cuDNN would build a plan for each.
                stack.enter_context(without_cudnn())
            if low == 0:
                key, value = key[..., :stop, :], value[..., :stop, :]
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, **self.rest)
            if self.merges and not run.wanted and low < stop:
                return self._merged(query, key, value, low, stop)
            seen = torch.ones(high - low, stop, dtype=torch.bool, device=query.device).tril_(low)
            return F.scaled_dot_product_attention(
                query, key[..., :stop, :], value[..., :stop, :], attn_mask=seen, **self.rest
            )

    def _merged(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, low: int, stop: int
    ) -> torch.Tensor:
        """Rows of a causal call without a mask: the results for earlier keys and for the rows' own keys are merged.

        They are weighted by their probability mass, as FlashAttention merges blocks (Dao et al. 2022). With a mask
        instead the call takes a third longer.
        """
        before, lse_before = self._with_lse(query, key[..., :low, :], value[..., :low, :], False)
        among, lse_among = self._with_lse(query, key[..., low:stop, :], value[..., low:stop, :], True)
        share = torch.sigmoid(lse_before - lse_among).unsqueeze(-1)
        return torch.lerp(among.to(share.dtype), before.to(share.dtype), share).to(before.dtype)

    def _with_lse(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return with_lse(SdpaCall.of((query, key, value), {"is_causal": is_causal, **self.rest}))

    def row_count(self) -> int:
        return self.row[0].size if self.row else 1
