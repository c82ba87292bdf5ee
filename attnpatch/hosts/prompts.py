"""Whose words the text tokens of a denoiser are: what text encoders return is found again, by its values, in what the
denoiser is given.

Pipelines cut templates off, drop padding and put several encoders' tokens one after another; the values stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnpatch.capture.sampling import TextRow
from attnpatch.capture.words import text_spans
from attnpatch.errors import BlockError
from attnpatch.hosts.transformers import parameter_names

# Values of a token that are compared to find it, before all are.
_FIRST = 16


@dataclasses.dataclass
class Encoded:
    """One row that a text encoder was called with.

    Attributes:
        tokenizer: Of that encoder.
        ids: Token ids.
        real: How many are no padding.
        states: Tensors ``[tokens, width]`` it returned, one of which the denoiser may be given.
    """

    tokenizer: Any
    ids: list[int]
    real: int
    states: list[torch.Tensor]


class Prompts:
    """Watches the text encoders of a pipeline.

    Args:
        parts: The pipeline's modules by name.
        tokenizers: Its tokenizers by name: ``tokenizer_2`` belongs to ``text_encoder_2``.
    """

    def __init__(self, parts: dict[str, nn.Module], tokenizers: dict[str, Any]) -> None:
        self.encoders = {
            part: tokenizers.get(name.replace("text_encoder", "tokenizer"))
            for name, part in parts.items()
            if name.startswith("text_encoder") and "input_ids" in parameter_names(type(part))
        }
        self.texts: list[tuple[str, str]] = []
        self.encoded: list[Encoded] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what the encoders return, inside a ``with`` block."""
        handles = [part.register_forward_hook(self._returned, with_kwargs=True) for part in self.encoders]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, texts: list[tuple[str, str]]) -> None:
        """A pipeline is called with these texts and their roles; what was encoded before it may be given to it."""
        self.texts = texts

    def end(self) -> None:
        """What encoders returned is let go."""
        self.encoded = []

    def _returned(self, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(parameter_names(type(part)), args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return
        states = [state for state in _tensors(output) if state.dim() == 3 and state.shape[:2] == ids.shape]
        for row, each in enumerate(ids.tolist()):
            is_masked = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
            real = int((mask[row] != 0).sum()) if is_masked else len(each)
            rows = [state[row].detach() for state in states]
            self.encoded.append(Encoded(self.encoders[part], each, real, rows))

    def find(self, text: torch.Tensor) -> list[TextRow | None]:
        """The text of each row of what a denoiser is given, ``[batch, tokens, width]``; ``None``: not found."""
        return [self._row(row) for row in text.detach()]

    def _row(self, given: torch.Tensor) -> TextRow | None:
        best: dict[int, tuple[int, torch.Tensor, Encoded]] = {}
        for encoded in self.encoded:
            found = max((_where(given, state) for state in encoded.states), key=_count, default=None)
            # An encoder that looks back only gives the start of any text the same values; T5 has one token for no text.
            least = max(min(2, encoded.real), min(encoded.real, len(given)) // 2)
            if found is None or _count(found) < least:
                continue
            number = id(encoded.tokenizer)
            if number not in best or _count(found) > best[number][0]:
                best[number] = (_count(found), found, encoded)
        if not best:
            return None
        whole = TextRow((), torch.full((len(given),), -1))
        for _, found, encoded in best.values():
            self._add_words(whole, found, encoded)
        return whole

    def _add_words(self, row: TextRow, found: torch.Tensor, encoded: Encoded) -> None:
        """Words of one encoder's tokens; those of a second encoder with the same text are the same words."""
        role, text, spans, labels = self._text_of(encoded)
        if row.text is None:
            row.text, row.role, row.labels = text, role, labels
        elif labels != row.labels:
            return
        word_of = torch.full((len(encoded.ids),), -1)
        for word, (start, end) in enumerate(spans):
            word_of[start:end] = word
        placed = found >= 0
        row.assignment[placed] = word_of[found[placed]]

    def _text_of(self, encoded: Encoded) -> tuple[str, str, tuple[tuple[int, int], ...], tuple[str, ...]]:
        """Role, text, and its words' spans among the tokens of a row."""
        candidates = []
        for role, given in self.texts:
            for text in dict.fromkeys([given, given.strip(), given.lower().strip()]):
                match = _located(encoded, text)
                if match is not None:
                    candidates.append((len(match[2]), role == "prompt", (role, given, *match[:2])))
        if candidates:
            return max(candidates, key=lambda each: each[:2])[2]
        # Not what the pipeline was called with: a template, or nobody called it. The tokens' own characters.
        special = set(getattr(encoded.tokenizer, "all_special_ids", ()))
        kept = [place for place, number in enumerate(encoded.ids) if number not in special]
        names = [_decoded(encoded.tokenizer, encoded.ids[place]) for place in kept]
        return "", "".join(names), tuple((place, place + 1) for place in kept), tuple(names)


def _decoded(tokenizer: Any, number: int) -> str:
    return tokenizer.decode([number]) if tokenizer is not None else str(number)


def _located(
    encoded: Encoded, text: str
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...], list[int]] | None:
    """Spans and labels of a text's words in a row, and its tokens; a text that was cut off counts as far as it goes."""
    try:
        spans, labels = text_spans(encoded.tokenizer, text, {"add_special_tokens": False}, True)
    except BlockError:
        return None
    ids = encoded.tokenizer(text, add_special_tokens=False)["input_ids"]
    special = set(encoded.tokenizer.all_special_ids)
    if not ids:
        return None if any(number not in special for number in encoded.ids) else ((), (), [])
    for start in range(len(encoded.ids)):
        length = 0
        while (
            length < len(ids)
            and start + length < len(encoded.ids)
            and encoded.ids[start + length] == ids[length]
        ):
            length += 1
        is_cut = length > 1 and length < len(ids) and all(n in special for n in encoded.ids[start + length :])
        if length == len(ids) or (is_cut and encoded.real == len(encoded.ids)):
            kept = [(a, min(b, length)) for a, b in spans if a < length]
            return tuple((start + a, start + b) for a, b in kept), labels[: len(kept)], ids[:length]
    return None


def _where(given: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """int64 ``[tokens]``: which token of an encoder each given token is, -1 for none.

    The features of several encoders may stand side by side; only the first one's are looked at.
    """
    width = min(given.shape[1], state.shape[1])
    left, right = given[:, :width], state[:, :width].to(given)
    place = torch.full((len(given),), -1)
    same = (left[:, None, :_FIRST] == right[None, :, :_FIRST]).all(-1) & right.bool().any(-1)
    same = same.cpu()
    # Pieces of the encoder's sequence in its own order: one after another, the longest first.
    while bool(same.any()):
        rows, columns = same.nonzero().T
        shifts, counts = (columns - rows).unique(return_counts=True)
        mine = (columns - rows) == shifts[counts.argmax()]
        rows, columns = rows[mine], columns[mine]
        equal = (left[rows.to(left.device)] == right[columns.to(left.device)]).all(-1).cpu()
        place[rows[equal]] = columns[equal]
        same[rows] = False
        same[:, columns] = False
    return place


def _count(found: torch.Tensor) -> int:
    return int((found >= 0).sum())


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
