"""Draws several pictures on one page: a grid of panels with a line above and below each, and one colour bar."""

import io
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnpatch.plotting import images, map_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150  # as map_figure.write has it
_PAGE = 13.0  # largest page in inches, unless its panels would become too small
_LONGEST, _SHORTEST = 4.0, 1.3  # limits of a panel's longer side, in inches
_NARROWEST = 0.95  # least width of a cell in inches, so that the word above it fits
_MARGIN, _GAP, _ABOVE, _BELOW, _BAR, _TITLE_LINE = 0.15, 0.18, 0.28, 0.24, 1.0, 0.24  # inches
_SHAPE, _STRIP_SHAPE = 1.6, 3.0  # width / height of a page: for a screen, and for a strip of frames or steps


@dataclass(frozen=True)
class Panel:
    """An image, with or without heat over it.

    Attributes:
        label: Text above the panel.
        image: ``[H, W, 3]`` float32 from 0 to 1.
        heat: ``[h, w]``, or None.
        top: The heat that gets the last colour.
    """

    label: str
    image: np.ndarray
    heat: np.ndarray | None = None
    top: float = 0.0


@dataclass(frozen=True)
class _Grid:
    """Where the panels lie, in inches."""

    count: int
    columns: int
    width: float  # of a panel
    height: float

    @property
    def rows(self) -> int:
        return math.ceil(self.count / self.columns)

    @property
    def cell(self) -> tuple[float, float]:
        return max(self.width, _NARROWEST) + _GAP, self.height + _ABOVE + _BELOW

    @property
    def pixels(self) -> int:
        """Pixels of a panel's longer side."""
        return round(_DOTS_PER_INCH * max(self.width, self.height))

    @property
    def page(self) -> tuple[float, float]:
        """Width and height of the page without the title."""
        across, down = self.cell
        return self.columns * across + _BAR + 2 * _MARGIN, self.rows * down + 2 * _MARGIN


def colours() -> np.ndarray:
    """``[256, 3]``: inferno without its blackest part; its order stays visible to colour-blind readers and in grey.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return map_figure.load_matplotlib().colormaps["inferno"](np.linspace(0.2, 1, 256))[:, :3]


def draw(panels: Sequence[Panel], title: str | None, top: float | None = None) -> "Figure":
    """Draw the panels in reading order.

    Args:
        panels: At least one.
        title: Title of the page.
        top: The end of the scale that all panels share; None if each has its own scale.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    palette = colours()
    height, width = panels[0].image.shape[:2]
    # Panels that share a scale are a sequence in time, so they are laid out as a strip.
    shape = _SHAPE if top is None else _STRIP_SHAPE
    grid = _grid(len(panels), width / height, shape)
    across, down = grid.page
    line = int(9 * across)
    title = textwrap.fill(map_figure.shorten(_visible(title), 2 * line), line) if title else ""
    head = _TITLE_LINE * (title.count("\n") + 1) if title else 0.0
    figure = map_figure.new_figure(across, down + head, layout=None)
    if title:
        place = 1 - 0.1 / (down + head)
        figure.suptitle(title, y=place, va="top", fontsize=11, parse_math=False)
    source = pixels = None
    for number, panel in enumerate(panels):
        if panel.image is not source:
            source, pixels = panel.image, images.fitted(panel.image, grid.pixels)
        _draw_panel(figure, grid, number, panel, pixels, palette)
    _draw_bar(figure, grid, palette, top)
    return figure


def png(pixels: np.ndarray) -> bytes:
    """``[H, W, 3]`` uint8 as the bytes of a PNG file of the same size."""
    map_figure.load_matplotlib()
    from matplotlib.image import imsave

    data = io.BytesIO()
    imsave(data, pixels, format="png")
    return data.getvalue()


def _grid(count: int, ratio: float, shape: float) -> _Grid:
    """Makes panels as large as the page allows; the number of columns is chosen so that they fill the page and bring it
    near its shape.
    """

    def strangeness(grid: _Grid) -> float:
        across, down = grid.page
        empty = grid.columns * grid.rows - count
        return abs(math.log(across / down / shape)) + 1.5 * empty / (count + empty)

    return min((_sized(count, ratio, columns) for columns in range(1, count + 1)), key=strangeness)


def _sized(count: int, ratio: float, columns: int) -> _Grid:
    ratio = min(max(ratio, 1 / 6), 6)  # a longer image is drawn smaller inside its panel
    wide, high = min(1, ratio), min(1, 1 / ratio)
    most = [
        (_PAGE - _BAR) / columns / wide - _GAP,
        _PAGE / math.ceil(count / columns) / high - _ABOVE - _BELOW,
    ]
    side = max(min(_LONGEST, *most), _SHORTEST)
    return _Grid(count, columns, side * wide, side * high)


def _add_axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Add axes; positions are inches from the left and the lower edge of the figure (the title is at the top)."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, (top - height) / down, width / across, height / down))


def _draw_panel(
    figure: "Figure", grid: _Grid, number: int, panel: Panel, pixels: np.ndarray, palette: np.ndarray
) -> None:
    row, column = divmod(number, grid.columns)
    across, down = grid.cell
    left = _MARGIN + column * across + (across - grid.width) / 2
    top = grid.page[1] - _MARGIN - row * down - _ABOVE
    axes = _add_axes(figure, left, top, grid.width, grid.height)
    if panel.heat is None:
        pixels = images.to_bytes(pixels)
    else:
        pixels = images.blended(pixels, panel.heat, panel.top, palette)
        note = f"max {_short(float(panel.heat.max()))}"
        axes.set_xlabel(note, fontsize=7.5, color="#555555", labelpad=3)
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    text = axes.set_title("", fontsize=9, pad=4, parse_math=False)
    _fit(text, panel.label, figure.dpi * (across - _GAP / 2))


def _fit(text, label: str, room: float) -> None:
    """Set as much of the label as fits into ``room`` dots; it is measured, because letters differ in width."""
    line = map_figure.shorten(_visible(label), 80) or repr(label)
    text.set_text(line)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # as map_figure.write does
        while len(line) > 2:
            taken = text.get_window_extent().width
            if taken <= room:
                break
            line = map_figure.shorten(line, max(2, min(len(line) - 1, int(len(line) * room / taken))))
            text.set_text(line)


def _visible(label: str) -> str:
    """The label without lone surrogates and control characters, which fonts cannot draw."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in label)


def _draw_bar(figure: "Figure", grid: _Grid, palette: np.ndarray, top: float | None) -> None:
    """Draw the colour bar beside the first row, with the colours as they look over a medium grey."""
    across, down = grid.page
    left = across - _MARGIN - _BAR + 0.12
    axes = _add_axes(figure, left, down - _MARGIN - _ABOVE, 0.13, grid.height)
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    shown = images.blended(np.full((256, 1, 3), 0.5, np.float32), ramp, 1.0, palette)
    axes.imshow(shown, aspect="auto", origin="lower", extent=(0, 1, 0, top or 1.0), interpolation="nearest")
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=7.5)
    if top is None:
        axes.set_yticks([0, 1], ["0", "max"])
    else:
        axes.yaxis.set_major_formatter(lambda value, _: _short(value, 3))


def _short(number: float, digits: int = 2) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.{digits}g}"
