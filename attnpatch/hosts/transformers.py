"""What transformers models say, in the arguments of a call, about padding, caches and cross-attention.

Reading a call imports nothing: these are the names its models have used for years (a cache's name was changed, so
``hosts.caches`` knows it by its type). Building a model does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import pathlib
import weakref
from typing import Any

import torch
from torch import nn

from attnpatch.errors import ExplainError, MissingExtraError
from attnpatch.hosts import caches


@dataclasses.dataclass
class ModelCall:
    """One call of a model.

    Attributes:
        batch: Sequences in it.
        mask: Bool ``[batch, tokens]``, real tokens of the (encoder's) input, the cached ones included; or ``None``.
        decoder_mask: The same for a decoder that has an encoder.
        past: Tokens in the cache when the call began.
        cache: Reference to the cache that it was handed, or ``None``.
        pasts: Tokens in that cache, and in any other that it was handed for another part of the model, by the cache's id,
            which is good for as long as the call goes on.
    """

    batch: int
    mask: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    past: int = 0
    cache: weakref.ref[Any] | None = None
    pasts: dict[int, int] = dataclasses.field(default_factory=dict)

    def continues(self, before: ModelCall) -> bool:
        """Whether it goes on with the sequence of the call before, as far as can be told.

        Not with a cache that is another than that call was handed (a prefix that was computed once and copied).
        """
        if self.past == 0:
            return False
        return self.cache is None or before.cache is None or self.cache() is before.cache()

    def go_on(self, before: ModelCall) -> None:
        """Take over what the call before knew of the padding among the tokens in the cache."""
        self.mask = _continued(self.mask, before.mask, self.past)
        self.decoder_mask = _continued(self.decoder_mask, before.decoder_mask, self.past)

    def past_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Tokens that were in the cache that one of its modules is handed; ``None``: in none that the model was handed.

        Args:
            args, kwargs: What the module is called with.
        """
        if not self.pasts:
            return None
        handed = (id(cache) for cache in caches.among((), args, kwargs))
        return next((self.pasts[key] for key in handed if key in self.pasts), None)


def _continued(mask: torch.Tensor | None, before: torch.Tensor | None, past: int) -> torch.Tensor | None:
    if mask is None or before is None or mask.shape[1] < past or before.shape[0] != mask.shape[0]:
        return mask
    known = min(past, before.shape[1])
    return torch.cat([mask[:, :known] & before[:, :known], mask[:, known:]], 1)


@functools.lru_cache(maxsize=64)
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def read_call(kind: type[nn.Module] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    """What a model is called with.

    Args:
        kind: The model's class; ``None`` if only a part of it is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    names = parameter_names(kind) if kind is not None else ()
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    pasts = [(cache, caches.tokens_in(cache)) for cache in caches.among(names, args, kwargs)]
    past = pasts[0][1] if pasts else 0
    tensors = [
        value for value in (*args, *given.values()) if isinstance(value, torch.Tensor) and value.dim() > 1
    ]
    return ModelCall(
        batch=tensors[0].shape[0] if tensors else 1,
        mask=_as_mask(given.get("attention_mask"), past),
        decoder_mask=_as_mask(given.get("decoder_attention_mask"), past),
        past=past,
        cache=caches.reference(pasts[0][0]) if pasts else None,
        pasts={id(cache): count for cache, count in pasts},
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


def called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Sequences, and tokens of each, that an attention module is called with; ``None`` if that cannot be told."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() in (3, 4):
            # Four dimensions: an image whose channels come last.
            return value.shape[0], math.prod(value.shape[1:-1])
    return None, None


def other_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """Tokens of the sequences that an attention module is called with beside its first."""
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3]
    return frozenset(value.shape[1] for value in given[1:])


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
        first = str(error).strip().partition("\n")[0]
        what = "its config cannot be read" if folder.exists() else "no such folder, and not on the hub"
        raise ExplainError(f"{name}: {what}: {first}") from error
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
        first = str(error).strip().partition("\n")[0]
        raise ExplainError(f"{name}: a model cannot be built of its config: {first}") from error
