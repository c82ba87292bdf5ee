"""A block map of attention weights that somebody has already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from attnpatch.blocks.partition import Partition
from attnpatch.blocks.spec import Blocks
from attnpatch.errors import CaptureError

# Rows that are reduced at a time: weights that are computed when they are read need not be held whole.
_ROWS = 1024
# Rows of bfloat16 weights do not sum to 1 exactly; each weight is rounded by up to 2 ** -9 of itself.
_TOLERANCE = 0.01
_FORM = (
    "accepted are tensors [batch, heads, queries, keys], one per layer, or one such tuple per generated token"
)


def fields_of(
    attentions: Any,
    blocks: Blocks | tuple[Blocks, Blocks],
    attention_mask: Tensor | None,
    heads: Literal["mean", "all"],
    layers: Sequence[int | str] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fields of ``BlockMap.from_attentions``, which says what the arguments are."""
    if not isinstance(heads, str) or heads not in ("mean", "all"):
        raise CaptureError(f"heads is {heads!r}; accepted are 'mean' and 'all'.")
    if isinstance(layers, (str, bytes)):
        raise CaptureError(f"layers is {layers!r}; accepted is a number or a name for each layer, or None.")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CaptureError(f"metadata is {metadata!r:.60}; accepted is a dict of what JSON can hold.")
    _check_blocks(blocks)
    calls = _calls(attentions)
    last = calls[-1][0]
    batch, count = last.shape[:2]
    num_keys, first_row = last.shape[-1], calls[0][0].shape[-1] - calls[0][0].shape[-2]
    _check_shapes(calls, first_row, is_pair=isinstance(blocks, tuple))
    query, key = _partitions(
        blocks, attention_mask, (batch, first_row, sum(c[0].shape[-2] for c in calls), num_keys)
    )
    of_query = one_hot(query.assignment + 1, query.sizes.shape[1] + 1)[..., 1:].double()
    of_key = one_hot(key.assignment + 1, key.sizes.shape[1] + 1)[..., 1:].double()
    sums = torch.zeros(len(calls[0]), batch, count, of_query.shape[-1], of_key.shape[-1], dtype=torch.float64)
    first = row = 0 if isinstance(blocks, tuple) else first_row
    for call in calls:
        of_rows = of_query[:, row : row + call[0].shape[-2]]
        on_own = sum(_add(sums[place], weights, of_rows, of_key, row) for place, weights in enumerate(call))
        if not isinstance(blocks, tuple) and bool(of_rows.any()) and on_own == 0:
            raise CaptureError(
                "no token of a call attends to itself, so its queries are not the last tokens of its keys. A static cache has "
                "keys for tokens to come; assisted generation may return rows of other tokens. Use attnpatch.capture, or give "
                "a pair of blocks, for queries and keys."
            )
        row += call[0].shape[-2]
    rows = of_query[:, first:row].sum(1)
    mass = (sums / rows.clamp(min=1)[:, None, :, None]).transpose(0, 1)
    return {
        "mass": mass.mean(2) if heads == "mean" else mass,
        "layers": range(len(calls[0])) if layers is None else layers,
        "query_labels": query.labels,
        "key_labels": key.labels,
        "query_sizes": rows.long(),
        "key_sizes": key.sizes,
        "heads": "mean" if heads == "mean" else range(count),
        "metadata": {
            "tokens": num_keys,
            **({"num_layers": len(calls[0])} if layers is None else {}),
            **(metadata or {}),
        },
    }


def _calls(attentions: Any) -> list[Sequence[Tensor]]:
    """The weights of each call of the model, one tensor per layer."""
    given = attentions
    if isinstance(given, Tensor) and given.dim() == 4:
        given = [given]
    if not isinstance(given, (tuple, list)) or not given:
        raise CaptureError(f"attentions is {type(attentions).__name__}; {_FORM}.")
    calls = list(given) if isinstance(given[0], (tuple, list)) else [given]
    for one in (weights for call in calls for weights in call):
        if one is None:
            raise CaptureError(
                "the attention weights are None: under SDPA transformers returns none. Load the model with "
                "attn_implementation='eager', or call attnpatch.apply(model) first."
            )
        if not isinstance(one, Tensor) or one.dim() != 4:
            found = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise CaptureError(f"one layer's weights are {found}; {_FORM}.")
    if not calls[0] or any(len(call) != len(calls[0]) for call in calls):
        raise CaptureError(f"the calls have {sorted({len(call) for call in calls})} layers; {_FORM}.")
    return calls


def _check_blocks(blocks: Any) -> None:
    pair = blocks if isinstance(blocks, tuple) else (blocks, blocks)
    if len(pair) != 2 or not all(isinstance(one, Blocks) for one in pair):
        raise CaptureError(f"blocks is {blocks!r}; accepted is attnpatch.Blocks, or a pair of them.")


def _check_shapes(calls: list[Sequence[Tensor]], first_row: int, is_pair: bool) -> None:
    """All layers of a call have the same queries and keys, and each call has the keys of the calls before.

    A cache that drops tokens (sliding windows) has fewer: which tokens its keys are cannot be told from the weights.
    """
    like, row = calls[0][0], first_row
    if 0 in like.shape:
        raise CaptureError(f"the weights are {list(like.shape)}, which is empty; {_FORM}.")
    are_constant = is_pair and all(weights.shape[-1] == like.shape[-1] for call in calls for weights in call)
    for call in calls:
        row += call[0].shape[-2]
        keys = like.shape[-1] if are_constant else row
        for place, weights in enumerate(call):
            if weights.shape[:2] != like.shape[:2] or weights.shape[-2] != call[0].shape[-2]:
                raise CaptureError(
                    f"layer {place} has weights of {list(weights.shape)}, another one of {list(call[0].shape)} (batch, heads, "
                    f"queries, keys); {_FORM}."
                )
            if weights.shape[-1] == keys or (len(calls) == len(call) == 1):
                continue
            raise CaptureError(
                f"layer {place} has weights on {weights.shape[-1]} keys where {keys} tokens were expected, so its keys are not "
                "the tokens so far; for cross-attention give a pair of blocks, for a sliding window or a static cache use "
                "attnpatch.capture."
            )


def _partitions(
    blocks: Any, mask: Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[Partition, Partition]:
    """The blocks of the query rows and of the keys."""
    batch, first_row, num_rows, num_keys = sizes
    try:
        valid = (
            torch.ones(batch, num_keys, dtype=torch.bool)
            if mask is None
            else torch.as_tensor(mask).cpu() != 0
        )
    except (TypeError, ValueError, RuntimeError):
        raise CaptureError(f"attention_mask is {mask!r}; accepted is a tensor [batch, keys].") from None
    if valid.shape != (batch, num_keys):
        raise CaptureError(
            f"attention_mask is {list(valid.shape)}; accepted is [{batch}, {num_keys}], batch and keys."
        )
    if isinstance(blocks, tuple):
        return blocks[0].resolve(torch.ones(batch, num_rows, dtype=torch.bool)), blocks[1].resolve(valid)
    if first_row + num_rows != num_keys:
        raise CaptureError(
            f"the weights have {num_rows} query rows from row {first_row} on and {num_keys} keys, so queries are not the same "
            "tokens as keys; give a pair of blocks, for queries and keys."
        )
    both = blocks.resolve(valid)
    return both, both


def _add(sums: Tensor, weights: Tensor, of_query: Tensor, of_key: Tensor, first: int) -> float:
    """Add a layer's weights to ``[batch, heads, query_blocks, key_blocks]``, some rows at a time.

    Args:
        first: Number of the first row among the keys, if they are the same tokens.

    Returns:
        The sum of the weights of tokens on themselves.

    Raises:
        CaptureError: A row of a block does not sum to 1 or less.
    """
    keys, on_own = of_key[:, None, : weights.shape[-1]], 0.0
    for start in range(0, weights.shape[-2], _ROWS):
        rows = weights[:, :, start : start + _ROWS].detach().to("cpu", torch.float64)
        blocks = of_query[:, None, start : start + _ROWS]
        # Rows of padding may hold anything, NaN too.
        rows = torch.where(blocks.any(-1, keepdim=True), rows, 0.0)
        total = rows.sum(-1)
        if not bool((total.abs() <= 1 + _TOLERANCE).all()):
            raise CaptureError(
                f"a row of the weights sums to {total.flatten()[total.abs().nan_to_num(torch.inf).argmax()]:.4g}; accepted are "
                "probabilities (after softmax, without dropout: model.eval()), whose rows sum to 1."
            )
        on_own += rows.diagonal(first + start, -2, -1).sum().item() if first + start < rows.shape[-1] else 0.0
        sums += blocks.mT @ (rows @ keys)
    return on_own
