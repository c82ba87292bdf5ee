"""What a process takes from the system for blocks that are made and freed: the C library's allocator, replayed.

On CPU torch asks the C library for every tensor. glibc maps blocks of its own for large ones, and keeps a heap for
those below a threshold that grows with what is freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). A hole in that
heap stays taken, and is used again for what fits into it. Measured (``python -m benchmarks explain``): at 2,048 tokens
that is half as much again as the tensors hold, at 8,192 tokens a few per cent.
"""

from __future__ import annotations

import bisect
import os
import platform

MAX_THRESHOLD = 32 * 2**20
PAGE = 4096
# torch aligns to 64 bytes; with glibc's own header.
_EXTRA = 80
_TOP_PAD = 128 * 1024
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_OTHERS = ("LD_PRELOAD", "GLIBC_TUNABLES")


def is_replayable() -> bool:
    """Whether this process has glibc's allocator as it comes."""
    return platform.libc_ver()[0] == "glibc" and not any(os.environ.get(n) for n in (*_SETTINGS, *_OTHERS))


class Heap:
    """glibc's main heap: best fit, split, and trimmed at its end.

    Neighbouring holes are not merged: torch's aligned requests leave a remainder between blocks, which the thread's
    cache holds as in use.

    Attributes:
        taken: Bytes held now, holes included.
        peak: Most bytes held at once.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._mapped: dict[int, int] = {}
        self._mapped_bytes = 0
        self._place: dict[int, int] = {}
        # By address: size, and the address of the block before.
        self._blocks: dict[int, tuple[int, int]] = {}
        self._holes: list[tuple[int, int]] = []
        self._top = self._end = 0
        self._last = -1

    @property
    def taken(self) -> int:
        return self._mapped_bytes + self._end

    def take(self, key: int, size: int) -> None:
        """A block of ``size`` bytes is made."""
        size += _EXTRA
        if size > MAX_THRESHOLD:
            self._mapped[key] = -(-size // PAGE) * PAGE
            self._mapped_bytes += self._mapped[key]
        else:
            self._place[key] = self._fill_hole(size)
        self.peak = max(self.peak, self.taken)

    def _fill_hole(self, size: int) -> int:
        at = bisect.bisect_left(self._holes, (size, 0))
        if at == len(self._holes):
            address, self._top = self._top, self._top + size
            self._blocks[address] = size, self._last
            self._last = address
            self._end = max(self._end, self._top)
            return address
        whole, address = self._holes.pop(at)
        if whole > size:
            self._blocks[address] = size, self._blocks[address][1]
            self._blocks[address + size] = whole - size, address
            following = address + whole
            if following in self._blocks:
                self._blocks[following] = self._blocks[following][0], address + size
            else:
                self._last = address + size
            bisect.insort(self._holes, (whole - size, address + size))
        return address

    def give_back(self, key: int) -> None:
        """A block is freed."""
        if key in self._mapped:
            self._mapped_bytes -= self._mapped.pop(key)
            return
        address = self._place.pop(key)
        size, before = self._blocks[address]
        if address != self._last:
            bisect.insort(self._holes, (size, address))
            return
        del self._blocks[address]
        self._top, self._last = address, before
        # The heap's end goes back to the system once twice the threshold is free there.
        if self._end - self._top > 2 * MAX_THRESHOLD:
            self._end = self._top + _TOP_PAD
