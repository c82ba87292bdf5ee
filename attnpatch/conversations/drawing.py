"""Further pictures of an analysis: layers side by side, one block's row over the layers, memory over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnpatch.maps import picture
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.meaning import meaning
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CELLS = 250  # rows and columns that a small map has pixels for
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def layers(block_map: BlockMap, most: int) -> Figure:
    """Small maps of up to ``most`` layers, evenly spaced, on one colour scale."""
    one = block_map.select(step="mean", head="mean", sequence=0)
    values = one.to_numpy().reshape(len(one.layers), *one.mass.shape[-2:])
    chosen = sorted({round(i) for i in np.linspace(0, len(values) - 1, min(most, len(values)))})
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    figure = map_figure.new_figure(2.3 * columns + 1.2, 2.4 * rows + 0.7)
    norm, cmap = map_figure.colours(values, "sqrt", one.is_signed)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, chosen, strict=False):
        shown, _ = map_figure.largest_of_each(values[layer], _MOST_CELLS)
        shown = np.ma.masked_where(shown == 0, shown)
        image = axes.imshow(shown, norm=norm, cmap=cmap, aspect="auto", interpolation="nearest")
        axes.set_title(f"layer {one.layers[layer]}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(image, ax=grid, aspect=30, pad=0.02)
    bar.set_label(f"{meaning(one)}\n(square-root scale)")
    blocks = f"{values.shape[1]} query x {values.shape[2]} key blocks"
    map_figure.set_title(figure, _title(block_map, f"{len(chosen)} of {len(values)} layers, {blocks}"))
    return figure


def row(block_map: BlockMap, number: int) -> Figure:
    """What one query block attends to: key blocks across, layers downwards."""
    one = block_map.select(step="mean", head="mean", sequence=0)
    values = one.to_numpy().reshape(len(one.layers), *one.mass.shape[-2:])[:, number]
    about = picture.named(block_map, "mean", "mean", 0, "mean")
    has_words = about.has_words and map_figure.label_step(len(about.keys)) == 1
    return map_figure.draw(
        values,
        query_labels=[f"layer {layer}" for layer in one.layers],
        key_labels=about.keys if has_words else one.key_labels,
        title=_title(
            block_map, f"what {map_figure.shorten(one.query_labels[number], 40)!r} attends to", number
        ),
        colour_label=meaning(one),
        is_signed=one.is_signed,
        axis_labels=("layer", "key block (is attended to)"),
        longest=picture.LONGEST if has_words else map_figure.LONGEST_LABEL,
    )


def memory(curve: Sequence[tuple[float, int]]) -> Figure:
    """Memory over time: bytes beyond what was held when the run began."""
    seconds, held = np.array(curve, dtype=float).T
    size, unit = next(((s, u) for s, u in _UNITS if held.max() >= s), (1.0, "B"))
    figure = map_figure.new_figure(7.5, 3.4)
    axes = figure.add_subplot()
    axes.plot(seconds, held / size, color="#0b6fa4", linewidth=1.4)
    axes.fill_between(seconds, held / size, color="#0b6fa4", alpha=0.15, linewidth=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"{unit} beyond what was held before")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    top = int(held.argmax())
    axes.annotate(
        f"peak {held[top] / size:.3g} {unit}", (seconds[top], held[top] / size), xytext=(0, 6),
        textcoords="offset points", fontsize=8,
        ha="right" if seconds[top] > 0.8 * seconds[-1] else "left",
    )  # fmt: skip
    axes.margins(y=0.15)
    return figure


def _title(block_map: BlockMap, what: str, row: int | None = None) -> str:
    """First what a row, by default the last one with tokens, attends to most; below it what the picture shows."""
    name = block_map.metadata.get("model")
    finding = picture.named(block_map, "mean", "mean", 0, "mean").finding(row)
    return "\n".join(filter(None, (finding, f"{name}: {what}" if name else what)))
