"""Pictures that a processor cuts into pieces: one grid of all pieces, and the picture whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from attnpatch.blocks.pictures import Picture, PictureGrid
from attnpatch.errors import BlockError
from attnpatch.hosts.transformers.picture_facts import Prompt, does_not_fit, setting, whole_picture


def joined(label: str, pieces: dict[tuple[int, int], list[int]], side: int) -> tuple[PictureGrid, ...]:
    """One grid of all pieces of a picture; none if it was not cut."""
    if not pieces:
        return ()
    rows, columns = (1 + max(place[axis] for place in pieces) for axis in (0, 1))
    if len(pieces) != rows * columns:
        raise does_not_fit(f"{label} has {len(pieces)} of {rows} x {columns} pieces")
    tokens = [
        pieces[row // side, column // side][row % side * side + column % side]
        for row in range(rows * side)
        for column in range(columns * side)
    ]
    return (PictureGrid(label, rows * side, columns * side, tuple(tokens)),)


def cut_pictures(
    processor: Any, prompt: Prompt, side: int, piece: tuple[int, int], sizes: Iterator[tuple[int, int]]
) -> Iterator[Picture]:
    """InternVL's pictures of one prompt: the pieces row by row, and then the picture whole if there are several."""
    cutter = processor.image_processor
    canvas = getattr(sys.modules[type(cutter).__module__], "get_optimal_tiled_canvas", None)
    if canvas is None:
        raise BlockError(
            f"{type(cutter).__name__}: it is not known how it cuts pictures; call it with crop_to_patches=False."
        )
    for number, run in enumerate(prompt.runs()):
        label, size = f"image {number + 1}", next(sizes, None)
        if size is None:
            raise does_not_fit(f"there are more pictures among the tokens than the {number} in images")
        columns, rows = canvas(size, piece, setting(cutter, "min_patches"), setting(cutter, "max_patches"))
        parts = [run[start : start + side * side] for start in range(0, len(run), side * side)]
        if len(parts) != rows * columns + (rows * columns > 1) or len(parts[-1]) != side * side:
            raise does_not_fit(
                f"{label} of {size[0]} x {size[1]} pixels is cut into {rows} x {columns} pieces, and it has {len(run)} tokens"
            )
        if len(parts) == 1:
            yield whole_picture(label, run, side, side)
            continue
        pieces = {divmod(place, columns): part for place, part in enumerate(parts[:-1])}
        whole = PictureGrid(f"{label} whole", side, side, tuple(parts[-1]))
        yield Picture(label, run[0], run[-1] + 1, (*joined(label, pieces, side), whole))
