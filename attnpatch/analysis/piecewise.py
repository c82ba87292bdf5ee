"""Whether a model gives the same map in pieces through its cache as in a single pass: a short text decides."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.analysis.passes import feed, input_device, text_config
from attnpatch.api import capture, patched
from attnpatch.capture.blocks import Blocks
from attnpatch.hosts import caches
from attnpatch.patching.counters import counted_apart
from attnpatch.patching.patch import patch_of

# What notes begin with of a model that is not passed piece by piece.
SINGLE_PASS = "in a single pass: "
# The pieces of the short text: several tokens, one, and several again, as messages and answers are.
_PIECES = ((0, 16), (16, 17), (17, 40))
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


def why_single_pass(model: nn.Module, tokenizer: Any, policy: Mapping[str, Any]) -> str | None:
    """Why pieces through the cache would give another map than a single pass; ``None`` if they would not.

    A short text is passed through the model twice, and the maps of its last layer with attention, token by token, are
    compared: what goes wrong before that layer is seen there.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        policy: As ``attnpatch.patched`` takes it.

    Returns:
        A line for people.
    """
    name = type(model).__name__
    if caches.parameter_of(model) is None:
        return f"{name} has no KV cache"
    ids = _short_text(model, tokenizer)
    pieces = [(start, min(end, ids.shape[1])) for start, end in _PIECES if start < ids.shape[1]]
    if len(pieces) < 2:
        return f"{name} takes texts too short to see whether its cache goes on"
    whole = _seen(model, ids, [(0, ids.shape[1])], policy)
    if any(one.triu(1).max() > _AHEAD for one in whole.values()):
        return f"tokens look ahead in {name}: what follows a message changes its attention"
    try:
        apart = _seen(model, ids, pieces, policy)
    # Whatever a host raises, it does not go on.
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        return f"{name} does not go on from its cache ({type(error).__name__}: {said})"
    return _difference(name, whole, apart, pieces[0][1], _bounds(model))


def _difference(
    name: str, whole: dict[str, Tensor], apart: dict[str, Tensor], first: int, bounds: tuple[float, float]
) -> str | None:
    """Of the maps ``[tokens, tokens]`` of each kind of attention; ``first`` tokens had nothing before them."""
    least, most = bounds
    for sites, one in whole.items():
        other = apart.get(sites)
        if other is None or other.shape != one.shape:
            return f"{name} shows other attention through its cache than in a single pass"
        off = (one - other).abs().amax(-1).nan_to_num(nan=torch.inf)
        rounding, later = off[:first].max().item(), off[first:].max().item()
        if rounding > most:
            return (
                f"tokens look ahead in {name}: what follows a message changes its attention by {rounding:.2g}"
            )
        if later > max(least, min(_TIMES * rounding, most)):
            return f"through the cache of {name} a short text has another map than in a single pass (off by {later:.2g})"
    return None


def _seen(
    model: nn.Module, ids: Tensor, pieces: list[tuple[int, int]], policy: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The map of the last layer ``[tokens, tokens]``, of each kind of attention."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(model, **policy))
        patch = patch_of(model)
        assert patch is not None
        stack.enter_context(counted_apart(patch.sites))
        maps = stack.enter_context(capture(model, Blocks.fixed(1), layers=[-1]))
        feed(model, ids, iter(pieces))
        # Of pieces that were not taken for one sequence the last one alone, which is of another shape.
        return {sites: one.mass[-1].double() for sites, one in (maps.sequences or [{}])[-1].items()}


def _short_text(model: nn.Module, tokenizer: Any) -> Tensor:
    """Token ids ``[1, tokens]`` of some text, or of the vocabulary where the tokenizer knows too few of its words."""
    count = _PIECES[-1][1]
    limit = getattr(text_config(model), "max_position_embeddings", None)
    ids = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])[:count]
    if len({*ids}) < _DIFFERENT:
        plain = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
        ids = plain[:: max(1, len(plain) // count)]
    # RoBERTa's positions begin at 2.
    ids = (ids * count)[: min(count, limit - 2 if isinstance(limit, int) and limit > 2 else count)]
    return torch.tensor([ids], device=input_device(model))


def _bounds(model: nn.Module) -> tuple[float, float]:
    dtype = getattr(model, "dtype", None)
    is_cast = torch.is_autocast_enabled(input_device(model).type)
    if is_cast or getattr(model, "hf_quantizer", None) is not None:
        return _WIDEST
    return _BOUNDS.get(dtype, _WIDEST) if isinstance(dtype, torch.dtype) else _WIDEST
