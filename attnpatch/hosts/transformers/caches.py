"""transformers' KV caches: which argument of a call is one, how many tokens it holds, which parameter takes one.

Models have named that argument ``past_key_values``, ``layer_past``, ``cache_params`` and ``cache``. So a cache is
recognised by its methods, and the parameter by its annotation.
"""

from __future__ import annotations

import inspect
import typing
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.releases.tested import is_at_least

# Names of a cache parameter, for models without annotations.
_NAMES = ("cache", "past_key_values")


def is_cache(value: Any) -> bool:
    """True if a value has the methods of a KV cache."""
    return _is_kind_of_cache(type(value))


def _is_kind_of_cache(kind: type) -> bool:
    return hasattr(kind, "get_seq_length") and hasattr(kind, "update")


def among(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The caches among the arguments of a call, each once, in the order of its parameters.

    Args:
        names: The names of the parameters, as far as they are known.
        args, kwargs: The arguments.
    """
    order = {name: place for place, name in enumerate(names)}
    named = sorted(kwargs, key=lambda name: order.get(name, len(order)))
    values = [*args, *(kwargs[name] for name in named)]
    # Caches that are arguments themselves come before caches in containers (a batch, a structure of inputs).
    found = [value for value in values if is_cache(value)]
    for value in values:
        if isinstance(value, (dict, list, tuple)) and not is_cache(value):
            found.extend(item for item in _items(value) if is_cache(item))
    return list({id(cache): cache for cache in found}.values())


def _items(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def why_pages(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The reason to leave a call out if its cache is paged: one row then holds tokens of several requests."""
    kinds = {type(value) for value in (*args, *kwargs.values())}
    if not any(hasattr(kind, "free_blocks") and hasattr(kind, "update") for kind in kinds):
        return None
    return (
        "its cache keeps pages of several requests, and one row of the call holds tokens of all of them (continuous "
        "batching), so it is not known whose tokens they are; capture model.generate(...) with one request"
    )


def parts_of(cache: Any) -> list[Any]:
    """A cache, and the self-attention cache inside it if it is an encoder-decoder's."""
    own = getattr(cache, "self_attention_cache", None)
    return [cache] if own is None else [cache, own]


def tokens_in(cache: Any) -> int:
    """Number of tokens that a cache has seen; those that left a sliding window are included."""
    try:
        count = cache.get_seq_length()
    except (ValueError, NotImplementedError):
        # If all layers have linear attention, the cache holds states and counts no tokens; no site has keys in it.
        return 0
    # Reformer's cache, which holds hashed buckets, returns None.
    return 0 if count is None else int(count)


def windows_of(cache: Any) -> frozenset[int]:
    """The window lengths of a cache's sliding layers, in tokens, read from the keys that they hold."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ()
    found: set[int] = set()
    for layer in layers:
        keys = getattr(layer, "keys", None)
        if getattr(layer, "is_sliding", False) and isinstance(keys, torch.Tensor) and keys.dim() == 4:
            # A cache of fixed size drops its oldest token before it takes several new ones.
            found.update((keys.shape[2], keys.shape[2] - 1))
    return frozenset(found)


# Features of a key that are kept for each token.
_NUMBERS = 16


def marks_of(cache: Any, start: int, stop: int) -> torch.Tensor | None:
    """A fingerprint of tokens ``start:stop``: a few features of their keys in the last layer, which depend on all
    earlier tokens. For a decoder, some of the encoder's first token follow, which depend on the encoder's whole text.

    Returns:
        float32 ``[batch, tokens, features]`` on the CPU, NaN for tokens that left the sliding window; ``None`` if the
        keys cannot be read.
    """
    keys, total = _keys_of(getattr(cache, "self_attention_cache", cache)), tokens_in(cache)
    if keys is None or stop > total:
        return None
    # A sliding window holds the latest tokens only; a static cache is filled from its first position on.
    first = max(0, total - keys.shape[2])
    found = keys[:, 0, max(start - first, 0) : max(stop - first, 0), :_NUMBERS].detach().float().cpu()
    found = torch.nn.functional.pad(found, (0, 0, stop - start - found.shape[1], 0), value=torch.nan)
    encoded = _keys_of(getattr(cache, "cross_attention_cache", None))
    if encoded is None or len(encoded) != len(found):
        return found
    other = encoded[:, 0, :1, :_NUMBERS].detach().float().cpu()
    return torch.cat([found, other.expand(-1, found.shape[1], -1)], 2)


def version_of(cache: Any) -> tuple[Any, int, int] | None:
    """A weak reference to the keys that ``marks_of`` reads, their number, and how often they were written to (in inference
    mode torch does not count that); ``None`` if they cannot be read.
    """
    keys = _keys_of(getattr(cache, "self_attention_cache", cache))
    if keys is None:
        return None
    return weakref.ref(keys), keys.shape[2], 0 if keys.is_inference() else keys._version


def _keys_of(cache: Any) -> torch.Tensor | None:
    """The keys ``[batch, heads, tokens, width]`` of the last layer that keeps all tokens, or else of the last layer."""
    plain = [(layer, keys) for layer, keys in _held_by(cache) if _is_readable(keys)]
    whole = [pair for pair in plain if not getattr(pair[0], "is_sliding", False)]
    return (whole or plain or [(None, None)])[-1][1]


def _held_by(cache: Any) -> list[tuple[Any, Any]]:
    """Pairs of a layer and the keys that it holds."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return [(None, keys) for keys in getattr(cache, "key_cache", ())]
    found = []
    for layer in layers:
        # Keys quantised to 8 bits with one scale never change; keys packed in groups are packed again later.
        narrow = getattr(layer, compat.QUANTIZED_KEYS, None)
        narrow = narrow[0] if isinstance(narrow, tuple) and narrow else None
        found.append((layer, narrow if _is_readable(narrow) else getattr(layer, "keys", None)))
    return found


def _is_readable(keys: Any) -> bool:
    return (
        isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.is_floating_point() and bool(keys.numel())
    )


def key_heads(module: nn.Module, cache: Any, heads: int) -> int | None:
    """Number of heads of keys of an attention module; ``None``: not known.

    Heads of queries share them in equal groups, one group after the other. transformers' modules say how many share one
    (``num_key_value_groups``). Otherwise the cache tells it if the order of groups does not matter: there are as many
    heads of keys as of queries, or one.

    Args:
        module: The attention module.
        cache: The cache that its call was given, or ``None``.
        heads: Number of heads of queries.
    """
    layers = [] if cache is None else [part for part in parts_of(cache) if hasattr(part, "get_seq_length")]
    held = {keys.shape[1] for part in layers for _, keys in _held_by(part) if _is_readable(keys)}
    shared = getattr(module, "num_key_value_groups", None)
    if isinstance(module, nn.MultiheadAttention):
        shared = 1
    if isinstance(shared, int) and shared > 0:
        number = heads // shared
        return number if number * shared == heads and (not held or number in held) else None
    (number,) = held if len(held) == 1 else (None,)
    return number if number in (heads, 1) else None


def rows_have_moved(cache: Any) -> bool | None:
    """True if beam search has reordered the batch rows of a cache whose keys cannot be read; ``None``: not known."""
    cache = getattr(cache, "self_attention_cache", cache)
    found = [getattr(layer, compat.PENDING_BEAMS, ...) for layer in getattr(cache, "layers", None) or ()]
    orders = [order for order in found if order is not ...]
    if not orders:
        return None
    # The pending order is kept beside the packed keys until they are packed again, in the next call.
    return any(order is not None and order.tolist() != list(range(len(order))) for order in orders)


def parameter_of(model: nn.Module) -> str | None:
    """The name of the parameter of a model's forward that takes a cache; ``None`` if there is none."""
    for owner in _owners(model):
        forward = inspect.unwrap(owner.forward)
        try:
            hints = typing.get_type_hints(forward)
        except Exception:
            # Annotations may be strings that cannot be evaluated, or name things that do not exist.
            hints = dict(getattr(forward, "__annotations__", {}))
        names = [name for name in inspect.signature(owner.forward).parameters if name != "self"]
        found = [name for name in names if _takes_cache(hints.get(name))]
        found += [name for name in _NAMES if name in names]
        if found:
            return found[0]
    return None


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the base model to which an adapter passes its keyword arguments."""
    yield model
    inner = getattr(model, "get_base_model", None)
    if inner is not None and any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(model.forward).parameters.values()
    ):
        yield inner()


def _takes_cache(hint: Any) -> bool:
    if isinstance(hint, str):
        return any(part.strip().rpartition(".")[2] == "Cache" for part in hint.split("|"))
    kinds = typing.get_args(hint) or (hint,)
    return any(isinstance(kind, type) and _is_kind_of_cache(kind) for kind in kinds)


def bytes_of(model: nn.Module, tokens: int) -> int | None:
    """Bytes of the keys and values of some tokens of one sequence; ``None`` if the configuration does not tell."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    # Of 4-bit weights, which are held as integers, the others tell in which dtype the model computes.
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    if not (heads and layers and hidden and dtype):
        return None
    width = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * layers * key_heads * width * tokens * dtype.itemsize


def new_cache(model: nn.Module, offloaded: bool = False) -> Any:
    """An empty KV cache for a transformers model; with ``offloaded``, layers not running wait in CPU memory."""
    import transformers

    if is_at_least("transformers", "4.56"):
        return transformers.DynamicCache(config=model.config, offloading=offloaded)
    # In older releases every layer of the cache keeps all tokens, even with a sliding window; the models' masks hide
    # the old ones.
    return transformers.OffloadedCache() if offloaded else transformers.DynamicCache()
