"""Checks of what spans, labels and sizes of blocks are given."""

import difflib
import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from attnpatch.blocks.chat.messages import Span
from attnpatch.errors import BlockError

# Options that chat templates have; a template may have others.
TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message", "enable_thinking", "chat_template")


def check_spelling(given: Iterable[str], known: Sequence[str]) -> None:
    """Check that no option for a tokenizer or a template is a known one misspelt: it would be ignored there.

    Raises:
        BlockError: One is.
    """
    for name in given:
        close = () if name in known else difflib.get_close_matches(name, known, 1, cutoff=0.85)
        if close:
            raise BlockError(f"there is no option {name!r}; did you mean {close[0]!r}?")


def whole(value: Any, what: str) -> int:
    """``value`` as an int; unlike ``int()``, it refuses bools, floats and strings."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise BlockError(f"{what} is {value!r}; accepted is a whole number of tokens.") from None


def is_nested(spans: Any) -> bool:
    try:
        first = spans[0]
        return isinstance(first[0], Sequence) and not isinstance(first[0], str)
    except (TypeError, IndexError, KeyError):
        return False


def check_spans(spans: Any) -> tuple[Span, ...]:
    try:
        pairs = [tuple(pair) for pair in spans]
    except TypeError:
        raise BlockError(f"spans is {spans!r}; accepted is a list of (start, end) in tokens.") from None
    if not pairs:
        raise BlockError("there are no spans; give at least one (start, end) per sequence.")
    checked = []
    for pair in pairs:
        if len(pair) != 2:
            raise BlockError(f"span {pair!r} has {len(pair)} numbers; accepted is (start, end) in tokens.")
        start, end = (whole(edge, f"an edge of span {pair!r}") for edge in pair)
        if start < 0 or end <= start:
            raise BlockError(f"span ({start}, {end}) is empty or negative; accepted is 0 <= start < end.")
        checked.append((start, end))
    for before, after in pairwise(checked):
        if after[0] < before[1]:
            problem = "overlap" if after[1] > before[0] else "are not sorted"
            raise BlockError(f"spans {before} and {after} {problem}; give them in order, without overlap.")
    return tuple(checked)


def check_labels(labels: Any, spans: tuple[tuple[Span, ...], ...]) -> tuple[tuple[str, ...], ...]:
    counts = [len(s) for s in spans]
    fits = (
        isinstance(labels, Sequence)
        and [
            len(s)
            for s in labels
            if isinstance(s, list | tuple) and all(isinstance(label, str) for label in s)
        ]
        == counts
    )
    if not fits or len(labels) != len(counts):
        raise BlockError(f"labels do not match the {counts} spans; give one string per span, nested alike.")
    return tuple(tuple(sequence) for sequence in labels)
