"""Heat maps of words over an image, over the steps of a sampler and over the frames of a video."""

import contextlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpatch.atomic_files import put, whole
from attnpatch.errors import CaptureError
from attnpatch.plotting import panel_grid
from attnpatch.plotting.images import as_heat, as_image, blended, described, enlarged, resized
from attnpatch.plotting.panel_grid import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_image", "frames", "overlay", "resized", "steps", "write_overlays"]

MOST_STEPS = 10
MOST_FRAMES = 8

_FILE_PIXELS = 512
_LONGEST_NAME = 40


def overlay(
    image: Any, heats: Mapping[str, np.ndarray], *, title: str | None = None, columns: int | None = None
) -> "Figure":
    """The image, then one panel per word with the word's heat over the image in grey.

    Every panel has its own scale, from 0 to the largest heat of its word, which stands below it.

    Args:
        image: Anything ``as_image`` takes.
        heats: ``[h, w]`` by word, not negative; any resolution.
        title: Over the figure.
        columns: Panels side by side; None chooses.

    Raises:
        CaptureError: There are no words, or the image, a heat or ``columns`` cannot be used.
        MissingExtraError: matplotlib is not installed.
    """
    pixels, heats = as_image(image), _by_word(heats)
    if columns is not None and (not isinstance(columns, Integral) or columns < 1):
        raise CaptureError(f"columns is {columns!r}; give a whole number from 1, or None.")
    panels = [Panel(word, pixels, heat, float(heat.max())) for word, heat in heats.items()]
    return panel_grid.draw([Panel("image", pixels), *panels], title, columns)


def steps(
    image: Any, heats: Sequence[np.ndarray], labels: Sequence[str], *, title: str | None = None
) -> "Figure":
    """How the heat of one word forms: at most 10 steps, evenly spread, on one scale.

    Args:
        image: Anything ``as_image`` takes.
        heats: ``[h, w]`` of each step of the sampler.
        labels: One per step.
        title: Over the figure.

    Raises:
        CaptureError: There are no steps, not one label for each, or the image or a heat cannot be used.
        MissingExtraError: matplotlib is not installed.
    """
    pixels = as_image(image)
    count, names = _count("heats", heats), _count("labels", labels)
    if count == 0 or count != names:
        raise CaptureError(
            f"{names} labels for heats of {count} steps; give one for each, and a step at least."
        )
    chosen = _spread(count, MOST_STEPS)
    return _on_one_scale([pixels] * len(chosen), heats, labels, chosen, title)


def frames(
    images: Sequence[Any],
    heats: np.ndarray,
    labels: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> "Figure":
    """The heat of one word in a video: at most 8 frames, evenly spread, on one scale.

    Args:
        images: One per frame, each anything ``as_image`` takes; also as an array, or a batch of one video.
        heats: ``[frames, h, w]``.
        labels: One per frame; None numbers them from 0.
        title: Over the figure.

    Raises:
        CaptureError: There are no frames, not one image and label for each, or one cannot be used.
        MissingExtraError: matplotlib is not installed.
    """
    count = _count("heats", heats)
    if _count("images", images) == 1 and count > 1:
        images = images[0]
    labels = [f"frame {number}" for number in range(count)] if labels is None else labels
    found, names = _count("images", images), _count("labels", labels)
    if count == 0 or not count == found == names:
        raise CaptureError(
            f"{found} images and {names} labels for heats of {count} frames; give one of each for every frame, "
            "and a frame at least."
        )
    chosen = _spread(count, MOST_FRAMES)
    return _on_one_scale([as_image(images[number]) for number in chosen], heats, labels, chosen, title)


def write_overlays(image: Any, heats: Mapping[str, np.ndarray], folder: str | os.PathLike) -> list[Path]:
    """One PNG per word (``00_circle.png``, ...): all of them, or none when one cannot be written.

    Each has the pixels of the image, a small one's enlarged to about 512, and the scale of ``overlay``.

    Args:
        image: Anything ``as_image`` takes.
        heats: ``[h, w]`` by word, not negative; any resolution.
        folder: Made where it is missing. Files of the same name are replaced.

    Raises:
        CaptureError: There are no words, the image or a heat cannot be used, or the folder cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    pixels, heats, colours, folder = as_image(image), _by_word(heats), panel_grid.colours(), Path(folder)
    pixels = enlarged(pixels, max(1, round(_FILE_PIXELS / max(pixels.shape[:2]))))
    digits = max(2, len(str(len(heats) - 1)))
    paths = [folder / f"{number:0{digits}}_{_file_name(word)}.png" for number, word in enumerate(heats)]
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as written:
            for path, heat in zip(paths, heats.values(), strict=True):
                picture = panel_grid.png(blended(pixels, heat, float(heat.max()), colours))
                put(written.enter_context(whole(path)), [picture])
    except BaseException as error:
        _remove(new, made)
        if not isinstance(error, OSError):
            raise
        problem = "it is a file" if folder.is_file() else error.strerror or error
        raise CaptureError(f"cannot write into {folder}: {problem}; choose a folder that can be.") from error
    return paths


def _by_word(heats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(heats, Mapping):
        raise CaptureError(f"the heats are {described(heats)}; give a dict from words to [h, w].")
    if not heats:
        raise CaptureError("there are no words to draw; give the heat of one at least.")
    return {str(word): as_heat(word, heat) for word, heat in heats.items()}


def _count(what: str, given: Any) -> int:
    try:
        return len(given)
    except TypeError as error:
        raise CaptureError(f"the {what} are {described(given)}; give a sequence.") from error


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count``, evenly, with the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _on_one_scale(
    pixels: Sequence[np.ndarray],
    heats: Sequence[np.ndarray],
    labels: Sequence[str],
    chosen: Sequence[int],
    title: str | None,
) -> "Figure":
    names = [str(labels[number]) for number in chosen]
    shown = [as_heat(name, heats[number]) for name, number in zip(names, chosen, strict=True)]
    top = max(float(heat.max()) for heat in shown)
    panels = [Panel(name, *both, top) for name, *both in zip(names, pixels, shown, strict=True)]
    return panel_grid.draw(panels, title, top=top)


def _file_name(word: str) -> str:
    """Letters, with their accents, and digits of any script; everything else as ``_``."""
    kept = (letter if unicodedata.category(letter)[0] in "LMN" or letter in "-_" else " " for letter in word)
    return "_".join("".join(kept).split())[:_LONGEST_NAME].rstrip("_") or "word"


def _remove(files: Sequence[Path], folders: Sequence[Path]) -> None:
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
