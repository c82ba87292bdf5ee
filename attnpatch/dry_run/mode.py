"""The mode of a rehearsal: what cannot run on shapes is split into its steps, or its result is made from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.table import CannotRead, Kernel, kernel_of
from attnpatch.rows.mode import FAST_PATHS, RowsMode, num_heads
from attnpatch.rows.sdpa import encoder_fast_paths


class RehearsalMode(RowsMode):
    """Splits torch's C++ fast paths into their steps under every policy. A kernel outside torch is not run: what it
    would return has known shapes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FAST_PATHS:
            encoder_fast_paths.goes_by_rows(args[0], num_heads(func, args), self.call)
            with self:
                return FAST_PATHS[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kernel = kernel_of(func)
        if kernel is None or kernel.holds_scores or kernel.is_transparent or self._replaces(kernel):
            return super()._answer(func, types, args, kwargs)
        site = self.call
        site.counters.count("fused")
        site.counters.kernel(kernel.name)
        try:
            with self:
                return _returned(kernel.read(*args, **kwargs))
        except (CannotRead, compat.DataDependentOutputException):
            # Lengths of packed sequences are values. Some kernels know the shapes of their results.
            return guard.native(kernel.native, args, kwargs)

    def _replaces(self, kernel: Kernel) -> bool:
        return kernel.is_missing or self.call.policy.replace_kernels


def _returned(call: KernelCall) -> Any:
    """What a kernel would return, without values."""
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    lse = call.query.new_empty(shape[:-1], dtype=torch.float32) if call.needs_lse else None
    return call.returned(call.query.new_empty(shape), lse)
