"""The picture of a block map: the whole, its finding in words, and beside it the strongest rows with texts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from attnpatch.errors import CaptureError
from attnpatch.maps import meaning
from attnpatch.maps.fields import largest_over, own_columns, texts_of
from attnpatch.plotting import map_figure, row_panels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnpatch.maps.block_map import BlockMap

_OTHERS_FROM = 0.25  # a second block is named if it gets at least this part of what the first one gets
_PANELS_FROM = 24  # blocks; with fewer, the map itself is easy to read
_PANELS, _ENTRIES = 3, 6  # rows beside the map, and what each lists
LONGEST = 30  # characters of a label with a text


@dataclasses.dataclass(frozen=True)
class Named:
    """One sequence of a map with averaged heads and steps, and names for its blocks.

    Attributes:
        values: ``[layers, query_blocks, key_blocks]``, normalised.
        layers: Their names; empty if only one layer, or a mean, is meant.
        rows: Numbers of the query blocks with tokens.
        queries, keys: Label and text of each block.
        own: For each query block, the position of the same block among the keys, if it is one.
        has_words: Whether a block has a text that its label does not say.
        is_signed: Whether numbers may be negative.
        number: What a number is, if it is no attention mass.
    """

    values: np.ndarray
    layers: Sequence[int | str]
    rows: list[int]
    queries: list[str]
    keys: list[str]
    own: Sequence[int | None]
    has_words: bool
    is_signed: bool
    number: str | None

    def strongest(self, row: int, count: int) -> list[tuple[int, int, float]]:
        """Where a row attends to most: layer (a position), column and number; each column once, the row's own never."""
        values = self.values[:, row]
        if not values.size:
            return []
        layers, best = largest_over(values)
        if self.own[row] is not None:
            best[self.own[row]] = 0
        columns = [int(c) for c in np.argsort(-best, kind="stable")[:count] if best[c] > 0]
        return [(int(layers[c]), c, float(values[layers[c], c])) for c in columns]

    def where(self, layer: int) -> str:
        """The name of a layer; empty if there is only one."""
        return f"layer {self.layers[layer]}" if self.layers else ""

    def finding(self, row: int | None = None) -> str:
        """A sentence: what the last row with tokens, or another, attends to most, and in which layer."""
        row = row if row is not None else self.rows[-1] if self.rows else None
        found = [] if row is None else self.strongest(row, 2)
        if row is None or not found:
            return ""
        told = [one for one in found if abs(one[2]) >= _OTHERS_FROM * abs(found[0][2])]
        where = [
            f'"{row_panels.fitted(self.keys[column], 60)}" ({", ".join(filter(None, (map_figure.short_number(value), self.where(layer))))})'
            for layer, column, value in told
        ]
        who = map_figure.shorten(self.queries[row].split(": ")[0], 40)
        if self.number is None and not self.is_signed:
            return f"{who} attends most to {', then '.join(where)}"
        # Without "mean over the query tokens", which the legend says.
        number = (self.number or "number").partition(",")[0]
        return f"{who}: the largest {number} is at {', then '.join(where)}"

    def panels(self) -> list[row_panels.RowPanel]:
        """The last row with tokens, and the other rows that attend most to one block that is not next to them."""
        last = self.rows[-1:]
        return [one for row in last + self._marked_rows(set(last)) if (one := self._panel(row))][:_PANELS]

    def _panel(self, row: int) -> row_panels.RowPanel | None:
        found = self.strongest(row, _ENTRIES)
        if not found:
            return None
        several = len(self.values) > 1
        entries = [
            row_panels.Entry(self.keys[column], value, self.where(layer) if several else "")
            for layer, column, value in found
        ]
        verb = "" if self.is_signed or self.number else " attends to"
        title = row_panels.fitted(self.queries[row], row_panels.TITLE - len(verb)) + verb
        return row_panels.RowPanel(title, (row, found[0][1]), entries)

    def _marked_rows(self, without: set[int]) -> list[int]:
        """Rows by their largest number on a block that is not next to them, less an even share of the row: the first
        rows of a causal map attend to few blocks, and so to each of them much.
        """
        sizes = largest_over(self.values)[1] if self.values.size else np.zeros(self.values.shape[1:])
        even = sizes.sum(-1) / np.maximum((sizes > 0).sum(-1), 1)
        for row, own in enumerate(self.own):
            if own is not None:
                sizes[row, max(0, own - 1) : own + 2] = 0
        order = np.argsort(even - sizes.max(-1, initial=0.0), kind="stable").tolist()
        return [row for row in order if row in set(self.rows) - without]


def named(whole: BlockMap, layer: Any, head: Any, sequence: int, step: Any) -> Named:
    """The part of a map that a picture is about; ``layer="mean"`` keeps its layers apart."""
    one = whole.select(layer=None if layer == "mean" else layer, head=head, sequence=sequence, step=step)
    queries, keys = [*map(str, one.query_labels)], [*map(str, one.key_labels)]
    words = (
        in_words(queries, texts_of(whole.metadata, "query", len(queries), sequence)),
        in_words(keys, texts_of(whole.metadata, "key", len(keys), sequence)),
    )
    return Named(
        values=one.values.reshape(len(one.layers), len(queries), len(keys)).numpy(),
        layers=one.layers if len(one.layers) > 1 or len(whole.layers) > 1 else (),
        rows=np.flatnonzero((one.query_sizes > 0).numpy()).tolist(),
        queries=words[0],
        keys=words[1],
        own=own_columns(one),
        has_words=words != (queries, keys),
        is_signed=whole.is_signed,
        number=meaning.numbers_of(whole) or ("probability x gradient" if whole.is_of_gradient else None),
    )


def in_words(labels: Sequence[str], texts: Sequence[str] | None) -> list[str]:
    """Label and text of each block; the label alone where there is no text, or the text says the same."""
    pairs = zip(labels, texts or [""] * len(labels), strict=True)
    return [
        f"{label}: {text}" if text.strip() and text.strip() != label.strip() else label
        for label, text in pairs
    ]


def drawn(
    whole: BlockMap,
    chosen: dict[str, Any],
    title: str | None,
    scale: str,
    path: str | os.PathLike | None,
    ax: Axes | None,
) -> Figure | Path:
    """See ``BlockMap.plot``; ``chosen`` are the arguments of ``select``."""
    if title is not None and not isinstance(title, str):
        raise CaptureError(f"title={title!r} is not accepted; give a text, or None for the usual title.")
    if ax is not None and not hasattr(ax, "get_figure"):
        raise CaptureError(f"ax={ax!r} is not accepted; give axes of matplotlib, such as plt.gca().")
    one = whole.select(**chosen)
    for what, found in (("layer", one.layers), ("step", one.steps or (0,))):
        if len(found) != 1:
            raise CaptureError(f"{len(found)} {what}s in one picture; give one {what} or 'mean'.")
    about = named(whole, **chosen)
    facts = meaning.title(whole, one, chosen["layer"], chosen["sequence"])
    if ax is not None:
        title = facts if title is None else title
    else:
        title = "\n".join(
            filter(None, (about.finding(), facts) if title is None else (title, about.finding()))
        )
    values = one.to_numpy().reshape(one.mass.shape[-2:])
    panels = about.panels() if ax is None and max(values.shape) >= _PANELS_FROM else []
    errors = None if whole.normalization != "none" else one.error if one.spread is None else one.spread
    beside = row_panels.layout(values.shape, title, len(panels)) if panels else []
    # The text of every tenth block would say little: texts are written where each block has a label.
    has_words = max(map(map_figure.label_step, values.shape)) == 1 and about.has_words
    figure = map_figure.draw(
        values,
        query_labels=about.queries if has_words else cast("Sequence[str]", one.query_labels),
        key_labels=about.keys if has_words else cast("Sequence[str]", one.key_labels),
        title="" if panels else title,
        colour_label=meaning.meaning(whole),
        scale=scale,
        errors=None if errors is None else errors.reshape(values.shape).numpy(),
        errors_are="standard error" if one.spread is None else "spread",
        is_signed=whole.is_signed,
        ax=beside[0] if panels else ax,
        longest=LONGEST if has_words else map_figure.LONGEST_LABEL,
    )
    for letter, axes, panel in zip("ABC", beside[1:], panels, strict=False):
        row_panels.draw(axes, panel, letter, _ENTRIES)
        row_panels.mark(beside[0], panel.cell, letter)
    return map_figure.write(figure, path)
