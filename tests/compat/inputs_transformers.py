"""Inputs for any model of transformers, made from its forward's signature and its config.

Two sequences, one of them padded; two images or sounds. Where a text has places for what an image encoder makes, the
encoder is asked how many.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .recipe import Recipe, floats
from .recipes_transformers import FRAMES, IMAGE, WORDS

# Longer than 64: below, torch's fused CPU kernel cannot be cut without rounding differently.
LENGTH, TARGET_LENGTH, PADDING, BATCH = 101, 71, 14, 2
GRID = (1, 8, 12)
SOUND = 32000

_IMAGES = ("pixel_values", "image_pixel_values")
MEDIA = ("pixel_values", "image_pixel_values", "input_features", "input_values", "audio_input_features")
_FLATTENED = ("image_grid_thw", "grid_thw")


def words(*shape: int, seed: int = 1, high: int = WORDS) -> torch.Tensor:
    """Ids of words; the first few are recipe."""
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(seed))


def mask(length: int, side: str, padding: int = PADDING) -> torch.Tensor:
    """``[2, length]`` ones and zeros: the second sequence is padded on one side."""
    kept = torch.ones(BATCH, length, dtype=torch.long)
    kept[1, slice(0, padding) if side == "left" else slice(length - padding, None)] = 0
    return kept


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters
    return {name: each for name, each in found.items() if each.kind not in kinds}


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of some fields that a config or one of its parts has."""
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for name in names:
        for part in (config, *parts):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)[-2:]  # type: ignore[return-value]


def _images(config: Any, names: set[str]) -> Iterator[torch.Tensor]:
    """Layouts of images, in the order in which they are tried."""
    vision = getattr(config, "vision_config", None) or config
    channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    height, width = _pair(find(vision, "image_size", "img_size", default=IMAGE))
    backbone = getattr(config, "backbone_config", None)
    if backbone is not None and not hasattr(backbone, "patch_size"):
        # Convolutions make one token of 32 x 32 pixels.
        yield floats(BATCH, channels, 4 * IMAGE, 4 * IMAGE)
    if names & set(_FLATTENED) or "hidden_states" in names:
        patch, frames = (
            find(vision, "patch_size", default=14),
            find(vision, "temporal_patch_size", "patch_temporal", default=1),
        )
        count = BATCH * GRID[0] * GRID[1] * GRID[2]
        area = _pair(patch)[0] * _pair(patch)[1]
        yield floats(count, channels * frames * area)
        yield floats(count, channels, *_pair(patch))
        yield floats(count, channels, frames, *_pair(patch))
    frames = find(vision, "num_frames", default=FRAMES)
    frames = frames if isinstance(frames, int) else FRAMES
    flat = floats(BATCH, channels, height, width)
    video = floats(BATCH, frames, channels, height, width)
    if find(vision, "num_frames") is not None:
        yield video
    yield flat
    yield floats(BATCH, 1, channels, height, width)
    yield video
    yield floats(BATCH, channels, 2 * IMAGE, 2 * IMAGE)


def _sounds(config: Any, name: str) -> Iterator[torch.Tensor]:
    mels = find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_feat_size", "feature_projection_input_dim", "input_dim",
                "n_mels", "input_size", "hidden_size", default=80)  # fmt: skip
    positions = find(config, "max_source_positions")
    if name == "input_features":
        if positions:
            yield floats(BATCH, mels, 2 * positions)
        yield floats(BATCH, mels, 200)
        yield floats(BATCH, 200, mels)
        yield floats(BATCH, 1, 1024, mels)
        yield floats(BATCH, SOUND)
    else:
        yield floats(BATCH, SOUND)
        yield floats(BATCH, 1, SOUND)
        yield floats(BATCH, find(config, "max_length", default=200), mels)
        yield floats(BATCH, 200, mels)
        yield words(BATCH, LENGTH)


def _sizes(image: torch.Tensor) -> torch.Tensor:
    return torch.tensor([list(image.shape[-2:])] * BATCH)


def _beside(name: str, made: dict[str, Any], side: str) -> Any:
    """An argument that goes with others; ``None`` where it is not given."""
    image = next((made[key] for key in _IMAGES if key in made), None)
    sound = next((made[key] for key in ("input_features", "input_values") if key in made), None)
    if name == "attention_mask" and "input_ids" in made:
        return mask(made["input_ids"].shape[1], side)
    if name in ("attention_mask", "padding_mask", "feature_attention_mask", "input_features_mask"):
        if sound is None or sound.dim() > 3:
            return None
        length = max(sound.shape[1:])
        return mask(length, "right", length // 5)
    if name == "decoder_attention_mask" and "decoder_input_ids" in made:
        return mask(TARGET_LENGTH, side, 9)
    if name in _FLATTENED and (image is not None or "hidden_states" in made):
        return torch.tensor([GRID] * BATCH)
    if name == "bbox":
        return _boxes(BATCH, LENGTH)
    if name == "pixel_mask" and image is not None and image.dim() == 4:
        kept = torch.ones(BATCH, *image.shape[-2:], dtype=torch.long)
        kept[1, :, -image.shape[-1] // 4 :] = 0
        return kept
    if name == "pixel_attention_mask" and image is not None and image.dim() == 5:
        return torch.ones(BATCH, 1, *image.shape[-2:], dtype=torch.bool)
    if name in ("image_sizes", "target_sizes") and image is not None:
        return _sizes(image)
    return None


def _boxes(*shape: int) -> torch.Tensor:
    low = torch.randint(0, 400, (*shape, 2), generator=torch.Generator().manual_seed(5))
    size = torch.randint(1, 400, (*shape, 2), generator=torch.Generator().manual_seed(6))
    return torch.cat([low, low + size], dim=-1)


def _seeds(model: nn.Module, names: dict[str, inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """What a model reads: text with images and sounds, then less and less of it."""
    config = model.config
    high = min(WORDS, find(config, "vocab_size", default=WORDS))
    text = {"input_ids": words(BATCH, LENGTH, high=high)} if "input_ids" in names else {}
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = words(BATCH, TARGET_LENGTH, seed=3, high=high)
    image = next((name for name in _IMAGES if name in names), None)
    sound = next((name for name in ("input_features", "input_values") if name in names), None)
    images = [{image: each} for each in _images(config, set(names))] if image else []
    sounds = (
        [{sound: each} for each in _sounds(getattr(config, "audio_config", None) or config, sound)]
        if sound
        else []
    )
    videos = []
    if "pixel_values_videos" in names and not images:
        videos = [{"pixel_values_videos": floats(BATCH, FRAMES, 3, *_pair(find(config, "image_size", "crop_size",
                                                                               default=IMAGE)))}]  # fmt: skip
    if "hidden_states" in names and "grid_thw" in names:
        for each in _images(config, set(names)):
            yield {"hidden_states": each}
    media = [{**a, **b} for a in (images or videos or [{}]) for b in (sounds or [{}])]
    for each in media:
        if each or text:
            yield {**text, **each}
    if text:
        yield text
    for each in [*images, *sounds, *videos]:
        yield {**{k: v for k, v in text.items() if k == "decoder_input_ids"}, **each}
        yield each
    if "inputs_embeds" in names:
        yield {"inputs_embeds": floats(BATCH, LENGTH, find(config, "hidden_size", default=64))}


def inputs_of(model: nn.Module, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Inputs to try, most complete first."""
    names = {k: v for k, v in parameters_of(model.forward).items() if k not in recipe.without}
    given = recipe.inputs
    side = "right" if getattr(model.config, "is_encoder_decoder", False) else "left"
    tried: set[tuple[Any, ...]] = set()
    for seed in [*_seeds(model, names)] or [{}]:
        seed = {**seed, **{k: v for k, v in given.items() if k in ("input_ids", *_IMAGES)}}
        made = dict(seed)
        for name in names:
            if name not in made and (value := _beside(name, made, side)) is not None:
                made[name] = value
            elif (
                name not in made and names[name].default is inspect.Parameter.empty and name.endswith("_ids")
            ):
                made[name] = words(BATCH, 20)
        made = {**made, **given}
        made = {k: v for k, v in made.items() if v is not None}
        key = tuple((k, tuple(v.shape) if isinstance(v, torch.Tensor) else repr(v)) for k, v in made.items())
        if key in tried:
            continue
        tried.add(key)
        optional = {k for k in made if "mask" in k or k.endswith("_sizes")}
        optional = {k for k in optional if k not in given and names[k].default is None}
        optional -= {"attention_mask"} if "input_ids" in made else set()
        for without in [set(), optional] if optional else [set()]:
            fewer = {k: v for k, v in made.items() if k not in without}
            placed = _placed(model, fewer, names, side)
            if placed is not None:
                yield placed
            yield fewer


# ------------------------------------------------------------------------------------- places for images in a text


def _placed(
    model: nn.Module, made: dict[str, Any], names: dict[str, inspect.Parameter], side: str
) -> dict[str, Any] | None:
    """The same inputs with a text that has as many places as the encoders of images and sounds make vectors."""
    if "input_ids" not in made:
        return None
    config, ids = model.config, made["input_ids"]
    parts, types = [], []
    for what, kind, tokens in (
        ("get_image_features", 1, ("image_token_id", "image_token_index", "image_patch_id", "img_token_id")),
        ("get_audio_features", 3, ("audio_token_id", "audio_token_index")),
    ):
        token = find(config, *tokens)
        count = _features(model, what, made)
        if token is None or not count:
            continue
        start = (
            find(config, "vision_start_token_id", "image_start_token_id", default=token)
            if kind == 1
            else token
        )
        end = find(config, "vision_end_token_id", "image_end_token_id", default=token) if kind == 1 else token
        block = [token] * (count // BATCH)
        if start != token:
            block = [start, *block, end]
        parts += block
        types += [kind if each == token else 0 for each in block]
    if not parts:
        return None
    before = PADDING + 2
    row = torch.tensor(parts).expand(BATCH, -1)
    text = torch.cat([ids[:, :before], row, ids[:, before:]], dim=1)
    result = {**made, "input_ids": text}
    if "attention_mask" in made:
        result["attention_mask"] = mask(text.shape[1], side)
    marks = torch.zeros_like(text)
    marks[:, before : before + len(types)] = torch.tensor(types)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names and (name == "mm_token_type_ids" or "gemma" in type(model).__name__.lower()):
            result[name] = marks
    return result


def _features(model: nn.Module, what: str, made: dict[str, Any]) -> int:
    """How many vectors an encoder makes of its part of the inputs."""
    function = next((getattr(part, what) for part in model.modules() if hasattr(part, what)), None)
    if function is None:
        return 0
    own = {
        k: v
        for k, v in made.items()
        if k in parameters_of(function) and k not in ("input_ids", "attention_mask")
    }
    if not own:
        return 0
    try:
        with torch.no_grad():
            found = function(**own)
    except Exception:
        return 0
    found = getattr(found, "pooler_output", found)
    while isinstance(found, (list, tuple)) and found and isinstance(found[0], (list, tuple)):
        found = found[0]
    if isinstance(found, torch.Tensor):
        found = [found]
    if not isinstance(found, (list, tuple)) or not found or not isinstance(found[0], torch.Tensor):
        return 0
    return sum(each.numel() // each.shape[-1] for each in found)
