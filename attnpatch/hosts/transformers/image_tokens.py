"""Where the pictures of a language model's call stand among its tokens, as Qwen2-VL and its kind are told it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Height, width, tile, start and frames, as ``Blocks.tiles`` has them.
Tiles = tuple[int, int, int, int, int]


def why_no_picture(part: nn.Module, given: dict[str, Any], tiles: Tiles) -> str | None:
    """Why tiles that were asked for are no picture of a call.

    Args:
        part: The model.
        given: What it is called with, by name.
        tiles: The picture, counted in tokens without padding.

    Returns:
        A reason that names the pictures there are; ``None``: it is one, or the call says nothing of pictures.
    """
    height, width, _, start, frames = tiles
    found = pictures_in(part, given)
    if found is None or all((start, frames, height, width) in row for row in found):
        return None
    shown = [f"{h} x {w} from token {first} on" + f" ({f} frames)" * (f > 1) for first, f, h, w in found[0]]
    return (
        f"there is no picture of {height} x {width} tokens from token {start} on; the first sequence has "
        f"{', '.join(shown) or 'none'}: give Blocks.tiles(height, width, tile, start=...) of one"
    )


def pictures_in(part: nn.Module, given: dict[str, Any]) -> list[list[tuple[int, int, int, int]]] | None:
    """The pictures of each sequence: first token, frames, rows and columns of tokens; ``None``: the call says nothing."""
    config, ids, grids = getattr(part, "config", None), given.get("input_ids"), given.get("image_grid_thw")
    number = getattr(config, "image_token_id", None)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    tensors = isinstance(ids, torch.Tensor) and isinstance(grids, torch.Tensor)
    if not tensors or ids.dim() != 2 or number is None or merge is None:
        return None
    mask = given.get("attention_mask")
    is_mask = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
    sizes = iter([(f, h // merge, w // merge) for f, h, w in grids.reshape(-1, 3).tolist()])
    found: list[list[tuple[int, int, int, int]]] = []
    for row, tokens in enumerate(ids):
        real = tokens[mask[row] != 0] if is_mask else tokens
        found.append(_of_sequence((real == number).nonzero().flatten().tolist(), sizes))
    return found


def _of_sequence(places: list[int], sizes: Any) -> list[tuple[int, int, int, int]]:
    """Pictures one after another, each of tokens in one piece; one in several pieces is none that tiles could show."""
    found = []
    while places:
        size = next(sizes, None)
        if size is None:
            break
        count = size[0] * size[1] * size[2]
        mine, places = places[:count], places[count:]
        if mine and len(mine) == count and mine[-1] - mine[0] == count - 1:
            found.append((mine[0], *size))
    return found
