"""The tokens of a picture in LLaVA-NeXT and LLaVA-OneVision: whole, then its pieces as one grid, where each row has an end.

Of a video of LLaVA-OneVision: all frames, and then one end.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnpatch.blocks.pictures import Picture, PictureGrid
from attnpatch.errors import BlockError
from attnpatch.hosts.transformers.picture_facts import does_not_fit, fact, setting, whole_picture


def class_tokens(processor: Any) -> int:
    """How many tokens of a picture are no patches: 1 if the model keeps a class token, or else 0.

    Raises:
        BlockError: The processor's settings do not tell it.
    """
    strategy = getattr(processor, "vision_feature_select_strategy", None)
    further = getattr(processor, "num_additional_image_tokens", 0)
    found = further - (strategy == "default")
    if strategy not in ("default", "full") or found not in (0, 1):
        raise BlockError(
            f"{type(processor).__name__}: vision_feature_select_strategy={strategy!r} and num_additional_image_tokens="
            f"{further!r} do not tell whether a class token comes before the patches; set both as the model needs them."
        )
    return found


def pictures(
    processor: Any, pixels: Sequence[int], sizes: Sequence[tuple[int, int]], places: list[list[int]]
) -> list[list[Picture]]:
    """The pictures of each sequence.

    Args:
        processor: LLaVA-NeXT's.
        pixels: The shape of ``pixel_values``, ``[pictures, pieces, channels, height, width]``.
        sizes: Height and width of each original picture, in pixels.
        places: For each sequence, the positions of its image tokens.

    Raises:
        BlockError: A setting is missing, or the tokens are others.
    """
    patch = getattr(processor, "patch_size", None)
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if not patch or not pinpoints or class_tokens(processor):
        raise BlockError(
            f"LlavaNextProcessor: patch_size={patch!r}, image_grid_pinpoints={pinpoints!r} and "
            f"vision_feature_select_strategy={processor.vision_feature_select_strategy!r} do not tell the rows of image "
            "tokens; set them as the model needs them (with the strategy 'default')."
        )
    edge = pixels[-2] // patch, pixels[-1] // patch
    left = iter(sizes)
    found = []
    for mine in places:
        own: list[Picture] = []
        while mine:
            size = next(left, None)
            grid = None if size is None else _unpadded(size, pinpoints, (pixels[-2], pixels[-1]), edge)
            count = 0 if grid is None else edge[0] * edge[1] + grid[0] * (grid[1] + 1)
            if grid is None or len(mine) < count or mine[count - 1] - mine[0] != count - 1:
                raise _others("LlavaNextProcessor", f"image {len(own) + 1}", size, count, len(mine))
            own.append(_picture(f"image {len(own) + 1}", mine[:count], edge, grid))
            mine = mine[count:]
        found.append(own)
    return found


def pictures_of_onevision(
    processor: Any,
    pixels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    alone: Sequence[bool],
    places: list[list[int]],
) -> list[list[Picture]]:
    """The pictures of each sequence, for LLaVA-OneVision.

    Args:
        processor: LLaVA-OneVision's.
        pixels, sizes, places: As ``pictures`` takes them.
        alone: For each picture, whether it is the only one of its prompt. Others are not cut into pieces.

    Raises:
        BlockError: A setting is missing, or the tokens are others.
    """
    count, limit = getattr(processor, "num_image_tokens", None), getattr(processor, "vision_aspect_ratio", "")
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    side = math.isqrt(count or 0)
    most = re.fullmatch(r"anyres_max_(\d+)", str(limit))
    if not pinpoints or not count or side * side != count or most is None:
        raise BlockError(
            f"LlavaOnevisionProcessor: num_image_tokens={count!r}, vision_aspect_ratio={limit!r} and "
            f"image_grid_pinpoints={pinpoints!r} do not tell the rows of image tokens; set them as the model needs them."
        )
    edge, left, found = (side, side), iter(zip(sizes, alone, strict=True)), []
    for mine in places:
        own: list[Picture] = []
        while mine:
            size, is_alone = next(left, (None, False))
            grid = None
            if size is not None and is_alone:
                grid = _limited(
                    _unpadded(size, pinpoints, (pixels[-2], pixels[-1]), edge), edge, int(most[1])
                )
            needed = count + (1 if grid is None else grid[0] * (grid[1] + 1))
            label = f"image {len(own) + 1}"
            if size is None or len(mine) < needed or mine[needed - 1] - mine[0] != needed - 1:
                raise _others("LlavaOnevisionProcessor", label, size, needed, len(mine))
            tokens, mine = mine[:needed], mine[needed:]
            whole = Picture(
                label, tokens[0], tokens[-1] + 1, (PictureGrid(label, *edge, tuple(tokens[:count])),)
            )
            own.append(whole if grid is None else _picture(label, tokens, edge, grid))
        found.append(own)
    return found


def _limited(grid: tuple[int, int], edge: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns after a grid of more than ``most`` pieces was resized, as the model does it."""
    ratio = math.sqrt(grid[0] * grid[1] / (most * edge[0] ** 2))
    return grid if ratio <= 1.1 else (int(grid[0] // ratio), int(grid[1] // ratio))


def _others(name: str, label: str, size: Any, needed: int, count: int) -> BlockError:
    return BlockError(
        f"{name}: {label} of size {size} needs {needed} contiguous image tokens, and there are {count}; give the inputs as "
        "the processor made them."
    )


def _picture(label: str, places: list[int], edge: tuple[int, int], grid: tuple[int, int]) -> Picture:
    area, (height, width) = edge[0] * edge[1], grid
    rows = places[area:]
    tokens = [rows[row * (width + 1) + column] for row in range(height) for column in range(width)]
    fine = PictureGrid(label, height, width, tuple(tokens))
    whole = PictureGrid(f"{label} whole", *edge, tuple(places[:area]))
    return Picture(label, places[0], places[-1] + 1, (whole, fine))


def _unpadded(
    size: tuple[int, int], pinpoints: Any, piece: tuple[int, int], edge: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the pieces' tokens, without those that show only padding."""
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(tuple(size), pinpoints)
    height, width = best[0] // piece[0] * edge[0], best[1] // piece[1] * edge[1]
    if size[1] / size[0] > width / height:
        # Rounded as in the model, which cuts as many rows off at the top as at the bottom.
        height -= (height - int(round(size[0] * (width / size[1]), 7))) // 2 * 2
    else:
        width -= (width - int(round(size[1] * (height / size[0]), 7))) // 2 * 2
    return height, width


def frames_of_onevision(
    processor: Any, inputs: Mapping[str, Any], places: list[list[int]]
) -> list[list[Picture]]:
    """LLaVA-OneVision: all frames of a video, each at half the rows and columns of a picture, and then one end.

    Args:
        processor: LLaVA-OneVision's.
        inputs: What it returned; ``pixel_values_videos`` has the number of frames.
        places: From ``places_of_videos``.

    Raises:
        BlockError: The tokens are others.
    """
    count = setting(processor, "num_image_tokens")
    side = math.ceil(math.isqrt(count) / 2)
    if math.isqrt(count) ** 2 != count:
        raise does_not_fit(f"a frame has {count} tokens before they are pooled, which is no square")
    frames = iter([len(video) for video in fact(inputs, "pixel_values_videos")])
    found = []
    for mine in places:
        own: list[Picture] = []
        number = 0
        while mine:
            number, shown = number + 1, next(frames, 0)
            needed = shown * side * side + 1
            if not shown or len(mine) < needed or mine[needed - 1] - mine[0] != needed - 1:
                raise does_not_fit(f"video {number} of {shown} frames has no {needed} contiguous tokens")
            for frame in range(shown):
                tokens = mine[frame * side * side : (frame + 1) * side * side]
                own.append(whole_picture(f"video {number} f{frame}", tokens, side, side))
            # The end of the video shows no place.
            own[-1] = dataclasses.replace(own[-1], stop=own[-1].stop + 1)
            mine = mine[needed:]
        found.append(own)
    if next(frames, None) is not None:
        raise does_not_fit("pixel_values_videos has more videos than the tokens")
    return found
