"""Images as grids of tokens: sites of any resolution are resampled to one grid of tiles, weighted by area.

A token of a site covers an area of the image, and so does a tile. If a token overlaps several tiles, it counts for each
of them by the overlap. A site is summed over cells, which are as coarse as possible: along each axis, tokens inside the
same tile form one cell. The sums are resampled to tiles when they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Edges:
    """One axis of an image, of ``length`` in any unit, cut every ``step``. The last piece may be shorter."""

    length: int
    step: int

    @property
    def count(self) -> int:
        return -(-self.length // self.step)

    def sizes(self) -> torch.Tensor:
        """Lengths of the pieces, int64 ``[count]``."""
        places = torch.arange(self.count + 1) * self.step
        return places.clamp(max=self.length).diff()

    @functools.lru_cache(maxsize=256)  # noqa: B019 (few and small)
    def cells(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Group the ``tokens`` of a site along this axis into cells.

        Returns:
            int64 ``[tokens]``, the cell of each token; and float64 ``[count, cells]``, the overlap of each piece with
            each cell. The unit of the overlap is such that the whole axis has the length ``length * tokens``.
        """
        pieces = (torch.arange(self.count + 1) * self.step).clamp(max=self.length) * tokens
        edges = torch.arange(tokens + 1) * self.length
        low = torch.maximum(pieces[:-1, None], edges[None, :-1])
        shared = (torch.minimum(pieces[1:, None], edges[None, 1:]) - low).clamp(min=0)
        inside = (shared > 0).sum(0) == 1
        piece = shared.argmax(0)
        # A token begins a new cell unless it and the token before are inside the same piece.
        joined = inside[1:] & inside[:-1] & (piece[1:] == piece[:-1])
        cell = torch.cat([torch.zeros(1, dtype=torch.int64), (~joined).cumsum(0)])
        summed = torch.zeros(self.count, int(cell[-1]) + 1, dtype=torch.int64).index_add_(1, cell, shared)
        return cell, summed.double()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Frames, rows and columns of tokens."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    def is_merged_from(self, sides: Sequence[int]) -> bool:
        """True if tokens into which dimensions of these lengths were merged may have this grid."""
        edges = [edge for edge in (self.frames, self.height, self.width) if edge > 1]
        merged = [*itertools.accumulate(sides, operator.mul)]
        if len(sides) < 2:
            return True
        if len(sides) >= len(edges):
            return list(sides) == edges
        return self.frames * self.height in merged and self.frames in (1, *merged)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def resolutions(cls, tokens: int, like: Grid) -> tuple[Grid, ...]:
        """The grids of so many tokens that show the image of ``like`` at another resolution.

        The ratio of rows to columns is kept, up to rounding either to a whole number. The number of frames is kept, or
        reduced if frames are merged (to a half, a quarter or one), and then rows and columns are not more than before.
        """
        found = []
        for frames in dict.fromkeys([like.frames, -(-like.frames // 2), -(-like.frames // 4), 1]):
            area = tokens // frames
            if tokens % frames or not area:
                continue
            small = [edge for edge in range(1, math.isqrt(area) + 1) if area % edge == 0]
            ratio = like.height / like.width
            heights = [*small, *(area // edge for edge in small)]
            height = min(heights, key=lambda edge: abs(math.log(edge * edge / (area * ratio))))
            width = area // height
            # The ratio must agree within the rounding of one edge; for small grids the tolerance is smaller.
            off = min(abs(height - width * ratio), abs(width - height / ratio))
            is_finer = frames < like.frames and (height > like.height or width > like.width)
            if off < (1.0 if min(height, width) >= 4 else 0.5) and not is_finer:
                found.append(cls(frames, height, width))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The grid of tiles that maps of an image are resampled to.

    Attributes:
        frames, height, width: The axes of the image, and how each is cut.
    """

    frames: Edges
    height: Edges
    width: Edges

    @classmethod
    def of(cls, image: Grid, most: int) -> Tiles:
        """Tiles for an image: single tokens, or larger ones so that there are at most ``most`` along either edge."""
        step = max(1, -(-max(image.height, image.width) // most))
        return cls(Edges(image.frames, 1), Edges(image.height, step), Edges(image.width, step))

    @classmethod
    def of_blocks(cls, image: tuple[int, int, int, int, int]) -> Tiles:
        """Tiles as ``Blocks.tiles`` specifies them: height, width, edge of a tile, start, frames."""
        height, width, tile, _, frames = image
        return cls(Edges(frames, 1), Edges(height, tile), Edges(width, tile))

    @property
    def image(self) -> Grid:
        """The grid of the image's tokens."""
        return Grid(self.frames.length, self.height.length, self.width.length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of frames, rows and columns of tiles."""
        return self.frames.count, self.height.count, self.width.count

    def labels(self) -> tuple[str, ...]:
        """The labels ``"r0c0"``, ...; for a video ``"f0r0c0"``, ..."""
        return labels_of(self.shape)

    def sizes(self) -> torch.Tensor:
        """int64 ``[tiles]``, the image tokens in each tile."""
        frames, height, width = (edges.sizes() for edges in (self.frames, self.height, self.width))
        return (frames[:, None, None] * height[:, None] * width).flatten()

    def cell_shape(self, site: Grid) -> tuple[int, int, int]:
        """Numbers of frames, rows and columns of a site's cells."""
        frames, height, width = (shared.shape[1] for _, shared in self._axes(site))
        return frames, height, width

    def cells(self, site: Grid) -> torch.Tensor:
        """int64 ``[tokens]``, the cell of each token of a site."""
        frame, row, column = (cell for cell, _ in self._axes(site))
        counts = self.cell_shape(site)
        return ((frame[:, None, None] * counts[1] + row[:, None]) * counts[2] + column).flatten()

    def average(self, values: torch.Tensor, site: Grid) -> torch.Tensor:
        """Convert means over cells, ``[..., cells]``, to means over the area of tiles, ``[..., tiles]``."""
        return self._brought(values, site, [shared / shared.sum(1, True) for _, shared in self._axes(site)])

    def spread(self, values: torch.Tensor, site: Grid) -> torch.Tensor:
        """Convert sums over cells, ``[..., cells]``, to sums over tiles, ``[..., tiles]``, in proportion to area."""
        return self._brought(values, site, [shared / shared.sum(0, True) for _, shared in self._axes(site)])

    def _brought(self, values: torch.Tensor, site: Grid, weights: list[torch.Tensor]) -> torch.Tensor:
        lead = values.shape[:-1]
        values = values.reshape(-1, *(weight.shape[1] for weight in weights))
        frames, height, width = weights
        brought = torch.einsum("bfhw,kf,ih,jw->bkij", values.double(), frames, height, width)
        # The last size is given instead of -1, because a text without words has no elements to infer it from.
        return brought.reshape(*lead, math.prod(brought.shape[1:]))

    def _axes(self, site: Grid) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = ((self.frames, site.frames), (self.height, site.height), (self.width, site.width))
        return [edges.cells(tokens) for edges, tokens in pairs]


def labels_of(shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The labels of a grid of frames, rows and columns."""
    frames, height, width = shape
    places = [f"r{i}c{j}" for i in range(height) for j in range(width)]
    return tuple(places) if frames == 1 else tuple(f"f{k}{place}" for k in range(frames) for place in places)
