"""Follows writes into a tensor, or into a copy of it, between a model's attention modules."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.graph.axes import fresh
from attnpatch.rows.provenance.reordered.picked import adds
from attnpatch.rows.provenance.reordered.token_tensors import TokenTensors, base, listed
from attnpatch.rows.provenance.tensors import is_wide


def follow_write(
    tokens: TokenTensors,
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    tensors: list[torch.Tensor],
    results: list[torch.Tensor],
) -> None:
    """Follow a write into a tensor, or into a copy of it."""
    target, value = args[0] if args else tensors[0], _value_of(name, args, kwargs)
    if not tokens.is_plain(target):
        return
    is_in_place = name == "__setitem__" or name.endswith("_")
    out = target if is_in_place or not results else results[0]
    if out is not target:
        if tokens.is_bare.get(target):
            tokens.is_bare[out] = True
        elif (dims := tokens.sources.of(target)) is not None:
            tokens.sources.give(out, dims)
    is_known = value is None or value is target or not tokens.is_plain(value)
    if is_known or not tokens.has_tokens(value):
        tokens.picked.wrote(target, None, out, False)
        return
    view = None
    if name == "__setitem__":
        if not any(isinstance(one, (torch.Tensor, list)) for one in listed(args[1])):
            view = out[args[1]]
    elif name == "copy_":
        view = out
    is_lost = is_wide(out) and _is_elsewhere(tokens, name, args, kwargs, target, value)
    is_whole = view is not None and view.shape == out.shape == value.shape
    if name == "copy_":
        out = base(out)
    tokens.picked.wrote(target, value, out, is_whole and out is target)
    if not is_wide(out):
        return
    if view is None:
        # A write at an index: it may replace some of the tokens, or all.
        is_piece = base(value).numel() == out.numel() or base(value) is base(target)
        is_much = value.numel() >= out.numel() or is_piece
        if tokens.is_bare.get(out) or is_lost or (is_much and not tokens.picked.has_places(value)):
            tokens.lose(out, name)
    elif view.shape == out.shape == value.shape:
        tokens.is_bare[out] = False
        tokens.sources.give(out, tokens.sources.of(value) or fresh(out.shape))
    else:
        # Some channels of every token.
        is_of_all = out.dim() < 4 and out.shape[:-1] == view.shape[:-1] == value.shape[:-1]
        is_in_place = is_of_all and not tokens.why(value)
        _into_view(tokens, name, out, view, value, is_lost and not is_in_place)


def _is_elsewhere(
    tokens: TokenTensors,
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    target: torch.Tensor,
    value: torch.Tensor,
) -> bool:
    """True if a write may put some of a tensor's tokens into places that are not their own."""
    if not tokens.picked.have_common_input(target, value):
        return False  # features of a picture, over their placeholders in a text
    if adds(name, args, kwargs):
        return tokens.hidden.has(target)
    return not tokens.picked.are_in_their_places(name, args, kwargs, target, value)


def _into_view(
    tokens: TokenTensors, name: str, out: torch.Tensor, view: torch.Tensor, value: torch.Tensor, is_lost: bool
) -> None:
    """Follow a write into a part of a tensor that slices tell."""
    source = base(value)
    if source.shape == out.shape and source.stride() == out.stride():
        start, end = value.storage_offset() - source.storage_offset(), view.storage_offset()
        if (value.shape, value.stride(), start) != (
            view.shape,
            view.stride(),
            end - out.storage_offset(),
        ):
            # Integers may be shifted: a decoder's input is the text shifted by one token.
            if value.is_floating_point():
                tokens.lose(out, name)
        elif tokens.is_bare.get(out):
            tokens.is_bare[out] = False
            if (dims := tokens.sources.of(source)) is not None:
                tokens.sources.give(out, dims)
    elif tokens.is_bare.get(out) or source.numel() == out.numel() or (is_lost and value.is_floating_point()):
        tokens.lose(out, name)


def spread(tokens: TokenTensors, written: torch.Tensor, before: dict[int, str]) -> None:
    """After a write that changed a tensor's order, the order of all tensors in its memory is lost, too."""
    whole = base(written)
    now = tokens.why(written) or tokens.why(whole)
    if not now or now == before:
        return
    for one in tokens.sharing(written):
        if not tokens.why(one):
            tokens.lose(one, next(iter(now.values())))


def _value_of(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that is written; ``None`` if it is a number."""
    named = [kwargs.get(key) for key in ("src", "source", "values", "value", "other")]
    if args and isinstance(args[-1], bool):
        args = args[:-1]  # whether to wait, or to accumulate
    at = 1 if name in ("select_scatter", "slice_scatter", "diagonal_scatter") else -1
    given = [*named, *(args[at:][:1] if len(args) > 1 else ())]
    return next((one for one in given if isinstance(one, torch.Tensor)), None)
