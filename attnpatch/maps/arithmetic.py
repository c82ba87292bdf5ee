"""Sums, differences and multiples of block maps, and the comparison of two maps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnpatch.errors import CaptureError
from attnpatch.maps.fields import shortened, texts_of
from attnpatch.maps.meaning import meaning

if TYPE_CHECKING:
    from attnpatch.maps.block_map import BlockMap

_NAMES = (("layers", "layers"), ("heads", "heads"), ("steps", "steps"), ("query_labels", "query blocks"), ("key_labels", "key blocks"))  # fmt: skip


def combined(one: BlockMap, other: BlockMap, sign: int) -> BlockMap:
    """``one + sign * other``, of the normalised values.

    Raises:
        CaptureError: The maps differ in their axes or their normalisation.
    """
    different = [words for name, words in _NAMES if getattr(one, name) != getattr(other, name)]
    if different or one.mass.shape != other.mass.shape:
        raise CaptureError(
            f"two maps that differ in {' and '.join(different) or 'their sequences'} have no sum or difference; "
            "attnpatch.compare(a, b) compares what they share."
        )
    if one.normalization != other.normalization:
        raise CaptureError(
            f"one map is normalised by {one.normalization!r}, the other by {other.normalization!r}; normalise both alike."
        )
    word = "difference" if sign < 0 else "sum"
    first, second = meaning(one), meaning(other)
    metadata = dict(one.metadata)
    models = [each.metadata.get("model") for each in (one, other)]
    if models[0] != models[1]:
        metadata["model"] = f" {'-' if sign < 0 else '+'} ".join(str(name or "?") for name in models)
    return _computed(
        one,
        one.values + sign * other.values,
        f"{word} of {first}" + f" and {second}" * (first != second),
        _error(one, other),
        metadata | ({"weighting": "difference"} if sign < 0 or other.is_signed > one.is_signed else {}),
    )


def multiplied(one: BlockMap, factor: Any) -> BlockMap:
    """``one * factor``, of the normalised values."""
    if isinstance(factor, (bool, np.bool_)) or not isinstance(factor, Real) or not math.isfinite(factor):
        raise CaptureError(f"a map times {factor!r}; accepted is a finite number.")
    factor = float(factor)
    error = None if one.error is None else _scaled(one) * abs(factor)
    return _computed(one, one.values * factor, f"{factor:g} times {meaning(one)}", error, one.metadata)


def divided(one: BlockMap, divisor: Any) -> BlockMap:
    """``one / divisor``, of the normalised values."""
    if isinstance(divisor, (bool, np.bool_)) or divisor == 0 or not math.isfinite(divisor):
        raise CaptureError(f"a map divided by {divisor!r}; accepted is a finite number other than 0.")
    return multiplied(one, 1 / float(divisor))


def _computed(
    one: BlockMap, values: Tensor, words: str, error: Tensor | None, metadata: Mapping[str, Any]
) -> BlockMap:
    return dataclasses.replace(
        one,
        mass=values,
        normalization="none",
        error=error,
        spread=None,
        metadata={**metadata, "numbers": words},
    )


def _scaled(one: BlockMap) -> Tensor:
    """The standard error of ``values``; NaN where it is not known, because the map is normalised."""
    assert one.error is not None
    return one.error if one.normalization == "none" else torch.full_like(one.error, float("nan"))


def _error(one: BlockMap, other: BlockMap) -> Tensor | None:
    """The standard error of a sum or difference of two maps; of the same sample of rows, its upper bound."""
    known = [_scaled(each) for each in (one, other) if each.error is not None]
    if not known:
        return None
    samples = [[each.metadata.get(name) for name in ("sample_rows", "seed")] for each in (one, other)]
    is_same = samples[0] == samples[1] and None not in samples[0]
    return torch.stack(known).sum(0) if is_same else torch.stack(known).square().sum(0).sqrt()


def compare(a: BlockMap, b: BlockMap) -> BlockMap:
    """What changed from ``a`` to ``b``: the map ``b - a`` of the blocks that both have.

    Blocks are matched by their labels. If no label is shared, or a label occurs more than once, blocks are matched by
    position, and both maps must have as many.

    Args:
        a, b: Two maps of one sequence each, with the same layers, heads and steps, and normalised alike. Two models with
            different layers are compared by their means: ``compare(a.mean("layer"), b.mean("layer"))``.

    Returns:
        A map of differences. ``metadata["compared"]`` says how blocks were matched and which were left out.
        ``result.top(5, query="all")`` lists the largest changes; ``plot`` and the page draw 0 in the middle.

    Raises:
        CaptureError: The maps differ in layers, heads, steps or normalisation, are batches, or share no blocks.
    """
    for name, one in (("first", a), ("second", b)):
        if not hasattr(one, "is_batch"):
            raise CaptureError(
                f"the {name} map is {type(one).__name__}; accepted are two block maps, such as result.block_map."
            )
        if one.is_batch:
            raise CaptureError(f"the {name} map is a batch; compare one sequence: map.isel(sequence=0).")
    notes: list[str] = []
    for name in ("layer", "head", "step"):
        own, others = getattr(a, f"{name}s"), getattr(b, f"{name}s")
        if own != others:
            raise CaptureError(
                f"the maps differ in their {name}s ({_listed(own)} and {_listed(others)}); select the same ones, or compare "
                f"means: map.mean({name!r})."
            )
    for side in ("query", "key"):
        a, b = _same_blocks(a, b, side, notes)
    found = combined(b, a, -1)
    metadata = {
        **found.metadata,
        "numbers": f"change of {meaning(a)}"
        if meaning(a) == meaning(b)
        else f"change from {meaning(a)} to {meaning(b)}",
        "compared": [a.metadata.get("model"), b.metadata.get("model"), *notes],
    }
    return dataclasses.replace(found, metadata=metadata)


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else shortened(names) or "none"


def _same_blocks(a: BlockMap, b: BlockMap, side: str, notes: list[str]) -> tuple[BlockMap, BlockMap]:
    own: Sequence[Any] = getattr(a, f"{side}_labels")
    other: Sequence[Any] = getattr(b, f"{side}_labels")
    if own == other:
        return a, b
    is_unique = max([*Counter(own).values(), *Counter(other).values()], default=1) == 1
    shared = [label for label in own if label in other] if is_unique else []
    if shared:
        gone = [
            *(f"- {label}" for label in own if label not in other),
            *(f"+ {label}" for label in other if label not in own),
        ]
        notes.append(f"{side} blocks in both: {len(shared)}; in one only: {', '.join(gone)}")
        return a.sel(**{side: shared}), b.sel(**{side: shared})
    if len(own) != len(other):
        raise CaptureError(
            f"the maps have {len(own)} and {len(other)} {side} blocks and share no label that occurs once; select the "
            f"blocks to compare: a.isel({side}=[...]), b.isel({side}=[...])."
        )
    notes.append(f"{side} blocks matched by position")
    texts = texts_of(a.metadata, side, len(own))
    # Labels and texts are those of the first map, or the text of a block would stand beside the label of another one.
    changes: dict[str, Any] = {f"{side}_labels": own, "metadata": {**b.metadata, f"{side}_texts": texts}}
    return a, dataclasses.replace(b, **changes)
