"""What is known of axes: which are a module's inputs', and what became of others on their way through its functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, fresh, leaves
from attnpatch.rows.graph.strides import Part
from attnpatch.rows.provenance.filled_in_pieces import Pieces


@dataclasses.dataclass(frozen=True)
class Made:
    """An axis that is no input's, or no longer: joined of others, part of one, or made by the module.

    Attributes:
        parts: What it was joined from, in order: axes, ``None`` where they are not known, and how many.
        of: What it is a part of; ``None``: of nothing known.
        part: Which part.
        has: What was written into it, where it was there before (a cache of fixed size).
        is_of_others: Whether it is of sequences of which the queries are one, and the keys another.
    """

    parts: tuple[tuple[Dim | None, int], ...] = ()
    of: Axis | None = None
    part: Part | None = None
    has: Dim | None = None
    is_of_others: bool = False


class Origins:
    """The axes of one call of a module.

    Args:
        inputs: The tensors that it is called with, in order, each once.

    Attributes:
        inputs: Their dimensions, every one an axis of its own.
        made: What became of other axes.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = [fresh(tensor.shape) for tensor in inputs]
        self.made: dict[Axis, Made] = {}
        # Of tensors that nothing was written into yet.
        self._blank: set[Axis] = set()
        # Of those that are filled piece by piece.
        self._pieces: dict[Axis, Pieces] = {}
        # Of axes that hold an input's elements in places that are not known: the number of the input.
        self._losses: dict[Axis, int] = {}
        # The number of the input that an axis is of. Only of those that are one's: others may yet become one's.
        self._ranks: dict[Axis, int] = {}

    def origin(self, leaf: Axis) -> tuple[int, int, int] | None:
        """Of which input an axis is, of which of its dimensions, and which part of that; ``None``: of none."""
        for number, dims in enumerate(self.inputs):
            for place, dim in enumerate(dims):
                parts = leaves(dim)
                if leaf in parts:
                    return number, place, parts.index(leaf)
        return None

    def number(self, leaf: Axis) -> int | None:
        """Of which input an axis is."""
        found = self.origin(leaf)
        return None if found is None else found[0]

    def _earliest(self, own: Dims) -> tuple[int, bool]:
        """The number of the earliest input that a tensor was made of, and whether it is lost where in it."""
        none = len(self.inputs)
        rank = min(map(self._rank, own), default=none)
        axes = [leaf for dim in own for leaf in leaves(dim)]
        # What was written over unseen may be tokens of any input.
        lost = min((0 if leaf.made_by else self._losses.get(leaf, none) for leaf in axes), default=none)
        return min(rank, lost), lost < none

    def _lost(self, found: Dims | None, dims: Dims) -> Dims | None:
        """Dimensions of a result, of which new ones are places in a tensor that are not known any more."""
        if found is not None and (rank := self._earliest(dims)[0]) < len(self.inputs):
            for leaf in (leaf for dim in found for leaf in leaves(dim)):
                if leaf not in self.made and self._rank_of(leaf) == len(self.inputs):
                    self._losses.setdefault(leaf, rank)
        return found

    def _rank(self, dim: Dim) -> int:
        """The number of the input that it comes from; as many as there are: of none."""
        return min(map(self._rank_of, leaves(dim)), default=len(self.inputs))

    def _rank_of(self, leaf: Axis) -> int:
        if leaf in self._ranks:
            return self._ranks[leaf]
        origin = self.origin(leaf)
        made = self.made.get(leaf, Made())
        inside = [part for part, _ in made.parts if part is not None]
        inside += [(made.of,)] if made.of is not None else []
        inside += [made.has] if made.has is not None else []
        none = len(self.inputs)
        found = min([origin[0] if origin is not None else none, *map(self._rank, inside)])
        if found < none:
            self._ranks[leaf] = found
        return found

    def _one(self, parts: list[tuple[Dim | None, int]]) -> Dim:
        """The dimension of pieces that lie one after the other."""
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
        """Whether something of it is an input's."""
        return self._rank(dim) < len(self.inputs) or any(
            (made.of is not None and self.is_known((made.of,)))
            or (made.has is not None and (not leaves(made.has) or self.is_known(made.has)))
            for leaf in leaves(dim)
            if (made := self.made.get(leaf)) is not None
        )

    def _whole_again(self, parts: list[tuple[Dim | None, int]]) -> Dim | None:
        """The axis that was cut into these pieces, if they are all of it in its order."""
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
        """Whether what is written comes from where it goes to; what is blank takes over where it comes from."""
        for mine, theirs in zip(reversed(own), reversed(dims), strict=False):
            place, source = leaves(mine), leaves(theirs)
            if len(place) == len(source) == 1 and place[0] in self._blank and place[0].size == source[0].size:
                place[0].become(source[0])
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
        """The blank axis that a place is a piece of, and which; ``None``: of none."""
        made = self.made.get(place[0], Made()) if len(place) == 1 else Made()
        if made.of is None or made.part is None or made.part.step != 1 or made.of not in self._blank:
            return None
        return (made.of, made.part) if leaves((made.of,)) == [made.of] else None

    def _fill(self, blank: Axis, part: Part, source: Dim) -> bool:
        """Write into a piece of a blank axis, which so is joined of such pieces; whether it held nothing else there."""
        pieces = self._pieces.setdefault(blank, Pieces())
        there = pieces.at(part.start, part.count)
        if there is not None:
            return self._signed(there) == self._signed(source)
        if not pieces.put(part.start, part.count, source):
            return False
        parts = pieces.all_of(blank.size)
        whole = self._whole_again(parts)
        if whole is not None:
            blank.become(whole[0])
        elif any(self.is_known(dim) for dim, _ in parts):
            self.made[blank] = Made(tuple(parts))
        return True

    def _signed(self, dim: Dim) -> list[Any]:
        """Where a dimension comes from, alike for the same part of one input, and for what was joined of the same."""
        return [self.origin(leaf) or self._signed_made(leaf) for leaf in leaves(dim)]

    def _signed_made(self, leaf: Axis) -> Any:
        made = self.made.get(leaf, Made())
        if made.of is not None:
            return made.of, made.part
        if made.has is not None:
            return "slots", leaf.size, *self._signed(made.has)
        if made.parts:
            # Of what the module kept there is only the length: half of a key may lie in one cache, half in another.
            known = [part if part is not None and self.is_known(part) else None for part, _ in made.parts]
            sizes = [size for _, size in made.parts]
            return "joined", *sizes, *(None if part is None else tuple(self._signed(part)) for part in known)
        return leaf
