"""Makes block maps from the sums of a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.blocks.heads import chosen_heads
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.recording.accumulator import SiteSums


def together(calls: list[dict[str, SiteSums]]) -> dict[str, SiteSums]:
    """The sums of a sequence by site, from those of its calls; later calls may have more blocks than earlier ones."""
    found: dict[str, SiteSums] = {}
    for call in calls:
        for name, record in call.items():
            before = found.get(name)
            found[name] = record if before is None else _added(before, record)
    return found


def _added(before: SiteSums, record: SiteSums) -> SiteSums:
    variance = None if record.variance is None else record.variance + grown(before.variance, record)
    measures = record.measures
    if measures is not None and before.measures is not None:
        measures = before.measures.plus(measures)
    sums = record.sums + grown(before.sums, record)
    counts = record.counts.clone()
    counts[:, : before.counts.shape[1]] += before.counts
    return dataclasses.replace(record, sums=sums, counts=counts, variance=variance, measures=measures)


def grown(sums: torch.Tensor, like: SiteSums) -> torch.Tensor:
    """Earlier sums, padded with zeros to the blocks of a later record; the column of keys in no block is dropped."""
    whole = torch.zeros_like(like.sums)
    whole[:, :, : sums.shape[2], : sums.shape[3] - 1] = sums[..., :-1]
    return whole


def block_map(
    records: Sequence[SiteSums],
    apart: list[list[SiteSums | None]],
    layers: list[int],
    heads: Any,
    metadata: dict[str, Any],
) -> BlockMap:
    """The block map of sites of one kind.

    Args:
        records: The sums, one per layer.
        apart: For each step (each call of the sequence) its sums, one per layer; empty if steps are not kept separate.
        layers: The layers' numbers.
        heads: As in ``capture``.
        metadata: Further metadata.

    Raises:
        CaptureError: The layers differ in heads or blocks.
    """
    first = records[0]
    if any(record.sums.shape != first.sums.shape for record in records):
        raise CaptureError(
            f"layers of {metadata['sites']} differ in heads or blocks and do not fit one map; capture them one by one "
            "with layers=[...]"
        )
    if apart:
        steps = [[_mean(one, like, heads) for one, like in zip(call, records, strict=True)] for call in apart]
        mass = torch.stack([_stacked(each, heads) for each in steps], 1)
    else:
        mass = _stacked([_mean(record, record, heads) for record in records], heads)
    error = None
    if first.variance is not None and not apart:
        errors = [dataclasses.replace(record, sums=record.variance.sqrt()) for record in records]
        error = _stacked([_mean(record, record, heads) for record in errors], heads)
    return BlockMap(
        mass=mass,
        layers=layers,
        query_labels=first.query.labels,
        key_labels=first.key.labels,
        query_sizes=first.counts.long(),
        key_sizes=first.key.sizes,
        heads="mean" if heads == "mean" else chosen_heads(heads, first.num_heads),
        error=error,
        steps=range(len(apart)),
        metadata={**metadata, **_texts(first), "tokens": int(first.key.assignment.shape[1])},
    )


def _texts(record: SiteSums) -> dict[str, Any]:
    """Texts of the blocks as metadata: ``texts`` if queries and keys are the same blocks, or else those of each side."""
    query, key = record.query, record.key
    sides = {"query_texts": query.texts, "key_texts": key.texts}
    if query.texts == key.texts and query.labels == key.labels:
        sides = {"texts": key.texts}
    found = {name: [list(each) for each in texts] for name, texts in sides.items() if texts is not None}
    return {name: lists if len(lists) > 1 else lists[0] for name, lists in found.items()}


def measured(records: Sequence[SiteSums], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The statistics from one record per layer; see ``Maps.measured``."""
    each = [record.measures for record in records]
    if any(one.entropy.shape != each[0].entropy.shape for one in each):
        raise CaptureError(
            "layers differ in heads and do not fit one table; capture them one by one with layers=[...]"
        )
    rows = torch.stack([one.rows for one in each], 1).clamp(min=1)[..., None]
    received = torch.stack([one.received for one in each], 1)
    values = {
        "received": received[:, :, 0] / records[0].num_heads if each[0].apart is None else received,
        "entropy": torch.stack([one.entropy for one in each], 1) / rows,
        "sink": torch.stack([one.sink for one in each], 1) / rows,
    }
    one = slice(None) if rows.shape[0] > 1 else 0
    return {name: values[name][one].float() for name in names}


def _mean(record: SiteSums | None, like: SiteSums, heads: Any) -> torch.Tensor:
    """Means over query tokens, float64 ``[batch, heads or 1, query_blocks, key_blocks]``; zeros without a record."""
    if record is None:
        return torch.zeros_like(like.sums[..., :-1])
    sums = record.sums if record is like else grown(record.sums, like)
    counts = torch.nn.functional.pad(record.counts, (0, sums.shape[2] - record.counts.shape[1]))
    share = (1 if heads != "mean" else record.num_heads) * counts.clamp(min=1)[:, None, :, None]
    return sums[..., :-1] / share


def _stacked(layers: list[torch.Tensor], heads: Any) -> torch.Tensor:
    values = torch.stack(layers, 1).float()
    return values.squeeze(2) if heads == "mean" else values
