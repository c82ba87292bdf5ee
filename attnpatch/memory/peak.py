"""A meter of peak memory for the demo, tests and benchmarks."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil
import torch


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
