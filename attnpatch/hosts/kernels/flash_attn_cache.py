"""flash-attn 2 with a cache: what the arguments of ``flash_attn_with_kvcache`` mean.

The kernel writes the new keys and values into the cache, and attends to all keys that are then in use.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.hosts.kernels.reading import call_in_batches, only, pages, pair, reads, refuse, window_of
from attnpatch.rows.kernels.call import KernelCall


@reads(
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False"
)
def flash_attn_with_kvcache(given: Any) -> KernelCall:
    return call_of(given, given.block_table, given.alibi_slopes)


def call_of(given: Any, table: torch.Tensor | None, slopes: torch.Tensor | None) -> KernelCall:
    """The call of version 2 or 3, which name the table of pages in different ways."""
    refuse("flash_attn_with_kvcache", given, "rotary_cos rotary_sin")
    cache = _Cache(
        given.k_cache, given.v_cache, given.cache_seqlens, given.cache_batch_idx, table, len(given.q)
    )
    k, v = given.k, given.v
    key, value, used = cache.read(k, v)
    return call_in_batches(
        (given.q, key, value),
        pair if given.return_softmax_lse else only,
        scale=given.softmax_scale,
        is_causal=given.causal,
        window=window_of(given.window_size),
        softcap=max(given.softcap or 0.0, 0.0),
        slopes=slopes,
        mask=_after(given.cache_leftpad, key.shape[1]),
        kv_used=used,
        needs_lse=given.return_softmax_lse,
        writes=None if k is None or v is None else lambda: cache.write(k, v),
    )


class _Cache:
    """The memory of keys and values, and how much of it each sequence uses.

    Args:
        keys, values: ``[batch, slots, heads, width]``, or ``[pages, page_size, heads, width]`` with a table.
        lengths: How many keys were in use before the call: of all sequences, of each one, or ``None``: all of them.
        rows: int ``[batch]``, which rows of the memory the sequences use; ``None``: the first ones.
        table: int ``[batch, pages]``, or ``None``.
        batch: Number of sequences.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: int | torch.Tensor | None,
        rows: torch.Tensor | None,
        table: torch.Tensor | None,
        batch: int,
    ) -> None:
        self.keys, self.values, self.rows, self.table, self.batch = keys, values, rows, table, batch
        self.slots = keys.shape[1] if table is None else keys.shape[1] * table.shape[1]
        said = self.slots if lengths is None else lengths
        self.past = (
            [int(one) for one in said.tolist()] if isinstance(said, torch.Tensor) else [int(said)] * batch
        )

    def read(
        self, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values ``[batch, used, heads, width]`` after new ones were written, and how many each sequence uses."""
        new = 0 if k is None else k.shape[1]
        most = max(self.past, default=0) + new
        is_even = len(set(self.past)) <= 1
        used = None if is_even else torch.tensor(self.past) + new
        key, value = self._of_each(self.keys, k, most, is_even), self._of_each(self.values, v, most, is_even)
        return key, value, used

    def _of_each(
        self, memory: torch.Tensor, new: torch.Tensor | None, most: int, is_even: bool
    ) -> torch.Tensor:
        if self.table is not None:
            memory = pages(memory, self.table)
        elif self.rows is not None:
            memory = memory[self.rows.long()]
        else:
            memory = memory[: self.batch]
        if new is None:
            return memory[:, :most]
        if is_even:
            past = most - new.shape[1]
            return torch.cat([memory[:, :past], new], 1) if past else new
        written = memory[:, :most].clone()
        for row, past in enumerate(self.past):
            written[row, past : past + new.shape[1]] = new[row]
        return written

    @torch.no_grad()
    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write new keys and values into the memory, as the kernel does."""
        for row, past in enumerate(self.past):
            if self.table is None:
                at = row if self.rows is None else int(self.rows[row])
                self.keys[at, past : past + k.shape[1]] = k[row]
                self.values[at, past : past + v.shape[1]] = v[row]
                continue
            size = self.keys.shape[1]
            places = torch.arange(past, past + k.shape[1], device=self.table.device)
            page, slot = self.table[row].long()[places // size], places % size
            self.keys[page, slot] = k[row]
            self.values[page, slot] = v[row]


def _after(leftpad: torch.Tensor | None, kv_len: int) -> torch.Tensor | None:
    """The mask that hides the first keys of each sequence."""
    if leftpad is None:
        return None
    return (torch.arange(kv_len, device=leftpad.device) >= leftpad.view(-1, 1))[:, None, None]
