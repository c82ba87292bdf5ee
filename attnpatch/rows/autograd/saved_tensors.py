"""Holds back the tensors that autograd saves for native steps, in case these have to be computed by rows after all.

A checkpointed layer counts the tensors that are saved in it, and expects as many when it recomputes. Steps that ran out
of memory have saved tensors that a recomputation by rows does not save. So saved tensors reach the checkpoint's hooks
only when the steps have succeeded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat


class _Held:
    """One saved tensor, and the hooks that are to get it."""

    def __init__(self, tensor: torch.Tensor, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.pack, self.unpack = pack, unpack
        self.packed: Any = None

    def hand_on(self) -> None:
        self.packed, self.tensor = self.pack(self.tensor), None

    def value(self) -> torch.Tensor:
        return self.unpack(self.packed) if self.tensor is None else self.tensor


class SavedTensorBuffer:
    """The tensors that autograd saved for the present native steps."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hold back the tensors that are saved inside the block, if there are hooks for saved tensors."""
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
        """Pass the tensors to the hooks: the steps have succeeded, or a saved tensor is about to be overwritten."""
        held, self._held = self._held, []
        for each in held:
            each.hand_on()  # a checkpoint ends its recomputation with an exception here when it has all tensors

    def forget(self) -> None:
        """Drop the tensors: the steps are computed by rows instead."""
        self._held.clear()
