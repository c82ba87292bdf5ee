"""Which tokens of a prompt show which part of a picture, for the processors of transformers whose layout is known.

Everything is read from facts: the processor's image token, its patch and merge sizes, and the processor's output
(``image_grid_thw``, ``image_sizes``, the shape of ``pixel_values``). Each grid must fit the tokens exactly. A processor
that is not in the table is refused, because a number of tokens alone does not tell rows and columns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from attnpatch.blocks.pictures import Picture, PictureGrid, PromptWithPictures
from attnpatch.errors import BlockError
from attnpatch.hosts.transformers import anyres


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The real tokens of one sequence, and the positions of image tokens among them."""

    ids: list[int]
    places: list[int]

    def runs(self) -> list[list[int]]:
        """The positions of image tokens, in contiguous runs."""
        numbered = itertools.groupby(enumerate(self.places), lambda pair: pair[1] - pair[0])
        return [[place for _, place in group] for _, group in numbered]


Layout = Callable[[Any, Mapping[str, Any], list[Prompt]], list[list[Picture]]]


def prompts_with_pictures(processor: Any, inputs: Mapping[str, Any]) -> list[PromptWithPictures]:
    """The sequences of a processor's output, with the pictures in them.

    Args:
        processor: A processor of transformers.
        inputs: What it returned.

    Raises:
        BlockError: The layout is not known, a fact is missing, or the facts contradict each other.
    """
    name = type(processor).__name__
    if name in REFUSED:
        raise BlockError(f"{name}: {REFUSED[name]}; use Blocks.fixed or Blocks.spans.")
    if name not in LAYOUTS:
        raise BlockError(
            f"{name}: it is not known how its image tokens are arranged in rows and columns; known are "
            f"{', '.join(LAYOUTS)}. Use Blocks.tiles(height, width, tile, start=...)."
        )
    tokens = _sequences(inputs)
    mark = _token(processor, "image")
    if mark is None:
        raise BlockError(f"{name}: image_token_id is missing, so image tokens cannot be told from text.")
    prompts = [Prompt(ids, [place for place, one in enumerate(ids) if one == mark]) for ids in tokens]
    found = LAYOUTS[name](processor, inputs, prompts)
    if not any(found):
        raise BlockError(f"there are no image tokens (id {mark}) in input_ids; give inputs with a picture.")
    decode = functools.partial(_decoded, processor.tokenizer)
    return [
        PromptWithPictures(len(ids), tuple(pictures), functools.partial(decode, ids))
        for ids, pictures in zip(tokens, found, strict=True)
    ]


def _decoded(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    return tokenizer.decode(ids[start:stop])


def _sequences(inputs: Mapping[str, Any]) -> list[list[int]]:
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


def _token(processor: Any, kind: str) -> int | None:
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


def _does_not_fit(what: str) -> BlockError:
    return BlockError(
        f"{what}, so it is not known which token shows which part; give the inputs as the processor made them."
    )


# ------------------------------------------------------------------------------------------------------------- layouts


def _by_grid(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Qwen2-VL and its successors: ``image_grid_thw`` and ``video_grid_thw`` have each picture's size in patches."""
    found: list[list[Picture]] = [[] for _ in prompts]
    for kind, part in (("image", "image_processor"), ("video", "video_processor")):
        mark = _token(processor, kind)
        places = [[at for at, one in enumerate(prompt.ids) if one == mark] for prompt in prompts]
        if mark is None or not any(places):
            continue
        merge = setting(getattr(processor, part, None) or processor.image_processor, "merge_size")
        shapes = torch.as_tensor(fact(inputs, f"{kind}_grid_thw")).reshape(-1, 3).tolist()
        sizes = iter([(frames, height // merge, width // merge) for frames, height, width in shapes])
        for own, pictures in zip(places, found, strict=True):
            number = 0
            while own:
                frames, height, width = next(sizes, (0, 0, 0))
                if not frames:
                    raise _does_not_fit(
                        f"{kind}_grid_thw has fewer pictures than the tokens, or smaller ones"
                    )
                number += 1
                count = frames * height * width
                mine, own = own[:count], own[count:]
                pictures += _frames(f"{kind} {number}", mine, (frames, height, width), kind == "video")
        if next(sizes, None) is not None:
            raise _does_not_fit(f"{kind}_grid_thw has more pictures than the tokens")
    return [sorted(pictures, key=lambda picture: picture.start) for pictures in found]


def _frames(label: str, places: list[int], size: tuple[int, int, int], is_video: bool) -> Iterator[Picture]:
    frames, height, width = size
    area = height * width
    for frame in range(max(frames, 1)):
        name = f"{label} f{frame}" if is_video or frames > 1 else label
        yield whole_picture(name, places[frame * area : (frame + 1) * area], height, width)


def whole_picture(label: str, places: list[int], height: int, width: int, skip: int = 0) -> Picture:
    """A picture whose tokens are contiguous and row by row, after ``skip`` other tokens.

    Raises:
        BlockError: Their number is another, or they are not contiguous.
    """
    if not places or len(places) != skip + height * width or places[-1] - places[0] != len(places) - 1:
        raise _does_not_fit(f"{label} has {len(places)} contiguous tokens instead of {height} x {width}")
    grid = PictureGrid(label, height, width, tuple(places[skip:]))
    return Picture(label, places[0], places[-1] + 1, (grid,))


def _pixels(inputs: Mapping[str, Any], dims: int) -> torch.Size:
    """The shape of ``pixel_values``: pictures first, height and width last."""
    found = fact(inputs, "pixel_values")
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != dims:
        raise BlockError(
            f"pixel_values is {'a list' if shape is None else list(shape)}; accepted is a tensor of {dims} dimensions "
            "(return_tensors='pt')."
        )
    return shape


def _equal(prompts: list[Prompt], count: int, height: int, width: int, pictures: int) -> list[list[Picture]]:
    """Pictures of one size: ``count`` tokens each, of which the last ``height * width`` are the grid."""
    total = sum(len(prompt.places) for prompt in prompts)
    if total != count * pictures:
        raise _does_not_fit(f"{pictures} pictures of {count} tokens each are given, and {total} image tokens")
    return [
        [
            whole_picture(
                f"image {number + 1}",
                prompt.places[number * count : (number + 1) * count],
                height,
                width,
                count - height * width,
            )
            for number in range(-(-len(prompt.places) // count))
        ]
        for prompt in prompts
    ]


def _llava(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """LLaVA: one token per patch, after a class token if the model keeps it."""
    pictures, _, height, width = _pixels(inputs, 4)
    patch = setting(processor, "patch_size")
    rows, columns = height // patch, width // patch
    return _equal(prompts, rows * columns + anyres.class_tokens(processor), rows, columns, pictures)


def _square(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """PaliGemma, Gemma 3: a square picture, and as many rows of tokens as columns (all patches, or means of them)."""
    pictures, _, height, width = _pixels(inputs, 4)
    count = setting(processor, "image_seq_length")
    side = math.isqrt(count)
    if height != width or side * side != count:
        raise _does_not_fit(f"a picture of {height} x {width} pixels has {count} tokens, which is no square")
    return _equal(prompts, count, side, side, pictures)


def _internvl(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """InternVL: a picture that is not cut is one square. How it was cut is not in the processor's output."""
    count = setting(processor, "image_seq_length")
    if any(len(run) != count for prompt in prompts for run in prompt.runs()):
        raise BlockError(
            "InternVLProcessor: a picture was cut into several, and its output does not have the numbers of rows and columns; "
            "call it with crop_to_patches=False."
        )
    return _square(processor, inputs, prompts)


def _pieces(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Idefics 3, SmolVLM: pieces of a picture with a token ``<row_1_col_2>`` before each, and then the picture whole."""
    count = setting(processor, "image_seq_len")
    side = math.isqrt(count)
    _, _, _, height, width = _pixels(inputs, 5)
    if side * side != count or height != width:
        raise _does_not_fit(f"a piece of {height} x {width} pixels has {count} tokens, which is no square")
    ids = _piece_tokens(processor)
    return [list(_pictures_of_pieces(prompt, side, ids)) for prompt in prompts]


def _piece_tokens(processor: Any) -> dict[int, tuple[int, int] | None]:
    """Row and column that a token before a piece names; ``None`` for the token before the whole picture."""
    tokenizer = processor.tokenizer
    names: dict[str, tuple[int, int] | None] = {
        f"<row_{row + 1}_col_{column + 1}>": (row, column) for row in range(16) for column in range(16)
    }
    names["<global-img>"] = None
    known = tokenizer.get_vocab()
    return {known[name]: place for name, place in names.items() if name in known}


def _pictures_of_pieces(
    prompt: Prompt, side: int, ids: dict[int, tuple[int, int] | None]
) -> Iterator[Picture]:
    pieces: dict[tuple[int, int], list[int]] = {}
    number = 0
    for run in prompt.runs():
        mark = prompt.ids[run[0] - 1] if run[0] else None
        if len(run) != side * side or mark not in ids:
            raise _does_not_fit(f"{len(run)} image tokens follow token {mark}, which names no row and column")
        place = ids[mark]
        if place is not None:
            pieces[place] = run
            continue
        number += 1
        label = f"image {number}"
        # The token that names the piece is a part of the picture.
        first = min([run, *pieces.values()], key=lambda one: one[0])[0] - 1
        grids = _joined(label, pieces, side)
        name = f"{label} whole" if grids else label
        whole = PictureGrid(name, side, side, tuple(run))
        yield Picture(label, first, run[-1] + 1, (*grids, whole))
        pieces = {}
    if pieces:
        raise _does_not_fit("pieces of a picture are not followed by the picture whole")


def _joined(label: str, pieces: dict[tuple[int, int], list[int]], side: int) -> tuple[PictureGrid, ...]:
    """One grid of all pieces of a picture; none if it was not cut."""
    if not pieces:
        return ()
    rows, columns = (1 + max(place[axis] for place in pieces) for axis in (0, 1))
    if len(pieces) != rows * columns:
        raise _does_not_fit(f"{label} has {len(pieces)} of {rows} x {columns} pieces")
    tokens = [
        pieces[row // side, column // side][row % side * side + column % side]
        for row in range(rows * side)
        for column in range(columns * side)
    ]
    return (PictureGrid(label, rows * side, columns * side, tuple(tokens)),)


def _llava_next(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """LLaVA-NeXT: the picture whole, then its pieces as one grid without the padding, each row with an end."""
    pixels = _pixels(inputs, 5)
    sizes: Sequence[Any] = torch.as_tensor(fact(inputs, "image_sizes")).reshape(-1, 2).tolist()
    return anyres.pictures(processor, pixels, sizes, [prompt.places for prompt in prompts])


LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), _by_grid),
    "LlavaProcessor": _llava,
    "LlavaNextProcessor": _llava_next,
    "InternVLProcessor": _internvl,
    "PaliGemmaProcessor": _square,
    "Gemma3Processor": _square,
    "Idefics3Processor": _pieces,
    "SmolVLMProcessor": _pieces,
}
REFUSED = {
    "Idefics2Processor": "its image tokens are outputs of a resampler, which have no place in the picture",
}
