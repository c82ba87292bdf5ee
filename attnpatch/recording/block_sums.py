"""Sums rows of attention probabilities by query block and key block.

The order of work makes it cheap. First, rows of one query block are summed, and heads with them, by one product with
ones; this is as fast as memory can be read. Only then are columns summed into key blocks, so that one row has to be
scattered instead of the whole run. Where nearly every row is in a block of its own, keys are summed into blocks first.
"""

import bisect

import torch
from torch import Tensor

# A run is a range of adjacent rows in one block. If a tile's runs are shorter than this on average, there is little to
# sum over rows.
_SHORT_RUN = 4
# If runs of adjacent keys in one block are at least this long on average, they are summed without scattering.
_LONG_RUN = 16


class Runs:
    """The ranges of adjacent tokens in one block.

    Args:
        blocks: int64 ``[tokens]``, the block of each token.
        first: The number of the first token.
    """

    def __init__(self, blocks: Tensor, first: int = 0) -> None:
        found, lengths = blocks.unique_consecutive(return_counts=True)
        self._blocks: list[int] = found.tolist()
        self._stops: list[int] = (lengths.cumsum(0) + first).tolist()

    def within(self, low: int, high: int) -> list[tuple[int, int]]:
        """The ranges among tokens ``low:high``: the block of each, and the number of tokens up to its end."""
        first, last = bisect.bisect_right(self._stops, low), bisect.bisect_left(self._stops, high)
        stops = (min(stop, high) - low for stop in self._stops[first : last + 1])
        return list(zip(self._blocks[first : last + 1], stops, strict=True))


def add_tile(
    sums: Tensor,
    rows: Tensor,
    blocks: Tensor,
    columns: Tensor,
    weights: Tensor | None = None,
    runs: list[tuple[int, int]] | None = None,
) -> None:
    """Add rows of one sequence to the sums of its blocks, heads summed or apart.

    Rows are summed in float32 or better, everything after that in the dtype of ``sums``.

    Args:
        sums: float64 ``[1 or H, query_blocks, key_blocks + 1]``; the last bin is "no block".
        rows: ``[H, rows, kv_len]``, any float dtype, on any device.
        blocks: int64 ``[rows]`` on the CPU, the block of each row, -1 for none (its values are never looked at).
        columns: int64 ``[kv_len]``, the bin of each key.
        weights: ``[H, rows]`` factors; 1 when left out.
        runs: The ranges of rows in one block, if they are known; see ``Runs.within``.
    """
    count = rows.shape[1]
    if runs is None:
        runs = Runs(blocks).within(0, count)
    if len(runs) * _SHORT_RUN > count:
        add_rows(sums, rows, blocks, columns, weights)
        return
    stop, own = 0, []
    for block, end in runs:
        start, stop = stop, end
        if block >= 0:
            factors = None if weights is None else weights[:, start:stop]
            own.append(run_sum(rows[:, start:stop], len(sums) > 1, factors))
    if own and rows.device != sums.device:
        # All runs are moved at once: every copy waits for the device.
        own = list(torch.stack(own).to(sums.device))
    for block, summed in zip([block for block, _ in runs if block >= 0], own, strict=True):
        sums[:, block].scatter_add_(1, columns.expand(summed.shape), like(sums, summed))


def run_sum(rows: Tensor, are_apart: bool, weights: Tensor | None = None) -> Tensor:
    """The sum of rows that all belong to one query block: the common case, and the fast one.

    Args:
        rows: ``[H, rows, kv_len]``, any float dtype.
        are_apart: True if heads are kept apart, otherwise they are summed.
        weights: ``[H, rows]`` factors; 1 when left out.

    Returns:
        ``[1 or H, kv_len]``, in float32 or better.
    """
    num_heads, count, kv_len = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    weights = rows.new_ones(num_heads, count, dtype=dtype) if weights is None else weights.to(dtype)
    rows = rows.to(dtype)
    if are_apart:
        return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
    return weights.reshape(1, -1) @ rows.reshape(-1, kv_len)


def add_rows(
    sums: Tensor, rows: Tensor, blocks: Tensor, columns: Tensor, weights: Tensor | None = None
) -> None:
    """Add rows that are nearly all in different blocks (an image's tokens): their keys are summed into blocks first.

    Args:
        sums: float64 ``[1 or H, query_blocks, key_blocks + 1]``; the last bin is "no block".
        rows: ``[H, rows, kv_len]``, any float dtype.
        blocks: int64 ``[rows]``, the block of each row, -1 for none (its values are never looked at).
        columns: int64 ``[kv_len]``, the bin of each key.
        weights: ``[H, rows]`` factors; 1 when left out.
    """
    if bool((blocks < 0).any()):
        kept = (blocks >= 0).nonzero().flatten()
        blocks, kept = blocks[kept], kept.to(rows.device)
        rows, weights = rows[:, kept], None if weights is None else weights[:, kept]
    sums.index_add_(1, blocks, key_sums(sums, rows, columns, weights))


def key_sums(sums: Tensor, rows: Tensor, columns: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows with their keys summed into blocks: ``[1 or H, rows, key_blocks + 1]``. Arguments as for ``add_rows``."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    bins, lengths = columns.unique_consecutive(return_counts=True)
    if len(bins) * _LONG_RUN <= len(columns):
        # Adjacent keys in one block are summed over contiguous memory, six times as fast as scattering.
        pieces = rows.split(lengths.tolist(), -1)
        rows, columns = torch.stack([piece.sum(-1) for piece in pieces], -1), bins
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    if sums.shape[0] == 1:
        rows = rows.sum(0, keepdim=True)
    rows = like(sums, rows)
    summed = sums.new_zeros(*rows.shape[:2], sums.shape[2])
    return summed.scatter_add_(2, columns.expand(rows.shape), rows)


def like(sums: Tensor, values: Tensor) -> Tensor:
    """``values`` with the device and dtype of ``sums``; moved first, since some devices have no float64 (MPS)."""
    return values.to(sums.device).to(sums.dtype)
