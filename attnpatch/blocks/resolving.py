"""Finds the block of every position of a batch, once the lengths of its sequences are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnpatch.blocks.chat.messages import Span
from attnpatch.blocks.growing import grown, say_what_is_left_out
from attnpatch.blocks.partition import Partition, assigned, blocks_of_tokens, tiled
from attnpatch.errors import BlockError

if TYPE_CHECKING:
    from attnpatch.blocks.spec import Blocks


def resolved(blocks: Blocks, valid: Tensor) -> Partition:
    """See ``Blocks.resolve``; ``valid`` is on the CPU."""
    if blocks.image is not None:
        return tiled(blocks.image, valid)
    if blocks.block_of_token:
        rows = _rows(blocks, len(valid))
        tokens = [blocks.block_of_token[row] for row in rows]
        partition = assigned(tokens, [blocks.labels_by_sequence[row] for row in rows], blocks.after, valid)
        return replace(partition, texts=_texts_for(blocks, partition.labels))
    lengths = valid.sum(1).tolist()
    say_what_is_left_out(blocks, lengths)
    spans, labels = _spans_for(blocks, lengths)
    num_blocks = max([1, *(len(s) for s in spans)])
    starts = torch.zeros(len(spans), num_blocks, dtype=torch.int64)
    ends = torch.zeros_like(starts)
    assignment = torch.full(valid.shape, -1, dtype=torch.int64)
    for row, sequence in enumerate(spans):
        if sequence:
            bounds = torch.tensor(sequence, dtype=torch.int64)
            starts[row, : len(sequence)], ends[row, : len(sequence)] = bounds.T
            of_token = blocks_of_tokens(bounds, lengths[row])
            assignment[row, valid[row]] = of_token
    return Partition(assignment, ends - starts, starts, ends, labels, _texts_for(blocks, labels))


def _texts_for(blocks: Blocks, labels: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...] | None:
    """The texts of blocks with these labels; a block of generated tokens has its label as text."""
    if not blocks.texts_by_sequence:
        return None
    known = blocks.texts_by_sequence
    known = known if blocks.per_sequence else known * len(labels)
    return tuple((*texts, *names[len(texts) :]) for texts, names in zip(known, labels, strict=True))


def _spans_for(
    blocks: Blocks, lengths: Sequence[int]
) -> tuple[list[tuple[Span, ...]], tuple[tuple[str, ...], ...]]:
    if blocks.kind == "fixed":
        size = blocks.size
        assert size is not None
        spans = [tuple((i, min(i + size, n)) for i in range(0, n, size)) for n in lengths]
        return spans, tuple(tuple(f"{start}:{end}" for start, end in s) for s in spans)
    found = [
        grown(blocks, row, place, length)
        for place, (row, length) in enumerate(zip(_rows(blocks, len(lengths)), lengths, strict=True))
    ]
    return [spans for spans, _ in found], tuple(labels for _, labels in found)


def _rows(blocks: Blocks, count: int) -> Sequence[int]:
    """Which of the given sequences each sequence of a batch is.

    Raises:
        BlockError: Blocks were given for another number of sequences.
    """
    given = len(blocks.labels_by_sequence)
    if blocks.per_sequence and given != count:
        raise BlockError(
            f"blocks were given for {given} sequences, but the batch has {count}; give one list of "
            "spans or messages per sequence, or a single one for all."
        )
    return range(given) if blocks.per_sequence else [0] * count


def description(blocks: Blocks) -> str:
    """The text that ``repr`` shows."""
    if blocks.kind == "fixed":
        return f"Blocks.fixed({blocks.size})"
    if blocks.image is not None:
        height, width, tile, start, frames = blocks.image
        more = f", start={start}" * (start > 0) + f", frames={frames}" * (frames > 1)
        return f"Blocks.tiles({height}, {width}, {tile}{more})"
    shown = []
    for row, labels in enumerate(blocks.labels_by_sequence):
        names = [f"{label!r}" for label in labels]
        if len(names) > 6:
            names = [*names[:3], "...", *names[-2:]]
        if blocks.block_of_token:
            end = len(blocks.block_of_token[row])
        else:
            end = max([stop for _, stop in blocks.spans_by_sequence[row]], default=0)
        shown.append(f"{len(labels)} blocks to token {end}: {', '.join(names)}")
    if len(shown) > 3:
        shown = [*shown[:2], f"... {len(shown)} sequences"]
    return f"Blocks.{blocks.kind}({'; '.join(shown)})"
