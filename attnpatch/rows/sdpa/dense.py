"""torch's dense attention on some query rows, with the work that all steps share done only once.

``F.scaled_dot_product_attention`` in its dense math (aten transformers/attention.cpp,
``_scaled_dot_product_attention_math``) scales all keys, and holds scores, a mask of their infinities and two results.
By rows it would do so in every step. Here the keys are scaled once for all rows, and the scores are one buffer that
every step overwrites: the same operations on the same operands, so the same bits.
"""

from __future__ import annotations

import math

import torch

from attnpatch.ledger import ledger_of
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.graph.axes import Axis, Dim, Dims, Tile
from attnpatch.rows.graph.nodes import Context, Node
from attnpatch.sdpa_call import SdpaCall, additive

_DTYPES = (torch.float32, torch.float64)  # torch computes narrower ones in float32, and rounds at the end


def is_simple(call: SdpaCall) -> bool:
    """True if ``Dense`` can compute a call for which torch would use its dense math."""
    query, mask = call.query, call.attn_mask
    tensors = [query, call.key, call.value]
    # It is not used on CPU for causal calls (each step has fewer keys) and grouped heads (a fused kernel serves them).
    is_other = call.is_causal or call.enable_gqa
    return (
        (query.device.type == "cuda" or (query.device.type == "cpu" and not is_other))
        # The in-place functions below cannot be differentiated.
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(query.device.type)
        and not call.dropout_p > 0
        and all(tensor.dtype == query.dtype and tensor.dim() == query.dim() for tensor in tensors)
        and query.dtype in _DTYPES
        and (mask is None or mask.dtype in (torch.bool, query.dtype))
        and math.isfinite(call.scale)
    )


class ScaledKey(Node):
    """The transposed keys times the square root of the scale; it has no rows, so all row steps share one tensor."""

    def __init__(self, key: Node, factor: float) -> None:
        self.children, self.factor = (key,), factor
        self.dims, self.dtype, self.device = key.dims, key.dtype, key.device

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        return run.value(self.children[0], tile).transpose(-2, -1) * self.factor


class Dense(Node):
    """Dense attention of some query rows."""

    def __init__(
        self, leaves: list[Node], dims: Dims, row: Dim, whole: tuple[Axis, ...], call: SdpaCall
    ) -> None:
        query, key, *rest = leaves
        self.row, self.is_causal = row, call.is_causal
        # Query heads that share a key head are treated as further rows, so keys and values are not repeated.
        self.group = call.group
        root = math.sqrt(abs(call.scale))
        self.factor = -root if call.scale < 0 else root
        self.children = (query, ScaledKey(key, root), *rest)
        self.dims, self.whole, self.score_width = dims, whole, self.group * call.kv_len
        self.scores_held = call.kv_len
        self.dtype, self.device = call.dtype, call.device
        self.context = Context(self.device)
        self.buffer: torch.Tensor | None = None

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        query, key, value, *mask = (run.value(child, tile) for child in self.children)
        rows = query.shape[-2]
        low = next((tile[axis][0] for axis in self.row if axis in tile), 0)
        if self.is_causal:
            stop = min(low + rows, key.shape[-1])
            key, value = key[..., :stop], value[..., :stop, :]
        with self.context.enter():
            if self.group > 1:
                query = query.unflatten(-3, (-1, self.group)).flatten(-3, -2)
            folded = self._scores(query * self.factor, key)
            scores = folded if self.group == 1 else folded.unflatten(-2, (self.group, rows)).flatten(-4, -3)
            if mask:
                scores.add_(additive(mask[0], scores.dtype))
            if self.is_causal:
                seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(low)
                scores.masked_fill_(seen.logical_not_(), -math.inf)
            # Rows that see no key become zeros (aten _safe_softmax).
            blind = scores.amax(-1, keepdim=True) == -math.inf
            torch.softmax(scores, -1, out=scores)
            # ``blind.any()`` is read on CPU only: elsewhere it would wait for the device, and a dry run has no values.
            if ledger_of(scores) is not None or scores.device.type != "cpu" or blind.any():
                scores.masked_fill_(blind, 0.0)
            out = torch.matmul(folded, value)
            return out if self.group == 1 else out.unflatten(-2, (self.group, rows)).flatten(-4, -3)

    def _scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The product, in memory that all steps share: allocating it in every step takes a tenth of the step's time."""
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        shape = (*lead, query.shape[-2], key.shape[-1])
        count = math.prod(shape)
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = None
            self.buffer = torch.empty(count, dtype=self.dtype, device=self.device)
        return torch.matmul(query, key, out=self.buffer[:count].view(shape))
