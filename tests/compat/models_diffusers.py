"""A small one of every model class that diffusers exports: constructor arguments and inputs, derived from signatures.

Most classes need no line here: sizes are shrunk by the names of parameters, inputs are made by the names of
arguments, and the layout of the first input is found by trying. ``SPECIAL`` holds what cannot be guessed.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

HEADS, HEAD_DIM, WIDTH, TEXT_WIDTH, TEXT_LEN = 4, 16, 64, 32, 19
FRAMES, HEIGHT, WIDTH_PX = 2, 8, 12
TOKENS = FRAMES * HEIGHT * WIDTH_PX // 2

_LAYERS = """num_layers depth num_hidden_layers num_single_layers num_mmdit_layers num_single_dit_layers n_layers
nlayers num_refiner_layers n_refiner_layers mmdit_layers transformer_num_layers num_text_blocks num_visual_blocks
dit_depth perceiver_num_layers num_layerwise_text_blocks num_refiner_text_blocks decoder_num_layers
encoder_num_hidden_layers decoder_num_hidden_layers LFE_depth approximator_layers""".split()
_HEADS = """num_attention_heads n_heads num_heads nheads dit_heads num_cross_attention_heads block_num_heads
text_num_attention_heads decoder_num_attention_heads audio_num_attention_heads face_encoder_num_heads
attn_num_heads motion_num_attention_heads cross_attn_num_heads LFE_num_heads""".split()
_KEY_HEADS = "num_key_value_heads num_kv_heads n_kv_heads num_key_value_attention_heads text_num_key_value_heads".split()
_HEAD_DIMS = """attention_head_dim head_dim cross_attention_head_dim linear_head_dim decoder_attention_head_dim d_kv
audio_attention_head_dim dim_heads decoder_head_dim cross_attn_dim_head LFE_dim_head""".split()
_WIDTHS = """hidden_size model_dim dim cross_attention_dim caption_projection_dim token_dim dit_dim embed_dim d_model
audio_cross_attention_dim encoder_hidden_size decoder_hidden_size model_channels""".split()
_INNER = """intermediate_size ffn_dim ff_dim ffn_hidden_size ff_inner_dim d_ff text_intermediate_size
decoder_intermediate_size moe_intermediate_dim approximator_hidden_dim""".split()
_TEXT = """text_embed_dim joint_attention_dim text_dim caption_channels cap_feat_dim cross_attention_input_dim
encoder_hid_dim context_in_dim in_text_dim dit_text_dim text_in_dim cond_token_dim text_hidden_dim source_dim
llm_features_dim condition_dim text_encoder_dim""".split()
_OTHER_WIDTHS = """pooled_projection_dim in_text_dim2 cross_attention_dim_t5 text_embed_dim_t5 text_embed_2_dim
time_embed_dim time_dim freq_dim image_embed_dim global_cond_dim global_states_input_dim text_emb_dim adaln_dim
adaln_lora_dim time_embedding_dim timestep_channels time_step_dim pair_repr_dim dim_cond
time_embed_hidden_dim""".split()

# How a value of the signature is made small; ``None`` in the signature means "not used" and is left alone.
SMALL: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, 1),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_KEY_HEADS, HEADS // 2),
    **dict.fromkeys(_HEAD_DIMS, HEAD_DIM),
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, 2 * WIDTH),
    **dict.fromkeys(_TEXT, TEXT_WIDTH),
    **dict.fromkeys(_OTHER_WIDTHS, TEXT_WIDTH),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "num_res_blocks": 1,
    "base_dim": 16,
    "vocab_size": 97,
    "ch": 32,
    "channels": 32,
    "groups": 8,
}
_AXES = ("axes_dims_rope", "axes_dims", "rope_axes_dim", "axes_dim_rope", "rope_dim_list", "rope_dim")
_AXES_BY_COUNT = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}


@dataclasses.dataclass(frozen=True)
class Special:
    """What cannot be derived for one class.

    Attributes:
        config: Constructor arguments that replace or add to the shrunk ones.
        inputs: Arguments of the call that replace or add to the derived ones; callables are given the model.
        build: Makes the model in the place of the constructor.
        first: The only shape of the first input to try.
        without: Arguments of the call that are not to be given.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None
    first: tuple[int, ...] | None = None
    without: tuple[str, ...] = ()


def floats(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module) -> nn.Module:
    """Draws every parameter anew, so that no gate stays at zero and attention has a share in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise.to(parameter.dtype), alpha=0.2)
            else:
                parameter.copy_(noise * (1.2 / math.sqrt(math.prod(parameter.shape[1:]))))
    return model


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
    if name in _AXES and isinstance(value, (tuple, list)) and len(value) in _AXES_BY_COUNT:
        return type(value)(_AXES_BY_COUNT[len(value)])
    if name.endswith("block_out_channels") and isinstance(value, (tuple, list)):
        return type(value)([32] * len(value))
    if name in SMALL and isinstance(value, (tuple, list)):
        return type(value)([SMALL[name]] * len(value))
    if name == "dim_mult":
        return type(value)([1] * len(value))
    if name in SMALL and isinstance(value, int) and not isinstance(value, bool):
        return min(SMALL[name], value) if value else value
    return value


def config_of(kind: type[nn.Module], special: Special) -> dict[str, Any]:
    """Constructor arguments: those of the signature, shrunk, and what is special."""
    config = {}
    for name, parameter in _parameters(kind.__init__).items():
        if parameter.default is inspect.Parameter.empty:
            if name in SMALL:
                config[name] = SMALL[name]
        elif (small := _shrunk(name, parameter.default)) != parameter.default:
            config[name] = small
    return {**config, **special.config}


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
    for name in (*_TEXT, "cross_attention_dim", "encoder_hidden_size", "embedding_dim"):
        if isinstance(config.get(name), int):
            return config[name]
    return TEXT_WIDTH


def _ids(length: int, config: Any) -> torch.Tensor:
    axes = next((len(config[name]) for name in _AXES if config.get(name) is not None), 3)
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


def inputs_of(model: nn.Module, special: Special) -> Iterator[dict[str, Any]]:
    """Inputs to try, most likely first."""
    parameters = _parameters(model.forward)
    config = dict(getattr(model, "config", {}))
    given = {k: (v(model) if callable(v) else v) for k, v in special.inputs.items()}
    name = next(iter(parameters))
    shapes = [special.first] if special.first else list(_first_shapes(_channels(config)))
    firsts = [given[name]] if name in given else [floats(*shape) for shape in shapes]
    for first in firsts:
        for mask_dtype in (torch.bool, torch.long):
            made = {name: first}
            for other, parameter in list(parameters.items())[1:]:
                if other in given or other in special.without:
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


def special_of(name: str) -> Special:
    """What cannot be derived for a class; nothing for most."""
    from .recipes_diffusers import SPECIAL

    return SPECIAL.get(name, Special())


def build(name: str) -> nn.Module:
    """A small model of an exported class with random weights."""
    kind, special = _exports()[name], special_of(name)
    torch.manual_seed(0)
    model = special.build() if special.build is not None else kind(**config_of(kind, special))
    return randomise(model).float().eval()
