"""Memory of an accelerator, asked of its own module: ``torch.cuda`` (ROCm too), ``torch.xpu``, ``torch.mps``, ``torch.npu``.

A module that lacks a function, or whose driver does not answer it, is replaced by ``torch.accelerator``.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from attnpatch import compat
from attnpatch.memory.host import free_on_host

# Intel GPUs without float64 (Arc A, integrated Xe) refuse a tensor of 4 GiB. Their drivers report 8 KiB less as the
# largest block, which torch does not pass on.
_INTEL_MOST = 2**32 - 2**13
# Metal's attention ends the process if a tensor inside it has more bytes (pytorch issue 149261).
_METAL_MOST = 2**32


def modules_of(device: torch.device) -> list[Any]:
    """The modules that may tell of a device: its own, then ``torch.accelerator`` if the device is the accelerator."""
    found = []
    try:
        found.append(torch.get_device_module(device))
    except RuntimeError:
        pass  # a device without a module of its own
    accelerator = compat.accelerator()
    if accelerator is not None and accelerator.type == device.type and hasattr(torch, "accelerator"):
        found.append(torch.accelerator)
    return found


def present() -> list[tuple[str, torch.device]]:
    """The accelerators of this machine, with their names."""
    kind = compat.accelerator()
    if kind is None:
        return []
    found = []
    for index in range(_called(modules_of(kind), "device_count") or 1):
        device = torch.device(kind.type, index)
        name = _called(modules_of(device), "get_device_name", device) or ""
        found.append((f"{device} {name}".strip(), device))
    return found


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Bytes that this process can still take on an accelerator, and the bytes that it has.

    Free is what the driver has free, within the share that ``set_per_process_memory_fraction`` allows, plus what the
    caching allocator has reserved and does not use.

    Returns:
        The two numbers, or ``None`` if the device has no function that tells them.

    Raises:
        RuntimeError: The device does not answer.
    """
    if device.type == "mps":
        return _memory_of_mps(modules_of(device)[0])
    reserved = _asked(device, "memory_reserved") or 0
    allocated = _asked(device, "memory_allocated") or 0
    found = _driver(device, reserved)
    if found is None:
        return None
    free, total = found
    # Older releases of torch set a share and do not tell it.
    share = _asked(device, "get_per_process_memory_fraction")
    if share is not None:
        free = min(free, int(share * total) - reserved)
    return max(0, free) + reserved - allocated, total


def allocation_limit(device: torch.device) -> int | None:
    """The most bytes that one tensor may have on a device, as far as torch tells; ``None``: any that fit."""
    if device.type == "mps":
        buffer = compat.mps_longest_buffer() or modules_of(device)[0].recommended_max_memory()
        return min(buffer, _METAL_MOST)
    if device.type == "xpu" and not _asked(device, "get_device_properties").has_fp64:
        return _INTEL_MOST
    return None


def _driver(device: torch.device, reserved: int) -> tuple[int, int] | None:
    """Free and total bytes of the driver. Some drivers of Intel do not tell what is free."""
    try:
        found = _asked(device, "mem_get_info")
    except RuntimeError:
        properties = getattr(_asked(device, "get_device_properties"), "total_memory", None)
        if properties is None:
            raise
        return properties - reserved, properties
    return found if found is not None else _asked(device, "get_memory_info")


def _asked(device: torch.device, name: str) -> Any:
    """What a device's modules answer about it; ``None`` if they have no such function."""
    return _called(modules_of(device), name, device)


def _called(modules: list[Any], name: str, *given: Any) -> Any:
    """The answer of the first module that has such a function; ``None`` if none has."""
    for module in modules:
        function = getattr(module, name, None)
        if function is not None:
            return function(*given)
    return None


def _memory_of_mps(module: Any) -> tuple[int, int]:
    """MPS shares the host's memory. What its driver holds beyond the tensors is the allocator's cache."""
    total = most = module.recommended_max_memory()
    # The allocator's limit as a share of ``total``; torch does not tell a share that was set in the program.
    share = os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "")
    try:
        most = min(most, int(float(share) * total)) or most  # 0: no limit
    except ValueError:
        pass  # not set
    held = module.current_allocated_memory()
    unused = max(0, module.driver_allocated_memory() - held)
    return max(0, min(most - held, free_on_host() + unused)), total
