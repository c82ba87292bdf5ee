"""Makes block maps from the sums of a run of the sampler."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.blocks.heads import Heads, chosen_heads
from attnpatch.blocks.tiles import labels_of
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.recording.diffusion.denoiser_call import TextRow
from attnpatch.recording.diffusion.denoising import (
    KEY_TILES,
    QUERY_TILES,
    ImageRecord,
    Row,
    Run,
    Sampling,
    Side,
    tiles_of,
)

# Kinds of attention, by whether queries have text, queries have image tokens, keys have text, keys have image tokens.
NAMES = {
    (False, True, True, False): "cross",
    (False, True, False, True): "self",
    (True, True, True, True): "joint",
    (True, False, True, False): "text",
}


def kind_of(record: ImageRecord) -> str:
    query, key = record.query_side, record.key_side
    found = (query.has_text, query.grid is not None, key.has_text, key.grid is not None)
    if found in NAMES:
        return NAMES[found]
    sides = ("text" * found[0], "image" * found[1]), ("text" * found[2], "image" * found[3])
    return " to ".join("+".join(filter(None, side)) for side in sides)


class Reading:
    """Makes block maps from one run of the sampler."""

    def __init__(self, sampling: Sampling, run: Run, heads: Heads, own_grid: bool) -> None:
        self.run, self.heads, self.own_grid = run, heads, own_grid
        self.tiles = None
        if run.image is not None:
            self.tiles = tiles_of(sampling, run, QUERY_TILES), tiles_of(sampling, run, KEY_TILES)

    def block_map(self, names: list[str], steps: list[int], metadata: dict[str, Any]) -> BlockMap:
        """The block map of sites of one kind, in which ``steps`` are kept separate; without ``steps``, all steps are
        averaged.
        """
        order = {"prompt": 0, "": 1, "negative": 2}
        rows = sorted(
            (row for row in self.run.rows if row[0] not in self.run.unclear),
            key=lambda row: (row in self.run.duplicates, order[self.run.texts[row[0]].role]),
        )
        values = {
            row: [[self._site(step, row, name) for name in names] for step in steps or [0]] for row in rows
        }
        whole = [row for row in rows if all(v is not None for each in values[row] for v in each)]
        if not rows:
            raise CaptureError(f"nothing was captured: {next(iter(self.run.unclear.values()))}")
        if not whole:
            raise CaptureError(
                "no image passed through all of these sites at every step; choose fewer steps or sites"
            )
        first = self._record(names[0])
        if len({self._shape(self._record(name)) for name in names}) > 1:
            raise CaptureError(
                f"{len(names)} sites differ in heads or in resolution and do not fit one map; choose fewer, or leave "
                "own_grid and heads out"
            )
        maps = [torch.stack([torch.stack(each) for each in values[row]]) for row in whole]
        height, width = (max(each.shape[axis] for each in maps) for axis in (-2, -1))
        mass = torch.stack(
            [torch.nn.functional.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in maps]
        )
        if self.heads == "mean":
            mass = mass.squeeze(3)
        labels, sizes = {}, {}
        for name, side, count in (("query", first.query_side, height), ("key", first.key_side, width)):
            found = [self._blocks(name, side, row) for row in whole]
            labels[name] = [each for each, _ in found]
            sizes[name] = torch.stack(
                [torch.nn.functional.pad(each, (0, count - len(each))) for _, each in found]
            )
        return BlockMap(
            mass=(mass if steps else mass[:, 0]).float(),
            layers=names,
            query_labels=labels["query"],
            key_labels=labels["key"],
            query_sizes=sizes["query"],
            key_sizes=sizes["key"],
            heads="mean" if self.heads == "mean" else chosen_heads(self.heads, first.num_heads),
            steps=steps,
            metadata={
                **metadata,
                "sequences": [self._described(row) for row in whole],
                "query_tiles": self._tile_shape("query", first.query_side),
                "key_tiles": self._tile_shape("key", first.key_side),
                "timesteps": self.run.timesteps,
                **(
                    {"incomplete": [self._described(row) for row in rows if row not in whole]}
                    if whole != rows
                    else {}
                ),
            },
        )

    def _site(self, step: int, row: Row, name: str) -> torch.Tensor | None:
        """Means of one site, batch row and step, float64 ``[heads, query blocks, key blocks]``, or ``None``."""
        sums, counts, last = 0, 0, None
        words = len(self.run.texts[row[0]].labels)
        for (at, rows), records in self.run.records.items():
            if at == step and row in rows and name in records:
                last, place = records[name], rows.index(row)
                query = last.query_side.of_row(words, last.sums.shape[2])
                key = last.key_side.of_row(words, last.sums.shape[3] - 1)
                sums = sums + last.sums[place][:, query][..., key]
                counts = counts + last.counts[place][query]
        if last is None:
            return None
        means = sums / counts.clamp(min=1)[None, :, None] / (1 if self.heads != "mean" else last.num_heads)
        means = self._brought(means.transpose(1, 2), last.query_side, words, "query").transpose(1, 2)
        return self._brought(means, last.key_side, words, "key")

    def _brought(self, values: torch.Tensor, side: Side, words: int, name: str) -> torch.Tensor:
        """``values`` with the image's cells converted to tiles, along the last axis."""
        if side.grid is None or self.own_grid:
            return values
        words = words if side.has_text else 0
        tiles = self.tiles[name == "key"]
        change = tiles.average if name == "query" else tiles.spread
        return torch.cat([values[..., :words], change(values[..., words:], side.grid)], -1)

    def _blocks(self, name: str, side: Side, row: Row) -> tuple[tuple[str, ...], torch.Tensor]:
        """Labels and sizes of the blocks of one batch row."""
        text = self.run.texts[row[0]] if side.has_text else TextRow((), torch.zeros(0, dtype=torch.int64))
        labels = text.labels
        sizes = torch.bincount(text.assignment[text.assignment >= 0], minlength=len(labels))
        if side.grid is None:
            return labels, sizes
        tiles = self.tiles[name == "key"]
        if self.own_grid:
            cells = torch.bincount(tiles.cells(side.grid))
            return labels + labels_of(tiles.cell_shape(side.grid)), torch.cat([sizes, cells])
        return labels + tiles.labels(), torch.cat([sizes, tiles.sizes()])

    def _tile_shape(self, name: str, side: Side) -> list[int] | None:
        if side.grid is None:
            return None
        tiles = self.tiles[name == "key"]
        return list(tiles.cell_shape(side.grid) if self.own_grid else tiles.shape)

    def _record(self, name: str) -> ImageRecord:
        return next(records[name] for records in self.run.records.values() if name in records)

    def _shape(self, record: ImageRecord) -> tuple[Any, ...]:
        heads = record.num_heads if self.heads != "mean" else None
        return heads, *((record.query_side.grid, record.key_side.grid) if self.own_grid else ())

    def _described(self, row: Row) -> dict[str, Any]:
        text = self.run.texts[row[0]]
        found = {"role": text.role, "text": text.text, "text_number": row[0], "image": row[1]}
        if row in self.run.duplicates:
            # Some guidance methods run a changed denoiser on the same image and text again.
            found |= {"image": self.run.duplicates[row][1], "again": True}
        steps = sorted(self.run.rows[row])
        # Guidance may end before the sampler does, and a prompt may be replaced in between.
        return found if len(steps) == len(self.run.timesteps) else {**found, "steps": steps}
