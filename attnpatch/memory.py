"""How many bytes this process can still take on a device; and a meter of peak memory for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time

import psutil
import torch

from attnpatch.policy import FREE_MEMORY as OVERRIDE
from attnpatch.policy import parse_size

# For each version of control groups: the root folder, the file with the limit and the file with the usage.
_CGROUPS = {
    2: ("/sys/fs/cgroup", "memory.max", "memory.current"),
    1: ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_MEMBERSHIP = "/proc/self/cgroup"


def free_bytes(device: torch.device | str) -> int:
    """Bytes that this process can still take on ``device``.

    CUDA and XPU: what the driver has free plus what the caching allocator has reserved and does not use. MPS: the
    recommended maximum minus what tensors hold. CPU: available memory within the limits of control groups. The
    environment variable ``ATTNPATCH_FREE_MEMORY`` (a size such as ``1.9GB``) overrides all of them.

    Raises:
        PolicyError: The environment variable is not a size.
    """
    override = os.environ.get(OVERRIDE)
    if override:
        return parse_size(override, OVERRIDE)
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        of_device = getattr(torch, device.type)
        free, _ = of_device.mem_get_info(device)
        return free + of_device.memory_reserved(device) - of_device.memory_allocated(device)
    if device.type == "mps":
        # What the driver has allocated beyond this is the allocator's cache.
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def _cgroup_free() -> list[int]:
    """Bytes left under each memory limit of this process: its own control group's, and those of its parents."""
    found = []
    for version, path in _memberships():
        root, limit_name, used_name = _CGROUPS[version]
        place = pathlib.PurePosixPath("/", path)
        for group in (place, *place.parents):
            folder = pathlib.Path(root, *group.parts[1:])
            try:
                limit = (folder / limit_name).read_text().strip()
                used = int((folder / used_name).read_text())
            except (OSError, ValueError):
                continue  # inside a container the path may be the host's: then only the root folder exists
            # If there is no limit, version 2 has "max" and version 1 a number near 2**63.
            if limit != "max" and int(limit) < 2**60:
                found.append(max(0, int(limit) - used + _page_cache(folder)))
    return found


def _memberships() -> list[tuple[int, str]]:
    """Version and path of the control groups that limit this process's memory."""
    try:
        lines = pathlib.Path(_MEMBERSHIP).read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            found.append((1, path))
        elif number == "0" and not controllers:
            found.append((2, path))
    return found or [(2, "/"), (1, "/")]


def _page_cache(folder: pathlib.Path) -> int:
    """Bytes of file cache charged to a control group. The kernel frees them before it kills a process."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        found = {name: int(count) for name, count in map(str.split, lines)}
    except (OSError, ValueError):
        return 0
    # Version 1 has a separate total that includes the groups inside.
    return found.get("total_inactive_file", found.get("inactive_file", 0))


class FreeMemoryCache:
    """Free memory during one call of a model: measured once per device, not in every layer."""

    def __init__(self) -> None:
        self._free: dict[torch.device, int] = {}
        self._short: set[torch.device] = set()

    def free(self, device: torch.device) -> int:
        """Free bytes on ``device``."""
        if device not in self._free:
            self._free[device] = free_bytes(device)
        return self._free[device]

    def ran_out(self, device: torch.device) -> None:
        """Note that a native call ran out of memory: the measured figure is dropped."""
        self._short.add(device)
        self._free.pop(device, None)

    def is_short(self, device: torch.device) -> bool:
        """Whether a native call has run out of memory on ``device``, so that later layers need not try natively."""
        return device in self._short


class PeakMeter:
    """Peak bytes taken inside a ``with`` block, beyond what was held when it began.

    On CUDA the allocator counts them. On CPU a thread samples the process's resident size, because the kernel's own
    high-water mark cannot be reset without privileges and would include earlier peaks.

    Args:
        device: The device to measure.
        interval: Seconds between samples.
        curve: Keep about 500 samples, in ``curve``.

    Attributes:
        peak: Bytes, valid after the block.
        curve: Samples: seconds since the block began, and bytes beyond what was held then.
    """

    def __init__(
        self, device: torch.device | str = "cpu", interval: float = 0.002, curve: bool = False
    ) -> None:
        self.device = torch.device(device)
        self.interval = interval
        self.peak = 0
        self.curve: list[tuple[float, int]] = []
        self._keeps_curve = curve

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            if not self._keeps_curve:
                self._before = torch.cuda.memory_allocated(self.device)
                return self
        self._process = psutil.Process()
        self._before = self._highest = self._held()
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            if not self._keeps_curve:
                return
        self._stop.set()
        self._thread.join()
        if self.device.type != "cuda":
            self.peak = max(0, max(self._highest, self._held()) - self._before)

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._process.memory_info().rss

    def _watch(self) -> None:
        interval = self.interval
        while not self._stop.wait(self.interval):
            with contextlib.suppress(psutil.Error):
                held = self._held()
                self._highest = max(self._highest, held)
                seconds = time.perf_counter() - self._start
                if self._keeps_curve and (not self.curve or seconds - self.curve[-1][0] >= interval):
                    self.curve.append((seconds, held - self._before))
                    if len(self.curve) > 1000:
                        # Drop every second sample, and sample half as often from now on.
                        del self.curve[::2]
                        interval *= 2
