"""Pictures that a processor cuts into pieces: one grid of all pieces, and the picture whole. Videos in parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attnpatch.blocks.pictures import Picture, PictureGrid
from attnpatch.errors import BlockError
from attnpatch.hosts.transformers.picture_facts import (
    Prompt,
    does_not_fit,
    fact,
    setting,
    shape_of_pixels,
    special_token,
    whole_picture,
)


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


def resampled(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Idefics 2: a resampler mixes all places of a piece, so the tokens of a piece are one tile.

    A picture is one piece, or its four quarters and then the picture whole (``do_image_splitting``).
    """
    count = setting(processor, "image_seq_len")
    most = shape_of_pixels(inputs, 5)[1]
    is_split = getattr(processor.image_processor, "do_image_splitting", None)
    if not isinstance(is_split, bool):
        raise does_not_fit(
            f"do_image_splitting of the image processor is {is_split!r} instead of True or False"
        )
    pieces = 5 if is_split else 1
    found = []
    for prompt in prompts:
        runs = prompt.runs()
        if any(len(run) != count for run in runs) or len(runs) % pieces or len(runs) > most:
            sizes = f"{len(prompt.places)} image tokens in {len(runs)} runs"
            raise does_not_fit(
                f"a prompt has {sizes}; expected are at most {most} runs of {count}, {pieces} a picture"
            )
        found.append(
            [
                _of_pieces(f"image {at // pieces + 1}", runs[at : at + pieces])
                for at in range(0, len(runs), pieces)
            ]
        )
    return found


def _of_pieces(label: str, runs: list[list[int]]) -> Picture:
    *quarters, whole = runs
    tokens = tuple(place for run in quarters for place in run)
    grids = (PictureGrid(label, 2, 2, tokens, len(whole)),) if quarters else ()
    name = f"{label} whole" if quarters else label
    grids = (*grids, PictureGrid(name, 1, 1, tuple(whole), len(whole)))
    return Picture(label, runs[0][0], whole[-1] + 1, grids)


def places_of_videos(processor: Any, prompts: list[Prompt]) -> list[list[int]]:
    """For each sequence, the positions of its video tokens."""
    mark = special_token(processor, "video")
    return [[at for at, one in enumerate(prompt.ids) if one == mark] for prompt in prompts]


def parts_of_kimi(processor: Any, inputs: Mapping[str, Any], places: list[list[int]]) -> list[list[Picture]]:
    """Kimi K2.5: parts of a video, each the mean of up to four frames.

    The processor's output does not tell which video a part is of, so parts are numbered as they come in the prompt.

    Args:
        processor: Kimi's.
        inputs: What it returned; ``video_grid_thw`` has a line for each part.
        places: From ``places_of_videos``.

    Raises:
        BlockError: The tokens are others.
    """
    merge = setting(getattr(processor, "video_processor", None) or processor.image_processor, "merge_size")
    shapes = iter(torch.as_tensor(fact(inputs, "video_grid_thw")).reshape(-1, 3).tolist())
    found = []
    for mine in places:
        own: list[Picture] = []
        while mine:
            _, height, width = next(shapes, (0, 0, 0))
            height, width = height // merge, width // merge
            label = f"video part {len(own) + 1}"
            own.append(whole_picture(label, mine[: height * width], height, width))
            mine = mine[height * width :]
        found.append(own)
    if next(shapes, None) is not None:
        raise does_not_fit("video_grid_thw has more parts of videos than the tokens")
    return found
