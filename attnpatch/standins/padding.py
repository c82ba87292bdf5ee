"""``flash_attn.bert_padding``: padded batches as packed sequences, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``indices`` of a tensor."""
    return input[indices]


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """A tensor of ``first_axis_dim`` rows: ``values`` at ``indices``, zeros elsewhere."""
    made = values.new_zeros(first_axis_dim, *values.shape[1:])
    return made.index_put((indices,), values)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The tokens of a padded batch in one row.

    Args:
        hidden_states: ``[batch, length, ...]``.
        attention_mask: ``[batch, length]``, not 0 where there is a token.
        unused_mask: ``[batch, length]``, not 0 at further places that are kept, and not counted in the last result.

    Returns:
        The tokens ``[total, ...]``, their places in the flattened batch, int32 cumulative lengths ``[batch + 1]``, the
        largest length, and the numbers of tokens ``[batch]``.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    places = kept.flatten().nonzero().flatten()
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = hidden_states.flatten(0, 1)[places]
    return tokens, places, ends, int(lengths.max()), attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of ``unpad_input``: ``[batch, seqlen, ...]``, zeros where there is no token."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
