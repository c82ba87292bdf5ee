"""Draws heat maps of words over an image, over a sampler's steps and over a video's frames."""

import contextlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
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


def overlay(image: Any, heats: Mapping[str, np.ndarray], *, title: str | None = None) -> "Figure":
    """Draw the image, then one panel per word: the word's heat over the image in grey.

    Every panel has its own scale, from 0 to the largest heat of its word, which is printed below it.

    Args:
        image: Anything that ``as_image`` accepts.
        heats: By word, ``[h, w]`` of any resolution, not negative.
        title: Title of the figure.

    Raises:
        CaptureError: There are no words, or the image or a heat cannot be used.
        MissingExtraError: matplotlib is not installed.
    """
    pixels, heats = as_image(image), _by_word(heats)
    panels = [Panel(word, pixels, heat, float(heat.max())) for word, heat in heats.items()]
    return panel_grid.draw([Panel("image", pixels), *panels], title)


def steps(
    image: Any, heats: Sequence[np.ndarray], labels: Sequence[str], *, title: str | None = None
) -> "Figure":
    """Draw how the heat of one word forms: at most 10 steps, evenly spaced, on one scale.

    Args:
        image: Anything that ``as_image`` accepts.
        heats: ``[h, w]`` for each step of the sampler.
        labels: One per step.
        title: Title of the figure.

    Raises:
        CaptureError: The image or a heat is invalid.
        MissingExtraError: matplotlib is not installed.
    """
    pixels = as_image(image)
    chosen = _spread(len(heats), MOST_STEPS)
    return _on_one_scale([pixels] * len(chosen), heats, labels, chosen, title)


def frames(images: Sequence[Any], heats: np.ndarray, *, title: str | None = None) -> "Figure":
    """Draw the heat of one word in a video: at most 8 frames, evenly spaced, on one scale.

    Args:
        images: One per frame, each anything that ``as_image`` accepts; also as one array, or as a batch of one video.
        heats: ``[frames, h, w]``.
        title: Title of the figure.

    Raises:
        CaptureError: The numbers of images and frames differ, or one of them is invalid.
        MissingExtraError: matplotlib is not installed.
    """
    count = len(heats)
    if _count(images) == 1 and count > 1:
        images = images[0]
    if _count(images) != count:
        raise CaptureError(f"{_count(images)} images for heats of {count} frames; give one image per frame.")
    labels = [f"frame {number}" for number in range(count)]
    chosen = _spread(count, MOST_FRAMES)
    return _on_one_scale([as_image(images[number]) for number in chosen], heats, labels, chosen, title)


def write_overlays(image: Any, heats: Mapping[str, np.ndarray], folder: str | os.PathLike) -> list[Path]:
    """Write one PNG per word (``00_circle.png``, ...): all of them, or none if one cannot be written.

    Each has the size of the image (a small image is enlarged to about 512 pixels) and the scale of ``overlay``.

    Args:
        image: Anything that ``as_image`` accepts.
        heats: By word, ``[h, w]`` of any resolution, not negative.
        folder: Created if it is missing. Files of the same name are replaced.

    Raises:
        CaptureError: There are no words, the image or a heat is invalid, or the folder cannot be written to.
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
        raise CaptureError(f"cannot write into {folder}: {problem}; choose another folder.") from error
    return paths


def _by_word(heats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not heats:
        raise CaptureError("there are no words to draw; give the heat of at least one.")
    return {str(word): as_heat(word, heat) for word, heat in heats.items()}


def _count(images: Any) -> int:
    try:
        return len(images)
    except TypeError as error:
        raise CaptureError(f"the images are {described(images)}; give a sequence.") from error


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spaced, the first and the last included."""
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
    """A word as a file name: letters, accents and digits of any script are kept, all else becomes ``_``."""
    kept = (letter if unicodedata.category(letter)[0] in "LMN" or letter in "-_" else " " for letter in word)
    return "_".join("".join(kept).split())[:_LONGEST_NAME].rstrip("_") or "word"


def _remove(files: Sequence[Path], folders: Sequence[Path]) -> None:
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
