"""Packed sequences: a call on several sequences in one, taken apart, and its results put together again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.graph.axes import leaves
from attnpatch.rows.kernels.call import KernelCall


@dataclasses.dataclass(frozen=True)
class Packing:
    """The calls that one call consists of.

    Attributes:
        calls: Not packed: one for each sequence, or a single one with all of them as its batch.
        sizes: Number of query rows of each sequence.
        total: Number of query rows; more than all of the sequences have if the last rows belong to none.
        is_batch: True if all sequences are the batch of one call.
    """

    calls: list[KernelCall]
    sizes: tuple[int, ...]
    total: int
    is_batch: bool

    @classmethod
    def of(cls, call: KernelCall, site: AttentionCall | None) -> Packing:
        if call.lengths is None:
            return cls([call], (call.q_len,), call.q_len, False)
        is_batch = _is_batch(call, site)
        calls = [_as_batch(call)] if is_batch else _pieces(call)
        if site is not None and site.sources is not None and not is_batch:
            for one in calls:
                site.sources.name_single(one.query, 2)
                site.sources.name_single(one.key, 2)
        return cls(calls, call.lengths[0], call.q_len, is_batch)

    def cut(self, result: torch.Tensor) -> list[torch.Tensor]:
        """The rows ``[batch, heads, q_len, width]`` of each call, of a result of the whole call."""
        if self.is_batch:
            return [_batched(result, self.sizes)]
        return list(result[:, :, : sum(self.sizes)].split(self.sizes, 2))

    def joined(self, results: Sequence[torch.Tensor], closed: float) -> torch.Tensor:
        """The result ``[batch, heads, q_len, ...]`` of the whole call; rows of no sequence are ``closed``."""
        if self.is_batch:
            found = results[0].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        else:
            found = results[0] if len(results) == 1 else torch.cat(list(results), 2)
        missing = self.total - found.shape[2]
        return F.pad(found, (0, 0) * (found.dim() - 3) + (0, missing), value=closed) if missing else found


def _is_batch(call: KernelCall, site: AttentionCall | None) -> bool:
    """True if all packed sequences have the same lengths, and are not known to be parts of one sequence."""
    assert call.lengths is not None
    q_lengths, kv_lengths = call.lengths
    if len(q_lengths) < 2 or len({*q_lengths}) > 1 or len({*kv_lengths}) > 1 or not kv_lengths[0]:
        return False
    if call.q_len != sum(q_lengths):
        return False
    starts = call.key_starts or (0, kv_lengths[0])
    if len({after - before for before, after in itertools.pairwise(starts)}) > 1:
        return False
    if site is None or site.sources is None:
        return True
    dims = site.sources.of(call.query)
    return dims is None or len(leaves(dims[2])) > 1


def _as_batch(call: KernelCall) -> KernelCall:
    assert call.lengths is not None
    q_lengths, kv_lengths = call.lengths
    count, kv_len = len(q_lengths), kv_lengths[0]
    starts = call.key_starts or (0, kv_len)
    step = starts[1] - starts[0]

    def keys(tensor: torch.Tensor) -> torch.Tensor:
        # The last sequence may have less memory than the others.
        tensor = tensor[:, :, starts[0] :]
        if step == kv_len:
            return _batched(tensor[:, :, : count * step], kv_lengths)
        places = torch.arange(count, device=tensor.device)[:, None] * step + torch.arange(
            kv_len, device=tensor.device
        )
        return tensor[0][:, places].transpose(0, 1)

    return dataclasses.replace(
        call,
        query=_batched(call.query, q_lengths),
        key=keys(call.key),
        value=keys(call.value),
        lengths=None,
        key_starts=None,
    )


def _batched(tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """``[1, heads, total, ...]`` as ``[sequences, heads, length, ...]``."""
    return tensor.squeeze(0).unflatten(1, (len(sizes), sizes[0])).transpose(0, 1)


def _pieces(call: KernelCall) -> list[KernelCall]:
    """The packed sequences, as calls on views."""
    assert call.lengths is not None
    found = []
    q_lengths, kv_lengths = call.lengths
    starts = call.key_starts or (0, *itertools.accumulate(kv_lengths))
    q_low = 0
    for number, (q_len, kv_len, kv_low) in enumerate(zip(q_lengths, kv_lengths, starts, strict=False)):
        own = slice(q_low, q_low + q_len)
        keys = slice(kv_low, kv_low + kv_len)
        slopes = call.slopes
        found.append(
            dataclasses.replace(
                call,
                query=call.query[:, :, own],
                key=call.key[:, :, keys],
                value=call.value[:, :, keys],
                slopes=slopes[number] if slopes is not None and slopes.dim() > 1 else slopes,
                lengths=None,
                key_starts=None,
            )
        )
        q_low += q_len
    return found
