"""Saves and restores the state of torch's random generators, so that a step that runs twice draws the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

RandomState = tuple[torch.device, torch.Tensor]


def random_state(device: torch.device) -> RandomState:
    """The state of a device's default generator."""
    if device.type == "cpu":
        return device, torch.get_rng_state()
    return device, torch.get_device_module(device).get_rng_state(device)


def set_random_state(state: RandomState | None) -> None:
    """Put a state back; ``None``: leave the generator alone."""
    if state is None:
        return
    device, random = state
    if device.type == "cpu":
        torch.set_rng_state(random)
    else:
        torch.get_device_module(device).set_rng_state(random, device)


@contextlib.contextmanager
def restored(state: RandomState | None) -> Iterator[None]:
    """Inside the block the generator has ``state``; afterwards it has its present state again."""
    if state is None:
        yield
        return
    device = state[0]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        set_random_state(state)
        yield
