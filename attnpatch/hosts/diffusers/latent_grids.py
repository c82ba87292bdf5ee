"""The grid (frames, rows, columns) of a denoiser's image tokens: from its latents, or from given positions or shapes.

It is never guessed from the number of tokens: a picture with three reference pictures has as many as one picture of
twice the height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.blocks.tiles import Grid

# If positions seem to show more pictures than this, the tokens are not in row order.
_MOST = 32


def pictures_of(given: dict[str, Any], images: list[torch.Tensor]) -> tuple[Grid, ...]:
    """The pictures in a sequence of image tokens, in order; empty if they are not known.

    Args:
        given: The denoiser's arguments, by name.
        images: Its image inputs.
    """
    if not images or images[0].dim() != 3:
        return ()
    ids, shapes = given.get("img_ids"), given.get("img_shapes", given.get("image_grid_thw"))
    if isinstance(ids, torch.Tensor):
        return _by_positions(ids)
    if shapes is not None:
        return _by_shapes(shapes)
    sizes = [given.get("num_frames"), given.get("height"), given.get("width")]
    frames, height, width = (size if type(size) is int else None for size in sizes)
    return (Grid(frames or 1, height, width),) if height and width else ()


def axes_of(given: dict[str, Any]) -> Grid | None:
    """The grid given as separate positions of frames, rows and columns (Kandinsky); ``None`` if there are none."""
    axes = given.get("visual_rope_pos")
    if not isinstance(axes, (tuple, list)) or len(axes) != 3:
        return None
    is_known = all(isinstance(axis, torch.Tensor) and axis.dim() == 1 and len(axis) for axis in axes)
    return Grid(*map(len, axes)) if is_known else None


def latents_grid(part: nn.Module, images: list[torch.Tensor]) -> Grid | None:
    """The grid of latents that have the shape of an image or a video; ``None`` if it is not known."""
    if not images:
        return None
    shape = images[0].shape
    if len(shape) == 4:
        return Grid(1, shape[2], shape[3])
    if len(shape) != 5:
        return None
    # The channel dimension comes before the frames, after them, or last.
    channels = getattr(getattr(part, "config", None), "in_channels", None)
    is_first, is_second, is_last = (shape[axis] == channels for axis in (1, 2, 4))
    if is_first + is_second + is_last != 1:
        # A model with 3d convolutions takes the channels before the frames.
        convolutions = (module for module in part.modules() if isinstance(module, nn.Conv3d))
        is_first = any(module.in_channels == shape[1] for module in convolutions)
        is_second = is_last = False
    if is_last:
        return Grid(shape[1], shape[2], shape[3])
    return Grid(shape[2] if is_first else shape[1], shape[3], shape[4]) if is_first or is_second else None


def _by_positions(ids: torch.Tensor) -> tuple[Grid, ...]:
    """Pictures found from positions ``[tokens, 3 or more]`` (or ``[batch, ...]``).

    Row and column are the second and third number, or the last two. The other numbers are constant within a picture.
    """
    ids = ids.detach().cpu()
    if ids.dim() == 3:
        if not bool((ids == ids[:1]).all()):
            return ()  # the images of the batch have different positions
        ids = ids[0]
    if ids.dim() != 2 or ids.shape[1] < 3 or not len(ids):
        return ()
    pairs = dict.fromkeys([(1, 2), (ids.shape[1] - 2, ids.shape[1] - 1)])
    return next(filter(None, (_by_columns(ids, *pair) for pair in pairs)), ())


def _by_columns(ids: torch.Tensor, row: int, column: int) -> tuple[Grid, ...]:
    """Pictures found from positions, given which number is the row and which the column."""
    others = ids[:, [place for place in range(ids.shape[1]) if place not in (row, column)]]
    changes = (others[1:] != others[:-1]).any(1).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(ids)]
    if len(bounds) > _MOST:
        return ()
    found: list[Grid] = []
    for start, end in itertools.pairwise(bounds):
        pictures = _in_rows(ids[start:end, [row, column]])
        if not pictures or len(found) + len(pictures) > _MOST:
            return ()
        found += pictures
    # Pictures of one token each: these numbers are not row and column.
    return () if len(found) > 1 and any(each.tokens == 1 for each in found) else tuple(found)


def _in_rows(places: torch.Tensor) -> list[Grid]:
    """Pictures found from the rows and columns of successive tokens; empty if the tokens are not in row order."""
    found: list[Grid] = []
    while len(places) and len(found) <= _MOST:
        height, width = _first_picture(places)
        found.append(Grid(1, height, width))
        last, places = places[(height - 1) * width, 0], places[height * width :]
        # Rows that continue the numbering belong to the same picture, which is then not a rectangle.
        if len(places) and bool(places[0, 0] > last):
            return []
    # Several pictures with a single row or column: pictures side by side, or tokens in another order.
    return [] if len(found) > 1 and any(1 in (each.height, each.width) for each in found) else found


def _first_picture(places: torch.Tensor) -> tuple[int, int]:
    """Height and width of the first picture."""
    rows, columns = places.T
    width = _regular(columns, rows == rows[0])
    whole = places[: len(places) // width * width].reshape(-1, width, 2)
    same = (whole[:, :, 1] == whole[0, :, 1]).all(1) & (whole[:, :, 0] == whole[:, :1, 0]).all(1)
    return _regular(whole[:, 0, 0], same), width


def _regular(values: torch.Tensor, valid: torch.Tensor) -> int:
    """The number of values, from the first on, that grow by a constant step."""
    steps = values.diff()
    if not len(steps) or not bool(steps[0] > 0):
        return 1
    goes_on = valid[1:] & ((steps - steps[0]).abs() < 1e-3 * steps[0].abs())
    return 1 + int(goes_on.int().cumprod(0).sum())


def _by_shapes(shapes: Any) -> tuple[Grid, ...]:
    """Pictures given as ``(frames, height, width)``: one for all samples, one per sample, or a list per sample."""
    if isinstance(shapes, torch.Tensor):
        shapes = shapes.tolist()
    if _is_shape(shapes):
        shapes = [shapes]
    if not isinstance(shapes, Sequence) or not len(shapes):
        return ()
    samples = [[each] if _is_shape(each) else each for each in shapes]
    alike = all(isinstance(each, Sequence) and all(map(_is_shape, each)) for each in samples)
    if not alike or any(list(map(tuple, each)) != list(map(tuple, samples[0])) for each in samples):
        return ()
    return tuple(Grid(*each) for each in samples[0])


def _is_shape(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(type(each) is int for each in value)
