"""Draws scores of heads: a panel for each score, a row for each layer, a column for each head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERS = 8  # with at most this many layers and heads, each cell shows its number
_MOST_TICKS = 9


def draw(scores: dict[str, np.ndarray], layers: Sequence[int]) -> "Figure":
    """Draw scores from 0 to 1, all on one scale.

    Args:
        scores: By name, ``[layers, heads]``; NaN where there is no head.
        layers: The number of each layer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows, columns = next(iter(scores.values())).shape
    side = min(max(2.1, 0.12 * columns), 3.6)
    height = min(max(1.9, side * rows / columns), 7.0)
    figure = map_figure.new_figure(side * len(scores) + 1.5, height + 1.1)
    norm, cmap = map_figure.colours(np.array([0.0, 1.0]), "linear")
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for panel, (name, values) in zip(panels, scores.items(), strict=True):
        image = panel.imshow(np.ma.masked_invalid(values), norm=norm, cmap=cmap, aspect="auto")
        layer, head = np.unravel_index(np.nanargmax(values), values.shape)
        panel.set_title(f"{name}\nstrongest: {layers[layer]}.{head} ({values[layer, head]:.2f})", fontsize=10)
        panel.set_xlabel("head")
        for axis, names in ((panel.xaxis, range(columns)), (panel.yaxis, layers)):
            every = -(-len(names) // _MOST_TICKS)
            axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])
        if max(rows, columns) <= _MOST_NUMBERS:
            for place, value in np.ndenumerate(values):
                if not np.isnan(value):
                    colour = "black" if value > 0.6 else "white"
                    panel.text(
                        *place[::-1], f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
                    )
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, pad=0.02, aspect=30).set_label("score")
    return figure
