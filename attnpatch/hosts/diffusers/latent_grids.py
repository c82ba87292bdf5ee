"""How the image tokens of a denoiser's call lie: as its latents do, or as the positions and shapes it is given say.

Never by how many they are: a picture and three references are as many as a picture of twice the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.blocks.tiles import Grid

# More than so many pictures in a sequence are tokens in another order than that of rows.
_MOST = 32


def pictures_of(given: dict[str, Any], images: list[torch.Tensor]) -> tuple[Grid, ...]:
    """The pictures in a sequence of image tokens, in order; none: not known.

    Args:
        given: What the denoiser is called with, by name.
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
    """The image's tokens by the positions of its frames, rows and columns, each apart, as Kandinsky is given them."""
    axes = given.get("visual_rope_pos")
    if not isinstance(axes, (tuple, list)) or len(axes) != 3:
        return None
    is_known = all(isinstance(axis, torch.Tensor) and axis.dim() == 1 and len(axis) for axis in axes)
    return Grid(*map(len, axes)) if is_known else None


def latents_grid(part: nn.Module, images: list[torch.Tensor]) -> Grid | None:
    """Frames, rows and columns of latents that come as an image or a video; ``None``: not known."""
    if not images:
        return None
    shape = images[0].shape
    if len(shape) == 4:
        return Grid(1, shape[2], shape[3])
    if len(shape) != 5:
        return None
    # Channels before frames, after them, or last.
    channels = getattr(getattr(part, "config", None), "in_channels", None)
    is_first, is_second, is_last = (shape[axis] == channels for axis in (1, 2, 4))
    if is_first + is_second + is_last != 1:
        # A convolution over frames takes them after the channels.
        convolutions = (module for module in part.modules() if isinstance(module, nn.Conv3d))
        is_first = any(module.in_channels == shape[1] for module in convolutions)
        is_second = is_last = False
    if is_last:
        return Grid(shape[1], shape[2], shape[3])
    return Grid(shape[2] if is_first else shape[1], shape[3], shape[4]) if is_first or is_second else None


def _by_positions(ids: torch.Tensor) -> tuple[Grid, ...]:
    """Pictures by ``[tokens, 3 or more]`` positions (also ``[batch, ...]``), of which the second is the row and the
    third the column, or the last two are; the others are the same all over a picture."""
    ids = ids.detach().cpu()
    if ids.dim() == 3:
        if not bool((ids == ids[:1]).all()):
            return ()  # images of a batch that differ
        ids = ids[0]
    if ids.dim() != 2 or ids.shape[1] < 3 or not len(ids):
        return ()
    pairs = dict.fromkeys([(1, 2), (ids.shape[1] - 2, ids.shape[1] - 1)])
    return next(filter(None, (_by_columns(ids, *pair) for pair in pairs)), ())


def _by_columns(ids: torch.Tensor, row: int, column: int) -> tuple[Grid, ...]:
    """The same, of the row and the column in two of the numbers."""
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
    # Several pictures of a token are one of which rows or columns were taken for its number.
    return () if len(found) > 1 and any(each.tokens == 1 for each in found) else tuple(found)


def _in_rows(places: torch.Tensor) -> list[Grid]:
    """Pictures by rows and columns that follow one another; none: they are in another order."""
    found: list[Grid] = []
    while len(places) and len(found) <= _MOST:
        height, width = _first_picture(places)
        found.append(Grid(1, height, width))
        last, places = places[(height - 1) * width, 0], places[height * width :]
        # Rows that go on where those before ended are of the same picture, which is then no rectangle.
        if len(places) and bool(places[0, 0] > last):
            return []
    # One beside the other, or single rows and columns of one in another order.
    return [] if len(found) > 1 and any(1 in (each.height, each.width) for each in found) else found


def _first_picture(places: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the picture that positions begin with."""
    rows, columns = places.T
    width = _regular(columns, rows == rows[0])
    whole = places[: len(places) // width * width].reshape(-1, width, 2)
    same = (whole[:, :, 1] == whole[0, :, 1]).all(1) & (whole[:, :, 0] == whole[:, :1, 0]).all(1)
    return _regular(whole[:, 0, 0], same), width


def _regular(values: torch.Tensor, valid: torch.Tensor) -> int:
    """How many values from the first on grow by one and the same step."""
    steps = values.diff()
    if not len(steps) or not bool(steps[0] > 0):
        return 1
    goes_on = valid[1:] & ((steps - steps[0]).abs() < 1e-3 * steps[0].abs())
    return 1 + int(goes_on.int().cumprod(0).sum())


def _by_shapes(shapes: Any) -> tuple[Grid, ...]:
    """Pictures by ``(frames, height, width)``: of one sample, of each, or a list of them for each sample."""
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
