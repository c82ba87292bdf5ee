"""The block of each position of a batch, once the lengths of its sequences are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpatch.errors import BlockError


@dataclass(frozen=True, eq=False)
class Partition:
    """The blocks of a batch of sequences whose real (not padding) tokens are known. All tensors are on the CPU.

    Attributes:
        assignment: ``[batch, total]`` int64, the block of each position; -1 for padding and gaps.
        sizes: ``[batch, num_blocks]`` int64, tokens per block; 0 if the sequence has fewer blocks. The tokens of an
            image tile are not contiguous, so its size is less than ``ends - starts``.
        starts: ``[batch, num_blocks]`` int64, first token of each block, not counting padding; 0 where the size is 0.
        ends: ``[batch, num_blocks]`` int64, one past the last token of each block, not counting padding.
        labels: For each sequence, the labels of its blocks.
        texts: For each sequence, the texts of its blocks; None if they are not known.
    """

    assignment: Tensor
    sizes: Tensor
    starts: Tensor
    ends: Tensor
    labels: tuple[tuple[str, ...], ...]
    texts: tuple[tuple[str, ...], ...] | None = None

    @property
    def num_blocks(self) -> int:
        """The largest number of blocks of a sequence."""
        return self.sizes.shape[1]

    def of_rows(self, order: list[int]) -> "Partition":
        """The blocks of the sequences with the given indices, in that order."""
        return Partition(
            self.assignment[order],
            self.sizes[order],
            self.starts[order],
            self.ends[order],
            tuple(self.labels[row] for row in order),
            None if self.texts is None else tuple(self.texts[row] for row in order),
        )

    def __repr__(self) -> str:
        batch, total = self.assignment.shape
        return f"Partition({batch} x {total} positions, {self.num_blocks} blocks)"


def tiled(image: tuple[int, int, int, int, int], valid: Tensor) -> Partition:
    """The partition of images into tiles; ``image`` as in ``Blocks.image``, ``valid`` as in ``Blocks.resolve``."""
    height, width, _, start, frames = image
    from attnpatch.blocks.tiles import Tiles

    tiles = Tiles.of_blocks(image)
    block = tiles.cells(tiles.image)
    tokens = start + torch.arange(len(block))
    assignment = torch.full(valid.shape, -1, dtype=torch.int64)
    for row, real in enumerate(valid):
        positions = real.nonzero().flatten()
        if len(positions) < start + len(block):
            shape = f"{height} x {width}" if frames == 1 else f"{frames} x {height} x {width}"
            raise BlockError(
                f"{shape} image tokens from token {start} on need {start + len(block)}, sequence {row} has "
                f"{len(positions)} real tokens; give height and width in tokens, not pixels."
            )
        assignment[row, positions[tokens]] = block
    none = torch.zeros(len(tiles.sizes()), dtype=torch.int64)
    starts = none.scatter_reduce(0, block, tokens, "amin", include_self=False)
    ends = none.scatter_reduce(0, block, tokens + 1, "amax", include_self=False)
    sizes, starts, ends = (each.repeat(len(valid), 1) for each in (tiles.sizes(), starts, ends))
    return Partition(assignment, sizes, starts, ends, (tiles.labels(),) * len(valid))


def assigned(
    blocks: Sequence[tuple[int, ...]], labels: Sequence[tuple[str, ...]], after: str, valid: Tensor
) -> Partition:
    """The partition of sequences whose tokens are assigned to blocks one by one; without texts.

    Args:
        blocks: For each sequence, the block of each of its first tokens.
        labels: For each sequence, the labels of its blocks.
        after: Label of an additional block for all later tokens.
        valid: As in ``Blocks.resolve``.

    Raises:
        BlockError: A sequence has fewer tokens than were assigned.
    """
    names = []
    assignment = torch.full(valid.shape, -1, dtype=torch.int64)
    for row, (real, known, own) in enumerate(zip(valid, blocks, labels, strict=True)):
        positions = real.nonzero().flatten()
        later = len(positions) - len(known)
        if later < 0:
            raise BlockError(
                f"the prompt has {len(known)} tokens, but sequence {row} has {len(positions)} real tokens; give the inputs "
                "that the model is called with."
            )
        names.append((*own, after) if later else own)
        assignment[row, positions] = torch.tensor([*known, *[len(own)] * later], dtype=torch.int64)
    sizes = torch.zeros(len(valid), max(1, *map(len, names)), dtype=torch.int64)
    starts, ends = sizes.clone(), sizes.clone()
    for row, real in enumerate(valid):
        block = assignment[row, real]
        tokens = torch.arange(len(block))
        sizes[row].scatter_add_(0, block, torch.ones_like(tokens))
        starts[row].scatter_reduce_(0, block, tokens, "amin", include_self=False)
        ends[row].scatter_reduce_(0, block, tokens + 1, "amax", include_self=False)
    return Partition(assignment, sizes, starts, ends, tuple(names))


def blocks_of_tokens(bounds: Tensor, length: int) -> Tensor:
    """The block of each token, ``[length]`` int64, -1 in gaps; ``bounds`` is ``[blocks, 2]``, sorted."""
    tokens = torch.arange(length)
    block = torch.searchsorted(bounds[:, 0].contiguous(), tokens, right=True) - 1
    inside = (block >= 0) & (tokens < bounds[block.clamp(min=0), 1])
    return block.masked_fill(~inside, -1)
