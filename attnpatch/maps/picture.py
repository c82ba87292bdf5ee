"""The picture of a block map."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attnpatch.errors import CaptureError
from attnpatch.maps import meaning
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnpatch.maps.block_map import BlockMap


def drawn(
    whole: BlockMap,
    chosen: dict[str, Any],
    title: str | None,
    scale: str,
    path: str | os.PathLike | None,
    ax: Axes | None,
) -> Figure | Path:
    """See ``BlockMap.plot``; ``chosen`` are the arguments of ``select``."""
    one = whole.select(**chosen)
    for what, found in (("layer", one.layers), ("step", one.steps or (0,))):
        if len(found) != 1:
            raise CaptureError(f"{len(found)} {what}s in one picture; give one {what} or 'mean'.")
    if title is None:
        title = meaning.title(whole, one, chosen["layer"], chosen["sequence"])
    values = one.to_numpy().reshape(one.mass.shape[-2:])
    errors = None if whole.normalization != "none" else one.error if one.spread is None else one.spread
    figure = map_figure.draw(
        values,
        query_labels=cast("Sequence[str]", one.query_labels),  # of one sequence
        key_labels=cast("Sequence[str]", one.key_labels),
        title=title,
        colour_label=meaning.meaning(whole),
        scale=scale,
        errors=None if errors is None else errors.reshape(values.shape).numpy(),
        errors_are="standard error" if one.spread is None else "spread",
        is_signed=whole.is_signed,
        ax=ax,
    )
    return map_figure.write(figure, path)
