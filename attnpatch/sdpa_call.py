"""One call of ``torch.nn.functional.scaled_dot_product_attention``: its arguments by name, and what they imply."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SdpaCall:
    """The arguments of an SDPA call, under torch's names and with its defaults.

    Attributes:
        query: ``[..., heads, q_len, head_dim]``; key and value alike, with ``kv_len``.
        attn_mask: Broadcasts to ``[..., heads, q_len, kv_len]``: bool (``True``: may attend), or added to the scores.
            It may be a deferred tensor.
        given_scale: The argument ``scale``. The property ``scale`` has the default filled in.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    given_scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def of(cls, args: Any, kwargs: dict[str, Any]) -> SdpaCall:
        """The call that a host makes with these arguments. torch has already refused invalid ones."""
        named = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if "scale" in named:
            named["given_scale"] = named.pop("scale")
        return cls(**named)

    def arguments(self) -> dict[str, Any]:
        """The call again, as torch's keyword arguments."""
        named = dict(vars(self))
        named["scale"] = named.pop("given_scale")
        return named

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def q_len(self) -> int:
        return self.query.shape[-2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[-2]

    @property
    def group(self) -> int:
        """Query heads that share a key head by ``enable_gqa``."""
        return self.query.shape[-3] // self.key.shape[-3] if self.enable_gqa else 1

    @property
    def lead(self) -> torch.Size:
        """The leading dimensions of the result, heads last; empty if the tensors have two dimensions."""
        if self.enable_gqa:
            return self.query.shape[:-2]
        return torch.broadcast_shapes(self.query.shape[:-2], self.key.shape[:-2])

    @property
    def scale(self) -> float:
        """The factor of the scores: the given one, or 1 / sqrt(head_dim)."""
        return scale_of(self.query, self.given_scale)

    @property
    def adds_mask(self) -> bool:
        """Whether the mask is added to the scores (and not boolean)."""
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool

    def additive_mask(self, hidden: float = -math.inf) -> torch.Tensor | None:
        """The mask as SDPA passes it to its kernels; ``hidden``: the number for the False of a boolean mask."""
        return None if self.attn_mask is None else additive(self.attn_mask, self.dtype, hidden)


def scale_of(query: torch.Tensor, given: float | None) -> float:
    """The factor of the scores: the given one, or 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(query.shape[-1]) if given is None else given


def additive(mask: torch.Tensor, dtype: torch.dtype, hidden: float = -math.inf) -> torch.Tensor:
    """A mask that can be added to scores: a boolean mask becomes 0 where it is ``True`` and ``hidden`` elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), hidden)
