"""Which rows the words of a prompt are, once it is known which token of which encoding each row is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.blocks.words import text_spans
from attnpatch.errors import BlockError
from attnpatch.hosts.diffusers.token_matching import Encoded, Piece
from attnpatch.recording.diffusion.denoiser_call import TextRow

# Special tokens that may follow a text that was cut off: an end, and one that is put after it.
_MOST_ENDS = 2
_CUT = "the prompt was cut off before it: the text encoder takes no more tokens"

# Token spans of the words of a text, their labels, and the ids.
_Words = tuple[Sequence[tuple[int, int]], Sequence[str], list[int]]


@dataclasses.dataclass
class Word:
    """One word of a text.

    Attributes:
        label: As it stands there.
        rows: Those of its tokens, of all encoders.
        doubt: Why it has none, or not these.
    """

    label: str
    rows: set[int] = dataclasses.field(default_factory=set)
    doubt: str | None = None


@dataclasses.dataclass
class Placed:
    """The text of one encoder's rows: what it is, as it was given, and whose."""

    text: str
    role: str


@dataclasses.dataclass
class _Token:
    row: int
    number: int
    doubt: str | None


def placed(pieces: list[Piece], texts: list[tuple[str, str]], words: dict[tuple[str, int], Word]) -> Placed:
    """Find the text of one encoder's rows among those that the pipeline was given.

    Args:
        pieces: What the rows are.
        texts: Role and text.
        words: By text and number; the text's are added, or their rows are, if another encoder has the same text.
    """
    tokenizer = pieces[0].encoded.tokenizer
    tokens = _tokens(pieces)
    numbers = [token.number for token in tokens]
    last = max(pieces, key=lambda piece: int((piece.places >= 0).nonzero().max())).encoded
    is_own = all(piece.encoded.is_own for piece in pieces)
    found = []
    for role, given in texts:
        for text in dict.fromkeys([given, given.strip(), given.lower().strip(), _without_weights(given)]):
            spelled = _spelled(tokenizer, text, pieces[0].encoded.special())
            match = None if spelled is None else _located(spelled[2], numbers, last, is_own)
            if match is not None:
                start, length = match
                rank = (length == len(spelled[2]), length, role == "prompt")
                found.append((rank, role, given, start, length, spelled))
    if found:
        best, role, given, start, length, spelled = max(found, key=lambda each: each[0])
        if any(each[1] != role and each[0][:2] == best[:2] for each in found):
            role = ""  # a prompt that is a negative prompt too
    else:
        # Not what the pipeline was called with: a template, or nobody called it. What the tokens say.
        role, start, length, spelled = "", 0, len(numbers), _read(tokenizer, numbers, pieces[0].encoded)
        given = _decoded(tokenizer, numbers)
    _add_words(words, given, spelled, tokens[start : start + length])
    return Placed(given, role)


def _tokens(pieces: list[Piece]) -> list[_Token]:
    """Tokens of text in the order of their rows."""
    found = []
    for piece in pieces:
        special = piece.encoded.special()
        for row in (piece.places >= 0).nonzero().flatten().tolist():
            number = piece.encoded.ids[int(piece.places[row])]
            if number not in special:
                found.append(_Token(row, number, piece.doubts.get(row)))
    return sorted(found, key=lambda token: token.row)


def _spelled(tokenizer: Any, text: str, special: frozenset[int]) -> _Words | None:
    """The words of a text and its ids, as they stand in a prompt: without special tokens, a concept's vectors spelled out."""
    try:
        spans, labels = text_spans(tokenizer, text, {"add_special_tokens": False}, True)
    except BlockError:
        return None
    ids: list[int] = []
    starts = []
    for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
        starts.append(len(ids))
        ids += [] if number in special else [number, *_more_vectors(tokenizer, number)]
    starts.append(len(ids))
    return [(starts[a], starts[b]) for a, b in spans], labels, ids


def _more_vectors(tokenizer: Any, number: int) -> list[int]:
    """Textual inversion of several vectors: ``<cat>`` stands for ``<cat>``, ``<cat>_1``, ``<cat>_2``, ..."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    token, found = tokenizer.convert_ids_to_tokens(number), []
    while token in added and f"{token}_{len(found) + 1}" in added:
        found.append(added[f"{token}_{len(found) + 1}"])
    return found


def _located(ids: list[int], numbers: list[int], last: Encoded, is_own: bool) -> tuple[int, int] | None:
    """Where a text's ids begin among the rows' tokens, and how many of them are there; ``None``: it is another text.

    Args:
        ids: Of the text; one that was cut off counts as far as it goes.
        numbers: Of the rows' tokens.
        last: The last encoding.
        is_own: Whether the rows' texts are the pipeline's own, which may stand in templates.
    """
    if not ids:
        return None if numbers else (0, 0)
    for start in range(len(numbers) if is_own else min(1, len(numbers))):
        length = 0
        while length < min(len(ids), len(numbers) - start) and numbers[start + length] == ids[length]:
            length += 1
        is_end = start + length == len(numbers)
        if length == len(ids) and (is_own or is_end):
            return start, length
        if 1 < length < len(ids) and is_end and _is_full(last):
            return start, length
    return None


def _is_full(encoded: Encoded) -> bool:
    """Whether a text fills all the tokens that the encoder takes."""
    special = encoded.special()
    words = [place for place, number in enumerate(encoded.ids) if number not in special]
    ends = len(encoded.ids) - 1 - max(words, default=-1)
    return encoded.real == len(encoded.ids) and ends <= _MOST_ENDS


def _read(tokenizer: Any, numbers: list[int], encoded: Encoded) -> _Words:
    """Words of the tokens themselves, or the tokens, where their text would not give them again."""
    text = _decoded(tokenizer, numbers)
    spelled = None if tokenizer is None else _spelled(tokenizer, text, encoded.special())
    if spelled is not None and spelled[2] == numbers:
        return spelled
    names = [_decoded(tokenizer, [number]) for number in numbers]
    return [(place, place + 1) for place in range(len(numbers))], names, numbers


def _decoded(tokenizer: Any, numbers: list[int]) -> str:
    return tokenizer.decode(numbers) if tokenizer is not None else " ".join(map(str, numbers))


def _without_weights(text: str) -> str:
    """A prompt without the signs of weights: ``(red:1.3)``, ``((red))``, ``[red]``, ``red++``, ``(red cube)1.3``."""
    text = re.sub(r":\s*-?\d*\.?\d+\s*(?=[)\]])", "", text)
    text = re.sub(r"(?<=[)\]])(-?\d*\.?\d+|[+-]+)", "", text)
    return re.sub(r"(?<=\w)[+-]+(?=\s|$|[,.;)])|[()\[\]]", "", text).strip()


def _add_words(words: dict[tuple[str, int], Word], text: str, spelled: _Words, tokens: list[_Token]) -> None:
    for number, ((first, end), label) in enumerate(zip(spelled[0], spelled[1], strict=True)):
        word, mine = words.setdefault((text, number), Word(label)), tokens[first:end]
        word.rows |= {token.row for token in mine}
        word.doubt = word.doubt or next((token.doubt for token in mine if token.doubt), None)
        if first == end:
            word.doubt = "the tokenizer has no token for it"


def row_of(found: list[Placed], words: dict[tuple[str, int], Word], rows: int) -> TextRow:
    """Put the words of all encoders together.

    Where two texts share rows, as SDXL's two prompts do, these are cut so that every word of either is whole blocks.
    """
    known = {key: word for key, word in words.items() if word.rows and not word.doubt}
    owners: dict[int, tuple[tuple[str, int], ...]] = {}
    for key, word in known.items():
        for row in word.rows:
            owners[row] = (*owners.get(row, ()), key)
    blocks: dict[tuple[tuple[str, int], ...], int] = {}
    assignment = torch.full((rows,), -1)
    for word in known.values():
        for row in sorted(word.rows):
            assignment[row] = blocks.setdefault(owners[row], len(blocks))
    labels = tuple(" + ".join(known[key].label for key in owner) for owner in blocks)
    listed = tuple(
        (word.label, tuple(number for owner, number in blocks.items() if key in owner))
        for key, word in known.items()
    )
    there = {word.label for word in known.values()}
    missing = {word.label: word.doubt for word in words.values() if word.doubt}
    missing |= {word.label: _CUT for word in words.values() if not word.rows and word.label not in there}
    role = next((each.role for each in found if each.role), "")
    return TextRow(labels, assignment, found[0].text, role, listed, missing)
