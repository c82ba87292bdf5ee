"""What cannot be derived for one model of a sweep, and what all of them are made with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What cannot be derived for one architecture or model class.

    Attributes:
        config: Values of the config, or arguments of the constructor, that replace or add to the shrunk ones; those of a
            sub-config as a dict.
        inputs: Arguments of the call that replace or add to the derived ones.
        without: Arguments of the call that are not to be given.
        kind: Of transformers: name of the model class, where not the one that ``AutoModel`` would take.
        first: Of diffusers: the only shape of the first input to try.
        build: Of diffusers: makes the model in the place of the constructor; it is given what builds other classes.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    kind: str = ""
    first: tuple[int, ...] | None = None
    build: Callable[[Callable[[str], nn.Module]], nn.Module] | None = None


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
