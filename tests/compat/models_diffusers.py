"""A small one of every model class that diffusers exports: constructor arguments and inputs, derived from signatures.

Most classes need no line here: sizes are shrunk by the names of parameters, inputs are made by the names of
arguments, and the layout of the first input is found by trying. ``recipes_diffusers.py`` holds what cannot be guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .recipe import Recipe, floats, randomise
from .recipes_diffusers import (
    AXES,
    AXES_BY_COUNT,
    FRAMES,
    HEIGHT,
    SMALL,
    TEXT_LEN,
    TEXT_NAMES,
    TEXT_WIDTH,
    TOKENS,
    WIDTH_PX,
    recipe_of,
)


def _exports() -> dict[str, type[nn.Module]]:
    import diffusers.models as models

    names = sorted({name for group in models._import_structure.values() for name in group})
    found = {name: getattr(models, name) for name in names}
    return {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, nn.Module)}


def has_attention(kind: type[nn.Module]) -> bool:
    """Whether a class has attention anywhere in what its own file names."""
    source = inspect.getsource(inspect.getmodule(kind))
    return any(word in source for word in ("Attention", "Attn", "attention(", "MidBlock", "get_down_block"))


def classes() -> dict[str, type[nn.Module]]:
    """Every exported model class that may have attention in it, by name."""
    return {name: kind for name, kind in _exports().items() if name != "ModelMixin" and has_attention(kind)}


# ------------------------------------------------------------------------------------------------ constructors


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(inspect.unwrap(function)).parameters)
    found.pop("self", None)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in found.items() if each.kind not in kinds}


def _shrunk(name: str, value: Any) -> Any:
    if name in AXES and isinstance(value, (tuple, list)) and len(value) in AXES_BY_COUNT:
        return type(value)(AXES_BY_COUNT[len(value)])
    if name.endswith("block_out_channels") and isinstance(value, (tuple, list)):
        return type(value)([32] * len(value))
    if name in SMALL and isinstance(value, (tuple, list)):
        return type(value)([SMALL[name]] * len(value))
    if name == "dim_mult":
        return type(value)([1] * len(value))
    if name in SMALL and isinstance(value, int) and not isinstance(value, bool):
        return min(SMALL[name], value) if value else value
    return value


def config_of(kind: type[nn.Module], recipe: Recipe) -> dict[str, Any]:
    """Constructor arguments: those of the signature, shrunk, and what is recipe."""
    config = {}
    for name, parameter in _parameters(kind.__init__).items():
        if parameter.default is inspect.Parameter.empty:
            if name in SMALL:
                config[name] = SMALL[name]
        elif (small := _shrunk(name, parameter.default)) != parameter.default:
            config[name] = small
    return {**config, **recipe.config}


# ------------------------------------------------------------------------------------------------------ inputs


def _first_shapes(channels: int) -> Iterator[tuple[int, ...]]:
    """Layouts of the input that a model denoises or encodes, in the order in which they are tried."""
    yield 1, channels, 2 * HEIGHT, 2 * WIDTH_PX
    yield 1, channels, 2 * FRAMES + 1, 2 * HEIGHT, 2 * WIDTH_PX
    yield 1, TOKENS, channels
    yield 1, 2 * FRAMES + 1, channels, 2 * HEIGHT, 2 * WIDTH_PX
    yield 1, channels, TOKENS
    yield 1, channels, 4 * FRAMES + 1, 8 * HEIGHT, 8 * WIDTH_PX
    yield 1, channels, 8 * HEIGHT, 8 * WIDTH_PX
    yield 1, channels, 1024


def _channels(config: Any) -> int:
    names = (
        "in_channels latent_channel in_visual_dim io_channels input_channels in_dim num_channels latent_dim"
    )
    for name in (*names.split(), "audio_channels", "latent_channels"):
        if isinstance(config.get(name), int):
            return config[name]
    return 3


def _text_width(config: Any) -> int:
    for name in (*TEXT_NAMES, "cross_attention_dim", "encoder_hidden_size", "embedding_dim"):
        if isinstance(config.get(name), int):
            return config[name]
    return TEXT_WIDTH


def _ids(length: int, config: Any) -> torch.Tensor:
    axes = next((len(config[name]) for name in AXES if config.get(name) is not None), 3)
    ids = torch.zeros(length, axes)
    ids[:, -1] = torch.arange(length) % WIDTH_PX
    ids[:, -2] = torch.arange(length) // WIDTH_PX
    return ids


def _value(name: str, first: torch.Tensor, config: Any, mask_dtype: torch.dtype, is_needed: bool) -> Any:
    """An argument of the call by its name; ``NotImplemented`` where none is known."""
    if name in ("timestep", "timesteps", "t"):
        return torch.tensor([500.0])
    if name in ("r_timestep", "timestep_r"):
        return torch.tensor([400.0]) if is_needed else None
    if name in ("encoder_hidden_states", "source_hidden_states"):
        return floats(1, TEXT_LEN, _text_width(config), seed=3)
    if name in ("encoder_hidden_states_2", "encoder_hidden_states_t5"):
        width = next(
            (
                config[k]
                for k in ("text_embed_2_dim", "cross_attention_dim_t5", "text_embed_dim_t5")
                if config.get(k)
            ),
            None,
        )
        return None if width is None else floats(1, TEXT_LEN, width, seed=4)
    if name in ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask", "encoder_attention_mask_2",
                "text_embedding_mask", "text_embedding_mask_t5"):  # fmt: skip
        mask = torch.ones(1, TEXT_LEN)
        mask[:, -3:] = 0
        return mask.to(mask_dtype)
    if name in ("pooled_projections", "pooled_embeds"):
        width = (
            config.get("pooled_projection_dim") or config.get("in_text_dim2") or config.get("text_emb_dim")
        )
        return None if width is None else floats(1, width, seed=5)
    if name == "img_ids":
        return _ids(first.shape[1], config)
    if name == "txt_ids":
        return _ids(TEXT_LEN, config) * 0
    if name == "guidance":
        return torch.tensor([4.0]) if config.get("guidance_embeds") else None
    if name == "img_shapes":
        return [[(1, HEIGHT, WIDTH_PX)]]
    if name in ("num_frames", "height", "width") and first.dim() == 3:
        return {"num_frames": 1, "height": HEIGHT, "width": WIDTH_PX}[name]
    if name == "class_labels" and config.get("num_embeds_ada_norm"):
        return torch.tensor([3])
    if name in ("original_size", "target_size", "crop_coords"):
        return torch.tensor([[16.0, 24.0]]) * (name != "crop_coords")
    if name == "controlnet_cond":
        if config.get("conditioning_channels") and first.dim() == 4:
            return floats(1, config["conditioning_channels"], 8 * first.shape[2], 8 * first.shape[3], seed=6)
        return floats(*first.shape, seed=6)
    if name == "fps":
        return torch.tensor([8.0])
    return NotImplemented


def inputs_of(model: nn.Module, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Inputs to try, most likely first."""
    parameters = _parameters(model.forward)
    config = dict(getattr(model, "config", {}))
    given = recipe.inputs
    name = next(iter(parameters))
    shapes = [recipe.first] if recipe.first else list(_first_shapes(_channels(config)))
    firsts = [given[name]] if name in given else [floats(*shape) for shape in shapes]
    for first in firsts:
        for mask_dtype in (torch.bool, torch.long):
            made = {name: first}
            for other, parameter in list(parameters.items())[1:]:
                if other in given or other in recipe.without:
                    continue
                value = _value(other, first, config, mask_dtype, parameter.default is inspect.Parameter.empty)
                if value is NotImplemented or (value is None and parameter.default is None):
                    continue
                made[other] = value
            yield {**made, **given}
            if not any("mask" in each for each in made):
                break
            # Some take no mask of their own making: without one.
            optional = {each for each in made if "mask" in each and parameters[each].default is None}
            if optional:
                yield {key: value for key, value in {**made, **given}.items() if key not in optional}


def build(name: str) -> nn.Module:
    """A small model of an exported class with random weights."""
    kind, recipe = _exports()[name], recipe_of(name)
    torch.manual_seed(0)
    model = recipe.build(build) if recipe.build is not None else kind(**config_of(kind, recipe))
    return randomise(model).float().eval()
