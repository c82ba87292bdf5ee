"""Converts images of every common kind into one kind of array, and blends heat maps over them; without matplotlib."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from attnpatch.errors import CaptureError

_ACCEPTED = (
    "a PIL image, numpy [H, W, 3] or [H, W], torch [3, H, W], [H, W, 3] or [H, W], as uint8 or as floats from "
    "0 to 1, alone or as a batch of one"
)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue for grey (ITU-R BT.601)
_DARKEST, _BRIGHTEST = 0.04, 0.66  # range of the grey image under the heat, so that the colours stand out
_COVER = 0.9  # opacity of the largest heat


def as_image(image: Any) -> np.ndarray:
    """Any common kind of image as ``[H, W, 3]`` float32 from 0 to 1; transparent pixels become white.

    Raises:
        CaptureError: It is not an image, or its shape, dtype or range is not supported.
    """
    if isinstance(image, list | tuple) and len(image) == 1:
        return as_image(image[0])
    pixels = _pixels(image)
    if pixels is not None:
        pixels = _channels_last(pixels, channels_first=isinstance(image, torch.Tensor))
    known = pixels is not None and (pixels.dtype == np.uint8 or np.issubdtype(pixels.dtype, np.floating))
    if not known or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise CaptureError(f"the image is {described(image)}; accepted are {_ACCEPTED}.")
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):  # also true if a pixel is NaN
        raise CaptureError(
            f"the image is {described(image)} with values from {pixels.min():.3g} to {pixels.max():.3g}; give "
            "uint8 or floats from 0 to 1 (from -1 to 1: (image + 1) / 2)."
        )
    return pixels.astype(np.float32).clip(0, 1)


def resized(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """``[h, w]`` resized to ``[height, width]`` float32, bilinear; the edges of both coincide."""
    source = torch.from_numpy(np.array(heat, np.float32))[None, None]
    return interpolate(source, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def enlarged(image: np.ndarray, times: int) -> np.ndarray:
    """``[H, W, 3]`` with every pixel repeated as a square of ``times`` x ``times``."""
    return image.repeat(times, axis=0).repeat(times, axis=1)


def fitted(image: np.ndarray, longest: int) -> np.ndarray:
    """``[H, W, 3]`` resized: its longer side has at most ``longest`` pixels, and more than half as many."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side <= longest:
        return enlarged(image, longest // side)
    size = [max(1, round(length * longest / side)) for length in (height, width)]
    source = torch.from_numpy(image.transpose(2, 0, 1))[None]
    return interpolate(source, size, mode="area")[0].numpy().transpose(1, 2, 0)


def blended(image: np.ndarray, heat: np.ndarray, top: float, colours: np.ndarray) -> np.ndarray:
    """The image in dimmed grey under ``heat`` in colours, which are more opaque where the heat is larger.

    Args:
        image: ``[H, W, 3]`` float32 from 0 to 1.
        heat: ``[h, w]``, not negative.
        top: The heat that gets the last colour.
        colours: ``[n, 3]`` from 0 to 1.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    dim = _DARKEST + (_BRIGHTEST - _DARKEST) * (image @ _GREY)[:, :, None]
    share = (resized(heat, *image.shape[:2]) / (top or 1.0)).clip(0, 1)
    cover = _COVER * share[:, :, None] ** 0.75
    colour = colours[(share * (len(colours) - 1)).round().astype(int)]
    return to_bytes(dim * (1 - cover) + colour * cover)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 as uint8."""
    return (image * 255).round().clip(0, 255).astype(np.uint8)


def as_heat(name: str, heat: Any) -> np.ndarray:
    """``heat`` as ``[h, w]`` float32.

    Raises:
        CaptureError: It has another shape, is empty, or has elements that are negative or not finite.
    """
    if isinstance(heat, torch.Tensor):
        heat = heat.detach().float().cpu().numpy()
    try:
        heat = np.asarray(heat)
    except ValueError as error:  # rows of different lengths
        raise CaptureError(
            f"the heat of {name!r} is {described(heat)}; give numbers of shape [h, w]."
        ) from error
    if heat.ndim != 2 or heat.size == 0 or heat.dtype.kind not in "biuf":
        raise CaptureError(f"the heat of {name!r} is {described(heat)}; give numbers of shape [h, w].")
    if not np.isfinite(heat).all() or heat.min() < 0:
        raise CaptureError(
            f"the heat of {name!r} holds numbers that are negative or not finite; give others."
        )
    return heat.astype(np.float32)


def described(given: Any) -> str:
    """For messages: shape and dtype of an array, mode of a PIL image, type of anything else."""
    if isinstance(given, np.ndarray | torch.Tensor):
        kind = "numpy" if isinstance(given, np.ndarray) else "torch"
        return f"{kind} {list(given.shape)} {str(given.dtype).removeprefix('torch.')}"
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {len(given)}"
    mode = f" of mode {given.mode}" if _is_pil(given) else ""
    return f"of type {type(given).__name__}{mode}"


def _is_pil(image: Any) -> bool:
    """Whether an object is a PIL image; PIL is not imported, because attnpatch does not need it."""
    return hasattr(image, "convert") and isinstance(getattr(image, "mode", None), str)


def _pixels(image: Any) -> np.ndarray | None:
    """The pixels of an image as an array; None if its kind is unknown."""
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu()
        return (pixels.float() if pixels.is_floating_point() else pixels).numpy()
    if not _is_pil(image):
        return image if isinstance(image, np.ndarray) else None
    if image.mode[0] in "IF":  # floats and integers of 16 or 32 bits, which PIL would clip at 255
        return np.asarray(image)
    try:
        pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
    except ValueError:  # PIL cannot convert this mode to RGBA
        return None
    return pixels[:, :, :3] * pixels[:, :, 3:] + (1 - pixels[:, :, 3:])


def _channels_last(pixels: np.ndarray, channels_first: bool) -> np.ndarray:
    """Pixels as ``[H, W, 3]``: without the batch axis, channels last, grey repeated as three channels."""
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 3 and channels_first and len(pixels) == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] != 3 and 1 in pixels.shape[::2]:
        pixels = pixels[0] if len(pixels) == 1 else pixels[:, :, 0]  # grey, with an axis of batch or channel
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
