"""Pictures among the blocks of a map: which block is which tile, and how large the tiles are."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

# "image 1 r0c2", "video 1 f0 r0c2", "image 1 whole r0c2"; "r0c2" where the image is all that there is.
_TILE = re.compile(r"(?:(.+) )?r(\d+)c(\d+)")
ONLY = "image"


@dataclasses.dataclass(frozen=True)
class PictureTiles:
    """The tiles of a picture.

    Attributes:
        blocks: ``[rows, columns]``: the number of each tile's block.
        heights, widths: The size of each row and each column of tiles, in any unit. Those at the edges may be narrower.
    """

    blocks: np.ndarray
    heights: np.ndarray
    widths: np.ndarray


def picture_tiles(labels: Sequence[str], sizes: Sequence[int]) -> dict[str, PictureTiles]:
    """The tiles of each picture, by its label such as ``"image 1"``; pictures with missing tiles are left out.

    Args:
        labels: Labels of the blocks.
        sizes: Their tokens.
    """
    found: dict[str, dict[tuple[int, int], int]] = {}
    for place, label in enumerate(labels):
        if match := _TILE.fullmatch(str(label)):
            found.setdefault(match[1] or ONLY, {})[int(match[2]), int(match[3])] = place
    pictures = {}
    for name, tiles in found.items():
        rows, columns = (1 + max(place[axis] for place in tiles) for axis in (0, 1))
        if len(tiles) == rows * columns:
            blocks = np.array([[tiles[i, j] for j in range(columns)] for i in range(rows)])
            tokens = np.asarray(sizes)[blocks]
            # The sizes of tiles in a row are in the ratio of their widths.
            pictures[name] = PictureTiles(blocks, _ratio(tokens[:, 0]), _ratio(tokens[0]))
    return pictures


def _ratio(sizes: np.ndarray) -> np.ndarray:
    return sizes // max(1, math.gcd(*sizes.tolist()))
