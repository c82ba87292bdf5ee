"""Keeps the values that a backward pass needs when the tensors that hold them are about to be overwritten."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from attnpatch import compat
from attnpatch.ledger import ledger_of
from attnpatch.rows.graph.nodes import copied
from attnpatch.rows.thread_state import here


class Kept:
    """The tensors that one edge has saved, with their version numbers.

    Autograd raises an error if a saved tensor was overwritten. But natively some steps save nothing (adding a bias),
    and their tensors may be overwritten; so they are copied before the write.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors: list[Any] = self.held(tensors)
        self.is_replaced = False
        self.versions = [tensor._version for tensor in tensors]
        self._storages = [memory_of(tensor) for tensor in tensors]
        self._registry = here.kept
        for storage in self._storages:
            self._registry.setdefault(storage, weakref.WeakSet()).add(self)
        _drop_empty()

    def held(self, tensors: list[torch.Tensor]) -> list[Any]:
        return [tensor.detach() for tensor in tensors]

    def preserve(self, storage: int) -> None:
        for i, tensor in enumerate(self.tensors):
            if memory_of(tensor) == storage and tensor._version == self.versions[i]:
                self.tensors[i] = copied(tensor)
                self.versions[i] = self.tensors[i]._version
                self.is_replaced = True

    def instead_of(self, saved: Callable[[], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """The kept tensors, or autograd's, which raises an error if one was overwritten without being copied."""
        is_known = all(t._version == version for t, version in zip(self.tensors, self.versions, strict=True))
        return (
            self.tensors if self.is_replaced and is_known and not torch.is_grad_enabled() else list(saved())
        )

    def forget(self) -> None:
        """Called after the backward pass: autograd has freed the saved tensors, so they must not be kept here."""
        if not self.is_replaced:
            self.tensors = []
        self.leave()

    def leave(self) -> None:
        """From now on, saved tensors may be overwritten without being copied first."""
        if self._registry is not here.kept:
            return  # it belongs to another thread, which drops empty entries itself when it grows
        for storage in self._storages:
            known = self._registry.get(storage)
            if known is not None:
                known.discard(self)
                if not known:
                    del self._registry[storage]


class Packed(Kept):
    """Tensors that hooks have saved in their own way (a checkpoint, an offload). They are not held here, only copied
    before a write.

    A checkpoint saves the tensors of its recomputation, and no hook sees if they are overwritten later in that run.
    """

    def held(self, tensors: list[torch.Tensor]) -> list[Any]:
        self.places = [
            None if ledger_of(tensor) is not None or compat.is_wrapped(tensor)
            else (StorageWeakRef(tensor.untyped_storage()), memory_of(tensor), _layout(tensor))
            for tensor in tensors
        ]  # fmt: skip
        return [None] * len(tensors)

    def preserve(self, storage: int) -> None:
        for i, place in enumerate(self.places):
            if place is None or place[1] != storage or place[0].expired() or self.tensors[i] is not None:
                continue
            memory = compat.storage_behind(place[0].cdata)
            (dtype, is_conj, is_neg), *layout = place[2]
            tensor = torch.empty(0, dtype=dtype, device=memory.device).set_(memory, *layout)
            tensor = tensor.conj() if is_conj else tensor
            self.tensors[i] = copied(compat.neg_view(tensor) if is_neg else tensor)
            self.is_replaced = True

    def forget(self) -> None:
        self.leave()  # only copies are held, so no tensor has to be dropped

    def instead_of(self, saved: Callable[[], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        if self.is_replaced and torch.is_grad_enabled():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        return [own if own is not None else packed for own, packed in zip(self.tensors, saved(), strict=True)]


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    kind = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return kind, tensor.storage_offset(), tensor.shape, tensor.stride()


def memory_of(tensor: torch.Tensor) -> int:
    """A number that identifies the storage of a tensor."""
    while compat.is_wrapped(tensor):
        # vmap's tensors have no storage of their own.
        tensor = compat.unwrapped(tensor)
    storage = tensor.untyped_storage()
    # In a dry run tensors have no data, so they are distinguished by their storage object.
    return storage.data_ptr() if ledger_of(tensor) is None else storage._cdata


def are_kept() -> bool:
    """True if a backward pass of this thread still needs tensors that could be overwritten."""
    return bool(here.kept)


def before_write(storage: int) -> None:
    """Let edges copy the tensors that they have saved from a storage that is about to be written to."""
    for kept in list(here.kept.get(storage, ())):
        kept.preserve(storage)


def _drop_empty() -> None:
    """Drop entries for storages that no edge keeps any more (graphs that were dropped without a backward pass)."""
    if len(here.kept) > here.most_kept:
        for storage in [storage for storage, found in here.kept.items() if not found]:
            del here.kept[storage]
        here.most_kept = max(256, 2 * len(here.kept))
