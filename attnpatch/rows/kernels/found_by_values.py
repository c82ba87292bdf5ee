"""Finds by their values which tokens a tensor holds that is not followed: pages of a cache, sequences without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, leaves
from attnpatch.rows.provenance.origins import Made
from attnpatch.rows.provenance.sources import Sources


def name_keys(sources: Sources, key: torch.Tensor, new: int, low: int = 0) -> None:
    """Note that the last keys are tokens of an input, if their values are those of tensors that were followed.

    Called while functions are followed.

    Args:
        sources: The sources of the module's call.
        key: ``[batch, heads, kv_len, head_dim]``. Keys before the last ``new`` ones were kept by the module.
        new: Number of tokens of this call.
        low: The place of the first of these tokens, if sequences are packed.
    """
    kept = key.shape[2] - new
    dims = sources.of(key)
    if kept < 0 or new < 1 or (dims is not None and are_tokens(sources, dims[2])):
        return
    own = key[:, :, kept:]
    for view in _candidates(sources, own, low):
        found = sources.of(view)
        if found is None or not are_tokens(sources, found[2]) or not torch.equal(view, own):
            continue
        tokens = found[2]
        if kept:
            axis = Axis(key.shape[2])
            sources.made[axis] = Made(parts=((None, kept), (tokens, new)))
            tokens = (axis,)
        sources.give(key, (found[0], found[1], tokens, found[3]))
        return


def are_tokens(sources: Sources, dim: Dim) -> bool:
    """True if a dimension is one of an input, or a part of one, or several of them."""
    found = dim if len(dim) == 1 and dim[0].size == 1 else leaves(dim)
    return bool(found) and all(_is_of_input(sources, leaf) for leaf in found)


def _is_of_input(sources: Sources, leaf: Axis) -> bool:
    whole = sources.made.get(leaf, Made()).of
    return sources.origin(leaf) is not None or (whole is not None and are_tokens(sources, (whole,)))


def _candidates(sources: Sources, own: torch.Tensor, low: int) -> Iterator[torch.Tensor]:
    """Tensors that were followed, in the layout of ``own``: ``[batch, heads, tokens, head_dim]``."""
    batch, heads, count, width = own.shape
    for tensor in sources.known():
        if tensor.dtype != own.dtype or tensor.device != own.device or tensor.shape[-1:] != own.shape[-1:]:
            continue
        if tensor.shape == (batch, count, heads, width):
            yield tensor.transpose(1, 2)
        if tensor.shape == own.shape:
            yield tensor
        if batch == 1 and tensor.dim() == 3 and tensor.shape[1] == heads and low + count <= len(tensor):
            yield tensor[low : low + count].transpose(0, 1).unsqueeze(0)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Where packed tokens lie among the tokens of padded sequences.

    Attributes:
        dims: The dimensions of sequences, heads, tokens and channels.
        tokens: Number of tokens of each padded sequence.
        starts: The place of the first token of each sequence that is no padding.
    """

    dims: Dims
    tokens: int
    starts: tuple[int, ...]


def padded_of(sources: Sources, packed: torch.Tensor, lengths: tuple[int, ...]) -> Padded | None:
    """The padded sequences whose tokens, without padding, are packed; ``None`` if there are none.

    Called while functions are followed.

    Args:
        sources: The sources of the module's call.
        packed: ``[1, heads, total, head_dim]``.
        lengths: Number of tokens of each sequence.
    """
    heads, width = packed.shape[1], packed.shape[3]
    if not any(lengths):
        return None
    for tensor in sources.known():
        if tensor.dim() != 4 or tensor.dtype != packed.dtype or tensor.device != packed.device:
            continue
        if tensor.shape[0] != len(lengths) or tensor.shape[3] != width:
            continue
        for view in (tensor.transpose(1, 2), tensor):
            if view.shape[1] != heads or view.shape[2] < max(lengths):
                continue
            dims = sources.of(view)
            if dims is None or not are_tokens(sources, dims[2]):
                continue
            starts = _starts(view, packed, lengths)
            if starts is not None:
                return Padded(dims, view.shape[2], starts)
    return None


def _starts(view: torch.Tensor, packed: torch.Tensor, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where each packed sequence begins in its padded one, if padding is at one end; otherwise ``None``."""
    found, low = [], 0
    for number, length in enumerate(lengths):
        own = packed[0, :, low : low + length]
        for start in (0, view.shape[2] - length):
            if torch.equal(view[number, :, start : start + length], own):
                found.append(start)
                break
        else:
            return None
        low += length
    return tuple(found)
