"""What transformers models say, in the arguments of a call, about padding, caches and cross-attention.

Nothing here imports transformers: these are the names its models have used for years, read from the call itself.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass
class ModelCall:
    """One call of a model.

    Attributes:
        batch: Sequences in it.
        mask: Bool ``[batch, tokens]``, real tokens of the (encoder's) input, the cached ones included; or ``None``.
        decoder_mask: The same for a decoder that has an encoder.
        past: Tokens in the cache when the call began.
    """

    batch: int
    mask: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    past: int = 0


@functools.lru_cache(maxsize=64)
def _parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def read_call(kind: type[nn.Module] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    """What a model is called with.

    Args:
        kind: The model's class; ``None`` if only a part of it is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    names = _parameter_names(kind) if kind is not None else ()
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = given.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    tensors = [value for value in (*args, *given.values()) if isinstance(value, torch.Tensor) and value.dim() > 1]
    return ModelCall(
        batch=tensors[0].shape[0] if tensors else 1,
        mask=_as_mask(given.get("attention_mask")),
        decoder_mask=_as_mask(given.get("decoder_attention_mask")),
        past=int(length()) if length is not None else 0,
    )


def _as_mask(value: Any) -> torch.Tensor | None:
    """A padding mask as bool; masks with more dimensions say nothing about padding alone."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return None
    return (value != 0).cpu()


def is_cross(kwargs: dict[str, Any]) -> bool:
    """Whether an attention module was handed another sequence to look at."""
    return any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))


def masks_of(call: ModelCall, site_name: str, cross: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Padding masks of the queries and of the keys of a site."""
    if cross:
        return call.decoder_mask, call.mask
    if "decoder" in site_name and (call.decoder_mask is not None or call.mask is None):
        return call.decoder_mask, call.decoder_mask
    return call.mask, call.mask
