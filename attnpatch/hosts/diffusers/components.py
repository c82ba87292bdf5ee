"""The modules of a pipeline: diffusers' components, or the model of a transformers pipeline.

Pipelines are recognised by their attributes, so nothing is imported and other libraries' pipelines work, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.transformers.calls import parameter_names
from attnpatch.rows.torch_graphs import is_compiled

# Names of a denoiser's arguments, in diffusers and in the original code of published models.
IMAGES = ("sample", "hidden_states", "x", "img")
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio")


def parts_of(pipeline: Any) -> dict[str, nn.Module] | None:
    """The modules that a pipeline runs, by name, each once; ``None`` if it is no pipeline.

    A compiled module is replaced by the module inside it, whose forwards are to be swapped.
    """
    parts: dict[str, nn.Module] = {}
    for name, part in components_of(pipeline).items():
        part = getattr(part, compat.COMPILED_MODULE, part)
        if isinstance(part, nn.Module) and not any(part is other for other in parts.values()):
            parts[str(name)] = part
    return parts or None


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """The tokenizers of a pipeline by name."""
    return {name: part for name, part in components_of(pipeline).items() if name.startswith("tokenizer")}


def compiled_in(model: Any) -> tuple[str, ...]:
    """Paths of the compiled modules in a model or a pipeline, without those that lie inside another compiled one."""
    parts = {"": model} if isinstance(model, nn.Module) else components_of(model)
    found: list[str] = []
    for name, part in parts.items():
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            forward = vars(module).get("forward")
            is_one = (
                compat.COMPILED_MODULE in module._modules
                or bool(getattr(module, compat.COMPILED_CALL, None))
                or is_compiled(forward)
                or is_compiled(getattr(forward, "__wrapped__", None))  # under ours
            )
            full = ".".join(filter(None, (name, path)))
            if is_one and not any(not outer or full.startswith(outer + ".") for outer in found):
                found.append(full)
    return tuple(found)


def components_of(pipeline: Any) -> dict[str, Any]:
    """The components of a pipeline, by name; empty if it is no pipeline."""
    components = getattr(pipeline, "components", None)
    if isinstance(components, dict):
        return components
    if not hasattr(pipeline, "task"):
        return {}
    return {name: getattr(pipeline, name, None) for name in ("model", "assistant_model")}


def is_denoiser(module: Any) -> bool:
    """True if a module takes an image and a timestep and returns an image (a ControlNet returns something else).

    ControlNet-XS's denoiser takes ``controlnet_cond``, too, but has ``apply_control``, which a ControlNet lacks.
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return False
    names = set(parameter_names(type(module)))
    is_control = "controlnet_cond" in names and "apply_control" not in names
    return bool(names.intersection(TIMESTEPS) and names.intersection(IMAGES)) and not is_control
