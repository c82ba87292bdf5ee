"""Finds given texts (the documents of a prompt) in the tokens of the prompt, by character offsets.

The prompt is divided at the borders of the texts. Each token belongs to one of the parts. A token on a border belongs
to the part of its letters and digits, because tokenizers join white space and punctuation with either side (``" Paris"``,
``".</"``). If it has letters or digits on both sides, the border is inside a word, which is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from attnpatch.blocks.chat.messages import Span, template_of
from attnpatch.errors import BlockError


@dataclass(frozen=True)
class Tokenized:
    """A prompt and its tokens.

    Attributes:
        text: The prompt.
        offsets: The characters of each token. A special token that the tokenizer adds lies before or after the text.
    """

    text: str
    offsets: list[Span]


@dataclass(frozen=True)
class Parts:
    """Blocks of one prompt: their spans in tokens, labels and texts."""

    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]


def text_parts(
    tokenizer: Any, prompt: Any, texts: Sequence[str], labels: Sequence[str], rest: str, options: dict
) -> Parts:
    """The blocks of one prompt: one for each text, one for each part between them. Arguments as ``Blocks.texts``.

    Raises:
        BlockError: A text cannot be found, or tokens do not show where it is.
    """
    whole = tokenized(tokenizer, prompt, options)
    places = _places(whole.text, texts, labels)
    order = sorted(range(len(texts)), key=lambda index: places[index])
    edges = [edge for index in order for edge in places[index]]
    counts = [0] * (len(edges) + 1)
    part = 0
    for token, offset in enumerate(whole.offsets):
        # Tokens are in the order of the text; several tokens of one character stay together.
        part = max(part, _part_of(whole.text, offset, edges, token))
        counts[part] += 1
    named = _names([labels[index] for index in order], rest)
    spans, kept, begin = [], [], 0
    for number, count in enumerate(counts):
        if count:
            spans.append((begin, begin + count))
            kept.append(number)
        elif number % 2:
            raise BlockError(f"{named[number]!r} has no token of its own; leave it out of the texts.")
        begin += count
    cut = [whole.text[start:end] for start, end in pairwise([0, *edges, len(whole.text)])]
    # A part of special tokens only has no text.
    return Parts(tuple(spans), tuple(named[n] for n in kept), tuple(cut[n] or named[n] for n in kept))


def _names(labels: Sequence[str], rest: str) -> list[str]:
    """Labels of all parts: before the first text, the first text, ..., after the last text."""
    return [*(name for label in labels for name in (before(label, rest), label)), rest]


def before(label: str, rest: str) -> str:
    """The label of the part before a named block."""
    return f"{rest}, before {label}"


def tokenized(tokenizer: Any, prompt: Any, options: dict) -> Tokenized:
    """A prompt with the characters of its tokens.

    Args:
        tokenizer: A fast tokenizer of transformers.
        prompt: A text, chat messages, or token ids (a list, or a tensor or array of one sequence).
        options: Options for the tokenizer's call; for messages, for ``apply_chat_template``.

    Raises:
        BlockError: There are no offsets or no template, or the ids are not the tokens of their text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError(
            "the tokenizer has no character offsets; load a fast tokenizer, or use Blocks.spans."
        )
    if isinstance(prompt, str):
        return _encoded(tokenizer, prompt, options)[0]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(one, Mapping) for one in prompt):
        if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
            raise BlockError(
                "the tokenizer has no chat template; set tokenizer.chat_template, or give the prompt."
            )
        try:
            text = template_of(tokenizer, options)(prompt)
        except Exception as error:  # templates stop with jinja errors: "roles must alternate"
            raise BlockError(f"the chat template refuses these messages ({error}); change them.") from error
        return _encoded(tokenizer, text, {"add_special_tokens": False})[0]
    ids = _ids(prompt)
    if _is_padded(tokenizer, ids):
        raise BlockError(
            "the token ids begin or end with padding, which blocks do not count; give them without."
        )
    if options:
        raise BlockError(f"the options {', '.join(sorted(options))} are not for token ids; leave them out.")
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    whole, again = _encoded(tokenizer, text, {"add_special_tokens": False})
    if again != ids:
        raise BlockError(
            "these token ids are not what the tokenizer makes of their text, so their characters are not known; give the "
            "text or the messages."
        )
    return whole


def _ids(prompt: Any) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list | tuple):
        ids = ids[0]
    if not isinstance(ids, list | tuple) or not ids or not all(type(one) is int for one in ids):
        raise BlockError(
            f"the prompt is {prompt!r:.80}; accepted is a string, chat messages, or token ids of one sequence."
        )
    return list(ids)


def _is_padded(tokenizer: Any, ids: list[int]) -> bool:
    pad = tokenizer.pad_token_id
    # One token at either end may be the beginning or the end of a text.
    allowed = int(pad in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return pad is not None and any(end[: allowed + 1] == [pad] * (allowed + 1) for end in (ids, ids[::-1]))


def _encoded(tokenizer: Any, text: str, options: dict) -> tuple[Tokenized, list[int]]:
    wanted = ("return_offsets_mapping", "return_special_tokens_mask", "return_attention_mask")
    encoded = tokenizer(text, **{**options, **dict.fromkeys(wanted, True), "return_tensors": None})
    columns = ("attention_mask", "special_tokens_mask", "offset_mapping", "input_ids")
    real = [row for row in zip(*(encoded[name] for name in columns), strict=True) if row[0]]
    offsets, begun = [], False
    for _, is_added, (start, end), _ in real:
        if is_added and start == end:
            offsets.append((len(text) + 1,) * 2 if begun else (-1, -1))
        else:
            begun = True
            offsets.append((start, end))
    return Tokenized(text, offsets), [row[3] for row in real]


def _part_of(text: str, offset: Span, edges: list[int], token: int) -> int:
    """The part of a token: 0 before the first text, 1 in it, 2 before the second one, ..."""
    start, end = offset
    if start == end:
        # A token of white space may have an empty span at its own end.
        return bisect_right(edges, start - 1 if 0 < start <= len(text) else start)
    inside = [place for place in range(start, end) if not text[place].isspace()] or [start]
    first, last = bisect_right(edges, inside[0]), bisect_right(edges, inside[-1])
    if first == last:
        return first
    parts = {bisect_right(edges, place) for place in inside if text[place].isalnum()}
    if len(parts) > 1:
        raise BlockError(
            f"a text begins or ends inside token {token}, {text[start:end]!r}; give whole words, or separate the texts by "
            "white space in the prompt."
        )
    return parts.pop() if parts else first


def _places(text: str, texts: Sequence[str], labels: Sequence[str]) -> list[Span]:
    """The characters of each text. Texts that are given several times are found in order.

    Raises:
        BlockError: A text is missing, is there more often than it is given, or overlaps another.
    """
    by_text: dict[str, list[int]] = {}
    for index, one in enumerate(texts):
        by_text.setdefault(one if one in text else one.strip(), []).append(index)
    places: dict[int, Span] = {}
    # Long texts first: a short one that occurs inside a longer one is not there by itself.
    for one, indices in sorted(by_text.items(), key=lambda item: -len(item[0])):
        label = labels[indices[0]]
        if not one:
            raise BlockError(f"{label!r} is empty; leave it out of the texts.")
        every = [match.start() for match in re.finditer(f"(?={re.escape(one)})", text)]
        taken = [(begin, end) for begin, end in places.values()]
        own = [at for at in every if not any(b <= at and at + len(one) <= e for b, e in taken)]
        if not every:
            raise BlockError(
                f"{label!r} is not in the prompt ({_short(one)}); give the text as the prompt or its template writes it."
            )
        if not own:
            raise BlockError(
                f"{label!r} is only inside another text ({_short(one)}); texts must not overlap."
            )
        if len(own) != len(indices):
            raise BlockError(
                f"{label!r} is {len(own)} times in the prompt and {len(indices)} times in the texts ({_short(one)}); give a "
                "longer text that is there once, or use Blocks.spans."
            )
        places.update({index: (at, at + len(one)) for index, at in zip(indices, own, strict=True)})
    order = sorted(places, key=lambda index: places[index])
    for first, second in pairwise(order):
        if places[second][0] < places[first][1]:
            raise BlockError(
                f"{labels[first]!r} and {labels[second]!r} overlap in the prompt; give separate texts."
            )
    return [places[index] for index in range(len(texts))]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def checked_texts(texts: Any, labels: Any) -> tuple[list[str], list[str]]:
    """The texts of one prompt and their labels, ``"doc 1"``, ... by default.

    Raises:
        BlockError: They are not lists of strings of the same length.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise BlockError(f"texts is {texts!r:.80}; accepted is a list of strings with at least one.")
    if not all(isinstance(one, str) for one in texts):
        raise BlockError("one of the texts is not a string; accepted is a list of strings.")
    if labels is None:
        return list(texts), [f"doc {number}" for number in range(1, len(texts) + 1)]
    are_names = isinstance(labels, list | tuple) and all(isinstance(one, str) for one in labels)
    if not are_names or len(labels) != len(texts):
        raise BlockError(
            f"labels is {labels!r:.80}; accepted is one string for each of the {len(texts)} texts."
        )
    return list(texts), list(labels)
