"""Finds which keys a mask leaves open, and so which tokens are padding, from the masks that attention itself gets."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# A key is closed if its bias is this far below the highest of its row. Hosts use -1000, -10000, -1e9 or a dtype's
# lowest number, and some divide it by the root of the head width. A bias by distance (ALiBi) may be as low, but then a
# whole row is, so only the difference within a row counts.
_CLOSED = -500.0
# A row that is at or below this everywhere sees no key.
_LOWEST = -9000.0
# Elements that are examined at a time.
_STEP = 1 << 22

# ``rows(sequence, low, high)``: rows of a sequence's mask, ``[rows, kv_len]``, bool (True: open) or additive.
Rows = Callable[[int, int, int], torch.Tensor]


def open_keys(rows: Rows, batch: int, q_len: int, kv_len: int, own: int | None) -> torch.Tensor:
    """Bool ``[batch, kv_len]``: the keys that are seen by some query that is not padding itself.

    The row of a padding query sees no key, or the host lets it see all keys so that softmax gives no NaN. Such rows are
    ignored, unless all rows are like this, or other rows see the row's own key: then it is no padding.

    Args:
        rows: Returns rows ``low:high`` of a sequence's mask.
        batch, q_len, kv_len: Sizes.
        own: Index among the keys of the first query's own key; ``None``: the keys belong to another sequence.
    """
    found = torch.zeros(batch, kv_len, dtype=torch.bool)
    step = max(1, _STEP // kv_len)
    for sequence in range(batch):
        told = opens = False
        hides_itself = 0
        sees_all = torch.zeros(q_len, dtype=torch.bool)
        for low in range(0, q_len, step):
            high = min(low + step, q_len)
            is_open = open_of(rows(sequence, low, high)).expand(high - low, kv_len)
            says = is_open.any(-1)
            opens |= bool(says.any())
            if own is not None:
                # The last row of a causal mask rightly sees all keys.
                is_last = torch.arange(own + low, own + high, device=is_open.device) >= kv_len - 1
                sees_all[low:high] = is_open.all(-1)
                says &= ~is_open.all(-1) | is_last
                places = torch.arange(low, high, device=is_open.device)
                hides_itself += int((says & ~is_open[places - low, own + places]).sum())
            if bool(says.any()):
                told = True
                some = is_open if bool(says.all()) else is_open[says]
                found[sequence] |= some.any(0).cpu()
        if own is not None and hides_itself > q_len // 2:
            # Most tokens do not see themselves, so the mask does not tell which tokens are padding.
            return torch.zeros(0, dtype=torch.bool)
        if not told:
            # All rows were ignored: either all keys are open, or all are padding.
            found[sequence] = opens
        elif own is not None and bool((sees_all & found[sequence, own : own + q_len]).any()):
            found[sequence] = True
    return found


def open_of(values: torch.Tensor) -> torch.Tensor:
    """Bool ``[rows, keys]`` like ``values``: True where a bool mask is True or an additive one does not close."""
    if values.dtype == torch.bool:
        return values
    highest = values.amax(-1, keepdim=True)
    found = values > highest + _CLOSED
    return found & ~(found.all(-1, keepdim=True) & (highest <= _LOWEST))


def causal_keys(batch: int, q_len: int, kv_len: int) -> torch.Tensor:
    """The open keys of a causal call, bool ``[batch, kv_len]``; its first query sees the first key only."""
    return (torch.arange(kv_len) < q_len).expand(batch, kv_len)


# For each mask tensor, which a model passes to all its layers: its version, and the results found for it.
_of_masks: Any = WeakIdKeyDictionary()


def once_for(mask: torch.Tensor, key: Hashable, find: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of ``find`` for a mask, computed once for all layers that get the same mask.

    Args:
        mask: The mask. Inference tensors have no version counter, so for them ``find`` runs each time.
        key: Everything else that the result depends on.
        find: Examines the mask.
    """
    if type(mask) is not torch.Tensor or mask.is_inference():
        return find()
    version, found = _of_masks.get(mask, (None, {}))
    if version != mask._version:
        found = {}
        _of_masks[mask] = mask._version, found
    if key not in found:
        found[key] = find()
    return found[key]
