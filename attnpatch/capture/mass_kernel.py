"""The Triton kernel behind ``fused_mass``: block mass from query, key and logsumexp. Imported where Triton is used only.

With a row's logsumexp its probabilities are ``exp(q k - lse)``, as FlashAttention's backward pass has it (Dao et al.
2022): no second look at a row, nothing as wide as the keys. A tile lies in one query block and one key block, so all that
is left of it is one number.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOLEAN, ADDITIVE = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _keep(mask_at, stride_row, stride_key, rows, is_row, keys, is_key, MASK: tl.constexpr):
    """``[ROWS, KEYS]``: the mask of a tile, and which of its elements may be looked at."""
    # An N x N mask has more elements than 32 bits count.
    at = rows.to(tl.int64)[:, None] * stride_row + keys.to(tl.int64)[None, :] * stride_key
    mask = tl.load(mask_at + at, mask=is_row[:, None] & is_key[None, :], other=0)
    if MASK == BOOLEAN:
        return mask, mask != 0
    return mask, mask != float("-inf")


@triton.jit
def _tile_sum(
    query, lse, key_at, mask_at, key_order, rows, is_row, start, count, scale,
    stride_key, stride_dim, stride_mask_row, stride_mask_key,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ORDERED: tl.constexpr,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The probabilities of a tile in one number. ``WHOLE``: all its rows may look at all its keys."""
    columns = tl.arange(0, KEYS)
    is_key = columns < count
    keys = start + columns
    if ORDERED:
        keys = tl.load(key_order + keys, mask=is_key, other=0)
    dims = tl.arange(0, WIDTH)
    at = key_at + keys[None, :] * stride_key + dims[:, None] * stride_dim
    if WHOLE and HEAD_DIM == WIDTH:
        key = tl.load(at)
    else:
        key = tl.load(at, mask=is_key[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    powers = tl.dot(query, key, input_precision=PRECISION) * scale - lse[:, None]
    if WHOLE:
        return tl.sum(tl.sum(tl.exp2(powers), 1), 0)
    keep = is_row[:, None] & is_key[None, :]
    if IS_CAUSAL:
        keep = keep & (keys[None, :] <= rows[:, None])
    if MASK != NO_MASK:
        mask, seen = _keep(mask_at, stride_mask_row, stride_mask_key, rows, is_row, keys, is_key, MASK)
        keep = keep & seen
        if MASK == ADDITIVE:
            powers += mask.to(tl.float32) * LOG2_E
    return tl.sum(tl.sum(tl.where(keep, tl.exp2(powers), 0.0), 1), 0)


@triton.jit
def sum_tiles(
    query, key, lse, mask, out, query_tiles, key_tiles, query_order, key_order, heads,
    q_len, kv_len, num_query_tiles, num_key_tiles, num_places, head_count, group, scale,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, l_batch, l_head, l_row,
    m_batch, m_head, m_row, m_key,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr, QUERY_ORDERED: tl.constexpr, KEY_ORDERED: tl.constexpr, EVEN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_OF_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile and ``KEY_TILES`` key tiles, all heads one after the other: no atomics, the same sums every time."""
    query_tile, place = tl.program_id(0), tl.program_id(2)
    first_tile = tl.program_id(1) * KEY_TILES
    b = (place // num_places).to(tl.int64)
    at = query_tiles + (b * num_query_tiles + query_tile) * 2
    row_start, row_count = tl.load(at), tl.load(at + 1)
    columns = tl.arange(0, ROWS)
    is_row = columns < row_count
    rows = row_start + columns
    if QUERY_ORDERED:
        rows = tl.load(query_order + b * q_len + rows, mask=is_row, other=0)

    tiles = tl.arange(0, KEY_TILES)
    is_tile = first_tile + tiles < num_key_tiles
    key_tile_at = key_tiles + (b * num_key_tiles + first_tile) * 2
    starts = tl.load(key_tile_at + tiles * 2, mask=is_tile, other=0)
    counts = tl.load(key_tile_at + tiles * 2 + 1, mask=is_tile, other=0)
    # Tiles come in the order of their keys: those that are seen are the first ones, those without a mask before them.
    is_seen = (counts > 0) & (row_count > 0)
    IN_ORDER: tl.constexpr = not QUERY_ORDERED and not KEY_ORDERED
    if EVEN and MASK == NO_MASK and (IN_ORDER or not IS_CAUSAL):
        is_whole = is_seen & (counts == KEYS)
    else:
        is_whole = counts < 0
    if IS_CAUSAL and IN_ORDER:
        is_whole = is_whole & (starts + KEYS - 1 <= row_start)
        is_seen = is_seen & (starts <= row_start + row_count - 1)
    seen_tiles = tl.sum(is_seen.to(tl.int32), 0)
    whole_tiles = tl.sum(is_whole.to(tl.int32), 0)
    first_key = tl.load(key_tile_at)
    key_order_at = key_order + b * kv_len

    # A mask that heads share says once for all of them which tiles nobody looks at.
    is_open = tl.zeros([KEY_TILES], tl.int32) + 1
    if MASK != NO_MASK and not MASK_OF_HEADS:
        is_open = tl.zeros([KEY_TILES], tl.int32)
        for tile in range(seen_tiles):
            start, count = tl.load(key_tile_at + tile * 2), tl.load(key_tile_at + tile * 2 + 1)
            of_key = tl.arange(0, KEYS)
            keys = start + of_key
            if KEY_ORDERED:
                keys = tl.load(key_order_at + keys, mask=of_key < count, other=0)
            _, keep = _keep(mask + b * m_batch, m_row, m_key, rows, is_row, keys, of_key < count, MASK)
            keep = keep & is_row[:, None] & (of_key < count)[None, :]
            is_open += tl.where(tiles == tile, tl.max(tl.max(keep.to(tl.int32), 1), 0), 0)

    sums = tl.zeros([KEY_TILES], tl.float32)
    dims = tl.arange(0, WIDTH)
    first_head = tl.load(heads + place % num_places).to(tl.int64)
    for number in range(head_count):
        head = first_head + number
        query_at = query + b * q_batch + head * q_head
        queries = tl.load(
            query_at + rows[:, None] * q_row + dims[None, :] * q_dim,
            mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        lse_at = lse + b * l_batch + head * l_head
        of_rows = tl.load(lse_at + rows * l_row, mask=is_row, other=float("inf"))
        # A row that may look at nothing has no finite logsumexp; it puts no mass anywhere.
        of_rows = tl.where((of_rows > float("-inf")) & is_row, of_rows * LOG2_E, float("inf"))
        key_at = key + b * k_batch + (head // group) * k_head
        mask_at = mask + b * m_batch + head * m_head
        for tile in range(whole_tiles):
            found = _tile_sum(
                queries, of_rows, key_at, mask_at, key_order_at, rows, is_row, first_key + tile * KEYS, KEYS, scale,
                k_row, k_dim, m_row, m_key, HEAD_DIM, WIDTH, KEYS, KEY_ORDERED, True, IS_CAUSAL, MASK,
                PRECISION,
            )  # fmt: skip
            sums += tl.where(tiles == tile, found, 0.0)
        for tile in range(whole_tiles, seen_tiles):
            go_on = True
            if MASK != NO_MASK and not MASK_OF_HEADS:
                go_on = tl.sum(tl.where(tiles == tile, is_open, 0), 0) > 0
            if go_on:
                start, count = tl.load(key_tile_at + tile * 2), tl.load(key_tile_at + tile * 2 + 1)
                found = _tile_sum(
                    queries, of_rows, key_at, mask_at, key_order_at, rows, is_row, start, count, scale,
                    k_row, k_dim, m_row, m_key, HEAD_DIM, WIDTH, KEYS, KEY_ORDERED, False, IS_CAUSAL, MASK,
                    PRECISION,
                )  # fmt: skip
                sums += tl.where(tiles == tile, found, 0.0)
    out_at = out + (place.to(tl.int64) * num_query_tiles + query_tile) * num_key_tiles + first_tile
    tl.store(out_at + tiles, sums, mask=is_tile)
