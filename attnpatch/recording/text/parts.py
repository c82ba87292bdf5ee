"""Parts of a sequence that attend only to themselves: several pictures in one sequence, or windows of it."""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.observing import PART, Layout, Opened, Piece
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.call_facts import (
    AttentionCallInfo,
    Relation,
    Unknown,
    check_batch,
    check_length,
    compare,
    said_of,
)


def part_of(layout: Layout) -> Piece | None:
    """The part of a sequence that attends to itself in this attention; ``None`` if queries are whole sequences."""
    is_part = len(layout.queries) == 1 and layout.queries[0].kind == PART and not layout.why_not
    return layout.queries[0] if is_part else None


@dataclasses.dataclass
class Parts:
    """The parts of one sequence that a module has attended with so far, one after the other.

    Attributes:
        of: Number of tokens of the sequence.
        number: Number of the input that it comes from.
        leads: Number of sequences and number of heads.
        seen: First token and length of each part.
        sums: The sums of the parts whose attention has ended.
    """

    of: int
    number: int
    leads: tuple[int, int]
    seen: dict[int, int] = dataclasses.field(default_factory=dict)
    sums: SiteSums | None = None

    @classmethod
    def begin(cls, layout: Layout, piece: Piece) -> Parts:
        return cls(piece.of, piece.number, (layout.batch, layout.heads))

    def takes(self, layout: Layout, piece: Piece) -> bool:
        """True if an attention belongs to another part of the same sequence."""
        mine = (self.of, self.number, self.leads)
        return mine == (piece.of, piece.number, (layout.batch, layout.heads)) and not any(
            piece.start < start + length and start < piece.start + piece.length
            for start, length in self.seen.items()
        )

    @property
    def is_complete(self) -> bool:
        return sum(self.seen.values()) == self.of

    @property
    def why_incomplete(self) -> str:
        return (
            f"it attends with {sum(self.seen.values())} of {self.of} tokens, in {len(self.seen)} parts, so rows of its map "
            "would be missing (windows that overlap, or tokens that are cut off)"
        )


def relation_of_part(layout: Layout, piece: Piece) -> Relation:
    """A part's keys are its own tokens."""
    return Relation(False, piece.start, piece.start, 0, layout.kv_len)


def real_tokens_of_part(
    layout: Layout, piece: Piece, facts: AttentionCallInfo, opened: Opened
) -> torch.Tensor:
    """Which tokens of the whole sequence are real, bool ``[batch, tokens]``; arguments as for ``real_tokens``.

    Padding of the other parts is not seen yet, so it must be known from the model's arguments.

    Raises:
        Unknown: It is not known.
    """
    if facts.has_cache:
        raise Unknown(
            "it attends with parts of its sequence and is given a cache, so it is not known which tokens they are"
        )
    check_batch(layout.batch, facts)
    check_length(piece.of, piece.of, facts.lengths)
    said = said_of(facts.query_mask, layout.batch, piece.of)
    known = torch.ones(layout.batch, piece.of, dtype=torch.bool) if said is None else said
    own = known[:, piece.start : piece.start + piece.length]
    seen = opened(0)
    if seen is None or seen.numel():
        compare(torch.ones_like(own) if seen is None else seen, own, "tokens")
    elif said is None:
        raise Unknown(
            "it attends with parts of its sequence, and its scores choose the keys, so it is not known which tokens are "
            "padding; give the model an attention_mask"
        )
    return known
