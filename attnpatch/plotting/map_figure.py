"""Draws one block map. Imports matplotlib when a picture is drawn."""

import functools
import io
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpatch.errors import CaptureError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
SCALES = {"sqrt": "square-root scale", "linear": "", "log": "logarithmic scale, over four powers of ten"}
_DECADES = 1e-4  # smallest value of the logarithmic scale, as a part of the largest

_MOST_CELLS = 500  # cells of a side that the picture has pixels for, twice over
_MOST_TICKS = 42  # most labels that fit on an axis at a readable size
_STEPS = [
    step * 10**power for power in range(9) for step in (1, 2, 5)
]  # label every 1st, 2nd, 5th, 10th, ... block
_MOST_NUMBERS = 10  # with at most this many blocks, each cell shows its number
LONGEST_LABEL = 22
_ZERO_COLOUR = "#e9e9ec"


def draw(
    values: np.ndarray,
    query_labels: Sequence[str],
    key_labels: Sequence[str],
    title: str,
    colour_label: str,
    scale: str = "sqrt",
    errors: np.ndarray | None = None,
    axis_labels: tuple[str, str] = ("query block (attends)", "key block (is attended to)"),
    errors_are: str = "standard error",
    is_signed: bool = False,
    ax: "Axes | None" = None,
    longest: int = LONGEST_LABEL,
) -> "Figure":
    """Draw a heat map with query blocks as rows and key blocks as columns.

    Exact zeros (such as those of a causal mask) are grey, so that they differ from small masses. The colours are
    viridis, whose order stays visible to colour-blind readers and in grey print. With negative values (gradients) they
    are purple and orange, with white at 0.

    Args:
        values: ``[query_blocks, key_blocks]``.
        query_labels: One per row; long labels are shortened, and if there are many only some are shown.
        key_labels: One per column.
        title: Title of the picture.
        colour_label: What the number is, for the colour bar.
        scale: ``"sqrt"``, ``"linear"`` or ``"log"`` colours.
        errors: Same shape, written below the values after a plus-minus sign; NaN: unknown.
        axis_labels: Labels of the vertical and of the horizontal axis.
        errors_are: What ``errors`` are, for the colour bar.
        is_signed: Whether values may be negative, even if none is: the colours are then symmetric around 0.
        ax: Axes of a figure to draw into; ``None``: a new figure.
        longest: Most characters of a label.

    Raises:
        CaptureError: The scale is unknown.
        MissingExtraError: matplotlib is not installed.
    """
    if not isinstance(scale, str) or scale not in SCALES:
        raise CaptureError(f"scale is {scale!r}; accepted are 'sqrt', 'linear' and 'log'.")
    rows, columns = values.shape
    if ax is None:
        figure = new_figure(*_figure_size(rows, columns))
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        axes = figure.add_subplot()
    else:
        figure, axes = ax.get_figure().canvas.figure, ax
    norm, cmap = colours(values, scale, is_signed)
    shown, (down, across) = largest_of_each(values)
    image = axes.imshow(
        np.ma.masked_where(shown == 0, shown),
        extent=(-0.5, across * shown.shape[1] - 0.5, down * shown.shape[0] - 0.5, -0.5),
        norm=norm,
        cmap=cmap,
        aspect="equal" if max(rows, columns) <= 3 * min(rows, columns) else "auto",
        interpolation="nearest",
    )
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    _label_axis(axes, "y", query_labels, longest)
    _label_axis(axes, "x", key_labels, longest)
    axes.set_ylabel(axis_labels[0])
    axes.set_xlabel(axis_labels[1])
    if title and ax is not None:
        axes.set_title(shorten(title, 60), fontsize=11, parse_math=False)
    elif title:
        set_title(figure, title)
    if max(rows, columns) <= _MOST_TICKS:
        _separate_cells(axes, rows, columns)
    has_numbers = max(rows, columns) <= _MOST_NUMBERS
    if has_numbers:
        _write_numbers(axes, values, norm, errors)
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
    notes = [SCALES[scale]] * bool(SCALES[scale]) + ["grey: exactly 0"] * bool((values == 0).any())
    notes += [f"each point: the largest of {down} x {across} cells"] * (down * across > 1)
    if has_numbers and errors is not None:
        notes.append(f"\u00b1: {errors_are}")
    bar.set_label(f"{colour_label}\n({', '.join(notes)})" if notes else colour_label)
    return figure


def set_title(figure: "Figure", title: str) -> None:
    """A title of the figure, not of the axes, which are narrow for a small map. Each line is filled and shortened."""
    columns = int(10 * figure.get_figwidth())
    lines = [textwrap.fill(shorten(line, 4 * columns), columns) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)


def largest_of_each(values: np.ndarray, most: int = _MOST_CELLS) -> tuple[np.ndarray, tuple[int, int]]:
    """The values if there are at most ``most`` rows and columns. Otherwise rectangles of cells are drawn as one point:
    the cell with the largest absolute value, which would otherwise fall between the picture's pixels.

    Returns:
        What to draw, and rows and columns of a rectangle.
    """
    down, across = (-(-count // most) for count in values.shape)
    if down == across == 1:
        return values, (1, 1)
    rows, columns = -(-values.shape[0] // down), -(-values.shape[1] // across)
    padded = np.zeros((rows * down, columns * across), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    parts = padded.reshape(rows, down, columns, across).swapaxes(1, 2).reshape(rows, columns, -1)
    at = np.abs(np.nan_to_num(parts)).argmax(-1)
    return np.take_along_axis(parts, at[..., None], -1)[..., 0], (down, across)


def colours(values: np.ndarray, scale: str, is_signed: bool = False) -> tuple[Any, Any]:
    """Norm and colour map for some values; for signed values, 0 is in the middle."""
    colormaps, colors = load_matplotlib().colormaps, load_matplotlib().colors
    low, top = float(np.nanmin(values, initial=0.0)), float(np.nanmax(values, initial=0.0))
    if is_signed or low < 0:
        most = max(-low, top) or 1.0
        signed = colormaps["PuOr_r"].with_extremes(bad=_ZERO_COLOUR)
        if scale == "log":
            return colors.SymLogNorm(_DECADES * most, vmin=-most, vmax=most), signed
        power = 0.5 if scale == "sqrt" else 1.0
        norm = colors.FuncNorm(
            (lambda x: np.sign(x) * np.abs(x) ** power, lambda x: np.sign(x) * np.abs(x) ** (1 / power)),
            -most,
            most,
        )
        return norm, signed
    if scale == "log":
        norm = colors.LogNorm(_DECADES * (top or 1.0), top or 1.0, clip=True)
    else:
        norm = colors.PowerNorm(0.5, 0, top or 1.0) if scale == "sqrt" else colors.Normalize(0, top or 1.0)
    return norm, colormaps["viridis"].with_extremes(bad=_ZERO_COLOUR)


def write(figure: "Figure", path: str | os.PathLike | None) -> "Figure | Path":
    """Save ``figure`` in the format of the path's suffix, and return the path. Without a path, return the figure.

    Raises:
        CaptureError: The suffix is not ``.png``, ``.svg`` or ``.pdf``, or the folder does not exist.
    """
    if path is None:
        return figure
    if not isinstance(path, (str, os.PathLike)):
        raise CaptureError(f"path={path!r} is not accepted; give the name of a file, such as 'map.png'.")
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CaptureError(f"cannot draw into {path.name!r}; accepted suffixes are {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise CaptureError(
            f"cannot draw into {path}: there is no folder {path.parent}; make it, or choose another path."
        )
    _save(figure, path, path.suffix.lower()[1:])
    return path


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG, small enough for a notebook."""
    data = io.BytesIO()
    _save(figure, data, "png", dpi=90)
    return data.getvalue()


def shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    """One line of at most ``longest`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "\u2026"


def short_number(value: float) -> str:
    """Two decimals, or the power of ten of a small number."""
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def _save(figure: "Figure", target: Path | io.BytesIO, kind: str, dpi: int = 150) -> None:
    with warnings.catch_warnings():
        # The font may lack a label's script and show boxes; a warning for each glyph is of no use.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(target, format=kind, dpi=dpi)


def load_matplotlib() -> Any:
    """The module matplotlib. Its pyplot is not used, because pyplot's figures are global and must be closed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError('a picture needs matplotlib; pip install "attnpatch[plot]".') from error
    return matplotlib


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """An empty figure; width and height are in inches. A notebook shows it, with and without ``%matplotlib``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = load_matplotlib().figure.Figure(figsize=(width, height), layout=layout)
    load_matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    # IPython knows no picture of a figure until pyplot is imported.
    figure._repr_png_ = functools.partial(to_png, figure)
    return figure


def _figure_size(rows: int, columns: int) -> tuple[float, float]:
    """Size in inches: cells of a readable size that fit a screen, plus room for labels and the colour bar."""
    width, height = (min(max(0.3 * count, 3.2), 9.5) for count in (columns, rows))
    return width + 3.4, height + 2.3


def label_step(count: int) -> int:
    """The distance of labels on an axis of ``count`` blocks; 1: every block has one."""
    return next(step for step in _STEPS if step * _MOST_TICKS >= count)


def _label_axis(axes: "Axes", which: str, labels: Sequence[str], longest: int) -> None:
    every = label_step(len(labels))
    shown = [shorten(label, longest) for label in labels[::every]]
    long = max((len(label) for label in shown), default=0) > 5 or len(shown) > 12
    options = {"fontsize": 9 if len(shown) <= 20 else 7.5, "parse_math": False}
    if which == "x" and long:
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        options |= slanted if len(shown) <= 12 else {"rotation": 90}
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(range(0, len(labels), every), shown, **options)


def _separate_cells(axes: "Axes", rows: int, columns: int) -> None:
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)


# Black text has the higher contrast above this luminance, white text below it (WCAG 2.2).
_MIDDLE = 0.179


def _luminance(colour: Sequence[float]) -> float:
    """The relative luminance of an sRGB colour (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _write_numbers(axes: "Axes", values: np.ndarray, norm, errors: np.ndarray | None) -> None:
    for (row, column), value in np.ndenumerate(values):
        if value:
            colour = "black" if _luminance(axes.images[0].cmap(norm(value))) > _MIDDLE else "white"
            text = short_number(value)
            if errors is not None and not np.isnan(errors[row, column]):
                error = errors[row, column]
                text += f"\n\u00b1{error:.1g}" if error >= 1e-3 else "\n\u00b1<1e-3"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
