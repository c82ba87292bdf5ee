"""Avoids following a module's functions again for every generated token.

While a sequence is generated, each call of an attention module runs the same functions on tensors of the same shapes;
only the number of keys grows. ``RepeatedSources`` records what a call does up to its SDPA call: functions, which tensor
goes where, numbers. The layout of an earlier call is reused if that call did the same. Numbers may differ only if they
are the ones that grew between earlier calls, and only by the same amount each (the number of keys). Otherwise the
recorded functions are followed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.observing import Layout
from attnpatch.rows.graph.axes import Dims
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.origins import lost
from attnpatch.rows.provenance.remembered_calls import RememberedCalls
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.tensors import share_memory
from attnpatch.rows.provenance.unseen_writes import EXPOSING, UNSEEN, place_of, sum_of_sample

# Only calls with at most this many tokens in the batch are recorded: their tensors are kept until the SDPA call.
MOST_TOKENS = 16
# A larger tensor (in bytes) that is concatenated with others, as a cache is, is not kept: only its shape is.
_LARGE = 1 << 20
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CONSTANTS = frozenset(
    (str, bool, float, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
)
# Marks in the record that differ from all other values.
_NEW, _STRIDED = object(), object()
# In-place functions that change a tensor's shape, so that earlier functions can no longer be followed.
_RESHAPING = frozenset(
    "resize_ resize_as_ set_ t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_ data_ unflatten_".split()
)


_name = functools.lru_cache(1024)(element_places.name_of)


@functools.lru_cache(1024)
def _writes(name: str) -> bool:
    return element_places.is_in_place(name) or name in element_places.WRITES | element_places.SCATTERING


class _Shape:
    """Stands for a tensor of which only the shape and dtype are kept."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def sources_of(
    inputs: Sequence[torch.Tensor],
    outer: Sources | None,
    moved: dict[int, dict[int, str]],
    repeats: RememberedCalls | None,
    hidden: HiddenTokens | None = None,
) -> Sources:
    """The sources of a call; see ``Sources``.

    Args:
        inputs, outer, moved, hidden: As for ``Sources``.
        repeats: The module's remembered calls; ``None``: each call is followed.
    """
    if repeats is None or repeats.is_off or outer is not None or moved or not inputs:
        return Sources(inputs, outer, moved, hidden=hidden)
    tokens = inputs[0].numel() // max(1, inputs[0].shape[-1])
    if tokens > MOST_TOKENS:
        return Sources(inputs, hidden=hidden)
    return RepeatedSources(inputs, repeats, hidden)


class RepeatedSources(Sources):
    """The sources of a call with few tokens, which is followed only if it does not repeat an earlier call.

    Args:
        inputs: The tensors that the module is called with, in order, each once.
        repeats: The module's remembered calls.
        hidden: As for ``Sources``.
    """

    is_repeated = True

    def __init__(
        self, inputs: Sequence[torch.Tensor], repeats: RememberedCalls, hidden: HiddenTokens | None = None
    ) -> None:
        super().__init__(inputs, hidden=hidden)
        self._repeats = repeats
        # Functions that were recorded and not followed yet; ``None``: nothing is recorded any more.
        self._waiting: list[tuple[Any, ...]] | None = [] if repeats else None
        self._is_asked = self._is_answered = self._is_lost = False
        # Where the record of what follows the attention begins: functions, and numbers. ``None``: it has not been asked
        # for yet.
        self._end: tuple[int, int] | None = None
        # Whether a tensor has more writes than were seen.
        self._has_strayed = False
        # The record: functions, with a number for every tensor; and all numbers that occur in it.
        self._done: list[Any] = []
        self._numbers: list[int] = []
        self._slots: dict[int, int] = {}
        self._memories: dict[int, int] = {}
        self._versions: list[int] = []
        # For memory of tensors without a version, by address: a tensor in it, and a checksum of a sample.
        self._samples: dict[int, tuple[torch.Tensor, int]] = {}
        self._held: list[Any] = []  # keeps tensors alive, so that no id is reused
        self._is_written = all(self._write(tensor) for tensor in inputs)

    def of(self, tensor: torch.Tensor) -> Dims | None:
        if self._is_answered or not self._is_asked:
            self._stop()
        self._catch_up()
        return None if self._is_lost else super().of(tensor)

    def returned(self, tensor: torch.Tensor) -> Dims | None:
        self._catch_up()
        return lost(tensor.shape, UNSEEN) if self._is_lost else super().of(tensor)

    def give_later(self, tensor: torch.Tensor, dims: Callable[[Sources], Dims | None]) -> None:
        if self._waiting is None:
            super().give_later(tensor, dims)
        else:
            self._waiting.append((tensor, dims))

    def give(self, tensor: torch.Tensor, dims: Dims) -> None:
        self._stop()
        super().give(tensor, dims)

    def same(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        if copy is not tensor:
            self._stop()
            super().same(tensor, copy)

    def has_seen_writes(self, tensor: torch.Tensor) -> bool:
        return self._waiting is not None or self._is_answered or super().has_seen_writes(tensor)

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if (self._is_answered and self._waiting is None) or type(result) is torch.Size:
            return
        if result is not None and not isinstance(result, (torch.Tensor, tuple, list)):
            if _name(func) in EXPOSING:
                self._stop()
                super().follow(func, args, kwargs, result)
            return  # a shape, a dtype
        if self._is_written:
            name = _name(func)
            if name in element_places.JOINING and not kwargs and isinstance(args[0], (tuple, list)):
                # The host drops the old cache after concatenating a token to it; do not keep it alive here.
                args = ([self._kept(piece) for piece in args[0]], *args[1:])
            if _writes(name):
                self._count_write(args[0] if args else None)
            is_attention = self._end == (len(self._done), len(self._numbers))
            given = ((), {}) if is_attention else (args, kwargs)
            is_recorded = name not in _RESHAPING and "out" not in kwargs and self._step(func, *given, result)
            if not is_recorded or self._has_strayed:
                self._is_lost |= self._waiting is not None and (name in _RESHAPING or self._has_strayed)
                self._stop()
        if self._waiting is None:
            super().follow(func, args, kwargs, result)
        else:
            self._waiting.append((func, args, kwargs, result))

    def recall(self, query: torch.Tensor, key: torch.Tensor) -> Layout | None:
        """The layout of the attention of ``query`` and ``key``, if an earlier call did the same; otherwise ``None``."""
        if not self._is_written or self._end is not None:
            # A second attention in the same call: only the first one was recorded.
            self._is_lost |= self._is_answered and self._waiting is None
            self._stop()
            return None
        self._is_asked = True
        self._is_written = self._write(query) and self._write(key)
        self._has_strayed |= self._has_other_contents()
        if self._has_strayed:
            self._is_lost |= self._waiting is not None
            self._stop()
        found = self._repeats.find(tuple(self._done), tuple(self._numbers)) if self._is_written else None
        if found is not None:
            self._is_answered = True
            self._end_attention()
        return found

    def remember(self, layout: Layout) -> None:
        """Remember the layout of an attention that could not be recalled."""
        if self.reads_values:
            self._repeats.is_off = True  # the next call may do the same on other values
        elif self._is_written and not self._is_lost:
            self._repeats.keep(tuple(self._done), tuple(self._numbers), layout)
        self._is_asked = False
        self._end_attention()

    def _end_attention(self) -> None:
        """The attention's layout is known; go on with the record if somebody asks for the order of the module's result."""
        self._end = len(self._done), len(self._numbers)
        if self.is_bare is None:
            self._waiting = None
            self._end_record()

    def recall_results(self, results: Sequence[torch.Tensor]) -> tuple[int | None, ...] | None:
        if self._waiting is None or not self._is_answered:
            return None
        self._has_strayed |= self._has_other_contents()
        key = None if self._has_strayed else self._key(results)
        found = None if key is None else self._repeats.results.get(key)
        if found is None:
            self._is_lost |= self._has_strayed
            self._catch_up()
        return found

    def remember_results(
        self, results: Sequence[torch.Tensor], orders: Callable[[], tuple[int | None, ...] | None]
    ) -> None:
        key = self._key(results)
        numbers = None if key is None or self.reads_values or self._is_lost else orders()
        if key is None or numbers is None:
            self._repeats.is_off = True  # the next call is followed as well
        else:
            self._repeats.keep_results(key, numbers)

    def _key(self, results: Sequence[torch.Tensor]) -> tuple[Any, ...] | None:
        """What a call has done, with those numbers that do not grow; ``None``: it was not recorded."""
        slots = [self._slots.get(id(one)) for one in results]
        if not self._is_written or self._end is None or None in slots:
            return None
        return (*self._done, "numbers", *self._numbers[self._end[1] :], "results", *slots)

    def _stop(self) -> None:
        """Stop recording for this module: from now on it is always followed."""
        self._repeats.is_off = True
        self._is_lost |= bool(self._waiting) and self._has_other_contents()
        self._end_record()
        self._catch_up()

    def _end_record(self) -> None:
        self._is_written = False
        self._held, self._slots, self._samples = [], {}, {}

    def _catch_up(self) -> None:
        waiting, self._waiting = self._waiting, None
        self._is_answered &= waiting is None
        for step in waiting or ():
            if len(step) == 2:
                super().give_later(*step)
            else:
                super().follow(*step)

    # ----------------------------------------------------------------------------------------------- what is written

    def _step(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        self._done.append(func)
        for value in args:
            if not self._write(value):
                return False
        for name, value in kwargs.items():
            self._done.append(name)
            if not self._write(value):
                return False
        return self._write(result, is_result=True)

    def _has_other_contents(self) -> bool:
        """True if code that was not seen has written to a tensor that was recorded."""
        for one, version in zip(self._held, self._versions, strict=True):
            if not one.is_inference() and one._version > version:
                return True
        return any(sum_of_sample(one) != before for one, before in self._samples.values())

    def _before_write(self, tensor: torch.Tensor) -> None:
        super()._before_write(tensor)
        place = place_of(tensor) if self._samples else 0
        self._has_strayed |= place in self._samples and sum_of_sample(tensor) != self._samples[place][1]

    def _count_write(self, target: Any) -> None:
        """Count a write that was seen, for all tensors in the target's memory."""
        place = place_of(target) if self._samples and isinstance(target, torch.Tensor) else 0
        if place in self._samples:
            self._samples[place] = target, sum_of_sample(target)
        for slot, tensor in enumerate(self._held):
            if isinstance(target, torch.Tensor) and share_memory(tensor, target):
                self._versions[slot] += 1

    def _kept(self, piece: Any) -> Any:
        is_large = type(piece) is torch.Tensor and piece.numel() * piece.element_size() > _LARGE
        return _Shape(piece) if is_large and id(piece) not in self._slots else piece

    def _write(self, value: Any, is_result: bool = False) -> bool:
        """Record an argument or a result of a function; False if that is not possible."""
        kind = type(value)
        if kind in _PLAIN:
            slot = self._slots.get(id(value))
            if slot is None:
                self._write_new(value, is_result)
            else:
                self._has_strayed |= not value.is_inference() and value._version > self._versions[slot]
                self._done.append(slot)
        elif kind is int:
            self._done.append(int)
            self._numbers.append(value)
        elif kind in _CONSTANTS:
            self._done += (kind, value)
        elif kind in (tuple, list, torch.Size):
            self._done += (kind, len(value))
            for each in value:
                if not self._write(each, is_result):
                    return False
        elif kind is slice:
            self._done.append(slice)
            return all(self._write(each) for each in (value.start, value.stop, value.step))
        elif kind is _Shape:
            self._done += (_Shape, value.dtype, value.dim())
            self._numbers += value.shape
        else:
            return False
        return True

    def _write_new(self, tensor: torch.Tensor, is_result: bool) -> None:
        """Record a tensor that was not recorded before."""
        self._slots[id(tensor)] = len(self._slots)
        self._held.append(tensor)
        is_inference = tensor.is_inference()
        self._versions.append(0 if is_inference else tensor._version)
        place = place_of(tensor)
        if is_inference and place not in self._samples:
            self._samples[place] = tensor, sum_of_sample(tensor)
        self._done += (_NEW, tensor.dtype, tensor.dim())
        self._numbers += tensor.shape
        # A number for its memory: tensors with the same number share memory, so a write to one changes both.
        has_memory = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        memory = self._memories.setdefault(place, len(self._memories)) if has_memory else -1
        if not is_result:  # the layout and memory of a result follow from its operands
            self._done.append(memory)
            if not tensor.is_contiguous():
                self._done.append(_STRIDED)
                self._numbers += tensor.stride()
