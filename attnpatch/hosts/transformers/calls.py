"""What transformers models say, in the arguments of a call, about padding, caches and cross-attention.

Reading a call imports nothing: these are the names its models have used for years (a cache's name was changed, so
``hosts.caches`` knows it by its type). Building a model does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnpatch.errors import ExplainError, MissingExtraError, first_line
from attnpatch.hosts.transformers import caches


@dataclasses.dataclass
class ModelCall:
    """One call of a model.

    Attributes:
        mask: Bool ``[batch, tokens]``, real tokens of the (encoder's) input, the cached ones included; or ``None``.
        decoder_mask: The same for a decoder that has an encoder.
        past: Tokens in the cache when the call began.
        cache: The cache that it was handed, or ``None``.
        batches: How many sequences, pictures or sounds it may be called with; ``None``: that is not known.
        lengths: Tokens of the sequences that it is called with; ``None``: there may be others (pictures, sound).
        pasts: Tokens in that cache, and in any other that it was handed for another part of the model, by the cache's id,
            which is good for as long as the call goes on.
        problem: Why the blocks that were asked for are none of it.
        is_single: Whether it is called with one token of one sequence, and with nothing else that has an order.
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
        """Tokens that were in the first of some caches that the model was handed; ``None``: it was handed none of them."""
        return next((self.pasts[id(cache)] for cache in handed if id(cache) in self.pasts), None)


@functools.lru_cache(maxsize=64)
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def read_call(kind: type[nn.Module] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    """What a model is called with.

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
            # Several pictures of a sequence: ``[batch, pictures, ...]``. Tokens may come first.
            found.update(itertools.accumulate(item.shape[: max(1, item.dim() - 2)], operator.mul))
            is_first = item.dim() == 3 and item.is_floating_point() and item.shape[0] > 1
            found.update(item.shape[1:2] if is_first else ())
        elif isinstance(item, (Mapping, tuple, list)) and depth < 4:
            for one in item.values() if isinstance(item, Mapping) else item:
                look(one, depth + 1)

    look(value, 0)
    return frozenset({1, *found}) if found else None


def _lengths(given: dict[str, Any], args: tuple[Any, ...]) -> frozenset[int] | None:
    """Tokens of the sequences that a model is called with, where all of its inputs are tokens."""
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
    """A step of a generation: of masks and caches alone there may be more than one token."""

    def is_one(name: str, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return not isinstance(value, (Mapping, tuple, list))
        # Numbers that are no embeddings may be a picture or a sound.
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
            or additive, alone or in a dict by kind of layer. From such a mask a token is real if it looks at itself.
        past: Tokens before the first query. A prepared mask says nothing of them; they count as real here.
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
    """Why the sequence of a model is not its text's: PEFT's soft prompts put virtual tokens before it."""
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return None
    forward = vars(model).get("forward")
    if getattr(forward, "__self__", None) is getattr(model, "base_model", model):
        return None  # inside ``disable_adapter()``
    return (
        f"{config.num_virtual_tokens} virtual tokens of its {type(config).__name__} come before the text, which blocks do not "
        "know; capture model.get_base_model(), whose sequence begins with them"
    )


def called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Sequences, and tokens of each, that an attention module is called with; ``None`` if that cannot be told."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() in (3, 4):
            # Four dimensions: an image whose channels come last.
            return value.shape[0], math.prod(value.shape[1:-1])
    return None, None


def is_part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention module is called with some tokens of a longer tensor ``[batch, tokens, channels]``."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() == 3:
            batch, tokens, channels = value.stride()
            return channels == 1 and batch > value.shape[1] * tokens
    return False


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


def made_up_inputs(model: nn.Module, seq_len: int, batch: int) -> dict[str, torch.Tensor] | None:
    """Token ids of a length, as a transformers model takes them, with shapes only; ``None`` where that is not enough.

    An encoder-decoder model gets as many tokens on either side.
    """
    names = parameter_names(type(model))
    if getattr(model, "main_input_name", None) != "input_ids" or "input_ids" not in names:
        return None
    ids = torch.empty(batch, seq_len, dtype=torch.long, device="meta")
    config = getattr(model, "config", None)
    two_sided = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names
    return {"input_ids": ids, **({"decoder_input_ids": ids} if two_sided else {})}


def built_on_meta(name: str, dtype: str | None, attention: str | None) -> nn.Module:
    """The model of a config, without weights.

    Args:
        name: A folder with a ``config.json``, or a model's name on the hub.
        dtype: Such as ``"bfloat16"``; ``None``: as the config says, else float32.
        attention: transformers' attention implementation; ``None``: its own choice.

    Raises:
        ExplainError: There is no such config, or no model can be built of it.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError('this needs transformers: pip install "attnpatch[transformers]"') from error
    folder = pathlib.Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ExplainError(f"{name}: no config.json there; give a folder with one, or a name on the hub")
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ExplainError(f"{name}: no such folder; give one with a config.json, or a name on the hub")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        what = "its config cannot be read" if folder.exists() else "no such folder, and not on the hub"
        raise ExplainError(f"{name}: {what}: {first_line(error)}") from error
    # A quantised checkpoint's config says how to load it; shapes are those of the model it was made of.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = next((getattr(transformers, each, None) for each in config.architectures or []), None)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    exact = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(exact, torch.dtype) or not exact.is_floating_point:
        raise ExplainError(f"dtype={dtype!r} is not accepted; give float32, bfloat16 or float16")
    try:
        with torch.device("meta"):
            build = kind._from_config if kind is not None else transformers.AutoModel.from_config
            return build(config, dtype=exact, **({"attn_implementation": attention} if attention else {}))
    except (ValueError, ImportError, AttributeError) as error:
        raise ExplainError(f"{name}: a model cannot be built of its config: {first_line(error)}") from error
