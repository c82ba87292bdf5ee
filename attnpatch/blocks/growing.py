"""Blocks of a sequence that goes on: which of them take the tokens that a model generates."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from attnpatch.blocks.chat.messages import Span
from attnpatch.errors import AttnpatchWarning, BlockError

if TYPE_CHECKING:
    from attnpatch.blocks.spec import Blocks

# Where blocks keep how long sequences were when they first saw them. No field: blocks that are alike are equal.
_SEEN = "_lengths_seen"


def grown(blocks: Blocks, row: int, place: int, length: int) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """Spans and labels of one sequence.

    Args:
        blocks: That were given as spans.
        row: Whose spans it has.
        place: Which of its batch it is.
        length: Its real tokens.

    Raises:
        BlockError: A span reaches past its end.
    """
    whole, labels = blocks.spans_by_sequence[row], blocks.labels_by_sequence[row]
    sequence = whole
    if blocks.ahead:
        sequence = tuple((start, min(end, length)) for start, end in whole if start < length)
    if not sequence:
        return sequence, labels
    start, end = sequence[-1]
    is_last = len(sequence) == len(whole)
    if blocks.grows and is_last and start < length:
        return (*sequence[:-1], (start, length)), labels
    if blocks.after and is_last and end < length:
        # The last message may be closed by other tokens when the next one is opened.
        begin = min(length, max(start + 1, blocks.after_from[row])) if blocks.after_from else end
        more = ((begin, length),) if begin < length else ()
        return (*sequence[:-1], (start, begin), *more), (*labels, *[blocks.after] * len(more))
    if end > length:
        raise BlockError(
            f"block {len(sequence) - 1} ends at token {end}, sequence {place} has {length} "
            "real tokens; give spans that end there or earlier (padding does not count)."
        )
    return sequence, labels


def say_what_is_left_out(blocks: Blocks, lengths: list[int]) -> None:
    """Warn once where a sequence is longer than it was, past its last block: what a model generates is in none."""
    if blocks.grows or blocks.after or not blocks.spans_by_sequence:
        return
    known = vars(blocks).setdefault(_SEEN, lengths)
    if known is lengths or known == "said" or len(known) != len(lengths):
        return
    ends = [spans[-1][1] if spans else 0 for spans in blocks.spans_by_sequence]
    ends = ends if blocks.per_sequence else ends * len(lengths)
    begins = [max(before, end) for before, end in zip(known, ends, strict=False)]
    left = [begin for begin, now in zip(begins, lengths, strict=False) if now > begin]
    if left:
        vars(blocks)[_SEEN] = "said"
        warnings.warn(
            f"attnpatch: the sequence has grown past its last block: tokens from {min(left)} on are in no block of the map; give "
            "Blocks.messages, or Blocks.spans(..., after='answer') for a block of them (grows=True adds them to the last "
            "one).",
            AttnpatchWarning,
            stacklevel=3,
        )
