"""TilePlan: how many heads and query rows one step has, given the bytes that it may take."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import torch

from attnpatch.policy import Policy
from attnpatch.rows.evaluate.row_granularity import RowGranularity, balanced
from attnpatch.rows.graph.axes import KEY, LEAD, LEAST, ROW, Axis, Tile

# Bytes of scores per step on CPU: as much as fits into the cache. Measured by `python -m benchmarks tiles`.
CPU_STEP_BYTES = 8 * 2**20
# On other devices: enough work to fill the device, and a few per cent of a small card's memory.
DEVICE_STEP_BYTES = 256 * 2**20
# Number of tensors as wide as the scores that a step holds at once: input, result, and a mask.
LIVE_COPIES = 3
MOST_CPU_ROWS = 256
# On other devices a step has as many rows, if there are as many, before it has further heads: every step reads all keys
# and values of its heads.
DEVICE_ROWS = 128
# Rows of this many bytes do not fit into the cache whatever their number, so a step has enough of them to be worth
# packing the keys (`python -m benchmarks sweep`).
LONG_ROW_BYTES = 128 * 2**10
# A step may be larger than the cache if it reads much beside its rows (the keys of a wide head are scaled and packed
# again in every step). Then a step has at most one part in ``MOST_SHARE`` of all scores.
MOST_SHARE = 16
# Below NATIVE_LOOP multiplications per head torch's CPU bmm uses a loop of its own, which rounds differently (aten
# LinearAlgebra.cpp, bmm_out_or_baddbmm_). For slightly larger products the matrix library uses another kernel (measured
# on a processor with AVX-512: 416 differ, 512 do not).
NATIVE_LOOP, LEAST_WORK = 400, 512


@dataclasses.dataclass
class TilePlan:
    """The tiles of an evaluation: every combination of a range of heads and a range of rows.

    Attributes:
        lead: Tiles over batch and heads.
        row: The row axis, or ``None``.
        rows: Its ranges.
    """

    lead: list[Tile]
    row: Axis | None
    rows: list[tuple[int, int]]

    def largest(self) -> tuple[int, int]:
        """Numbers of rows and heads of the largest step; axes of heads that are not cut count as one."""
        rows = max((high - low for low, high in self.rows), default=0)
        heads = max(math.prod(high - low for low, high in tile.values()) for tile in self.lead)
        return rows, heads


@dataclasses.dataclass(frozen=True)
class StepWork:
    """The work of a step of a graph.

    Attributes:
        tileable: The axes that may be cut, outermost first.
        width: Elements per row and head in the widest tensor of the graph.
        itemsize: Bytes per element.
        grain: Where rows may be cut; by default so that results are bit-identical.
        reads: Elements per head that each step reads whatever its number of rows (keys and values).
        held: The most bytes that a step holds per row and head; 0 if not known.
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
    """Choose the tiles for a graph.

    Args:
        work: The work of a step.
        policy: Its ``rows``, ``heads``, ``workspace`` and ``max_allocation`` are respected.
        device: The device on which it runs.
        shrink: Divides the step, even a fixed one; doubled after an out-of-memory error.
        free: Free bytes on the device, of which a step takes at most half; ``None``: no limit.

    Returns:
        The tiles; none has fewer rows or heads than ``LEAST``, unless there are no more.
    """
    on_cpu = device.type == "cpu"
    row, lead = row_and_lead(work.tileable)
    if row is None:
        return TilePlan([{}], None, [])
    width, itemsize, grain = max(1, work.width), work.itemsize, work.grain
    present = math.prod(axis.size for axis in lead)
    ceiling = _ceiling(max(LIVE_COPIES * itemsize, -(-work.held // width)), itemsize, policy, free)
    elements = max(1, min((CPU_STEP_BYTES if on_cpu else DEVICE_STEP_BYTES) // itemsize, ceiling) // shrink)
    heads, rows = _fixed(policy, shrink, grain.fewest)
    if heads is None:
        heads = LEAST[LEAD] if on_cpu else present
        heads = max(
            LEAST[LEAD], min(heads, elements // (width * min(row.size, 16 if on_cpu else DEVICE_ROWS)))
        )
        if on_cpu:
            # For short sequences a step has as many heads as fit, to be worth its overhead.
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


def _ceiling(held: int, itemsize: int, policy: Policy, free: int | None) -> int:
    """The most scores of one step, by the workspace, by free memory and by the largest allowed tensor.

    ``held`` is the number of bytes that a step holds for each of its scores, ``itemsize`` that of one tensor of them.
    """
    limits = [sys.maxsize if free is None else free // 2]
    if policy.workspace_bytes is not None:
        limits.append(policy.workspace_bytes)
    most = min(limits) // held
    return most if policy.max_allocation_bytes is None else min(most, policy.max_allocation_bytes // itemsize)


def one_row(tileable: list[Axis]) -> TilePlan:
    """The smallest possible steps, which round differently from larger ones."""
    row, lead = row_and_lead(tileable)
    if row is None:
        return TilePlan([{}], None, [])
    return TilePlan(_lead_tiles(lead, 1), row, [(i, i + 1) for i in range(row.size)])


def products_grain(
    works: list[int], tileable: list[Axis], device: torch.device, narrow: bool
) -> RowGranularity:
    """The granularity that keeps every product of a step large enough to be computed by the kernel of the whole
    product.

    Args:
        works: Multiplications per head of each product of the graph.
        tileable: The axes that may be cut.
        device: The device on which it runs.
        narrow: True if any tensor has a narrow dtype.
    """
    row, _ = row_and_lead(tileable)
    # At least as many rows as fill a vector register: if keys come before queries, softmax treats a remainder with
    # another kernel.
    unit = LEAST[ROW] * (2 if narrow else 1)
    if row is None or device.type != "cpu":
        return RowGranularity(unit, unit=unit)
    rows = [-(-LEAST_WORK * row.size // work) for work in works if work >= NATIVE_LOOP]
    return RowGranularity(max(unit, *rows, 0), unit=unit)


def row_and_lead(tileable: list[Axis]) -> tuple[Axis | None, list[Axis]]:
    kinds = [axis.kind for axis in tileable]
    # In attention of both sides, the keys of one side are the rows of the other.
    kind = next((kind for kind in (ROW, KEY) if kind in kinds), None)
    row = next((axis for axis in reversed(tileable) if kind in (None, axis.kind)), None)
    return row, [axis for axis in tileable if axis is not row]


def _fixed(policy: Policy, shrink: int, fewest: int) -> tuple[int | None, int | None]:
    """Heads and rows that the policy fixes; after running out of memory first rows are divided, then heads."""
    heads, rows = policy.heads, policy.rows
    if rows is not None:
        least = min(rows, fewest)
        rows, shrink = max(least, rows // shrink), max(1, shrink * least // rows)
    if heads is not None:
        heads = max(min(heads, LEAST[LEAD]), heads // shrink)
    return heads, rows


def _lead_tiles(lead: list[Axis], target: int) -> list[Tile]:
    """Tiles of about ``target`` heads: inner axes are kept whole, one axis is cut, outer axes are taken one by one."""
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
