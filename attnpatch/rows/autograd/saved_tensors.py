"""What autograd saves for native steps that may yet be answered by rows.

A checkpointed layer counts what is saved in it, and expects as much when it runs again. Steps that ran out of memory
leave something behind that the second run, by rows, does not save. So it is held back until the steps have succeeded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat


class _Held:
    """One saved tensor, and who wanted it."""

    def __init__(self, tensor: torch.Tensor, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.pack, self.unpack = pack, unpack
        self.packed: Any = None

    def hand_on(self) -> None:
        self.packed, self.tensor = self.pack(self.tensor), None

    def value(self) -> torch.Tensor:
        return self.unpack(self.packed) if self.tensor is None else self.tensor


class SavedTensorBuffer:
    """Saved tensors of the present steps."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hold back what is saved inside the block, if anybody but autograd itself wants it."""
        hooks = compat.saved_tensor_hooks() if torch.is_grad_enabled() else None
        if hooks is None:
            yield
            return

        def hold(tensor: torch.Tensor) -> _Held:
            self._held.append(_Held(tensor, *hooks))
            return self._held[-1]

        with torch.autograd.graph.saved_tensors_hooks(hold, _Held.value):
            yield

    def hand_on(self) -> None:
        """The steps have succeeded, or somebody is about to overwrite what they saved."""
        held, self._held = self._held, []
        for each in held:
            each.hand_on()  # a checkpoint that runs again ends with an exception when it has seen enough

    def forget(self) -> None:
        """The steps are answered by rows."""
        self._held.clear()
