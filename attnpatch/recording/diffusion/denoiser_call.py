"""The facts of a denoiser's call, and the texts of its batch rows (``attnpatch.hosts`` reads them)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from attnpatch.blocks.tiles import Grid
from attnpatch.errors import BlockError


@dataclasses.dataclass
class TextRow:
    """The text of one row of a batch (``attnpatch.hosts`` finds it).

    Attributes:
        labels: One per block.
        assignment: int64 ``[tokens]``: the block of each text token that the denoiser is given, -1 for none.
        text: The text as the pipeline was given it; ``None``: not known.
        role: ``"prompt"``, ``"negative"``, or ``""``: not known.
        listed: Words and their blocks, if blocks are not one word each.
        missing: For each word without a block of its own, the reason.
    """

    labels: tuple[str, ...]
    assignment: torch.Tensor
    text: str | None = None
    role: str = ""
    listed: tuple[tuple[str, tuple[int, ...]], ...] = ()
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The words in order, each with its blocks."""
        return self.listed or tuple((label, (number,)) for number, label in enumerate(self.labels))

    def is_like(self, other: TextRow) -> bool:
        """True if both are the same text with the same words at the same tokens, whatever the embeddings are."""
        mine, its = ((e.text, e.role, e.labels, e.listed, sorted(e.missing)) for e in (self, other))
        return self.text is not None and mine == its and torch.equal(self.assignment, other.assignment)

    def check_words(self, labels: Sequence[str], assignment: torch.Tensor) -> None:
        """Check that given words lie at the tokens where they were found: another tokenizer, or chunks, would move them.

        Raises:
            BlockError: They do not.
        """
        words: dict[int, list[str]] = {}
        for label, numbers in self.words:
            for number in numbers:
                words.setdefault(number, []).append(label)
        for token, (mine, its) in enumerate(zip(assignment.tolist(), self.assignment.tolist(), strict=True)):
            if mine >= 0 and its >= 0 and labels[mine] not in words[its]:
                raise BlockError(
                    f"text token {token} is of {words[its][0]!r}, but the blocks have {labels[mine]!r} there; give the words of "
                    "the pipeline's own text, with its tokenizer, or leave them out: attnpatch finds them"
                )


@dataclasses.dataclass
class DenoiserCall:
    """One call of a denoiser (``attnpatch.hosts`` reads it).

    Attributes:
        batch: Number of batch rows.
        images, texts: Its image inputs and its text inputs.
        text_mask: Bool ``[batch, tokens]`` of the text, or ``None``.
        timesteps: The timesteps in the call, each once (a reference image may have one of its own); may be empty.
        latents: The grid of the image, if it comes as rows and columns.
        pictures: The grids of the pictures, if they come as a sequence of tokens; the first is the sampled one. If
            neither is given, the grid is not known.
        pooled: A vector for each batch row's text, which tells texts apart if their tokens are not given; or ``None``.
        past: Tokens in a cache; always 0, since a denoiser has none.
    """

    batch: int
    images: list[torch.Tensor]
    texts: list[torch.Tensor]
    text_mask: torch.Tensor | None
    timesteps: frozenset[float] = frozenset()
    latents: Grid | None = None
    pictures: tuple[Grid, ...] = ()
    pooled: torch.Tensor | None = None
    past: int = 0
