"""In what multiples keys can be left out of a product without changing the order in which the others are summed."""

from __future__ import annotations

import functools

import torch

# The blocks in which matrix libraries sum over keys, as measured on processors of two makers (float32): 512 on most, 384
# on Intel's since Sapphire Rapids. With other multiples the last bits of some rows differ.
_UNITS = (512, 384, 1536)
LEAST = min(_UNITS)


def numbers(like: torch.Tensor) -> torch.Tensor:
    """Random numbers on the CPU, laid out in memory as a tensor; no random state of the user's changes."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    found = torch.empty(length, dtype=like.dtype, device="cpu")
    found.uniform_(generator=torch.Generator("cpu").manual_seed(0))
    return found.as_strided(like.shape, like.stride())


def unit_of(device: torch.device) -> int:
    """Keys are left out in multiples of this number."""
    return _unit_here() if device.type == "cpu" else _UNITS[0]


@functools.cache
def _unit_here(keys: int = 4096) -> int:
    """The first unit with which nearly all products of this processor have the same bits; else that with which most have."""
    weights, values = (numbers(torch.empty(1, *shape, device="meta")) for shape in ((32, keys), (keys, 32)))

    def is_same(stop: int) -> bool:
        whole = weights.clone()
        whole[..., stop:] = 0
        return torch.equal(whole[..., :stop].contiguous() @ values[:, :stop], whole @ values)

    def fits(unit: int) -> float:
        same = [is_same(stop) for stop in range(unit, keys, unit)]
        # The last stops before the end may fail: libraries divide what is left there in another way.
        return min(0.8, sum(same) / len(same))

    # The first call may lie in a user's autocast, where narrow results would hide a difference.
    with torch.autocast("cpu", enabled=False):
        return max(_UNITS, key=fits)
