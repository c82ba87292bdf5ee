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
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .recipe import randomise
from .recipes_transformers import (
    COSTLY,
    HEAD_NAMES,
    ID_ENDINGS,
    IMAGE,
    KEY_HEAD_NAMES,
    LAYERS,
    POSITION_NAMES,
    POSITIONS,
    SMALL,
    SPECIAL_IDS,
    WORDS,
    recipe_of,
)

MOST_PARAMETERS = 100 * 10**6


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
    if name.endswith(ID_ENDINGS) and isinstance(value, int):
        return _special_id(name, value)
    if name in POSITION_NAMES and isinstance(value, int) and value > 0:
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
        return type(value)(small if name in HEAD_NAMES else min(small, v) for v in value)
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
        name
        for name in KEY_HEAD_NAMES
        if values.get(name) and own.get(name) == own.get("num_attention_heads")
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


def class_of(model_type: str) -> type[Any]:
    """The model class.

    Raises:
        ImportError: It asks for a package that is not here.
    """
    import transformers

    return getattr(transformers, recipe_of(model_type).kind or model_classes()[model_type])


def config_of(model_type: str, level: int) -> Any:
    from transformers import CONFIG_MAPPING

    config = small_config(CONFIG_MAPPING[model_type], level, recipe_of(model_type).config)
    if level == 0:
        _rotate(config)
    return config


def _parameters(kind: type[Any], config: Any) -> int:
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(each.numel() for each in kind(copy.deepcopy(config)).parameters())
    return 0


def build(model_type: str, level: int, implementation: str) -> nn.Module:
    """A small model with random weights."""
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
