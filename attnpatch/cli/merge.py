"""``attnpatch merge``: writes the mean map of a folder of results as a table, a file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from attnpatch.errors import AnalysisError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from attnpatch.maps.block_map import BlockMap

# More columns do not fit a terminal; the picture and the file have all of them.
_MOST = 12


def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that attnpatch analyze wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A safetensors file; DIR/merged/BY.safetensors if not given."),
    ] = None,
    by: Annotated[
        Literal["labels", "role"],
        typer.Option(
            help="labels: merge conversations with the same blocks; role: merge all, with one block per role."
        ),
    ] = "labels",
) -> None:
    """Write the mean map of many conversations, and its spread: the standard deviation over conversations."""
    from rich.console import Console

    from attnpatch.cli.console import say
    from attnpatch.conversations.merge import merge_folder

    path = folder / "merged" / f"{by}.safetensors" if out is None else out
    if path.suffix != ".safetensors":
        raise UsageError(f"--out {path}: give the name of a .safetensors file")
    merged = merge_folder(folder, by)
    try:
        if out is None:
            path.parent.mkdir(exist_ok=True)
        merged.block_map.save(path)
    except OSError as error:
        raise AnalysisError(f"cannot write --out {path}: {error.strerror or error}") from error
    shown, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    _show(shown, merged.block_map)
    say(shown, f"{merged.merged} conversations merged, {len(merged.left_out)} left out")
    if merged.left_out:
        say(shown, "(their blocks, layers or heads differ; --by role also merges different blocks)")
    say(shown, f"map: {path}")
    try:
        picture = merged.block_map.plot(path.with_suffix(".png"))
        say(shown, f"picture: {picture}")
    except MissingExtraError as error:
        say(errors, f"note: no picture: {error}")
    for line in merged.damaged:
        say(errors, line)
    if merged.damaged:
        raise typer.Exit(3)


def _show(console: Console, block_map: BlockMap) -> None:
    """Print the map averaged over layers; the spread shown for a cell is the mean of the layers' spreads."""
    from rich.table import Table

    from attnpatch.cli.console import say
    from attnpatch.maps.meaning import meaning

    labels = block_map.query_labels
    shown = len(labels) if len(labels) <= _MOST else 0
    if not shown:
        say(console, f"{len(labels)} x {len(block_map.key_labels)} blocks: see the picture")
        return
    axes = tuple(range(block_map.mass.ndim - 2))
    mass = block_map.mass.double().mean(axes)
    spread = block_map.spread.double().mean(axes)  # type: ignore[union-attr]
    sign = "\u00b1" if (console.encoding or "").lower().startswith("utf") else "+-"
    what = f"{meaning(block_map)} {sign} spread"
    table = Table("from \\ to", title=f"{what} ({block_map.metadata['spread']}), mean over layers")
    for label in block_map.key_labels:
        table.add_column(str(label), justify="right")
    for row, label in enumerate(labels):
        cells = []
        for value, error in zip(mass[row].tolist(), spread[row].tolist(), strict=True):
            cells.append(f"{value:.3f}" if error != error else f"{value:.3f} {sign} {error:.3f}")
        table.add_row(str(label), *cells)
    console.print(table)
