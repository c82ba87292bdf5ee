"""Finds which token of a text encoder each row of a tensor is: by value, or, if its values were changed, by position.

Users change embeddings: they scale those of a word, mix them with those of an empty text, or concatenate encodings.
Most rows keep their values or their direction. A changed row between them is taken for the token at that position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Number of features that are compared first, before all of them.
_FIRST = 16
# The largest number of encodings in one mixture, and the share of a row below which an encoding is not part of it.
_MOST_MIXED, _SHARE = 6, 0.02
CHANGED = "its embedding, like most of the prompt's, was changed to one that no text encoder returned"
OTHER = "its place holds the embedding of another token"


@dataclasses.dataclass
class Encoded:
    """One row that a text encoder was called with.

    Attributes:
        tokenizer: The encoder's tokenizer.
        ids: Token ids.
        real: Number of tokens that are not padding.
        states: Tensors ``[tokens, width]`` that it returned; the denoiser may be given one of them.
        is_own: True if the encoder ran inside a call of the pipeline, for the texts of that call.
    """

    tokenizer: Any
    ids: list[int]
    real: int
    states: list[torch.Tensor]
    is_own: bool = True

    def special(self) -> frozenset[int]:
        """Ids of special tokens. The token for an unknown word counts as text."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
        marks = {getattr(self.tokenizer, name, None) for name in names}
        unknown = {getattr(self.tokenizer, "unk_token_id", None)} - marks
        return frozenset(getattr(self.tokenizer, "all_special_ids", ())) - unknown


@dataclasses.dataclass
class Piece:
    """Rows that hold tokens of one encoding.

    Attributes:
        encoded: That encoding.
        state: The index of the state, among the encoding's states.
        offset: The first feature of a row at which that state begins.
        places: int64 ``[rows]``: the token of each row; -1 for none.
        shift: Token index minus row index, for most of the rows.
        doubts: By row, why it may not hold its token after all.
    """

    encoded: Encoded
    state: int
    offset: int
    places: torch.Tensor
    shift: int
    doubts: dict[int, str] = dataclasses.field(default_factory=dict)


def pieces_of(given: torch.Tensor, encodings: Sequence[Encoded], offsets: Sequence[int]) -> list[Piece]:
    """The pieces of one encoder's text.

    Args:
        given: ``[rows, width]``: the denoiser's text input.
        encodings: The encoder's recorded calls.
        offsets: Features at which its states may begin.
    """
    found: list[Piece] = []
    free = torch.ones(len(given), dtype=torch.bool)
    for alike in (_equal, _parallel):
        tables = [
            (encoded, state, offset, alike(given[:, offset : offset + values.shape[1]], values))
            for encoded, state, offset, values in _states(given, encodings, offsets)
        ]
        while bool(free.any()):
            pieces = [Piece(*which, *_placed(same, free)) for *which, same in tables]
            best = max(pieces, key=lambda piece: _count(piece.places), default=None)
            if best is None or _count(best.places) < _least(best.encoded, len(given)):
                break
            found.append(best)
            free &= best.places < 0
    found = found or _mixed(given, encodings, offsets)
    for piece in found:
        _fill(given, piece, encodings, free)
    return found


def _states(
    given: torch.Tensor, encodings: Sequence[Encoded], offsets: Sequence[int]
) -> Iterator[tuple[Encoded, int, int, torch.Tensor]]:
    for encoded in encodings:
        for number, state in enumerate(encoded.states):
            for offset in offsets:
                width = state.shape[1] if offset else min(state.shape[1], given.shape[1])
                if offset + width <= given.shape[1]:
                    yield encoded, number, offset, state[:, :width].to(given)


def _least(encoded: Encoded, rows: int) -> int:
    """The number of tokens that must be found.

    More than one token, because a causal encoder gives every text the same values for its first token, and T5's empty
    text is one token.
    """
    return max(min(2, encoded.real), min(encoded.real, rows) // 2)


def _equal(given: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bool ``[rows, tokens]``: True where a row equals a token's values."""
    same = (given[:, None, :_FIRST] == values[None, :, :_FIRST]).all(-1) & values.bool().any(-1)
    rows, tokens = same.nonzero().T
    same[rows, tokens] = (given[rows] == values[tokens]).all(-1)
    return same.cpu()


def _parallel(given: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bool ``[rows, tokens]``: True where a row is a positive multiple of a token's values."""
    if values.shape[1] < _FIRST:
        return torch.zeros(len(given), len(values), dtype=torch.bool)
    one, other = (torch.nn.functional.normalize(each.float(), dim=1) for each in (given, values))
    # 1 - cosine is half the squared angle, and rounding turns a row by an angle below the dtype's precision.
    return (one @ other.T > 1 - max((torch.finfo(given.dtype).eps / 2) ** 2, 4e-6)).cpu()


def _placed(same: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Match rows to tokens in runs that have the encoder's order, the longest run first.

    Args:
        same: Bool ``[rows, tokens]``: which may match.
        free: Bool ``[rows]``: rows without a token so far.

    Returns:
        int64 ``[rows]``: the token of each row, -1 for none; and the longest run's token index minus row index.
    """
    place, shift = torch.full((len(free),), -1), None
    same = same & free[:, None]
    while bool(same.any()):
        rows, tokens = same.nonzero().T
        shifts, counts = (tokens - rows).unique(return_counts=True)
        most = int(shifts[counts.argmax()])
        rows, tokens = rows[tokens - rows == most], tokens[tokens - rows == most]
        place[rows] = tokens
        same[rows] = False
        same[:, tokens] = False
        shift = most if shift is None else shift
    return place, shift or 0


def _mixed(given: torch.Tensor, encodings: Sequence[Encoded], offsets: Sequence[int]) -> list[Piece]:
    """A piece whose rows are all sums of encodings, token by token; used if no row has a token's own values."""
    best: tuple[tuple[int, int], Piece] | None = None
    for encoded, number, offset, values in _states(given, encodings, offsets):
        tokens, words = len(values), sum(each not in encoded.special() for each in encoded.ids)
        last = max(0, len(given) - tokens)
        for start in {*range(0, last + 1, tokens), last}:
            piece = Piece(encoded, number, offset, torch.full((len(given),), -1), -start)
            rows = torch.arange(start, min(start + tokens, len(given)))
            shares = _shares(given, piece, encodings, rows)
            known = 0 if shares is None else int(shares[1].sum())
            # The words of a mixture are taken from the encoding that has most of them.
            if known >= max(2, 3 * len(rows) // 4) and (best is None or (known, words) > best[0]):
                best = (known, words), piece
    return [] if best is None else [best[1]]


def _fill(given: torch.Tensor, piece: Piece, encodings: Sequence[Encoded], free: torch.Tensor) -> None:
    """Give rows without a token's values the token at their position; note doubts if most of them match nothing."""
    ids, taken = piece.encoded.ids, set(piece.places[piece.places >= 0].tolist())
    inside = torch.arange(len(given)) + piece.shift
    rows = [
        r
        for r in free.nonzero().flatten().tolist()
        if 0 <= inside[r] < len(ids) and int(inside[r]) not in taken
    ]
    if not rows:
        return
    numbers = torch.tensor(rows)
    piece.places[numbers] = inside[numbers]
    free[numbers] = False
    shares = _shares(given, piece, encodings, numbers)
    # Only tokens of words count: the padding of another text may be the same.
    special, unknown = piece.encoded.special(), []
    known = sum(ids[token] not in special for token in taken)
    for place, row in enumerate(rows):
        token = ids[int(inside[row])]
        if token in special:
            continue
        if shares is not None and bool(shares[1][place]):
            parts = zip(shares[0], shares[2][place].tolist(), strict=True)
            among = {each.ids[int(inside[row])] for each, has_part in parts if has_part}
        else:
            among = _ids_with_values_of(given[row], piece, encodings)
            unknown += [row] if bool(given[row].any()) and not among else []
        if among and (among - special or among) != {token}:
            piece.doubts[row] = OTHER
        known += bool(among) and row not in piece.doubts
    if len(unknown) > known:
        piece.doubts.update(dict.fromkeys(unknown, CHANGED))


def _ids_with_values_of(row: torch.Tensor, piece: Piece, encodings: Sequence[Encoded]) -> set[int]:
    """Ids of the tokens, at any position, that have the values of a row."""
    found = set()
    for encoded, number, offset, values in _states(row[None], encodings, [piece.offset]):
        if number == piece.state:
            same = _equal(row[None, offset : offset + values.shape[1]], values)[0]
            found |= {encoded.ids[token] for token in same.nonzero().flatten().tolist()}
    return found


def _shares(
    given: torch.Tensor, piece: Piece, encodings: Sequence[Encoded], rows: torch.Tensor
) -> tuple[list[Encoded], torch.Tensor, torch.Tensor] | None:
    """Express rows as weighted sums of encodings, token by token.

    Returns:
        The encodings; bool ``[rows]``: which rows are such a sum; bool ``[rows, encodings]``: which encodings
        contribute. ``None`` if it cannot be determined.
    """
    offset, length = piece.offset, len(piece.encoded.ids)
    alike = [e for e in encodings if len(e.ids) == length and len(e.states) > piece.state][-_MOST_MIXED:]
    states = [e.states[piece.state] for e in alike]
    width = min([given.shape[1] - offset, *(state.shape[1] for state in states)])
    if not alike or width <= 2 * len(alike):
        return None
    target, tokens = given[rows, offset : offset + width].double().cpu(), rows + piece.shift
    parts = torch.stack([state[:, :width].double().cpu()[tokens] for state in states], -1)
    # The pseudo-inverse handles encodings that are equal at a token.
    weights = (torch.linalg.pinv(parts, rtol=1e-4) @ target.unsqueeze(-1)).squeeze(-1)
    off = (parts @ weights.unsqueeze(-1)).squeeze(-1) - target
    size = target.norm(dim=1)
    is_sum = (off.norm(dim=1) <= max(2 * torch.finfo(given.dtype).eps, 1e-4) * size) & (size > 0)
    return alike, is_sum, weights.abs() * parts.norm(dim=1) > _SHARE * size[:, None]


def _count(places: torch.Tensor) -> int:
    return int((places >= 0).sum())
