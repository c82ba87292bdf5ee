"""What tensors hold while a model runs: storages that operators make, counted until they are freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from compat.sweep import plain_tensors, storage_of
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operators make inside the block, until they are freed.

    What is there before, and views, count nothing; neither does what a kernel holds inside one operator, which is no
    tensor.

    Attributes:
        live, peak: Bytes held now, and at most.
        largest: Bytes of the largest single storage.
        what: What made that one.
        at_peak: What was held at the peak, a line for each of the largest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.what = self.at_peak = ""
        self._alive: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage_of(tensor) for tensor in plain_tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(result):
            if storage_of(tensor) not in given:
                self._enter(tensor, f"{func} {tuple(tensor.shape)} {tensor.dtype}")
        return result

    def _enter(self, tensor: torch.Tensor, what: str) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size, what
        weakref.finalize(storage, self._leave, key).atexit = False
        self.live += size
        if size > self.largest:
            self.largest, self.what = size, what
        if self.live > self.peak:
            self.peak = self.live
            held = sorted(self._alive.values(), reverse=True)[:12]
            self.at_peak = "\n".join(f"{count:>12} {name}" for count, name in held)

    def _leave(self, key: int) -> None:
        self.live -= self._alive.pop(key)[0]
