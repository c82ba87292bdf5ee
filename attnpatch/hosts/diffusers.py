"""What a pipeline is made of: diffusers' by its components, transformers' by its model.

Told by their attributes, so that nothing is imported and pipelines of other makers do.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def parts_of(pipeline: Any) -> dict[str, nn.Module] | None:
    """The modules a pipeline runs, by name, each once; ``None`` if it is no pipeline.

    Of a compiled module the one inside: swapping is for that one.
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        if not hasattr(pipeline, "task"):
            return None
        components = {name: getattr(pipeline, name, None) for name in ("model", "assistant_model")}
    parts: dict[str, nn.Module] = {}
    for name, part in components.items():
        part = getattr(part, "_orig_mod", part)
        if isinstance(part, nn.Module) and not any(part is other for other in parts.values()):
            parts[str(name)] = part
    return parts or None
