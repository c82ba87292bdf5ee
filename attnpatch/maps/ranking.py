"""The cells of a block map with the most attention, as a table."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from attnpatch.errors import CaptureError
from attnpatch.maps.dataframe import load_pandas
from attnpatch.maps.fields import largest_over, own_columns, texts_of
from attnpatch.plotting.map_figure import shorten
from attnpatch.plotting.text_table import aligned

if TYPE_CHECKING:
    import pandas

    from attnpatch.maps.block_map import BlockMap

_MOST_OF_A_TEXT = 60
_APART = ("sequence", "step", "head")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a map.

    Attributes:
        layer: Number or name of the layer.
        query, key: Labels of the blocks.
        text: Text of the key block; its label if the map has no texts.
        mass: The map's number (``values``) for this cell.
        head, step, sequence: ``None`` if the map does not keep them separate.
    """

    layer: int | str
    query: str
    key: str
    text: str
    mass: float
    head: int | None = None
    step: int | str | None = None
    sequence: int | None = None


class Ranking(Sequence[Cell]):
    """Cells with the largest numbers first; prints as a table, also in a notebook."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = tuple(cells)

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> Ranking: ...
    def __getitem__(self, place: int | slice) -> Cell | Ranking:
        return Ranking(self._cells[place]) if isinstance(place, slice) else self._cells[place]

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells)

    def __repr__(self) -> str:
        header, *rows = self._rows()
        return "\n".join(aligned([header, *rows], [header.index("mass")]))

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        header, *rows = self._rows()
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per cell; a column that is nowhere known is left out.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return load_pandas().DataFrame(
            [dataclasses.asdict(cell) for cell in self._cells], columns=self._columns()
        )

    def _columns(self) -> list[str]:
        """The fields that the table shows."""
        known = [name for name in _APART if any(getattr(cell, name) is not None for cell in self._cells)]
        return [*known, "layer", "query", "key", "text", "mass"]

    def _rows(self) -> list[list[str]]:
        columns = self._columns()
        rows = [[getattr(cell, name) for name in columns] for cell in self._cells]
        shown = [
            [
                f"{value:.4f}" if isinstance(value, float) else shorten(str(value), _MOST_OF_A_TEXT)
                for value in row
            ]
            for row in rows
        ]
        return [columns, *shown]


def top(one: BlockMap, count: Any, query: Any, own: bool) -> Ranking:
    """See ``BlockMap.top``."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise CaptureError(f"top({count!r}): accepted is a number of rows, 1 or more.")
    if not isinstance(own, bool):
        raise CaptureError(f"top(own={own!r}): accepted are True and False.")
    cells: list[Cell] = []
    unknown: list[CaptureError] = []
    for place in range(one.num_sequences):
        try:
            cells += _of_sequence(one, place, query, own)
        except CaptureError as error:
            unknown.append(error)
    if len(unknown) == one.num_sequences:  # sequences of a batch have blocks of their own
        raise unknown[0]
    return Ranking(sorted(cells, key=lambda cell: -abs(cell.mass))[: int(count)])


def _of_sequence(whole: BlockMap, place: int, query: Any, own: bool) -> Iterator[Cell]:
    """For each pair of blocks, its cell with the largest number over layers, heads and steps."""
    one: BlockMap = whole.select(sequence=place)
    values = one.values
    apart = [name for name in one.dims if name in ("step", "layer", "head")]
    names: dict[str, Sequence[Any]] = {
        "layer": one.layers, "step": one.steps, "head": () if one.heads == "mean" else one.heads
    }  # fmt: skip
    flat = values.reshape(-1, *values.shape[-2:]).numpy()
    at, sizes = largest_over(flat)
    # The labels of one sequence are strings.
    queries, keys = [*map(str, one.query_labels)], [*map(str, one.key_labels)]
    texts = texts_of(whole.metadata, "key", len(keys), place) or keys
    own_column = own_columns(one)
    for row in rows_of(one, query):
        for column, key in enumerate(keys):
            if (own_column[row] == column and not own) or sizes[row, column] == 0:
                continue
            where = np.unravel_index(at[row, column], values.shape[:-2])
            found = {name: names[name][int(i)] for name, i in zip(apart, where, strict=True)}
            number = {"sequence": place} if whole.is_batch else {}
            yield Cell(
                query=queries[row], key=key, text=texts[column], mass=float(flat[at[row, column], row, column]),
                **found, **number,
            )  # fmt: skip


def rows_of(one: BlockMap, query: Any) -> list[int]:
    """The numbers of the query blocks of a map of one sequence.

    Args:
        one: The map.
        query: A label (all blocks that bear it), a number (negative ones count from the last block with tokens), or
            ``"all"`` that have tokens.

    Returns:
        The numbers; empty for -1 if no block has tokens.

    Raises:
        CaptureError: There is no such block.
    """
    labels = list(one.query_labels)
    real = [i for i in range(len(labels)) if one.query_sizes[i] > 0]
    if isinstance(query, str) and query == "all":
        return real
    if isinstance(query, str) and query in labels:
        return [i for i in real if labels[i] == query]
    place = None if isinstance(query, bool) or not isinstance(query, Integral) else int(query)
    if place is not None and -len(real) <= place < len(labels):
        # Counted from the last block with tokens: a block for an answer that was not generated is empty.
        return [place if place >= 0 else real[place]]
    if place == -1:
        return []
    raise CaptureError(
        f"there is no query block {query!r}; accepted is a number from 0 to {len(labels) - 1}, a label, or 'all'."
    )
