"""Recomputes the probabilities of a fused SDPA call, which its kernel does not return, a few rows at a time.

A fused kernel can return each row's logsumexp. With it a probability is ``exp(q k - lse)``, one product and one
exponential, and each row is read once. FlashAttention's backward pass does the same (Dao et al. 2022).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import numpy
import torch

from attnpatch import compat
from attnpatch.observing import Observer, TileInfo
from attnpatch.oom import Attempts, until_it_fits
from attnpatch.rows.deferred.tensor import DeferredTensor
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.tile_plan import LIVE_COPIES
from attnpatch.rows.graph.axes import Tile, leaves
from attnpatch.rows.precision import in_full
from attnpatch.sdpa_call import SdpaCall

# Bytes of scores held at once: on CPU as much as fits into the cache beside a head's keys.
CPU_SHOW_BYTES = 2 * 2**20  # per thread
DEVICE_SHOW_BYTES = 64 * 2**20
# exp2 is three times as fast as exp (measured, float32 on CPU).
LOG2_E = 1.0 / math.log(2.0)


@torch.no_grad()
def show(
    call: SdpaCall,
    observer: Observer,
    lse: torch.Tensor | None = None,
    on_retry: Callable[[], None] | None = None,
    grad: torch.Tensor | None = None,
    workspace: int | None = None,
) -> None:
    """Show an observer the probabilities of an SDPA call, in float32 or better.

    Args:
        call: The call.
        observer: Called once per tile.
        lse: ``[batch, heads, q_len]``, the logsumexp of each row if it is known.
        on_retry: Called when a tile does not fit into memory; then all tiles are shown again, at half the size.
            ``None``: the error is raised. It is also raised if a single row does not fit.
        grad: ``[..., heads, q_len, value_dim]``, the gradient of the call's result. Each probability is multiplied by
            its own gradient, which is the product of a row of ``grad`` and a value (Q K' = S, P = softmax S, O = P V).
        workspace: The most bytes that a tile may take; ``None``: the fastest size.
    """
    kv_len, on_cpu = call.kv_len, call.device.type == "cpu"
    elements = (CPU_SHOW_BYTES * min(16, torch.get_num_threads()) if on_cpu else DEVICE_SHOW_BYTES) // 4
    elements = max(elements, 16 * kv_len * call.group)
    if workspace is not None:
        elements = min(elements, workspace // (LIVE_COPIES * 4))

    def shown() -> None:
        # This is hidden from modes that watch the host's functions, because they would follow every tile.
        with compat.DisableTorchFunction():
            _show(call, observer, lse, elements, grad)

    def begin_smaller() -> bool:
        nonlocal elements
        if elements < kv_len:
            return False
        elements = min(elements, call.q_len * kv_len) // 2
        on_retry()
        observer.restart()
        return True

    if on_retry is None:
        shown()
        return
    until_it_fits(shown, begin_smaller, lambda: f"tiles of {elements} scores", Attempts())


def _show(
    call: SdpaCall,
    observer: Observer,
    lse: torch.Tensor | None,
    elements: int,
    grad: torch.Tensor | None,
) -> None:
    """Show tiles of about ``elements`` scores each."""
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    lead = call.lead
    if query.dim() == 2:
        query, key, value, lead = query[None], key[None], value[None], torch.Size((1, *lead))
        grad = None if grad is None else grad[None]
    q_len, kv_len, group = call.q_len, call.kv_len, call.group
    outer = (*lead[:-1], lead[-1] // group)
    query = query.expand(*lead, *query.shape[-2:]).unflatten(-3, (outer[-1], group))
    key = key.expand(*outer, *key.shape[-2:])
    masks = _Masks(mask, lead, q_len, kv_len, group)
    lse = None if lse is None else lse.unflatten(-2, (outer[-1], group))
    if grad is not None:
        value = value.expand(*outer, *value.shape[-2:])
        grad = grad.unflatten(-3, (outer[-1], group))
    rows = observer.rows(math.prod(lead), q_len, kv_len)
    if rows is not None:
        at_rows = rows.to(query.device)
        query = query[..., at_rows, :]
        lse = None if lse is None else lse.index_select(-1, at_rows)
    count = q_len if rows is None else len(rows)
    if not count:
        return
    # With few rows (one per generated token), a tile has several key heads.
    together = max(1, min(outer[-1], elements // (group * count * kv_len)))
    places_of_batch = enumerate(itertools.product(*map(range, outer[:-1])))
    # These products, and the observer's sums, are attnpatch's own: full precision, no autocast. Not so the graph of a
    # mask, which is the host's.
    is_own, nothing = masks.graph is None, contextlib.nullcontext()
    with _exactly(query) if is_own else nothing:
        for (number, at), first_head in itertools.product(places_of_batch, range(0, outer[-1], together)):
            heads = slice(first_head, min(first_head + together, outer[-1]))
            begin = number * outer[-1]
            leads = torch.arange((begin + heads.start) * group, (begin + heads.stop) * group)
            known = None if lse is None else lse[at][heads]
            own = _Heads(query[at][heads], key[at][heads], known, call.scale, call.adds_mask)
            for low, high, places in _spans(call, rows, elements // (group * together)):
                tile_mask = (
                    masks.rows(at, heads, low, high) if places is None else masks.picked(at, heads, places)
                )
                with nothing if is_own else _exactly(query):
                    powers, weights = own.powers(low, high, tile_mask, call.is_causal, places)
                    if grad is not None:
                        seen_values = value[at][heads, None, : powers.shape[-1]].to(powers.dtype)
                        powers.mul_(grad[at][heads, :, low:high].to(powers.dtype) @ seen_values.mT)
                    where_from = TileInfo(
                        leads, (low, high), math.prod(lead), q_len, kv_len, weights.flatten(0, 1), places
                    )
                    observer.observe(powers.flatten(0, 1), where_from)


@contextlib.contextmanager
def _exactly(tensor: torch.Tensor) -> Iterator[None]:
    """In the block, products on a tensor's device have full precision, and autocast is off."""
    with torch.autocast(tensor.device.type, enabled=False), in_full(tensor):
        yield


def _spans(
    call: SdpaCall, rows: torch.Tensor | None, elements: int
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Ranges ``low:high`` of the rows that are shown, each with the row numbers if only some rows are shown."""
    count, low = call.q_len if rows is None else len(rows), 0
    while low < count:
        # A causal tile sees only the keys up to its last row, so early tiles can have more rows.
        first = low if rows is None else int(rows[low])
        seen = min(call.kv_len, max(first, 256)) if call.is_causal else call.kv_len
        high = min(count, low + _tile_rows(elements, seen))
        yield low, high, None if rows is None else rows[low:high]
        low = high


def mask_rows(call: SdpaCall) -> Callable[[int, int, int], torch.Tensor]:
    """``rows(number, low, high)``, which returns rows of a call's mask; ``number`` is a flat index of batch and head."""
    lead, group = call.query.shape[:-2] or (1,), call.group
    outer = (*lead[:-1], lead[-1] // group)
    masks = _Masks(call.attn_mask, tuple(lead), call.q_len, call.kv_len, group)

    def rows(number: int, low: int, high: int) -> torch.Tensor:
        *at, head = numpy.unravel_index(number // group, outer)
        found = masks.rows(tuple(at), slice(head, head + 1), low, high)
        assert found is not None
        return found[0, number % group]

    return rows


class _Masks:
    """The rows of a call's mask, which may be real or deferred.

    Args:
        mask: The mask, which broadcasts to ``[*lead, q_len, kv_len]``, or ``None``.
        lead: Sizes of batch and heads.
        q_len, kv_len: Numbers of query rows and keys.
        group: Number of query heads per key head.
    """

    def __init__(
        self, mask: torch.Tensor | None, lead: tuple[int, ...], q_len: int, kv_len: int, group: int
    ) -> None:
        self.group = group
        self.graph = self.whole = None
        if isinstance(mask, DeferredTensor):
            dims = mask.handle.node.dims
            self.graph, self.run = mask.handle.node, Evaluator(mask.handle.node)
            self.dims = ((),) * (len(lead) + 2 - len(dims)) + dims
        elif mask is not None:
            self.whole = mask.expand(*lead, q_len, kv_len).unflatten(-3, (lead[-1] // group, group))

    def rows(self, at: tuple[int, ...], heads: slice, low: int, high: int) -> torch.Tensor | None:
        """Rows ``low:high`` for some key heads: ``[heads, group, rows, kv_len]``."""
        if self.graph is None:
            return None if self.whole is None else self.whole[at][heads, :, low:high]
        wanted = [
            *((i, i + 1) for i in at),
            (heads.start * self.group, heads.stop * self.group),
            (low, high),
        ]
        tile: Tile = {}
        for dim, span in zip(self.dims, wanted, strict=False):
            parts = leaves(dim)
            if len(parts) == 1 and parts[0] not in self.run.whole:
                tile[parts[0]] = span
        value = self.run.value(self.graph, tile)
        self.run.next_lead()
        value = value.reshape((1,) * (len(self.dims) - value.dim()) + value.shape)
        for position, span in enumerate(wanted):
            # A dimension that could not be cut was computed whole.
            if value.shape[position] not in (1, span[1] - span[0]):
                value = value.narrow(position, span[0], span[1] - span[0])
        count = heads.stop - heads.start
        value = value.reshape(value.shape[-3:]).expand(count * self.group, -1, -1)
        return value.unflatten(0, (count, self.group))

    def picked(self, at: tuple[int, ...], heads: slice, rows: torch.Tensor) -> torch.Tensor | None:
        """As ``rows``, for row numbers that need not be adjacent."""
        if self.whole is not None:
            return self.whole[at][heads].index_select(-2, rows.to(self.whole.device))
        if self.graph is None:
            return None
        found = [self.rows(at, heads, row, row + 1) for row in rows.tolist()]
        return torch.cat([row.expand(-1, -1, 1, -1) for row in found if row is not None], -2)


def _tile_rows(elements: int, kv_len: int) -> int:
    """Number of rows of a tile: a multiple of 16 if at least 16 fit."""
    rows = elements // kv_len
    return rows // 16 * 16 if rows >= 16 else max(1, rows)


class _Heads:
    """Some key heads and the query heads that share each of them.

    An additive mask may hide all keys of a row with one very low number (``finfo.min``, -1e30). The scores are then
    lost in rounding, so softmax makes the row uniform. The same happens here, because terms are added in the kernel's
    order and in its units (natural logarithms): first the mask is added, then the logsumexp or maximum is subtracted.
    Without an additive mask the product of query and key itself subtracts the logsumexp.

    Args:
        query: ``[heads, group, q_len, head_dim]``.
        key: ``[heads, kv_len, head_dim]``.
        lse: ``[heads, group, q_len]`` or ``None``.
        scale: The scale of the scores.
        is_added: True if there will be an additive mask.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, scale: float, is_added: bool
    ) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.is_added = is_added
        unit = 1.0 if is_added else LOG2_E
        self.query = query.to(dtype) * (scale * unit)
        self.key = key.to(dtype)
        self.lse = None
        if lse is not None:
            # A row that sees no key has no finite lse; it gets no probabilities.
            self.lse = torch.where(lse.isfinite(), lse, math.inf).to(dtype).unsqueeze(-1)
        if lse is not None and not is_added:
            # One more column makes the product subtract the lse, without a pass over the scores.
            self.query = torch.cat([self.query, self.lse * -LOG2_E], -1)
            self.key = torch.cat([self.key, self.key.new_ones(*key.shape[:-1], 1)], -1)

    def powers(
        self,
        low: int,
        high: int,
        mask: torch.Tensor | None,
        is_causal: bool,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unnormalised probabilities ``[heads, group, rows, keys]`` and their normalisers ``[heads, group, rows]``.

        A causal call leaves out the keys after its last row. ``places`` are the row numbers, if rows are not adjacent.
        """
        first, end = (low, high) if places is None else (int(places[0]), int(places[-1]) + 1)
        query, key = self.query[:, :, low:high], self.key[:, :end] if is_causal else self.key
        scores = (query.flatten(1, 2) @ key.mT).view(*query.shape[:3], -1)
        if mask is not None and self.is_added:
            scores.add_(mask[..., : scores.shape[-1]])
        elif mask is not None:
            scores.masked_fill_(mask[..., : scores.shape[-1]].logical_not(), -math.inf)
        if self.lse is None:
            if is_causal:
                corner = scores[..., first:]
                corner.masked_fill_(_later(corner[0, 0], places), -math.inf)
            highest = scores.amax(-1, keepdim=True)
            scores.sub_(torch.where(highest == -math.inf, 0.0, highest))
        elif self.is_added:
            scores.sub_(self.lse[:, :, low:high])
        scores.exp_() if self.is_added else scores.exp2_()
        if self.lse is not None and is_causal:
            corner = scores[..., first:]
            corner.tril_() if places is None else corner.masked_fill_(_later(corner[0, 0], places), 0.0)
        # If the lse is known, the total is close to 1, and the factor makes each row sum to 1 up to the last digit.
        total = scores.sum(-1)
        return scores, torch.where(total > 0, total.reciprocal(), 0.0)


def _later(corner: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Bool ``[rows, keys]``: True where a key comes after the row; ``corner`` begins at its first row's own key."""
    if places is None:
        return torch.ones_like(corner, dtype=torch.bool).triu_(1)
    keys = torch.arange(int(places[0]), int(places[0]) + corner.shape[-1])
    return (keys > places[:, None]).to(corner.device)
