"""Pictures among the tokens of a prompt: each is divided into tiles, and what is around them is text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnpatch.blocks.texts import before
from attnpatch.blocks.tiles import Tiles

# Most tiles along the longer edge of a picture, unless the edge of a tile is given.
MOST_TILES = 16


@dataclass(frozen=True)
class PictureGrid:
    """Rows and columns of tokens that show a picture.

    Attributes:
        label: Such as ``"image 1"``.
        height, width: Rows and columns.
        tokens: The position in the sequence of each token, row by row.
        per_place: How many tokens, one after the other, show the same row and column.
    """

    label: str
    height: int
    width: int
    tokens: tuple[int, ...]
    per_place: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture, or a frame of a video, in one sequence. Positions do not count padding.

    Attributes:
        label: Such as ``"image 1"``.
        start, stop: Its first token, and one past its last.
        grids: What shows it; several if the model sees it at several resolutions. Its other tokens are in no grid: a
            class token, the ends of rows, markers between parts.
    """

    label: str
    start: int
    stop: int
    grids: tuple[PictureGrid, ...]


@dataclass(frozen=True)
class PromptWithPictures:
    """One sequence.

    Attributes:
        length: Number of its tokens.
        pictures: Its pictures, in order, without overlap.
        text_of: The text of the tokens from one position to another.
    """

    length: int
    pictures: tuple[Picture, ...]
    text_of: Callable[[int, int], str]


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of one sequence: the block of each token, and the labels and texts of the blocks."""

    block_of_token: tuple[int, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]


def picture_blocks(prompt: PromptWithPictures, tile: int | None, rest: str) -> TokenBlocks:
    """The tiles of each picture and each contiguous part of text, in the order of the prompt.

    Args:
        prompt: The sequence.
        tile: Edge of a tile in tokens; ``None``: at most 16 tiles along the longer edge of each grid.
        rest: Label of the text after the last picture.
    """
    block_of_token: list[int] = []
    labels: list[str] = []
    texts: list[str] = []

    def add_text(stop: int, label: str) -> None:
        start = len(block_of_token)
        if stop > start:
            block_of_token.extend([len(labels)] * (stop - start))
            labels.append(label)
            texts.append(prompt.text_of(start, stop) or label)

    for picture in prompt.pictures:
        add_text(picture.start, before(picture.label, rest))
        block = dict.fromkeys(range(picture.start, picture.stop), -1)
        for grid in picture.grids:
            step = tile or max(1, -(-max(grid.height, grid.width) // MOST_TILES))
            tiles = Tiles.of_blocks((grid.height, grid.width, step, 0, 1))
            cells = tiles.cells(tiles.image).repeat_interleave(grid.per_place).tolist()
            block |= {token: len(labels) + cell for token, cell in zip(grid.tokens, cells, strict=True)}
            labels += [f"{grid.label} {name}" for name in tiles.labels()]
        if -1 in block.values():
            block = {token: len(labels) if cell < 0 else cell for token, cell in block.items()}
            labels.append(f"{picture.label} other")
        block_of_token += block.values()
        texts += labels[len(texts) :]
    add_text(prompt.length, rest)
    return TokenBlocks(tuple(block_of_token), tuple(labels), tuple(texts))
