"""Whether a model gives the same map in pieces through its cache as in a single pass: a short text decides."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.api import capture, patched
from attnpatch.blocks.spec import Blocks
from attnpatch.conversations.passes import feed, input_device, main_sites, text_config
from attnpatch.errors import in_one_line
from attnpatch.hosts.transformers import caches
from attnpatch.patching.counters import counted_apart
from attnpatch.patching.patch import patch_of

# What notes begin with of a model that is not passed piece by piece.
SINGLE_PASS = "in a single pass: "
# Tokens of the short text, and the most of a longer one that is as long as what the model counts in.
_SHORT, _LONGEST = 40, 8192
# Numbers of a config that say from how many tokens on attention, or a cache, is another one.
_COUNTED = ("window", "chunk", "topk", "top_k", "local", "compress", "block_size", "stride")
_BLOCKS = 64  # at most, of the maps that are compared
_TEXT = (
    "The key to the red house lies under a flat stone near the old well, and nobody but the gardener knows where it was "
    "put when the owners moved away to the coast last winter."
)
# Fewer different tokens than these would hide what a lost state does.
_DIFFERENT = 12
# Rows that are computed in another shape differ by rounding. How much is measured on the first piece, which has nothing
# before it; of a sample so small the largest of all may be this many times the largest seen.
_TIMES = 16
# Less than the first is rounding whatever was measured, and more than the second is none.
_BOUNDS = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-5, 1e-3), torch.float16: (1e-3, 1.6e-2)}
_WIDEST = (8e-3, 0.125)  # of bfloat16 and of quantised weights: one and sixteen of its steps below 1
# Masks leave nothing of what is ahead, in any dtype.
_AHEAD = 1e-6


def tokens_to_try(model: nn.Module, length: int) -> int:
    """How long a text shows what becomes of one of ``length`` tokens.

    What a model counts in (the width of a window, keys that an indexer picks, a chunk of states) is passed where the
    longer text passes it; 8,192 tokens are the most.
    """
    counted = [
        number
        for name, value in vars(text_config(model) or object).items()
        if any(word in name for word in _COUNTED)
        for number in (value if isinstance(value, list | tuple) else [value])
        if type(number) is int and _SHORT // 2 < number < length
    ]
    return min(_LONGEST, max(_SHORT, *(number + max(_SHORT, number // 4) for number in [0, *counted])))


def why_single_pass(
    model: nn.Module, tokenizer: Any, policy: Mapping[str, Any], tokens: int = _SHORT
) -> str | None:
    """Why pieces through the cache would give another map than a single pass; ``None`` if they would not.

    A short text is passed through the model twice, and the maps of its layers with attention are compared.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        policy: As ``attnpatch.patched`` takes it.
        tokens: Of the text.

    Returns:
        A line for people.
    """
    name = type(model).__name__
    if caches.parameter_of(model) is None:
        return f"{name} has no KV cache"
    ids = _text(model, tokenizer, tokens)
    count = ids.shape[1]
    size = -(-count // _BLOCKS)
    # Several tokens, one, and several again, as messages and answers are.
    first = 16 * size
    edges = [0, first, first + 1, count - 8 * size, count]
    if sorted({*edges}) != edges:
        return f"{name} takes texts too short to see whether its cache goes on"
    whole = _seen(model, ids, [(0, count)], size, policy)
    try:
        apart = _seen(model, ids, list(pairwise(edges)), size, policy)
    # Whatever a host raises, it does not go on.
    except Exception as error:
        return f"{name} does not go on from its cache ({type(error).__name__}: {in_one_line(error, 120)})"
    # What is no probability (a linear attention) is no matter of a cache.
    kept = (whole.amin((1, 2)) > -_AHEAD) & (whole.sum(-1).amax(1) < 1 + _WIDEST[1])
    if apart.shape == whole.shape:
        whole, apart = whole[kept], apart[kept]
    if not len(whole):
        return None
    if whole.triu(1).max() > _AHEAD:
        return f"tokens look ahead in {name}: what follows a message changes its attention"
    return _difference(name, whole, apart, first // size, _bounds(model))


def _difference(
    name: str, whole: Tensor, apart: Tensor, first: int, bounds: tuple[float, float]
) -> str | None:
    """Of maps ``[layers, blocks, blocks]``; ``first`` blocks had nothing before them."""
    least, most = bounds
    if apart.shape != whole.shape:
        return f"{name} shows other attention through its cache than in a single pass"
    off = (whole - apart).abs().amax((0, 2)).nan_to_num(nan=torch.inf)
    rounding, later = off[:first].max().item(), off[first:].max().item()
    if rounding > most:
        return f"tokens look ahead in {name}: what follows a message changes its attention by {rounding:.2g}"
    if later > max(least, min(_TIMES * rounding, most)):
        return f"through the cache of {name} a short text has another map than in a single pass (off by {later:.2g})"
    return None


def _seen(
    model: nn.Module, ids: Tensor, pieces: list[tuple[int, int]], size: int, policy: Mapping[str, Any]
) -> Tensor:
    """The map of the kind of attention that most layers have, ``[layers, blocks, blocks]``, float64."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(model, **policy))
        patch = patch_of(model)
        assert patch is not None
        stack.enter_context(counted_apart(patch.sites))
        maps = stack.enter_context(capture(model, Blocks.fixed(size)))
        feed(model, ids, iter(pieces))
        # Of pieces that were not taken for one sequence the last one alone, which is of another shape.
        return maps[main_sites(maps)].mass.double()


def _text(model: nn.Module, tokenizer: Any, count: int) -> Tensor:
    """Token ids ``[1, tokens]`` of some text, or of the vocabulary where the tokenizer knows too few of its words."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    ids = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    if len({*ids[:_SHORT]}) < _DIFFERENT:
        plain = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
        ids = plain[:: max(1, len(plain) // _SHORT)]
    # RoBERTa's positions begin at 2.
    count = min(count, limit - 2 if isinstance(limit, int) and limit > 2 else count)
    return torch.tensor([(ids * (count // len(ids) + 1))[:count]], device=input_device(model))


def _bounds(model: nn.Module) -> tuple[float, float]:
    dtype = getattr(model, "dtype", None)
    is_cast = torch.is_autocast_enabled(input_device(model).type)
    if is_cast or getattr(model, "hf_quantizer", None) is not None:
        return _WIDEST
    return _BOUNDS.get(dtype, _WIDEST) if isinstance(dtype, torch.dtype) else _WIDEST
