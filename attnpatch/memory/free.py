"""How many bytes this process can still take on a device, and in a single allocation."""

from __future__ import annotations

import functools
import os
import warnings

import torch

from attnpatch.errors import AttnpatchWarning
from attnpatch.memory import devices
from attnpatch.memory.host import free_on_host
from attnpatch.policy import FREE_MEMORY as OVERRIDE
from attnpatch.sizes import parse_size

# Tensors on "meta" have no memory: what will be there is not known yet.
_OF_THE_HOST = ("cpu", "meta")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that this process can still take on ``device``.

    An accelerator is asked by its own functions (``memory.devices``), the CPU within the limits of control groups and of
    SLURM (``memory.host``). A device that does not tell counts as if it shared the host's memory, with one warning. The
    environment variable ``ATTNPATCH_FREE_MEMORY`` (a size such as ``1.9GB``) overrides all of them.

    Raises:
        PolicyError: The environment variable is not a size.
        RuntimeError: The device does not answer.
    """
    override = os.environ.get(OVERRIDE)
    if override:
        return parse_size(override, OVERRIDE)
    device = torch.device(device)
    if device.type in _OF_THE_HOST:
        return free_on_host()
    found = devices.memory_of(device)
    if found is not None:
        return found[0]
    _say_unknown(device.type)
    return free_on_host()


@functools.cache
def _say_unknown(kind: str) -> None:
    warnings.warn(
        f"torch does not tell how much memory of {kind!r} is free; the host's is taken instead. Set {OVERRIDE}=, or "
        "min_free= and max_allocation= of the policy",
        AttnpatchWarning,
        stacklevel=3,
    )


@functools.cache
def allocation_limit(device: torch.device) -> int | None:
    """The most bytes that one tensor may have on a device, as far as torch tells; ``None``: any that fit."""
    return None if device.type in _OF_THE_HOST else devices.allocation_limit(device)


# A call is large if this many like it would not fit.
_LARGE = 8


class FreeMemoryCache:
    """Free memory during one call of a model: measured once per device, not in every layer.

    Meanwhile a cache of keys grows. So memory is measured again for a call that takes a large part of it.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, int] = {}
        self._short: set[torch.device] = set()

    def free(self, device: torch.device, need: int = 0) -> int:
        """Free bytes on ``device``, for a call that natively takes ``need``."""
        if device not in self._free or _LARGE * need > self._free[device]:
            self._free[device] = free_bytes(device)
        return self._free[device]

    def limit(self, device: torch.device) -> int | None:
        """The most bytes of one tensor on ``device``; ``None``: any that fit."""
        return allocation_limit(device)

    def ran_out(self, device: torch.device) -> None:
        """Note that a native call ran out of memory: the measured figure is dropped."""
        self._short.add(device)
        self._free.pop(device, None)

    def is_short(self, device: torch.device) -> bool:
        """Whether a native call has run out of memory on ``device``, so that later layers need not try natively."""
        return device in self._short
