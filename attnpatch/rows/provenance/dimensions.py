"""Determines which dimensions of attention are sequences, heads, queries and keys, and from which input they come.

Nothing is assumed that was not followed (``sources.py``). The result is a ``Layout``, or the reason why there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from attnpatch.observing import CAPTURE_ALONE, INPUT, KEPT, PART, SLOTS, Layout, Piece
from attnpatch.rows.graph.axes import Axis, Dim, leaves
from attnpatch.rows.provenance.origins import Made
from attnpatch.rows.provenance.reordered.function_tables import IN_ANOTHER_ORDER
from attnpatch.rows.provenance.reordered.token_order import SWAPPED
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.unseen_writes import UNSEEN_WAYS

# The size of a dimension, and the axes it comes from; ``None``: not known.
Entry = tuple[int, Dim | None]
# Where tokens come from, in order, each with its dimensions of the input.
Found = list[tuple[Piece, tuple[int, ...]]]


class Unknown(Exception):
    """A fact that a map depends on is not known; the message says which."""


# By the number of an input's dimensions: their possible roles, as indices of batch, tokens, heads, and channels.
_PATTERNS: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]]] = {
    2: [((), (0,), (), 1)],
    3: [((0,), (1,), (), 2), ((1,), (0,), (), 2), ((0,), (2,), (), 1)],
    4: [((0,), (2, 3), (), 1), ((0,), (1, 2), (), 3), ((0,), (2,), (1,), 3), ((0,), (1,), (2,), 3)],
    5: [((0,), (2, 3, 4), (), 1), ((0,), (1, 2, 3), (), 4)],
}


class _Reading:
    """Tells the axes of one attention apart."""

    def __init__(self, sources: Sources, contracted: Sequence[Axis]) -> None:
        self.sources = sources
        self.summed = {found[:2] for leaf in contracted if (found := sources.origin(leaf)) is not None}
        self.has_made_channels = any(sources.origin(leaf) is None for leaf in contracted)
        self.has_made_heads = False
        self.key_batch: Axis | None = None

    def is_head(self, leaf: Axis) -> bool:
        """True if an axis is made by a layer, or is a part of an input's channels, over which the product sums."""
        found = self.sources.origin(leaf)
        if found is None:
            whole = self.sources.whole_of(leaf) if leaf.size == 1 else None
            return not self.sources.is_known((whole or leaf,))
        number, place, _ = found
        parts = leaves(self.sources.inputs[number][place])
        return len(parts) > 1 and (number, place) in self.summed

    def _made(self, leaf: Axis) -> Made | None:
        return self.sources.made.get(leaf)

    def _split(self, found: list[Axis]) -> tuple[Axis, Made] | None:
        """The axis, made by the module, that a reshape has split into exactly these parts; otherwise ``None``."""
        if any(self.sources.origin(leaf) is not None for leaf in found):
            return None
        return next((pair for pair in self.sources.made.items() if pair[0].leaves() == found), None)

    def tokens(self, found: Sequence[Axis], side: str) -> Found:
        """Find which tokens some axes hold: pieces in order, each with its dimensions of the input.

        Raises:
            Unknown: They are not tokens, or it is not known which.
        """
        if len(found) == 1 and (made := self._made(found[0])) is not None:
            return self._of_made(found[0], made, side)
        if len(found) > 1 and (whole := self._split(list(found))) is not None:
            return self._of_made(*whole, side)
        origins = [self.sources.origin(leaf) for leaf in found]
        if any(origin is None for origin in origins):
            raise Unknown(f"its {side} are computed inside it (pooled, learned or mixed), not given to it")
        numbers = {origin[0] for origin in origins if origin is not None}
        if len(numbers) != 1:
            raise Unknown(f"its {side} combine tokens of {len(numbers)} inputs in one dimension")
        (number,) = numbers
        dims = self.sources.inputs[number]
        places = tuple(dict.fromkeys(origin[1] for origin in origins if origin is not None))
        whole = [leaf for place in places for leaf in leaves(dims[place])]
        if side == "keys" and places[0] == 0 and len(whole) == len(found) + 1 and whole[1:] == list(found):
            self.key_batch = whole[0]  # several pictures per sequence, one sequence after the other
        elif list(found) != whole:
            raise Unknown(
                f"its {side} are some tokens of an input, or all of them in another order (windows, for example)"
            )
        return [(Piece(INPUT, number, math.prod(leaf.size for leaf in found)), places)]

    def _of_made(self, leaf: Axis, made: Made, side: str) -> Found:
        if made.has is not None:
            inside = self.tokens(leaves(made.has), side) if leaves(made.has) else [(Piece(INPUT, -1, 1), ())]
            if len(inside) != 1:
                raise Unknown(f"its {side} were concatenated and then written to a buffer of fixed size")
            return [(Piece(SLOTS, inside[0][0].number, leaf.size), inside[0][1])]
        memory = self._made(made.of) if made.of is not None else None
        if (
            memory is not None
            and memory.has is not None
            and made.part
            and (made.part.start, made.part.step) == (0, 1)
        ):
            ((piece, places),) = self._of_made(leaf, memory, side)
            return [(piece, places)]
        if made.of is not None:
            return [self._part(leaf, made, side)]
        pieces: Found = []
        for dim, size in made.parts:
            if dim is None or (size > 1 and all(self.is_head(one) for one in leaves(dim))):
                pieces.append((Piece(KEPT, -1, size), ()))
            elif size == 1 and not leaves(dim):
                # A single token has no axis; the other pieces tell which input it belongs to.
                pieces.append((Piece(INPUT, -1, 1), ()))
            else:
                pieces += self.tokens(leaves(dim), side)
        return pieces

    def _part(self, leaf: Axis, made: Made, side: str) -> tuple[Piece, tuple[int, ...]]:
        """Some of the tokens of an input.

        Raises:
            Unknown: They are not consecutive, or are parts of something else.
        """
        assert made.of is not None
        ((piece, places), *others) = self.tokens(leaves((made.of,)), side)
        if others or piece.kind not in (INPUT, PART) or made.part is None or made.part.step != 1:
            raise Unknown(_only(leaf.size, made.of.size, side))
        start, of = piece.start + made.part.start, piece.of or piece.length
        return Piece(PART, piece.number, leaf.size, start, of), places


def _only(count: int, of: int, side: str) -> str:
    return f"its {side} are only {count} of {of} tokens (windows, chunks, pooled or cut off)"


def layout_of(
    sources: Sources,
    leads: Sequence[Entry],
    rows: Sequence[Entry],
    keys: Sequence[Entry],
    contracted: Sequence[Axis],
) -> Layout:
    """The layout of an attention, or a layout with the reason why it is not known.

    Args:
        sources: The sources of the module's call.
        leads: The leading dimensions, in order.
        rows: The dimensions of queries, in order.
        keys: The dimensions of keys, in order.
        contracted: The axes over which the product of query and key sums.
    """
    sizes = [math.prod(size for size, _ in side) for side in (leads, rows, keys)]
    try:
        return _layout(_Reading(sources, contracted), leads, rows, keys)
    except Unknown as reason:
        return Layout(1, sizes[0], sizes[1], sizes[2], why_not=str(reason))


def _followed(sources: Sources, entries: Sequence[Entry], side: str) -> list[Axis]:
    if any(dim is None for _, dim in entries):
        raise Unknown(f"its {side} come from an operation that attnpatch cannot follow")
    found = [leaf for _, dim in entries for leaf in leaves(dim or ())]
    # A dimension of size 1 has an axis if it is a part of a known one, so that it is known which token it holds.
    ones = [leaf for n, dim in entries if n == 1 for leaf in dim or () if leaf not in found]
    found += [one for one in ones if (of := sources.whole_of(one)) is not None and sources.is_known((of,))]
    if any(leaf.made_by is not None for leaf in found):
        raise Unknown(f"its {side} were overwritten by {UNSEEN_WAYS}")
    return found


def _layout(read: _Reading, leads: Sequence[Entry], rows: Sequence[Entry], keys: Sequence[Entry]) -> Layout:
    inner = [_followed(read.sources, [entry], "queries") for entry in rows]
    head_rows = tuple(i for i, own in enumerate(inner) if own and all(map(read.is_head, own)))
    outer = _followed(read.sources, leads, "heads") + [leaf for i in head_rows for leaf in inner[i]]
    if any(made.is_of_others for leaf in outer if (made := read.sources.made.get(leaf)) is not None):
        raise Unknown("its keys are of other sequences or windows than its queries, or in another order")
    token_axes = [leaf for i, own in enumerate(inner) if i not in head_rows for leaf in own]
    if any(map(read.is_head, token_axes)):
        raise Unknown("its query rows combine tokens and heads in one dimension")
    kept = [size for size, dim in keys if dim is None]
    key_axes = [] if kept else _followed(read.sources, keys, "keys")
    is_head = [read.is_head(leaf) for leaf in outer]
    read.has_made_heads = any(
        read.sources.origin(leaf) is None for leaf, head in zip(outer, is_head, strict=True) if head
    )
    batch_axes = [leaf for leaf, head in zip(outer, is_head, strict=True) if not head]
    queries = read.tokens(token_axes, "queries") if token_axes else []
    number, batch_places, head_places = _query_input(read, queries, batch_axes)
    queries = queries or [(Piece(INPUT, number, 1), ())]
    if kept:
        key_pieces = [(Piece(KEPT, -1, math.prod(size for size, _ in keys)), ())]
    else:
        key_pieces = read.tokens(key_axes, "keys") if key_axes else [(Piece(INPUT, number, 1), ())]
    _check_parts(queries, key_pieces)
    _check_keys(read, key_pieces, number)
    tokens = [
        (piece.number, place)
        for piece, its in (*queries, *key_pieces)
        if piece.kind != KEPT
        for place in its or ([1] if piece.number in read.sources.moved else [])
    ]
    firsts = (*batch_places, SWAPPED) if 0 in batch_places else batch_places
    _check_order(read, [*((number, place) for place in firsts), *tokens])
    if head_places and any(piece.number == number and piece.kind == INPUT for piece, _ in key_pieces):
        # An input may have a dimension of heads only if queries and keys are separate inputs.
        raise Unknown("it attends along one dimension of three, which may be rows of an image, or heads")
    dims = read.sources.inputs[number]
    own_batch = [leaf for place in batch_places for leaf in leaves(dims[place])]
    own_heads = [leaf for place in head_places for leaf in leaves(dims[place])]
    if any(leaf not in own_batch and leaf not in own_heads for leaf in batch_axes):
        raise Unknown(
            "it attends separately along several dimensions of its input (windows, or rows of an image)"
        )
    if [leaf for leaf in outer if leaf in own_batch] != own_batch:
        raise Unknown("its batch dimension does not hold each sequence once and in order")
    batch = math.prod(leaf.size for leaf in own_batch)
    if read.key_batch is not None and read.key_batch.size != batch:
        raise Unknown("its keys are only some of the tokens (windows, for example)")
    for piece, places in key_pieces:
        if (
            piece.number != number
            and places[:1] == (0,)
            and len(places) > 1
            and read.key_batch is None
            and batch > 1
        ):
            raise Unknown("its keys are the tokens of all sequences together")
    return Layout(
        batch,
        math.prod(leaf.size for leaf in outer) // batch,
        math.prod(size for i, (size, _) in enumerate(rows) if i not in head_rows),
        math.prod(size for size, _ in keys),
        _named(queries, number),
        _named(key_pieces, number),
        _numbers(outer, own_batch),
        head_rows,
    )


def _named(pieces: Sequence[tuple[Piece, tuple[int, ...]]], number: int) -> tuple[Piece, ...]:
    """Assign single tokens without an axis to the input of the queries."""
    return tuple(
        dataclasses.replace(piece, number=number) if piece.kind != KEPT and piece.number < 0 else piece
        for piece, _ in pieces
    )


def _query_input(
    read: _Reading, queries: Found, batch_axes: list[Axis]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The input whose tokens the queries are (the first of several), with its dimensions of sequences and of heads."""
    own = [
        (piece.number, places)
        for piece, places in queries
        if piece.kind in (INPUT, PART) and piece.number >= 0
    ]
    if not own and queries:
        raise Unknown("its queries are kept by the module (learned, or cached) and are no tokens of an input")
    leads = [found for leaf in batch_axes if (found := read.sources.origin(leaf)) is not None]
    # If the tokens come from several inputs, take the one whose sequences are followed.
    first = next((pair for pair in own if pair[0] in {lead[0] for lead in leads}), own[0] if own else None)
    number, places = first or (leads[0][0] if leads else 0, ())
    if number >= len(read.sources.inputs):
        raise Unknown("none of its arguments is a tensor of tokens")
    for other, there in own:
        if other != number and _pattern(read, other, there, None) is None:
            raise Unknown("its queries are concatenated along dimensions that are not known to be tokens")
    given = tuple(dict.fromkeys(place for at, place, _ in leads if at == number))
    found = _pattern(read, number, places, given)
    if found is None:
        if not places and queries == []:
            raise Unknown(
                "its queries are not all tokens of an input in order (pooled, sorted, moved, learned or mixed)"
            )
        if not leads and _pattern(read, number, places, None) is not None:
            raise Unknown("it moves, picks, joins or pools sequences (such as windows), which are not known")
        shape = [math.prod(axis.size for axis in dim) for dim in read.sources.inputs[number]]
        raise Unknown(
            f"its queries lie along dimension {', '.join(map(str, places)) or 'none'} of its input of shape {shape}, which "
            "may be channels, windows or rows of an image"
        )
    return (number, *found)


def _pattern(
    read: _Reading, number: int, rows: tuple[int, ...], leads: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dimensions of an input that are sequences and heads, given those that are tokens; ``None``: none fit."""
    dims = read.sources.inputs[number]
    large = {place for place, dim in enumerate(dims) if math.prod(axis.size for axis in dim) > 1}
    for batch, tokens, heads, channel in _PATTERNS.get(len(dims), []):
        if tuple(place for place in tokens if place in large) != rows:
            continue
        if leads is not None and not set(batch) & large <= set(leads) <= {*batch, *heads}:
            continue
        is_summed = leads is None or (number, channel) in read.summed
        if heads and (read.has_made_channels or read.has_made_heads or not is_summed):
            continue  # the module makes its own heads, so this dimension is rows of an image
        if len(dims) == 3 and channel == 1 and (not read.has_made_channels or (number, 1) in read.summed):
            continue  # channels that no layer has mixed may also be tokens
        return batch, heads
    return None


def _check_parts(queries: Found, keys: Found) -> None:
    """Raise ``Unknown`` if some tokens of an input attend to others than themselves, or the other way round."""
    for side, (piece, _) in (*(("queries", one) for one in queries), *(("keys", one) for one in keys)):
        if piece.kind == PART and not (queries == keys and len(keys) == 1):
            raise Unknown(_only(piece.length, piece.of, side))


def _check_keys(read: _Reading, pieces: Sequence[tuple[Piece, tuple[int, ...]]], number: int) -> None:
    for piece, places in pieces:
        # Several pictures of one sequence: ``[pictures, tokens, channels]``.
        if piece.number != number and places == (0, 1) and len(read.sources.inputs[piece.number]) == 3:
            continue
        if piece.kind in (INPUT, PART) and places and _pattern(read, piece.number, places, None) is None:
            raise Unknown(
                "its keys lie along a dimension of an input that may be channels, windows or rows of an image"
            )


def _check_order(read: _Reading, dims: Iterable[tuple[int, int]]) -> None:
    """Raise ``Unknown`` unless dimensions of inputs are known to be in the order of the model's own inputs."""
    moved = read.sources.moved
    name = next((moved[number][place] for number, place in dims if place in moved.get(number, {})), None)
    if name is not None:
        cause = f"come from {name}, and no tokens in order were added afterwards"
        if name in IN_ANOTHER_ORDER:
            cause = f"were put into another order ({name}) before it was called"
        known = f"it is not known which of the model's tokens they are{CAPTURE_ALONE}"
        raise Unknown(f"its tokens or sequences {cause}, so {known}")


def _numbers(outer: list[Axis], batch: list[Axis]) -> torch.Tensor | None:
    """For each flat leading index, the index it would have if sequences came first; ``None`` if they do come first."""
    order = [*batch, *(leaf for leaf in outer if leaf not in batch)]
    if order == outer or not outer:
        return None
    sizes = [leaf.size for leaf in order]
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    return numbers.permute([order.index(leaf) for leaf in outer]).reshape(-1)
