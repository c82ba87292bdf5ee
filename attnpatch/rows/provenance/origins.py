"""Origins: which axes belong to a module's inputs, and how other axes were made from them (joined, sliced, written)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, all_leaves, fresh, leaves
from attnpatch.rows.graph.strides import Part


class Pieces:
    """The pieces that were written along one dimension of memory that is filled piece by piece."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[Dim, int]] = {}

    def at(self, start: int, count: int) -> Dim | None:
        """The source of exactly this piece; ``None`` if no such piece was written."""
        found = self._written.get(start)
        return found[0] if found is not None and found[1] == count else None

    def put(self, start: int, count: int, source: Dim) -> bool:
        """Note a piece; False if it overlaps one that was written before."""
        if any(at < start + count and start < at + size for at, (_, size) in self._written.items()):
            return False
        self._written[start] = source, count
        return True

    def all_of(self, size: int) -> list[tuple[Dim | None, int]]:
        """All pieces in order, each with its length; parts that are still blank get a new axis."""
        parts: list[tuple[Dim | None, int]] = []
        end = 0
        for at, (dim, count) in [*sorted(self._written.items()), (size, ((), 0))]:
            if at > end:
                parts.append((fresh([at - end])[0], at - end))
            if count:
                parts.append((dim, count))
            end = at + count
        return parts


@dataclasses.dataclass(frozen=True)
class Made:
    """How an axis was made that is not an input's own: joined from others, a part of one, or made by the module.

    Attributes:
        parts: The axes it was joined from, in order, each with its length; ``None`` for axes that are not known.
        of: The axis that it is a part of, or ``None``.
        part: Which part.
        has: The axes of what was written into it, if it existed before (a cache of fixed size).
        is_of_others: True if queries and keys belong to different sequences along it.
    """

    parts: tuple[tuple[Dim | None, int], ...] = ()
    of: Axis | None = None
    part: Part | None = None
    has: Dim | None = None
    is_of_others: bool = False


def lost(shape: Sequence[int], made_by: str) -> Dims:
    """New dimensions for a tensor whose elements are unknown after a function; the function's name is kept."""
    dims = fresh(shape)
    for leaf in all_leaves(dims):
        leaf.made_by = made_by
    return dims


class Origins:
    """The axes of one call of a module.

    Args:
        inputs: The tensors that it is called with, in order, each once.

    Attributes:
        inputs: The dimensions of the inputs, each a new axis.
        made: How other axes were made.
        new: Axes of tokens that the module makes from no input (learned queries).
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = [fresh(tensor.shape) for tensor in inputs]
        # For each axis of an input, what ``origin`` returns, and when that was found.
        self._origins: tuple[Any, int, dict[Axis, tuple[int, int, int]]] = None, 0, {}
        self.made: dict[Axis, Made] = {}
        self.new: set[Axis] = set()
        # Axes of uninitialized tensors that nothing was written into yet.
        self._blank: set[Axis] = set()
        # For axes of tensors that are filled piece by piece: the pieces.
        self._pieces: dict[Axis, Pieces] = {}
        # For axes that hold an input's elements at unknown positions: the number of the input.
        self._losses: dict[Axis, int] = {}
        # For axes that come from an input: its number. Others are not cached, since they may come to be an input's.
        self._ranks: dict[Axis, int] = {}

    def origin(self, leaf: Axis) -> tuple[int, int, int] | None:
        """Which part of the inputs an axis is: the number of the input, its dimension, and the part of that dimension;
        ``None`` if it belongs to no input.
        """
        latest, count, found = self._origins
        if latest is not Axis.latest or count != len(self.inputs):
            found = {}
            for number, dims in enumerate(self.inputs):
                for place, dim in enumerate(dims):
                    for part, axis in enumerate(leaves(dim)):
                        found.setdefault(axis, (number, place, part))
            self._origins = Axis.latest, len(self.inputs), found
        return found.get(leaf)

    def number(self, leaf: Axis) -> int | None:
        """The number of the input that an axis belongs to, or ``None``."""
        found = self.origin(leaf)
        return None if found is None else found[0]

    def _earliest(self, own: Dims) -> tuple[int, bool]:
        """The number of the earliest input that a tensor comes from, and whether positions in it were lost."""
        rank, is_lost = len(self.inputs), False
        for leaf in all_leaves(own):
            # A tensor that unseen code has written to may hold tokens of any input.
            loss = self._loss(leaf)
            is_lost |= loss is not None
            rank = min(rank, self._rank_of(leaf), rank if loss is None else loss)
        return rank, is_lost

    def _loss(self, leaf: Axis) -> int | None:
        """The number of the input whose elements an axis holds at unknown positions; ``None`` if it does not."""
        if leaf.made_by:
            return 0
        if not self._losses:
            return None
        return next((self._losses[axis] for axis in leaf.wholes() if axis in self._losses), None)

    def _lost(self, found: Dims | None, dims: Dims) -> Dims | None:
        """The dimensions of a result, with its new axes noted as holding an input's elements at unknown positions."""
        if found is None:
            return None
        before = all_leaves(dims)
        new = [leaf for leaf in all_leaves(found) if leaf not in before and leaf not in self.made]
        if not new:
            return found
        rank = self._earliest(dims)[0]
        # A single generated token has no axis, so the tokens that the module kept (a cache) are joined with no input's
        # axis.
        if rank < len(self.inputs) or any(leaf in self.made for leaf in before):
            for leaf in new:
                if self._rank_of(leaf) == len(self.inputs):
                    self._losses.setdefault(leaf, rank)
        return found

    def _rank(self, dim: Dim) -> int:
        """The number of the input that a dimension comes from; the number of inputs if it comes from none."""
        rank = len(self.inputs)
        for leaf in leaves(dim):
            rank = min(rank, self._rank_of(leaf))
        return rank

    def _rank_of(self, leaf: Axis) -> int:
        if leaf in self._ranks:
            return self._ranks[leaf]
        origin, made = self.origin(leaf), self.made.get(leaf)
        none = len(self.inputs)
        found = origin[0] if origin is not None else none
        if made is not None:
            inside = [part for part, _ in made.parts if part is not None]
            inside += [(made.of,)] if made.of is not None else []
            inside += [made.has] if made.has is not None else []
            found = min([found, *map(self._rank, inside)])
        if found < none:
            self._ranks[leaf] = found
        return found

    def _one(self, parts: list[tuple[Dim | None, int]]) -> Dim:
        """The dimension that is made by concatenating pieces."""
        if len(parts) == 1 and parts[0][0] is not None:
            return parts[0][0]
        whole = self._whole_again(parts)
        if whole is not None:
            return whole
        axis = Axis(sum(size for _, size in parts))
        if any(dim is None or self.is_known(dim) for dim, _ in parts):
            self.made[axis] = Made(tuple(parts))
        return (axis,) if axis.size > 1 else ()

    def is_known(self, dim: Dim) -> bool:
        """True if a dimension comes from an input, at least in part."""
        return self._rank(dim) < len(self.inputs) or any(
            (made.of is not None and self.is_known((made.of,)))
            or (made.has is not None and (not leaves(made.has) or self.is_known(made.has)))
            for leaf in leaves(dim)
            if (made := self.made.get(leaf)) is not None
        )

    def has_loss(self, leaf: Axis) -> bool:
        """True if an axis holds tokens at unknown positions."""
        return self._loss(leaf) is not None

    def _has_losses(self, dim: Dim) -> bool:
        """True if a dimension holds tokens at unknown positions."""
        return any(self._loss(leaf) is not None for leaf in leaves(dim))

    def _is_regrouped(self, dim: Dim, others: Sequence[Dim]) -> bool:
        """True if a dimension differs from others, and holds tokens of an input but is no dimension of it as a whole."""
        if all(dim == other for other in others):
            return False
        own = leaves(dim)
        if all(own == leaves(other) for other in others):
            return False
        origins = [self.origin(leaf) for leaf in own]
        found = next((origin for origin in origins if origin is not None), None)
        return found is not None and own != leaves(self.inputs[found[0]][found[1]])

    def whole_of(self, leaf: Axis) -> Axis | None:
        """The axis that an axis is a part of, or ``None``."""
        made = self.made.get(leaf)
        return None if made is None else made.of

    def _whole_again(self, parts: list[tuple[Dim | None, int]]) -> Dim | None:
        """The axis that was cut into these pieces, if they are all of it, in order; otherwise ``None``."""
        place, whole = 0, None
        for dim, size in parts:
            own = (list(dim) if size == 1 else leaves(dim)) if dim is not None else []
            made = self.made.get(own[0]) if len(own) == 1 else None
            if made is None or made.of is None or made.part is None:
                return None
            if whole not in (None, made.of) or made.part.start != place or made.part.step != 1:
                return None
            whole, place = made.of, place + size
        return (whole,) if whole is not None and place == whole.size else None

    def _take_places(self, own: Dims, dims: Dims) -> bool:
        """True if written values have the same origin as the place they go to; blank axes take over their origin."""
        for mine, theirs in zip(reversed(own), reversed(dims), strict=False):
            place, source = leaves(mine), leaves(theirs)
            if len(place) == len(source) == 1 and place[0] in self._blank and place[0].size == source[0].size:
                place[0].unify_with(source[0])
            elif (blank := self._blank_part(place)) is not None:
                if not self._fill(*blank, theirs):
                    return False
            elif (
                source
                and (self.is_known(theirs) or self.is_known(mine))
                and self._signed(mine) != self._signed(theirs)
            ):
                return False
        return True

    def _blank_part(self, place: list[Axis]) -> tuple[Axis, Part] | None:
        """The blank axis that a place is part of, and which part of it the place is; ``None`` if there is no such axis."""
        made = self.made.get(place[0], Made()) if len(place) == 1 else Made()
        if made.of is None or made.part is None or made.part.step != 1 or made.of not in self._blank:
            return None
        return (made.of, made.part) if leaves((made.of,)) == [made.of] else None

    def _fill(self, blank: Axis, part: Part, source: Dim) -> bool:
        """Note a write into a part of a blank axis; False if that part was written before, from another origin."""
        pieces = self._pieces.setdefault(blank, Pieces())
        there = pieces.at(part.start, part.count)
        if there is not None:
            return self._signed(there) == self._signed(source)
        if not pieces.put(part.start, part.count, source):
            return False
        parts = pieces.all_of(blank.size)
        whole = self._whole_again(parts)
        if whole is not None:
            blank.unify_with(whole[0])
        elif any(self.is_known(dim) for dim, _ in parts):
            self.made[blank] = Made(tuple(parts))
        return True

    def _signed(self, dim: Dim) -> list[Any]:
        """A value that is equal for two dimensions with the same origin."""
        return [self.origin(leaf) or self._signed_made(leaf) for leaf in leaves(dim)]

    def _signed_made(self, leaf: Axis) -> Any:
        made = self.made.get(leaf, Made())
        if made.of is not None:
            return made.of, made.part
        if made.has is not None:
            return "slots", leaf.size, *self._signed(made.has)
        if made.parts:
            # For what the module kept, only the length counts: half of a key may be in one cache, half in another.
            known = [part if part is not None and self.is_known(part) else None for part, _ in made.parts]
            sizes = [size for _, size in made.parts]
            return "joined", *sizes, *(None if part is None else tuple(self._signed(part)) for part in known)
        return leaf
