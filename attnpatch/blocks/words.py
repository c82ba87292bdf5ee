"""Finds the tokens of each word of a text by character offsets, so that words do not depend on the tokenizer."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.blocks.chat.messages import Span
from attnpatch.errors import BlockError


def text_spans(
    tokenizer: Any, text: str, options: dict, by_word: bool
) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """Token spans and labels of the words of a text, or of its tokens; padding is not counted.

    Args:
        tokenizer: A fast tokenizer of transformers.
        text: The text.
        options: Arguments for the tokenizer's call.
        by_word: Whether blocks are words separated by white space; otherwise they are single tokens.
    """
    if not isinstance(text, str):
        raise BlockError(f"a prompt is {text!r}; accepted is a string, or a list of them for a batch.")
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError(
            "the tokenizer has no character offsets; load a fast tokenizer, or use Blocks.spans."
        )
    wanted = {
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "return_attention_mask": True,
    }
    encoded = tokenizer(text, **{**options, **wanted, "return_tensors": None})
    columns = ("attention_mask", "special_tokens_mask", "offset_mapping", "input_ids")
    real = [row for row in zip(*(encoded[name] for name in columns), strict=True) if row[0]]
    places = [place for place, (_, is_special, _, _) in enumerate(real) if not is_special]
    if not places:
        return (), ()
    if by_word:
        return _words(text, [real[place][2] for place in places], places)
    names = tokenizer.convert_ids_to_tokens([real[place][3] for place in places])
    labels = (text[slice(*real[place][2])].strip() or name for place, name in zip(places, names, strict=True))
    return tuple((place, place + 1) for place in places), tuple(labels)


def _words(
    text: str, offsets: Sequence[Span], places: Sequence[int]
) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """Spans and texts of the words that have tokens. A token belongs to the word it begins in, or else to the next."""
    found = list(re.finditer(r"\S+", text))
    edges = torch.tensor([match.end() for match in found])
    word_of = torch.searchsorted(edges, torch.tensor([start for start, _ in offsets]), right=True).tolist()
    spans: dict[int, Span] = {}
    for word, place in zip(word_of, places, strict=True):
        if word < len(found):
            spans[word] = (spans.get(word, (place, 0))[0], place + 1)
    return tuple(spans.values()), tuple(found[word].group() for word in spans)
