"""Reads padding, caches and cross-attention from the arguments of a transformers model's call.

Nothing is imported for it: it uses argument names that the models have had for years. (A cache's name has changed;
``caches.py`` recognises caches by their methods.)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnpatch.hosts.transformers import caches


@dataclasses.dataclass
class ModelCall:
    """One call of a model.

    Attributes:
        mask: Bool ``[batch, tokens]``: True for real tokens of the (encoder's) input, cached ones included; or
            ``None``.
        decoder_mask: The same for the decoder of an encoder-decoder model.
        past: Tokens in the cache when the call began.
        cache: The cache that was passed, or ``None``.
        batches: Batch sizes that may occur in it (sequences, pictures, sounds); ``None``: not known.
        lengths: Numbers of tokens of its sequences; ``None``: there may be others (pictures, sound).
        pasts: For every cache that was passed, by its id: the tokens in it when the call began. Ids are valid during
            the call.
        problem: Why the blocks of the capture do not fit this call, or ``None``.
        is_single: True if the call has one token of one sequence, and no other input whose order matters.
    """

    mask: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    past: int = 0
    cache: Any = None
    batches: frozenset[int] | None = None
    lengths: frozenset[int] | None = None
    pasts: dict[int, int] = dataclasses.field(default_factory=dict)
    problem: str | None = None
    is_single: bool = False

    def past_of(self, handed: list[Any]) -> int | None:
        """The tokens in the first known cache of ``handed`` when the model was called; ``None`` if no cache is known."""
        return next((self.pasts[id(cache)] for cache in handed if id(cache) in self.pasts), None)


@functools.lru_cache(maxsize=64)
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def read_call(kind: type[nn.Module] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    """The facts that the arguments of a model's call tell.

    Args:
        kind: The model's class; ``None`` if it is not known.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    names = parameter_names(kind) if kind is not None else ()
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # A batch is often handed over as one dict.
    for value in (*args, *kwargs.values()):
        if isinstance(value, Mapping):
            given = {**{key: item for key, item in value.items() if isinstance(key, str)}, **given}
    pasts = [(cache, caches.tokens_in(cache)) for cache in caches.among(names, args, kwargs)]
    past = pasts[0][1] if pasts else 0
    return ModelCall(
        mask=_as_mask(given.get("attention_mask"), past),
        decoder_mask=_as_mask(given.get("decoder_attention_mask"), past),
        past=past,
        cache=pasts[0][0] if pasts else None,
        batches=_batches((args, kwargs)),
        lengths=_lengths(given, args),
        pasts={id(part): count for cache, count in pasts for part in caches.parts_of(cache)},
        problem=caches.why_pages(args, kwargs),
        is_single=_is_single(given, args),
    )


def _batches(value: Any) -> frozenset[int] | None:
    found: set[int] = set()

    def look(item: Any, depth: int) -> None:
        if isinstance(item, torch.Tensor) and item.dim():
            # A sequence may have several pictures: ``[batch, pictures, ...]``. The token dimension may come first.
            found.update(itertools.accumulate(item.shape[: max(1, item.dim() - 2)], operator.mul))
            is_first = item.dim() == 3 and item.is_floating_point() and item.shape[0] > 1
            found.update(item.shape[1:2] if is_first else ())
        elif isinstance(item, (Mapping, tuple, list)) and depth < 4:
            for one in item.values() if isinstance(item, Mapping) else item:
                look(one, depth + 1)

    look(value, 0)
    return frozenset({1, *found}) if found else None


def _lengths(given: dict[str, Any], args: tuple[Any, ...]) -> frozenset[int] | None:
    """Numbers of tokens of a call's sequences; ``None`` if an input is not made of tokens."""
    found: set[int] = set()
    named = {id(value) for value in given.values()}
    for name, value in [*given.items(), *(("", value) for value in args if id(value) not in named)]:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        is_mask = name.endswith("mask")
        if (value.dim() == 2 and (is_mask or not value.is_floating_point())) or name.endswith(
            "inputs_embeds"
        ):
            found.add(value.shape[1])
        elif value.is_floating_point() and not is_mask:
            return None  # pictures, or sound
    return frozenset(found) or None


def _is_single(given: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """True if a call is one step of a generation: one token of one sequence (masks and caches may be longer)."""

    def is_one(name: str, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return not isinstance(value, (Mapping, tuple, list))
        # A floating-point input that is not embeddings may be a picture or a sound.
        is_embedded = name.endswith("inputs_embeds") and value.dim() == 3
        return (
            value.shape[:2] == (1, 1) if is_embedded else not value.is_floating_point() and value.numel() == 1
        )

    named = {id(value) for value in given.values()}
    values = [(name, value) for name, value in given.items() if not name.endswith("mask")]
    values += [("", value) for value in args if id(value) not in named]
    return any(isinstance(value, torch.Tensor) for _, value in values) and all(
        is_one(*each) for each in values
    )


def _as_mask(value: Any, past: int) -> torch.Tensor | None:
    """Real tokens as bool ``[batch, tokens]``, from a padding mask or from a prepared mask over queries and keys.

    Args:
        value: The padding mask; or, as ``generate`` prepares it for some caches, ``[batch, 1, q_len, kv_len]``, boolean
            or additive, alone or in a dict by kind of layer. In such a mask a token counts as real if it sees itself.
        past: Tokens before the first query. A prepared mask does not tell which of them are real; all count as real.
    """
    if isinstance(value, dict) and value:
        value = value.get("full_attention", next(iter(value.values())))
    if not isinstance(value, torch.Tensor):
        return None
    if value.dim() == 2:
        return (value != 0).cpu()
    if value.dim() != 4:
        return None
    q_len = value.shape[2]
    seen = value[:, 0, :, past : past + q_len].diagonal(dim1=-2, dim2=-1)
    seen = seen if seen.dtype == torch.bool else seen > -1.0
    return torch.cat([torch.ones(len(seen), past, dtype=torch.bool), seen.cpu()], 1)


def why_other_tokens(model: nn.Module) -> str | None:
    """Why a model's sequence is not that of its text (PEFT's soft prompts prepend virtual tokens), or ``None``."""
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return None
    forward = vars(model).get("forward")
    if getattr(forward, "__self__", None) is getattr(model, "base_model", model):
        return None  # inside ``disable_adapter()``
    return (
        f"{config.num_virtual_tokens} virtual tokens of its {type(config).__name__} come before the text, which blocks do not "
        "count; capture model.get_base_model(), whose sequence begins with them"
    )


def called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Batch size and tokens per sequence of an attention module's call; ``None`` if they cannot be determined."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() in (3, 4):
            # Four dimensions: an image with channels last.
            return value.shape[0], math.prod(value.shape[1:-1])
    return None, None


def is_part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if an attention module is called with some tokens of a longer tensor ``[batch, tokens, channels]``."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() == 3:
            batch, tokens, channels = value.stride()
            return channels == 1 and batch > value.shape[1] * tokens
    return False


def is_cross(kwargs: dict[str, Any]) -> bool:
    """True if an attention module was given another sequence to attend to (cross-attention)."""
    return any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))


def masks_of(call: ModelCall, site_name: str, cross: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The padding masks of a site's queries and of its keys."""
    if cross:
        return call.decoder_mask, call.mask
    if "decoder" in site_name and (call.decoder_mask is not None or call.mask is None):
        return call.decoder_mask, call.decoder_mask
    return call.mask, call.mask


def made_up_inputs(model: nn.Module, seq_len: int, batch: int) -> dict[str, torch.Tensor] | None:
    """Inputs of token ids on device meta for a transformers model; ``None`` if the model needs other inputs.

    An encoder-decoder model gets ``seq_len`` tokens on both sides.
    """
    names = parameter_names(type(model))
    if getattr(model, "main_input_name", None) != "input_ids" or "input_ids" not in names:
        return None
    ids = torch.empty(batch, seq_len, dtype=torch.long, device="meta")
    config = getattr(model, "config", None)
    two_sided = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names
    return {"input_ids": ids, **({"decoder_input_ids": ids} if two_sided else {})}
