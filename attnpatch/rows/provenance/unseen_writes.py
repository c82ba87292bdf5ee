"""What is known of tensors, until something writes into one of them that no function of torch's was seen to write.

A scripted function, another thread or an operator in C++ writes where no mode sees it; but a tensor counts what torch writes
into its memory. What writes to an address, or through an array of numpy that shares its memory, is not counted: such memory
is looked at again before it is used, from when somebody asks where it is. In ``torch.inference_mode`` tensors count
nothing.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.provenance.tensors import tensors_in

# After these others may write to a tensor's memory.
EXPOSING = frozenset(
    "numpy __array__ data_ptr untyped_storage storage _typed_storage __dlpack__ to_dlpack __cuda_array_interface__".split()
)
UNSEEN = "code that cannot be followed"
# Tensors of other classes must not be asked.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Bytes that are looked at together.
_CHUNK = 1 << 23


@dataclasses.dataclass(slots=True)
class _Memory:
    """What some tensors share: how often it was written to, and how often by what was not seen."""

    version: int
    strays: int = 0


class Notes:
    """One note for each of some tensors, which are kept weakly.

    Args:
        strayed: The note of a tensor that holds other elements than those that were noted; ``None``: nobody looks for that.
    """

    def __init__(self, strayed: Callable[[torch.Tensor], Any] | None = None) -> None:
        # By identity. Of a tensor: itself, the note, its memory, and how often that was written to by what was not seen.
        self._notes: dict[int, tuple[weakref.ref[torch.Tensor], Any, _Memory, int]] = {}
        # Of tensors that others are views of.
        self._bases: dict[int, tuple[weakref.ref[torch.Tensor], _Memory]] = {}
        self._strayed = strayed
        self._counts = strayed is not None and not torch.is_inference_mode_enabled()
        # Of memory that others may write to, by where it begins: what it holds.
        self._exposed: dict[int, tuple[int, int]] = {}

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
        """Tensors and their notes, whatever was written to them since."""
        return [(tensor, self._notes[id(tensor)][1]) for tensor in self]

    def get(self, tensor: torch.Tensor) -> Any:
        """The note of a tensor; ``None``: it has none."""
        found = self._found(tensor)
        if found is None or found[1] is None:
            return None
        _, note, memory, strays = found
        if self._exposed:
            self._compare(tensor)
        version = self._version(tensor)
        if memory.version != version:
            memory.version = version
            memory.strays += 1
        if memory.strays != strays and self._strayed is not None:
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
        if self._exposed:
            self._look(tensor)

    def wrote(self, tensor: torch.Tensor) -> None:
        """A function that was seen has written to a tensor, once."""
        found = self._found(tensor)
        memory = self._memory(tensor) if found is None else found[2]
        version = self._version(tensor)
        memory.strays += version > memory.version + 1
        memory.version = version
        if self._exposed:
            self._look(tensor)

    def lose(self, tensor: torch.Tensor) -> None:
        """A function of which nothing is known has written to a tensor."""
        place = _place(tensor)
        found = [*self._at(place)] if place else [self._found(tensor)]
        for memory in {id(each[2]): each[2] for each in found if each is not None}.values():
            memory.strays += 1

    def knows_writes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was noted, and all that was written to it since was seen."""
        found = self._found(tensor)
        return found is not None and self.get(tensor) is found[1]

    def agree(self, tensor: torch.Tensor) -> None:
        """Whatever was written to a tensor so far was seen by somebody else."""
        found = self._found(tensor)
        if found is not None:
            found[2].version = self._version(tensor)
            if self._exposed:
                self._look(tensor)

    def expose(self, tensor: torch.Tensor) -> None:
        """Others may write to the memory of a tensor from now on."""
        place = _place(tensor) if self._strayed is not None else 0
        if place and place not in self._exposed:
            self._exposed[place] = _sum(tensor)

    def _found(self, tensor: torch.Tensor) -> Any:
        found = self._notes.get(id(tensor))
        return found if found is not None and found[0]() is tensor else None

    def _memory(self, tensor: torch.Tensor) -> _Memory:
        """Of a tensor that has no note."""
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
        if not self._counts or type(tensor) not in _PLAIN:
            return 0
        try:
            return tensor._version
        except RuntimeError:
            return 0  # made in inference mode

    def _compare(self, tensor: torch.Tensor) -> None:
        """Look for what was written to memory that others know."""
        place = _place(tensor)
        if place not in self._exposed:
            return
        now = _sum(tensor)
        if now != self._exposed[place]:
            self._exposed[place] = now
            for memory in {id(found[2]): found[2] for found in self._at(place)}.values():
                memory.strays += 1

    def _at(self, place: int) -> Iterator[Any]:
        for tensor in self:
            if _place(tensor) == place:
                yield self._found(tensor)

    def _look(self, tensor: torch.Tensor) -> None:
        """What memory holds now was seen, or is that of another tensor."""
        place = _place(tensor)
        if place in self._exposed:
            self._exposed[place] = _sum(tensor)


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator of another library says it writes to."""
    schema = getattr(getattr(func, "default", func), compat.OPERATOR_SCHEMA, None)
    if schema is None or not schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    is_written = {
        one.name: one.alias_info is not None and one.alias_info.is_write for one in schema.arguments
    }
    return [*tensors_in([value for name, value in named.items() if is_written.get(name)])]


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0: it has none of its own."""
    if tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _sum(tensor: torch.Tensor) -> tuple[int, int]:
    """A sum of all of a tensor's memory that tells whether something in it has changed, or changed places."""
    memory = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
    rest = len(flat) % 8
    words = flat[: len(flat) - rest].view(torch.int64)
    total = 0
    for part in words.split(_CHUNK // 8):
        # Odd numbers that look random: 64 bits of a sum of products.
        keys = torch.arange(1, len(part) + 1, device=part.device).mul_(-0x61C8864680B583EB).bitwise_or_(1)
        keys.bitwise_xor_(keys >> 29)
        total = (total * 31 + int((part * keys.bitwise_or_(1)).sum())) % (1 << 64)
    return total, int.from_bytes(bytes(flat[len(flat) - rest :].tolist()), "little")
