"""Finds the words that a heat map is asked for among the words of a text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from attnpatch.errors import CaptureError
from attnpatch.recording.diffusion.denoiser_call import TextRow


def listed(words: Any, labels: Sequence[str]) -> list[Any]:
    """The words as a list; a string is split, unless it is a label as a whole."""
    if isinstance(words, str):
        is_label = any(plain(label) == plain(words) for label in labels)
        return [words] if is_label else words.split() or [words]
    return [words] if isinstance(words, int) else list(words)


def plain(word: str) -> str:
    """A word in lower case, without the punctuation around it."""
    return word.casefold().strip(string.punctuation + " ")


def why_missing(word: str, text: TextRow) -> str | None:
    """Why an occurrence of the word has no map; ``None`` if all have one."""
    return next((why for label, why in text.missing.items() if plain(label) == plain(word)), None)


def places(word: str | int, text: TextRow) -> list[int]:
    """The indices of a word among the text's words.

    Raises:
        CaptureError: The word is not there, or has no map.
    """
    labels = [label for label, _ in text.words]
    if isinstance(word, int) and not isinstance(word, bool):
        if 0 <= word < len(labels):
            return [word]
    else:
        why = why_missing(str(word), text)
        if why is not None:
            raise CaptureError(f"there is no map of {word!r}: {why}")
        wanted = plain(str(word))
        found = [i for i, label in enumerate(labels) if label == word or (wanted and plain(label) == wanted)]
        if found:
            return found
    shown = ", ".join(repr(label) for label in labels[:20]) + (", ..." if len(labels) > 20 else "")
    raise CaptureError(f"{word!r} is not among the words: {shown}")
