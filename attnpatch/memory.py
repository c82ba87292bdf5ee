"""How many bytes are free to this process on a device, and a meter of the peak for tests and benchmarks."""

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

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device | str) -> int:
    """Bytes that this process can still take on ``device``.

    CUDA: what the driver has free plus what the caching allocator has reserved and does not use. MPS: the
    recommended maximum minus what is allocated. CPU: available memory within the cgroup limit. The environment
    variable ``ATTNPATCH_FREE_MEMORY`` (a size such as ``1.9GB``) overrides all of them.

    Raises:
        PolicyError: The environment variable is not a size.
    """
    override = os.environ.get(OVERRIDE)
    if override:
        return parse_size(override, OVERRIDE)
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def _cgroup_free() -> list[int]:
    for limit_file, used_file in _CGROUPS:
        try:
            limit = pathlib.Path(limit_file).read_text().strip()
            used = int(pathlib.Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        # Without a limit version 2 says "max", version 1 a number near 2**63.
        if limit != "max" and int(limit) < 2**60:
            return [max(0, int(limit) - used + _page_cache())]
    return []


def _page_cache() -> int:
    """Bytes of file cache charged to the cgroup: the kernel gives them back before it kills anybody."""
    try:
        for line in pathlib.Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


class Room:
    """What is known of free memory during one call of a model: it is asked once, not in every layer."""

    def __init__(self) -> None:
        self._free: dict[torch.device, int] = {}
        self._short: set[torch.device] = set()

    def free(self, device: torch.device) -> int:
        """Free bytes on ``device``."""
        if device not in self._free:
            self._free[device] = free_bytes(device)
        return self._free[device]

    def ran_out(self, device: torch.device) -> None:
        """A native call ran out of memory: what was known is wrong."""
        self._short.add(device)
        self._free.pop(device, None)

    def is_short(self, device: torch.device) -> bool:
        """Whether a native call has run out of memory on ``device``: the layers after it need not try."""
        return device in self._short


class PeakMeter:
    """Peak bytes taken inside a ``with`` block, beyond what was held when it began.

    On CUDA from the allocator's own counter; on CPU from the resident size of the process, sampled by a thread
    (the kernel's own high-water mark cannot be reset without privileges, and would include what came before).

    Args:
        device: Where.
        interval: Seconds between samples.
        curve: Keep the samples, in ``curve``, about 500 of them.

    Attributes:
        peak: Bytes, valid after the block.
        curve: Seconds since the block began, and bytes beyond what was held then.
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
                        # Every second one goes, and from now on half as many come.
                        del self.curve[::2]
                        interval *= 2
