"""Where in a picture a block looks: the row of a map with ``Blocks.images``, drawn over the picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.picture_tiles import picture_tiles
from attnpatch.maps.ranking import rows_of
from attnpatch.plotting import map_figure, overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_heat(
    block_map: BlockMap,
    picture: str = "image 1",
    *,
    query: int | str = -1,
    layer: Any = "mean",
    head: Any = "mean",
    sequence: int = 0,
) -> np.ndarray:
    """How much a block attends to each part of a picture.

    Args:
        block_map: A map with ``Blocks.images``.
        picture: Label of the picture, or of a frame of a video (``"video 1 f0"``).
        query: Number or label of the query block; -1: the last one with tokens, such as the answer.
        layer, head, sequence: As in ``BlockMap.select``; one layer, or ``"mean"``.

    Returns:
        float32 ``[rows, columns]``: the mass on each tile, divided by the number of its tokens. It covers the whole
        picture: narrower tiles at its edges have fewer elements.

    Raises:
        CaptureError: It is no block map, or has no such picture, block, layer, head or sequence.
    """
    if not isinstance(block_map, BlockMap):
        raise CaptureError(
            f"block_map is {type(block_map).__name__}; accepted is a block map, such as maps.block_map."
        )
    one = block_map.select(layer=layer, head=head, sequence=sequence, step="mean")
    if len(one.layers) != 1:
        raise CaptureError(f"{len(one.layers)} layers in one picture; give one layer or 'mean'.")
    rows_asked = rows_of(one, query)
    if len(rows_asked) != 1:
        raise CaptureError(f"query={query!r} names {len(rows_asked)} query blocks; give the number of one.")
    mass = one.mass.reshape(one.mass.shape[-2:])[rows_asked[0]].numpy()
    tiles = picture_tiles(one.key_labels, one.key_sizes.tolist())
    if picture not in tiles:
        known = ", ".join(map(repr, tiles))
        raise CaptureError(f"the map has no tiles of {picture!r}; it has tiles of: {known or 'no picture'}.")
    found = tiles[picture]
    heat = mass[found.blocks] / one.key_sizes.numpy()[found.blocks]
    return np.repeat(np.repeat(heat, found.heights, 0), found.widths, 1)


def plot_on_picture(
    image: Any,
    block_map: BlockMap,
    picture: str = "image 1",
    *,
    layers: Sequence[Any] = ("mean",),
    path: str | os.PathLike | None = None,
    **options: Any,
) -> Figure | Path:
    """Draw what a block attends to over a picture: one panel per layer, each with a scale of its own.

    Args:
        image: The picture as the model sees it: PIL, numpy or torch. A processor may have cut its edges off.
        block_map: A map with ``Blocks.images``.
        picture: As in ``picture_heat``.
        layers: Entries of ``block_map.layers``, or ``"mean"``.
        path: ``.png``, ``.svg`` or ``.pdf``; ``None`` returns the figure.
        **options: ``query``, ``head`` and ``sequence`` as in ``picture_heat``.

    Returns:
        The path, or a matplotlib ``Figure`` without a path.

    Raises:
        CaptureError: As ``picture_heat``, or the image or the path cannot be used.
        MissingExtraError: matplotlib is not installed.
    """
    names = ["mean over layers" if layer == "mean" else f"layer {layer}" for layer in layers]
    heats = [picture_heat(block_map, picture, layer=layer, **options) for layer in layers]
    figure = overlay.overlay(image, dict(zip(names, heats, strict=True)), title=picture)
    return map_figure.write(figure, path)
