"""Finds the rows of each word of a prompt; ``token_matching.py`` has found the token that each row holds."""

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

# Special tokens that may follow a truncated text: the end of the text, and one after it.
_MOST_ENDS = 2
_TWICE = (
    "the text encoder was given it in several places (the pipeline puts other text around the prompt), and it is not known "
    "which is the prompt's"
)
_CUT = "the prompt was cut off before it, because the text encoder takes no more tokens; shorten the prompt"

# Token spans of the words of a text, their labels, and the ids.
_Words = tuple[Sequence[tuple[int, int]], Sequence[str], list[int]]


@dataclasses.dataclass
class Word:
    """One word of a text.

    Attributes:
        label: The word as it stands in the text.
        rows: The rows of its tokens, from all encoders.
        doubt: Why its rows are missing or uncertain.
    """

    label: str
    rows: set[int] = dataclasses.field(default_factory=set)
    doubt: str | None = None


@dataclasses.dataclass
class Placed:
    """The text of one encoder's rows, as the pipeline was given it, and its role."""

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
        pieces: Which tokens the rows are.
        texts: Pairs of role and text.
        words: Words by text and number. The words of the found text are added; if another encoder has added them
            already, only their rows are added.
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
                start, length, is_again = match
                rank = (length == len(spelled[2]), length, role == "prompt")
                found.append((rank, role, given, start, length, spelled, is_again))
    if found:
        best, role, given, start, length, spelled, is_again = max(found, key=lambda each: each[0])
        if any(each[1] != role and each[0][:2] == best[:2] for each in found):
            role = ""  # the same text is prompt and negative prompt
        if is_again:
            tokens = [dataclasses.replace(token, doubt=token.doubt or _TWICE) for token in tokens]
    else:
        # None of the pipeline's texts (a template, or the pipeline was not called): decode the tokens.
        role, start, length, spelled = "", 0, len(numbers), _read(tokenizer, numbers, pieces[0].encoded)
        given = _decoded(tokenizer, numbers)
    _add_words(words, given, spelled, tokens[start : start + length])
    return Placed(given, role)


def _tokens(pieces: list[Piece]) -> list[_Token]:
    """The tokens that are text, in the order of their rows."""
    found = []
    for piece in pieces:
        special = piece.encoded.special()
        for row in (piece.places >= 0).nonzero().flatten().tolist():
            number = piece.encoded.ids[int(piece.places[row])]
            if number not in special:
                found.append(_Token(row, number, piece.doubts.get(row)))
    return sorted(found, key=lambda token: token.row)


def _spelled(tokenizer: Any, text: str, special: frozenset[int]) -> _Words | None:
    """The words and ids of a text as in a prompt: no special tokens, and all vectors of a textual inversion."""
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
    """The further ids of a textual inversion with several vectors: ``<cat>`` means ``<cat>``, ``<cat>_1``, ..."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    token, found = tokenizer.convert_ids_to_tokens(number), []
    while token in added and f"{token}_{len(found) + 1}" in added:
        found.append(added[f"{token}_{len(found) + 1}"])
    return found


def _located(ids: list[int], numbers: list[int], last: Encoded, is_own: bool) -> tuple[int, int, bool] | None:
    """Where a text's ids begin among the rows' tokens, how many of them are there, and whether they are there again;
    ``None`` if it is another text.

    Args:
        ids: The ids of the text. A truncated text matches as far as it goes.
        numbers: The ids of the rows' tokens.
        last: The last encoding.
        is_own: True if the pipeline encoded the rows itself, possibly inside a template.
    """
    if not ids:
        return None if numbers else (0, 0, False)
    starts = range(len(numbers) if is_own else min(1, len(numbers)))
    ends = range(len(ids), len(numbers) + 1) if is_own else [len(numbers)]
    whole = [at for at in starts if at + len(ids) in ends and numbers[at : at + len(ids)] == ids]
    if whole:
        return whole[0], len(ids), len(whole) > 1
    for start in starts if _is_full(last) else ():
        rest = numbers[start:]
        if 1 < len(rest) < len(ids) and rest == ids[: len(rest)]:
            return start, len(rest), False
    return None


def _is_full(encoded: Encoded) -> bool:
    """True if a text fills all tokens that the encoder takes."""
    special = encoded.special()
    words = [place for place, number in enumerate(encoded.ids) if number not in special]
    ends = len(encoded.ids) - 1 - max(words, default=-1)
    return encoded.real == len(encoded.ids) and ends <= _MOST_ENDS


def _read(tokenizer: Any, numbers: list[int], encoded: Encoded) -> _Words:
    """The words of the decoded tokens; single tokens if encoding that text again gives other ids."""
    text = _decoded(tokenizer, numbers)
    spelled = None if tokenizer is None else _spelled(tokenizer, text, encoded.special())
    if spelled is not None and spelled[2] == numbers:
        return spelled
    names = [_decoded(tokenizer, [number]) for number in numbers]
    return [(place, place + 1) for place in range(len(numbers))], names, numbers


def _decoded(tokenizer: Any, numbers: list[int]) -> str:
    return tokenizer.decode(numbers) if tokenizer is not None else " ".join(map(str, numbers))


def _without_weights(text: str) -> str:
    """A prompt without weight syntax: ``(red:1.3)``, ``((red))``, ``[red]``, ``red++``, ``(red cube)1.3``."""
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
    """Combine the words of all encoders into blocks.

    If two texts share rows, as SDXL's two prompts do, rows are grouped so that every word of either consists of whole
    blocks.
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
