"""The Triton kernel behind ``fused_sums.py``: block sums from query, key and logsumexp. This file is imported only
where Triton is installed.

With a row's logsumexp its probabilities are ``exp(q k - lse)``, as in FlashAttention's backward pass (Dao et al. 2022).
So each row is read once, and nothing is as wide as the keys. A tile lies in one query block and one key block, so it is
reduced to one number.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOLEAN, ADDITIVE = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _load_mask(mask_at, stride_row, stride_key, rows, keys):
    """The mask of a tile, ``[ROWS, KEYS]``; 64-bit offsets, since an N x N mask may exceed 32 bits."""
    at = rows.to(tl.int64)[:, None] * stride_row + keys.to(tl.int64)[None, :] * stride_key
    return tl.load(mask_at + at)


@triton.jit
def _is_open(mask, MASK: tl.constexpr):
    """True where a mask lets a row see a key."""
    if MASK == BOOLEAN:
        return mask != 0
    return mask != float("-inf")


@triton.jit
def _keys_of(key_order, start, count, KEYS: tl.constexpr, ORDERED: tl.constexpr):
    """The tokens of a tile, padded with its first one, and which of them are real."""
    columns = tl.arange(0, KEYS)
    is_key = columns < count
    keys = start + tl.where(is_key, columns, 0)
    if ORDERED:
        keys = tl.load(key_order + keys)
    return keys, is_key


@triton.jit
def _tile_sum(
    query, lse, key_at, mask_at, rows, keys, is_key, scale, stride_key, stride_dim, stride_mask_row, stride_mask_key,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of a tile's probabilities. ``WHOLE``: all its rows see all its keys."""
    dims = tl.arange(0, WIDTH)
    at = key_at + keys[None, :] * stride_key + dims[:, None] * stride_dim
    if HEAD_DIM == WIDTH:
        key = tl.load(at)
    else:
        key = tl.load(at, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    powers = tl.dot(query, key, input_precision=PRECISION) * scale - lse[:, None]
    if WHOLE:
        return tl.sum(tl.exp2(powers))
    if IS_CAUSAL:
        # One comparison for both conditions: padding keys get a position behind every row.
        keep = tl.where(is_key, keys, 2147483647)[None, :] <= rows[:, None]
    else:
        keep = is_key[None, :]
    if MASK != NO_MASK:
        mask = _load_mask(mask_at, stride_mask_row, stride_mask_key, rows, keys)
        keep = keep & _is_open(mask, MASK)
        if MASK == ADDITIVE:
            powers += mask.to(tl.float32) * LOG2_E
    return tl.sum(tl.where(keep, tl.exp2(powers), 0.0))


# Lengths differ from call to call. If Triton compiled again for each that is 1 or a multiple of 16, a varied workload
# would take a dozen kernels.
LENGTHS = ["q_len", "kv_len", "num_query_tiles", "num_key_tiles", "num_places", "l_batch", "l_head"]


@triton.jit(do_not_specialize=LENGTHS)
def sum_tiles(
    query, key, lse, mask, out, query_tiles, key_tiles, query_order, key_order, heads,
    q_len, kv_len, num_query_tiles, num_key_tiles, num_places, head_count, group, scale,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, l_batch, l_head, l_row,
    m_batch, m_head, m_row, m_key,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr, QUERY_ORDERED: tl.constexpr, KEY_ORDERED: tl.constexpr, FULL_FIRST: tl.constexpr,
    EVEN: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_OF_HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile and ``KEY_TILES`` key tiles, all heads in sequence: no atomics, so the sums are deterministic.

    ``FULL_FIRST``: full key tiles come before the others. ``EVEN``: besides, each of them begins where the previous one
    ends. Full tiles come in the order of their keys; so do all tiles without ``FULL_FIRST``.
    """
    query_tile, place = tl.program_id(0), tl.program_id(2)
    first_tile = tl.program_id(1) * KEY_TILES
    b = (place // num_places).to(tl.int64)
    at = query_tiles + (b * num_query_tiles + query_tile) * 2
    row_start, row_count = tl.load(at), tl.load(at + 1)
    rows, is_row = _keys_of(query_order + b * q_len, row_start, row_count, ROWS, QUERY_ORDERED)

    tiles = tl.arange(0, KEY_TILES)
    is_tile = first_tile + tiles < num_key_tiles
    key_tile_at = key_tiles + (b * num_key_tiles + first_tile) * 2
    starts = tl.load(key_tile_at + tiles * 2, mask=is_tile, other=0)
    counts = tl.load(key_tile_at + tiles * 2 + 1, mask=is_tile, other=0)
    key_order_at = key_order + b * kv_len
    IN_ORDER: tl.constexpr = not QUERY_ORDERED and not KEY_ORDERED

    # Whole tiles come first and missing tiles last. Tiles between are computed with masking, or skipped if no row sees
    # them.
    is_seen = (counts > 0) & (row_count > 0)
    is_whole = is_seen & (counts == KEYS)
    PASSED_OVER: tl.constexpr = (IS_CAUSAL and IN_ORDER and FULL_FIRST and not EVEN) or (
        MASK != NO_MASK and not MASK_OF_HEADS
    )
    there = tl.sum(is_seen.to(tl.int32), 0)
    if IS_CAUSAL and IN_ORDER:
        is_whole = is_whole & (starts + KEYS - 1 <= row_start)
        is_seen = is_seen & (starts <= row_start + row_count - 1)
        if not PASSED_OVER:
            there = tl.sum(is_seen.to(tl.int32), 0)
    whole = tl.sum(is_whole.to(tl.int32), 0)
    if not FULL_FIRST or MASK != NO_MASK or (IS_CAUSAL and not IN_ORDER):
        whole = there * 0
    is_looked_at = is_seen.to(tl.int32)
    if MASK != NO_MASK and not MASK_OF_HEADS:
        # Heads share the mask, so it is read once for all of them.
        is_looked_at = tl.zeros([KEY_TILES], tl.int32)
        for tile in range(there):
            start, count = tl.load(key_tile_at + tile * 2), tl.load(key_tile_at + tile * 2 + 1)
            keys, is_key = _keys_of(key_order_at, start, count, KEYS, KEY_ORDERED)
            opened = _is_open(_load_mask(mask + b * m_batch, m_row, m_key, rows, keys), MASK)
            is_looked_at += tl.where(tiles == tile, tl.max(tl.max(opened.to(tl.int32), 1), 0), 0)

    sums = tl.zeros([KEY_TILES], tl.float32)
    dims = tl.arange(0, WIDTH)
    first_key = tl.load(key_tile_at)
    first_head = tl.load(heads + place % num_places).to(tl.int64)
    for number in range(head_count):
        head = first_head + number
        query_at = query + b * q_batch + head * q_head + rows[:, None] * q_row + dims[None, :] * q_dim
        queries = tl.load(query_at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        of_rows = tl.load(lse + b * l_batch + head * l_head + rows * l_row)
        # A row that sees no key has no finite logsumexp; it gets no probabilities, like padding.
        of_rows = tl.where((of_rows > float("-inf")) & is_row, of_rows * LOG2_E, float("inf"))
        key_at = key + b * k_batch + (head // group) * k_head
        mask_at = mask + b * m_batch + head * m_head
        for tile in range(whole):
            if EVEN:
                start = first_key + tile * KEYS
            else:
                start = tl.load(key_tile_at + tile * 2)
            keys, is_key = _keys_of(key_order_at, start, KEYS, KEYS, KEY_ORDERED)
            found = _tile_sum(
                queries, of_rows, key_at, mask_at, rows, keys, is_key, scale, k_row, k_dim, m_row, m_key,
                HEAD_DIM, WIDTH, True, IS_CAUSAL, MASK, PRECISION,
            )  # fmt: skip
            sums += tl.where(tiles == tile, found, 0.0)
        for tile in range(whole, there):
            go_on = True
            if PASSED_OVER:
                go_on = tl.sum(tl.where(tiles == tile, is_looked_at, 0), 0) > 0
            if go_on:
                start, count = tl.load(key_tile_at + tile * 2), tl.load(key_tile_at + tile * 2 + 1)
                keys, is_key = _keys_of(key_order_at, start, count, KEYS, KEY_ORDERED)
                found = _tile_sum(
                    queries, of_rows, key_at, mask_at, rows, keys, is_key, scale, k_row, k_dim, m_row, m_key,
                    HEAD_DIM, WIDTH, False, IS_CAUSAL, MASK, PRECISION,
                )  # fmt: skip
                sums += tl.where(tiles == tile, found, 0.0)
    out_at = out + (place.to(tl.int64) * num_query_tiles + query_tile) * num_key_tiles + first_tile
    tl.store(out_at + tiles, sums, mask=is_tile)
