"""Finds the pictures among the tokens of a language model's call, from the arguments that Qwen2-VL and similar take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.hosts.transformers.calls import parameter_names

# Height, width, tile, start and frames, as in ``Blocks.tiles``.
Tiles = tuple[int, int, int, int, int]
# First token, frames, rows and columns of tokens.
Picture = tuple[int, int, int, int]
# Frames, rows and columns of tokens.
Size = tuple[int, int, int]

IMAGE, VIDEO = "image", "video"
# The names of the language model in vision-language models.
LANGUAGE_MODELS = ("language_model", "text_model")


def why_no_picture(
    part: nn.Module, given: Mapping[str, Any], tiles: Tiles, before: Sequence[torch.Tensor] = ()
) -> str | None:
    """Why the tiles of a capture do not match any picture of a call.

    Args:
        part: The model.
        given: The arguments of its call, by name.
        tiles: The tiles of the capture; positions count tokens without padding.
        before: Shapes with which the vision tower was called before, call by call: ``generate`` encodes pictures first.

    Returns:
        A reason that names the pictures of the call; ``None`` if one matches, or if the call tells nothing of pictures.
    """
    height, width, _, start, frames = tiles
    found = pictures_in(part, given, before)
    if found is None or all((start, frames, height, width) in row for row in found):
        return None
    shown = [f"{h} x {w} from token {first} on" + f" ({f} frames)" * (f > 1) for first, f, h, w in found[0]]
    return (
        f"there is no picture of {height} x {width} tokens from token {start} on"
        + (f" ({frames} frames)" * (frames > 1))
        + f"; the first sequence has {', '.join(shown) or 'none'}: give Blocks.tiles(height, width, tile, start=...) of one"
    )


def language_model_in(model: nn.Module) -> str:
    """The path of the language model in a vision-language model; empty if the model has no such part."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LANGUAGE_MODELS]
    return min(names, key=lambda name: name.count("."), default="")


def towers_in(model: nn.Module) -> dict[str, str]:
    """The vision towers in a model whose patches may come square by square, each with the reason that tiles do not fit.

    Processors of Qwen2-VL and similar put the patches next to each other that the model merges into one token.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        merge = getattr(getattr(module, "config", None), "spatial_merge_size", None)
        if isinstance(merge, int) and merge > 1 and "grid_thw" in parameter_names(type(module)):
            found[name] = (
                f"its patches may come in squares of {merge} x {merge} instead of row by row, so it is not known which patches "
                f"a tile has; Blocks.fixed({merge * merge}) has a block for each square, and Blocks.spans any others"
            )
    return found


def pictures_in(
    part: nn.Module, given: Mapping[str, Any], before: Sequence[torch.Tensor] = ()
) -> list[list[Picture]] | None:
    """The pictures of each sequence; ``None`` if the call does not tell them. Arguments as for ``why_no_picture``."""
    config, ids = getattr(part, "config", None), given.get("input_ids")
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or merge is None:
        return None
    marks = {kind: getattr(config, f"{kind}_token_id", None) for kind in (IMAGE, VIDEO)}
    counts = {kind: int((ids == mark).sum()) for kind, mark in marks.items() if mark is not None}
    counts = {kind: count for kind, count in counts.items() if count}
    shapes = {kind: given.get(f"{kind}_grid_thw") for kind in (IMAGE, VIDEO)}
    shapes = {kind: shape for kind, shape in shapes.items() if isinstance(shape, torch.Tensor)}
    if not shapes and counts:
        # The tower was called once per kind, images first.
        shapes = dict(zip(counts, before[-len(counts) :], strict=False))
    sizes = {kind: _merged(shape, merge) for kind, shape in shapes.items()}
    totals = {kind: sum(f * h * w for f, h, w in each) for kind, each in sizes.items()}
    if not sizes or {kind for kind in totals if totals[kind]} != set(counts):
        return None  # the kinds of shapes and of placeholder tokens differ
    # With ``num_return_sequences`` each sequence occurs several times, with the same pictures.
    copies = max((counts[kind] // totals[kind] for kind in counts), default=1)
    if any(counts[kind] != copies * totals[kind] for kind in counts):
        return None
    mask = given.get("attention_mask")
    is_mask = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
    left = {kind: iter(each) for kind, each in sizes.items()}
    found: list[list[Picture]] = []
    for row, tokens in enumerate(ids):
        if row % copies:
            found.append(found[-1])
            continue
        real = tokens[mask[row] != 0] if is_mask else tokens
        places = {kind: (real == marks[kind]).nonzero().flatten().tolist() for kind in counts}
        found.append(sorted(itertools.chain(*(_of_sequence(places[kind], left[kind]) for kind in counts))))
    return found


def _merged(shapes: torch.Tensor, merge: int) -> list[Size]:
    """Sizes in tokens of the language model, from sizes ``[pictures, 3]`` in patches of the vision tower."""
    return [(f, h // merge, w // merge) for f, h, w in shapes.reshape(-1, 3).tolist()]


def _of_sequence(places: list[int], sizes: Iterator[Size]) -> Iterator[Picture]:
    """The pictures of one kind, each contiguous in the tokens; a video that is not contiguous is split into frames."""
    while places:
        size = next(sizes, None)
        if size is None:
            return
        frames, height, width = size
        mine, places = places[: frames * height * width], places[frames * height * width :]
        yield from _pieces(mine, [size]) or _pieces(mine, [(1, height, width)] * frames)


def _pieces(places: list[int], sizes: list[Size]) -> list[Picture]:
    """Pictures of these sizes at some token positions; empty if one of them is not contiguous."""
    found: list[Picture] = []
    for size in sizes:
        count = size[0] * size[1] * size[2]
        mine, places = places[:count], places[count:]
        if len(mine) < count or not count or mine[-1] - mine[0] != count - 1:
            return []
        found.append((mine[0], *size))
    return found
