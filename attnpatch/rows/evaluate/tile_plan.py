"""From bytes to tiles: how many heads and query rows one step of a replay takes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import torch

from attnpatch.policy import Policy
from attnpatch.rows.evaluate.row_granularity import RowGranularity, balanced
from attnpatch.rows.graph.axes import KEY, LEAD, LEAST, ROW, Axis, Tile

# Live scores of one step on CPU: what the cache holds. Measured by `python -m benchmarks tiles`.
CPU_STEP_BYTES = 8 * 2**20
# Elsewhere a step must be long enough to fill the device; a few per cent of a small card.
DEVICE_STEP_BYTES = 256 * 2**20
# Tensors as wide as the scores that a replay holds at once: a step's input, its result, and a mask beside them.
LIVE_COPIES = 3
MOST_CPU_ROWS = 256
# Rows of so many bytes go through memory whatever their number, so a step has as many as are worth packing keys for
# (`python -m benchmarks sweep`).
LONG_ROW_BYTES = 128 * 2**10
# A step that is made longer than the cache holds, because it reads so much beside its rows (a wide head's keys are
# scaled and packed again for every step), still holds at most this part of all scores.
MOST_SHARE = 16
# Below so many multiplications per head torch's CPU bmm takes a loop of its own (aten LinearAlgebra.cpp,
# bmm_out_or_baddbmm_), which rounds differently; and the matrix library takes another kernel for products that are a little
# larger (measured on a processor with AVX-512: 416 differ, 512 do not).
NATIVE_LOOP, LEAST_WORK = 400, 512


@dataclasses.dataclass
class TilePlan:
    """How a replay is cut: every combination of lead pieces, and for each the row pieces.

    Attributes:
        lead: Tiles over batch and heads.
        row: The axis whose pieces change fastest, or ``None``.
        rows: Its pieces.
    """

    lead: list[Tile]
    row: Axis | None
    rows: list[tuple[int, int]]

    def largest(self) -> tuple[int, int]:
        """Rows and heads of the largest step; a head that is not cut counts as one."""
        rows = max((high - low for low, high in self.rows), default=0)
        heads = max(math.prod(high - low for low, high in tile.values()) for tile in self.lead)
        return rows, heads


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What the steps of a graph work on.

    Attributes:
        tileable: The axes that may be cut, outermost first.
        width: Elements that one row of one head has in the widest tensor of the graph.
        itemsize: Bytes of an element.
        grain: Where rows may be cut; so that results are the same to the last bit unless it is said.
        reads: Elements that each step reads of one head however few its rows (its keys and values).
        held: Bytes that a step holds at most for one row of one head, where that is known.
    """

    tileable: list[Axis]
    width: int
    itemsize: int
    grain: RowGranularity = dataclasses.field(default_factory=RowGranularity)
    reads: int = 0
    held: int = 0


def choose(
    work: StepWork, policy: Policy, device: torch.device, shrink: int = 1, free: int | None = None
) -> TilePlan:
    """Steps for a graph.

    Args:
        work: What a step works on.
        policy: Its ``rows``, ``heads`` and ``workspace`` are honoured.
        device: Where it runs.
        shrink: Divides the step, also a fixed one; doubled after an out-of-memory error.
        free: Free bytes on the device, of which a step takes at most half; ``None``: plenty.

    Returns:
        The steps, none with fewer rows or heads than ``LEAST`` unless there are no more.
    """
    on_cpu = device.type == "cpu"
    row, lead = row_and_lead(work.tileable)
    if row is None:
        return TilePlan([{}], None, [])
    width, itemsize, grain = max(1, work.width), work.itemsize, work.grain
    present = math.prod(axis.size for axis in lead)
    ceiling = _ceiling(max(LIVE_COPIES * itemsize, -(-work.held // width)), policy, free)
    elements = max(1, min((CPU_STEP_BYTES if on_cpu else DEVICE_STEP_BYTES) // itemsize, ceiling) // shrink)
    heads, rows = _fixed(policy, shrink, grain.fewest)
    if heads is None:
        heads = LEAST[LEAD] if on_cpu else present
        heads = max(LEAST[LEAD], min(heads, elements // (width * min(row.size, 16))))
        if on_cpu:
            # Short sequences: as many heads as the step holds, so that a step is worth its overhead.
            heads = max(heads, elements // (width * min(row.size, MOST_CPU_ROWS)))
        heads = min(heads, present)
    if rows is None:
        rows = max(1, elements // (width * heads))
        if on_cpu:
            share = row.size * present // (heads * MOST_SHARE)
            least = MOST_CPU_ROWS if work.reads and width * itemsize >= LONG_ROW_BYTES else 0
            worth = min(max(least, -(-work.reads // width)), share, ceiling // (width * heads)) // shrink
            rows = max(min(rows, MOST_CPU_ROWS), worth)
    spans = grain.cut(row.size, rows)
    most = ceiling // (width * heads) // shrink
    if grain.multiple > 1 and policy.rows is None and max(high - low for low, high in spans) > most:
        spans = grain.tight(row.size, most)
    return TilePlan(_lead_tiles(lead, heads), row, spans)


def _ceiling(held: int, policy: Policy, free: int | None) -> int:
    """Scores that one step may hold at most, whatever would be fast; ``held``: bytes for each of them."""
    limits = [sys.maxsize if free is None else free // 2]
    if policy.workspace_bytes is not None:
        limits.append(policy.workspace_bytes)
    return min(limits) // held


def one_row(tileable: list[Axis]) -> TilePlan:
    """The smallest steps there are, which round differently from larger ones."""
    row, lead = row_and_lead(tileable)
    if row is None:
        return TilePlan([{}], None, [])
    return TilePlan(_lead_tiles(lead, 1), row, [(i, i + 1) for i in range(row.size)])


def products_grain(
    works: list[int], tileable: list[Axis], device: torch.device, narrow: bool
) -> RowGranularity:
    """Rows such that no step's product is so small that it takes another kernel than the whole one.

    Args:
        works: Multiplications per head of each product of the graph.
        tileable: The axes that may be cut.
        device: Where it runs.
        narrow: Whether some of it is in a narrow dtype.
    """
    row, _ = row_and_lead(tileable)
    # As many as fill a vector: where keys come before queries softmax has another kernel for what is left over.
    unit = LEAST[ROW] * (2 if narrow else 1)
    if row is None or device.type != "cpu":
        return RowGranularity(unit, unit=unit)
    rows = [-(-LEAST_WORK * row.size // work) for work in works if work >= NATIVE_LOOP]
    return RowGranularity(max(unit, *rows, 0), unit=unit)


def row_and_lead(tileable: list[Axis]) -> tuple[Axis | None, list[Axis]]:
    kinds = [axis.kind for axis in tileable]
    # Scores that serve both sides have the queries of one where the other one has keys.
    kind = next((kind for kind in (ROW, KEY) if kind in kinds), None)
    row = next((axis for axis in reversed(tileable) if kind in (None, axis.kind)), None)
    return row, [axis for axis in tileable if axis is not row]


def _fixed(policy: Policy, shrink: int, fewest: int) -> tuple[int | None, int | None]:
    """Heads and rows that the policy fixes; where memory ran out, first the rows are divided, then the heads."""
    heads, rows = policy.heads, policy.rows
    if rows is not None:
        least = min(rows, fewest)
        rows, shrink = max(least, rows // shrink), max(1, shrink * least // rows)
    if heads is not None:
        heads = max(min(heads, LEAST[LEAD]), heads // shrink)
    return heads, rows


def _lead_tiles(lead: list[Axis], target: int) -> list[Tile]:
    """Tiles of about ``target`` heads: whole inner axes, pieces of one, single elements of the outer ones."""
    pieces: list[list[tuple[int, int]]] = []
    inside = 1
    for axis in reversed(lead):
        if inside * axis.size <= target:
            pieces.append([(0, axis.size)])
            inside *= axis.size
        elif inside < target:
            part = balanced(
                axis.size, max(1, target // inside), 1 if inside > 1 or target == 1 else LEAST[LEAD]
            )
            pieces.append(part)
            inside = target
        else:
            pieces.append([(i, i + 1) for i in range(axis.size)])
    pieces.reverse()
    return [
        {axis: span for axis, span in zip(lead, spans, strict=True) if span != (0, axis.size)}
        for spans in itertools.product(*pieces)
    ]
