"""Tests with a short text whether a model gives the same map in pieces through its cache as in a single pass."""

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

# The beginning of the note that a conversation was run in a single pass, followed by the reason.
SINGLE_PASS = "in a single pass: "
# Tokens of the short text, and the limit for a longer one (see tokens_to_try).
_SHORT, _LONGEST = 40, 8192
# Words that occur in the names of config fields which hold a length, such as a window: attention or the cache may work
# differently beyond it.
_COUNTED = ("window", "chunk", "topk", "top_k", "local", "compress", "block_size", "stride")
_BLOCKS = 64  # most blocks of the compared maps
_TEXT = (
    "The key to the red house lies under a flat stone near the old well, and nobody but the gardener knows where it was "
    "put when the owners moved away to the coast last winter."
)
# With fewer different tokens than this, the loss of a state might not show.
_DIFFERENT = 12
# Rows computed in another shape differ by rounding. The size of this difference is measured on the first piece, which
# has nothing before it. The sample is small, so the true maximum may be this many times the largest difference seen.
_TIMES = 16
# A difference below the first bound is always rounding, and one above the second never is.
_BOUNDS = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-5, 1e-3), torch.float16: (1e-3, 1.6e-2)}
_WIDEST = (8e-3, 0.125)  # for bfloat16 and quantised weights: 1 and 16 times its spacing below 1
# Masks remove later tokens completely in any dtype, so more mass than this on them is attention.
_AHEAD = 1e-6


def tokens_to_try(model: nn.Module, length: int) -> int:
    """How long a test text must be to stand for a conversation of ``length`` tokens.

    A model may work differently beyond some length (the width of a window, the keys that an indexer picks, a chunk of
    states). If the conversation exceeds such a length, the test text exceeds it too, up to 8,192 tokens.
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
    """Why pieces through the cache would give another map than a single pass; ``None`` if the maps agree.

    A short text is run through the model both ways, and the maps of the layers with attention are compared.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        policy: As ``attnpatch.patched`` takes it.
        tokens: Tokens of the text.

    Returns:
        The reason, in one line.
    """
    name = type(model).__name__
    if caches.parameter_of(model) is None:
        return f"{name} has no KV cache"
    ids = _text(model, tokenizer, tokens)
    count = ids.shape[1]
    size = -(-count // _BLOCKS)
    # Pieces of several tokens, one token, and several again, like messages and answers.
    first = 16 * size
    edges = [0, first, first + 1, count - 8 * size, count]
    if sorted({*edges}) != edges:
        return f"{name} takes only texts that are too short to test its cache"
    whole = _seen(model, ids, [(0, count)], size, policy)
    try:
        apart = _seen(model, ids, list(pairwise(edges)), size, policy)
    # Any error of the model means that it cannot continue from its cache.
    except Exception as error:
        return f"{name} cannot continue from its cache ({type(error).__name__}: {in_one_line(error, 120)})"
    # Layers whose rows are not probabilities (linear attention) are not compared.
    kept = (whole.amin((1, 2)) > -_AHEAD) & (whole.sum(-1).amax(1) < 1 + _WIDEST[1])
    if apart.shape == whole.shape:
        whole, apart = whole[kept], apart[kept]
    if not len(whole):
        return None
    if whole.triu(1).max() > _AHEAD:
        return f"tokens attend to later tokens in {name}, so what follows a message changes its attention"
    return _difference(name, whole, apart, first // size, _bounds(model))


def _difference(
    name: str, whole: Tensor, apart: Tensor, first: int, bounds: tuple[float, float]
) -> str | None:
    """Why two maps ``[layers, blocks, blocks]`` differ, or None; the first ``first`` blocks had nothing before them."""
    least, most = bounds
    if apart.shape != whole.shape:
        return f"{name} runs another number of attention layers with its cache than in a single pass"
    off = (whole - apart).abs().amax((0, 2)).nan_to_num(nan=torch.inf)
    rounding, later = off[:first].max().item(), off[first:].max().item()
    if rounding > most:
        return f"tokens attend to later tokens in {name}: the text after a message changes its map by {rounding:.2g}"
    if later > max(least, min(_TIMES * rounding, most)):
        return f"with the cache of {name}, a short text has another map than in a single pass (off by {later:.2g})"
    return None


def _seen(
    model: nn.Module, ids: Tensor, pieces: list[tuple[int, int]], size: int, policy: Mapping[str, Any]
) -> Tensor:
    """The map of the attention kind that most layers have, ``[layers, blocks, blocks]`` float64."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(model, **policy))
        patch = patch_of(model)
        assert patch is not None
        stack.enter_context(counted_apart(patch.sites))
        maps = stack.enter_context(capture(model, Blocks.fixed(size)))
        feed(model, ids, iter(pieces))
        # If the pieces were not recognised as one sequence, this is the map of the last piece, of another shape.
        return maps[main_sites(maps)].mass.double()


def _text(model: nn.Module, tokenizer: Any, count: int) -> Tensor:
    """Token ids ``[1, tokens]`` of a text, or of the vocabulary if the tokenizer knows too few words of the text."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    ids = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    if len({*ids[:_SHORT]}) < _DIFFERENT:
        plain = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
        ids = plain[:: max(1, len(plain) // _SHORT)]
    # RoBERTa's positions begin at 2, so it takes two tokens fewer.
    count = min(count, limit - 2 if isinstance(limit, int) and limit > 2 else count)
    return torch.tensor([(ids * (count // len(ids) + 1))[:count]], device=input_device(model))


def _bounds(model: nn.Module) -> tuple[float, float]:
    dtype = getattr(model, "dtype", None)
    is_cast = torch.is_autocast_enabled(input_device(model).type)
    if is_cast or getattr(model, "hf_quantizer", None) is not None:
        return _WIDEST
    return _BOUNDS.get(dtype, _WIDEST) if isinstance(dtype, torch.dtype) else _WIDEST
