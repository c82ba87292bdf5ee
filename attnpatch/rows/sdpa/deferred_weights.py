"""The probabilities of an SDPA call, which its kernel does not return, as a deferred tensor."""

from __future__ import annotations

import math

import torch

from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation.row_masks import RowFunctionNode
from attnpatch.rows.deferred.tensor import wrap
from attnpatch.rows.matmul import products
from attnpatch.sdpa_call import SdpaCall


@torch.no_grad()
def of_call(call: SdpaCall, site: AttentionCall) -> torch.Tensor:
    """Softmax of the scores of an SDPA call, before dropout, in the dtype of its query.

    A row that sees no key is zero, as in torch's attention. The result has no gradients.

    Args:
        call: The call; its mask may be deferred.
        site: The attention call whose policy applies.

    Returns:
        ``[..., heads, q_len, kv_len]``: deferred, which keeps the query and the key alive; or computed at once if it is
        no larger than these (a step of a generation).
    """
    query, key, mask = call.query.detach(), call.key.detach(), call.attn_mask
    grouped = call.group > 1
    if grouped:
        query, key = query.unflatten(-3, (key.shape[-3], -1)), key.unsqueeze(-3)
    product = products.parse("matmul", (query, key.transpose(-2, -1)), {})
    assert product is not None
    scores: torch.Tensor = products.deferred(torch.matmul, product, site)
    if grouped:
        scores = scores.flatten(-4, -3)
    scores = scores * call.scale
    if call.is_causal:
        mask = _causal(call.q_len, call.kv_len, call.device, site)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores = scores + mask.detach()
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32))
    if mask is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    weights = weights.to(call.dtype)
    if weights.numel() <= query.numel() + key.numel():
        return site.replay(weights.handle.node)  # type: ignore[attr-defined]
    return weights


def _causal(q_len: int, kv_len: int, device: torch.device, site: AttentionCall) -> torch.Tensor:
    def rows(low: int, high: int) -> torch.Tensor:
        return torch.ones(high - low, kv_len, dtype=torch.bool, device=device).tril_(low)

    return wrap(RowFunctionNode(rows, (q_len, kv_len), torch.bool, device), site)
