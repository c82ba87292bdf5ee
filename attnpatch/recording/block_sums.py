"""Sums rows of attention probabilities by query block and key block.

The order of work makes it cheap. First the rows of each query block are summed (one small matrix product per head, with
a one-hot matrix of the few blocks that a tile touches), then the heads. Only then are columns summed into key blocks,
so that a few rows have to be scattered instead of the whole tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnpatch.errors import BlockError

# A slice of rows grows no further than this: the rounding error of a float32 sum grows with its length,
# and a slice that holds few blocks wastes little work on the zeros of the one-hot matrix. A run of rows at
# least this long is worth a product of its own (one block: a matrix-vector product at the speed of memory).
_MAX_ROWS = 256
_MAX_BLOCKS = 8
_LONG_RUN = 16

# Scratch space that is always allowed, in elements (1 MiB of float32). A decoding step has one row and many
# heads; holding it to the size of one row would turn it into a loop over heads.
_MIN_SCRATCH = 1 << 18


def accumulate_block_mass(
    sums: Tensor,
    probabilities: Tensor,
    query_assignment: Tensor,
    key_assignment: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Add one tile of attention probabilities to the running block sums, in place.

    Beside the tile it holds at most one float32 tensor of ``[B, rows, kv_len]`` (or 1 MiB). The rows are
    summed in float32 or better, a few hundred at a time, and everything after that in the dtype of ``sums``.

    Args:
        sums: ``[B, G, query_blocks, key_blocks]`` float64 (float32 where a device has no float64); ``G`` is
            the number of heads in the tile, or 1 to sum over them (the caller divides by their number). May
            be a view. On any device.
        probabilities: ``[B, H, rows, kv_len]``, any float dtype, need not be contiguous.
        query_assignment: ``[B, rows]`` int64, block of each row, -1 for none (its values are never looked
            at, so they may be NaN). Cheapest on the CPU, whatever the device of the tile.
        key_assignment: ``[B, kv_len]`` int64, block of each key, -1 for none.
        weights: ``[B, rows]`` factor of each row; 1 when left out.

    Returns:
        ``sums``.

    Raises:
        BlockError: The shapes do not fit each other.
    """
    _check_shapes(sums, probabilities, query_assignment, key_assignment)
    batch, num_heads, rows, kv_len = probabilities.shape
    if probabilities.numel() == 0:
        return sums
    split_heads = sums.shape[1] == num_heads
    columns = torch.where(key_assignment < 0, sums.shape[3], key_assignment).to(sums.device)[:, None, None]
    scratch = max(batch * rows * kv_len, _MIN_SCRATCH)
    # A result row costs its float32 sum and its copy in the dtype of `sums`: three float32 with float64.
    result_rows = max(1, scratch // (batch * kv_len * (1 + sums.element_size() // 4)))
    for start, stop, blocks in _row_slices(query_assignment, min(_MAX_BLOCKS, result_rows)):
        member = _membership(query_assignment[:, start:stop], blocks)
        if weights is not None:
            member = member * weights[:, None, start:stop].to(member)
        index = torch.tensor(blocks, device=sums.device)
        step = max(1, min(result_rows // len(blocks), num_heads))
        for head in range(0, num_heads, step):
            tile = probabilities[:, head : head + step, start:stop]
            part = _tile_mass(tile, member, columns, sums, scratch, split_heads)
            target = sums[:, head : head + step] if split_heads else sums
            target.index_add_(2, index, part)
    return sums


def add_run(sums: Tensor, rows: Tensor, columns: Tensor, weights: Tensor | None = None) -> None:
    """Add rows that all belong to one query block, heads summed or apart: the common case, and the fast one.

    Args:
        sums: float64 ``[1 or H, key_blocks + 1]``, a view of the block's row; the last bin is "no block".
        rows: ``[H, rows, kv_len]``, any float dtype.
        columns: int64 ``[kv_len]``, the bin of each key.
        weights: ``[H, rows]`` factors; 1 when left out.
    """
    num_heads, count, kv_len = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    weights = rows.new_ones(num_heads, count, dtype=dtype) if weights is None else weights.to(dtype)
    rows = rows.to(dtype)
    if sums.shape[0] == 1:
        summed = weights.reshape(1, -1) @ rows.reshape(-1, kv_len)
    else:
        summed = torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
    sums.scatter_add_(1, columns.expand(summed.shape), like(sums, summed))


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


def _tile_mass(
    tile: Tensor, member: Tensor, columns: Tensor, sums: Tensor, scratch: int, split_heads: bool
) -> Tensor:
    """``[B, heads or 1, blocks, key_blocks]``: the block sums of some rows of some heads."""
    part = _gather_columns(_sum_rows(tile, member, split_heads), columns, sums)
    if not torch.isfinite(part).all():
        # 0 x NaN is NaN: a padding row that is NaN after softmax would spoil every block of the tile.
        part = _gather_columns(_sum_rows_apart(tile, member, split_heads), columns, sums)
    return part


def _sum_rows(tile: Tensor, member: Tensor, split_heads: bool) -> Tensor:
    """``[B, heads or 1, blocks, kv_len]`` float32 or float64: rows of one block summed."""
    dtype = torch.promote_types(tile.dtype, torch.float32)
    member = member.to(tile.device, dtype)[:, None]
    if tile.dtype == dtype:
        summed = torch.matmul(member, tile)
        return summed if split_heads or summed.shape[1] == 1 else summed.sum(1, keepdim=True)
    # A half-precision product would round its result to half precision; columns are cast a strip at a time,
    # small enough to stay in the cache.
    batch, heads, rows, kv_len = tile.shape
    summed = tile.new_empty(batch, heads if split_heads else 1, member.shape[2], kv_len, dtype=dtype)
    strip = max(1, min(kv_len, _MIN_SCRATCH // (batch * heads * rows)))
    for left in range(0, kv_len, strip):
        product = torch.matmul(member, tile[..., left : left + strip].to(dtype))
        summed[..., left : left + strip] = product if split_heads else product.sum(1, keepdim=True)
    return summed


def _sum_rows_apart(tile: Tensor, member: Tensor, split_heads: bool) -> Tensor:
    """As ``_sum_rows``, but block by block, so that NaN in a row outside a block does not reach it."""
    batch, heads, _, kv_len = tile.shape
    dtype = torch.promote_types(tile.dtype, torch.float32)
    member = member.to(tile.device, dtype)
    summed = tile.new_zeros(batch, heads if split_heads else 1, member.shape[1], kv_len, dtype=dtype)
    for head in range(heads):
        for block in range(member.shape[1]):
            weight = member[:, block, :, None]
            rows = tile[:, head].to(dtype, copy=True).masked_fill_(weight == 0, 0)
            summed[:, head if split_heads else 0, block] += rows.mul_(weight).sum(1)
    return summed


def like(sums: Tensor, values: Tensor) -> Tensor:
    """``values`` with the device and dtype of ``sums``; moved first, since some devices have no float64 (MPS)."""
    return values.to(sums.device).to(sums.dtype)


def _gather_columns(summed: Tensor, columns: Tensor, sums: Tensor) -> Tensor:
    """Add the columns of ``summed`` into key blocks, in the dtype of ``sums``; the last bin is "no block"."""
    bins = sums.new_zeros(*summed.shape[:3], sums.shape[3] + 1)
    bins.scatter_add_(3, columns.expand(summed.shape), like(sums, summed))
    return bins[..., :-1]


def _row_slices(query_assignment: Tensor, max_blocks: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut rows into slices ``(start, stop, blocks)`` that touch few blocks; rows in no block are left out."""
    rows = query_assignment.shape[1]
    changes = (query_assignment[:, 1:] != query_assignment[:, :-1]).any(0).nonzero().flatten() + 1
    cuts = sorted({0, *range(0, rows, _MAX_ROWS), *changes.tolist()})
    start, seen = 0, set()
    for row, column in zip(cuts, query_assignment[:, cuts].T.tolist(), strict=True):
        blocks = set(column) - {-1}
        limit = 1 if row - start >= _LONG_RUN else max_blocks
        full = row - start >= _MAX_ROWS or len(seen | blocks) > limit
        if seen and (full or not blocks):
            yield start, row, sorted(seen)
            seen = set()
        if not seen:
            start = row
        seen |= blocks
    if seen:
        yield start, rows, sorted(seen)


def _membership(assignment: Tensor, blocks: list[int]) -> Tensor:
    """``[B, blocks, rows]`` float32: 1 where the row belongs to the block."""
    index = torch.tensor(blocks, device=assignment.device)
    return (assignment[:, None, :] == index[None, :, None]).float()


def _check_shapes(sums: Tensor, probabilities: Tensor, query: Tensor, key: Tensor) -> None:
    batch, num_heads, rows, kv_len = probabilities.shape
    fits = (
        query.shape == (batch, rows)
        and key.shape == (batch, kv_len)
        and sums.ndim == 4
        and sums.shape[0] == batch
        and sums.shape[1] in (1, num_heads)
    )
    if not fits:
        raise BlockError(
            f"probabilities {list(probabilities.shape)} do not fit sums {list(sums.shape)}, query assignment "
            f"{list(query.shape)} and key assignment {list(key.shape)}; accepted are [B, H, rows, kv_len], "
            "[B, 1 or H, query_blocks, key_blocks], [B, rows] and [B, kv_len]."
        )
