"""Tells if a tensor's dimensions hold their elements in the order in which they were first seen.

The model's ``Sources`` have recorded how its views have split, permuted and merged them.
"""

from __future__ import annotations

from collections import Counter

from attnpatch.rows.graph.axes import Axis, Dim, Dims, leaves, size_of
from attnpatch.rows.graph.strides import Part
from attnpatch.rows.provenance.sources import Sources

# Stands for the first dimension, if it holds tokens and the second one sequences, as many as these.
SWAPPED = -1


class Order:
    """Examines the order of dimensions.

    Args:
        sources: Sources whose inputs are the tensors that have the model's order.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def why(self, dims: Dims) -> dict[int, str]:
        """The cause, for each dimension whose elements are in another order than before or in an unknown one.

        ``SWAPPED`` counts as such a dimension for those who take the first one for sequences.
        """
        found = {place: reason for place, dim in enumerate(dims) if (reason := self._reason(dim)) is not None}
        if (
            self._is_exchanged(dims)
            or self._is_spread(dims)
            or self._is_of_batch(dims)
            or self._is_of_parts(dims)
        ):
            found |= {place: "views" for place in range(len(dims)) if place not in found}
        return found | {SWAPPED: "views"} if self._is_swapped(dims) else found

    def sides(self, dim: Dim) -> list[tuple[int, list[int]]]:
        """The pieces that a dimension was concatenated from, in order: the length of each, and the lengths of the
        dimensions that were merged into it.

        The latter are ``[0]`` if one of them was cut or concatenated; empty if they are not known.
        """
        own = leaves(dim)
        pieces = [(dim, size_of(dim))] if len(own) != 1 else self._joined_from(own[0])
        return [(size, self._sides(leaves(piece or ()))) for piece, size in pieces]

    def _joined_from(self, axis: Axis, depth: int = 0) -> list[tuple[Dim | None, int]]:
        """The dimensions, and their lengths, that an axis was concatenated from, or a slice of such an axis has;
        ``None`` for those that are not known, or not complete.
        """
        made = self._sources.made.get(axis)
        if made is None or depth > 16:
            return [((axis,), axis.size)]
        found: list[tuple[Dim | None, int]] = []
        if made.of is not None and made.part is not None:
            place, start, end = 0, made.part.start, made.part.start + made.part.count
            for dim, size in self._joined_from(made.of, depth + 1) if made.part.step == 1 else ():
                low, high = max(start, place), min(end, place + size)
                found += [(dim if high - low == size else None, high - low)] if low < high else []
                place += size
        else:
            for dim, size in made.parts:
                own = leaves(dim or ())
                found += self._joined_from(own[0], depth + 1) if len(own) == 1 else [(dim, size)]
        return found or [((axis,), axis.size)]

    def _sides(self, own: list[Axis]) -> list[int]:
        found: dict[tuple[int, int], int] = {}
        for leaf in own:
            pieces = self._pieces(leaf)
            is_whole = len(pieces) == 1 and (pieces[0].count, pieces[0].step) == (pieces[0].of.size, 1)
            if not is_whole:
                return [0] if len(own) > 1 else []
            origin = self._sources.origin(pieces[0].of)
            if origin is None:
                return []
            found[origin[:2]] = found.get(origin[:2], 1) * leaf.size
        return list(found.values())

    def _reason(self, dim: Dim) -> str | None:
        found = leaves(dim)
        # Axes that were joined from pieces may have been split since.
        joined = [whole for leaf in found for whole in leaf.wholes() if whole in self._sources.made]
        reason = next((why for leaf in [*found, *joined] if (why := self._made_by(leaf)) is not None), None)
        is_moved = self._is_out_of_order(found) or any(self._is_out_of_order([whole]) for whole in joined)
        return reason or ("views" if is_moved else None)

    def _made_by(self, leaf: Axis, depth: int = 0) -> str | None:
        if leaf.made_by is not None or depth > 16:
            return leaf.made_by
        made = self._sources.made.get(leaf)
        if made is None:
            return None
        if made.part is not None and made.part.step != 1 and made.part.count > 1:
            return "views"
        inside = [*made.of.leaves()] if made.of is not None else []
        inside += [one for dim, _ in made.parts for one in leaves(dim or ())]
        return next((why for one in inside if (why := self._made_by(one, depth + 1)) is not None), None)

    def _is_of_batch(self, dims: Dims) -> bool:
        """True if sequences are partly in a dimension of tokens, and something else is in the batch dimension."""
        first = {found[0] for leaf in leaves(dims[0]) if (found := self._sources.origin(leaf)) is not None}
        for dim in dims[1:-1]:
            origins = [found for leaf in leaves(dim) if (found := self._sources.origin(leaf)) is not None]
            batches = {number for number, place, part in origins if (place, part) == (0, 0)} & first
            if any(number in batches and place for number, place, _ in origins):
                return True
        return False

    def _is_of_parts(self, dims: Dims) -> bool:
        """True if a sequence is a part of one of the model's (a window, a chunk), or a column of its pictures.

        The number of sequences does not always tell: there may be as many windows as channels.
        """
        batch, tokens = set(leaves(dims[0])), {leaf for dim in dims[1:-1] for leaf in leaves(dim)}
        if any(batch & own and tokens & own for own in (set(leaves((axis,))) for axis in self._sources.made)):
            return True
        for given in self._sources.inputs:
            wholes = [set(leaves(whole)) for whole in given[1:]]
            if any(whole & batch and whole & tokens for whole in wholes):
                return True
        of_batch, of_tokens = (
            {found[:2] for leaf in side if (found := self._sources.origin(leaf)) is not None}
            for side in (batch, tokens)
        )
        inner = {found for found in of_batch if found[1] > 0}
        # Tokens may come before the batch as a whole.
        is_transposed = any(place == 0 for _, place in of_tokens) and len(of_batch) == len(inner)
        if not inner or is_transposed:
            return False
        return any(place > 0 and (number, place) < max(inner) for number, place in of_tokens)

    def _is_swapped(self, dims: Dims) -> bool:
        """True if the first two dimensions, sequences and as many tokens, have changed places."""
        return len(dims) > 2 and any(
            len(own) > 2
            and size_of(own[0]) == size_of(own[1]) > 1
            and leaves(own[0]) == leaves(dims[1])
            and leaves(own[1]) == leaves(dims[0])
            for own in self._sources.inputs
        )

    def _is_exchanged(self, dims: Dims) -> bool:
        """True if a sequence's tokens lie along channels and its channels where the tokens were, as many as these."""
        return len(dims) == 3 and any(
            len(own) == 3
            and size_of(own[1]) == size_of(dims[1]) > 1
            and any(leaf.made_by is None and leaf in leaves(own[1]) for leaf in leaves(dims[2]))
            and not set(leaves(own[1])) & set(leaves(dims[1]))
            for own in self._sources.inputs
        )

    def _is_spread(self, dims: Dims) -> bool:
        """True if a dimension was split and its parts are in several dimensions, in another order than before."""
        for own in self._sources.inputs:
            flat = [
                (place, part, at)
                for at, dim in enumerate(dims[:-1])
                for leaf in leaves(dim)
                for place, whole in enumerate(own[:-1])
                for part, one in enumerate(leaves(whole))
                if one is leaf
            ]
            spread = {
                place for place, _, at in flat for other, _, there in flat if other == place and there != at
            }
            if spread and [each[:2] for each in flat] != sorted(each[:2] for each in flat):
                return True
        return False

    def _is_out_of_order(self, dim: list[Axis]) -> bool:
        pieces = [piece for leaf in dim for piece in self._pieces(leaf)]
        for axis in {piece.of for piece in pieces}:
            own = [piece for piece in pieces if piece.of is axis]
            start = sum(piece.count for piece in pieces[: pieces.index(own[0])])
            if start != own[0].start and axis.size == sum(piece.count for piece in pieces) > own[0].count:
                return True  # shifted, with elements cut off
            if len(own) > 1 and (
                any(piece.step != 1 for piece in own) or own != sorted(own, key=lambda p: p.start)
            ):
                return True
        origins = [found for leaf in dim if (found := self._sources.origin(leaf)) is not None]
        if len(origins) < 2:
            return False
        numbers = {number for number, _, _ in origins}
        by_number = ([found for found in self._in_order(origins) if found[0] == number] for number in numbers)
        return any(own != sorted(own) for own in by_number)

    def _in_order(self, origins: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """The origins whose order matters; parts of channels are left out.

        Parts of channels may be between rows and columns (pixel shuffle). A part counts as channels in two cases: the
        first part of its dimension is missing, or it is of the last dimension and another dimension is complete.
        """
        inputs, counts = self._sources.inputs, Counter(found[:2] for found in origins)
        whole = {(n, place) for n, place in counts if counts[n, place] == len(leaves(inputs[n][place]))}
        numbers_of_whole = {number for number, _ in whole}
        found = []
        for number, place, part in origins:
            is_channels = place == len(inputs[number]) - 1 and number in numbers_of_whole
            if (number, place) in whole or (not is_channels and (number, place, 0) in origins):
                found.append((number, place, part))
        return found

    def _pieces(self, axis: Axis) -> list[Part]:
        """The parts that an axis consists of, in order; they are parts of axes that were not joined themselves."""
        made = self._sources.made.get(axis)
        if made is not None and made.of is not None and made.part is not None:
            return _piece(self._pieces(made.of), made.part)
        if made is None or not made.parts:
            return [Part(axis, 0, axis.size, 1)]
        found: list[Part] = []
        for dim, size in made.parts:
            own = (list(dim) if size == 1 else leaves(dim)) if dim is not None else []
            found += self._pieces(own[0]) if len(own) == 1 else [Part(Axis(size), 0, size, 1)]
        return found


def _piece(parts: list[Part], piece: Part) -> list[Part]:
    """The parts that a slice takes from a sequence of parts."""
    if piece.step != 1:
        return [piece]
    found, place = [], 0
    for part in parts:
        low, high = max(piece.start, place), min(piece.start + piece.count, place + part.count)
        if low < high:
            found.append(Part(part.of, part.start + (low - place) * part.step, high - low, part.step))
        place += part.count
    return _joined(found)


def _joined(parts: list[Part]) -> list[Part]:
    """The parts, with each part that continues the previous one merged into it."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else Part(Axis(0), 0, 0, 1)
        goes_on = last.of is part.of and last.step == part.step == 1 and last.start + last.count == part.start
        if goes_on:
            found[-1] = Part(last.of, last.start, last.count + part.count, 1)
        else:
            found.append(part)
    return found
