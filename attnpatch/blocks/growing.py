"""Blocks of a growing sequence: which blocks contain the tokens that a model generates."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from attnpatch.blocks.chat.messages import Span
from attnpatch.errors import AttnpatchWarning, BlockError

if TYPE_CHECKING:
    from attnpatch.blocks.spec import Blocks

# Attribute with the lengths of the sequences at the first call. It is not a field, so that equal blocks compare equal.
_SEEN = "_lengths_seen"


def grown(blocks: Blocks, row: int, place: int, length: int) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """Spans and labels of one sequence at its current length.

    Args:
        blocks: Blocks that were given as spans.
        row: Index of the sequence's spans in ``blocks``.
        place: Index of the sequence in the batch.
        length: Number of its real tokens.

    Raises:
        BlockError: A span ends after the sequence.
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
        # The last message may be closed with other tokens if another message follows.
        begin = min(length, max(start + 1, blocks.after_from[row])) if blocks.after_from else end
        more = ((begin, length),) if begin < length else ()
        return (*sequence[:-1], (start, begin), *more), (*labels, *[blocks.after] * len(more))
    if end > length:
        raise BlockError(
            f"block {len(sequence) - 1} ends at token {end}, but sequence {place} has {length} "
            "real tokens; give spans within the sequence (padding does not count)."
        )
    return sequence, labels


def say_what_is_left_out(blocks: Blocks, lengths: list[int]) -> None:
    """Warn once if a sequence has grown past its last block, so that generated tokens are in no block."""
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
            f"attnpatch: the sequence has grown past its last block: tokens from {min(left)} on are in no block of the "
            "map; give Blocks.messages, or Blocks.spans(..., after='answer') for a block of them (grows=True adds them "
            "to the last block).",
            AttnpatchWarning,
            stacklevel=3,
        )
