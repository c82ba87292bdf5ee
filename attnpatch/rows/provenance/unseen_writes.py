"""Keeps notes on tensors, which become invalid when code that was not seen writes to a tensor.

Scripted functions, other threads and C++ operators write without a mode seeing it, but torch counts these writes in the
tensor's version. Writes through an address, or through a numpy array that shares the memory, are not counted. So once
code has asked for the address, the memory's contents are compared before a note is used. Tensors made in
``torch.inference_mode`` have no version, so a sample of their memory is compared.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.tensors import tensors_in

# After these functions, code outside torch may write to a tensor's memory.
EXPOSING = frozenset(
    "numpy __array__ data_ptr untyped_storage storage _typed_storage __dlpack__ to_dlpack __cuda_array_interface__".split()
)
UNSEEN = "code that attnpatch cannot follow"
UNSEEN_WAYS = (
    f"{UNSEEN}: a scripted function, another thread, a C++ operator, or a write through their address"
)
# Tensors of other classes must not be asked for their version or base.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Bytes that are summed at a time.
_CHUNK = 1 << 23
# A sample has about this many words of 4 bytes, and every 61st at least, so that a row of a tensor is hardly missed.
_SAMPLE = 1 << 13
_STEPS = (1, 7, 31, 61)
# Memory of at most this many bytes is compared as a whole.
_SMALL = 1 << 12


@dataclasses.dataclass(slots=True)
class _Memory:
    """The state of memory that some tensors share: its last known version, and the number of unseen writes.

    Its address is kept for a tensor without a version, since ``set_`` exchanges it where no mode sees it.
    """

    version: int
    strays: int = 0
    address: int = 0


class Notes:
    """One note per tensor; the tensors are held weakly.

    Args:
        strayed: Returns the new note of a tensor that unseen code has written to; ``None``: do not watch for such
            writes.
    """

    def __init__(self, strayed: Callable[[torch.Tensor], Any] | None = None) -> None:
        # For each tensor, by id: a reference to it, the note, its memory, and the number of unseen writes at the time
        # of the note.
        self._notes: dict[int, tuple[weakref.ref[torch.Tensor], Any, _Memory, int]] = {}
        # For each tensor that others are views of, by id: a reference to it, and its memory.
        self._bases: dict[int, tuple[weakref.ref[torch.Tensor], _Memory]] = {}
        self._strayed = strayed
        # For the memory of each tensor without a version, by address: a checksum of a sample.
        self._samples: dict[int, int] = {}
        # While a function that has run is followed: addresses whose samples were taken since, as nobody else writes.
        self._taken: set[int] | None = None
        # For memory that code outside torch may write to, by address: a checksum of its contents.
        self._exposed: dict[int, tuple[int, int]] = {}

    def begin_function(self) -> None:
        """Called when a function that has run begins to be followed: a sample of each memory is taken once."""
        self._taken = set()

    def end_function(self) -> None:
        """Called when the function was followed."""
        self._taken = None

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return self._found(tensor) is not None

    def __iter__(self) -> Iterator[torch.Tensor]:
        for key, found in list(self._notes.items()):
            tensor = found[0]()
            if tensor is None:
                del self._notes[key]
            else:
                yield tensor

    def items(self) -> list[tuple[torch.Tensor, Any]]:
        """The tensors and their notes, without a check for unseen writes."""
        return [(tensor, self._notes[id(tensor)][1]) for tensor in self]

    def get(self, tensor: torch.Tensor) -> Any:
        """The note of a tensor; ``None`` if it has none."""
        found = self._notes.get(id(tensor))
        if found is None or found[0]() is not tensor or found[1] is None:
            return None
        _, note, memory, strays = found
        if self._strayed is None:
            return note
        is_sampled = self._is_sampled(tensor)
        if is_sampled or self._exposed:
            self._compare(tensor, memory, is_sampled)
        version = 0 if is_sampled else self._version(tensor)
        if memory.version != version:
            memory.version = version
            memory.strays += 1
        if memory.strays != strays:
            note = self._strayed(tensor)
            self._notes[id(tensor)] = found[0], note, memory, memory.strays
        return note

    __getitem__ = get

    def __setitem__(self, tensor: torch.Tensor, note: Any) -> None:
        found = self._found(tensor)
        memory = self._memory(tensor) if found is None else found[2]
        memory.version = self._version(tensor)
        self._notes[id(tensor)] = (
            weakref.ref(tensor) if found is None else found[0],
            note,
            memory,
            memory.strays,
        )
        self._look(tensor, memory)

    def before_write(self, tensor: torch.Tensor) -> None:
        """Called before a function that is seen writes to a tensor: after it, earlier writes could not be told apart
        from it where a tensor has no version.
        """
        if self._is_sampled(tensor) and (found := self._found(tensor)) is not None:
            self._compare(tensor, found[2], True)

    def wrote(self, tensor: torch.Tensor) -> None:
        """Called when a function that was seen has written to a tensor once."""
        found = self._found(tensor)
        memory = self._memory(tensor) if found is None else found[2]
        version = self._version(tensor)
        memory.strays += version > memory.version + 1
        memory.version = version
        self._look(tensor, None if found is None else memory)

    def lose(self, tensor: torch.Tensor) -> None:
        """Called when an unknown function has written to a tensor."""
        place = place_of(tensor)
        found = [*self._at(place)] if place else [self._found(tensor)]
        for memory in {id(each[2]): each[2] for each in found if each is not None}.values():
            memory.strays += 1

    def knows_writes(self, tensor: torch.Tensor) -> bool:
        """True if a tensor has a note, and all writes to it since were seen."""
        found = self._found(tensor)
        return found is not None and self.get(tensor) is found[1]

    def agree(self, tensor: torch.Tensor) -> None:
        """Accept all writes to a tensor so far: they were seen elsewhere."""
        found = self._found(tensor)
        if found is not None:
            found[2].version = self._version(tensor)
            self._look(tensor, found[2])

    def expose(self, tensor: torch.Tensor) -> None:
        """Called when code outside torch may write to a tensor's memory from now on."""
        place = place_of(tensor) if self._strayed is not None else 0
        if place and place not in self._exposed:
            self._exposed[place] = _sum(tensor)

    def _found(self, tensor: torch.Tensor) -> Any:
        found = self._notes.get(id(tensor))
        return found if found is not None and found[0]() is tensor else None

    def _memory(self, tensor: torch.Tensor) -> _Memory:
        """The memory of a tensor that has no note."""
        base = tensor._base if type(tensor) in _PLAIN else None
        if base is not None:
            noted = self._found(base)
            if noted is not None:
                memory: _Memory = noted[2]
                return memory
        own = tensor if base is None else base
        found = self._bases.get(id(own))
        if found is not None and found[0]() is own:
            return found[1]
        memory = _Memory(self._version(tensor))
        if base is not None:
            self._bases[id(own)] = weakref.ref(own), memory
        return memory

    def _version(self, tensor: torch.Tensor) -> int:
        if self._strayed is None or type(tensor) not in _PLAIN or tensor.is_inference():
            return 0
        return tensor._version

    def _is_sampled(self, tensor: torch.Tensor) -> bool:
        return self._strayed is not None and type(tensor) in _PLAIN and tensor.is_inference()

    def _compare(self, tensor: torch.Tensor, memory: _Memory, is_sampled: bool) -> None:
        """Look for writes to memory whose address code outside torch has, or whose tensors have no version."""
        place = place_of(tensor)
        is_changed = False
        if place in self._exposed:
            now = _sum(tensor)
            is_changed = now != self._exposed[place]
            self._exposed[place] = now
        elif place and is_sampled:
            if self._takes(place):
                part = sum_of_sample(tensor)
                is_changed = part != self._samples.get(place, part)
                self._samples[place] = part
            memory.strays += memory.address != place
            memory.address = place
        if is_changed:
            for each in {id(found[2]): found[2] for found in self._at(place)}.values():
                each.strays += 1

    def _takes(self, place: int) -> bool:
        """True if a sample of some memory has to be taken."""
        if self._taken is None:
            return True
        is_new = place not in self._taken
        self._taken.add(place)
        return is_new

    def _at(self, place: int) -> Iterator[Any]:
        for tensor in self:
            if place_of(tensor) == place:
                yield self._found(tensor)

    def _look(self, tensor: torch.Tensor, memory: _Memory | None) -> None:
        """Accept the present contents of such memory; ``memory``: of a tensor that has a note."""
        is_sampled = self._is_sampled(tensor)
        place = place_of(tensor) if self._exposed or is_sampled else 0
        if place in self._exposed:
            self._exposed[place] = _sum(tensor)
        elif place and is_sampled:
            if self._takes(place):
                self._samples[place] = sum_of_sample(tensor)
            if memory is not None:
                memory.address = place


def may_write(func: Any, kwargs: dict[str, Any]) -> bool:
    """True if a torch function may write to a tensor that it is given, by its name."""
    try:
        return any(_writes(func)) or "out" in kwargs
    except TypeError:  # it cannot be hashed
        return True


def may_write_to(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a torch function may write to, by its name and its arguments."""
    is_write, is_foreign = _writes(func)
    if not (is_write or is_foreign or "out" in kwargs):
        return []
    found = [*args[:1], kwargs.get("input")] if is_write else []
    found += written_by(func, args, kwargs) if is_foreign else []
    return [one for one in (*found, *tensors_in(kwargs.get("out"))) if isinstance(one, torch.Tensor)]


@functools.lru_cache(1024)
def _writes(func: Any) -> tuple[bool, bool]:
    """Whether a function's name says that it writes to its first argument, and whether it is another library's."""
    name = element_places.name_of(func)
    is_write = element_places.is_in_place(name) or name in element_places.WRITES
    return is_write, name.startswith("torch._ops.")


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that another library's operator writes to, according to its schema."""
    schema = getattr(getattr(func, "default", func), compat.OPERATOR_SCHEMA, None)
    if schema is None or not schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    is_written = {
        one.name: one.alias_info is not None and one.alias_info.is_write for one in schema.arguments
    }
    return [*tensors_in([value for name, value in named.items() if is_written.get(name)])]


def place_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's memory; 0 if it has none of its own."""
    if tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def sum_of_sample(tensor: torch.Tensor) -> int:
    """A checksum of a part of a tensor's memory, spread over all of it; of all of it if there is little."""
    memory = tensor.untyped_storage()
    size = memory.nbytes()
    if size <= _SMALL and tensor.device.type == "cpu":
        return hash(ctypes.string_at(memory.data_ptr(), size))
    words, dtype = (size // 4, torch.int32) if size > 3 else (size, torch.uint8)
    step = next((step for step in _STEPS if words <= step * _SAMPLE), _STEPS[-1])
    count = -(-words // step)
    part = torch.empty(0, dtype=dtype, device=tensor.device).set_(memory, 0, (count,), (step,))
    # The product has 64 bits: the lower bits of most numbers are alike.
    return int((part * _keys(count, part.device)).sum())


@functools.lru_cache(16)
def _keys(count: int, device: torch.device) -> torch.Tensor:
    """Pseudo-random odd factors of 64 bits."""
    with torch.inference_mode(False):
        keys = torch.arange(1, count + 1, device=device).mul_(-0x61C8864680B583EB).bitwise_or_(1)
        return keys.bitwise_xor_(keys >> 29).bitwise_or_(1)


def _sum(tensor: torch.Tensor) -> tuple[int, int]:
    """A checksum of a tensor's whole memory, which also depends on the order of its contents."""
    memory = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
    rest = len(flat) % 8
    words = flat[: len(flat) - rest].view(torch.int64)
    total = 0
    for part in words.split(_CHUNK // 8):
        # The checksum is 64 bits of a sum of products.
        total = (total * 31 + int((part * _keys(len(part), part.device)).sum())) % (1 << 64)
    return total, int.from_bytes(bytes(flat[len(flat) - rest :].tolist()), "little")
