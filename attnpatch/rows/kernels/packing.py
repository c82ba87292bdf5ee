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
from attnpatch.rows.kernels.found_by_values import are_tokens, name_keys, padded_of
from attnpatch.rows.provenance.sources import Sources


@dataclasses.dataclass(frozen=True)
class Packing:
    """The calls that one call consists of.

    Attributes:
        calls: Not packed: one for each sequence, or a single one with all of them as its batch.
        sizes: Number of query rows of each sequence.
        total: Number of query rows; more than all of the sequences have if the last rows belong to none.
        rows: If all sequences are the batch of one call: the place of each packed query row among all of its rows.
    """

    calls: list[KernelCall]
    sizes: tuple[int, ...]
    total: int
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, call: KernelCall, site: AttentionCall | None) -> Packing:
        if call.lengths is None:
            if site is not None:
                _name_tokens([call], site)
            return cls([call], (call.q_len,), call.q_len)
        whole = _as_batch(call, site)
        if whole is not None:
            if site is not None:
                _name_tokens([whole[0]], site)
            return cls([whole[0]], call.lengths[0], call.q_len, whole[1])
        calls = _pieces(call)
        if site is not None:
            _name_tokens(calls, site)
        return cls(calls, call.lengths[0], call.q_len)

    def cut(self, result: torch.Tensor) -> list[torch.Tensor]:
        """The rows ``[batch, heads, q_len, width]`` of each call, of a result of the whole call."""
        if self.rows is not None:
            query = self.calls[0].query
            return [_spread(result, self.rows, query.shape[0], query.shape[2])]
        return list(result[:, :, : sum(self.sizes)].split(self.sizes, 2))

    def joined(self, results: Sequence[torch.Tensor], closed: float) -> torch.Tensor:
        """The result ``[batch, heads, q_len, ...]`` of the whole call; rows of no sequence are ``closed``."""
        if self.rows is not None:
            flat = results[0].transpose(0, 1).flatten(1, 2)
            found = (flat if len(self.rows) == flat.shape[1] else flat[:, self.rows]).unsqueeze(0)
        else:
            found = results[0] if len(results) == 1 else torch.cat(list(results), 2)
        missing = self.total - found.shape[2]
        return F.pad(found, (0, 0) * (found.dim() - 3) + (0, missing), value=closed) if missing else found


def _name_tokens(calls: list[KernelCall], site: AttentionCall) -> None:
    """Note which tokens queries and keys are, where functions do not tell."""
    sources, low = site.sources, 0
    if sources is None:
        return
    for one in calls:
        sources.name_single(one.query, 2)
        sources.name_single(one.key, 2)
        name_keys(sources, one.key, one.q_len, low)
        low += one.q_len


def _as_batch(call: KernelCall, site: AttentionCall | None) -> tuple[KernelCall, torch.Tensor] | None:
    """All packed sequences as the batch of one call, and the place of each packed query row in it.

    ``None`` if they are known to be parts of one sequence, or if their lengths differ and it is not known which padding
    was removed.
    """
    assert call.lengths is not None
    q_lengths, kv_lengths = call.lengths
    if site is not None and site.sources is not None:
        sources, dims = site.sources, site.sources.of(call.query)
        is_known = dims is not None and are_tokens(sources, dims[2])
        if dims is not None and is_known and len(leaves(dims[2])) == 1:
            return None
        found = _with_padding(call, sources)
        if found is not None:
            return found
    if len({*q_lengths}) != 1 or len({*kv_lengths}) != 1 or len(q_lengths) == 1:
        return None
    if not q_lengths[0] or not kv_lengths[0]:
        return None
    starts = call.key_starts or tuple(itertools.accumulate((0, *kv_lengths[:-1])))
    rows = _places(_even(len(q_lengths), q_lengths[0]), q_lengths, call.query)
    keys = _places(starts, kv_lengths, call.query)
    is_even = starts == _even(len(starts), kv_lengths[0])

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor[:, :, : len(keys)] if is_even else tensor[:, :, keys]
        return _batched(tensor, len(starts))

    query = _batched(call.query[:, :, : len(rows)], len(q_lengths))
    return _unpacked(call, query, taken(call.key), taken(call.value)), rows


def _with_padding(call: KernelCall, sources: Sources) -> tuple[KernelCall, torch.Tensor] | None:
    """As ``_as_batch``, with the padding that was removed; its rows are closed."""
    assert call.lengths is not None
    if call.key_starts is not None:
        return None
    q_lengths, kv_lengths = call.lengths
    queries, keys = padded_of(sources, call.query, q_lengths), padded_of(sources, call.key, kv_lengths)
    if queries is None or keys is None:
        return None
    is_alike = (queries.starts, queries.tokens, q_lengths) == (keys.starts, keys.tokens, kv_lengths)
    if not is_alike and (call.is_causal or call.slopes is not None or call.window != (None, None)):
        return None
    count = len(q_lengths)
    of_queries, of_keys = _even(count, queries.tokens), _even(count, keys.tokens)
    rows = _places([a + b for a, b in zip(of_queries, queries.starts, strict=True)], q_lengths, call.query)
    places = _places([a + b for a, b in zip(of_keys, keys.starts, strict=True)], kv_lengths, call.query)
    query = _spread(call.query, rows, count, queries.tokens)
    key, value = (_spread(one, places, count, keys.tokens) for one in (call.key, call.value))
    sources.give(query, queries.dims)
    sources.give(key, keys.dims)
    real = [
        torch.zeros(count * size, dtype=torch.bool, device=rows.device).index_fill_(0, one, True)
        for one, size in ((rows, queries.tokens), (places, keys.tokens))
    ]
    mask = _Real(*(one.view(count, -1) for one in real))
    return dataclasses.replace(_unpacked(call, query, key, value), mask=mask.rows), rows


class _Real:
    """A mask that opens tokens that are no padding, and closes the rows of padding.

    Args:
        queries, keys: Bool ``[batch, tokens]``.
    """

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        self.queries, self.keys = queries, keys

    def rows(self, low: int, high: int) -> torch.Tensor:
        return self.keys[:, None, None, :] & self.queries[:, None, low:high, None]


def _even(count: int, size: int) -> tuple[int, ...]:
    return tuple(number * size for number in range(count))


def _places(starts: Sequence[int], lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """int64, the places ``start, start + 1, ...`` of each sequence, one after the other, on the device of ``like``."""
    found = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return torch.cat(found).to(like.device)


def _batched(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """``[1, heads, total, ...]`` as ``[count, heads, length, ...]``, a view."""
    return tensor.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1)


def _spread(packed: torch.Tensor, places: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Packed rows ``[1, heads, total, ...]`` at their places among ``[count, heads, length, ...]``, zeros elsewhere."""
    packed = packed[:, :, : len(places)]
    if len(places) != count * length:
        whole = packed.new_zeros(*packed.shape[:2], count * length, *packed.shape[3:])
        packed = whole.index_copy(2, places, packed)
    return _batched(packed, count)


def _unpacked(call: KernelCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> KernelCall:
    return dataclasses.replace(call, query=query, key=key, value=value, lengths=None, key_starts=None)


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
