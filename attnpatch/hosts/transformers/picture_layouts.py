"""Which tokens of a prompt show which part of a picture, for the processors of transformers whose layout is known.

Everything is read from facts: the processor's image token, its patch and merge sizes, and the processor's output
(``image_grid_thw``, ``image_sizes``, the shape of ``pixel_values``). Each grid must fit the tokens exactly. A processor
that is not in the table is refused, because a number of tokens alone does not tell rows and columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from attnpatch.blocks.pictures import Picture, PictureGrid, PromptWithPictures
from attnpatch.errors import BlockError, CaptureError
from attnpatch.hosts.transformers import anyres
from attnpatch.hosts.transformers.picture_facts import (
    Prompt,
    does_not_fit,
    fact,
    sequences,
    setting,
    shape_of_pixels,
    special_token,
    whole_picture,
)
from attnpatch.hosts.transformers.picture_pieces import (
    cut_pictures,
    joined,
    parts_of_kimi,
    places_of_videos,
    resampled,
)
from attnpatch.plotting.images import as_image

Layout = Callable[[Any, Mapping[str, Any], list[Prompt]], list[list[Picture]]]


# Where layouts find the sizes of the pictures: height and width of each, in pixels.
SIZES = "sizes of the pictures"


def prompts_with_pictures(
    processor: Any, inputs: Mapping[str, Any], images: Any = None
) -> list[PromptWithPictures]:
    """The sequences of a processor's output, with the pictures in them.

    Args:
        processor: A processor of transformers.
        inputs: What it returned.
        images: The pictures, in the order of the prompts; only InternVL needs them.

    Raises:
        BlockError: The layout is not known, a fact is missing, or the facts contradict each other.
    """
    name = type(processor).__name__
    if name not in LAYOUTS:
        raise BlockError(
            f"{name}: it is not known how its image tokens are arranged in rows and columns; known are "
            f"{', '.join(LAYOUTS)}. Use Blocks.tiles(height, width, tile, start=...)."
        )
    tokens = sequences(inputs)
    mark = special_token(processor, "image")
    if mark is None:
        raise BlockError(f"{name}: image_token_id is missing, so image tokens cannot be told from text.")
    prompts = [Prompt(ids, [place for place, one in enumerate(ids) if one == mark]) for ids in tokens]
    if images is not None:
        inputs = {**inputs, SIZES: _sizes(images)}
    found = LAYOUTS[name](processor, inputs, prompts)
    if not any(found):
        raise BlockError(f"there are no image tokens (id {mark}) in input_ids; give inputs with a picture.")
    decode = functools.partial(_decoded, processor.tokenizer)
    return [
        PromptWithPictures(len(ids), tuple(pictures), functools.partial(decode, ids))
        for ids, pictures in zip(tokens, found, strict=True)
    ]


def _sizes(images: Any) -> list[tuple[int, int]]:
    """Height and width of each picture."""
    try:
        return [as_image(image).shape[:2] for image in images]
    except (TypeError, CaptureError) as error:
        raise BlockError(
            f"images={images!r:.60} is not accepted ({error}); give a list of pictures."
        ) from error


def _decoded(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    return tokenizer.decode(ids[start:stop])


# What a prompt may show, and the part of the processor that has its settings.
_KINDS = (("image", "image_processor"), ("video", "video_processor"))


def _by_grid(
    processor: Any,
    inputs: Mapping[str, Any],
    prompts: list[Prompt],
    kinds: Sequence[tuple[str, str]] = _KINDS,
) -> list[list[Picture]]:
    """Qwen2-VL and its successors: ``image_grid_thw`` and ``video_grid_thw`` have each picture's size in patches."""
    found: list[list[Picture]] = [[] for _ in prompts]
    for kind, part in kinds:
        mark = special_token(processor, kind)
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
                    raise does_not_fit(f"{kind}_grid_thw has fewer pictures than the tokens, or smaller ones")
                number += 1
                count = frames * height * width
                mine, own = own[:count], own[count:]
                pictures += _frames(f"{kind} {number}", mine, (frames, height, width), kind == "video")
        if next(sizes, None) is not None:
            raise does_not_fit(f"{kind}_grid_thw has more pictures than the tokens")
    return [sorted(pictures, key=lambda picture: picture.start) for pictures in found]


def _frames(label: str, places: list[int], size: tuple[int, int, int], is_video: bool) -> Iterator[Picture]:
    frames, height, width = size
    area = height * width
    for frame in range(max(frames, 1)):
        name = f"{label} f{frame}" if is_video or frames > 1 else label
        yield whole_picture(name, places[frame * area : (frame + 1) * area], height, width)


def _equal(prompts: list[Prompt], count: int, height: int, width: int, pictures: int) -> list[list[Picture]]:
    """Pictures of one size: ``count`` tokens each, of which the last ``height * width`` are the grid."""
    total = sum(len(prompt.places) for prompt in prompts)
    if total != count * pictures:
        raise does_not_fit(f"{pictures} pictures of {count} tokens each are given, and {total} image tokens")
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
    pictures, _, height, width = shape_of_pixels(inputs, 4)
    patch = setting(processor, "patch_size")
    rows, columns = height // patch, width // patch
    return _equal(prompts, rows * columns + anyres.class_tokens(processor), rows, columns, pictures)


def _square(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """PaliGemma, Gemma 3: a square picture, and as many rows of tokens as columns (all patches, or means of them)."""
    pictures, _, height, width = shape_of_pixels(inputs, 4)
    count = setting(processor, "image_seq_length")
    side = math.isqrt(count)
    if height != width or side * side != count:
        raise does_not_fit(f"a picture of {height} x {width} pixels has {count} tokens, which is no square")
    return _equal(prompts, count, side, side, pictures)


def _internvl(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """InternVL: a picture that is not cut is one square. How it was cut follows from its size, which is not in the
    processor's output.
    """
    count = setting(processor, "image_seq_length")
    if all(len(run) == count for prompt in prompts for run in prompt.runs()):
        return _square(processor, inputs, prompts)
    sizes = inputs.get(SIZES)
    if sizes is None:
        raise BlockError(
            "InternVLProcessor: a picture was cut into several, and its output does not have the numbers of rows and columns; "
            "give the pictures too: Blocks.images(processor, inputs, images=[...])."
        )
    _, _, height, width = shape_of_pixels(inputs, 4)
    side, left = math.isqrt(count), iter(sizes)
    return [list(cut_pictures(processor, prompt, side, (height, width), left)) for prompt in prompts]


def _pieces(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Idefics 3, SmolVLM: pieces of a picture with a token ``<row_1_col_2>`` before each, and then the picture whole."""
    count = setting(processor, "image_seq_len")
    side = math.isqrt(count)
    _, _, _, height, width = shape_of_pixels(inputs, 5)
    if side * side != count or height != width:
        raise does_not_fit(f"a piece of {height} x {width} pixels has {count} tokens, which is no square")
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
            raise does_not_fit(f"{len(run)} image tokens follow token {mark}, which names no row and column")
        place = ids[mark]
        if place is not None:
            pieces[place] = run
            continue
        number += 1
        label = f"image {number}"
        # The token that names the piece is a part of the picture.
        first = min([run, *pieces.values()], key=lambda one: one[0])[0] - 1
        grids = joined(label, pieces, side)
        name = f"{label} whole" if grids else label
        whole = PictureGrid(name, side, side, tuple(run))
        yield Picture(label, first, run[-1] + 1, (*grids, whole))
        pieces = {}
    if pieces:
        raise does_not_fit("pieces of a picture are not followed by the picture whole")


def _llava_next(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """LLaVA-NeXT: the picture whole, then its pieces as one grid without the padding, each row with an end."""
    pixels = shape_of_pixels(inputs, 5)
    sizes: Sequence[Any] = torch.as_tensor(fact(inputs, "image_sizes")).reshape(-1, 2).tolist()
    return anyres.pictures(processor, pixels, sizes, [prompt.places for prompt in prompts])


def _llava_onevision(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """LLaVA-OneVision: as LLaVA-NeXT, with a limit on the pieces' tokens. Of several pictures in one prompt, each whole."""
    found: list[list[Picture]] = [[] for _ in prompts]
    if any(prompt.places for prompt in prompts):
        pixels = shape_of_pixels(inputs, 5)
        sizes: Sequence[Any] = torch.as_tensor(fact(inputs, "image_sizes")).reshape(-1, 2).tolist()
        counts = torch.as_tensor(fact(inputs, "batch_num_images")).flatten().tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
        places = [prompt.places for prompt in prompts]
        found = anyres.pictures_of_onevision(processor, pixels, sizes, alone, places)
    return _with_videos(processor, inputs, prompts, found, anyres.frames_of_onevision)


def _with_videos(
    processor: Any,
    inputs: Mapping[str, Any],
    prompts: list[Prompt],
    pictures: list[list[Picture]],
    of_videos: Callable[[Any, Mapping[str, Any], list[list[int]]], list[list[Picture]]],
) -> list[list[Picture]]:
    """The pictures of each sequence and its videos, in order."""
    places = places_of_videos(processor, prompts)
    if not any(places):
        return pictures
    videos = of_videos(processor, inputs, places)
    both = (one + other for one, other in zip(pictures, videos, strict=True))
    return [sorted(own, key=lambda picture: picture.start) for own in both]


def _kimi(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Kimi K2.5: ``image_grid_thw``, as Qwen2-VL."""
    pictures = _by_grid(processor, inputs, prompts, kinds=_KINDS[:1])
    return _with_videos(processor, inputs, prompts, pictures, parts_of_kimi)


def _pixtral(processor: Any, inputs: Mapping[str, Any], prompts: list[Prompt]) -> list[list[Picture]]:
    """Pixtral, Mistral 3: a token after each row of the picture, which is another one after the last row."""
    step = setting(processor, "patch_size") * setting(processor, "spatial_merge_size")
    sizes = iter(torch.as_tensor(fact(inputs, "image_sizes")).reshape(-1, 2).tolist())
    ends = [
        processor.tokenizer.convert_tokens_to_ids(getattr(processor, name))
        for name in ("image_break_token", "image_end_token")
    ]
    found = []
    for prompt in prompts:
        runs, own = prompt.runs(), []
        while runs:
            height, width = (side // step for side in next(sizes, (0, 0)))
            mine, runs = runs[:height], runs[height:]
            after = [prompt.ids[run[-1] + 1] if run[-1] + 1 < len(prompt.ids) else None for run in mine]
            label = f"image {len(own) + 1}"
            follows = all(one[-1] + 2 == other[0] for one, other in itertools.pairwise(mine))
            if (
                {len(run) for run in mine} != {width}
                or after != [ends[0]] * (height - 1) + ends[1:]
                or not follows
            ):
                raise does_not_fit(f"{label} has no {height} rows of {width} tokens, each with an end")
            tokens = tuple(place for run in mine for place in run)
            own.append(
                Picture(label, tokens[0], tokens[-1] + 2, (PictureGrid(label, height, width, tokens),))
            )
        found.append(own)
    if next(sizes, None) is not None:
        raise does_not_fit("image_sizes has more pictures than the tokens")
    return found


LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), _by_grid),
    "LlavaProcessor": _llava,
    "LlavaNextProcessor": _llava_next,
    "LlavaOnevisionProcessor": _llava_onevision,
    "PixtralProcessor": _pixtral,
    "Kimi_K25Processor": _kimi,
    "InternVLProcessor": _internvl,
    "PaliGemmaProcessor": _square,
    "Gemma3Processor": _square,
    "Idefics2Processor": resampled,
    "Idefics3Processor": _pieces,
    "SmolVLMProcessor": _pieces,
}
