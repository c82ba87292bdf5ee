"""Which keys a mask leaves open: what padding is, from what attention itself is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# A bias this far below the highest of its row closes a key: hosts write -1000, -10000, -1e9 or the lowest number of a
# dtype, and some divide it by the root of a head's width with the scores. A bias by distance (ALiBi) may be as low in a
# whole row, or in all that a row looks at.
_CLOSED = -500.0
# A row that is as low everywhere looks at nothing.
_LOWEST = -9000.0
# Elements that are looked at together.
_STEP = 1 << 22

# What makes rows of a mask or a bias of one sequence: ``[rows, kv_len]``, boolean (open) or added to the scores.
Rows = Callable[[int, int, int], torch.Tensor]


def open_keys(rows: Rows, batch: int, q_len: int, kv_len: int, own: int | None) -> torch.Tensor:
    """Bool ``[batch, kv_len]``: the keys that some query looks at which is no padding itself.

    A row of padding is closed to every key, or its host has opened it to all of them, so that softmax gives numbers: such
    rows say nothing, unless all are open.

    Args:
        rows: Gives rows ``low:high`` of the mask of a sequence.
        batch, q_len, kv_len: Sizes.
        own: The place of the first query among the keys; ``None``: the keys are others' tokens.
    """
    found = torch.zeros(batch, kv_len, dtype=torch.bool)
    step = max(1, _STEP // kv_len)
    for sequence in range(batch):
        told = opens = False
        hides_itself = 0
        for low in range(0, q_len, step):
            high = min(low + step, q_len)
            is_open = open_of(rows(sequence, low, high)).expand(high - low, kv_len)
            says = is_open.any(-1)
            opens |= bool(says.any())
            if own is not None:
                # The last row of a causal mask is open to all by right.
                is_last = torch.arange(own + low, own + high, device=is_open.device) >= kv_len - 1
                says &= ~is_open.all(-1) | is_last
                places = torch.arange(low, high, device=is_open.device)
                hides_itself += int((says & ~is_open[places - low, own + places]).sum())
            if bool(says.any()):
                told = True
                some = is_open if bool(says.all()) else is_open[says]
                found[sequence] |= some.any(0).cpu()
        if own is not None and hides_itself > q_len // 2:
            # Tokens that do not look at themselves: who looks at a token says nothing of padding.
            return torch.zeros(0, dtype=torch.bool)
        if not told:
            # All rows alike: open to all keys, or nothing but padding.
            found[sequence] = opens
    return found


def open_of(values: torch.Tensor) -> torch.Tensor:
    """Bool like ``values``, ``[rows, keys]``: what is true, or added and no number that closes."""
    if values.dtype == torch.bool:
        return values
    highest = values.amax(-1, keepdim=True)
    found = values > highest + _CLOSED
    return found & ~(found.all(-1, keepdim=True) & (highest <= _LOWEST))


def causal_keys(batch: int, q_len: int, kv_len: int) -> torch.Tensor:
    """The same of a causal call, whose first query looks at the first key."""
    return (torch.arange(kv_len) < q_len).expand(batch, kv_len)


# Of masks that are there as tensors, which a model hands to all of its layers: their version, and what was found.
_of_masks: Any = WeakIdKeyDictionary()


def once_for(mask: torch.Tensor, key: Hashable, find: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``find`` finds of a mask, once for all layers that are given it.

    Args:
        mask: The mask; one of which no versions are counted (``inference_mode``) is looked at each time.
        key: What else it depends on.
        find: Looks at the mask.
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
