"""One call of an attention kernel outside torch's SDPA (flash-attn, xFormers, SageAttention, FlexAttention): what it means.

The fields follow FlashAttention's public functions (Dao 2023, arXiv:2307.08691), FlexAttention (Dong et al. 2024,
arXiv:2412.05496) and ALiBi (Press et al. 2022, arXiv:2108.12409).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.sdpa_call import SdpaCall, scale_of

# Returns rows ``low:high`` of a mask: ``[batch or 1, heads or 1, high - low, kv_len]``.
MaskRows = Callable[[int, int], torch.Tensor]


def _itself(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class KernelCall:
    """The attention that one call of a kernel computes.

    Scores are ``scale * query @ key.T``; then ``softcap * tanh(scores / softcap)``, then ``change``, then ALiBi and the
    mask. A row without any open key gives zeros.

    Attributes:
        query: ``[batch, heads, q_len, head_dim]``.
        key: ``[batch, key_heads, kv_len, head_dim]``; ``heads`` is a multiple of ``key_heads``.
        value: ``[batch, key_heads, kv_len, value_dim]``.
        scale: The factor of the scores; ``None``: 1 / sqrt(head_dim).
        is_causal: A query sees keys up to its own place.
        aligns_ends: The last query is at the place of the last key (flash-attn since 2.1); otherwise the first query is
            at the place of the first key (torch).
        window: How many keys before and after its own place a query sees; ``None``: all.
        softcap: Scores are bounded by it; 0: they are not.
        sinks: ``[heads]``, a further score for each row, which takes part in softmax and has no value (gpt-oss).
        slopes: ALiBi: ``[heads]`` or ``[batch, heads]``; ``slope * |place of the query - key|`` is subtracted.
        mask: Bool (``True``: may attend) or added to scores, broadcasts to ``[batch, heads, q_len, kv_len]``; or a
            function of a range of rows that returns these rows.
        lengths: Packed sequences: the numbers of queries and of keys of each. Batch is then 1.
        key_starts: The place of the first key of each packed sequence; ``None``: one after the other without gaps.
        kv_used: int ``[batch]``, how many keys of each sequence are in use; ``None``: all. ``aligns_ends`` means the last
            one that is in use.
        change: ``change(score, batch, head, query, key)`` returns the changed score; scalars (``score_mod`` of
            FlexAttention).
        dropout_p: Probability with which weights are set to 0.
        output: Returns ``[batch, heads, q_len, value_dim]``, given what the kernel has returned.
        returned: Returns what the kernel would return, given the result ``[batch, heads, q_len, value_dim]`` and the
            logsumexp of the scores, float32 ``[batch, heads, q_len]`` (``None`` unless ``needs_lse``).
        needs_lse: True if the kernel was asked for the logsumexp, too.
        tolerance: The largest error of the kernel's results, as a share of the largest result; ``None``: that of its
            dtype. A kernel that quantises query and key has a larger one.
        writes: What else the kernel does, before it attends: writes new keys into a cache. Called only if the kernel
            itself does not run.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float | None = None
    is_causal: bool = False
    aligns_ends: bool = True
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    mask: torch.Tensor | MaskRows | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    key_starts: tuple[int, ...] | None = None
    kv_used: torch.Tensor | None = None
    change: Callable[..., torch.Tensor] | None = None
    dropout_p: float = 0.0
    output: Callable[[Any], torch.Tensor] = _itself
    returned: Callable[[torch.Tensor, torch.Tensor | None], Any] = lambda result, lse: result
    needs_lse: bool = False
    tolerance: float | None = None
    writes: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """Say the same in fewer words: a window of 0 keys after the query is causal, a wide one is open."""
        left, right = self.window
        most = max(self.q_len, self.kv_len) - 1
        if right == 0:
            object.__setattr__(self, "is_causal", True)
        if self.is_causal or (right is not None and right >= most):
            right = None
        if left is not None and left >= most:
            left = None
        object.__setattr__(self, "window", (left, right))

    @property
    def q_len(self) -> int:
        return self.query.shape[-2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[-2]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[-3] // self.key.shape[-3]

    @property
    def factor(self) -> float:
        """The factor of the scores, with the default filled in."""
        return scale_of(self.query, self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of exact scores: float32 or better."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def _is_square(self) -> bool:
        """True if both alignments mean the same."""
        return self.kv_used is None and (not self.aligns_ends or self.q_len == self.kv_len)

    @property
    def is_only_causal(self) -> bool:
        """True if the mask is torch's own causal mask."""
        others = self.mask is not None or self.slopes is not None or self.window != (None, None)
        return self.is_causal and self._is_square and not others

    @property
    def has_mask(self) -> bool:
        """True if a mask or a bias is added to the scores, other than torch's causal mask."""
        if self.is_only_causal:
            return False
        closes = self.is_causal and not (self.q_len == 1 and self.aligns_ends)
        left, right = self.window
        # A single query at the last place has no keys after it.
        opens = left is None and (right is None or (self.q_len == 1 and self.aligns_ends))
        return closes or not opens or any(one is not None for one in (self.mask, self.slopes, self.kv_used))

    @property
    def is_softmax_of_masked(self) -> bool:
        """True if ``scaled_dot_product_attention`` with a mask computes it: no changed scores, no sinks."""
        return not self.softcap and self.sinks is None and self.change is None

    def as_sdpa(self, mask: torch.Tensor | None) -> SdpaCall:
        """The same call for torch; ``mask`` is all that ``mask_rows`` returns, real or deferred."""
        return SdpaCall(
            self.query,
            self.key,
            self.value,
            mask,
            self.dropout_p,
            self.is_only_causal,
            self.scale,
            self.group > 1,
        )

    def mask_rows(self, low: int, high: int) -> torch.Tensor:
        """Rows ``low:high`` of mask and bias together.

        Returns:
            ``[batch or 1, heads or 1, high - low, kv_len]``: bool (``True``: may attend), or added to the scores, in
            float32 or better.
        """
        device = self.query.device
        key = torch.arange(self.kv_len, device=device)
        end: Any = self.kv_len if self.kv_used is None else self.kv_used.to(device).long().view(-1, 1, 1, 1)
        place = torch.arange(low, high, device=device).view(1, 1, -1, 1)
        place = place + (end - self.q_len if self.aligns_ends else 0)
        is_open = key < end if self.kv_used is not None else torch.ones_like(key, dtype=torch.bool)
        is_open = is_open.expand(*place.shape[:-1], -1)
        left, right = self.window
        if self.is_causal:
            is_open = is_open & (key <= place)
        if left is not None:
            is_open = is_open & (key >= place - left)
        if right is not None:
            is_open = is_open & (key <= place + right)
        bias = None
        if self.slopes is not None:
            slopes = self.slopes.to(device, self.dtype)
            slopes = slopes.view(*(slopes.shape if slopes.dim() > 1 else (1, -1)), 1, 1)
            bias = -slopes * (place - key).abs()
        given = self._given_rows(low, high)
        if given is not None and given.dtype == torch.bool:
            is_open = is_open & given
        elif given is not None:
            bias = given.to(self.dtype) if bias is None else bias + given
        return is_open if bias is None else torch.where(is_open, bias, -math.inf)

    def _given_rows(self, low: int, high: int) -> torch.Tensor | None:
        mask = self.mask
        if not isinstance(mask, torch.Tensor):
            return None if mask is None else mask(low, high)
        mask = mask[(None,) * (4 - mask.dim())]
        return mask if mask.shape[-2] == 1 else mask[..., low:high, :]
