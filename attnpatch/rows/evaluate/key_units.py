"""In what multiples keys can be left out of a product without changing the order in which the others are summed."""

from __future__ import annotations

import functools

import torch

# The blocks in which matrix libraries sum over keys, as measured on processors of two makers (float32): 512 on most, 384
# on Intel's since Sapphire Rapids. With other multiples the last bits of some rows differ.
_UNITS = (512, 384, 1536)
LEAST = min(_UNITS)


def numbers(like: torch.Tensor) -> torch.Tensor:
    """Random numbers, laid out in memory as a tensor; no random state of the user's changes."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    numbers = torch.empty(length, dtype=like.dtype).uniform_(generator=torch.Generator().manual_seed(0))
    return numbers.as_strided(like.shape, like.stride())


def unit_of(device: torch.device) -> int:
    """Keys are left out in multiples of this number."""
    return _unit_here() if device.type == "cpu" else _UNITS[0]


@functools.cache
def _unit_here(keys: int = 4096) -> int:
    """The first unit with which nearly all products of this processor have the same bits; else that with which most have."""
    weights, values = (numbers(torch.empty(1, *shape, device="meta")) for shape in ((32, keys), (keys, 32)))

    def fits(unit: int) -> float:
        stops = range(unit, keys, unit)
        same = [
            torch.equal(
                weights[..., :stop].contiguous() @ values[:, :stop],
                weights.clone().index_fill_(-1, torch.arange(stop, keys), 0) @ values,
            )
            for stop in stops
        ]
        # The last stops before the end may fail: libraries divide what is left there in another way.
        return min(0.8, sum(same) / len(same))

    return max(_UNITS, key=fits)
