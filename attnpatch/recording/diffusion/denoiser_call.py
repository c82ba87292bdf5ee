"""What is known of a call of a denoiser, and of the texts that its rows are given (``attnpatch.hosts`` reads them)."""

from __future__ import annotations

import dataclasses

import torch

from attnpatch.blocks.tiles import Grid


@dataclasses.dataclass
class TextRow:
    """The text of one row of a batch (``attnpatch.hosts`` finds it).

    Attributes:
        labels: One per block.
        assignment: int64 ``[tokens]``, the block of each text token the denoiser is given, -1 for none.
        text: As it was given; ``None``: not known.
        role: ``"prompt"``, ``"negative"``, or ``""``: not known.
        listed: Words and their blocks, where these are not one word each.
        missing: Words without a block of their own: why.
    """

    labels: tuple[str, ...]
    assignment: torch.Tensor
    text: str | None = None
    role: str = ""
    listed: tuple[tuple[str, tuple[int, ...]], ...] = ()
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Words in order, and the blocks of each."""
        return self.listed or tuple((label, (number,)) for number, label in enumerate(self.labels))

    def is_like(self, other: TextRow) -> bool:
        """Whether the same words of the same text are the same tokens, whatever their embeddings are."""
        mine, its = ((e.text, e.role, e.labels, e.listed, sorted(e.missing)) for e in (self, other))
        return self.text is not None and mine == its and torch.equal(self.assignment, other.assignment)


@dataclasses.dataclass
class DenoiserCall:
    """One call of a denoiser (``attnpatch.hosts`` reads it).

    Attributes:
        batch: Rows of its batch.
        images, texts: What it is given of either.
        text_mask: Bool ``[batch, tokens]`` of the text, or ``None``.
        timesteps: Of the sampler, each once: an image that others are made from has one of its own; empty: it has none.
        latents: Shape of the image, where it comes as rows and columns.
        pictures: Shapes of the pictures, where they come as a sequence of tokens; the first is the one that is sampled.
            Neither: not known.
        past: Tokens in a cache, which a denoiser has not.
    """

    batch: int
    images: list[torch.Tensor]
    texts: list[torch.Tensor]
    text_mask: torch.Tensor | None
    timesteps: frozenset[float] = frozenset()
    latents: Grid | None = None
    pictures: tuple[Grid, ...] = ()
    past: int = 0
