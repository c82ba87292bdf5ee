"""What the layouts of pictures are read from: a prompt's image tokens, settings of the processor, and what it returned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch

from attnpatch.blocks.pictures import Picture, PictureGrid
from attnpatch.errors import BlockError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The real tokens of one sequence, and the positions of image tokens among them."""

    ids: list[int]
    places: list[int]

    def runs(self) -> list[list[int]]:
        """The positions of image tokens, in contiguous runs."""
        numbered = itertools.groupby(enumerate(self.places), lambda pair: pair[1] - pair[0])
        return [[place for _, place in group] for _, group in numbered]


def sequences(inputs: Mapping[str, Any]) -> list[list[int]]:
    """The real tokens of each sequence."""
    given, mask = fact(inputs, "input_ids"), inputs.get("attention_mask")
    try:
        ids = torch.as_tensor(given)
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    except (ValueError, TypeError) as error:
        raise BlockError("input_ids are no tensor; call the processor with return_tensors='pt'.") from error
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise BlockError(
            f"input_ids is {list(ids.shape)} and attention_mask {list(mask.shape)}; accepted is [batch, tokens] for both."
        )
    return [row[real != 0].tolist() for row, real in zip(ids, mask, strict=True)]


def special_token(processor: Any, kind: str) -> int | None:
    """The id of the token that stands for a part of an image or a video; ``None`` if there is none."""
    # The image token of Gemma 3's processor is the one that begins a picture.
    holder = processor.tokenizer if type(processor).__name__ == "Gemma3Processor" else processor
    found, name = getattr(holder, f"{kind}_token_id", None), getattr(holder, f"{kind}_token", None)
    if found is None and isinstance(name, str):  # processors of older releases have the name only
        found = processor.tokenizer.convert_tokens_to_ids(name)
    return found if isinstance(found, int) else None


def fact(inputs: Mapping[str, Any], name: str) -> Any:
    """A part of the processor's output.

    Raises:
        BlockError: It is missing.
    """
    if not isinstance(inputs, Mapping) and not hasattr(inputs, "keys"):
        raise BlockError(f"inputs is {type(inputs).__name__}; accepted is what the processor returned.")
    found = inputs[name] if name in inputs else None  # noqa: SIM401 (a BatchFeature has no get in older releases)
    if found is None:
        raise BlockError(
            f"inputs have no {name}, which tells where pictures are; give all that the processor returned."
        )
    return found


def setting(holder: Any, name: str) -> int:
    """A whole number among a processor's settings.

    Raises:
        BlockError: It is missing.
    """
    found = getattr(holder, name, None)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BlockError(
            f"{type(holder).__name__}.{name} is {found!r}, and the rows of image tokens depend on it; set it."
        )
    return found


def does_not_fit(what: str) -> BlockError:
    return BlockError(
        f"{what}, so it is not known which token shows which part; give the inputs as the processor made them."
    )


# ------------------------------------------------------------------------------------------------------------- layouts


def whole_picture(label: str, places: list[int], height: int, width: int, skip: int = 0) -> Picture:
    """A picture whose tokens are contiguous and row by row, after ``skip`` other tokens.

    Raises:
        BlockError: Their number is another, or they are not contiguous.
    """
    if not places or len(places) != skip + height * width or places[-1] - places[0] != len(places) - 1:
        raise does_not_fit(f"{label} has {len(places)} contiguous tokens instead of {height} x {width}")
    grid = PictureGrid(label, height, width, tuple(places[skip:]))
    return Picture(label, places[0], places[-1] + 1, (grid,))


def shape_of_pixels(inputs: Mapping[str, Any], dims: int) -> torch.Size:
    """The shape of ``pixel_values``: pictures first, height and width last."""
    found = fact(inputs, "pixel_values")
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != dims:
        raise BlockError(
            f"pixel_values is {'a list' if shape is None else list(shape)}; accepted is a tensor of {dims} dimensions "
            "(return_tensors='pt')."
        )
    return shape
