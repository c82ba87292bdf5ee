"""Small models of every architecture that transformers knows: defaults of its config, shrunk, and random weights.

Widths come from a table of names; what cannot be derived for one architecture stands in ``recipes_transformers.py``.
Where the shrunk config does not fit together, the model keeps its default widths and only loses layers, words and
experts (``level`` 1).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 512
IMAGE, PATCH, FRAMES, POSITIONS = 64, 4, 4, 1024
MOST_PARAMETERS = 100 * 10**6
# Ids of special tokens are put above all words that a text is made of.
WORDS, SPECIAL_IDS = 97, 400

_LAYERS = """num_hidden_layers num_layers n_layer n_layers layers encoder_layers decoder_layers depth num_decoder_layers
num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers conf_num_hidden_layers
speech_encoder_layers t2u_encoder_layers t2u_decoder_layers memory_attention_num_layers resampler_depth
decoder_num_layers text_encoder_num_layers query_dec_layers num_blocks num_attention_layers l_layers x_layers
r_layers num_self_attends_per_block folding_trunk_num_hidden_layers num_timestamp_prediction_layers
num_global_layers perceiver_resampler_num_layers decoder_depth postnet_layers""".split()
_VOCAB = """vocab_size text_vocab_size src_vocab_size tgt_vocab_size entity_vocab_size codebook_vocab_size
vocab_size_per_layer_input t2u_vocab_size unit_hifi_gan_vocab_size text_encoder_vocab_size audio_vocab_size
vision_vocab_size encoder_hash_byte_group_vocab num_hash_buckets mel_vocab_size shape_vocab_size
pronunciation_vocab_size""".split()
_WIDTHS = """hidden_size d_model n_embd dim emb_dim hidden_dim embed_dim projection_dim embedding_size text_hidden_size
decoder_hidden_size encoder_hidden_size encoder_hidden_dim out_hidden_size vision_hidden_size output_proj_dims
cross_hidden_size memory_attention_hidden_size memory_encoder_hidden_size fpn_hidden_size d_latents
hidden_size_global backbone_hidden_size mask_dim conv_dim fpn_feature_size mask_feature_size feature_size
adapter_out_dim reassemble_hidden_size project_dim decoder_embed_dim hidden_channels text_embed_dim word_embed_proj_dim output_dim
decoder_in_channels projector_hidden_size projection_hidden_size emb_size true_hidden_size intra_bottleneck_size
memory_encoder_output_channels_ image_text_hidden_size mask_downsampler_embed_dim memory_fuser_embed_dim
perceiver_resampler_hidden_size output_channels decoder_output_dim input_embedding_size output_embedding_size
mm_embed_dim audio_embed_dim condition_dim audio_hidden_size prompt_embed_dim vector_quantization_hidden_dimension""".split()
_INNER = """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dim_ff dff mlp_dim ffn_hidden_size d_inner
n_inner moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
decoder_intermediate_size encoder_feedforward_dim dim_feedforward encoder_dim_feedforward decoder_dim_feedforward
iou_head_hidden_dim intermediate_size_mlp moe_shared_expert_intermediate_size speech_encoder_intermediate_size
t2u_encoder_ffn_dim t2u_decoder_ffn_dim memory_fuser_intermediate_dim memory_attention_feed_forward_hidden_size
memory_attention_mlp_hidden_size perceiver_resampler_mlp_intermediate_size dense_intermediate_size
shared_experts_intermediate_size encoder_linear_units decoder_linear_units moe_hidden_size feed_forward_size
task_encoder_hidden_dim projection_intermediate_dim pair_transition_intermediate_size
centroid_intermediate_size""".split()
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
decoder_num_attention_heads encoder_num_attention_heads conf_num_attention_heads speech_encoder_attention_heads
t2u_encoder_attention_heads t2u_decoder_attention_heads cross_num_attention_heads cross_num_key_value_heads
decoder_num_heads num_encoder_attention_heads num_decoder_attention_heads resampler_n_heads resampler_heads
swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_key_heads linear_num_heads
mamba_n_heads mamba_num_heads num_self_attention_heads num_cross_attention_heads decoder_self_attention_heads
decoder_cross_attention_heads""".split()
_KEY_HEADS = "num_key_value_heads swa_num_key_value_heads num_key_value_attention_heads".split()
_HEAD_DIMS = """head_dim d_kv d_head v_head_dim qk_nope_head_dim dim_head attention_head_size cross_head_dim
global_head_dim swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels
mamba_head_dim mamba_d_head resampler_head_dim resampler_dim_head attention_head_dim""".split()
_EXPERTS = """num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts""".split()
_PICKED = "num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k".split()
_POSITIONS = """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len
decoder_max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings context_length
t2u_max_position_embeddings max_sequence_length""".split()

# What a value of a config becomes; never more than it was.
SMALL: dict[str, int] = {
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_VOCAB, VOCAB),
    **dict.fromkeys(_WIDTHS, HIDDEN),
    **dict.fromkeys(_INNER, INNER),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_KEY_HEADS, KEY_HEADS),
    **dict.fromkeys(_HEAD_DIMS, HEAD_DIM),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_PICKED, 2),
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
    "index_topk": 16,
    "rotary_dim": 8,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_queries": 20,
    "num_query_tokens": 20,
    "num_latents": 20,
    "window_size": 4,
    "num_pos_feats": HIDDEN // 2,
    "sliding_window": 32,
    "num_mel_bins": 16,
    "num_frames": FRAMES,
    "codebook_size": 64,
    "num_codebooks": 4,
    "mamba_d_state": 16,
    "num_res_blocks": 1,
    "depths": 2,
    "upsample_groups": HIDDEN,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
# What only costs time: shrunk where widths stay as they are.
COSTLY = {
    *_LAYERS,
    *_VOCAB,
    *_EXPERTS,
    *_PICKED,
    "num_kv_shared_layers",
    "n_group",
    "topk_group",
    "num_frames",
}
COSTLY |= {"first_k_dense_replace", "sliding_window", "num_mtp_layers", "num_nextn_predict_layers"}
_ID = ("_token_id", "_token_index", "_token_ids")


@dataclasses.dataclass(frozen=True)
class Special:
    """What cannot be derived for one architecture.

    Attributes:
        config: Values of the config that replace the shrunk ones; those of a sub-config as a dict.
        inputs: Arguments of the call that replace or add to the derived ones; callables are given the model.
        without: Arguments of the call that are not to be given.
        kind: Name of the model class, where not the one that ``AutoModel`` would take.
        level: The only level to try.
        build: Makes the config in the place of all this.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    kind: str = ""
    level: int | None = None
    build: Callable[[], Any] | None = None


@functools.cache
def model_classes() -> dict[str, str]:
    """The name of a class by model type: that of ``AutoModel``, or else of the first mapping that has the type."""
    from transformers.models.auto import modeling_auto

    mappings = [modeling_auto.MODEL_MAPPING_NAMES]
    mappings += [
        value
        for name, value in sorted(vars(modeling_auto).items())
        if name.startswith("MODEL_FOR_") and name.endswith("_NAMES")
    ]
    found: dict[str, str] = {}
    for mapping in mappings:
        for model_type, name in mapping.items():
            found.setdefault(model_type, name if isinstance(name, str) else name[0])
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------------------- configs


def small_config(kind: type[Any], level: int, given: dict[str, Any], default: Any = None) -> Any:
    """A config of class ``kind``: its fields shrunk, sub-configs too, and what is given.

    Args:
        kind: A config class of transformers.
        level: 0: everything is shrunk; 1: what only costs time.
        given: Values that stay as they are; for sub-configs dicts.
        default: An instance whose values count instead of the class's.
    """
    default = kind() if default is None else default
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name, value = field.name, _value(default, field)
        if getattr(value, "model_type", "") == "timm_backbone":
            values |= {name: _convolutions(), "use_timm_backbone": False}
        elif hasattr(value, "to_dict") and hasattr(type(value), "model_type"):
            values[name] = small_config(type(value), level, given.get(name) or {}, value)
        elif value is None and name not in given and (part := _optional(kind, name)) is not None:
            values[name] = small_config(part, level, {})
        elif field.default is None or not field.init:
            continue  # derived from others
        else:
            # One value for all layers may have become one for each, and "auto" a number.
            is_one = isinstance(field.default, int) and isinstance(value, (list, tuple))
            is_derived = is_one or (isinstance(field.default, str) and isinstance(value, int))
            values[name] = shrunk(name, field.default if is_derived else value, level)
    values |= _key_heads(default, values) | _layer_types(default, values) | _stages(default, values)
    own = {name: value for name, value in given.items() if not isinstance(value, dict) or name not in values}
    own |= {
        name: v
        for name, v in given.items()
        if isinstance(v, dict) and not hasattr(values.get(name), "to_dict")
    }
    values |= own
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    changed = {
        name: value for name, value in values.items() if name in own or name not in known or value is not None
    }
    return kind(**{name: value for name, value in changed.items() if name != "model_type"})


def _convolutions() -> Any:
    """A small backbone in the place of one that timm would build."""
    from transformers import ResNetConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, out_features=stages)


def _optional(kind: type[Any], name: str) -> type[Any] | None:
    """The class of a part (an encoder of images or sounds) that a config leaves out unless it is asked for."""
    part = kind.sub_configs.get(name) if getattr(kind, "sub_configs", None) else None
    return (
        part
        if part is not None and dataclasses.is_dataclass(part) and getattr(part, "model_type", "")
        else None
    )


def _value(config: Any, field: Any) -> Any:
    try:
        return getattr(config, field.name, None)
    except RuntimeError:
        return field.default  # another one in every layer


def shrunk(name: str, value: Any, level: int) -> Any:
    """A value of a config, made small."""
    if isinstance(value, bool) or value is None:
        return value
    if name.endswith(_ID) and isinstance(value, int):
        return _special_id(name, value)
    if name in _POSITIONS and isinstance(value, int) and value > 0:
        return max(value, POSITIONS) if level else POSITIONS
    if name not in SMALL or (level and name not in COSTLY):
        return value
    small = SMALL[name]
    if name == "window_size" and isinstance(value, int) and value > IMAGE:
        return IMAGE // 2  # in pixels, not in patches
    if isinstance(value, int):
        return min(small, value) if value > 0 else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        # Heads of stages that grow wider: a number that divides all widths.
        return type(value)(small if name in _HEADS else min(small, v) for v in value)
    return value


@functools.cache
def _special_id(name: str, value: int) -> int:
    if value < WORDS and not re.search("image|video|audio|vision|img|media", name):
        return value
    # The same name is the same id in every part of a config.
    return SPECIAL_IDS + sum(map(ord, name)) % 97


def _key_heads(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """As many heads of keys as of queries, where there are as many."""
    own = vars(default)
    same = [
        name for name in _KEY_HEADS if values.get(name) and own.get(name) == own.get("num_attention_heads")
    ]
    return dict.fromkeys(same, values.get("num_attention_heads"))


def _rotate(config: Any) -> None:
    """Sections of rotary positions (time, height, width) that fit the width of a small head."""
    for key in getattr(config, "sub_configs", {}):
        _rotate(getattr(config, key, None))
    rope = getattr(config, "rope_parameters", None)
    own = vars(config) if rope else {}
    if isinstance(rope, dict) and {"hidden_size", "num_attention_heads"} <= own.keys():
        width = own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
        nested = [value for value in rope.values() if isinstance(value, dict)]
        for each in nested or [rope]:
            pairs = int(width * (each.get("partial_rotary_factor") or 1.0)) // 2
            third = 3 * pairs // 8
            each["mrope_section"] = [pairs - 2 * third, third, third]


def _stages(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Of a backbone: as many layers as are asked for, and what else it was told to give out."""
    known = {field.name for field in dataclasses.fields(default)}
    found = {
        name: value for name, value in vars(default).items() if isinstance(value, bool) and name not in known
    }
    found = {name: value for name, value in found.items() if not name.startswith("_")}
    indices = getattr(default, "_out_indices", None)
    if not indices or len(getattr(default, "stage_names", ())) < 3:
        return found
    if "num_hidden_layers" in values and "depths" not in values:
        found["num_hidden_layers"] = max(len(indices), LAYERS)
        return {**found, "out_indices": list(range(1 + found["num_hidden_layers"] - len(indices),
                                                   1 + found["num_hidden_layers"]))}  # fmt: skip
    return {**found, "out_indices": list(indices)}


def _layer_types(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Every kind of layer once, where layers are of several kinds."""
    kinds = vars(default).get("layer_types")
    if not isinstance(kinds, (list, tuple)) or len(set(kinds)) < 2 or "num_hidden_layers" not in values:
        return {}
    unique = list(dict.fromkeys(kinds))
    return {"layer_types": unique, "num_hidden_layers": len(unique)}


# ------------------------------------------------------------------------------------------------------ models


def special_of(model_type: str) -> Special:
    """What cannot be derived for an architecture; nothing for most."""
    from .recipes_transformers import SPECIAL

    return SPECIAL.get(model_type, Special())


def class_of(model_type: str) -> type[Any]:
    """The model class.

    Raises:
        ImportError: It asks for a package that is not here.
    """
    import transformers

    return getattr(transformers, special_of(model_type).kind or model_classes()[model_type])


def config_of(model_type: str, level: int) -> Any:
    from transformers import CONFIG_MAPPING

    special = special_of(model_type)
    if special.build is not None:
        return special.build()
    config = small_config(CONFIG_MAPPING[model_type], level, special.config)
    if level == 0:
        _rotate(config)
    return config


def _parameters(kind: type[Any], config: Any) -> int:
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(each.numel() for each in kind(copy.deepcopy(config)).parameters())
    return 0


def build(model_type: str, level: int, implementation: str) -> nn.Module:
    """A small model with random weights."""
    from .models_diffusers import randomise

    kind, config = class_of(model_type), config_of(model_type, level)
    if level and (count := _parameters(kind, config)) > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters with its default widths")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation)
    return randomise(model).float().eval()


def built_with(
    model_type: str, level: int, implementations: Iterable[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The model with each attention implementation that it supports."""
    for implementation in implementations:
        try:
            model = build(model_type, level, implementation)
        except ValueError as error:
            if implementation != "sdpa" or "does not support" not in str(error):
                raise
            continue
        yield implementation, model
