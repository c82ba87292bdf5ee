"""Draws what single rows of a map attend to: a short list with bars for each row, beside the map."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.plotting.map_figure import new_figure, set_title, short_number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 4.9  # of a panel, in inches
_MAP = 6.6  # of a map's longer side, in inches
_MOST_OF_A_LINE = 66  # columns of text that fit on a panel
_BAR, _UP, _DOWN = "#5b7fa6", "#b35806", "#542788"
TITLE = 54
MARK = "#d1006c"  # of the row's largest cell on the map


@dataclass(frozen=True)
class Entry:
    """A key block that a row attends to.

    Attributes:
        name: Label and text of the block.
        value: Its number.
        note: Where it has this number, such as ``"layer 3"``; empty if that goes without saying.
    """

    name: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class RowPanel:
    """What one row attends to most.

    Attributes:
        title: Names the row, in at most ``TITLE`` columns.
        cell: Row and column of its largest number, which is marked on the map.
        entries: Its largest numbers, the largest first.
    """

    title: str
    cell: tuple[int, int]
    entries: Sequence[Entry]


def layout(shape: tuple[int, ...], title: str, count: int) -> list["Axes"]:
    """The axes of a map with ``count`` panels to its right, in a new figure: the map's, then one for each panel."""
    rows, columns = shape
    width, height = (max(_MAP * side / max(rows, columns), 2.4) for side in (columns, rows))
    figure = new_figure(width + 3.0 + _WIDTH, max(height + 2.0, 1.3 + 2.3 * count))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(count, 2, width_ratios=(width + 3.0, _WIDTH))
    set_title(figure, title)
    return [figure.add_subplot(grid[:, 0]), *(figure.add_subplot(grid[place, 1]) for place in range(count))]


def draw(axes: "Axes", panel: RowPanel, letter: str, most: int) -> None:
    """Draw a panel with room for ``most`` entries; ``letter`` is its mark on the map."""
    axes.set_title(
        f"{letter}   {panel.title}",
        fontsize=9.5,
        loc="left",
        color=MARK,
        parse_math=False,
    )
    largest = max(abs(entry.value) for entry in panel.entries)
    is_signed = any(entry.value < 0 for entry in panel.entries)
    for place, entry in enumerate(panel.entries):
        colour = (_DOWN if entry.value < 0 else _UP) if is_signed else _BAR
        axes.barh(place + 0.28, abs(entry.value) / largest, height=0.22, color=colour)
        number = f"{entry.note}   {short_number(entry.value)}".strip()
        text = {"fontsize": 8, "va": "bottom", "parse_math": False}
        axes.text(0, place + 0.14, fitted(entry.name, _MOST_OF_A_LINE - len(number)), ha="left", **text)
        axes.text(1.0, place + 0.14, number, ha="right", **text)
    axes.set_xlim(0, 1)
    axes.set_ylim(most - 0.45, -0.45)
    axes.axis("off")


def mark(axes: "Axes", cell: tuple[int, int], letter: str) -> None:
    """Circle a cell of the map, and write its letter beside it."""
    row, column = cell
    for colour, width in (("white", 3.2), (MARK, 1.6)):
        axes.plot(column, row, "o", mfc="none", mec=colour, mew=width, ms=9, clip_on=False, zorder=5)
    left = column > axes.get_xlim()[1] / 2
    axes.annotate(
        letter, (column, row), xytext=(-7 if left else 7, 6), textcoords="offset points", color="white", fontsize=8,
        ha="right" if left else "left", va="bottom", fontweight="bold", zorder=6, annotation_clip=False,
        bbox={"boxstyle": "round,pad=0.2", "fc": MARK, "ec": "none"},
    )  # fmt: skip


def fitted(text: str, columns: int) -> str:
    """One line that takes at most so many columns; a letter of Chinese, Japanese or Korean takes two."""
    longest = columns
    while True:
        line = shorten(text, longest)
        wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in line)
        if len(line) + wide <= columns or longest <= 1:
            return line
        longest -= max(1, (len(line) + wide - columns) // 2)
